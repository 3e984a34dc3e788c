/* request.h: one submitted request inside the generator: its prompts, and the choices that continue them.
 * The generator moves them; this file knows what they hold and how they report. Device's owner thread. */
#ifndef ENGINE_INFERENCE_REQUEST_H
#define ENGINE_INFERENCE_REQUEST_H

#include "engine/inference/choice_text.h"
#include "engine/inference/generator.h"
#include "engine/inference/score_list.h"
#include "engine/inference/stop_strings.h"

struct request;

/* A prompt is run once, all but its last token, in the slot of its first choice; the others start from copies
 * of that state. The last token is every choice's first decode step. */
struct prompt {
    struct request *request;
    int32_t *ids; /* [n_ids], at least one */
    int32_t n_ids;
    bool implicit;            /* the client's was empty: ids is one end of text, neither shown nor counted */
    int32_t n_run;            /* tokens of ids already in the state */
    int32_t slot;             /* where that state is; -1 before the first choice is seated */
    int32_t n_queued;         /* choices that wait for a seat */
    struct score_list scores; /* of ids, when they are echoed with logprobs */
};

enum choice_state {
    CHOICE_QUEUED,  /* no seat yet */
    CHOICE_SEATED,  /* has a slot, waits for its prompt */
    CHOICE_RUNNING, /* decodes */
    CHOICE_OVER,
};

struct choice {
    struct request *request;
    struct prompt *prompt;
    int32_t index; /* prompt * n + sample */
    enum choice_state state;
    int32_t slot; /* -1 = none */
    uint64_t seed;
    int32_t *history; /* [n_history]: prompt, then generated */
    int32_t n_history, capacity;
    int32_t n_generated;
    struct choice_text text;
    struct score_list scores; /* not yet reported */
};

struct request {
    struct request *next; /* in order of arrival */
    uint64_t id;
    const struct adapter *adapter;
    struct generation_params params; /* bias is owned; stop lives in `stops` */
    struct logit_bias *bias;
    struct stop_strings stops;
    bool stream;
    struct generation_callbacks callbacks;
    int32_t n_prompts, n, n_choices;
    struct prompt *prompts;  /* [n_prompts] */
    struct choice *choices;  /* [n_choices] */
    int32_t n_seated;        /* choices that were given a seat so far, in order of their index */
    int32_t n_open;          /* choices that are not over */
    int64_t n_prompt_tokens; /* as the client counts */
    int failure;             /* why it must end, or 0 */
};

/* Check and copy what the client sent; bos_id stands in for empty prompts (-1: those are refused). */
int request_create(const struct generation_request *source, uint64_t id, int32_t vocab_size, int32_t bos_id,
                   struct request **ret_request, struct error *error);
void request_free(struct request *request);
int64_t request_completion_tokens(const struct request *request);
/* Are the prompt's tokens reported with scores? */
bool request_scores_prompt(const struct request *request);

/* The prompt is in the state: fill the history and, for echo, put the prompt into the text. Returns 0 or
 * ERROR_NO_MEMORY. */
int choice_start(struct choice *choice, const struct tokenizer *tokenizer);
/* Take in a generated token. *ret_finish says whether it was the last. Returns 0 or ERROR_NO_MEMORY. */
int choice_accept(struct choice *choice, const struct tokenizer *tokenizer, int32_t eos_id, int32_t id,
                  float logprob, const int32_t *top_ids, const float *top_logprobs,
                  enum finish_reason *ret_finish);
/* Nothing follows: let out what was held back. */
int choice_finish(struct choice *choice);
/* Give the client what is ready, if there is anything to say. */
void choice_report(struct choice *choice, enum finish_reason finish);

#endif
