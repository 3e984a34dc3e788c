/* worker_job.c: JOB_* frames and the one fine-tuning job a worker runs at a time. The worker's thread; the
 * callbacks come from inside trainer calls. */
#include "engine/worker_internal.h"

#include "base/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What JOB_VALIDATE and JOB_START have in common. Strings point into the payload. */
struct job_order {
    const char *name;
    int64_t attempt;
    struct named_folder base;
    struct trainer_options options; /* without model, tokenizer and callbacks */
};

/* Name and attempt first: with them a refusal can be addressed. */
static int read_address(const json_t *payload, struct job_order *order, struct error *error)
{
    int status = field_string(payload, "job", &order->name, error);
    if (!status)
        status = field_integer(payload, "attempt", 0, INT64_MAX, &order->attempt, error);
    return status;
}

static int read_order(const json_t *payload, struct job_order *order, struct error *error)
{
    struct trainer_options *options = &order->options;
    int64_t seed;
    int status;
    if ((status = field_folder(payload, "model", &order->base, error)) ||
        (status = field_string(payload, "training_file", &options->training_file, error)) ||
        (status = field_optional_string(payload, "validation_file", &options->validation_file, error)) ||
        (status = training_spec_decode(json_object_get(payload, "hyperparameters"), &options->spec, error)) ||
        (status = field_integer(payload, "seed", INT64_MIN, INT64_MAX, &seed, error)))
        return status;
    options->spec.seed = (uint64_t)seed;
    options->base_name = order->base.id;
    return 0;
}

/* ERROR_BUSY where there is no room for the model beside the job that trains: whether there is any, only its end
 * tells. */
static int take_model(struct worker *worker, struct job_order *order, struct loaded_model **ret_model,
                      struct error *error)
{
    int status = loaded_models_get(&worker->models, &order->base, ret_model, error);
    if (status == ERROR_NO_MEMORY && worker->job.model)
        status = error->code = ERROR_BUSY;
    if (status)
        return status;
    order->options.model = (*ret_model)->model;
    order->options.tokenizer = (*ret_model)->tokenizer;
    return 0;
}

/* {"job","attempt"}, to be filled. */
static json_t *address(const char *name, int64_t attempt)
{
    return json_pack("{s:o, s:I}", "job", frame_text(name, strlen(name)), "attempt", (json_int_t)attempt);
}

json_t *worker_job_address(const char *name, int64_t attempt, json_t *more)
{
    json_t *payload = address(name, attempt);
    int failed = !more || json_object_update(payload, more);
    json_decref(more);
    if (!failed)
        return payload;
    json_decref(payload);
    return NULL;
}

/* ---- validation ---- */

/* What a job on this model will find free beyond what is free now: by then other jobs are over, and models that nobody
 * uses make room. */
static int64_t reclaimable_bytes(const struct worker *worker, const struct loaded_model *model)
{
    struct kernel_device_info info;
    if (worker->ops->device_query(worker->device, &info) != KERNEL_OK)
        return 0;
    int64_t bytes = info.allocated_bytes - worker->idle_bytes - model->device_bytes;
    return bytes > 0 ? bytes : 0;
}

bool worker_job_plan(struct worker *worker, uint64_t id, const json_t *payload, bool in_trainer)
{
    struct job_order order = {.options.callbacks = {.arg = worker, .yield = worker_yield}};
    struct trainer_inspection inspection = {0};
    struct trainer_bad_lines bad;
    struct loaded_model *model = NULL;
    struct error error = {0};
    int64_t planned_bytes = 0;
    int status = read_address(payload, &order, &error);
    if (!status)
        status = read_order(payload, &order, &error);
    if (!status)
        status = take_model(worker, &order, &model, &error);
    if (!status) {
        order.options.reclaimable_bytes = reclaimable_bytes(worker, model);
        status = trainer_bound(&order.options, &planned_bytes, &error);
        if (!status && in_trainer)
            return false;
    }
    if (!status) {
        model->n_holders++;
        status = trainer_inspect(&order.options, &inspection, &bad, &error);
        model->n_holders--;
        planned_bytes = inspection.planned_bytes;
    }
    if (status < 0)
        worker_fail(worker, id, &error);
    else
        worker_stream_send(&worker->stream, FRAME_JOB_PLANNED, id,
                           json_pack("{s:I}", "planned_bytes", (json_int_t)planned_bytes));
    return true;
}

static json_t *encode_bad_lines(const struct trainer_bad_lines *bad)
{
    json_t *lines = json_array();
    int64_t n = bad->n_line_errors < DATASET_LISTED_ERRORS ? bad->n_line_errors : DATASET_LISTED_ERRORS;
    for (int64_t i = 0; i < n; i++) {
        const struct dataset_line_error *line = &bad->line_errors[i];
        json_array_append_new(lines,
                              json_pack("{s:s, s:I, s:o}", "file", bad->file, "line", (json_int_t)line->line,
                                        "reason", frame_text(line->reason, strlen(line->reason))));
    }
    return lines;
}

void worker_job_validate(struct worker *worker, uint64_t id, const json_t *payload)
{
    struct job_order order = {.options.callbacks = {.arg = worker, .yield = worker_yield}};
    struct trainer_inspection inspection;
    struct trainer_bad_lines bad = {0};
    struct loaded_model *model;
    struct error error = {0};
    int status = read_address(payload, &order, &error);
    if (status) {
        worker_fail(worker, id, &error);
        return;
    }
    if (!(status = read_order(payload, &order, &error)) &&
        !(status = take_model(worker, &order, &model, &error))) {
        order.options.reclaimable_bytes = reclaimable_bytes(worker, model);
        model->n_holders++; /* what is served meanwhile may need room */
        status = trainer_inspect(&order.options, &inspection, &bad, &error);
        model->n_holders--;
    }
    if (status == ERROR_DEVICE || status == ERROR_BUSY) {
        worker_fail(worker, id, &error);
        return;
    }
    if (status) {
        json_t *more = frame_error_payload(&error);
        json_object_set_new(more, "lines", encode_bad_lines(&bad));
        worker_stream_send(&worker->stream, FRAME_JOB_INVALID, id,
                           worker_job_address(order.name, order.attempt, more));
        return;
    }
    worker_stream_send(
        &worker->stream, FRAME_JOB_VALIDATED, id,
        worker_job_address(order.name, order.attempt,
                           json_pack("{s:I, s:I, s:I, s:I, s:I, s:I}", "examples",
                                     (json_int_t)inspection.examples, "tokens", (json_int_t)inspection.tokens,
                                     "loss_tokens", (json_int_t)inspection.loss_tokens, "validation_examples",
                                     (json_int_t)inspection.validation_examples, "total_steps",
                                     (json_int_t)inspection.total_steps, "planned_bytes",
                                     (json_int_t)inspection.planned_bytes)));
}

/* ---- reports of the running job ---- */

static void send_job(struct worker *worker, enum frame_type type, json_t *more)
{
    worker_stream_send(&worker->stream, type, 0,
                       worker_job_address(worker->job.name, worker->job.attempt, more));
}

static void on_message(void *arg, const char *level, const char *text)
{
    send_job(arg, FRAME_JOB_MESSAGE,
             json_pack("{s:s, s:o}", "level", level, "message", frame_text(text, strlen(text))));
}

static void on_metrics(void *arg, const struct training_metrics *metrics)
{
    struct worker *worker = arg;
    struct trainer_status status;
    trainer_status(worker->job.trainer, &status);
    send_job(worker, FRAME_JOB_METRICS,
             json_pack("{s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:I, s:o, s:I, s:o, s:I, s:I, s:o}",
                       "step", (json_int_t)metrics->step, "total_steps", (json_int_t)metrics->total_steps,
                       "train_loss", frame_number(metrics->train_loss), "train_accuracy",
                       frame_number(metrics->train_accuracy), "valid_loss",
                       metrics->has_valid ? frame_number(metrics->valid_loss) : json_null(), "valid_accuracy",
                       metrics->has_valid ? frame_number(metrics->valid_accuracy) : json_null(),
                       "learning_rate", frame_number(metrics->learning_rate), "grad_norm",
                       frame_number(metrics->grad_norm), "tokens_per_second",
                       frame_number(metrics->tokens_per_second), "trained_tokens",
                       (json_int_t)metrics->trained_tokens, "eta_seconds", frame_number(status.eta_seconds),
                       "skipped_steps", (json_int_t)status.skipped_steps, "loss_scale",
                       frame_number(status.loss_scale), "planned_memory_bytes",
                       (json_int_t)status.planned_bytes, "peak_memory_bytes", (json_int_t)status.peak_bytes,
                       "bytes_per_token", frame_number(status.bytes_per_token)));
}

static void on_checkpoint(void *arg, const struct training_checkpoint *checkpoint)
{
    send_job(arg, FRAME_JOB_CHECKPOINT,
             json_pack("{s:I, s:o, s:o, s:o, s:o, s:o, s:b, s:b}", "step", (json_int_t)checkpoint->step,
                       "folder", frame_text(checkpoint->folder, strlen(checkpoint->folder)), "train_loss",
                       frame_number(checkpoint->train_loss), "train_accuracy",
                       frame_number(checkpoint->train_accuracy), "valid_loss",
                       frame_number(checkpoint->valid_loss), "valid_accuracy",
                       frame_number(checkpoint->valid_accuracy), "best", (int)checkpoint->best,
                       "resumable_only", (int)checkpoint->resumable_only));
}

static bool on_make_room(void *arg)
{
    struct worker *worker = arg;
    return loaded_models_make_room(&worker->models);
}

static void on_checkpoint_dropped(void *arg, int64_t step)
{
    send_job(arg, FRAME_JOB_CHECKPOINT_DROPPED, json_pack("{s:I}", "step", (json_int_t)step));
}

/* ---- its life ---- */

json_t *worker_job_end(const char *status, bool resumable, json_t *folder, int64_t trained_tokens,
                       int64_t step, const struct error *error)
{
    return json_pack("{s:s, s:b, s:o, s:I, s:I, s:o}", "status", status, "resumable", (int)resumable,
                     "folder", folder, "trained_tokens", (json_int_t)trained_tokens, "step", (json_int_t)step,
                     "error", error ? frame_error_payload(error) : json_null());
}

void worker_job_abandon(struct worker *worker)
{
    struct worker_job *job = &worker->job;
    if (job->trainer)
        trainer_close(job->trainer);
    if (job->model)
        job->model->n_holders--;
    free(job->name);
    free(job->folder);
    *job = (struct worker_job){0};
}

/* Close the job, then say so: whoever is told may start it again elsewhere. */
static void end_job(struct worker *worker, const char *status, bool resumable, bool with_adapter,
                    const struct error *error)
{
    struct worker_job *job = &worker->job;
    struct trainer_status progress = {0};
    json_t *folder = json_null();
    if (job->trainer)
        trainer_status(job->trainer, &progress);
    if (with_adapter)
        folder = json_sprintf("%s/adapter", job->folder);
    json_t *payload = worker_job_address(
        job->name, job->attempt,
        worker_job_end(status, resumable, folder, progress.trained_tokens, progress.step, error));
    log_write(error ? LOG_WARN : LOG_INFO, "job ended", "job", job->name, "status", status, "reason",
              error ? error->message : NULL, NULL);
    worker_job_abandon(worker);
    worker_stream_send(&worker->stream, FRAME_JOB_ENDED, 0, payload);
}

/* A job that failed. A lost device is not held to be the job's fault: the process ends without a word about the
 * job, and the daemon starts it again from its checkpoint. */
static void fail_job(struct worker *worker, const struct error *error)
{
    if (error->code == ERROR_DEVICE) {
        worker_fault(worker, error);
        worker_job_abandon(worker);
    } else {
        end_job(worker, "failed", false, false, error);
    }
}

/* A job that does not become the running one. */
static void refuse_job(struct worker *worker, const struct job_order *order, const char *status,
                       const struct error *error)
{
    worker_stream_send(&worker->stream, FRAME_JOB_ENDED, 0,
                       worker_job_address(order->name, order->attempt,
                                          worker_job_end(status, false, json_null(), 0, 0, error)));
}

bool worker_job_start(struct worker *worker, const json_t *payload)
{
    struct worker_job *job = &worker->job;
    struct job_order order = {0};
    struct error error = {0};
    if (read_address(payload, &order, &error)) {
        log_write(LOG_ERROR, "a job that cannot be addressed", "reason", error.message, NULL);
        return true;
    }
    if (job->trainer || worker->evaluation) {
        error_set(&error, ERROR_BUSY, "this worker already runs another job");
        refuse_job(worker, &order, "failed", &error);
        return true;
    }
    job->name = strdup(order.name);
    if (!job->name) {
        error_set(&error, ERROR_NO_MEMORY, "no memory for a job");
        refuse_job(worker, &order, "failed", &error);
        return true;
    }
    int status;
    struct loaded_model *model;
    const char *folder = "";
    job->attempt = order.attempt;
    if ((status = read_order(payload, &order, &error)) ||
        (status = field_string(payload, "folder", &folder, &error)) ||
        (status = field_optional_string(payload, "resume_from", &order.options.resume_from, &error)))
        goto failed;
    job->folder = strdup(folder);
    if (!job->folder) {
        status = error_set(&error, ERROR_NO_MEMORY, "no memory for a job");
        goto failed;
    }
    status = take_model(worker, &order, &model, &error);
    if (status)
        goto failed;
    job->model = model;
    model->n_holders++;
    order.options.folder = job->folder;
    order.options.callbacks = (struct trainer_callbacks){
        .arg = worker,
        .message = on_message,
        .metrics = on_metrics,
        .checkpoint = on_checkpoint,
        .checkpoint_dropped = on_checkpoint_dropped,
        .yield = worker_yield,
        .make_room = on_make_room,
    };
    worker->trained_since_us = worker_now_us();
    status = trainer_open(&order.options, &job->trainer, &error);
    if (status)
        goto failed;
    log_write(LOG_INFO, "job started", "job", job->name, "folder", job->folder, "resume_from",
              order.options.resume_from, NULL);
    return true;
failed:
    if (status == ERROR_NO_MEMORY && !loaded_models_idle(&worker->models)) {
        log_write(LOG_INFO, "a job waits for room", "job", job->name, "reason", error.message, NULL);
        worker_job_abandon(worker);
        return false;
    }
    fail_job(worker, &error);
    return true;
}

bool worker_job_stop_unstarted(struct worker *worker, const json_t *start, const json_t *stop)
{
    struct job_order started = {0}, stopped = {0};
    struct error error = {0};
    const char *reason;
    if (read_address(start, &started, &error) || read_address(stop, &stopped, &error) ||
        field_string(stop, "reason", &reason, &error) || strcmp(started.name, stopped.name) ||
        started.attempt != stopped.attempt)
        return false;
    refuse_job(worker, &started, strcmp(reason, "pause") ? "cancelled" : "paused", NULL);
    return true;
}

void worker_job_stop(struct worker *worker, const json_t *payload)
{
    struct job_order order = {0};
    struct error error = {0};
    const char *reason;
    if (read_address(payload, &order, &error) || field_string(payload, "reason", &reason, &error)) {
        log_write(LOG_ERROR, "a stop that cannot be understood", "reason", error.message, NULL);
        return;
    }
    worker_evaluation_stop(worker, order.name, order.attempt,
                           strcmp(reason, "pause") ? "cancelled" : "paused");
    /* Another one, or an attempt that has ended: its JOB_ENDED is on the way. */
    if (!worker->job.trainer || strcmp(worker->job.name, order.name) || worker->job.attempt != order.attempt)
        return;
    if (!strcmp(reason, "pause"))
        worker_job_pause(worker);
    else
        end_job(worker, "cancelled", false, false, NULL);
}

void worker_job_pause(struct worker *worker)
{
    struct error error = {0};
    if (!worker->job.trainer)
        return;
    int status = trainer_checkpoint(worker->job.trainer, &error);
    if (status == ERROR_DEVICE)
        fail_job(worker, &error);
    else
        end_job(worker, "paused", !status, false, status ? &error : NULL);
}

void worker_job_advance(struct worker *worker)
{
    struct error error = {0};
    worker->trained_since_us = worker_now_us();
    int status = trainer_advance(worker->job.trainer, &error);
    /* The plan was held against what was free. That memory runs out all the same is mended by a new process if by
     * anything, as a lost device is. */
    if (status == ERROR_NO_MEMORY) {
        worker_fault(worker, &error);
        worker_job_abandon(worker);
    } else if (status < 0)
        fail_job(worker, &error);
    else if (status == TRAINER_FINISHED)
        end_job(worker, "succeeded", false, true, NULL);
}
