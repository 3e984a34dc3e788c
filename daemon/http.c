/* http.c: see http.h. Loop thread only.
 *
 * libmicrohttpd runs without threads of its own. Its epoll descriptor is watched by the loop; when it is
 * readable, when MHD's own timeout is due, or when one of its connections was resumed, http_run() lets it
 * work. Everything MHD calls (on_access, on_read, on_completed) therefore happens inside http_run(), and
 * MHD's state is changed from outside in one way alone: exchange_resume().
 *
 * A connection is suspended while a handler works on its request, while an upload's chunk is being written,
 * and while a stream has nothing to send. MHD does not watch suspended sockets, so we do, for the first and
 * last of these: that is how a client that left is noticed. */
#include "daemon/http.h"

#include "base/buffer.h"
#include "base/log.h"

#include <microhttpd.h>

#include <ctype.h>
#include <errno.h>
#include <netdb.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    IDLE_TIMEOUT_SECONDS = 120,
    PING_MS = 15000,
    CONNECTION_MEMORY = 32 << 10,
    FORM_BUFFER = 32 << 10,
    STREAM_BLOCK = 16 << 10,
    MAX_ARGUMENTS = 64,
    /* What is read and dropped of a body that was refused, so that the client gets to read why. */
    MAX_DISCARDED = 64 << 20,
    STATUS_CLIENT_GONE = 499,
};

enum exchange_state {
    EXCHANGE_HEADERS,  /* on_access was not called yet */
    EXCHANGE_BODY,     /* the body is coming in */
    EXCHANGE_HANDLED,  /* handle() was called, no answer yet */
    EXCHANGE_ANSWERED, /* the answer is on its way */
};

/* One request with its answer. */
struct exchange {
    struct http_request request; /* first: handlers' pointers are pointers to this */
    struct exchange *next, *previous;
    struct MHD_Connection *connection; /* NULL once MHD is done with it */
    enum exchange_state state;
    uint64_t started;
    int status;
    bool suspended;
    bool held; /* a handler will still answer or hold it */
    bool dead; /* the client is gone: close when MHD next asks */
    bool last; /* nothing more can be read from the connection after this */

    enum http_body body_kind;
    struct buffer body;
    struct MHD_PostProcessor *form;
    struct problem problem; /* status != 0: refused; the rest of the body is dropped */
    const char *allow;
    int64_t discarded;

    struct MHD_Response *response; /* to be queued when MHD next asks */
    bool streaming, ended;
    bool lines; /* of the stream: no events, and no comments between them */
    struct buffer stream;
    size_t stream_sent; /* bytes of stream already taken */
    struct file_body *file;

    uv_poll_t watch; /* for a client that leaves */
    bool watch_made, watching, watch_closed;
};

struct http_server {
    struct http_options options;
    char *upload_folder;
    struct MHD_Daemon *daemon;
    int listen_fd; /* ours until MHD has it, and after draining */
    uv_poll_t poll;
    uv_timer_t timer, ping;
    int open_handles;
    bool running, again; /* inside http_run(); it is due once more */
    bool draining;
    struct exchange *first;
    size_t n_open, n_held;
};

static void on_timer(uv_timer_t *timer);
static void server_free(struct http_server *server);

/* ---- exchanges ---- */

static struct exchange *exchange_of(struct http_request *request)
{
    return (struct exchange *)request;
}

/* The last of: MHD is done, the handler is done, the watcher is closed. */
static void exchange_release(struct exchange *exchange)
{
    if (exchange->connection || exchange->held)
        return;
    if (exchange->watch_made && !exchange->watch_closed)
        return;
    struct http_server *server = exchange->request.server;
    if (exchange->previous)
        exchange->previous->next = exchange->next;
    else
        server->first = exchange->next;
    if (exchange->next)
        exchange->next->previous = exchange->previous;
    server->n_open--;
    if (exchange->response)
        MHD_destroy_response(exchange->response);
    upload_free(exchange->request.upload);
    file_body_free(exchange->file);
    buffer_free(&exchange->body);
    buffer_free(&exchange->stream);
    free(exchange->request.arguments);
    free(exchange->request.path);
    free(exchange);
    server_free(server);
}

static void exchange_unhold(struct exchange *exchange)
{
    if (exchange->held) {
        exchange->held = false;
        exchange->request.server->n_held--;
    }
}

static void on_watch_closed(uv_handle_t *handle)
{
    struct exchange *exchange = handle->data;
    exchange->watch_closed = true;
    exchange_release(exchange);
}

static void watch_stop(struct exchange *exchange)
{
    if (exchange->watching) {
        uv_poll_stop(&exchange->watch);
        exchange->watching = false;
    }
}

/* Let MHD go on with the connection, soon: we may be deep inside a handler, or inside MHD. */
static void exchange_resume(struct exchange *exchange)
{
    struct http_server *server = exchange->request.server;
    if (!exchange->suspended)
        return;
    watch_stop(exchange);
    exchange->suspended = false;
    MHD_resume_connection(exchange->connection);
    if (server->running)
        server->again = true;
    else
        uv_timer_start(&server->timer, on_timer, 0, 0);
}

/* The client is not there any more. The handler hears of it if it asked to. */
static void exchange_gone(struct exchange *exchange)
{
    exchange->dead = true;
    if (exchange->held && exchange->request.on_gone) {
        exchange_unhold(exchange);
        exchange->request.on_gone(&exchange->request);
    }
    exchange_resume(exchange);
}

static void on_watch(uv_poll_t *watch, int status, int events)
{
    (void)status;
    (void)events; /* an error is as final as a hang-up */
    exchange_gone(watch->data);
}

static void watch_start(struct exchange *exchange)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(exchange->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    if (!exchange->watch_made && info &&
        !uv_poll_init_socket(exchange->request.server->options.loop, &exchange->watch, info->connect_fd)) {
        exchange->watch.data = exchange;
        exchange->watch_made = true;
    }
    if (exchange->watch_made && !uv_poll_start(&exchange->watch, UV_DISCONNECT, on_watch))
        exchange->watching = true;
}

static void exchange_suspend(struct exchange *exchange, bool watch)
{
    MHD_suspend_connection(exchange->connection);
    exchange->suspended = true;
    if (watch)
        watch_start(exchange);
}

/* ---- the request line ---- */

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : isxdigit((unsigned char)c) ? (c | 0x20) - 'a' + 10 : -1;
}

/* In place. Returns false for an escape that is none, or that hides a NUL. */
static bool decode_argument(char *text)
{
    char *out = text;
    for (; *text; text++) {
        char c = *text == '+' ? ' ' : *text;
        if (*text == '%') {
            int high = hex_digit(text[1]), low = high < 0 ? -1 : hex_digit(text[2]);
            if (low < 0 || (!high && !low))
                return false;
            c = (char)(high << 4 | low);
            text += 2;
        }
        *out++ = c;
    }
    *out = '\0';
    return true;
}

/* Splits what follows '?'; the arguments point into it. */
static void parse_query(struct exchange *exchange, char *query)
{
    struct http_request *request = &exchange->request;
    char *rest = query;
    request->arguments = calloc(MAX_ARGUMENTS, sizeof *request->arguments);
    for (char *pair; (pair = strsep(&rest, "&"));) {
        if (!*pair)
            continue;
        char *value = strchr(pair, '=');
        if (value)
            *value++ = '\0';
        if (!request->arguments || request->n_arguments == MAX_ARGUMENTS || !decode_argument(pair) ||
            (value && !decode_argument(value))) {
            problem_set(&exchange->problem, 400, "invalid_query", NULL,
                        "The query holds an invalid escape, or more than %d arguments.", MAX_ARGUMENTS);
            return;
        }
        request->arguments[request->n_arguments++] = (struct query_argument){pair, value ? value : ""};
    }
}

/* MHD has read the request line. What is returned comes back as each callback's context. */
static void *on_request_line(void *arg, const char *uri, struct MHD_Connection *connection)
{
    struct http_server *server = arg;
    struct exchange *exchange = calloc(1, sizeof *exchange);
    if (!exchange)
        return NULL;
    exchange->request.server = server;
    exchange->request.body = (char *)(uintptr_t) "";
    exchange->request.path = strdup(uri);
    exchange->connection = connection;
    exchange->started = uv_hrtime();
    exchange->next = server->first;
    if (server->first)
        server->first->previous = exchange;
    server->first = exchange;
    server->n_open++;
    char *query = exchange->request.path ? strchr(exchange->request.path, '?') : NULL;
    if (query) {
        *query = '\0';
        parse_query(exchange, query + 1);
    }
    return exchange;
}

/* ---- headers ---- */

const char *http_header(const struct http_request *request, const char *name)
{
    const struct exchange *exchange = (const struct exchange *)request;
    return exchange->connection ? MHD_lookup_connection_value(exchange->connection, MHD_HEADER_KIND, name)
                                : NULL;
}

const char *http_argument(const struct http_request *request, const char *name)
{
    for (size_t i = 0; i < request->n_arguments; i++)
        if (!strcmp(request->arguments[i].key, name))
            return request->arguments[i].value;
    return NULL;
}

static void choose_request_id(struct http_request *request)
{
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    const char *given = http_header(request, "x-request-id");
    size_t length = given ? strlen(given) : 0;
    if (length && length < sizeof request->id && !given[strspn(given, allowed)]) {
        memcpy(request->id, given, length + 1);
        return;
    }
    unsigned char random[12];
    randombytes_buf(random, sizeof random);
    memcpy(request->id, "req_", 4);
    sodium_bin2hex(request->id + 4, sizeof request->id - 4, random, sizeof random);
}

static enum MHD_Result on_form_part(void *arg, enum MHD_ValueKind kind, const char *key, const char *filename,
                                    const char *content_type, const char *encoding, const char *data,
                                    uint64_t offset, size_t length)
{
    struct exchange *exchange = arg;
    (void)kind;
    (void)content_type;
    (void)encoding;
    if (exchange->problem.status)
        return MHD_YES;
    upload_add(exchange->request.upload, key ? key : "", filename, data, offset, length, &exchange->problem);
    return MHD_YES;
}

static void begin_form(struct exchange *exchange)
{
    struct http_server *server = exchange->request.server;
    const char *type = http_header(&exchange->request, "content-type");
    if (!type || strncasecmp(type, "multipart/form-data", strlen("multipart/form-data"))) {
        problem_set(&exchange->problem, 400, "invalid_content_type", NULL,
                    "The body must be multipart/form-data with the fields purpose and file.");
        return;
    }
    exchange->request.upload =
        upload_create(server->options.loop, server->upload_folder, server->options.max_upload_bytes);
    exchange->form = MHD_create_post_processor(exchange->connection, FORM_BUFFER, on_form_part, exchange);
    if (!exchange->request.upload)
        problem_set(&exchange->problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    else if (!exchange->form)
        problem_set(&exchange->problem, 400, "invalid_content_type", NULL,
                    "The multipart/form-data content type names no boundary.");
}

/* The headers are in: what body is due? */
static void begin(struct exchange *exchange, const char *method)
{
    struct http_request *request = &exchange->request;
    struct http_server *server = request->server;
    exchange->state = EXCHANGE_BODY;
    snprintf(request->method, sizeof request->method, "%s", method);
    choose_request_id(request);
    if (!request->path)
        problem_set(&exchange->problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    if (exchange->problem.status ||
        server->options.callbacks.admit(server->options.callbacks.arg, request, &exchange->body_kind,
                                        &exchange->allow, &exchange->problem))
        return;
    const char *length = http_header(request, "content-length");
    if (exchange->body_kind == HTTP_BODY_FORM)
        begin_form(exchange);
    else if (length && strtoll(length, NULL, 10) > server->options.max_body_bytes)
        problem_set(&exchange->problem, 413, "body_too_large", NULL,
                    "The body has %.20s bytes; at most %lld are allowed.", length,
                    (long long)server->options.max_body_bytes);
}

/* ---- bodies ---- */

static void on_chunk_written(void *arg, int code, const struct error *error)
{
    struct exchange *exchange = arg;
    if (code)
        problem_set(&exchange->problem, 500, "storage_error", NULL, "The file could not be stored: %s.",
                    error->message);
    exchange_resume(exchange);
}

/* Take a piece of the body. Returns MHD_NO when enough was dropped. */
static enum MHD_Result take_body(struct exchange *exchange, const char *data, size_t length)
{
    const struct http_options *options = &exchange->request.server->options;
    if (!exchange->problem.status && exchange->form) {
        if (MHD_post_process(exchange->form, data, length) != MHD_YES && !exchange->problem.status)
            problem_set(&exchange->problem, 400, "invalid_form", NULL, "The multipart form is malformed.");
        if (!exchange->problem.status && upload_is_full(exchange->request.upload)) {
            exchange_suspend(exchange, false);
            upload_flush(exchange->request.upload, on_chunk_written, exchange);
        }
        return MHD_YES;
    }
    if (!exchange->problem.status) {
        buffer_append(&exchange->body, data, length);
        if (exchange->body.failed)
            problem_set(&exchange->problem, 503, "out_of_memory", NULL, "The server is out of memory.");
        if ((int64_t)exchange->body.length > options->max_body_bytes)
            problem_set(&exchange->problem, 413, "body_too_large", NULL,
                        "The body is longer than the %lld bytes that are allowed.",
                        (long long)options->max_body_bytes);
        if (exchange->problem.status)
            buffer_free(&exchange->body);
        return MHD_YES;
    }
    exchange->discarded += (int64_t)length;
    return exchange->discarded > MAX_DISCARDED ? MHD_NO : MHD_YES;
}

/* The body is complete. */
static void end_body(struct exchange *exchange)
{
    struct http_request *request = &exchange->request;
    if (exchange->form) {
        bool whole = MHD_destroy_post_processor(exchange->form) == MHD_YES;
        exchange->form = NULL;
        if (!whole && !exchange->problem.status)
            problem_set(
                &exchange->problem, 400, "invalid_form", NULL,
                "The multipart form is malformed: its last boundary is missing, or no part named file "
                "comes before it.");
    }
    exchange->state = EXCHANGE_HANDLED;
    exchange->held = true;
    request->server->n_held++;
    if (exchange->problem.status) {
        http_answer_problem(request, &exchange->problem, exchange->allow);
        return;
    }
    if (exchange->body.length) {
        request->body = exchange->body.data;
        request->length = exchange->body.length;
    }
    request->server->options.callbacks.handle(request->server->options.callbacks.arg, request);
}

/* ---- what MHD calls ---- */

static enum MHD_Result queue_response(struct exchange *exchange)
{
    enum MHD_Result result =
        MHD_queue_response(exchange->connection, (unsigned)exchange->status, exchange->response);
    MHD_destroy_response(exchange->response);
    exchange->response = NULL;
    return result;
}

static enum MHD_Result on_access(void *arg, struct MHD_Connection *connection, const char *url,
                                 const char *method, const char *version, const char *data, size_t *length,
                                 void **context)
{
    struct exchange *exchange = *context;
    (void)arg;
    (void)connection;
    (void)url;
    (void)version;
    if (!exchange || exchange->dead)
        return MHD_NO;
    if (exchange->state == EXCHANGE_HEADERS) {
        begin(exchange, method);
        /* A client that asked first need not send its body at all. */
        if (!exchange->problem.status || !http_header(&exchange->request, "expect"))
            return MHD_YES;
        exchange->last = true;
        end_body(exchange);
        return queue_response(exchange);
    }
    if (*length) {
        size_t n = *length;
        *length = 0;
        return take_body(exchange, data, n);
    }
    if (exchange->state == EXCHANGE_BODY)
        end_body(exchange);
    if (exchange->response)
        return queue_response(exchange);
    if (exchange->dead) /* there was no memory for an answer */
        return MHD_NO;
    exchange_suspend(exchange, true);
    return MHD_YES;
}

static ssize_t read_stream(struct exchange *exchange, char *bytes, size_t max)
{
    struct buffer *stream = &exchange->stream;
    void (*on_drained)(struct http_request *) = exchange->request.on_drained;
    if (stream->length == exchange->stream_sent && exchange->held && on_drained) {
        exchange->request.on_drained = NULL;
        on_drained(&exchange->request);
    }
    size_t n = stream->length - exchange->stream_sent;
    if (!n && exchange->ended)
        return MHD_CONTENT_READER_END_OF_STREAM;
    if (n > max)
        n = max;
    if (!n) {
        exchange_suspend(exchange, true);
        return 0;
    }
    memcpy(bytes, stream->data + exchange->stream_sent, n);
    exchange->stream_sent += n;
    if (exchange->stream_sent == stream->length) {
        buffer_clear(stream);
        exchange->stream_sent = 0;
    }
    return (ssize_t)n;
}

static void on_file_ready(void *arg)
{
    exchange_resume(arg);
}

/* MHD wants more of an answer's body. */
static ssize_t on_read(void *arg, uint64_t position, char *bytes, size_t max)
{
    struct exchange *exchange = arg;
    (void)position;
    if (exchange->dead)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    if (exchange->streaming)
        return read_stream(exchange, bytes, max);
    int64_t n = file_body_read(exchange->file, exchange->request.server->options.loop, bytes, max,
                               on_file_ready, exchange);
    if (n < 0)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    if (n == 0)
        exchange_suspend(exchange, false);
    return (ssize_t)n;
}

static void on_completed(void *arg, struct MHD_Connection *connection, void **context,
                         enum MHD_RequestTerminationCode reason)
{
    struct http_server *server = arg;
    struct exchange *exchange = *context;
    (void)connection;
    if (!exchange)
        return;
    *context = NULL;
    if (exchange->form)
        MHD_destroy_post_processor(exchange->form);
    exchange->form = NULL;
    watch_stop(exchange);
    if (!exchange->status || (reason != MHD_REQUEST_TERMINATED_COMPLETED_OK && exchange->streaming))
        exchange->status = STATUS_CLIENT_GONE;
    if (exchange->state != EXCHANGE_HEADERS)
        server->options.callbacks.finished(server->options.callbacks.arg, &exchange->request,
                                           exchange->status, (double)(uv_hrtime() - exchange->started) / 1e9);
    exchange->suspended = false;
    exchange_gone(exchange);
    exchange->connection = NULL;
    if (exchange->watch_made)
        uv_close((uv_handle_t *)&exchange->watch, on_watch_closed);
    exchange_release(exchange);
}

/* ---- answers ---- */

/* Takes the answer from the handler: MHD gets it now, or when it is next asked. response NULL: no memory. */
static void answer(struct exchange *exchange, int status, struct MHD_Response *response)
{
    if (response) {
        MHD_add_response_header(response, "x-request-id", exchange->request.id);
        if (exchange->request.server->draining || exchange->last)
            MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
    } else {
        exchange->dead = true;
    }
    exchange->status = status;
    exchange->state = EXCHANGE_ANSWERED;
    exchange->response = response;
    exchange_resume(exchange);
}

/* The handler is done with the request. */
static void hand_back(struct exchange *exchange)
{
    exchange_unhold(exchange);
    exchange_release(exchange);
}

static struct MHD_Response *memory_response(char *body, size_t length, const char *content_type)
{
    struct MHD_Response *response =
        body ? MHD_create_response_from_buffer(length, body, MHD_RESPMEM_MUST_FREE) : NULL;
    if (!response)
        free(body);
    else
        MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, content_type);
    return response;
}

void http_answer(struct http_request *request, int status, const char *content_type, char *body,
                 size_t length)
{
    answer(exchange_of(request), status, memory_response(body, length, content_type));
    hand_back(exchange_of(request));
}

void http_answer_problem(struct http_request *request, const struct problem *problem, const char *allow)
{
    char *body = problem_encode(problem);
    struct MHD_Response *response = memory_response(body, body ? strlen(body) : 0, "application/json");
    bool soon = problem->status == 429 || problem->status == 503;
    if (response && (soon || problem->retry_after_seconds > 0)) {
        char seconds[16];
        snprintf(seconds, sizeof seconds, "%d",
                 problem->retry_after_seconds > 0 ? problem->retry_after_seconds : 1);
        MHD_add_response_header(response, MHD_HTTP_HEADER_RETRY_AFTER, seconds);
    }
    if (response && allow)
        MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, allow);
    if (response && problem->status == 401)
        MHD_add_response_header(response, MHD_HTTP_HEADER_WWW_AUTHENTICATE, "Bearer");
    answer(exchange_of(request), problem->status, response);
    hand_back(exchange_of(request));
}

/* attachment; filename="..." with what a header cannot hold replaced. */
static void add_disposition(struct MHD_Response *response, const char *filename)
{
    char header[512];
    size_t used = (size_t)snprintf(header, sizeof header, "attachment; filename=\"");
    for (const char *c = filename; *c && used + 2 < sizeof header; c++)
        header[used++] = *c < 0x20 || *c == 0x7f || *c == '"' || *c == '\\' ? '_' : *c;
    header[used++] = '"';
    header[used] = '\0';
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_DISPOSITION, header);
}

void http_answer_file(struct http_request *request, const char *content_type, const char *filename,
                      struct file_body *body)
{
    struct exchange *exchange = exchange_of(request);
    exchange->file = body;
    struct MHD_Response *response = MHD_create_response_from_callback((uint64_t)file_body_size(body),
                                                                      STREAM_BLOCK, on_read, exchange, NULL);
    if (response) {
        MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, content_type);
        if (filename)
            add_disposition(response, filename);
    }
    answer(exchange, 200, response);
    hand_back(exchange);
}

static void stream_begin(struct http_request *request, const char *content_type, bool lines)
{
    struct exchange *exchange = exchange_of(request);
    struct MHD_Response *response =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, STREAM_BLOCK, on_read, exchange, NULL);
    exchange->streaming = true;
    exchange->lines = lines;
    if (response) {
        MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, content_type);
        MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-cache");
    }
    answer(exchange, 200, response);
}

void http_stream_begin(struct http_request *request)
{
    stream_begin(request, "text/event-stream", false);
}

void http_stream_begin_lines(struct http_request *request)
{
    stream_begin(request, "application/jsonl", true);
}

int http_stream_write(struct http_request *request, const char *data, size_t length)
{
    struct exchange *exchange = exchange_of(request);
    if (exchange->stream_sent > exchange->stream.length / 2) {
        buffer_consume(&exchange->stream, exchange->stream_sent);
        exchange->stream_sent = 0;
    }
    buffer_append(&exchange->stream, data, length);
    if (exchange->stream.failed || exchange->stream.length - exchange->stream_sent > HTTP_STREAM_LIMIT) {
        exchange->dead = true;
        exchange_resume(exchange);
        hand_back(exchange);
        return -1;
    }
    exchange_resume(exchange);
    return 0;
}

void http_stream_end(struct http_request *request)
{
    struct exchange *exchange = exchange_of(request);
    exchange->ended = true;
    exchange_resume(exchange);
    hand_back(exchange);
}

/* ---- the server ---- */

static void http_run(struct http_server *server)
{
    server->running = true;
    server->again = false;
    MHD_run(server->daemon);
    server->running = false;
    MHD_UNSIGNED_LONG_LONG timeout_ms = 0;
    if (server->again || MHD_get_timeout(server->daemon, &timeout_ms) == MHD_YES)
        uv_timer_start(&server->timer, on_timer, server->again ? 0 : timeout_ms, 0);
    else
        uv_timer_stop(&server->timer);
}

static void on_timer(uv_timer_t *timer)
{
    http_run(timer->data);
}

static void on_readable(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    http_run(poll->data);
}

/* A word to every quiet stream, so that whatever stands between knows it lives. */
static void on_ping(uv_timer_t *timer)
{
    static const char ping[] = ": ping\n\n";
    struct http_server *server = timer->data;
    for (struct exchange *exchange = server->first; exchange; exchange = exchange->next)
        if (exchange->streaming && !exchange->lines && !exchange->ended && exchange->suspended) {
            buffer_append(&exchange->stream, ping, sizeof ping - 1);
            exchange_resume(exchange);
        }
}

static void on_mhd_log(void *arg, const char *format, va_list args) __attribute__((format(printf, 2, 0)));
static void on_mhd_log(void *arg, const char *format, va_list args)
{
    char text[512];
    (void)arg;
    vsnprintf(text, sizeof text, format, args);
    text[strcspn(text, "\n")] = '\0';
    log_write(LOG_DEBUG, "http", "detail", text, NULL);
}

static int listen_on(const char *host, uint16_t port, int *ret_fd, struct error *error)
{
    char service[8];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV | AI_PASSIVE},
                    *list = NULL;
    snprintf(service, sizeof service, "%u", (unsigned)port);
    int status = getaddrinfo(host, service, &hints, &list);
    if (status)
        return error_set_param(error, ERROR_INVALID, "listen", "cannot listen on %s: %s", host,
                               gai_strerror(status));
    int fd = -1, cause = 0, on = 1;
    for (const struct addrinfo *one = list; one && fd < 0; one = one->ai_next) {
        fd = socket(one->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd >= 0 && (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
                        bind(fd, one->ai_addr, one->ai_addrlen) || listen(fd, 1024))) {
            cause = errno;
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(list);
    if (fd < 0)
        return error_set_param(error, ERROR_IO, "listen", "cannot listen on %s port %u: %s", host,
                               (unsigned)port, strerror(cause));
    *ret_fd = fd;
    return 0;
}

static void server_free(struct http_server *server)
{
    if (server->open_handles || server->first)
        return;
    if (server->listen_fd >= 0)
        close(server->listen_fd);
    free(server->upload_folder);
    free(server);
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct http_server *server = handle->data;
    server->open_handles--;
    server_free(server);
}

int http_start(const struct http_options *options, struct http_server **ret_server, struct error *error)
{
    struct http_server *server = calloc(1, sizeof *server);
    if (!server)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the HTTP server");
    server->options = *options;
    server->listen_fd = -1;
    server->upload_folder = strdup(options->upload_folder);
    int code = server->upload_folder ? listen_on(options->host, options->port, &server->listen_fd, error)
                                     : error_set(error, ERROR_NO_MEMORY, "no memory for the HTTP server");
    if (code) {
        server_free(server);
        return code;
    }
    server->daemon = MHD_start_daemon(
        MHD_USE_EPOLL | MHD_USE_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL, on_access, server,
        MHD_OPTION_EXTERNAL_LOGGER, on_mhd_log, NULL, MHD_OPTION_LISTEN_SOCKET, server->listen_fd,
        MHD_OPTION_URI_LOG_CALLBACK, on_request_line, server, MHD_OPTION_NOTIFY_COMPLETED, on_completed,
        server, MHD_OPTION_CONNECTION_LIMIT, (unsigned)options->max_connections,
        MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)IDLE_TIMEOUT_SECONDS, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
        (size_t)CONNECTION_MEMORY, MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1, MHD_OPTION_END);
    const union MHD_DaemonInfo *info =
        server->daemon ? MHD_get_daemon_info(server->daemon, MHD_DAEMON_INFO_EPOLL_FD) : NULL;
    if (!info || uv_poll_init(options->loop, &server->poll, info->epoll_fd)) {
        if (server->daemon) {
            server->listen_fd = -1; /* it closes with MHD */
            MHD_stop_daemon(server->daemon);
        }
        server_free(server);
        return error_set(error, ERROR_INTERNAL, "the HTTP server did not start");
    }
    uv_timer_init(options->loop, &server->timer);
    uv_timer_init(options->loop, &server->ping);
    server->poll.data = server->timer.data = server->ping.data = server;
    server->open_handles = 3;
    uv_poll_start(&server->poll, UV_READABLE, on_readable);
    uv_timer_start(&server->ping, on_ping, PING_MS, PING_MS);
    *ret_server = server;
    return 0;
}

uint16_t http_port(const struct http_server *server)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    char port[8];
    if (getsockname(server->listen_fd, (struct sockaddr *)&address, &length) ||
        getnameinfo((struct sockaddr *)&address, length, NULL, 0, port, sizeof port, NI_NUMERICSERV))
        return server->options.port;
    return (uint16_t)strtoul(port, NULL, 10);
}

void http_drain(struct http_server *server)
{
    if (server->draining)
        return;
    server->draining = true;
    int fd = MHD_quiesce_daemon(server->daemon);
    if (fd >= 0)
        close(fd);
    server->listen_fd = -1;
}

size_t http_unanswered(const struct http_server *server)
{
    return server->n_held;
}

size_t http_open(const struct http_server *server)
{
    return server->n_open;
}

void http_stop(struct http_server *server)
{
    if (!server->draining)
        server->listen_fd = -1; /* MHD closes it */
    for (struct exchange *exchange = server->first, *next; exchange; exchange = next) {
        next = exchange->next;
        exchange_gone(exchange);
    }
    MHD_stop_daemon(server->daemon);
    uv_close((uv_handle_t *)&server->poll, on_handle_closed);
    uv_close((uv_handle_t *)&server->timer, on_handle_closed);
    uv_close((uv_handle_t *)&server->ping, on_handle_closed);
}
