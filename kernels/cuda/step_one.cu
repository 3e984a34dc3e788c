/* step_one.cu: a step of one row in one kernel.
 *
 * For one sequence a step is a read of all weights, and a chain of products each of which wants all of the one before. Here
 * one block stays on every multiprocessor and the two do not wait for each other:
 *
 * Weights. Each block's share of every product is known beforehand, so one warp streams them, tile by tile (8 outputs,
 * a stage of columns at a time), through a ring in shared memory, across all layers and into the head. It waits for
 * nothing but room in the ring.
 *
 * Activations. Blocks hand them on by mail: 8 bytes in memory, of which 4 are the value and 4 the tag of the layer and
 * step that it belongs to, so that whoever polls sees either something old or all of it; there is no barrier of the grid
 * and no fence. A place in the mail is written again only behind something that took all of its readers to come about:
 * h of the next layer needs y of all blocks, each of which had read h and x_dbl; x_dbl needed those that read xc.
 *
 * An adapter's x A^T comes about where x does: who sends a part of h or y sends behind it what A makes of that part, and
 * a warp of its own adds up the parts of all blocks while the others multiply, so that it is there when B wants it, at
 * the product's end. x_proj's A is another tile of x_proj itself, and whoever reads x_dbl adds B's part.
 *
 * The block that computes x and z of a channel also convolves it and moves its state: those never leave it. What a
 * thread needs beside the mail (parameters, states) it loads ahead of the wait; another warp has touched it before.
 *
 * All blocks must run at once: the launch is a cooperative one. */
#include "kernels/cuda/step_one.cuh"

int64_t step_one_mail(const struct mamba_step_args *a)
{
    struct step_one p = {};
    p.rank = (int)a->dt_rank;
    return lay_out_mail(&p, (int)a->d_model, (int)a->d_inner) * (int64_t)sizeof(uint64_t);
}

#if CUDA_HOPPER

/* ---- pieces of the math ---- */

/* Words of x lie such that 16 bytes of it are what a lane has of two rows of the tensor cores' operand: the first half
 * of 8 elements in row 0, the second in row 8. This is where the word k is. */
static __device__ __forceinline__ int word_at(int k)
{
    return (k & ~3) | (k & 1) << 1 | (k >> 1 & 1);
}

/* c[16,8] += a[16,16] b[16,8]; as step_multiply, but free to move. */
static __device__ __forceinline__ void multiply_16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                   uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The product of 8 weights with what they meet. */
static __device__ __forceinline__ float dot_8(uint4 raw, const float *v)
{
    const float4 low = *reinterpret_cast<const float4 *>(v), high = *reinterpret_cast<const float4 *>(v + 4);
    const float2 a = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&raw.x)),
                 b = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&raw.y)),
                 c = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&raw.z)),
                 d = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&raw.w));
    return fmaf(a.x, low.x, fmaf(a.y, low.y, fmaf(b.x, low.z, b.y * low.w))) +
           fmaf(c.x, high.x, fmaf(c.y, high.y, fmaf(d.x, high.z, d.y * high.w)));
}

/* Eight numbers, of as many ranks: a piece of a row of B or of a column of A, with zeros behind the last rank. */
struct ranks {
    float v[TILE];
};

static __device__ __forceinline__ float dot_row(const struct ranks &b, const float *u)
{
    const float4 low = *reinterpret_cast<const float4 *>(u), high = *reinterpret_cast<const float4 *>(u + 4);
    return fmaf(b.v[0], low.x, fmaf(b.v[1], low.y, fmaf(b.v[2], low.z, b.v[3] * low.w))) +
           fmaf(b.v[4], high.x, fmaf(b.v[5], high.y, fmaf(b.v[6], high.z, b.v[7] * high.w)));
}

/* What a thread needs for its channel, loaded ahead of the waits; which those are says `math`. */
struct channel_in {
    float before[STEP_CONV - 1], bias, bias_in;
    float4 weight;
    struct ranks b;
};
template <int CHUNKS> struct channel_scan {
    float h[LANE_STATES], rate[LANE_STATES], bias, skip;
    uint4 weight[CHUNKS]; /* of dt_proj */
    /* An adapter's: x_proj's row of B of output threadIdx.x; of dt_proj's A the row of rank lane / 4, each lane every 4th
     * 4 elements; and of its B the channel's, of the ranks that the lane has of 8. */
    struct ranks x_b;
    float4 dt_a[2 * CHUNKS];
    float dt_b[LANE_RANKS];
};

/* ---- the math warps ---- */

template <int KB, int STAGES, enum adapted ADAPTED>
struct math {
    using S = shape<KB, STAGES>; static constexpr bool EIGHT = ADAPTED == RANK_8; enum {
        CHUNKS =
            (S::D / 16 + 31) / 32 /* of 8 elements of dt_low, LANES lanes; the published rank is d / 16 */
    };
    const struct step_one & p; struct ring_at at; uint32_t full, empty; /* the ring's barriers */
    const struct block own; const int warp, lane;
    float own_r; /* the residual of output `lane` of the block, in warp 0 */

    /* The next `count` tiles of PER_TILE stages in the ring: 32 columns of weights, of an adapter's A 16, for each of KB
     * blocks of each stage. */
    template <bool ADAPTER, int PER_TILE> __device__ __forceinline__ void multiply(int count){
        enum {
            BLOCK = ADAPTER ? 32 : 64,                      /* bytes of x */
            SIDE = PER_TILE < GROUP ? GROUP / PER_TILE : 1, /* tiles side by side */
            DEEP = PER_TILE < GROUP ? PER_TILE : GROUP,     /* stages of each */
        };
        const int g = lane / 4, q = lane % 4;
        const unsigned char * w = shared_at(g * S::STRIDE + warp * KB * 64 + q * 16),
        *x = shared_at(p.room.x + warp * KB * BLOCK + (ADAPTER ? q / 2 * 16 + q % 2 * 4 : q * 16));
        float * sums = floats_at(p.room.sums) + warp * SUMS * TILE + 2 * q;
#pragma unroll 1
        for (int t = 0; t < count; t += SIDE){
            float acc[SIDE][DEEP][2][4] = {};
#pragma unroll 1
            for (int s = 0; s < PER_TILE; s += DEEP){
                uint4 weight[SIDE][DEEP][KB]; const struct ring_at first = at;
#pragma unroll
                for (int j = 0; j < SIDE; j++)
#pragma unroll
                    for (int e = 0; e < DEEP;
                         e++) if (t + j < count){barrier_wait_at(full + at.barriers, at.parity);
#pragma unroll
                                                 for (int b = 0; b < KB; b++) weight[j][e][b] =
                                                     *reinterpret_cast<const uint4 *>(w + at.offset + b * 64);
                                                 at.template next<S::SLOT>(p.ring);}
#pragma unroll
for (int e = 0; e < DEEP; e++)
#pragma unroll
    for (int b = 0; b < KB; b++)
{
    const unsigned char *from = x + ((s + e) * MATH_WARPS * KB + b) * BLOCK;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (g == 0 && ADAPTER) {
        v.x = *reinterpret_cast<const uint32_t *>(from);
        v.y = *reinterpret_cast<const uint32_t *>(from + 8);
    } else if (g == 0) {
        v = *reinterpret_cast<const uint4 *>(from);
    }
#pragma unroll
    for (int j = 0; j < SIDE; j++) {
        const uint4 &a = weight[j][e][b];
        if (ADAPTER) {
            multiply_16(acc[j][e][0], v.x, 0, v.y, 0, round_pair(__uint_as_float(a.x), __uint_as_float(a.y)),
                        round_pair(__uint_as_float(a.z), __uint_as_float(a.w)));
        } else {
            multiply_16(acc[j][e][0], v.x, v.y, v.z, v.w, a.x, a.y);
            multiply_16(acc[j][e][1], v.x, v.y, v.z, v.w, a.z, a.w);
        }
    }
}
__syncwarp();
if (lane == 0) {
    struct ring_at done = first;
#pragma unroll
    for (int j = 0; j < SIDE * DEEP; j++)
        if (t + j / DEEP < count) {
            barrier_arrive_at(empty + done.barriers);
            done.template next<S::SLOT>(p.ring);
        }
}
}
if (g == 0)
#pragma unroll
    for (int j = 0; j < SIDE; j++)
        if (t + j < count) {
            float low = 0.0f, high = 0.0f;
#pragma unroll
            for (int e = 0; e < DEEP; e++) {
                low += acc[j][e][0][0] + acc[j][e][1][2];
                high += acc[j][e][0][1] + acc[j][e][1][3];
            }
            *reinterpret_cast<float2 *>(sums + (t + j) * TILE) = make_float2(low, high);
        }
}
}

__device__ __forceinline__ bool has(int target) const
{
    return ADAPTED != PLAIN && p.u_tiles[target] > 0;
}
__device__ __forceinline__ const struct step_lora &lora(int layer) const
{
    return p.lora[layer * STEP_ADAPTERS];
}

/* Of 8 ranks, where the adapter is on that matrix. */
__device__ __forceinline__ int tiles_of(int target) const
{
    return EIGHT ? 1 : p.u_tiles[target];
}
__device__ __forceinline__ int lora_rank() const
{
    return EIGHT ? (int)TILE : p.lora_rank;
}
__device__ __forceinline__ struct ranks load_ranks(const float *from, int64_t step, int first) const
{
    struct ranks out;
#pragma unroll
    for (int e = 0; e < TILE; e++)
        out.v[e] = EIGHT || first + e < p.lora_rank ? from[(first + e) * step] : 0.0f;
    return out;
}
/* The same of a row of B, whose beginning is aligned to 16 bytes where there are 8 ranks. */
__device__ __forceinline__ struct ranks load_row(const float *b, int64_t row, int first) const
{
    if (!EIGHT)
        return load_ranks(b + row * p.lora_rank, 1, first);
    struct ranks out;
    *reinterpret_cast<float4 *>(&out.v[0]) = *reinterpret_cast<const float4 *>(b + row * TILE);
    *reinterpret_cast<float4 *>(&out.v[4]) = *reinterpret_cast<const float4 *>(b + row * TILE + 4);
    return out;
}

/* Of one output, counted from the tile's first. */
__device__ __forceinline__ float total(int tile, int output) const
{
    const float *from = floats_at(p.room.sums) + tile * TILE + output;
    float v[MATH_WARPS];
#pragma unroll
    for (int w = 0; w < MATH_WARPS; w++)
        v[w] = from[w * SUMS * TILE];
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

__device__ __forceinline__ float *u_of(int use) const
{
    return floats_at(p.room.u) + use * RANKS;
}

/* u B^T for one output, of whose row the first ranks are in `b`. */
__device__ __forceinline__ float low_rank(int layer, int target, int use, int64_t output,
                                          const struct ranks &b) const
{
    float sum = dot_row(b, u_of(use));
#pragma unroll 1
    for (int first = TILE; first < lora_rank(); first += TILE)
        sum += dot_row(load_row(lora(layer).b[target], output, first), u_of(use) + first);
    return sum;
}

__device__ __forceinline__ float *state_of(int layer, int state, int channel) const
{
    return p.states + ((int64_t)layer * (STEP_CONV - 1 + STEP_STATE) + state) * S::INNER + channel;
}

/* ---- a layer ---- */

/* h of the first layer, of which every block computes all: there is nothing to wait for. */
__device__ __forceinline__ void embed()
{
    __shared__ float squares[MATH_WARPS];
    __shared__ __align__(16) float r[S::D];
    const struct step_lora *lora = p.lora_rank > 0 ? &p.lora[(int64_t)p.layers * STEP_ADAPTERS] : NULL;
    if (lora != NULL && lora->a[STEP_IN] == NULL)
        lora = NULL;
    float sum = 0.0f;
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < S::D; i += MATH_THREADS) {
        float v = to_float(static_cast<const step_type *>(p.embedding)[(int64_t)p.id * S::D + i]);
        if (lora != NULL) {
            float low = 0.0f;
#pragma unroll 1
            for (int j = 0; j < p.lora_rank; j++)
                low = fmaf(lora->b[STEP_IN][(int64_t)i * p.lora_rank + j],
                           lora->a[STEP_IN][(int64_t)j * p.vocab + p.id], low);
            v = fmaf(p.lora_scale, low, v);
        }
        sum = fmaf(v, v, sum);
        r[i] = v;
        reinterpret_cast<step_type *>(shared_at(p.room.x))[word_at(i / 2) * 2 + i % 2] =
            from_float<step_type>(v * p.layer[0].norm[i]);
    }
    sum = warp_sum(sum);
    if (lane == 0)
        squares[warp] = sum;
    math_sync();
    if (threadIdx.x == 0) {
        float all = 0.0f;
        for (int w = 0; w < MATH_WARPS; w++)
            all += squares[w];
        row_scale = rsqrtf(all / (float)S::D + p.eps);
    }
    if (has(STEP_IN))
#pragma unroll 1
        for (int j = warp; j < p.u_tiles[STEP_IN] * TILE; j += MATH_WARPS) {
            float u = 0.0f;
            if (j < p.lora_rank)
#pragma unroll
                for (int i = lane * 4; i < S::D; i += WARP * 4) {
                    const float4 a = *reinterpret_cast<const float4 *>(this->lora(0).a[STEP_IN] + j * S::D +
                                                                       i),
                                 w = *reinterpret_cast<const float4 *>(p.layer[0].norm + i),
                                 v = *reinterpret_cast<const float4 *>(r + i);
                    u += a.x * w.x * v.x + a.y * w.y * v.y + a.z * w.z * v.z + a.w * w.w * v.w;
                }
            u = warp_sum(u);
            if (lane == 0)
                u_of(USE_IN)[j] = p.lora_scale * u;
        }
    if (lane < own.out.count * TILE)
        own_r = r[own.out.begin * TILE + lane];
    math_sync();
}

__device__ __forceinline__ void receive_h(uint32_t tag)
{
    mail_gather<(S::D / 4 + MATH_THREADS - 1) / MATH_THREADS>(p.h, S::D / 2, shared_at(p.room.x), tag);
    math_sync();
}

/* Threads of the first half have x of a channel, of the second z. */
__device__ __forceinline__ struct channel_in load_in(int layer) const
{
    const struct mamba_step_layer &l = p.layer[layer];
    const bool is_z = threadIdx.x >= MATH_THREADS / 2;
    const int i = (int)threadIdx.x % (MATH_THREADS / 2);
    struct channel_in in = {};
    if (i < own.in.count * CHANNELS) {
        const int channel = own.in.begin * CHANNELS + i;
        if (!is_z) {
            const float *state = state_of(layer, 0, channel);
#pragma unroll
            for (int k = 0; k < STEP_CONV - 1; k++)
                in.before[k] = state[k * S::INNER];
            in.weight = *reinterpret_cast<const float4 *>(l.conv + channel * STEP_CONV);
            in.bias = l.conv_bias != NULL ? l.conv_bias[channel] : 0.0f;
        }
        const int output = (is_z ? S::INNER : 0) + channel;
        if (l.in_bias != NULL)
            in.bias_in = l.in_bias[output];
        if (has(STEP_IN))
            in.b = load_row(lora(layer).b[STEP_IN], output, 0);
    }
    return in;
}

/* x | z of the block's channels, and xc. */
__device__ __forceinline__ void in_proj(int layer, uint32_t tag, const struct channel_in &in)
{
    const int i = (int)threadIdx.x % (MATH_THREADS / 2), channel = own.in.begin * CHANNELS + i;
    const bool is_z = threadIdx.x >= MATH_THREADS / 2, live = i < own.in.count * CHANNELS;
    multiply<false, STAGES>(own.in.count);
    numbered_wait(BARRIER_IN, MATH_THREADS + (has(STEP_IN) ? 2 : 1) * WARP);
    if (i / WARP * WARP >= own.in.count * CHANNELS)
        return;
    float v = 0.0f;
    if (live) {
        v = total(i / CHANNELS, (is_z ? CHANNELS : 0) + i % CHANNELS);
        if (has(STEP_IN))
            v += low_rank(layer, STEP_IN, USE_IN, (is_z ? S::INNER : 0) + channel, in.b);
        v = fmaf(v, row_scale, in.bias_in);
    }
    if (is_z) {
        if (live)
            floats_at(p.room.own_z)[i] = v;
        return;
    }
    const float4 w = in.weight;
    const float y = silu(
        fmaf(w.w, v, fmaf(w.z, in.before[2], fmaf(w.y, in.before[1], fmaf(w.x, in.before[0], in.bias)))));
    const uint32_t pair = round_pair(y, __shfl_down_sync(0xffffffffu, y, 1));
    if (live && i % 2 == 0)
        mail_send(p.xc + word_at(channel / 2), pair, tag);
    if (live) {
        float *state = state_of(layer, 0, channel);
        floats_at(p.room.own_x)[i] = to_float(from_float<step_type>(y));
        state[0] = in.before[1];
        state[S::INNER] = in.before[2];
        state[2 * S::INNER] = v;
    }
}

__device__ __forceinline__ void x_proj(uint32_t tag)
{
    const int tiles = x_tiles_of(p), out = own.x * TILE + (int)threadIdx.x;
    mail_gather<(S::INNER / 4 + MATH_THREADS - 1) / MATH_THREADS>(p.xc, S::INNER / 2, shared_at(p.room.x),
                                                                  tag);
    math_sync();
    if (ADAPTED != PLAIN && own.x >= tiles)
        multiply<true, 4 * STAGES>(1);
    else
        multiply<false, 2 * STAGES>(1);
    math_sync();
    if (threadIdx.x < TILE) {
        const bool live = ADAPTED != ANY_RANK || out < tiles * TILE + p.lora_rank;
        mail_send(p.x_dbl + out, live ? __float_as_uint(total(0, (int)threadIdx.x)) : 0, tag);
    }
}

/* Four lanes a channel, of 4 states each; they share dt's row of weights as well. */
__device__ __forceinline__ struct channel_scan<CHUNKS> load_scan(int layer) const {
    const struct mamba_step_layer &l = p.layer[layer];
    const int i = (int)threadIdx.x / LANES, part = lane % LANES, channel = own.in.begin * CHANNELS + i;
    struct channel_scan<CHUNKS> in = {
    };
    if (i < own.in.count * CHANNELS) {
        const float *state = state_of(layer, STEP_CONV - 1 + part * LANE_STATES, channel),
                    *rate = l.a + part * LANE_STATES * S::INNER + channel;
        const step_type *weight = static_cast<const step_type *>(l.dt_proj) + channel * p.rank;
#pragma unroll
        for (int s = 0; s < LANE_STATES; s++) {
            in.h[s] = state[s * S::INNER];
            in.rate[s] = rate[s * S::INNER];
        }
        in.bias = l.dt_bias[channel];
        in.skip = l.d[channel];
#pragma unroll
        for (int j = 0; j < CHUNKS; j++)
            if ((part + j * LANES) * 8 < p.rank)
                in.weight[j] = *reinterpret_cast<const uint4 *>(weight + (part + j * LANES) * 8);
#pragma unroll
        for (int e = 0; e < LANE_RANKS; e++) {
            const int j = part * LANE_RANKS + e;
            in.dt_b[e] = has(STEP_DT) ? dt_b_of(layer, channel, j) : 0.0f;
        }
    }
    if (has(STEP_X) && (int)threadIdx.x < p.rank + 2 * STEP_STATE)
        in.x_b = load_row(lora(layer).b[STEP_X], threadIdx.x, 0);
    if (has(STEP_DT))
        load_dt_a(layer, 0, in.dt_a);
    return in;
}

__device__ __forceinline__ float
dt_b_of(int layer, int channel, int j) const
{
    return EIGHT || j < p.lora_rank ? lora(layer).b[STEP_DT][channel * lora_rank() + j] : 0.0f;
}
__device__ __forceinline__ void load_dt_a(int layer, int first, float4 (&a)[2 * CHUNKS]) const
{
    const int j = first + lane / LANES;
    const float *row = lora(layer).a[STEP_DT] + j * p.rank;
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; i++) {
        const int k = (lane % LANES + i * LANES) * 4;
        a[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if ((EIGHT || j < p.lora_rank) && k < p.rank)
            a[i] = *reinterpret_cast<const float4 *>(row + k);
    }
}

/* What x_proj's adapter adds to x_dbl: a thread an output. */
__device__ __forceinline__ void adapt_x_dbl(int layer, const struct ranks &b)
{
    const int width = p.rank + 2 * STEP_STATE, i = (int)threadIdx.x;
    float *x_dbl = floats_at(p.room.x_dbl);
    if (i < width) {
        float sum = dot_row(b, x_dbl + width);
#pragma unroll 1
        for (int first = TILE; first < lora_rank(); first += TILE)
            sum += dot_row(load_row(lora(layer).b[STEP_X], i, first), x_dbl + width + first);
        x_dbl[i] = fmaf(p.lora_scale, sum, x_dbl[i]);
    }
    math_sync();
}

/* This lane's ranks' part of what dt_proj's adapter adds to dt: every warp makes dt_low A^T for itself. */
__device__ __forceinline__ float adapt_dt(int layer, int channel, const float *low,
                                          const struct channel_scan<CHUNKS> &in) const
{
    const int part = lane % LANES;
    float4 a[2 * CHUNKS];
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; i++)
        a[i] = in.dt_a[i];
    float dt = 0.0f;
#pragma unroll 1
    for (int first = 0; first < tiles_of(STEP_DT) * TILE; first += TILE) {
        if (first > 0)
            load_dt_a(layer, first, a);
        float u = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * CHUNKS; i++) {
            const int k = (part + i * LANES) * 4;
            if (k < p.rank) {
                const float4 v = *reinterpret_cast<const float4 *>(low + k);
                u += a[i].x * v.x + a[i].y * v.y + a[i].z * v.z + a[i].w * v.w;
            }
        }
        u += __shfl_xor_sync(0xffffffffu, u, 1);
        u += __shfl_xor_sync(0xffffffffu, u, 2);
#pragma unroll
        for (int e = 0; e < LANE_RANKS; e++) {
            const int j = part * LANE_RANKS + e;
            const float one = __shfl_sync(0xffffffffu, u, j * LANES);
            dt = fmaf(first == 0 ? in.dt_b[e] : dt_b_of(layer, channel, first + j), one, dt);
        }
    }
    return p.lora_scale * dt;
}

/* dt, the state's step and y of the block's channels. */
__device__ __forceinline__ void scan(int layer, uint32_t tag)
{
    const int i = (int)threadIdx.x / LANES, part = lane % LANES, channel = own.in.begin * CHANNELS + i;
    const bool live = i < own.in.count * CHANNELS;
    struct channel_scan<CHUNKS> in = load_scan(layer);
    mail_gather<1>(p.x_dbl, p.rank + 2 * STEP_STATE + (has(STEP_X) ? tiles_of(STEP_X) * TILE : 0),
                   shared_at(p.room.x_dbl), tag);
    math_sync();
    if (has(STEP_X))
        adapt_x_dbl(layer, in.x_b);
    if ((int)threadIdx.x / WARP * WARP >= own.in.count * CHANNELS * LANES)
        return;
    const float *low = floats_at(p.room.x_dbl);
    const float4 b = *reinterpret_cast<const float4 *>(low + p.rank + part * LANE_STATES),
                 c = *reinterpret_cast<const float4 *>(low + p.rank + STEP_STATE + part * LANE_STATES);
    const float xc = floats_at(p.room.own_x)[live ? i : 0], z = floats_at(p.room.own_z)[live ? i : 0];
    float dt = 0.0f;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
        if ((part + j * LANES) * 8 < p.rank)
            dt += dot_8(in.weight[j], low + (part + j * LANES) * 8);
    if (has(STEP_DT))
        dt += adapt_dt(layer, live ? channel : 0, low, in);
    dt += __shfl_xor_sync(0xffffffffu, dt, 1);
    dt += __shfl_xor_sync(0xffffffffu, dt, 2);
    dt = softplus(dt + in.bias);
    float y = 0.0f;
#pragma unroll
    for (int s = 0; s < LANE_STATES; s++) {
        in.h[s] = fmaf(exp2_fast(dt * LOG2_E * in.rate[s]), in.h[s],
                       dt * reinterpret_cast<const float *>(&b)[s] * xc);
        y = fmaf(reinterpret_cast<const float *>(&c)[s], in.h[s], y);
    }
    y += __shfl_xor_sync(0xffffffffu, y, 1);
    y += __shfl_xor_sync(0xffffffffu, y, 2);
    y = fmaf(in.skip, xc, y) * silu(z);
    const uint32_t pair = round_pair(y, __shfl_down_sync(0xffffffffu, y, LANES));
    if (live && lane % (2 * LANES) == 0)
        mail_send(p.y + word_at(channel / 2), pair, tag);
    if (has(STEP_OUT)) {
        if (live && part == 0)
            floats_at(p.room.own_y)[i] = y;
        numbered_arrive(BARRIER_Y, (own.scan_warps() + 1 + (own.out.count > 0)) * WARP);
    }
    if (live) {
        float *state = state_of(layer, STEP_CONV - 1 + part * LANE_STATES, channel);
#pragma unroll
        for (int s = 0; s < LANE_STATES; s++)
            state[s * S::INNER] = in.h[s];
    }
}

/* r of the block's outputs, and h of the layer behind, by the first warp. */
__device__ __forceinline__ void out_proj(int layer, uint32_t tag)
{
    const struct mamba_step_layer &l = p.layer[layer];
    const int outputs = own.out.count * TILE, out = own.out.begin * TILE + lane;
    const bool live = lane < outputs;
    const float norm = live ? (layer + 1 < p.layers ? p.layer[layer + 1].norm : p.norm_f)[out] : 0.0f;
    const float bias = live && l.out_bias != NULL ? l.out_bias[out] : 0.0f;
    struct ranks b = {};
    if (has(STEP_OUT) && warp == 0 && live)
        b = load_row(lora(layer).b[STEP_OUT], out, 0);
    mail_gather<(S::INNER / 4 + MATH_THREADS - 1) / MATH_THREADS>(p.y, S::INNER / 2, shared_at(p.room.x),
                                                                  tag);
    math_sync();
    multiply<false, 2 * STAGES>(own.out.count);
    if (has(STEP_OUT))
        numbered_wait(BARRIER_OUT, MATH_THREADS + WARP);
    else
        math_sync();
    if (warp > 0)
        return;
    if (live) {
        own_r += total(0, lane) + bias;
        if (has(STEP_OUT))
            own_r += low_rank(layer, STEP_OUT, USE_OUT, out, b);
    }
    const float h = own_r * norm;
    const uint32_t pair = round_pair(h, __shfl_down_sync(0xffffffffu, h, 1));
    if (live && lane % 2 == 0)
        mail_send(p.h + word_at(out / 2), pair, tag + 1);
    if (has(STEP_IN) && layer + 1 < p.layers) {
        if (live)
            floats_at(p.room.own_h)[lane] = h;
        numbered_arrive(BARRIER_H, 2 * WARP);
    }
    const float squares = warp_sum(live ? own_r * own_r : 0.0f);
    if (lane == 0)
        mail_send(p.squares + own.template sender<S::D>(), __float_as_uint(squares), tag + 1);
}

__device__ __forceinline__ void head()
{
    const struct share share = share_first((p.vocab + TILE - 1) / TILE, (int)blockIdx.x, (int)gridDim.x);
    const int out = own.out.begin * TILE + lane;
    numbered_wait(BARRIER_IN, MATH_THREADS + WARP);
    if (warp == 0 && lane < own.out.count * TILE)
        p.hidden[out] = from_float<step_type>(own_r * row_scale * p.norm_f[out]);
#pragma unroll 1
    for (int first = 0; first < share.count; first += HEAD_TILES) {
        const int count = min((int)HEAD_TILES, share.count - first),
                  token = (share.begin + first) * TILE + (int)threadIdx.x;
        multiply<false, STAGES>(count);
        math_sync();
        if ((int)threadIdx.x < count * TILE && token < p.vocab)
            p.logits[token] = total(0, (int)threadIdx.x) * row_scale;
        math_sync();
    }
}

__device__ __forceinline__ void run()
{
#pragma unroll 1
    for (int layer = 0;; layer++) {
        const uint32_t tag = p.tag + (uint32_t)layer;
        const struct channel_in in = load_in(min(layer, p.layers - 1));
        if (threadIdx.x == 0)
            *(volatile int *)&layers_begun = layer + 1;
        if (layer == 0)
            embed();
        else
            receive_h(tag);
        if (layer == p.layers)
            break;
        in_proj(layer, tag, in);
        if (own.x >= 0)
            x_proj(tag);
        scan(layer, tag);
        if (own.out.count > 0)
            out_proj(layer, tag);
    }
    head();
}
}
;

#endif

template <int KB, int STAGES, enum adapted ADAPTED>
static __global__ void __launch_bounds__(THREADS, 1) one_kernel(const __grid_constant__ struct step_one p)
{
#if CUDA_HOPPER
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.ring; i++) {
            barrier_init(&ring_full[i], 1);
            barrier_init(&ring_empty[i], MATH_WARPS);
        }
        barrier_inits_done();
        layers_begun = 0;
    }
    __syncthreads();
    const uint32_t full = shared_address(ring_full), empty = shared_address(ring_empty);
    if (warp < MATH_WARPS) {
        registers_more<MATH_REGISTERS>();
        struct math<KB, STAGES, ADAPTED> math = {
            p, {0, 0, 0}, full, empty, block_of<KB, STAGES>(p), warp, lane, 0.0f
        };
        math.run();
    } else {
        registers_fewer<OTHER_REGISTERS>();
        if (warp == COPY_WARP) {
            struct copier<KB, STAGES> copier = {
                p, full, empty, {0, 0, 0}, 0, 0
            };
            copier.run();
        } else if (warp == TOUCH_WARP) {
            const struct toucher<KB, STAGES> toucher = {
                p, block_of<KB, STAGES>(p), lane
            };
            toucher.run();
        } else {
            const struct summer<KB, STAGES, ADAPTED != PLAIN> summer = {
                p, block_of<KB, STAGES>(p), lane
            };
            if (warp == SEND_WARP)
                summer.run_sender();
            else if (ADAPTED != PLAIN)
                summer.run();
        }
    }
#endif
}

/* ---- launch ---- */

template <int KB, int STAGES, enum adapted ADAPTED>
static int launch_adapted(struct kernel_device *device, struct step_one *p)
{
    using S = shape<KB, STAGES>;
    enum { STATIC = 2048 + S::D * 4 /* shared memory */ };
    const int blocks = min(min(device->multiprocessors, (int)STEP_ONE_BLOCKS), S::INNER / CHANNELS);
    const int in_tiles = (int)divide_up(S::INNER / CHANNELS, blocks),
              out_tiles = (int)divide_up(S::D / TILE, blocks);
    p->ring = min((int)SLOTS_MOST,
                  (device->shared_bytes - STATIC - lay_out_room(p, S::INNER, in_tiles, 0)) / S::SLOT);
    if (p->ring < GROUP || in_tiles > SUMS || in_tiles * CHANNELS * LANES > MATH_THREADS ||
        out_tiles * TILE > WARP || x_tiles_of(*p) + p->u_tiles[STEP_X] > blocks ||
        p->rank > (S::D / 16 + 31) / 32 * 32)
        return KERNEL_UNSUPPORTED;
    const int shared = lay_out_room(p, S::INNER, in_tiles, p->ring * S::SLOT);
    (void)lay_out_mail(p, S::D, S::INNER);
    int status =
        cuda_check(device, cudaFuncSetAttribute((const void *)one_kernel<KB, STAGES, ADAPTED>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    if (status != KERNEL_OK)
        return status;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = (size_t)shared;
    config.stream = device->stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cuda_check(device, cudaLaunchKernelEx(&config, one_kernel<KB, STAGES, ADAPTED>, *p));
}

template <int KB, int STAGES> static int launch(struct kernel_device *device, struct step_one *p)
{
    return p->lora_rank == 0      ? launch_adapted<KB, STAGES, PLAIN>(device, p)
           : p->lora_rank == TILE ? launch_adapted<KB, STAGES, RANK_8>(device, p)
                                  : launch_adapted<KB, STAGES, ANY_RANK>(device, p);
}

int step_launch_one(struct kernel_device *device, struct step_one *p, int64_t d_model, int64_t d_inner)
{
    if (d_inner != 2 * d_model)
        return KERNEL_UNSUPPORTED;
    switch (d_model) {
    case 256:
        return launch<1, 1>(device, p);
    case 768:
        return launch<3, 1>(device, p);
    case 1024:
        return launch<4, 1>(device, p);
    case 1536:
        return launch<3, 2>(device, p);
    case 2048:
        return launch<4, 2>(device, p);
    case 2560:
        return launch<5, 2>(device, p);
    default:
        return KERNEL_UNSUPPORTED;
    }
}
