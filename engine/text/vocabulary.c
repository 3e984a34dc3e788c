/* vocabulary.c: see vocabulary.h. */
#include "engine/text/vocabulary.h"

#include "engine/text/unicode.h"

#include <stdlib.h>
#include <string.h>

int alphabet_byte(int32_t c)
{
    if ((c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF))
        return c;
    if (c >= 0x100 && c <= 0x120) /* 0x00 .. 0x20 */
        return c - 0x100;
    if (c >= 0x121 && c <= 0x142) /* 0x7F .. 0xA0 */
        return c - 0x121 + 0x7F;
    return c == 0x143 ? 0xAD : -1;
}

static uint64_t hash(const char *text, size_t length)
{
    uint64_t h = 0xCBF29CE484222325u; /* FNV-1a */
    for (size_t i = 0; i < length; i++)
        h = (h ^ (unsigned char)text[i]) * 0x100000001B3u;
    return h ^ h >> 32;
}

/* The slot that holds the spelling, or the free one where it belongs. */
static size_t slot_of(const struct vocabulary *vocabulary, const char *spelling, size_t length)
{
    size_t mask = vocabulary->n_slots - 1, slot = hash(spelling, length) & mask;
    for (;; slot = (slot + 1) & mask) {
        int32_t id = vocabulary->slots[slot];
        if (id < 0)
            return slot;
        const struct vocabulary_entry *entry = &vocabulary->entries[id];
        if (entry->spelling_length == length &&
            !memcmp(vocabulary->text.data + entry->spelling, spelling, length))
            return slot;
    }
}

int32_t vocabulary_find(const struct vocabulary *vocabulary, const char *spelling, size_t length)
{
    return vocabulary->n_slots ? vocabulary->slots[slot_of(vocabulary, spelling, length)] : -1;
}

static int reserve(struct vocabulary *vocabulary, int32_t id)
{
    if (id >= vocabulary->capacity) {
        int32_t capacity = id < 512 ? 1024 : 2 * id;
        struct vocabulary_entry *grown =
            realloc(vocabulary->entries, (size_t)capacity * sizeof *vocabulary->entries);
        if (!grown)
            return ERROR_NO_MEMORY;
        memset(grown + vocabulary->capacity, 0, (size_t)(capacity - vocabulary->capacity) * sizeof *grown);
        vocabulary->entries = grown;
        vocabulary->capacity = capacity;
    }
    if (2 * (vocabulary->n_used + 1) > vocabulary->n_slots) {
        size_t n_slots = vocabulary->n_slots ? 2 * vocabulary->n_slots : 1024;
        int32_t *slots = malloc(n_slots * sizeof *slots);
        if (!slots)
            return ERROR_NO_MEMORY;
        memset(slots, 0xFF, n_slots * sizeof *slots);
        free(vocabulary->slots);
        vocabulary->slots = slots;
        vocabulary->n_slots = n_slots;
        for (int32_t i = 0; i < vocabulary->size; i++) {
            const struct vocabulary_entry *entry = &vocabulary->entries[i];
            if (entry->present)
                slots[slot_of(vocabulary, vocabulary->text.data + entry->spelling, entry->spelling_length)] =
                    i;
        }
    }
    return 0;
}

/* Append what a spelling stands for. One character outside the alphabet (an added token with spaces, say)
 * makes the whole spelling stand for itself, as in Hugging Face's ByteLevel decoder. */
static void append_bytes(struct buffer *text, const char *spelling, size_t length)
{
    size_t start = text->length;
    for (size_t at = 0; at < length;) {
        int32_t codepoint = -1;
        int n = utf8_scan(spelling + at, length - at, &codepoint);
        int byte = n > 0 ? alphabet_byte(codepoint) : -1;
        if (byte < 0) {
            text->length = start;
            buffer_append(text, spelling, length);
            return;
        }
        char c = (char)byte;
        buffer_append(text, &c, 1);
        at += (size_t)n;
    }
}

int vocabulary_add(struct vocabulary *vocabulary, const char *spelling, size_t length, int32_t id,
                   struct error *error)
{
    if (id < 0 || id > VOCABULARY_MAX_ID)
        return error_set(error, ERROR_CORRUPT, "the id of token \"%.60s\" is out of range", spelling);
    if (vocabulary_find(vocabulary, spelling, length) >= 0)
        return error_set(error, ERROR_CORRUPT, "token \"%.60s\" has two ids", spelling);
    if (id < vocabulary->size && vocabulary->entries[id].present)
        return error_set(error, ERROR_CORRUPT, "id %d belongs to two tokens, one of them \"%.60s\"", (int)id,
                         spelling);
    if (reserve(vocabulary, id))
        return error_set(error, ERROR_NO_MEMORY, "out of memory");

    struct buffer *text = &vocabulary->text;
    struct vocabulary_entry entry = {.spelling = (uint32_t)text->length,
                                     .spelling_length = (uint32_t)length,
                                     .bytes = (uint32_t)(text->length + length),
                                     .present = true};
    buffer_append(text, spelling, length);
    append_bytes(text, spelling, length);
    if (text->failed)
        return error_set(error, ERROR_NO_MEMORY, "out of memory");
    entry.bytes_length = (uint32_t)(text->length - entry.bytes);
    size_t slot = slot_of(vocabulary, spelling, length);
    vocabulary->entries[id] = entry;
    vocabulary->slots[slot] = id;
    vocabulary->n_used++;
    if (id >= vocabulary->size)
        vocabulary->size = id + 1;
    return 0;
}

void vocabulary_clear(struct vocabulary *vocabulary)
{
    free(vocabulary->entries);
    free(vocabulary->slots);
    buffer_free(&vocabulary->text);
    *vocabulary = (struct vocabulary){0};
}
