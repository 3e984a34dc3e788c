/* buffer.c: see buffer.h. */
#include "base/buffer.h"

#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int buffer_reserve(struct buffer *buffer, size_t extra)
{
    if (buffer->failed)
        return ERROR_NO_MEMORY;
    size_t need = buffer->length + extra + 1;
    if (need <= extra) {
        buffer->failed = true;
        return ERROR_NO_MEMORY;
    }
    if (need <= buffer->capacity)
        return 0;
    size_t capacity = buffer->capacity ? buffer->capacity : 256;
    while (capacity < need)
        capacity = capacity > (size_t)-1 / 2 ? need : capacity * 2;
    char *data = realloc(buffer->data, capacity);
    if (!data) {
        buffer->failed = true;
        return ERROR_NO_MEMORY;
    }
    buffer->data = data;
    buffer->capacity = capacity;
    return 0;
}

void buffer_append(struct buffer *buffer, const void *data, size_t length)
{
    if (buffer_reserve(buffer, length))
        return;
    if (length)
        memcpy(buffer->data + buffer->length, data, length);
    buffer->length += length;
    buffer->data[buffer->length] = '\0';
}

void buffer_append_string(struct buffer *buffer, const char *string)
{
    buffer_append(buffer, string, strlen(string));
}

void buffer_printf(struct buffer *buffer, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    if (n >= 0 && !buffer_reserve(buffer, (size_t)n)) {
        vsnprintf(buffer->data + buffer->length, (size_t)n + 1, format, again);
        buffer->length += (size_t)n;
    }
    va_end(again);
    va_end(args);
}

void buffer_consume(struct buffer *buffer, size_t n)
{
    if (!n)
        return;
    memmove(buffer->data, buffer->data + n, buffer->length - n + 1);
    buffer->length -= n;
}

void buffer_clear(struct buffer *buffer)
{
    buffer->length = 0;
    buffer->failed = false;
    if (buffer->data)
        buffer->data[0] = '\0';
}

void buffer_free(struct buffer *buffer)
{
    free(buffer->data);
    *buffer = (struct buffer){0};
}

char *buffer_take(struct buffer *buffer, size_t *ret_length)
{
    if (buffer_reserve(buffer, 0)) {
        buffer_free(buffer);
        return NULL;
    }
    char *data = buffer->data;
    data[buffer->length] = '\0';
    if (ret_length)
        *ret_length = buffer->length;
    *buffer = (struct buffer){0};
    return data;
}
