/* http.h: the HTTP server: libmicrohttpd driven by the loop. http.c is the one file that includes
 * <microhttpd.h>. Loop thread only.
 *
 * The life of a request. When its headers are in, admit() says what body it may have (or refuses it). The body
 * is collected (JSON) or streamed to disk (forms). Then handle() is called, once. The handler answers, now or
 * later, with exactly one of
 *     http_answer        a body that is in memory,
 *     http_answer_file   a body that is read from files as the client takes it,
 *     http_stream_begin, http_stream_write..., http_stream_end
 * and does not touch the request afterwards. While the handler works, the connection is suspended, and its
 * socket watched: when the client leaves, on_gone is called, and the request is no longer the handler's. A
 * handler that sets no on_gone simply answers nobody. */
#ifndef DAEMON_HTTP_H
#define DAEMON_HTTP_H

#include "api/problem.h"
#include "api/requests.h"
#include "api/route.h"
#include "base/error.h"
#include "daemon/file_body.h"
#include "daemon/upload.h"

#include <stddef.h>
#include <stdint.h>
#include <uv.h>

struct http_server;

enum http_body { HTTP_BODY_NONE, HTTP_BODY_JSON, HTTP_BODY_FORM };

struct http_request {
    struct http_server *server;
    char id[64]; /* x-request-id: the client's own when it is sane, else drawn */
    char method[16];
    char *path; /* as sent, without the query */
    struct query_argument *arguments;
    size_t n_arguments;
    char *body; /* [length], followed by a NUL; "" when there is none */
    size_t length;
    struct upload *upload; /* of a form; the request's */

    /* Filled by admit(). */
    struct route route;
    char key_id[ID_BYTES];

    /* The handler's. */
    void *context;
    void (*on_gone)(struct http_request *request);
    void (*on_drained)(struct http_request *request); /* of a stream: once, when all of it was taken */
    struct idempotency *idempotency;                  /* reply.h */
};

struct http_callbacks {
    void *arg;
    /* Headers are known. Returns 0 and the body that is due, or -1 with a problem and perhaps an Allow value. */
    int (*admit)(void *arg, struct http_request *request, enum http_body *ret_body, const char **ret_allow,
                 struct problem *problem);
    void (*handle)(void *arg, struct http_request *request);
    /* The answer is out, or the client is gone (status 499). */
    void (*finished)(void *arg, const struct http_request *request, int status, double seconds);
};

struct http_options {
    uv_loop_t *loop;
    const char *host;
    uint16_t port;
    int32_t max_connections;
    int64_t max_body_bytes, max_upload_bytes;
    const char *upload_folder;
    struct http_callbacks callbacks;
};

/* Listens when it returns. */
int http_start(const struct http_options *options, struct http_server **ret_server, struct error *error);
uint16_t http_port(const struct http_server *server);
/* No new connections, and each answer closes its own. */
void http_drain(struct http_server *server);
/* Requests that a handler has not answered yet. */
size_t http_unanswered(const struct http_server *server);
/* Requests that are not over yet, their bodies and answers included. */
size_t http_open(const struct http_server *server);
/* Close every connection. on_gone is called for what a handler still holds. The memory goes when the loop has
 * closed its handles. */
void http_stop(struct http_server *server);

/* A header of the request, or NULL. Only from admit() and until handle() has returned. */
const char *http_header(const struct http_request *request, const char *name);
/* A query argument, or NULL. */
const char *http_argument(const struct http_request *request, const char *name);

/* body is freed with free(). NULL (no memory) closes the connection. */
void http_answer(struct http_request *request, int status, const char *content_type, char *body,
                 size_t length);
/* Says Retry-After for 429 and 503, too, where the problem does not. allow may be NULL. */
void http_answer_problem(struct http_request *request, const struct problem *problem, const char *allow);
/* The body is stolen. filename may be NULL: then there is no Content-Disposition. */
void http_answer_file(struct http_request *request, const char *content_type, const char *filename,
                      struct file_body *body);

/* Server-sent events. */
void http_stream_begin(struct http_request *request);
/* The same for JSON lines. */
void http_stream_begin_lines(struct http_request *request);
/* Returns 0, or -1 when the client takes the stream too slowly (HTTP_STREAM_LIMIT bytes wait for it): then the
 * stream was cut, and the request is no longer the handler's. */
int http_stream_write(struct http_request *request, const char *data, size_t length);
void http_stream_end(struct http_request *request);
enum { HTTP_STREAM_LIMIT = 8 << 20 };

#endif
