/* store_answers.c: rows of the answers kept for repeated POSTs. run functions: the store's threads; the rest: the
 * loop's. */
#include "daemon/store_internal.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ANSWER_SECONDS = 24 * 3600 };

/* ---- put ---- */

int answer_row_insert(struct connection *connection, const struct kept_answer *answer, struct error *error)
{
    int64_t now = time(NULL);
    struct query old = query_begin(connection, "DELETE FROM answers WHERE created_at <= ?");
    query_int(&old, now - ANSWER_SECONDS);
    int code = query_run(&old, NULL, error);
    if (code)
        return code;
    struct query query =
        query_begin(connection, "INSERT INTO answers (scope, key, created_at, body_hash, status, "
                                "body) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING");
    query_text(&query, answer->scope);
    query_text(&query, answer->key);
    query_int(&query, now);
    query_text(&query, answer->body_hash);
    query_int(&query, answer->status);
    query_text(&query, answer->body);
    return query_run(&query, NULL, error);
}

static const char *append(char **end, const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *start = memcpy(*end, text, bytes);
    *end += bytes;
    return start;
}

struct kept_answer *answer_copy(const struct kept_answer *answer)
{
    size_t bytes =
        strlen(answer->scope) + strlen(answer->key) + strlen(answer->body_hash) + strlen(answer->body) + 4;
    struct kept_answer *copy = malloc(sizeof *copy + bytes);
    if (!copy)
        return NULL;
    char *end = (char *)(copy + 1);
    copy->scope = append(&end, answer->scope);
    copy->key = append(&end, answer->key);
    copy->body_hash = append(&end, answer->body_hash);
    copy->body = append(&end, answer->body);
    copy->status = answer->status;
    return copy;
}

struct answer_write {
    struct store_request request;
    struct kept_answer *answer;
};

static int run_put(struct connection *connection, struct store_request *request, struct error *error)
{
    return answer_row_insert(connection, ((struct answer_write *)request)->answer, error);
}

static void release_put(struct store_request *request)
{
    free(((struct answer_write *)request)->answer);
}

void store_answer_put(struct store *store, const struct kept_answer *answer, store_written done, void *arg)
{
    struct answer_write *write = request_new_write(sizeof *write, run_put, done, arg);
    if (!write)
        return;
    write->request.release = release_put;
    write->answer = answer_copy(answer);
    if (!write->answer)
        request_refuse(&write->request, ERROR_NO_MEMORY, "no memory for an answer");
    else
        write->request.bytes += strlen(answer->body);
    store_write(store, &write->request);
}

/* ---- get ---- */

struct answer_read {
    struct store_request request;
    char *scope, *key, *body_hash, *body;
    int64_t now;
    int status;
    store_answer_read done;
};

static void release_get(struct store_request *request)
{
    struct answer_read *read = (struct answer_read *)request;
    free(read->scope);
    free(read->key);
    free(read->body_hash);
    free(read->body);
}

static int run_get(struct connection *connection, struct store_request *request, struct error *error)
{
    struct answer_read *read = (struct answer_read *)request;
    struct query query =
        query_begin(connection, "SELECT body_hash, status, body FROM answers WHERE scope = ? AND "
                                "key = ? AND created_at > ?");
    query_text(&query, read->scope);
    query_text(&query, read->key);
    query_int(&query, read->now - ANSWER_SECONDS);
    int code = query_next(&query, error);
    if (code == 0)
        return error_set(error, ERROR_NOT_FOUND, "no answer is kept for this key");
    if (code < 0)
        return code;
    read->status = (int)column_int(&query, 1);
    if (!(code = column_copy(&query, 0, &read->body_hash, error)))
        code = column_copy(&query, 2, &read->body, error);
    query_end(&query);
    return code;
}

static void deliver_get(struct store_request *request)
{
    struct answer_read *read = (struct answer_read *)request;
    if (request->code)
        read->done(request->arg, request->code, 0, NULL, NULL);
    else
        read->done(request->arg, 0, read->status, read->body_hash, read->body);
}

void store_answer_get(struct store *store, const char *scope, const char *key, store_answer_read done,
                      void *arg)
{
    struct answer_read *read = request_new(sizeof *read);
    if (!read) {
        done(arg, ERROR_NO_MEMORY, 0, NULL, NULL);
        return;
    }
    read->request.run = run_get;
    read->request.deliver = deliver_get;
    read->request.release = release_get;
    read->request.arg = arg;
    read->done = done;
    read->now = time(NULL);
    read->scope = strdup(scope);
    read->key = strdup(key);
    if (!read->scope || !read->key)
        request_refuse(&read->request, ERROR_NO_MEMORY, "no memory to look for an answer");
    store_read(store, &read->request);
}
