/* server.h: `adderd serve`: everything the daemon consists of, started in order, and stopped in the other.
 * Loop thread only. */
#ifndef DAEMON_SERVER_H
#define DAEMON_SERVER_H

#include "daemon/auth.h"
#include "daemon/config.h"
#include "daemon/http.h"
#include "daemon/metrics.h"
#include "daemon/registry.h"
#include "daemon/scheduler.h"
#include "daemon/store.h"
#include "daemon/worker_calls.h"
#include "daemon/worker_pool.h"

#include <uv.h>

/* What handlers work with. */
struct server {
    const struct config *config;
    uv_loop_t loop;
    struct store *store;
    struct registry *registry;
    struct auth *auth;
    struct metrics *metrics;
    struct scheduler *scheduler;
    struct worker_pool *pool;
    struct worker_calls *calls;
    struct http_server *http;
    struct idempotency *repeatable;     /* POSTs with a key that are being answered: reply.c */
    struct event_stream *event_streams; /* handlers_events.c */
    struct download *downloads;         /* handlers_evaluations.c */
    bool stopping;
};

/* Is there a worker that is up and has the default model, if there is one? reason says what is missing. */
bool server_is_ready(const struct server *server, char reason[256]);

/* Serve until SIGTERM or SIGINT. Returns the process's exit status. */
int server_run(const struct config *config);

#endif
