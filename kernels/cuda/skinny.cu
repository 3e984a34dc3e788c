/* skinny.cu: what a low-rank adapter adds to a linear layer, in one pass over the activations: u = x A^T in the forward;
 * du = s dy B and dB = s dy^T u together, then dA = du^T x, in the backward. Bound by memory: a rank of 8 is one
 * m16n8k16 of the tensor cores for 256 elements. Hopper only, for its copy engine.
 *
 * A block goes down its rows; the copy engine keeps a ring of tiles ahead of it full, boxes of 64 columns side by side.
 * A warp owns BOXES of them, so that its part of the weights and its part of the gradient stay in registers. Where a
 * matrix is narrow, several groups of warps take 16 rows each. `project` sums over columns and takes a box from shared
 * memory as it is; `outer` sums over rows and takes it transposed.
 *
 * Sums over columns end in shared memory (over the warps) and, where a matrix is too wide for a block, in the
 * workspace; sums over rows always do. A second kernel adds those parts in order. All partitions follow from the sizes
 * alone. */
#include "kernels/cuda/skinny.cuh"

#include "kernels/cuda/fragments.cuh"

namespace
{

enum {
    STEP = 16, /* rows of a warp at a time */
    BOX = 64,  /* columns */
    ROW_BYTES = BOX * 2,
    BLOCKS = 132, /* one for each multiprocessor of an H100 or H200; a number of its own so that sums do not
                     depend on the device */
    CONSUMERS_MOST = 12, /* warps, beside the one that asks for tiles */
    BOXES_MOST = 3,      /* of a warp with one tile of ranks; 1 with two */
    BOXES_LEAST = 4,     /* of a block that has company */
    PART_SHARE = 512,    /* a part's row, written and read, is a 16th of so many numbers read */
    STAGES_MOST = 8,
    RING_BYTES = 200 << 10,
    FRAGMENT = 128, /* numbers of a 16 by 8 result */
    RANKS = 8,      /* of a tile */
    ADD_ELEMENTS = 64,
    ADD_SLICES = 8,
};

struct partition {
    int across, down; /* blocks side by side, one below the other */
    int boxes;        /* of a warp */
    int side, groups; /* warps of a block side by side, and how many times one below the other */
    int stages;
    int64_t rows; /* of a block, a multiple of groups * STEP */
};

struct parameters {
    int64_t rows, columns, block_rows;
    int rank, side, groups, stages;
    float scale; /* of low_out */
    bool by_column;
    const float *weights;
    void *low_out;
    float *low_parts; /* [across][rows][8 * TILES] in place of low_out, or NULL */
    const void *low_in;
    float *gradient_parts; /* [down][columns][8 * TILES] */
    const float *pack;
    void *pack_to;
    float pack_scale;
    int64_t pack_count;
};

#if CUDA_HOPPER

/* ---- right factors, in registers ---- */

/* low_in, for a sum over rows: rows row + 2 (lane % 4), the next, and both 8 below, of rank lane / 4. */
template <typename T, int TILES>
__device__ __forceinline__ void load_low(const struct parameters &p, int64_t row, int lane,
                                         uint32_t (&out)[TILES][2])
{
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            T v[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int64_t r = row + lane % 4 * 2 + 8 * half + i, rank = lane / 4 + RANKS * n;
                bool inside = r < p.rows && rank < p.rank;
                v[i] = inside ? ((const T *)p.low_in)[r * p.rank + rank] : from_float<T>(0.0f);
            }
            out[n][half] = pair_of(v[0], v[1]);
        }
}

/* The weights of a box, for a sum over columns: sixteen by sixteen columns, likewise. */
template <typename T, int TILES>
__device__ __forceinline__ void load_weights(const struct parameters &p, int64_t column, int lane,
                                             uint32_t (&out)[TILES][4][2])
{
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                T v[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int64_t c = column + 16 * k + lane % 4 * 2 + 8 * half + i, r = lane / 4 + RANKS * n;
                    bool inside = c < p.columns && r < p.rank;
                    v[i] = from_float<T>(inside ? p.weights[p.by_column ? c * p.rank + r : r * p.columns + c]
                                                : 0.0f);
                }
                out[n][k][half] = pair_of(v[0], v[1]);
            }
}

/* ---- the kernel ---- */

struct shared {
    unsigned char *ring;
    float *sums; /* [2][warps][TILES * FRAGMENT] */
    uint64_t *full, *empty;
};

/* One thread: asks for the tiles of this block's rows. */
__device__ __forceinline__ void produce(const struct parameters &p, const struct shared &shared,
                                        const CUtensorMap *map, int64_t column, int boxes, int64_t row,
                                        int64_t end)
{
    int step = p.groups * STEP, bytes = step * ROW_BYTES;
    int inside = (int)min((int64_t)boxes, divide_up(p.columns - column, BOX));
    struct tile_ring ring = {0, 1}; /* everything is empty at first */
    for (; row < end; row += step, ring.next(p.stages)) {
        barrier_wait(&shared.empty[ring.stage], ring.phase);
        barrier_expect(&shared.full[ring.stage], inside * bytes);
        for (int i = 0; i < inside; i++)
            tile_load(shared.ring + (ring.stage * boxes + i) * bytes, map, (int)column + i * BOX, (int)row,
                      &shared.full[ring.stage]);
    }
}

/* The sums of the warps that share rows, in order. */
template <typename T, int TILES>
__device__ __forceinline__ void write_low(const struct parameters &p, const float *sums, int64_t row)
{
    for (int i = threadIdx.x; i < p.groups * TILES * FRAGMENT; i += p.side * p.groups * WARP) {
        int group = i / (TILES * FRAGMENT), within = i % (TILES * FRAGMENT);
        const float *from = sums + group * p.side * (TILES * FRAGMENT) + within;
        float sum = from[0];
        for (int w = 1; w < p.side; w++)
            sum += from[w * (TILES * FRAGMENT)];
        sum *= p.scale;
        int64_t r = row + group * STEP + within % FRAGMENT / RANKS;
        int rank = within / FRAGMENT * RANKS + within % RANKS;
        if (r < p.rows && p.low_parts != NULL)
            p.low_parts[(blockIdx.x * p.rows + r) * (TILES * RANKS) + rank] = sum;
        else if (r < p.rows && rank < p.rank)
            ((T *)p.low_out)[r * p.rank + rank] = from_float<T>(sum);
    }
}

/* The gradients of the warps that share columns, in order, into those of the first group. */
template <int COUNT>
__device__ __forceinline__ void add_groups(const struct parameters &p, int group, int threads,
                                           float *gradient, float *space)
{
    float *mine = space + threadIdx.x % (p.side * WARP);
    const int stride = p.side * WARP;
    if (group > 0)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            mine[((group - 1) * COUNT + i) * stride] = gradient[i];
    numbered_wait(1, threads);
    for (int other = 0; group == 0 && other < p.groups - 1; other++)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            gradient[i] += mine[(other * COUNT + i) * stride];
}

template <typename T, int TILES, int BOXES, bool PROJECT, bool OUTER>
__device__ __forceinline__ void consume(const struct parameters &p, const struct shared &shared, int64_t row,
                                        int64_t end)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, threads = p.side * p.groups * WARP;
    const int group = warp / p.side, first_box = warp % p.side * BOXES, step = p.groups * STEP;
    const int64_t column = ((int64_t)blockIdx.x * p.side * BOXES + first_box) * BOX;

    uint32_t weights[PROJECT ? BOXES : 1][TILES][4][2];
#pragma unroll
    for (int j = 0; PROJECT && j < BOXES; j++)
        load_weights<T, TILES>(p, column + j * BOX, lane, weights[j]);
    uint32_t low[TILES][2] = {}, low_next[TILES][2] = {};
    if constexpr (OUTER)
        load_low<T, TILES>(p, row + group * STEP, lane, low);
    float gradient[OUTER ? BOXES : 1][4][TILES][4] = {};

    struct tile_ring ring = {0, 0};
    /* A buffer of sums is written again two barriers after it was read, so one barrier a step is enough. */
    for (int buffer = 0; row < end; row += step, ring.next(p.stages), buffer ^= 1) {
        if constexpr (OUTER)
            load_low<T, TILES>(p, row + step + group * STEP, lane, low_next);
        barrier_wait(&shared.full[ring.stage], ring.phase);
        uint32_t box = shared_address(shared.ring) + group * (STEP * ROW_BYTES) +
                       (ring.stage * p.side * BOXES + first_box) * step * ROW_BYTES;
        float sum[TILES][4] = {};
#pragma unroll
        for (int j = 0; j < BOXES; j++, box += step * ROW_BYTES) {
            if (column + j * BOX >= p.columns)
                continue;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                uint32_t a[4];
                if constexpr (PROJECT) {
                    load_fragment<false>(box, lane, 2 * k, a);
#pragma unroll
                    for (int n = 0; n < TILES; n++)
                        multiply_fragment<T>(sum[n], a, weights[j][n][k][0], weights[j][n][k][1]);
                }
                if constexpr (OUTER) {
                    load_fragment<true>(box, lane, 2 * k, a);
#pragma unroll
                    for (int n = 0; n < TILES; n++)
                        multiply_fragment<T>(gradient[j][k][n], a, low[n][0], low[n][1]);
                }
            }
        }
        __syncwarp();
        if (lane == 0)
            barrier_arrive(&shared.empty[ring.stage]);
        if constexpr (PROJECT) {
            float *sums = shared.sums + buffer * CONSUMERS_MOST * TILES * FRAGMENT;
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                float *at = sums + (warp * TILES + n) * FRAGMENT + lane / 4 * RANKS + lane % 4 * 2;
                *(float2 *)at = make_float2(sum[n][0], sum[n][1]);
                *(float2 *)(at + 8 * RANKS) = make_float2(sum[n][2], sum[n][3]);
            }
            numbered_wait(1, threads);
            write_low<T, TILES>(p, sums, row);
        }
#pragma unroll
        for (int n = 0; OUTER && n < TILES; n++)
            low[n][0] = low_next[n][0], low[n][1] = low_next[n][1];
    }
    if constexpr (OUTER) {
        numbered_wait(1, threads); /* the ring is free for other use */
        add_groups<BOXES * 4 * TILES * 4>(p, group, threads, &gradient[0][0][0][0], (float *)shared.ring);
        float *part = p.gradient_parts + blockIdx.y * p.columns * (TILES * RANKS);
#pragma unroll
        for (int j = 0; j < BOXES; j++)
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int64_t c = column + j * BOX + 16 * k + 8 * half + lane / 4;
#pragma unroll
                    for (int n = 0; n < TILES; n++)
                        if (group == 0 && c < p.columns)
                            *(float2 *)&part[c * (TILES * RANKS) + n * RANKS + lane % 4 * 2] =
                                make_float2(gradient[j][k][n][2 * half], gradient[j][k][n][2 * half + 1]);
                }
    }
}

#endif

template <typename T, int TILES, int BOXES, bool PROJECT, bool OUTER>
__global__ void __launch_bounds__((CONSUMERS_MOST + 1) * WARP, 1)
    skinny_kernel(const __grid_constant__ CUtensorMap map, const struct parameters p)
{
#if CUDA_HOPPER
    extern __shared__ unsigned char memory[];
    const int consumers = p.side * p.groups;
    const int64_t row = blockIdx.y * p.block_rows, end = min(row + p.block_rows, p.rows);
    struct shared shared;
    shared.ring = memory + (1024 - shared_address(memory) % 1024) % 1024;
    shared.sums = (float *)(shared.ring + p.stages * p.side * BOXES * p.groups * STEP * ROW_BYTES);
    shared.full = (uint64_t *)(shared.sums + (PROJECT ? 2 * CONSUMERS_MOST * TILES * FRAGMENT : 0));
    shared.empty = shared.full + STAGES_MOST;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], consumers);
        }
        barrier_inits_done();
    }
    __syncthreads();
    chain_wait();
    if (threadIdx.x / WARP < consumers) {
        for (int64_t i = ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * consumers * WARP + threadIdx.x;
             i < p.pack_count; i += (int64_t)gridDim.x * gridDim.y * consumers * WARP)
            ((T *)p.pack_to)[i] = from_float<T>(p.pack_scale * p.pack[i]);
        consume<T, TILES, BOXES, PROJECT, OUTER>(p, shared, row, end);
    } else if (threadIdx.x % WARP == 0) {
        produce(p, shared, &map, (int64_t)blockIdx.x * p.side * BOXES * BOX, p.side * BOXES, row, end);
    }
#endif
}

/* ---- adding parts ---- */

struct sums {
    const float *parts; /* [n][count] */
    int n;
    int64_t count;
    int tile_ranks, rank; /* a row of the parts has tile_ranks numbers, rank of which are wanted */
};

/* The sum of one number over the parts, in thread slice 0; the slices of a block divide the parts. */
__device__ __forceinline__ float add_parts(const struct sums &s, int64_t element, int slice,
                                           float (*shared)[ADD_ELEMENTS])
{
    float sum = 0.0f;
    if (element < s.count)
#pragma unroll 8
        for (int i = slice; i < s.n; i += ADD_SLICES)
            sum += s.parts[i * s.count + element];
    shared[slice][threadIdx.x % ADD_ELEMENTS] = sum;
    __syncthreads();
    for (int i = 1; slice == 0 && i < ADD_SLICES; i++)
        sum += shared[i][threadIdx.x];
    return sum;
}

/* The first gradient_blocks blocks add the parts of a gradient, the others those of low_out. */
template <typename T>
__global__ void __launch_bounds__(ADD_ELEMENTS *ADD_SLICES)
    add_kernel(struct sums gradient_sums, unsigned gradient_blocks, float scale, bool by_column,
               int64_t columns, float *gradient, struct sums low_sums, T *low)
{
    __shared__ float shared[ADD_SLICES][ADD_ELEMENTS];
    int slice = threadIdx.x / ADD_ELEMENTS;
    chain_wait();
    if (blockIdx.x < gradient_blocks) {
        int64_t element = (int64_t)blockIdx.x * ADD_ELEMENTS + threadIdx.x % ADD_ELEMENTS;
        float sum = add_parts(gradient_sums, element, slice, shared);
        int64_t column = element / gradient_sums.tile_ranks;
        int rank = element % gradient_sums.tile_ranks;
        if (slice == 0 && element < gradient_sums.count && rank < gradient_sums.rank) {
            float *to = &gradient[by_column ? column * gradient_sums.rank + rank : rank * columns + column];
            *to = fmaf(scale, sum, *to);
        }
        return;
    }
    int64_t element = (int64_t)(blockIdx.x - gradient_blocks) * (ADD_ELEMENTS * ADD_SLICES) + threadIdx.x;
    int64_t row = element / low_sums.tile_ranks;
    int rank = element % low_sums.tile_ranks;
    if (element >= low_sums.count || rank >= low_sums.rank)
        return;
    float sum = 0.0f;
    for (int i = 0; i < low_sums.n; i++)
        sum += low_sums.parts[i * low_sums.count + element];
    low[row * low_sums.rank + rank] = from_float<T>(sum);
}

/* ---- host ---- */

int tiles_of(int64_t rank)
{
    return rank <= RANKS ? 1 : 2;
}

int64_t down_of(int64_t across)
{
    return BLOCKS / across > 0 ? BLOCKS / across : 1;
}

/* As few blocks side by side as have room for a row. */
int64_t least_across(int64_t columns, int tiles)
{
    return divide_up(divide_up(columns, BOX), CONSUMERS_MOST * (tiles == 1 ? BOXES_MOST : 1));
}

/* Rows of parts, of low_out and of the gradient. */
int64_t parts_of(int64_t rows, int64_t columns, int64_t across, bool project, bool outer)
{
    return (project && across > 1 ? across * rows : 0) + (outer ? down_of(across) * columns : 0);
}

/* Blocks side by side cost parts of low_out, blocks one below the other parts of the gradient. Side by side twice as many as
 * need be, and again, where that saves a third of the parts and they are not little beside what is read. */
struct partition partition_of(int64_t rows, int64_t columns, int tiles, bool project, bool outer)
{
    struct partition p = {};
    int64_t boxes = divide_up(columns, BOX), across = least_across(columns, tiles);
    for (;;) {
        int64_t parts = parts_of(rows, columns, across, project, outer);
        if (boxes < 2 * across * BOXES_LEAST || parts * tiles * PART_SHARE < rows * columns ||
            parts_of(rows, columns, 2 * across, project, outer) * 3 > parts * 2)
            break;
        across *= 2;
    }
    int64_t of_block = divide_up(boxes, across);
    p.boxes = (int)divide_up(of_block, CONSUMERS_MOST);
    p.side = (int)divide_up(of_block, p.boxes);
    p.across = (int)divide_up(boxes, p.side * p.boxes); /* none without columns */
    int64_t of_down = divide_up(divide_up(rows, STEP), down_of(across));
    p.groups = 1;
    for (int groups = 2; groups <= CONSUMERS_MOST / p.side && groups <= of_down; groups++)
        if (divide_up(of_down, groups) * groups * 16 <= of_down * 17) /* hardly any rows for nothing */
            p.groups = groups;
    p.rows = divide_up(of_down, p.groups) * p.groups * STEP;
    p.down = (int)divide_up(rows, p.rows);
    int64_t stages = RING_BYTES / (p.side * p.boxes * p.groups * STEP * ROW_BYTES);
    p.stages = (int)(stages < STAGES_MOST ? stages : STAGES_MOST);
    return p;
}

int64_t round_up(int64_t bytes)
{
    return divide_up(bytes, 256) * 256;
}

template <typename T, int TILES, int BOXES, bool PROJECT, bool OUTER>
int launch_kernel(struct kernel_device *device, const struct partition &part, const CUtensorMap &map,
                  const struct parameters &p)
{
    auto kernel = skinny_kernel<T, TILES, BOXES, PROJECT, OUTER>;
    int sums = PROJECT ? 2 * CONSUMERS_MOST * TILES * FRAGMENT * (int)sizeof(float) : 0;
    int shared = part.stages * part.side * BOXES * part.groups * STEP * ROW_BYTES + sums +
                 2 * STAGES_MOST * (int)sizeof(uint64_t) + 1024;
    return cuda_launch_chained(device, kernel, dim3((unsigned)part.across, (unsigned)part.down),
                               (part.side * part.groups + 1) * WARP, shared, 1, map, p);
}

template <typename T, int TILES, int BOXES>
int launch_boxes(struct kernel_device *device, const struct partition &part, const CUtensorMap &map,
                 const struct parameters &p)
{
    if (p.weights != NULL && p.gradient_parts != NULL)
        return launch_kernel<T, TILES, BOXES, true, true>(device, part, map, p);
    if (p.weights != NULL)
        return launch_kernel<T, TILES, BOXES, true, false>(device, part, map, p);
    return launch_kernel<T, TILES, BOXES, false, true>(device, part, map, p);
}

template <typename T>
int launch(struct kernel_device *device, int tiles, const struct partition &part, const CUtensorMap &map,
           const struct parameters &p)
{
    if (tiles == 1)
        return part.boxes == 1   ? launch_boxes<T, 1, 1>(device, part, map, p)
               : part.boxes == 2 ? launch_boxes<T, 1, 2>(device, part, map, p)
                                 : launch_boxes<T, 1, 3>(device, part, map, p);
    return launch_boxes<T, 2, 1>(device, part, map, p);
}

template <typename T>
int add(struct kernel_device *device, int tiles, const struct partition &part, const struct parameters &p,
        const struct skinny *s)
{
    struct sums gradient = {p.gradient_parts, part.down, s->gradient != NULL ? s->columns * tiles * RANKS : 0,
                            tiles * RANKS, p.rank};
    struct sums low = {p.low_parts, part.across, p.low_parts != NULL ? s->rows * tiles * RANKS : 0,
                       tiles * RANKS, p.rank};
    unsigned gradient_blocks = (unsigned)divide_up(gradient.count, ADD_ELEMENTS);
    unsigned low_blocks = (unsigned)divide_up(low.count, ADD_ELEMENTS * ADD_SLICES);
    if (gradient_blocks + low_blocks == 0)
        return KERNEL_OK;
    return cuda_launch_chained(device, add_kernel<T>, dim3(gradient_blocks + low_blocks),
                               ADD_ELEMENTS * ADD_SLICES, 0, 1, gradient, gradient_blocks, s->scale,
                               s->by_column, s->columns, s->gradient, low, (T *)s->low_out);
}

template <typename T>
int run(struct kernel_device *device, int tiles, const struct partition &part, const CUtensorMap &map,
        const struct parameters &p, const struct skinny *s)
{
    int status = launch<T>(device, tiles, part, map, p);
    return status == KERNEL_OK ? add<T>(device, tiles, part, p, s) : status;
}

} // namespace

bool cuda_skinny_can(const struct kernel_device *device, const void *wide, int64_t stride, int64_t columns,
                     int64_t rank, enum kernel_type act)
{
    return device->hopper && (act == TYPE_BF16 || act == TYPE_F16) && rank > 0 && rank <= SKINNY_RANK_MOST &&
           columns > 0 && stride % 8 == 0 && (uintptr_t)wide % 16 == 0;
}

int64_t cuda_skinny_workspace(int64_t rows, int64_t columns, int64_t rank)
{
    if (columns <= 0)
        return 0;
    int tiles = tiles_of(rank);
    int64_t numbers = tiles * RANKS * (int64_t)sizeof(float);
    /* partition_of makes that many parts or fewer, of both kinds; one begins where the other ends, rounded up. */
    int64_t parts = parts_of(rows, columns, least_across(columns, tiles), true, true);
    return round_up(parts * numbers + 256);
}

int cuda_skinny(struct kernel_device *device, const struct skinny *s)
{
    int tiles = tiles_of(s->rank);
    struct partition part = partition_of(s->rows, s->columns, tiles, s->weights != NULL, s->gradient != NULL);
    struct parameters p = {};
    p.rows = s->rows, p.columns = s->columns, p.block_rows = part.rows;
    p.rank = (int)s->rank, p.side = part.side, p.groups = part.groups, p.stages = part.stages;
    p.scale = s->scale;
    p.by_column = s->by_column;
    p.weights = s->weights;
    p.low_out = s->low_out;
    p.low_in = s->low_in;
    char *workspace = (char *)s->workspace;
    if (s->gradient != NULL) {
        p.gradient_parts = (float *)workspace;
        workspace += round_up(part.down * s->columns * tiles * RANKS * (int64_t)sizeof(float));
    }
    if (s->weights != NULL && part.across > 1)
        p.low_parts = (float *)workspace;
    p.pack = s->pack, p.pack_to = s->pack_to;
    p.pack_scale = s->pack_scale, p.pack_count = s->pack_count;
    CUtensorMap map;
    int status = cuda_tile_map(&map, s->wide, s->rows, s->columns, s->stride, part.groups * STEP, s->act);
    if (status != KERNEL_OK)
        return status;
    return s->act == TYPE_BF16 ? run<__nv_bfloat16>(device, tiles, part, map, p, s)
                               : run<__half>(device, tiles, part, map, p, s);
}
