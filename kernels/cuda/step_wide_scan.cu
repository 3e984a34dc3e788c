/* step_wide_scan.cu: what of mamba_step for many rows is no product over the whole width: the embeddings, and dt with the
 * step of the state.
 *
 * A block of the scan has STEP_SCAN_CHANNELS channels and takes its sequences 8 at a time, one to a warp; a lane has 4
 * channels of 4 of the 16 states. States travel through a ring of stages in shared memory, the first of them before the
 * wait for the kernel in front, so that they are there when the turn comes. So do
 * dt_proj's rows and A. */
#include "kernels/cuda/step_wide.cuh"
#include "kernels/cuda/vector.cuh"

enum {
    CHANNELS = STEP_SCAN_CHANNELS,
    WARPS = STEP_THREADS / WARP,
    SEQUENCES = 8, /* at a time; columns of the tensor cores */
    LANE_STATES = 4,
    LANE_CHANNELS = 4,
    DT_WARPS = WARPS / (CHANNELS / 16), /* share dt_low */
    DT_BLOCKS = 2,                      /* of 32 elements of it, a warp */
    PAD = 4,                            /* floats behind a row of x_dbl */
    W_PAD = 8,                          /* elements behind a row of weights */
};
static_assert(DT_WARPS * DT_BLOCKS * 32 == STEP_DT_RANK, "");
static_assert(WARPS == SEQUENCES, "a warp a sequence");
static_assert(STEP_STATE / LANE_STATES * (CHANNELS / LANE_CHANNELS) == WARP, "a warp's lanes");

static __device__ __forceinline__ float4 load4(const float *p)
{
    return *reinterpret_cast<const float4 *>(p);
}

/* 8 floats, rounded. */
static __device__ __forceinline__ uint4 load_rounded(const float *p)
{
    float v[8];
    *reinterpret_cast<float4 *>(&v[0]) = load4(p);
    *reinterpret_cast<float4 *>(&v[4]) = load4(p + 4);
    union {
        uint4 packed;
        __nv_bfloat162 pairs[4];
    } out;
#pragma unroll
    for (int i = 0; i < 4; i++)
        out.pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    return out.packed;
}

/* ---- embeddings ---- */

/* The shared adapter's A of all layers, rounded: share `block` of `blocks`. */
static __device__ __forceinline__ void round_factors(const struct step_wide_embed &p, int block, int blocks)
{
    const int main = p.from->main, per_layer = STEP_WIDE_SHARED * (p.d + 2 * p.inner) / 8;
#pragma unroll 4
    for (int i = block * STEP_THREADS + threadIdx.x; i < p.layers * per_layer; i += blocks * STEP_THREADS) {
        const int layer = i / per_layer, at = i % per_layer * 8; /* in the layer's factors */
        const int x = STEP_WIDE_SHARED * p.d, out = x + STEP_WIDE_SHARED * p.inner;
        const int target = at < x ? STEP_IN : at < out ? STEP_X : STEP_OUT;
        const struct step_lora &lora = p.layers_lora[layer * STEP_ADAPTERS + main];
        const int begin = at < x ? 0 : at < out ? x : out, k = at < x ? p.d : p.inner;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (lora.a[target] != NULL && (at - begin) / k < lora.rank)
            v = load_rounded(lora.a[target] + (at - begin));
        *reinterpret_cast<uint4 *>(p.factors + (int64_t)layer * per_layer * 8 + at) = v;
    }
}

static __global__ void __launch_bounds__(STEP_THREADS)
    wide_embed_kernel(const __grid_constant__ struct step_wide_embed p)
{
    extern __shared__ float h_row[]; /* [d] */
    if ((int)blockIdx.x >= p.rows) {
        round_factors(p, blockIdx.x - p.rows, gridDim.x - p.rows);
        return;
    }
    const int n = blockIdx.x, rows = p.from->rows, id = p.from->ids[n], adapter = p.from->adapters[n];
    if (threadIdx.x == 0) {
        p.header->ids[n] = id;
        p.header->slots[n] = p.from->slots[n];
        p.header->adapters[n] = adapter;
        if (n == 0) {
            p.header->rows = rows;
            p.header->rank = p.from->rank;
            p.header->main = p.from->main;
        }
    }
    if (n >= rows)
        return;
    const struct step_lora *lora = p.lora != NULL && adapter >= 0 ? &p.lora[adapter] : NULL;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < p.d; i += STEP_THREADS) {
        float v = to_float(p.table[(int64_t)id * p.d + i]);
        if (lora != NULL && lora->a[STEP_IN] != NULL) {
            float sum = 0.0f;
            for (int j = 0; j < lora->rank; j++)
                sum = fmaf(lora->b[STEP_IN][(int64_t)i * lora->rank + j],
                           lora->a[STEP_IN][(int64_t)j * p.vocab + id], sum);
            v = fmaf(lora->scale, sum, v);
        }
        p.r[(int64_t)n * p.d + i] = v;
        step_type h = from_float<step_type>(v * p.norm[i]);
        p.h[(int64_t)n * p.d + i] = h;
        h_row[i] = to_float(h);
        squares = fmaf(v, v, squares);
    }
    squares = block_sum<STEP_THREADS>(squares);
    if (threadIdx.x == 0)
        p.next_squares.values[n] = squares;
    if (p.next_lora == NULL || adapter < 0 || p.next_lora[adapter].a[STEP_IN] == NULL)
        return;
    __syncthreads();
    const struct step_lora &next = p.next_lora[adapter];
    for (int j = threadIdx.x / WARP; j < next.rank; j += WARPS) {
        float sum = 0.0f;
        for (int i = threadIdx.x % WARP; i < p.d; i += WARP)
            sum = fmaf(h_row[i], next.a[STEP_IN][(int64_t)j * p.d + i], sum);
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0)
            p.next_u.values[(int64_t)n * STEP_RANK + j] = sum;
    }
}

/* ---- scan ---- */

/* What of 8 sequences is in shared memory. */
struct stage {
    float states[SEQUENCES][STEP_STATE][CHANNELS];
    float z[SEQUENCES][CHANNELS];
    step_type xc[SEQUENCES][CHANNELS];
    float x_dbl[]; /* [SEQUENCES][width + PAD] */
};

static __host__ __device__ inline size_t stage_bytes(int width)
{
    return sizeof(struct stage) + (size_t)(SEQUENCES * (width + PAD)) * sizeof(float);
}

/* A warp's own sequence: its states. */
static __device__ __forceinline__ void copy_states(const struct step_wide_scan &p, struct stage *to, int n,
                                                   int first)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const float *from = p.states + p.header->slots[n] * p.slot_stride + first + lane % 8 * 4;
#pragma unroll
    for (int i = lane / 8; i < STEP_STATE; i += 4)
        step_copy(&to->states[warp][i][lane % 8 * 4], from + (int64_t)i * p.inner);
}

/* And what the kernels in front made. */
static __device__ __forceinline__ void copy_inputs(const struct step_wide_scan &p, struct stage *to, int n,
                                                   int first)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float *x_dbl = to->x_dbl + warp * (p.width + PAD);
    for (int i = lane * 4; i < p.width; i += WARP * 4)
        step_copy(x_dbl + i, p.x_dbl + (int64_t)n * p.width + i);
    if (lane < 8)
        step_copy(&to->z[warp][lane * 4], p.z + (int64_t)n * p.inner + first + lane * 4);
    else if (lane < 12)
        step_copy(&to->xc[warp][(lane - 8) * 8], p.xc + (int64_t)n * p.inner + first + (lane - 8) * 8);
}

static __device__ __forceinline__ void copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING> static __device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Of four values in each of four groups of lanes: the sum over the groups of the value that has this group's number. */
static __device__ __forceinline__ float sum_of_groups(const float (&v)[LANE_CHANNELS], int group)
{
    const bool upper = group & 2, odd = group & 1;
    float low = (upper ? v[2] : v[0]) + __shfl_xor_sync(0xffffffffu, upper ? v[0] : v[2], 16);
    float high = (upper ? v[3] : v[1]) + __shfl_xor_sync(0xffffffffu, upper ? v[1] : v[3], 16);
    return (odd ? high : low) + __shfl_xor_sync(0xffffffffu, odd ? low : high, 8);
}

/* This block's share of what is wanted in the second-level cache, by one thread. */
static __device__ __forceinline__ void fetch_ahead(const struct step_wide_scan &p)
{
    const int64_t blocks = (int64_t)gridDim.x * gridDim.y,
                  block = (int64_t)blockIdx.y * gridDim.x + blockIdx.x;
    const int64_t begin = p.ahead_bytes / 16 * block / blocks * 16,
                  end = p.ahead_bytes / 16 * (block + 1) / blocks * 16;
    if (end > begin)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"((const char *)p.ahead + begin),
                     "r"((int)(end - begin)));
}

/* One adapter to a lane: of dt_proj A and its channel's row of B, of out_proj its channel's column of A. Ranks are 0
 * where there is none. */
struct adapter_use {
    int rank, out_rank;
    float scale;
    const float *a, *b, *out; /* b and out: of rank j at [j * step] */
    int64_t b_step, out_step;
};

static __device__ __forceinline__ struct adapter_use use_of(const struct step_wide_scan &p, int adapter,
                                                            int channel)
{
    struct adapter_use use = {};
    if (adapter < 0)
        return use;
    const struct step_lora &lora = p.lora[adapter];
    use.rank = lora.b[STEP_DT] != NULL ? lora.rank : 0;
    use.out_rank = lora.a[STEP_OUT] != NULL ? lora.rank : 0;
    use.scale = lora.scale;
    use.a = lora.a[STEP_DT];
    use.b = lora.b[STEP_DT] + (int64_t)channel * lora.rank;
    use.b_step = 1;
    use.out = lora.a[STEP_OUT] + channel;
    use.out_step = p.inner;
    return use;
}

/* The adapter's part of dt for one channel of this lane's. */
static __device__ __forceinline__ float low_rank_dt(const struct adapter_use &use, const float *x_dbl,
                                                    int dt_rank)
{
    const int lane = threadIdx.x % WARP;
    float dt = 0.0f;
#pragma unroll 1
    for (int first = 0; first < use.rank; first += 8) { /* 8 ranks at once, 4 lanes each */
        float u = 0.0f;
        if (first + lane / 4 < use.rank) {
            const float *factor = use.a + (first + lane / 4) * dt_rank;
#pragma unroll 4
            for (int i = lane % 4 * 4; i < dt_rank; i += 16) {
                float4 low = load4(x_dbl + i), f = load4(factor + i);
                u += low.x * f.x + low.y * f.y + low.z * f.z + low.w * f.w;
            }
        }
        u += __shfl_xor_sync(0xffffffffu, u, 1);
        u += __shfl_xor_sync(0xffffffffu, u, 2);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float one = __shfl_sync(0xffffffffu, u, 4 * j);
            if (first + j < use.rank)
                dt = fmaf(one, use.b[(first + j) * use.b_step], dt);
        }
    }
    return use.scale * dt;
}

/* This lane's channel's part of the sums that out_proj wants. */
static __device__ __forceinline__ void feed_out(const struct step_wide_scan &p, const struct adapter_use &use,
                                                int n, float y)
{
#pragma unroll 1
    for (int first = 0; first < use.out_rank; first += 8) {
        float products[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            products[j] = first + j < use.out_rank ? y * use.out[(first + j) * use.out_step] : 0.0f;
        const float sum = scatter_sum<WARP>(products);
        const int j = first + scattered_index<WARP>();
        if (threadIdx.x % (WARP / 8) == 0 && j < use.out_rank)
            p.next_u.values[((int64_t)blockIdx.x * p.rows + n) * STEP_RANK + j] = sum;
    }
}

/* 4 bytes as step_copy. */
static __device__ __forceinline__ void copy_one(float *to, const float *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from)
                 : "memory");
}

static __device__ __forceinline__ uint32_t round_pair(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

/* The weights of the block's channels with what the shared adapter adds to them, B A: a warp 16 channels and every so many
 * 8 columns. a: [rank][k], b: [rank][CHANNELS]. */
static __device__ __forceinline__ void merge(step_type *weights, int stride, int k, const float *a,
                                             const float *b, int rank, float scale)
{
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
    const int channel = warp % (CHANNELS / 16) * 16 + g;
    auto b_of = [&](int j, int row) { return j < rank ? scale * b[j * CHANNELS + row] : 0.0f; };
    auto a_of = [&](int j, int column) { return j < rank ? a[j * k + column] : 0.0f; };
    const uint32_t upper = round_pair(b_of(2 * q, channel), b_of(2 * q + 1, channel)),
                   lower = round_pair(b_of(2 * q, channel + 8), b_of(2 * q + 1, channel + 8));
    for (int column = warp / (CHANNELS / 16) * 8; column < k; column += DT_WARPS * 8) {
        float c[4] = {};
        step_multiply(c, upper, lower, 0, 0, round_pair(a_of(2 * q, column + g), a_of(2 * q + 1, column + g)),
                      0);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            __nv_bfloat162 *at =
                reinterpret_cast<__nv_bfloat162 *>(weights + (channel + 8 * h) * stride + column + 2 * q);
            const float2 w = __bfloat1622float2(*at);
            *at = __floats2bfloat162_rn(w.x + c[2 * h], w.y + c[2 * h + 1]);
        }
    }
}
static_assert(STEP_WIDE_SHARED <= 8, "the first half of a product's k");

/* The ranks whose factors have room in shared memory. */
static __host__ __device__ constexpr int ahead(enum step_adapted adapted)
{
    return adapted == STEP_MIXED ? (int)STEP_AHEAD : adapted == STEP_SHARED ? (int)STEP_WIDE_SHARED : 0;
}

template <int STAGES, enum step_adapted ADAPTED>
static __global__ void __launch_bounds__(STEP_THREADS, 5)
    wide_scan_kernel(const __grid_constant__ struct step_wide_scan p)
{
#if STEP_HOPPER
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ float dts[DT_WARPS][SEQUENCES][CHANNELS + 4];
    constexpr bool MIXED = ADAPTED == STEP_MIXED;
    __shared__ int adapters[MIXED ? STEP_WIDE_ROWS : 1]; /* of this block's sequences */
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    const int first = blockIdx.x * CHANNELS;
    const int quad = lane % (CHANNELS / LANE_CHANNELS) * LANE_CHANNELS, channel = first + quad;
    const int state_group = lane / (CHANNELS / LANE_CHANNELS), state0 = state_group * LANE_STATES;
    /* The one of its channels that a lane finishes. */
    const int own = quad + state_group, single = first + own;
    step_release();

    const int rows = p.header->rows, groups = p.rows / SEQUENCES;
    const int begin = groups * (int)blockIdx.y / (int)gridDim.y,
              end = min(groups * ((int)blockIdx.y + 1) / (int)gridDim.y, (rows + SEQUENCES - 1) / SEQUENCES);
    if (begin >= end)
        return;
    const size_t bytes = stage_bytes(p.width);
    auto stage_of = [&](int i) {
        return reinterpret_cast<struct stage *>(memory + (size_t)((i - begin) % STAGES) * bytes);
    };

    /* What the chain does not write. */
#pragma unroll
    for (int i = 0; i < STAGES; i++) {
        int n = (begin + i) * SEQUENCES + warp;
        if (begin + i < end && n < rows)
            copy_states(p, stage_of(begin + i), n, first);
        copies_commit();
    }
    float *rates = reinterpret_cast<float *>(memory + STAGES * bytes); /* A [STATE][CHANNELS] */
    step_type *weights =
        reinterpret_cast<step_type *>(rates + STEP_STATE * CHANNELS); /* [CHANNELS][rank + W_PAD] */
    const int weight_stride = p.rank + W_PAD;
    for (int i = threadIdx.x; i < STEP_STATE * CHANNELS / 4; i += STEP_THREADS)
        step_copy(rates + i * 4,
                  p.a + (int64_t)(i / (CHANNELS / 4)) * p.inner + first + i % (CHANNELS / 4) * 4);
    for (int row = warp; row < CHANNELS; row += WARPS)
        for (int i = lane * 8; i < p.rank; i += WARP * 8)
            step_copy(weights + row * weight_stride + i, p.dt_proj + (int64_t)(first + row) * p.rank + i);
    /* This warp's share of dt: 16 channels, and every DT_WARPS-th block of 32 elements of dt_low. */
    const int dt_channels = warp % (CHANNELS / 16) * 16, dt_share = warp / (CHANNELS / 16);
    const step_type *weight = weights + (dt_channels + g) * weight_stride;
    /* Of one adapter: A [rank][dt_rank] and B [channels][rank] of dt_proj, A [rank][channels] of out_proj. */
    constexpr int AHEAD = ahead(ADAPTED), FEEDS = MIXED ? AHEAD : 0;
    float *dt_b = reinterpret_cast<float *>(weights + CHANNELS * weight_stride),
          *out_a = dt_b + AHEAD * CHANNELS, *dt_a = out_a + FEEDS * CHANNELS;
    const int main = ADAPTED != STEP_PLAIN && p.header->main >= 0 && p.lora[p.header->main].rank <= STEP_AHEAD
                         ? p.header->main
                         : -1;
    struct adapter_use main_use = {};
    if (ADAPTED != STEP_PLAIN) {
        if (MIXED)
            for (int i = threadIdx.x; i < (end - begin) * SEQUENCES; i += STEP_THREADS)
                adapters[i] = p.header->adapters[begin * SEQUENCES + i];
        main_use = use_of(p, main, single);
        step_copy_floats(dt_a, main_use.a, main_use.rank * p.rank, threadIdx.x, STEP_THREADS);
        for (int j = warp; j < main_use.rank; j += WARPS)
            copy_one(dt_b + j * CHANNELS + lane,
                     p.lora[main].b[STEP_DT] + (int64_t)(first + lane) * main_use.rank + j);
        for (int j = warp; MIXED && j < main_use.out_rank; j += WARPS)
            copy_one(out_a + j * CHANNELS + lane,
                     p.lora[main].a[STEP_OUT] + (int64_t)j * p.inner + first + lane);
        main_use.a = dt_a;
        main_use.b = dt_b + own;
        main_use.out = out_a + own;
        main_use.b_step = main_use.out_step = CHANNELS;
    }
    if (ADAPTED == STEP_SHARED && main_use.rank > 0) {
        copies_commit();
        copies_wait<0>();
        __syncthreads();
        merge(weights, weight_stride, p.rank, dt_a, dt_b, main_use.rank, main_use.scale);
    }
    const float bias = p.dt_bias[single], skip = p.d[single];

    step_wait();

#pragma unroll
    for (int i = 0; i < STAGES; i++) {
        int n = (begin + i) * SEQUENCES + warp;
        if (begin + i < end && n < rows)
            copy_inputs(p, stage_of(begin + i), n, first);
        copies_commit();
    }
    for (int at = begin; at < end; at++) {
        if (threadIdx.x == 0 && at == max(begin, end - STAGES)) /* all states have been asked for */
            fetch_ahead(p);
        const int n = at * SEQUENCES + warp;
        const bool live = n < rows;
        struct stage *in = stage_of(at);
        copies_wait<STAGES - 1>();
        __syncthreads();

        /* dt of the block's channels and these sequences. */
        float acc[4] = {};
        const float *low = in->x_dbl + g * (p.width + PAD);
#pragma unroll
        for (int i = 0; i < DT_BLOCKS; i++) {
            const int k = (dt_share + i * DT_WARPS) * 32 + q * 8;
            uint4 v = make_uint4(0, 0, 0, 0), upper = v, lower = v;
            if (k < p.rank) {
                upper = *reinterpret_cast<const uint4 *>(weight + k);
                lower = *reinterpret_cast<const uint4 *>(weight + 8 * weight_stride + k);
                if (at * SEQUENCES + g < rows)
                    v = load_rounded(low + k);
            }
            step_multiply_32(acc, upper, lower, v);
        }
        dts[dt_share][2 * q][dt_channels + g] = acc[0];
        dts[dt_share][2 * q + 1][dt_channels + g] = acc[1];
        dts[dt_share][2 * q][dt_channels + g + 8] = acc[2];
        dts[dt_share][2 * q + 1][dt_channels + g + 8] = acc[3];
        __syncthreads();

        if (live) {
            const float *x_dbl = in->x_dbl + warp * (p.width + PAD);
            struct adapter_use use = main_use;
            if (MIXED) { /* a warp's sequence has one adapter */
                const int adapter = adapters[(at - begin) * SEQUENCES + warp];
                if (adapter != main)
                    use = use_of(p, adapter, single);
            }
            float delta = bias;
#pragma unroll
            for (int share = 0; share < DT_WARPS; share++)
                delta += dts[share][warp][own];
            if (MIXED)
                delta += low_rank_dt(use, x_dbl, p.rank);
            delta = softplus(delta);
            float dt[LANE_CHANNELS], dtx[LANE_CHANNELS], y[LANE_CHANNELS] = {};
            union {
                uint2 raw;
                step_type v[LANE_CHANNELS];
            } x;
            x.raw = *reinterpret_cast<const uint2 *>(&in->xc[warp][quad]);
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++) {
                dt[i] = __shfl_sync(0xffffffffu, delta, lane % 8 + 8 * i);
                dtx[i] = dt[i] * to_float(x.v[i]);
                dt[i] *= LOG2_E;
            }
            float b[LANE_STATES], c[LANE_STATES];
            *reinterpret_cast<float4 *>(b) = load4(x_dbl + p.rank + state0);
            *reinterpret_cast<float4 *>(c) = load4(x_dbl + p.rank + STEP_STATE + state0);
            float *state = p.states + p.header->slots[n] * p.slot_stride + channel;
#pragma unroll
            for (int s = 0; s < LANE_STATES; s++) {
                float h[LANE_CHANNELS], rate[LANE_CHANNELS];
                *reinterpret_cast<float4 *>(rate) = load4(rates + (state0 + s) * CHANNELS + quad);
                *reinterpret_cast<float4 *>(h) = load4(&in->states[warp][state0 + s][quad]);
#pragma unroll
                for (int i = 0; i < LANE_CHANNELS; i++) {
                    h[i] = fmaf(exp2_fast(dt[i] * rate[i]), h[i], dtx[i] * b[s]);
                    y[i] = fmaf(c[s], h[i], y[i]);
                }
                *reinterpret_cast<float4 *>(state + (int64_t)(state0 + s) * p.inner) =
                    *reinterpret_cast<float4 *>(h);
            }
            const float sum = sum_of_groups(y, state_group);
            const step_type result =
                from_float<step_type>(fmaf(skip, to_float(in->xc[warp][own]), sum) * silu(in->z[warp][own]));
            p.y[(int64_t)n * p.inner + single] = result;
            if (MIXED)
                feed_out(p, use, n, to_float(result));
        }
        __syncthreads(); /* the stage has been read */
        const int next = at + STAGES, next_n = next * SEQUENCES + warp;
        if (next < end && next_n < rows) {
            copy_states(p, stage_of(next), next_n, first);
            copy_inputs(p, stage_of(next), next_n, first);
        }
        copies_commit();
    }
#endif
}

/* ---- launch ---- */

int step_wide_scan_parts(int64_t inner)
{
    return (int)(inner / CHANNELS);
}

int step_wide_launch_embed(struct kernel_device *device, const struct step_wide_embed *p)
{
    const int more = p->factors != NULL ? 2 * device->multiprocessors : 0;
    return step_launch(device, wide_embed_kernel, dim3((unsigned)(p->rows + more)), STEP_THREADS,
                       (size_t)p->d * sizeof(float), 1, false, *p);
}

template <int STAGES, enum step_adapted ADAPTED>
static int launch(struct kernel_device *device, const struct step_wide_scan *p, int splits)
{
    const size_t factors = (size_t)ahead(ADAPTED) *
                           ((ADAPTED == STEP_MIXED ? 2 : 1) * CHANNELS + (size_t)p->rank) * sizeof(float);
    const size_t weights =
        STEP_STATE * CHANNELS * sizeof(float) + CHANNELS * ((size_t)p->rank + W_PAD) * sizeof(step_type);
    const size_t shared = STAGES * stage_bytes(p->width) + weights + factors;
    auto kernel = wide_scan_kernel<STAGES, ADAPTED>;
    int status = cuda_check(
        device, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    if (status != KERNEL_OK)
        return status;
    return step_launch(device, kernel, dim3((unsigned)(p->inner / CHANNELS), (unsigned)splits), STEP_THREADS,
                       shared, 1, true, *p);
}

template <int STAGES>
static int launch_stages(struct kernel_device *device, const struct step_wide_scan *p, int splits)
{
    return p->adapted == STEP_SHARED  ? launch<STAGES, STEP_SHARED>(device, p, splits)
           : p->adapted == STEP_MIXED ? launch<STAGES, STEP_MIXED>(device, p, splits)
                                      : launch<STAGES, STEP_PLAIN>(device, p, splits);
}

/* As many blocks as fit the device at once. */
int step_wide_launch_scan(struct kernel_device *device, const struct step_wide_scan *p)
{
    const int groups = p->rows / SEQUENCES, columns = p->inner / CHANNELS;
    int splits = 1;
    while (splits < groups && splits * columns * 2 < device->multiprocessors * 5)
        splits *= 2;
    switch (divide_up(groups, splits)) {
    case 1:
        return launch_stages<1>(device, p, splits);
    case 2:
        return launch_stages<2>(device, p, splits);
    default:
        return launch_stages<3>(device, p, splits);
    }
}
