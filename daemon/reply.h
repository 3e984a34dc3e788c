/* reply.h: how handlers answer, and POSTs that may be repeated with an Idempotency-Key. Loop thread only.
 *
 * A POST with such a key is remembered with its answer (unless that says "try again"), and the same POST with
 * the same key gets the same answer for a day; the same key with another body is refused; and while the first
 * is still being answered, the second is told to try again (409). An answer that is streamed is not
 * remembered. */
#ifndef DAEMON_REPLY_H
#define DAEMON_REPLY_H

#include "daemon/server.h"

#include <jansson.h>

/* What repeats of this request are to be answered once the row that it makes has committed, for the store to keep in
 * that row's transaction; reply_json then says the same. NULL when the request came without a key (or there is no
 * memory: then the answer is kept after the row). json is stolen; the answer is the request's. */
const struct kept_answer *reply_keep(struct http_request *request, int status, json_t *json);
/* json is stolen; NULL (no memory) becomes a 503. */
void reply_json(struct http_request *request, int status, json_t *json);
/* body: JSON text, freed; NULL becomes a 503. */
void reply_text(struct http_request *request, int status, char *body);
void reply_problem(struct http_request *request, const struct problem *problem);
/* problem_set and reply_problem. */
void reply_refuse(struct http_request *request, int status, const char *code, const char *param,
                  const char *format, ...) __attribute__((format(printf, 5, 6)));
/* A store call failed with code; what: "file 'file-1'", for ERROR_NOT_FOUND. */
void reply_store_error(struct http_request *request, int code, const struct error *error, const char *what);

/* Go on with next(server, request) unless the request repeats one; then it is answered. */
typedef void (*reply_next)(struct server *server, struct http_request *request);
void reply_once(struct server *server, struct http_request *request, reply_next next);
/* A list of `count` items, each item_bytes large: what the store answered to a request for a page. missing: "there is no
 * such file", for an `after` that names nothing. */
typedef json_t *(*reply_encoder)(const struct http_request *request, const void *item);
void reply_list(struct http_request *request, int code, const char *missing, const void *items, size_t count,
                size_t item_bytes, bool has_more, reply_encoder encode);
/* The request's answer will not be remembered: it streams, or the client left. */
void reply_forget(struct http_request *request);

#endif
