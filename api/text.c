/* text.c: see text.h. Any thread. */
#include "api/text.h"

#include <string.h>

size_t text_character(const char *text, size_t length)
{
    const unsigned char *c = (const unsigned char *)text;
    if (c[0] < 0x80)
        return 1;
    size_t n = c[0] >= 0xf0 ? 4 : c[0] >= 0xe0 ? 3 : 2;
    if (c[0] < 0xc2 || c[0] > 0xf4 || n > length)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((c[i] & 0xc0) != 0x80)
            return 0;
    /* Overlong forms, surrogates and what lies beyond U+10FFFF. */
    if ((c[0] == 0xe0 && c[1] < 0xa0) || (c[0] == 0xed && c[1] > 0x9f) || (c[0] == 0xf0 && c[1] < 0x90) ||
        (c[0] == 0xf4 && c[1] > 0x8f))
        return 0;
    return n;
}

bool text_is_utf8(const char *text, size_t length)
{
    for (size_t i = 0, n; i < length; i += n) {
        n = text_character(text + i, length - i);
        if (!n)
            return false;
    }
    return true;
}

int64_t text_count(const char *text, size_t length)
{
    int64_t count = 0;
    for (size_t i = 0; i < length; i++)
        count += ((unsigned char)text[i] & 0xc0) != 0x80;
    return count;
}

json_t *text_json(const char *text)
{
    size_t length = strlen(text);
    if (text_is_utf8(text, length))
        return json_stringn_nocheck(text, length);
    struct buffer mended = {0};
    for (size_t i = 0; i < length;) {
        size_t n = text_character(text + i, length - i);
        buffer_append(&mended, n ? text + i : "\xef\xbf\xbd", n ? n : 3);
        i += n ? n : 1;
    }
    json_t *json = mended.failed ? NULL : json_stringn_nocheck(mended.data, mended.length);
    buffer_free(&mended);
    return json;
}

json_t *text_json_or_null(const char *text)
{
    return *text ? text_json(text) : json_null();
}

void text_write_json(struct buffer *out, const char *text, size_t length)
{
    buffer_append(out, "\"", 1);
    size_t plain = 0; /* bytes before i that need no change and are not yet written */
    for (size_t i = 0; i < length;) {
        unsigned char c = (unsigned char)text[i];
        size_t n = text_character(text + i, length - i);
        if (n && c >= 0x20 && c != '"' && c != '\\') {
            i += n;
            plain += n;
            continue;
        }
        buffer_append(out, text + i - plain, plain);
        plain = 0;
        if (!n)
            buffer_append(out, "\xef\xbf\xbd", 3);
        else if (c == '"' || c == '\\')
            buffer_append(out, (char[]){'\\', (char)c}, 2);
        else if (c == '\n')
            buffer_append(out, "\\n", 2);
        else
            buffer_printf(out, "\\u%04x", (unsigned)c);
        i++;
    }
    buffer_append(out, text + length - plain, plain);
    buffer_append(out, "\"", 1);
}
