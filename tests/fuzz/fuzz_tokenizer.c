/* fuzz_tokenizer.c: input that begins with '{' is a tokenizer.json to load; anything else is text to encode. */
#include "fuzz.h"

#include "engine/text/tokenizer.h"
#include "engine/text/unicode.h"

#include <string.h>

static void check_streams(const struct tokenizer *tokenizer, const struct token_list *ids,
                          const struct buffer *whole)
{
    struct buffer pieces = {0};
    struct token_stream stream = {0};
    for (size_t i = 0; i < ids->count; i++)
        token_stream_push(&stream, tokenizer, ids->ids[i], false, &pieces);
    token_stream_flush(&stream, &pieces);
    FUZZ_CHECK(pieces.length == whole->length);
    FUZZ_CHECK(pieces.length == 0 || !memcmp(pieces.data, whole->data, pieces.length));
    buffer_free(&pieces);
}

/* Encode and decode. exact: the tokenizer changes nothing but invalid bytes. */
static void use(const struct tokenizer *tokenizer, const char *text, size_t length, bool exact)
{
    struct token_list ids = {0};
    struct buffer back = {0};
    FUZZ_CHECK(tokenizer_encode(tokenizer, text, length, &ids, NULL) == 0);
    FUZZ_CHECK(tokenizer_decode(tokenizer, ids.ids, ids.count, false, &back, NULL) == 0);
    FUZZ_CHECK(back.length == 0 || utf8_valid_prefix(back.data, back.length) == back.length);
    check_streams(tokenizer, &ids, &back);
    if (exact) {
        struct buffer valid = {0};
        unsigned char held[4];
        size_t n_held = 0;
        utf8_feed(held, &n_held, text, length, &valid);
        utf8_finish(&n_held, &valid);
        FUZZ_CHECK(valid.length == back.length);
        FUZZ_CHECK(valid.length == 0 || !memcmp(valid.data, back.data, valid.length));
        buffer_free(&valid);
    }
    token_list_free(&ids);
    buffer_free(&back);
}

static void load(const uint8_t *data, size_t size)
{
    static const char text[] = " Hello  w\u00f6rld<s> \n\n e\u0301 123<|endoftext|>\xFF";
    struct tokenizer *tokenizer = NULL;
    struct error error = {0};
    char path[32];
    int fd = fuzz_file(data, size, path);
    int status = tokenizer_load(path, &tokenizer, &error);
    close(fd);
    if (status) {
        FUZZ_CHECK(!tokenizer && error.code == status && error.message[0]);
        return;
    }
    use(tokenizer, text, sizeof text - 1, false);
    for (int32_t id = 0; id < tokenizer_size(tokenizer) && id < 1000; id++) {
        size_t length;
        const char *bytes = tokenizer_bytes(tokenizer, id, &length);
        FUZZ_CHECK(bytes || length == 0);
    }
    tokenizer_free(tokenizer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct tokenizer *hatchling;
    if (!hatchling)
        FUZZ_CHECK(tokenizer_load(fuzz_source("models/hatchling"), &hatchling, NULL) == 0);
    if (size > 0 && data[0] == '{')
        load(data, size);
    else
        use(hatchling, (const char *)data, size, true);
    return 0;
}
