/* worker_calls.h: requests that any worker may answer: completions and the tokenizer. They go to the least
 * loaded worker that is up, and wait for one while there is none (a worker that is being restarted, say): a
 * client is not refused for that, because some clients give up after few tries. Loop thread only. */
#ifndef DAEMON_WORKER_CALLS_H
#define DAEMON_WORKER_CALLS_H

#include "api/problem.h"
#include "daemon/scheduler.h"

struct worker_calls;
struct worker_call;

/* limit: calls that may be under way or waiting; more are refused. */
struct worker_calls *worker_calls_create(uv_loop_t *loop, struct scheduler *scheduler, size_t limit);
/* Calls that are left are forgotten, unanswered. The memory goes when the loop has closed a timer. */
void worker_calls_free(struct worker_calls *calls);

/* payload is stolen. on_frame is called as worker_request() does, the last time with any frame but CHUNK, and
 * never before this returns. NULL with a problem: 429 when there are too many, 503 when out of memory. */
struct worker_call *worker_calls_begin(struct worker_calls *calls, enum frame_type type, json_t *payload,
                                       worker_answer on_frame, void *arg, struct problem *problem);
/* on_frame is never called again. Not after its last call. */
void worker_call_cancel(struct worker_call *call);

/* A worker came up: what waits goes to it. */
void worker_calls_go(struct worker_calls *calls);
/* Nothing waits any more: what has no worker fails. */
void worker_calls_drain(struct worker_calls *calls);
/* Calls that have no worker yet. */
size_t worker_calls_waiting(const struct worker_calls *calls);

/* The problem a client is told for a FAILED frame. */
void worker_calls_problem(const json_t *failed, struct problem *problem);

#endif
