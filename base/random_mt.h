/* random_mt.h: the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998) as CPython's random.Random seeds and uses it, so that a
 * sample drawn here is the sample that Python draws. Not for secrets. */
#ifndef BASE_RANDOM_MT_H
#define BASE_RANDOM_MT_H

#include <stdint.h>

enum { RANDOM_MT_WORDS = 624 };

struct random_mt {
    uint32_t words[RANDOM_MT_WORDS];
    int32_t next; /* index of the next word to give out; RANDOM_MT_WORDS = make new ones first */
};

/* random.Random(seed) of CPython 3.2 and later. */
void random_mt_seed(struct random_mt *random, uint64_t seed);
/* getrandbits(n), 1 <= n <= 64. */
uint64_t random_mt_bits(struct random_mt *random, int n);
/* Uniform in 0..n-1, n > 0: Random._randbelow(n). */
uint64_t random_mt_below(struct random_mt *random, uint64_t n);
/* sample(range(n), k) of CPython 3.11 and later: k different indices in the order in which they were drawn. Returns 0,
 * ERROR_INVALID when k is negative or above n (nothing is drawn then), or ERROR_NO_MEMORY. */
int random_mt_sample(struct random_mt *random, int64_t n, int64_t k, int64_t *ret_indices);

#endif
