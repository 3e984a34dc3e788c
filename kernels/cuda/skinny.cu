/* skinny.cu: what a low-rank adapter adds to a linear layer, in one pass over the activations: u = x A^T in the forward;
 * du = s dy B and dB = s dy^T u together, then dA = du^T x, in the backward. Bound by memory: a rank of 8 is one
 * m16n8k16 of the tensor cores for 256 elements.
 *
 * A block has up to 16 warps, side by side over its columns and, where those are few, in several groups one below the
 * other. It goes down its rows 16 a group at a time; a warp owns CHUNKS times 32 columns, so that its part of the weights
 * and its part of the gradient stay in registers. A lane loads 8 neighbouring elements of
 * row lane / 4 and as many of the row 8 below. That they are not the elements that an instruction's fragment wants does
 * not matter to `project`, which sums over columns: the weights are loaded in the same order. `outer` sums over rows
 * and takes the same registers transposed (movmatrix). The next rows are on their way meanwhile.
 *
 * Sums over columns end in shared memory (over the warps) and, where a matrix is too wide for a block, in the
 * workspace; sums over rows always do. A second kernel adds those parts in order. All partitions follow from the sizes
 * alone. */
#include "kernels/cuda/skinny.cuh"

#include <type_traits>

namespace
{

enum {
    STEP = 16,    /* rows at a time */
    CHUNK = 32,   /* columns that a warp loads at a time */
    BLOCKS = 132, /* one for each multiprocessor of an H100 or H200; a number of its own so that sums do not
                     depend on the device */
    WARPS_MOST = 16,
    FRAGMENT = 128, /* numbers of a 16 by 8 result */
    RANKS = 8,      /* of a tile */
    ADD_ELEMENTS = 64,
    ADD_SLICES = 8,
};

/* ---- instructions ---- */

template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1)
{
    if constexpr (sizeof(T) == 2 && std::is_same<T, __half>::value)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* An 8 by 8 matrix of 16-bit elements, row lane / 4 and columns 2 (lane % 4) and on in each lane, transposed. */
__device__ __forceinline__ uint32_t transpose(uint32_t v)
{
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

template <typename T> __device__ __forceinline__ uint32_t pair_of(T low, T high)
{
    T both[2] = {low, high};
    uint32_t r;
    memcpy(&r, both, sizeof(r));
    return r;
}

/* ---- the kernel ---- */

struct partition {
    int across, down; /* blocks side by side, one below the other */
    int chunks;       /* of a warp */
    int side, groups; /* warps of a block side by side, and how many times one below the other */
    int64_t rows;     /* of a block */
};

struct parameters {
    int64_t rows, columns, stride, block_rows;
    int rank, side, groups;
    float scale; /* of low_out */
    bool by_column;
    const void *wide;
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

/* Sixteen rows of a warp's columns, 0 outside the matrix. */
template <typename T, int CHUNKS>
__device__ __forceinline__ void load_rows(const struct parameters &p, const T *at, int64_t row, int64_t end,
                                          int64_t column, uint4 (&out)[CHUNKS][2])
{
    const uint4 zero = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool inside = row + 8 * half < end && column + CHUNK * j < p.columns;
            out[j][half] = inside ? __ldg((const uint4 *)(at + 8 * half * p.stride + CHUNK * j)) : zero;
        }
}

/* low_in as the right factor of a product that sums over rows: rows 2 (lane % 4), the next, and both 8 below, of rank
 * lane / 4. */
template <typename T, int TILES>
__device__ __forceinline__ void load_low(const struct parameters &p, int64_t row, int64_t end, int rank,
                                         uint32_t (&out)[TILES][2])
{
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            T v[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int64_t r = row + 8 * half + i;
                bool inside = r < end && rank + RANKS * n < p.rank;
                v[i] = inside ? ((const T *)p.low_in)[r * p.rank + rank + RANKS * n] : from_float<T>(0.0f);
            }
            out[n][half] = pair_of(v[0], v[1]);
        }
}

/* The weights of rank lane / 4 and the columns that load_rows gives this lane. */
template <typename T, int TILES, int CHUNKS>
__device__ __forceinline__ void load_weights(const struct parameters &p, int rank, int64_t column,
                                             uint32_t (&out)[TILES][CHUNKS][4])
{
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int j = 0; j < CHUNKS; j++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                T v[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int64_t c = column + CHUNK * j + 2 * q + i, r = rank + RANKS * n;
                    bool inside = c < p.columns && r < p.rank;
                    float w = inside ? p.weights[p.by_column ? c * p.rank + r : r * p.columns + c] : 0.0f;
                    v[i] = from_float<T>(w);
                }
                out[n][j][q] = pair_of(v[0], v[1]);
            }
}

/* What a warp has of its columns. */
template <int TILES, int CHUNKS, bool PROJECT, bool OUTER> struct state {
    uint32_t weights[PROJECT ? TILES : 1][PROJECT ? CHUNKS : 1][4];
    float gradient[OUTER ? CHUNKS : 1][2][OUTER ? TILES : 1][4];
};

/* Sixteen rows of a warp's columns with the rows of low_in. */
template <int TILES, int CHUNKS, bool OUTER> struct rows {
    uint4 wide[CHUNKS][2];
    uint32_t low[OUTER ? TILES : 1][2];
};

/* The sums over this warp's columns go to `to`, 16 rows of 8 ranks for each tile. */
template <typename T, int TILES, int CHUNKS, bool PROJECT, bool OUTER>
__device__ __forceinline__ void multiply_rows(const struct rows<TILES, CHUNKS, OUTER> &rows,
                                              struct state<TILES, CHUNKS, PROJECT, OUTER> &state, int g,
                                              int t, float *to)
{
    if constexpr (PROJECT) {
        float sum[TILES][4] = {};
#pragma unroll
        for (int j = 0; j < CHUNKS; j++)
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                const uint4 &a = rows.wide[j][0], &b = rows.wide[j][1];
                const uint32_t(&w)[4] = state.weights[n][j];
                multiply<T>(sum[n], a.x, b.x, a.y, b.y, w[0], w[1]);
                multiply<T>(sum[n], a.z, b.z, a.w, b.w, w[2], w[3]);
            }
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            float *at = to + n * FRAGMENT + g * RANKS + 2 * t;
            *(float2 *)at = make_float2(sum[n][0], sum[n][1]);
            *(float2 *)(at + 8 * RANKS) = make_float2(sum[n][2], sum[n][3]);
        }
    }
    if constexpr (OUTER) {
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            const uint4 &a = rows.wide[j][0], &b = rows.wide[j][1];
            const uint32_t top[4] = {a.x, a.y, a.z, a.w}, bottom[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int q = 0; q < 2; q++) {
                uint32_t a0 = transpose(top[2 * q]), a1 = transpose(top[2 * q + 1]);
                uint32_t a2 = transpose(bottom[2 * q]), a3 = transpose(bottom[2 * q + 1]);
#pragma unroll
                for (int n = 0; n < TILES; n++)
                    multiply<T>(state.gradient[j][q][n], a0, a1, a2, a3, rows.low[n][0], rows.low[n][1]);
            }
        }
    }
}

/* The sums of the warps that share rows, in order. */
template <typename T, int TILES>
__device__ __forceinline__ void write_low(const struct parameters &p, const float *sums, int64_t row,
                                          int64_t end)
{
    for (int i = threadIdx.x; i < p.groups * TILES * FRAGMENT; i += blockDim.x) {
        int group = i / (TILES * FRAGMENT), within = i % (TILES * FRAGMENT);
        const float *from = sums + group * p.side * (TILES * FRAGMENT) + within;
        float sum = from[0];
        for (int w = 1; w < p.side; w++)
            sum += from[w * (TILES * FRAGMENT)];
        sum *= p.scale;
        int64_t r = row + group * STEP + within % FRAGMENT / RANKS;
        int rank = within / FRAGMENT * RANKS + within % RANKS;
        if (r < end && p.low_parts != NULL)
            p.low_parts[(blockIdx.x * p.rows + r) * (TILES * RANKS) + rank] = sum;
        else if (r < end && rank < p.rank)
            ((T *)p.low_out)[r * p.rank + rank] = from_float<T>(sum);
    }
}

/* The gradients of the warps that share columns, in order, into those of the first group. */
template <int COUNT>
__device__ __forceinline__ void add_groups(const struct parameters &p, int group, float *gradient,
                                           float *shared)
{
    float *mine = shared + threadIdx.x % (p.side * WARP);
    for (int other = 1; other < p.groups; other++) {
        __syncthreads();
        if (group == other)
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                mine[i * p.side * WARP] = gradient[i];
        __syncthreads();
        if (group == 0)
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                gradient[i] += mine[i * p.side * WARP];
    }
}

template <typename T, int TILES, int CHUNKS, bool PROJECT, bool OUTER>
__global__ void __launch_bounds__(WARPS_MOST *WARP, 1) skinny_kernel(const struct parameters p)
{
    constexpr int SUMS = PROJECT ? 2 * WARPS_MOST * TILES * FRAGMENT : 0;
    constexpr int GRADIENT = OUTER ? CHUNKS * 2 * TILES * 4 : 0, GRADIENTS = GRADIENT * WARPS_MOST / 2 * WARP;
    __shared__ __align__(16) float shared[SUMS > GRADIENTS ? SUMS : GRADIENTS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int group = warp / p.side, step = p.groups * STEP;
    const int64_t column = ((int64_t)blockIdx.x * p.side + warp % p.side) * (CHUNKS * CHUNK) + 8 * t;
    int64_t row = blockIdx.y * p.block_rows; /* of the first group */
    const int64_t end = min(row + p.block_rows, p.rows);

    auto load = [&](struct rows<TILES, CHUNKS, OUTER> &rows, int64_t first) {
        int64_t r = first + group * STEP;
        load_rows<T>(p, (const T *)p.wide + (r + g) * p.stride + column, r + g, end, column, rows.wide);
        if constexpr (OUTER)
            load_low<T>(p, r + 2 * t, end, g, rows.low);
    };
    struct rows<TILES, CHUNKS, OUTER> even, odd;
    load(even, row);
    for (int64_t i = ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
         i < p.pack_count; i += (int64_t)gridDim.x * gridDim.y * blockDim.x)
        ((T *)p.pack_to)[i] = from_float<T>(p.pack_scale * p.pack[i]);
    struct state<TILES, CHUNKS, PROJECT, OUTER> state = {
    };
    if constexpr (PROJECT)
        load_weights<T>(p, g, column, state.weights);

    /* A buffer of sums is written again two barriers after it was read, so one barrier a step is enough. */
    float *sums = shared, *other_sums = shared + SUMS / 2;
    auto take = [&](const struct rows<TILES, CHUNKS, OUTER> &rows, int64_t first, float *sums) {
        multiply_rows<T>(rows, state, g, t, sums + warp * (TILES * FRAGMENT));
        if constexpr (PROJECT) {
            __syncthreads();
            write_low<T, TILES>(p, sums, first, end);
        }
    };
    for (; row < end; row += 2 * step) {
        load(odd, row + step);
        take(even, row, sums);
        load(even, row + 2 * step);
        take(odd, row + step, other_sums);
    }
    if constexpr (OUTER) {
        add_groups<GRADIENT>(p, group, &state.gradient[0][0][0][0], shared);
        float *part = p.gradient_parts + blockIdx.y * p.columns * (TILES * RANKS);
#pragma unroll
        for (int j = 0; j < CHUNKS; j++)
#pragma unroll
            for (int q = 0; q < 2; q++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    /* where transpose() put the columns 8 (g / 2) + 2 (2 q + half) + g % 2 */
                    int64_t c = column - 8 * t + CHUNK * j + 8 * (g / 2) + 2 * (2 * q + half) + g % 2;
#pragma unroll
                    for (int n = 0; n < TILES; n++)
                        if (group == 0 && c < p.columns)
                            *(float2 *)&part[c * (TILES * RANKS) + n * RANKS + 2 * t] = make_float2(
                                state.gradient[j][q][n][2 * half], state.gradient[j][q][n][2 * half + 1]);
                }
    }
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

/* The chunks that a warp has registers for. */
int chunks_most(int tiles, bool outer)
{
    if (outer)
        return tiles == 1 ? 3 : 2;
    return tiles == 1 ? 4 : 3;
}

/* Blocks side by side cost parts of low_out, blocks one below the other parts of the gradient. */
struct partition partition_of(int64_t rows, int64_t columns, int tiles, bool project, bool outer)
{
    struct partition p = {};
    int64_t chunks = divide_up(columns, CHUNK);
    int most = chunks_most(tiles, outer);
    p.across = (int)divide_up(chunks, (project ? WARPS_MOST : WARPS_MOST / 4) * most);
    p.across = p.across < BLOCKS ? p.across : (int)divide_up(chunks, WARPS_MOST * most);
    int64_t of_block = divide_up(chunks, p.across), best = 0;
    for (int n = most; n >= 1; n--) {
        int64_t side = divide_up(of_block, n), groups = side <= WARPS_MOST ? WARPS_MOST / side : 0;
        if (groups * of_block <= best)
            continue;
        best = groups * of_block; /* chunks on their way at a time */
        p.chunks = n, p.side = (int)side, p.groups = (int)groups;
    }
    int64_t steps = divide_up(rows, STEP), down = BLOCKS / p.across > 0 ? BLOCKS / p.across : 1;
    int64_t of_down = divide_up(steps, down);
    p.groups = p.groups < of_down ? p.groups : (int)of_down;
    p.rows = of_down * STEP;
    p.down = (int)divide_up(rows, p.rows);
    return p;
}

int64_t round_up(int64_t bytes)
{
    return divide_up(bytes, 256) * 256;
}

int64_t gradient_bytes(const struct partition &p, int64_t columns, int tiles)
{
    return round_up(p.down * columns * tiles * RANKS * (int64_t)sizeof(float));
}

template <typename T, int TILES, int CHUNKS>
void launch_chunks(cudaStream_t stream, dim3 grid, int threads, const struct parameters &p)
{
    if (p.weights != NULL && p.gradient_parts != NULL) {
        if constexpr (CHUNKS <= (TILES == 1 ? 3 : 2))
            skinny_kernel<T, TILES, CHUNKS, true, true><<<grid, threads, 0, stream>>>(p);
    } else if (p.weights != NULL) {
        skinny_kernel<T, TILES, CHUNKS, true, false><<<grid, threads, 0, stream>>>(p);
    } else if constexpr (CHUNKS <= (TILES == 1 ? 3 : 2)) {
        skinny_kernel<T, TILES, CHUNKS, false, true><<<grid, threads, 0, stream>>>(p);
    }
}

template <typename T, int TILES>
void launch(cudaStream_t stream, const struct partition &part, const struct parameters &p)
{
    dim3 grid((unsigned)part.across, (unsigned)part.down);
    int threads = part.side * part.groups * WARP;
    if (part.chunks == 1)
        launch_chunks<T, TILES, 1>(stream, grid, threads, p);
    else if (part.chunks == 2)
        launch_chunks<T, TILES, 2>(stream, grid, threads, p);
    else if (part.chunks == 3)
        launch_chunks<T, TILES, 3>(stream, grid, threads, p);
    else
        launch_chunks<T, TILES, 4>(stream, grid, threads, p);
}

} // namespace

bool cuda_skinny_can(const void *wide, int64_t stride, int64_t columns, int64_t rank, enum kernel_type act)
{
    return (act == TYPE_BF16 || act == TYPE_F16) && rank > 0 && rank <= SKINNY_RANK_MOST && columns > 0 &&
           columns % 8 == 0 && stride % 8 == 0 && (uintptr_t)wide % 16 == 0;
}

int64_t cuda_skinny_workspace(int64_t rows, int64_t columns, int64_t rank)
{
    if (columns <= 0)
        return 0;
    int tiles = tiles_of(rank);
    rows = rows > 0 ? rows : 1;
    struct partition both = partition_of(rows, columns, tiles, true, true);
    struct partition outer = partition_of(rows, columns, tiles, false, true);
    int64_t numbers = tiles * RANKS * (int64_t)sizeof(float);
    int64_t across = both.across < outer.across ? both.across : outer.across;
    int64_t down = across < BLOCKS ? BLOCKS / across : 1; /* however few the rows are */
    return round_up(down * columns * numbers) + (both.across > 1 ? both.across * rows * numbers : 0);
}

int cuda_skinny(struct kernel_device *device, const struct skinny *s)
{
    bool outer = s->gradient != NULL, project = s->weights != NULL;
    int tiles = tiles_of(s->rank);
    struct partition part = partition_of(s->rows, s->columns, tiles, project, outer);
    struct parameters p = {};
    p.rows = s->rows, p.columns = s->columns, p.stride = s->stride, p.block_rows = part.rows;
    p.rank = (int)s->rank, p.side = part.side, p.groups = part.groups;
    p.scale = s->scale;
    p.by_column = s->by_column;
    p.wide = s->wide;
    p.weights = s->weights;
    p.low_out = s->low_out;
    p.low_in = s->low_in;
    char *workspace = (char *)s->workspace;
    if (outer) {
        p.gradient_parts = (float *)workspace;
        workspace += gradient_bytes(part, s->columns, tiles);
    }
    if (project && part.across > 1)
        p.low_parts = (float *)workspace;
    p.pack = s->pack, p.pack_to = s->pack_to;
    p.pack_scale = s->pack_scale, p.pack_count = s->pack_count;
    if (s->act == TYPE_BF16)
        tiles == 1 ? launch<__nv_bfloat16, 1>(device->stream, part, p)
                   : launch<__nv_bfloat16, 2>(device->stream, part, p);
    else
        tiles == 1 ? launch<__half, 1>(device->stream, part, p) : launch<__half, 2>(device->stream, part, p);

    struct sums gradient_sums = {p.gradient_parts, part.down, outer ? s->columns * tiles * RANKS : 0,
                                 tiles * RANKS, p.rank};
    struct sums low_sums = {p.low_parts, part.across, p.low_parts != NULL ? s->rows * tiles * RANKS : 0,
                            tiles * RANKS, p.rank};
    unsigned gradient_blocks = (unsigned)divide_up(gradient_sums.count, ADD_ELEMENTS);
    unsigned low_blocks = (unsigned)divide_up(low_sums.count, ADD_ELEMENTS * ADD_SLICES);
    if (gradient_blocks + low_blocks > 0) {
        dim3 grid(gradient_blocks + low_blocks);
        int threads = ADD_ELEMENTS * ADD_SLICES;
        if (s->act == TYPE_BF16)
            add_kernel<<<grid, threads, 0, device->stream>>>(gradient_sums, gradient_blocks, s->scale,
                                                             s->by_column, s->columns, s->gradient, low_sums,
                                                             (__nv_bfloat16 *)s->low_out);
        else
            add_kernel<<<grid, threads, 0, device->stream>>>(gradient_sums, gradient_blocks, s->scale,
                                                             s->by_column, s->columns, s->gradient, low_sums,
                                                             (__half *)s->low_out);
    }
    return cuda_launched(device);
}
