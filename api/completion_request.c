/* completion_request.c: POST /v1/completions and /v1/chat/completions into a struct completion_request whose
 * `work` is what the worker is sent. Any thread.
 *
 * Fields that only tune OpenAI's own service (user, metadata, store, service_tier ...) are let through
 * unread; those that would change the answer's meaning and are not implemented (suffix, tools,
 * response_format ...) are refused. */
#include "api/requests.h"

#include "api/decode.h"
#include "base/buffer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LOGPROBS = 20, MAX_BIASED = 1024 };
/* max_tokens where a request names none. */
enum { DEFAULT_COMPLETION_TOKENS = 16, DEFAULT_CHAT_TOKENS = 1024 };

static int out_of_memory(const struct decoder *decoder)
{
    return problem_set(decoder->problem, 503, "out_of_memory", NULL, "The server is out of memory.");
}

/* ---- prompts ---- */

static bool is_token_id(const json_t *json)
{
    return json_is_integer(json) && json_integer_value(json) >= 0 && json_integer_value(json) <= INT32_MAX;
}

/* Are all elements ids? */
static int ids_check(const struct decoder *decoder, const json_t *ids)
{
    for (size_t i = 0; i < json_array_size(ids); i++)
        if (!is_token_id(json_array_get(ids, i)))
            return decode_refuse(decoder, "prompt", "token id %zu must be an integer from 0 to %d.", i,
                                 INT32_MAX);
    return 0;
}

/* Any of the four forms into an array with one element a prompt, a string or an array of ids; null is one
 * empty prompt. */
static int prompts_decode(const struct decoder *decoder, int64_t max_prompts, json_t **ret_prompts)
{
    json_t *prompt = json_object_get(decoder->object, "prompt");
    const json_t *first = json_array_get(prompt, 0);
    if (!prompt)
        return decode_refuse(decoder, "prompt", "is required.");
    if (!json_is_string(prompt) && !json_is_null(prompt) && !json_is_array(prompt))
        return decode_refuse(
            decoder, "prompt",
            "must be a string, an array of strings, an array of token ids or an array of arrays of "
            "token ids.");
    if (json_is_array(prompt) && !first)
        return decode_refuse(decoder, "prompt", "is an empty array; at least one prompt is due.");
    if (json_is_null(prompt) || json_is_string(prompt) || json_is_number(first)) {
        if (json_is_array(prompt) && ids_check(decoder, prompt))
            return -1;
        *ret_prompts = json_is_null(prompt) ? json_pack("[s]", "") : json_pack("[O]", prompt);
        return *ret_prompts ? 0 : out_of_memory(decoder);
    }
    if ((int64_t)json_array_size(prompt) > max_prompts)
        return decode_refuse(decoder, "prompt", "may hold at most %lld prompts; it has %zu.",
                             (long long)max_prompts, json_array_size(prompt));
    for (size_t i = 0; i < json_array_size(prompt); i++) {
        const json_t *one = json_array_get(prompt, i);
        if (json_typeof(one) != json_typeof(first) || (!json_is_string(one) && !json_is_array(one)))
            return decode_refuse(decoder, "prompt", "element %zu must be %s.", i,
                                 json_is_array(first) ? "an array of token ids" : "a string");
        if (json_is_array(one) && ids_check(decoder, one))
            return -1;
    }
    *ret_prompts = json_incref(prompt);
    return 0;
}

/* ---- messages ---- */

/* A message's content as one string: itself, its text parts joined, or "" for null. NULL with a problem. */
static json_t *content_decode(const struct decoder *decoder, size_t index, const json_t *message)
{
    json_t *content = json_object_get(message, "content");
    if (json_is_string(content))
        return json_incref(content);
    if (!content || json_is_null(content))
        return json_string("");
    if (!json_is_array(content)) {
        decode_refuse(decoder, "messages",
                      "content of message %zu must be a string or an array of text parts.", index);
        return NULL;
    }
    struct buffer text = {0};
    buffer_append(&text, "", 0);
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *part = json_array_get(content, i);
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *words = json_object_get(part, "text");
        if (!type || strcmp(type, "text") || !json_is_string(words)) {
            decode_refuse(decoder, "messages",
                          "message %zu has a part %zu that is not text; nothing else is supported.", index,
                          i);
            buffer_free(&text);
            return NULL;
        }
        buffer_append(&text, json_string_value(words), json_string_length(words));
    }
    json_t *joined = text.failed ? NULL : json_stringn(text.data, text.length);
    if (!joined)
        out_of_memory(decoder);
    buffer_free(&text);
    return joined;
}

static int messages_decode(const struct decoder *decoder, json_t **ret_messages)
{
    static const char *const roles[] = {"system", "developer", "user", "assistant"};
    const json_t *given = decode_get(decoder, "messages");
    if (!json_is_array(given) || !json_array_size(given))
        return decode_refuse(decoder, "messages", "must be an array of at least one {role, content}.");
    json_t *messages = json_array();
    for (size_t i = 0; i < json_array_size(given); i++) {
        const json_t *message = json_array_get(given, i);
        const char *role = json_string_value(json_object_get(message, "role"));
        if (!role || !decode_name_in(role, roles, sizeof roles / sizeof *roles)) {
            json_decref(messages);
            return decode_refuse(
                decoder, "messages",
                "message %zu must be an object whose role is system, developer, user or assistant.", i);
        }
        json_t *content = content_decode(decoder, i, message);
        if (!content) {
            json_decref(messages);
            return -1;
        }
        /* developer is what newer clients call system. */
        if (json_array_append_new(messages,
                                  json_pack("{s:s, s:o}", "role", strcmp(role, "developer") ? role : "system",
                                            "content", content))) {
            json_decref(messages);
            return out_of_memory(decoder);
        }
    }
    *ret_messages = messages;
    return 0;
}

/* ---- what generation is told ---- */

/* A string or an array of strings into an array. Empty strings, which some clients send, stop nothing. */
static int stop_decode(const struct decoder *decoder, int64_t max_stop, json_t **ret_stop)
{
    const json_t *given = decode_get(decoder, "stop");
    size_t n = json_is_array(given) ? json_array_size(given) : given != NULL;
    if ((int64_t)n > max_stop)
        return decode_refuse(decoder, "stop", "may hold at most %lld strings; it has %zu.",
                             (long long)max_stop, n);
    json_t *stop = json_array();
    for (size_t i = 0; i < n; i++) {
        json_t *one = (json_t *)(uintptr_t)(json_is_array(given) ? json_array_get(given, i) : given);
        if (!json_is_string(one)) {
            json_decref(stop);
            return decode_refuse(decoder, "stop", "must be null, a string or an array of strings.");
        }
        if (json_string_length(one) && json_array_append(stop, one)) {
            json_decref(stop);
            return out_of_memory(decoder);
        }
    }
    *ret_stop = stop;
    return stop ? 0 : out_of_memory(decoder);
}

static int logit_bias_decode(const struct decoder *decoder, json_t **ret_bias)
{
    json_t *bias = NULL;
    if (decode_object(decoder, "logit_bias", &bias))
        return -1;
    if (json_object_size(bias) > MAX_BIASED)
        return decode_refuse(decoder, "logit_bias", "may name at most %d tokens; it names %zu.", MAX_BIASED,
                             json_object_size(bias));
    const char *key;
    json_t *value;
    json_object_foreach(bias, key, value)
    {
        char *end;
        long long id = strtoll(key, &end, 10);
        if (*key < '0' || *key > '9' || *end || id > INT32_MAX)
            return decode_refuse(decoder, "logit_bias", "keys must be token ids, not \"%.40s\".", key);
        if (!json_is_number(value) || json_number_value(value) < -100 || json_number_value(value) > 100)
            return decode_refuse(decoder, "logit_bias",
                                 "the bias of token %s must be a number from -100 to 100.", key);
    }
    *ret_bias = bias ? json_incref(bias) : json_object();
    return *ret_bias ? 0 : out_of_memory(decoder);
}

/* Number of alternatives a token, or -1 for no scores: a count in completions; in chat a switch and a count.
 */
static int logprobs_decode(const struct decoder *decoder, bool chat, int64_t *ret_logprobs)
{
    if (!chat)
        return decode_integer(decoder, "logprobs", 0, MAX_LOGPROBS, ret_logprobs);
    bool wanted = false;
    int64_t count = 0;
    if (decode_bool(decoder, "logprobs", &wanted) ||
        decode_integer(decoder, "top_logprobs", 0, MAX_LOGPROBS, &count))
        return -1;
    if (!wanted && count)
        return decode_refuse(decoder, "top_logprobs", "needs \"logprobs\": true.");
    *ret_logprobs = wanted ? count : -1;
    return 0;
}

static int max_tokens_decode(const struct decoder *decoder, bool chat, bool echo, int64_t limit,
                             int64_t *ret_max_tokens)
{
    int64_t max_tokens = chat ? DEFAULT_CHAT_TOKENS : DEFAULT_COMPLETION_TOKENS;
    int64_t min = echo ? 0 : 1;
    if (max_tokens > limit)
        max_tokens = limit;
    if (decode_integer(decoder, "max_tokens", min, limit, &max_tokens) ||
        (chat && decode_integer(decoder, "max_completion_tokens", min, limit, &max_tokens)))
        return -1;
    *ret_max_tokens = max_tokens;
    return 0;
}

/* What would need a part of OpenAI's service that is not here. */
static int unsupported_check(const struct decoder *decoder, bool chat)
{
    static const char *const in_completions[] = {"suffix"};
    static const char *const in_chat[] = {"tools", "functions", "audio", "prediction", "web_search_options"};
    const char *const *names = chat ? in_chat : in_completions;
    size_t count = chat ? sizeof in_chat / sizeof *in_chat : 1;
    for (size_t i = 0; i < count; i++) {
        const json_t *value = decode_get(decoder, names[i]);
        bool empty = !value || (json_is_array(value) && !json_array_size(value)) ||
                     (json_is_string(value) && !json_string_length(value));
        if (!empty)
            return decode_refuse(decoder, names[i], "is not supported; leave it out.");
    }
    const json_t *format = chat ? decode_get(decoder, "response_format") : NULL;
    const char *type = json_string_value(json_object_get(format, "type"));
    if (format && (!type || strcmp(type, "text")))
        return decode_refuse(decoder, "response_format", "only {\"type\": \"text\"} is supported.");
    return 0;
}

static int stream_decode(const struct decoder *decoder, struct completion_request *request)
{
    json_t *options = NULL;
    if (decode_bool(decoder, "stream", &request->stream) ||
        decode_object(decoder, "stream_options", &options))
        return -1;
    if (options && !request->stream)
        return decode_refuse(decoder, "stream_options", "is allowed only with \"stream\": true.");
    struct decoder inner = {options, "stream_options.", decoder->problem};
    return decode_bool(&inner, "include_usage", &request->include_usage);
}

/* n and best_of against the number of prompts. */
static int choices_decode(const struct decoder *decoder, const struct completion_limits *limits,
                          struct completion_request *request)
{
    request->n = 1;
    if (decode_integer(decoder, "n", 1, limits->max_choices, &request->n))
        return -1;
    int64_t best_of = request->n;
    if (decode_integer(decoder, "best_of", 1, limits->max_choices, &best_of))
        return -1;
    if (best_of != request->n)
        return decode_refuse(decoder, "best_of", "is not supported unless it equals n.");
    if (request->n_prompts * request->n > limits->max_choices)
        return decode_refuse(decoder, "n", "makes %lld choices of %lld prompts; at most %lld are allowed.",
                             (long long)(request->n_prompts * request->n), (long long)request->n_prompts,
                             (long long)limits->max_choices);
    return 0;
}

/* Everything that goes to the worker besides prompts, stop and bias. Returns NULL with a problem. */
static json_t *sampling_decode(const struct decoder *decoder, bool chat,
                               const struct completion_limits *limits, struct completion_request *request)
{
    double temperature = 1, top_p = 1, min_p = 0, repetition = 1, presence = 0, frequency = 0;
    int64_t top_k = 0, logprobs = -1, max_tokens = 0, seed = 0;
    bool ignore_eos = false;
    if (decode_bool(decoder, "echo", &request->echo))
        return NULL;
    if (chat && request->echo) {
        decode_refuse(decoder, "echo", "is for /v1/completions alone.");
        return NULL;
    }
    if (decode_number(decoder, "temperature", 0, false, 2, &temperature) ||
        decode_number(decoder, "top_p", 0, true, 1, &top_p) ||
        decode_number(decoder, "min_p", 0, false, 1, &min_p) ||
        decode_integer(decoder, "top_k", -1, INT32_MAX, &top_k) ||
        decode_number(decoder, "repetition_penalty", 0, true, 10, &repetition) ||
        decode_number(decoder, "presence_penalty", -2, false, 2, &presence) ||
        decode_number(decoder, "frequency_penalty", -2, false, 2, &frequency) ||
        decode_integer(decoder, "seed", INT64_MIN, INT64_MAX, &seed) ||
        decode_bool(decoder, "ignore_eos", &ignore_eos) || logprobs_decode(decoder, chat, &logprobs) ||
        max_tokens_decode(decoder, chat, request->echo, limits->max_tokens, &max_tokens))
        return NULL;
    request->has_logprobs = logprobs >= 0;
    json_t *work =
        json_pack("{s:I, s:I, s:f, s:f, s:f, s:I, s:f, s:f, s:f, s:o, s:o, s:b, s:b, s:b, s:b}", "n",
                  (json_int_t)request->n, "max_tokens", (json_int_t)max_tokens, "temperature", temperature,
                  "top_p", top_p, "min_p", min_p, "top_k", (json_int_t)(top_k < 0 ? 0 : top_k),
                  "repetition_penalty", repetition, "presence_penalty", presence, "frequency_penalty",
                  frequency, "seed", decode_get(decoder, "seed") ? json_integer(seed) : json_null(),
                  "logprobs", logprobs >= 0 ? json_integer(logprobs) : json_null(), "echo", request->echo,
                  "ignore_eos", ignore_eos, "stream", request->stream, "chat", chat);
    if (!work)
        out_of_memory(decoder);
    return work;
}

int completion_request_decode(const json_t *body, bool chat, const struct completion_limits *limits,
                              struct completion_request *ret_request, struct problem *problem)
{
    struct decoder decoder = {body, "", problem};
    struct completion_request request = {.chat = chat, .n_prompts = 1};
    const char *model = "", *adapter = "";
    json_t *prompts = NULL, *messages = NULL, *stop = NULL, *bias = NULL, *work = NULL;
    int result = -1;

    if (decode_string(&decoder, "model", MODEL_ID_BYTES - 1, &model) ||
        decode_string(&decoder, "adapter", MODEL_ID_BYTES - 1, &adapter) ||
        unsupported_check(&decoder, chat) || stream_decode(&decoder, &request))
        goto done;
    if (chat ? messages_decode(&decoder, &messages) : prompts_decode(&decoder, limits->max_prompts, &prompts))
        goto done;
    if (!chat)
        request.n_prompts = (int64_t)json_array_size(prompts);
    if (choices_decode(&decoder, limits, &request) || stop_decode(&decoder, limits->max_stop, &stop) ||
        logit_bias_decode(&decoder, &bias))
        goto done;
    work = sampling_decode(&decoder, chat, limits, &request);
    if (!work)
        goto done;
    if (json_object_set_new(work, "prompts", prompts ? json_incref(prompts) : json_array()) ||
        json_object_set(work, "stop", stop) || json_object_set(work, "logit_bias", bias) ||
        (messages && json_object_set(work, "messages", messages))) {
        out_of_memory(&decoder);
        goto done;
    }
    snprintf(request.model, sizeof request.model, "%s", model);
    snprintf(request.adapter, sizeof request.adapter, "%s", adapter);
    request.work = json_incref(work);
    *ret_request = request;
    result = 0;
done:
    json_decref(work);
    json_decref(bias);
    json_decref(stop);
    json_decref(messages);
    json_decref(prompts);
    return result;
}

void completion_request_free(struct completion_request *request)
{
    json_decref(request->work);
    request->work = NULL;
}
