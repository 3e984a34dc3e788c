/* choice_text.h: the text of one choice as its tokens come: characters are whole, stop strings are cut off,
 * and what may still become a stop string is held back. Device's owner thread. */
#ifndef ENGINE_INFERENCE_CHOICE_TEXT_H
#define ENGINE_INFERENCE_CHOICE_TEXT_H

#include "base/buffer.h"
#include "engine/inference/stop_strings.h"
#include "engine/text/tokenizer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Zeroed = empty. */
struct choice_text {
    struct token_stream stream; /* the bytes of a character that is not whole yet */
    struct buffer undecided;    /* whole characters that may begin a stop string */
    struct buffer ready;        /* certain; the owner reads and clears it */
};

void choice_text_free(struct choice_text *text);
/* The prompt's own tokens, for echo: shown as they are, never searched for stop strings. Returns 0 or
 * ERROR_NO_MEMORY. */
int choice_text_echo(struct choice_text *text, const struct tokenizer *tokenizer, const int32_t *ids,
                     int64_t count);
/* One generated token. Returns 1 when a stop string has appeared, or is this special token (ready then ends
 * before it, and the text is closed), 0, or ERROR_NO_MEMORY. */
int choice_text_push(struct choice_text *text, const struct tokenizer *tokenizer,
                     const struct stop_strings *stops, int32_t id);
/* No token follows: what was held back comes out. Returns as choice_text_push. */
int choice_text_finish(struct choice_text *text, const struct stop_strings *stops);

#endif
