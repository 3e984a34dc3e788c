/* run.h: an evaluation of one model: the units of a plan, window by window, batch by batch. Device's owner thread. */
#ifndef ENGINE_EVALUATION_RUN_H
#define ENGINE_EVALUATION_RUN_H

#include "engine/evaluation/plan.h"
#include "engine/evaluation/scorer.h"

/* A document that has been scored. */
struct example_result {
    const struct evaluation_unit *unit;
    const struct example *example;      /* its requests and their ids */
    const struct request_score *scores; /* [example->n_requests] */
    int choice, choice_norm;            /* the most likely; by length too. Of a target 0 */
    bool acc, acc_norm;                 /* right. Of a target: greedy */
};

struct evaluation_run_options {
    const struct evaluation_plan *plan; /* outlives the run, as all that follows */
    struct model *model;
    const struct tokenizer *tokenizer;
    const struct adapter *adapter; /* of this model; NULL = the base */
    int64_t max_tokens;            /* of a batch; 0 = what the device has use for */
    int32_t max_seqs, max_states;  /* the same; states for prefixes that wait for their children */
    void *arg;
    /* Has this document been scored before? */
    bool (*is_done)(void *arg, const struct evaluation_unit *unit, int64_t document);
    /* Called from evaluation_run_advance(), where others may have their turn; or NULL. It must not touch the run. */
    void (*yield)(void *arg);
    void *yield_arg;
    /* The same, of a document that has been scored. */
    void (*result)(void *arg, const struct example_result *result);
};

struct evaluation_run;

int evaluation_run_open(const struct evaluation_run_options *options, struct evaluation_run **ret_run,
                        struct error *error);
void evaluation_run_close(struct evaluation_run *run);
/* One batch. Returns 1 while there is more, 0 at the end, or a negative code. */
int evaluation_run_advance(struct evaluation_run *run, struct error *error);
/* What of the requests that have been begun went through the model. unit: of the last batch; NULL before the first. */
void evaluation_run_status(const struct evaluation_run *run, struct scorer_status *ret_status,
                           const struct evaluation_unit **ret_unit);
/* The file that the unit's few-shot examples come from, as the definition calls it; NULL at 0 shots. */
const char *evaluation_run_pool(const struct evaluation_run *run);

#endif
