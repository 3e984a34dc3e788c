/* worker_evaluation.c: EVALUATION_* frames and the one evaluation that a worker runs at a time, model by model. The worker's
 * thread. An evaluation is a job to the daemon: it has a name and an attempt, is stopped by JOB_STOP and ends with JOB_ENDED. */
#include "engine/worker_internal.h"

#include "base/log.h"
#include "engine/evaluation/run.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    PAUSE_US = 2000, /* documents are read and prompts made for so long before completions have a turn */
    FRAME_BYTES = 4 << 20, /* of results: more are several frames */
    MAX_RESULTS = 1 << 14, /* what clients read again and again */
};

struct worker_evaluation {
    struct worker *worker;
    char *name;
    int64_t attempt;
    json_t *order; /* the START frame's payload */
    struct evaluation_plan *plan;
    size_t model; /* of order's "models": which is running */
    const char *model_name;
    struct loaded_model *loaded;
    size_t precision;                  /* of order's "precisions": which is running */
    struct model *view;                /* loaded's in another precision, or NULL */
    struct adapter *own;               /* on the view, or NULL */
    const struct adapter *adapter;     /* loaded's, or own */
    struct evaluation_run *run;        /* NULL = the model is to be entered */
    bool waits;                        /* for memory that completions take, to enter it */
    const json_t *done;                /* of the model: {"PRECISION/TASK/SHOTS": ranges}, or NULL */
    int64_t n_before, n_done, n_total; /* examples of all models: of other attempts, scored, in all */
    int64_t n_passed;                  /* that this attempt scored or found done */
    struct scorer_status reported;     /* of the run, with the last results */
    int64_t begun_us;                  /* the attempt */
    int64_t run_tokens;                /* of all models in this attempt */
    int64_t batch_us;
    json_t *results; /* of the batch under way, that are not sent yet */
    size_t result_bytes;
    bool lost; /* one of them, for want of memory */
};

static void send_addressed(struct worker *worker, const struct worker_evaluation *evaluation,
                           enum frame_type type, json_t *more)
{
    worker_stream_send(&worker->stream, type, 0,
                       worker_job_address(evaluation->name, evaluation->attempt, more));
}

static void pause_for_others(void *arg)
{
    struct worker *worker = arg;
    if (worker_now_us() - worker->trained_since_us >= PAUSE_US)
        worker_yield(worker);
}

static int read_plan(struct worker *worker, const json_t *payload, struct evaluation_plan **ret_plan,
                     struct error *error)
{
    int status = evaluation_plan_read(payload, ret_plan, error);
    if (!status)
        (*ret_plan)->source.pause = (struct documents_pause){pause_for_others, worker};
    return status;
}

/* ---- validation ---- */

static int read_name(const json_t *payload, const char **ret_name, int64_t *ret_attempt, struct error *error)
{
    int status = field_string(payload, "job", ret_name, error);
    return status ? status : field_integer(payload, "attempt", 0, INT64_MAX, ret_attempt, error);
}

void worker_evaluation_validate(struct worker *worker, uint64_t id, const json_t *payload)
{
    struct evaluation_plan *plan = NULL;
    struct error error = {0};
    json_t *warnings = json_array();
    const char *name;
    const json_t *models, *precisions;
    int64_t attempt;
    int status = read_name(payload, &name, &attempt, &error);
    if (status) {
        worker_fail(worker, id, &error);
        json_decref(warnings);
        return;
    }
    status = field_array(payload, "models", &models, &error);
    if (!status)
        status = field_array(payload, "precisions", &precisions, &error);
    if (!status)
        status = read_plan(worker, payload, &plan, &error);
    worker->trained_since_us = worker_now_us();
    if (!status &&
        (int64_t)plan->n_units * (int64_t)json_array_size(models) * (int64_t)json_array_size(precisions) >
            MAX_RESULTS)
        status = error_set_param(
            &error, ERROR_INVALID, "tasks",
            "more than %d results: tasks and subtasks, shot counts, models and precisions", MAX_RESULTS);
    if (!status)
        status = evaluation_plan_check(plan, warnings, &error);
    if (status) {
        json_t *more = frame_error_payload(&error);
        json_object_set_new(more, "lines", json_array());
        worker_stream_send(&worker->stream, FRAME_JOB_INVALID, id, worker_job_address(name, attempt, more));
    } else {
        json_int_t examples = evaluation_plan_examples(plan) * (json_int_t)json_array_size(models) *
                              (json_int_t)json_array_size(precisions);
        worker_stream_send(&worker->stream, FRAME_JOB_VALIDATED, id,
                           worker_job_address(name, attempt,
                                              json_pack("{s:I, s:O?, s:I}", "examples", examples, "warnings",
                                                        warnings, "total_steps", examples)));
    }
    evaluation_plan_free(plan);
    json_decref(warnings);
}

/* ---- results ---- */

static json_t *encode_ids(const int32_t *ids, int32_t count)
{
    json_t *list = json_array();
    for (int32_t i = 0; i < count; i++)
        json_array_append_new(list, json_integer(ids[i]));
    return list;
}

static bool contexts_are_one(const struct example *example)
{
    const struct prompt_request *first = &example->requests[0];
    for (int i = 1; i < example->n_requests; i++)
        if (example->requests[i].n_context != first->n_context ||
            memcmp(example->requests[i].ids, first->ids, (size_t)first->n_context * sizeof *first->ids))
            return false;
    return true;
}

static const char *precision_name(const struct model *model)
{
    if (model_infers_in_tf32(model))
        return "tf32";
    switch (model_inference_type(model)) {
    case TYPE_BF16:
        return "bf16";
    case TYPE_F16:
        return "fp16";
    case TYPE_F32:
    default:
        return "fp32";
    }
}

static struct model *running_model(const struct worker_evaluation *evaluation)
{
    return evaluation->view ? evaluation->view : evaluation->loaded->model;
}

static bool is_done(void *arg, const struct evaluation_unit *unit, int64_t document)
{
    struct worker_evaluation *evaluation = arg;
    char key[sizeof unit->name + 32];
    snprintf(key, sizeof key, "%s/%s/%" PRId32, precision_name(running_model(evaluation)), unit->name,
             unit->shots);
    const json_t *ranges = json_object_get(evaluation->done, key), *range;
    size_t i;
    json_array_foreach(ranges, i, range)
    {
        if (document < json_integer_value(json_array_get(range, 0)))
            return false;
        if (document <= json_integer_value(json_array_get(range, 1))) {
            evaluation->n_passed++;
            return true;
        }
    }
    return false;
}

static int64_t count_done(const json_t *done)
{
    const char *key;
    const json_t *of_model, *ranges, *range;
    size_t i;
    int64_t count = 0;
    json_object_foreach((json_t *)(uintptr_t)done, key, of_model)
    {
        json_object_foreach((json_t *)(uintptr_t)of_model, key, ranges)
        {
            json_array_foreach(ranges, i, range) count += json_integer_value(json_array_get(range, 1)) -
                                                          json_integer_value(json_array_get(range, 0)) + 1;
        }
    }
    return count;
}

/* "acc acc_norm" and so on. */
static const char *metrics_of(const struct task *task)
{
    if (task->kind == TASK_TARGET)
        return !(task->metrics & METRIC_ACC)       ? "perplexity"
               : task->metrics & METRIC_PERPLEXITY ? "perplexity acc"
                                                   : "acc";
    return !(task->metrics & METRIC_ACC_NORM) ? "acc"
           : task->metrics & METRIC_ACC       ? "acc acc_norm"
                                              : "acc_norm";
}

/* What came of the batch since the last frame. Also when no example has become whole: the tokens count. */
static void send_results(struct worker_evaluation *evaluation)
{
    struct scorer_status status;
    const struct evaluation_unit *unit;
    evaluation_run_status(evaluation->run, &status, &unit);
    const int64_t tokens = status.tokens_said - evaluation->reported.tokens_said,
                  tokens_run = status.tokens_run - evaluation->reported.tokens_run;
    evaluation->reported = status;
    evaluation->n_done += (int64_t)json_array_size(evaluation->results);
    evaluation->n_passed += (int64_t)json_array_size(evaluation->results);
    evaluation->run_tokens += tokens_run;
    if (!unit)
        return;
    const int64_t now_us = worker_now_us();
    const double seconds = (double)(now_us - evaluation->begun_us) / 1e6;
    const int64_t here = evaluation->n_done - evaluation->n_before;
    const double eta =
        here > 0 ? seconds * (double)(evaluation->n_total - evaluation->n_done) / (double)here : (double)NAN;
    const char *pool = evaluation_run_pool(evaluation->run);
    send_addressed(
        evaluation->worker, evaluation, FRAME_EVALUATION_RESULTS,
        json_pack("{s:s, s:s, s:s, s:s, s:s, s:s, s:i, s:o, s:O, s:I, s:I, s:f, s:o, s:I, s:I, s:o}", "model",
                  evaluation->model_name, "metrics", metrics_of(unit->task), "precision",
                  precision_name(running_model(evaluation)), "task", unit->name, "parent", unit->task->name,
                  "group", unit->subtask < 0 ? "" : unit->task->subtasks[unit->subtask].group, "num_fewshot",
                  (int)unit->shots, "pool", pool ? frame_text(pool, strlen(pool)) : json_null(), "results",
                  evaluation->results, "tokens", (json_int_t)tokens, "tokens_run", (json_int_t)tokens_run,
                  "seconds", (double)(now_us - evaluation->batch_us) / 1e6, "tokens_per_second",
                  frame_number(seconds > 0 ? (double)evaluation->run_tokens / seconds : (double)NAN), "step",
                  (json_int_t)evaluation->n_done, "total_steps", (json_int_t)evaluation->n_total,
                  "eta_seconds", frame_number(eta)));
    json_array_clear(evaluation->results);
    evaluation->result_bytes = 0;
    evaluation->batch_us = now_us;
}

static void on_result(void *arg, const struct example_result *result)
{
    struct worker_evaluation *evaluation = arg;
    const struct example *example = result->example;
    const bool one = contexts_are_one(example);
    json_t *choices = json_array();
    for (int i = 0; i < example->n_requests; i++) {
        const struct prompt_request *request = &example->requests[i];
        json_t *choice =
            json_pack("{s:o, s:o, s:b}", "ids",
                      encode_ids(request->ids + request->n_context, request->n_ids - request->n_context),
                      "log_likelihood", frame_number(result->scores[i].log_likelihood), "greedy",
                      (int)result->scores[i].greedy);
        if (!one)
            json_object_set_new(choice, "context_ids", encode_ids(request->ids, request->n_context));
        json_array_append_new(choices, choice);
    }
    json_t *row =
        json_pack("{s:I, s:i, s:i, s:i, s:i, s:i, s:o}", "doc", (json_int_t)example->document, "gold",
                  example->gold, "choice", result->choice, "choice_norm", result->choice_norm, "acc",
                  (int)result->acc, "acc_norm", (int)result->acc_norm, "choices", choices);
    if (one)
        json_object_set_new(row, "context_ids",
                            encode_ids(example->requests[0].ids, example->requests[0].n_context));
    char *detail = json_dumps(row, JSON_COMPACT);
    json_decref(row);
    evaluation->result_bytes += detail ? strlen(detail) : 0;
    evaluation->lost |=
        !detail ||
        json_array_append_new(
            evaluation->results,
            json_pack("{s:I, s:i, s:i, s:o, s:s}", "doc", (json_int_t)example->document, "acc",
                      (int)result->acc, "acc_norm", (int)result->acc_norm, "log_likelihood",
                      frame_number(result->scores[result->unit->task->kind == TASK_TARGET ? 0 : example->gold]
                                       .log_likelihood),
                      "detail", detail));
    free(detail);
    if (evaluation->result_bytes >= FRAME_BYTES)
        send_results(evaluation);
}

/* ---- its life ---- */

static void leave_model(struct worker_evaluation *evaluation)
{
    evaluation_run_close(evaluation->run);
    evaluation->run = NULL;
    if (!evaluation->loaded)
        return;
    if (evaluation->adapter && !evaluation->own)
        loaded_models_release_adapter(evaluation->loaded, evaluation->adapter);
    adapter_free(evaluation->own);
    model_close(evaluation->view);
    evaluation->loaded->n_holders--;
    evaluation->loaded = NULL;
    evaluation->adapter = evaluation->own = NULL;
    evaluation->view = NULL;
}

void worker_evaluation_abandon(struct worker *worker)
{
    struct worker_evaluation *evaluation = worker->evaluation;
    if (!evaluation)
        return;
    leave_model(evaluation);
    evaluation_plan_free(evaluation->plan);
    json_decref(evaluation->results);
    json_decref(evaluation->order);
    free(evaluation->name);
    free(evaluation);
    worker->evaluation = NULL;
}

static void end(struct worker *worker, const char *status, const struct error *error)
{
    struct worker_evaluation *evaluation = worker->evaluation;
    if (error && error->code == ERROR_DEVICE) {
        worker_fault(worker, error);
        worker_evaluation_abandon(worker);
        return;
    }
    json_t *payload = worker_job_address(
        evaluation->name, evaluation->attempt,
        worker_job_end(status, true, json_null(), evaluation->run_tokens, evaluation->n_done, error));
    log_write(error ? LOG_WARN : LOG_INFO, "evaluation ended", "job", evaluation->name, "status", status,
              "reason", error ? error->message : NULL, NULL);
    worker_evaluation_abandon(worker);
    worker_stream_send(&worker->stream, FRAME_JOB_ENDED, 0, payload);
}

/* Everything has been gone through. */
static void end_whole(struct worker *worker)
{
    const struct worker_evaluation *evaluation = worker->evaluation;
    struct error error = {0};
    if (evaluation->n_passed != evaluation->n_total)
        error_set(&error, ERROR_INVALID,
                  "there are %" PRId64 " examples now and were %" PRId64
                  ": a task's definition or its documents changed meanwhile",
                  evaluation->n_passed, evaluation->n_total);
    end(worker, error.code ? "failed" : "succeeded", error.code ? &error : NULL);
}

/* A view of the model where another precision than the one it is served in is asked for. */
static int take_precision(struct worker_evaluation *evaluation, struct error *error)
{
    static const struct {
        const char *name;
        enum kernel_type type;
        bool tf32;
    } precisions[] = {{"fp32", TYPE_F32, false},
                      {"tf32", TYPE_F32, true},
                      {"bf16", TYPE_BF16, false},
                      {"fp16", TYPE_F16, false}};
    const struct model *model = evaluation->loaded->model;
    const char *name = json_string_value(
        json_array_get(json_object_get(evaluation->order, "precisions"), evaluation->precision));
    if (name && (!strcmp(name, "auto") || !strcmp(name, precision_name(model))))
        return 0;
    for (size_t i = 0; name && i < sizeof precisions / sizeof *precisions; i++)
        if (!strcmp(name, precisions[i].name))
            return model_open_view(model, precisions[i].type, precisions[i].tf32, &evaluation->view, error);
    return error_set_param(error, ERROR_INVALID, "precision", "a precision that is none: %s",
                           name ? name : "");
}

static int enter_model(struct worker *worker, struct worker_evaluation *evaluation, struct error *error)
{
    const json_t *entry = json_array_get(json_object_get(evaluation->order, "models"), evaluation->model);
    struct named_folder base, adapter;
    struct loaded_model *loaded;
    int status;
    if ((status = field_string(entry, "name", &evaluation->model_name, error)) ||
        (status = field_folder(entry, "model", &base, error)) ||
        (status = field_optional_folder(entry, "adapter", &adapter, error)) ||
        (status = loaded_models_get(&worker->models, &base, &loaded, error)))
        return status;
    evaluation->loaded = loaded;
    loaded->n_holders++;
    if ((status = take_precision(evaluation, error)))
        return status;
    if (adapter.id && evaluation->view) {
        status = adapter_load(evaluation->view, adapter.path, false, &evaluation->own, error);
        if (status)
            return error_prefix(error, "adapter \"%s\": ", adapter.id);
        evaluation->adapter = evaluation->own;
    } else if (adapter.id) {
        const struct adapter *found;
        status = loaded_models_get_adapter(&worker->models, loaded, &adapter, &found, error);
        if (status)
            return status;
        evaluation->adapter = found;
        loaded_models_hold_adapter(loaded, found);
    }
    evaluation->done = json_object_get(json_object_get(evaluation->order, "done"), evaluation->model_name);
    evaluation->reported = (struct scorer_status){0};
    const struct evaluation_run_options options = {
        .plan = evaluation->plan,
        .model = running_model(evaluation),
        .tokenizer = loaded->tokenizer,
        .adapter = evaluation->adapter,
        .arg = evaluation,
        .is_done = is_done,
        .yield = worker_yield,
        .yield_arg = worker,
        .result = on_result,
    };
    return evaluation_run_open(&options, &evaluation->run, error);
}

void worker_evaluation_start(struct worker *worker, const json_t *payload)
{
    struct error error = {0};
    const char *name;
    int64_t attempt;
    if (read_name(payload, &name, &attempt, &error)) {
        log_write(LOG_ERROR, "an evaluation that cannot be addressed", "reason", error.message, NULL);
        return;
    }
    struct worker_evaluation *evaluation =
        worker->job.trainer || worker->evaluation ? NULL : calloc(1, sizeof *evaluation);
    if (evaluation && !(evaluation->name = strdup(name))) {
        free(evaluation);
        evaluation = NULL;
    }
    if (!evaluation) {
        error_set(&error, ERROR_BUSY, "this worker runs another job, or is out of memory");
        worker_stream_send(
            &worker->stream, FRAME_JOB_ENDED, 0,
            worker_job_address(name, attempt, worker_job_end("failed", true, json_null(), 0, 0, &error)));
        return;
    }
    worker->evaluation = evaluation;
    evaluation->worker = worker;
    evaluation->attempt = attempt;
    evaluation->order = json_incref((json_t *)(uintptr_t)payload);
    evaluation->begun_us = worker_now_us();
    evaluation->n_done = evaluation->n_before = count_done(json_object_get(payload, "done"));
    int status = read_plan(worker, evaluation->order, &evaluation->plan, &error);
    if (!status)
        status = field_integer(payload, "total_steps", 0, INT64_MAX, &evaluation->n_total, &error);
    if (status)
        end(worker, "failed", &error);
    else
        log_write(LOG_INFO, "evaluation started", "job", name, NULL);
}

void worker_evaluation_stop(struct worker *worker, const char *name, int64_t attempt, const char *status)
{
    const struct worker_evaluation *evaluation = worker->evaluation;
    if (evaluation && (!name || (!strcmp(evaluation->name, name) && evaluation->attempt == attempt)))
        end(worker, status, NULL);
}

bool worker_evaluation_waits(const struct worker *worker)
{
    return worker->evaluation && worker->evaluation->waits && !loaded_models_idle(&worker->models);
}

/* Models that nobody uses make room; where that is not enough, the evaluation waits until completions are done. */
static int enter(struct worker *worker, struct worker_evaluation *evaluation, struct error *error)
{
    int status = enter_model(worker, evaluation, error);
    if (status)
        leave_model(evaluation);
    if (status == ERROR_NO_MEMORY && loaded_models_make_room(&worker->models)) {
        status = enter_model(worker, evaluation, error);
        if (status)
            leave_model(evaluation);
    }
    evaluation->waits = status == ERROR_NO_MEMORY && !loaded_models_idle(&worker->models);
    if (!evaluation->waits)
        return status;
    log_write(LOG_INFO, "an evaluation waits for room", "job", evaluation->name, "reason", error->message,
              NULL);
    return 0;
}

void worker_evaluation_advance(struct worker *worker)
{
    struct worker_evaluation *evaluation = worker->evaluation;
    struct error error = {0};
    worker->trained_since_us = evaluation->batch_us = worker_now_us();
    if (!evaluation->run && enter(worker, evaluation, &error)) {
        end(worker, "failed", &error);
        return;
    }
    if (!evaluation->run)
        return;
    evaluation->results = json_array();
    int status = evaluation->results ? evaluation_run_advance(evaluation->run, &error)
                                     : error_set(&error, ERROR_NO_MEMORY, "no memory for results");
    if (status > 0)
        send_results(evaluation);
    json_decref(evaluation->results);
    evaluation->results = NULL;
    if (evaluation->lost)
        status = error_set(&error, ERROR_NO_MEMORY, "no memory for results");
    if (!status) {
        leave_model(evaluation);
        evaluation->precision++;
        if (evaluation->precision == json_array_size(json_object_get(evaluation->order, "precisions"))) {
            evaluation->precision = 0;
            evaluation->model++;
        }
        if (evaluation->model == json_array_size(json_object_get(evaluation->order, "models"))) {
            end_whole(worker);
            return;
        }
    }
    if (status < 0)
        end(worker, "failed", &error);
}
