/* step_wide_linear.cu: the products of mamba_step for many rows, on the matrix units of Hopper.
 *
 * A block makes 64 or 128 outputs of 64 rows over its share of k; the blocks of a cluster share k. One warp has the copy
 * engine fill a ring of stages, 64 columns of the weights and of the rows each: the weights before the wait for the kernel
 * in front, the rows after it. A warpgroup multiplies 64 outputs by 64 rows. Then each block sends every other block of
 * its cluster the sums of the rows that that one finishes, and adds up what it gets in the order of k.
 *
 * A thread finishes 4 neighbouring outputs of a few rows; a row's outputs lie in one warp (64 outputs: half of it). */
#include "kernels/cuda/step_wide.cuh"
#include "kernels/cuda/vector.cuh"

#include <cooperative_groups.h>

enum {
    GROUP = STEP_WIDE_GROUP,
    TILE_K = 64,
    WARPGROUP = 128,
    STAGES_MOST = 8,
    SPLITS_LEAST = 3,
    SPLITS_MOST = 8,
    PAD = 4,          /* floats behind a row of sums: no two lanes that write share a bank */
    ROWS_AT_ONCE = 8, /* a block's threads finish so many, four outputs each */
    BOX = 64 * TILE_K * 2,
};

/* Four values of neighbouring outputs. */
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

static __device__ __forceinline__ float dot(const struct quad &a, const struct quad &b)
{
    return a.v[0] * b.v[0] + a.v[1] * b.v[1] + a.v[2] * b.v[2] + a.v[3] * b.v[3];
}

/* First of `count` things that share i of n gets. */
static __host__ __device__ inline int share_of(int count, int i, int n)
{
    return count * i / n;
}

#if CUDA_HOPPER

/* D[64,64] = A[64,16] B[64,16]^T (+ D), as product_64x256. */
static __device__ __forceinline__ void product_64x64(float (&d)[32], uint64_t a, uint64_t b, bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
                 " %32, %33, p, 1, 1, 0, 0;\n"
                 "}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                   "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
                   "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
                   "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
                   "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "l"(a), "l"(b), "r"((int)accumulate));
}

/* 16 bytes to the same place of another block of the cluster, which counts them at its barrier. */
static __device__ __forceinline__ void send_quad(float *to, uint64_t *barrier, int rank, const struct quad &q)
{
    asm volatile("{\n"
                 ".reg .b32 there, counter;\n"
                 "mapa.shared::cluster.u32 there, %0, %2;\n"
                 "mapa.shared::cluster.u32 counter, %1, %2;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, "
                 "[counter];\n"
                 "}" ::"r"(shared_address(to)),
                 "r"(shared_address(barrier)), "r"(rank), "f"(q.v[0]), "f"(q.v[1]), "f"(q.v[2]), "f"(q.v[3])
                 : "memory");
}

static __device__ __forceinline__ void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
static __device__ __forceinline__ void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

#endif

template <int WARPGROUPS> struct layout {
    enum {
        M = 64 * WARPGROUPS,
        THREADS = WARPGROUP * WARPGROUPS, /* that multiply and finish */
        STAGE = (WARPGROUPS + 1) * BOX,   /* weights, then rows */
        STRIDE = M + PAD,
        LANES = M / 4,            /* of a row */
        FACTORS = M * STEP_AHEAD, /* floats of one adapter's B, or of A */
    };
};

template <int LANES> static __device__ __forceinline__ float row_sum(float v)
{
#pragma unroll
    for (int lane = 1; lane < LANES; lane *= 2)
        v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

#if CUDA_HOPPER

/* Tiles in shared memory, filled and read in turn. */
struct ring {
    unsigned char *tiles;
    uint64_t *full, *empty;
    int stages;
};
struct place {
    int stage, parity;
    __device__ void next(const struct ring &ring)
    {
        if (++stage == ring.stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

static __device__ __forceinline__ void ring_open(const struct ring &ring, int readers)
{
    for (int i = 0; i < ring.stages; i++) {
        barrier_init(&ring.full[i], 1);
        barrier_init(&ring.empty[i], readers);
    }
}

/* What a block multiplies: `tiles` tiles of outputs, `step` apart, each over blocks of k. */
struct share {
    int first_row, step, tiles;
    int k_begin, k_count;
};

/* The one thread that fills the ring. */
template <int WARPGROUPS>
static __device__ __forceinline__ void fill(const struct step_wide_linear &p, const struct ring &ring,
                                            const struct share &share)
{
    using L = layout<WARPGROUPS>;
    const int bytes = WARPGROUPS * BOX + min(p.rows, (int)GROUP) * TILE_K * 2;
    const int count = share.tiles * share.k_count, ahead = min(count, ring.stages);
    auto load_weights = [&](int i, int stage) {
        int tile = i / share.k_count, k = share.k_begin + i % share.k_count;
        barrier_expect(&ring.full[stage], bytes);
        tile_load(ring.tiles + stage * L::STAGE, &p.weight, k * TILE_K, share.first_row + tile * share.step,
                  &ring.full[stage]);
    };
    auto load_x = [&](int i, int stage) {
        int k = share.k_begin + i % share.k_count;
        tile_load(ring.tiles + stage * L::STAGE + WARPGROUPS * BOX, &p.x, k * TILE_K, blockIdx.y * GROUP,
                  &ring.full[stage]);
    };
    for (int i = 0; i < ahead; i++)
        load_weights(i, i);
    if (!p.first)
        step_wait();
    for (int i = 0; i < ahead; i++)
        load_x(i, i);
    struct place at = {0, 0};
    for (int i = ahead; i < count; i++, at.next(ring)) {
        barrier_wait(&ring.empty[at.stage], at.parity);
        load_weights(i, at.stage);
        load_x(i, at.stage);
    }
}

/* 64 outputs by 64 rows over `count` blocks of k. */
template <int WARPGROUPS>
static __device__ __forceinline__ void multiply(float (&acc)[32], const struct ring &ring, struct place &at,
                                                int count)
{
    using L = layout<WARPGROUPS>;
    const int warpgroup = threadIdx.x / WARPGROUP, lane = threadIdx.x % WARP;
    int before = -1; /* the stage whose products may still be under way */
    for (int i = 0; i < count; i++, at.next(ring)) {
        const unsigned char *w = ring.tiles + at.stage * L::STAGE + warpgroup * BOX,
                            *x = ring.tiles + at.stage * L::STAGE + WARPGROUPS * BOX;
        barrier_wait(&ring.full[at.stage], at.parity);
        product_begin();
#pragma unroll
        for (int k = 0; k < TILE_K; k += 16)
            product_64x64(acc, tile_descriptor(w + 2 * k), tile_descriptor(x + 2 * k), i > 0 || k > 0);
        product_commit();
        product_wait<1>();
        if (before >= 0 && lane == 0)
            barrier_arrive(&ring.empty[before]);
        before = at.stage;
    }
    product_wait<0>();
    product_take(acc);
    if (before >= 0 && lane == 0)
        barrier_arrive(&ring.empty[before]);
    if (count == 0)
#pragma unroll
        for (int i = 0; i < 32; i++)
            acc[i] = 0.0f;
}

#endif

/* 1/rms of the rows that this block finishes, and what their adapters' A made of them. */
template <int MODE, int THREADS, int TARGET>
static __device__ __forceinline__ void gather_rows(const struct step_wide_linear &p, int n0, int own,
                                                   float *scale, float *u)
{
    if (MODE == STEP_MODE_IN) { /* 8 lanes a row */
        int local = threadIdx.x / 8;
        float sum = 0.0f;
        if (local < own)
            for (int i = threadIdx.x % 8; i < p.squares.count; i += 8)
                sum += p.squares.values[(int64_t)i * p.rows + n0 + local];
        sum = row_sum<8>(sum);
        if (local < own && threadIdx.x % 8 == 0)
            scale[local] = rsqrtf(sum / (float)p.k + p.eps);
    }
    if (p.lora == NULL)
        return;
    const int lane = threadIdx.x % WARP;
    for (int local = threadIdx.x / WARP; local < own;
         local += THREADS / WARP) { /* a warp a row, 4 lanes a sum */
        int n = n0 + local, adapter = n < p.header->rows ? p.header->adapters[n] : -1;
        if (adapter < 0 || p.lora[adapter].b[TARGET] == NULL)
            continue;
        const int rank = p.lora[adapter].rank;
        for (int first = 0; first < rank; first += 8) {
            const int j = first + lane % 8;
            float sum = 0.0f;
            if (j < rank) {
#pragma unroll 16
                for (int s = lane / 8; s < p.u.count; s += 4)
                    sum += p.u.values[((int64_t)s * p.rows + n) * STEP_RANK + j];
            }
            sum += __shfl_xor_sync(0xffffffffu, sum, 8);
            sum += __shfl_xor_sync(0xffffffffu, sum, 16);
            if (lane < 8 && j < rank)
                u[local * STEP_RANK + j] = sum;
        }
    }
}

/* What the block needs of one adapter behind the product: B's rows, and A's columns of the next one. */
template <int M, int THREADS>
static __device__ __forceinline__ void copy_factors(const struct step_lora &lora, int target,
                                                    const struct step_lora *next, int next_target,
                                                    int first_row, int m, int columns, float *b, float *a)
{
    if (lora.b[target] != NULL)
        step_copy_floats(b, lora.b[target] + (int64_t)first_row * lora.rank,
                         min(M, m - first_row) * lora.rank, threadIdx.x, THREADS);
    const int own = min(M, columns - first_row);
    if (next == NULL || own <= 0 || next->a[next_target] == NULL)
        return;
    for (int i = threadIdx.x; i < next->rank * (own / 4); i += THREADS) {
        int j = i / (own / 4), at = i % (own / 4) * 4;
        step_copy(a + j * M + at, next->a[next_target] + (int64_t)j * columns + first_row + at);
    }
}

/* QUADS: a thread finishes its four outputs of up to so many rows. */
template <int MODE, int WARPGROUPS, int QUADS>
static __global__ void __launch_bounds__(WARPGROUP *WARPGROUPS + WARP, 2)
    wide_kernel(const __grid_constant__ struct step_wide_linear p)
{
#if CUDA_HOPPER
    using L = layout<WARPGROUPS>;
    constexpr int TARGET = MODE == STEP_MODE_IN ? STEP_IN : MODE == STEP_MODE_X ? STEP_X : STEP_OUT;
    constexpr int NEXT_TARGET = MODE == STEP_MODE_IN ? STEP_X : STEP_IN;
    constexpr bool FEEDS = MODE != STEP_MODE_X; /* an adapter's x A^T */
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t full[STAGES_MOST], empty[STAGES_MOST], arrived;
    __shared__ float row_scale[QUADS * ROWS_AT_ONCE], row_u[QUADS * ROWS_AT_ONCE * STEP_RANK];
    const struct ring ring = {memory + (1024 - shared_address(memory) % 1024) % 1024, full, empty, p.stages};
    float *sums = reinterpret_cast<float *>(ring.tiles); /* [GROUP][STRIDE], when the ring has been read */
    float *parts =
        reinterpret_cast<float *>(ring.tiles + p.parts); /* [splits-1][own][STRIDE], of the others */
    const int splits = p.splits, split = (int)blockIdx.x % splits, tile = (int)blockIdx.x / splits,
              first_row = tile * L::M;

    if (p.first)
        step_wait();
    step_release();

    const int room = min(p.rows, (int)GROUP), group = blockIdx.y * GROUP;
    const int own_first = share_of(room, split, splits), own = share_of(room, split + 1, splits) - own_first;
    const int k_blocks = (p.k + TILE_K - 1) / TILE_K, begin = share_of(k_blocks, split, splits),
              count = share_of(k_blocks, split + 1, splits) - begin;
    if (threadIdx.x == L::THREADS) {
        ring_open(ring, L::THREADS / WARP);
        barrier_init(&arrived, 1);
        barrier_inits_done();
        barrier_expect(&arrived, (splits - 1) * own * L::M * (int)sizeof(float));
    }
    __syncwarp();
    cluster_arrive();
    if (threadIdx.x >= L::THREADS) {
        if (threadIdx.x == L::THREADS)
            fill<WARPGROUPS>(p, ring, {first_row, 0, 1, begin, count});
        __syncwarp();
        cluster_wait();
        return;
    }

    /* What the chain does not write. */
    const int rows = p.header->rows, m = (int)threadIdx.x % L::LANES * 4, out = first_row + m;
    const bool inside = out < p.m, convolves = MODE == STEP_MODE_IN && out < p.inner;
    struct quad weight[STEP_CONV], offset = {}, before[QUADS][STEP_CONV - 1];
    float *state[QUADS];
    if (inside && p.bias != NULL)
        offset = load_quad(p.bias + out);
    if (convolves) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            weight[i] = load_quad(p.conv + (int64_t)(out + i) * STEP_CONV);
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            int local = (int)threadIdx.x / L::LANES + i * ROWS_AT_ONCE, n = group + own_first + local;
            if (local < own && n < rows) {
                state[i] = p.states + p.header->slots[n] * p.slot_stride + out;
#pragma unroll
                for (int k = 0; k < STEP_CONV - 1; k++)
                    before[i][k] = load_quad(state[i] + k * (int64_t)p.inner);
            }
        }
    } else if (MODE == STEP_MODE_OUT && inside) {
        weight[0] = load_quad(p.norm + out);
    }
    const int columns = MODE == STEP_MODE_IN ? p.inner : p.m; /* that are fed to the next product */
    float *factors_b = reinterpret_cast<float *>(ring.tiles + p.factors), *factors_a = factors_b + L::FACTORS;
    const int main = p.lora != NULL && p.header->main >= 0 && p.lora[p.header->main].rank <= STEP_AHEAD
                         ? p.header->main
                         : -1;
    if (main >= 0)
        copy_factors<L::M, L::THREADS>(p.lora[main], TARGET, p.next_lora != NULL ? &p.next_lora[main] : NULL,
                                       NEXT_TARGET, first_row, p.m, columns, factors_b, factors_a);
    cluster_wait();

    if (!p.first)
        step_wait();
    if (MODE == STEP_MODE_OUT) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            int local = (int)threadIdx.x / L::LANES + i * ROWS_AT_ONCE, n = group + own_first + local;
            if (local < own && n < rows && inside)
                before[i][0] = load_quad(p.r + (int64_t)n * p.m + out);
        }
    }
    gather_rows<MODE, L::THREADS, TARGET>(p, group + own_first, own, row_scale, row_u);

    float acc[32];
    struct place at = {0, 0};
    multiply<WARPGROUPS>(acc, ring, at, count);
    step_copies_wait();
    numbered_wait(1, L::THREADS); /* the ring has been read */

    /* Rows of sums, then to whom they belong. */
    {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        float *to = sums + lane % 4 * 2 * L::STRIDE + warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                to[(8 * j + i % 2) * L::STRIDE + i / 2 * 8] = acc[4 * j + i];
    }
    numbered_wait(1, L::THREADS);
    for (int step = 1; step < splits; step++) {
        int to = split + step < splits ? split + step : split + step - splits;
        int first = share_of(room, to, splits), its = share_of(room, to + 1, splits) - first;
        int slot = split < to ? split : split - 1;
        for (int local = (int)threadIdx.x / L::LANES; local < its; local += ROWS_AT_ONCE)
            send_quad(parts + (slot * its + local) * L::STRIDE + m, &arrived, to,
                      load_quad(sums + (first + local) * L::STRIDE + m));
    }
    barrier_wait(&arrived, 0);

#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int local = (int)threadIdx.x / L::LANES + i * ROWS_AT_ONCE, n = group + own_first + local;
        const bool live = local < own && n < rows;
        const int adapter = p.lora != NULL && live ? p.header->adapters[n] : -1;
        struct quad v = {}, fed = {};
        float squares = 0.0f;
        if (live && inside) {
            for (int s = 0; s < splits; s++) {
                const float *from = s == split ? sums + (own_first + local) * L::STRIDE
                                               : parts + ((s < split ? s : s - 1) * own + local) * L::STRIDE;
                struct quad part = load_quad(from + m);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    v.v[e] += part.v[e];
            }
            const float scale = MODE == STEP_MODE_IN ? row_scale[local] : 1.0f;
            const struct step_lora *lora =
                adapter >= 0 && p.lora[adapter].b[TARGET] != NULL ? &p.lora[adapter] : NULL;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                v.v[e] = fmaf(v.v[e], scale, offset.v[e]);
                if (lora != NULL) { /* u was made of h, which 1/rms has yet to scale */
                    const float *factor = adapter == main ? factors_b + (m + e) * lora->rank
                                                          : lora->b[TARGET] + (int64_t)(out + e) * lora->rank;
                    v.v[e] = fmaf(lora->scale * scale,
                                  step_dot(factor, row_u + local * STEP_RANK, lora->rank), v.v[e]);
                }
            }
            if (convolves) {
                store_quad(state[i], before[i][1]);
                store_quad(state[i] + p.inner, before[i][2]);
                store_quad(state[i] + 2 * (int64_t)p.inner, v);
                struct quad y = {};
                if (p.conv_bias != NULL)
                    y = load_quad(p.conv_bias + out);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float(&w)[4] = weight[e].v;
                    y.v[e] = silu(
                        fmaf(w[3], v.v[e],
                             fmaf(w[2], before[i][2].v[e],
                                  fmaf(w[1], before[i][1].v[e], fmaf(w[0], before[i][0].v[e], y.v[e])))));
                }
                fed = store_rounded(p.xc + (int64_t)n * p.inner + out, y);
            } else if (MODE == STEP_MODE_IN) {
                store_quad(p.z + (int64_t)n * p.inner + out - p.inner, v);
            } else if (MODE == STEP_MODE_X) {
                store_quad(p.y + (int64_t)n * p.m + out, v);
            } else {
                struct quad h;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    v.v[e] += before[i][0].v[e];
                    h.v[e] = v.v[e] * weight[0].v[e];
                }
                store_quad(p.r + (int64_t)n * p.m + out, v);
                fed = store_rounded(p.h + (int64_t)n * p.m + out, h);
                squares = dot(v, v);
            }
        }
        const bool writes = live && m == 0;
        if (MODE == STEP_MODE_OUT) {
            squares = row_sum<L::LANES>(squares);
            if (writes)
                p.next_squares.values[(int64_t)tile * p.rows + n] = squares;
        }
        if (FEEDS && p.next_lora != NULL && (MODE == STEP_MODE_OUT || first_row < p.inner)) {
            const struct step_lora *next =
                adapter >= 0 && p.next_lora[adapter].a[NEXT_TARGET] != NULL ? &p.next_lora[adapter] : NULL;
            const int rank = next != NULL ? next->rank : 0, most = p.header->rank;
#pragma unroll 4
            for (int j = 0; j < most; j++) {
                float sum = 0.0f;
                if (j < rank && out < columns)
                    sum = dot(fed,
                              load_quad(adapter == main ? factors_a + j * L::M + m
                                                        : next->a[NEXT_TARGET] + (int64_t)j * columns + out));
                sum = row_sum<L::LANES>(sum);
                if (writes && j < rank)
                    p.next_u.values[((int64_t)tile * p.rows + n) * STEP_RANK + j] = sum;
            }
        }
    }
#endif
}

/* The head: no cluster; a block takes every gridDim.x-th tile of 128 outputs over the whole of k, the ring running on from
 * one to the next. The hidden states on the way. */
static __global__ void __launch_bounds__(WARPGROUP * 2 + WARP, 2)
    wide_head_kernel(const __grid_constant__ struct step_wide_linear p)
{
#if CUDA_HOPPER
    using L = layout<2>;
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t full[STAGES_MOST], empty[STAGES_MOST];
    __shared__ float row_scale[GROUP];
    const struct ring ring = {memory + (1024 - shared_address(memory) % 1024) % 1024, full, empty, p.stages};
    const int group = blockIdx.y * GROUP, tiles = (p.m + L::M - 1) / L::M, stride = (int)gridDim.x;
    const int own = (tiles - (int)blockIdx.x + stride - 1) / stride, count = (p.k + TILE_K - 1) / TILE_K;
    step_release();
    if (threadIdx.x == L::THREADS) {
        ring_open(ring, L::THREADS / WARP);
        barrier_inits_done();
    }
    __syncthreads();
    if (threadIdx.x >= L::THREADS) {
        if (threadIdx.x == L::THREADS)
            fill<2>(p, ring, {(int)blockIdx.x * L::M, stride * L::M, own, 0, count});
        return;
    }

    step_wait();
    const int rows = min(p.header->rows - group, (int)GROUP);
    if (rows > 0) {
        for (int local = threadIdx.x / 8; local < GROUP; local += L::THREADS / 8) { /* 8 lanes a row */
            float sum = 0.0f;
            if (local < rows)
                for (int i = threadIdx.x % 8; i < p.squares.count; i += 8)
                    sum += p.squares.values[(int64_t)i * p.rows + group + local];
            sum = row_sum<8>(sum);
            if (threadIdx.x % 8 == 0)
                row_scale[local] = rsqrtf(sum / (float)p.k + p.eps);
        }
        numbered_wait(1, L::THREADS);
        for (int local = blockIdx.x; local < rows; local += stride) {
            const int64_t n = group + local;
            for (int i = threadIdx.x; i < p.k; i += L::THREADS)
                p.h[n * p.k + i] = from_float<step_type>(p.r[n * p.k + i] * row_scale[local] * p.norm[i]);
        }
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    struct place at = {0, 0};
    for (int i = 0; i < own; i++) {
        float acc[32];
        multiply<2>(acc, ring, at, count);
        const int out = ((int)blockIdx.x + i * stride) * L::M + warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int local = 8 * j + lane % 4 * 2 + e % 2, m = out + e / 2 * 8;
                if (local < rows && m < p.m)
                    p.y[(int64_t)(group + local) * p.m + m] = acc[4 * j + e] * row_scale[local];
            }
    }
#endif
}

/* ---- launch ---- */

/* 128 outputs a block where there are enough of them. */
static int warpgroups_of(enum step_mode mode, int64_t m)
{
    return mode == STEP_MODE_HEAD || (mode != STEP_MODE_X && divide_up(m, 128) * SPLITS_MOST >= 96) ? 2 : 1;
}

int step_wide_linear_outputs(enum step_mode mode, int64_t m)
{
    return 64 * warpgroups_of(mode, m);
}

int step_wide_linear_parts(enum step_mode mode, int64_t fed, int64_t m)
{
    return (int)divide_up(fed, step_wide_linear_outputs(mode, m));
}

/* As many blocks as fill the device once, or twice; of equals the fewest. */
static int choose_splits(const struct kernel_device *device, int blocks)
{
    const int slots = device->multiprocessors;
    int best = SPLITS_LEAST;
    double best_fill = 0;
    for (int splits = SPLITS_LEAST; splits <= SPLITS_MOST; splits++) {
        int all = blocks * splits;
        double fill = (double)all / (double)(divide_up(all, slots) * slots);
        if ((all <= 2 * slots || splits == SPLITS_LEAST) && fill > best_fill + 0.02) {
            best = splits;
            best_fill = fill;
        }
    }
    return best;
}

template <int MODE, int WARPGROUPS, int QUADS>
static int launch(struct kernel_device *device, struct step_wide_linear *p)
{
    using L = layout<WARPGROUPS>;
    const int k_blocks = (int)divide_up(p->k, TILE_K), most = (int)divide_up(k_blocks, p->splits);
    const int own = (int)divide_up(p->rows < GROUP ? p->rows : GROUP, p->splits);
    const size_t sums = (size_t)GROUP * L::STRIDE * sizeof(float),
                 parts = (size_t)(p->splits - 1) * (size_t)own * L::STRIDE * sizeof(float);
    const size_t factors = p->lora != NULL ? 2 * L::FACTORS * sizeof(float) : 0;
    const size_t half = (size_t)device->shared_bytes / 2 - 12288; /* two blocks to a multiprocessor */
    p->stages = (int)((half - parts - factors) / L::STAGE);
    if (p->stages > most)
        p->stages = most;
    if (p->stages > STAGES_MOST)
        p->stages = STAGES_MOST;
    if (p->stages < 1)
        p->stages = 1;
    size_t ring = (size_t)p->stages * L::STAGE;
    p->parts = (int)(ring > sums ? ring : (sums + 15) / 16 * 16);
    p->factors = p->parts + (int)parts;
    size_t shared = (size_t)p->factors + factors + 1024;
    auto kernel = wide_kernel<MODE, WARPGROUPS, QUADS>;
    int status = cuda_check(
        device, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    if (status != KERNEL_OK)
        return status;
    dim3 grid((unsigned)(divide_up(p->m, L::M) * p->splits), (unsigned)divide_up(p->rows, GROUP));
    return step_launch(device, kernel, grid, L::THREADS + WARP, shared, p->splits, true, *p);
}

template <int MODE, int WARPGROUPS>
static int launch_quads(struct kernel_device *device, struct step_wide_linear *p)
{
    int own = (int)divide_up(p->rows < GROUP ? p->rows : GROUP, p->splits);
    switch (divide_up(own, ROWS_AT_ONCE)) {
    case 1:
        return launch<MODE, WARPGROUPS, 1>(device, p);
    case 2:
        return launch<MODE, WARPGROUPS, 2>(device, p);
    default:
        return launch<MODE, WARPGROUPS, 3>(device, p);
    }
}

template <int MODE> static int launch_mode(struct kernel_device *device, struct step_wide_linear *p)
{
    int warpgroups = warpgroups_of((enum step_mode)MODE, p->m);
    p->splits = choose_splits(device, (int)(divide_up(p->m, 64 * warpgroups) * divide_up(p->rows, GROUP)));
    if constexpr (MODE != STEP_MODE_X)
        if (warpgroups == 2)
            return launch_quads<MODE, 2>(device, p);
    return launch_quads<MODE, 1>(device, p);
}

static int launch_head(struct kernel_device *device, struct step_wide_linear *p)
{
    using L = layout<2>;
    const int tiles = (int)divide_up(p->m, L::M), groups = (int)divide_up(p->rows, GROUP);
    const int most = 2 * device->multiprocessors / groups;
    p->stages = (device->shared_bytes / 2 - 4096) / L::STAGE;
    if (p->stages > STAGES_MOST)
        p->stages = STAGES_MOST;
    const size_t shared = (size_t)p->stages * L::STAGE + 1024;
    int status =
        cuda_check(device, cudaFuncSetAttribute(wide_head_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                (int)shared));
    if (status != KERNEL_OK)
        return status;
    dim3 grid((unsigned)(tiles < most ? tiles : most), (unsigned)groups);
    return step_launch(device, wide_head_kernel, grid, L::THREADS + WARP, shared, 1, true, *p);
}

int step_wide_launch_linear(struct kernel_device *device, enum step_mode mode, struct step_wide_linear *p)
{
    if (mode == STEP_MODE_HEAD)
        return launch_head(device, p);
    return mode == STEP_MODE_IN  ? launch_mode<STEP_MODE_IN>(device, p)
           : mode == STEP_MODE_X ? launch_mode<STEP_MODE_X>(device, p)
                                 : launch_mode<STEP_MODE_OUT>(device, p);
}
