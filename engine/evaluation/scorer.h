/* scorer.h: log-likelihoods of many requests by one model, each shared prefix run once. Device's owner thread.
 *
 * A window of requests becomes a forest (forest.h), whose nodes run in batches, from their parents' recurrent states. On
 * the CPU a request's score has the same bits whatever else is in the batch, wherever its row is cut, and however many
 * states and tokens there is room for. */
#ifndef ENGINE_EVALUATION_SCORER_H
#define ENGINE_EVALUATION_SCORER_H

#include "base/error.h"
#include "engine/evaluation/forest.h"
#include "engine/models/model.h"

#include <stdbool.h>
#include <stdint.h>

struct scorer_options {
    const struct adapter *adapter; /* NULL = the base; outlives the scorer */
    int64_t max_tokens;            /* of a batch */
    int32_t max_seqs;              /* the same */
    int32_t max_states;            /* kept for nodes that go on, and for their children */
    bool share;                    /* false: every request is run by itself */
    void (*yield)(void *arg);      /* between layers, as forward_request's; or NULL */
    void *yield_arg;
};

/* Of one request. */
struct request_score {
    double log_likelihood;
    bool greedy;       /* each token is the most probable one (or as probable) */
    int32_t n_missing; /* scored ids that have not been run; 0 = final */
};

struct scorer;

int scorer_create(struct model *model, const struct scorer_options *options, struct scorer **ret_scorer,
                  struct error *error);
void scorer_free(struct scorer *scorer);

/* Begin a window. ids must stay where they are until the next. scores: [n_rows], written from now on by scorer_advance(). */
int scorer_begin(struct scorer *scorer, const struct forest_row *rows, int32_t n_rows,
                 struct request_score *scores, struct error *error);
/* Run one batch. Returns 1 while there is more to run, 0 when every score is final, or a negative code. */
int scorer_advance(struct scorer *scorer, struct error *error);
/* The same in two: a GPU is at work between them. *ret_tokens: in the batch. */
int scorer_launch(struct scorer *scorer, int32_t *ret_tokens, struct error *error);
int scorer_collect(struct scorer *scorer, struct error *error);

struct scorer_status {
    int64_t tokens_run;  /* through the model since scorer_create() */
    int64_t tokens_said; /* that the requests so far would take one by one */
    int64_t batches;
};
void scorer_status(const struct scorer *scorer, struct scorer_status *ret_status);

#endif
