/* fixture.h: hatchling with a generator, and what came out of it. */
#ifndef TESTS_ENGINE_INFERENCE_FIXTURE_H
#define TESTS_ENGINE_INFERENCE_FIXTURE_H

#include "base/buffer.h"
#include "engine/inference/generator.h"

#include <jansson.h>

struct fixture {
    const struct kernel_ops *ops;
    struct kernel_device *device;
    struct model *model;
    struct tokenizer *tokenizer;
    struct generator *generator;
    json_t *vectors; /* hatchling_forward.json */
};

/* For cmocka's group setup; *state becomes the fixture. */
int fixture_open(void **state);
int fixture_close(void **state);
/* A generator of another shape in place of the one there is. */
void fixture_shape(struct fixture *fixture, int32_t max_seqs, int64_t prefill_tokens);

enum { ANSWER_CHOICES = 16 };

/* All that one request said. */
struct answer {
    struct choice_answer {
        struct buffer text;
        int32_t n_tokens, capacity;
        struct token_answer {
            int32_t id;
            float logprob;
            int32_t n_top;
            int32_t top_ids[KERNEL_TOP_MAX];
            float top_logprobs[KERNEL_TOP_MAX];
        } * tokens;
        int32_t n_chunks;
        enum finish_reason finish;
    } choices[ANSWER_CHOICES];
    int32_t n_done;
    int code;
    int64_t prompt_tokens, completion_tokens;
};

/* Greedy, no stop strings, seed 1. */
struct generation_params fixture_params(int32_t max_tokens);
/* The prompt's ids, to be freed with token_list_free. */
struct token_list fixture_encode(const struct fixture *fixture, const char *text);
/* One prompt, given as text. Returns its id. */
uint64_t fixture_submit(struct fixture *fixture, const char *prompt, int32_t n,
                        const struct generation_params *params, bool stream, struct answer *answer);
uint64_t fixture_submit_ids(struct fixture *fixture, const struct token_list *prompts, int32_t n_prompts,
                            int32_t n, const struct generation_params *params, bool stream,
                            struct answer *answer);
/* Any request; its callbacks are set here. */
uint64_t fixture_submit_request(struct fixture *fixture, const struct generation_request *request,
                                struct answer *answer);
/* Until nothing is left. */
void fixture_run(struct fixture *fixture);
/* The text of a choice; "" when it has none. */
const char *answer_text(const struct answer *answer, int32_t choice);
void answer_free(struct answer *answer);

#endif
