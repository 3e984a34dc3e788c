/* step_scan.cu: what of mamba_step is no product over the whole width: the embeddings, and dt with the step of the state.
 *
 * A block of the scan has STEP_SCAN_CHANNELS channels of 8 sequences, one to a warp; a lane has 4 channels of 4 of the
 * 16 states. dt_proj is small enough for two of the warps to do with the tensor cores. */
#include "kernels/cuda/step.cuh"
#include "kernels/cuda/vector.cuh"

enum {
    WARPS = STEP_THREADS / WARP,
    SEQUENCES = 8, /* of a block; columns of the tensor cores */
    LANE_STATES = 4,
    LANE_CHANNELS = 4,
    DT_WARPS = WARPS / (STEP_SCAN_CHANNELS / 16), /* share dt_low */
    DT_BLOCKS = 2,                                /* of 32 elements of it, a warp */
};
static_assert(DT_WARPS * DT_BLOCKS * 32 == STEP_DT_RANK, "");
static_assert(WARPS == SEQUENCES, "a warp a sequence");
static_assert(STEP_STATE / LANE_STATES * (STEP_SCAN_CHANNELS / LANE_CHANNELS) == WARP, "a warp's lanes");

/* ---- embeddings ---- */

static __global__ void __launch_bounds__(STEP_THREADS)
    embed_kernel(const __grid_constant__ struct step_embed p)
{
    extern __shared__ float h_row[]; /* [d] */
    const int n = blockIdx.x, rows = p.from->rows, id = p.from->ids[n], adapter = p.from->adapters[n];
    if (n == 0) {
        const int32_t *from = reinterpret_cast<const int32_t *>(p.from);
        int32_t *to = reinterpret_cast<int32_t *>(p.header);
        for (int i = threadIdx.x; i < (int)(sizeof(struct step_header) / 4); i += STEP_THREADS)
            to[i] = from[i];
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

static __global__ void __launch_bounds__(STEP_THREADS, 3)
    scan_kernel(const __grid_constant__ struct step_scan p)
{
#if STEP_HOPPER
    __shared__ float dts[DT_WARPS][SEQUENCES][STEP_SCAN_CHANNELS + 4];
    /* of the main adapter: A [rank][dt_rank] and B [channels][rank] of dt_proj, A [rank][channels] of out_proj */
    __shared__ __align__(16) float dt_a[STEP_AHEAD * STEP_DT_RANK], dt_b[STEP_AHEAD * STEP_SCAN_CHANNELS],
        out_a[STEP_AHEAD * STEP_SCAN_CHANNELS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    const int first = blockIdx.x * STEP_SCAN_CHANNELS, n0 = blockIdx.y * SEQUENCES, n = n0 + warp;
    const int quad = lane % (STEP_SCAN_CHANNELS / LANE_CHANNELS) * LANE_CHANNELS, channel = first + quad;
    const int group = lane / (STEP_SCAN_CHANNELS / LANE_CHANNELS), state0 = group * LANE_STATES;
    step_release();

    const int rows = p.header->rows;
    if (n0 >= rows)
        return;
    const bool live = n < rows;

    /* What the chain does not write. */
    float h[LANE_STATES][LANE_CHANNELS], rate[LANE_STATES][LANE_CHANNELS];
    float *state = p.states + (int64_t)(live ? p.header->slots[n] : 0) * p.slot_stride;
#pragma unroll
    for (int i = 0; i < LANE_STATES; i++) {
        int64_t at = (int64_t)(state0 + i) * p.inner + channel;
        if (live) {
            *reinterpret_cast<float4 *>(h[i]) = load4(state + at);
            *reinterpret_cast<float4 *>(rate[i]) = load4(p.a + at);
        }
    }
    const int adapter = p.lora != NULL && live ? p.header->adapters[n] : -1;
    const struct step_lora *lora = adapter >= 0 ? &p.lora[adapter] : NULL;
    const bool low_rank = lora != NULL && lora->b[STEP_DT] != NULL;
    const int main = p.lora != NULL && p.header->rank <= STEP_AHEAD ? p.header->main : -1;
    if (main >= 0) {
        const struct step_lora &ahead = p.lora[main];
        if (ahead.b[STEP_DT] != NULL) {
            step_copy_floats(dt_a, ahead.a[STEP_DT], ahead.rank * p.rank, threadIdx.x, STEP_THREADS);
            step_copy_floats(dt_b, ahead.b[STEP_DT] + (int64_t)first * ahead.rank,
                             STEP_SCAN_CHANNELS * ahead.rank, threadIdx.x, STEP_THREADS);
        }
        if (ahead.a[STEP_OUT] != NULL)
            for (int i = threadIdx.x; i < ahead.rank * (STEP_SCAN_CHANNELS / 4); i += STEP_THREADS) {
                int j = i / (STEP_SCAN_CHANNELS / 4), at = i % (STEP_SCAN_CHANNELS / 4) * 4;
                step_copy(out_a + j * STEP_SCAN_CHANNELS + at,
                          ahead.a[STEP_OUT] + (int64_t)j * p.inner + first + at);
            }
    }
    uint4 weights[DT_BLOCKS][2];
    /* This warp's share of dt: 16 channels, and every DT_WARPS-th block of 32 elements of dt_low. */
    const int dt_channels = warp % (STEP_SCAN_CHANNELS / 16) * 16,
              dt_share = warp / (STEP_SCAN_CHANNELS / 16);
    const step_type *weight = p.dt_proj + (int64_t)(first + dt_channels + g) * p.rank;
#pragma unroll
    for (int i = 0; i < DT_BLOCKS; i++) {
        int at = (dt_share + i * DT_WARPS) * 32 + q * 8;
        weights[i][0] = at < p.rank ? step_load_weight(weight + at) : make_uint4(0, 0, 0, 0);
        weights[i][1] =
            at < p.rank ? step_load_weight(weight + at + 8 * (int64_t)p.rank) : make_uint4(0, 0, 0, 0);
    }
    float4 bias = load4(p.dt_bias + channel), skip = load4(p.d + channel);

    step_wait();

    const float *x_dbl = p.x_dbl + (int64_t)n * p.width;
    float4 b = {}, c = {}, z = {};
    float x[LANE_CHANNELS] = {};
    if (live) {
        b = load4(x_dbl + p.rank + state0);
        c = load4(x_dbl + p.rank + STEP_STATE + state0);
        z = load4(p.z + (int64_t)n * p.inner + channel);
        union {
            uint2 raw;
            step_type v[LANE_CHANNELS];
        } xc;
        xc.raw = *reinterpret_cast<const uint2 *>(p.xc + (int64_t)n * p.inner + channel);
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            x[i] = to_float(xc.v[i]);
    }

    /* dt of the block's channels and sequences. */
    float acc[4] = {};
#pragma unroll
    for (int i = 0; i < DT_BLOCKS; i++) {
        int at = (dt_share + i * DT_WARPS) * 32 + q * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (n0 + g < rows && at < p.rank)
            v = load_rounded(p.x_dbl + (int64_t)(n0 + g) * p.width + at);
        step_multiply_32(acc, weights[i][0], weights[i][1], v);
    }
    dts[dt_share][2 * q][dt_channels + g] = acc[0];
    dts[dt_share][2 * q + 1][dt_channels + g] = acc[1];
    dts[dt_share][2 * q][dt_channels + g + 8] = acc[2];
    dts[dt_share][2 * q + 1][dt_channels + g + 8] = acc[3];
    step_copies_wait();
    __syncthreads();
    if (!live)
        return;

    float low_dt[LANE_CHANNELS] = {};
    if (low_rank) { /* a warp's sequence has one adapter */
        const int rank = lora->rank;
        const float *factor_a = adapter == main ? dt_a : lora->a[STEP_DT];
        const float *factor_b =
            adapter == main ? dt_b + quad * rank : lora->b[STEP_DT] + (int64_t)channel * rank;
        for (int first_j = 0; first_j < rank; first_j += 8) { /* 8 ranks at once, 4 lanes each */
            float u = 0.0f;
            if (first_j + lane / 4 < rank) {
                const float *factor = factor_a + (first_j + lane / 4) * p.rank;
#pragma unroll 4
                for (int i = lane % 4 * 4; i < p.rank; i += 16) {
                    float4 low = load4(x_dbl + i), f = load4(factor + i);
                    u += low.x * f.x + low.y * f.y + low.z * f.z + low.w * f.w;
                }
            }
            u += __shfl_xor_sync(0xffffffffu, u, 1);
            u += __shfl_xor_sync(0xffffffffu, u, 2);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float one = __shfl_sync(0xffffffffu, u, 4 * j);
                if (first_j + j < rank) {
#pragma unroll
                    for (int i = 0; i < LANE_CHANNELS; i++)
                        low_dt[i] = fmaf(one, factor_b[i * rank + first_j + j], low_dt[i]);
                }
            }
        }
    }

    float y[LANE_CHANNELS];
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        float v = reinterpret_cast<const float *>(&bias)[i];
#pragma unroll
        for (int share = 0; share < DT_WARPS; share++)
            v += dts[share][warp][quad + i];
        if (low_rank)
            v = fmaf(lora->scale, low_dt[i], v);
        float dt = softplus(v), sum = 0.0f;
#pragma unroll
        for (int s = 0; s < LANE_STATES; s++) {
            h[s][i] = fmaf(exp2_fast(dt * LOG2_E * rate[s][i]), h[s][i],
                           dt * reinterpret_cast<const float *>(&b)[s] * x[i]);
            sum = fmaf(reinterpret_cast<const float *>(&c)[s], h[s][i], sum);
        }
        y[i] = sum;
    }
#pragma unroll
    for (int s = 0; s < LANE_STATES; s++)
        *reinterpret_cast<float4 *>(state + (int64_t)(state0 + s) * p.inner + channel) =
            *reinterpret_cast<float4 *>(h[s]);
    union {
        uint2 raw;
        step_type v[LANE_CHANNELS];
    } out;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        y[i] += __shfl_xor_sync(0xffffffffu, y[i], 8);
        y[i] += __shfl_xor_sync(0xffffffffu, y[i], 16);
        float gate = silu(reinterpret_cast<const float *>(&z)[i]);
        out.v[i] = from_float<step_type>(fmaf(reinterpret_cast<const float *>(&skip)[i], x[i], y[i]) * gate);
    }
    if (group == 0)
        *reinterpret_cast<uint2 *>(p.y + (int64_t)n * p.inner + channel) = out.raw;
    if (lora != NULL && lora->a[STEP_OUT] != NULL) { /* the groups share the ranks */
        for (int j = group; j < (lora->rank + 3) / 4 * 4; j += 4) {
            float sum = 0.0f;
            if (j < lora->rank) {
                float4 a = load4(adapter == main ? out_a + j * STEP_SCAN_CHANNELS + quad
                                                 : lora->a[STEP_OUT] + (int64_t)j * p.inner + channel);
                sum = to_float(out.v[0]) * a.x + to_float(out.v[1]) * a.y + to_float(out.v[2]) * a.z +
                      to_float(out.v[3]) * a.w;
            }
            for (int step = 1; step < 8; step *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, step);
            if (quad == 0 && j < lora->rank)
                p.next_u.values[((int64_t)blockIdx.x * STEP_ROWS + n) * STEP_RANK + j] = sum;
        }
    }
#endif
}

/* ---- launch ---- */

int step_launch_embed(struct kernel_device *device, const struct step_embed *p)
{
    return step_launch(device, embed_kernel, dim3(STEP_ROWS), STEP_THREADS, (size_t)p->d * sizeof(float), 1,
                       false, *p);
}

int step_launch_scan(struct kernel_device *device, const struct step_scan *p)
{
    dim3 grid((unsigned)(p->inner / STEP_SCAN_CHANNELS), STEP_ROWS / SEQUENCES);
    return step_launch(device, scan_kernel, grid, STEP_THREADS, 0, 1, true, *p);
}
