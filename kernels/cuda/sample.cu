/* sample.cu: choosing the next token on the device.
 *
 * First SPLITS thread blocks a row find its highest logit and its log sum of exponentials; the last of them to arrive
 * puts their findings together, in order. That is all for a plain row, one that takes the highest logit; the others get
 * a thread block each, which does what their settings ask for.
 *
 * The vocabulary is never sorted. Every filter keeps the first so many ids in descending order of logit (ties to the
 * lowest id), so it is told by the key (keys.cuh) of the last id that it keeps. That is found among weights that are
 * integers, exp() scaled by a power of two such that their sum fits 64 bits: their sums depend on no order, so that
 * histograms may be filled by atomics and a draw gives the same id every time. */
#include "kernels/cuda/keys.cuh"

extern "C" {
#include "kernels/philox.h"
}
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

constexpr float BUCKETS_A_UNIT = 32.0f; /* of logit: all beyond 32 from the highest share the last bucket */

enum {
    THREADS = 1024,
    RADIX_BITS = 8,
    DIGITS = 1 << RADIX_BITS,
    BUCKETS = 1024,
    LIST = 1024, /* of a bucket's keys */
    KEY_BITS = 64,
    ROWS_AT_ONCE = 128, /* bounds the scratch: 16 bytes a row and id */
    SPLITS = 16, /* thread blocks that look at a row first; a constant, so that batching changes no sum */
    SPLIT_THREADS = 256,
    ROWS_UNIT = 256, /* memory is made for multiples of this, so that it grows seldom */
};

/* A row's settings as they travel. Offsets into the staged ids and biases of all rows. */
struct row_settings {
    float temperature, top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    float draw; /* in [0,1), a multiple of 2^-24 */
    int32_t top_k, banned, n_top;
    int64_t history, bias; /* first entries */
    int32_t n_history, n_prompt, n_bias;
    bool plain; /* the highest logit but for `banned`, and nothing else is wanted */
};

/* What a split found. */
struct split_result {
    word key;           /* of the highest logit that is not banned, or 0 */
    float highest, sum; /* of all: the highest, and the sum of exp(logit - highest) */
};

/* Of a row, in memory of sample's own: what its blocks tell each other. */
struct row_work {
    struct split_result splits[SPLITS];
    double total;    /* log sum exp of the model's logits */
    int32_t arrived; /* splits that are done; 0 between launches */
};

/* What comes out, in memory of the host. */
struct sample_results {
    int32_t *ids; /* [rows] */
    float *logprobs;
    int32_t *top_ids; /* [rows,KERNEL_TOP_MAX] */
    float *top_logprobs;
};

struct sample_task {
    const float *logits;
    int64_t stride, vocab;
    const struct row_settings *settings; /* [rows] */
    struct row_work *work;               /* [rows] */
    struct sample_results results;
    /* Of the rows that are not plain: */
    const int32_t *rows; /* their numbers */
    const int32_t *history;
    const struct logit_bias *bias;
    float *adjusted; /* [ROWS_AT_ONCE,vocab]; NaN marks an id that may not be chosen */
    int32_t *counts; /* [ROWS_AT_ONCE,vocab], zero between rows' uses */
    word *weights;   /* [ROWS_AT_ONCE,vocab]: round(exp(..) weight_scale) */
    double weight_scale;
};

/* The highest key of those ids of a row that the thread looks at, or 0. */
static __device__ word highest_own_key(const float *logits, int64_t vocab)
{
    word best = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS) {
        word key = key_of(logits[i], i);
        best = key > best ? key : best;
    }
    return best;
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
#pragma unroll 4
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

/* Where the running sum of the bins, from the first, reaches `wanted`: the bin, and what is wanted of it. By one warp,
 * for all of it. */
static __device__ int reach(const word *bins, int count, word &wanted)
{
    int lane = (int)threadIdx.x % WARP, part = count / WARP;
    word own = 0;
    for (int i = 0; i < part; i++)
        own += bins[lane * part + i];
    word running = own;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        word lower = __shfl_up_sync(0xffffffffu, running, step);
        running += lane >= step ? lower : 0;
    }
    unsigned reached = __ballot_sync(0xffffffffu, running >= wanted);
    int where = reached != 0 ? __ffs((int)reached) - 1 : WARP - 1, bin = where * part;
    word rest = wanted - (running - own);
    if (lane == where)
        while (bin < count - 1 && bins[bin] < rest)
            rest -= bins[bin++];
    wanted = __shfl_sync(0xffffffffu, rest, where);
    return __shfl_sync(0xffffffffu, bin, where);
}

/* Buckets of logits by their distance from the highest. */
static __device__ __forceinline__ int bucket_of(float logit, float highest)
{
    return (int)fminf((highest - logit) * BUCKETS_A_UNIT, (float)(BUCKETS - 1));
}

/* The greatest key such that the measures of all keys at or above it, up to `first`, sum to `wanted` or more. A measure is
 * the weight, or 1 where `weights` is NULL. The whole of those at or above `lowest` must be at least `wanted` > 0.
 * The bucket that it lies in comes first. The bucket's keys mostly fit a list, and each can look at all the others;
 * otherwise the key's bits are found from the top, a digit at a time. */
static __device__ word select_key(const float *adjusted, const word *weights, int64_t vocab, word first,
                                  word lowest, word wanted)
{
    __shared__ word bins[BUCKETS], list[LIST], measures[LIST];
    __shared__ word rest;
    __shared__ int found, listed;
    const float highest = logit_of(first);
    __syncthreads();
    for (int i = threadIdx.x; i < BUCKETS; i += THREADS)
        bins[i] = 0;
    if (threadIdx.x == 0)
        listed = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS)
        if (key_of(adjusted[i], i) >= lowest)
            atomicAdd(&bins[bucket_of(adjusted[i], highest)], weights != NULL ? weights[i] : 1);
    __syncthreads();
    if (threadIdx.x < WARP) {
        int bucket = reach(bins, BUCKETS, wanted);
        if (threadIdx.x == 0) {
            found = bucket;
            rest = wanted;
        }
    }
    __syncthreads();
    const int bucket = found;
    wanted = rest;
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS) {
        word key = key_of(adjusted[i], i);
        if (key >= lowest && bucket_of(adjusted[i], highest) == bucket) {
            int at = atomicAdd(&listed, 1);
            if (at < LIST) {
                list[at] = key;
                measures[at] = weights != NULL ? weights[i] : 1;
            }
        }
    }
    __syncthreads();
    if (listed <= LIST) {
        word best = 0;
        for (int i = threadIdx.x; i < listed; i += THREADS) {
            word sum = 0;
            for (int k = 0; k < listed; k++)
                sum += list[k] >= list[i] ? measures[k] : 0;
            best = sum >= wanted && list[i] > best ? list[i] : best;
        }
        return block_highest<THREADS>(best);
    }
    word prefix = 0;
    for (int shift = KEY_BITS - RADIX_BITS; shift >= 0; shift -= RADIX_BITS) {
        for (int i = threadIdx.x; i < DIGITS; i += THREADS)
            bins[i] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < vocab; i += THREADS) {
            word key = key_of(adjusted[i], i);
            bool inside = shift == KEY_BITS - RADIX_BITS || key >> (shift + RADIX_BITS) == prefix;
            if (key >= lowest && inside && bucket_of(adjusted[i], highest) == bucket)
                atomicAdd(&bins[DIGITS - 1 - (key >> shift & (DIGITS - 1))],
                          weights != NULL ? weights[i] : 1);
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            int bin = reach(bins, DIGITS, wanted);
            if (threadIdx.x == 0) {
                found = DIGITS - 1 - bin;
                rest = wanted;
            }
        }
        __syncthreads();
        prefix = prefix << RADIX_BITS | (word)found;
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

/* Weights of all ids that may be chosen, 0 for the others. */
static __device__ void weigh(const struct row_settings &row, const float *adjusted, word *weights,
                             int64_t vocab, double scale, word first)
{
    float highest = logit_of(first);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS) {
        float weight = isnan(adjusted[i]) ? 0.0f : expf((adjusted[i] - highest) / row.temperature);
        weights[i] = (word)__double2ull_rn((double)weight * scale);
    }
    __syncthreads();
}

/* The key of the last id that top-k and top-p keep, then of min-p. */
static __device__ word filter(const struct sample_task &task, const struct row_settings &row,
                              const float *adjusted, const word *weights, double scale, word first)
{
    word lowest = 1; /* all that is no NaN */
    if (row.top_k > 0) {
        word choosable = 0;
        for (int64_t i = threadIdx.x; i < task.vocab; i += THREADS)
            choosable += !isnan(adjusted[i]);
        choosable = block_sum<THREADS>(choosable);
        if ((word)row.top_k < choosable)
            lowest = select_key(adjusted, NULL, task.vocab, first, lowest, (word)row.top_k);
    }
    if (row.top_p < 1.0f) {
        word total = sum_from(adjusted, weights, task.vocab, lowest);
        word wanted = (word)ceil((double)row.top_p * (double)total);
        wanted = wanted < 1 ? 1 : wanted > total ? total : wanted;
        lowest = select_key(adjusted, weights, task.vocab, first, lowest, wanted);
    }
    if (row.min_p > 0.0f) {
        word last = first, least = (word)__double2ull_ru((double)row.min_p * scale);
        for (int64_t i = threadIdx.x; i < task.vocab; i += THREADS) {
            word key = key_of(adjusted[i], i);
            if (key >= lowest && key < last && weights[i] >= least)
                last = key;
        }
        lowest = ~block_highest<THREADS>(~last);
    }
    return lowest;
}

/* The first id in ascending order whose running sum of weights passes draw * total. Every warp sums a stretch of ids;
 * the one whose stretch holds the threshold walks it. */
static __device__ int32_t draw_id(const float *adjusted, const word *weights, int64_t vocab, word lowest,
                                  float draw)
{
    enum { WARPS = THREADS / WARP };
    __shared__ word sums[WARPS];
    __shared__ int32_t chosen;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int64_t stretch = divide_up(vocab, WARPS), begin = warp * stretch;
    int64_t end = begin + stretch < vocab ? begin + stretch : vocab;
    word sum = 0;
#pragma unroll 4
    for (int64_t i = begin + lane; i < end; i += WARP)
        if (key_of(adjusted[i], i) >= lowest)
            sum += weights[i];
    sum = warp_sum(sum);
    if (lane == 0)
        sums[warp] = sum;
    __syncthreads();
    word total = 0, before = 0;
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? sums[i] : 0;
        total += sums[i];
    }
    /* floor(m total / 2^24) for draw = m / 2^24 */
    word m = (word)(draw * 0x1p24f);
    word threshold = __umul64hi(m, total) << 40 | (m * total) >> 24;
    if (before <= threshold && threshold < before + sum) {
        for (int64_t first = begin; before <= threshold; first += WARP) {
            int64_t i = first + lane;
            word weight = i < end && key_of(adjusted[i], i) >= lowest ? weights[i] : 0, running = weight;
#pragma unroll
            for (int step = 1; step < WARP; step *= 2) {
                word lower = __shfl_up_sync(0xffffffffu, running, step);
                running += lane >= step ? lower : 0;
            }
            running += before;
            unsigned passed = __ballot_sync(0xffffffffu, threshold < running);
            if (lane == 0 && passed != 0)
                chosen = (int32_t)first + __ffs((int)passed) - 1;
            before = __shfl_sync(0xffffffffu, running, WARP - 1);
        }
    }
    __syncthreads();
    return chosen;
}

/* ---- a row ---- */

static __device__ int32_t choose(const struct sample_task &task, const struct row_settings &row,
                                 const float *adjusted, word *weights)
{
    word first = block_highest<THREADS>(highest_own_key(adjusted, task.vocab));
    if (first == 0)
        return 0; /* nothing may be chosen */
    if (row.temperature == 0.0f || isinf(adjusted[id_of(first)]))
        return id_of(first);
    weigh(row, adjusted, weights, task.vocab, task.weight_scale, first);
    word lowest = filter(task, row, adjusted, weights, task.weight_scale, first);
    return draw_id(adjusted, weights, task.vocab, lowest, row.draw);
}

static __global__ void __launch_bounds__(THREADS) sample_kernel(struct sample_task task, int32_t first)
{
    int64_t r = task.rows[first + (int32_t)blockIdx.x];
    const struct row_settings row = task.settings[r];
    const float *logits = task.logits + r * task.stride;
    float *adjusted = task.adjusted + blockIdx.x * task.vocab;
    adjust(task, row, logits, adjusted, task.counts + blockIdx.x * task.vocab);
    int32_t id = choose(task, row, adjusted, task.weights + blockIdx.x * task.vocab);
    double total = task.work[r].total;
    if (threadIdx.x == 0) {
        task.results.ids[r] = id;
        task.results.logprobs[r] = (float)((double)logits[id] - total);
    }
    if (row.n_top == 0)
        return;
    extern __shared__ word list[];
    __shared__ word top[KERNEL_TOP_MAX];
    int32_t count = row.n_top < task.vocab ? row.n_top : (int32_t)task.vocab, i = (int32_t)threadIdx.x;
    block_top<THREADS>(logits, task.vocab, highest_own_key(logits, task.vocab), count, list, top);
    if (i < count) {
        id = top[i] != 0 ? id_of(top[i]) : 0;
        task.results.top_ids[r * KERNEL_TOP_MAX + i] = id;
        task.results.top_logprobs[r * KERNEL_TOP_MAX + i] = (float)((double)logits[id] - total);
    }
}

/* ---- all rows: the highest logit and the log sum of exponentials ---- */

/* Adds what another part found. */
static __device__ __forceinline__ void merge(struct split_result &a, const struct split_result &b)
{
    float highest = fmaxf(a.highest, b.highest);
    float own = a.highest == highest ? a.sum : a.sum * __expf(a.highest - highest);
    float other = b.highest == highest ? b.sum : b.sum * __expf(b.highest - highest);
    a.key = a.key > b.key ? a.key : b.key;
    a.highest = highest;
    a.sum = own + other;
}

static __device__ __forceinline__ struct split_result merge_warp(struct split_result a)
{
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        struct split_result b = {__shfl_xor_sync(0xffffffffu, a.key, step),
                                 __shfl_xor_sync(0xffffffffu, a.highest, step),
                                 __shfl_xor_sync(0xffffffffu, a.sum, step)};
        merge(a, b);
    }
    return a;
}

/* N elements at a time. The sum is of floats at most 1: its error is far below what a logit resolves. */
template <int N>
static __device__ struct split_result look_at(const float *logits, int64_t begin, int64_t end, int32_t banned)
{
    float best = -INFINITY;
    int32_t id = -1;
    struct split_result found = {0, -INFINITY, 0.0f};
#pragma unroll 4
    for (int64_t i = begin + (int64_t)threadIdx.x * N; i < end; i += SPLIT_THREADS * N) {
        float v[N], highest = found.highest;
        load_pack(logits + i, v);
#pragma unroll
        for (int j = 0; j < N; j++) {
            highest = fmaxf(highest, v[j]);
            if ((v[j] > best || (id < 0 && v[j] == best)) && (int32_t)(i + j) != banned) {
                best = v[j];
                id = (int32_t)(i + j);
            }
        }
        if (highest > found.highest)
            found.sum *= __expf(found.highest - highest);
        found.highest = highest;
#pragma unroll
        for (int j = 0; j < N; j++)
            found.sum += v[j] == highest ? 1.0f : __expf(v[j] - highest);
    }
    if (id >= 0)
        found.key = key_of(best, id);
    return found;
}

template <int N> static __global__ void __launch_bounds__(SPLIT_THREADS) split_kernel(struct sample_task task)
{
    __shared__ struct split_result warps[SPLIT_THREADS / WARP];
    __shared__ bool last;
    int64_t r = blockIdx.y, stretch = divide_up(divide_up(task.vocab, N), SPLITS) * N;
    int64_t begin = blockIdx.x * stretch, end = begin + stretch < task.vocab ? begin + stretch : task.vocab;
    const float *logits = task.logits + r * task.stride;
    struct split_result found = merge_warp(look_at<N>(logits, begin, end, task.settings[r].banned));
    if (threadIdx.x % WARP == 0)
        warps[threadIdx.x / WARP] = found;
    __syncthreads();
    struct split_result *splits = task.work[r].splits;
    if (threadIdx.x == 0) {
        for (int i = 1; i < SPLIT_THREADS / WARP; i++)
            merge(found, warps[i]);
        splits[blockIdx.x] = found;
        __threadfence();
        last = atomicAdd(&task.work[r].arrived, 1) == SPLITS - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x >= WARP)
        return;
    __threadfence();
    found = {0, -INFINITY, 0.0f};
    if (threadIdx.x < SPLITS) {
        found.key = __ldcg(&splits[threadIdx.x].key);
        found.highest = __ldcg(&splits[threadIdx.x].highest);
        found.sum = __ldcg(&splits[threadIdx.x].sum);
    }
    found = merge_warp(found);
    if (threadIdx.x != 0)
        return;
    double total = (double)found.highest + log((double)found.sum);
    int32_t id = found.key != 0 ? id_of(found.key) : 0;
    task.work[r].arrived = 0;
    task.work[r].total = total;
    if (task.settings[r].plain) {
        task.results.ids[r] = id;
        task.results.logprobs[r] = (float)((double)logits[id] - total);
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

static bool is_plain(const struct sample_row *row)
{
    return row->temperature == 0.0f && !wants_history(row) && row->n_bias == 0 && row->n_top == 0;
}

static int check_args(const struct sample_args *s)
{
    if (s->rows > UINT16_MAX)
        return KERNEL_UNSUPPORTED;
    if (s->rows < 0 || s->vocab <= 0 || s->vocab > INT32_MAX || s->logits_stride < s->vocab)
        return KERNEL_INVALID;
    for (int64_t r = 0; r < s->rows; r++)
        if (!row_valid(&s->row[r], s->vocab))
            return KERNEL_INVALID;
    return KERNEL_OK;
}

/* The rows' settings. Those of plain rows are mostly the same as in the step before. */
static int stage_settings(struct kernel_device *device, const struct sample_args *s, bool plain,
                          struct sample_task *task)
{
    struct row_settings *settings = (struct row_settings *)calloc((size_t)s->rows, sizeof(*settings));
    if (settings == NULL)
        return KERNEL_NO_MEMORY;
    int64_t n_history = 0, n_bias = 0;
    for (int64_t r = 0; r < s->rows; r++) {
        const struct sample_row *row = &s->row[r];
        struct row_settings *to = &settings[r];
        to->banned = row->banned;
        to->plain = is_plain(row);
        if (to->plain)
            continue;
        to->temperature = row->temperature;
        to->top_p = row->top_p;
        to->min_p = row->min_p;
        to->repetition_penalty = row->repetition_penalty;
        to->presence_penalty = row->presence_penalty;
        to->frequency_penalty = row->frequency_penalty;
        to->draw = philox_uniform(row->seed, row->position);
        to->top_k = row->top_k;
        to->n_top = row->n_top;
        to->n_prompt = row->n_prompt;
        to->history = n_history;
        to->n_history = wants_history(row) ? row->n_history : 0;
        to->bias = n_bias;
        to->n_bias = row->n_bias;
        n_history += to->n_history;
        n_bias += to->n_bias;
    }
    size_t bytes = (size_t)s->rows * sizeof(*settings);
    const void *staged = NULL;
    int status = plain ? cuda_stage_cached(device, settings, bytes, &staged)
                       : cuda_stage(device, settings, bytes, &staged);
    task->settings = (const struct row_settings *)staged;
    free(settings);
    return status;
}

static int make_memory(struct kernel_device *device, int64_t rows, struct sample_task *task)
{
    size_t n = (size_t)(divide_up(rows, ROWS_UNIT) * ROWS_UNIT), bytes = n * sizeof(*task->work);
    bool grows = device->scratch[CUDA_SCRATCH_SAMPLE].bytes < bytes;
    void *work = NULL, *results = NULL;
    int status = cuda_scratch(device, CUDA_SCRATCH_SAMPLE, bytes, &work);
    if (status == KERNEL_OK && grows)
        status = cuda_check(device, cudaMemsetAsync(work, 0, bytes, device->stream));
    if (status == KERNEL_OK)
        status = cuda_results(device, n * (1 + KERNEL_TOP_MAX) * (sizeof(int32_t) + sizeof(float)), &results);
    if (status != KERNEL_OK)
        return status;
    task->work = (struct row_work *)work;
    task->results.ids = (int32_t *)results;
    task->results.logprobs = (float *)(task->results.ids + n);
    task->results.top_ids = (int32_t *)(task->results.logprobs + n);
    task->results.top_logprobs = (float *)(task->results.top_ids + n * KERNEL_TOP_MAX);
    return KERNEL_OK;
}

static int split_rows(struct kernel_device *device, const struct sample_task &task, int64_t rows)
{
    dim3 grid(SPLITS, (unsigned)rows);
    constexpr int N = pack<float>::COUNT;
    if (cuda_aligned(task.logits, task.stride) && task.vocab % N == 0)
        split_kernel<N><<<grid, SPLIT_THREADS, 0, device->stream>>>(task);
    else
        split_kernel<1><<<grid, SPLIT_THREADS, 0, device->stream>>>(task);
    return cuda_launched(device);
}

/* What rows that are not plain need, in one array for one copy: [numbers of the rows][biases][histories]. */
static int stage_rows(struct kernel_device *device, const struct sample_args *s, struct sample_task *task,
                      int32_t *ret_count)
{
    int64_t count = 0, n_bias = 0, n_history = 0;
    for (int64_t r = 0; r < s->rows; r++) {
        count += !is_plain(&s->row[r]);
        n_bias += s->row[r].n_bias;
        n_history += wants_history(&s->row[r]) ? s->row[r].n_history : 0;
    }
    size_t bias_at = (size_t)count * sizeof(int32_t);
    size_t history_at = bias_at + (size_t)n_bias * sizeof(struct logit_bias);
    char *packed = (char *)malloc(history_at + (size_t)n_history * sizeof(int32_t) + 1);
    if (packed == NULL)
        return KERNEL_NO_MEMORY;
    int32_t *numbers = (int32_t *)packed, *histories = (int32_t *)(packed + history_at);
    struct logit_bias *biases = (struct logit_bias *)(packed + bias_at);
    for (int64_t r = 0; r < s->rows; r++) {
        const struct sample_row *row = &s->row[r];
        if (is_plain(row))
            continue;
        *numbers++ = (int32_t)r;
        for (int32_t i = 0; i < row->n_bias; i++)
            *biases++ = row->bias[i];
        for (int32_t i = 0; wants_history(row) && i < row->n_history; i++)
            *histories++ = row->history[i];
    }
    const void *staged = NULL;
    int status = cuda_stage(device, packed, (size_t)((char *)histories - packed), &staged);
    free(packed);
    if (status != KERNEL_OK)
        return status;
    task->rows = (const int32_t *)staged;
    task->bias = (const struct logit_bias *)((const char *)staged + bias_at);
    task->history = (const int32_t *)((const char *)staged + history_at);
    *ret_count = (int32_t)count;
    return KERNEL_OK;
}

static int sample_rows(struct kernel_device *device, const struct sample_args *s, struct sample_task task)
{
    int32_t count = 0;
    int status = stage_rows(device, s, &task, &count);
    if (status != KERNEL_OK)
        return status;
    int32_t at_once = count < ROWS_AT_ONCE ? count : ROWS_AT_ONCE;
    int64_t cells = at_once * s->vocab;
    void *scratch = NULL;
    status = cuda_scratch(device, CUDA_SCRATCH_OP, (size_t)cells * 16, &scratch);
    if (status != KERNEL_OK)
        return status;
    task.weights = (word *)scratch;
    task.adjusted = (float *)(task.weights + cells);
    task.counts = (int32_t *)(task.adjusted + cells);
    task.weight_scale = 0x1p62;
    for (int64_t most = 1; most < s->vocab; most *= 2)
        task.weight_scale /= 2;
    int32_t n_top = 0;
    for (int64_t r = 0; r < s->rows; r++)
        n_top = s->row[r].n_top > n_top ? s->row[r].n_top : n_top;
    size_t shared = block_top_bytes(n_top, divide_up(s->vocab, THREADS));
    if (shared + 40960 > (size_t)device->shared_bytes)
        return KERNEL_UNSUPPORTED;
    status = cuda_check(device, cudaFuncSetAttribute(
                                    sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaMemsetAsync(task.counts, 0, (size_t)cells * 4, device->stream));
    for (int32_t first = 0; first < count && status == KERNEL_OK; first += at_once) {
        unsigned rows = (unsigned)(count - first < at_once ? count - first : at_once);
        sample_kernel<<<rows, THREADS, shared, device->stream>>>(task, first);
        status = cuda_launched(device);
    }
    return status;
}

static void take_results(const struct sample_args *s, const struct sample_results &from)
{
    memcpy(s->ids, from.ids, (size_t)s->rows * sizeof(int32_t));
    memcpy(s->logprobs, from.logprobs, (size_t)s->rows * sizeof(float));
    for (int64_t r = 0; r < s->rows && s->top_ids != NULL; r++) {
        size_t count = (size_t)(s->row[r].n_top < s->vocab ? s->row[r].n_top : s->vocab);
        int64_t at = r * KERNEL_TOP_MAX;
        memcpy(s->top_ids + at, from.top_ids + at, count * sizeof(int32_t));
        memcpy(s->top_logprobs + at, from.top_logprobs + at, count * sizeof(float));
    }
}

int cuda_sample(struct kernel_device *device, const struct sample_args *s)
{
    struct sample_task task = {};
    int status = cuda_enter_unrecorded(device);
    if (status == KERNEL_OK)
        status = check_args(s);
    if (status != KERNEL_OK || s->rows == 0)
        return status;
    task.logits = s->logits;
    task.stride = s->logits_stride;
    task.vocab = s->vocab;
    bool plain = true;
    for (int64_t r = 0; r < s->rows; r++)
        plain = plain && is_plain(&s->row[r]);
    status = stage_settings(device, s, plain, &task);
    if (status == KERNEL_OK)
        status = make_memory(device, s->rows, &task);
    if (status == KERNEL_OK)
        status = split_rows(device, task, s->rows);
    if (status == KERNEL_OK && !plain)
        status = sample_rows(device, s, task);
    if (status == KERNEL_OK)
        status = cuda_synchronize(device);
    if (status == KERNEL_OK)
        take_results(s, task.results);
    return status;
}
