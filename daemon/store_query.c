/* store_query.c: the layer over SQLite's statements, and what collects their rows. See store_internal.h.
 * Whichever thread owns the connection. */
#include "daemon/store_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What SQLite reports (extended codes), as one of ours and a sentence. */
static int translate(struct connection *connection, int status, struct error *error)
{
    const char *message = sqlite3_errmsg(connection->db);
    if (status == SQLITE_CONSTRAINT_FOREIGNKEY)
        return error_set(error, ERROR_NOT_FOUND, "what this belongs to does not exist");
    switch (status & 0xff) {
    case SQLITE_CONSTRAINT:
        return error_set(error, ERROR_INVALID, "refused by the database: %s", message);
    case SQLITE_FULL:
        return error_set(error, ERROR_IO, "the disk is full");
    case SQLITE_NOMEM:
        return error_set(error, ERROR_NO_MEMORY, "no memory for the database");
    case SQLITE_BUSY:
        return error_set(error, ERROR_BUSY, "the database is in use by another process");
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
        return error_set(error, ERROR_CORRUPT, "the database is damaged: %s", message);
    case SQLITE_ERROR:
    case SQLITE_MISUSE:
    case SQLITE_RANGE:
        return error_set(error, ERROR_INTERNAL, "the database says: %s", message);
    default:
        return error_set(error, ERROR_IO, "the database says: %s", message);
    }
}

static sqlite3_stmt *prepared(struct connection *connection, const char *sql, int *ret_status)
{
    for (int i = 0; i < connection->n_statements; i++)
        if (connection->statements[i].sql == sql)
            return connection->statements[i].statement;
    if (connection->n_statements == CONNECTION_STATEMENTS) {
        *ret_status = SQLITE_NOMEM;
        return NULL;
    }
    sqlite3_stmt *statement = NULL;
    *ret_status = sqlite3_prepare_v3(connection->db, sql, -1, SQLITE_PREPARE_PERSISTENT, &statement, NULL);
    if (*ret_status == SQLITE_OK) {
        connection->statements[connection->n_statements].sql = sql;
        connection->statements[connection->n_statements++].statement = statement;
    }
    return statement;
}

struct query query_begin(struct connection *connection, const char *sql)
{
    struct query query = {.connection = connection, .status = SQLITE_OK};
    query.statement = prepared(connection, sql, &query.status);
    return query;
}

void query_text(struct query *query, const char *text)
{
    query->n_bound++;
    if (query->status == SQLITE_OK)
        query->status = sqlite3_bind_text(query->statement, query->n_bound, text, -1, SQLITE_STATIC);
}

void query_int(struct query *query, int64_t value)
{
    query->n_bound++;
    if (query->status == SQLITE_OK)
        query->status = sqlite3_bind_int64(query->statement, query->n_bound, value);
}

void query_real(struct query *query, double value)
{
    query->n_bound++;
    if (query->status == SQLITE_OK)
        query->status = sqlite3_bind_double(query->statement, query->n_bound, value);
}

int query_next(struct query *query, struct error *error)
{
    if (query->status == SQLITE_OK || query->status == SQLITE_ROW)
        query->status = sqlite3_step(query->statement);
    if (query->status == SQLITE_ROW)
        return 1;
    int code = query->status == SQLITE_DONE ? 0 : translate(query->connection, query->status, error);
    query_end(query);
    return code;
}

int query_run(struct query *query, int64_t *ret_changes, struct error *error)
{
    int code;
    while ((code = query_next(query, error)) > 0)
        ;
    if (!code && ret_changes)
        *ret_changes = sqlite3_changes64(query->connection->db);
    return code;
}

void query_end(struct query *query)
{
    if (!query->statement)
        return;
    sqlite3_reset(query->statement);
    sqlite3_clear_bindings(query->statement);
}

void column_text(const struct query *query, int column, char *ret_text, size_t size)
{
    const unsigned char *text = sqlite3_column_text(query->statement, column);
    snprintf(ret_text, size, "%s", text ? (const char *)text : "");
}

int64_t column_int(const struct query *query, int column)
{
    return sqlite3_column_int64(query->statement, column);
}

double column_real(const struct query *query, int column)
{
    return sqlite3_column_type(query->statement, column) == SQLITE_NULL
               ? (double)NAN
               : sqlite3_column_double(query->statement, column);
}

int column_copy(const struct query *query, int column, char **ret_text, struct error *error)
{
    if (sqlite3_column_type(query->statement, column) == SQLITE_NULL)
        return 0;
    const unsigned char *text = sqlite3_column_text(query->statement, column);
    char *copy = text ? strdup((const char *)text) : NULL;
    if (!copy)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a row");
    *ret_text = copy;
    return 0;
}

int query_finds(struct connection *connection, const char *sql, const char *first, const char *second,
                struct error *error)
{
    struct query query = query_begin(connection, sql);
    query_text(&query, first);
    if (second)
        query_text(&query, second);
    int found = query_next(&query, error);
    if (found > 0)
        query_end(&query);
    return found;
}

void *rows_add(struct rows *rows)
{
    if (rows->count == rows->capacity) {
        size_t capacity = rows->capacity ? 2 * rows->capacity : 16;
        void *items = reallocarray(rows->items, capacity, rows->item_size);
        if (!items)
            return NULL;
        rows->items = items;
        rows->capacity = capacity;
    }
    void *item = (char *)rows->items + rows->count * rows->item_size;
    rows->count++;
    return memset(item, 0, rows->item_size);
}

void rows_free(struct rows *rows, void (*item_free)(void *item))
{
    for (size_t i = 0; item_free && i < rows->count; i++)
        item_free((char *)rows->items + i * rows->item_size);
    free(rows->items);
    rows->items = NULL;
    rows->count = rows->capacity = 0;
}

int rows_collect(struct rows *rows, struct query *query, int64_t limit, row_reader read, bool *ret_more,
                 struct error *error)
{
    int code;
    *ret_more = false;
    while ((code = query_next(query, error)) > 0) {
        if ((int64_t)rows->count == limit) {
            *ret_more = true;
            code = 0;
            break;
        }
        void *item = rows_add(rows);
        code = item ? read(query, item, error) : error_set(error, ERROR_NO_MEMORY, "no memory for a list");
        if (code)
            break;
    }
    query_end(query);
    return code;
}

struct page page_of(const struct list_query *query)
{
    struct page page = {.limit = query->limit < 1 ? 1 : query->limit, .ascending = query->ascending};
    snprintf(page.after, sizeof page.after, "%s", query->after);
    return page;
}

int page_start(struct connection *connection, const struct page *page, const char *sql, const char *owner,
               int64_t *ret_sequence, struct error *error)
{
    if (!page->after[0]) {
        *ret_sequence = page->ascending ? 0 : INT64_MAX;
        return 0;
    }
    struct query query = query_begin(connection, sql);
    query_text(&query, page->after);
    if (owner)
        query_text(&query, owner);
    int code = query_next(&query, error);
    if (code == 0)
        return error_set_param(error, ERROR_NOT_FOUND, "after", "no row has the id '%.200s'", page->after);
    if (code < 0)
        return code;
    *ret_sequence = column_int(&query, 0);
    query_end(&query);
    return 0;
}

void page_bind(struct query *query, const struct page *page, int64_t start)
{
    query_int(query, start);
    query_int(query, page->limit + 1);
}

/* ---- start-up ---- */

struct ids_read {
    struct store_request request;
    enum store_table table;
    struct rows rows;
};

static int id_from_row(const struct query *query, void *item, struct error *error)
{
    (void)error;
    column_text(query, 0, item, ID_BYTES);
    return 0;
}

static int run_ids(struct connection *connection, struct store_request *request, struct error *error)
{
    struct ids_read *read = (struct ids_read *)request;
    bool more;
    struct query query =
        query_begin(connection, read->table == STORE_FILES ? "SELECT id FROM files ORDER BY id"
                                                           : "SELECT id FROM jobs ORDER BY id");
    return rows_collect(&read->rows, &query, INT64_MAX, id_from_row, &more, error);
}

int store_load_ids(struct store *store, enum store_table table, char (**ret_ids)[ID_BYTES], size_t *ret_count,
                   struct error *error)
{
    struct ids_read read = {.request.run = run_ids, .table = table, .rows.item_size = ID_BYTES};
    int code = store_read_blocking(store, &read.request, error);
    if (code) {
        rows_free(&read.rows, NULL);
        return code;
    }
    *ret_ids = read.rows.items;
    *ret_count = read.rows.count;
    return 0;
}
