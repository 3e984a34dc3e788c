/* job_requests.c: what clients ask of jobs: create, cancel, pause, resume. Part of scheduler.h; loop thread
 * only. */
#include "daemon/job_evaluations.h"
#include "daemon/live_job.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* How long an answer waits for the plan (a worker may have to load the model first, or to read the data). A job that is
 * accepted without it is held against the memory by its validation. */
enum { PLAN_PATIENCE_MS = 3000 };

struct creation {
    struct scheduler *scheduler;
    struct job_resource job;
    bool validation; /* the validation file is being looked up */
    scheduler_keeper keep;
    scheduler_answer done;
    void *arg;
    struct worker *planner; /* asked for the plan, as this request */
    uint64_t plan;
    uv_timer_t patience; /* while planner is set */
};

static void on_patience_closed(uv_handle_t *handle)
{
    free(handle->data);
}

/* The job is whoever's took it. */
static void creation_free(struct creation *creation)
{
    if (creation->planner)
        uv_close((uv_handle_t *)&creation->patience, on_patience_closed);
    else
        free(creation);
}

static void creation_refuse(struct creation *creation, int status, const char *code, const char *param,
                            const char *format, ...) __attribute__((format(printf, 5, 6)));
static void creation_refuse(struct creation *creation, int status, const char *code, const char *param,
                            const char *format, ...)
{
    struct problem problem = {0};
    char message[sizeof problem.message];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    problem_set(&problem, status, code, param, "%s", message);
    creation->done(creation->arg, NULL, &problem);
    job_free(&creation->job);
    creation_free(creation);
}

static void on_job_inserted(void *arg, int code, const struct error *error)
{
    struct creation *creation = arg;
    struct scheduler *scheduler = creation->scheduler;
    if (code) {
        creation_refuse(creation, code == ERROR_INVALID || code == ERROR_NOT_FOUND ? 400 : 503, "store_error",
                        NULL, "The job could not be stored: %s", error ? error->message : "");
        return;
    }
    struct live_job *live = live_job_add(scheduler, &creation->job);
    if (!live) { /* the row stands: the next start takes it up */
        creation_refuse(creation, 503, "no_memory", NULL,
                        "The job is stored and will run after the next start.");
        return;
    }
    scheduler->counts[JOB_VALIDATING]++;
    creation->done(creation->arg, &live->job, NULL);
    creation_free(creation);
    live_job_say(live, "info", "Created fine-tuning job: %s", live->job.id);
    live_job_say(live, "info", "Validating training file: %s", live->job.training_file);
    scheduler_run(scheduler);
}

static void insert_job(struct creation *creation)
{
    store_job_insert(creation->scheduler->options.store, &creation->job,
                     creation->keep(creation->arg, &creation->job), on_job_inserted, creation);
}

static void on_planned(void *arg, enum frame_type type, const json_t *payload)
{
    struct creation *creation = arg;
    const char *code = json_string_value(json_object_get(payload, "code"));
    uv_timer_stop(&creation->patience);
    if (creation->scheduler->draining)
        creation_refuse(creation, 503, "shutting_down", NULL, "The server is shutting down.");
    else if (type == FRAME_FAILED && code && !strcmp(code, error_code_name(ERROR_NO_MEMORY)))
        creation_refuse(creation, 400, insufficient_memory,
                        json_string_value(json_object_get(payload, "param")), "The job cannot fit: %s.",
                        json_string_value(json_object_get(payload, "message")));
    else {
        creation->job.planned_memory_bytes = json_integer_value(
            json_object_get(payload, "planned_bytes")); /* 0 where the plan failed otherwise */
        insert_job(creation);
    }
}

static void on_patience_over(uv_timer_t *timer)
{
    struct creation *creation = timer->data;
    worker_request_cancel(creation->planner, creation->plan);
    insert_job(creation);
}

/* Refuse at once what cannot fit. Anything else that is wrong is for the validation to report, line by line. */
static void plan_job(struct creation *creation)
{
    struct worker *worker = scheduler_pick_trainer(creation->scheduler);
    if (worker)
        creation->plan =
            worker_request(worker, FRAME_JOB_PLAN, scheduler_job_payload(creation->scheduler, &creation->job),
                           on_planned, creation);
    if (!creation->plan) {
        insert_job(creation);
        return;
    }
    creation->planner = worker;
    uv_timer_init(creation->scheduler->options.loop, &creation->patience);
    creation->patience.data = creation;
    uv_timer_start(&creation->patience, on_patience_over, PLAN_PATIENCE_MS, 0);
}

static void on_tasks_checked(void *arg, int code, const char *missing)
{
    struct creation *creation = arg;
    if (code)
        creation_refuse(creation, 503, "store_error", "evaluations",
                        "The uploaded files could not be looked up.");
    else if (missing)
        creation_refuse(creation, 400, "task_not_found", "evaluations.tasks", EVALUATION_NO_TASK, missing);
    else
        plan_job(creation);
}

static void on_file_found(void *arg, int code, const struct file_resource *file)
{
    struct creation *creation = arg;
    const char *param = creation->validation ? "validation_file" : "training_file";
    const char *id = creation->validation ? creation->job.validation_file : creation->job.training_file;
    if (code == ERROR_NOT_FOUND) {
        creation_refuse(creation, 400, "file_not_found", param, "There is no file '%s'.", id);
    } else if (code) {
        creation_refuse(creation, 503, "store_error", param, "The file '%s' could not be looked up.", id);
    } else if (strcmp(file->purpose, "fine-tune")) {
        creation_refuse(creation, 400, "invalid_file_purpose", param,
                        "File '%s' has purpose '%s'; fine-tuning needs 'fine-tune'.", id, file->purpose);
    } else if (!creation->validation && creation->job.validation_file[0]) {
        creation->validation = true;
        store_file_get(creation->scheduler->options.store, creation->job.validation_file, on_file_found,
                       creation);
    } else if (creation->job.evaluations) {
        evaluation_check_tasks(creation->scheduler, creation->job.evaluations, on_tasks_checked, creation);
    } else {
        plan_job(creation);
    }
}

/* Is there room for the names of the adapter and of every checkpoint (live_job_model_row)? */
static bool names_fit(const struct scheduler *scheduler, const struct job_resource *job)
{
    int n = snprintf(NULL, 0, "ft:%s:%s:%s:%s:ckpt-step-%lld", job->model, scheduler->options.organization,
                     job->suffix, job->id, (long long)INT64_MAX);
    return n >= 0 && n < MODEL_ID_BYTES;
}

/* Every hyperparameter with "auto" precision settled, as text; *ret_refused names a precision that the devices
 * do not have. NULL: refused, or no memory. */
static char *settle_precision(const struct scheduler *scheduler, const json_t *hyperparameters,
                              const char **ret_refused)
{
    const char *precision = json_string_value(json_object_get(hyperparameters, "precision"));
    *ret_refused = NULL;
    if (!precision || !strcmp(precision, "auto"))
        precision = scheduler->has_gpu ? "bf16" : "fp32";
    if (!scheduler->has_gpu && strcmp(precision, "fp32")) {
        *ret_refused = precision;
        return NULL;
    }
    json_t *settled = json_copy((json_t *)(uintptr_t)hyperparameters);
    char *text = NULL;
    if (settled && !json_object_set_new(settled, "precision", json_string(precision)))
        text = json_dumps(settled, JSON_COMPACT);
    json_decref(settled);
    return text;
}

void scheduler_create_job(struct scheduler *scheduler, const struct job_request *request,
                          scheduler_keeper keep, scheduler_answer done, void *arg)
{
    struct creation *creation = calloc(1, sizeof *creation);
    struct problem problem = {0};
    if (!creation) {
        problem_set(&problem, 503, "no_memory", NULL, "The server is out of memory.");
        done(arg, NULL, &problem);
        return;
    }
    creation->scheduler = scheduler;
    creation->keep = keep;
    creation->done = done;
    creation->arg = arg;
    struct job_resource *job = &creation->job;
    store_new_id("ftjob-", job->id);
    job->created_at = live_job_now();
    snprintf(job->model, sizeof job->model, "%s", request->model);
    snprintf(job->suffix, sizeof job->suffix, "%s", request->suffix);
    snprintf(job->training_file, sizeof job->training_file, "%s", request->training_file);
    snprintf(job->validation_file, sizeof job->validation_file, "%s", request->validation_file);
    job->status = JOB_VALIDATING;
    job->trained_tokens = -1;
    job->queue_position = -1;
    job->loss = job->tokens_per_second = job->eta_seconds = job->bytes_per_token = (double)NAN;
    if (request->has_seed)
        job->seed = request->seed;
    else
        uv_random(NULL, NULL, &job->seed, 3, 0, NULL); /* the low 24 bits: exact in every client's JSON */
    const char *precision;
    job->hyperparameters = settle_precision(scheduler, request->hyperparameters, &precision);
    job->metadata = request->metadata ? json_dumps(request->metadata, JSON_COMPACT) : NULL;
    job->evaluations = request->evaluations ? json_dumps(request->evaluations, JSON_COMPACT) : NULL;
    const struct model_entry *entry = registry_find(scheduler->options.registry, request->model);
    const char *of_evaluations =
        evaluation_refused_precision(scheduler, json_object_get(request->evaluations, "settings"));
    if (of_evaluations)
        creation_refuse(creation, 400, "unsupported_precision", "evaluations.precision",
                        EVALUATION_NO_PRECISION, of_evaluations);
    else if (precision)
        creation_refuse(
            creation, 400, "unsupported_precision", "precision",
            "precision: %s needs a GPU; the workers of this server are CPUs, which train in fp32.",
            precision);
    else if (!job->hyperparameters || (request->metadata && !job->metadata) ||
             (request->evaluations && !job->evaluations))
        creation_refuse(creation, 503, "no_memory", NULL, "The server is out of memory.");
    else if (scheduler->draining)
        creation_refuse(creation, 503, "shutting_down", NULL, "The server is shutting down.");
    else if (!entry)
        creation_refuse(creation, 400, "model_not_found", "model", "There is no model '%s'.", request->model);
    else if (!entry->is_base)
        creation_refuse(creation, 400, "invalid_model", "model",
                        "'%s' is itself fine-tuned; fine-tune its base, '%s'.", request->model, entry->base);
    else if (!names_fit(scheduler, job))
        creation_refuse(creation, 400, "name_too_long", "suffix",
                        "suffix: the name of the fine-tuned model would be longer than %d bytes.",
                        MODEL_ID_BYTES - 1);
    else
        store_file_get(scheduler->options.store, job->training_file, on_file_found, creation);
}

/* The live job for a change of status, or NULL after having answered: an ended job is told apart from one
 * that never was by the store. */
struct lookup {
    scheduler_answer done;
    void *arg;
    char id[ID_BYTES];
};

static void on_ended_job_read(void *arg, int code, const struct job_resource *job)
{
    struct lookup *lookup = arg;
    struct problem problem = {0};
    if (code == ERROR_NOT_FOUND)
        problem_set(&problem, 404, "job_not_found", NULL, "There is no %s '%s'.",
                    strncmp(lookup->id, "eval-", 5) ? "fine-tuning job" : "evaluation", lookup->id);
    else if (code)
        problem_set(&problem, 503, "store_error", NULL, "The job could not be looked up.");
    else
        problem_set(&problem, 400, "job_already_ended", NULL, "Job %s has already %s.", lookup->id,
                    job_status_name(job->status));
    lookup->done(lookup->arg, NULL, &problem);
    free(lookup);
}

static struct live_job *find_or_answer(struct scheduler *scheduler, const char *id, scheduler_answer done,
                                       void *arg)
{
    struct live_job *live = live_job_find(scheduler, id);
    if (live && !live->ended && !scheduler->draining)
        return live;
    struct problem problem = {0};
    struct lookup *lookup = scheduler->draining ? NULL : calloc(1, sizeof *lookup);
    if (!lookup) {
        problem_set(&problem, 503, "shutting_down", NULL, "The server is shutting down or out of memory.");
        done(arg, NULL, &problem);
        return NULL;
    }
    lookup->done = done;
    lookup->arg = arg;
    snprintf(lookup->id, sizeof lookup->id, "%s", id);
    store_job_get(scheduler->options.store, id, on_ended_job_read, lookup);
    return NULL;
}

static bool wait_for(struct live_job *live, enum job_status wanted, scheduler_answer done, void *arg)
{
    struct waiter *waiter = malloc(sizeof *waiter);
    if (!waiter) {
        struct problem problem = {0};
        problem_set(&problem, 503, "no_memory", NULL, "The server is out of memory.");
        done(arg, NULL, &problem);
        return false;
    }
    *waiter = (struct waiter){.next = live->waiters, .wanted = wanted, .done = done, .arg = arg};
    live->waiters = waiter;
    return true;
}

void scheduler_cancel_job(struct scheduler *scheduler, const char *id, scheduler_answer done, void *arg)
{
    struct live_job *live = find_or_answer(scheduler, id, done, arg);
    if (!live || !wait_for(live, JOB_CANCELLED, done, arg) || live->ending.status)
        return;
    if (live->job.status == JOB_RUNNING && live->trainer && !live->changes)
        live_job_stop(live, "cancel");
    job_evaluations_cancel(live);
    live_job_end(live, JOB_CANCELLED, NULL, NULL, NULL);
}

void scheduler_pause_job(struct scheduler *scheduler, const char *id, scheduler_answer done, void *arg)
{
    struct live_job *live = find_or_answer(scheduler, id, done, arg);
    if (!live)
        return;
    if (live->job.status == JOB_PAUSED && !live->changes) {
        done(arg, &live->job, NULL);
        return;
    }
    bool asked = live_job_wants(live, JOB_PAUSED);
    if (!wait_for(live, JOB_PAUSED, done, arg) || live->ending.status || asked)
        return;
    if (live->job.status == JOB_RUNNING && !live->evaluations.trained) {
        if (live->trainer && !live->changes) /* else it is told when it starts */
            live_job_stop(live, "pause");
        return;
    }
    live->job.queue_position = -1;
    live_job_set_status(live, JOB_PAUSED);
    live_job_say(live, "info", "The job is paused");
    live_job_commit(live);
}

void scheduler_resume_job(struct scheduler *scheduler, const char *id, scheduler_answer done, void *arg)
{
    struct live_job *live = find_or_answer(scheduler, id, done, arg);
    if (!live)
        return;
    enum job_status next = live->evaluations.trained ? JOB_RUNNING
                           : live->validated         ? JOB_QUEUED
                                                     : JOB_VALIDATING;
    if (live->job.status != JOB_PAUSED) {
        struct problem problem = {0};
        problem_set(&problem, 400, "job_not_paused", NULL, "Job %s is %s, not paused.", id,
                    job_status_name(live->job.status));
        done(arg, NULL, &problem);
        return;
    }
    if (!wait_for(live, next, done, arg) || live->ending.status)
        return;
    /* A pause that is not committed yet is undone: its clients get this answer. */
    for (struct waiter *waiter = live->waiters; waiter; waiter = waiter->next)
        if (waiter->wanted == JOB_PAUSED)
            waiter->wanted = next;
    live_job_set_status(live, next);
    live_job_say(live, "info", "The job is resumed");
    live_job_commit(live);
    job_evaluations_look(live);
}
