/* store_models.c: rows of adapters, fine-tuned models and checkpoints, and where jobs resume. run functions:
 * the store's threads; the rest: the loop's. */
#include "daemon/store_internal.h"

#include <stdio.h>
#include <string.h>

#define MODEL_COLUMNS "id, created, owned_by, root, parent, path, job, step, is_full"
#define CHECKPOINT_COLUMNS                                                                                   \
    "id, job, created_at, step, model, train_loss, train_accuracy, valid_loss, valid_accuracy"

/* ---- models ---- */

int model_row_insert(struct connection *connection, const struct adapter_row *row, struct error *error)
{
    struct query query =
        query_begin(connection, "INSERT INTO models (" MODEL_COLUMNS ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)");
    query_text(&query, row->model.id);
    query_int(&query, row->model.created);
    query_text(&query, row->model.owned_by);
    query_text(&query, row->model.root);
    query_text(&query, row->model.parent);
    query_text(&query, row->path);
    query_text(&query, row->job[0] ? row->job : NULL);
    query_int(&query, row->step);
    query_int(&query, row->full);
    return query_run(&query, NULL, error);
}

struct model_delete {
    struct store_request request;
    char id[MODEL_ID_BYTES];
};

static int run_model_delete(struct connection *connection, struct store_request *request, struct error *error)
{
    const char *id = ((struct model_delete *)request)->id;
    struct query query = query_begin(connection, "DELETE FROM models WHERE id = ?");
    query_text(&query, id);
    int64_t changes = 0;
    int code = query_run(&query, &changes, error);
    if (!code && !changes)
        code = error_set(error, ERROR_NOT_FOUND, "no fine-tuned model has the id '%s'", id);
    return code;
}

void store_model_delete(struct store *store, const char *id, store_written done, void *arg)
{
    struct model_delete *write = request_new_write(sizeof *write, run_model_delete, done, arg);
    if (!write)
        return;
    snprintf(write->id, sizeof write->id, "%s", id);
    store_write(store, &write->request);
}

struct model_insert {
    struct store_request request;
    struct adapter_row model;
};

static int run_model_insert(struct connection *connection, struct store_request *request, struct error *error)
{
    const struct adapter_row *model = &((struct model_insert *)request)->model;
    struct query query = query_begin(connection, "DELETE FROM models WHERE id = ?");
    query_text(&query, model->model.id);
    int code = query_run(&query, NULL, error);
    return code ? code : model_row_insert(connection, model, error);
}

void store_model_insert(struct store *store, const struct adapter_row *model, store_written done, void *arg)
{
    struct model_insert *write = request_new_write(sizeof *write, run_model_insert, done, arg);
    if (!write)
        return;
    write->model = *model;
    store_write(store, &write->request);
}

struct models_read {
    struct store_request request;
    struct rows rows;
};

static int model_from_row(const struct query *query, void *item, struct error *error)
{
    (void)error;
    struct adapter_row *row = item;
    column_text(query, 0, row->model.id, sizeof row->model.id);
    row->model.created = column_int(query, 1);
    column_text(query, 2, row->model.owned_by, sizeof row->model.owned_by);
    column_text(query, 3, row->model.root, sizeof row->model.root);
    column_text(query, 4, row->model.parent, sizeof row->model.parent);
    column_text(query, 5, row->path, sizeof row->path);
    column_text(query, 6, row->job, sizeof row->job);
    row->step = column_int(query, 7);
    row->full = column_int(query, 8) != 0;
    return 0;
}

static int run_models(struct connection *connection, struct store_request *request, struct error *error)
{
    struct rows *rows = &((struct models_read *)request)->rows;
    struct query query = query_begin(connection, "SELECT " MODEL_COLUMNS " FROM models ORDER BY sequence");
    bool more;
    return rows_collect(rows, &query, INT64_MAX, model_from_row, &more, error);
}

int store_load_models(struct store *store, struct adapter_row **ret_items, size_t *ret_count,
                      struct error *error)
{
    struct models_read read = {.request.run = run_models, .rows.item_size = sizeof(struct adapter_row)};
    int code = store_read_blocking(store, &read.request, error);
    if (code) {
        rows_free(&read.rows, NULL);
        return code;
    }
    *ret_items = read.rows.items;
    *ret_count = read.rows.count;
    return 0;
}

/* ---- checkpoints ---- */

struct checkpoint_write {
    struct store_request request;
    struct checkpoint_resource checkpoint; /* for a delete job and step alone */
    struct adapter_row model;
};

/* The model's row takes the checkpoint's with it. *ret_changes: models deleted. */
static int delete_at(struct connection *connection, const char *job, int64_t step, int64_t *ret_changes,
                     struct error *error)
{
    struct query query = query_begin(
        connection,
        "DELETE FROM models WHERE id = (SELECT model FROM checkpoints WHERE job = ? AND step = ?)");
    query_text(&query, job);
    query_int(&query, step);
    return query_run(&query, ret_changes, error);
}

static int run_checkpoint_insert(struct connection *connection, struct store_request *request,
                                 struct error *error)
{
    const struct checkpoint_write *write = (const struct checkpoint_write *)request;
    const struct checkpoint_resource *checkpoint = &write->checkpoint;
    int code;
    if ((code = delete_at(connection, checkpoint->job, checkpoint->step, NULL, error)) ||
        (code = model_row_insert(connection, &write->model, error)))
        return code;
    struct query query = query_begin(connection, "INSERT INTO checkpoints (" CHECKPOINT_COLUMNS
                                                 ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)");
    query_text(&query, checkpoint->id);
    query_text(&query, checkpoint->job);
    query_int(&query, checkpoint->created_at);
    query_int(&query, checkpoint->step);
    query_text(&query, write->model.model.id);
    query_real(&query, checkpoint->train_loss);
    query_real(&query, checkpoint->train_accuracy);
    query_real(&query, checkpoint->valid_loss);
    query_real(&query, checkpoint->valid_accuracy);
    return query_run(&query, NULL, error);
}

void store_checkpoint_insert(struct store *store, const struct checkpoint_resource *checkpoint,
                             const struct adapter_row *model, store_written done, void *arg)
{
    struct checkpoint_write *write = request_new_write(sizeof *write, run_checkpoint_insert, done, arg);
    if (!write)
        return;
    write->checkpoint = *checkpoint;
    write->model = *model;
    store_write(store, &write->request);
}

static int run_checkpoint_delete(struct connection *connection, struct store_request *request,
                                 struct error *error)
{
    const struct checkpoint_resource *checkpoint = &((struct checkpoint_write *)request)->checkpoint;
    int64_t changes = 0;
    int code = delete_at(connection, checkpoint->job, checkpoint->step, &changes, error);
    if (!code && !changes)
        code = error_set(error, ERROR_NOT_FOUND, "job '%s' has no checkpoint of step %lld", checkpoint->job,
                         (long long)checkpoint->step);
    return code;
}

void store_checkpoint_delete(struct store *store, const char *job, int64_t step, store_written done,
                             void *arg)
{
    struct checkpoint_write *write = request_new_write(sizeof *write, run_checkpoint_delete, done, arg);
    if (!write)
        return;
    snprintf(write->checkpoint.job, sizeof write->checkpoint.job, "%s", job);
    write->checkpoint.step = step;
    store_write(store, &write->request);
}

struct checkpoint_list {
    struct store_request request;
    char job[ID_BYTES];
    struct page page;
    struct rows rows;
    bool has_more;
    store_checkpoints_read done;
};

static int checkpoint_from_row(const struct query *query, void *item, struct error *error)
{
    (void)error;
    struct checkpoint_resource *checkpoint = item;
    column_text(query, 0, checkpoint->id, sizeof checkpoint->id);
    column_text(query, 1, checkpoint->job, sizeof checkpoint->job);
    checkpoint->created_at = column_int(query, 2);
    checkpoint->step = column_int(query, 3);
    column_text(query, 4, checkpoint->model, sizeof checkpoint->model);
    checkpoint->train_loss = column_real(query, 5);
    checkpoint->train_accuracy = column_real(query, 6);
    checkpoint->valid_loss = column_real(query, 7);
    checkpoint->valid_accuracy = column_real(query, 8);
    return 0;
}

static int run_checkpoint_list(struct connection *connection, struct store_request *request,
                               struct error *error)
{
    struct checkpoint_list *list = (struct checkpoint_list *)request;
    int64_t start;
    int code =
        page_start(connection, &list->page, "SELECT sequence FROM checkpoints WHERE id = ? AND job = ?",
                   list->job, &start, error);
    if (code)
        return code;
    struct query query =
        query_begin(connection, list->page.ascending
                                    ? LIST_ASCENDING(CHECKPOINT_COLUMNS, "checkpoints", "job = ? AND ")
                                    : LIST_DESCENDING(CHECKPOINT_COLUMNS, "checkpoints", "job = ? AND "));
    query_text(&query, list->job);
    page_bind(&query, &list->page, start);
    return rows_collect(&list->rows, &query, list->page.limit, checkpoint_from_row, &list->has_more, error);
}

static void deliver_checkpoint_list(struct store_request *request)
{
    struct checkpoint_list *list = (struct checkpoint_list *)request;
    if (request->code)
        list->done(request->arg, request->code, NULL, 0, false);
    else
        list->done(request->arg, 0, list->rows.items, list->rows.count, list->has_more);
}

static void release_checkpoint_list(struct store_request *request)
{
    rows_free(&((struct checkpoint_list *)request)->rows, NULL);
}

void store_checkpoint_list(struct store *store, const char *job, const struct list_query *query,
                           store_checkpoints_read done, void *arg)
{
    struct checkpoint_list *list = request_new(sizeof *list);
    if (!list) {
        done(arg, ERROR_NO_MEMORY, NULL, 0, false);
        return;
    }
    list->request.run = run_checkpoint_list;
    list->request.deliver = deliver_checkpoint_list;
    list->request.release = release_checkpoint_list;
    list->request.arg = arg;
    list->rows.item_size = sizeof(struct checkpoint_resource);
    list->page = page_of(query);
    list->done = done;
    snprintf(list->job, sizeof list->job, "%s", job);
    store_read(store, &list->request);
}

/* ---- resume points ---- */

struct resume_point_write {
    struct store_request request;
    char job[ID_BYTES];
    int64_t step;
    char path[4096];
};

static int run_resume_point(struct connection *connection, struct store_request *request, struct error *error)
{
    const struct resume_point_write *write = (const struct resume_point_write *)request;
    struct query query = query_begin(
        connection, "INSERT INTO resume_points (job, step, path) VALUES (?, ?, ?) ON CONFLICT (job) DO "
                    "UPDATE SET step = excluded.step, path = excluded.path");
    query_text(&query, write->job);
    query_int(&query, write->step);
    query_text(&query, write->path);
    return query_run(&query, NULL, error);
}

void store_resume_point_set(struct store *store, const char *job, int64_t step, const char *path,
                            store_written done, void *arg)
{
    struct resume_point_write *write = request_new_write(sizeof *write, run_resume_point, done, arg);
    if (!write)
        return;
    snprintf(write->job, sizeof write->job, "%s", job);
    snprintf(write->path, sizeof write->path, "%s", path);
    write->step = step;
    store_write(store, &write->request);
}

int resume_point_forget(struct connection *connection, const char *job, struct error *error)
{
    struct query query = query_begin(connection, "DELETE FROM resume_points WHERE job = ?");
    query_text(&query, job);
    return query_run(&query, NULL, error);
}
