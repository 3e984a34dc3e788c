/* worker_pool.h: the worker processes: started, watched, restarted with backoff, and spoken to in frames.
 * Loop thread only.
 *
 * One `adderd worker` per device, over a socketpair (its end is fd 3). A worker that exits, breaks the
 * protocol or sends no frame for heartbeat_timeout_ms is killed and started again after 0.1 s, 0.2 s ... 30 s
 * (reset once it has lived a minute). */
#ifndef DAEMON_WORKER_POOL_H
#define DAEMON_WORKER_POOL_H

#include "daemon/config.h"
#include "engine/protocol.h"

#include <uv.h>

struct worker_pool;
struct worker; /* one slot: the device stays, processes come and go */

struct worker_info {
    const char *device; /* "cpu", "cuda:0" */
    bool up;            /* HELLO seen */
    int pid;
    int64_t restarts;
    int64_t total_bytes, free_bytes, resident_bytes,
        allocated_bytes;  /* resident: of the process; allocated: by its ops */
    int running, waiting; /* sequences, from the last STATUS */
};

struct worker_pool_callbacks {
    void *arg;
    void (*up)(void *arg, struct worker *worker);
    /* The process is gone; reason is one line for people ("killed by signal 9", "no heartbeat for 30 s", or its own
     * last words, "the device is lost (an illegal memory access was encountered)").
     * Requests in flight there have already been failed through their own callbacks. */
    void (*down)(void *arg, struct worker *worker, const char *reason);
    /* JOB_* frames (id 0) and answers to job_validate. payload is borrowed. */
    void (*job_frame)(void *arg, struct worker *worker, enum frame_type type, const json_t *payload);
};

int worker_pool_create(uv_loop_t *loop, const struct config *config,
                       const struct worker_pool_callbacks *callbacks, struct worker_pool **ret_pool,
                       struct error *error);
/* SHUTDOWN to all, SIGKILL to what is left after the timeout, then done() once all are gone (perhaps before
 * this returns). */
void worker_pool_stop(struct worker_pool *pool, int timeout_ms, void (*done)(void *arg), void *arg);
/* After the stop is done. The memory goes when the loop has closed its timers. */
void worker_pool_free(struct worker_pool *pool);

size_t worker_pool_count(const struct worker_pool *pool);
struct worker *worker_pool_at(struct worker_pool *pool, size_t index);
void worker_info(const struct worker *worker, struct worker_info *ret_info);

/* Send a request; payload is stolen. on_frame is called for each frame that answers it (payload borrowed),
 * the last being any but CHUNK; when the worker dies first it is called with FRAME_FAILED, code "device",
 * message the reason. Returns its id, 0 when the worker is not up. */
typedef void (*worker_answer)(void *arg, enum frame_type type, const json_t *payload);
uint64_t worker_request(struct worker *worker, enum frame_type type, json_t *payload, worker_answer on_frame,
                        void *arg);
/* Tell the worker to stop a request and never call on_frame again. */
void worker_request_cancel(struct worker *worker, uint64_t id);
/* A frame without an answer of its own (JOB_*, UNLOAD). Returns 0 or ERROR_IO when it is not up. */
int worker_send(struct worker *worker, enum frame_type type, json_t *payload);

#endif
