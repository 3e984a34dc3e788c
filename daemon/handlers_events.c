/* handlers_events.c: a job's events, as a list and as a stream. Loop thread only.
 *
 * A stream first reads what is stored, page by page, then passes on what happens. It subscribes before it
 * reads: an event that becomes durable meanwhile makes it read once more, so that none is missed and none is
 * said twice. A page is read when the client has taken the one before: a long history waits on the disk. */
#include "daemon/handlers.h"

#include "daemon/reply.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE_EVENTS = 100 };

/* ---- the list ---- */

static json_t *encode_event(const struct http_request *request, const void *item)
{
    (void)request;
    return event_encode(item);
}

static void on_events(void *arg, int code, const struct event_resource *items, size_t count, bool has_more)
{
    reply_list(arg, code, "the job has no such event", items, count, sizeof *items, has_more, encode_event);
}

/* ---- the stream ---- */

struct event_stream {
    struct event_stream *next; /* in the server's list */
    struct server *server;
    struct http_request *request; /* NULL once the client left */
    struct event_subscription *subscription;
    char job[ID_BYTES];
    struct list_query query; /* of the next page */
    int64_t last;            /* sequence of the last event that was sent */
    bool begun;              /* headers are out */
    bool reading;            /* a page is under way */
    bool behind;             /* the next page waits for the client to take the last one */
    bool missed;             /* an event happened meanwhile */
    bool ended;              /* so did the job */
};

static void stream_free(struct event_stream *stream)
{
    struct event_stream **link = &stream->server->event_streams;
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    scheduler_unsubscribe(stream->server->scheduler, stream->subscription);
    free(stream);
}

/* The client left, or was too slow. The page that is under way frees the stream. */
static void stream_abandon(struct event_stream *stream)
{
    stream->request = NULL;
    if (!stream->reading)
        stream_free(stream);
}

static void on_client_gone(struct http_request *request)
{
    stream_abandon(request->context);
}

static void stream_end(struct event_stream *stream)
{
    static const char done[] = "data: [DONE]\n\n";
    if (!http_stream_write(stream->request, done, sizeof done - 1))
        http_stream_end(stream->request);
    stream_free(stream);
}

/* Returns -1 when the request is gone. */
static int stream_event(struct event_stream *stream, const struct event_resource *event)
{
    json_t *json = event_encode(event);
    char *text = json ? json_dumps(json, JSON_COMPACT | JSON_REAL_PRECISION(12)) : NULL;
    struct buffer out = {0};
    buffer_printf(&out, "id: ftevent-%lld\ndata: %s\n\n", (long long)event->sequence, text ? text : "null");
    json_decref(json);
    free(text);
    stream->last = event->sequence;
    int status = http_stream_write(stream->request, out.data ? out.data : "", out.length);
    buffer_free(&out);
    return status;
}

static void stream_read(struct event_stream *stream);

static void on_event(void *arg, const struct event_resource *event)
{
    struct event_stream *stream = arg;
    if (!event)
        stream->ended = true;
    if (stream->reading || stream->behind) {
        stream->missed |= event != NULL;
        return;
    }
    if (!event)
        stream_end(stream);
    else if (event->sequence > stream->last && stream_event(stream, event))
        stream_abandon(stream);
}

static void on_page_taken(struct http_request *request)
{
    struct event_stream *stream = request->context;
    stream->behind = false;
    stream_read(stream);
}

static void on_page(void *arg, int code, const struct event_resource *items, size_t count, bool has_more)
{
    struct event_stream *stream = arg;
    stream->reading = false;
    if (!stream->request) {
        stream_free(stream);
        return;
    }
    if (code && !stream->begun) {
        struct http_request *request = stream->request;
        if (code == ERROR_NOT_FOUND)
            reply_refuse(request, 400, "invalid_value", "Last-Event-ID",
                         "Last-Event-ID: the job has no such event.");
        else
            reply_store_error(request, code, NULL, "job");
        stream_free(stream);
        return;
    }
    if (!stream->begun)
        http_stream_begin(stream->request);
    stream->begun = true;
    for (size_t i = 0; i < count; i++)
        if (stream_event(stream, &items[i])) {
            stream_abandon(stream);
            return;
        }
    if (count)
        snprintf(stream->query.after, sizeof stream->query.after, "ftevent-%lld", (long long)stream->last);
    if (!code && has_more) {
        stream->behind = true;
        stream->request->on_drained = on_page_taken;
    } else if (!code && stream->missed) {
        stream_read(stream);
    } else if (stream->ended || code) {
        stream_end(stream);
    }
}

static void stream_read(struct event_stream *stream)
{
    stream->reading = true;
    stream->missed = false;
    store_event_list(stream->server->store, stream->job, &stream->query, on_page, stream);
}

static void stream_start(struct server *server, struct http_request *request, const struct list_query *query)
{
    struct event_stream *stream = calloc(1, sizeof *stream);
    if (!stream) {
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
        return;
    }
    stream->server = server;
    stream->request = request;
    stream->query = *query;
    stream->query.ascending = true;
    stream->query.limit = PAGE_EVENTS;
    snprintf(stream->job, sizeof stream->job, "%.*s", ID_BYTES - 1, request->route.id);
    stream->subscription = scheduler_subscribe(server->scheduler, stream->job, on_event, stream);
    stream->ended = !stream->subscription; /* then what is stored is all there will be */
    request->context = stream;
    request->on_gone = on_client_gone;
    stream->next = server->event_streams;
    server->event_streams = stream;
    stream_read(stream);
}

/* The job goes on, and its stream is cut without an end: a client resumes with Last-Event-ID. */
void events_drain(struct server *server)
{
    for (struct event_stream *stream = server->event_streams, *next; stream; stream = next) {
        next = stream->next;
        if (stream->begun && stream->request) {
            http_stream_end(stream->request);
            stream_abandon(stream);
        }
    }
}

/* ---- either ---- */

struct events_request {
    struct server *server;
    struct http_request *request;
    struct list_query query;
};

static void on_job_of_events(void *arg, int code, const struct job_resource *job)
{
    struct events_request *events = arg;
    struct http_request *request = events->request;
    (void)job;
    if (code) {
        char words[300];
        snprintf(words, sizeof words, "%s '%.255s'",
                 strncmp(request->route.id, "eval-", 5) ? "fine-tuning job" : "evaluation",
                 request->route.id);
        reply_store_error(request, code, NULL, words);
    } else if (events->query.stream) {
        stream_start(events->server, request, &events->query);
    } else {
        store_event_list(events->server->store, request->route.id, &events->query, on_events, request);
    }
    free(events);
}

void handle_job_events(struct server *server, struct http_request *request)
{
    struct events_request *events = calloc(1, sizeof *events);
    struct problem problem;
    if (!events) {
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
        return;
    }
    events->server = server;
    events->request = request;
    if (list_query_decode(LIST_EVENTS, request->arguments, request->n_arguments, &events->query, &problem)) {
        free(events);
        reply_problem(request, &problem);
        return;
    }
    const char *accept = http_header(request, "accept"), *last = http_header(request, "last-event-id");
    if (accept && strstr(accept, "text/event-stream"))
        events->query.stream = true;
    if (events->query.stream && last && *last && strlen(last) < sizeof events->query.after)
        snprintf(events->query.after, sizeof events->query.after, "%s", last);
    store_job_get(server->store, request->route.id, on_job_of_events, events);
}
