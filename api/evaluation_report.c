/* evaluation_report.c: what shots gain, as the paper tabulates it. Any thread.
 *
 * For every model and precision, and each task (subtasks put together, each example weighing alike), the metric at each shot count,
 * and over that at 0 shots:
 *     gain[k]           score(k) - score(0)
 *     relative_gain[k]  gain[k] / score(0)
 *     aipss             the mean of relative_gain over the shot counts: average improvement per shot count
 * A model's aipss is the mean of its tasks'. `shares`: which part of one model's aipss another reaches in the same precision.
 * `divergence`: of each precision, the mean absolute difference from fp32 over all tasks and shot counts, and how many of them
 * exceed one point.
 * The metric is acc_norm where a task has it, acc otherwise. */
#include "api/evaluation.h"

#include "api/encode.h"
#include "api/text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double spike = 0.01;

/* One score. */
struct cell {
    const struct evaluation_unit_resource *unit; /* model, precision, shots */
    const char *task;
    double score;
    bool by_length;
};

static bool same_model(const struct cell *a, const struct cell *b)
{
    return !strcmp(a->unit->model, b->unit->model) && !strcmp(a->unit->precision, b->unit->precision);
}

static const struct cell *find_cell(const struct cell *cells, size_t count, const struct cell *like,
                                    const char *precision, int64_t shots)
{
    for (size_t i = 0; i < count; i++)
        if (!strcmp(cells[i].unit->model, like->unit->model) &&
            !strcmp(cells[i].unit->precision, precision) && !strcmp(cells[i].task, like->task) &&
            cells[i].unit->num_fewshot == shots)
            return &cells[i];
    return NULL;
}

/* Is this the first cell of its model, or of its model's task? */
static bool is_first(const struct cell *cells, size_t index, bool of_task)
{
    for (size_t i = index; i-- > 0;) /* from the end: its like are near */
        if (same_model(&cells[i], &cells[index]) && (!of_task || !strcmp(cells[i].task, cells[index].task)))
            return false;
    return true;
}

/* The task's row, and its aipss (NaN without 0 shots, or without others). */
static json_t *task_encode(const struct cell *cells, size_t count, const struct cell *task, double *ret_aipss)
{
    const struct cell *zero = find_cell(cells, count, task, task->unit->precision, 0);
    json_t *scores = json_object(), *gains = json_object(), *relative = json_object();
    double sum = 0;
    int n = 0;
    for (size_t i = 0; i < count; i++) {
        char shots[24];
        if (!same_model(&cells[i], task) || strcmp(cells[i].task, task->task))
            continue;
        snprintf(shots, sizeof shots, "%lld", (long long)cells[i].unit->num_fewshot);
        json_object_set_new(scores, shots, encode_number(cells[i].score));
        if (!zero || &cells[i] == zero)
            continue;
        double gain = cells[i].score - zero->score, part = zero->score > 0 ? gain / zero->score : (double)NAN;
        json_object_set_new(gains, shots, encode_number(gain));
        json_object_set_new(relative, shots, encode_number(part));
        sum += part;
        n++;
    }
    *ret_aipss = n ? sum / n : (double)NAN;
    return json_pack("{s:o, s:s, s:o, s:o, s:o, s:o}", "task", text_json(task->task), "metric",
                     task->by_length ? "acc_norm" : "acc", "scores", scores, "gain", gains, "relative_gain",
                     relative, "aipss", encode_number(*ret_aipss));
}

static json_t *model_table(const struct cell *cells, size_t count, size_t first, double *ret_aipss)
{
    json_t *tasks = json_array();
    double sum = 0;
    int n = 0;
    for (size_t i = first; i < count; i++) {
        double aipss;
        if (!same_model(&cells[i], &cells[first]) || !is_first(cells, i, true))
            continue;
        json_array_append_new(tasks, task_encode(cells, count, &cells[i], &aipss));
        if (!isnan(aipss)) {
            sum += aipss;
            n++;
        }
    }
    *ret_aipss = n ? sum / n : (double)NAN;
    return json_pack("{s:o, s:s, s:o, s:o}", "model", text_json(cells[first].unit->model), "precision",
                     cells[first].unit->precision, "tasks", tasks, "aipss", encode_number(*ret_aipss));
}

/* How far a model's scores in this precision are from those in fp32; NULL where there are none to compare. */
static json_t *divergence_encode(const struct cell *cells, size_t count, size_t first)
{
    double sum = 0;
    int n = 0, spikes = 0;
    if (!strcmp(cells[first].unit->precision, "fp32"))
        return NULL;
    for (size_t i = first; i < count; i++) {
        if (!same_model(&cells[i], &cells[first]))
            continue;
        const struct cell *exact = find_cell(cells, count, &cells[i], "fp32", cells[i].unit->num_fewshot);
        if (!exact)
            continue;
        double difference = fabs(cells[i].score - exact->score);
        sum += difference;
        spikes += difference > spike;
        n++;
    }
    if (!n)
        return NULL;
    return json_pack("{s:o, s:s, s:o, s:i, s:i}", "model", text_json(cells[first].unit->model), "precision",
                     cells[first].unit->precision, "mean_absolute", encode_number(sum / n), "spikes", spikes,
                     "n", n);
}

static void set_score(struct cell *cell, int64_t acc, int64_t acc_norm, int64_t n)
{
    cell->by_length = evaluation_unit_has(cell->unit, "acc_norm");
    cell->score = (double)(cell->by_length ? acc_norm : acc) / (double)n;
}

static json_t *report_encode(const struct job_resource *job, const struct cell *cells, size_t count)
{
    json_t *tables = json_array(), *shares = json_array(), *divergence = json_array();
    for (size_t i = 0; i < count; i++) {
        double aipss;
        if (!is_first(cells, i, false))
            continue;
        json_t *table = model_table(cells, count, i, &aipss);
        for (size_t j = 0; !isnan(aipss) && j < json_array_size(tables); j++) {
            const json_t *other = json_array_get(tables, j);
            double of = json_number_value(json_object_get(other, "aipss"));
            const json_t *precision = json_object_get(other, "precision");
            if (of > 0 && json_equal(precision, json_object_get(table, "precision")))
                json_array_append_new(shares, json_pack("{s:O?, s:O?, s:O?, s:o}", "model",
                                                        json_object_get(table, "model"), "of",
                                                        json_object_get(other, "model"), "precision",
                                                        precision, "share", encode_number(aipss / of)));
        }
        json_array_append_new(tables, table);
        json_t *difference = divergence_encode(cells, count, i);
        if (difference)
            json_array_append_new(divergence, difference);
    }
    return json_pack("{s:s, s:o, s:s, s:o, s:o, s:o}", "object", "evaluation.report", "evaluation",
                     text_json(job->id), "status", job_status_name(job->status), "tables", tables, "shares",
                     shares, "divergence", divergence);
}

json_t *evaluation_report_encode(const struct job_resource *job, const struct evaluation_unit_resource *units,
                                 size_t count)
{
    struct evaluation_sum *sums;
    int64_t n_sums = evaluation_sum_up(units, count, &sums);
    struct cell *cells = n_sums < 0 ? NULL : calloc(count + (size_t)n_sums + 1, sizeof *cells);
    size_t n_cells = 0;
    json_t *json = NULL;
    if (n_sums < 0)
        return NULL;
    for (size_t i = 0; cells && i < count; i++) {
        const struct evaluation_unit_resource *unit = &units[i];
        if (!unit->n || unit->group[0] ||
            (!evaluation_unit_has(unit, "acc") && !evaluation_unit_has(unit, "acc_norm")))
            continue;
        cells[n_cells] = (struct cell){.unit = unit, .task = unit->task};
        set_score(&cells[n_cells++], unit->acc, unit->acc_norm, unit->n);
    }
    for (int64_t i = 0; cells && i < n_sums; i++) {
        if (strcmp(sums[i].task, sums[i].first->parent))
            continue; /* a group: it is in its task already */
        cells[n_cells] = (struct cell){.unit = sums[i].first, .task = sums[i].task};
        set_score(&cells[n_cells++], sums[i].acc, sums[i].acc_norm, sums[i].n);
    }
    if (cells)
        json = report_encode(job, cells, n_cells);
    free(cells);
    free(sums);
    return json;
}
