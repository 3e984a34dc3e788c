/* resources.c: see resources.h. Any thread. */
#include "api/resources.h"

#include "api/encode.h"
#include "api/evaluation.h"
#include "api/text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* jansson has no NaN: a number that is not known, or that diverged, is null. */
json_t *encode_number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

json_t *encode_time(int64_t seconds)
{
    return seconds ? json_integer(seconds) : json_null();
}

/* Text that the store keeps as JSON; null when there is none. */
json_t *encode_stored(const char *text)
{
    return text ? json_loads(text, 0, NULL) : json_null();
}

json_t *file_encode(const struct file_resource *file)
{
    return json_pack("{s:o, s:s, s:I, s:I, s:o, s:o, s:s, s:s, s:o}", "id", text_json(file->id), "object",
                     "file", "bytes", (json_int_t)file->bytes, "created_at", (json_int_t)file->created_at,
                     "expires_at", encode_time(file->expires_at), "filename", text_json(file->filename),
                     "purpose", file->purpose, "status", file->status, "status_details",
                     text_json_or_null(file->status_details));
}

const char *job_kind_name(enum job_kind kind)
{
    return kind == JOB_EVALUATION ? "evaluation" : "fine_tuning";
}

static const char *const status_names[JOB_STATUS_COUNT] = {
    [JOB_VALIDATING] = "validating_files",
    [JOB_QUEUED] = "queued",
    [JOB_RUNNING] = "running",
    [JOB_PAUSED] = "paused",
    [JOB_SUCCEEDED] = "succeeded",
    [JOB_FAILED] = "failed",
    [JOB_CANCELLED] = "cancelled",
};

const char *job_status_name(enum job_status status)
{
    return status_names[status];
}

int job_status_from_name(const char *name)
{
    for (int status = 0; status < JOB_STATUS_COUNT; status++)
        if (!strcmp(name, status_names[status]))
            return status;
    return -1;
}

bool job_status_is_final(enum job_status status)
{
    return status >= JOB_SUCCEEDED;
}

void job_free(struct job_resource *job)
{
    free(job->hyperparameters);
    free(job->metadata);
    free(job->evaluations);
    free(job->evaluation_jobs);
    job->hyperparameters = job->metadata = job->evaluations = job->evaluation_jobs = NULL;
}

json_t *encode_job_error(const struct job_resource *job)
{
    if (!job->error_code[0])
        return json_null();
    return json_pack("{s:s, s:o, s:o}", "code", job->error_code, "message", text_json(job->error_message),
                     "param", text_json_or_null(job->error_param));
}

static json_t *bytes_or_null(int64_t bytes)
{
    return bytes ? json_integer(bytes) : json_null();
}

static json_t *job_progress_encode(const struct job_resource *job)
{
    return json_pack(
        "{s:I, s:o, s:o, s:o, s:o, s:I, s:o, s:o, s:o, s:o, s:o}", "step", (json_int_t)job->step,
        "total_steps", job->total_steps ? json_integer(job->total_steps) : json_null(), "tokens_per_second",
        encode_number(job->tokens_per_second), "loss", encode_number(job->loss), "eta_seconds",
        encode_number(job->eta_seconds), "skipped_steps", (json_int_t)job->skipped_steps,
        "planned_memory_bytes", bytes_or_null(job->planned_memory_bytes), "peak_memory_bytes",
        bytes_or_null(job->peak_memory_bytes), "bytes_per_token",
        job->peak_memory_bytes ? encode_number(job->bytes_per_token) : json_null(), "queue_position",
        job->queue_position >= 0 ? json_integer(job->queue_position) : json_null(), "device",
        text_json_or_null(job->device));
}

json_t *job_encode(const struct job_resource *job, const char *organization, int64_t now)
{
    json_t *hyperparameters = encode_stored(job->hyperparameters);
    bool has_estimate = job->status == JOB_RUNNING && isfinite(job->eta_seconds) && job->eta_seconds >= 0 &&
                        job->eta_seconds < 1e9;
    /* json_pack gives up (and drops what it was handed) when one of its values is NULL: out of memory. */
    json_t *json = json_pack(
        "{s:o, s:s, s:I, s:o, s:o, s:o, s:o, s:o}", "id", text_json(job->id), "object", "fine_tuning.job",
        "created_at", (json_int_t)job->created_at, "started_at", encode_time(job->started_at), "finished_at",
        encode_time(job->finished_at), "model", text_json(job->model), "fine_tuned_model",
        text_json_or_null(job->fine_tuned_model), "organization_id", text_json(organization));
    json_t *more = json_pack(
        "{s:s, s:o, s:o, s:o, s:o, s:O, s:{s:s, s:{s:O}}, s:o, s:I, s:o, s:o, s:o, s:[], s:o}", "status",
        job_status_name(job->status), "result_files",
        job->result_file[0] ? json_pack("[o]", text_json(job->result_file)) : json_array(), "trained_tokens",
        job->trained_tokens >= 0 ? json_integer(job->trained_tokens) : json_null(), "training_file",
        text_json(job->training_file), "validation_file", text_json_or_null(job->validation_file),
        "hyperparameters", hyperparameters, "method", "type", "supervised", "supervised", "hyperparameters",
        hyperparameters, "evaluations", job_evaluations_encode(job->evaluations, job->evaluation_jobs),
        "seed", (json_int_t)job->seed, "metadata", encode_stored(job->metadata), "estimated_finish",
        has_estimate ? json_integer(now + (int64_t)ceil(job->eta_seconds)) : json_null(), "error",
        encode_job_error(job), "integrations", "progress", job_progress_encode(job));
    if (json && (!more || json_object_update(json, more))) {
        json_decref(json);
        json = NULL;
    }
    json_decref(more);
    json_decref(hyperparameters);
    return json;
}

void event_free(struct event_resource *event)
{
    free(event->message);
    free(event->data);
    event->message = NULL;
    event->data = NULL;
}

json_t *event_encode(const struct event_resource *event)
{
    char id[40];
    snprintf(id, sizeof id, "ftevent-%lld", (long long)event->sequence);
    const bool evaluation = !strncmp(event->job, "eval-", strlen("eval-"));
    return json_pack("{s:s, s:s, s:I, s:s, s:o, s:s, s:o}", "id", id, "object",
                     evaluation ? "evaluation.event" : "fine_tuning.job.event", "created_at",
                     (json_int_t)event->created_at, "level", event->level, "message",
                     text_json(event->message ? event->message : ""), "type", event->type, "data",
                     encode_stored(event->data));
}

json_t *checkpoint_encode(const struct checkpoint_resource *checkpoint)
{
    double valid_loss = checkpoint->valid_loss, valid_accuracy = checkpoint->valid_accuracy;
    /* Every evaluation covers the whole validation set: the full_ values are the same ones. */
    return json_pack("{s:o, s:s, s:I, s:o, s:o, s:I, s:{s:I, s:o, s:o, s:o, s:o, s:o, s:o}}", "id",
                     text_json(checkpoint->id), "object", "fine_tuning.job.checkpoint", "created_at",
                     (json_int_t)checkpoint->created_at, "fine_tuned_model_checkpoint",
                     text_json(checkpoint->model), "fine_tuning_job_id", text_json(checkpoint->job),
                     "step_number", (json_int_t)checkpoint->step, "metrics", "step",
                     (json_int_t)checkpoint->step, "train_loss", encode_number(checkpoint->train_loss),
                     "train_mean_token_accuracy", encode_number(checkpoint->train_accuracy), "valid_loss",
                     encode_number(valid_loss), "valid_mean_token_accuracy", encode_number(valid_accuracy),
                     "full_valid_loss", encode_number(valid_loss), "full_valid_mean_token_accuracy",
                     encode_number(valid_accuracy));
}

json_t *model_encode(const struct model_resource *model)
{
    return json_pack("{s:o, s:s, s:I, s:o, s:o, s:o}", "id", text_json(model->id), "object", "model",
                     "created", (json_int_t)model->created, "owned_by", text_json(model->owned_by), "root",
                     text_json(model->root), "parent", text_json_or_null(model->parent));
}

/* A new reference to an element's id; null for NULL. */
static json_t *element_id(const json_t *element)
{
    json_t *id = json_object_get(element, "id");
    return id ? json_incref(id) : json_null();
}

json_t *list_encode(json_t *data, bool has_more)
{
    if (!data)
        return NULL;
    size_t count = json_array_size(data);
    json_t *first = json_array_get(data, 0), *last = count ? json_array_get(data, count - 1) : NULL;
    return json_pack("{s:s, s:o, s:o, s:b, s:o}", "object", "list", "first_id", element_id(first), "last_id",
                     element_id(last), "has_more", has_more, "data", data);
}

json_t *deleted_encode(const char *id, const char *object)
{
    return json_pack("{s:o, s:s, s:b}", "id", text_json(id), "object", object, "deleted", 1);
}
