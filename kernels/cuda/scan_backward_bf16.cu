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
 * first, each forward and back. */
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
constexpr uint32_t ONES = 0x3f803f80u, LEAST = 0xff80ff80u; /* pairs of 1 and of minus infinity */

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

/* Rows are states, columns channels: row g is state 4 (g / 2) + g % 2, row g + 8 the second after it; a lane's columns are
 * the channels 4q and 4q+2, 4q+1 and 4q+3. */
__device__ __forceinline__ struct tile turned(const struct tile &in)
{
    return {{turn_pairs(in.v[0]), turn_pairs(in.v[2]), turn_pairs(in.v[1]), turn_pairs(in.v[3])}};
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
__device__ __forceinline__ void multiply_add(float (&sums)[POINTS], const struct tile &a,
                                             const struct factor &b)
{
    const uint2 pairs = *reinterpret_cast<const uint2 *>(&b);
    multiply_add(sums, a, pairs.x, pairs.y);
}

/* ---- memory of a block ---- */

/* Of a warp's channels alone. Rows of 8 are padded so that neighbouring tokens' are in different banks. */
struct warp_memory {
    float4 inputs[SCAN_CHUNK][9];                   /* delta and delta x of the channels 2g, 2g+1 */
    float4 states[GROUPS - 1][LANE_CHANNELS][WARP]; /* before each group but the last */
    float2 douts[GROUP][10];
    factor dout_factors[GROUP][WARP], input_factors[GROUP][WARP];
    float4 sums[2][2]
               [WARP]; /* dB and dC of a group over the warp's channels; twice, for neighbouring groups */
};

struct block_memory {
    struct warp_memory warps[WARPS];
    float bc[SCAN_CHUNK][2 * STATES];
    factor bc_factors[2][2][GROUP][WARP]; /* of B and of C; twice, for neighbouring groups */
    uint32_t ones[GROUP][8];              /* a right factor of ones */
};

/* ---- rows ---- */

/* A lane's channels and tokens of a group as they are in memory, pairs of channels. */
struct raw_points {
    uint32_t v[LANE_TOKENS];
};

/* A lane's place in a matrix: its channels at its first token of a group. */
struct place {
    char *at;
    int64_t stride; /* bytes */

    __device__ __forceinline__ place(const void *rows, int64_t row_stride, int64_t row, int64_t c)
        : at((char *)rows + (row * row_stride + c) * 2), stride(row_stride * 2)
    {
    }
    __device__ __forceinline__ void move(int groups)
    {
        at += groups * GROUP * stride;
    }
    /* Tokens that are not there, beyond `left`, are `absent`. */
    __device__ __forceinline__ struct raw_points load(int left, uint32_t absent) const
    {
        struct raw_points out;
#pragma unroll
        for (int k = 0; k < LANE_TOKENS; k++)
            out.v[k] = k < left ? *reinterpret_cast<const uint32_t *>(at + k * stride) : absent;
        return out;
    }
    /* v[channel][token] */
    __device__ __forceinline__ void store(int left, const float (&v)[LANE_CHANNELS][LANE_TOKENS]) const
    {
#pragma unroll
        for (int k = 0; k < LANE_TOKENS; k++)
            if (k < left)
                *reinterpret_cast<uint32_t *>(at + k * stride) = pair_of(v[0][k], v[1][k]);
    }
};

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

/* B and C of a chunk, a thread a row; what is not there is 0. */
__device__ __forceinline__ void put_bc(const struct scan_backward_args &a, struct block_memory &m, int64_t t0,
                                       int count)
{
    static_assert(THREADS == 2 * SCAN_CHUNK, "a thread a row");
    int t = threadIdx.x / 2, is_c = threadIdx.x % 2;
    const void *rows = is_c ? a.c : a.b;
    const uint4 *row = reinterpret_cast<const uint4 *>((const __nv_bfloat16 *)rows +
                                                       (t0 + t) * (is_c ? a.c_stride : a.b_stride));
    uint4 raw[2] = {};
    if (t < count)
        raw[0] = row[0], raw[1] = row[1];
    float4 *to = reinterpret_cast<float4 *>(&m.bc[t][is_c * STATES]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        to[2 * i] =
            make_float4(lower_of(raw[i].x), upper_of(raw[i].x), lower_of(raw[i].y), upper_of(raw[i].y));
        to[2 * i + 1] =
            make_float4(lower_of(raw[i].z), upper_of(raw[i].z), lower_of(raw[i].w), upper_of(raw[i].w));
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

/* Puts the lane's channels at token t of a group into a right factor whose rows are turned()'s columns. */
__device__ __forceinline__ void put_factor(factor (&factors)[GROUP][WARP], int t, int g, float v0, float v1)
{
    uint32_t pair = pair_of(v0, v1);
    factors[t][4 * t + g / 2].v[g % 2] = (uint16_t)pair;
    factors[t][4 * t + g / 2].v[2 + g % 2] = (uint16_t)(pair >> 16);
}

__device__ __forceinline__ void prefetch(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* Brings the inputs of the chunk that ends before t0, and its state, on their way to the second-level cache. */
__device__ __forceinline__ void prefetch_chunk(const struct scan_backward_args &a, const float *states,
                                               int64_t t0, int64_t block_c)
{
    static_assert(THREADS == 2 * SCAN_CHUNK && THREADS == 8 * STATES,
                  "two lines a thread, and some of the states");
    if (block_c + CHANNELS > a.channels)
        return;
    int64_t t = t0 - 1 - threadIdx.x / 2;
    bool second = threadIdx.x % 2;
    prefetch((const __nv_bfloat16 *)(second ? a.x : a.dt) + t * (second ? a.x_stride : a.dt_stride) +
             block_c);
    prefetch((const __nv_bfloat16 *)(second ? a.z : a.dy) + t * (second ? a.z_stride : a.dy_stride) +
             block_c);
    if (threadIdx.x < 2 * STATES)
        prefetch(states + threadIdx.x / 2 * a.channels + block_c + threadIdx.x % 2 * 32);
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
        multiply_add(over_channels, turned(now), w.dout_factors[t][lane]);
    }
    w.sums[group % 2][1][lane] =
        make_float4(over_channels[0], over_channels[1], over_channels[2], over_channels[3]);
#pragma unroll
    for (int i = 0; i < POINTS; i++)
        over_channels[i] = 0.0f;
#pragma unroll
    for (int t = GROUP - 1; t >= 0; t--) {
        const float2 dout = w.douts[t][g];
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
        multiply_add(over_channels, turned(now), w.input_factors[t][lane]);
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
        uint32_t one = m.ones[t][g];
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

    for (int i = lane; i < GROUP * WARP; i += WARP)
        w.dout_factors[i / WARP][lane] = w.input_factors[i / WARP][lane] = factor{};
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

    /* The places stay with the present group. */
    int length = (int)(span.end - span.begin), chunk = (length + SCAN_CHUNK - 1) / SCAN_CHUNK - 1;
    int own_t = q * LANE_TOKENS, groups = (length - chunk * SCAN_CHUNK + GROUP - 1) / GROUP;
    int64_t chunk_t = span.begin + chunk * SCAN_CHUNK, last_t = chunk_t + (groups - 1) * GROUP;
    struct place x_at(a.x, a.x_stride, chunk_t + own_t, c), dt_at(a.dt, a.dt_stride, chunk_t + own_t, c),
        z_at(a.z, a.z_stride, last_t + own_t, c), dy_at(a.dy, a.dy_stride, last_t + own_t, c),
        dx_at(a.dx, a.dx_stride, last_t + own_t, c), ddt_at(a.ddt, a.ddt_stride, last_t + own_t, c),
        dz_at(a.dz, a.dz_stride, last_t + own_t, c), y_at(a.y, a.y_stride, last_t + own_t, c);
    struct block_sums block(token_parts, last_t);
    const float *state =
        a.chunk_states + (span.chunk + chunk) * state_size + q * LANE_STATES * a.channels + c;
    for (; chunk >= 0; chunk--) {
        int count = min((int)SCAN_CHUNK, length - chunk * SCAN_CHUNK);
        int left = active ? count - own_t : 0; /* tokens from the lane's first on */
        float h[LANE_CHANNELS][LANE_STATES];
        groups = (count + GROUP - 1) / GROUP;
        {
            const struct raw_points x = x_at.load(left, 0), dt = dt_at.load(left, LEAST);
#pragma unroll
            for (int i = 0; i < LANE_STATES; i++)
#pragma unroll
                for (int j = 0; j < LANE_CHANNELS; j++)
                    h[j][i] = state[i * a.channels + j];
            put_bc(a, m, span.begin + chunk * SCAN_CHUNK, count);
            put_inputs(w, own_t, g, x, dt, bias);
        }
        state -= state_size;
        __syncthreads();
        put_bc_factors(m, groups - 1);
        if (chunk > 0)
            prefetch_chunk(a, a.chunk_states + (span.chunk + chunk - 1) * state_size,
                           span.begin + chunk * SCAN_CHUNK, block_c);

        /* Forward. A group's inputs are made while states go through the group before it. */
        int last_left = left - (groups - 1) * GROUP;
        struct raw_points z = z_at.load(last_left, 0), dy = dy_at.load(last_left, 0);
#pragma unroll 1
        for (int group = 0; group < groups - 1; group++) {
            x_at.move(1), dt_at.move(1), left -= GROUP;
            const struct raw_points x = x_at.load(left, 0), dt = dt_at.load(left, LEAST);
#pragma unroll
            for (int j = 0; j < LANE_CHANNELS; j++)
                w.states[group][j][lane] = make_float4(h[j][0], h[j][1], h[j][2], h[j][3]);
            step_group(m, w, group, g, q, k.rate, h);
            put_inputs(w, (group + 1) * GROUP + own_t, g, x, dt, bias);
            __syncwarp();
        }
        __syncthreads();

        /* Back, group by group. */
#pragma unroll 1
        for (int group = groups - 1; group >= 0; group--) {
            if (group < groups - 1)
#pragma unroll
                for (int j = 0; j < LANE_CHANNELS; j++) {
                    const float4 v = w.states[group][j][lane];
                    h[j][0] = v.x, h[j][1] = v.y, h[j][2] = v.z, h[j][3] = v.w;
                }
            const struct raw_points x = x_at.load(left, 0), dt = dt_at.load(left, 0);
            x_at.move(-1), dt_at.move(-1), z_at.move(-1), dy_at.move(-1);
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
                w.douts[own_t + t][g] = make_float2(dout[0][t], dout[1][t]);
                put_factor(w.dout_factors, own_t + t, g, dout[0][t], dout[1][t]);
                put_factor(w.input_factors, own_t + t, g, in[t].y, in[t].w);
            }
            if (group > 0)
                z = z_at.load(left + GROUP, 0), dy = dy_at.load(left + GROUP, 0);
            __syncwarp();
            const struct group_sums sums = run_group<SUMS>(m, w, group, lane, h, &k);
            if (group > 0)
                put_bc_factors(m, group - 1);
            __syncthreads();
            block.add(m, group % 2, count - group * GROUP);

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
                        k.bias_sum[j] += t < left ? ddt[j][t] : 0.0f;
                    }
                }
            dx_at.store(left, dx), ddt_at.store(left, ddt), dz_at.store(left, dz);
            if (a.y != NULL)
                y_at.store(left, y);
            dx_at.move(-1), ddt_at.move(-1), dz_at.move(-1), y_at.move(-1);
            left += GROUP;
        }
        /* Now at the group before this chunk; the next begins with the first of its own. */
        x_at.move(1 - GROUPS), dt_at.move(1 - GROUPS);
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
    return a.act == TYPE_BF16 && a.d_state == STATES && a.channels % TILE == 0 &&
           (int)sizeof(struct block_memory) <= device->shared_bytes;
}

int cuda_scan_backward_tiles(struct kernel_device *device, const struct scan_backward_args &a,
                             const struct scan_spans &spans, const float *gradients,
                             const struct scan_parts &parts, bool sums)
{
    return sums ? launch<true>(device, a, spans, gradients, parts)
                : launch<false>(device, a, spans, gradients, parts);
}
