/* completion.c: see completion.h. Any thread; one thread at a time for one completion.
 *
 * A choice's scores are kept as the JSON text they will be sent as, because an echoed prompt of thousands of
 * tokens with alternatives would be tens of thousands of json_t otherwise, and because every float must go
 * through one formatter: clients compare a token's own score with its best alternative for equality. */
#include "api/completion.h"

#include "api/text.h"
#include "base/buffer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Comma-separated JSON values, one a token. */
struct scores {
    int64_t count;
    struct buffer tokens, logprobs, tops, offsets; /* completions */
    struct buffer content;                         /* chat */
};

struct choice {
    struct buffer text;
    struct scores scores;
    int64_t offset; /* characters of the tokens so far */
    bool begun;     /* chat, streamed: the role was sent */
    const char *finish_reason;
};

struct completion {
    bool chat, stream, include_usage, has_logprobs;
    struct buffer head; /* {"id":...,"object":...,"created":...,"model":...  */
    int64_t n_choices;
    struct choice *choices;
};

static void scores_clear(struct scores *scores)
{
    scores->count = 0;
    buffer_clear(&scores->tokens);
    buffer_clear(&scores->logprobs);
    buffer_clear(&scores->tops);
    buffer_clear(&scores->offsets);
    buffer_clear(&scores->content);
}

static void choice_free(struct choice *choice)
{
    buffer_free(&choice->text);
    buffer_free(&choice->scores.tokens);
    buffer_free(&choice->scores.logprobs);
    buffer_free(&choice->scores.tops);
    buffer_free(&choice->scores.offsets);
    buffer_free(&choice->scores.content);
}

struct completion *completion_create(const struct completion_request *request, const char *id,
                                     const char *model, int64_t created)
{
    struct completion *completion = calloc(1, sizeof *completion);
    if (!completion)
        return NULL;
    completion->chat = request->chat;
    completion->stream = request->stream;
    completion->include_usage = request->include_usage;
    completion->has_logprobs = request->has_logprobs;
    completion->n_choices = request->n_prompts * request->n;
    completion->choices = calloc((size_t)completion->n_choices, sizeof *completion->choices);
    const char *object = !request->chat    ? "text_completion"
                         : request->stream ? "chat.completion.chunk"
                                           : "chat.completion";
    struct buffer *head = &completion->head;
    buffer_append_string(head, "{\"id\":");
    text_write_json(head, id, strlen(id));
    buffer_printf(head, ",\"object\":\"%s\",\"created\":%lld,\"model\":", object, (long long)created);
    text_write_json(head, model, strlen(model));
    if (!completion->choices || head->failed) {
        completion_free(completion);
        return NULL;
    }
    return completion;
}

void completion_free(struct completion *completion)
{
    if (!completion)
        return;
    for (int64_t i = 0; completion->choices && i < completion->n_choices; i++)
        choice_free(&completion->choices[i]);
    free(completion->choices);
    buffer_free(&completion->head);
    free(completion);
}

/* ---- numbers ---- */

/* The one formatter: the shortest decimal that reads back as the same float. */
static void write_score(struct buffer *out, const json_t *json)
{
    float value = (float)json_number_value(json);
    if (!(value > -9999.0F)) /* -inf, and NaN, which a score never is */
        value = -9999.0F;
    char text[32];
    for (int precision = 6; precision <= 9; precision++) {
        snprintf(text, sizeof text, "%.*g", precision, (double)value);
        if (strtof(text, NULL) == value)
            break;
    }
    buffer_append_string(out, text);
}

/* ---- scores of one token ---- */

static void separate(struct buffer *list)
{
    if (list->length)
        buffer_append(list, ",", 1);
}

struct alternative {
    const json_t *text, *logprob;
};

static bool alternative_read(const json_t *pair, struct alternative *alternative)
{
    alternative->text = json_array_get(pair, 0);
    alternative->logprob = json_array_get(pair, 1);
    return json_is_string(alternative->text) && json_is_number(alternative->logprob);
}

/* {"text":score,...}: of two tokens with one text the larger score stays, and the token itself is there. */
static int write_top_object(struct buffer *out, const json_t *top, const struct alternative *self)
{
    size_t n = json_array_size(top), kept_count = 0;
    struct alternative kept[64];
    if (n >= sizeof kept / sizeof *kept)
        return -1;
    for (size_t i = 0; i <= n; i++) {
        struct alternative one = *self;
        if (i < n && !alternative_read(json_array_get(top, i), &one))
            return -1;
        size_t k = 0;
        while (k < kept_count && !json_equal(kept[k].text, one.text))
            k++;
        if (k == kept_count)
            kept[kept_count++] = one;
        else if (json_number_value(one.logprob) > json_number_value(kept[k].logprob))
            kept[k] = one;
    }
    buffer_append(out, "{", 1);
    for (size_t k = 0; k < kept_count; k++) {
        if (k)
            buffer_append(out, ",", 1);
        text_write_json(out, json_string_value(kept[k].text), json_string_length(kept[k].text));
        buffer_append(out, ":", 1);
        write_score(out, kept[k].logprob);
    }
    buffer_append(out, "}", 1);
    return 0;
}

static void write_bytes(struct buffer *out, const json_t *text, const json_t *bytes)
{
    size_t n = bytes ? json_array_size(bytes) : json_string_length(text);
    buffer_append(out, "[", 1);
    for (size_t i = 0; i < n; i++)
        buffer_printf(out, "%s%d", i ? "," : "",
                      bytes ? (int)json_integer_value(json_array_get(bytes, i))
                            : (int)(unsigned char)json_string_value(text)[i]);
    buffer_append(out, "]", 1);
}

static void write_chat_token(struct buffer *out, const struct alternative *token, const json_t *bytes)
{
    buffer_append_string(out, "{\"token\":");
    text_write_json(out, json_string_value(token->text), json_string_length(token->text));
    buffer_append_string(out, ",\"logprob\":");
    write_score(out, token->logprob);
    buffer_append_string(out, ",\"bytes\":");
    write_bytes(out, token->text, bytes);
}

static int add_chat_token(struct choice *choice, const struct alternative *self, const json_t *bytes,
                          const json_t *top)
{
    struct buffer *out = &choice->scores.content;
    separate(out);
    write_chat_token(out, self, bytes);
    buffer_append_string(out, ",\"top_logprobs\":[");
    for (size_t i = 0; i < json_array_size(top); i++) {
        struct alternative one;
        if (!alternative_read(json_array_get(top, i), &one))
            return -1;
        if (i)
            buffer_append(out, ",", 1);
        write_chat_token(out, &one, NULL);
        buffer_append(out, "}", 1);
    }
    buffer_append(out, "]}", 2);
    return 0;
}

/* Characters that begin in a token: its bytes where its text is not whole. */
static int64_t token_characters(const json_t *text, const json_t *bytes)
{
    if (!bytes)
        return text_count(json_string_value(text), json_string_length(text));
    int64_t count = 0;
    for (size_t i = 0; i < json_array_size(bytes); i++)
        count += (json_integer_value(json_array_get(bytes, i)) & 0xc0) != 0x80;
    return count;
}

static int add_token(const struct completion *completion, struct choice *choice, const json_t *token)
{
    const json_t *bytes = json_object_get(token, "bytes"), *top = json_object_get(token, "top");
    struct alternative self = {json_object_get(token, "text"), json_object_get(token, "logprob")};
    if (!json_is_string(self.text) || (!json_is_number(self.logprob) && !json_is_null(self.logprob)))
        return -1;
    bool scored = json_is_number(self.logprob); /* the first token of a prompt is not */
    struct scores *scores = &choice->scores;
    scores->count++;
    if (completion->chat)
        return scored ? add_chat_token(choice, &self, bytes, top) : -1;
    separate(&scores->tokens);
    text_write_json(&scores->tokens, json_string_value(self.text), json_string_length(self.text));
    separate(&scores->offsets);
    buffer_printf(&scores->offsets, "%lld", (long long)choice->offset);
    choice->offset += token_characters(self.text, bytes);
    separate(&scores->logprobs);
    separate(&scores->tops);
    if (!scored) {
        buffer_append_string(&scores->logprobs, "null");
        buffer_append_string(&scores->tops, "null");
        return 0;
    }
    write_score(&scores->logprobs, self.logprob);
    return write_top_object(&scores->tops, top, &self);
}

/* ---- answers ---- */

static void write_list(struct buffer *out, const char *name, const struct buffer *list)
{
    buffer_printf(out, "%s:[", name);
    buffer_append(out, list->length ? list->data : "", list->length);
    buffer_append(out, "]", 1);
}

static bool any_failed(const struct choice *choice)
{
    const struct scores *scores = &choice->scores;
    return choice->text.failed || scores->tokens.failed || scores->logprobs.failed || scores->tops.failed ||
           scores->offsets.failed || scores->content.failed;
}

static void write_logprobs(const struct completion *completion, struct buffer *out,
                           const struct scores *scores, bool always)
{
    buffer_append_string(out, ",\"logprobs\":");
    if (!completion->has_logprobs || (!always && !scores->count)) {
        buffer_append_string(out, "null");
        return;
    }
    buffer_append(out, "{", 1);
    if (completion->chat) {
        write_list(out, "\"content\"", &scores->content);
        buffer_append_string(out, ",\"refusal\":null");
    } else {
        write_list(out, "\"tokens\"", &scores->tokens);
        write_list(out, ",\"token_logprobs\"", &scores->logprobs);
        write_list(out, ",\"top_logprobs\"", &scores->tops);
        write_list(out, ",\"text_offset\"", &scores->offsets);
    }
    buffer_append(out, "}", 1);
}

static void write_finish(struct buffer *out, const char *reason)
{
    if (reason)
        buffer_printf(out, ",\"finish_reason\":\"%s\"", reason);
    else
        buffer_append_string(out, ",\"finish_reason\":null");
}

static void write_usage(struct buffer *out, int64_t prompt_tokens, int64_t completion_tokens)
{
    buffer_printf(out, ",\"usage\":{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,\"total_tokens\":%lld}",
                  (long long)prompt_tokens, (long long)completion_tokens,
                  (long long)(prompt_tokens + completion_tokens));
}

/* One chunk as one event. */
static void write_event(const struct completion *completion, struct buffer *out, int64_t index,
                        const char *text, size_t length)
{
    struct choice *choice = &completion->choices[index];
    buffer_append_string(out, "data: ");
    buffer_append(out, completion->head.data, completion->head.length);
    buffer_printf(out, ",\"choices\":[{\"index\":%lld,", (long long)index);
    if (completion->chat) {
        buffer_append_string(out, "\"delta\":{");
        if (!choice->begun)
            buffer_append_string(out, "\"role\":\"assistant\",");
        if (length || !choice->begun) {
            buffer_append_string(out, "\"content\":");
            text_write_json(out, text, length);
        }
        buffer_append(out, "}", 1);
        choice->begun = true;
    } else {
        buffer_append_string(out, "\"text\":");
        text_write_json(out, text, length);
    }
    write_logprobs(completion, out, &choice->scores, false);
    write_finish(out, choice->finish_reason);
    buffer_append_string(out, completion->include_usage ? "}],\"usage\":null}\n\n" : "}]}\n\n");
}

int completion_add(struct completion *completion, const json_t *chunk, char **ret_events)
{
    const json_t *index_json = json_object_get(chunk, "index"), *text = json_object_get(chunk, "text");
    const json_t *reason = json_object_get(chunk, "finish_reason"),
                 *tokens = json_object_get(chunk, "tokens");
    int64_t index = json_is_integer(index_json) ? json_integer_value(index_json) : -1;
    if (index < 0 || index >= completion->n_choices || !json_is_string(text))
        return -1;
    struct choice *choice = &completion->choices[index];
    if (choice->finish_reason)
        return -1;
    if (json_is_string(reason)) {
        choice->finish_reason = !strcmp(json_string_value(reason), "stop") ? "stop" : "length";
    }
    for (size_t i = 0; completion->has_logprobs && i < json_array_size(tokens); i++)
        if (add_token(completion, choice, json_array_get(tokens, i)))
            return -1;
    size_t length = json_string_length(text);
    if (!completion->stream) {
        buffer_append(&choice->text, json_string_value(text), length);
        return any_failed(choice) ? -1 : 0;
    }
    struct buffer events = {0};
    if (length || choice->finish_reason || choice->scores.count)
        write_event(completion, &events, index, json_string_value(text), length);
    bool failed = any_failed(choice) || events.failed;
    scores_clear(&choice->scores);
    char *taken = ret_events && !failed ? buffer_take(&events, NULL) : NULL;
    buffer_free(&events);
    if (failed || (ret_events && !taken))
        return -1;
    if (ret_events)
        *ret_events = taken;
    return 0;
}

/* The body of an answer that was not streamed. */
static void write_body(const struct completion *completion, struct buffer *out, int64_t prompt_tokens,
                       int64_t completion_tokens)
{
    buffer_append(out, completion->head.data, completion->head.length);
    buffer_append_string(out, ",\"choices\":[");
    for (int64_t i = 0; i < completion->n_choices; i++) {
        const struct choice *choice = &completion->choices[i];
        buffer_printf(out, "%s{\"index\":%lld,", i ? "," : "", (long long)i);
        buffer_append_string(out, completion->chat ? "\"message\":{\"role\":\"assistant\",\"content\":"
                                                   : "\"text\":");
        text_write_json(out, choice->text.length ? choice->text.data : "", choice->text.length);
        if (completion->chat)
            buffer_append_string(out, ",\"refusal\":null}");
        write_logprobs(completion, out, &choice->scores, true);
        write_finish(out, choice->finish_reason);
        buffer_append(out, "}", 1);
    }
    buffer_append(out, "]", 1);
    write_usage(out, prompt_tokens, completion_tokens);
    buffer_append(out, "}", 1);
}

char *completion_finish(struct completion *completion, int64_t prompt_tokens, int64_t completion_tokens)
{
    struct buffer out = {0};
    for (int64_t i = 0; i < completion->n_choices; i++)
        if (!completion->choices[i].finish_reason)
            return NULL;
    if (completion->stream) {
        if (completion->include_usage) {
            buffer_append_string(&out, "data: ");
            buffer_append(&out, completion->head.data, completion->head.length);
            buffer_append_string(&out, ",\"choices\":[]");
            write_usage(&out, prompt_tokens, completion_tokens);
            buffer_append_string(&out, "}\n\n");
        }
        buffer_append_string(&out, "data: [DONE]\n\n");
    } else {
        write_body(completion, &out, prompt_tokens, completion_tokens);
    }
    return buffer_take(&out, NULL);
}

char *completion_error_event(const struct problem *problem)
{
    struct buffer out = {0};
    char *body = problem_encode(problem);
    if (!body)
        return NULL;
    buffer_printf(&out, "data: %s\n\n", body);
    free(body);
    return buffer_take(&out, NULL);
}
