/* python_text.c: see python_text.h. */
#include "engine/evaluation/python_text.h"

#include "engine/text/unicode.h"

#include <stdbool.h>
#include <utf8proc.h>

static bool is_space(int32_t c)
{
    return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
           c == 0x3000;
}

size_t python_leading_space(const char *text, size_t length)
{
    size_t at = 0;
    while (at < length) {
        int32_t codepoint;
        int n = utf8_scan(text + at, length - at, &codepoint);
        if (n <= 0 || !is_space(codepoint))
            break;
        at += (size_t)n;
    }
    return at;
}

size_t python_trailing_space(const char *text, size_t length)
{
    size_t left = length;
    while (left > 0) {
        size_t bytes;
        int32_t codepoint = unicode_last(text, left, &bytes);
        if (codepoint < 0 || !is_space(codepoint))
            break;
        left -= bytes;
    }
    return length - left;
}

int64_t python_length(const char *text, size_t length)
{
    int64_t characters = 0;
    for (size_t i = 0; i < length; i++)
        characters += ((unsigned char)text[i] & 0xc0) != 0x80;
    return characters;
}

void python_capitalize(const char *text, size_t length, struct buffer *out)
{
    for (size_t at = 0; at < length;) {
        int32_t codepoint;
        int n = utf8_scan(text + at, length - at, &codepoint);
        if (n <= 0) {
            buffer_append(out, text + at, 1);
            at++;
            continue;
        }
        utf8proc_uint8_t bytes[4];
        utf8proc_ssize_t written =
            utf8proc_encode_char(at ? utf8proc_tolower(codepoint) : utf8proc_totitle(codepoint), bytes);
        buffer_append(out, bytes, (size_t)written);
        at += (size_t)n;
    }
}
