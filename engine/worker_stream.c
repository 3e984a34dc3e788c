/* worker_stream.c: see worker_stream.h. */
#include "engine/worker_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    READ_BYTES = 64 << 10,
    WRITE_SOON_BYTES = 64 << 10,               /* gathered frames leave at once from here on */
    COMPACT_BYTES = 1 << 20,                   /* written bytes that are worth moving the rest for */
    OUT_LIMIT_BYTES = 32 << 20,                /* unread frames: from here on the reader is waited for */
    IN_LIMIT_BYTES = 2 * PROTOCOL_MAX_PAYLOAD, /* taken in while waiting */
};

static int fail(struct worker_stream *stream, int code, const char *what)
{
    if (!stream->failure) {
        stream->failure = code;
        error_set(&stream->error, code, "%s", what);
    }
    return stream->failure;
}

int worker_stream_open(struct worker_stream *stream, int fd, struct error *error)
{
    *stream = (struct worker_stream){.fd = fd};
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return error_set(error, ERROR_IO, "descriptor %d is not a stream: %s", fd, strerror(errno));
    return 0;
}

void worker_stream_free(struct worker_stream *stream)
{
    buffer_free(&stream->in);
    buffer_free(&stream->out);
}

static void wait_for_either(const struct worker_stream *stream, int timeout_ms)
{
    struct pollfd wanted = {.fd = stream->fd};
    if (stream->in.length < IN_LIMIT_BYTES)
        wanted.events |= POLLIN;
    if (stream->sent < stream->out.length)
        wanted.events |= POLLOUT;
    poll(&wanted, 1, timeout_ms);
}

void worker_stream_wait(struct worker_stream *stream, int timeout_ms)
{
    if (!stream->fresh && !stream->failure)
        wait_for_either(stream, timeout_ms);
}

static int take_in(struct worker_stream *stream)
{
    while (stream->in.length < IN_LIMIT_BYTES) {
        if (buffer_reserve(&stream->in, READ_BYTES))
            return fail(stream, ERROR_NO_MEMORY, "no memory for a frame");
        ssize_t n = recv(stream->fd, stream->in.data + stream->in.length, READ_BYTES, 0);
        if (n > 0) {
            stream->in.length += (size_t)n;
            stream->in.data[stream->in.length] = '\0';
            stream->fresh = true;
            if (n < READ_BYTES)
                return 0;
        } else if (n == 0) {
            return fail(stream, ERROR_IO, "the daemon has closed the stream");
        } else if (errno == EAGAIN) {
            return 0;
        } else if (errno != EINTR) {
            return fail(stream, ERROR_IO, strerror(errno));
        }
    }
    return 0;
}

static int give_out(struct worker_stream *stream)
{
    while (stream->sent < stream->out.length) {
        ssize_t n = send(stream->fd, stream->out.data + stream->sent, stream->out.length - stream->sent,
                         MSG_NOSIGNAL);
        if (n >= 0)
            stream->sent += (size_t)n;
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR)
            return fail(stream, ERROR_IO, strerror(errno));
    }
    if (stream->sent < stream->out.length) {
        if (stream->sent >= COMPACT_BYTES) {
            buffer_consume(&stream->out, stream->sent);
            stream->sent = 0;
        }
        return 0;
    }
    stream->sent = 0;
    buffer_clear(&stream->out);
    return 0;
}

int worker_stream_pump(struct worker_stream *stream)
{
    if (!stream->failure)
        take_in(stream);
    if (!stream->failure)
        give_out(stream);
    return stream->failure;
}

void worker_stream_flush(struct worker_stream *stream)
{
    if (!stream->failure)
        give_out(stream);
}

int worker_stream_next(struct worker_stream *stream, struct frame *ret_frame)
{
    if (stream->failure)
        return stream->failure;
    int status = frame_decode(&stream->in, ret_frame, &stream->error);
    if (status < 0)
        stream->failure = status;
    if (status <= 0)
        stream->fresh = false;
    return status;
}

void worker_stream_send(struct worker_stream *stream, enum frame_type type, uint64_t id, json_t *payload)
{
    if (stream->failure) {
        json_decref(payload);
        return;
    }
    int status = payload ? frame_encode(type, id, payload, &stream->out) : ERROR_NO_MEMORY;
    if (status == ERROR_INVALID && id) {
        /* Too long for a frame: that is the request's fault, and no reason to end. */
        struct error error;
        error_set(&error, ERROR_INVALID, "the answer is too long: it takes more than %d bytes",
                  PROTOCOL_MAX_PAYLOAD);
        status = frame_encode(FRAME_FAILED, id, frame_error_payload(&error), &stream->out);
    }
    if (status) {
        fail(stream, ERROR_NO_MEMORY, "a frame could not be built");
        return;
    }
    if (stream->out.length - stream->sent >= WRITE_SOON_BYTES)
        give_out(stream);
    while (!stream->failure && stream->out.length - stream->sent > OUT_LIMIT_BYTES) {
        wait_for_either(stream, -1);
        worker_stream_pump(stream);
    }
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void worker_stream_drain(struct worker_stream *stream, int timeout_ms)
{
    int64_t end = now_ms() + timeout_ms;
    while (!stream->failure && !give_out(stream) && stream->out.length) {
        int64_t left = end - now_ms();
        if (left <= 0)
            return;
        struct pollfd wanted = {.fd = stream->fd, .events = POLLOUT};
        poll(&wanted, 1, (int)left);
    }
}
