/* step_linear.cu: the products of mamba_step: few rows, every weight read once.
 *
 * A warp has 16 outputs and up to 8 rows. Weights go from memory to registers in the layout of the tensor cores: a lane
 * loads 16 consecutive bytes of two rows and of a row of x, and that is what it multiplies. Two chunks of DEPTH x 32
 * elements of k are under way at any time, the first two before the wait for the kernel in front. The warps of a block
 * share k where there are few outputs, and so do the blocks of a cluster; their sums meet in shared memory, in a fixed
 * order, and each block of the cluster finishes its own share of the rows. */
#include "kernels/cuda/step.cuh"
#include "kernels/cuda/vector.cuh"

#include <cooperative_groups.h>

enum { WARPS = STEP_THREADS / WARP, DEPTH = 3, PAD = 4, SPLITS_MOST = 8 };

template <int MODE> struct layout {
    enum {
        WARPS_M = MODE == STEP_MODE_IN     ? 2
                  : MODE == STEP_MODE_HEAD ? 4
                                           : 1, /* side by side over the outputs */
        WARPS_K = WARPS / WARPS_M,              /* share k */
        M = 16 * WARPS_M,                       /* outputs of a block */
        STRIDE = M + PAD, /* of sums in shared memory: no two lanes that write share a bank */
        SUMS = WARPS_K * STEP_ROWS * STRIDE,
        FACTORS = M * STEP_AHEAD, /* of one adapter's B, or of A */
    };
};

/* First of `count` blocks of 32 that share i of n gets. */
static __host__ __device__ inline int share_of(int count, int i, int n)
{
    return (int)((int64_t)count * i / n);
}

static __device__ __forceinline__ float *conv_state(const struct step_linear &p, int n, int channel)
{
    return p.states + p.header->slots[n] * p.slot_stride + channel;
}

/* Four values of neighbouring channels. */
struct alignas(16) quad {
    float v[4];
};
static __device__ __forceinline__ struct quad load_quad(const float *p)
{
    return *reinterpret_cast<const struct quad *>(p);
}
static __device__ __forceinline__ void store_quad(float *p, const struct quad &q)
{
    *reinterpret_cast<struct quad *>(p) = q;
}
/* Rounded, and back: what the next product multiplies. */
static __device__ __forceinline__ struct quad store_rounded(step_type *p, const struct quad &q)
{
    struct alignas(8) {
        step_type v[4];
    } rounded;
    struct quad out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        rounded.v[i] = from_float<step_type>(q.v[i]);
        out.v[i] = to_float(rounded.v[i]);
    }
    *reinterpret_cast<uint2 *>(p) = *reinterpret_cast<uint2 *>(&rounded);
    return out;
}

/* silu(conv) of four channels of one sequence, whose state moves on. before: the state, `stride` floats apart. */
static __device__ __forceinline__ struct quad convolve(const struct step_linear &p, int n, int channel,
                                                       const struct quad &x, const float *before, int stride,
                                                       const float *weight, const float *bias)
{
    float *state = conv_state(p, n, channel);
    struct quad s[STEP_CONV - 1], y = load_quad(bias);
#pragma unroll
    for (int k = 0; k < STEP_CONV - 1; k++)
        s[k] = load_quad(before + k * stride);
    store_quad(state, s[1]);
    store_quad(state + p.inner, s[2]);
    store_quad(state + 2 * (int64_t)p.inner, x);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        struct quad w = load_quad(weight + i * STEP_CONV);
        y.v[i] =
            silu(fmaf(w.v[3], x.v[i],
                      fmaf(w.v[2], s[2].v[i], fmaf(w.v[1], s[1].v[i], fmaf(w.v[0], s[0].v[i], y.v[i])))));
    }
    return y;
}

/* The factors of one adapter that the block needs behind the product: B's rows, and A's columns of the next one. */
static __device__ __forceinline__ void copy_factors(const struct step_linear &p, int target, int next_target,
                                                    int first_row, int m, float *b, float *a)
{
    const struct step_lora &lora = p.lora[p.header->main];
    if (lora.b[target] != NULL)
        step_copy_floats(b, lora.b[target] + (int64_t)first_row * lora.rank,
                         min(m, p.m - first_row) * lora.rank, threadIdx.x, STEP_THREADS);
    const int columns = next_target == STEP_X ? p.inner : p.m, own = min(m, columns - first_row);
    if (p.next_lora == NULL || own <= 0)
        return;
    const struct step_lora &next = p.next_lora[p.header->main];
    if (next.a[next_target] != NULL)
        for (int i = threadIdx.x; i < next.rank * (own / 4); i += STEP_THREADS) {
            int j = i / (own / 4), at = i % (own / 4) * 4;
            step_copy(a + j * m + at, next.a[next_target] + (int64_t)j * columns + first_row + at);
        }
}

/* ---- sums over parts: each warp takes a row at a time ---- */

static __device__ __forceinline__ float sum_squares(const struct step_parts &squares, int n)
{
    float sum = 0.0f;
#pragma unroll 2
    for (int i = threadIdx.x % WARP; i < squares.count; i += WARP)
        sum += squares.values[(int64_t)i * STEP_ROWS + n];
    return warp_sum(sum);
}

static __device__ __forceinline__ void sum_u(const struct step_parts &u, int n, int rank, float *out)
{
    int lane = threadIdx.x % WARP, part = lane / 8;
    for (int first = 0; first < rank; first += 8) {
        int j = first + lane % 8;
        float sum = 0.0f;
        if (j < rank) {
#pragma unroll 16
            for (int i = part; i < u.count; i += 4)
                sum += u.values[((int64_t)i * STEP_ROWS + n) * STEP_RANK + j];
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 8);
        sum += __shfl_xor_sync(0xffffffffu, sum, 16);
        if (lane < 8 && j < rank)
            out[j] = sum;
    }
}

template <int MODE>
static __global__ void __launch_bounds__(STEP_THREADS, 2)
    linear_kernel(const __grid_constant__ struct step_linear p)
{
#if STEP_HOPPER
    using L = layout<MODE>;
    constexpr int TARGET = MODE == STEP_MODE_IN ? STEP_IN : MODE == STEP_MODE_X ? STEP_X : STEP_OUT;
    constexpr int NEXT_TARGET = MODE == STEP_MODE_IN ? STEP_X : STEP_IN;
    constexpr bool SCALED = MODE == STEP_MODE_IN || MODE == STEP_MODE_HEAD; /* by 1/rms */
    constexpr bool FEEDS = MODE == STEP_MODE_IN || MODE == STEP_MODE_OUT;   /* an adapter's x A^T */
    extern __shared__ __align__(16) unsigned char shared[]; /* sums; then what is loaded ahead */
    __shared__ float row_scale[STEP_ROWS], row_u[STEP_ROWS * STEP_RANK];
    float *sums = reinterpret_cast<float *>(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    const int splits = p.splits, split = splits > 1 ? (int)(blockIdx.x % splits) : 0;
    const int tile = blockIdx.x / splits, first_row = tile * L::M;

    if (p.first)
        step_wait();
    step_release();

    /* This warp's outputs and its share of k, in blocks of 32. */
    const int k_blocks = p.k / 32;
    const int block_begin = share_of(k_blocks, split, splits),
              block_end = share_of(k_blocks, split + 1, splits);
    const int warp_k = warp / L::WARPS_M;
    const int begin = block_begin + share_of(block_end - block_begin, warp_k, L::WARPS_K);
    const int end = block_begin + share_of(block_end - block_begin, warp_k + 1, L::WARPS_K);
    const int row = first_row + warp % L::WARPS_M * 16 + g;
    const step_type *upper = p.weight + (int64_t)min(row, p.m - 1) * p.k + q * 8;
    const step_type *lower = p.weight + (int64_t)min(row + 8, p.m - 1) * p.k + q * 8;
    uint4 weights[2][DEPTH][2];
    auto load_weights = [&](uint4(&w)[DEPTH][2], int first) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            bool inside = first + i < end;
            w[i][0] = inside ? step_load_weight(upper + (first + i) * 32) : make_uint4(0, 0, 0, 0);
            w[i][1] = inside ? step_load_weight(lower + (first + i) * 32) : make_uint4(0, 0, 0, 0);
        }
    };
    load_weights(weights[0], begin);
    load_weights(weights[1], begin + DEPTH);

    const int rows = min(p.header->rows, (int)STEP_ROWS);
    const int own = STEP_ROWS / splits, own_first = split * own; /* rows that this block finishes */
    float *ahead = reinterpret_cast<float *>(shared + p.ahead);
    float *ahead_weight = ahead; /* conv [M][STEP_CONV], or the norm [M] */
    float *ahead_bias = ahead + (MODE == STEP_MODE_IN ? STEP_CONV : 1) * L::M; /* of conv [M] */
    float *ahead_rows =
        ahead_bias + (MODE == STEP_MODE_IN ? L::M : 0); /* conv's state [own][3][M], or r [own][M] */
    float *factors_b = ahead_rows + own * (MODE == STEP_MODE_IN ? STEP_CONV - 1 : 1) * L::M;
    float *factors_a = factors_b + L::FACTORS;
    const int main = p.lora != NULL && p.header->rank <= STEP_AHEAD ? p.header->main : -1;
    const int outputs = min((int)L::M, p.m - first_row);
    const bool convolves = MODE == STEP_MODE_IN && first_row < p.inner;
    if (convolves) {
        const int channels = min((int)L::M, p.inner - first_row);
        step_copy_floats(ahead_weight, p.conv + (int64_t)first_row * STEP_CONV, channels * STEP_CONV,
                         threadIdx.x, STEP_THREADS);
        if (p.conv_bias != NULL)
            step_copy_floats(ahead_bias, p.conv_bias + first_row, channels, threadIdx.x, STEP_THREADS);
        else if (threadIdx.x < L::M)
            ahead_bias[threadIdx.x] = 0.0f;
        for (int i = threadIdx.x; i < min(own, rows - own_first) * (STEP_CONV - 1) * (L::M / 4);
             i += STEP_THREADS) {
            int at = i % (L::M / 4) * 4, which = i / (L::M / 4), local = which / (STEP_CONV - 1);
            if (at < channels)
                step_copy(ahead_rows + which * L::M + at, conv_state(p, own_first + local, first_row + at) +
                                                              (int64_t)(which % (STEP_CONV - 1)) * p.inner);
        }
    }
    if (MODE == STEP_MODE_OUT)
        step_copy_floats(ahead_weight, p.norm + first_row, outputs, threadIdx.x, STEP_THREADS);
    if (MODE != STEP_MODE_HEAD && main >= 0)
        copy_factors(p, TARGET, NEXT_TARGET, first_row, L::M, factors_b, factors_a);

    if (!p.first)
        step_wait();

    if (MODE == STEP_MODE_OUT)
        for (int i = threadIdx.x; i < min(own, rows - own_first) * (L::M / 4); i += STEP_THREADS) {
            int at = i % (L::M / 4) * 4, local = i / (L::M / 4);
            if (at < outputs)
                step_copy(ahead_rows + local * L::M + at,
                          p.r + (int64_t)(own_first + local) * p.m + first_row + at);
        }
    uint4 x[2][DEPTH];
    auto load_x = [&](uint4(&v)[DEPTH], int first) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            int at = (first + i) * 32 + q * 8;
            v[i] = make_uint4(0, 0, 0, 0);
            if (g < rows && first + i < end)
                v[i] = *reinterpret_cast<const uint4 *>(p.x + (int64_t)g * p.k + at);
        }
    };
    load_x(x[0], begin);
    load_x(x[1], begin + DEPTH);

    /* 1/rms and the adapters' sums of the rows that this block finishes. */
    for (int i = warp; i < own; i += WARPS) {
        int n = own_first + i;
        if (n >= rows)
            break;
        if (SCALED) {
            float sum = sum_squares(p.squares, n);
            if (lane == 0)
                row_scale[i] = rsqrtf(sum / (float)p.k + p.eps);
        }
        int adapter = p.lora != NULL ? p.header->adapters[n] : -1;
        if (MODE != STEP_MODE_HEAD && adapter >= 0 && p.lora[adapter].b[TARGET] != NULL)
            sum_u(p.u, n, p.lora[adapter].rank, row_u + i * STEP_RANK);
    }

    float acc[4] = {};
    step_copies_wait();
    for (int at = begin; at < end; at += 2 * DEPTH) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < DEPTH; i++)
                step_multiply_32(acc, weights[half][i][0], weights[half][i][1], x[half][i]);
            load_weights(weights[half], at + (half + 2) * DEPTH);
            load_x(x[half], at + (half + 2) * DEPTH);
        }
    }

    /* Sums of the block, then of the cluster. */
    float *to = sums + (warp_k * STEP_ROWS + 2 * q) * L::STRIDE + warp % L::WARPS_M * 16 + g;
    to[0] = acc[0];
    to[L::STRIDE] = acc[1];
    to[8] = acc[2];
    to[L::STRIDE + 8] = acc[3];
    cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    if (splits > 1)
        cluster.sync();
    else
        __syncthreads();

    float *finished = sums + L::SUMS, *finished_r = finished + own * L::STRIDE;
    for (int i = threadIdx.x; i < own * (L::M / 4); i += STEP_THREADS) {
        const int m = i % (L::M / 4) * 4, local = i / (L::M / 4), n = own_first + local, out = first_row + m;
        if (n >= rows)
            break;
        struct quad v = {}, fed = {}, whole = {};
#pragma unroll 4
        for (int s = 0; s < splits; s++) {
            const float *from = splits > 1 ? cluster.map_shared_rank(sums, s) : sums;
#pragma unroll
            for (int w = 0; w < L::WARPS_K; w++) {
                struct quad part = load_quad(from + (w * STEP_ROWS + n) * L::STRIDE + m);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    v.v[e] += part.v[e];
            }
        }
        const float scale = SCALED ? row_scale[local] : 1.0f;
        const int adapter = MODE != STEP_MODE_HEAD && p.lora != NULL ? p.header->adapters[n] : -1;
        const struct step_lora *lora =
            adapter >= 0 && p.lora[adapter].b[TARGET] != NULL ? &p.lora[adapter] : NULL;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            v.v[e] *= scale;
            if (MODE != STEP_MODE_HEAD && p.bias != NULL && m < outputs)
                v.v[e] += p.bias[out + e];
            if (lora != NULL && m < outputs) { /* u was made of h, which 1/rms has yet to scale */
                const float *b = adapter == main ? factors_b + (m + e) * lora->rank
                                                 : lora->b[TARGET] + (int64_t)(out + e) * lora->rank;
                v.v[e] =
                    fmaf(lora->scale * scale, step_dot(b, row_u + local * STEP_RANK, lora->rank), v.v[e]);
            }
        }
        if (m >= outputs) {
        } else if (MODE == STEP_MODE_IN && out < p.inner) {
            const float *before = ahead_rows + local * (STEP_CONV - 1) * L::M + m;
            v = convolve(p, n, out, v, before, L::M, ahead_weight + m * STEP_CONV, ahead_bias + m);
            fed = store_rounded(p.xc + (int64_t)n * p.inner + out, v);
        } else if (MODE == STEP_MODE_IN) {
            store_quad(p.z + (int64_t)n * p.inner + out - p.inner, v);
        } else if (MODE == STEP_MODE_OUT) {
            struct quad h, r = load_quad(ahead_rows + local * L::M + m), w = load_quad(ahead_weight + m);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                whole.v[e] = r.v[e] + v.v[e];
                h.v[e] = whole.v[e] * w.v[e];
            }
            store_quad(p.r + (int64_t)n * p.m + out, whole);
            fed = store_rounded(p.h + (int64_t)n * p.m + out, h);
        } else {
            float *y = p.y + (int64_t)n * p.m + out;
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (m + e < outputs)
                    y[e] = v.v[e];
        }
        if (FEEDS)
            store_quad(finished + local * L::STRIDE + m, fed);
        if (MODE == STEP_MODE_OUT)
            store_quad(finished_r + local * L::STRIDE + m, whole);
    }

    /* This block's part of the sums that the next product wants: 8 lanes a sum. */
    if (FEEDS && (MODE == STEP_MODE_OUT || (p.next_lora != NULL && first_row < p.inner))) {
        __syncthreads();
        const int most = p.next_lora != NULL ? p.header->rank + 1 : 1;
        for (int i = threadIdx.x / 8; i < own * most; i += STEP_THREADS / 8) {
            int local = i / most, j = i % most - 1, n = own_first + local;
            if (n >= rows)
                break;
            float sum = 0.0f;
            bool wanted = MODE == STEP_MODE_OUT && j < 0;
            if (wanted) {
                for (int m = threadIdx.x % 8; m < L::M; m += 8)
                    sum = fmaf(finished_r[local * L::STRIDE + m], finished_r[local * L::STRIDE + m], sum);
            } else if (j >= 0) {
                int adapter = p.header->adapters[n];
                if (adapter >= 0 && j < p.next_lora[adapter].rank &&
                    p.next_lora[adapter].a[NEXT_TARGET] != NULL) {
                    int columns = MODE == STEP_MODE_IN ? p.inner : p.m;
                    const float *a = adapter == main ? factors_a + j * L::M
                                                     : p.next_lora[adapter].a[NEXT_TARGET] +
                                                           (int64_t)j * columns + first_row;
                    wanted = true;
                    for (int m = threadIdx.x % 8; m < L::M && first_row + m < columns; m += 8)
                        sum = fmaf(finished[local * L::STRIDE + m], a[m], sum);
                }
            }
            unsigned mates = 0xffu << (lane / 8 * 8);
            for (int step = 1; step < 8; step *= 2)
                sum += __shfl_xor_sync(mates, sum, step);
            if (wanted && threadIdx.x % 8 == 0) {
                if (j < 0)
                    p.next_squares.values[(int64_t)tile * STEP_ROWS + n] = sum;
                else
                    p.next_u.values[((int64_t)tile * STEP_ROWS + n) * STEP_RANK + j] = sum;
            }
        }
    }
    if (MODE == STEP_MODE_HEAD) { /* the hidden states on the way; here splits is 1 */
        for (int n = tile; n < rows; n += p.tiles)
            for (int i = threadIdx.x; i < p.k; i += STEP_THREADS)
                p.hidden[(int64_t)n * p.k + i] =
                    from_float<step_type>(p.r[(int64_t)n * p.k + i] * row_scale[n] * p.norm[i]);
    }
    if (splits > 1)
        cluster.sync(); /* the others have read this block's sums */
#endif
}

/* ---- launch ---- */

int step_linear_tiles(enum step_mode mode, int64_t m)
{
    return (int)divide_up(m, mode == STEP_MODE_IN     ? (int)layout<STEP_MODE_IN>::M
                             : mode == STEP_MODE_HEAD ? (int)layout<STEP_MODE_HEAD>::M
                                                      : (int)layout<STEP_MODE_X>::M);
}

/* Enough blocks to fill the device, or all of k under way at once. */
static int choose_splits(const struct kernel_device *device, enum step_mode mode, int tiles, int k_blocks,
                         int warps_k)
{
    int splits = 1;
    if (mode != STEP_MODE_HEAD)
        while (splits < SPLITS_MOST && k_blocks > warps_k * splits * 2 * DEPTH &&
               tiles * splits < device->multiprocessors)
            splits *= 2;
    return splits;
}

template <int MODE> static int launch(struct kernel_device *device, struct step_linear *p)
{
    using L = layout<MODE>;
    p->tiles = step_linear_tiles((enum step_mode)MODE, p->m);
    p->splits = choose_splits(device, (enum step_mode)MODE, p->tiles, p->k / 32, L::WARPS_K);
    const size_t own = (size_t)(STEP_ROWS / p->splits),
                 sums = (L::SUMS + 2 * own * L::STRIDE) * sizeof(float);
    p->ahead = (int)sums;
    const size_t per_output = MODE == STEP_MODE_IN ? STEP_CONV + 1 : 1,
                 per_row = MODE == STEP_MODE_IN ? STEP_CONV - 1 : 1;
    const size_t ahead = (per_output + own * per_row) * L::M + (p->lora != NULL ? 2 * L::FACTORS : 0);
    const size_t shared = sums + ahead * sizeof(float);
    int status =
        cuda_check(device, cudaFuncSetAttribute((const void *)linear_kernel<MODE>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    if (status != KERNEL_OK)
        return status;
    return step_launch(device, linear_kernel<MODE>, dim3((unsigned)(p->tiles * p->splits)), STEP_THREADS,
                       shared, p->splits, true, *p);
}

int step_launch_linear(struct kernel_device *device, enum step_mode mode, struct step_linear *p)
{
    return mode == STEP_MODE_IN    ? launch<STEP_MODE_IN>(device, p)
           : mode == STEP_MODE_X   ? launch<STEP_MODE_X>(device, p)
           : mode == STEP_MODE_OUT ? launch<STEP_MODE_OUT>(device, p)
                                   : launch<STEP_MODE_HEAD>(device, p);
}
