/* worker_stream.h: a worker's end of the byte stream, never blocking where the other side could be waiting
 * too. The worker's thread alone. */
#ifndef ENGINE_WORKER_STREAM_H
#define ENGINE_WORKER_STREAM_H

#include "engine/protocol.h"

#include <stdbool.h>

struct worker_stream {
    int fd;
    struct buffer in;
    struct buffer out;
    bool fresh;  /* in holds bytes that worker_stream_next has not looked at */
    size_t sent; /* of out, already given to the system */
    int failure; /* sticky: ERROR_IO once the other side is gone, ERROR_CORRUPT, ERROR_NO_MEMORY */
    struct error error;
};

/* fd is made non-blocking and stays the caller's. */
int worker_stream_open(struct worker_stream *stream, int fd, struct error *error);
void worker_stream_free(struct worker_stream *stream);
/* Sleep until there is something to look at, or room for what waits to be written, or the time is over. */
void worker_stream_wait(struct worker_stream *stream, int timeout_ms);
/* Take what has arrived and write what can be written, without waiting. Returns 0 or the failure. */
int worker_stream_pump(struct worker_stream *stream);
/* The writing half of it. */
void worker_stream_flush(struct worker_stream *stream);
/* The next whole frame among what has arrived: 1, 0 when there is none, or the failure. */
int worker_stream_next(struct worker_stream *stream, struct frame *ret_frame);
/* Queue a frame; payload is stolen (NULL = it could not be built: no memory). An answer that is too long for
 * a frame becomes FAILED. It leaves with the next pump, at once when much has gathered; a reader that does
 * not keep up is waited for while its own frames are taken in. */
void worker_stream_send(struct worker_stream *stream, enum frame_type type, uint64_t id, json_t *payload);
/* Write everything, for at most timeout_ms. */
void worker_stream_drain(struct worker_stream *stream, int timeout_ms);

#endif
