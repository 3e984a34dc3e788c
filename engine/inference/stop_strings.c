/* stop_strings.c: see stop_strings.h. */
#include "engine/inference/stop_strings.h"

#include "base/error.h"

#include <stdlib.h>
#include <string.h>

int stop_strings_create(struct stop_strings *stops, const char *const *strings, int32_t count)
{
    *stops = (struct stop_strings){0};
    if (count <= 0)
        return 0;
    stops->strings = calloc((size_t)count, sizeof *stops->strings);
    stops->lengths = calloc((size_t)count, sizeof *stops->lengths);
    if (!stops->strings || !stops->lengths)
        goto no_memory;
    for (int32_t i = 0; i < count; i++) {
        if (!strings[i][0])
            continue;
        char *copy = strdup(strings[i]);
        if (!copy)
            goto no_memory;
        stops->strings[stops->count] = copy;
        stops->lengths[stops->count++] = strlen(copy);
    }
    return 0;
no_memory:
    stop_strings_free(stops);
    return ERROR_NO_MEMORY;
}

void stop_strings_free(struct stop_strings *stops)
{
    for (int32_t i = 0; i < stops->count; i++)
        free(stops->strings[i]);
    free(stops->strings);
    free(stops->lengths);
    *stops = (struct stop_strings){0};
}

/* The longest end of text that is the beginning of a stop string, but not all of it. */
static size_t undecided(const struct stop_strings *stops, const char *text, size_t length)
{
    size_t longest = 0;
    for (int32_t i = 0; i < stops->count; i++) {
        size_t n = stops->lengths[i] - 1 < length ? stops->lengths[i] - 1 : length;
        for (; n > longest; n--) {
            if (!memcmp(text + length - n, stops->strings[i], n)) {
                longest = n;
                break;
            }
        }
    }
    return longest;
}

bool stop_strings_find(const struct stop_strings *stops, const char *text, size_t length, size_t *ret_keep)
{
    bool found = false;
    size_t begin = 0, end = 0;
    for (int32_t i = 0; i < stops->count; i++) {
        const char *at = length ? memmem(text, length, stops->strings[i], stops->lengths[i]) : NULL;
        if (!at)
            continue;
        size_t this_begin = (size_t)(at - text), this_end = this_begin + stops->lengths[i];
        if (!found || this_end < end || (this_end == end && this_begin < begin)) {
            begin = this_begin;
            end = this_end;
        }
        found = true;
    }
    *ret_keep = found ? begin : length - undecided(stops, text, length);
    return found;
}
