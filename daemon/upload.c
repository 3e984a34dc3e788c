/* upload.c: see upload.h. */
#include "daemon/upload.h"

#include "base/buffer.h"
#include "base/file.h"
#include "daemon/store.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct field {
    const char *key;
    char text[UPLOAD_FIELD_BYTES];
    size_t length;
    bool given;
};
enum { FIELD_PURPOSE, FIELD_ANCHOR, FIELD_SECONDS, FIELD_COUNT };

struct upload {
    uv_loop_t *loop;
    int64_t limit, bytes;
    struct field fields[FIELD_COUNT];
    char *filename; /* NULL until the file's part begins */
    char path[4096];
    int fd;       /* -1 until something is written */
    bool on_disk; /* path exists and is ours to remove */
    struct buffer pending;
    crypto_hash_sha256_state hash;
    char sha256[2 * crypto_hash_sha256_BYTES + 1];

    /* Work under way, of which the work thread owns the file, what is pending and the result. */
    uv_work_t work;
    bool busy, freed;
    char commit_path[4096]; /* "" = only flush */
    int code;
    struct error error;
    upload_done done;
    void *arg;
};

struct upload *upload_create(uv_loop_t *loop, const char *folder, int64_t limit)
{
    struct upload *upload = calloc(1, sizeof *upload);
    if (!upload)
        return NULL;
    char id[ID_BYTES];
    store_new_id("upload-", id);
    upload->loop = loop;
    upload->limit = limit;
    upload->fd = -1;
    upload->fields[FIELD_PURPOSE].key = "purpose";
    upload->fields[FIELD_ANCHOR].key = "expires_after[anchor]";
    upload->fields[FIELD_SECONDS].key = "expires_after[seconds]";
    snprintf(upload->path, sizeof upload->path, "%s/%s", folder, id);
    crypto_hash_sha256_init(&upload->hash);
    return upload;
}

/* ---- the end ---- */

static void destroy(struct upload *upload)
{
    buffer_free(&upload->pending);
    free(upload->filename);
    free(upload);
}

/* Work thread: closing the last link of a large file may take its time. */
static void discard(uv_work_t *work)
{
    struct upload *upload = work->data;
    unlink(upload->path);
    if (upload->fd >= 0)
        close(upload->fd);
}

static void on_discarded(uv_work_t *work, int status)
{
    (void)status;
    destroy(work->data);
}

void upload_free(struct upload *upload)
{
    if (!upload)
        return;
    upload->freed = true;
    if (upload->busy)
        return; /* on_worked comes back here */
    if (!upload->on_disk) {
        destroy(upload);
        return;
    }
    upload->work.data = upload;
    if (uv_queue_work(upload->loop, &upload->work, discard, on_discarded)) {
        discard(&upload->work);
        destroy(upload);
    }
}

/* ---- receiving ---- */

static int field_add(struct field *field, const char *data, uint64_t offset, size_t length,
                     struct problem *problem)
{
    if (offset == 0 && field->given && field->length)
        return problem_set(problem, 400, "invalid_value", field->key, "%s: is given twice.", field->key);
    field->given = true;
    if (field->length + length >= sizeof field->text || (length && memchr(data, '\0', length)))
        return problem_set(problem, 400, "invalid_value", field->key,
                           "%s: must be text of less than %zu bytes.", field->key, sizeof field->text);
    if (length)
        memcpy(field->text + field->length, data, length);
    field->length += length;
    return 0;
}

int upload_add(struct upload *upload, const char *key, const char *filename, const char *data,
               uint64_t offset, size_t length, struct problem *problem)
{
    for (int i = 0; i < FIELD_COUNT; i++)
        if (!strcmp(key, upload->fields[i].key))
            return field_add(&upload->fields[i], data, offset, length, problem);
    if (strcmp(key, "file"))
        return 0;
    if (!filename)
        return problem_set(problem, 400, "invalid_value", "file", "file: its part has no file name.");
    if (offset == 0 && upload->filename && upload->bytes)
        return problem_set(problem, 400, "invalid_value", "file", "file: is given twice.");
    if (!upload->filename)
        upload->filename = strdup(filename);
    upload->bytes += (int64_t)length;
    if (upload->bytes > upload->limit)
        return problem_set(problem, 413, "file_too_large", "file",
                           "file: is larger than the limit of %lld bytes.", (long long)upload->limit);
    buffer_append(&upload->pending, data, length);
    if (!upload->filename || upload->pending.failed)
        return problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    return 0;
}

bool upload_is_full(const struct upload *upload)
{
    return upload->pending.length >= UPLOAD_CHUNK;
}

/* ---- writing: work threads ---- */

static int write_pending(struct upload *upload)
{
    if (upload->fd < 0)
        upload->fd = open(upload->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0640);
    if (upload->fd < 0)
        return error_set(&upload->error, ERROR_IO, "cannot create a file: %s", strerror(errno));
    upload->on_disk = true;
    crypto_hash_sha256_update(&upload->hash, (const unsigned char *)upload->pending.data,
                              upload->pending.length);
    for (size_t done = 0; done < upload->pending.length;) {
        ssize_t n = write(upload->fd, upload->pending.data + done, upload->pending.length - done);
        if (n < 0 && errno != EINTR)
            return error_set(&upload->error, ERROR_IO, "cannot write the file: %s", strerror(errno));
        done += n > 0 ? (size_t)n : 0;
    }
    buffer_clear(&upload->pending);
    return 0;
}

static int commit(struct upload *upload)
{
    if (fsync(upload->fd))
        return error_set(&upload->error, ERROR_IO, "cannot write the file: %s", strerror(errno));
    int code = file_rename_durable(upload->path, upload->commit_path, &upload->error);
    if (code)
        return code;
    unsigned char digest[crypto_hash_sha256_BYTES];
    crypto_hash_sha256_final(&upload->hash, digest);
    sodium_bin2hex(upload->sha256, sizeof upload->sha256, digest, sizeof digest);
    upload->on_disk = false;
    close(upload->fd);
    upload->fd = -1;
    return 0;
}

static void write_work(uv_work_t *work)
{
    struct upload *upload = work->data;
    upload->code = write_pending(upload);
    if (!upload->code && upload->commit_path[0])
        upload->code = commit(upload);
}

static void on_worked(uv_work_t *work, int status)
{
    struct upload *upload = work->data;
    upload->busy = false;
    if (status && !upload->code)
        upload->code = error_set(&upload->error, ERROR_IO, "cannot write the file: %s", uv_strerror(status));
    if (upload->freed) { /* nobody waits: what was committed meanwhile is removed, too */
        if (!upload->code && upload->commit_path[0]) {
            memcpy(upload->path, upload->commit_path, sizeof upload->path);
            upload->on_disk = true;
        }
        upload_free(upload);
        return;
    }
    /* Whoever waits may free it. */
    upload->done(upload->arg, upload->code, upload->code ? &upload->error : NULL);
}

static void start(struct upload *upload, upload_done done, void *arg)
{
    upload->done = done;
    upload->arg = arg;
    upload->work.data = upload;
    int status = uv_queue_work(upload->loop, &upload->work, write_work, on_worked);
    if (status)
        on_worked(&upload->work, status);
    else
        upload->busy = true;
}

void upload_flush(struct upload *upload, upload_done done, void *arg)
{
    upload->commit_path[0] = '\0';
    start(upload, done, arg);
}

void upload_commit(struct upload *upload, const char *path, upload_done done, void *arg)
{
    snprintf(upload->commit_path, sizeof upload->commit_path, "%s", path);
    start(upload, done, arg);
}

/* ---- what the form said ---- */

static const char *field_text(const struct field *field)
{
    return field->given ? field->text : NULL;
}

const char *upload_filename(const struct upload *upload)
{
    return upload->filename;
}

const char *upload_purpose(const struct upload *upload)
{
    return field_text(&upload->fields[FIELD_PURPOSE]);
}

const char *upload_expires_anchor(const struct upload *upload)
{
    return field_text(&upload->fields[FIELD_ANCHOR]);
}

const char *upload_expires_seconds(const struct upload *upload)
{
    return field_text(&upload->fields[FIELD_SECONDS]);
}

int64_t upload_bytes(const struct upload *upload)
{
    return upload->bytes;
}

const char *upload_sha256(const struct upload *upload)
{
    return upload->sha256;
}

void upload_fingerprint(const struct upload *upload, char ret_hex[65])
{
    crypto_hash_sha256_state hash = upload->hash;
    unsigned char digest[crypto_hash_sha256_BYTES];
    if (upload->pending.length)
        crypto_hash_sha256_update(&hash, (const unsigned char *)upload->pending.data, upload->pending.length);
    /* Each with its NUL, so that no two forms run together alike. */
    for (int i = 0; i < FIELD_COUNT; i++)
        crypto_hash_sha256_update(&hash, (const unsigned char *)upload->fields[i].text,
                                  upload->fields[i].length + 1);
    if (upload->filename)
        crypto_hash_sha256_update(&hash, (const unsigned char *)upload->filename, strlen(upload->filename));
    crypto_hash_sha256_final(&hash, digest);
    sodium_bin2hex(ret_hex, 65, digest, sizeof digest);
}
