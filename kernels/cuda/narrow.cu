/* narrow.cu: narrow.cuh's products where y is narrow and x wide: x_proj's forward and dt_proj's backward; and what both ways
 * have in common. Bound by the memory of x.
 *
 * A block has 128 rows of y and walks along x: a warp has the copy engine fill a ring of stages, 64 columns of x and what
 * of W belongs to them. Two warpgroups multiply 64 rows each, with W and with `first`, which a block keeps in shared
 * memory. In the backward a third one takes the same stages the other way round for first_gradient: its part for 64
 * columns is complete with the stage and goes out.
 *
 * Where there are so few rows that many blocks would have none, the SPLITS blocks of a cluster share 128 rows: each has a
 * part of x's columns, and what they summed is added, in order, by the one that finishes those rows. */
#include "kernels/cuda/narrow.cuh"

#include "kernels/cuda/fragments.cuh"

namespace
{

enum {
    WARPGROUP = 128,
    CONSUMERS = 2, /* warpgroups */
    CONSUMER_THREADS = CONSUMERS * WARPGROUP,
    ROWS = 64 * CONSUMERS, /* of a tile */
    BOX = 64,
    X_BYTES = ROWS * BOX * 2,
    CHUNK = 64, /* columns of y; CHUNKS of them are all */
    CHUNKS_MOST = 3,
    CHUNK_BYTES = BOX * CHUNK * 2,
    STEP_K = 16,
    K_LEAST = 256,
    ROWS_LEAST = 8192, /* of tiles that one block has: with fewer, many would have none */
    SPLITS = 2,        /* blocks that share a tile; of clusters of four only 30 fit a GPU of 132 */
    SPLIT_ROWS = ROWS / SPLITS,
    SPLIT_ROWS_LEAST = 2048,
    SPLIT_K_LEAST = 2048,
    K_SHORT = 1280, /* with little to do rows do not matter */
    STAGES_MOST = 8,
    STAGES_LEAST = 3, /* which also have room for the gradients of all warps */
    BLOCKS = 132,     /* as skinny.cu's */
    RANKS = NARROW_RANKS,
    FIRST_BOX_BYTES = RANKS * BOX * 2,
    SECOND_STRIDE = 24, /* of a column of `second`: 16 ranks, and no two of eight in the same banks */
    SHARED_MOST = 227 << 10,
    ADD_ELEMENTS = 64,
    ADD_SLICES = 8,
};

struct parameters {
    int64_t rows;
    int k, n, rank, stages;
    int boxes; /* of k, of a block */
    const float *first, *second;
    float first_scale, second_scale;
    void *y;
    int64_t y_stride;
    void *middle;
    const void *middle_in;
    float *first_parts, *second_parts; /* [parts][columns][RANKS] */
};

/* ---- how the work is divided, by sizes alone ---- */

struct partition {
    int splits; /* 1 or SPLITS */
    int chunks, boxes, stages;
    int64_t blocks, first_parts, second_parts;
    int shared; /* bytes */
};

/* Parts of a tile's gradients then take no more than those of blocks with rows of their own would: see
 * cuda_narrow_workspace. */
bool splits(int64_t rows, int64_t k)
{
    return rows >= SPLIT_ROWS_LEAST && rows < ROWS_LEAST && k >= SPLIT_K_LEAST;
}

struct partition partition_of(int64_t rows, int64_t k, int64_t n, bool gradients)
{
    struct partition p = {};
    int64_t tiles = divide_up(rows, ROWS);
    p.splits = splits(rows, k) ? (int)SPLITS : 1;
    p.chunks = (int)divide_up(n, CHUNK);
    p.boxes = (int)divide_up(divide_up(k, BOX), p.splits);
    p.blocks = p.splits > 1 ? tiles * SPLITS : tiles < BLOCKS ? tiles : (int64_t)BLOCKS;
    p.first_parts = p.splits > 1 ? tiles : p.blocks;
    p.second_parts = p.splits > 1 ? tiles * (ROWS / 16) : p.blocks;
    int fixed = p.boxes * FIRST_BOX_BYTES + p.chunks * CHUNK * SECOND_STRIDE * 2 + 1024 + 256 +
                (gradients ? p.chunks * X_BYTES / p.splits : 0);
    int stage = X_BYTES + p.chunks * CHUNK_BYTES, stages = (SHARED_MOST - fixed) / stage;
    p.stages = stages < STAGES_MOST ? stages : (int)STAGES_MOST;
    p.shared = fixed + p.stages * stage;
    return p;
}

#if CUDA_HOPPER

struct shared {
    unsigned char *ring;   /* [stages]: X_BYTES, then [CHUNKS] of W */
    unsigned char *first;  /* [boxes][RANKS][BOX], swizzled */
    unsigned char *other;  /* [CHUNKS][ROWS][BOX], swizzled */
    unsigned char *second; /* [CHUNKS * CHUNK][SECOND_STRIDE] */
    uint64_t *full, *empty, *other_full, *other_empty;
};

/* What a block has: every tile_step-th tile from `tile` on, and boxes of x's columns from `box` to `end`. */
struct share {
    int64_t tile, tile_step;
    int box, end;
};

template <bool SPLIT> __device__ __forceinline__ struct share share_of(const struct parameters &p)
{
    struct share s = {blockIdx.x, gridDim.x, 0, p.boxes};
    if (SPLIT) {
        s.tile = blockIdx.x / SPLITS, s.tile_step = gridDim.x / SPLITS;
        s.box = (int)(blockIdx.x % SPLITS) * p.boxes;
        s.end = min(s.box + p.boxes, (p.k + BOX - 1) / BOX);
    }
    return s;
}

/* One thread. */
template <int CHUNKS, bool TRANSPOSED, bool SPLIT>
__device__ __forceinline__ void produce(const struct parameters &p, const struct shared &shared,
                                        const CUtensorMap *x, const CUtensorMap *weight,
                                        const CUtensorMap *other)
{
    constexpr int BYTES = X_BYTES + CHUNKS * CHUNK_BYTES;
    const struct share share = share_of<SPLIT>(p);
    struct tile_ring ring = {0, 1}; /* everything is empty at first */
    uint32_t other_phase = 1;
    for (int64_t tile = share.tile; tile * ROWS < p.rows; tile += share.tile_step) {
        const int row = (int)(tile * ROWS);
        for (int i = share.box; i < share.end; i++, ring.next(p.stages)) {
            uint64_t *full = &shared.full[ring.stage];
            unsigned char *to = shared.ring + ring.stage * BYTES;
            barrier_wait(&shared.empty[ring.stage], ring.phase);
            barrier_expect(full, BYTES);
            tile_load(to, x, i * BOX, row, full);
            if (TRANSPOSED)
                tile_load(to + X_BYTES, weight, i * BOX, 0, full);
            else
                for (int j = 0; j < CHUNKS; j++)
                    tile_load(to + X_BYTES + j * CHUNK_BYTES, weight, j * CHUNK, i * BOX, full);
        }
        if (!TRANSPOSED) {
            constexpr int OTHER_BYTES = SPLIT ? X_BYTES / SPLITS : X_BYTES;
            const int first = row + (SPLIT ? (int)(blockIdx.x % SPLITS) * SPLIT_ROWS : 0);
            barrier_wait(shared.other_empty, other_phase);
            barrier_expect(shared.other_full, CHUNKS * OTHER_BYTES);
            for (int j = 0; j < CHUNKS; j++)
                tile_load(shared.other + j * OTHER_BYTES, other, j * CHUNK, first, shared.other_full);
            other_phase ^= 1;
        }
    }
}

/* Both factors, in the type of the activations, to shared memory; by all consumers. */
template <typename T, int CHUNKS, bool TRANSPOSED>
__device__ __forceinline__ void load_factors(const struct parameters &p, const struct shared &shared,
                                             const struct share &share)
{
    const int column = share.box * BOX;
    load_first<T, TRANSPOSED, CONSUMER_THREADS>(
        shared.first, p.first + (int64_t)column * (TRANSPOSED ? 1 : p.rank), p.k,
        TRANSPOSED ? 1.0f : p.first_scale, min(p.k, share.end * BOX) - column, p.rank);
#pragma unroll
    for (int i = threadIdx.x; i < CHUNKS * CHUNK * STEP_K; i += CONSUMER_THREADS) {
        int r = TRANSPOSED ? i % STEP_K : i / (CHUNKS * CHUNK),
            n = TRANSPOSED ? i / STEP_K : i % (CHUNKS * CHUNK);
        float v = r < p.rank && n < p.n ? p.second[TRANSPOSED ? n * p.rank + r : r * p.n + n] : 0.0f;
        ((T *)shared.second)[n * SECOND_STRIDE + r] = from_float<T>(p.second_scale * v);
    }
}

/* y and middle of a warp's 16 rows, lane / 4 and 8 further down from `row` on, once their sums are complete: of COUNT times
 * eight columns, from `column` on. */
template <typename T, int COUNT>
__device__ __forceinline__ void write_rows(const struct parameters &p, const struct shared &shared,
                                           int64_t row, int column, int lane, const uint32_t (&factor)[4],
                                           const float (&d)[COUNT][4])
{
#pragma unroll
    for (int j = 0; j < COUNT; j++, column += 8) {
        const T *at = (const T *)shared.second + (column + lane / 4) * SECOND_STRIDE + lane % 4 * 2;
        float c[4] = {d[j][0], d[j][1], d[j][2], d[j][3]};
        multiply_fragment<T>(c, factor, *(const uint32_t *)at, 0);
        T *to = (T *)p.y + row * p.y_stride + column + lane % 4 * 2;
        if (column < p.n && row < p.rows)
            *(uint32_t *)to = pair_rounded<T>(c[0], c[1]);
        if (column < p.n && row + 8 < p.rows)
            *(uint32_t *)(to + 8 * p.y_stride) = pair_rounded<T>(c[2], c[3]);
    }
}

template <typename T>
__device__ __forceinline__ void write_middle(const struct parameters &p, int64_t row, int lane,
                                             const float (&middle)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int64_t to = row + i / 2 * 8;
        int r = lane % 4 * 2 + i % 2;
        if (to < p.rows && r < p.rank)
            ((T *)p.middle)[to * p.rank + r] = from_float<T>(middle[i]);
    }
}

/* This block's sums for a tile, for whoever finishes the rows: [warp][8 columns after 8][lane], then middle's; where the
 * ring was. */
template <int CHUNKS>
__device__ __forceinline__ void leave_sums(const struct shared &shared, const float (&d)[CHUNKS * 8][4],
                                           const float (&middle)[4])
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float4 *to = (float4 *)shared.ring + warp * (CHUNKS * 8 + 1) * WARP + lane;
#pragma unroll
    for (int j = 0; j < CHUNKS * 8; j++)
        to[j * WARP] = make_float4(d[j][0], d[j][1], d[j][2], d[j][3]);
    to[CHUNKS * 8 * WARP] = make_float4(middle[0], middle[1], middle[2], middle[3]);
}

/* What the blocks of the cluster left at one place, added in order. */
__device__ __forceinline__ void add_sums(const float4 *at, float (&sum)[4])
{
    float4 v[SPLITS];
#pragma unroll
    for (int i = 0; i < SPLITS; i++)
        v[i] = cluster_load(at, i);
    sum[0] = v[0].x, sum[1] = v[0].y, sum[2] = v[0].z, sum[3] = v[0].w;
#pragma unroll
    for (int i = 1; i < SPLITS; i++)
        sum[0] += v[i].x, sum[1] += v[i].y, sum[2] += v[i].z, sum[3] += v[i].w;
}

/* Two warpgroups: y, middle, and what second_gradient is made of. */
template <typename T, int CHUNKS, bool TRANSPOSED, bool SPLIT>
__device__ __forceinline__ void multiply_rows(const struct parameters &p, const struct shared &shared)
{
    constexpr bool GRADIENT = !TRANSPOSED && !SPLIT;
    constexpr int BYTES = X_BYTES + CHUNKS * CHUNK_BYTES;
    const struct share share = share_of<SPLIT>(p);
    const int group = threadIdx.x / WARPGROUP, lane = threadIdx.x % WARP;
    const int warp_rows = threadIdx.x / WARP * 16; /* where they begin in the tile */
    float gradient[GRADIENT ? CHUNKS * 4 : 1][4] = {};

    struct tile_ring ring = {0, 0};
    uint32_t other_phase = 0;
    for (int64_t tile = share.tile; tile * ROWS < p.rows; tile += share.tile_step) {
        float d[CHUNKS][32], middle[4];
        int before = -1; /* the stage whose products may still be under way */
#pragma unroll 1
        for (int i = share.box; i < share.end; i++, ring.next(p.stages)) {
            const unsigned char *x = shared.ring + ring.stage * BYTES, *weight = x + X_BYTES,
                                *first = shared.first + (i - share.box) * FIRST_BOX_BYTES;
            const bool add = i > share.box;
            x += group * (X_BYTES / CONSUMERS);
            barrier_wait(&shared.full[ring.stage], ring.phase);
            product_begin();
#pragma unroll
            for (int k = 0; k < BOX / STEP_K; k++) {
                uint64_t a = tile_descriptor(x + k * STEP_K * 2);
                product_64x8<T>(middle, a, tile_descriptor(first + k * STEP_K * 2), add || k > 0);
#pragma unroll
                for (int j = 0; j < CHUNKS; j++)
                    product_64x64<T, TRANSPOSED>(
                        d[j], a,
                        tile_descriptor(weight + j * CHUNK_BYTES +
                                        k * STEP_K * (TRANSPOSED ? 2 : TILE_ROW_BYTES)),
                        add || k > 0);
            }
            product_commit();
            product_wait<1>();
            if (before >= 0 && lane == 0)
                barrier_arrive(&shared.empty[before]);
            before = ring.stage;
        }
        product_wait<0>();
        product_take(middle);
#pragma unroll
        for (int j = 0; j < CHUNKS; j++)
            product_take(d[j]);
        if (lane == 0)
            barrier_arrive(&shared.empty[before]);
        float(&sums)[CHUNKS * 8][4] = *(float(*)[CHUNKS * 8][4]) & d;

        if constexpr (SPLIT) {
            /* Everybody of the block is done with the ring. */
            numbered_wait(1, CONSUMER_THREADS + (TRANSPOSED ? 0 : WARPGROUP));
            leave_sums<CHUNKS>(shared, sums, middle);
            return;
        }
        const int64_t row = tile * ROWS + warp_rows + lane / 4;
        const uint32_t factor[4] = {pair_rounded<T>(middle[0], middle[1]),
                                    pair_rounded<T>(middle[2], middle[3]), 0, 0};
        if (p.middle != NULL)
            write_middle<T>(p, row, lane, middle);
        write_rows<T, CHUNKS * 8>(p, shared, row, 0, lane, factor, sums);
        if constexpr (GRADIENT) {
            uint32_t low[2] = {transpose_fragment(factor[0]), transpose_fragment(factor[1])}, a[4];
            barrier_wait(shared.other_full, other_phase);
            other_phase ^= 1;
#pragma unroll
            for (int j = 0; j < CHUNKS * 4; j++) {
                load_fragment<true>(shared_address(shared.other) + j / 4 * X_BYTES +
                                        warp_rows * TILE_ROW_BYTES,
                                    lane, j % 4 * 2, a);
                multiply_fragment<T>(gradient[j], a, low[0], low[1]);
            }
            __syncwarp();
            if (lane == 0)
                barrier_arrive(shared.other_empty);
        }
    }
    if constexpr (GRADIENT) {
        /* The sums of the warps, in order; the ring is free for other use. */
        constexpr int NUMBERS = CHUNKS * 4 * 4;
        float *space = (float *)shared.ring;
        numbered_wait(1, CONSUMER_THREADS + WARPGROUP);
#pragma unroll
        for (int i = 0; i < NUMBERS; i++)
            space[(threadIdx.x / WARP * NUMBERS + i) * WARP + lane] = gradient[i / 4][i % 4];
        numbered_wait(2, CONSUMER_THREADS);
        for (int e = threadIdx.x; e < NUMBERS * WARP; e += CONSUMER_THREADS) {
            float sum = 0.0f;
            for (int w = 0; w < CONSUMER_THREADS / WARP; w++)
                sum += space[w * NUMBERS * WARP + e];
            int i = e / WARP, from = e % WARP;
            int column = i / 4 * 16 + from / 4 + i % 4 / 2 * 8;
            if (column < p.n)
                p.second_parts[((int64_t)blockIdx.x * p.n + column) * RANKS + from % 4 * 2 + i % 2] = sum;
        }
    }
}

/* Two warpgroups, once all blocks of the cluster have left their sums: the rest of this block's part of the rows. SPLITS
 * warps have 16 rows, each some of the columns. */
template <typename T, int CHUNKS, bool TRANSPOSED>
__device__ __forceinline__ void finish_rows(const struct parameters &p, const struct shared &shared)
{
    constexpr int COUNT = CHUNKS * 8 / SPLITS; /* of 8 columns, of a warp */
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = warp % SPLITS;
    const int within = warp / SPLITS * 16; /* where the warp's rows begin in the block's */
    const int warp_rows = (int)(blockIdx.x % SPLITS) * SPLIT_ROWS + within; /* and in the tile */
    const int64_t tile = blockIdx.x / SPLITS, row = tile * ROWS + warp_rows + lane / 4;
    const float4 *from = (const float4 *)shared.ring + warp_rows / 16 * (CHUNKS * 8 + 1) * WARP + lane;
    float sums[COUNT][4], middle[4];
    add_sums(from + CHUNKS * 8 * WARP, middle);
#pragma unroll
    for (int j = 0; j < COUNT; j++)
        add_sums(from + (part * COUNT + j) * WARP, sums[j]);
    const uint32_t factor[4] = {pair_rounded<T>(middle[0], middle[1]), pair_rounded<T>(middle[2], middle[3]),
                                0, 0};
    if (p.middle != NULL && part == 0)
        write_middle<T>(p, row, lane, middle);
    write_rows<T, COUNT>(p, shared, row, part * COUNT * 8, lane, factor, sums);
    if constexpr (!TRANSPOSED) {
        uint32_t low[2] = {transpose_fragment(factor[0]), transpose_fragment(factor[1])}, a[4];
        barrier_wait(shared.other_full, 0);
#pragma unroll
        for (int j = 0; j < COUNT / 2; j++) {
            const int piece = (part * COUNT / 2 + j) * 2; /* of 8 columns */
            float gradient[4] = {};
            load_fragment<true>(shared_address(shared.other) + piece / 8 * (X_BYTES / SPLITS) +
                                    within * TILE_ROW_BYTES,
                                lane, piece % 8, a);
            multiply_fragment<T>(gradient, a, low[0], low[1]);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int column = piece * 8 + half * 8 + lane / 4;
                float *to = p.second_parts + ((tile * (ROWS / 16) + warp_rows / 16) * p.n + column) * RANKS +
                            lane % 4 * 2;
                if (column < p.n)
                    *(float2 *)to = make_float2(gradient[2 * half], gradient[2 * half + 1]);
            }
        }
    }
}

/* One warpgroup: first_gradient's part of the block's columns. */
template <typename T, int CHUNKS, bool SPLIT>
__device__ __forceinline__ void multiply_columns(const struct parameters &p, const struct shared &shared)
{
    constexpr int BYTES = X_BYTES + CHUNKS * CHUNK_BYTES;
    const struct share share = share_of<SPLIT>(p);
    const int warp = threadIdx.x % WARPGROUP / WARP, lane = threadIdx.x % WARP;
    float *const part = p.first_parts + share.tile * p.k * RANKS + lane % 4 * 2;
    struct tile_ring ring = {0, 0};
    for (int64_t tile = share.tile; tile * ROWS < p.rows; tile += share.tile_step) {
        uint32_t in[ROWS / 16][2];
#pragma unroll
        for (int i = 0; i < ROWS / 16; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                T both[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    int64_t row = tile * ROWS + i * 16 + lane % 4 * 2 + 8 * half + j;
                    bool inside = row < p.rows && lane / 4 < p.rank;
                    both[j] =
                        inside ? ((const T *)p.middle_in)[row * p.rank + lane / 4] : from_float<T>(0.0f);
                }
                in[i][half] = pair_of(both[0], both[1]);
            }
        for (int i = share.box; i < share.end; i++, ring.next(p.stages)) {
            const int column = i * BOX + warp * 16 + lane / 4;
            float2 *to[2] = {(float2 *)&part[(int64_t)column * RANKS],
                             (float2 *)&part[(int64_t)(column + 8) * RANKS]};
            float2 sum[2] = {};
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (tile != share.tile && column + 8 * half < p.k)
                    sum[half] = *to[half];
            float c[4] = {};
            barrier_wait(&shared.full[ring.stage], ring.phase);
            uint32_t x = shared_address(shared.ring) + ring.stage * BYTES;
#pragma unroll
            for (int j = 0; j < ROWS / 16; j++) {
                uint32_t a[4];
                load_fragment<true>(x + j * 16 * TILE_ROW_BYTES, lane, warp * 2, a);
                multiply_fragment<T>(c, a, in[j][0], in[j][1]);
            }
            __syncwarp();
            if (lane == 0)
                barrier_arrive(&shared.empty[ring.stage]);
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (column + 8 * half < p.k)
                    *to[half] = make_float2(sum[half].x + c[2 * half], sum[half].y + c[2 * half + 1]);
        }
    }
    numbered_arrive(1, CONSUMER_THREADS + WARPGROUP);
}

#endif

template <typename T, int CHUNKS, bool TRANSPOSED, bool SPLIT>
__global__ void __launch_bounds__(CONSUMER_THREADS + (TRANSPOSED ? 0 : WARPGROUP) + WARP, 1)
    narrow_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                  const __grid_constant__ CUtensorMap other, const struct parameters p)
{
#if CUDA_HOPPER
    constexpr int PRODUCER = CONSUMER_THREADS + (TRANSPOSED ? 0 : WARPGROUP);
    extern __shared__ unsigned char memory[];
    struct shared shared;
    shared.ring = memory + (1024 - shared_address(memory) % 1024) % 1024;
    shared.first = shared.ring + p.stages * (X_BYTES + CHUNKS * CHUNK_BYTES);
    shared.other = shared.first + p.boxes * FIRST_BOX_BYTES;
    shared.second = shared.other + (TRANSPOSED ? 0 : CHUNKS * X_BYTES / (SPLIT ? SPLITS : 1));
    shared.full = (uint64_t *)(shared.second + CHUNKS * CHUNK * SECOND_STRIDE * 2);
    shared.empty = shared.full + STAGES_MOST;
    shared.other_full = shared.empty + STAGES_MOST;
    shared.other_empty = shared.other_full + 1;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], PRODUCER / WARP);
        }
        barrier_init(shared.other_full, 1);
        barrier_init(shared.other_empty, CONSUMER_THREADS / WARP);
        barrier_inits_done();
    }
    __syncthreads();
    /* No kernel that lets the next one begin before its end writes a layer's factors. */
    if (threadIdx.x < CONSUMER_THREADS)
        load_factors<T, CHUNKS, TRANSPOSED>(p, shared, share_of<SPLIT>(p));
    chain_wait();
    if (threadIdx.x < CONSUMER_THREADS) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        numbered_wait(2, CONSUMER_THREADS);
        multiply_rows<T, CHUNKS, TRANSPOSED, SPLIT>(p, shared);
    } else if (threadIdx.x < PRODUCER) {
        multiply_columns<T, CHUNKS, SPLIT>(p, shared);
    } else if (threadIdx.x % WARP == 0) {
        produce<CHUNKS, TRANSPOSED, SPLIT>(p, shared, &x, &weight, &other);
    }
    if constexpr (SPLIT) {
        __syncwarp();
        cluster_sync();
        if (threadIdx.x < CONSUMER_THREADS)
            finish_rows<T, CHUNKS, TRANSPOSED>(p, shared);
        cluster_sync(); /* others may still read what this block left */
    }
#endif
}

/* The sums of the parts of both gradients: a thread has every ADD_SLICES-th part of one number. */
__global__ void __launch_bounds__(ADD_ELEMENTS *ADD_SLICES)
    add_kernel(struct narrow_sum first, struct narrow_sum second, unsigned first_blocks, int64_t rank)
{
    __shared__ float shared[ADD_SLICES][ADD_ELEMENTS];
    chain_wait();
    const bool is_first = blockIdx.x < first_blocks;
    const struct narrow_sum s = {
        is_first ? first.parts : second.parts,       is_first ? first.n_parts : second.n_parts,
        is_first ? first.columns : second.columns,   is_first ? first.scale : second.scale,
        is_first ? first.gradient : second.gradient, is_first ? first.by_column : second.by_column};
    const int64_t block = is_first ? blockIdx.x : blockIdx.x - first_blocks;
    const int64_t element = block * ADD_ELEMENTS + threadIdx.x % ADD_ELEMENTS, count = s.columns * RANKS;
    const int slice = threadIdx.x / ADD_ELEMENTS;
    float sum = 0.0f;
    if (element < count)
#pragma unroll 8
        for (int64_t i = slice; i < s.n_parts; i += ADD_SLICES)
            sum += s.parts[i * count + element];
    shared[slice][threadIdx.x % ADD_ELEMENTS] = sum;
    __syncthreads();
    const int64_t column = element / RANKS, r = element % RANKS;
    if (slice > 0 || element >= count || r >= rank)
        return;
    for (int i = 1; i < ADD_SLICES; i++)
        sum += shared[i][threadIdx.x];
    float *to = &s.gradient[s.by_column ? column * rank + r : r * s.columns + column];
    *to = fmaf(s.scale, sum, *to);
}

/* ---- host ---- */

template <typename T, int CHUNKS>
int launch(struct kernel_device *device, const struct partition &part, const CUtensorMap (&maps)[3],
           const struct parameters &p, bool transposed)
{
    auto kernel =
        part.splits > 1
            ? (transposed ? narrow_kernel<T, CHUNKS, true, true> : narrow_kernel<T, CHUNKS, false, true>)
            : (transposed ? narrow_kernel<T, CHUNKS, true, false> : narrow_kernel<T, CHUNKS, false, false>);
    int threads = CONSUMER_THREADS + (transposed ? 0 : WARPGROUP) + WARP;
    return cuda_launch_chained(device, kernel, dim3((unsigned)part.blocks), threads, part.shared, part.splits,
                               maps[0], maps[1], maps[2], p);
}

template <typename T>
int launch_chunks(struct kernel_device *device, const struct partition &part, const CUtensorMap (&maps)[3],
                  const struct parameters &p, bool transposed)
{
    return part.chunks == 1   ? launch<T, 1>(device, part, maps, p, transposed)
           : part.chunks == 2 ? launch<T, 2>(device, part, maps, p, transposed)
                              : launch<T, 3>(device, part, maps, p, transposed);
}

bool rows_fit(const void *p, int64_t stride)
{
    return (uintptr_t)p % 16 == 0 && stride % 8 == 0;
}

/* To few columns: what this file does itself. */
bool reduces(const struct narrow_layer *l)
{
    return (l->rows >= ROWS_LEAST || l->k <= K_SHORT || splits(l->rows, l->k)) && l->k >= K_LEAST &&
           l->n <= CHUNKS_MOST * CHUNK && l->n % 8 == 0 && !l->accumulate &&
           partition_of(l->rows, l->k, l->n, !l->transposed).stages >= STAGES_LEAST;
}

int reduce(struct kernel_device *device, const struct narrow_layer *l)
{
    const struct partition part = partition_of(l->rows, l->k, l->n, !l->transposed);
    CUtensorMap maps[3];
    struct parameters p = {};
    p.rows = l->rows;
    p.k = (int)l->k, p.n = (int)l->n, p.rank = (int)l->rank;
    p.stages = part.stages, p.boxes = part.boxes;
    p.first = l->first, p.second = l->second;
    p.first_scale = l->first_scale, p.second_scale = l->second_scale;
    p.y = l->y, p.y_stride = l->y_stride;
    p.middle = l->middle, p.middle_in = l->middle_in;
    p.first_parts = (float *)l->workspace;
    p.second_parts = p.first_parts + part.first_parts * l->k * RANKS;
    int status = cuda_tile_map(&maps[0], l->x, l->rows, l->k, l->x_stride, ROWS, l->act);
    if (status == KERNEL_OK)
        status = l->transposed
                     ? cuda_tile_map(&maps[1], l->weight, l->n, l->k, l->k, part.chunks * CHUNK, l->act)
                     : cuda_tile_map(&maps[1], l->weight, l->k, l->n, l->n, BOX, l->act);
    maps[2] = maps[0];
    if (status == KERNEL_OK && !l->transposed)
        status =
            cuda_tile_map(&maps[2], l->other, l->rows, l->n, l->other_stride, ROWS / part.splits, l->act);
    if (status == KERNEL_OK)
        status = l->act == TYPE_BF16 ? launch_chunks<__nv_bfloat16>(device, part, maps, p, l->transposed)
                                     : launch_chunks<__half>(device, part, maps, p, l->transposed);
    if (status != KERNEL_OK || l->transposed)
        return status;
    const struct narrow_sum sums[2] = {
        {p.first_parts, part.first_parts, l->k, l->first_scale, l->first_gradient, true},
        {p.second_parts, part.second_parts, l->n, 1.0f, l->second_gradient, false},
    };
    return cuda_narrow_add(device, sums, l->rank);
}

} // namespace

bool cuda_narrow_can(const struct kernel_device *device, const struct narrow_layer *l)
{
    return device->hopper && device->shared_bytes >= SHARED_MOST &&
           (l->act == TYPE_BF16 || l->act == TYPE_F16) && l->rank > 0 && l->rank <= RANKS && l->rows > 0 &&
           l->rows <= INT32_MAX / 2 && l->k > 0 && l->n > 0 && rows_fit(l->x, l->x_stride) &&
           rows_fit(l->y, l->y_stride) && rows_fit(l->weight, l->transposed ? l->k : l->n) &&
           (l->transposed || rows_fit(l->other, l->other_stride)) &&
           (reduces(l) || cuda_widen_can(device, l));
}

int64_t cuda_narrow_workspace(int64_t rows, int64_t in, int64_t out)
{
    /* widen.cu's tiles are smaller; and where a cluster shares 128 rows, they have one part of `first` and eight of
     * `second`, which is far narrower. */
    int64_t blocks = divide_up(rows, ROWS / 2);
    if (blocks > BLOCKS)
        blocks = BLOCKS;
    return (blocks < 1 ? 1 : blocks) * (in + out) * RANKS * (int64_t)sizeof(float);
}

int cuda_narrow_add(struct kernel_device *device, const struct narrow_sum *sums, int64_t rank)
{
    unsigned first = (unsigned)divide_up(sums[0].columns * RANKS, ADD_ELEMENTS),
             second = (unsigned)divide_up(sums[1].columns * RANKS, ADD_ELEMENTS);
    return cuda_launch_chained(device, add_kernel, dim3(first + second), ADD_ELEMENTS * ADD_SLICES, 0, 1,
                               sums[0], sums[1], first, rank);
}

int cuda_narrow(struct kernel_device *device, const struct narrow_layer *l)
{
    return reduces(l) ? reduce(device, l) : cuda_widen(device, l);
}
