/* random_mt.c: see random_mt.h. Pure; the caller owns the state. */
#include "base/random_mt.h"

#include "base/error.h"

#include <stdbool.h>
#include <stdlib.h>

enum { MIDDLE = 397 };

static void seed_word(struct random_mt *random, uint32_t seed)
{
    random->words[0] = seed;
    for (uint32_t i = 1; i < RANDOM_MT_WORDS; i++) {
        uint32_t before = random->words[i - 1];
        random->words[i] = 1812433253u * (before ^ before >> 30) + i;
    }
    random->next = RANDOM_MT_WORDS;
}

/* init_by_array of the authors' 2002 version with the seed's 32-bit words, the lowest first, as the key. */
void random_mt_seed(struct random_mt *random, uint64_t seed)
{
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t n_key = key[1] ? 2 : 1;
    uint32_t *words = random->words, at = 1, from = 0;
    seed_word(random, 19650218u);
    for (int step = 0; step < RANDOM_MT_WORDS; step++) {
        words[at] = (words[at] ^ (words[at - 1] ^ words[at - 1] >> 30) * 1664525u) + key[from] + from;
        if (++at == RANDOM_MT_WORDS) {
            words[0] = words[RANDOM_MT_WORDS - 1];
            at = 1;
        }
        from = from + 1 == n_key ? 0 : from + 1;
    }
    for (int step = 0; step < RANDOM_MT_WORDS - 1; step++) {
        words[at] = (words[at] ^ (words[at - 1] ^ words[at - 1] >> 30) * 1566083941u) - at;
        if (++at == RANDOM_MT_WORDS) {
            words[0] = words[RANDOM_MT_WORDS - 1];
            at = 1;
        }
    }
    words[0] = 0x80000000u;
}

static void make_words(struct random_mt *random)
{
    uint32_t *words = random->words;
    for (int i = 0; i < RANDOM_MT_WORDS; i++) {
        uint32_t mixed = (words[i] & 0x80000000u) | (words[(i + 1) % RANDOM_MT_WORDS] & 0x7fffffffu);
        words[i] = words[(i + MIDDLE) % RANDOM_MT_WORDS] ^ mixed >> 1 ^ (mixed & 1 ? 0x9908b0dfu : 0);
    }
    random->next = 0;
}

static uint32_t next_word(struct random_mt *random)
{
    if (random->next == RANDOM_MT_WORDS)
        make_words(random);
    uint32_t word = random->words[random->next++];
    word ^= word >> 11;
    word ^= word << 7 & 0x9d2c5680u;
    word ^= word << 15 & 0xefc60000u;
    return word ^ word >> 18;
}

uint64_t random_mt_bits(struct random_mt *random, int n)
{
    uint64_t low = next_word(random);
    if (n <= 32)
        return low >> (32 - n);
    uint64_t high = next_word(random) >> (64 - n);
    return high << 32 | low;
}

uint64_t random_mt_below(struct random_mt *random, uint64_t n)
{
    int bits = 64 - __builtin_clzll(n);
    uint64_t drawn = random_mt_bits(random, bits);
    while (drawn >= n)
        drawn = random_mt_bits(random, bits);
    return drawn;
}

static bool contains(const int64_t *values, int64_t count, int64_t value)
{
    for (int64_t i = 0; i < count; i++)
        if (values[i] == value)
            return true;
    return false;
}

/* Python draws from a shrinking list where that list is smaller than a set of the sample would be, and draws again what it already
 * has otherwise; the two consume the generator differently, so the border matters. Python's border: a set of up to 5 takes
 * 21 places of a list, a larger one as many more as the power of four at or above 3 k. */
int random_mt_sample(struct random_mt *random, int64_t n, int64_t k, int64_t *ret_indices)
{
    if (k < 0 || k > n)
        return ERROR_INVALID;
    int64_t border = 21;
    if (k > 5) {
        int64_t power = 1;
        while (power < 3 * k)
            power *= 4;
        border += power;
    }
    if (n > border) {
        for (int64_t i = 0; i < k; i++) {
            do
                ret_indices[i] = (int64_t)random_mt_below(random, (uint64_t)n);
            while (contains(ret_indices, i, ret_indices[i]));
        }
        return 0;
    }
    int64_t *pool = malloc((size_t)(n > 0 ? n : 1) * sizeof *pool);
    if (!pool)
        return ERROR_NO_MEMORY;
    for (int64_t i = 0; i < n; i++)
        pool[i] = i;
    for (int64_t i = 0; i < k; i++) {
        int64_t drawn = (int64_t)random_mt_below(random, (uint64_t)(n - i));
        ret_indices[i] = pool[drawn];
        pool[drawn] = pool[n - i - 1];
    }
    free(pool);
    return 0;
}
