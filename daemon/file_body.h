/* file_body.h: an answer's body made of pieces of memory and whole files, read in the background as the client
 * takes it. One thread at a time. */
#ifndef DAEMON_FILE_BODY_H
#define DAEMON_FILE_BODY_H

#include "base/error.h"

#include <stddef.h>
#include <stdint.h>
#include <uv.h>

struct file_body;

struct file_body *file_body_create(void);
/* NULL is fine. A read that is under way is waited for in the background. */
void file_body_free(struct file_body *body);
/* bytes are copied. Returns 0 or ERROR_NO_MEMORY. */
int file_body_add_bytes(struct file_body *body, const void *bytes, size_t length);
/* Open a file for file_body_add_file. May block: call it from a work thread. */
int file_body_open(const char *path, int *ret_fd, int64_t *ret_size, struct error *error);
/* fd belongs to the body from now on, on failure too. Returns 0 or ERROR_INTERNAL (too many parts). */
int file_body_add_file(struct file_body *body, int fd, int64_t size);
int64_t file_body_size(const struct file_body *body);

/* Copy what is there, at most max bytes: returns how many, 0 when a read was set going (on_ready is called
 * when there is more), -1 when a file could not be read. Not to be called after the last byte. */
typedef void (*file_body_ready)(void *arg);
int64_t file_body_read(struct file_body *body, uv_loop_t *loop, char *bytes, size_t max,
                       file_body_ready on_ready, void *arg);

#endif
