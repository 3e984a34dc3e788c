/* store_keys.c: rows of API keys. run functions: the store's
 * threads; the rest: the loop's, or the `keys` command's only one. */
#include "daemon/store_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct key_write {
    struct store_request request;
    struct key_row key;
    char id_or_name[128]; /* to revoke */
};

struct keys_read {
    struct store_request request;
    struct rows rows;
    store_keys_read done;
};

static int run_key_insert(struct connection *connection, struct store_request *request, struct error *error)
{
    const struct key_row *key = &((struct key_write *)request)->key;
    int taken = query_finds(connection, "SELECT 1 FROM keys WHERE name = ? AND revoked_at = 0", key->name,
                            NULL, error);
    if (taken < 0)
        return taken;
    if (taken)
        return error_set_param(error, ERROR_INVALID, "name", "a key named '%s' exists; revoke it first",
                               key->name);
    struct query query = query_begin(connection, "INSERT INTO keys (id, name, hash, created_at, revoked_at, "
                                                 "last_used_at) VALUES (?, ?, ?, ?, ?, ?)");
    query_text(&query, key->id);
    query_text(&query, key->name);
    query_text(&query, key->hash);
    query_int(&query, key->created_at);
    query_int(&query, key->revoked_at);
    query_int(&query, key->last_used_at);
    return query_run(&query, NULL, error);
}

int store_key_insert(struct store *store, const struct key_row *key, struct error *error)
{
    struct key_write write = {.request.run = run_key_insert, .key = *key};
    return store_write_blocking(store, &write.request, error);
}

static int run_key_revoke(struct connection *connection, struct store_request *request, struct error *error)
{
    const struct key_write *write = (const struct key_write *)request;
    struct query query = query_begin(
        connection, "UPDATE keys SET revoked_at = ?1 WHERE revoked_at = 0 AND (id = ?2 OR name = ?2)");
    query_int(&query, write->key.revoked_at);
    query_text(&query, write->id_or_name);
    int64_t changes = 0;
    int code = query_run(&query, &changes, error);
    if (!code && !changes)
        code = error_set(error, ERROR_NOT_FOUND, "no live key has the id or name '%s'", write->id_or_name);
    return code;
}

int store_key_revoke(struct store *store, const char *id_or_name, int64_t now, struct error *error)
{
    struct key_write write = {.request.run = run_key_revoke, .key.revoked_at = now};
    snprintf(write.id_or_name, sizeof write.id_or_name, "%s", id_or_name);
    return store_write_blocking(store, &write.request, error);
}

static int run_key_used(struct connection *connection, struct store_request *request, struct error *error)
{
    const struct key_row *key = &((struct key_write *)request)->key;
    struct query query =
        query_begin(connection, "UPDATE keys SET last_used_at = max(last_used_at, ?) WHERE id = ?");
    query_int(&query, key->last_used_at);
    query_text(&query, key->id);
    return query_run(&query, NULL, error);
}

void store_key_used(struct store *store, const char *id, int64_t now)
{
    struct key_write *write = request_new_write(sizeof *write, run_key_used, NULL, NULL);
    if (!write)
        return;
    snprintf(write->key.id, sizeof write->key.id, "%s", id);
    write->key.last_used_at = now;
    store_write(store, &write->request);
}

static int run_keys(struct connection *connection, struct store_request *request, struct error *error)
{
    struct rows *rows = &((struct keys_read *)request)->rows;
    struct query query = query_begin(
        connection,
        "SELECT id, name, hash, created_at, revoked_at, last_used_at FROM keys ORDER BY sequence");
    int code;
    while ((code = query_next(&query, error)) > 0) {
        struct key_row *key = rows_add(rows);
        if (!key) {
            query_end(&query);
            return error_set(error, ERROR_NO_MEMORY, "no memory for the list of keys");
        }
        column_text(&query, 0, key->id, sizeof key->id);
        column_text(&query, 1, key->name, sizeof key->name);
        column_text(&query, 2, key->hash, sizeof key->hash);
        key->created_at = column_int(&query, 3);
        key->revoked_at = column_int(&query, 4);
        key->last_used_at = column_int(&query, 5);
    }
    return code;
}

int store_load_keys(struct store *store, struct key_row **ret_items, size_t *ret_count, struct error *error)
{
    struct keys_read read = {.request.run = run_keys, .rows.item_size = sizeof(struct key_row)};
    int code = store_read_blocking(store, &read.request, error);
    if (code) {
        rows_free(&read.rows, NULL);
        return code;
    }
    *ret_items = read.rows.items;
    *ret_count = read.rows.count;
    return 0;
}

static void deliver_keys(struct store_request *request)
{
    struct keys_read *read = (struct keys_read *)request;
    if (request->code)
        read->done(request->arg, request->code, NULL, 0);
    else
        read->done(request->arg, 0, read->rows.items, read->rows.count);
}

static void release_keys(struct store_request *request)
{
    rows_free(&((struct keys_read *)request)->rows, NULL);
}

void store_key_list(struct store *store, store_keys_read done, void *arg)
{
    struct keys_read *read = request_new(sizeof *read);
    if (!read) {
        done(arg, ERROR_NO_MEMORY, NULL, 0);
        return;
    }
    read->request.run = run_keys;
    read->request.deliver = deliver_keys;
    read->request.release = release_keys;
    read->request.arg = arg;
    read->rows.item_size = sizeof(struct key_row);
    read->done = done;
    store_read(store, &read->request);
}
