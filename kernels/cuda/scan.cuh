/* scan.cuh: how the two directions of the selective scan divide their work.
 *
 * A warp takes neighbouring channels through a span of one sequence's tokens, one token after the other, with the
 * states in registers. A channel's d_state states lie with one thread, or with a few lanes that share them: the fewer
 * lanes, the less is done twice, the more, the more warps there are (scan_shape). Lanes of one channel are far apart
 * and neighbouring lanes have neighbouring channels: they read the same B and C, and adjacent words of everything else.
 *
 * A span is a whole sequence where there are channels and sequences enough to fill a device. Where they are not,
 * sequences are cut into spans, and a scan is three passes: each span from a state of zero, with the sum of its delta;
 * the states at the spans' starts, by h_next = exp(A sum(delta)) h + local; each span from its own state. The backward
 * does the same with gradients, from the end. How spans are cut depends on the sizes alone, never on the device. */
#ifndef KERNELS_CUDA_SCAN_CUH
#define KERNELS_CUDA_SCAN_CUH

#include <stdlib.h>

#include "kernels/cuda/vector.cuh"

enum {
    SCAN_STATES_MOST = 64,
    SPLIT_BELOW =
        16384, /* channels of all sequences that go on at the same time: too few to fill a large device */
    SPLIT_PAIRS = 98304, /* wanted then: channels times spans */
};

/* S states of a channel in a thread, L lanes a channel, in blocks of T threads, B of them on a multiprocessor. */
template <int S, int L, int T, int B> struct scan_shape {
    enum {
        LANE_STATES = S,
        LANES = L,
        THREADS = T,
        BLOCKS = B,
        STATES = S * L,
        LANE_STEP = WARP / L, /* between the lanes of a channel */
        WARP_CHANNELS = LANE_STEP,
        CHANNELS = T / WARP * WARP_CHANNELS, /* of a block */
    };
};

/* Tables on the device: the first span and the first chunk of every sequence, and how many there are. Every sequence,
 * even an empty one, has a span. */
struct scan_spans {
    const int32_t *seq_starts, *span_starts, *chunk_starts;
    int32_t n_seqs, n_spans;
    int32_t length; /* tokens of a span, a multiple of SCAN_CHUNK */
    bool split;
    int64_t pairs; /* channels times the spans that go on at the same time */
};

/* Most spans that any batch of so many tokens and sequences is cut into. */
static inline int64_t scan_spans_most(int64_t tokens, int64_t channels, int32_t n_seqs)
{
    int64_t cuts = SPLIT_PAIRS / (channels > 0 ? channels : 1) + 1, chunks = tokens / SCAN_CHUNK + 1;
    return n_seqs + (cuts < chunks ? cuts : chunks);
}

/* seq_starts is in host memory, valid, and has at least one sequence. */
static inline int scan_spans_make(struct kernel_device *device, const int32_t *seq_starts, int32_t n_seqs,
                                  int64_t channels, struct scan_spans *ret_spans)
{
    int64_t tokens = seq_starts[n_seqs], longest = 1;
    for (int32_t s = 0; s < n_seqs; s++)
        longest = seq_starts[s + 1] - seq_starts[s] > longest ? seq_starts[s + 1] - seq_starts[s] : longest;
    struct scan_spans spans = {NULL, NULL, NULL, n_seqs, 0, 0, false, tokens * channels / longest};
    int64_t length = divide_up(longest, SCAN_CHUNK) * SCAN_CHUNK;
    if (spans.pairs < SPLIT_BELOW && longest > 2 * SCAN_CHUNK) {
        int64_t cut = divide_up(divide_up(tokens * channels, SPLIT_PAIRS), SCAN_CHUNK) * SCAN_CHUNK;
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
    if (spans.split)
        spans.pairs = tokens * channels / length;
    const int32_t *copy = NULL;
    int status = cuda_stage_array(device, tables, 3 * entries, &copy);
    free(tables);
    spans.seq_starts = copy;
    spans.span_starts = copy + entries;
    spans.chunk_starts = copy + 2 * entries;
    *ret_spans = spans;
    return status;
}

/* What the spans of a split scan begin from. Forward, the states: rows, of x and B. In the backward, `reverse`, the
 * gradients of the states after the spans' ends: of dy, gated by z, and C. initial: its slots on the device. */
struct scan_local {
    int64_t channels, d_state;
    const void *x, *dt, *z, *b;
    int64_t x_stride, dt_stride, z_stride, b_stride;
    const float *a, *dt_bias;
    struct state_view initial;
    enum kernel_type act;
    bool reverse;
};
/* states: [spans][d_state][channels]. deltas: [spans][channels], for its own use. */
int cuda_scan_local(struct kernel_device *device, const struct scan_local *l, const struct scan_spans *spans,
                    float *states, float *deltas);

/* ---- on the device ---- */

/* One span: tokens begin..end-1 of sequence `seq`, whose first chunk is `chunk`. */
struct scan_span {
    int32_t seq;
    int64_t index, begin, end, chunk;
    bool first, last; /* of its sequence */
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
    span.first = j == 0;
    span.last = index + 1 == spans.span_starts[span.seq + 1];
    return span;
}

/* A few neighbouring elements of a row as they are in memory, so that a load can be under way while other work is
 * done. */
template <typename T, int N> struct alignas(N * sizeof(T)) several {
    T v[N];

    __device__ __forceinline__ float operator[](int i) const
    {
        return to_float(v[i]);
    }
};

/* The first n of N elements at p, the others zero; nothing is read when n <= 0. WHOLE: all or nothing, and aligned. */
template <int N, bool WHOLE, typename T>
static __device__ __forceinline__ struct several<T, N> load_several(const T *p, int n) {
    struct several<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++)
        out.v[i] = from_float<T>(0.0f);
    if (WHOLE) {
        if (n > 0)
            out = *reinterpret_cast<const struct several<T, N> *>(p);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < n)
                out.v[i] = p[i];
    }
    return out;
}

/* All of it as floats; two halves of a register at a time. */
template <int N>
static __device__ __forceinline__ void unpack(const struct several<float, N> &in, float (&out)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        out[i] = in.v[i];
}
template <int N>
static __device__ __forceinline__ void unpack(const struct several<__nv_bfloat16, N> &in, float (&out)[N])
{
    if (N == 1)
        out[0] = to_float(in.v[0]);
    const uint32_t *pairs = reinterpret_cast<const uint32_t *>(&in);
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        out[2 * i] = __uint_as_float(pairs[i] << 16);
        out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}
template <int N>
static __device__ __forceinline__ void unpack(const struct several<__half, N> &in, float (&out)[N])
{
    if (N == 1)
        out[0] = to_float(in.v[0]);
    const __half2 *pairs = reinterpret_cast<const __half2 *>(&in);
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float2 two = __half22float2(pairs[i]);
        out[2 * i] = two.x;
        out[2 * i + 1] = two.y;
    }
}

template <int N, bool WHOLE, typename T>
static __device__ __forceinline__ void store_several(T *p, int n, const float (&in)[N])
{
    struct several<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++)
        out.v[i] = from_float<T>(in[i]);
    if (WHOLE) {
        if (n > 0)
            *reinterpret_cast<struct several<T, N> *>(p) = out;
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < n)
                p[i] = out.v[i];
    }
}

/* A matrix's rows of a tile. The tile is the same for all threads and offsets within it have 32 bits, so that an address
 * is one addition. */
template <typename T> struct tile_rows {
    char *base;
    unsigned stride; /* bytes */

    __device__ __forceinline__ tile_rows(const void *rows, int64_t row_stride, int64_t row)
        : base((char *)rows + row * row_stride * (int64_t)sizeof(T)),
          stride((unsigned)row_stride * (unsigned)sizeof(T))
    {
    }
    __device__ __forceinline__ T *at(unsigned row, unsigned column) const
    {
        return (T *)(base + (row * stride + column * (unsigned)sizeof(T)));
    }
};

/* Four neighbouring values of the matrix [token][B | C], STATES of each: the i-th four, from token t0 on. Zero from
 * `count` tokens on. */
template <typename T, typename SHAPE, bool WHOLE>
static __device__ __forceinline__ struct several<T, 4>
load_bc_four(const void *b, int64_t b_stride, const void *c, int64_t c_stride, int64_t d_state, int64_t t0,
             int count, int i) {
    constexpr int FOURS = 2 * SHAPE::STATES / 4;
    int t = i / FOURS, n = i % FOURS * 4;
    bool is_c = n >= SHAPE::STATES;
    n = is_c ? n - SHAPE::STATES : n;
    const T *row = is_c ? (const T *)c + (t0 + t) * c_stride : (const T *)b + (t0 + t) * b_stride;
    return load_several<4, WHOLE>(row + n, t < count ? (int)d_state - n : 0);
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

/* A thread's S states of channel c, states n0.. of d_state, from [d_state][channels]. NULL: zeros. */
template <int S>
static __device__ __forceinline__ void load_states(const float *states, int64_t n0, int64_t d_state,
                                                   int64_t c, int64_t channels, float (&out)[S])
{
#pragma unroll
    for (int i = 0; i < S; i++)
        out[i] = states != NULL && c < channels && n0 + i < d_state ? states[(n0 + i) * channels + c] : 0.0f;
}

template <int S>
static __device__ __forceinline__ void store_states(float *states, int64_t n0, int64_t d_state, int64_t c,
                                                    int64_t channels, const float (&in)[S])
{
#pragma unroll
    for (int i = 0; i < S; i++)
        if (c < channels && n0 + i < d_state)
            states[(n0 + i) * channels + c] = in[i];
}

/* S floats from shared memory, 16 bytes at a time. */
template <int S> static __device__ __forceinline__ void load_shared(const float *p, float (&out)[S])
{
#pragma unroll
    for (int i = 0; i < S; i += 4) {
        const float4 v = *reinterpret_cast<const float4 *>(p + i);
        out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
}

#endif
