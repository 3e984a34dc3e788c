/* worker_calls.c: see worker_calls.h. Loop thread only. */
#include "daemon/worker_calls.h"

#include <stdlib.h>
#include <string.h>

enum { PATIENCE_MS = 30000 }; /* how long a call waits for a worker */

struct worker_call {
    struct worker_calls *calls;
    struct worker_call *next, *previous;
    enum frame_type type;
    json_t *payload;       /* NULL once it was sent */
    struct worker *worker; /* NULL while it waits */
    uint64_t id, deadline_ms;
    worker_answer on_frame;
    void *arg;
};

struct worker_calls {
    uv_loop_t *loop;
    struct scheduler *scheduler;
    struct worker_call *first, *last; /* oldest first */
    size_t count, n_waiting, limit;
    bool draining;
    uv_timer_t timer; /* runs while something waits */
};

struct worker_calls *worker_calls_create(uv_loop_t *loop, struct scheduler *scheduler, size_t limit)
{
    struct worker_calls *calls = calloc(1, sizeof *calls);
    if (!calls)
        return NULL;
    calls->loop = loop;
    calls->scheduler = scheduler;
    calls->limit = limit;
    uv_timer_init(loop, &calls->timer);
    calls->timer.data = calls;
    return calls;
}

static void call_free(struct worker_call *call)
{
    struct worker_calls *calls = call->calls;
    if (call->previous)
        call->previous->next = call->next;
    else
        calls->first = call->next;
    if (call->next)
        call->next->previous = call->previous;
    else
        calls->last = call->previous;
    calls->count--;
    if (!call->worker)
        calls->n_waiting--;
    json_decref(call->payload);
    free(call);
}

static void on_timer_closed(uv_handle_t *handle)
{
    free(handle->data);
}

void worker_calls_free(struct worker_calls *calls)
{
    if (!calls)
        return;
    while (calls->first)
        call_free(calls->first);
    uv_close((uv_handle_t *)&calls->timer, on_timer_closed);
}

static void on_frame(void *arg, enum frame_type type, const json_t *payload)
{
    struct worker_call *call = arg;
    worker_answer answer = call->on_frame;
    void *answer_arg = call->arg;
    if (type != FRAME_CHUNK)
        call_free(call);
    answer(answer_arg, type, payload);
}

/* Fails the calls that wait: those whose patience is over, or all. */
static void fail_waiting(struct worker_calls *calls, uint64_t deadline_ms, const char *reason)
{
    struct error error;
    error_set(&error, ERROR_BUSY, "%s", reason);
    json_t *payload = frame_error_payload(&error);
    for (struct worker_call *call = calls->first, *next; call; call = next) {
        next = call->next;
        if (!call->worker && call->deadline_ms <= deadline_ms)
            on_frame(call, FRAME_FAILED, payload);
    }
    json_decref(payload);
}

static void on_timer(uv_timer_t *timer)
{
    struct worker_calls *calls = timer->data;
    worker_calls_go(calls);
    fail_waiting(calls, uv_now(calls->loop), "no worker is up");
    if (!calls->n_waiting)
        uv_timer_stop(&calls->timer);
}

static void call_go(struct worker_call *call)
{
    struct worker *worker = scheduler_pick(call->calls->scheduler);
    uint64_t id = worker ? worker_request(worker, call->type, json_incref(call->payload), on_frame, call) : 0;
    if (!id)
        return;
    call->worker = worker;
    call->id = id;
    json_decref(call->payload);
    call->payload = NULL;
    call->calls->n_waiting--;
}

void worker_calls_go(struct worker_calls *calls)
{
    for (struct worker_call *call = calls->first, *next; call && calls->n_waiting; call = next) {
        next = call->next;
        if (!call->worker)
            call_go(call);
    }
}

void worker_calls_drain(struct worker_calls *calls)
{
    calls->draining = true;
    fail_waiting(calls, UINT64_MAX, "the server is shutting down");
}

size_t worker_calls_waiting(const struct worker_calls *calls)
{
    return calls->n_waiting;
}

struct worker_call *worker_calls_begin(struct worker_calls *calls, enum frame_type type, json_t *payload,
                                       worker_answer on_answer, void *arg, struct problem *problem)
{
    if (calls->count >= calls->limit || calls->draining) {
        json_decref(payload);
        problem_set(problem, calls->draining ? 503 : 429,
                    calls->draining ? "shutting_down" : "too_many_requests", NULL,
                    calls->draining ? "The server is shutting down." : "Too many requests are waiting.");
        return NULL;
    }
    struct worker_call *call = payload ? calloc(1, sizeof *call) : NULL;
    if (!call) {
        json_decref(payload);
        problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
        return NULL;
    }
    *call = (struct worker_call){.calls = calls,
                                 .previous = calls->last,
                                 .type = type,
                                 .payload = payload,
                                 .deadline_ms = uv_now(calls->loop) + PATIENCE_MS,
                                 .on_frame = on_answer,
                                 .arg = arg};
    if (calls->last)
        calls->last->next = call;
    else
        calls->first = call;
    calls->last = call;
    calls->count++;
    calls->n_waiting++;
    call_go(call);
    if (calls->n_waiting && !uv_is_active((uv_handle_t *)&calls->timer))
        uv_timer_start(&calls->timer, on_timer, 100, 100);
    return call;
}

void worker_call_cancel(struct worker_call *call)
{
    if (call->worker)
        worker_request_cancel(call->worker, call->id);
    call_free(call);
}

void worker_calls_problem(const json_t *failed, struct problem *problem)
{
    static const struct {
        int code, status;
        const char *name;
    } table[] = {
        {ERROR_INVALID, 400, "invalid_value"},
        {ERROR_NOT_FOUND, 404, "not_found"},
        {ERROR_UNSUPPORTED, 400, "unsupported"},
        {ERROR_CORRUPT, 500, "corrupt_model"},
        {ERROR_IO, 500, "io_error"},
        {ERROR_NO_MEMORY, 503, "out_of_memory"},
        {ERROR_BUSY, 503, "not_ready"},
        {ERROR_DEVICE, 503, "worker_lost"},
        {ERROR_CANCELLED, 503, "request_stopped"},
        {ERROR_INTERNAL, 500, "internal_error"},
    };
    const char *name = json_string_value(json_object_get(failed, "code"));
    const char *message = json_string_value(json_object_get(failed, "message"));
    const char *param = json_string_value(json_object_get(failed, "param"));
    int code = error_code_from_name(name ? name : "");
    size_t i = 0;
    while (table[i].code != code && i + 1 < sizeof table / sizeof *table)
        i++;
    problem_set(problem, table[i].status, table[i].name, param, "%s",
                message ? message : "The worker failed.");
}
