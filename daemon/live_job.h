/* live_job.h: a job that has not ended, as the scheduler's files share it. Loop thread only; nothing outside
 * those files (scheduler.c, job_frames.c, job_requests.c) includes this.
 *
 * What a client may see of a job is changed here ahead of the store only where losing the change in a crash
 * would not matter (progress). A change of status is answered to whoever asked for it after its commit, and a
 * final status is seen by nobody before its commit. */
#ifndef DAEMON_LIVE_JOB_H
#define DAEMON_LIVE_JOB_H

#include "daemon/scheduler.h"

#include <jansson.h>

enum { DEATHS_AT_ONE_STEP = 2 }; /* of workers, until the job is held to be the cause */

/* What clients are told where a plan does not fit. */
static const char insufficient_memory[] = "insufficient_memory";

struct waiter { /* a client who asked for a change of status */
    struct waiter *next;
    enum job_status wanted;
    scheduler_answer done;
    void *arg;
};

struct live_job {
    struct live_job *next;
    struct scheduler *scheduler;
    struct job_resource job;
    char resume_from[4096];   /* newest checkpoint's folder, "" = from the start */
    bool validated, full;     /* full: adaptation "full" */
    struct worker *validator; /* working on its validation, as this request */
    uint64_t validation;
    struct worker *trainer; /* training it, from the commit of `running` on */
    int changes;  /* rows on their way to the store: until they are in, nothing begins and nobody is answered
                   */
    bool lost;    /* results of an evaluation that the store did not take: it is to go on once more */
    bool refused; /* the last row was not taken: it is written again by the retry timer */
    bool ended;   /* the final row is committed */
    bool
        alone; /* validated again where no job trains: beside one there was no room for its model, or the worker was
                     lost, of which either may be the cause */
    int deaths; /* workers lost while it stood at death_step, or was validated alone */
    int64_t death_step;
    struct waiter *waiters;
    struct event_subscription *subscriptions;
    int64_t writes;                 /* callbacks still to come: the memory stays until then */
    struct {                        /* of a fine-tuning job that names evaluations: job_evaluations.c's */
        bool looking, again;        /* what there is is being read or made; and is to be once more */
        bool trained;               /* training is done, and its model's row is there */
        int n_outcomes;             /* of evaluations that have ended, on their way into its events */
        json_t *refused;            /* models that could not be evaluated, as keys */
        char model[MODEL_ID_BYTES]; /* whose evaluation is being made */
        char best[MODEL_ID_BYTES];  /* what the job ends with: its row is there */
    } evaluations;
    struct { /* while it ends; status 0 = it does not */
        enum job_status status;
        bool writing; /* its result file: a work thread's callback is still to come */
        char code[64], param[64], message[4096];
        struct job_resource final; /* shares the strings that job owns */
        struct adapter_row row;
        struct file_resource result;
    } ending;
};

/* A worker seen as a place for one training job. */
struct lane {
    struct worker *worker;
    char job[ID_BYTES]; /* "" = free */
    int64_t attempt;
    bool trains; /* a CPU's does not where there is a GPU */
};

struct scheduler {
    struct scheduler_options options;
    struct worker_pool_callbacks callbacks;
    struct worker_pool *pool;
    struct lane lanes[CONFIG_MAX_DEVICES];
    size_t n_lanes;
    bool has_gpu;
    struct live_job *first; /* in order of creation */
    int64_t counts[JOB_STATUS_COUNT];
    bool draining;
    uv_timer_t retry;
};

int64_t live_job_now(void); /* seconds since 1970 */
/* NULL when it has ended or never was. */
struct live_job *live_job_find(struct scheduler *scheduler, const char *id);
/* Takes over what job owns. NULL: no memory (nothing is taken). */
struct live_job *live_job_add(struct scheduler *scheduler, const struct job_resource *job);
/* It has left the scheduler's list. */
void live_job_free(struct live_job *live);
/* If it has ended and no callback is to come, tell subscribers so and free it. */
void live_job_release(struct live_job *live);
void live_job_set_status(struct live_job *live, enum job_status status);
/* The id of its adapter (step -1) or of a checkpoint. */
void live_job_model_row(const struct live_job *live, int64_t step, const char *path,
                        struct adapter_row *ret_row);

/* An event, published to subscribers once it is durable. data is stolen. */
void live_job_append_event(struct live_job *live, const char *level, const char *type, const char *message,
                           json_t *data, int64_t step);
void live_job_say(struct live_job *live, const char *level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Tell subscribers that no more will come. */
void live_job_close_events(struct live_job *live);

/* Commit the row as it is now; then answer who waits for its status and schedule. */
void live_job_commit(struct live_job *live);
bool live_job_wants(const struct live_job *live, enum job_status status); /* does a client wait for it? */
/* Begin the end: for a success ending.row.path is set. The rest happens with the store's callbacks. */
void live_job_end(struct live_job *live, enum job_status status, const char *code, const char *param,
                  const char *message);
/* The store refused a write (a full disk, say): log it, and try again a little later. */
void live_job_retry_later(struct live_job *live, const char *what, const struct error *error);

/* scheduler.c: JOB_STOP to its worker; start what can start. */
void live_job_stop(struct live_job *live, const char *reason);
void scheduler_run(struct scheduler *scheduler);
/* A worker that trains and is up, or NULL. */
struct worker *scheduler_pick_trainer(struct scheduler *scheduler);
/* What JOB_PLAN, JOB_VALIDATE and JOB_START have in common. */
json_t *scheduler_job_payload(struct scheduler *scheduler, const struct job_resource *job);
struct lane *scheduler_lane_of(struct scheduler *scheduler, const struct worker *worker);
void scheduler_lane_free(struct lane *lane);

/* evaluation_requests.c: EVALUATION_VALIDATE's payload. */
json_t *evaluation_payload(struct scheduler *scheduler, const struct job_resource *job);
/* A precision of an evaluation's settings that the workers do not have, or NULL. */
#define EVALUATION_NO_PRECISION                                                                              \
    "precision: %.16s needs a GPU; the workers of this server are CPUs, which compute in fp32."
const char *evaluation_refused_precision(const struct scheduler *scheduler, const json_t *settings);
/* Is there every task that a fine-tuning job's evaluations name? missing: one that there is not, or NULL; valid during the call. */
#define EVALUATION_NO_TASK                                                                                   \
    "There is no task '%.200s': neither in the tasks folder nor among the 1,000 newest files with purpose "  \
    "evals."
void evaluation_check_tasks(struct scheduler *scheduler, const char *evaluations,
                            void (*done)(void *arg, int code, const char *missing), void *arg);
/* Does the evaluation name this model? */
bool evaluation_uses(const struct job_resource *job, const char *model);
/* evaluation_frames.c: EVALUATION_RESULTS of the current attempt. */
void evaluation_frames_results(struct live_job *live, const json_t *payload);

#endif
