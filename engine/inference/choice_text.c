/* choice_text.c: see choice_text.h. */
#include "engine/inference/choice_text.h"

#include "base/error.h"

#include <string.h>

void choice_text_free(struct choice_text *text)
{
    buffer_free(&text->undecided);
    buffer_free(&text->ready);
}

int choice_text_echo(struct choice_text *text, const struct tokenizer *tokenizer, const int32_t *ids,
                     int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        token_stream_push(&text->stream, tokenizer, ids[i], false, &text->ready);
    return text->ready.failed ? ERROR_NO_MEMORY : 0;
}

/* Move what is decided from undecided to ready. */
static int settle(struct choice_text *text, const struct stop_strings *stops)
{
    size_t keep;
    bool found = stop_strings_find(stops, text->undecided.data, text->undecided.length, &keep);
    buffer_append(&text->ready, text->undecided.data, keep);
    buffer_consume(&text->undecided, found ? text->undecided.length : keep);
    if (text->ready.failed || text->undecided.failed)
        return ERROR_NO_MEMORY;
    return found ? 1 : 0;
}

int choice_text_finish(struct choice_text *text, const struct stop_strings *stops)
{
    token_stream_flush(&text->stream, &text->undecided);
    int status = settle(text, stops);
    if (status)
        return status;
    buffer_append(&text->ready, text->undecided.data, text->undecided.length);
    buffer_clear(&text->undecided);
    return text->ready.failed ? ERROR_NO_MEMORY : 0;
}

/* Special tokens are not shown, so that no search in the text finds one; yet a chat's turns may end with
 * one. */
static bool is_stop_token(const struct tokenizer *tokenizer, const struct stop_strings *stops, int32_t id)
{
    size_t length;
    const char *bytes = tokenizer_is_special(tokenizer, id) ? tokenizer_bytes(tokenizer, id, &length) : NULL;
    for (int32_t i = 0; bytes && i < stops->count; i++)
        if (stops->lengths[i] == length && !memcmp(stops->strings[i], bytes, length))
            return true;
    return false;
}

int choice_text_push(struct choice_text *text, const struct tokenizer *tokenizer,
                     const struct stop_strings *stops, int32_t id)
{
    if (!stops->count) {
        token_stream_push(&text->stream, tokenizer, id, true, &text->ready);
        return text->ready.failed ? ERROR_NO_MEMORY : 0;
    }
    if (is_stop_token(tokenizer, stops, id)) {
        int status = choice_text_finish(text, stops);
        return status < 0 ? status : 1;
    }
    token_stream_push(&text->stream, tokenizer, id, true, &text->undecided);
    return settle(text, stops);
}
