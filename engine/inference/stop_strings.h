/* stop_strings.h: the strings that end a completion, looked for in text that comes in pieces. Pure. */
#ifndef ENGINE_INFERENCE_STOP_STRINGS_H
#define ENGINE_INFERENCE_STOP_STRINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct stop_strings {
    char **strings; /* none is empty */
    size_t *lengths;
    int32_t count;
};

/* Copy; empty strings, which would end every text at once, are left out. Returns 0 or ERROR_NO_MEMORY. */
int stop_strings_create(struct stop_strings *stops, const char *const *strings, int32_t count);
void stop_strings_free(struct stop_strings *stops);

/* Has one of them appeared in text? The first to be complete counts, of two that end together the longer, so
 * that the answer is the same however the text was cut into tokens. Then *ret_keep is where it begins.
 * Otherwise *ret_keep is the length of text that can be given away: what follows may still become a stop
 * string. */
bool stop_strings_find(const struct stop_strings *stops, const char *text, size_t length, size_t *ret_keep);

#endif
