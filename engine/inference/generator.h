/* generator.h: continuous batching of completions over one base model and any of its adapters.
 *
 * Requests wait in a queue, take a state slot, have their prompt run in chunks, then decode one token a step
 * together with all others; rows of one step may use different adapters. All on the device's owner thread;
 * callbacks run there too. */
#ifndef ENGINE_INFERENCE_GENERATOR_H
#define ENGINE_INFERENCE_GENERATOR_H

#include "base/error.h"
#include "engine/models/model.h"
#include "engine/text/tokenizer.h"

#include <stdbool.h>
#include <stdint.h>

/* One sequence of a request: prompt i, sample j is index i * n + j. */
struct generation_params {
    int32_t max_tokens;
    float temperature, top_p, min_p;
    int32_t top_k;
    float repetition_penalty, presence_penalty, frequency_penalty;
    const struct logit_bias *bias;
    int32_t n_bias;
    const char *const *stop; /* strings; the text ends before the first of them that appears */
    int32_t n_stop;
    uint64_t seed;
    int32_t logprobs; /* -1 = none, else 0..KERNEL_TOP_MAX alternatives */
    bool echo, ignore_eos;
};

/* One token of the answer with its scores, as API.md's logprobs wants them. */
struct scored_token {
    int32_t id;
    float logprob; /* NaN for the very first token of a prompt */
    int32_t n_top;
    const int32_t
        *top_ids; /* the argmax first; the chosen token is appended by the encoder if it is not among them */
    const float *top_logprobs;
};

enum finish_reason { FINISH_NONE, FINISH_STOP, FINISH_LENGTH };

/* They must not call the generator back. */
struct generation_callbacks {
    void *arg;
    /* More of one choice: text that is certain (may be empty), the tokens behind it (only when logprobs were
     * asked for; the text of a token may come later than the token), finish != FINISH_NONE with the last.
     * tokens are valid during the call. */
    void (*chunk)(void *arg, int32_t index, const char *text, size_t length,
                  const struct scored_token *tokens, int32_t n_tokens, enum finish_reason finish);
    /* The request is over, exactly once: code 0, or why it failed. */
    void (*done)(void *arg, int64_t prompt_tokens, int64_t completion_tokens, int code,
                 const struct error *error);
};

struct generation_request {
    const struct adapter *adapter; /* NULL = base; must outlive the request */
    int32_t n_prompts;
    const struct token_list *prompts; /* copied */
    int32_t n;                        /* samples a prompt */
    struct generation_params params;  /* copied */
    bool stream;                      /* false: chunk() may be called once a choice, with everything */
    struct generation_callbacks callbacks;
};

struct generator;

/* max_seqs: sequences decoded together (state slots); more wait. prefill_tokens: longest prompt chunk of one
 * quantum. */
int generator_create(struct model *model, const struct tokenizer *tokenizer, int32_t max_seqs,
                     int64_t prefill_tokens, struct generator **ret_generator, struct error *error);
/* Every request still there ends with ERROR_CANCELLED. */
void generator_free(struct generator *generator);
/* Queue a request. An empty prompt becomes one end of text token (bos). max_tokens 0 is allowed with echo.
 * *ret_id names it for cancel. */
int generator_submit(struct generator *generator, const struct generation_request *request, uint64_t *ret_id,
                     struct error *error);
/* Forget a request; done() is called with ERROR_CANCELLED. An unknown id is fine. */
void generator_cancel(struct generator *generator, uint64_t id);
/* One quantum: a prefill chunk or a decode step for all. Returns how many sequences are still waiting or
 * running, or a negative code when the device failed (every request has then been ended). */
int generator_advance(struct generator *generator, struct error *error);
bool generator_idle(const struct generator *generator);
/* Does any waiting or running request use this adapter? */
bool generator_uses(const struct generator *generator, const struct adapter *adapter);

struct generator_status {
    int32_t running, waiting; /* sequences */
};
void generator_status(const struct generator *generator, struct generator_status *ret_status);

#endif
