/* score_list.h: scored tokens in a row, with their alternatives, in arrays that grow by doubling. */
#ifndef ENGINE_INFERENCE_SCORE_LIST_H
#define ENGINE_INFERENCE_SCORE_LIST_H

#include "engine/inference/generator.h"

/* Zeroed but for n_top = empty. */
struct score_list {
    int32_t n_top; /* alternatives kept of each token, 0..KERNEL_TOP_MAX */
    int32_t count, capacity;
    struct scored_token *tokens; /* [capacity]; their pointers are set by score_list_view alone */
    int32_t *top_ids;            /* [capacity,n_top] */
    float *top_logprobs;         /* [capacity,n_top] */
};

void score_list_free(struct score_list *list);
/* top_ids and top_logprobs: [n_top], or NULL for a token without a score (the first of a prompt; logprob is
 * then NaN). Returns 0 or ERROR_NO_MEMORY. */
int score_list_push(struct score_list *list, int32_t id, float logprob, const int32_t *top_ids,
                    const float *top_logprobs);
/* All of another list with the same n_top. */
int score_list_append(struct score_list *list, const struct score_list *other);
/* The tokens, valid until the list changes; NULL when there are none. */
const struct scored_token *score_list_view(struct score_list *list);

#endif
