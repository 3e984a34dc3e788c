/* job_frames.h: what workers report of jobs, taken into live jobs and the store. */
#ifndef DAEMON_JOB_FRAMES_H
#define DAEMON_JOB_FRAMES_H

#include "engine/protocol.h"

struct worker;

/* A JOB_* frame (worker_pool_callbacks.job_frame); arg: struct scheduler. Those of an attempt that is not the
 * job's current one are dropped. */
void job_frames_take(void *arg, struct worker *worker, enum frame_type type, const json_t *payload);
/* The answer to JOB_VALIDATE (a worker_answer); arg: struct live_job. */
void job_frames_validation(void *arg, enum frame_type type, const json_t *payload);

#endif
