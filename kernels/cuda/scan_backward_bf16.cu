/* scan_backward_bf16.cu: the selective scan, backward, of bf16 activations and 16 states: what models are trained with.
 * scan_backward.cu tells what is computed and takes every other case; this one leaves most sums to the tensor cores.
 *
 * Each warp has TILE channels: with their states, one left factor of a product on the tensor cores. Lane (g, q) = (lane /
 * 4, lane % 4) holds channels 2g and 2g+1 and of each the states 4q .. 4q+3, in fp32, and what the sums take of them in
 * bf16, as the tensor cores want it (tile_of). Of a group of GROUP tokens the warp makes, in fp32,
 *   forward:  kept = a_t h_{t-1},  h_t = kept + delta x B
 *   back:     whole = g_t + dout C,  g_{t-1} = a_t whole        (g_t: what later tokens say about h_t)
 * and the tensor cores add up over states and over channels
 *   out = sum_n C h,  in = sum_n B whole,  through = sum_n A kept whole;  dC = sum_c dout h,  dB = sum_c (delta x) whole
 * each with one column per token of the group, so that a lane ends up with both its channels at tokens 2q and 2q+1. The
 * right factors are 0 in the columns of other tokens.
 *
 * A chunk is gone through forward once to find the states before each of its groups; then its groups from the last to the
 * first, each forward and back. What a warp's arithmetic would otherwise have to wait for comes by asynchronous copies,
 * one or two groups or a chunk ahead, to places in shared memory that are the copying lane's own: loads to registers share
 * the few scoreboards of a warp with its exponentials, which then wait for memory, too. */
#include <cuda_pipeline.h>

#include "kernels/cuda/scan_backward.cuh"

namespace
{

enum {
    GROUP = 8, /* tokens: columns of a product */
    GROUPS = SCAN_CHUNK / GROUP,
    STATES = 16,
    TILE = 16, /* channels of a warp */
    WARPS = 4,
    THREADS = WARPS * WARP,
    CHANNELS = WARPS * TILE, /* of a block */
    LANE_CHANNELS = 2,
    LANE_STATES = 4,
    LANE_TOKENS = 2, /* of a group, where a lane has tokens */
    POINTS = LANE_CHANNELS * LANE_TOKENS,
};
static_assert((int)CHANNELS == SCAN_PARTS_CHANNELS, "partial sums are as wide");

constexpr float LN_2 = 0.693147180559945309f;
constexpr uint32_t ONES = 0x3f803f80u; /* a pair */

/* ---- pairs of bf16, and products on the tensor cores ---- */

__device__ __forceinline__ uint32_t pair_of(float lower, float upper)
{
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
    return pair;
}

__device__ __forceinline__ float lower_of(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float upper_of(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b)
{
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}

__device__ __forceinline__ uint32_t add_product(uint32_t sum, uint32_t a, uint32_t b)
{
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

/* A warp's left factor: 16 rows of 16. */
struct tile {
    uint32_t v[4];
};

/* A lane's part of a right factor, four rows of column g: 16 rows, a column for each token of a group. */
struct alignas(8) factor {
    uint16_t v[4];
};

/* Rows are channels, columns states. */
__device__ __forceinline__ struct tile tile_of(const float (&v)[LANE_CHANNELS][LANE_STATES])
{
    return {{pair_of(v[0][0], v[0][1]), pair_of(v[1][0], v[1][1]), pair_of(v[0][2], v[0][3]),
             pair_of(v[1][2], v[1][3])}};
}

__device__ __forceinline__ uint32_t turn_pairs(uint32_t v)
{
    uint32_t turned;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(v));
    return turned;
}

/* sums: rows g and g + 8, of each the columns 2q and 2q+1. */
__device__ __forceinline__ void multiply_add(float (&sums)[POINTS], const struct tile &a, uint32_t b0,
                                             uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}
/* The channels' sums of a's rows times b's pairs, over the lane's two: half of the tile. Rows are states, columns pairs of
 * channels: row g is state 4 (g / 2) + g % 2, row g + 8 the second after it. */
__device__ __forceinline__ uint2 turned_sum(const struct tile &a, uint2 b)
{
    uint32_t lower = add_product(multiply_pairs(a.v[0], b.x), a.v[1], b.y);
    uint32_t upper = add_product(multiply_pairs(a.v[2], b.x), a.v[3], b.y);
    return make_uint2(turn_pairs(lower), turn_pairs(upper));
}
__device__ __forceinline__ void multiply_add(float (&sums)[POINTS], uint2 a, uint32_t b)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.x), "r"(a.y), "r"(b));
}
__device__ __forceinline__ void multiply_add(float (&sums)[POINTS], const struct tile &a,
                                             const struct factor &b)
{
    const uint2 pairs = *reinterpret_cast<const uint2 *>(&b);
    multiply_add(sums, a, pairs.x, pairs.y);
}

/* ---- rows ---- */

/* A lane's channels and tokens of a group as they are in memory, pairs of channels. */
struct raw_points {
    uint32_t v[LANE_TOKENS];
};

/* ---- memory of a block ---- */

/* A word of each lane. */
struct arrival {
    uint32_t v[WARP];
};

/* Of a warp's channels alone. Rows of 8 are padded so that neighbouring tokens' are in different banks. */
struct warp_memory {
    float4 inputs[SCAN_CHUNK][9];                   /* delta and delta x of the channels 2g, 2g+1 */
    float4 states[GROUPS - 1][LANE_CHANNELS][WARP]; /* before each group but the last */
    uint4 outs[GROUP][9];        /* dout of the channels, and of each delta x twice in a pair */
    uint2 dout_pairs[GROUP][10]; /* of each dout twice */
    /* On their way from memory, each lane's own. */
    struct arrival ahead[2][2][LANE_TOKENS]; /* x and dt of two groups */
    struct arrival back[4][LANE_TOKENS];     /* x, dt, z and dy of one, for the way back */
    float2 state[LANE_STATES][WARP];         /* before the chunk */
    float4 sums[2][2]
               [WARP]; /* dB and dC of a group over the warp's channels; twice, for neighbouring groups */
};

struct block_memory {
    struct warp_memory warps[WARPS];
    float bc[SCAN_CHUNK][2 * STATES];
    uint4 bc_rows[2][THREADS];            /* the next chunk's on their way, each thread's own */
    factor bc_factors[2][2][GROUP][WARP]; /* of B and of C; twice, for neighbouring groups */
    uint32_t ones[GROUP][8];              /* a right factor of ones */
};

/* A lane's channels in a matrix's rows of a span. An address is one multiplication by a stride of 32 bits. */
struct column {
    char *first;
    int stride; /* bytes */

    __device__ __forceinline__ column(const void *rows, int64_t row_stride, int64_t row, int64_t c)
        : stride((int)row_stride * 2)
    {
        size_t address = __cvta_generic_to_global((char *)rows + (row * row_stride + c) * 2);
        asm("" : "+l"(address)); /* so that nothing is added to it twice */
        first = (char *)__cvta_global_to_generic(address);
    }
    __device__ __forceinline__ uint32_t *at(int t) const
    {
        return reinterpret_cast<uint32_t *>(first + (int64_t)t * stride);
    }
    /* The tokens t and t + 1; those from `end` on are not there, and 0. */
    __device__ __forceinline__ struct raw_points load(int t, int end) const
    {
        struct raw_points out;
#pragma unroll
        for (int k = 0; k < LANE_TOKENS; k++)
            out.v[k] = t + k < end ? *at(t + k) : 0;
        return out;
    }
    /* The same, on the way to the lane's words. */
    __device__ __forceinline__ void copy(struct arrival (&to)[LANE_TOKENS], int lane, int t, int end) const
    {
#pragma unroll
        for (int k = 0; k < LANE_TOKENS; k++)
            __pipeline_memcpy_async(&to[k].v[lane], at(t + k), 4, t + k < end ? 0 : 4);
    }
    /* v[channel][token] */
    __device__ __forceinline__ void store(int t, int end, const float (&v)[LANE_CHANNELS][LANE_TOKENS]) const
    {
#pragma unroll
        for (int k = 0; k < LANE_TOKENS; k++)
            if (t + k < end)
                *at(t + k) = pair_of(v[0][k], v[1][k]);
    }
};

__device__ __forceinline__ struct raw_points arrived(const struct arrival (&from)[LANE_TOKENS], int lane)
{
    return {{from[0].v[lane], from[1].v[lane]}};
}

/* delta and delta x of a group's points, into the warp's memory. */
__device__ __forceinline__ void put_inputs(struct warp_memory &w, int t, int g, const struct raw_points &x,
                                           const struct raw_points &dt, const float (&bias)[LANE_CHANNELS])
{
#pragma unroll
    for (int k = 0; k < LANE_TOKENS; k++) {
        float delta0 = softplus(lower_of(dt.v[k]) + bias[0]), delta1 = softplus(upper_of(dt.v[k]) + bias[1]);
        w.inputs[t + k][g] =
            make_float4(delta0, delta0 * lower_of(x.v[k]), delta1, delta1 * upper_of(x.v[k]));
    }
}

/* B and C of a chunk on their way, a thread a row; what is not there is 0. */
__device__ __forceinline__ void copy_bc(const struct scan_backward_args &a, struct block_memory &m,
                                        int64_t t0, int count)
{
    static_assert(THREADS == 2 * SCAN_CHUNK, "a thread a row");
    int t = threadIdx.x / 2, is_c = threadIdx.x % 2;
    const void *rows = is_c ? a.c : a.b;
    const uint4 *row = reinterpret_cast<const uint4 *>((const __nv_bfloat16 *)rows +
                                                       (t0 + t) * (is_c ? a.c_stride : a.b_stride));
#pragma unroll
    for (int i = 0; i < 2; i++)
        __pipeline_memcpy_async(&m.bc_rows[i][threadIdx.x], t < count ? row + i : (const uint4 *)a.b, 16,
                                t < count ? 0 : 16);
}

__device__ __forceinline__ void put_bc(struct block_memory &m)
{
    float4 *to = reinterpret_cast<float4 *>(&m.bc[threadIdx.x / 2][threadIdx.x % 2 * STATES]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 raw = m.bc_rows[i][threadIdx.x];
        to[2 * i] = make_float4(lower_of(raw.x), upper_of(raw.x), lower_of(raw.y), upper_of(raw.y));
        to[2 * i + 1] = make_float4(lower_of(raw.z), upper_of(raw.z), lower_of(raw.w), upper_of(raw.w));
    }
}

/* A group's B and C as right factors: the only lanes with something in the product of token t are those whose column it
 * is. */
__device__ __forceinline__ void put_bc_factors(struct block_memory &m, int group)
{
    static_assert(THREADS >= 2 * WARP, "a thread for every element");
    if (threadIdx.x < 2 * WARP) {
        int which = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane / 4;
        const float4 v = *reinterpret_cast<const float4 *>(
            &m.bc[group * GROUP + t][which * STATES + lane % 4 * LANE_STATES]);
        *reinterpret_cast<uint2 *>(&m.bc_factors[group % 2][which][t][lane]) =
            make_uint2(pair_of(v.x, v.y), pair_of(v.z, v.w));
    }
}

/* ---- a group ---- */

/* What a lane keeps all the time. */
struct lane_state {
    float rate[LANE_CHANNELS][LANE_STATES];     /* A log2(e) */
    struct tile rates;                          /* A */
    float gradient[LANE_CHANNELS][LANE_STATES]; /* of the state before the tokens done so far */
    float rate_sum[LANE_CHANNELS][LANE_STATES]; /* dA */
    float skip_sum[LANE_CHANNELS], bias_sum[LANE_CHANNELS];
};

/* A group forward, for its last state alone. */
__device__ __forceinline__ void step_group(const struct block_memory &m, const struct warp_memory &w,
                                           int group, int g, int q,
                                           const float (&rate)[LANE_CHANNELS][LANE_STATES],
                                           float (&h)[LANE_CHANNELS][LANE_STATES])
{
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
        const float4 in = w.inputs[group * GROUP + t][g];
        const float delta[2] = {in.x, in.z}, input[2] = {in.y, in.w};
        float b[LANE_STATES];
        load_shared(&m.bc[group * GROUP + t][q * LANE_STATES], b);
#pragma unroll
        for (int j = 0; j < LANE_CHANNELS; j++)
#pragma unroll
            for (int i = 0; i < LANE_STATES; i++)
                h[j][i] = fmaf(exp2_fast(delta[j] * rate[j][i]), h[j][i], input[j] * b[i]);
    }
}

/* A group's sums over states, at the lane's points: [channel * 2 + token]. */
struct group_sums {
    float out[POINTS], in[POINTS], through[POINTS];
};

/* A group forward from h, and back. RATES: dA is wanted. */
template <bool RATES>
__device__ __forceinline__ struct group_sums
run_group(const struct block_memory &m, struct warp_memory &w, int group, int lane,
          float (&h)[LANE_CHANNELS][LANE_STATES], struct lane_state *k)
{
    int g = lane / 4, q = lane % 4;
    struct group_sums sums = {};
    float decay[GROUP][LANE_CHANNELS][LANE_STATES], over_channels[POINTS] = {};
    struct tile kept[GROUP];
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
        const float4 in = w.inputs[group * GROUP + t][g];
        const float delta[2] = {in.x, in.z}, input[2] = {in.y, in.w};
        float b[LANE_STATES], part[LANE_CHANNELS][LANE_STATES];
        load_shared(&m.bc[group * GROUP + t][q * LANE_STATES], b);
#pragma unroll
        for (int j = 0; j < LANE_CHANNELS; j++)
#pragma unroll
            for (int i = 0; i < LANE_STATES; i++) {
                decay[t][j][i] = exp2_fast(delta[j] * k->rate[j][i]);
                part[j][i] = decay[t][j][i] * h[j][i];
                h[j][i] = fmaf(input[j], b[i], part[j][i]);
            }
        kept[t] = tile_of(part);
        const struct tile now = tile_of(h);
        multiply_add(sums.out, now, m.bc_factors[group % 2][1][t][lane]);
        multiply_add(over_channels, turned_sum(now, w.dout_pairs[t][g]), m.ones[t][g]);
    }
    w.sums[group % 2][1][lane] =
        make_float4(over_channels[0], over_channels[1], over_channels[2], over_channels[3]);
#pragma unroll
    for (int i = 0; i < POINTS; i++)
        over_channels[i] = 0.0f;
#pragma unroll
    for (int t = GROUP - 1; t >= 0; t--) {
        const uint4 outs = w.outs[t][g];
        const float2 dout = make_float2(__uint_as_float(outs.x), __uint_as_float(outs.y));
        float c[LANE_STATES], whole[LANE_CHANNELS][LANE_STATES];
        load_shared(&m.bc[group * GROUP + t][STATES + q * LANE_STATES], c);
#pragma unroll
        for (int j = 0; j < LANE_CHANNELS; j++)
#pragma unroll
            for (int i = 0; i < LANE_STATES; i++) {
                whole[j][i] = fmaf(c[i], j == 0 ? dout.x : dout.y, k->gradient[j][i]);
                k->gradient[j][i] = whole[j][i] * decay[t][j][i];
            }
        struct tile now = tile_of(whole);
        multiply_add(sums.in, now, m.bc_factors[group % 2][0][t][lane]);
        uint32_t one = m.ones[t][g];
        multiply_add(over_channels, turned_sum(now, make_uint2(outs.z, outs.w)), one);
#pragma unroll
        for (int i = 0; i < 4; i++)
            now.v[i] = multiply_pairs(now.v[i], kept[t].v[i]);
        if (RATES) {
            const float4 in = w.inputs[group * GROUP + t][g];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float delta = i % 2 == 0 ? in.x : in.z;
                float *sum = &k->rate_sum[i % 2][i / 2 * 2];
                sum[0] = fmaf(lower_of(now.v[i]), delta, sum[0]);
                sum[1] = fmaf(upper_of(now.v[i]), delta, sum[1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            now.v[i] = multiply_pairs(now.v[i], k->rates.v[i]);
        multiply_add(sums.through, now, one, one);
    }
    w.sums[group % 2][0][lane] =
        make_float4(over_channels[0], over_channels[1], over_channels[2], over_channels[3]);
    return sums;
}

/* A thread's part of the sums over the block's channels: dB or dC of one state at two tokens of a group. */
struct block_sums {
    int which, lane, upper; /* of the warps' sums */
    int t;                  /* the first token */
    float *to;              /* for that token of the present group */

    __device__ __forceinline__ block_sums(float *token_parts, int64_t group_t)
        : which(threadIdx.x / (2 * WARP)), lane(threadIdx.x % (2 * WARP) / 2), upper(threadIdx.x % 2),
          t(lane % 4 * LANE_TOKENS)
    {
        static_assert(THREADS == 2 * WARP * 2, "two sums a thread");
        int n = lane / 8 * 4 + lane / 4 % 2 + upper * 2; /* see turned() */
        to = token_parts + (group_t + t) * 2 * STATES + which * STATES + n;
    }
    /* left: tokens from the group's first on. */
    __device__ __forceinline__ void add(const struct block_memory &m, int buffer, int left)
    {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            const float2 v = reinterpret_cast<const float2 *>(&m.warps[i].sums[buffer][which][lane])[upper];
            sum.x += v.x, sum.y += v.y;
        }
        if (t < left)
            to[0] = sum.x;
        if (t + 1 < left)
            to[2 * STATES] = sum.y;
        to -= GROUP * 2 * STATES;
    }
};

/* ---- the kernel ---- */

/* The span's sums over tokens, of the warp's channels from `tile_c` on. */
__device__ __forceinline__ void store_sums(const struct scan_backward_args &a, float *part, int64_t tile_c,
                                           int lane, const struct lane_state &k)
{
    int64_t size = a.channels * STATES, c = tile_c + lane / 4 * LANE_CHANNELS;
#pragma unroll
    for (int j = 0; j < LANE_CHANNELS; j++) {
#pragma unroll
        for (int i = 0; i < LANE_STATES; i++)
            part[(c + j) * STATES + lane % 4 * LANE_STATES + i] = k.rate_sum[j][i] * k.rate[j][i] * LN_2;
        float skip = k.skip_sum[j], bias = k.bias_sum[j];
        skip += __shfl_xor_sync(0xffffffffu, skip, 1);
        skip += __shfl_xor_sync(0xffffffffu, skip, 2);
        bias += __shfl_xor_sync(0xffffffffu, bias, 1);
        bias += __shfl_xor_sync(0xffffffffu, bias, 2);
        if (lane % 4 == 0) {
            part[size + c + j] = skip;
            part[size + a.channels + c + j] = bias;
        }
    }
}

/* gradients, parts: see scan_backward.cu. SUMS: those over tokens are wanted. */
template <bool SUMS>
__global__ void __launch_bounds__(THREADS, 2)
    tile_kernel(struct scan_backward_args a, struct scan_spans spans, const float *gradients,
                struct scan_parts parts)
{
    extern __shared__ __align__(16) unsigned char raw[];
    struct block_memory &m = *reinterpret_cast<struct block_memory *>(raw);
    struct scan_span span = scan_span_at(spans, (int32_t)blockIdx.x);
    int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    struct warp_memory &w = m.warps[threadIdx.x / WARP];
    int64_t block_c = (int64_t)blockIdx.y * CHANNELS, tile_c = block_c + threadIdx.x / WARP * TILE;
    int64_t state_size = STATES * a.channels;
    float *token_parts = parts.tokens + blockIdx.y * a.tokens * 2 * STATES;
    /* A warp without channels goes along with those of the last tile, with no tokens. */
    bool active = tile_c < a.channels;
    int64_t c = (active ? tile_c : a.channels - TILE) + g * LANE_CHANNELS;

    if (threadIdx.x < GROUP * 8)
        m.ones[threadIdx.x / 8][threadIdx.x % 8] = threadIdx.x / 8 == threadIdx.x % 8 ? ONES : 0;
    for (int i = threadIdx.x; i < 2 * 2 * GROUP * WARP; i += THREADS)
        m.bc_factors[i / 512][i / 256 % 2][i / WARP % GROUP][lane] = factor{};

    struct lane_state k = {};
    float bias[LANE_CHANNELS], skip[LANE_CHANNELS];
#pragma unroll
    for (int j = 0; j < LANE_CHANNELS; j++) {
        bias[j] = a.dt_bias[c + j];
        skip[j] = a.d[c + j];
    }
#pragma unroll
    for (int i = 0; i < LANE_STATES; i++) {
        int64_t at = (q * LANE_STATES + i) * a.channels + c;
#pragma unroll
        for (int j = 0; j < LANE_CHANNELS; j++) {
            k.rate[j][i] = a.a[at + j];
            if (gradients != NULL)
                k.gradient[j][i] = gradients[span.index * state_size + at + j];
        }
    }
    k.rates = tile_of(k.rate);
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS * LANE_STATES; i++)
        k.rate[i / LANE_STATES][i % LANE_STATES] *= LOG2_E;

    /* Tokens are counted from the span's first. Those that are not there have x and dy 0, and say nothing; a warp
     * without channels has none. */
    int length = (int)(span.end - span.begin), end = active ? length : 0, own_t = q * LANE_TOKENS;
    const struct column x_at(a.x, a.x_stride, span.begin, c), dt_at(a.dt, a.dt_stride, span.begin, c),
        z_at(a.z, a.z_stride, span.begin, c), dy_at(a.dy, a.dy_stride, span.begin, c),
        dx_at(a.dx, a.dx_stride, span.begin, c), ddt_at(a.ddt, a.ddt_stride, span.begin, c),
        dz_at(a.dz, a.dz_stride, span.begin, c), y_at(a.y, a.y_stride, span.begin, c);
    int chunk = (length + SCAN_CHUNK - 1) / SCAN_CHUNK - 1;
    const float *state =
        a.chunk_states + (span.chunk + chunk) * state_size + q * LANE_STATES * a.channels + c;
    /* x and dt of a group of the chunk. */
    auto copy_group = [&](int group) {
        int t = chunk * SCAN_CHUNK + group * GROUP + own_t;
        x_at.copy(w.ahead[group % 2][0], lane, t, end);
        dt_at.copy(w.ahead[group % 2][1], lane, t, end);
    };
    /* What the way back takes of the group from token t on: by copies where the sums over tokens need the registers, else
     * all but z and dy of a chunk's last group by loads. */
    auto copy_back = [&](int t) {
        if (SUMS) {
            x_at.copy(w.back[0], lane, t + own_t, end);
            dt_at.copy(w.back[1], lane, t + own_t, end);
        }
        z_at.copy(w.back[2], lane, t + own_t, end);
        dy_at.copy(w.back[3], lane, t + own_t, end);
        __pipeline_commit();
    };
    /* What a chunk begins with. */
    auto copy_first = [&]() {
        copy_group(0);
        copy_group(1);
#pragma unroll
        for (int i = 0; i < LANE_STATES; i++)
            __pipeline_memcpy_async(&w.state[i][lane], state + i * a.channels, 8);
        copy_bc(a, m, span.begin + chunk * SCAN_CHUNK, length - chunk * SCAN_CHUNK);
        __pipeline_commit();
        state -= state_size;
    };
    if (chunk >= 0)
        copy_first();
    struct block_sums block(token_parts, span.begin + (length - 1) / GROUP * GROUP);
    while (chunk >= 0) {
        int t0 = chunk * SCAN_CHUNK, groups = (min((int)SCAN_CHUNK, length - t0) + GROUP - 1) / GROUP;
        float h[LANE_CHANNELS][LANE_STATES];
        copy_back(t0 + (groups - 1) * GROUP);
        __pipeline_wait_prior(1);
#pragma unroll
        for (int i = 0; i < LANE_STATES; i++) {
            const float2 v = w.state[i][lane];
            h[0][i] = v.x, h[1][i] = v.y;
        }
        put_bc(m);
        put_inputs(w, own_t, g, arrived(w.ahead[0][0], lane), arrived(w.ahead[0][1], lane), bias);
        __syncthreads();
        put_bc_factors(m, groups - 1);

        /* Forward. A group's inputs are made while states go through the group before it, and those of the one after
         * it are on their way. */
#pragma unroll 1
        for (int group = 0; group < groups - 1; group++) {
            if (group + 2 < groups)
                copy_group(group + 2);
            __pipeline_commit();
#pragma unroll
            for (int j = 0; j < LANE_CHANNELS; j++)
                w.states[group][j][lane] = make_float4(h[j][0], h[j][1], h[j][2], h[j][3]);
            step_group(m, w, group, g, q, k.rate, h);
            __pipeline_wait_prior(1);
            put_inputs(w, (group + 1) * GROUP + own_t, g, arrived(w.ahead[(group + 1) % 2][0], lane),
                       arrived(w.ahead[(group + 1) % 2][1], lane), bias);
            __syncwarp();
        }
        __pipeline_wait_prior(0);
        struct raw_points z = arrived(w.back[2], lane), dy = arrived(w.back[3], lane);
        __syncthreads();

        /* Back, group by group, with the chunk before this one on its way. */
        chunk--;
        if (chunk >= 0)
            copy_first();
#pragma unroll 1
        for (int group = groups - 1; group >= 0; group--) {
            if (group < groups - 1)
#pragma unroll
                for (int j = 0; j < LANE_CHANNELS; j++) {
                    const float4 v = w.states[group][j][lane];
                    h[j][0] = v.x, h[j][1] = v.y, h[j][2] = v.z, h[j][3] = v.w;
                }
            int group_t = t0 + group * GROUP, t_own = group_t + own_t;
            const struct raw_points x = SUMS ? arrived(w.back[0], lane) : x_at.load(t_own, end),
                                    dt = SUMS ? arrived(w.back[1], lane) : dt_at.load(t_own, end);
            if (SUMS)
                z = arrived(w.back[2], lane), dy = arrived(w.back[3], lane);
            float dys[LANE_CHANNELS][LANE_TOKENS], gate[LANE_CHANNELS][LANE_TOKENS],
                gated[LANE_CHANNELS][LANE_TOKENS], dout[LANE_CHANNELS][LANE_TOKENS];
            float4 in[LANE_TOKENS];
#pragma unroll
            for (int t = 0; t < LANE_TOKENS; t++) {
                in[t] = w.inputs[group * GROUP + own_t + t][g];
#pragma unroll
                for (int j = 0; j < LANE_CHANNELS; j++) {
                    float zs = j == 0 ? lower_of(z.v[t]) : upper_of(z.v[t]);
                    dys[j][t] = j == 0 ? lower_of(dy.v[t]) : upper_of(dy.v[t]);
                    gate[j][t] = sigmoid(zs);
                    gated[j][t] = zs * gate[j][t];
                    dout[j][t] = dys[j][t] * gated[j][t];
                }
                w.outs[own_t + t][g] = make_uint4(__float_as_uint(dout[0][t]), __float_as_uint(dout[1][t]),
                                                  pair_of(in[t].y, in[t].y), pair_of(in[t].w, in[t].w));
                w.dout_pairs[own_t + t][g] =
                    make_uint2(pair_of(dout[0][t], dout[0][t]), pair_of(dout[1][t], dout[1][t]));
            }
            if (group > 0 && SUMS)
                copy_back(group_t - GROUP);
            else if (group > 0)
                z = z_at.load(t_own - GROUP, end), dy = dy_at.load(t_own - GROUP, end);
            __syncwarp();
            const struct group_sums sums = run_group<SUMS>(m, w, group, lane, h, &k);
            if (group > 0)
                put_bc_factors(m, group - 1);

            float dx[LANE_CHANNELS][LANE_TOKENS], ddt[LANE_CHANNELS][LANE_TOKENS],
                dz[LANE_CHANNELS][LANE_TOKENS], y[LANE_CHANNELS][LANE_TOKENS];
#pragma unroll
            for (int j = 0; j < LANE_CHANNELS; j++)
#pragma unroll
                for (int t = 0; t < LANE_TOKENS; t++) {
                    float xs = j == 0 ? lower_of(x.v[t]) : upper_of(x.v[t]);
                    float dts = j == 0 ? lower_of(dt.v[t]) : upper_of(dt.v[t]);
                    float out = fmaf(skip[j], xs, sums.out[j * 2 + t]), input = sums.in[j * 2 + t];
                    y[j][t] = out * gated[j][t];
                    dz[j][t] = dys[j][t] * out * fmaf(gated[j][t], 1.0f - gate[j][t], gate[j][t]);
                    dx[j][t] = fmaf(j == 0 ? in[t].x : in[t].z, input, skip[j] * dout[j][t]);
                    ddt[j][t] = fmaf(xs, input, sums.through[j * 2 + t]) * sigmoid(dts + bias[j]);
                    if (SUMS) {
                        k.skip_sum[j] = fmaf(dout[j][t], xs, k.skip_sum[j]);
                        k.bias_sum[j] += t_own + t < end ? ddt[j][t] : 0.0f;
                    }
                }
            dx_at.store(t_own, end, dx), ddt_at.store(t_own, end, ddt), dz_at.store(t_own, end, dz);
            if (a.y != NULL)
                y_at.store(t_own, end, y);
            if (SUMS)
                __pipeline_wait_prior(0);
            __syncthreads();
            block.add(m, group % 2, length - group_t);
        }
    }
    if (SUMS && active)
        store_sums(a, parts.channels + span.index * (state_size + 2 * a.channels), tile_c, lane, k);
}

template <bool SUMS>
int launch(struct kernel_device *device, const struct scan_backward_args &a, const struct scan_spans &spans,
           const float *gradients, const struct scan_parts &parts)
{
    int bytes = (int)sizeof(struct block_memory);
    int status = cuda_check(
        device, cudaFuncSetAttribute(tile_kernel<SUMS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (status != KERNEL_OK)
        return status;
    dim3 grid((unsigned)spans.n_spans, (unsigned)divide_up(a.channels, CHANNELS));
    tile_kernel<SUMS><<<grid, THREADS, bytes, device->stream>>>(a, spans, gradients, parts);
    return cuda_launched(device);
}

} // namespace

bool cuda_scan_backward_tiles_fit(const struct kernel_device *device, const struct scan_backward_args &a)
{
    const int64_t strides[] = {a.x_stride,  a.dt_stride,  a.z_stride,  a.dy_stride,
                               a.dx_stride, a.ddt_stride, a.dz_stride, a.y != NULL ? a.y_stride : 0};
    for (int64_t stride : strides)
        if (stride > INT32_MAX / 2)
            return false;
    return (uintptr_t)a.chunk_states % sizeof(float2) == 0 && a.act == TYPE_BF16 && a.d_state == STATES &&
           a.channels % TILE == 0 && (int)sizeof(struct block_memory) <= device->shared_bytes;
}

int cuda_scan_backward_tiles(struct kernel_device *device, const struct scan_backward_args &a,
                             const struct scan_spans &spans, const float *gradients,
                             const struct scan_parts &parts, bool sums)
{
    return sums ? launch<true>(device, a, spans, gradients, parts)
                : launch<false>(device, a, spans, gradients, parts);
}
