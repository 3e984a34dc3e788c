/* handlers_completions.c: /v1/completions and /v1/chat/completions. Loop thread only.
 *
 * A request becomes one call to a worker. Its chunks are collected into one answer, or passed on as events. A
 * stream's headers go out with its first event, so that whatever is wrong before it is an ordinary error; what
 * goes wrong later is an error event. */
#include "daemon/handlers.h"

#include "api/completion.h"
#include "daemon/reply.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

static const struct completion_limits limits = {
    .max_prompts = 1024, .max_choices = 1024, .max_tokens = 1 << 20, .max_stop = 256};

struct generation {
    struct server *server;
    struct http_request *request;
    struct worker_call *call;
    struct completion *completion;
    bool stream, begun;
    uint64_t started, last_chunk; /* nanoseconds; last_chunk 0 = none yet */
};

/* ---- which model ---- */

static json_t *folder(const struct model_entry *entry)
{
    return json_pack("{s:s, s:s}", "id", entry->resource.id, "path", entry->path);
}

int completions_resolve(struct server *server, const char *model, const char *adapter, json_t **ret_model,
                        json_t **ret_adapter, struct problem *problem)
{
    const struct model_entry *named =
        *model ? registry_find(server->registry, model) : registry_default(server->registry);
    if (!named && !*model)
        return problem_set(problem, 400, "missing_parameter", "model",
                           "model: is required, because there is no default model.");
    if (!named)
        return problem_set(problem, 404, "model_not_found", "model", "There is no model '%s'.", model);
    const struct model_entry *tuned = named->is_base ? NULL : named;
    const struct model_entry *base = named->is_base ? named : registry_find(server->registry, named->base);
    if (!base)
        return problem_set(problem, 404, "model_not_found", "model",
                           "The base of '%s', '%s', is not here any more.", model, named->base);
    if (*adapter) {
        const struct model_entry *chosen = registry_find(server->registry, adapter);
        if (!chosen || chosen->is_base)
            return problem_set(problem, 404, "model_not_found", "adapter", "There is no adapter '%s'.",
                               adapter);
        if (strcmp(chosen->base, base->resource.id) || (tuned && tuned != chosen))
            return problem_set(problem, 400, "invalid_value", "adapter",
                               "adapter: '%s' is an adapter of '%s'.", adapter, chosen->base);
        tuned = chosen;
    }
    json_t *base_json = folder(base), *tuned_json = tuned ? folder(tuned) : json_null();
    if (!base_json || !tuned_json) {
        json_decref(base_json);
        json_decref(tuned_json);
        return problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    }
    *ret_model = base_json;
    *ret_adapter = tuned_json;
    return 0;
}

/* ---- the answer ---- */

static void generation_free(struct generation *generation)
{
    completion_free(generation->completion);
    free(generation);
}

static void on_client_gone(struct http_request *request)
{
    struct generation *generation = request->context;
    reply_forget(request);
    worker_call_cancel(generation->call);
    generation_free(generation);
}

/* The worker's call is over: say what went wrong. */
static void generation_fail(struct generation *generation, const struct problem *problem)
{
    struct http_request *request = generation->request;
    if (generation->begun) {
        char *event = completion_error_event(problem);
        if (!http_stream_write(request, event ? event : "", event ? strlen(event) : 0))
            http_stream_end(request);
        free(event);
    } else {
        reply_problem(request, problem);
    }
    generation_free(generation);
}

/* What is wrong is our doing: stop the worker first. */
static void generation_abort(struct generation *generation)
{
    struct problem problem;
    worker_call_cancel(generation->call);
    problem_set(&problem, 500, "internal_error", NULL, "The worker's answer could not be encoded.");
    generation_fail(generation, &problem);
}

/* Returns -1 when the request is gone. */
static int generation_send(struct generation *generation, const char *events)
{
    if (!generation->begun) {
        generation->begun = true;
        http_stream_begin(generation->request);
    }
    return http_stream_write(generation->request, events, strlen(events));
}

static void on_chunk(struct generation *generation, const json_t *chunk)
{
    struct metrics *metrics = generation->server->metrics;
    uint64_t now = uv_hrtime(), since = generation->last_chunk ? generation->last_chunk : generation->started;
    char *events = NULL;
    metrics_observe(metrics,
                    generation->last_chunk ? HISTOGRAM_INTER_TOKEN_LATENCY : HISTOGRAM_TIME_TO_FIRST_TOKEN,
                    (double)(now - since) / 1e9);
    generation->last_chunk = now;
    if (completion_add(generation->completion, chunk, generation->stream ? &events : NULL)) {
        generation_abort(generation);
        return;
    }
    if (events && *events && generation_send(generation, events)) {
        worker_call_cancel(generation->call);
        generation_free(generation);
    }
    free(events);
}

static void on_done(struct generation *generation, const json_t *done)
{
    struct metrics *metrics = generation->server->metrics;
    int64_t prompt_tokens = json_integer_value(json_object_get(done, "prompt_tokens"));
    int64_t completion_tokens = json_integer_value(json_object_get(done, "completion_tokens"));
    metrics_add(metrics, COUNTER_PROMPT_TOKENS, (double)prompt_tokens);
    metrics_add(metrics, COUNTER_GENERATION_TOKENS, (double)completion_tokens);
    metrics_observe(metrics, HISTOGRAM_REQUEST_LATENCY, (double)(uv_hrtime() - generation->started) / 1e9);
    char *text = completion_finish(generation->completion, prompt_tokens, completion_tokens);
    if (!text) {
        struct problem problem;
        problem_set(&problem, 500, "internal_error", NULL, "The worker's answer is not complete.");
        generation_fail(generation, &problem);
        return;
    }
    if (generation->stream) {
        if (!generation_send(generation, text))
            http_stream_end(generation->request);
        free(text);
    } else {
        reply_text(generation->request, 200, text);
    }
    generation_free(generation);
}

static void on_frame(void *arg, enum frame_type type, const json_t *payload)
{
    struct generation *generation = arg;
    struct problem problem;
    switch (type) {
    case FRAME_CHUNK:
        on_chunk(generation, payload);
        break;
    case FRAME_DONE:
        on_done(generation, payload);
        break;
    case FRAME_FAILED:
        worker_calls_problem(payload, &problem);
        generation_fail(generation, &problem);
        break;
    default:
        problem_set(&problem, 500, "internal_error", NULL,
                    "The worker answered with a frame of another kind.");
        generation_fail(generation, &problem);
        break;
    }
}

/* ---- the request ---- */

/* The COMPLETE payload; NULL with a problem. */
static json_t *make_payload(struct server *server, const struct http_request *request,
                            const struct completion_request *completion, struct problem *problem)
{
    json_t *model = NULL, *adapter = NULL;
    if (completions_resolve(server, completion->model, completion->adapter, &model, &adapter, problem))
        return NULL;
    json_t *work = json_incref(completion->work);
    if (json_object_set_new(work, "model", model) | json_object_set_new(work, "adapter", adapter) |
        json_object_set_new(work, "request_id", json_string(request->id))) {
        json_decref(work);
        problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
        return NULL;
    }
    return work;
}

static int generation_start(struct server *server, struct http_request *request,
                            const struct completion_request *completion, struct problem *problem)
{
    char id[ID_BYTES];
    const struct model_entry *standard = registry_default(server->registry);
    struct generation *generation = calloc(1, sizeof *generation);
    json_t *payload = make_payload(server, request, completion, problem);
    if (!payload || !generation) {
        json_decref(payload);
        free(generation);
        return payload ? problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.")
                       : -1;
    }
    generation->server = server;
    generation->request = request;
    generation->stream = completion->stream;
    generation->started = uv_hrtime();
    store_new_id(completion->chat ? "chatcmpl-" : "cmpl-", id);
    const char *model = completion->model[0] ? completion->model : standard ? standard->resource.id : "";
    generation->completion = completion_create(completion, id, model, (int64_t)time(NULL));
    if (!generation->completion) {
        json_decref(payload);
        generation_free(generation);
        return problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    }
    generation->call =
        worker_calls_begin(server->calls, FRAME_COMPLETE, payload, on_frame, generation, problem);
    if (!generation->call) {
        generation_free(generation);
        return -1;
    }
    if (completion->stream)
        reply_forget(request);
    request->context = generation;
    request->on_gone = on_client_gone;
    return 0;
}

static void complete(struct server *server, struct http_request *request, bool chat)
{
    struct completion_request completion = {0};
    struct problem problem;
    json_t *body = NULL;
    int status = body_decode(request->body, request->length, &body, &problem);
    if (!status)
        status = completion_request_decode(body, chat, &limits, &completion, &problem);
    json_decref(body);
    if (!status)
        status = generation_start(server, request, &completion, &problem);
    completion_request_free(&completion);
    if (status)
        reply_problem(request, &problem);
}

void handle_completion(struct server *server, struct http_request *request)
{
    complete(server, request, false);
}

void handle_chat_completion(struct server *server, struct http_request *request)
{
    complete(server, request, true);
}
