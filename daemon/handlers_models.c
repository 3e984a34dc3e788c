/* handlers_models.c: /v1/models, and adapters as tar files. Loop thread only; the disk is left to work threads.
 */
#include "daemon/handlers.h"

#include "base/file.h"
#include "base/log.h"
#include "daemon/reply.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void reply_no_model(struct http_request *request)
{
    reply_refuse(request, 404, "model_not_found", "model", "There is no model '%s'.", request->route.id);
}

void handle_model_list(struct server *server, struct http_request *request)
{
    json_t *data = json_array();
    for (size_t i = 0; i < registry_count(server->registry); i++)
        json_array_append_new(data, model_encode(&registry_at(server->registry, i)->resource));
    reply_json(request, 200, list_encode(data, false));
}

void handle_model_get(struct server *server, struct http_request *request)
{
    const struct model_entry *entry = registry_find(server->registry, request->route.id);
    if (entry)
        reply_json(request, 200, model_encode(&entry->resource));
    else
        reply_no_model(request);
}

/* ---- delete ---- */

/* A folder that nothing names any more. */
struct removal {
    uv_work_t work;
    char path[4096];
    int code;
    struct error error;
};

static void remove_folder(uv_work_t *work)
{
    struct removal *removal = work->data;
    removal->code = file_remove_tree(removal->path, &removal->error);
}

static void on_folder_removed(uv_work_t *work, int status)
{
    struct removal *removal = work->data;
    if (status || removal->code)
        log_write(LOG_WARN, "an adapter's folder stays", "reason",
                  status ? uv_strerror(status) : removal->error.message, NULL);
    free(removal);
}

static void on_model_deleted(void *arg, int code, const struct error *error)
{
    struct http_request *request = arg;
    struct server *server = request->context;
    const char *id = request->route.id;
    const struct model_entry *entry = registry_find(server->registry, id);
    if (code == ERROR_NOT_FOUND || (!code && !entry)) {
        reply_no_model(request);
        return;
    }
    if (code) {
        reply_store_error(request, code, error, "model");
        return;
    }
    struct removal *removal = calloc(1, sizeof *removal);
    if (removal) {
        removal->work.data = removal;
        snprintf(removal->path, sizeof removal->path, "%s", entry->path);
        if (uv_queue_work(&server->loop, &removal->work, remove_folder, on_folder_removed))
            free(removal);
    }
    registry_remove(server->registry, id);
    for (size_t i = 0; i < worker_pool_count(server->pool); i++)
        worker_send(worker_pool_at(server->pool, i), FRAME_UNLOAD, json_pack("{s:s}", "adapter", id));
    reply_json(request, 200, deleted_encode(id, "model"));
}

void handle_model_delete(struct server *server, struct http_request *request)
{
    const struct model_entry *entry = registry_find(server->registry, request->route.id);
    request->context = server;
    if (!entry)
        reply_no_model(request);
    else if (entry->is_base)
        reply_refuse(request, 400, "invalid_value", "model",
                     "'%s' is a base model; only fine-tuned ones are deleted.", request->route.id);
    else if (scheduler_uses_model(server->scheduler, request->route.id))
        reply_refuse(request, 400, "model_in_use", "model", "'%s' is in use by a job that has not ended.",
                     request->route.id);
    else
        store_model_delete(server->store, request->route.id, on_model_deleted, request);
}

/* ---- an adapter as a tar ---- */

enum { TAR_BLOCK = 512 };

static const char *const adapter_files[] = {"adapter_config.json", "adapter_model.safetensors"};
enum { ADAPTER_FILES = sizeof adapter_files / sizeof *adapter_files };

struct packing {
    struct http_request *request;
    uv_work_t work;
    char path[4096], filename[MODEL_ID_BYTES + 8];
    int64_t created;
    struct file_body *body;
    int code;
    struct error error;
};

/* POSIX ustar: numbers are octal text, the checksum is taken with its own field as blanks. */
static void tar_header(char header[TAR_BLOCK], const char *name, int64_t size, int64_t modified)
{
    unsigned sum = 0;
    memset(header, 0, TAR_BLOCK);
    snprintf(header, 100, "%s", name);
    memcpy(header + 100, "0000644", 8);
    memcpy(header + 108, "0000000", 8);
    memcpy(header + 116, "0000000", 8);
    snprintf(header + 124, 12, "%011llo", (unsigned long long)size);
    snprintf(header + 136, 12, "%011llo", (unsigned long long)modified);
    memset(header + 148, ' ', 8);
    header[156] = '0';
    memcpy(header + 257, "ustar", 6);
    memcpy(header + 263, "00", 2);
    for (int i = 0; i < TAR_BLOCK; i++)
        sum += (unsigned char)header[i];
    snprintf(header + 148, 8, "%06o", sum);
}

static int pack_file(struct packing *packing, const char *name)
{
    static const char zeros[TAR_BLOCK];
    char path[4200], header[TAR_BLOCK];
    int fd;
    int64_t size;
    snprintf(path, sizeof path, "%s/%s", packing->path, name);
    int code = file_body_open(path, &fd, &size, &packing->error);
    if (code)
        return code;
    tar_header(header, name, size, packing->created);
    code = file_body_add_bytes(packing->body, header, sizeof header);
    if (code) {
        close(fd);
        return code;
    }
    code = file_body_add_file(packing->body, fd, size);
    if (!code && size % TAR_BLOCK)
        code = file_body_add_bytes(packing->body, zeros, (size_t)(TAR_BLOCK - size % TAR_BLOCK));
    return code;
}

/* Work thread. */
static void pack_adapter(uv_work_t *work)
{
    static const char end[2 * TAR_BLOCK];
    struct packing *packing = work->data;
    for (int i = 0; i < ADAPTER_FILES && !packing->code; i++)
        packing->code = pack_file(packing, adapter_files[i]);
    if (!packing->code)
        packing->code = file_body_add_bytes(packing->body, end, sizeof end);
}

static void on_packed(uv_work_t *work, int status)
{
    struct packing *packing = work->data;
    if (status || packing->code) {
        file_body_free(packing->body);
        reply_refuse(packing->request, 500, "storage_error", NULL, "The adapter could not be read: %s.",
                     status ? uv_strerror(status) : packing->error.message);
    } else {
        http_answer_file(packing->request, "application/x-tar", packing->filename, packing->body);
    }
    free(packing);
}

void handle_model_adapter(struct server *server, struct http_request *request)
{
    const struct model_entry *entry = registry_find(server->registry, request->route.id);
    if (!entry) {
        reply_no_model(request);
        return;
    }
    if (entry->is_base || entry->full) {
        reply_refuse(request, 400, "not_an_adapter", "model", "'%s' is %s, not an adapter.",
                     request->route.id, entry->is_base ? "a base model" : "a full fine-tune");
        return;
    }
    struct packing *packing = calloc(1, sizeof *packing);
    struct file_body *body = packing ? file_body_create() : NULL;
    if (!body) {
        free(packing);
        reply_refuse(request, 503, "out_of_memory", NULL, "The server is out of memory.");
        return;
    }
    packing->request = request;
    packing->body = body;
    packing->created = entry->resource.created;
    packing->work.data = packing;
    snprintf(packing->path, sizeof packing->path, "%s", entry->path);
    snprintf(packing->filename, sizeof packing->filename, "%s.tar", entry->resource.id);
    int status = uv_queue_work(&server->loop, &packing->work, pack_adapter, on_packed);
    if (status)
        on_packed(&packing->work, status);
}
