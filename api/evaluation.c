/* evaluation.c: an evaluation's resource and its results. Any thread.
 *
 * A metric's standard error is the sample deviation over the square root of n (null for one example). That of a perplexity is
 * the mean log-likelihood's times the perplexity (the delta method). Subtasks are put together twice: `acc` weights each example
 * alike (micro), `acc_macro` each subtask; their errors are the pooled deviation's and that of a mean of independent means. */
#include "api/evaluation.h"

#include "api/encode.h"
#include "api/text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool evaluation_unit_has(const struct evaluation_unit_resource *unit, const char *metric)
{
    const size_t length = strlen(metric);
    for (const char *at = unit->metrics; *at;) {
        size_t n = strcspn(at, " ");
        if (n == length && !memcmp(at, metric, n))
            return true;
        at += n + (at[n] == ' ');
    }
    return false;
}

/* The squared standard error of a share of n; NaN below two. */
static double share_variance(int64_t right, int64_t n)
{
    const double mean = (double)right / (double)n;
    return n > 1 ? mean * (1 - mean) / (double)(n - 1) : (double)NAN;
}

/* ---- sums over subtasks ---- */

static bool belongs(const struct evaluation_sum *sum, const struct evaluation_unit_resource *unit,
                    const char *task)
{
    return !strcmp(sum->task, task) && !strcmp(sum->first->model, unit->model) &&
           !strcmp(sum->first->precision, unit->precision) && sum->first->num_fewshot == unit->num_fewshot;
}

static void add_unit(struct evaluation_sum *sum, const struct evaluation_unit_resource *unit)
{
    const int64_t right[2] = {unit->acc, unit->acc_norm};
    sum->n_units++;
    sum->n += unit->n;
    sum->acc += unit->acc;
    sum->acc_norm += unit->acc_norm;
    sum->tokens += unit->tokens;
    sum->tokens_run += unit->tokens_run;
    sum->seconds += unit->seconds;
    sum->micro_freedom += unit->n - 1;
    for (int i = 0; i < 2; i++) {
        double variance = share_variance(right[i], unit->n);
        sum->micro_variance[i] += (double)(unit->n - 1) * variance * (double)unit->n;
        sum->macro[i] += (double)right[i] / (double)unit->n;
        sum->macro_variance[i] += variance;
    }
}

int64_t evaluation_sum_up(const struct evaluation_unit_resource *units, size_t count,
                          struct evaluation_sum **ret_sums)
{
    struct evaluation_sum *sums = calloc(2 * count + 1, sizeof *sums);
    int64_t n_sums = 0;
    if (!sums)
        return -1;
    for (int by_group = 0; by_group < 2; by_group++) {
        for (size_t i = 0; i < count; i++) {
            const struct evaluation_unit_resource *unit = &units[i];
            char task[sizeof sums->task];
            if (!unit->group[0] || !unit->n)
                continue;
            snprintf(task, sizeof task, "%s%s%s", unit->parent, by_group ? "_" : "",
                     by_group ? unit->group : "");
            int64_t at = n_sums; /* from the end: units come in the order of their sums */
            while (at > 0 && !belongs(&sums[at - 1], unit, task))
                at--;
            if (!at) {
                sums[n_sums].first = unit;
                memcpy(sums[n_sums++].task, task, sizeof task);
                at = n_sums;
            }
            add_unit(&sums[at - 1], unit);
        }
    }
    *ret_sums = sums;
    return n_sums;
}

/* ---- results ---- */

static json_t *head_encode(const struct evaluation_unit_resource *unit, const char *task)
{
    return json_pack("{s:o, s:s, s:o, s:I}", "model", text_json(unit->model), "precision", unit->precision,
                     "task", text_json(task), "num_fewshot", (json_int_t)unit->num_fewshot);
}

static void set_cost(json_t *result, int64_t n, int64_t tokens, int64_t tokens_run, double seconds)
{
    json_object_set_new(result, "n", json_integer(n));
    json_object_set_new(result, "tokens", json_integer(tokens));
    json_object_set_new(result, "tokens_run", json_integer(tokens_run));
    json_object_set_new(result, "seconds", encode_number(seconds));
}

static void set_metric(json_t *result, const char *name, double value, double variance)
{
    char key[40];
    json_object_set_new(result, name, encode_number(value));
    snprintf(key, sizeof key, "%s_stderr", name);
    json_object_set_new(result, key, encode_number(sqrt(variance)));
}

static json_t *unit_encode(const struct evaluation_unit_resource *unit)
{
    json_t *result = head_encode(unit, unit->task);
    const double n = (double)unit->n;
    if (!result)
        return NULL;
    json_object_set_new(result, "fewshot_file", text_json_or_null(unit->pool));
    set_cost(result, unit->n, unit->tokens, unit->tokens_run, unit->seconds);
    if (evaluation_unit_has(unit, "acc"))
        set_metric(result, "acc", unit->n ? (double)unit->acc / n : (double)NAN,
                   share_variance(unit->acc, unit->n));
    if (evaluation_unit_has(unit, "acc_norm"))
        set_metric(result, "acc_norm", unit->n ? (double)unit->acc_norm / n : (double)NAN,
                   share_variance(unit->acc_norm, unit->n));
    if (evaluation_unit_has(unit, "perplexity")) {
        const double mean = unit->log_likelihood / n;
        const double variance = (unit->log_likelihood_squared / n - mean * mean) / (n - 1);
        const double perplexity = exp(-mean);
        set_metric(result, "perplexity", perplexity,
                   unit->n > 1 ? perplexity * perplexity * (variance > 0 ? variance : 0) : (double)NAN);
    }
    return result;
}

static json_t *sum_encode(const struct evaluation_sum *sum)
{
    static const char *const names[] = {"acc", "acc_norm"};
    static const char *const macro_names[] = {"acc_macro", "acc_norm_macro"};
    const int64_t right[2] = {sum->acc, sum->acc_norm};
    const double n = (double)sum->n, units = (double)sum->n_units;
    json_t *result = head_encode(sum->first, sum->task);
    if (!result)
        return NULL;
    json_object_set_new(result, "subtasks", json_integer(sum->n_units));
    set_cost(result, sum->n, sum->tokens, sum->tokens_run, sum->seconds);
    for (int i = 0; i < 2; i++) {
        if (!evaluation_unit_has(sum->first, names[i]))
            continue;
        set_metric(result, names[i], (double)right[i] / n,
                   sum->micro_variance[i] / (double)sum->micro_freedom / n);
        set_metric(result, macro_names[i], sum->macro[i] / units, sum->macro_variance[i] / (units * units));
    }
    return result;
}

json_t *evaluation_results_encode(const struct evaluation_unit_resource *units, size_t count)
{
    struct evaluation_sum *sums;
    int64_t n_sums = evaluation_sum_up(units, count, &sums);
    if (n_sums < 0)
        return NULL;
    json_t *results = json_array();
    for (int64_t i = 0; i < n_sums; i++)
        json_array_append_new(results, sum_encode(&sums[i]));
    for (size_t i = 0; i < count; i++)
        json_array_append_new(results, unit_encode(&units[i]));
    free(sums);
    return results;
}

json_t *evaluation_encode(const struct job_resource *job, const struct evaluation_unit_resource *units,
                          size_t count, int64_t now)
{
    json_t *settings = encode_stored(job->hyperparameters);
    const bool has_estimate = job->status == JOB_RUNNING && isfinite(job->eta_seconds) &&
                              job->eta_seconds >= 0 && job->eta_seconds < 1e9;
    json_t *json = evaluation_settings_encode(settings, (int64_t)job->seed);
    json_t *head = json_pack(
        "{s:o, s:s, s:I, s:o, s:o, s:s, s:O?, s:o, s:o, s:o, s:o}", "id", text_json(job->id), "object",
        "evaluation", "created_at", (json_int_t)job->created_at, "started_at", encode_time(job->started_at),
        "finished_at", encode_time(job->finished_at), "status", job_status_name(job->status), "model",
        json_object_get(settings, "models"), "fine_tuning_job", text_json_or_null(job->parent), "metadata",
        encode_stored(job->metadata), "estimated_finish",
        has_estimate ? json_integer(now + (int64_t)ceil(job->eta_seconds)) : json_null(), "error",
        encode_job_error(job));
    json_t *more = json_pack("{s:o, s:{s:I, s:o, s:o, s:o, s:o, s:o}}", "results",
                             units ? evaluation_results_encode(units, count) : json_null(), "progress",
                             "examples", (json_int_t)job->step, "total_examples",
                             job->total_steps ? json_integer(job->total_steps) : json_null(),
                             "tokens_per_second", encode_number(job->tokens_per_second), "eta_seconds",
                             encode_number(job->eta_seconds), "queue_position",
                             job->queue_position >= 0 ? json_integer(job->queue_position) : json_null(),
                             "device", text_json_or_null(job->device));
    if (json && (!head || !more || json_object_update(json, head) || json_object_update(json, more))) {
        json_decref(json);
        json = NULL;
    }
    json_decref(head);
    json_decref(more);
    json_decref(settings);
    return json;
}
