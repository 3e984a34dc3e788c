/* bpe.c: see bpe.h.
 *
 * The word starts as one symbol a byte. Every pair of neighbours that has a merge waits in a heap ordered by
 * rank, then position. The lowest is taken out, its two symbols become one (the left one's place), and the
 * new symbol's two pairs join the heap. Candidates whose symbols have changed since are recognised when they
 * come out. Each merge removes a symbol and adds at most two candidates, hence O(n log n). */
#include "engine/text/bpe.h"

#include "base/error.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

struct bpe_symbol {
    int32_t id;             /* -1 = merged into the one before it */
    int32_t previous, next; /* -1 = none */
};

struct bpe_candidate {
    uint64_t order; /* rank << 32 | position of the left symbol */
    int32_t id;     /* what the pair becomes */
};

static uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static struct bpe_merge *slot_of(const struct bpe *bpe, uint64_t pair)
{
    size_t mask = bpe->n_slots - 1, slot = (pair * 0x9E3779B97F4A7C15u) >> 32 & mask;
    while (bpe->merges[slot].pair != pair && bpe->merges[slot].pair != UINT64_MAX)
        slot = (slot + 1) & mask;
    return &bpe->merges[slot];
}

int bpe_reserve(struct bpe *bpe, size_t n_merges)
{
    size_t n_slots = 64;
    while (n_slots < 2 * n_merges)
        n_slots *= 2;
    struct bpe_merge *merges = malloc(n_slots * sizeof *merges);
    if (!merges)
        return ERROR_NO_MEMORY;
    memset(merges, 0xFF, n_slots * sizeof *merges);
    free(bpe->merges);
    bpe->merges = merges;
    bpe->n_slots = n_slots;
    return 0;
}

void bpe_add_merge(struct bpe *bpe, int32_t left, int32_t right, int32_t rank, int32_t id)
{
    uint64_t pair = pair_of(left, right);
    *slot_of(bpe, pair) = (struct bpe_merge){.pair = pair, .rank = rank, .id = id};
}

void bpe_clear(struct bpe *bpe)
{
    free(bpe->merges);
    bpe->merges = NULL;
    bpe->n_slots = 0;
}

static int scratch_reserve(struct bpe_scratch *scratch, size_t n)
{
    if (n <= scratch->capacity)
        return 0;
    size_t capacity = n < 64 ? 64 : n + n / 2;
    bpe_scratch_free(scratch);
    scratch->symbols = malloc(capacity * sizeof *scratch->symbols);
    scratch->heap = malloc(3 * capacity * sizeof *scratch->heap);
    if (!scratch->symbols || !scratch->heap)
        return ERROR_NO_MEMORY;
    scratch->capacity = capacity;
    return 0;
}

void bpe_scratch_free(struct bpe_scratch *scratch)
{
    free(scratch->symbols);
    free(scratch->heap);
    *scratch = (struct bpe_scratch){0};
}

/* Put the pair that begins at position into the heap, if it has a merge. */
static void push(const struct bpe *bpe, const struct bpe_scratch *scratch, size_t *heap_size,
                 int32_t position)
{
    const struct bpe_symbol *left = &scratch->symbols[position];
    if (left->next < 0)
        return;
    const struct bpe_merge *merge = slot_of(bpe, pair_of(left->id, scratch->symbols[left->next].id));
    if (merge->pair == UINT64_MAX)
        return;
    struct bpe_candidate candidate = {(uint64_t)(uint32_t)merge->rank << 32 | (uint32_t)position, merge->id};
    struct bpe_candidate *heap = scratch->heap;
    size_t at = (*heap_size)++;
    for (; at > 0 && heap[(at - 1) / 2].order > candidate.order; at = (at - 1) / 2)
        heap[at] = heap[(at - 1) / 2];
    heap[at] = candidate;
}

static struct bpe_candidate pop(struct bpe_candidate *heap, size_t *heap_size)
{
    struct bpe_candidate top = heap[0], last = heap[--*heap_size];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= *heap_size)
            break;
        if (child + 1 < *heap_size && heap[child + 1].order < heap[child].order)
            child++;
        if (heap[child].order >= last.order)
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = last;
    return top;
}

int bpe_encode(const struct bpe *bpe, struct bpe_scratch *scratch, const char *word, size_t length,
               struct token_list *ids)
{
    if (scratch_reserve(scratch, length))
        return ERROR_NO_MEMORY;
    struct bpe_symbol *symbols = scratch->symbols;
    int32_t n = 0;
    for (size_t i = 0; i < length; i++, n++)
        symbols[n] = (struct bpe_symbol){bpe->byte_ids[(unsigned char)word[i]], n - 1, n + 1};
    if (n > 0)
        symbols[n - 1].next = -1;

    size_t heap_size = 0;
    for (int32_t i = 0; i + 1 < n; i++)
        push(bpe, scratch, &heap_size, i);
    while (heap_size > 0) {
        struct bpe_candidate top = pop(scratch->heap, &heap_size);
        int32_t position = (int32_t)(top.order & UINT32_MAX);
        struct bpe_symbol *left = &symbols[position];
        if (left->id < 0 || left->next < 0)
            continue;
        struct bpe_symbol *right = &symbols[left->next];
        const struct bpe_merge *merge = slot_of(bpe, pair_of(left->id, right->id));
        if (merge->pair == UINT64_MAX || merge->id != top.id)
            continue; /* one of the two has changed */
        left->id = top.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0)
            symbols[left->next].previous = position;
        if (left->previous >= 0)
            push(bpe, scratch, &heap_size, left->previous);
        push(bpe, scratch, &heap_size, position);
    }
    for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = symbols[i].next)
        if (token_list_push(ids, symbols[i].id))
            return ERROR_NO_MEMORY;
    return 0;
}
