/* upload.h: a form with one file that is being received. Bytes gather in memory until UPLOAD_CHUNK of them are
 * there, then a work thread hashes and writes them under a temporary name; nothing has its final name before
 * it is whole and on disk. Loop thread only. */
#ifndef DAEMON_UPLOAD_H
#define DAEMON_UPLOAD_H

#include "api/problem.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

struct upload;

enum { UPLOAD_CHUNK = 1 << 20, UPLOAD_FIELD_BYTES = 256 };

/* folder: where the temporary file goes. limit: bytes of the file. */
struct upload *upload_create(uv_loop_t *loop, const char *folder, int64_t limit);
/* What was written is removed unless it was committed. NULL is fine, work under way too. */
void upload_free(struct upload *upload);

/* A piece of a form's part: offset 0 begins it. filename is NULL for plain fields. Fields that are not known
 * are skipped. Returns 0, or -1 with a problem: 400, or 413 beyond the limit. */
int upload_add(struct upload *upload, const char *key, const char *filename, const char *data,
               uint64_t offset, size_t length, struct problem *problem);
/* Is it time to flush? */
bool upload_is_full(const struct upload *upload);
typedef void (*upload_done)(void *arg, int code, const struct error *error);
/* Hash and write what is there. One flush or commit at a time. */
void upload_flush(struct upload *upload, upload_done done, void *arg);
/* Write the rest, fsync, and give it its name. */
void upload_commit(struct upload *upload, const char *path, upload_done done, void *arg);

/* NULL where the form did not have it. */
const char *upload_filename(const struct upload *upload);
const char *upload_purpose(const struct upload *upload);
const char *upload_expires_anchor(const struct upload *upload);
const char *upload_expires_seconds(const struct upload *upload);
int64_t upload_bytes(const struct upload *upload);
/* SHA-256 in hex; valid after a commit. */
const char *upload_sha256(const struct upload *upload);
/* SHA-256 of the whole form, in hex, before a commit; no work may be under way. At most a chunk is hashed here
 * and now. */
void upload_fingerprint(const struct upload *upload, char ret_hex[65]);

#endif
