/* lora.cu: a low-rank path where linear.cu and skinny.cu cannot help: under dropout, and for the rows of a mixed batch
 * that have an adapter of their own. Three kernels over skinny matrices.
 *
 *     project   u = dropout(x) A^T
 *     expand    y += s u B^T                dx += mask * (du A)
 *     outer     parts of dA = du^T dropout(x) over some rows; conv.cu's cuda_add_parts sums them
 *
 * `wide` is the matrix of activations [rows,columns] (x, y or dx), `low` the one of [rows,rank], of type L. The weights
 * are [rank,columns] (A) or, BY_COLUMN, [columns,rank] (B). The dropout mask is a function of (seed, counter): it is
 * drawn again wherever it is needed and never stored. */
#include "kernels/cuda/low_rank.cuh"
#include "kernels/cuda/vector.cuh"

#include "kernels/philox.h"

namespace
{

enum {
    BLOCK_THREADS = 128,
    SPLIT_THREADS = 512, /* where few rows have to keep a device busy */
    LANE_COLUMNS = 4,
    RANKS = 8,        /* of one pass */
    PROJECT_ROWS = 4, /* of a warp, or of a block when there are few */
    EXPAND_ROWS = 8,  /* of a block */
    OUTER_ROWS_LEAST = 64,
    OUTER_PARTS_MOST = 64,
    OUTER_PARTS_BYTES = 128 << 20, /* of all: plans count no scratch */
    MANY_ROWS = 2048,              /* from here a warp a few rows keeps the device busy */
};

struct dropout {
    float p, keep; /* keep = 1 / (1 - p) */
    uint64_t seed, offset;
};

/* What an element is multiplied with. */
__device__ __forceinline__ float mask_at(const struct dropout &d, int64_t columns, int64_t row,
                                         int64_t column)
{
    uint64_t counter = d.offset + (uint64_t)row * (uint64_t)columns + (uint64_t)column;
    const uint32_t key[2] = {(uint32_t)d.seed, (uint32_t)(d.seed >> 32)};
    const uint32_t block[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0};
    uint32_t words[4];
    philox_block(key, block, words);
    return (float)(words[0] >> 8) * 0x1p-24f >= d.p ? d.keep : 0.0f;
}

__device__ __forceinline__ void apply_mask(const struct dropout &d, int64_t columns, int64_t row,
                                           int64_t column, float (&v)[LANE_COLUMNS])
{
    if (d.p > 0.0f)
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS; i++)
            v[i] *= mask_at(d, columns, row, column + i);
}

struct wide {
    void *p;
    int64_t stride, rows, columns;
    bool whole; /* rows are aligned */
};

struct weights {
    const float *p;
    int64_t columns, rank;
};

/* weight[r][i] of ranks first.. and columns c.., 0 outside. */
template <bool BY_COLUMN, int N>
__device__ __forceinline__ void load_weights(const struct weights &w, int64_t first, int64_t c,
                                             float (&out)[N][LANE_COLUMNS])
{
    if (BY_COLUMN) {
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS; i++) {
            float row[N];
            bool inside = c + i < w.columns;
            load_some(w.p + (c + i) * w.rank + first, inside ? w.rank - first : 0,
                      w.rank % 4 == 0 && (uintptr_t)w.p % 16 == 0, row);
#pragma unroll
            for (int r = 0; r < N; r++)
                out[r][i] = row[r];
        }
    } else {
#pragma unroll
        for (int r = 0; r < N; r++)
            load_some(w.p + (first + r) * w.columns + c, first + r < w.rank ? w.columns - c : 0,
                      w.columns % 4 == 0 && (uintptr_t)w.p % 16 == 0, out[r]);
    }
}

/* low[row][r] = scale * sum over columns of mask * wide[row] * weight[r]. SPLIT: the warps of a block share its rows
 * and divide the columns, otherwise every warp has rows of its own. */
template <typename T, typename L, bool SPLIT>
__global__ void __launch_bounds__(SPLIT ? SPLIT_THREADS : BLOCK_THREADS)
    project_kernel(struct wide x, struct weights w, struct dropout d, float scale, L *low)
{
    constexpr int THREADS = SPLIT ? SPLIT_THREADS : BLOCK_THREADS, WARPS = THREADS / WARP;
    __shared__ float sums[WARPS][PROJECT_ROWS][RANKS];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int64_t row =
        SPLIT ? (int64_t)blockIdx.x * PROJECT_ROWS : ((int64_t)blockIdx.x * WARPS + warp) * PROJECT_ROWS;
    int64_t first = (int64_t)blockIdx.y * RANKS, at = SPLIT ? threadIdx.x : lane;
    constexpr int STEP = (SPLIT ? THREADS : WARP) * LANE_COLUMNS;
    float sum[PROJECT_ROWS][RANKS] = {};
    for (int64_t c = at * LANE_COLUMNS; c < x.columns; c += STEP) {
        float v[PROJECT_ROWS][LANE_COLUMNS], weight[RANKS][LANE_COLUMNS];
#pragma unroll
        for (int i = 0; i < PROJECT_ROWS; i++) {
            load_some((const T *)x.p + (row + i) * x.stride + c, row + i < x.rows ? x.columns - c : 0,
                      x.whole, v[i]);
            apply_mask(d, x.columns, row + i, c, v[i]);
        }
        load_weights<false>(w, first, c, weight);
#pragma unroll
        for (int i = 0; i < PROJECT_ROWS; i++)
#pragma unroll
            for (int r = 0; r < RANKS; r++)
#pragma unroll
                for (int j = 0; j < LANE_COLUMNS; j++)
                    sum[i][r] = fmaf(v[i][j], weight[r][j], sum[i][r]);
    }
#pragma unroll
    for (int i = 0; i < PROJECT_ROWS; i++)
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            float total = warp_sum(sum[i][r]);
            if (lane == i * RANKS + r)
                sums[warp][i][r] = total;
        }
    if (SPLIT)
        __syncthreads();
    else
        __syncwarp();
    static_assert(PROJECT_ROWS * RANKS == WARP, "a lane an output");
    int64_t out_row = row + lane / RANKS, rank = first + lane % RANKS;
    if ((SPLIT && warp != 0) || out_row >= x.rows || rank >= w.rank)
        return;
    float total = sums[SPLIT ? 0 : warp][lane / RANKS][lane % RANKS];
    for (int i = 1; SPLIT && i < WARPS; i++)
        total += sums[i][lane / RANKS][lane % RANKS];
    low[out_row * w.rank + rank] = from_float<L>(scale * total);
}

/* wide[row] += mask * scale * sum over ranks of low[row][r] * weight[r]. */
template <typename T, typename L, bool BY_COLUMN>
__global__ void __launch_bounds__(BLOCK_THREADS)
    expand_kernel(struct wide y, struct weights w, struct dropout d, float scale, const L *low)
{
    __shared__ float rows[EXPAND_ROWS][RANKS];
    int64_t row = (int64_t)blockIdx.x * EXPAND_ROWS;
    int64_t c = ((int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x) * LANE_COLUMNS;
    float sum[EXPAND_ROWS][LANE_COLUMNS] = {};
    for (int64_t first = 0; first < w.rank; first += RANKS) {
        __syncthreads();
        if (threadIdx.x < EXPAND_ROWS * RANKS) {
            int64_t from = row + threadIdx.x / RANKS, rank = first + threadIdx.x % RANKS;
            rows[threadIdx.x / RANKS][threadIdx.x % RANKS] =
                from < y.rows && rank < w.rank ? to_float(low[from * w.rank + rank]) : 0.0f;
        }
        __syncthreads();
        float weight[RANKS][LANE_COLUMNS];
        load_weights<BY_COLUMN>(w, first, c, weight);
#pragma unroll
        for (int i = 0; i < EXPAND_ROWS; i++)
#pragma unroll
            for (int r = 0; r < RANKS; r++)
#pragma unroll
                for (int j = 0; j < LANE_COLUMNS; j++)
                    sum[i][j] = fmaf(rows[i][r], weight[r][j], sum[i][j]);
    }
    if (c >= y.columns)
        return;
#pragma unroll
    for (int i = 0; i < EXPAND_ROWS; i++) {
        if (row + i >= y.rows)
            return;
        T *at = (T *)y.p + (row + i) * y.stride + c;
        float v[LANE_COLUMNS];
        load_some(at, y.columns - c, y.whole, v);
        apply_mask(d, y.columns, row + i, c, sum[i]);
#pragma unroll
        for (int j = 0; j < LANE_COLUMNS; j++)
            v[j] = fmaf(scale, sum[i][j], v[j]);
        store_some(at, y.columns - c, y.whole, v);
    }
}

/* Of rows blockIdx.x * part_rows and on: part[r][c] = scale * sum of low[row][r] * mask * wide[row][c]. */
template <typename T, typename L>
__global__ void __launch_bounds__(BLOCK_THREADS)
    outer_kernel(struct wide x, const L *low, int64_t rank, struct dropout d, float scale, int64_t part_rows,
                 float *parts)
{
    constexpr int ROWS = 16; /* of low in shared memory at once */
    __shared__ float rows[ROWS][RANKS];
    int64_t c = ((int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x) * LANE_COLUMNS,
            first = (int64_t)blockIdx.z * RANKS;
    int64_t row = blockIdx.x * part_rows, end = min(row + part_rows, x.rows);
    float sum[RANKS][LANE_COLUMNS] = {};
    for (; row < end; row += ROWS) {
        __syncthreads();
        {
            int64_t from = row + threadIdx.x / RANKS, r = first + threadIdx.x % RANKS;
            static_assert(ROWS * RANKS == BLOCK_THREADS, "a thread an element");
            rows[threadIdx.x / RANKS][threadIdx.x % RANKS] =
                from < end && r < rank ? to_float(low[from * rank + r]) : 0.0f;
        }
        __syncthreads();
        if (c >= x.columns)
            continue;
#pragma unroll 4
        for (int i = 0; i < ROWS; i++) {
            float v[LANE_COLUMNS];
            load_some((const T *)x.p + (row + i) * x.stride + c, row + i < end ? x.columns - c : 0, x.whole,
                      v);
            apply_mask(d, x.columns, row + i, c, v);
#pragma unroll
            for (int r = 0; r < RANKS; r++)
#pragma unroll
                for (int j = 0; j < LANE_COLUMNS; j++)
                    sum[r][j] = fmaf(rows[i][r], v[j], sum[r][j]);
        }
    }
    float *part = parts + (int64_t)blockIdx.x * rank * x.columns;
#pragma unroll
    for (int r = 0; r < RANKS; r++)
#pragma unroll
        for (int j = 0; j < LANE_COLUMNS; j++)
            if (first + r < rank && c + j < x.columns)
                part[(first + r) * x.columns + c + j] = scale * sum[r][j];
}

struct dropout dropout_of(float p, uint64_t seed, uint64_t offset)
{
    struct dropout d = {p, 1.0f / (1.0f - p), seed, offset};
    return d;
}

struct wide wide_of(const void *p, int64_t stride, int64_t rows, int64_t columns, enum kernel_type act)
{
    struct wide w = {const_cast<void *>(p), stride, rows, columns, rows_aligned(p, stride, act)};
    return w;
}

unsigned column_blocks(int64_t columns)
{
    return (unsigned)divide_up(columns, BLOCK_THREADS * LANE_COLUMNS);
}

template <typename T, typename L>
void project(cudaStream_t stream, const struct wide &x, const float *weight, int64_t rank,
             const struct dropout &d, float scale, L *low)
{
    struct weights w = {weight, x.columns, rank};
    unsigned ranks = (unsigned)divide_up(rank, RANKS);
    if (x.rows < MANY_ROWS)
        project_kernel<T, L, true>
            <<<dim3((unsigned)divide_up(x.rows, PROJECT_ROWS), ranks), SPLIT_THREADS, 0, stream>>>(
                x, w, d, scale, low);
    else
        project_kernel<T, L, false>
            <<<dim3((unsigned)divide_up(x.rows, PROJECT_ROWS * (BLOCK_THREADS / WARP)), ranks), BLOCK_THREADS,
               0, stream>>>(x, w, d, scale, low);
}

template <typename T, bool BY_COLUMN, typename L>
void expand(cudaStream_t stream, const struct wide &y, const float *weight, int64_t rank,
            const struct dropout &d, float scale, const L *low)
{
    struct weights w = {weight, y.columns, rank};
    dim3 grid((unsigned)divide_up(y.rows, EXPAND_ROWS), column_blocks(y.columns));
    expand_kernel<T, L, BY_COLUMN><<<grid, BLOCK_THREADS, 0, stream>>>(y, w, d, scale, low);
}

/* sum += its gradient, [rank,columns]. */
template <typename T, typename L>
int outer(struct kernel_device *device, const struct wide &x, const L *low, int64_t rank,
          const struct dropout &d, float scale, float *sum)
{
    int64_t count = rank * x.columns, most = OUTER_PARTS_BYTES / (count * (int64_t)sizeof(float));
    most = most < 1 ? 1 : most < OUTER_PARTS_MOST ? most : (int64_t)OUTER_PARTS_MOST;
    int64_t part_rows = divide_up(x.rows, most);
    if (part_rows < OUTER_ROWS_LEAST)
        part_rows = OUTER_ROWS_LEAST;
    int64_t n_parts = divide_up(x.rows, part_rows);
    void *parts;
    int status = cuda_scratch(device, CUDA_SCRATCH_OP, (size_t)(n_parts * count) * sizeof(float), &parts);
    if (status != KERNEL_OK)
        return status;
    dim3 grid((unsigned)n_parts, column_blocks(x.columns), (unsigned)divide_up(rank, RANKS));
    outer_kernel<T, L>
        <<<grid, BLOCK_THREADS, 0, device->stream>>>(x, low, rank, d, scale, part_rows, (float *)parts);
    return cuda_add_parts(device, (float *)parts, n_parts, count, count, sum);
}

} // namespace

int cuda_low_rank_project(struct kernel_device *device, const struct linear_forward_args *f)
{
    const struct linear_layer *l = &f->layer;
    struct wide x = wide_of(f->x, f->x_stride, f->rows, l->in, f->act);
    CUDA_WITH_TYPE(f->act, T,
                   project<T>(device->stream, x, l->a, l->rank, dropout_of(l->dropout, l->seed, l->offset),
                              1.0f, (T *)f->u));
    return cuda_launched(device);
}

int cuda_low_rank_expand(struct kernel_device *device, const struct linear_backward_args *b, const void *du)
{
    const struct linear_layer *l = &b->layer;
    struct wide dx = wide_of(b->dx, b->dx_stride, b->rows, l->in, b->act);
    if (l->in == 0)
        return KERNEL_OK;
    CUDA_WITH_TYPE(b->act, T,
                   expand<T, false>(device->stream, dx, l->a, l->rank,
                                    dropout_of(l->dropout, l->seed, l->offset), 1.0f, (const T *)du));
    return cuda_launched(device);
}

int cuda_low_rank_outer(struct kernel_device *device, const struct linear_backward_args *b, const void *du)
{
    const struct linear_layer *l = &b->layer;
    struct wide x = wide_of(b->x, b->x_stride, b->rows, l->in, b->act);
    int status = KERNEL_OK;
    if (l->in > 0)
        CUDA_WITH_TYPE(b->act, T,
                       status = outer<T>(device, x, (const T *)du, l->rank,
                                         dropout_of(l->dropout, l->seed, l->offset), 1.0f, b->da));
    return status;
}

int cuda_lora_forward(struct kernel_device *device, const struct lora_forward_args *a)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (a->rows < 0 || a->in < 0 || a->out < 0 || a->rank <= 0 || a->x_stride < a->in ||
        a->y_stride < a->out || !(a->dropout >= 0.0f && a->dropout < 1.0f))
        return KERNEL_INVALID;
    if (!cuda_is_float(a->act))
        return KERNEL_UNSUPPORTED;
    if (a->rows == 0)
        return KERNEL_OK;
    struct wide x = wide_of(a->x, a->x_stride, a->rows, a->in, a->act);
    CUDA_WITH_TYPE(
        a->act, T,
        project<T>(device->stream, x, a->a, a->rank, dropout_of(a->dropout, a->seed, a->offset), 1.0f, a->u));
    struct wide y = wide_of(a->y, a->y_stride, a->rows, a->out, a->act);
    if (a->out > 0)
        CUDA_WITH_TYPE(
            a->act, T,
            expand<T, true>(device->stream, y, a->b, a->rank, dropout_of(0.0f, 0, 0), a->scale, a->u));
    return cuda_launched(device);
}
