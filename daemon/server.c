/* server.c: see server.h. Loop thread only.
 *
 * Start: store (and its migrations), keys, registry, scheduler, workers, HTTP. Stop, on a signal:
 *   1. no new connections, no new jobs; event streams end; completions may finish, for a third of the time there is
 *   2. workers checkpoint their jobs and end
 *   3. what is still unanswered gets its error, the store writes the last rows, and everything is closed. */
#include "daemon/server.h"

#include "base/file.h"
#include "base/log.h"
#include "daemon/handlers.h"
#include "daemon/sweep.h"

#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <time.h>
#include <unistd.h>

enum { KEYS_MS = 1000, EXPIRY_MS = 60000, STOP_POLL_MS = 10, FLUSH_MS = 2000 };

struct loading;

/* The server with what only this file touches. */
struct daemon {
    struct server server; /* first: server pointers are pointers to this */
    struct worker_pool_callbacks to_scheduler;
    struct loading *loading; /* [worker_pool_count]; NULL until the pool is there */
    uv_signal_t signals[2];
    uv_timer_t keys_timer, expiry_timer, watchdog_timer, stop_timer;
    uint64_t stop_deadline; /* of the step of stopping that is under way */
    enum { RUNNING, ENDING_REQUESTS, STOPPING_WORKERS, FLUSHING } phase;
};

/* The default model on one worker. */
struct loading {
    bool loaded;
    char reason[256]; /* why not, or why the worker is down */
};

/* ---- workers ---- */

static struct loading *loading_of(struct daemon *daemon, const struct worker *worker)
{
    size_t i = 0;
    while (i + 1 < worker_pool_count(daemon->server.pool) && worker_pool_at(daemon->server.pool, i) != worker)
        i++;
    return &daemon->loading[i];
}

bool server_is_ready(const struct server *server, char reason[256])
{
    const struct daemon *daemon = (const struct daemon *)server;
    bool wants_model = registry_default(server->registry) != NULL;
    snprintf(reason, 256, "No worker is up.");
    for (size_t i = 0; i < worker_pool_count(server->pool); i++) {
        struct worker_info info;
        worker_info(worker_pool_at(server->pool, i), &info);
        if (info.up && (!wants_model || daemon->loading[i].loaded))
            return true;
        if (info.up || daemon->loading[i].reason[0])
            snprintf(reason, 256, "%s",
                     daemon->loading[i].reason[0] ? daemon->loading[i].reason
                                                  : "The default model is being loaded.");
    }
    return false;
}

static void on_loaded(void *arg, enum frame_type type, const json_t *payload)
{
    struct loading *loading = arg;
    struct problem problem;
    if (type == FRAME_LOADED) {
        loading->loaded = true;
        log_write(LOG_INFO, "model loaded", "model", json_string_value(json_object_get(payload, "model")),
                  NULL);
        return;
    }
    worker_calls_problem(payload, &problem);
    snprintf(loading->reason, sizeof loading->reason, "%s", problem.message);
    log_write(LOG_ERROR, "the default model cannot be loaded", "reason", problem.message, NULL);
}

static void on_worker_up(void *arg, struct worker *worker)
{
    struct daemon *daemon = arg;
    const struct model_entry *model = registry_default(daemon->server.registry);
    struct loading *loading = loading_of(daemon, worker);
    loading->loaded = false;
    loading->reason[0] = '\0';
    if (model)
        worker_request(worker, FRAME_LOAD,
                       json_pack("{s:{s:s, s:s}}", "model", "id", model->resource.id, "path", model->path),
                       on_loaded, loading);
    daemon->to_scheduler.up(daemon->to_scheduler.arg, worker);
    worker_calls_go(daemon->server.calls);
}

static void on_worker_down(void *arg, struct worker *worker, const char *reason)
{
    struct daemon *daemon = arg;
    if (daemon->loading) {
        struct loading *loading = loading_of(daemon, worker);
        struct worker_info info;
        worker_info(worker, &info);
        loading->loaded = false;
        snprintf(loading->reason, sizeof loading->reason, "The worker of %s is down: %s", info.device,
                 reason);
    }
    if (!daemon->server.stopping)
        metrics_add(daemon->server.metrics, COUNTER_WORKER_RESTARTS, 1);
    daemon->to_scheduler.down(daemon->to_scheduler.arg, worker, reason);
}

/* Tokens this frame adds to its job's total. */
static void count_trained_tokens(struct daemon *daemon, const json_t *payload)
{
    const char *id = json_string_value(json_object_get(payload, "job"));
    const struct job_resource *job = id ? scheduler_find(daemon->server.scheduler, id) : NULL;
    int64_t total = json_integer_value(json_object_get(payload, "trained_tokens"));
    int64_t before = job && job->trained_tokens > 0 ? job->trained_tokens : 0;
    if (job && total > before)
        metrics_add(daemon->server.metrics, COUNTER_TRAINED_TOKENS, (double)(total - before));
}

static void on_job_frame(void *arg, struct worker *worker, enum frame_type type, const json_t *payload)
{
    struct daemon *daemon = arg;
    if (type == FRAME_JOB_METRICS)
        count_trained_tokens(daemon, payload);
    daemon->to_scheduler.job_frame(daemon->to_scheduler.arg, worker, type, payload);
}

/* ---- what happens now and then ---- */

static void on_keys(void *arg, int code, const struct key_row *items, size_t count)
{
    struct daemon *daemon = arg;
    struct error error = {0};
    if (!code && auth_reload(daemon->server.auth, items, count, &error))
        log_write(LOG_ERROR, "the keys could not be read again", "reason", error.message, NULL);
}

static void on_keys_timer(uv_timer_t *timer)
{
    struct daemon *daemon = timer->data;
    store_key_list(daemon->server.store, on_keys, daemon);
}

static void on_expiry_timer(uv_timer_t *timer)
{
    struct daemon *daemon = timer->data;
    files_expire(&daemon->server);
}

static void on_watchdog(uv_timer_t *timer)
{
    (void)timer;
    sd_notify(0, "WATCHDOG=1");
}

static void on_commit(void *arg, double seconds, int64_t requests)
{
    struct daemon *daemon = arg;
    (void)requests;
    metrics_observe(daemon->server.metrics, HISTOGRAM_COMMIT_SECONDS, seconds);
}

static void on_finished(void *arg, const struct http_request *request, int status, double seconds)
{
    struct server *server = arg;
    char status_text[8], ms[24];
    const char *endpoint = request->route.name ? request->route.name : "unknown";
    snprintf(status_text, sizeof status_text, "%d", status);
    snprintf(ms, sizeof ms, "%.1f", seconds * 1000);
    metrics_http_request(server->metrics, endpoint, status);
    metrics_observe(server->metrics, HISTOGRAM_HTTP_LATENCY, seconds);
    log_write(LOG_INFO, "request", "request_id", request->id, "method", request->method, "path",
              request->path ? request->path : "", "status", status_text, "ms", ms, "key", request->key_id,
              NULL);
}

/* ---- stopping ---- */

static void close_handle(uv_handle_t *handle)
{
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

/* In the order of their use of each other. What is NULL never started. */
static void close_all(struct daemon *daemon)
{
    struct server *server = &daemon->server;
    if (server->http)
        http_stop(server->http);
    store_close(server->store);
    server->store = NULL;
    worker_calls_free(server->calls);
    if (server->pool)
        worker_pool_free(server->pool);
    if (server->scheduler)
        scheduler_free(server->scheduler);
    for (int i = 0; i < 2; i++)
        close_handle((uv_handle_t *)&daemon->signals[i]);
    close_handle((uv_handle_t *)&daemon->keys_timer);
    close_handle((uv_handle_t *)&daemon->expiry_timer);
    close_handle((uv_handle_t *)&daemon->watchdog_timer);
    close_handle((uv_handle_t *)&daemon->stop_timer);
}

static void on_workers_stopped(void *arg)
{
    struct daemon *daemon = arg;
    daemon->phase = FLUSHING;
    daemon->stop_deadline = uv_now(&daemon->server.loop) + FLUSH_MS;
}

/* One look at what stopping waits for. */
static void on_stop_timer(uv_timer_t *timer)
{
    struct daemon *daemon = timer->data;
    struct server *server = &daemon->server;
    bool late = uv_now(&server->loop) >= daemon->stop_deadline;
    if (daemon->phase == ENDING_REQUESTS && (late || !http_unanswered(server->http))) {
        daemon->phase = STOPPING_WORKERS;
        worker_pool_stop(server->pool, server->config->shutdown_timeout_ms / 2, on_workers_stopped, daemon);
    } else if (daemon->phase == FLUSHING && (late || !http_open(server->http)) &&
               scheduler_is_settled(server->scheduler)) {
        uv_timer_stop(timer);
        close_all(daemon);
    }
}

static void stop(struct daemon *daemon)
{
    struct server *server = &daemon->server;
    if (server->stopping)
        return;
    server->stopping = true;
    sd_notify(0, "STOPPING=1");
    http_drain(server->http);
    events_drain(server);
    results_drain(server);
    worker_calls_drain(server->calls);
    scheduler_drain(server->scheduler);
    daemon->phase = ENDING_REQUESTS;
    daemon->stop_deadline = uv_now(&server->loop) + (uint64_t)server->config->shutdown_timeout_ms / 3;
    uv_timer_start(&daemon->stop_timer, on_stop_timer, 0, STOP_POLL_MS);
}

static void on_signal(uv_signal_t *signal, int number)
{
    log_write(LOG_INFO, "stopping", "signal", number == SIGTERM ? "SIGTERM" : "SIGINT", NULL);
    stop(signal->data);
}

/* ---- starting ---- */

/* DATA and its folders; what an earlier run was receiving when it ended is gone. */
static int make_folders(const struct config *config, char uploads[4096], struct error *error)
{
    char path[4096];
    snprintf(uploads, 4096, "%s/uploads", config->data_dir);
    int code = file_remove_tree(uploads, error);
    if (!code)
        code = file_make_dirs(uploads, error);
    snprintf(path, sizeof path, "%s/files", config->data_dir);
    if (!code)
        code = file_make_dirs(path, error);
    snprintf(path, sizeof path, "%s/jobs", config->data_dir);
    if (!code)
        code = file_make_dirs(path, error);
    return code;
}

/* Everything that is read from the store before the loop runs. */
static int load(struct daemon *daemon, struct error *error)
{
    struct server *server = &daemon->server;
    const struct config *config = server->config;
    struct key_row *keys = NULL;
    struct adapter_row *rows = NULL;
    size_t n_keys = 0, n_rows = 0;
    int code = store_load_keys(server->store, &keys, &n_keys, error);
    if (!code)
        code = auth_create(keys, n_keys, &server->auth, error);
    if (!code)
        code = store_load_models(server->store, &rows, &n_rows, error);
    if (!code)
        code = registry_create(config->models_dirs, config->n_models_dirs, config->default_model, rows,
                               n_rows, &server->registry, error);
    free(keys);
    free(rows);
    if (!code && !auth_required(server->auth) && !config_is_loopback(config->listen_host))
        code = error_set_param(
            error, ERROR_INVALID, "listen",
            "without API keys only this machine may be served, and %s can be reached from others: "
            "make a key with `adderd keys create NAME`, or listen on 127.0.0.1",
            config->listen_host);
    return code;
}

static int start_scheduler(struct daemon *daemon, struct error *error)
{
    struct server *server = &daemon->server;
    const struct config *config = server->config;
    struct scheduler_options options = {.loop = &server->loop,
                                        .store = server->store,
                                        .registry = server->registry,
                                        .data_dir = config->data_dir,
                                        .organization = config->organization,
                                        .tasks_dir = config->tasks_dir,
                                        .eval_data_dir = config->eval_data_dir};
    int code = scheduler_create(&options, &server->scheduler, error);
    if (code)
        return code;
    size_t limit = (size_t)config->max_waiting + (size_t)config->max_seqs * (size_t)config->n_devices;
    server->calls = worker_calls_create(&server->loop, server->scheduler, limit);
    if (!server->calls)
        return error_set(error, ERROR_NO_MEMORY, "no memory to start");
    daemon->to_scheduler = *scheduler_pool_callbacks(server->scheduler);
    struct worker_pool_callbacks callbacks = {
        .arg = daemon, .up = on_worker_up, .down = on_worker_down, .job_frame = on_job_frame};
    code = worker_pool_create(&server->loop, config, &callbacks, &server->pool, error);
    if (code)
        return code;
    scheduler_attach(server->scheduler, server->pool);
    daemon->loading = calloc(worker_pool_count(server->pool), sizeof *daemon->loading);
    if (!daemon->loading)
        return error_set(error, ERROR_NO_MEMORY, "no memory to start");
    return scheduler_recover(server->scheduler, error);
}

static int start_http(struct daemon *daemon, const char *uploads, struct error *error)
{
    struct server *server = &daemon->server;
    const struct config *config = server->config;
    struct http_options options = {
        .loop = &server->loop,
        .host = config->listen_host,
        .port = config->listen_port,
        .max_connections = config->max_connections,
        .max_body_bytes = config->max_body_bytes,
        .max_upload_bytes = config->max_upload_bytes,
        .upload_folder = uploads,
        .callbacks = {
            .arg = server, .admit = handlers_admit, .handle = handlers_handle, .finished = on_finished}};
    return http_start(&options, &server->http, error);
}

/* Say where it listens, in the log and in --port-file. */
static int announce(const struct server *server, struct error *error)
{
    const struct config *config = server->config;
    bool brackets = strchr(config->listen_host, ':') != NULL;
    char address[96], line[100];
    snprintf(address, sizeof address, "%s%s%s:%u", brackets ? "[" : "", config->listen_host,
             brackets ? "]" : "", (unsigned)http_port(server->http));
    snprintf(line, sizeof line, "%s\n", address);
    log_write(LOG_INFO, "listening", "address", address, "version", ADDERD_VERSION, NULL);
    return config->port_file ? file_write_whole(config->port_file, line, strlen(line), error) : 0;
}

static void start_timers(struct daemon *daemon)
{
    uv_loop_t *loop = &daemon->server.loop;
    uint64_t watchdog_us = 0;
    uv_timer_t *timers[] = {&daemon->keys_timer, &daemon->expiry_timer, &daemon->watchdog_timer,
                            &daemon->stop_timer};
    for (size_t i = 0; i < sizeof timers / sizeof *timers; i++) {
        uv_timer_init(loop, timers[i]);
        timers[i]->data = daemon;
    }
    uv_timer_start(&daemon->keys_timer, on_keys_timer, KEYS_MS, KEYS_MS);
    uv_timer_start(&daemon->expiry_timer, on_expiry_timer, 0, EXPIRY_MS);
    if (sd_watchdog_enabled(0, &watchdog_us) > 0)
        uv_timer_start(&daemon->watchdog_timer, on_watchdog, 0, watchdog_us / 2000);
    for (int i = 0; i < 2; i++) {
        uv_signal_init(loop, &daemon->signals[i]);
        daemon->signals[i].data = daemon;
        uv_signal_start(&daemon->signals[i], on_signal, i ? SIGINT : SIGTERM);
    }
}

static int start(struct daemon *daemon, struct error *error)
{
    struct server *server = &daemon->server;
    char uploads[4096];
    int code = file_make_dirs(server->config->data_dir, error);
    if (!code)
        code = store_open(server->config->data_dir, &server->loop, &server->store, error);
    if (!code)
        code = make_folders(server->config, uploads, error);
    if (!code)
        code = sweep_orphans(server->store, server->config->data_dir, error);
    if (!code)
        code = load(daemon, error);
    if (code)
        return code;
    store_observe_commits(server->store, on_commit, daemon);
    code = start_http(daemon, uploads, error);
    if (!code)
        code = start_scheduler(daemon, error);
    if (!code)
        code = announce(server, error);
    return code;
}

int server_run(const struct config *config)
{
    struct error error = {0};
    struct daemon *daemon = calloc(1, sizeof *daemon);
    struct server *server = &daemon->server;
    if (!daemon || sodium_init() < 0 || uv_loop_init(&server->loop)) {
        free(daemon);
        log_write(LOG_ERROR, "cannot start", "reason", "no memory", NULL);
        return 1;
    }
    signal(SIGPIPE, SIG_IGN);
    server->config = config;
    server->metrics = metrics_create();
    start_timers(daemon);
    int code = server->metrics ? start(daemon, &error) : error_set(&error, ERROR_NO_MEMORY, "no memory");
    if (code) {
        log_write(LOG_ERROR, "cannot start", "reason", error.message, NULL);
        if (server->pool)
            stop(daemon);
        else
            close_all(daemon);
    } else {
        sd_notify(0, "READY=1");
    }
    uv_run(&server->loop, UV_RUN_DEFAULT);
    int closed = uv_loop_close(&server->loop);
    if (closed)
        log_write(LOG_WARN, "the loop was not empty at the end", "reason", uv_strerror(closed), NULL);
    registry_free(server->registry);
    auth_free(server->auth);
    metrics_free(server->metrics);
    free(daemon->loading);
    free(daemon);
    if (!code)
        log_write(LOG_INFO, "stopped", NULL);
    return code ? 1 : 0;
}
