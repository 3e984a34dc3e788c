/* job_evaluations.c: see job_evaluations.h. Loop thread only.
 *
 * look() reads what there is and does the one next thing: it makes the evaluation of a checkpoint that has none, then, when training
 * is done, that of the model it ended with; and when all of them have ended, it has the best chosen and the job ended. All of that
 * is decided from rows, so that a restart goes on anywhere. */
#include "daemon/job_evaluations.h"

#include "base/log.h"
#include "daemon/live_job.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void look(struct live_job *live);

/* ---- what the job names ---- */

/* A member of job->evaluations: a new reference, or NULL. */
static json_t *named(const struct job_resource *job, const char *key)
{
    json_t *evaluations = json_loads(job->evaluations, 0, NULL);
    json_t *value = json_incref(json_object_get(evaluations, key));
    json_decref(evaluations);
    return value;
}

static bool is_at(const struct job_resource *job, const char *place)
{
    json_t *at = named(job, "at");
    bool found = false;
    for (size_t i = 0; i < json_array_size(at); i++)
        found |= !strcmp(json_string_value(json_array_get(at, i)), place);
    json_decref(at);
    return found;
}

static bool keeps_best(const struct live_job *live)
{
    json_t *best = named(&live->job, "keep_best");
    bool keeps = json_is_object(best);
    json_decref(best);
    return keeps;
}

bool job_evaluations_keep_all(const struct job_resource *job)
{
    return job->evaluations && is_at(job, "checkpoints");
}

/* Those that were made: a new reference. */
static json_t *made(const struct live_job *live)
{
    json_t *list = live->job.evaluation_jobs ? json_loads(live->job.evaluation_jobs, 0, NULL) : NULL;
    return list ? list : json_array();
}

static bool was_made_or_refused(const struct live_job *live, const char *model)
{
    json_t *list = made(live);
    bool found = json_object_get(live->evaluations.refused, model) != NULL;
    for (size_t i = 0; i < json_array_size(list); i++)
        found |= !strcmp(json_string_value(json_object_get(json_array_get(list, i), "model")), model);
    json_decref(list);
    return found;
}

static bool is_waited_for(const struct live_job *live)
{
    for (const struct live_job *other = live->scheduler->first; other; other = other->next)
        if (!other->ended && !strcmp(other->job.parent, live->job.id))
            return true;
    return live->evaluations.n_outcomes > 0;
}

/* ---- making one ---- */

static const struct kept_answer *keep_nothing(void *arg, const struct job_resource *job)
{
    (void)arg, (void)job;
    return NULL;
}

static void ignore_answer(void *arg, const struct job_resource *job, const struct problem *problem)
{
    (void)arg, (void)job, (void)problem;
}

static void add_made(struct live_job *live, const struct job_resource *evaluation)
{
    json_t *list = made(live);
    json_array_append_new(list, json_pack("{s:s, s:s}", "id", evaluation->id, "model", evaluation->model));
    char *text = json_dumps(list, JSON_COMPACT);
    json_decref(list);
    if (text) {
        free(live->job.evaluation_jobs);
        live->job.evaluation_jobs = text;
    }
}

static void on_created(void *arg, const struct job_resource *evaluation, const struct problem *problem)
{
    struct live_job *live = arg;
    live->writes--;
    live->evaluations.looking = false;
    if (live->ended || live->ending.status) { /* cancelled while it was made */
        if (evaluation)
            scheduler_cancel_job(live->scheduler, evaluation->id, ignore_answer, NULL);
    } else if (evaluation) {
        add_made(live, evaluation);
        live_job_say(live, "info", "Created evaluation %s of %s", evaluation->id, evaluation->model);
    } else if (!live->scheduler->draining) {
        json_object_set_new(live->evaluations.refused, live->evaluations.model, json_true());
        live_job_say(live, "warn", "%s cannot be evaluated: %s", live->evaluations.model, problem->message);
    }
    look(live);
    live_job_release(live);
}

/* looking goes on until it is made. */
static void create(struct live_job *live, const char *model)
{
    json_t *evaluations = json_loads(live->job.evaluations, 0, NULL);
    struct evaluation_request request = {
        .seed = (uint64_t)json_integer_value(json_object_get(evaluations, "seed")),
        .settings = json_deep_copy(json_object_get(evaluations, "settings")),
    };
    snprintf(request.parent, sizeof request.parent, "%s", live->job.id);
    snprintf(live->evaluations.model, sizeof live->evaluations.model, "%s", model);
    json_object_set_new(request.settings, "models", json_pack("[s]", model));
    live->writes++;
    scheduler_create_evaluation(live->scheduler, &request, keep_nothing, on_created, live);
    evaluation_request_free(&request);
    json_decref(evaluations);
}

/* ---- the best ---- */

/* One evaluation after another: its row, its units. */
struct choice {
    struct live_job *live;
    json_t *list; /* made */
    size_t next;
    char metric[32], task[MODEL_ID_BYTES];
    json_int_t shots;
    bool found;
    double score;
    char best[MODEL_ID_BYTES];
};

static void end_with(struct live_job *live, const char *model)
{
    snprintf(live->evaluations.best, sizeof live->evaluations.best, "%s", model);
    live_job_end(live, JOB_SUCCEEDED, NULL, NULL, NULL);
}

static const char *final_model(const struct live_job *live, struct adapter_row *row)
{
    live_job_model_row(live, -1, "", row);
    return row->model.id;
}

static void choose_next(struct choice *choice);

static void finish_choice(struct choice *choice)
{
    struct live_job *live = choice->live;
    struct adapter_row row;
    live->writes--;
    live->evaluations.looking = false;
    if (live->ended || live->ending.status || live->job.status != JOB_RUNNING || live->scheduler->draining) {
        live_job_release(live);
    } else if (choice->found) {
        live_job_say(live, "info", "The best is %s: %s %s %.4f at %lld shots", choice->best, choice->task,
                     choice->metric, choice->score, (long long)choice->shots);
        end_with(live, choice->best);
    } else {
        live_job_say(live, "warn",
                     "No evaluation gave %s of %s at %lld shots: the model is what training ended with",
                     choice->metric, choice->task, (long long)choice->shots);
        end_with(live, final_model(live, &row));
    }
    json_decref(choice->list);
    free(choice);
}

static const char *current(const struct choice *choice, const char *key)
{
    return json_string_value(json_object_get(json_array_get(choice->list, choice->next), key));
}

/* Of equal ones the first stays. */
static void weigh(struct choice *choice, const json_t *results)
{
    const bool least = !strcmp(choice->metric, "perplexity");
    const json_t *result;
    size_t i;
    json_array_foreach(results, i, result)
    {
        const json_t *score = json_object_get(result, choice->metric);
        if (strcmp(json_string_value(json_object_get(result, "task")), choice->task) ||
            json_integer_value(json_object_get(result, "num_fewshot")) != choice->shots ||
            !json_is_number(score))
            continue;
        const double value = json_number_value(score);
        if (choice->found && (least ? value >= choice->score : value <= choice->score))
            return;
        choice->found = true;
        choice->score = value;
        snprintf(choice->best, sizeof choice->best, "%s", current(choice, "model"));
        return;
    }
}

static void on_units_of_choice(void *arg, int code, const struct evaluation_unit_resource *items,
                               size_t count)
{
    struct choice *choice = arg;
    json_t *results = code ? NULL : evaluation_results_encode(items, count);
    weigh(choice, results);
    json_decref(results);
    choice->next++;
    choose_next(choice);
}

static void on_row_of_choice(void *arg, int code, const struct job_resource *job)
{
    struct choice *choice = arg;
    if (!code && job->status == JOB_SUCCEEDED && !choice->live->scheduler->draining) {
        store_evaluation_units(choice->live->scheduler->options.store, current(choice, "id"),
                               on_units_of_choice, choice);
        return;
    }
    choice->next++;
    choose_next(choice);
}

static void choose_next(struct choice *choice)
{
    const struct live_job *live = choice->live;
    if (choice->next == json_array_size(choice->list) || live->ending.status || live->scheduler->draining)
        finish_choice(choice);
    else
        store_job_get(choice->live->scheduler->options.store, current(choice, "id"), on_row_of_choice,
                      choice);
}

static void choose(struct live_job *live)
{
    struct choice *choice = calloc(1, sizeof *choice);
    struct adapter_row row;
    json_t *best = named(&live->job, "keep_best");
    if (!json_is_object(best) || !choice) {
        json_decref(best);
        free(choice);
        end_with(live, final_model(live, &row));
        return;
    }
    *choice = (struct choice){
        .live = live, .list = made(live), .shots = json_integer_value(json_object_get(best, "num_fewshot"))};
    snprintf(choice->metric, sizeof choice->metric, "%s", json_string_value(json_object_get(best, "metric")));
    snprintf(choice->task, sizeof choice->task, "%s", json_string_value(json_object_get(best, "task")));
    json_decref(best);
    live->writes++;
    live->evaluations.looking = true;
    choose_next(choice);
}

/* ---- looking ---- */

/* Should what training ended with be evaluated, too? Where the best is kept it is a candidate, unless the last checkpoint is it. */
static bool wants_final(const struct live_job *live, const struct checkpoint_resource *checkpoints,
                        size_t count)
{
    if (is_at(&live->job, "end"))
        return true;
    for (size_t i = 0; i < count; i++)
        if (checkpoints[i].step == live->job.step)
            return false;
    return keeps_best(live);
}

static void take_stock(struct live_job *live, const struct checkpoint_resource *checkpoints, size_t count)
{
    struct adapter_row row;
    for (size_t i = 0; i < count; i++)
        if (!was_made_or_refused(live, checkpoints[i].model)) {
            create(live, checkpoints[i].model);
            return;
        }
    if (live->evaluations.trained && !was_made_or_refused(live, final_model(live, &row)) &&
        wants_final(live, checkpoints, count)) {
        create(live, row.model.id);
        return;
    }
    live->evaluations.looking = false;
    if (live->evaluations.again)
        look(live);
    else if (live->evaluations.trained && live->job.status == JOB_RUNNING && !is_waited_for(live))
        choose(live);
}

static void on_checkpoints(void *arg, int code, const struct checkpoint_resource *items, size_t count,
                           bool has_more)
{
    struct live_job *live = arg;
    (void)has_more;
    live->writes--;
    if (code || live->ended || live->ending.status || live->scheduler->draining) {
        live->evaluations.looking = false;
        if (code && !live->ending.status)
            live_job_retry_later(live, "the checkpoints of a job", NULL);
    } else {
        take_stock(live, items, count);
    }
    live_job_release(live);
}

static void look(struct live_job *live)
{
    const struct list_query query = {.limit = INT32_MAX, .ascending = true};
    if (!live->job.evaluations || live->ended || live->ending.status || live->scheduler->draining)
        return;
    live->evaluations.again = live->evaluations.looking;
    if (live->evaluations.looking)
        return;
    live->evaluations.looking = true;
    if (!live->evaluations.refused)
        live->evaluations.refused = json_object();
    if (!is_at(&live->job, "checkpoints")) {
        take_stock(live, NULL, 0);
        return;
    }
    live->writes++;
    store_checkpoint_list(live->scheduler->options.store, live->job.id, &query, on_checkpoints, live);
}

void job_evaluations_look(struct live_job *live)
{
    look(live);
}

/* ---- training is done ---- */

struct final_write {
    struct live_job *live;
    struct adapter_row row;
};

static void on_final_written(void *arg, int code, const struct error *error)
{
    struct final_write *write = arg;
    struct live_job *live = write->live;
    struct error reason;
    live->writes--;
    live->changes--;
    if (!code && registry_add(live->scheduler->options.registry, &write->row, &reason)) {
        code = reason.code;
        error = &reason;
    }
    if (live->ended || live->ending.status) { /* cancelled while we wrote */
        job_evaluations_forget(live);
    } else if (code) { /* it goes on from its last checkpoint, and ends again */
        live_job_set_status(live, JOB_QUEUED);
        live_job_retry_later(live, "the model of a job", error);
    } else {
        live->evaluations.trained = true;
        live_job_say(live, "info", "Training is done; the job ends with its evaluations");
        if (live_job_wants(live, JOB_PAUSED)) /* asked for while we wrote */
            live_job_set_status(live, JOB_PAUSED);
        live_job_commit(live);
        look(live);
    }
    free(write);
    live_job_release(live);
}

void job_evaluations_trained(struct live_job *live, const char *folder)
{
    struct final_write *write = calloc(1, sizeof *write);
    if (!write) {
        live_job_end(live, JOB_FAILED, "no_memory", NULL, "The server is out of memory.");
        return;
    }
    write->live = live;
    live_job_model_row(live, -1, folder, &write->row);
    live->writes++;
    live->changes++;
    store_model_insert(live->scheduler->options.store, &write->row, on_final_written, write);
}

void job_evaluations_recover(struct live_job *live)
{
    struct adapter_row row;
    live->evaluations.trained =
        live->job.evaluations && registry_find(live->scheduler->options.registry, final_model(live, &row));
}

void job_evaluations_forget(struct live_job *live)
{
    struct adapter_row row;
    if (!live->job.evaluations || !registry_find(live->scheduler->options.registry, final_model(live, &row)))
        return;
    registry_remove(live->scheduler->options.registry, row.model.id);
    store_model_delete(live->scheduler->options.store, row.model.id, NULL, NULL);
}

void job_evaluations_cancel(struct live_job *live)
{
    for (struct live_job *other = live->scheduler->first, *next; other; other = next) {
        next = other->next;
        if (!other->ended && !strcmp(other->job.parent, live->job.id))
            scheduler_cancel_job(live->scheduler, other->job.id, ignore_answer, NULL);
    }
    job_evaluations_forget(live);
}

/* ---- one has ended ---- */

struct outcome {
    struct live_job *live; /* the fine-tuning job */
    char id[ID_BYTES], model[MODEL_ID_BYTES], reason[512];
    enum job_status status;
};

static void say_outcome(struct live_job *live, const struct outcome *outcome, json_t *results)
{
    char message[1024];
    snprintf(message, sizeof message, "Evaluation %s of %s has %s%s%s", outcome->id, outcome->model,
             job_status_name(outcome->status), outcome->reason[0] ? ": " : "", outcome->reason);
    live_job_append_event(live, outcome->status == JOB_FAILED ? "warn" : "info", "message", message,
                          json_pack("{s:s, s:s, s:s, s:o}", "evaluation", outcome->id, "model",
                                    outcome->model, "status", job_status_name(outcome->status), "results",
                                    results ? results : json_array()),
                          -1);
}

static void on_units_of_outcome(void *arg, int code, const struct evaluation_unit_resource *items,
                                size_t count)
{
    struct outcome *outcome = arg;
    struct live_job *live = outcome->live;
    live->writes--;
    live->evaluations.n_outcomes--;
    if (!live->ended && !live->ending.status) {
        say_outcome(live, outcome, code ? NULL : evaluation_results_encode(items, count));
        look(live);
    }
    free(outcome);
    live_job_release(live);
}

void job_evaluations_ended(struct scheduler *scheduler, const struct job_resource *evaluation)
{
    struct live_job *live = evaluation->parent[0] ? live_job_find(scheduler, evaluation->parent) : NULL;
    struct outcome *outcome = live && !live->ended ? calloc(1, sizeof *outcome) : NULL;
    if (!outcome)
        return;
    *outcome = (struct outcome){.live = live, .status = evaluation->status};
    memcpy(outcome->id, evaluation->id, sizeof outcome->id);
    memcpy(outcome->model, evaluation->model, sizeof outcome->model);
    snprintf(outcome->reason, sizeof outcome->reason, "%.500s", evaluation->error_message);
    live->writes++;
    live->evaluations.n_outcomes++;
    store_evaluation_units(scheduler->options.store, evaluation->id, on_units_of_outcome, outcome);
}
