/* store_events.c: rows of jobs' events. run functions: the store's threads; the rest: the loop's. */
#include "daemon/store_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define COLUMNS   "sequence, job, created_at, level, type, message, data"
#define ID_PREFIX "ftevent-"

/* ---- append ---- */

struct event_write {
    struct store_request request;
    struct event_resource event;
    int64_t step;
    bool inserted;
    store_event_written done;
};

int event_row_insert(struct connection *connection, struct event_resource *event, int64_t step,
                     bool *ret_inserted, struct error *error)
{
    struct query query = query_begin(
        connection,
        "INSERT INTO events (job, created_at, level, type, message, data, step) VALUES (?, ?, ?, ?, ?, "
        "?, ?) ON CONFLICT (job, step) WHERE type = 'metrics' DO NOTHING");
    query_text(&query, event->job);
    query_int(&query, event->created_at);
    query_text(&query, event->level);
    query_text(&query, event->type);
    query_text(&query, event->message);
    query_text(&query, event->data);
    query_int(&query, step);
    int64_t changes = 0;
    int code = query_run(&query, &changes, error);
    if (code)
        return code;
    event->sequence = sqlite3_last_insert_rowid(connection->db);
    *ret_inserted = changes > 0;
    return 0;
}

static int run_append(struct connection *connection, struct store_request *request, struct error *error)
{
    struct event_write *write = (struct event_write *)request;
    return event_row_insert(connection, &write->event, write->step, &write->inserted, error);
}

static void deliver_append(struct store_request *request)
{
    struct event_write *write = (struct event_write *)request;
    if (write->done)
        write->done(request->arg, request->code, !request->code && write->inserted ? &write->event : NULL);
}

static void release_append(struct store_request *request)
{
    event_free(&((struct event_write *)request)->event);
}

void store_event_append(struct store *store, const char *job, const char *level, const char *type,
                        const char *message, const char *data, int64_t step, store_event_written done,
                        void *arg)
{
    struct event_write *write = request_new(sizeof *write);
    if (!write) {
        if (done)
            done(arg, ERROR_NO_MEMORY, NULL);
        return;
    }
    write->request.run = run_append;
    write->request.deliver = deliver_append;
    write->request.release = release_append;
    write->request.arg = arg;
    write->done = done;
    write->step = step;
    struct event_resource *event = &write->event;
    snprintf(event->job, sizeof event->job, "%s", job);
    snprintf(event->level, sizeof event->level, "%s", level);
    snprintf(event->type, sizeof event->type, "%s", type);
    event->created_at = time(NULL);
    event->message = strdup(message ? message : "");
    event->data = data ? strdup(data) : NULL;
    if (!event->message || (data && !event->data))
        request_refuse(&write->request, ERROR_NO_MEMORY, "no memory for an event");
    else
        write->request.bytes += strlen(event->message) + (data ? strlen(data) : 0);
    store_write(store, &write->request);
}

/* ---- lists ---- */

struct event_list {
    struct store_request request;
    char job[ID_BYTES];
    struct page page;
    struct rows rows;
    bool has_more;
    store_events_read done;
};

static int event_from_row(const struct query *query, void *item, struct error *error)
{
    struct event_resource *event = item;
    event->sequence = column_int(query, 0);
    column_text(query, 1, event->job, sizeof event->job);
    event->created_at = column_int(query, 2);
    column_text(query, 3, event->level, sizeof event->level);
    column_text(query, 4, event->type, sizeof event->type);
    int code = column_copy(query, 5, &event->message, error);
    return code ? code : column_copy(query, 6, &event->data, error);
}

/* An event's id says its sequence: "ftevent-12" and no other spelling of 12. */
static int parse_id(const char *id, int64_t *ret_sequence)
{
    char spelled[ID_BYTES];
    size_t prefix = strlen(ID_PREFIX);
    if (strncmp(id, ID_PREFIX, prefix))
        return ERROR_NOT_FOUND;
    errno = 0;
    long long sequence = strtoll(id + prefix, NULL, 10);
    snprintf(spelled, sizeof spelled, ID_PREFIX "%lld", sequence);
    if (errno || strcmp(spelled, id))
        return ERROR_NOT_FOUND;
    *ret_sequence = sequence;
    return 0;
}

static int event_start(struct connection *connection, const struct event_list *list, int64_t *ret_start,
                       struct error *error)
{
    if (!list->page.after[0])
        return page_start(connection, &list->page, NULL, NULL, ret_start, error);
    int64_t sequence = 0;
    int found = 0;
    if (!parse_id(list->page.after, &sequence)) {
        struct query query = query_begin(connection, "SELECT 1 FROM events WHERE sequence = ? AND job = ?");
        query_int(&query, sequence);
        query_text(&query, list->job);
        found = query_next(&query, error);
        query_end(&query);
    }
    if (found < 0)
        return found;
    if (!found)
        return error_set_param(error, ERROR_NOT_FOUND, "after", "no event of job '%s' has the id '%.200s'",
                               list->job, list->page.after);
    *ret_start = sequence;
    return 0;
}

static int run_list(struct connection *connection, struct store_request *request, struct error *error)
{
    struct event_list *list = (struct event_list *)request;
    int64_t start;
    int code = event_start(connection, list, &start, error);
    if (code)
        return code;
    struct query query =
        query_begin(connection, list->page.ascending ? LIST_ASCENDING(COLUMNS, "events", "job = ? AND ")
                                                     : LIST_DESCENDING(COLUMNS, "events", "job = ? AND "));
    query_text(&query, list->job);
    page_bind(&query, &list->page, start);
    return rows_collect(&list->rows, &query, list->page.limit, event_from_row, &list->has_more, error);
}

static int run_metrics(struct connection *connection, struct store_request *request, struct error *error)
{
    struct event_list *list = (struct event_list *)request;
    struct query query = query_begin(connection, "SELECT " COLUMNS " FROM events WHERE job = ? AND type = "
                                                 "'metrics' ORDER BY step");
    query_text(&query, list->job);
    return rows_collect(&list->rows, &query, INT64_MAX, event_from_row, &list->has_more, error);
}

static void deliver_list(struct store_request *request)
{
    struct event_list *list = (struct event_list *)request;
    if (request->code)
        list->done(request->arg, request->code, NULL, 0, false);
    else
        list->done(request->arg, 0, list->rows.items, list->rows.count, list->has_more);
}

static void free_item(void *item)
{
    event_free(item);
}

static void release_list(struct store_request *request)
{
    rows_free(&((struct event_list *)request)->rows, free_item);
}

static struct event_list *list_new(const char *job,
                                   int (*run)(struct connection *, struct store_request *, struct error *),
                                   store_events_read done, void *arg)
{
    struct event_list *list = request_new(sizeof *list);
    if (!list) {
        done(arg, ERROR_NO_MEMORY, NULL, 0, false);
        return NULL;
    }
    list->request.run = run;
    list->request.deliver = deliver_list;
    list->request.release = release_list;
    list->request.arg = arg;
    list->rows.item_size = sizeof(struct event_resource);
    list->done = done;
    snprintf(list->job, sizeof list->job, "%s", job);
    return list;
}

void store_event_list(struct store *store, const char *job, const struct list_query *query,
                      store_events_read done, void *arg)
{
    struct event_list *list = list_new(job, run_list, done, arg);
    if (!list)
        return;
    list->page = page_of(query);
    store_read(store, &list->request);
}

void store_metrics_list(struct store *store, const char *job, store_events_read done, void *arg)
{
    struct event_list *list = list_new(job, run_metrics, done, arg);
    if (list)
        store_read(store, &list->request);
}
