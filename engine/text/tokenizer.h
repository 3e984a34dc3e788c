/* tokenizer.h: a Hugging Face tokenizer.json with a byte-level BPE model (GPT-2, GPT-NeoX, hatchling).
 *
 * A loaded tokenizer is immutable: any thread may encode and decode with it. */
#ifndef ENGINE_TEXT_TOKENIZER_H
#define ENGINE_TEXT_TOKENIZER_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

struct token_list {
    int32_t *ids; /* free with token_list_free */
    size_t count, capacity;
};
void token_list_free(struct token_list *list);
/* Returns 0 or ERROR_NO_MEMORY. */
int token_list_push(struct token_list *list, int32_t id);

/* Load a tokenizer.json (at most 64 MiB), or the one in a folder. Model types, normalizers, pre-tokenizers
 * and decoders that are not implemented exactly are refused, by name. */
int tokenizer_load(const char *path, struct tokenizer **ret_tokenizer, struct error *error);
void tokenizer_free(struct tokenizer *tokenizer);

/* One more than the highest id. */
int32_t tokenizer_size(const struct tokenizer *tokenizer);
/* The id of an added or vocabulary token spelled exactly so, or -1. */
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *content);
/* The raw bytes one id stands for (special tokens: their content). Not NUL-terminated and perhaps not whole
 * UTF-8. NULL and length 0 for an id out of range. */
const char *tokenizer_bytes(const struct tokenizer *tokenizer, int32_t id, size_t *ret_length);
bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id);

/* Append the ids of text (UTF-8; invalid bytes are replaced by U+FFFD, as clients' JSON decoders do). Added
 * tokens, special ones too, are recognised in the text. Nothing (no BOS) is added. O(n log n). */
int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t length,
                     struct token_list *ids, struct error *error);
/* The same for text that goes on from other text: where the tokenizer begins a text with a space of its own
 * (add_prefix_space), none is put here. */
int tokenizer_encode_continued(const struct tokenizer *tokenizer, const char *text, size_t length,
                               struct token_list *ids, struct error *error);
/* Where this text may be cut, whatever follows it: the ids of a text that begins with it are those of its first tokenizer_cut() bytes,
 * and then those of the rest as continued text. The last such place; 0 = there is none. */
size_t tokenizer_cut(const struct tokenizer *tokenizer, const char *text, size_t length);
/* Append the text of ids; special tokens are left out when skip_special. Invalid UTF-8 becomes U+FFFD.
 * ERROR_INVALID when an id is outside 0..tokenizer_size-1. */
int tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, size_t count, bool skip_special,
                     struct buffer *text, struct error *error);

/* Streaming decode: bytes of a character that is not yet whole are held back. Zeroed = ready. */
struct token_stream {
    unsigned char held[8];
    size_t n_held;
};
/* Append what id makes certain. Special tokens are left out when skip_special. */
void token_stream_push(struct token_stream *stream, const struct tokenizer *tokenizer, int32_t id,
                       bool skip_special, struct buffer *text);
/* The end: what is held comes out as U+FFFD. */
void token_stream_flush(struct token_stream *stream, struct buffer *text);

#endif
