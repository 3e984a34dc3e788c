/* python_text.h: what Python's str does to text, where a prompt depends on it. UTF-8; pure functions; any thread. */
#ifndef ENGINE_EVALUATION_PYTHON_TEXT_H
#define ENGINE_EVALUATION_PYTHON_TEXT_H

#include "base/buffer.h"

#include <stddef.h>
#include <stdint.h>

/* The bytes of white space at the ends, as str.lstrip() and str.rstrip() take them away. This is not Unicode's White_Space:
 * U+001C..U+001F are in it. */
size_t python_leading_space(const char *text, size_t length);
size_t python_trailing_space(const char *text, size_t length);
/* len(): characters. */
int64_t python_length(const char *text, size_t length);
/* Append str.capitalize(): the first character in title case, all others in lower case. By characters' simple mappings, that is
 * without those that make two characters of one. */
void python_capitalize(const char *text, size_t length, struct buffer *out);

#endif
