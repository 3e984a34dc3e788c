/* worker_internal.h: what the files of the worker share: its state, and who answers which frames. */
#ifndef ENGINE_WORKER_INTERNAL_H
#define ENGINE_WORKER_INTERNAL_H

#include "engine/protocol.h"
#include "engine/training/trainer.h"
#include "engine/worker.h"
#include "engine/worker_models.h"
#include "engine/worker_stream.h"

struct completion;        /* a COMPLETE that is not over: worker_completions.c */
struct worker_evaluation; /* worker_evaluation.c */

/* The fine-tuning job that runs here, if trainer is set. */
struct worker_job {
    char *name;
    int64_t attempt;
    char *folder;
    struct loaded_model *model;
    struct trainer *trainer;
};

/* A frame that has to wait until no trainer call is under way. for_room: a JOB_START that found no memory beside models in
 * use, and waits until no request runs. */
struct waiting_frame {
    struct waiting_frame *next;
    struct frame frame;
    bool for_room;
};

struct worker {
    const struct worker_options *options;
    struct worker_stream stream;
    const struct kernel_ops *ops;
    struct kernel_device *device;
    struct kernel_device_info device_info;
    int64_t idle_bytes; /* allocated_bytes of the device as it opened */
    struct loaded_models models;
    struct completion *completions;
    struct worker_job job;
    struct worker_evaluation *evaluation; /* that runs here, or NULL; never beside a job */
    struct waiting_frame *waiting_first, *waiting_last;
    int64_t heartbeat_ms, next_heartbeat_ms;
    /* While a job trains: the time generation may take before training has its turn again, and since when
     * training has had it. */
    int64_t credit_us, trained_since_us;
    struct error
        fault; /* code not 0: the device is lost, or its memory is not what it was planned to be; the process
                           ends and says so */
    bool shutdown;
};

/* The clock of everything here, in microseconds. */
int64_t worker_now_us(void);
/* From now on the process ends, with this reason and what the device's driver says. The first one counts. */
void worker_fault(struct worker *worker, const struct error *error);
/* Answer a request that failed. */
void worker_fail(struct worker *worker, uint64_t id, const struct error *error);

/* worker_completions.c */
void worker_complete(struct worker *worker, uint64_t id, const json_t *payload);
void worker_cancel(struct worker *worker, uint64_t id);

/* worker_job.c. Not from inside a trainer call. */
/* Returns false, and has not answered, when it has to read files and may not: in_trainer. */
bool worker_job_plan(struct worker *worker, uint64_t id, const json_t *payload, bool in_trainer);
void worker_job_validate(struct worker *worker, uint64_t id, const json_t *payload);
/* Returns false, and has not answered, when there is no room beside the models that requests use. */
bool worker_job_start(struct worker *worker, const json_t *payload);
/* A JOB_STOP of a job whose JOB_START still waits for that: answers for it, and returns true. */
bool worker_job_stop_unstarted(struct worker *worker, const json_t *start, const json_t *stop);
void worker_job_stop(struct worker *worker, const json_t *payload);
/* One quantum of the running job. */
void worker_job_advance(struct worker *worker);
/* Checkpoint and end it as paused; nothing when none runs. */
void worker_job_pause(struct worker *worker);
/* Drop it without a word: the process ends. */
void worker_job_abandon(struct worker *worker);

/* worker_evaluation.c. Not from inside a trainer call. */
void worker_evaluation_validate(struct worker *worker, uint64_t id, const json_t *payload);
void worker_evaluation_start(struct worker *worker, const json_t *payload);
/* End it as this status if it is of that name and attempt; whatever it is where name is NULL. */
void worker_evaluation_stop(struct worker *worker, const char *name, int64_t attempt, const char *status);
/* One batch. */
void worker_evaluation_advance(struct worker *worker);
/* Until completions are done there is no room for it. */
bool worker_evaluation_waits(const struct worker *worker);
/* Drop it without a word: the process ends. */
void worker_evaluation_abandon(struct worker *worker);

/* worker_job.c: {"job","attempt"} with the members of `more` (stolen); NULL when out of memory. */
json_t *worker_job_address(const char *name, int64_t attempt, json_t *more);
/* JOB_ENDED's members behind the address. folder is stolen; error may be NULL. */
json_t *worker_job_end(const char *status, bool resumable, json_t *folder, int64_t trained_tokens,
                       int64_t step, const struct error *error);

/* worker.c: what waits is served between the layers of a micro-batch. */
void worker_yield(void *worker);

#endif
