/* reply.c: see reply.h. Loop thread only. */
#include "daemon/reply.h"

#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_BYTES = 256, SCOPE_BYTES = 512 };

/* Hangs on its request until the answer is known, and in the server's list meanwhile. */
struct idempotency {
    struct idempotency *next;
    struct server *server;
    struct http_request *request;
    reply_next next_step;
    char key[KEY_BYTES], scope[SCOPE_BYTES], hash[65];
    bool kept; /* the store has it, with the row that the request made */
    int status;
    char *body;
    struct kept_answer answer; /* the above as the store takes it */
};

static void idempotency_free(struct idempotency *once)
{
    struct idempotency **link = &once->server->repeatable;
    while (*link != once)
        link = &(*link)->next;
    *link = once->next;
    free(once->body);
    free(once);
}

void reply_forget(struct http_request *request)
{
    if (request->idempotency)
        idempotency_free(request->idempotency);
    request->idempotency = NULL;
}

/* ---- answers ---- */

static void answer_text(struct http_request *request, int status, char *body)
{
    http_answer(request, status, "application/json", body, body ? strlen(body) : 0);
}

static void on_answer_kept(void *arg, int code, const struct error *error)
{
    struct idempotency *once = arg;
    struct http_request *request = once->request;
    int status = once->status;
    char *body = once->body;
    (void)code; /* the request itself was done: that its answer was not kept is no reason to refuse it */
    (void)error;
    once->body = NULL;
    reply_forget(request);
    answer_text(request, status, body);
}

static const struct kept_answer *answer_of(struct idempotency *once, int status, char *body)
{
    free(once->body);
    once->status = status;
    once->body = body;
    once->answer = (struct kept_answer){
        .scope = once->scope, .key = once->key, .body_hash = once->hash, .status = status, .body = body};
    return &once->answer;
}

static char *encode_text(json_t *json)
{
    char *body = json ? json_dumps(json, JSON_COMPACT | JSON_REAL_PRECISION(12)) : NULL;
    json_decref(json);
    return body;
}

const struct kept_answer *reply_keep(struct http_request *request, int status, json_t *json)
{
    struct idempotency *once = request->idempotency;
    char *body = once ? encode_text(json) : NULL;
    if (!once)
        json_decref(json);
    if (!body)
        return NULL;
    once->kept = true;
    return answer_of(once, status, body);
}

void reply_text(struct http_request *request, int status, char *body)
{
    struct idempotency *once = request->idempotency;
    if (!body) {
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
        return;
    }
    request->on_gone = NULL;
    if (once && once->kept) {
        free(body);
        on_answer_kept(once, 0, NULL);
        return;
    }
    if (once) {
        store_answer_put(once->server->store, answer_of(once, status, body), on_answer_kept, once);
        return;
    }
    answer_text(request, status, body);
}

void reply_json(struct http_request *request, int status, json_t *json)
{
    reply_text(request, status, encode_text(json));
}

void reply_problem(struct http_request *request, const struct problem *problem)
{
    request->on_gone = NULL;
    /* What a client may well try again must not be remembered. */
    bool again = problem->status == 409 || problem->status == 429 || problem->status >= 500;
    if (request->idempotency && !again) {
        request->idempotency->kept = false; /* the row was not made */
        reply_text(request, problem->status, problem_encode(problem));
        return;
    }
    reply_forget(request);
    http_answer_problem(request, problem, NULL);
}

void reply_refuse(struct http_request *request, int status, const char *code, const char *param,
                  const char *format, ...)
{
    struct problem problem;
    char message[sizeof problem.message];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    problem_set(&problem, status, code, param, "%s", message);
    reply_problem(request, &problem);
}

void reply_store_error(struct http_request *request, int code, const struct error *error, const char *what)
{
    struct problem problem;
    if (code == ERROR_NOT_FOUND)
        problem_set(&problem, 404, "not_found", NULL, "There is no %s.", what);
    else if (code == ERROR_BUSY)
        problem_set(&problem, 503, "busy", NULL, "The database has too much to do.");
    else
        problem_set(&problem, 500, "store_error", NULL, "The database failed%s%s.", error ? ": " : "",
                    error ? error->message : "");
    reply_problem(request, &problem);
}

void reply_list(struct http_request *request, int code, const char *missing, const void *items, size_t count,
                size_t item_bytes, bool has_more, reply_encoder encode)
{
    if (code == ERROR_NOT_FOUND) {
        reply_refuse(request, 400, "invalid_value", "after", "after: %s.", missing);
        return;
    }
    if (code) {
        reply_store_error(request, code, NULL, "list");
        return;
    }
    json_t *data = json_array();
    for (size_t i = 0; i < count; i++)
        json_array_append_new(data, encode(request, (const char *)items + i * item_bytes));
    reply_json(request, 200, list_encode(data, has_more));
}

/* ---- repeated requests ---- */

static void on_answer_found(void *arg, int code, int status, const char *body_hash, const char *body)
{
    struct idempotency *once = arg;
    struct http_request *request = once->request;
    if (code == ERROR_NOT_FOUND) {
        once->next_step(once->server, request);
        return;
    }
    bool same = !code && !strcmp(body_hash, once->hash);
    reply_forget(request);
    if (code)
        reply_store_error(request, code, NULL, "answer");
    else if (same)
        answer_text(request, status, strdup(body));
    else
        reply_refuse(request, 400, "idempotency_key_reused", NULL,
                     "This Idempotency-Key was used before with another request.");
}

static void fingerprint(const struct http_request *request, char hex[65])
{
    unsigned char digest[crypto_hash_sha256_BYTES];
    if (request->upload) {
        upload_fingerprint(request->upload, hex);
        return;
    }
    crypto_hash_sha256(digest, (const unsigned char *)request->body, request->length);
    sodium_bin2hex(hex, 65, digest, sizeof digest);
}

void reply_once(struct server *server, struct http_request *request, reply_next next)
{
    const char *key = http_header(request, "idempotency-key");
    if (!key || strcmp(request->method, "POST")) {
        next(server, request);
        return;
    }
    size_t length = strlen(key);
    if (!length || length >= KEY_BYTES) {
        reply_refuse(request, 400, "invalid_value", "Idempotency-Key",
                     "Idempotency-Key: must have 1 to %d bytes.", KEY_BYTES - 1);
        return;
    }
    struct idempotency *once = calloc(1, sizeof *once);
    if (!once) {
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
        return;
    }
    once->server = server;
    once->request = request;
    once->next_step = next;
    memcpy(once->key, key, length + 1);
    snprintf(once->scope, sizeof once->scope, "%s %s", request->key_id, request->path);
    fingerprint(request, once->hash);
    for (const struct idempotency *other = server->repeatable; other; other = other->next)
        if (!strcmp(other->key, once->key) && !strcmp(other->scope, once->scope)) {
            free(once);
            struct problem problem;
            problem_set(&problem, 409, "request_in_progress", NULL,
                        "A request with this Idempotency-Key is still being answered.");
            problem.retry_after_seconds = 1;
            reply_problem(request, &problem);
            return;
        }
    once->next = server->repeatable;
    server->repeatable = once;
    request->idempotency = once;
    store_answer_get(server->store, once->scope, once->key, on_answer_found, once);
}
