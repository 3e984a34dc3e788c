/* store_evaluations.c: what evaluations have scored. run functions: the store's threads; the rest: the loop's. */
#include "daemon/store_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define UNIT_NAMES "model, precision, task, parent, subgroup, num_fewshot, metrics, pool"

/* ---- insert ---- */

struct results_write {
    struct store_request request;
    char evaluation[ID_BYTES];
    struct evaluation_unit_resource unit;
    struct evaluation_row *rows; /* [count] */
    size_t count;
};

/* Add to the unit's row, which is made if it is not there; its sequence. */
static int add_to_unit(struct connection *connection, const struct results_write *write, int64_t *ret_unit,
                       struct error *error)
{
    const struct evaluation_unit_resource *unit = &write->unit;
    struct query query = query_begin(
        connection,
        "INSERT INTO evaluation_units (evaluation, " UNIT_NAMES ", tokens, tokens_run, seconds) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (evaluation, model, precision, task, num_fewshot) DO UPDATE SET tokens = tokens + "
        "excluded.tokens, tokens_run = tokens_run + excluded.tokens_run, seconds = seconds + "
        "excluded.seconds RETURNING sequence");
    query_text(&query, write->evaluation);
    query_text(&query, unit->model);
    query_text(&query, unit->precision);
    query_text(&query, unit->task);
    query_text(&query, unit->parent);
    query_text(&query, unit->group);
    query_int(&query, unit->num_fewshot);
    query_text(&query, unit->metrics);
    query_text(&query, unit->pool);
    query_int(&query, unit->tokens);
    query_int(&query, unit->tokens_run);
    query_real(&query, unit->seconds);
    int code = query_next(&query, error);
    if (code <= 0)
        return code ? code : error_set(error, ERROR_INTERNAL, "a row that was written has no number");
    *ret_unit = column_int(&query, 0);
    query_end(&query);
    return 0;
}

static int run_insert(struct connection *connection, struct store_request *request, struct error *error)
{
    const struct results_write *write = (const struct results_write *)request;
    int64_t unit = 0;
    int code = add_to_unit(connection, write, &unit, error);
    for (size_t i = 0; !code && i < write->count; i++) {
        const struct evaluation_row *row = &write->rows[i];
        struct query query = query_begin(
            connection,
            "INSERT INTO evaluation_results (unit, document, acc, acc_norm, log_likelihood, detail) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (unit, document) DO NOTHING");
        query_int(&query, unit);
        query_int(&query, row->document);
        query_int(&query, row->acc);
        query_int(&query, row->acc_norm);
        query_real(&query, row->log_likelihood);
        query_text(&query, row->detail);
        code = query_run(&query, NULL, error);
    }
    return code;
}

static void free_rows(struct evaluation_row *rows, size_t count)
{
    for (size_t i = 0; i < count; i++)
        free(rows[i].detail);
    free(rows);
}

static void release_insert(struct store_request *request)
{
    struct results_write *write = (struct results_write *)request;
    free_rows(write->rows, write->count);
}

void store_evaluation_insert(struct store *store, const char *evaluation,
                             const struct evaluation_unit_resource *unit, struct evaluation_row *rows,
                             size_t count, store_written done, void *arg)
{
    struct results_write *write = request_new_write(sizeof *write, run_insert, done, arg);
    if (!write) {
        free_rows(rows, count);
        return;
    }
    write->request.release = release_insert;
    snprintf(write->evaluation, sizeof write->evaluation, "%s", evaluation);
    write->unit = *unit;
    write->rows = rows;
    write->count = count;
    for (size_t i = 0; i < count; i++)
        write->request.bytes += sizeof *rows + strlen(rows[i].detail);
    store_write(store, &write->request);
}

/* ---- reads ---- */

struct results_read {
    struct store_request request;
    char evaluation[ID_BYTES];
    int64_t after, limit;
    struct rows rows;
    bool has_more;
    char *scored;
    store_units_read units_done;
    store_scored_read scored_done;
    store_examples_read examples_done;
};

static struct results_read *new_read(const char *evaluation, size_t item_size,
                                     int (*run)(struct connection *, struct store_request *, struct error *),
                                     void (*deliver)(struct store_request *),
                                     void (*release)(struct store_request *), void *arg)
{
    struct results_read *read = request_new(sizeof *read);
    if (!read)
        return NULL;
    read->request.run = run;
    read->request.deliver = deliver;
    read->request.release = release;
    read->request.arg = arg;
    read->rows.item_size = item_size;
    snprintf(read->evaluation, sizeof read->evaluation, "%s", evaluation);
    return read;
}

static void names_from_row(const struct query *query, int column, struct evaluation_unit_resource *unit)
{
    column_text(query, column, unit->model, sizeof unit->model);
    column_text(query, column + 1, unit->precision, sizeof unit->precision);
    column_text(query, column + 2, unit->task, sizeof unit->task);
    column_text(query, column + 3, unit->parent, sizeof unit->parent);
    column_text(query, column + 4, unit->group, sizeof unit->group);
    unit->num_fewshot = column_int(query, column + 5);
    column_text(query, column + 6, unit->metrics, sizeof unit->metrics);
    column_text(query, column + 7, unit->pool, sizeof unit->pool);
}

static int unit_from_row(const struct query *query, void *item, struct error *error)
{
    struct evaluation_unit_resource *unit = item;
    (void)error;
    names_from_row(query, 0, unit);
    unit->tokens = column_int(query, 8);
    unit->tokens_run = column_int(query, 9);
    unit->seconds = column_real(query, 10);
    unit->n = column_int(query, 11);
    unit->acc = column_int(query, 12);
    unit->acc_norm = column_int(query, 13);
    unit->log_likelihood = column_real(query, 14);
    unit->log_likelihood_squared = column_real(query, 15);
    return 0;
}

/* Sums go through the documents in their order, so that they are the same whatever came first. With a log-likelihood that is not a
 * number their sums are none. */
static int run_units(struct connection *connection, struct store_request *request, struct error *error)
{
    struct results_read *read = (struct results_read *)request;
    struct query query = query_begin(
        connection,
        "SELECT " UNIT_NAMES ", tokens, tokens_run, seconds, count(document), total(acc), total(acc_norm), "
        "CASE WHEN count(log_likelihood) = count(document) THEN total(log_likelihood) END, "
        "CASE WHEN count(log_likelihood) = count(document) THEN total(log_likelihood * log_likelihood) END "
        "FROM evaluation_units AS unit LEFT JOIN evaluation_results AS result "
        "INDEXED BY evaluation_results_sums ON result.unit = unit.sequence WHERE evaluation = ? GROUP BY "
        "unit.sequence ORDER BY unit.sequence LIMIT ?");
    query_text(&query, read->evaluation);
    query_int(&query, INT32_MAX);
    return rows_collect(&read->rows, &query, INT32_MAX - 1, unit_from_row, &read->has_more, error);
}

static void deliver_units(struct store_request *request)
{
    struct results_read *read = (struct results_read *)request;
    read->units_done(request->arg, request->code, request->code ? NULL : read->rows.items,
                     request->code ? 0 : read->rows.count);
}

static void release_units(struct store_request *request)
{
    rows_free(&((struct results_read *)request)->rows, NULL);
}

void store_evaluation_units(struct store *store, const char *evaluation, store_units_read done, void *arg)
{
    struct results_read *read = new_read(evaluation, sizeof(struct evaluation_unit_resource), run_units,
                                         deliver_units, release_units, arg);
    if (!read) {
        done(arg, ERROR_NO_MEMORY, NULL, 0);
        return;
    }
    read->units_done = done;
    store_read(store, &read->request);
}

/* ---- what is scored ---- */

/* Take one more document, later than all before, into the ranges of its unit. */
static int add_scored(json_t *scored, const struct query *query)
{
    char model[MODEL_ID_BYTES], precision[16], task[160], key[200];
    column_text(query, 0, model, sizeof model);
    column_text(query, 1, precision, sizeof precision);
    column_text(query, 2, task, sizeof task);
    const json_int_t document = column_int(query, 4);
    snprintf(key, sizeof key, "%s/%s/%" PRId64, precision, task, column_int(query, 3));
    json_t *of_model = json_object_get(scored, model);
    if (!of_model && json_object_set_new(scored, model, of_model = json_object()))
        return ERROR_NO_MEMORY;
    json_t *ranges = json_object_get(of_model, key);
    if (!ranges && json_object_set_new(of_model, key, ranges = json_array()))
        return ERROR_NO_MEMORY;
    json_t *last = json_array_get(ranges, json_array_size(ranges) - 1);
    if (last && json_integer_value(json_array_get(last, 1)) + 1 == document)
        return json_array_set_new(last, 1, json_integer(document)) ? ERROR_NO_MEMORY : 0;
    return json_array_append_new(ranges, json_pack("[I,I]", document, document)) ? ERROR_NO_MEMORY : 0;
}

static int run_scored(struct connection *connection, struct store_request *request, struct error *error)
{
    struct results_read *read = (struct results_read *)request;
    struct query query = query_begin(
        connection, "SELECT model, precision, task, num_fewshot, document FROM evaluation_units JOIN "
                    "evaluation_results ON "
                    "unit = evaluation_units.sequence WHERE evaluation = ? ORDER BY unit, document");
    query_text(&query, read->evaluation);
    json_t *scored = json_object();
    int code;
    while ((code = query_next(&query, error)) > 0 && !(code = add_scored(scored, &query)))
        ;
    query_end(&query);
    if (!code && !(read->scored = json_dumps(scored, JSON_COMPACT)))
        code = ERROR_NO_MEMORY;
    json_decref(scored);
    return code == ERROR_NO_MEMORY ? error_set(error, code, "no memory for what is scored") : code;
}

static void deliver_scored(struct store_request *request)
{
    struct results_read *read = (struct results_read *)request;
    read->scored_done(request->arg, request->code, request->code ? NULL : read->scored);
}

static void release_scored(struct store_request *request)
{
    free(((struct results_read *)request)->scored);
}

void store_evaluation_scored(struct store *store, const char *evaluation, store_scored_read done, void *arg)
{
    struct results_read *read = new_read(evaluation, 1, run_scored, deliver_scored, release_scored, arg);
    if (!read) {
        done(arg, ERROR_NO_MEMORY, NULL);
        return;
    }
    read->scored_done = done;
    store_read(store, &read->request);
}

/* ---- examples ---- */

enum { PAGE_BYTES = 1 << 20 }; /* of details: a page ends behind the one that reaches it */

static int example_from_row(const struct query *query, struct evaluation_example *example,
                            struct error *error)
{
    names_from_row(query, 0, &example->unit);
    example->sequence = column_int(query, 8);
    return column_copy(query, 9, &example->detail, error);
}

static int run_examples(struct connection *connection, struct store_request *request, struct error *error)
{
    struct results_read *read = (struct results_read *)request;
    struct query query = query_begin(
        connection, "SELECT " UNIT_NAMES ", result.sequence, detail FROM evaluation_results AS result JOIN "
                    "evaluation_units AS unit ON result.unit = unit.sequence WHERE evaluation = ? AND "
                    "result.sequence > ? "
                    "ORDER BY result.sequence LIMIT ?");
    query_text(&query, read->evaluation);
    query_int(&query, read->after);
    query_int(&query, read->limit + 1);
    size_t bytes = 0;
    int code;
    while ((code = query_next(&query, error)) > 0) {
        read->has_more = (int64_t)read->rows.count == read->limit || bytes >= PAGE_BYTES;
        if (read->has_more) {
            code = 0;
            break;
        }
        struct evaluation_example *example = rows_add(&read->rows);
        code = example ? example_from_row(&query, example, error)
                       : error_set(error, ERROR_NO_MEMORY, "no memory for a list");
        if (code)
            break;
        bytes += strlen(example->detail);
    }
    query_end(&query);
    return code;
}

static void deliver_examples(struct store_request *request)
{
    struct results_read *read = (struct results_read *)request;
    read->examples_done(request->arg, request->code, request->code ? NULL : read->rows.items,
                        request->code ? 0 : read->rows.count, !request->code && read->has_more);
}

static void free_example(void *item)
{
    free(((struct evaluation_example *)item)->detail);
}

static void release_examples(struct store_request *request)
{
    rows_free(&((struct results_read *)request)->rows, free_example);
}

void store_evaluation_examples(struct store *store, const char *evaluation, int64_t after, int64_t limit,
                               store_examples_read done, void *arg)
{
    struct results_read *read = new_read(evaluation, sizeof(struct evaluation_example), run_examples,
                                         deliver_examples, release_examples, arg);
    if (!read) {
        done(arg, ERROR_NO_MEMORY, NULL, 0, false);
        return;
    }
    read->after = after;
    read->limit = limit;
    read->examples_done = done;
    store_read(store, &read->request);
}
