/* vocabulary.h: the tokens of a tokenizer.json, by spelling and by id. Filled once while loading, then read
 * by any thread. */
#ifndef ENGINE_TEXT_VOCABULARY_H
#define ENGINE_TEXT_VOCABULARY_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* More than any model has; keeps a corrupt file from asking for the moon. */
enum { VOCABULARY_MAX_ID = (1 << 24) - 1 };

struct vocabulary_entry {
    uint32_t spelling, spelling_length; /* slice of text: as the file has it ("Ġthe") */
    uint32_t bytes, bytes_length;       /* slice of text: what it stands for (" the") */
    bool present, special;
};

struct vocabulary {
    struct vocabulary_entry *entries; /* [size], by id; ids may have holes */
    int32_t size, capacity;
    struct buffer text;
    int32_t *slots; /* [n_slots], open addressing by spelling: an id, or -1 */
    size_t n_slots, n_used;
};

/* The byte a character of the byte-level alphabet stands for, or -1. GPT-2's bytes_to_unicode: printable
 * Latin-1 stands for itself, the other 68 bytes are U+0100 and up in order. */
int alphabet_byte(int32_t codepoint);

/* Add a token (valid UTF-8). ERROR_CORRUPT when the id is out of range or taken, or the spelling is known. */
int vocabulary_add(struct vocabulary *vocabulary, const char *spelling, size_t length, int32_t id,
                   struct error *error);
/* The id of a spelling, or -1. */
int32_t vocabulary_find(const struct vocabulary *vocabulary, const char *spelling, size_t length);
void vocabulary_clear(struct vocabulary *vocabulary);

#endif
