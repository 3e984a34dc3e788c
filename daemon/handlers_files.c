/* handlers_files.c: /v1/files. Loop thread only; opening, renaming and removing files is left to work threads.
 *
 * A file is DATA/files/ID. It has that name before its row commits, and loses it after its row is gone, so that
 * every row has its file. */
#include "daemon/handlers.h"

#include "base/log.h"
#include "daemon/reply.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void file_path(const struct server *server, const char *id, char path[4096])
{
    snprintf(path, 4096, "%s/files/%s", server->config->data_dir, id);
}

/* "file 'ID'", for messages. */
static const char *file_words(const char *id, char words[300])
{
    snprintf(words, 300, "file '%.255s'", id);
    return words;
}

/* ---- removing, with nobody waiting ---- */

static void on_unlinked(uv_fs_t *fs)
{
    uv_fs_req_cleanup(fs);
    free(fs);
}

static void remove_file(struct server *server, const char *id)
{
    char path[4096];
    uv_fs_t *fs = malloc(sizeof *fs);
    file_path(server, id, path);
    if (fs && uv_fs_unlink(&server->loop, fs, path, on_unlinked))
        free(fs);
}

/* ---- create ---- */

struct creation {
    struct server *server;
    struct http_request *request;
    struct file_resource file;
};

static void on_file_inserted(void *arg, int code, const struct error *error)
{
    struct creation *creation = arg;
    if (code) {
        remove_file(creation->server, creation->file.id);
        reply_store_error(creation->request, code, error, "file");
    } else {
        reply_json(creation->request, 200, file_encode(&creation->file));
    }
    free(creation);
}

static void on_committed(void *arg, int code, const struct error *error)
{
    struct creation *creation = arg;
    if (code || !creation->server->store) { /* no store: it took too long to shut down */
        if (!code)
            remove_file(creation->server, creation->file.id);
        reply_refuse(creation->request, 500, "storage_error", NULL, "The file could not be stored: %s.",
                     code ? error->message : "the server is shutting down");
        free(creation);
        return;
    }
    snprintf(creation->file.sha256, sizeof creation->file.sha256, "%s",
             upload_sha256(creation->request->upload));
    store_file_insert(creation->server->store, &creation->file,
                      reply_keep(creation->request, 200, file_encode(&creation->file)), on_file_inserted,
                      creation);
}

void handle_file_create(struct server *server, struct http_request *request)
{
    const struct upload *upload = request->upload;
    struct file_resource file;
    struct problem problem;
    if (file_fields_check(upload_purpose(upload), upload_filename(upload), upload_expires_anchor(upload),
                          upload_expires_seconds(upload), (int64_t)time(NULL), &file, &problem)) {
        reply_problem(request, &problem);
        return;
    }
    struct creation *creation = calloc(1, sizeof *creation);
    if (!creation) {
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
        return;
    }
    store_new_id("file-", file.id);
    file.bytes = upload_bytes(upload);
    *creation = (struct creation){server, request, file};
    char path[4096];
    file_path(server, file.id, path);
    upload_commit(request->upload, path, on_committed, creation);
}

/* ---- list and get ---- */

static json_t *encode_file(const struct http_request *request, const void *item)
{
    (void)request;
    return file_encode(item);
}

static void on_files(void *arg, int code, const struct file_resource *items, size_t count, bool has_more)
{
    reply_list(arg, code, "there is no such file", items, count, sizeof *items, has_more, encode_file);
}

void handle_file_list(struct server *server, struct http_request *request)
{
    struct list_query query;
    struct problem problem;
    if (list_query_decode(LIST_FILES, request->arguments, request->n_arguments, &query, &problem))
        reply_problem(request, &problem);
    else
        store_file_list(server->store, &query, on_files, request);
}

/* Answers and returns false when there is no file to go on with. */
static bool check_found(struct http_request *request, int code, const struct file_resource *file)
{
    char words[300];
    bool expired = !code && file->expires_at && file->expires_at <= (int64_t)time(NULL);
    if (code || expired)
        reply_store_error(request, expired ? ERROR_NOT_FOUND : code, NULL,
                          file_words(request->route.id, words));
    return !code && !expired;
}

static void on_file(void *arg, int code, const struct file_resource *file)
{
    if (check_found(arg, code, file))
        reply_json(arg, 200, file_encode(file));
}

void handle_file_get(struct server *server, struct http_request *request)
{
    store_file_get(server->store, request->route.id, on_file, request);
}

/* ---- content ---- */

struct opening {
    struct http_request *request;
    uv_work_t work;
    char path[4096], filename[FILENAME_BYTES];
    struct file_body *body;
    int code;
    struct error error;
};

/* Work thread. */
static void open_file(uv_work_t *work)
{
    struct opening *opening = work->data;
    int fd;
    int64_t size;
    opening->code = file_body_open(opening->path, &fd, &size, &opening->error);
    if (!opening->code)
        opening->code = file_body_add_file(opening->body, fd, size);
}

static void on_opened(uv_work_t *work, int status)
{
    struct opening *opening = work->data;
    if (status || opening->code) {
        file_body_free(opening->body);
        reply_refuse(opening->request, 500, "storage_error", NULL, "The file could not be read: %s.",
                     status ? uv_strerror(status) : opening->error.message);
    } else {
        http_answer_file(opening->request, "application/octet-stream", opening->filename, opening->body);
    }
    free(opening);
}

static void on_file_to_open(void *arg, int code, const struct file_resource *file)
{
    struct http_request *request = arg;
    if (!check_found(request, code, file))
        return;
    struct server *server = request->context;
    struct opening *opening = calloc(1, sizeof *opening);
    struct file_body *body = opening ? file_body_create() : NULL;
    if (!body) {
        free(opening);
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
        return;
    }
    opening->request = request;
    opening->body = body;
    opening->work.data = opening;
    file_path(server, file->id, opening->path);
    snprintf(opening->filename, sizeof opening->filename, "%s", file->filename);
    int status = uv_queue_work(&server->loop, &opening->work, open_file, on_opened);
    if (status)
        on_opened(&opening->work, status);
}

void handle_file_content(struct server *server, struct http_request *request)
{
    request->context = server;
    store_file_get(server->store, request->route.id, on_file_to_open, request);
}

/* ---- delete ---- */

static void on_file_deleted(void *arg, int code, const struct error *error)
{
    struct http_request *request = arg;
    char words[300];
    if (code == ERROR_BUSY) {
        reply_refuse(request, 400, "file_in_use", NULL, "File '%s' is in use by a job that has not ended.",
                     request->route.id);
    } else if (code) {
        reply_store_error(request, code, error, file_words(request->route.id, words));
    } else {
        remove_file(request->context, request->route.id);
        reply_json(request, 200, deleted_encode(request->route.id, "file"));
    }
}

void handle_file_delete(struct server *server, struct http_request *request)
{
    request->context = server;
    store_file_delete(server->store, request->route.id, on_file_deleted, request);
}

/* ---- expiry ---- */

struct expiry {
    struct server *server;
    char id[ID_BYTES];
};

static void on_expired_deleted(void *arg, int code, const struct error *error)
{
    struct expiry *expiry = arg;
    (void)error;
    if (!code) {
        remove_file(expiry->server, expiry->id);
        log_write(LOG_INFO, "file expired", "file", expiry->id, NULL);
    }
    free(expiry);
}

static void on_expired(void *arg, int code, const struct file_resource *items, size_t count, bool has_more)
{
    (void)has_more;
    for (size_t i = 0; !code && i < count; i++) {
        struct expiry *expiry = calloc(1, sizeof *expiry);
        if (!expiry)
            return;
        expiry->server = arg;
        snprintf(expiry->id, sizeof expiry->id, "%s", items[i].id);
        store_file_delete(expiry->server->store, expiry->id, on_expired_deleted, expiry);
    }
}

void files_expire(struct server *server)
{
    store_file_expired(server->store, (int64_t)time(NULL), on_expired, server);
}
