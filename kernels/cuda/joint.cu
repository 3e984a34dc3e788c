/* joint.cu: C[m,n] (+)= A B + A2 B2 with 16-bit operands and sums in fp32, for sm_90a: what cuBLAS does not offer is the
 * second product, a linear layer's adapter, added while the first is still in registers.
 *
 * Two blocks of a cluster make 256 by 256 of C, one above the other. In each a warpgroup of 128 threads has the copy
 * engine fill a ring of tiles, 128 by 64 of A and 64 by 256 of B, and two others multiply, 64 rows each. The two
 * blocks need the same tile of B: each fetches half of it for both. A tile outside the operands is zeros, which is how
 * odd sizes and the short second product are padded. Tiles of C leave through shared memory and the copy engine, 64
 * columns after 64, the last of them while the next tile is being multiplied. Where C accumulates there is a stage less
 * and room for a whole tile, so that what C holds comes meanwhile. Blocks stay and take every (number of clusters)th tile.
 *
 * Shared memory of tiles is as TMA and wgmma want it: rows of 128 bytes whose 16-byte pieces are permuted by the row's
 * last three bits. */
#include "kernels/cuda/joint.cuh"

#include "kernels/cuda/hopper.cuh"

#include <type_traits>

namespace
{

enum {
    TILE_M = 128, /* of a block */
    TILE_N = 256,
    TILE_K = 64,
    BOX = 64, /* columns of 128 bytes */
    STAGES_MOST = 4,
    CLUSTER = 2,
    WARPGROUP = 128,
    CONSUMERS = 2,
    THREADS = WARPGROUP * (1 + CONSUMERS),
    GROUP = 4, /* rows of cluster tiles that are walked together, so that operands stay in L2 */
    A_BYTES = TILE_M * TILE_K * 2,
    B_BYTES = TILE_N * TILE_K * 2,
    STAGE_BYTES = A_BYTES + B_BYTES,
    C_BOXES = TILE_N / BOX,
    C_BOX_BYTES = 64 * BOX * 2, /* a consumer's 64 rows */
    C_SLOTS = 2,                /* boxes on their way out, of a consumer */
    SHARED_BYTES = STAGES_MOST * STAGE_BYTES + CONSUMERS * C_SLOTS * C_BOX_BYTES + 1024 + 256,
    STEP_K = 16,
    ACCUMULATORS = TILE_N / 2, /* of a thread */
};

struct sizes {
    int m, n, k, k2;
    int tiles_m, tiles_n; /* of clusters */
    bool accumulate;
};

#if CUDA_HOPPER

/* What one stage less leaves is enough for a tile of C. */
static_assert(STAGE_BYTES >= CONSUMERS * (C_BOXES - C_SLOTS) * C_BOX_BYTES, "room for all boxes");
__device__ __forceinline__ int stages_of(bool accumulate)
{
    return STAGES_MOST - accumulate;
}

/* ---- the two blocks of a cluster ---- */

/* At the same barrier of block `rank` of the cluster. What is announced is that shared memory has been read, by the
 * tensor cores: nothing was written that a fence would have to show. */
__device__ __forceinline__ void barrier_arrive_at(uint64_t *barrier, uint32_t rank)
{
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(rank)
                 : "memory");
}

/* Of one consumer's threads. */
__device__ __forceinline__ void consumer_sync(int consumer)
{
    if (consumer == 0)
        asm volatile("bar.sync 1, 128;" ::: "memory");
    else
        asm volatile("bar.sync 2, 128;" ::: "memory");
}

__device__ __forceinline__ uint32_t cluster_rank()
{
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* ---- the copy engine ---- */

/* tile_load to both blocks of the cluster. */
__device__ __forceinline__ void tile_load_shared(void *to, const CUtensorMap *map, int column, int row,
                                                 uint64_t *barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"((uint16_t)3)
        : "memory");
}

/* ---- the tensor cores ---- */

/* B in rows of 64 n, 8 k after 8 k; 64 n after 64 n a box further on. Otherwise as tile_descriptor. */
template <bool K_MAJOR> __device__ __forceinline__ uint64_t descriptor(const void *at)
{
    const uint64_t box = BOX * TILE_K * 2 / 16;
    uint64_t d = tile_descriptor(at);
    return K_MAJOR ? d : (d & ~(0xffffull << 16)) | box << 16;
}

/* d = A B, or += when `add`: 64 by 256 by 16. */
template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void multiply(float (&d)[ACCUMULATORS], uint64_t a, uint64_t b, int add)
{
#define WGMMA(TYPE)                                                                                          \
    asm volatile(                                                                                            \
        "{\n"                                                                                                \
        ".reg .pred p;\n"                                                                                    \
        "setp.ne.b32 p, %130, 0;\n"                                                                          \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"                                    \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                   \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                   \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                   \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                   \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "       \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"     \
        "}, %128, %129, p, 1, 1, 0, %131;\n"                                                                 \
        "}"                                                                                                  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),    \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),           \
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),         \
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),         \
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),         \
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),         \
          "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),         \
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),         \
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),         \
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]),         \
          "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]),         \
          "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]),         \
          "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]),         \
          "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]),         \
          "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]),   \
          "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]),  \
          "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),  \
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]),  \
          "+f"(d[127])                                                                                       \
        : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED ? 0 : 1))
    if constexpr (std::is_same<T, __half>::value)
        WGMMA("f16");
    else
        WGMMA("bf16");
#undef WGMMA
}

/* d = or += the first STEPS * 16 columns of a tile of A times as many rows of B, as one group. */
template <typename T, bool TRANSPOSED, int STEPS>
__device__ __forceinline__ void multiply_tile(float (&d)[ACCUMULATORS], const unsigned char *a,
                                              const unsigned char *b, int add)
{
    product_begin();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        multiply<T, TRANSPOSED>(d, descriptor<true>(a + k * STEP_K * 2),
                                descriptor<TRANSPOSED>(b + k * STEP_K * (TRANSPOSED ? 2 : BOX * 2)),
                                add || k > 0);
    product_commit();
}

/* ---- the tiles ---- */

struct position {
    int m, n; /* of the cluster's tile */
};

/* GROUP rows of tiles are walked column by column. */
__device__ __forceinline__ struct position position_of(const struct sizes &s, int tile)
{
    int of_group = GROUP * s.tiles_n, first = tile / of_group * GROUP, within = tile % of_group;
    int rows = min((int)GROUP, s.tiles_m - first);
    struct position p = {first + within % rows, within / rows};
    return p;
}

struct shared {
    unsigned char *tiles, *c;
    uint64_t *full, *empty; /* [STAGES_MOST] */
    uint64_t *old;          /* [CONSUMERS]: what C holds has come */
};

/* One thread: fills the ring with the operands of this block's tiles. */
template <bool TRANSPOSED>
__device__ __forceinline__ void produce(const struct sizes &s, const struct shared &shared,
                                        const CUtensorMap *a, const CUtensorMap *b, const CUtensorMap *a2,
                                        const CUtensorMap *b2)
{
    const int rank = (int)cluster_rank(), steps = (s.k + TILE_K - 1) / TILE_K,
              steps2 = (s.k2 + TILE_K - 1) / TILE_K, stages = stages_of(s.accumulate);
    struct tile_ring ring = {0, 1}; /* everything is empty at first */
    for (int tile = blockIdx.x / CLUSTER; tile < s.tiles_m * s.tiles_n; tile += gridDim.x / CLUSTER) {
        struct position at = position_of(s, tile);
        int row = (at.m * CLUSTER + rank) * TILE_M, column = at.n * TILE_N;
        for (int i = 0; i < steps + steps2; i++, ring.next(stages)) {
            const CUtensorMap *left = i < steps ? a : a2, *right = i < steps ? b : b2;
            int k = (i < steps ? i : i - steps) * TILE_K;
            uint64_t *full = &shared.full[ring.stage];
            unsigned char *to = shared.tiles + ring.stage * STAGE_BYTES;
            barrier_wait(&shared.empty[ring.stage], ring.phase);
            barrier_expect(full, STAGE_BYTES);
            tile_load(to, left, k, row, full);
            unsigned char *half = to + A_BYTES + rank * (B_BYTES / 2);
            if (TRANSPOSED) {
                tile_load_shared(half, right, k, column + rank * (TILE_N / 2), full);
            } else {
                tile_load_shared(half, right, column + rank * (TILE_N / 2), k, full);
                tile_load_shared(half + B_BYTES / 4, right, column + rank * (TILE_N / 2) + BOX, k, full);
            }
        }
    }
}

template <typename T> __device__ __forceinline__ uint32_t pair_of(float low, float high)
{
    if constexpr (std::is_same<T, __half>::value) {
        __half2 v = __floats2half2_rn(low, high);
        return *(uint32_t *)&v;
    } else {
        __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return *(uint32_t *)&v;
    }
}

/* A consumer's 64 by 256 numbers, 64 columns of them, to a box in shared memory; on top of what is there when `add`. */
template <typename T>
__device__ __forceinline__ void put_box(unsigned char *to, int warp, int lane, bool add, const float *d)
{
    int row = warp * 16 + lane % 16; /* of the 8 by 8 matrix whose row this lane addresses */
    uint32_t base = shared_address(to) + row * 128;
#pragma unroll
    for (int j = 0; j < BOX / 8; j += 2) {
        uint32_t at = base + (((j + lane / 16) ^ (row % 8)) * 16);
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] = d[4 * j + i];
        if (add) {
            uint32_t old[4];
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(old[0]), "=r"(old[1]), "=r"(old[2]), "=r"(old[3])
                         : "r"(at)
                         : "memory");
#pragma unroll
            for (int i = 0; i < 4; i++) {
                T both[2];
                memcpy(both, &old[i], sizeof(both));
                v[2 * i] += to_float(both[0]);
                v[2 * i + 1] += to_float(both[1]);
            }
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                     "r"(pair_of<T>(v[0], v[1])), "r"(pair_of<T>(v[2], v[3])), "r"(pair_of<T>(v[4], v[5])),
                     "r"(pair_of<T>(v[6], v[7]))
                     : "memory");
    }
}

template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void consume(const struct sizes &s, const struct shared &shared,
                                        const CUtensorMap *c, int consumer)
{
    const int rank = (int)cluster_rank(), steps = (s.k + TILE_K - 1) / TILE_K,
              steps2 = (s.k2 + TILE_K - 1) / TILE_K, stages = stages_of(s.accumulate);
    const int thread = threadIdx.x % WARPGROUP, warp = thread / WARP, lane = thread % WARP;
    const int slots = s.accumulate ? C_BOXES : C_SLOTS;
    unsigned char *const mine = shared.c + consumer * slots * C_BOX_BYTES;
    struct tile_ring ring = {0, 0};
    uint32_t old_phase = 0;
    for (int tile = blockIdx.x / CLUSTER; tile < s.tiles_m * s.tiles_n; tile += gridDim.x / CLUSTER) {
        float d[ACCUMULATORS];
        struct position at = position_of(s, tile);
        int row = (at.m * CLUSTER + rank) * TILE_M + consumer * 64, column = at.n * TILE_N;
        if (s.accumulate && thread == 0) {
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); /* the last tile has left */
            barrier_expect(&shared.old[consumer], C_BOXES * C_BOX_BYTES);
            for (int box = 0; box < C_BOXES; box++)
                tile_load(mine + box * C_BOX_BYTES, c, column + box * BOX, row, &shared.old[consumer]);
        }
        int before = -1; /* the stage whose products may still be under way */
        for (int i = 0; i < steps + steps2; i++, ring.next(stages)) {
            const unsigned char *a =
                shared.tiles + ring.stage * STAGE_BYTES + consumer * (A_BYTES / CONSUMERS);
            const unsigned char *b = shared.tiles + ring.stage * STAGE_BYTES + A_BYTES;
            int left = i < steps ? s.k - i * TILE_K : s.k2 - (i - steps) * TILE_K;
            barrier_wait(&shared.full[ring.stage], ring.phase);
            if (left > 3 * STEP_K)
                multiply_tile<T, TRANSPOSED, 4>(d, a, b, i > 0);
            else if (left > 2 * STEP_K)
                multiply_tile<T, TRANSPOSED, 3>(d, a, b, i > 0);
            else if (left > STEP_K)
                multiply_tile<T, TRANSPOSED, 2>(d, a, b, i > 0);
            else
                multiply_tile<T, TRANSPOSED, 1>(d, a, b, i > 0);
            product_wait<1>();
            if (before >= 0 && lane < CLUSTER)
                barrier_arrive_at(&shared.empty[before], lane);
            before = ring.stage;
        }
        product_wait<0>();
        if (lane < CLUSTER)
            barrier_arrive_at(&shared.empty[before], lane);

        if (s.accumulate) {
            barrier_wait(&shared.old[consumer], old_phase);
            old_phase ^= 1;
        }
#pragma unroll
        for (int box = 0; box < C_BOXES; box++) {
            unsigned char *to = mine + (s.accumulate ? box : box % C_SLOTS) * C_BOX_BYTES;
            if (!s.accumulate) {
                if (thread == 0) /* all but the box in front have left */
                    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(C_SLOTS - 1) : "memory");
                consumer_sync(consumer);
            }
            put_box<T>(to, warp, lane, s.accumulate, d + box * (BOX / 2));
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            consumer_sync(consumer);
            if (thread == 0) {
                if (row < s.m && column + box * BOX < s.n)
                    tile_store(c, to, column + box * BOX, row);
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
        }
    }
    if (thread == 0)
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif

template <typename T, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1)
    product_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                   const __grid_constant__ CUtensorMap a2, const __grid_constant__ CUtensorMap b2,
                   const __grid_constant__ CUtensorMap c, const struct sizes s)
{
#if CUDA_HOPPER
    extern __shared__ unsigned char memory[];
    struct shared shared;
    shared.tiles = memory + (1024 - shared_address(memory) % 1024) % 1024;
    shared.c = shared.tiles + stages_of(s.accumulate) * STAGE_BYTES;
    shared.full = (uint64_t *)(shared.tiles + STAGES_MOST * STAGE_BYTES + CONSUMERS * C_SLOTS * C_BOX_BYTES);
    shared.empty = shared.full + STAGES_MOST;
    shared.old = shared.empty + STAGES_MOST;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES_MOST; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], CLUSTER * CONSUMERS * WARPGROUP / WARP);
        }
        for (int i = 0; i < CONSUMERS; i++)
            barrier_init(&shared.old[i], 1);
        barrier_inits_done();
    }
    cluster_sync();
    chain_wait();
    if (threadIdx.x < WARPGROUP) {
        registers_fewer<40>();
        if (threadIdx.x == 0)
            produce<TRANSPOSED>(s, shared, &a, &b, &a2, &b2);
        __syncwarp();
    } else {
        registers_more<232>();
        consume<T, TRANSPOSED>(s, shared, &c, threadIdx.x / WARPGROUP - 1);
    }
    cluster_sync(); /* the other block may still arrive at this one's barriers */
#endif
}

/* ---- host ---- */

bool rows_fit(const void *p, int64_t stride)
{
    return (uintptr_t)p % 16 == 0 && stride % 8 == 0;
}

template <typename T, bool TRANSPOSED>
int launch(struct kernel_device *device, const CUtensorMap (&maps)[5], const struct sizes &s)
{
    auto kernel = product_kernel<T, TRANSPOSED>;
    int tiles = s.tiles_m * s.tiles_n, clusters = device->multiprocessors / CLUSTER;
    dim3 grid((unsigned)((tiles < clusters ? tiles : clusters) * CLUSTER));
    return cuda_launch_chained(device, kernel, grid, THREADS, SHARED_BYTES, CLUSTER, maps[0], maps[1],
                               maps[2], maps[3], maps[4], s);
}

/* Whether the clusters have nearly as much to do as each other. */
bool fills_device(const struct kernel_device *device, const struct joint_product *p)
{
    int64_t tiles = divide_up(p->m, TILE_M * CLUSTER) * divide_up(p->n, TILE_N);
    int64_t clusters = device->multiprocessors / CLUSTER;
    return tiles < clusters || tiles * 100 >= divide_up(tiles, clusters) * clusters * 85;
}

} // namespace

bool cuda_joint_can(const struct kernel_device *device, const struct joint_product *p)
{
    return device->hopper && (p->act == TYPE_BF16 || p->act == TYPE_F16) && p->m > 0 && p->n > 0 &&
           p->k > 0 && p->k2 > 0 && p->m <= INT32_MAX / 2 && rows_fit(p->a, p->a_stride) &&
           rows_fit(p->b, p->b_stride) && rows_fit(p->a2, p->a2_stride) && rows_fit(p->b2, p->b2_stride) &&
           rows_fit(p->c, p->c_stride) && fills_device(device, p);
}

int cuda_joint_product(struct kernel_device *device, const struct joint_product *p)
{
    CUtensorMap maps[5];
    int b_rows = p->transposed ? TILE_N / 2 : TILE_K;
    int status = cuda_tile_map(&maps[0], p->a, p->m, p->k, p->a_stride, TILE_M, p->act);
    if (status == KERNEL_OK)
        status = cuda_tile_map(&maps[1], p->b, p->transposed ? p->n : p->k, p->transposed ? p->k : p->n,
                               p->b_stride, b_rows, p->act);
    if (status == KERNEL_OK)
        status = cuda_tile_map(&maps[2], p->a2, p->m, p->k2, p->a2_stride, TILE_M, p->act);
    if (status == KERNEL_OK)
        status = cuda_tile_map(&maps[3], p->b2, p->transposed ? p->n : p->k2, p->transposed ? p->k2 : p->n,
                               p->b2_stride, b_rows, p->act);
    if (status == KERNEL_OK)
        status = cuda_tile_map(&maps[4], p->c, p->m, p->n, p->c_stride, 64, p->act);
    if (status != KERNEL_OK)
        return status;
    struct sizes s = {};
    s.m = (int)p->m, s.n = (int)p->n, s.k = (int)p->k, s.k2 = (int)p->k2;
    s.tiles_m = (int)divide_up(p->m, TILE_M * CLUSTER);
    s.tiles_n = (int)divide_up(p->n, TILE_N);
    s.accumulate = p->accumulate;
    if (p->act == TYPE_BF16)
        return p->transposed ? launch<__nv_bfloat16, true>(device, maps, s)
                             : launch<__nv_bfloat16, false>(device, maps, s);
    return p->transposed ? launch<__half, true>(device, maps, s) : launch<__half, false>(device, maps, s);
}
