/* worker_pool.c: see worker_pool.h. Loop thread only.
 *
 * A slot (struct worker) lives as long as the pool and stands for a device; a process (struct process) lives
 * as long as its handles. There is one way out of life for a process: it has exited AND its stream was read
 * to the end (so that its last frames count). Whatever else goes wrong - a broken frame, a missing heartbeat
 * - only notes the reason and kills it. */
#include "daemon/worker_pool.h"

#include "daemon/devices.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKOFF_FIRST_MS = 100, BACKOFF_LAST_MS = 30000, LIVED_LONG_MS = 60000, WORKER_HEARTBEAT_MS = 1000 };

struct pending {
    uint64_t id;
    worker_answer on_frame; /* NULL once cancelled: the answers still to come are dropped */
    void *arg;
};

struct process {
    struct worker *worker;
    uv_process_t handle;
    uv_pipe_t stream;
    int open_handles;   /* of the two above */
    bool exited, ended; /* the process; its stream */
    int64_t exit_status;
    int exit_signal;
    uint64_t started_ms;
    uint64_t grace_ms;              /* how much longer than usual it may be silent, by its last STATUS */
    uint64_t watched_ms, silent_ms; /* the last look, and for how long nothing had come by then */
    struct buffer in;
    char chunk[65536];
    char reason[640]; /* why we killed it, in its own words if it had any; "" when we did not */
};

struct worker {
    struct worker_pool *pool;
    char device[32];
    struct process *process; /* NULL while none runs */
    bool up;
    uv_timer_t restart_timer, watch_timer;
    uint64_t backoff_ms;
    struct pending *pending; /* in order of id */
    size_t n_pending, pending_capacity;
    struct worker_info info;
};

struct worker_pool {
    uv_loop_t *loop;
    const struct config *config;
    struct worker_pool_callbacks callbacks;
    char executable[4096];
    uint64_t next_id;
    bool stopping;
    uv_timer_t stop_timer;
    void (*stopped)(void *arg);
    void *stopped_arg;
    int open_timers;
    size_t n_workers;
    struct worker workers[];
};

static void worker_start(struct worker *worker);

/* ---- the end of a process ---- */

static void on_handle_closed(uv_handle_t *handle)
{
    struct process *process = handle->data;
    if (--process->open_handles == 0) {
        buffer_free(&process->in);
        free(process);
    }
}

static void process_kill(struct process *process, const char *reason)
{
    if (!process->reason[0])
        snprintf(process->reason, sizeof process->reason, "%s", reason);
    if (!process->exited)
        uv_process_kill(&process->handle, SIGKILL);
}

static void on_restart(uv_timer_t *timer)
{
    worker_start(timer->data);
}

/* Every request in flight hears of it once. A callback may send new requests: they fail at once, since the
 * worker is not up. */
static void fail_pending(struct worker *worker, const char *reason)
{
    struct pending *pending = worker->pending;
    size_t count = worker->n_pending;
    worker->pending = NULL;
    worker->n_pending = worker->pending_capacity = 0;
    struct error error;
    error_set(&error, ERROR_DEVICE, "the worker of %s ended: %s", worker->device, reason);
    json_t *payload = frame_error_payload(&error);
    for (size_t i = 0; i < count; i++)
        if (pending[i].on_frame)
            pending[i].on_frame(pending[i].arg, FRAME_FAILED, payload);
    json_decref(payload);
    free(pending);
}

static void pool_check_stopped(struct worker_pool *pool)
{
    if (!pool->stopping || !pool->stopped)
        return;
    for (size_t i = 0; i < pool->n_workers; i++)
        if (pool->workers[i].process)
            return;
    uv_timer_stop(&pool->stop_timer);
    void (*stopped)(void *) = pool->stopped;
    pool->stopped = NULL;
    stopped(pool->stopped_arg);
}

static void process_finish(struct process *process)
{
    struct worker *worker = process->worker;
    struct worker_pool *pool = worker->pool;
    char reason[sizeof process->reason];
    if (process->reason[0])
        memcpy(reason, process->reason, sizeof reason);
    else if (process->exit_signal)
        snprintf(reason, sizeof reason, "killed by signal %d (%s)", process->exit_signal,
                 strsignal(process->exit_signal));
    else
        snprintf(reason, sizeof reason, "exited with status %lld", (long long)process->exit_status);

    bool lived_long = uv_now(pool->loop) - process->started_ms >= LIVED_LONG_MS;
    worker->process = NULL;
    worker->up = false;
    worker->info.up = false;
    worker->info.running = worker->info.waiting = 0;
    uv_timer_stop(&worker->watch_timer);
    uv_close((uv_handle_t *)&process->stream, on_handle_closed);
    uv_close((uv_handle_t *)&process->handle, on_handle_closed);

    fail_pending(worker, reason);
    pool->callbacks.down(pool->callbacks.arg, worker, reason);
    if (!pool->stopping) {
        if (lived_long)
            worker->backoff_ms = BACKOFF_FIRST_MS;
        uv_timer_start(&worker->restart_timer, on_restart, worker->backoff_ms, 0);
        worker->backoff_ms =
            worker->backoff_ms * 2 < BACKOFF_LAST_MS ? worker->backoff_ms * 2 : BACKOFF_LAST_MS;
        worker->info.restarts++;
    }
    pool_check_stopped(pool);
}

static void on_process_exit(uv_process_t *handle, int64_t status, int signal)
{
    struct process *process = handle->data;
    process->exited = true;
    process->exit_status = status;
    process->exit_signal = signal;
    if (process->ended)
        process_finish(process);
}

/* ---- frames in ---- */

static struct pending *pending_find(struct worker *worker, uint64_t id)
{
    size_t low = 0, high = worker->n_pending;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (worker->pending[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < worker->n_pending && worker->pending[low].id == id ? &worker->pending[low] : NULL;
}

static void pending_remove(struct worker *worker, struct pending *pending)
{
    size_t index = (size_t)(pending - worker->pending);
    memmove(pending, pending + 1, (worker->n_pending - index - 1) * sizeof *pending);
    worker->n_pending--;
}

static void read_memory(struct worker *worker, const json_t *payload)
{
    worker->info.total_bytes = json_integer_value(json_object_get(payload, "total_bytes"));
    worker->info.free_bytes = json_integer_value(json_object_get(payload, "free_bytes"));
}

static int on_hello(struct worker *worker, const json_t *payload)
{
    struct worker_pool *pool = worker->pool;
    if (json_integer_value(json_object_get(payload, "version")) != PROTOCOL_VERSION)
        return ERROR_CORRUPT;
    read_memory(worker, payload);
    worker->up = worker->info.up = true;
    json_t *configure = json_pack("{s:i,s:i,s:i}", "max_seqs", (int)pool->config->max_seqs, "prefill_tokens",
                                  512, "heartbeat_ms", WORKER_HEARTBEAT_MS);
    if (worker_send(worker, FRAME_CONFIGURE, configure))
        return ERROR_IO;
    pool->callbacks.up(pool->callbacks.arg, worker);
    return 0;
}

static int on_frame(struct worker *worker, const struct frame *frame)
{
    struct worker_pool *pool = worker->pool;
    if (frame->type == FRAME_FAULT) {
        const char *reason = json_string_value(json_object_get(frame->payload, "reason"));
        process_kill(worker->process, reason && *reason ? reason : "a fault without a reason");
        return 0; /* it was about to end: a driver that has lost its device may hang in that */
    }
    if (frame->type == FRAME_HELLO)
        return worker->up ? ERROR_CORRUPT : on_hello(worker, frame->payload);
    if (!worker->up)
        return ERROR_CORRUPT;
    if (frame->type == FRAME_STATUS) {
        json_int_t grace_ms = json_integer_value(json_object_get(frame->payload, "grace_ms"));
        worker->process->grace_ms = grace_ms > 0 ? (uint64_t)grace_ms : 0;
        read_memory(worker, frame->payload);
        worker->info.resident_bytes = json_integer_value(json_object_get(frame->payload, "resident_bytes"));
        worker->info.allocated_bytes = json_integer_value(json_object_get(frame->payload, "allocated_bytes"));
        worker->info.running = (int)json_integer_value(json_object_get(frame->payload, "running"));
        worker->info.waiting = (int)json_integer_value(json_object_get(frame->payload, "waiting"));
        return 0;
    }
    if (frame->id == 0) {
        pool->callbacks.job_frame(pool->callbacks.arg, worker, frame->type, frame->payload);
        return 0;
    }
    struct pending *pending = pending_find(worker, frame->id);
    if (!pending)
        return 0; /* cancelled, and over before the worker heard of it */
    struct pending copy = *pending;
    if (frame->type != FRAME_CHUNK)
        pending_remove(worker, pending);
    if (copy.on_frame)
        copy.on_frame(copy.arg, frame->type, frame->payload);
    return 0;
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *ret_buffer)
{
    (void)suggested;
    struct process *process = handle->data;
    *ret_buffer = uv_buf_init(process->chunk, sizeof process->chunk);
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *bytes)
{
    struct process *process = stream->data;
    if (n < 0) {
        uv_read_stop(stream);
        process->ended = true;
        if (process->exited)
            process_finish(process);
        return; /* a process that closed its stream and lives on is caught by the watch timer */
    }
    if (process->reason[0])
        return; /* already condemned: its frames no longer count */
    process->silent_ms = 0;
    buffer_append(&process->in, bytes->base, (size_t)n);
    if (process->in.failed) {
        process_kill(process, "the daemon has no memory for its frames");
        return;
    }
    for (;;) {
        struct frame frame;
        struct error error;
        int got = frame_decode(&process->in, &frame, &error);
        if (got == 0)
            return;
        int code = got < 0 ? got : on_frame(process->worker, &frame);
        if (got > 0)
            json_decref(frame.payload);
        if (code) {
            char reason[160];
            snprintf(reason, sizeof reason, "broke the protocol: %s",
                     got < 0 ? error.message : frame_type_name(frame.type));
            process_kill(process, reason);
            return;
        }
    }
}

/* ---- frames out ---- */

struct outgoing {
    uv_write_t request;
    struct buffer bytes;
};

static void on_written(uv_write_t *request, int status)
{
    (void)status; /* a broken stream shows on the reading side */
    struct outgoing *outgoing = request->data;
    buffer_free(&outgoing->bytes);
    free(outgoing);
}

static int send_frame(struct worker *worker, enum frame_type type, uint64_t id, json_t *payload)
{
    if (!worker->up) {
        json_decref(payload);
        return ERROR_IO;
    }
    struct outgoing *outgoing = calloc(1, sizeof *outgoing);
    if (!outgoing) {
        json_decref(payload);
        return ERROR_NO_MEMORY;
    }
    int code = frame_encode(type, id, payload, &outgoing->bytes);
    if (!code) {
        outgoing->request.data = outgoing;
        uv_buf_t bytes = uv_buf_init(outgoing->bytes.data, (unsigned)outgoing->bytes.length);
        if (uv_write(&outgoing->request, (uv_stream_t *)&worker->process->stream, &bytes, 1, on_written))
            code = ERROR_IO;
    }
    if (code) {
        buffer_free(&outgoing->bytes);
        free(outgoing);
    }
    return code;
}

int worker_send(struct worker *worker, enum frame_type type, json_t *payload)
{
    return send_frame(worker, type, 0, payload);
}

uint64_t worker_request(struct worker *worker, enum frame_type type, json_t *payload, worker_answer on_answer,
                        void *arg)
{
    if (worker->n_pending == worker->pending_capacity) {
        size_t capacity = worker->pending_capacity ? 2 * worker->pending_capacity : 16;
        struct pending *grown = realloc(worker->pending, capacity * sizeof *grown);
        if (!grown) {
            json_decref(payload);
            return 0;
        }
        worker->pending = grown;
        worker->pending_capacity = capacity;
    }
    uint64_t id = worker->pool->next_id++;
    if (send_frame(worker, type, id, payload))
        return 0;
    worker->pending[worker->n_pending++] = (struct pending){.id = id, .on_frame = on_answer, .arg = arg};
    return id;
}

void worker_request_cancel(struct worker *worker, uint64_t id)
{
    struct pending *pending = pending_find(worker, id);
    if (!pending || !pending->on_frame)
        return;
    pending->on_frame = NULL;
    send_frame(worker, FRAME_CANCEL, id, json_object());
}

/* ---- starting ---- */

static void on_watch(uv_timer_t *timer)
{
    struct worker *worker = timer->data;
    struct process *process = worker->process;
    uint64_t timeout_ms = (uint64_t)worker->pool->config->heartbeat_timeout_ms,
             period_ms = uv_timer_get_repeat(timer);
    if (!process)
        return;
    /* Time in which this loop did not run either (a stopped or starved daemon) is no silence: what the worker said
     * meanwhile has yet to be read. */
    uint64_t now_ms = uv_now(timer->loop), elapsed_ms = now_ms - process->watched_ms;
    process->watched_ms = now_ms;
    process->silent_ms += elapsed_ms < 2 * period_ms ? elapsed_ms : period_ms;
    if (process->silent_ms > timeout_ms + process->grace_ms) {
        char reason[80];
        snprintf(reason, sizeof reason, "no heartbeat for %.1f s",
                 (double)(timeout_ms + process->grace_ms) / 1e3);
        process_kill(process, reason);
    }
}

/* Start a process in the slot. Failures take the same road as a process that dies at once: backoff, then
 * again. */
static void worker_start(struct worker *worker)
{
    struct worker_pool *pool = worker->pool;
    if (pool->stopping || worker->process)
        return;
    int ends[2] = {-1, -1};
    char reason[160];
    struct process *process = calloc(1, sizeof *process);
    if (!process || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends)) {
        snprintf(reason, sizeof reason, "cannot start: %s", strerror(errno));
        goto failed;
    }
    process->worker = worker;
    process->started_ms = process->watched_ms = uv_now(pool->loop);
    uv_pipe_init(pool->loop, &process->stream, 0);
    process->stream.data = process->handle.data = process;

    char threads[16];
    snprintf(threads, sizeof threads, "%d", pool->config->threads);
    char program[] = "adderd", command[] = "worker", device_flag[] = "--device", fd_flag[] = "--fd",
         fd[] = "3", threads_flag[] = "--threads";
    char *args[] = {program, command, device_flag, worker->device, fd_flag, fd, threads_flag, threads, NULL};
    uv_stdio_container_t stdio[4] = {
        {.flags = UV_IGNORE},
        {.flags = UV_INHERIT_FD, .data.fd = STDERR_FILENO},
        {.flags = UV_INHERIT_FD, .data.fd = STDERR_FILENO},
        {.flags = UV_INHERIT_FD, .data.fd = ends[1]},
    };
    uv_process_options_t options = {
        .exit_cb = on_process_exit, .file = pool->executable, .args = args, .stdio = stdio, .stdio_count = 4};
    int status = uv_spawn(pool->loop, &process->handle, &options);
    close(ends[1]);
    ends[1] = -1;
    process->open_handles = 2;
    if (status) { /* libuv has initialised the handle even so: both must be closed */
        snprintf(reason, sizeof reason, "cannot start: %s", uv_strerror(status));
        uv_close((uv_handle_t *)&process->handle, on_handle_closed);
        uv_close((uv_handle_t *)&process->stream, on_handle_closed);
        process = NULL;
        goto failed;
    }
    uv_pipe_open(&process->stream, ends[0]);
    uv_read_start((uv_stream_t *)&process->stream, on_alloc, on_read);
    worker->process = process;
    worker->info.pid = process->handle.pid;
    uint64_t period = (uint64_t)pool->config->heartbeat_timeout_ms / 4 + 1;
    uv_timer_start(&worker->watch_timer, on_watch, period, period);
    return;
failed:
    if (ends[0] >= 0)
        close(ends[0]);
    if (ends[1] >= 0)
        close(ends[1]);
    free(process);
    pool->callbacks.down(pool->callbacks.arg, worker, reason);
    uv_timer_start(&worker->restart_timer, on_restart, worker->backoff_ms, 0);
    worker->backoff_ms = worker->backoff_ms * 2 < BACKOFF_LAST_MS ? worker->backoff_ms * 2 : BACKOFF_LAST_MS;
    worker->info.restarts++;
}

static void timer_init(struct worker_pool *pool, uv_timer_t *timer, void *data)
{
    uv_timer_init(pool->loop, timer);
    timer->data = data;
    pool->open_timers++;
}

int worker_pool_create(uv_loop_t *loop, const struct config *config,
                       const struct worker_pool_callbacks *callbacks, struct worker_pool **ret_pool,
                       struct error *error)
{
    struct device_list devices;
    devices_resolve(config, &devices);
    size_t n = devices.n;
    struct worker_pool *pool = calloc(1, sizeof *pool + n * sizeof pool->workers[0]);
    if (!pool)
        return error_set(error, ERROR_NO_MEMORY, "no memory for %zu workers", n);
    pool->loop = loop;
    pool->config = config;
    pool->callbacks = *callbacks;
    pool->next_id = 1;
    pool->n_workers = n;
    size_t size = sizeof pool->executable;
    int status = uv_exepath(pool->executable, &size);
    if (status) {
        free(pool);
        return error_set(error, ERROR_IO, "cannot tell where this program is: %s", uv_strerror(status));
    }
    timer_init(pool, &pool->stop_timer, pool);
    for (size_t i = 0; i < n; i++) {
        struct worker *worker = &pool->workers[i];
        worker->pool = pool;
        memcpy(worker->device, devices.names[i], sizeof worker->device);
        worker->backoff_ms = BACKOFF_FIRST_MS;
        worker->info.device = worker->device;
        timer_init(pool, &worker->restart_timer, worker);
        timer_init(pool, &worker->watch_timer, worker);
        uv_timer_start(&worker->restart_timer, on_restart, 0,
                       0); /* from the loop: callbacks see a whole pool */
    }
    *ret_pool = pool;
    return 0;
}

/* ---- stopping ---- */

static void on_stop_timeout(uv_timer_t *timer)
{
    struct worker_pool *pool = timer->data;
    for (size_t i = 0; i < pool->n_workers; i++)
        if (pool->workers[i].process)
            process_kill(pool->workers[i].process, "did not stop in time");
}

void worker_pool_stop(struct worker_pool *pool, int timeout_ms, void (*done)(void *arg), void *arg)
{
    pool->stopping = true;
    pool->stopped = done;
    pool->stopped_arg = arg;
    for (size_t i = 0; i < pool->n_workers; i++) {
        struct worker *worker = &pool->workers[i];
        uv_timer_stop(&worker->restart_timer);
        if (worker->process && (!worker->up || worker_send(worker, FRAME_SHUTDOWN, json_object())))
            process_kill(worker->process, "stopped before it was up");
    }
    uv_timer_start(&pool->stop_timer, on_stop_timeout, (uint64_t)timeout_ms, 0);
    pool_check_stopped(pool);
}

static void on_timer_closed(uv_handle_t *handle)
{
    /* The pool outlives its timers; its memory goes with the last of them. */
    struct worker_pool *pool = handle->data;
    if (--pool->open_timers == 0)
        free(pool);
}

void worker_pool_free(struct worker_pool *pool)
{
    if (!pool)
        return;
    for (size_t i = 0; i < pool->n_workers; i++) {
        struct worker *worker = &pool->workers[i];
        free(worker->pending);
        worker->restart_timer.data = worker->watch_timer.data = pool;
        uv_close((uv_handle_t *)&worker->restart_timer, on_timer_closed);
        uv_close((uv_handle_t *)&worker->watch_timer, on_timer_closed);
    }
    uv_close((uv_handle_t *)&pool->stop_timer, on_timer_closed);
}

/* ---- looking ---- */

size_t worker_pool_count(const struct worker_pool *pool)
{
    return pool->n_workers;
}

struct worker *worker_pool_at(struct worker_pool *pool, size_t index)
{
    return &pool->workers[index];
}

void worker_info(const struct worker *worker, struct worker_info *ret_info)
{
    *ret_info = worker->info;
}
