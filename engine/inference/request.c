/* request.c: see request.h. */
#include "engine/inference/request.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CHOICES = 1 << 20 };

static int check_params(const struct generation_params *params, int32_t vocab_size, struct error *error)
{
    if (params->max_tokens < 0 || (!params->max_tokens && !params->echo))
        return error_set_param(error, ERROR_INVALID, "max_tokens",
                               "max_tokens must be at least 1 (or 0 with echo), not %d", params->max_tokens);
    if (!(params->temperature >= 0) || !isfinite(params->temperature))
        return error_set_param(error, ERROR_INVALID, "temperature", "temperature must be 0 or more");
    if (!(params->top_p >= 0 && params->top_p <= 1))
        return error_set_param(error, ERROR_INVALID, "top_p", "top_p must be between 0 and 1");
    if (!(params->min_p >= 0 && params->min_p <= 1))
        return error_set_param(error, ERROR_INVALID, "min_p", "min_p must be between 0 and 1");
    if (params->top_k < 0)
        return error_set_param(error, ERROR_INVALID, "top_k", "top_k must be 0 (off) or more");
    if (!(params->repetition_penalty > 0) || !isfinite(params->repetition_penalty))
        return error_set_param(error, ERROR_INVALID, "repetition_penalty",
                               "repetition_penalty must be above 0");
    if (!isfinite(params->presence_penalty))
        return error_set_param(error, ERROR_INVALID, "presence_penalty", "presence_penalty must be finite");
    if (!isfinite(params->frequency_penalty))
        return error_set_param(error, ERROR_INVALID, "frequency_penalty", "frequency_penalty must be finite");
    if (params->logprobs < -1 || params->logprobs > KERNEL_TOP_MAX || params->logprobs > vocab_size)
        return error_set_param(error, ERROR_INVALID, "logprobs", "logprobs must be between 0 and %d",
                               KERNEL_TOP_MAX < vocab_size ? KERNEL_TOP_MAX : vocab_size);
    for (int32_t i = 0; i < params->n_bias; i++) {
        if (params->bias[i].id < 0 || params->bias[i].id >= vocab_size)
            return error_set_param(error, ERROR_INVALID, "logit_bias",
                                   "logit_bias names token %d; the model has 0 to %d", params->bias[i].id,
                                   vocab_size - 1);
        if (isnan(params->bias[i].bias))
            return error_set_param(error, ERROR_INVALID, "logit_bias", "logit_bias of token %d is no number",
                                   params->bias[i].id);
    }
    return 0;
}

static int copy_prompt(struct prompt *prompt, const struct token_list *source, int32_t max_tokens,
                       int32_t vocab_size, int32_t bos_id, struct error *error)
{
    if (source->count > (size_t)(INT32_MAX - max_tokens))
        return error_set_param(error, ERROR_INVALID, "prompt", "a prompt of %zu tokens is too long",
                               source->count);
    for (size_t i = 0; i < source->count; i++)
        if (source->ids[i] < 0 || source->ids[i] >= vocab_size)
            return error_set_param(error, ERROR_INVALID, "prompt",
                                   "token %d of the prompt is %d; the model has 0 to %d", (int)i,
                                   source->ids[i], vocab_size - 1);
    prompt->implicit = !source->count;
    if (prompt->implicit && bos_id < 0)
        return error_set_param(error, ERROR_INVALID, "prompt", "the prompt is empty");
    prompt->n_ids = prompt->implicit ? 1 : (int32_t)source->count;
    prompt->ids = malloc((size_t)prompt->n_ids * sizeof *prompt->ids);
    if (!prompt->ids)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a prompt of %d tokens", prompt->n_ids);
    if (prompt->implicit)
        prompt->ids[0] = bos_id;
    else
        memcpy(prompt->ids, source->ids, source->count * sizeof *prompt->ids);
    return 0;
}

/* Choices draw from keys of their own (splitmix64 of seed and index), so that what one of them gets depends
 * neither on the others nor on what else the device decodes at the time. */
static uint64_t choice_seed(uint64_t seed, int32_t index)
{
    uint64_t z = seed + (uint64_t)(index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

int request_create(const struct generation_request *source, uint64_t id, int32_t vocab_size, int32_t bos_id,
                   struct request **ret_request, struct error *error)
{
    int status = check_params(&source->params, vocab_size, error);
    if (status)
        return status;
    if (source->n_prompts < 1)
        return error_set_param(error, ERROR_INVALID, "prompt", "there is no prompt");
    if (source->n < 1 || source->n > MAX_CHOICES / source->n_prompts)
        return error_set_param(error, ERROR_INVALID, "n", "n must be at least 1, and prompts x n at most %d",
                               MAX_CHOICES);

    struct request *request = calloc(1, sizeof *request);
    if (!request)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a request");
    const struct generation_params *params = &source->params;
    request->id = id;
    request->adapter = source->adapter;
    request->params = *params;
    request->params.bias = NULL;
    request->params.stop = NULL;
    request->stream = source->stream;
    request->callbacks = source->callbacks;
    request->n = source->n;
    request->n_prompts = source->n_prompts;
    request->n_open = request->n_choices = source->n_prompts * source->n;
    request->prompts = calloc((size_t)request->n_prompts, sizeof *request->prompts);
    request->choices = calloc((size_t)request->n_choices, sizeof *request->choices);
    if (!request->prompts || !request->choices ||
        stop_strings_create(&request->stops, params->stop, params->n_stop)) {
        status = error_set(error, ERROR_NO_MEMORY, "no memory for a request");
        goto failed;
    }
    if (params->n_bias > 0) {
        size_t bytes = (size_t)params->n_bias * sizeof *request->bias;
        request->bias = malloc(bytes);
        if (!request->bias) {
            status = error_set(error, ERROR_NO_MEMORY, "no memory for a request");
            goto failed;
        }
        memcpy(request->bias, params->bias, bytes);
        request->params.bias = request->bias;
    }
    for (int32_t i = 0; i < request->n_prompts; i++) {
        struct prompt *prompt = &request->prompts[i];
        *prompt = (struct prompt){.request = request, .slot = -1, .n_queued = request->n};
        status = copy_prompt(prompt, &source->prompts[i], params->max_tokens, vocab_size, bos_id, error);
        if (status)
            goto failed;
        prompt->scores.n_top = params->logprobs > 0 ? params->logprobs : 0;
        if (!prompt->implicit)
            request->n_prompt_tokens += prompt->n_ids;
    }
    for (int32_t i = 0; i < request->n_choices; i++)
        request->choices[i] = (struct choice){
            .request = request,
            .prompt = &request->prompts[i / request->n],
            .index = i,
            .slot = -1,
            .seed = choice_seed(params->seed, i),
            .scores.n_top = params->logprobs > 0 ? params->logprobs : 0,
        };
    *ret_request = request;
    return 0;
failed:
    request_free(request);
    return status;
}

void request_free(struct request *request)
{
    if (!request)
        return;
    for (int32_t i = 0; request->prompts && i < request->n_prompts; i++) {
        free(request->prompts[i].ids);
        score_list_free(&request->prompts[i].scores);
    }
    for (int32_t i = 0; request->choices && i < request->n_choices; i++) {
        free(request->choices[i].history);
        choice_text_free(&request->choices[i].text);
        score_list_free(&request->choices[i].scores);
    }
    free(request->prompts);
    free(request->choices);
    free(request->bias);
    stop_strings_free(&request->stops);
    free(request);
}

int64_t request_completion_tokens(const struct request *request)
{
    int64_t count = 0;
    for (int32_t i = 0; i < request->n_choices; i++)
        count += request->choices[i].n_generated;
    return count;
}

bool request_scores_prompt(const struct request *request)
{
    return request->params.echo && request->params.logprobs >= 0;
}

static int remember(struct choice *choice, const int32_t *ids, int32_t count)
{
    if (count > choice->capacity - choice->n_history) {
        int64_t need = (int64_t)choice->n_history + count;
        int64_t capacity = choice->capacity ? 2 * (int64_t)choice->capacity : 64;
        if (capacity < need)
            capacity = need;
        if (capacity > INT32_MAX)
            capacity = INT32_MAX; /* request_create made sure that everything fits */
        int32_t *history = realloc(choice->history, (size_t)capacity * sizeof *history);
        if (!history)
            return ERROR_NO_MEMORY;
        choice->history = history;
        choice->capacity = (int32_t)capacity;
    }
    memcpy(choice->history + choice->n_history, ids, (size_t)count * sizeof *ids);
    choice->n_history += count;
    return 0;
}

int choice_start(struct choice *choice, const struct tokenizer *tokenizer)
{
    const struct request *request = choice->request;
    const struct prompt *prompt = choice->prompt;
    int status = remember(choice, prompt->ids, prompt->n_ids);
    if (status || !request->params.echo || prompt->implicit)
        return status;
    status = choice_text_echo(&choice->text, tokenizer, prompt->ids, prompt->n_ids);
    if (status || request->params.logprobs < 0)
        return status;
    return score_list_append(&choice->scores, &prompt->scores);
}

int choice_accept(struct choice *choice, const struct tokenizer *tokenizer, int32_t eos_id, int32_t id,
                  float logprob, const int32_t *top_ids, const float *top_logprobs,
                  enum finish_reason *ret_finish)
{
    const struct generation_params *params = &choice->request->params;
    int status = remember(choice, &id, 1);
    if (status)
        return status;
    choice->n_generated++;
    if (params->logprobs >= 0) {
        status = score_list_push(&choice->scores, id, logprob, top_ids, top_logprobs);
        if (status)
            return status;
    }
    if (id == eos_id && !params->ignore_eos) {
        *ret_finish = FINISH_STOP;
        return choice_finish(choice);
    }
    status = choice_text_push(&choice->text, tokenizer, &choice->request->stops, id);
    if (status < 0)
        return status;
    if (status) {
        *ret_finish = FINISH_STOP;
    } else if (choice->n_generated >= params->max_tokens) {
        status = choice_text_finish(&choice->text, &choice->request->stops);
        if (status < 0)
            return status;
        *ret_finish = status ? FINISH_STOP : FINISH_LENGTH;
    } else {
        *ret_finish = FINISH_NONE;
    }
    return 0;
}

int choice_finish(struct choice *choice)
{
    int status = choice_text_finish(&choice->text, &choice->request->stops);
    return status < 0 ? status : 0;
}

void choice_report(struct choice *choice, enum finish_reason finish)
{
    const struct request *request = choice->request;
    struct buffer *ready = &choice->text.ready;
    if (finish == FINISH_NONE && (!request->stream || (!ready->length && !choice->scores.count)))
        return;
    request->callbacks.chunk(request->callbacks.arg, choice->index, ready->data ? ready->data : "",
                             ready->length, score_list_view(&choice->scores), choice->scores.count, finish);
    buffer_clear(ready);
    choice->scores.count = 0;
}
