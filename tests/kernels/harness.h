/* harness.h: runs one op on several backends and compares what came out.
 *
 * A case is a function that asks its session for arrays, fills an argument struct, and calls the op. The
 * harness calls it once with the reference, then with the CPU backend at every instruction set of this
 * machine and with 1, 2 and 3 threads; the random numbers are the same each time. Afterwards it checks that
 *   - nothing outside the arrays, between strided rows, or inside inputs was written (sentinels),
 *   - every element of an output was written (outputs begin as NaN, unless they accumulate),
 *   - outputs equal the reference's: normalised error sum (a-b)^2 / sum b^2 below the array's tolerance,
 *     integers exactly,
 *   - the number of threads changes no bit.
 * With ADDERD_TEST_CUDA=1 the CUDA backend takes the CPU's place (mirror.h): with activations of each type, inputs
 * rounded to it for the reference as well; with every other array 4 bytes off a cache line and with all of them on one,
 * which take different paths; and twice, which must give the same bits. Tolerances there: the array's own for F32,
 * BF16_ERROR and F16_ERROR for the others, whose ids may differ where logits tie but for the rounding.
 * With ADDERD_TEST_SMALL=1 a case function runs with the first of its parameters and ever fewer of the following (the
 * 1st, 2nd, 3rd, 5th, 9th ...), and not twice: for tools that slow it down a hundredfold.
 * ADDERD_TEST_ONLY=PATTERN runs the test functions whose names it matches (* and ? are wild).
 * Sentinels are NaN, so that reading one shows in the result as well. */
#ifndef TESTS_KERNELS_HARNESS_H
#define TESTS_KERNELS_HARNESS_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "kernels/cpu/device.h"
#include "kernels/kernels.h"

enum { BLOCKS_MAX = 80, GUARD_BYTES = 256 };
/* A quiet NaN, as float and as the upper half of it in 16 bits. */
enum { SENTINEL = 0x7fc5e471 };

enum block_kind { BLOCK_INPUT, BLOCK_OUTPUT, BLOCK_SCRATCH };

struct block {
    const char *name;
    enum block_kind kind;
    enum kernel_type type;
    int64_t rows, columns, stride;
    double tolerance;
    bool activation; /* see mark_activation */
    unsigned char *allocation;
    unsigned char *raw, *before; /* with guards; as it was when the case got it */
    size_t bytes;                /* between the guards */
    /* While an op of the mirror runs: */
    unsigned char *device_allocation, *device; /* device memory; begins with the guard, as raw does */
    unsigned char *uploaded;                   /* what was copied there */
    enum kernel_type device_type;
    size_t device_bytes;
};

struct session {
    const struct kernel_ops *ops;
    struct kernel_device *device;
    enum kernel_type act; /* of activations on the device; inputs are rounded to it */
    bool aligned;         /* arrays begin on cache lines */
    uint64_t random;
    char label[128];
    struct block blocks[BLOCKS_MAX];
    int n_blocks;
};

typedef void (*case_function)(struct session *session, const void *param);

/* Normalised errors that are good enough. */
#define ELEMENTWISE 1e-12
#define SUMMED      1e-11
/* With activations in 16 bits. An element that is rounded once is off by 2.8e-6 and 4.4e-8 on average; a linear layer's
 * output is a sum of products of which one went through four roundings (u, a factor, their product, the sum), and an
 * array of few elements is some times worse than the average. */
#define BF16_ERROR 5e-5
#define F16_ERROR  1e-6
/* F16's spacing near zero is 2^-24: what an element below 2^-14 loses however well it was computed, squared. */
#define F16_FLOOR 0x1p-50

/* Runs and compares as told above. `label` says which case, for the message. */
void compare_backends(case_function function, const void *param, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The backends of this run beside the reference, for tests that look at results themselves: NULL after the last. */
const struct kernel_ops *tested_backend(int index);
/* The best of them. */
const struct kernel_ops *best_backend(void);

/* One session on a backend, for tests that look at results themselves. */
void session_open(struct session *session, const struct kernel_ops *ops, int threads);
void session_close(struct session *session);

/* splitmix64, and uniform in [low, high). */
uint64_t random_next(struct session *session);
float random_float(struct session *session, float low, float high);

/* Arrays live until the session closes. rows x columns in rows of `stride` elements. */
float *input_floats(struct session *session, const char *name, int64_t count, float low, float high);
float *input_rows(struct session *session, const char *name, int64_t rows, int64_t columns, int64_t stride,
                  float low, float high);
/* Weights of any storage type. */
void *input_weights(struct session *session, const char *name, enum kernel_type type, int64_t rows,
                    int64_t columns, int64_t stride, float low, float high);
/* Ids in low..high-1. */
int32_t *input_ids(struct session *session, const char *name, int64_t count, int32_t low, int32_t high);
/* Where an op takes an array of either kind (a product's second factor and its result), it is fp32 or a weight unless
 * marked: this one has the type of the activations. */
void mark_activation(struct session *session, const void *array);
/* For a case that changed its inputs: what they hold now is what the op must leave alone. */
void inputs_settle(struct session *session);
float *output_floats(struct session *session, const char *name, int64_t count, double tolerance);
float *output_rows(struct session *session, const char *name, int64_t rows, int64_t columns, int64_t stride,
                   double tolerance);
int32_t *output_ids(struct session *session, const char *name, int64_t count);
/* Begins with random content, as what accumulates does. */
float *accumulated_rows(struct session *session, const char *name, int64_t rows, int64_t columns,
                        int64_t stride, double tolerance);
void *scratch_bytes(struct session *session, const char *name, int64_t bytes);

/* Ways to cut tokens into sequences. Returns the starts (n_seqs + 1), freed with the session. */
enum cut { CUT_ONE, CUT_SINGLES, CUT_MIXED, CUT_EMPTY_ENDS, CUT_COUNT, CUT_SHORT = CUT_COUNT };
int32_t *cut_tokens(struct session *session, enum cut cut, int64_t tokens, int32_t *ret_n_seqs);
/* A permutation of 0..count-1, but for some that are -1 or, where they may be shared, that of the first. */
int32_t *permuted_slots(struct session *session, int32_t count, bool shared);

#endif
