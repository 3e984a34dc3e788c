/* result_file.c: see result_file.h. The loop's thread, but for write_file, which runs in libuv's pool. */
#include "daemon/result_file.h"

#include "base/buffer.h"
#include "base/file.h"

#include <jansson.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct writing {
    uv_work_t work;
    uv_loop_t *loop;
    char path[4096 + ID_BYTES];
    struct file_resource file;
    struct buffer csv;
    int code;
    store_file_read done;
    void *arg;
};

static void finish(struct writing *writing, int code)
{
    writing->done(writing->arg, code, code ? NULL : &writing->file);
    buffer_free(&writing->csv);
    free(writing);
}

static void write_file(uv_work_t *work)
{
    struct writing *writing = work->data;
    unsigned char hash[crypto_hash_sha256_BYTES];
    crypto_hash_sha256(hash, (const unsigned char *)writing->csv.data, writing->csv.length);
    sodium_bin2hex(writing->file.sha256, sizeof writing->file.sha256, hash, sizeof hash);
    writing->code = file_write_whole(writing->path, writing->csv.data, writing->csv.length, NULL);
}

static void on_file_written(uv_work_t *work, int status)
{
    struct writing *writing = work->data;
    finish(writing, status ? ERROR_CANCELLED : writing->code);
}

/* A number as the event has it; an empty field where it is null. */
static void append_number(struct buffer *csv, const json_t *value)
{
    if (json_is_number(value))
        buffer_printf(csv, "%.9g", json_number_value(value));
}

static void on_metrics(void *arg, int code, const struct event_resource *items, size_t count, bool has_more)
{
    (void)has_more;
    struct writing *writing = arg;
    if (code) {
        finish(writing, code);
        return;
    }
    static const char *const columns[] = {"train_loss", "train_mean_token_accuracy", "valid_loss",
                                          "valid_mean_token_accuracy"};
    buffer_append_string(&writing->csv,
                         "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n");
    for (size_t i = 0; i < count; i++) {
        json_t *data = items[i].data ? json_loads(items[i].data, 0, NULL) : NULL;
        append_number(&writing->csv, json_object_get(data, "step"));
        for (size_t j = 0; j < sizeof columns / sizeof *columns; j++) {
            buffer_append(&writing->csv, ",", 1);
            append_number(&writing->csv, json_object_get(data, columns[j]));
        }
        buffer_append(&writing->csv, "\n", 1);
        json_decref(data);
    }
    if (writing->csv.failed) {
        finish(writing, ERROR_NO_MEMORY);
        return;
    }
    writing->file.bytes = (int64_t)writing->csv.length;
    writing->work.data = writing;
    if (uv_queue_work(writing->loop, &writing->work, write_file, on_file_written))
        finish(writing, ERROR_IO);
}

void result_file_write(uv_loop_t *loop, struct store *store, const char *data_dir, const char *job,
                       store_file_read done, void *arg)
{
    struct writing *writing = calloc(1, sizeof *writing);
    if (!writing) {
        done(arg, ERROR_NO_MEMORY, NULL);
        return;
    }
    writing->loop = loop;
    writing->done = done;
    writing->arg = arg;
    struct file_resource *file = &writing->file;
    store_new_id("file-", file->id);
    file->created_at = (int64_t)time(NULL);
    snprintf(file->filename, sizeof file->filename, "step_metrics.csv");
    snprintf(file->purpose, sizeof file->purpose, "fine-tune-results");
    snprintf(file->status, sizeof file->status, "processed");
    snprintf(writing->path, sizeof writing->path, "%s/files/%s", data_dir, file->id);
    store_metrics_list(store, job, on_metrics, writing);
}
