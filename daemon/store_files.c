/* store_files.c: rows of uploaded and result files. run functions: the store's threads; the rest: the loop's.
 */
#include "daemon/store_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COLUMNS "id, bytes, created_at, expires_at, filename, purpose, status, status_details, sha256"
/* An evaluation's settings hold the ids of its files. */
#define OPEN_JOB_NAMES(file)                                                                                 \
    "SELECT 1 FROM jobs WHERE status IN ('validating_files', 'queued', 'running', 'paused') AND "            \
    "(training_file = " file " OR validation_file = " file                                                   \
    " OR (kind = 'evaluation' AND instr(hyperparameters, " file ")))"

enum { EXPIRED_LIMIT = 1000 };

struct file_write {
    struct store_request request;
    struct file_resource file; /* for a delete the id alone */
    struct kept_answer *answer;
};

struct file_read {
    struct store_request request;
    char id[ID_BYTES];
    struct file_resource file;
    store_file_read done;
};

struct file_list {
    struct store_request request;
    struct page page;
    char purpose[32];
    int64_t now; /* of store_file_expired */
    struct rows rows;
    bool has_more;
    store_files_read done;
};

static int file_from_row(const struct query *query, void *item, struct error *error)
{
    (void)error;
    struct file_resource *file = item;
    column_text(query, 0, file->id, sizeof file->id);
    file->bytes = column_int(query, 1);
    file->created_at = column_int(query, 2);
    file->expires_at = column_int(query, 3);
    column_text(query, 4, file->filename, sizeof file->filename);
    column_text(query, 5, file->purpose, sizeof file->purpose);
    column_text(query, 6, file->status, sizeof file->status);
    column_text(query, 7, file->status_details, sizeof file->status_details);
    column_text(query, 8, file->sha256, sizeof file->sha256);
    return 0;
}

int file_row_insert(struct connection *connection, const struct file_resource *file, struct error *error)
{
    struct query query =
        query_begin(connection, "INSERT INTO files (" COLUMNS ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)");
    query_text(&query, file->id);
    query_int(&query, file->bytes);
    query_int(&query, file->created_at);
    query_int(&query, file->expires_at);
    query_text(&query, file->filename);
    query_text(&query, file->purpose);
    query_text(&query, file->status);
    query_text(&query, file->status_details);
    query_text(&query, file->sha256);
    return query_run(&query, NULL, error);
}

static int run_insert(struct connection *connection, struct store_request *request, struct error *error)
{
    const struct file_write *write = (const struct file_write *)request;
    int code = file_row_insert(connection, &write->file, error);
    return code || !write->answer ? code : answer_row_insert(connection, write->answer, error);
}

static void release_insert(struct store_request *request)
{
    free(((struct file_write *)request)->answer);
}

void store_file_insert(struct store *store, const struct file_resource *file,
                       const struct kept_answer *answer, store_written done, void *arg)
{
    struct file_write *write = request_new_write(sizeof *write, run_insert, done, arg);
    if (!write)
        return;
    write->file = *file;
    write->request.release = release_insert;
    if (answer && !(write->answer = answer_copy(answer)))
        request_refuse(&write->request, ERROR_NO_MEMORY, "no memory for an answer");
    store_write(store, &write->request);
}

static int run_delete(struct connection *connection, struct store_request *request, struct error *error)
{
    const char *id = ((struct file_write *)request)->file.id;
    int in_use = query_finds(connection, OPEN_JOB_NAMES("?1"), id, NULL, error);
    if (in_use < 0)
        return in_use;
    if (in_use)
        return error_set(error, ERROR_BUSY, "file '%s' is used by a job that has not ended", id);
    struct query query = query_begin(connection, "DELETE FROM files WHERE id = ?");
    query_text(&query, id);
    int64_t changes = 0;
    int code = query_run(&query, &changes, error);
    if (!code && !changes)
        code = error_set(error, ERROR_NOT_FOUND, "no file has the id '%s'", id);
    return code;
}

void store_file_delete(struct store *store, const char *id, store_written done, void *arg)
{
    struct file_write *write = request_new_write(sizeof *write, run_delete, done, arg);
    if (!write)
        return;
    snprintf(write->file.id, sizeof write->file.id, "%s", id);
    store_write(store, &write->request);
}

static int run_get(struct connection *connection, struct store_request *request, struct error *error)
{
    struct file_read *read = (struct file_read *)request;
    struct query query = query_begin(connection, "SELECT " COLUMNS " FROM files WHERE id = ?");
    query_text(&query, read->id);
    int code = query_next(&query, error);
    if (code == 0)
        return error_set(error, ERROR_NOT_FOUND, "no file has the id '%s'", read->id);
    if (code < 0)
        return code;
    code = file_from_row(&query, &read->file, error);
    query_end(&query);
    return code;
}

static void deliver_get(struct store_request *request)
{
    struct file_read *read = (struct file_read *)request;
    read->done(request->arg, request->code, request->code ? NULL : &read->file);
}

void store_file_get(struct store *store, const char *id, store_file_read done, void *arg)
{
    struct file_read *read = request_new(sizeof *read);
    if (!read) {
        done(arg, ERROR_NO_MEMORY, NULL);
        return;
    }
    read->request.run = run_get;
    read->request.deliver = deliver_get;
    read->request.arg = arg;
    read->done = done;
    snprintf(read->id, sizeof read->id, "%s", id);
    store_read(store, &read->request);
}

static int run_list(struct connection *connection, struct store_request *request, struct error *error)
{
    struct file_list *list = (struct file_list *)request;
    int64_t start;
    int code =
        page_start(connection, &list->page, "SELECT sequence FROM files WHERE id = ?", NULL, &start, error);
    if (code)
        return code;
    bool any = !list->purpose[0];
    const char *sql = list->page.ascending ? (any ? LIST_ASCENDING(COLUMNS, "files", "")
                                                  : LIST_ASCENDING(COLUMNS, "files", "purpose = ? AND "))
                                           : (any ? LIST_DESCENDING(COLUMNS, "files", "")
                                                  : LIST_DESCENDING(COLUMNS, "files", "purpose = ? AND "));
    struct query query = query_begin(connection, sql);
    if (!any)
        query_text(&query, list->purpose);
    page_bind(&query, &list->page, start);
    return rows_collect(&list->rows, &query, list->page.limit, file_from_row, &list->has_more, error);
}

static int run_expired(struct connection *connection, struct store_request *request, struct error *error)
{
    struct file_list *list = (struct file_list *)request;
    struct query query = query_begin(connection, "SELECT " COLUMNS " FROM files WHERE expires_at > 0 AND "
                                                 "expires_at <= ? AND NOT EXISTS (" OPEN_JOB_NAMES(
                                                     "files.id") ") ORDER BY expires_at LIMIT ?");
    query_int(&query, list->now);
    query_int(&query, EXPIRED_LIMIT + 1);
    return rows_collect(&list->rows, &query, EXPIRED_LIMIT, file_from_row, &list->has_more, error);
}

static void deliver_list(struct store_request *request)
{
    struct file_list *list = (struct file_list *)request;
    if (request->code)
        list->done(request->arg, request->code, NULL, 0, false);
    else
        list->done(request->arg, 0, list->rows.items, list->rows.count, list->has_more);
}

static void release_list(struct store_request *request)
{
    rows_free(&((struct file_list *)request)->rows, NULL);
}

static struct file_list *list_new(int (*run)(struct connection *, struct store_request *, struct error *),
                                  store_files_read done, void *arg)
{
    struct file_list *list = request_new(sizeof *list);
    if (!list) {
        done(arg, ERROR_NO_MEMORY, NULL, 0, false);
        return NULL;
    }
    list->request.run = run;
    list->request.deliver = deliver_list;
    list->request.release = release_list;
    list->request.arg = arg;
    list->rows.item_size = sizeof(struct file_resource);
    list->done = done;
    return list;
}

void store_file_list(struct store *store, const struct list_query *query, store_files_read done, void *arg)
{
    struct file_list *list = list_new(run_list, done, arg);
    if (!list)
        return;
    list->page = page_of(query);
    snprintf(list->purpose, sizeof list->purpose, "%s", query->purpose);
    store_read(store, &list->request);
}

void store_file_expired(struct store *store, int64_t now, store_files_read done, void *arg)
{
    struct file_list *list = list_new(run_expired, done, arg);
    if (!list)
        return;
    list->now = now;
    store_read(store, &list->request);
}
