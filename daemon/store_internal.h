/* store_internal.h: what the store's files share: requests that travel to a store thread and back, and a
 * thin, sticky layer over SQLite's statements. For daemon/store*.c alone. */
#ifndef DAEMON_STORE_INTERNAL_H
#define DAEMON_STORE_INTERNAL_H

#include "daemon/store.h"

#include <sqlite3.h>

/* ---- connections and statements ----
 *
 * struct query q = query_begin(connection, SQL);     SQL: one static text; its statement is kept, prepared
 * query_text(&q, id); query_int(&q, step);           in the order of the question marks
 * return query_run(&q, error);                       or: while ((code = query_next(&q, error)) > 0) ...
 *
 * The first failure sticks and is reported by query_run or query_next. Both reset the statement once they
 * return 0 or an error; a loop that is left early calls query_end. Bound texts must live until then. */

enum { CONNECTION_STATEMENTS = 96 };

struct connection {
    sqlite3 *db;
    int n_statements;
    struct {
        const char *sql;
        sqlite3_stmt *statement;
    } statements[CONNECTION_STATEMENTS];
};

struct query {
    struct connection *connection;
    sqlite3_stmt *statement;
    int n_bound;
    int status; /* SQLite's */
};

struct query query_begin(struct connection *connection, const char *sql);
void query_text(struct query *query, const char *text); /* NULL -> NULL */
void query_int(struct query *query, int64_t value);
void query_real(struct query *query, double value); /* NaN -> NULL */
/* 1 and a row, 0 at the end, or an error. */
int query_next(struct query *query, struct error *error);
/* To the end. ret_changes (rows written) may be NULL. */
int query_run(struct query *query, int64_t *ret_changes, struct error *error);
void query_end(struct query *query);

void column_text(const struct query *query, int column, char *ret_text, size_t size);
int64_t column_int(const struct query *query, int column);
double column_real(const struct query *query, int column); /* NULL -> NaN */
/* A copy to free(); *ret_text stays NULL for NULL. Returns 0 or ERROR_NO_MEMORY. */
int column_copy(const struct query *query, int column, char **ret_text, struct error *error);

/* Does this one-column query (texts bound in order, NULL: fewer) find a row? 1, 0, or an error. */
int query_finds(struct connection *connection, const char *sql, const char *first, const char *second,
                struct error *error);

/* ---- requests ---- */

/* Embedded as the first member of what each kind of request carries. Belongs to the loop's thread, then to a
 * store thread while it is queued and run, then to the loop's thread again. */
struct store_request {
    struct store_request *next;
    /* On a store thread. For writes: within the group's transaction, and once more in a transaction of its
     * own when the group's could not be committed, so that it must not change what the request carries
     * except its results. */
    int (*run)(struct connection *connection, struct store_request *request, struct error *error);
    void (*deliver)(struct store_request *request); /* on the loop's thread; NULL: nobody waits */
    void (*release)(struct store_request *request); /* frees what it owns, not itself; may be NULL */
    store_written done;                             /* plain writes: see request_new_write */
    void *arg;
    size_t bytes;           /* about what it occupies while it waits */
    bool refused;           /* code is set and it is not to be run */
    bool blocking, settled; /* somebody waits in store_*_blocking and owns the memory */
    int code;
    struct error error;
    /* On the first request of a transaction that committed; 0 requests elsewhere. */
    double commit_seconds;
    int64_t commit_requests;
};

/* A zeroed request of `size` bytes (a struct that starts with struct store_request), or NULL. */
void *request_new(size_t size);
/* The same for a write with a store_written callback, which is told at once when there is no memory. */
void *request_new_write(size_t size,
                        int (*run)(struct connection *connection, struct store_request *request,
                                   struct error *error),
                        store_written done, void *arg);
/* It could not be filled: it goes its way unrun and is answered in its turn. */
void request_refuse(struct store_request *request, int code, const char *reason);
/* Queue; from here on the request belongs to the store. */
void store_write(struct store *store, struct store_request *request);
void store_read(struct store *store, struct store_request *request);
/* The same, and wait. The request is the caller's (on its stack, say) and is not released. Returns its code.
 */
int store_write_blocking(struct store *store, struct store_request *request, struct error *error);
int store_read_blocking(struct store *store, struct store_request *request, struct error *error);

/* ---- rows that a read collects ---- */
struct rows {
    void *items; /* [count] of item_size bytes */
    size_t count, capacity, item_size;
};
/* A zeroed new item, or NULL. */
void *rows_add(struct rows *rows);
void rows_free(struct rows *rows, void (*item_free)(void *item)); /* item_free may be NULL */
/* Take in at most `limit` of a query's rows, and say whether there are more. The query is over afterwards. */
typedef int (*row_reader)(const struct query *query, void *item, struct error *error);
int rows_collect(struct rows *rows, struct query *query, int64_t limit, row_reader read, bool *ret_more,
                 struct error *error);

/* ---- lists ---- */

/* What every list query binds; copied from a struct list_query. */
struct page {
    char after[MODEL_ID_BYTES];
    int64_t limit;
    bool ascending;
};
struct page page_of(const struct list_query *query);
/* The sequence to start behind: the row's that `sql` (one text in, one sequence out) finds for page->after,
 * or the end that the order starts from. ERROR_NOT_FOUND when it finds none. */
int page_start(struct connection *connection, const struct page *page, const char *sql, const char *owner,
               int64_t *ret_sequence, struct error *error);
/* Texts of a list query for both orders: SELECT ... WHERE [conditions AND] sequence < ? ... LIMIT ?. */
#define LIST_DESCENDING(columns, table, conditions)                                                          \
    "SELECT " columns " FROM " table " WHERE " conditions "sequence < ? ORDER BY sequence DESC LIMIT ?"
#define LIST_ASCENDING(columns, table, conditions)                                                           \
    "SELECT " columns " FROM " table " WHERE " conditions "sequence > ? ORDER BY sequence ASC LIMIT ?"
/* Bind the two question marks above (one row more than the limit is asked for). */
void page_bind(struct query *query, const struct page *page, int64_t start);

/* ---- rows that more than one file writes, within the caller's transaction ---- */
int file_row_insert(struct connection *connection, const struct file_resource *file, struct error *error);
int model_row_insert(struct connection *connection, const struct adapter_row *row, struct error *error);
int event_row_insert(struct connection *connection, struct event_resource *event, int64_t step,
                     bool *ret_inserted, struct error *error);
int answer_row_insert(struct connection *connection, const struct kept_answer *answer, struct error *error);
/* One block to free(); NULL: no memory. */
struct kept_answer *answer_copy(const struct kept_answer *answer);
int resume_point_forget(struct connection *connection, const char *job, struct error *error);

#endif
