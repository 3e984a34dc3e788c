/* bpe.h: byte pair merges in O(n log n): a heap of candidate merges over a linked list of symbols. The table
 * of merges is filled once while loading, then read by any thread; a bpe_scratch belongs to one call. */
#ifndef ENGINE_TEXT_BPE_H
#define ENGINE_TEXT_BPE_H

#include "engine/text/tokenizer.h"

#include <stddef.h>
#include <stdint.h>

struct bpe_merge {
    uint64_t pair; /* left id << 32 | right id; UINT64_MAX = free slot */
    int32_t rank, id;
};

struct bpe {
    int32_t byte_ids[256];    /* the token of each single byte; -1 = none */
    struct bpe_merge *merges; /* open addressing */
    size_t n_slots;
};

struct bpe_scratch {
    struct bpe_symbol *symbols;
    struct bpe_candidate *heap; /* at most 3 per symbol */
    size_t capacity;            /* symbols */
};

/* Room for n_merges. Returns 0 or ERROR_NO_MEMORY. */
int bpe_reserve(struct bpe *bpe, size_t n_merges);
/* Merge left and right into id; of two merges of one pair the later one holds, as in Hugging Face's. */
void bpe_add_merge(struct bpe *bpe, int32_t left, int32_t right, int32_t rank, int32_t id);
void bpe_clear(struct bpe *bpe);

/* Append the ids of one word (length < 2^31). Returns 0 or ERROR_NO_MEMORY. */
int bpe_encode(const struct bpe *bpe, struct bpe_scratch *scratch, const char *word, size_t length,
               struct token_list *ids);
void bpe_scratch_free(struct bpe_scratch *scratch);

#endif
