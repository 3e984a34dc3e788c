/* scheduler.h: which job runs where, and the states of API.md. Loop thread only.
 *
 *   validating_files -> queued -> running -> succeeded | failed | cancelled;   paused <-> queued
 *
 * The row in the store changes first; what clients and workers see follows its commit. After a restart
 * everything that was validating, queued or running starts again from its newest checkpoint, with a new
 * attempt number. A job whose worker dies twice at the same step fails. Jobs run in the order of their
 * creation, one a worker; validations go ahead of them.
 *
 * Where there are GPUs jobs are trained on them alone; a CPU beside them serves completions. So a job that is
 * resumed goes on in the same arithmetic, and "auto" precision is known when a job is created. */
#ifndef DAEMON_SCHEDULER_H
#define DAEMON_SCHEDULER_H

#include "daemon/registry.h"
#include "daemon/store.h"
#include "daemon/worker_pool.h"

struct scheduler;

struct scheduler_options {
    uv_loop_t *loop;
    struct store *store;
    struct registry *registry;
    const char *data_dir, *organization;
    const char *tasks_dir, *eval_data_dir; /* eval_data_dir may be NULL */
};
int scheduler_create(const struct scheduler_options *options, struct scheduler **ret_scheduler,
                     struct error *error);
/* After the pool has stopped and the store is closed: no callback is on its way then. Subscriptions must have
 * been given back, waiting clients are answered with 503. The memory goes when the loop has closed its timer.
 */
void scheduler_free(struct scheduler *scheduler);
/* The pool is created after the scheduler (its callbacks point here) and handed over once. */
void scheduler_attach(struct scheduler *scheduler, struct worker_pool *pool);
const struct worker_pool_callbacks *scheduler_pool_callbacks(struct scheduler *scheduler);
/* Take in what was unfinished at the last stop. */
int scheduler_recover(struct scheduler *scheduler, struct error *error);
/* No new starts; running jobs are paused by the workers' SHUTDOWN and stay `running` in the store so that the
 * next start resumes them. */
void scheduler_drain(struct scheduler *scheduler);
/* Is it safe to close the store and to free the scheduler? Not while a result file is being written. */
bool scheduler_is_settled(const struct scheduler *scheduler);

/* Answers to clients. job is valid during the call; NULL with a problem. */
typedef void (*scheduler_answer)(void *arg, const struct job_resource *job, const struct problem *problem);
/* Called before the row of a new job is written: the answer that is to be kept with it, or NULL. */
typedef const struct kept_answer *(*scheduler_keeper)(void *arg, const struct job_resource *job);
/* Checks the model and both files (exist, purpose fine-tune), settles the precision, asks a worker whether it fits,
 * commits the row, answers, and sets validation going. */
void scheduler_create_job(struct scheduler *scheduler, const struct job_request *request,
                          scheduler_keeper keep, scheduler_answer done, void *arg);
/* The same for an evaluation: checks models, names of tasks and uploaded files. */
void scheduler_create_evaluation(struct scheduler *scheduler, const struct evaluation_request *request,
                                 scheduler_keeper keep, scheduler_answer done, void *arg);
/* Of jobs of either kind. */
void scheduler_cancel_job(struct scheduler *scheduler, const char *id, scheduler_answer done, void *arg);
void scheduler_pause_job(struct scheduler *scheduler, const char *id, scheduler_answer done, void *arg);
void scheduler_resume_job(struct scheduler *scheduler, const char *id, scheduler_answer done, void *arg);
/* The live row of a job that has not ended (its queue position set), or NULL: ask the store. */
const struct job_resource *scheduler_find(struct scheduler *scheduler, const char *id);
/* Does a job that has not ended name this model or (an adapter of) this job? */
bool scheduler_uses_model(struct scheduler *scheduler, const char *id);

/* Events of one job as they become durable, for SSE. on_event gets NULL when the job has ended and its last
 * event was given. */
struct event_subscription;
typedef void (*event_listener)(void *arg, const struct event_resource *event);
struct event_subscription *scheduler_subscribe(struct scheduler *scheduler, const char *job,
                                               event_listener on_event, void *arg);
void scheduler_unsubscribe(struct scheduler *scheduler, struct event_subscription *subscription);

/* A worker for a completion or tokenizer call: up, the least loaded; NULL when none is up. */
struct worker *scheduler_pick(struct scheduler *scheduler);
/* Every job that has not ended, oldest first. */
void scheduler_each(struct scheduler *scheduler, void (*visit)(void *arg, const struct job_resource *job),
                    void *arg);
/* How many jobs, ended ones too, have this status. */
int64_t scheduler_count(const struct scheduler *scheduler, enum job_status status);

#endif
