/* score_list.c: see score_list.h. */
#include "engine/inference/score_list.h"

#include <stdlib.h>
#include <string.h>

void score_list_free(struct score_list *list)
{
    free(list->tokens);
    free(list->top_ids);
    free(list->top_logprobs);
    *list = (struct score_list){.n_top = list->n_top};
}

/* A failed call leaves arrays that are larger than capacity says, which harms nobody. */
static int reserve(struct score_list *list, int32_t extra)
{
    if (extra <= list->capacity - list->count)
        return 0;
    int64_t need = (int64_t)list->count + extra;
    int64_t capacity = list->capacity ? list->capacity : 16;
    while (capacity < need)
        capacity *= 2;
    if (capacity > INT32_MAX)
        return ERROR_NO_MEMORY;
    struct scored_token *tokens = realloc(list->tokens, (size_t)capacity * sizeof *tokens);
    if (!tokens)
        return ERROR_NO_MEMORY;
    list->tokens = tokens;
    if (list->n_top) {
        size_t n = (size_t)capacity * (size_t)list->n_top;
        int32_t *top_ids = realloc(list->top_ids, n * sizeof *top_ids);
        if (!top_ids)
            return ERROR_NO_MEMORY;
        list->top_ids = top_ids;
        float *top_logprobs = realloc(list->top_logprobs, n * sizeof *top_logprobs);
        if (!top_logprobs)
            return ERROR_NO_MEMORY;
        list->top_logprobs = top_logprobs;
    }
    list->capacity = (int32_t)capacity;
    return 0;
}

int score_list_push(struct score_list *list, int32_t id, float logprob, const int32_t *top_ids,
                    const float *top_logprobs)
{
    int status = reserve(list, 1);
    if (status)
        return status;
    int32_t n_top = top_ids ? list->n_top : 0;
    if (n_top) {
        size_t at = (size_t)list->count * (size_t)list->n_top;
        memcpy(list->top_ids + at, top_ids, (size_t)n_top * sizeof *top_ids);
        memcpy(list->top_logprobs + at, top_logprobs, (size_t)n_top * sizeof *top_logprobs);
    }
    list->tokens[list->count++] = (struct scored_token){.id = id, .logprob = logprob, .n_top = n_top};
    return 0;
}

int score_list_append(struct score_list *list, const struct score_list *other)
{
    if (!other->count)
        return 0;
    int status = reserve(list, other->count);
    if (status)
        return status;
    memcpy(list->tokens + list->count, other->tokens, (size_t)other->count * sizeof *other->tokens);
    if (list->n_top) {
        size_t at = (size_t)list->count * (size_t)list->n_top;
        size_t n = (size_t)other->count * (size_t)list->n_top;
        memcpy(list->top_ids + at, other->top_ids, n * sizeof *other->top_ids);
        memcpy(list->top_logprobs + at, other->top_logprobs, n * sizeof *other->top_logprobs);
    }
    list->count += other->count;
    return 0;
}

const struct scored_token *score_list_view(struct score_list *list)
{
    for (int32_t i = 0; i < list->count; i++) {
        size_t at = (size_t)i * (size_t)list->n_top;
        list->tokens[i].top_ids = list->tokens[i].n_top ? list->top_ids + at : NULL;
        list->tokens[i].top_logprobs = list->tokens[i].n_top ? list->top_logprobs + at : NULL;
    }
    return list->count ? list->tokens : NULL;
}
