/* tokenizer.c: text to ids and back. See tokenizer.h; loading is in tokenizer_load.c.
 *
 * Text passes through the stages of Hugging Face's pipeline, each cutting it into smaller pieces:
 *   invalid UTF-8 -> U+FFFD | added tokens | NFC | added tokens matched after it | GPT-2 split | merges */
#include "engine/text/tokenizer.h"

#include "engine/text/tokenizer_parts.h"
#include "engine/text/unicode.h"

#include <stdlib.h>
#include <string.h>

/* One call's working memory. */
struct encoder {
    const struct tokenizer *tokenizer;
    struct token_list *ids;
    pcre2_match_data *match;
    struct bpe_scratch scratch;
    struct buffer normalized, prefixed;
    struct error *error;
};

void token_list_free(struct token_list *list)
{
    free(list->ids);
    *list = (struct token_list){0};
}

int token_list_push(struct token_list *list, int32_t id)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 64;
        int32_t *ids = realloc(list->ids, capacity * sizeof *ids);
        if (!ids)
            return ERROR_NO_MEMORY;
        list->ids = ids;
        list->capacity = capacity;
    }
    list->ids[list->count++] = id;
    return 0;
}

void tokenizer_free(struct tokenizer *tokenizer)
{
    if (!tokenizer)
        return;
    vocabulary_clear(&tokenizer->vocabulary);
    bpe_clear(&tokenizer->bpe);
    added_tokens_clear(&tokenizer->raw);
    added_tokens_clear(&tokenizer->normalized);
    pcre2_code_free(tokenizer->split);
    free(tokenizer);
}

int32_t tokenizer_size(const struct tokenizer *tokenizer)
{
    return tokenizer->vocabulary.size;
}

int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *content)
{
    return vocabulary_find(&tokenizer->vocabulary, content, strlen(content));
}

static const struct vocabulary_entry *entry_of(const struct tokenizer *tokenizer, int32_t id)
{
    if (id < 0 || id >= tokenizer->vocabulary.size || !tokenizer->vocabulary.entries[id].present)
        return NULL;
    return &tokenizer->vocabulary.entries[id];
}

const char *tokenizer_bytes(const struct tokenizer *tokenizer, int32_t id, size_t *ret_length)
{
    const struct vocabulary_entry *entry = entry_of(tokenizer, id);
    *ret_length = entry ? entry->bytes_length : 0;
    return entry ? tokenizer->vocabulary.text.data + entry->bytes : NULL;
}

bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id)
{
    const struct vocabulary_entry *entry = entry_of(tokenizer, id);
    return entry && entry->special;
}

/* ---- encode ---- */

static int no_memory(struct encoder *encoder)
{
    return error_set(encoder->error, ERROR_NO_MEMORY, "out of memory while tokenizing");
}

static int encode_word(struct encoder *encoder, const char *word, size_t length)
{
    if (bpe_encode(&encoder->tokenizer->bpe, &encoder->scratch, word, length, encoder->ids))
        return no_memory(encoder);
    return 0;
}

/* ByteLevel's pre-tokenizer. continued: the text goes on from other text. */
static int encode_split(struct encoder *encoder, const char *text, size_t length, bool continued)
{
    const struct tokenizer *tokenizer = encoder->tokenizer;
    if (tokenizer->add_prefix_space && !continued && length > 0 && text[0] != ' ') {
        buffer_clear(&encoder->prefixed);
        buffer_append(&encoder->prefixed, " ", 1);
        buffer_append(&encoder->prefixed, text, length);
        if (encoder->prefixed.failed)
            return no_memory(encoder);
        text = encoder->prefixed.data;
        length = encoder->prefixed.length;
    }
    if (!tokenizer->split)
        return encode_word(encoder, text, length);

    const PCRE2_SIZE *span = pcre2_get_ovector_pointer(encoder->match);
    size_t at = 0;
    while (at < length) {
        /* The text is valid UTF-8 already; checking it again on every call would be quadratic. */
        int found = pcre2_match(tokenizer->split, (PCRE2_SPTR)text, length, at, PCRE2_NO_UTF_CHECK,
                                encoder->match, NULL);
        if (found == PCRE2_ERROR_NOMATCH)
            return encode_word(encoder, text + at, length - at);
        if (found < 0)
            return error_set(encoder->error, ERROR_INTERNAL, "the split pattern failed (PCRE2 error %d)",
                             found);
        int status = 0;
        if (span[0] > at)
            status = encode_word(encoder, text + at, span[0] - at);
        if (!status)
            status = encode_word(encoder, text + span[0], span[1] - span[0]);
        if (status)
            return status;
        at = span[1];
    }
    return 0;
}

static int encode_normalized(struct encoder *encoder, const char *text, size_t length, bool continued)
{
    const struct tokenizer *tokenizer = encoder->tokenizer;
    if (tokenizer->nfc) {
        buffer_clear(&encoder->normalized);
        if (unicode_nfc(text, length, &encoder->normalized))
            return no_memory(encoder);
        text = encoder->normalized.data;
        length = encoder->normalized.length;
    }
    size_t done = 0, from = 0;
    struct added_match match;
    int status = 0;
    while (added_tokens_next(&tokenizer->normalized, text, length, done, &from, &match)) {
        if (done < match.begin)
            status = encode_split(encoder, text + done, match.begin - done, continued && done == 0);
        if (!status && token_list_push(encoder->ids, match.id))
            status = no_memory(encoder);
        if (status)
            return status;
        done = match.end;
    }
    if (done < length)
        status = encode_split(encoder, text + done, length - done, continued && done == 0);
    return status;
}

static int encode_raw(struct encoder *encoder, const char *text, size_t length, bool continued)
{
    size_t done = 0, from = 0;
    struct added_match match;
    int status = 0;
    while (added_tokens_next(&encoder->tokenizer->raw, text, length, done, &from, &match)) {
        if (done < match.begin)
            status = encode_normalized(encoder, text + done, match.begin - done, continued && done == 0);
        if (!status && token_list_push(encoder->ids, match.id))
            status = no_memory(encoder);
        if (status)
            return status;
        done = match.end;
    }
    if (done < length)
        status = encode_normalized(encoder, text + done, length - done, continued && done == 0);
    return status;
}

static int encode(const struct tokenizer *tokenizer, const char *text, size_t length, bool continued,
                  struct token_list *ids, struct error *error)
{
    /* A merge's position has 32 bits, and NFC may lengthen a text threefold. */
    enum { LONGEST = 1 << 29 };
    if (length > LONGEST)
        return error_set(error, ERROR_INVALID, "a text of %zu bytes is too long to tokenize (at most %d)",
                         length, LONGEST);
    if (length == 0)
        return 0;

    struct encoder encoder = {.tokenizer = tokenizer, .ids = ids, .error = error};
    struct buffer repaired = {0};
    size_t count_before = ids->count;
    int status;
    if (tokenizer->split) {
        encoder.match = pcre2_match_data_create(1, NULL);
        if (!encoder.match) {
            status = no_memory(&encoder);
            goto done;
        }
    }
    if (utf8_valid_prefix(text, length) < length) {
        unsigned char held[4];
        size_t n_held = 0;
        utf8_feed(held, &n_held, text, length, &repaired);
        utf8_finish(&n_held, &repaired);
        if (repaired.failed) {
            status = no_memory(&encoder);
            goto done;
        }
        text = repaired.data;
        length = repaired.length;
    }
    status = encode_raw(&encoder, text, length, continued);
done:
    if (status)
        ids->count = count_before;
    pcre2_match_data_free(encoder.match);
    bpe_scratch_free(&encoder.scratch);
    buffer_free(&encoder.normalized);
    buffer_free(&encoder.prefixed);
    buffer_free(&repaired);
    return status;
}

int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t length,
                     struct token_list *ids, struct error *error)
{
    return encode(tokenizer, text, length, false, ids, error);
}

int tokenizer_encode_continued(const struct tokenizer *tokenizer, const char *text, size_t length,
                               struct token_list *ids, struct error *error)
{
    return encode(tokenizer, text, length, true, ids, error);
}

/* A space behind a visible ASCII character: the split's pattern always cuts there, neither side looks at the other, and NFC joins
 * nothing over it. */
size_t tokenizer_cut(const struct tokenizer *tokenizer, const char *text, size_t length)
{
    if (!tokenizer->split || tokenizer->uncuttable)
        return 0;
    for (size_t at = length; at-- > 1;)
        if (text[at] == ' ' && text[at - 1] > ' ' && text[at - 1] < 0x7F)
            return at;
    return 0;
}

/* ---- decode ---- */

void token_stream_push(struct token_stream *stream, const struct tokenizer *tokenizer, int32_t id,
                       bool skip_special, struct buffer *text)
{
    const struct vocabulary_entry *entry = entry_of(tokenizer, id);
    if (entry && !(skip_special && entry->special))
        utf8_feed(stream->held, &stream->n_held, tokenizer->vocabulary.text.data + entry->bytes,
                  entry->bytes_length, text);
}

void token_stream_flush(struct token_stream *stream, struct buffer *text)
{
    utf8_finish(&stream->n_held, text);
}

int tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, size_t count, bool skip_special,
                     struct buffer *text, struct error *error)
{
    for (size_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= tokenizer_size(tokenizer))
            return error_set(error, ERROR_INVALID, "token %d is not in the vocabulary (0..%d)", (int)ids[i],
                             (int)tokenizer_size(tokenizer) - 1);
    struct token_stream stream = {0};
    for (size_t i = 0; i < count; i++)
        token_stream_push(&stream, tokenizer, ids[i], skip_special, text);
    token_stream_flush(&stream, text);
    return text->failed ? error_set(error, ERROR_NO_MEMORY, "out of memory while decoding") : 0;
}
