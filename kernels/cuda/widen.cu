/* widen.cu: narrow.cuh's products where y is wide and x narrow: dt_proj's forward and x_proj's backward, which accumulates.
 * Bound by the memory of y (and of `other`).
 *
 * A block has 128 columns of y and keeps its part of W, and both factors, in shared memory. A warp has the copy engine fill
 * a ring of stages: 64 rows of x, of what y holds and of `other`. Two warpgroups take 64 columns each, a warp 16 rows;
 * the tile of y leaves from where the old one was. What a warp sums for the gradients stays in its registers till the
 * end, is added to those of the other warps and written as one of the parts that cuda_narrow_add adds: of
 * second_gradient the block's columns, of first_gradient 16 columns of x for each block of columns of y. */
#include "kernels/cuda/narrow.cuh"

#include "kernels/cuda/fragments.cuh"

namespace
{

enum {
    WARPGROUP = 128,
    CONSUMERS = 2, /* warpgroups */
    WARPS = WARPGROUP / WARP,
    THREADS = CONSUMERS * WARPGROUP + WARP,
    ROWS = 64, /* of a tile */
    BOX = 64,
    COLUMNS = CONSUMERS * BOX, /* of a block */
    BOX_BYTES = ROWS * BOX * 2,
    COLUMN_BOXES = CONSUMERS,
    STEP_K = 16,
    K_MOST = 256,
    ROWS_LEAST = 4096, /* of a forward that joint.cu would not do as fast */
    N_SHORT = 1280,
    STAGES_MOST = 8,
    STAGES_LEAST = 2,
    BLOCKS = 132, /* as skinny.cu's; or twice as many */
    RANKS = NARROW_RANKS,
    FIRST_BOX_BYTES = RANKS * BOX * 2,
    SECOND_STRIDE = 24, /* of a column of `second`: 16 ranks, and no two of eight in the same banks */
    SHARED_MOST = 227 << 10,
    /* Numbers of a lane, for 64 columns of second_gradient and 16 of first_gradient. */
    GRADIENTS = (BOX / 16 + 1) * 4,
};

struct parameters {
    int64_t rows;
    int k, n, rank, stages, boxes; /* of k */
    bool accumulate;
    const float *first, *second;
    float first_scale, second_scale;
    void *middle;
    const void *middle_in;
    float *first_parts, *second_parts; /* [down][columns][RANKS] */
};

int weight_bytes(int boxes)
{
    return boxes * COLUMN_BOXES * BOX_BYTES;
}
int stage_bytes(int boxes, bool gradients)
{
    return (boxes + COLUMN_BOXES * (gradients ? 2 : 1)) * BOX_BYTES;
}
int other_bytes(int boxes)
{
    return boxes * FIRST_BOX_BYTES + COLUMNS * SECOND_STRIDE * 2 + 1024 + 256;
}
/* Without gradients there is space and time for two blocks a multiprocessor. */
int blocks_of(bool gradients)
{
    return gradients ? BLOCKS : 2 * BLOCKS;
}
int stages_of(int boxes, bool gradients)
{
    int most = gradients ? (int)SHARED_MOST : SHARED_MOST / 2 - 1024;
    int stages = (most - weight_bytes(boxes) - other_bytes(boxes)) / stage_bytes(boxes, gradients);
    return stages < STAGES_MOST ? stages : (int)STAGES_MOST;
}

#if CUDA_HOPPER

struct shared {
    unsigned char *weight; /* [boxes][COLUMN_BOXES] boxes */
    unsigned char *ring;   /* [stages]: x [boxes], y [COLUMN_BOXES], other [COLUMN_BOXES] */
    unsigned char *first;  /* [boxes][RANKS][BOX], swizzled */
    unsigned char *second; /* [COLUMNS][SECOND_STRIDE] */
    uint64_t *full, *empty, *ready;
};

/* One thread. */
template <bool TRANSPOSED>
__device__ __forceinline__ void produce(const struct parameters &p, const struct shared &shared,
                                        const CUtensorMap *x, const CUtensorMap *weight, const CUtensorMap *y,
                                        const CUtensorMap *other)
{
    const int column = blockIdx.x * COLUMNS;
    barrier_expect(shared.ready, p.boxes * COLUMN_BOXES * BOX_BYTES);
    for (int i = 0; i < p.boxes; i++)
        for (int j = 0; j < COLUMN_BOXES; j++) {
            unsigned char *to = shared.weight + (i * COLUMN_BOXES + j) * BOX_BYTES;
            if (TRANSPOSED)
                tile_load(to, weight, i * BOX, column + j * BOX, shared.ready);
            else
                tile_load(to, weight, column + j * BOX, i * BOX, shared.ready);
        }
    const int size = (p.boxes + COLUMN_BOXES * (TRANSPOSED ? 1 : 2)) * BOX_BYTES;
    const int coming = size - (p.accumulate ? 0 : COLUMN_BOXES * BOX_BYTES);
    struct tile_ring ring = {0, 1}; /* everything is empty at first */
    for (int64_t row = (int64_t)blockIdx.y * ROWS; row < p.rows;
         row += (int64_t)gridDim.y * ROWS, ring.next(p.stages)) {
        uint64_t *full = &shared.full[ring.stage];
        unsigned char *to = shared.ring + ring.stage * size;
        barrier_wait(&shared.empty[ring.stage], ring.phase);
        barrier_expect(full, coming);
        for (int i = 0; i < p.boxes; i++, to += BOX_BYTES)
            tile_load(to, x, i * BOX, (int)row, full);
        for (int j = 0; j < COLUMN_BOXES; j++, to += BOX_BYTES)
            if (p.accumulate)
                tile_load(to, y, column + j * BOX, (int)row, full);
        for (int j = 0; !TRANSPOSED && j < COLUMN_BOXES; j++, to += BOX_BYTES)
            tile_load(to, other, column + j * BOX, (int)row, full);
    }
}

/* Both factors, in the type of the activations, to shared memory; by all consumers. */
template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void load_factors(const struct parameters &p, const struct shared &shared)
{
    load_first<T, TRANSPOSED, CONSUMERS * WARPGROUP>(shared.first, p.first, p.k,
                                                     TRANSPOSED ? 1.0f : p.first_scale, p.k, p.rank);
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS * STEP_K; i += CONSUMERS * WARPGROUP) {
        int r = TRANSPOSED ? i % STEP_K : i / COLUMNS, within = TRANSPOSED ? i / STEP_K : i % COLUMNS;
        int64_t n = (int64_t)blockIdx.x * COLUMNS + within;
        float v = r < p.rank && n < p.n ? p.second[TRANSPOSED ? n * p.rank + r : r * (int64_t)p.n + n] : 0.0f;
        ((T *)shared.second)[within * SECOND_STRIDE + r] = from_float<T>(p.second_scale * v);
    }
}

/* y's tile: 16 rows of a warp by 64 columns of `box`, on top of what is there when `add`. */
template <typename T>
__device__ __forceinline__ void put_box(unsigned char *box, int warp, int lane, bool add,
                                        const float (&d)[32])
{
    int row = warp * 16 + lane % 16;
    uint32_t base = shared_address(box) + row * TILE_ROW_BYTES;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
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
                     "r"(pair_rounded<T>(v[0], v[1])), "r"(pair_rounded<T>(v[2], v[3])),
                     "r"(pair_rounded<T>(v[4], v[5])), "r"(pair_rounded<T>(v[6], v[7]))
                     : "memory");
    }
}

/* The gradients of the warps of a warpgroup, in order, to the block's parts. */
__device__ __forceinline__ void write_gradients(const struct parameters &p, float *space, int group,
                                                const float (&gradient)[BOX / 16 + 1][4])
{
    const int thread = threadIdx.x % WARPGROUP;
    space += group * WARPS * GRADIENTS * WARP;
#pragma unroll
    for (int i = 0; i < GRADIENTS; i++)
        space[(thread / WARP * GRADIENTS + i) * WARP + thread % WARP] = gradient[i / 4][i % 4];
    numbered_wait(2 + group, WARPGROUP);
    for (int e = thread; e < GRADIENTS * WARP; e += WARPGROUP) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++)
            sum += space[w * GRADIENTS * WARP + e];
        int i = e / WARP, lane = e % WARP;
        int within = lane / 4 + i % 4 / 2 * 8, r = lane % 4 * 2 + i % 2;
        int column = (int)blockIdx.x * COLUMNS + group * BOX + i / 4 * 16 + within;
        int first_column = (int)blockIdx.x * 16 + within;
        if (i < GRADIENTS - 4 && column < p.n)
            p.second_parts[((int64_t)blockIdx.y * p.n + column) * RANKS + r] = sum;
        if (i >= GRADIENTS - 4 && group == 0 && first_column < p.k)
            p.first_parts[((int64_t)blockIdx.y * p.k + first_column) * RANKS + r] = sum;
    }
}

/* middle_in of this warp's 16 rows as a right factor. */
template <typename T>
__device__ __forceinline__ void load_middle(const struct parameters &p, int64_t row, int lane,
                                            uint32_t (&out)[2])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        T v[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int64_t from = row + lane % 4 * 2 + 8 * half + j;
            bool inside = from < p.rows && lane / 4 < p.rank;
            v[j] = inside ? ((const T *)p.middle_in)[from * p.rank + lane / 4] : from_float<T>(0.0f);
        }
        out[half] = pair_of(v[0], v[1]);
    }
}

template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void consume(const struct parameters &p, const struct shared &shared,
                                        const CUtensorMap *y)
{
    constexpr bool GRADIENT = !TRANSPOSED;
    const int group = threadIdx.x / WARPGROUP, warp = threadIdx.x % WARPGROUP / WARP,
              lane = threadIdx.x % WARP;
    const int size = (p.boxes + COLUMN_BOXES * (GRADIENT ? 2 : 1)) * BOX_BYTES;
    const int column = (int)blockIdx.x * COLUMNS + group * BOX;
    const bool sums_first = GRADIENT && group == 0 && (int)blockIdx.x * 16 < p.k;
    float gradient[BOX / 16 + 1][4] = {}; /* of second, and last of first */

    load_factors<T, TRANSPOSED>(p, shared);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    numbered_wait(1, CONSUMERS * WARPGROUP);
    barrier_wait(shared.ready, 0);

    struct tile_ring ring = {0, 0};
    for (int64_t tile = blockIdx.y; tile * ROWS < p.rows; tile += gridDim.y, ring.next(p.stages)) {
        const int64_t row = tile * ROWS + warp * 16; /* of this warp */
        const unsigned char *x = shared.ring + ring.stage * size;
        unsigned char *out = shared.ring + ring.stage * size + (p.boxes + group) * BOX_BYTES;
        uint32_t in[2];
        if (sums_first)
            load_middle<T>(p, row, lane, in);
        float d[32], middle[4];
        barrier_wait(&shared.full[ring.stage], ring.phase);
#pragma unroll 1
        for (int i = 0; i < p.boxes; i++) {
            const unsigned char *left = x + i * BOX_BYTES, *first = shared.first + i * FIRST_BOX_BYTES,
                                *weight = shared.weight + (i * COLUMN_BOXES + group) * BOX_BYTES;
            product_begin();
#pragma unroll
            for (int k = 0; k < BOX / STEP_K; k++) {
                uint64_t a = tile_descriptor(left + k * STEP_K * 2);
                product_64x8<T>(middle, a, tile_descriptor(first + k * STEP_K * 2), i > 0 || k > 0);
                product_64x64<T, TRANSPOSED>(
                    d, a, tile_descriptor(weight + k * STEP_K * (TRANSPOSED ? 2 : TILE_ROW_BYTES)),
                    i > 0 || k > 0);
            }
            product_commit();
        }
        product_wait<0>();
        product_take(middle);
        product_take(d);

        const uint32_t factor[4] = {pair_rounded<T>(middle[0], middle[1]),
                                    pair_rounded<T>(middle[2], middle[3]), 0, 0};
        if (p.middle != NULL && column == 0)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int64_t to = row + lane / 4 + j / 2 * 8;
                int r = lane % 4 * 2 + j % 2;
                if (to < p.rows && r < p.rank)
                    ((T *)p.middle)[to * p.rank + r] = from_float<T>(middle[j]);
            }
#pragma unroll
        for (int j = 0; j < BOX / 8; j++) {
            const T *at =
                (const T *)shared.second + (group * BOX + j * 8 + lane / 4) * SECOND_STRIDE + lane % 4 * 2;
            float c[4] = {d[j * 4], d[j * 4 + 1], d[j * 4 + 2], d[j * 4 + 3]};
            multiply_fragment<T>(c, factor, *(const uint32_t *)at, 0);
#pragma unroll
            for (int q = 0; q < 4; q++)
                d[j * 4 + q] = c[q];
        }
        put_box<T>(out, warp, lane, p.accumulate, d);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        if constexpr (GRADIENT) {
            uint32_t low[2] = {transpose_fragment(factor[0]), transpose_fragment(factor[1])}, a[4];
            uint32_t other = shared_address(out) + COLUMN_BOXES * BOX_BYTES + warp * 16 * TILE_ROW_BYTES;
#pragma unroll
            for (int j = 0; j < BOX / 16; j++) {
                load_fragment<true>(other, lane, j * 2, a);
                multiply_fragment<T>(gradient[j], a, low[0], low[1]);
            }
            if (sums_first) {
                uint32_t at = shared_address(x) + blockIdx.x / 4 * BOX_BYTES + warp * 16 * TILE_ROW_BYTES;
                load_fragment<true>(at, lane, blockIdx.x % 4 * 2, a);
                multiply_fragment<T>(gradient[BOX / 16], a, in[0], in[1]);
            }
        }
        numbered_wait(2 + group, WARPGROUP);
        if (threadIdx.x % WARPGROUP == 0) {
            if (column < p.n)
                tile_store(y, out, column, (int)(tile * ROWS));
            asm volatile("cp.async.bulk.commit_group;\n"
                         "cp.async.bulk.wait_group.read 0;" ::
                             : "memory");
            barrier_arrive(&shared.empty[ring.stage]);
        }
    }
    if (threadIdx.x % WARPGROUP == 0)
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    if constexpr (GRADIENT) {
        numbered_wait(1, CONSUMERS * WARPGROUP); /* the ring is free for other use */
        write_gradients(p, (float *)shared.ring, group, gradient);
    }
}

#endif

template <typename T, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, TRANSPOSED ? 2 : 1)
    widen_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                 const __grid_constant__ CUtensorMap y, const __grid_constant__ CUtensorMap other,
                 const struct parameters p)
{
#if CUDA_HOPPER
    extern __shared__ unsigned char memory[];
    struct shared shared;
    shared.weight = memory + (1024 - shared_address(memory) % 1024) % 1024;
    shared.ring = shared.weight + p.boxes * COLUMN_BOXES * BOX_BYTES;
    shared.first = shared.ring + p.stages * (p.boxes + COLUMN_BOXES * (TRANSPOSED ? 1 : 2)) * BOX_BYTES;
    shared.second = shared.first + p.boxes * FIRST_BOX_BYTES;
    shared.full = (uint64_t *)(shared.second + COLUMNS * SECOND_STRIDE * 2);
    shared.empty = shared.full + STAGES_MOST;
    shared.ready = shared.empty + STAGES_MOST;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], CONSUMERS);
        }
        barrier_init(shared.ready, 1);
        barrier_inits_done();
    }
    __syncthreads();
    chain_wait();
    if (threadIdx.x < CONSUMERS * WARPGROUP)
        consume<T, TRANSPOSED>(p, shared, &y);
    else if (threadIdx.x % WARP == 0)
        produce<TRANSPOSED>(p, shared, &x, &weight, &y, &other);
#endif
}

/* ---- host ---- */

int64_t blocks_down(int64_t rows, int64_t n, bool gradients)
{
    int64_t across = divide_up(n, COLUMNS), down = blocks_of(gradients) / across,
            tiles = divide_up(rows, ROWS);
    return down < 1 ? 1 : down < tiles ? down : tiles;
}

template <typename T, bool TRANSPOSED>
int launch(struct kernel_device *device, const CUtensorMap (&maps)[4], const struct parameters &p)
{
    auto kernel = widen_kernel<T, TRANSPOSED>;
    int shared = weight_bytes(p.boxes) + p.stages * stage_bytes(p.boxes, !TRANSPOSED) + other_bytes(p.boxes);
    dim3 grid((unsigned)divide_up(p.n, COLUMNS), (unsigned)blocks_down(p.rows, p.n, !TRANSPOSED));
    return cuda_launch_chained(device, kernel, grid, THREADS, shared, 1, maps[0], maps[1], maps[2], maps[3],
                               p);
}

} // namespace

bool cuda_widen_can(const struct kernel_device *device, const struct narrow_layer *l)
{
    int boxes = (int)divide_up(l->k, BOX);
    return (!l->transposed || l->rows >= ROWS_LEAST || l->n <= N_SHORT) && l->k <= K_MOST &&
           l->n >= 2 * COLUMNS && divide_up(l->n, COLUMNS) * 16 >= l->k &&
           stages_of(boxes, !l->transposed) >= STAGES_LEAST && device->shared_bytes >= SHARED_MOST;
}

int cuda_widen(struct kernel_device *device, const struct narrow_layer *l)
{
    CUtensorMap maps[4];
    struct parameters p = {};
    p.rows = l->rows;
    p.k = (int)l->k, p.n = (int)l->n, p.rank = (int)l->rank;
    p.boxes = (int)divide_up(l->k, BOX);
    p.stages = stages_of(p.boxes, !l->transposed);
    p.accumulate = l->accumulate;
    p.first = l->first, p.second = l->second;
    p.first_scale = l->first_scale, p.second_scale = l->second_scale;
    p.middle = l->middle, p.middle_in = l->middle_in;
    const int64_t down = blocks_down(l->rows, l->n, !l->transposed);
    p.second_parts = (float *)l->workspace;
    p.first_parts = p.second_parts + down * l->n * RANKS;
    int status = cuda_tile_map(&maps[0], l->x, l->rows, l->k, l->x_stride, ROWS, l->act);
    if (status == KERNEL_OK)
        status = l->transposed ? cuda_tile_map(&maps[1], l->weight, l->n, l->k, l->k, BOX, l->act)
                               : cuda_tile_map(&maps[1], l->weight, l->k, l->n, l->n, BOX, l->act);
    if (status == KERNEL_OK)
        status = cuda_tile_map(&maps[2], l->y, l->rows, l->n, l->y_stride, ROWS, l->act);
    maps[3] = maps[2];
    if (status == KERNEL_OK && !l->transposed)
        status = cuda_tile_map(&maps[3], l->other, l->rows, l->n, l->other_stride, ROWS, l->act);
    if (status == KERNEL_OK)
        CUDA_WITH_TYPE(
            l->act, T, if constexpr (sizeof(T) == 2) {
                status = l->transposed ? launch<T, true>(device, maps, p) : launch<T, false>(device, maps, p);
            });
    if (status != KERNEL_OK || l->transposed)
        return status;
    const struct narrow_sum sums[2] = {
        {p.first_parts, down, l->k, l->first_scale, l->first_gradient, true},
        {p.second_parts, down, l->n, 1.0f, l->second_gradient, false},
    };
    return cuda_narrow_add(device, sums, l->rank);
}
