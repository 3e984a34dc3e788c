/* evaluation_frames.c: what a worker has scored, into the store and the evaluation's events. Loop thread only. */
#include "base/log.h"
#include "daemon/live_job.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void read_text(const json_t *payload, const char *key, char *text, size_t size)
{
    const char *value = json_string_value(json_object_get(payload, key));
    snprintf(text, size, "%s", value ? value : "");
}

static double read_number(const json_t *payload, const char *key)
{
    const json_t *value = json_object_get(payload, key);
    return json_is_number(value) ? json_number_value(value) : (double)NAN;
}

static int64_t read_integer(const json_t *payload, const char *key)
{
    return json_integer_value(json_object_get(payload, key));
}

static void unit_from(const json_t *payload, struct evaluation_unit_resource *unit)
{
    *unit = (struct evaluation_unit_resource){
        .num_fewshot = read_integer(payload, "num_fewshot"),
        .tokens = read_integer(payload, "tokens"),
        .tokens_run = read_integer(payload, "tokens_run"),
        .seconds = read_number(payload, "seconds"),
    };
    read_text(payload, "model", unit->model, sizeof unit->model);
    read_text(payload, "precision", unit->precision, sizeof unit->precision);
    read_text(payload, "task", unit->task, sizeof unit->task);
    read_text(payload, "parent", unit->parent, sizeof unit->parent);
    read_text(payload, "group", unit->group, sizeof unit->group);
    read_text(payload, "metrics", unit->metrics, sizeof unit->metrics);
    read_text(payload, "pool", unit->pool, sizeof unit->pool);
}

/* *ret_rows: [count], or NULL with a count of 0: there are none, or no memory. */
static bool rows_from(const json_t *results, struct evaluation_row **ret_rows, size_t *ret_count)
{
    const size_t count = json_array_size(results);
    struct evaluation_row *rows = calloc(count + 1, sizeof *rows);
    bool whole = rows != NULL;
    for (size_t i = 0; whole && i < count; i++) {
        const json_t *result = json_array_get(results, i);
        const char *detail = json_string_value(json_object_get(result, "detail"));
        rows[i] = (struct evaluation_row){
            .document = read_integer(result, "doc"),
            .acc = read_integer(result, "acc") != 0,
            .acc_norm = read_integer(result, "acc_norm") != 0,
            .log_likelihood = read_number(result, "log_likelihood"),
            .detail = strdup(detail ? detail : "{}"),
        };
        whole = rows[i].detail != NULL;
    }
    for (size_t i = 0; rows && !whole && i < count; i++)
        free(rows[i].detail);
    if (!whole)
        free(rows);
    *ret_rows = whole ? rows : NULL;
    *ret_count = whole ? count : 0;
    return whole;
}

static void on_results_written(void *arg, int code, const struct error *error)
{
    struct live_job *live = arg;
    live->writes--;
    if (code) {
        live->lost = true;
        log_write(LOG_ERROR, "results of an evaluation were not stored", "job", live->job.id, "reason",
                  error ? error->message : "", NULL);
    }
    live_job_release(live);
}

static void say_progress(struct live_job *live, const struct evaluation_unit_resource *unit)
{
    char message[320];
    snprintf(message, sizeof message, "Example %lld/%lld: %s at %lld shots, %s", (long long)live->job.step,
             (long long)live->job.total_steps, unit->task, (long long)unit->num_fewshot, unit->model);
    json_t *data = json_pack("{s:I,s:I,s:s,s:s,s:I,s:o,s:o}", "examples", (json_int_t)live->job.step,
                             "total_examples", (json_int_t)live->job.total_steps, "model", unit->model,
                             "task", unit->task, "num_fewshot", (json_int_t)unit->num_fewshot,
                             "tokens_per_second", frame_number(live->job.tokens_per_second), "eta_seconds",
                             frame_number(live->job.eta_seconds));
    live_job_append_event(live, "info", "metrics", message, data, live->job.step);
}

void evaluation_frames_results(struct live_job *live, const json_t *payload)
{
    struct evaluation_unit_resource unit;
    struct evaluation_row *rows;
    size_t count;
    unit_from(payload, &unit);
    live->job.step = read_integer(payload, "step");
    live->job.total_steps = read_integer(payload, "total_steps");
    live->job.tokens_per_second = read_number(payload, "tokens_per_second");
    live->job.eta_seconds = read_number(payload, "eta_seconds");
    if (!rows_from(json_object_get(payload, "results"), &rows, &count)) {
        live->lost = true;
        return;
    }
    live->writes++;
    store_evaluation_insert(live->scheduler->options.store, live->job.id, &unit, rows, count,
                            on_results_written, live);
    if (count)
        say_progress(live, &unit);
}
