/* sample.cu: choosing the next token on the device; a thread block a row.
 *
 * The vocabulary is never sorted. Every filter keeps the first so many ids in descending order of logit (ties to the
 * lowest id), so it is told by the key of the last id that it keeps. A key is the logit's bits, made to sort as
 * unsigned, above the id's complement: no two are equal. The last key comes out of a radix selection over weights that
 * are integers, exp() scaled by a power of two such that their sum fits 64 bits: their sums depend on no order, so that
 * histograms may be filled by atomics and a draw gives the same id every time. The rounding, 2^-46 of the highest
 * weight for a vocabulary of 65536, is below what the log-probabilities resolve. */
#include "kernels/cuda/common.cuh"

extern "C" {
#include "kernels/philox.h"
}
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    THREADS = 512,
    RADIX_BITS = 8,
    BINS = 1 << RADIX_BITS,
    KEY_BITS = 64,
    ROWS_AT_ONCE = 64, /* bounds the scratch: 16 bytes a row and id */
};

typedef unsigned long long word; /* what integer atomics take */

/* A row's settings as they travel. Offsets into the staged ids and biases of all rows. */
struct row_settings {
    float temperature, top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    float draw; /* in [0,1), a multiple of 2^-24 */
    int32_t top_k, banned, n_top;
    int64_t history, bias; /* first entries */
    int32_t n_history, n_prompt, n_bias;
};

struct sample_task {
    const float *logits;
    int64_t stride, vocab;
    const struct row_settings *rows;
    const int32_t *history;
    const struct logit_bias *bias;
    float *adjusted;  /* [rows,vocab]; NaN marks an id that may not be chosen */
    int32_t *counts;  /* [rows,vocab], zero between rows' uses */
    word *weights;    /* [rows,vocab] */
    int weight_shift; /* weight = round(exp(..) 2^shift) */
    int32_t *ids;     /* [rows] */
    float *logprobs;
    int32_t *top_ids; /* [rows,KERNEL_TOP_MAX] */
    float *top_logprobs;
};

/* ---- keys ---- */

/* Sorts as the number does; NaN is below all. */
static __device__ __forceinline__ word key_of(float logit, int64_t id)
{
    if (isnan(logit))
        return 0;
    uint32_t bits = __float_as_uint(logit + 0.0f); /* -0 is 0 */
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (word)bits << 32 | (uint32_t) ~(uint32_t)id;
}

static __device__ __forceinline__ int32_t id_of(word key)
{
    return (int32_t) ~(uint32_t)key;
}

static __device__ word block_max(word v)
{
    __shared__ word partial[THREADS / WARP];
    for (int lane = WARP / 2; lane > 0; lane /= 2) {
        word other = __shfl_xor_sync(0xffffffffu, v, lane);
        v = v > other ? v : other;
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0)
        partial[threadIdx.x / WARP] = v;
    __syncthreads();
    v = partial[0];
    for (int i = 1; i < THREADS / WARP; i++)
        v = v > partial[i] ? v : partial[i];
    return v;
}

/* The highest key of a row below `limit`, or 0. */
static __device__ word highest_key(const float *logits, int64_t vocab, word limit)
{
    word best = 0;
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS) {
        word key = key_of(logits[i], i);
        if (key < limit && key > best)
            best = key;
    }
    return block_max(best);
}

/* ---- the adjusted logits ---- */

enum { SEEN = 1 << 30 }; /* above the count of generated tokens */

static __device__ void adjust(const struct sample_task &task, const struct row_settings &row,
                              const float *logits, float *adjusted, int32_t *counts)
{
    const int32_t *history = task.history + row.history;
    for (int32_t i = threadIdx.x; i < row.n_history; i += THREADS) {
        atomicOr(&counts[history[i]], SEEN);
        if (i >= row.n_prompt)
            atomicAdd(&counts[history[i]], 1);
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < task.vocab; i += THREADS) {
        float v = logits[i];
        int32_t count = row.n_history > 0 ? counts[i] : 0;
        if (count != 0) {
            counts[i] = 0;
            v = v > 0.0f ? v / row.repetition_penalty : v * row.repetition_penalty;
            int32_t generated = count & (SEEN - 1);
            if (generated > 0)
                v -= row.presence_penalty +
                     __fmul_rn(row.frequency_penalty, (float)generated); /* as the CPU rounds it */
        }
        adjusted[i] = v;
    }
    __syncthreads();
    if (threadIdx.x == 0) { /* in order: an id may be named twice */
        for (int32_t i = 0; i < row.n_bias; i++)
            adjusted[task.bias[row.bias + i].id] += task.bias[row.bias + i].bias;
        if (row.banned >= 0 && row.banned < task.vocab)
            adjusted[row.banned] = NAN;
    }
    __syncthreads();
}

/* ---- filters ---- */

/* The greatest key such that the measures of all keys at or above it sum to `wanted` or more: its bits are found from
 * the top, a digit at a time. measure(i) is 1 to count, or the weight. The whole must be at least `wanted` > 0. */
template <typename Measure>
static __device__ word select_key(const float *adjusted, int64_t vocab, word lowest, word wanted,
                                  Measure measure)
{
    __shared__ word bins[BINS];
    __shared__ word found, rest;
    word prefix = 0;
    for (int shift = KEY_BITS - RADIX_BITS; shift >= 0; shift -= RADIX_BITS) {
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            bins[i] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < vocab; i += THREADS) {
            word key = key_of(adjusted[i], i);
            bool inside = shift == KEY_BITS - RADIX_BITS || key >> (shift + RADIX_BITS) == prefix;
            if (key >= lowest && key != 0 && inside)
                atomicAdd(&bins[key >> shift & (BINS - 1)], measure(i));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = BINS - 1;
            while (digit > 0 && bins[digit] < wanted)
                wanted -= bins[digit--];
            found = (word)digit;
            rest = wanted;
        }
        __syncthreads();
        prefix = prefix << RADIX_BITS | found;
        wanted = rest;
        __syncthreads();
    }
    return prefix;
}

static __device__ word sum_from(const float *adjusted, const word *weights, int64_t vocab, word lowest)
{
    word sum = 0;
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS)
        if (key_of(adjusted[i], i) >= lowest)
            sum += weights[i];
    return block_sum<THREADS>(sum);
}

/* Weights of all ids; 0 for those that min-p drops, which are the last ones too. */
static __device__ void weigh(const struct row_settings &row, const float *adjusted, word *weights,
                             int64_t vocab, int shift, word first)
{
    double highest = (double)adjusted[id_of(first)], scale = ldexp(1.0, shift);
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS) {
        double weight = 0;
        if (!isnan(adjusted[i]))
            weight = exp(((double)adjusted[i] - highest) / (double)row.temperature);
        weights[i] = (word)__double2ull_rn(weight * scale);
    }
    __syncthreads();
}

/* The key of the last id that top-k and top-p keep, then of min-p. */
static __device__ word filter(const struct sample_task &task, const struct row_settings &row,
                              const float *adjusted, const word *weights, word first)
{
    word lowest = 1; /* all that is no NaN */
    if (row.top_k > 0) {
        word choosable = 0;
        for (int64_t i = threadIdx.x; i < task.vocab; i += THREADS)
            choosable += !isnan(adjusted[i]);
        choosable = block_sum<THREADS>(choosable);
        if ((word)row.top_k < choosable)
            lowest =
                select_key(adjusted, task.vocab, lowest, (word)row.top_k, [](int64_t) { return (word)1; });
    }
    if (row.top_p < 1.0f) {
        word total = sum_from(adjusted, weights, task.vocab, lowest);
        word wanted = (word)ceil((double)row.top_p * (double)total);
        wanted = wanted < 1 ? 1 : wanted > total ? total : wanted;
        lowest = select_key(adjusted, task.vocab, lowest, wanted, [=](int64_t i) { return weights[i]; });
    }
    if (row.min_p > 0.0f) {
        double highest = (double)adjusted[id_of(first)];
        word last = first;
        for (int64_t i = threadIdx.x; i < task.vocab; i += THREADS) {
            word key = key_of(adjusted[i], i);
            if (key >= lowest && key < last &&
                exp(((double)adjusted[i] - highest) / (double)row.temperature) >= (double)row.min_p)
                last = key;
        }
        lowest = ~block_max(~last);
    }
    return lowest;
}

/* The first id in ascending order whose running sum of weights passes draw * total. Every thread sums a stretch of
 * ids; the one whose stretch holds the threshold walks it. */
static __device__ int32_t draw_id(const float *adjusted, const word *weights, int64_t vocab, word lowest,
                                  float draw)
{
    __shared__ word sums[THREADS];
    __shared__ int32_t chosen;
    int64_t stretch = divide_up(vocab, THREADS), begin = threadIdx.x * stretch;
    int64_t end = begin + stretch < vocab ? begin + stretch : vocab;
    word sum = 0;
    for (int64_t i = begin; i < end; i++)
        if (key_of(adjusted[i], i) >= lowest)
            sum += weights[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    word total = 0, before = 0;
    for (int i = 0; i < THREADS; i++) {
        before += i < (int)threadIdx.x ? sums[i] : 0;
        total += sums[i];
    }
    /* floor(m total / 2^24) for draw = m / 2^24 */
    word m = (word)(draw * 0x1p24f);
    word threshold = __umul64hi(m, total) << 40 | (m * total) >> 24;
    if (before <= threshold && threshold < before + sum) {
        for (int64_t i = begin; i < end; i++) {
            if (key_of(adjusted[i], i) < lowest)
                continue;
            before += weights[i];
            if (threshold < before) {
                chosen = (int32_t)i;
                break;
            }
        }
    }
    __syncthreads();
    return chosen;
}

/* ---- a row ---- */

static __device__ double log_sum_exp(const float *logits, int64_t vocab)
{
    float highest = -INFINITY;
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS)
        highest = fmaxf(highest, logits[i]);
    word key = block_max(key_of(highest, 0));
    uint32_t bits = (uint32_t)(key >> 32);
    double top = (double)__uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits), sum = 0;
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS)
        sum += exp((double)logits[i] - top);
    return top + log(block_sum<THREADS>(sum));
}

static __device__ int32_t choose(const struct sample_task &task, const struct row_settings &row,
                                 const float *adjusted, word *weights)
{
    word first = highest_key(adjusted, task.vocab, ~(word)0);
    if (first == 0)
        return 0; /* nothing may be chosen */
    if (row.temperature == 0.0f || isinf(adjusted[id_of(first)]))
        return id_of(first);
    weigh(row, adjusted, weights, task.vocab, task.weight_shift, first);
    word lowest = filter(task, row, adjusted, weights, first);
    return draw_id(adjusted, weights, task.vocab, lowest, row.draw);
}

static __global__ void sample_kernel(struct sample_task task)
{
    int64_t r = blockIdx.x;
    const struct row_settings row = task.rows[r];
    const float *logits = task.logits + r * task.stride;
    float *adjusted = task.adjusted + r * task.vocab;
    adjust(task, row, logits, adjusted, task.counts + r * task.vocab);
    int32_t id = choose(task, row, adjusted, task.weights + r * task.vocab);
    double total = log_sum_exp(logits, task.vocab);
    if (threadIdx.x == 0) {
        task.ids[r] = id;
        task.logprobs[r] = (float)((double)logits[id] - total);
    }
    word key = ~(word)0;
    for (int32_t i = 0; i < row.n_top && i < task.vocab; i++) {
        key = highest_key(logits, task.vocab, key);
        if (threadIdx.x == 0) {
            int32_t top = key != 0 ? id_of(key) : 0;
            task.top_ids[r * KERNEL_TOP_MAX + i] = top;
            task.top_logprobs[r * KERNEL_TOP_MAX + i] = (float)((double)logits[top] - total);
        }
    }
}

/* ---- host side ---- */

static bool row_valid(const struct sample_row *row, int64_t vocab)
{
    bool filters = row->temperature >= 0.0f && row->top_k >= 0 && row->top_p >= 0.0f && row->min_p >= 0.0f &&
                   row->min_p <= 1.0f && row->repetition_penalty > 0.0f;
    if (!filters || row->n_history < 0 || row->n_prompt < 0 || row->n_prompt > row->n_history ||
        row->n_bias < 0 || row->n_top < 0 || row->n_top > KERNEL_TOP_MAX)
        return false;
    for (int32_t i = 0; i < row->n_history; i++)
        if (row->history[i] < 0 || row->history[i] >= vocab)
            return false;
    for (int32_t i = 0; i < row->n_bias; i++)
        if (row->bias[i].id < 0 || row->bias[i].id >= vocab)
            return false;
    return true;
}

static bool wants_history(const struct sample_row *row)
{
    return row->repetition_penalty != 1.0f || row->presence_penalty != 0.0f || row->frequency_penalty != 0.0f;
}

/* The settings of some rows, their histories and biases, in one array for one copy:
 * [settings][biases][histories]. */
static int stage_rows(struct kernel_device *device, const struct sample_row *rows, int64_t n_rows,
                      struct sample_task *task)
{
    int64_t n_bias = 0, n_history = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        n_bias += rows[r].n_bias;
        n_history += wants_history(&rows[r]) ? rows[r].n_history : 0;
    }
    size_t bias_at = (size_t)n_rows * sizeof(struct row_settings);
    size_t history_at = bias_at + (size_t)n_bias * sizeof(struct logit_bias);
    size_t bytes = history_at + (size_t)n_history * sizeof(int32_t);
    char *packed = (char *)malloc(bytes);
    if (packed == NULL)
        return KERNEL_NO_MEMORY;
    n_bias = n_history = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        const struct sample_row *row = &rows[r];
        struct row_settings settings = {};
        settings.temperature = row->temperature;
        settings.top_p = row->top_p;
        settings.min_p = row->min_p;
        settings.repetition_penalty = row->repetition_penalty;
        settings.presence_penalty = row->presence_penalty;
        settings.frequency_penalty = row->frequency_penalty;
        settings.draw = philox_uniform(row->seed, row->position);
        settings.top_k = row->top_k;
        settings.banned = row->banned;
        settings.n_top = row->n_top;
        settings.bias = n_bias;
        settings.n_bias = row->n_bias;
        settings.history = n_history;
        settings.n_history = wants_history(row) ? row->n_history : 0;
        settings.n_prompt = row->n_prompt;
        memcpy(packed + (size_t)r * sizeof(settings), &settings, sizeof(settings));
        if (settings.n_bias > 0)
            memcpy(packed + bias_at + (size_t)n_bias * sizeof(struct logit_bias), row->bias,
                   (size_t)settings.n_bias * sizeof(struct logit_bias));
        if (settings.n_history > 0)
            memcpy(packed + history_at + (size_t)n_history * sizeof(int32_t), row->history,
                   (size_t)settings.n_history * sizeof(int32_t));
        n_bias += settings.n_bias;
        n_history += settings.n_history;
    }
    const void *staged = NULL;
    int status = cuda_stage(device, packed, bytes, &staged);
    free(packed);
    if (status != KERNEL_OK)
        return status;
    task->rows = (const struct row_settings *)staged;
    task->bias = (const struct logit_bias *)((const char *)staged + bias_at);
    task->history = (const int32_t *)((const char *)staged + history_at);
    return KERNEL_OK;
}

/* One copy back for a batch of rows. */
struct row_results {
    int32_t ids[ROWS_AT_ONCE];
    float logprobs[ROWS_AT_ONCE];
    int32_t top_ids[ROWS_AT_ONCE * KERNEL_TOP_MAX];
    float top_logprobs[ROWS_AT_ONCE * KERNEL_TOP_MAX];
};

static int sample_batch(struct kernel_device *device, const struct sample_args *s, int64_t first,
                        int64_t rows, struct sample_task task, struct row_results *on_device)
{
    int status = stage_rows(device, s->row + first, rows, &task);
    if (status != KERNEL_OK)
        return status;
    task.logits = s->logits + first * s->logits_stride;
    sample_kernel<<<(unsigned)rows, THREADS, 0, device->stream>>>(task);
    status = cuda_launched(device);
    static_assert(sizeof(struct row_results) < 64 << 10, "fits the stack");
    struct row_results results;
    if (status == KERNEL_OK)
        status = cuda_copy_out(device, &results, on_device, sizeof(results));
    if (status != KERNEL_OK)
        return status;
    memcpy(s->ids + first, results.ids, (size_t)rows * sizeof(int32_t));
    memcpy(s->logprobs + first, results.logprobs, (size_t)rows * sizeof(float));
    for (int64_t r = 0; r < rows && s->top_ids != NULL; r++) {
        size_t count = (size_t)(s->row[first + r].n_top < s->vocab ? s->row[first + r].n_top : s->vocab);
        memcpy(s->top_ids + (first + r) * KERNEL_TOP_MAX, results.top_ids + r * KERNEL_TOP_MAX,
               count * sizeof(int32_t));
        memcpy(s->top_logprobs + (first + r) * KERNEL_TOP_MAX, results.top_logprobs + r * KERNEL_TOP_MAX,
               count * sizeof(float));
    }
    return KERNEL_OK;
}

int cuda_sample(struct kernel_device *device, const struct sample_args *s)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (s->rows < 0 || s->vocab <= 0 || s->vocab > INT32_MAX || s->logits_stride < s->vocab)
        return KERNEL_INVALID;
    for (int64_t r = 0; r < s->rows; r++)
        if (!row_valid(&s->row[r], s->vocab))
            return KERNEL_INVALID;
    if (s->rows == 0)
        return KERNEL_OK;

    int64_t at_once = s->rows < ROWS_AT_ONCE ? s->rows : (int64_t)ROWS_AT_ONCE, cells = at_once * s->vocab;
    size_t results_bytes = (sizeof(struct row_results) + 255) / 256 * 256;
    void *scratch = NULL;
    status = cuda_scratch(device, CUDA_SCRATCH_OP, results_bytes + (size_t)cells * 16, &scratch);
    if (status != KERNEL_OK)
        return status;
    struct row_results *results = (struct row_results *)scratch;
    struct sample_task task = {};
    task.stride = s->logits_stride;
    task.vocab = s->vocab;
    task.weights = (word *)((char *)scratch + results_bytes);
    task.adjusted = (float *)(task.weights + cells);
    task.counts = (int32_t *)(task.adjusted + cells);
    task.weight_shift = 62;
    for (int64_t most = 1; most < s->vocab; most *= 2)
        task.weight_shift--;
    task.ids = results->ids;
    task.logprobs = results->logprobs;
    task.top_ids = results->top_ids;
    task.top_logprobs = results->top_logprobs;
    status = cuda_check(device, cudaMemsetAsync(scratch, 0, results_bytes, device->stream));
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaMemsetAsync(task.counts, 0, (size_t)cells * 4, device->stream));
    for (int64_t first = 0; first < s->rows && status == KERNEL_OK; first += at_once)
        status = sample_batch(device, s, first, s->rows - first < at_once ? s->rows - first : at_once, task,
                              results);
    return status;
}
