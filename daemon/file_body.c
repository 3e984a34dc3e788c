/* file_body.c: see file_body.h. */
#include "daemon/file_body.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_PARTS = 16, READ_BYTES = 256 << 10 };

struct part {
    int fd; /* -1: the bytes */
    char *bytes;
    int64_t length;
};

struct file_body {
    struct part parts[MAX_PARTS];
    int n_parts;
    int64_t size;
    int part;       /* being read */
    int64_t offset; /* in it */
    char *buffer;   /* what was read of a file and not yet taken: [begin,end) */
    int64_t begin, end;
    uv_work_t work;
    bool busy, freed;
    int code; /* of the read */
    file_body_ready on_ready;
    void *arg;
};

struct file_body *file_body_create(void)
{
    return calloc(1, sizeof(struct file_body));
}

static void destroy(struct file_body *body)
{
    for (int i = 0; i < body->n_parts; i++) {
        free(body->parts[i].bytes);
        if (body->parts[i].fd >= 0)
            close(body->parts[i].fd);
    }
    free(body->buffer);
    free(body);
}

void file_body_free(struct file_body *body)
{
    if (!body)
        return;
    body->freed = true;
    if (!body->busy)
        destroy(body);
}

static int add_part(struct file_body *body, struct part part)
{
    if (body->n_parts == MAX_PARTS)
        return ERROR_INTERNAL;
    body->parts[body->n_parts++] = part;
    body->size += part.length;
    return 0;
}

int file_body_add_bytes(struct file_body *body, const void *bytes, size_t length)
{
    char *copy = malloc(length ? length : 1);
    if (!copy)
        return ERROR_NO_MEMORY;
    memcpy(copy, bytes, length);
    int code = add_part(body, (struct part){-1, copy, (int64_t)length});
    if (code)
        free(copy);
    return code;
}

int file_body_open(const char *path, int *ret_fd, int64_t *ret_size, struct error *error)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_set(error, errno == ENOENT ? ERROR_NOT_FOUND : ERROR_IO, "cannot open %s: %s", path,
                         strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        return error_set(error, ERROR_IO, "%s is not a regular file", path);
    }
    *ret_fd = fd;
    *ret_size = st.st_size;
    return 0;
}

int file_body_add_file(struct file_body *body, int fd, int64_t size)
{
    int code = add_part(body, (struct part){fd, NULL, size});
    if (code)
        close(fd);
    return code;
}

int64_t file_body_size(const struct file_body *body)
{
    return body->size;
}

/* Work thread. */
static void read_chunk(uv_work_t *work)
{
    struct file_body *body = work->data;
    const struct part *part = &body->parts[body->part];
    int64_t want = part->length - body->offset;
    ssize_t n;
    if (want > READ_BYTES)
        want = READ_BYTES;
    do
        n = pread(part->fd, body->buffer, (size_t)want, body->offset);
    while (n < 0 && errno == EINTR);
    body->begin = 0;
    body->end = n > 0 ? n : 0;
    body->code = n > 0 ? 0 : ERROR_IO; /* shorter than it was: as bad as unreadable */
}

static void on_read(uv_work_t *work, int status)
{
    struct file_body *body = work->data;
    body->busy = false;
    if (status)
        body->code = ERROR_IO;
    if (body->freed)
        destroy(body);
    else
        body->on_ready(body->arg);
}

static int64_t take(struct file_body *body, const char *from, int64_t length, char *bytes, size_t max)
{
    int64_t n = length < (int64_t)max ? length : (int64_t)max;
    memcpy(bytes, from, (size_t)n);
    body->offset += n;
    if (body->offset == body->parts[body->part].length) {
        body->part++;
        body->offset = 0;
    }
    return n;
}

int64_t file_body_read(struct file_body *body, uv_loop_t *loop, char *bytes, size_t max,
                       file_body_ready on_ready, void *arg)
{
    while (body->part < body->n_parts && !body->parts[body->part].length)
        body->part++;
    if (body->code || body->part == body->n_parts)
        return -1;
    if (body->busy)
        return 0;
    const struct part *part = &body->parts[body->part];
    if (part->fd < 0)
        return take(body, part->bytes + body->offset, part->length - body->offset, bytes, max);
    if (body->begin < body->end) {
        int64_t n = take(body, body->buffer + body->begin, body->end - body->begin, bytes, max);
        body->begin += n;
        return n;
    }
    if (!body->buffer)
        body->buffer = malloc(READ_BYTES);
    body->on_ready = on_ready;
    body->arg = arg;
    body->work.data = body;
    if (!body->buffer || uv_queue_work(loop, &body->work, read_chunk, on_read)) {
        body->code = ERROR_NO_MEMORY;
        return -1;
    }
    body->busy = true;
    return 0;
}
