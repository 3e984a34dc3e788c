/* scan.cuh: how the two directions of the selective scan divide their work.
 *
 * A block takes CHANNELS neighbouring channels through a span of one sequence's tokens. LANES neighbouring threads
 * share a channel, each with LANE_STATES of its states in registers; sums over the states go across those lanes.
 * Loading and storing use the same threads another way: each takes LANE_CHANNELS neighbouring channels of a row, so
 * that everything that is computed once per token and channel (softplus, gates) is computed once.
 *
 * A span is a whole sequence where there are channels and sequences enough to fill the device. Where they are not,
 * sequences are cut into spans, and a scan is three passes: each span from a state of zero, with the sum of its delta;
 * the states at the spans' starts, by h_next = exp(A sum(delta)) h + local; each span from its own state. The backward
 * does the same with gradients, from the end. How spans are cut depends on the sizes alone, never on the device. */
#ifndef KERNELS_CUDA_SCAN_CUH
#define KERNELS_CUDA_SCAN_CUH

#include <stdlib.h>

#include "kernels/cuda/vector.cuh"

enum {
    SCAN_THREADS = 256,
    LANE_STATES = 4,
    LANE_CHANNELS = 4,
    SCAN_STATES_MOST = 64,
    SPLIT_BELOW =
        132, /* blocks that go on at the same time: fewer than the multiprocessors of a large device */
    SPLIT_BLOCKS = 1056, /* wanted then */
};

constexpr float LOG2_E = 1.44269504088896341f;

template <int L> struct scan_shape {
    enum {
        LANES = L,
        STATES = L * LANE_STATES,
        CHANNELS = SCAN_THREADS / L,
        GROUPS = CHANNELS / LANE_CHANNELS, /* threads that load a row */
        PASS_ROWS = SCAN_THREADS / GROUPS, /* rows that all threads load */
        WARP_CHANNELS = WARP / L,
    };
};

/* Runs the statement with SHAPE naming the shape for d_state. */
#define SCAN_WITH_SHAPE(d_state, SHAPE, ...)                                                                 \
    do {                                                                                                     \
        if ((d_state) <= 16) {                                                                               \
            using SHAPE = scan_shape<4>;                                                                     \
            __VA_ARGS__;                                                                                     \
        } else {                                                                                             \
            using SHAPE = scan_shape<16>;                                                                    \
            __VA_ARGS__;                                                                                     \
        }                                                                                                    \
    } while (0)

static inline int64_t scan_block_channels(int64_t d_state)
{
    return d_state <= 16 ? (int64_t)scan_shape<4>::CHANNELS : (int64_t)scan_shape<16>::CHANNELS;
}

/* Tables on the device: the first span and the first chunk of every sequence, and how many there are. Every sequence,
 * even an empty one, has a span. */
struct scan_spans {
    const int32_t *seq_starts, *span_starts, *chunk_starts;
    int32_t n_seqs, n_spans;
    int32_t length; /* tokens of a span, a multiple of SCAN_CHUNK */
    bool split;
};

/* Most spans that any batch of so many tokens and sequences is cut into. */
static inline int64_t scan_spans_most(int64_t tokens, int64_t channels, int64_t d_state, int32_t n_seqs)
{
    int64_t blocks = divide_up(channels, scan_block_channels(d_state));
    int64_t cuts = SPLIT_BLOCKS / (blocks > 0 ? blocks : 1) + 1, chunks = tokens / SCAN_CHUNK + 1;
    return n_seqs + (cuts < chunks ? cuts : chunks);
}

/* seq_starts is in host memory, valid, and has at least one sequence. */
static inline int scan_spans_make(struct kernel_device *device, const int32_t *seq_starts, int32_t n_seqs,
                                  int64_t channels, int64_t d_state, struct scan_spans *ret_spans)
{
    int64_t tokens = seq_starts[n_seqs], longest = 1,
            blocks = divide_up(channels, scan_block_channels(d_state));
    for (int32_t s = 0; s < n_seqs; s++)
        longest = seq_starts[s + 1] - seq_starts[s] > longest ? seq_starts[s + 1] - seq_starts[s] : longest;
    struct scan_spans spans = {NULL, NULL, NULL, n_seqs, 0, 0, false};
    int64_t length = divide_up(longest, SCAN_CHUNK) * SCAN_CHUNK;
    if (tokens * blocks < SPLIT_BELOW * longest && longest > 2 * SCAN_CHUNK) {
        int64_t cut = divide_up(divide_up(tokens * blocks, SPLIT_BLOCKS), SCAN_CHUNK) * SCAN_CHUNK;
        length = cut < length ? cut : length;
    }
    spans.length = (int32_t)length;
    int64_t entries = (int64_t)n_seqs + 1;
    int32_t *tables = (int32_t *)malloc((size_t)(3 * entries) * sizeof(int32_t));
    if (tables == NULL)
        return KERNEL_NO_MEMORY;
    int32_t *span_starts = tables + entries, *chunk_starts = tables + 2 * entries;
    span_starts[0] = chunk_starts[0] = 0;
    for (int32_t s = 0; s < n_seqs; s++) {
        int64_t tokens_of = seq_starts[s + 1] - seq_starts[s];
        tables[s] = seq_starts[s];
        span_starts[s + 1] =
            span_starts[s] + (int32_t)(tokens_of > length ? divide_up(tokens_of, length) : 1);
        chunk_starts[s + 1] = chunk_starts[s] + (int32_t)divide_up(tokens_of, SCAN_CHUNK);
    }
    tables[n_seqs] = seq_starts[n_seqs];
    spans.n_spans = span_starts[n_seqs];
    spans.split = spans.n_spans > n_seqs;
    const int32_t *copy = NULL;
    int status = cuda_stage_array(device, tables, 3 * entries, &copy);
    free(tables);
    spans.seq_starts = copy;
    spans.span_starts = copy + entries;
    spans.chunk_starts = copy + 2 * entries;
    *ret_spans = spans;
    return status;
}

/* ---- on the device ---- */

/* One span: tokens begin..end-1 of sequence `seq`, whose first chunk is `chunk`. */
struct scan_span {
    int32_t seq;
    int64_t index, begin, end, chunk;
    bool last; /* of its sequence */
};

static __device__ __forceinline__ struct scan_span scan_span_at(const struct scan_spans &spans, int32_t index)
{
    struct scan_span span;
    span.index = index;
    span.seq = part_of(spans.span_starts, spans.n_seqs, index);
    int64_t j = index - spans.span_starts[span.seq];
    span.begin = spans.seq_starts[span.seq] + j * spans.length;
    span.end = min(span.begin + spans.length, (int64_t)spans.seq_starts[span.seq + 1]);
    span.chunk = spans.chunk_starts[span.seq] + j * (spans.length / SCAN_CHUNK);
    span.last = index + 1 == spans.span_starts[span.seq + 1];
    return span;
}

/* Neighbouring channels of a row as they are in memory, so that a load can be under way while other work is done. */
template <typename T> struct alignas(LANE_CHANNELS * sizeof(T)) four {
    T v[LANE_CHANNELS];

    __device__ __forceinline__ float operator[](int i) const
    {
        return to_float(v[i]);
    }
};

template <typename T>
static __device__ __forceinline__ struct four<T> load_four(const void *rows, int64_t stride, int64_t row,
                                                           int64_t c, int64_t channels, bool whole,
                                                           bool inside) {
    const T *p = (const T *)rows + row * stride + c;
    if (inside && whole && c + LANE_CHANNELS <= channels)
        return *reinterpret_cast<const struct four<T> *>(p);
    struct four<T> out;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++)
        out.v[i] = inside && c + i < channels ? p[i] : from_float<T>(0.0f);
    return out;
}

/* Per-channel values of a thread's LANE_CHANNELS channels. */
static __device__ __forceinline__ void
load_channels(const float *p, int64_t c, int64_t channels, float (&out)[LANE_CHANNELS])
{
    load_some(p + c, channels - c, false, out);
}

/* Sums each of v[0..VALUES-1] over the COUNT lanes that differ in the bits STEP .. STEP*COUNT/2 of the lane's number.
 * Lanes share the sums: afterwards lane k of the COUNT has in v[0..] the VALUES / COUNT values from k * VALUES / COUNT
 * on, or, when the values are fewer than the lanes, v[0] is value k / (COUNT / VALUES). */
template <int VALUES, int COUNT, int STEP, int N>
static __device__ __forceinline__ void reduce_scatter(float (&v)[N], int lane)
{
    static_assert(VALUES <= N, "");
    if constexpr (COUNT > 1) {
        constexpr int BIT = STEP * COUNT / 2;
        if constexpr (VALUES > 1) {
            bool upper = lane & BIT;
#pragma unroll
            for (int i = 0; i < VALUES / 2; i++) {
                float give = upper ? v[i] : v[i + VALUES / 2], keep = upper ? v[i + VALUES / 2] : v[i];
                v[i] = keep + __shfl_xor_sync(0xffffffffu, give, BIT);
            }
            reduce_scatter<VALUES / 2, COUNT / 2, STEP>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], BIT);
            reduce_scatter<1, COUNT / 2, STEP>(v, lane);
        }
    }
}

/* Goes over a sequence's spans from the first (or, REVERSE, the last): in `states` [spans][d_state][channels] the
 * local ends become what the spans begin from. deltas: [spans][channels], sums over the spans. */
template <bool REVERSE>
static __global__ void scan_carry_kernel(struct scan_spans spans, const float *a, int64_t channels,
                                         int64_t d_state, struct state_view initial, const float *deltas,
                                         float *states)
{
    int64_t s = blockIdx.x, n = blockIdx.y, c = (int64_t)blockIdx.z * blockDim.x + threadIdx.x;
    if (c >= channels)
        return;
    int64_t at = n * channels + c;
    float rate = a[at] * LOG2_E, h = 0.0f;
    const float *from = state_of(initial, (int32_t)s);
    if (from != NULL)
        h = from[at];
    int32_t first = spans.span_starts[s], count = spans.span_starts[s + 1] - first;
    for (int32_t i = 0; i < count; i++) {
        int64_t span = first + (REVERSE ? count - 1 - i : i);
        float *state = states + span * d_state * channels + at, local = *state;
        *state = h;
        h = fmaf(exp2_fast(rate * deltas[span * channels + c]), h, local);
    }
}

#endif
