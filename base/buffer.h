/* buffer.h: a growable byte buffer that is always followed by a NUL (not counted), with sticky out-of-memory:
 * after a failed append every later append is a no-op and `failed` stays true, so a writer checks once, at
 * the end. */
#ifndef BASE_BUFFER_H
#define BASE_BUFFER_H

#include <stdbool.h>
#include <stddef.h>

struct buffer {
    char *data; /* NULL until the first append */
    size_t length;
    size_t capacity;
    bool failed;
};

/* A zeroed struct buffer is a valid empty one. */
void buffer_append(struct buffer *buffer, const void *data, size_t length);
void buffer_append_string(struct buffer *buffer, const char *string);
void buffer_printf(struct buffer *buffer, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Drop the first n bytes (n <= length). */
void buffer_consume(struct buffer *buffer, size_t n);
/* Make room for `extra` more bytes. Returns 0 or ERROR_NO_MEMORY. */
int buffer_reserve(struct buffer *buffer, size_t extra);
/* Keep the memory, forget the bytes. */
void buffer_clear(struct buffer *buffer);
/* Give the memory back; the buffer is empty and usable afterwards. */
void buffer_free(struct buffer *buffer);
/* Hand the bytes (NUL-terminated, free() them) to the caller; NULL when an append had failed. Leaves it
 * empty. */
char *buffer_take(struct buffer *buffer, size_t *ret_length);

#endif
