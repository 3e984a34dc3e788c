/* text.h: strings on their way into JSON: UTF-8 that may be broken (paths, file names, cut messages) is
 * mended with U+FFFD here, so that an answer is always valid JSON. Private to api/ and its tests. */
#ifndef API_TEXT_H
#define API_TEXT_H

#include "base/buffer.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes of the well-formed character at text (1..4), or 0 when the bytes there are none. length > 0. */
size_t text_character(const char *text, size_t length);
/* Is all of it well-formed UTF-8? */
bool text_is_utf8(const char *text, size_t length);
/* How many characters (code points) begin in these bytes, whole or not. */
int64_t text_count(const char *text, size_t length);
/* A JSON string; NULL when out of memory. */
json_t *text_json(const char *text);
/* The same, "" becoming null. */
json_t *text_json_or_null(const char *text);
/* Append as a quoted JSON string. */
void text_write_json(struct buffer *out, const char *text, size_t length);

#endif
