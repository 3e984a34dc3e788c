/* live_job.c: see live_job.h. Loop thread only. */
#include "daemon/live_job.h"

#include "base/log.h"
#include "daemon/job_evaluations.h"
#include "daemon/result_file.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RETRY_MS = 1000 };

struct event_subscription {
    struct event_subscription *next;
    struct live_job *live; /* NULL once the job has ended */
    event_listener on_event;
    void *arg;
};

static void end_job_commit(struct live_job *live);

int64_t live_job_now(void)
{
    return (int64_t)time(NULL);
}

struct live_job *live_job_find(struct scheduler *scheduler, const char *id)
{
    for (struct live_job *live = scheduler->first; live; live = live->next)
        if (!strcmp(live->job.id, id))
            return live;
    return NULL;
}

void live_job_set_status(struct live_job *live, enum job_status status)
{
    live->scheduler->counts[live->job.status]--;
    live->scheduler->counts[status]++;
    live->job.status = status;
}

struct live_job *live_job_add(struct scheduler *scheduler, const struct job_resource *job)
{
    struct live_job *live = calloc(1, sizeof *live);
    if (!live)
        return NULL;
    live->scheduler = scheduler;
    live->job = *job;
    live->death_step = -1;
    json_t *hyperparameters = json_loads(job->hyperparameters, 0, NULL);
    const char *adaptation = json_string_value(json_object_get(hyperparameters, "adaptation"));
    live->full = adaptation && !strcmp(adaptation, "full");
    json_decref(hyperparameters);
    struct live_job **link = &scheduler->first;
    while (*link)
        link = &(*link)->next;
    *link = live;
    return live;
}

void live_job_model_row(const struct live_job *live, int64_t step, const char *path,
                        struct adapter_row *ret_row)
{
    const char *organization = live->scheduler->options.organization;
    const char *part = strchr(live->job.id, '-');
    memset(ret_row, 0, sizeof *ret_row);
    int n = snprintf(ret_row->model.id, sizeof ret_row->model.id, "ft:%s:%s:%s:%s", live->job.model,
                     organization, live->job.suffix, part ? part + 1 : live->job.id);
    if (step >= 0)
        snprintf(ret_row->model.id + n, sizeof ret_row->model.id - (size_t)n, ":ckpt-step-%lld",
                 (long long)step);
    ret_row->model.created = live_job_now();
    snprintf(ret_row->model.owned_by, sizeof ret_row->model.owned_by, "%s", organization);
    snprintf(ret_row->model.root, sizeof ret_row->model.root, "%s", live->job.model);
    snprintf(ret_row->model.parent, sizeof ret_row->model.parent, "%s", live->job.model);
    snprintf(ret_row->path, sizeof ret_row->path, "%s", path);
    snprintf(ret_row->job, sizeof ret_row->job, "%s", live->job.id);
    ret_row->step = step;
    ret_row->full = live->full;
}

void live_job_release(struct live_job *live)
{
    if (!live->ended || live->writes)
        return;
    struct live_job **link = &live->scheduler->first;
    while (*link && *link != live)
        link = &(*link)->next;
    if (*link)
        *link = live->next;
    live_job_close_events(live);
    live_job_free(live);
}

void live_job_free(struct live_job *live)
{
    json_decref(live->evaluations.refused);
    job_free(&live->job);
    free(live);
}

static void on_retry(uv_timer_t *timer)
{
    struct scheduler *scheduler = timer->data;
    for (struct live_job *live = scheduler->first, *next; live; live = next) {
        next = live->next;
        if (live->changes || live->ended)
            continue;
        if (live->ending.status)
            end_job_commit(live);
        else if (live->refused)
            live_job_commit(live);
        else
            job_evaluations_look(live);
    }
    scheduler_run(scheduler);
}

void live_job_retry_later(struct live_job *live, const char *what, const struct error *error)
{
    log_write(LOG_ERROR, "cannot write to the store; trying again", "what", what, "job", live->job.id,
              "reason", error ? error->message : "", NULL);
    uv_timer_start(&live->scheduler->retry, on_retry, RETRY_MS, 0);
}

/* ---- events ---- */

static void publish(struct live_job *live, const struct event_resource *event)
{
    for (struct event_subscription *s = live->subscriptions, *next; s; s = next) {
        next = s->next;
        s->on_event(s->arg, event);
    }
}

void live_job_close_events(struct live_job *live)
{
    publish(live, NULL);
    for (struct event_subscription *s = live->subscriptions; s; s = s->next)
        s->live = NULL;
    live->subscriptions = NULL;
}

static void on_event_written(void *arg, int code, const struct event_resource *event)
{
    struct live_job *live = arg;
    live->writes--;
    if (code)
        log_write(LOG_ERROR, "an event was lost", "job", live->job.id, NULL);
    if (event)
        publish(live, event);
    live_job_release(live);
}

void live_job_append_event(struct live_job *live, const char *level, const char *type, const char *message,
                           json_t *data, int64_t step)
{
    char *text = data ? json_dumps(data, JSON_COMPACT) : NULL;
    json_decref(data);
    live->writes++;
    store_event_append(live->scheduler->options.store, live->job.id, level, type, message, text, step,
                       on_event_written, live);
    free(text);
}

void live_job_say(struct live_job *live, const char *level, const char *format, ...)
{
    char message[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    live_job_append_event(live, level, "message", message, NULL, -1);
}

struct event_subscription *scheduler_subscribe(struct scheduler *scheduler, const char *job,
                                               event_listener on_event, void *arg)
{
    struct live_job *live = live_job_find(scheduler, job);
    struct event_subscription *subscription = live ? calloc(1, sizeof *subscription) : NULL;
    if (!subscription)
        return NULL;
    *subscription = (struct event_subscription){
        .next = live->subscriptions, .live = live, .on_event = on_event, .arg = arg};
    live->subscriptions = subscription;
    return subscription;
}

void scheduler_unsubscribe(struct scheduler *scheduler, struct event_subscription *subscription)
{
    (void)scheduler;
    if (!subscription)
        return;
    if (subscription->live) {
        struct event_subscription **link = &subscription->live->subscriptions;
        while (*link != subscription)
            link = &(*link)->next;
        *link = subscription->next;
    }
    free(subscription);
}

/* ---- rows and the clients who wait for them ---- */

bool live_job_wants(const struct live_job *live, enum job_status status)
{
    for (const struct waiter *waiter = live->waiters; waiter; waiter = waiter->next)
        if (waiter->wanted == status)
            return true;
    return false;
}

/* Whoever resumed a job got that with any commit since, whatever the job has become meanwhile. */
static bool is_granted(const struct live_job *live, const struct waiter *waiter)
{
    return live->job.status == waiter->wanted ||
           (!live->ended && (waiter->wanted == JOB_QUEUED || waiter->wanted == JOB_VALIDATING));
}

/* After a commit: those who got what they asked for, and those who never will. */
static void answer_waiters(struct live_job *live)
{
    struct waiter *waiter = live->waiters, *kept = NULL;
    live->waiters = NULL;
    while (waiter) {
        struct waiter *next = waiter->next;
        if (is_granted(live, waiter)) {
            waiter->done(waiter->arg, &live->job, NULL);
            free(waiter);
        } else if (live->ended) {
            struct problem problem = {0};
            problem_set(&problem, 400, "job_already_ended", NULL, "Job %s has already %s.", live->job.id,
                        job_status_name(live->job.status));
            waiter->done(waiter->arg, NULL, &problem);
            free(waiter);
        } else {
            waiter->next = kept;
            kept = waiter;
        }
        waiter = next;
    }
    live->waiters = kept;
}

static void on_row_committed(void *arg, int code, const struct error *error)
{
    struct live_job *live = arg;
    live->writes--;
    live->changes--;
    live->refused = code != 0;
    if (code)
        live_job_retry_later(live, "a job's status", error);
    else if (!live->changes)
        answer_waiters(live);
    scheduler_run(live->scheduler);
}

void live_job_commit(struct live_job *live)
{
    live->changes++;
    live->writes++;
    store_job_update(live->scheduler->options.store, &live->job, on_row_committed, live);
}

/* ---- the end ---- */

static void on_finished(void *arg, int code, const struct error *error, const struct event_resource *closing)
{
    struct live_job *live = arg;
    struct scheduler *scheduler = live->scheduler;
    live->writes--;
    live->changes--;
    if (code) {
        live_job_retry_later(live, "the end of a job", error);
        return;
    }
    live->ended = true;
    live_job_set_status(live, live->ending.status);
    live->job = live->ending.final;
    if (live->ending.row.path[0]) {
        struct error reason;
        if (registry_add(scheduler->options.registry, &live->ending.row, &reason))
            log_write(LOG_ERROR, "a finished adapter cannot be listed before the next start", "job",
                      live->job.id, "reason", reason.message, NULL);
    }
    log_write(LOG_INFO, "job ended", "job", live->job.id, "status", job_status_name(live->job.status),
              "reason", live->job.error_message, NULL);
    answer_waiters(live);
    if (closing)
        publish(live, closing);
    job_evaluations_ended(scheduler, &live->job);
    live_job_release(live);
    scheduler_run(scheduler);
}

/* The final row is made beside the live one, which clients go on seeing until the commit. */
static void end_job_commit(struct live_job *live)
{
    struct job_resource *final = &live->ending.final;
    *final = live->job; /* the owned strings stay live->job's */
    final->status = live->ending.status;
    final->finished_at = live_job_now();
    final->queue_position = -1;
    snprintf(final->error_code, sizeof final->error_code, "%s", live->ending.code);
    snprintf(final->error_param, sizeof final->error_param, "%s", live->ending.param);
    snprintf(final->error_message, sizeof final->error_message, "%s", live->ending.message);
    bool succeeded = final->status == JOB_SUCCEEDED;
    const bool trained = succeeded && final->kind == JOB_FINE_TUNING;
    if (trained) {
        snprintf(final->fine_tuned_model, sizeof final->fine_tuned_model, "%s",
                 live->evaluations.best[0] ? live->evaluations.best : live->ending.row.model.id);
        snprintf(final->result_file, sizeof final->result_file, "%s", live->ending.result.id);
    }
    if (succeeded)
        final->eta_seconds = 0;
    char closing[sizeof final->error_message + 64];
    if (succeeded && !trained)
        snprintf(closing, sizeof closing, "The evaluation has successfully completed: %lld examples",
                 (long long) final->step);
    else if (succeeded)
        snprintf(closing, sizeof closing, "The job has successfully completed: %s", final->fine_tuned_model);
    else if (final->status == JOB_CANCELLED)
        snprintf(closing, sizeof closing, "The job was cancelled");
    else
        snprintf(closing, sizeof closing, "The job failed: %s", final->error_message);
    live->changes++;
    live->writes++;
    store_job_finish(live->scheduler->options.store, final,
                     trained && !live->evaluations.best[0] ? &live->ending.row : NULL,
                     live->ending.result.id[0] ? &live->ending.result : NULL, closing, on_finished, live);
}

static void on_result_file(void *arg, int code, const struct file_resource *file)
{
    struct live_job *live = arg;
    live->writes--;
    live->changes--;
    live->ending.writing = false;
    if (code)
        log_write(LOG_ERROR, "cannot write a job's result file", "job", live->job.id, NULL);
    else
        live->ending.result = *file;
    end_job_commit(live);
}

static void on_metrics_committed(void *arg, int code, const struct error *error)
{
    struct live_job *live = arg;
    (void)code, (void)error; /* only to be sure that every metrics event before it can be read */
    result_file_write(live->scheduler->options.loop, live->scheduler->options.store,
                      live->scheduler->options.data_dir, live->job.id, on_result_file, live);
}

/* Every result before has been written, or was lost: then the evaluation goes on with what is missing. */
static void on_results_committed(void *arg, int code, const struct error *error)
{
    struct live_job *live = arg;
    (void)code, (void)error;
    live->writes--;
    live->changes--;
    if (!live->lost) {
        end_job_commit(live);
        return;
    }
    live->lost = false;
    live->ending.status = 0;
    live_job_say(live, "warn",
                 "Results could not be stored; the evaluation goes on with those that are missing");
    if (live_job_wants(live, JOB_CANCELLED)) {
        live_job_end(live, JOB_CANCELLED, NULL, NULL, NULL);
        return;
    }
    live_job_set_status(live, live_job_wants(live, JOB_PAUSED) ? JOB_PAUSED : JOB_QUEUED);
    live_job_commit(live);
}

void live_job_end(struct live_job *live, enum job_status status, const char *code, const char *param,
                  const char *message)
{
    live->ending.status = status;
    snprintf(live->ending.code, sizeof live->ending.code, "%s", code ? code : "");
    snprintf(live->ending.param, sizeof live->ending.param, "%s", param ? param : "");
    snprintf(live->ending.message, sizeof live->ending.message, "%s", message ? message : "");
    if (live->validator) { /* its answer is of no use any more, and would hold the memory and the streams */
        worker_request_cancel(live->validator, live->validation);
        live->writes--;
    }
    live->validator = live->trainer = NULL;
    if (status != JOB_SUCCEEDED) {
        end_job_commit(live);
        return;
    }
    if (live->job.kind == JOB_EVALUATION) {
        live->changes++;
        live->writes++;
        store_job_update(live->scheduler->options.store, &live->job, on_results_committed, live);
        return;
    }
    if (!live->evaluations.best[0]) {
        struct adapter_row *row = &live->ending.row;
        char folder[sizeof row->path];
        memcpy(folder, row->path, sizeof folder);
        live_job_model_row(live, -1, folder, row);
    }
    live->ending.writing = true;
    live->changes++;
    live->writes++;
    store_job_update(live->scheduler->options.store, &live->job, on_metrics_committed, live);
}
