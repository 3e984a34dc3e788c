/* scheduler.c: see scheduler.h. Loop thread only. What is known of a job is in live_job.h, what workers
 * report of it in job_frames.c, what clients ask in job_requests.c; here it is decided where a job runs.
 *
 * A lane is a worker seen as a place for one training job. It is taken from the commit of `running` until the
 * worker says JOB_ENDED for that attempt or dies, also when the job itself was cancelled in the meantime. */
#include "daemon/scheduler.h"

#include "base/log.h"
#include "daemon/job_evaluations.h"
#include "daemon/job_frames.h"
#include "daemon/live_job.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct lane *scheduler_lane_of(struct scheduler *scheduler, const struct worker *worker)
{
    for (size_t i = 0; i < scheduler->n_lanes; i++)
        if (scheduler->lanes[i].worker == worker)
            return &scheduler->lanes[i];
    return NULL;
}

static struct lane *lane_of_job(const struct live_job *live)
{
    for (size_t i = 0; i < live->scheduler->n_lanes; i++) {
        struct lane *lane = &live->scheduler->lanes[i];
        if (!strcmp(lane->job, live->job.id) && lane->attempt == live->job.attempt)
            return lane;
    }
    return NULL;
}

/* MODEL of the protocol. */
static json_t *model_payload(struct scheduler *scheduler, const char *id)
{
    const struct model_entry *entry = registry_find(scheduler->options.registry, id);
    return json_pack("{s:s,s:s}", "id", id, "path", entry ? entry->path : "");
}

static json_t *file_payload(struct scheduler *scheduler, const char *id)
{
    return id[0] ? json_sprintf("%s/files/%s", scheduler->options.data_dir, id) : json_null();
}

json_t *scheduler_job_payload(struct scheduler *scheduler, const struct job_resource *job)
{
    if (job->kind == JOB_EVALUATION)
        return evaluation_payload(scheduler, job);
    json_t *hyperparameters = json_loads(job->hyperparameters, 0, NULL);
    if (job_evaluations_keep_all(job))
        json_object_set_new(hyperparameters, "keep_checkpoints", json_integer(0)); /* all */
    return json_pack("{s:s,s:I,s:o,s:o,s:o,s:o,s:I,s:o}", "job", job->id, "attempt", (json_int_t)job->attempt,
                     "model", model_payload(scheduler, job->model), "training_file",
                     file_payload(scheduler, job->training_file), "validation_file",
                     file_payload(scheduler, job->validation_file), "hyperparameters", hyperparameters,
                     "seed", (json_int_t)job->seed, "folder",
                     json_sprintf("%s/jobs/%s", scheduler->options.data_dir, job->id));
}

/* The least loaded that is up; idle: and trains no job. */
static struct worker *pick(const struct scheduler *scheduler, bool for_training, bool idle)
{
    struct worker *best = NULL;
    int best_load = 0;
    for (size_t i = 0; i < scheduler->n_lanes; i++) {
        struct worker_info info;
        worker_info(scheduler->lanes[i].worker, &info);
        int load = info.running + info.waiting + (scheduler->lanes[i].job[0] ? 1 : 0);
        bool fits = (!for_training || scheduler->lanes[i].trains) && (!idle || !scheduler->lanes[i].job[0]);
        if (info.up && fits && (!best || load < best_load)) {
            best = scheduler->lanes[i].worker;
            best_load = load;
        }
    }
    return best;
}

static bool is_evaluation(const struct live_job *live)
{
    return live->job.kind == JOB_EVALUATION;
}

static void start_validation(struct live_job *live)
{
    struct worker *worker = pick(live->scheduler, true, live->alone);
    if (!worker)
        return;
    live->validation =
        worker_request(worker, is_evaluation(live) ? FRAME_EVALUATION_VALIDATE : FRAME_JOB_VALIDATE,
                       scheduler_job_payload(live->scheduler, &live->job), job_frames_validation, live);
    if (live->validation) {
        live->validator = worker;
        live->writes++;
    }
}

/* ---- running ---- */

void scheduler_lane_free(struct lane *lane)
{
    lane->job[0] = '\0';
}

void live_job_stop(struct live_job *live, const char *reason)
{
    worker_send(live->trainer, FRAME_JOB_STOP,
                json_pack("{s:s,s:I,s:s}", "job", live->job.id, "attempt", (json_int_t)live->job.attempt,
                          "reason", reason));
}

/* What is needed beyond scheduler_job_payload() to go on from where it is. scored: of an evaluation. */
static json_t *start_payload(const struct live_job *live, const char *scored)
{
    json_t *payload = scheduler_job_payload(live->scheduler, &live->job);
    if (!payload)
        return NULL;
    if (is_evaluation(live)) {
        json_object_set_new(payload, "done", scored ? json_loads(scored, 0, NULL) : json_object());
        json_object_set_new(payload, "total_steps", json_integer(live->job.total_steps));
    } else {
        json_object_set_new(payload, "resume_from",
                            live->resume_from[0] ? json_string(live->resume_from) : json_null());
    }
    return payload;
}

/* The row says `running`: hand the job to its worker, unless it was cancelled or lost its worker meanwhile. */
static void start_on_worker(struct live_job *live, const char *scored)
{
    struct scheduler *scheduler = live->scheduler;
    struct lane *lane = lane_of_job(live); /* NULL: the worker died while we wrote */
    if (live->ending.status) {             /* cancelled while we wrote */
        if (lane)
            scheduler_lane_free(lane);
        scheduler_run(scheduler);
        return;
    }
    if (!lane || worker_send(live->trainer, is_evaluation(live) ? FRAME_EVALUATION_START : FRAME_JOB_START,
                             start_payload(live, scored))) {
        if (lane)
            scheduler_lane_free(lane);
        live->trainer = NULL;
        live_job_set_status(live, live_job_wants(live, JOB_PAUSED) ? JOB_PAUSED : JOB_QUEUED);
        live_job_commit(live);
        return;
    }
    struct worker_info info;
    worker_info(live->trainer, &info);
    bool resumed = is_evaluation(live) ? live->job.step > 0 : live->resume_from[0] != '\0';
    live_job_say(live, "info", "%s %s on %s", is_evaluation(live) ? "Evaluation" : "Fine-tuning",
                 resumed ? "resumed" : "started", info.device);
    log_write(LOG_INFO, "job started", "job", live->job.id, "device", info.device, "resume_from",
              live->resume_from, NULL);
    if (live_job_wants(live, JOB_PAUSED))
        live_job_stop(live, "pause");
}

/* The row could not be written, or what it goes on from could not be read. */
static void put_back(struct live_job *live, const char *what, const struct error *error)
{
    struct lane *lane = lane_of_job(live);
    if (live->ending.status) {
        if (lane)
            scheduler_lane_free(lane);
        scheduler_run(live->scheduler);
        return;
    }
    live_job_set_status(live, JOB_QUEUED);
    if (lane)
        scheduler_lane_free(lane);
    live->trainer = NULL;
    live_job_retry_later(live, what, error);
}

static void on_scored(void *arg, int code, const char *scored)
{
    struct live_job *live = arg;
    live->writes--;
    live->changes--;
    if (code)
        put_back(live, "what an evaluation has scored", NULL);
    else
        start_on_worker(live, scored);
}

static void on_running(void *arg, int code, const struct error *error)
{
    struct live_job *live = arg;
    if (!code && is_evaluation(live) && !live->ending.status) {
        store_evaluation_scored(live->scheduler->options.store, live->job.id, on_scored, live);
        return; /* it is still changing */
    }
    live->writes--;
    live->changes--;
    if (code)
        put_back(live, "the start of a job", error);
    else
        start_on_worker(live, NULL);
}

static void start_job(struct live_job *live, struct lane *lane)
{
    struct worker_info info;
    worker_info(lane->worker, &info);
    snprintf(live->job.device, sizeof live->job.device, "%s", info.device);
    live->trainer = lane->worker;
    live->job.attempt++;
    live->job.queue_position = -1;
    if (!live->job.started_at)
        live->job.started_at = live_job_now();
    live_job_set_status(live, JOB_RUNNING);
    snprintf(lane->job, sizeof lane->job, "%s", live->job.id);
    lane->attempt = live->job.attempt;
    live->changes++;
    live->writes++;
    store_job_update(live->scheduler->options.store, &live->job, on_running, live);
}

void scheduler_run(struct scheduler *scheduler)
{
    if (scheduler->draining || !scheduler->pool)
        return;
    int64_t position = 0;
    for (struct live_job *live = scheduler->first, *next; live; live = next) {
        next = live->next;
        if (live->ended || live->changes || live->ending.status)
            continue;
        if (live->job.status == JOB_VALIDATING && !live->validator)
            start_validation(live);
        if (live->job.status != JOB_QUEUED)
            continue;
        struct lane *lane = NULL;
        for (size_t i = 0; i < scheduler->n_lanes && !lane; i++) {
            struct worker_info info;
            worker_info(scheduler->lanes[i].worker, &info);
            if (info.up && scheduler->lanes[i].trains && !scheduler->lanes[i].job[0])
                lane = &scheduler->lanes[i];
        }
        if (lane)
            start_job(live, lane);
        else
            live->job.queue_position = position++;
    }
}

/* ---- workers come and go ---- */

static void on_worker_up(void *arg, struct worker *worker)
{
    struct scheduler *scheduler = arg;
    struct worker_info info;
    worker_info(worker, &info);
    log_write(LOG_INFO, "worker up", "device", info.device, NULL);
    scheduler_run(scheduler);
}

static void on_worker_down(void *arg, struct worker *worker, const char *reason)
{
    struct scheduler *scheduler = arg;
    struct worker_info info;
    worker_info(worker, &info);
    log_write(scheduler->draining ? LOG_INFO : LOG_WARN, "worker down", "device", info.device, "reason",
              reason, NULL);
    struct lane *lane = scheduler_lane_of(scheduler, worker);
    if (!lane)
        return;
    struct live_job *live = lane->job[0] ? live_job_find(scheduler, lane->job) : NULL;
    scheduler_lane_free(lane);
    if (!live || live->trainer != worker || live->changes || live->ending.status || scheduler->draining)
        return; /* a start that is being committed finds out by itself */
    live->trainer = NULL;
    live->deaths = live->death_step == live->job.step ? live->deaths + 1 : 1;
    live->death_step = live->job.step;
    if (live->deaths >= DEATHS_AT_ONE_STEP) {
        char message[sizeof live->ending.message];
        snprintf(message, sizeof message, "The worker died %d times at step %lld: %s", live->deaths,
                 (long long)live->job.step, reason);
        live_job_end(live, JOB_FAILED, "worker_lost", NULL, message);
        return;
    }
    live_job_say(live, "warn", "The worker died (%s); the job goes on from %s", reason,
                 is_evaluation(live) ? "the last example that was scored" : "its last checkpoint");
    live_job_set_status(live, live_job_wants(live, JOB_PAUSED) ? JOB_PAUSED : JOB_QUEUED);
    live_job_commit(live);
}

/* ---- looking ---- */

const struct job_resource *scheduler_find(struct scheduler *scheduler, const char *id)
{
    struct live_job *live = live_job_find(scheduler, id);
    return live ? &live->job : NULL;
}

bool scheduler_uses_model(struct scheduler *scheduler, const char *id)
{
    const struct model_entry *entry = registry_find(scheduler->options.registry, id);
    for (struct live_job *live = scheduler->first; live; live = live->next)
        if (!live->ended && (!strcmp(live->job.model, id) || (entry && !strcmp(live->job.id, entry->job)) ||
                             (is_evaluation(live) && evaluation_uses(&live->job, id))))
            return true;
    return false;
}

struct worker *scheduler_pick_trainer(struct scheduler *scheduler)
{
    return pick(scheduler, true, false);
}

struct worker *scheduler_pick(struct scheduler *scheduler)
{
    return pick(scheduler, false, false);
}

void scheduler_each(struct scheduler *scheduler, void (*visit)(void *arg, const struct job_resource *job),
                    void *arg)
{
    for (struct live_job *live = scheduler->first; live; live = live->next)
        if (!live->ended)
            visit(arg, &live->job);
}

int64_t scheduler_count(const struct scheduler *scheduler, enum job_status status)
{
    return scheduler->counts[status];
}

/* ---- life ---- */

int scheduler_create(const struct scheduler_options *options, struct scheduler **ret_scheduler,
                     struct error *error)
{
    struct scheduler *scheduler = calloc(1, sizeof *scheduler);
    if (!scheduler)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the scheduler");
    scheduler->options = *options;
    scheduler->callbacks = (struct worker_pool_callbacks){
        .arg = scheduler, .up = on_worker_up, .down = on_worker_down, .job_frame = job_frames_take};
    uv_timer_init(options->loop, &scheduler->retry);
    scheduler->retry.data = scheduler;
    *ret_scheduler = scheduler;
    return 0;
}

const struct worker_pool_callbacks *scheduler_pool_callbacks(struct scheduler *scheduler)
{
    return &scheduler->callbacks;
}

static bool is_gpu(const struct worker *worker)
{
    struct worker_info info;
    worker_info(worker, &info);
    return !strncmp(info.device, "cuda:", strlen("cuda:"));
}

void scheduler_attach(struct scheduler *scheduler, struct worker_pool *pool)
{
    scheduler->pool = pool;
    scheduler->n_lanes = worker_pool_count(pool);
    for (size_t i = 0; i < scheduler->n_lanes; i++) {
        scheduler->lanes[i].worker = worker_pool_at(pool, i);
        scheduler->has_gpu |= is_gpu(scheduler->lanes[i].worker);
    }
    for (size_t i = 0; i < scheduler->n_lanes; i++)
        scheduler->lanes[i].trains = !scheduler->has_gpu || is_gpu(scheduler->lanes[i].worker);
}

int scheduler_recover(struct scheduler *scheduler, struct error *error)
{
    struct job_recovery *items = NULL;
    size_t count = 0;
    int code = store_count_jobs(scheduler->options.store, scheduler->counts, error);
    if (!code)
        code = store_load_unfinished(scheduler->options.store, &items, &count, error);
    for (size_t i = 0; i < count; i++) {
        struct live_job *live = code ? NULL : live_job_add(scheduler, &items[i].job);
        if (!live) {
            job_free(&items[i].job);
            if (!code)
                code = error_set(error, ERROR_NO_MEMORY, "no memory for the jobs that are to go on");
            continue;
        }
        snprintf(live->resume_from, sizeof live->resume_from, "%s", items[i].resume_from);
        live->validated = live->job.total_steps > 0;
        live->job.queue_position = -1;
        job_evaluations_recover(live);
        if (live->job.status == JOB_RUNNING && !live->evaluations.trained) {
            live_job_set_status(live, JOB_QUEUED);
            live_job_say(live, "warn", "The server restarted; the job goes on from %s",
                         is_evaluation(live)    ? "the last example that was scored"
                         : live->resume_from[0] ? "its last checkpoint"
                                                : "the start");
            live_job_commit(live);
        }
    }
    free(items);
    for (struct live_job *live = scheduler->first; live && !code; live = live->next)
        job_evaluations_look(live);
    return code;
}

void scheduler_drain(struct scheduler *scheduler)
{
    scheduler->draining = true;
}

bool scheduler_is_settled(const struct scheduler *scheduler)
{
    for (const struct live_job *live = scheduler->first; live; live = live->next)
        if (live->ending.writing)
            return false;
    return true;
}

static void on_retry_closed(uv_handle_t *handle)
{
    free(handle->data);
}

void scheduler_free(struct scheduler *scheduler)
{
    if (!scheduler)
        return;
    while (scheduler->first) {
        struct live_job *live = scheduler->first;
        scheduler->first = live->next;
        struct problem problem = {0};
        problem_set(&problem, 503, "shutting_down", NULL, "The server is shutting down.");
        while (live->waiters) {
            struct waiter *waiter = live->waiters;
            live->waiters = waiter->next;
            waiter->done(waiter->arg, NULL, &problem);
            free(waiter);
        }
        live_job_close_events(live);
        live_job_free(live);
    }
    uv_close((uv_handle_t *)&scheduler->retry, on_retry_closed);
}
