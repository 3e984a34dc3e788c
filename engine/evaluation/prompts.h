/* prompts.h: a task's requests at one number of shots: few-shot examples drawn, prompts put together, ids split into context and
 * continuation, all as lm-evaluation-harness does it (docs/decisions/0008-evaluation.md lists its facts).
 *
 * Documents are taken in order; each draws from the one generator whether its requests are wanted or not, so that a resumed run goes
 * on with the same examples. One thread. */
#ifndef ENGINE_EVALUATION_PROMPTS_H
#define ENGINE_EVALUATION_PROMPTS_H

#include "engine/evaluation/task.h"
#include "engine/text/tokenizer.h"

#include <stdint.h>

struct prompt_options {
    int32_t shots;
    uint64_t seed;
    int64_t limit; /* documents, 0 = all */
    int32_t
        max_length; /* 0 = none; ids beyond max_length - 1 are dropped on the left, as a harness with that max_length does */
    int32_t prefix_id; /* stands for an empty context; -1 = an empty context is refused */
};

/* The last n_ids - n_context ids are scored. */
struct prompt_request {
    int32_t *ids; /* in the example's array */
    int32_t n_ids, n_context;
    int64_t characters; /* of the choice, for acc_norm */
};

struct example {
    int64_t document; /* from 0 */
    int64_t line;     /* in its file */
    int n_requests, gold;
    struct prompt_request *requests;
    int32_t *ids; /* of all requests */
};
void example_free(struct example *example);

struct prompts;

/* Reads the documents. tokenizer may be NULL where only prompts_check() follows. task, tokenizer and source outlive the call; task and tokenizer the prompts too. */
int prompts_open(const struct task *task, int subtask, const struct prompt_options *options,
                 const struct task_source *source, const struct tokenizer *tokenizer,
                 struct prompts **ret_prompts, struct error *error);
void prompts_free(struct prompts *prompts);
int64_t prompts_count(const struct prompts *prompts);
/* The file that examples come from, as the definition calls it; NULL at 0 shots. */
const char *prompts_pool_file(const struct prompts *prompts);
/* The split that examples were to come from, where its files are absent and they come from another; else NULL. */
const char *prompts_missing_pool(const struct prompts *prompts);
/* Render every document, and the whole pool, without taking a step. */
int prompts_check(const struct prompts *prompts, struct error *error);
/* The requests of the next document; ret_example may be NULL: it is passed by. Errors name file and line. */
int prompts_next(struct prompts *prompts, struct example *ret_example, struct error *error);

#endif
