/* unicode.c: see unicode.h. Character properties come from utf8proc. */
#include "engine/text/unicode.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

static const char replacement[] = "\xEF\xBF\xBD";

int utf8_scan(const char *text, size_t length, int32_t *ret_codepoint)
{
    const unsigned char *s = (const unsigned char *)text;
    unsigned char low = 0x80, high = 0xBF; /* what the next byte may be */
    int32_t codepoint;
    int n;

    if (s[0] < 0x80) {
        *ret_codepoint = s[0];
        return 1;
    }
    if (s[0] >= 0xC2 && s[0] <= 0xDF) {
        n = 2;
        codepoint = s[0] & 0x1F;
    } else if (s[0] >= 0xE0 && s[0] <= 0xEF) {
        n = 3;
        codepoint = s[0] & 0x0F;
        if (s[0] == 0xE0)
            low = 0xA0; /* overlong below */
        if (s[0] == 0xED)
            high = 0x9F; /* surrogates above */
    } else if (s[0] >= 0xF0 && s[0] <= 0xF4) {
        n = 4;
        codepoint = s[0] & 0x07;
        if (s[0] == 0xF0)
            low = 0x90;
        if (s[0] == 0xF4)
            high = 0x8F; /* past U+10FFFF above */
    } else {
        return -1;
    }
    for (int i = 1; i < n; i++) {
        if ((size_t)i == length)
            return 0;
        if (s[i] < low || s[i] > high)
            return -i;
        codepoint = codepoint << 6 | (s[i] & 0x3F);
        low = 0x80;
        high = 0xBF;
    }
    *ret_codepoint = codepoint;
    return n;
}

size_t utf8_valid_prefix(const char *text, size_t length)
{
    size_t at = 0;
    while (at < length) {
        int32_t codepoint;
        int n = utf8_scan(text + at, length - at, &codepoint);
        if (n <= 0)
            break;
        at += (size_t)n;
    }
    return at;
}

void utf8_feed(unsigned char *held, size_t *n_held, const char *bytes, size_t length, struct buffer *out)
{
    size_t at = 0;
    while (at < length) {
        if (*n_held == 0) {
            size_t valid = utf8_valid_prefix(bytes + at, length - at);
            buffer_append(out, bytes + at, valid);
            at += valid;
            if (at == length)
                break;
        }
        /* One character that may begin in held; what is held is always a proper beginning, so whatever comes
         * of it takes all of held and perhaps more. */
        char piece[4];
        size_t n = *n_held, take = length - at < 4 - n ? length - at : 4 - n;
        memcpy(piece, held, n);
        memcpy(piece + n, bytes + at, take);
        int32_t codepoint;
        int result = utf8_scan(piece, n + take, &codepoint);
        if (result == 0) {
            memcpy(held + n, bytes + at, take);
            *n_held = n + take;
            break;
        }
        size_t used = (size_t)(result > 0 ? result : -result);
        if (result > 0)
            buffer_append(out, piece, used);
        else
            buffer_append_string(out, replacement);
        at += used - n;
        *n_held = 0;
    }
}

void utf8_finish(size_t *n_held, struct buffer *out)
{
    if (*n_held > 0)
        buffer_append_string(out, replacement);
    *n_held = 0;
}

static int compare_marks(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

/* Canonical ordering: a stable sort by combining class of every run of characters whose class is not 0.
 * utf8proc's own sorts by swapping neighbours, quadratic in the length of a run. A mark is packed as
 * class:8 | index:32 | codepoint:24, so that comparing numbers is that stable order. */
static void order_marks(uint64_t *marks, size_t count)
{
    for (size_t i = 0; i < count;) {
        if (marks[i] >> 56 == 0) {
            i++;
            continue;
        }
        size_t end = i + 1;
        bool ordered = true;
        for (; end < count && marks[end] >> 56 != 0; end++)
            ordered &= marks[end - 1] >> 56 <= marks[end] >> 56;
        if (!ordered)
            qsort(marks + i, end - i, sizeof *marks, compare_marks);
        i = end;
    }
}

int unicode_nfc(const char *text, size_t length, struct buffer *out)
{
    /* Below U+0300 (first byte 0xCC) nothing changes. */
    size_t plain = 0;
    while (plain < length && (unsigned char)text[plain] < 0xCC)
        plain++;
    if (plain == length) {
        buffer_append(out, text, length);
        return out->failed ? ERROR_NO_MEMORY : 0;
    }

    enum { MOST = 8 }; /* a canonical decomposition has at most 4 characters */
    int result = ERROR_NO_MEMORY;
    size_t count = 0, capacity = length + MOST;
    int32_t *characters = NULL;
    uint64_t *marks = malloc(capacity * sizeof *marks);
    if (!marks)
        goto done;
    for (size_t at = 0; at < length;) {
        int32_t codepoint = 0, pieces[MOST];
        at += (size_t)utf8_scan(text + at, length - at, &codepoint);
        int boundary = 0;
        utf8proc_ssize_t n =
            utf8proc_decompose_char(codepoint, pieces, MOST, UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, &boundary);
        if (count + MOST > capacity) {
            capacity *= 2;
            uint64_t *grown = realloc(marks, capacity * sizeof *marks);
            if (!grown)
                goto done;
            marks = grown;
        }
        for (utf8proc_ssize_t i = 0; i < n && i < MOST; i++, count++) {
            uint64_t class = (uint64_t)utf8proc_get_property(pieces[i])->combining_class;
            marks[count] = class << 56 | (uint64_t)count << 24 | (uint64_t)pieces[i];
        }
    }
    order_marks(marks, count);
    characters = malloc(count * sizeof *characters);
    if (!characters)
        goto done;
    for (size_t i = 0; i < count; i++)
        characters[i] = (int32_t)(marks[i] & 0xFFFFFF);
    utf8proc_ssize_t n =
        utf8proc_normalize_utf32(characters, (utf8proc_ssize_t)count, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    for (utf8proc_ssize_t i = 0; i < n; i++) {
        utf8proc_uint8_t bytes[4];
        buffer_append(out, bytes, (size_t)utf8proc_encode_char(characters[i], bytes));
    }
    result = out->failed ? ERROR_NO_MEMORY : 0;
done:
    free(marks);
    free(characters);
    return result;
}

bool unicode_is_space(int32_t c)
{
    return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
           c == 0x3000;
}

bool unicode_is_word(int32_t c)
{
    if (c < 0)
        return false;
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        /* Other_Alphabetic beyond the marks (circled and squared letters), and the two joiners. */
        return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
               (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189) || c == 0x200C || c == 0x200D;
    }
}

size_t unicode_leading_space(const char *text, size_t length)
{
    size_t at = 0;
    while (at < length) {
        int32_t codepoint;
        int n = utf8_scan(text + at, length - at, &codepoint);
        if (n <= 0 || !unicode_is_space(codepoint))
            break;
        at += (size_t)n;
    }
    return at;
}

int32_t unicode_last(const char *text, size_t length, size_t *ret_bytes)
{
    for (size_t n = 1; n <= 4 && n <= length; n++) {
        int32_t codepoint;
        if (utf8_scan(text + length - n, n, &codepoint) == (int)n) {
            *ret_bytes = n;
            return codepoint;
        }
    }
    *ret_bytes = 1;
    return -1;
}

size_t unicode_trailing_space(const char *text, size_t length)
{
    size_t end = length;
    while (end > 0) {
        size_t n;
        int32_t codepoint = unicode_last(text, end, &n);
        if (!unicode_is_space(codepoint))
            break;
        end -= n;
    }
    return length - end;
}
