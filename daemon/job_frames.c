/* job_frames.c: see job_frames.h. Loop thread only. */
#include "daemon/job_frames.h"

#include "base/log.h"
#include "daemon/job_evaluations.h"
#include "daemon/live_job.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double number_or_nan(const json_t *payload, const char *key)
{
    const json_t *value = json_object_get(payload, key);
    return json_is_number(value) ? json_number_value(value) : (double)NAN;
}

static int64_t integer_or_zero(const json_t *payload, const char *key)
{
    const json_t *value = json_object_get(payload, key);
    return json_is_integer(value) ? (int64_t)json_integer_value(value)
           : json_is_real(value)  ? (int64_t)json_real_value(value)
                                  : 0;
}

static const char *string_or_empty(const json_t *payload, const char *key)
{
    const char *value = json_string_value(json_object_get(payload, key));
    return value ? value : "";
}

/* The code of a worker's error as clients are told it. */
static const char *error_code(const json_t *error)
{
    const char *code = string_or_empty(error, "code");
    return strcmp(code, error_code_name(ERROR_NO_MEMORY)) ? code : insufficient_memory;
}

/* ---- validation ---- */

static void on_invalid(struct live_job *live, const json_t *payload)
{
    const json_t *lines = json_object_get(payload, "lines");
    struct buffer message = {0};
    buffer_append_string(&message, string_or_empty(payload, "message"));
    size_t index;
    const json_t *line;
    json_array_foreach(lines, index, line)
    {
        live_job_say(live, "error", "%s, line %lld: %s", string_or_empty(line, "file"),
                     (long long)integer_or_zero(line, "line"), string_or_empty(line, "reason"));
        if (index) /* the first is in the message already */
            buffer_printf(&message, "; line %lld: %s", (long long)integer_or_zero(line, "line"),
                          string_or_empty(line, "reason"));
    }
    live_job_end(live, JOB_FAILED, error_code(payload), string_or_empty(payload, "param"),
                 message.data ? message.data : "");
    buffer_free(&message);
}

static void on_tasks_validated(struct live_job *live, const json_t *payload)
{
    const json_t *warning;
    size_t i;
    json_array_foreach(json_object_get(payload, "warnings"), i, warning)
        live_job_say(live, "warn", "%s", json_string_value(warning));
    live_job_say(live, "info", "Tasks validated: %lld examples", (long long)live->job.total_steps);
}

void job_frames_validation(void *arg, enum frame_type type, const json_t *payload)
{
    struct live_job *live = arg;
    struct scheduler *scheduler = live->scheduler;
    const struct lane *lane = scheduler_lane_of(scheduler, live->validator);
    live->writes--; /* the request held the memory as a write does */
    live->validator = NULL;
    if (live->ended || live->ending.status || live->job.status != JOB_VALIDATING || scheduler->draining) {
        live_job_release(live);
        return;
    }
    if (type == FRAME_JOB_VALIDATED) {
        live->validated = true;
        live->job.total_steps = integer_or_zero(payload, "total_steps");
        live->job.planned_memory_bytes = integer_or_zero(payload, "planned_bytes");
        live_job_set_status(live, JOB_QUEUED);
        if (live->job.kind == JOB_EVALUATION)
            on_tasks_validated(live, payload);
        else
            live_job_say(live, "info",
                         "Files validated: %lld training examples (%lld tokens, %lld of them under the "
                         "loss), %lld for "
                         "validation; %lld steps",
                         (long long)integer_or_zero(payload, "examples"),
                         (long long)integer_or_zero(payload, "tokens"),
                         (long long)integer_or_zero(payload, "loss_tokens"),
                         (long long)integer_or_zero(payload, "validation_examples"),
                         (long long)live->job.total_steps);
        live_job_commit(live);
    } else if (type == FRAME_JOB_INVALID) {
        on_invalid(live, payload);
    } else if (!strcmp(string_or_empty(payload, "code"), error_code_name(ERROR_BUSY))) {
        live->alone = true;
        scheduler_run(scheduler);
    } else if (!strcmp(string_or_empty(payload, "code"), error_code_name(ERROR_DEVICE)) &&
               ((lane && lane->job[0]) || ++live->deaths < DEATHS_AT_ONE_STEP)) {
        live->alone = true;
        scheduler_run(scheduler); /* the worker died: another one, or the next, will do it */
    } else {
        live_job_end(live, JOB_FAILED, error_code(payload), string_or_empty(payload, "param"),
                     string_or_empty(payload, "message"));
    }
}

/* ---- a running job ---- */

static void on_metrics(struct live_job *live, const json_t *payload)
{
    struct job_resource *job = &live->job;
    job->step = integer_or_zero(payload, "step");
    job->total_steps = integer_or_zero(payload, "total_steps");
    job->trained_tokens = integer_or_zero(payload, "trained_tokens");
    job->loss = number_or_nan(payload, "train_loss");
    job->tokens_per_second = number_or_nan(payload, "tokens_per_second");
    job->eta_seconds = number_or_nan(payload, "eta_seconds");
    job->planned_memory_bytes = integer_or_zero(payload, "planned_memory_bytes");
    job->peak_memory_bytes = integer_or_zero(payload, "peak_memory_bytes");
    job->skipped_steps = integer_or_zero(payload, "skipped_steps");
    job->bytes_per_token = number_or_nan(payload, "bytes_per_token");
    double valid_loss = number_or_nan(payload, "valid_loss"),
           valid_accuracy = number_or_nan(payload, "valid_accuracy");
    json_t *data = json_pack(
        "{s:I,s:I,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:I,s:o}", "step", (json_int_t)job->step, "total_steps",
        (json_int_t)job->total_steps, "train_loss", frame_number(job->loss), "train_mean_token_accuracy",
        frame_number(number_or_nan(payload, "train_accuracy")), "valid_loss", frame_number(valid_loss),
        "valid_mean_token_accuracy", frame_number(valid_accuracy), "full_valid_loss",
        frame_number(valid_loss), "full_valid_mean_token_accuracy", frame_number(valid_accuracy),
        "learning_rate", frame_number(number_or_nan(payload, "learning_rate")), "grad_norm",
        frame_number(number_or_nan(payload, "grad_norm")), "tokens_per_second",
        frame_number(job->tokens_per_second), "skipped_steps", (json_int_t)job->skipped_steps, "loss_scale",
        frame_number(number_or_nan(payload, "loss_scale")));
    char message[160];
    int n = snprintf(message, sizeof message, "Step %lld/%lld: training loss=%.4f", (long long)job->step,
                     (long long)job->total_steps, job->loss);
    if (!isnan(valid_loss))
        snprintf(message + n, sizeof message - (size_t)n, ", validation loss=%.4f", valid_loss);
    live_job_append_event(live, "info", "metrics", message, data, job->step);
}

struct checkpoint_write {
    struct live_job *live;
    struct adapter_row row;
    bool resumable_only;
};

static void on_checkpoint_written(void *arg, int code, const struct error *error)
{
    struct checkpoint_write *write = arg;
    struct live_job *live = write->live;
    live->writes--;
    if (code) {
        log_write(LOG_ERROR, "a checkpoint's row was lost", "job", live->job.id, "reason",
                  error ? error->message : "", NULL);
    } else {
        snprintf(live->resume_from, sizeof live->resume_from, "%s", write->row.path);
        struct error reason;
        if (!write->resumable_only && registry_add(live->scheduler->options.registry, &write->row, &reason))
            log_write(LOG_ERROR, "a checkpoint cannot be listed before the next start", "reason",
                      reason.message, NULL);
        if (!write->resumable_only) {
            live_job_say(live, "info", "Checkpoint at step %lld: %s", (long long)write->row.step,
                         write->row.model.id);
            job_evaluations_look(live);
        }
    }
    free(write);
    live_job_release(live);
}

static void on_checkpoint(struct live_job *live, const json_t *payload)
{
    struct scheduler *scheduler = live->scheduler;
    struct checkpoint_write *write = calloc(1, sizeof *write);
    if (!write)
        return; /* without its row the checkpoint is only not used */
    write->live = live;
    write->resumable_only = json_is_true(json_object_get(payload, "resumable_only"));
    struct adapter_row *row = &write->row;
    live_job_model_row(live, integer_or_zero(payload, "step"), string_or_empty(payload, "folder"), row);
    live->writes++;
    if (write->resumable_only) {
        store_resume_point_set(scheduler->options.store, live->job.id, row->step, row->path,
                               on_checkpoint_written, write);
        return;
    }
    struct checkpoint_resource checkpoint = {
        .created_at = row->model.created,
        .step = row->step,
        .train_loss = number_or_nan(payload, "train_loss"),
        .train_accuracy = number_or_nan(payload, "train_accuracy"),
        .valid_loss = number_or_nan(payload, "valid_loss"),
        .valid_accuracy = number_or_nan(payload, "valid_accuracy"),
    };
    store_new_id("ftckpt-", checkpoint.id);
    snprintf(checkpoint.job, sizeof checkpoint.job, "%s", live->job.id);
    snprintf(checkpoint.model, sizeof checkpoint.model, "%s", row->model.id);
    store_checkpoint_insert(scheduler->options.store, &checkpoint, row, on_checkpoint_written, write);
}

/* Not before: the row's own insertion, which lists it, may have been on its way. */
static void on_checkpoint_deleted(void *arg, int code, const struct error *error)
{
    struct checkpoint_write *write = arg;
    struct live_job *live = write->live;
    (void)code, (void)error; /* one that only resumes has no such row */
    live->writes--;
    registry_remove(live->scheduler->options.registry, write->row.model.id);
    free(write);
    live_job_release(live);
}

static void on_checkpoint_dropped(struct live_job *live, const json_t *payload)
{
    struct checkpoint_write *write = calloc(1, sizeof *write);
    if (!write)
        return; /* its folder is gone: naming it is an error, no more */
    write->live = live;
    live_job_model_row(live, integer_or_zero(payload, "step"), "", &write->row);
    live->writes++;
    store_checkpoint_delete(live->scheduler->options.store, live->job.id, write->row.step,
                            on_checkpoint_deleted, write);
}

/* While draining, the row of a job that no client paused stays `running`, so that the next start resumes it. */
static void on_paused(struct live_job *live, int64_t step, const json_t *reason)
{
    bool wanted = live_job_wants(live, JOB_PAUSED);
    if (json_is_object(reason))
        live_job_say(live, "warn",
                     "No checkpoint could be written (%s): the job will go on from the last one",
                     string_or_empty(reason, "message"));
    if (!wanted && live->scheduler->draining)
        return;
    live_job_set_status(live, wanted ? JOB_PAUSED : JOB_QUEUED);
    if (wanted)
        live_job_say(live, "info", "The job is paused at %s %lld",
                     live->job.kind == JOB_EVALUATION ? "example" : "step", (long long)step);
    live_job_commit(live);
}

static void on_ended(struct live_job *live, const json_t *payload)
{
    const char *status = string_or_empty(payload, "status");
    const json_t *reason = json_object_get(payload, "error");
    live->trainer = NULL;
    live->job.trained_tokens = integer_or_zero(payload, "trained_tokens");
    if (!strcmp(status, "succeeded")) {
        if (live->job.evaluations) {
            job_evaluations_trained(live, string_or_empty(payload, "folder"));
            return;
        }
        snprintf(live->ending.row.path, sizeof live->ending.row.path, "%s",
                 string_or_empty(payload, "folder"));
        live_job_end(live, JOB_SUCCEEDED, NULL, NULL, NULL);
    } else if (!strcmp(status, "failed")) {
        live_job_end(live, JOB_FAILED, error_code(reason), string_or_empty(reason, "param"),
                     string_or_empty(reason, "message"));
    } else if (!strcmp(status, "cancelled")) {
        live_job_end(live, JOB_CANCELLED, NULL, NULL, NULL);
    } else {
        on_paused(live, integer_or_zero(payload, "step"), reason);
    }
}

void job_frames_take(void *arg, struct worker *worker, enum frame_type type, const json_t *payload)
{
    struct scheduler *scheduler = arg;
    const char *id = string_or_empty(payload, "job");
    int64_t attempt = integer_or_zero(payload, "attempt");
    struct lane *lane = scheduler_lane_of(scheduler, worker);
    if (type == FRAME_JOB_ENDED && lane && !strcmp(lane->job, id) && lane->attempt == attempt)
        scheduler_lane_free(lane);
    struct live_job *live = live_job_find(scheduler, id);
    if (live && live->trainer == worker && live->job.attempt == attempt && !live->ending.status) {
        switch (type) {
        case FRAME_JOB_MESSAGE:
            live_job_say(live, string_or_empty(payload, "level"), "%s", string_or_empty(payload, "message"));
            break;
        case FRAME_JOB_METRICS:
            on_metrics(live, payload);
            break;
        case FRAME_EVALUATION_RESULTS:
            evaluation_frames_results(live, payload);
            break;
        case FRAME_JOB_CHECKPOINT:
            on_checkpoint(live, payload);
            break;
        case FRAME_JOB_CHECKPOINT_DROPPED:
            on_checkpoint_dropped(live, payload);
            break;
        case FRAME_JOB_ENDED:
            on_ended(live, payload);
            break;
        default:
            break;
        }
    }
    if (type == FRAME_JOB_ENDED)
        scheduler_run(scheduler);
}
