/* step_wide_product.cuh: inside of step_wide_linear.cu and step_wide_head.cu: the ring of tiles, and the products over it. */
#ifndef KERNELS_CUDA_STEP_WIDE_PRODUCT_CUH
#define KERNELS_CUDA_STEP_WIDE_PRODUCT_CUH

#include "kernels/cuda/fragments.cuh"
#include "kernels/cuda/step_wide.cuh"
#include "kernels/cuda/vector.cuh"

enum {
    GROUP = STEP_WIDE_GROUP,
    TILE_K = 64,
    WARPGROUP = 128,
    STAGES_MOST = 12,
    SPLITS_MOST = 8,
    K_LEAST = 384,             /* of a block, where there is a choice */
    PAD = 4,                   /* floats behind a row of sums: no two lanes that write share a bank */
    CONSUMERS = 2 * WARPGROUP, /* threads that multiply and finish */
    BOX = 64 * TILE_K * 2,
    SHARED = STEP_WIDE_SHARED,
    BOX_A = SHARED * TILE_K * 2,
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

/* D[64,N] = A[64,16] B[N,16]^T (+ D) for N of 16, 32, 64; as product_64x256. */
static __device__ __forceinline__ void product(float (&d)[8], uint64_t a, uint64_t b, bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7},"
                 " %8, %9, p, 1, 1, 0, 0;\n"
                 "}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                   "+f"(d[7])
                 : "l"(a), "l"(b), "r"((int)accumulate));
}
static __device__ __forceinline__ void product(float (&d)[16], uint64_t a, uint64_t b, bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"
                 " %16, %17, p, 1, 1, 0, 0;\n"
                 "}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                   "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
                   "+f"(d[14]), "+f"(d[15])
                 : "l"(a), "l"(b), "r"((int)accumulate));
}
static __device__ __forceinline__ void product(float (&d)[32], uint64_t a, uint64_t b, bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
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

/* Warpgroups side by side over outputs; else they share k. RESIDENT: rows stay in shared memory, and the ring brings
 * weights alone. */
template <bool LARGE, int ROWS, bool RESIDENT = false, bool SHARES = false> struct layout {
    enum {
        OVER_M = LARGE ? 2 : 1,
        OVER_K = 2 / OVER_M,
        M = 64 * OVER_M,
        X = ROWS * TILE_K * 2,
        WEIGHTS = OVER_M * BOX,
        A = SHARES ? BOX_A : 0,
        STAGE = WEIGHTS + (RESIDENT ? 0 : X) + A, /* weights, then rows, then A */
        STRIDE = M + PAD,
        SUMS = ROWS * STRIDE, /* floats of a warpgroup over k */
        U_SUMS = SHARES ? ROWS * SHARED : 0,
        /* What the product for u reads behind the last rows. */
        BEYOND = SHARES ? BOX - X : 0,
        LANES = M / 4,                    /* of a row */
        ROWS_AT_ONCE = CONSUMERS / LANES, /* that the threads finish, four outputs each */
        FACTORS = M * STEP_AHEAD,         /* floats of one adapter's B, or of A */
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
    unsigned char *tiles, *x; /* x: of a layout with resident rows */
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
template <typename L, bool RESIDENT>
static __device__ __forceinline__ void fill(const struct step_wide_linear &p, const struct ring &ring,
                                            const struct share &share)
{
    const int rows = L::X / (TILE_K * 2), x_bytes = min(p.rows, rows) * TILE_K * 2;
    const int count = share.tiles * share.k_count, ahead = min(count, ring.stages);
    auto load_weights = [&](int i, int stage, int tile, int k) {
        barrier_expect(&ring.full[stage],
                       L::WEIGHTS + (RESIDENT && i >= share.k_count ? 0 : x_bytes + (int)L::A));
        tile_load(ring.tiles + stage * L::STAGE, &p.weight, (share.k_begin + k) * TILE_K,
                  share.first_row + tile * share.step, &ring.full[stage]);
    };
    auto load_x = [&](int i, int stage, int k) {
        if (!RESIDENT || i < share.k_count)
            tile_load(RESIDENT ? ring.x + k * L::X : ring.tiles + stage * L::STAGE + L::WEIGHTS, &p.x,
                      (share.k_begin + k) * TILE_K, blockIdx.y * rows, &ring.full[stage]);
        if (L::A > 0) /* which the chain writes, too */
            tile_load(ring.tiles + stage * L::STAGE + L::WEIGHTS + L::X, &p.a, (share.k_begin + k) * TILE_K,
                      0, &ring.full[stage]);
    };
    asm volatile("prefetch.tensormap [%0];" ::"l"(&p.x) : "memory");
#pragma unroll 1
    for (int i = 0; i < ahead; i++)
        load_weights(i, i, i / share.k_count, i % share.k_count);
    if (!p.first)
        step_wait();
#pragma unroll 1
    for (int i = 0; i < ahead; i++)
        load_x(i, i, i % share.k_count);
    struct place at = {0, 0};
    for (int i = ahead; i < count; i++, at.next(ring)) {
        int tile = i / share.k_count, k = i % share.k_count;
        barrier_wait(&ring.empty[at.stage], at.parity);
        load_weights(i, at.stage, tile, k);
        load_x(i, at.stage, k);
    }
}

/* This warpgroup's products over `count` blocks of k; u: of the rows with A, [64,8]. */
template <typename L, bool RESIDENT, int SUMS>
static __device__ __forceinline__ void multiply(float (&acc)[SUMS], float (&u)[4], const struct ring &ring,
                                                struct place &at, int count)
{
    const int warpgroup = threadIdx.x / WARPGROUP, lane = threadIdx.x % WARP;
    const int over_m = warpgroup % L::OVER_M, over_k = warpgroup / L::OVER_M;
    int before = -1; /* the stage whose products may still be under way */
#pragma unroll 1
    for (int i = 0; i < count; i++, at.next(ring)) {
        if (i % L::OVER_K != over_k)
            continue;
        const unsigned char *w = ring.tiles + at.stage * L::STAGE + over_m * BOX,
                            *x = RESIDENT ? ring.x + i * L::X : ring.tiles + at.stage * L::STAGE + L::WEIGHTS;
        barrier_wait(&ring.full[at.stage], at.parity);
        product_begin();
#pragma unroll
        for (int k = 0; k < TILE_K; k += 16)
            product(acc, tile_descriptor(w + 2 * k), tile_descriptor(x + 2 * k), before >= 0 || k > 0);
        if (L::A > 0)
#pragma unroll
            for (int k = 0; k < TILE_K; k += 16)
                product_64x8<step_type>(u, tile_descriptor(x + 2 * k), tile_descriptor(x + L::X + 2 * k),
                                        before >= 0 || k > 0);
        product_commit();
        product_wait<1>();
        if (before >= 0 && lane == 0)
            barrier_arrive(&ring.empty[before]);
        before = at.stage;
    }
    product_wait<0>();
    product_take(acc);
    if (L::A > 0)
        product_take(u);
    if (before >= 0) {
        if (lane == 0)
            barrier_arrive(&ring.empty[before]);
    } else {
#pragma unroll
        for (int i = 0; i < SUMS; i++)
            acc[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++)
            u[i] = 0.0f;
    }
}

#endif

/* The sum of every `step`th of `count` numbers, `stride` apart, with AT_ONCE loads under way. */
template <int AT_ONCE>
static __device__ __forceinline__ float sum_strided(const float *from, int64_t stride, int first, int count,
                                                    int step)
{
    float sum = 0.0f;
#pragma unroll 1
    for (int i = first; i < count; i += AT_ONCE * step) {
        float v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            v[j] = i + j * step < count ? from[(i + j * step) * stride] : 0.0f;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            sum += v[j];
    }
    return sum;
}

/* 1/rms of the rows that this block finishes. */
static __device__ __forceinline__ void gather_scale(const struct step_wide_linear &p, int n0, int own,
                                                    float *scale)
{
    for (int first = 0; first < own; first += CONSUMERS / 8) { /* 8 lanes a row */
        const int local = first + (int)threadIdx.x / 8;
        float sum = 0.0f;
        if (local < own)
            sum = sum_strided<4>(p.squares.values + n0 + local, p.rows, threadIdx.x % 8, p.squares.count, 8);
        sum = row_sum<8>(sum);
        if (local < own && threadIdx.x % 8 == 0)
            scale[local] = rsqrtf(sum / (float)p.k + p.eps);
    }
}

#endif
