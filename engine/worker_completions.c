/* worker_completions.c: COMPLETE frames become requests of a generator, and what it reports becomes CHUNK,
 * DONE and FAILED frames. The worker's thread; the callbacks come from inside generator calls. */
#include "engine/worker_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* For "max_tokens": null. */
enum { DEFAULT_MAX_TOKENS = 4096 };

struct completion {
    struct completion *next, *previous;
    struct worker *worker;
    struct loaded_model *model;
    uint64_t id;            /* of the frame */
    uint64_t generation_id; /* of the generator */
    bool logprobs;
    /* Chat: what the reply's form begins with is not part of what the client gets. */
    const char *lead; /* "" = nothing to drop */
    bool *begun;      /* [choices] some text of it was sent */
};

/* What a COMPLETE frame holds, while it becomes a generation_request. */
struct reading {
    struct generation_request request;
    struct token_list *prompts; /* [n_prompts] */
    int32_t n_prompts;
    struct logit_bias *bias;
    const char **stop; /* strings inside the payload, and the chat form's own */
    const char *lead;
};

static void reading_free(struct reading *reading)
{
    for (int32_t i = 0; reading->prompts && i < reading->n_prompts; i++)
        token_list_free(&reading->prompts[i]);
    free(reading->prompts);
    free(reading->bias);
    free(reading->stop);
}

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for the request");
}

/* ---- reading the frame ---- */

static int read_ids(const json_t *array, struct token_list *ids, struct error *error)
{
    size_t i;
    const json_t *value;
    json_array_foreach(array, i, value)
    {
        json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
        if (id < 0 || id > INT32_MAX)
            return error_set_param(error, ERROR_INVALID, "prompt",
                                   "token %zu of the prompt is not a token id", i);
        if (token_list_push(ids, (int32_t)id))
            return no_memory(error);
    }
    return 0;
}

static int read_prompts(const json_t *payload, const struct loaded_model *model, struct reading *reading,
                        struct error *error)
{
    const json_t *prompts;
    int status = field_array(payload, "prompts", &prompts, error);
    if (status)
        return status;
    size_t count = json_array_size(prompts);
    if (!count || count > INT32_MAX)
        return error_set_param(error, ERROR_INVALID, "prompt", "there is no prompt");
    reading->prompts = calloc(count, sizeof *reading->prompts);
    if (!reading->prompts)
        return no_memory(error);
    reading->n_prompts = (int32_t)count;
    for (size_t i = 0; i < count; i++) {
        const json_t *prompt = json_array_get(prompts, i);
        if (json_is_string(prompt))
            status = tokenizer_encode(model->tokenizer, json_string_value(prompt), json_string_length(prompt),
                                      &reading->prompts[i], error);
        else if (json_is_array(prompt))
            status = read_ids(prompt, &reading->prompts[i], error);
        else
            status = error_set_param(error, ERROR_INVALID, "prompt",
                                     "a prompt must be a string or an array of token ids");
        if (status)
            return status;
    }
    return 0;
}

static int read_chat(const json_t *payload, const struct loaded_model *model, struct reading *reading,
                     struct error *error)
{
    const json_t *list;
    int status = field_array(payload, "messages", &list, error);
    if (status)
        return status;
    size_t count = json_array_size(list);
    struct buffer prompt = {0};
    struct chat_message *messages = calloc(count ? count : 1, sizeof *messages);
    reading->prompts = calloc(1, sizeof *reading->prompts);
    if (!messages || !reading->prompts) {
        status = no_memory(error);
        goto done;
    }
    reading->n_prompts = 1;
    for (size_t i = 0; i < count; i++) {
        const json_t *message = json_array_get(list, i);
        if ((status = field_string(message, "role", &messages[i].role, error)) ||
            (status = field_string(message, "content", &messages[i].content, error)))
            goto done;
    }
    const char *template = model_config(model->model)->chat_template;
    status = chat_render(template, messages, count, &prompt, error);
    if (!status)
        status = tokenizer_encode(model->tokenizer, prompt.data, prompt.length, &reading->prompts[0], error);
    reading->lead = chat_reply_lead(template);
done:
    buffer_free(&prompt);
    free(messages);
    return status;
}

static int read_stop(const json_t *payload, const struct loaded_model *model, bool chat,
                     struct reading *reading, struct error *error)
{
    const json_t *list;
    int status = field_array(payload, "stop", &list, error);
    if (status)
        return status;
    size_t count = json_array_size(list);
    reading->stop = calloc(count + 1, sizeof *reading->stop);
    if (!reading->stop)
        return no_memory(error);
    for (size_t i = 0; i < count; i++) {
        reading->stop[i] = json_string_value(json_array_get(list, i));
        if (!reading->stop[i])
            return error_set_param(error, ERROR_INVALID, "stop", "\"stop\" must be strings");
    }
    if (chat)
        reading->stop[count++] = chat_reply_stop(model_config(model->model)->chat_template);
    reading->request.params.stop = reading->stop;
    reading->request.params.n_stop = (int32_t)count;
    return 0;
}

static int read_bias(const json_t *payload, struct reading *reading, struct error *error)
{
    json_t *object = json_object_get(payload, "logit_bias");
    if (!json_is_object(object) && !json_is_null(object))
        return error_set_param(error, ERROR_INVALID, "logit_bias",
                               "\"logit_bias\" must be an object or null");
    size_t count = json_object_size(object);
    if (!count)
        return 0;
    reading->bias = calloc(count, sizeof *reading->bias);
    if (!reading->bias)
        return no_memory(error);
    const char *key;
    json_t *value;
    int32_t n = 0;
    json_object_foreach(object, key, value)
    {
        char *end;
        long id = strtol(key, &end, 10);
        if (end == key || *end || id < 0 || id > INT32_MAX || !json_is_number(value))
            return error_set_param(error, ERROR_INVALID, "logit_bias",
                                   "\"logit_bias\" must map token ids to numbers");
        reading->bias[n++] = (struct logit_bias){.id = (int32_t)id, .bias = (float)json_number_value(value)};
    }
    reading->request.params.bias = reading->bias;
    reading->request.params.n_bias = n;
    return 0;
}

static int read_params(const json_t *payload, struct reading *reading, struct error *error)
{
    struct generation_request *request = &reading->request;
    struct generation_params *params = &request->params;
    const struct {
        const char *key;
        float *value;
    } numbers[] = {
        {"temperature", &params->temperature},
        {"top_p", &params->top_p},
        {"min_p", &params->min_p},
        {"repetition_penalty", &params->repetition_penalty},
        {"presence_penalty", &params->presence_penalty},
        {"frequency_penalty", &params->frequency_penalty},
    };
    int status;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        double value;
        if ((status = field_number(payload, numbers[i].key, &value, error)))
            return status;
        *numbers[i].value = (float)value;
    }
    int64_t n, top_k, max_tokens = DEFAULT_MAX_TOKENS, logprobs = -1, seed;
    if ((status = field_integer(payload, "n", 1, INT32_MAX, &n, error)) ||
        (status = field_integer(payload, "top_k", 0, INT32_MAX, &top_k, error)) ||
        (status = field_boolean(payload, "echo", &params->echo, error)) ||
        (status = field_boolean(payload, "ignore_eos", &params->ignore_eos, error)) ||
        (status = field_boolean(payload, "stream", &request->stream, error)))
        return status;
    if (!json_is_null(json_object_get(payload, "max_tokens")) &&
        (status = field_integer(payload, "max_tokens", 0, INT32_MAX, &max_tokens, error)))
        return status;
    if (!json_is_null(json_object_get(payload, "logprobs")) &&
        (status = field_integer(payload, "logprobs", 0, KERNEL_TOP_MAX, &logprobs, error)))
        return status;
    if (json_is_null(json_object_get(payload, "seed"))) {
        if (getrandom(&params->seed, sizeof params->seed, 0) != sizeof params->seed)
            return error_set(error, ERROR_INTERNAL, "the system gives no random seed");
    } else {
        if ((status = field_integer(payload, "seed", INT64_MIN, INT64_MAX, &seed, error)))
            return status;
        params->seed = (uint64_t)seed;
    }
    request->n = (int32_t)n;
    params->top_k = (int32_t)top_k;
    params->max_tokens = (int32_t)max_tokens;
    params->logprobs = (int32_t)logprobs;
    return 0;
}

/* ---- reports ---- */

/* A log-probability as frames carry it: null for a token without one, -9999 for what cannot be. */
static json_t *encode_logprob(float logprob)
{
    if (isnan(logprob))
        return json_null();
    return json_real(isinf(logprob) ? -9999.0 : (double)logprob);
}

/* A token's text; its bytes go to *ret_bytes when the text cannot show them. */
static json_t *encode_text(const struct tokenizer *tokenizer, int32_t id, json_t **ret_bytes)
{
    size_t length = 0;
    const char *bytes = tokenizer_bytes(tokenizer, id, &length);
    json_t *text = json_stringn(bytes ? bytes : "", length);
    if (text || !bytes)
        return text;
    if (ret_bytes) {
        *ret_bytes = json_array();
        for (size_t i = 0; i < length; i++)
            json_array_append_new(*ret_bytes, json_integer((unsigned char)bytes[i]));
    }
    return frame_text(bytes, length);
}

static int append_top(json_t *top, const struct tokenizer *tokenizer, int32_t id, float logprob)
{
    return json_array_append_new(
        top, json_pack("[o, o]", encode_text(tokenizer, id, NULL), encode_logprob(logprob)));
}

/* The alternatives, best first, and the token itself where it is not among them. */
static json_t *encode_top(const struct tokenizer *tokenizer, const struct scored_token *token)
{
    json_t *top = json_array();
    bool listed = !token->n_top;
    int failed = top ? 0 : -1;
    for (int32_t i = 0; i < token->n_top && !failed; i++) {
        failed = append_top(top, tokenizer, token->top_ids[i], token->top_logprobs[i]);
        listed |= token->top_ids[i] == token->id;
    }
    if (!listed && !failed)
        failed = append_top(top, tokenizer, token->id, token->logprob);
    if (!failed)
        return top;
    json_decref(top);
    return NULL;
}

static json_t *encode_tokens(const struct tokenizer *tokenizer, const struct scored_token *tokens, int32_t n)
{
    json_t *list = json_array();
    for (int32_t i = 0; i < n; i++) {
        json_t *bytes = NULL;
        json_t *text = encode_text(tokenizer, tokens[i].id, &bytes);
        json_t *token =
            json_pack("{s:i, s:o, s:o, s:o}", "id", (int)tokens[i].id, "text", text, "logprob",
                      encode_logprob(tokens[i].logprob), "top", encode_top(tokenizer, &tokens[i]));
        if (bytes)
            json_object_set_new(token, "bytes", bytes);
        if (json_array_append_new(list, token)) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

/* Drop the lead from the first text of a choice. */
static void skip_lead(struct completion *completion, int32_t index, const char **text, size_t *length)
{
    if (!*length || completion->begun[index])
        return;
    completion->begun[index] = true;
    size_t lead = strlen(completion->lead);
    if (*length >= lead && !memcmp(*text, completion->lead, lead)) {
        *text += lead;
        *length -= lead;
    }
}

static void on_chunk(void *arg, int32_t index, const char *text, size_t length,
                     const struct scored_token *tokens, int32_t n_tokens, enum finish_reason finish)
{
    struct completion *completion = arg;
    skip_lead(completion, index, &text, &length);
    json_t *reason =
        finish == FINISH_NONE ? json_null() : json_string(finish == FINISH_STOP ? "stop" : "length");
    json_t *payload = json_pack("{s:i, s:o, s:o}", "index", (int)index, "text", frame_text(text, length),
                                "finish_reason", reason);
    if (completion->logprobs &&
        json_object_set_new(payload, "tokens",
                            encode_tokens(completion->model->tokenizer, tokens, n_tokens))) {
        json_decref(payload);
        payload = NULL;
    }
    worker_stream_send(&completion->worker->stream, FRAME_CHUNK, completion->id, payload);
}

static void completion_free(struct completion *completion)
{
    if (completion->next)
        completion->next->previous = completion->previous;
    if (completion->previous)
        completion->previous->next = completion->next;
    else
        completion->worker->completions = completion->next;
    free(completion->begun);
    free(completion);
}

static void on_done(void *arg, int64_t prompt_tokens, int64_t completion_tokens, int code,
                    const struct error *error)
{
    struct completion *completion = arg;
    if (code)
        worker_fail(completion->worker, completion->id, error);
    else
        worker_stream_send(&completion->worker->stream, FRAME_DONE, completion->id,
                           json_pack("{s:I, s:I}", "prompt_tokens", (json_int_t)prompt_tokens,
                                     "completion_tokens", (json_int_t)completion_tokens));
    completion_free(completion);
}

/* ---- frames ---- */

static int submit(struct worker *worker, struct completion *completion, const json_t *payload,
                  struct reading *reading, struct error *error)
{
    struct named_folder base, adapter;
    bool chat;
    int status;
    if ((status = field_folder(payload, "model", &base, error)) ||
        (status = field_optional_folder(payload, "adapter", &adapter, error)) ||
        (status = field_boolean(payload, "chat", &chat, error)) ||
        (status = read_params(payload, reading, error)) || (status = read_bias(payload, reading, error)) ||
        (status = loaded_models_get(&worker->models, &base, &completion->model, error)))
        return status;
    struct generation_request *request = &reading->request;
    if (adapter.id && (status = loaded_models_get_adapter(&worker->models, completion->model, &adapter,
                                                          &request->adapter, error)))
        return status;
    reading->lead = "";
    status = chat ? read_chat(payload, completion->model, reading, error)
                  : read_prompts(payload, completion->model, reading, error);
    if (status || (status = read_stop(payload, completion->model, chat, reading, error)))
        return status;

    completion->lead = reading->lead;
    completion->logprobs = request->params.logprobs >= 0;
    request->n_prompts = reading->n_prompts;
    request->prompts = reading->prompts;
    request->callbacks = (struct generation_callbacks){.arg = completion, .chunk = on_chunk, .done = on_done};
    if (request->n > INT32_MAX / request->n_prompts)
        return error_set_param(error, ERROR_INVALID, "n", "prompts x n is too large");
    completion->begun = calloc((size_t)request->n * (size_t)request->n_prompts, sizeof *completion->begun);
    if (!completion->begun)
        return no_memory(error);
    return generator_submit(completion->model->generator, request, &completion->generation_id, error);
}

void worker_complete(struct worker *worker, uint64_t id, const json_t *payload)
{
    struct error error = {0};
    struct reading reading = {0};
    struct completion *completion = calloc(1, sizeof *completion);
    if (!completion) {
        no_memory(&error);
        worker_fail(worker, id, &error);
        return;
    }
    completion->worker = worker;
    completion->id = id;
    completion->next = worker->completions;
    if (completion->next)
        completion->next->previous = completion;
    worker->completions = completion;
    if (submit(worker, completion, payload, &reading, &error)) {
        worker_fail(worker, id, &error);
        completion_free(completion);
    }
    reading_free(&reading);
}

void worker_cancel(struct worker *worker, uint64_t id)
{
    for (struct completion *completion = worker->completions; completion; completion = completion->next) {
        if (completion->id == id) {
            generator_cancel(completion->model->generator, completion->generation_id);
            return;
        }
    }
}
