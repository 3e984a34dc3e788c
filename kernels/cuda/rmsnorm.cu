/* rmsnorm.cu: RMSNorm with its residual. A warp a row, which it holds in registers: every array is read once and
 * written once, and that is all the time it takes. Rows too long or too crooked for that are read a second time. The
 * weight's gradient is made by blocks of BLOCK_ROWS rows, whose sums another kernel adds in order. */
#include "kernels/cuda/vector.cuh"

namespace
{

enum {
    THREADS = 128,
    ROWS = THREADS / WARP, /* of a block */
    ROW_LANES = 8,
    BLOCK_ROWS = 64,
};

/* ---- forward ---- */

struct forward {
    const void *x;
    const float *residual; /* may be residual_out: each element is read and written by one thread */
    const float *weight;
    float eps;
    float *residual_out;
    void *kept, *y;
    float *rstd;
    int64_t rows, d;
};

/* r at one pack of the row, as `kept` holds it where it is kept. */
template <typename T, int N>
__device__ __forceinline__ void load_sum(const struct forward &f, int64_t at, float (&r)[N])
{
    if (f.residual == NULL) {
        load_pack((const T *)f.x + at, r);
        return;
    }
    load_pack(f.residual + at, r);
    if (f.x != NULL) {
        float v[N];
        load_pack((const T *)f.x + at, v);
#pragma unroll
        for (int j = 0; j < N; j++)
            r[j] += v[j];
    }
}

/* The first reading of a pack: r, what is left of it in memory, and its squares. */
template <typename T, int N>
__device__ __forceinline__ float take_sum(const struct forward &f, int64_t at, float (&r)[N])
{
    float squares = 0.0f;
    load_sum<T>(f, at, r);
    if (f.residual_out != NULL)
        store_pack(f.residual_out + at, r);
    if (f.kept != NULL) {
        store_pack((T *)f.kept + at, r);
#pragma unroll
        for (int j = 0; j < N; j++)
            r[j] = to_float(from_float<T>(r[j]));
    }
#pragma unroll
    for (int j = 0; j < N; j++)
        squares = fmaf(r[j], r[j], squares);
    return squares;
}

template <typename T, int N>
__device__ __forceinline__ void write_y(const struct forward &f, int64_t at, int64_t column, float rstd,
                                        const float (&r)[N])
{
    float w[N];
    load_pack(f.weight + column, w);
#pragma unroll
    for (int j = 0; j < N; j++)
        w[j] *= r[j] * rstd;
    store_pack((T *)f.y + at, w);
}

/* HELD: packs a lane, 0 = any number, read again. */
template <typename T, int N, int HELD>
__global__ void __launch_bounds__(THREADS) forward_kernel(struct forward f)
{
    int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / WARP;
    int64_t first = (int64_t)(threadIdx.x % WARP) * N;
    if (row >= f.rows)
        return;
    int64_t start = row * f.d;
    float squares = 0.0f;
    [[maybe_unused]] float held[HELD > 0 ? HELD : 1][N];
    if constexpr (HELD > 0) {
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (first + p * WARP * N < f.d)
                squares += take_sum<T>(f, start + first + p * WARP * N, held[p]);
    } else {
        for (int64_t i = first; i < f.d; i += WARP * N)
            squares += take_sum<T>(f, start + i, held[0]);
    }
    float rstd = 1.0f / sqrtf(warp_sum(squares) / (float)f.d + f.eps);
    if constexpr (HELD > 0) {
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (first + p * WARP * N < f.d)
                write_y<T>(f, start + first + p * WARP * N, first + p * WARP * N, rstd, held[p]);
    } else {
        for (int64_t i = first; i < f.d; i += WARP * N) {
            if (f.kept != NULL)
                load_pack((const T *)f.kept + start + i, held[0]);
            else if (f.residual_out != NULL)
                load_pack((const float *)f.residual_out + start + i, held[0]);
            else
                load_pack((const T *)f.x + start + i, held[0]);
            write_y<T>(f, start + i, i, rstd, held[0]);
        }
    }
    if (f.rstd != NULL && first == 0)
        f.rstd[row] = rstd;
}

/* ---- backward ---- */

struct backward {
    const void *dy, *r;
    const float *rstd, *weight;
    float *dresidual;
    void *dx;
    int64_t rows, d;
};

/* g = dy weight, and h = r (times rstd in the formulas), at one pack. */
template <typename T, int N>
__device__ __forceinline__ void load_factors(const struct backward &b, int64_t at, int64_t column,
                                             float (&g)[N], float (&h)[N])
{
    float w[N];
    load_pack((const T *)b.dy + at, g);
    load_pack(b.weight + column, w);
    load_pack((const T *)b.r + at, h);
#pragma unroll
    for (int j = 0; j < N; j++)
        g[j] *= w[j];
}

template <int N> __device__ __forceinline__ float dot(const float (&g)[N], const float (&h)[N])
{
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++)
        sum = fmaf(g[j], h[j], sum);
    return sum;
}

template <typename T, int N>
__device__ __forceinline__ void write_gradient(const struct backward &b, int64_t at, float rstd, float scale,
                                               const float (&g)[N], const float (&h)[N])
{
    float out[N];
    load_pack((const float *)b.dresidual + at, out);
#pragma unroll
    for (int j = 0; j < N; j++)
        out[j] += rstd * (g[j] - h[j] * scale);
    store_pack(b.dresidual + at, out);
    if (b.dx != NULL)
        store_pack((T *)b.dx + at, out);
}

/* With h = r rstd and g = dy weight:  dr = rstd (g - h mean(g h)). */
template <typename T, int N, int HELD>
__global__ void __launch_bounds__(THREADS) backward_kernel(struct backward b)
{
    int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / WARP;
    int64_t first = (int64_t)(threadIdx.x % WARP) * N;
    if (row >= b.rows)
        return;
    int64_t start = row * b.d;
    float sum = 0.0f;
    [[maybe_unused]] float g[HELD > 0 ? HELD : 1][N], h[HELD > 0 ? HELD : 1][N];
    if constexpr (HELD > 0) {
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (int64_t i = first + p * WARP * N; i < b.d) {
                load_factors<T>(b, start + i, i, g[p], h[p]);
                sum += dot(g[p], h[p]);
            }
    } else {
        for (int64_t i = first; i < b.d; i += WARP * N) {
            load_factors<T>(b, start + i, i, g[0], h[0]);
            sum += dot(g[0], h[0]);
        }
    }
    float rstd = b.rstd[row];
    float scale = warp_sum(sum) / (float)b.d * rstd * rstd; /* mean(g h) rstd */
    if constexpr (HELD > 0) {
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (int64_t i = first + p * WARP * N; i < b.d)
                write_gradient<T>(b, start + i, rstd, scale, g[p], h[p]);
    } else {
        for (int64_t i = first; i < b.d; i += WARP * N) {
            load_factors<T>(b, start + i, i, g[0], h[0]);
            write_gradient<T>(b, start + i, rstd, scale, g[0], h[0]);
        }
    }
}

/* partial[block][column] = sum over BLOCK_ROWS rows of dy h. A thread has N columns of every ROW_LANES-th row. */
template <typename T, int N>
__global__ void __launch_bounds__(WARP *ROW_LANES)
    dweight_kernel(const T *__restrict__ dy, const T *__restrict__ r, const float *__restrict__ rstd,
                   float *__restrict__ partial, int64_t rows, int64_t d)
{
    __shared__ float sums[ROW_LANES][WARP * N];
    int64_t tile = (int64_t)blockIdx.y * WARP * N, column = tile + threadIdx.x * N;
    int64_t first = (int64_t)blockIdx.x * BLOCK_ROWS;
    int64_t end = first + BLOCK_ROWS < rows ? first + BLOCK_ROWS : rows;
    float sum[N] = {};
    if (column < d) {
#pragma unroll 4
        for (int64_t row = first + threadIdx.y; row < end; row += ROW_LANES) {
            float g[N], h[N], scale = rstd[row];
            load_pack(dy + row * d + column, g);
            load_pack(r + row * d + column, h);
#pragma unroll
            for (int j = 0; j < N; j++)
                sum[j] = fmaf(g[j], h[j] * scale, sum[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < N; j++)
        sums[threadIdx.y][threadIdx.x * N + j] = sum[j];
    __syncthreads();
    for (int c = (int)(threadIdx.y * WARP + threadIdx.x); c < WARP * N && tile + c < d;
         c += WARP * ROW_LANES) {
        float total = sums[0][c];
        for (int lane = 1; lane < ROW_LANES; lane++)
            total += sums[lane][c];
        partial[(int64_t)blockIdx.x * d + tile + c] = total;
    }
}

/* ---- launches ---- */

/* A kernel that holds no fewer packs of a row than a lane has, or none. */
#define WITH_HELD(packs, HELD, ...)                                                                          \
    do {                                                                                                     \
        if ((packs) <= 3) {                                                                                  \
            constexpr int HELD = 3;                                                                          \
            __VA_ARGS__;                                                                                     \
        } else if ((packs) <= 6) {                                                                           \
            constexpr int HELD = 6;                                                                          \
            __VA_ARGS__;                                                                                     \
        } else if ((packs) <= 10) {                                                                          \
            constexpr int HELD = 10;                                                                         \
            __VA_ARGS__;                                                                                     \
        } else {                                                                                             \
            constexpr int HELD = 0;                                                                          \
            __VA_ARGS__;                                                                                     \
        }                                                                                                    \
    } while (0)

template <typename T> void launch_forward(struct kernel_device *device, const struct forward &f)
{
    constexpr int N = pack<T>::COUNT;
    unsigned grid = (unsigned)divide_up(f.rows, ROWS);
    bool aligned = cuda_aligned((const T *)f.x, f.d) && cuda_aligned((const T *)f.kept, f.d) &&
                   cuda_aligned((const T *)f.y, f.d) && cuda_aligned(f.residual, f.d) &&
                   cuda_aligned(f.residual_out, f.d) && cuda_aligned(f.weight, f.d);
    if (aligned)
        WITH_HELD(divide_up(f.d, WARP * N), HELD,
                  forward_kernel<T, N, HELD><<<grid, THREADS, 0, device->stream>>>(f));
    else
        forward_kernel<T, 1, 0><<<grid, THREADS, 0, device->stream>>>(f);
}

template <typename T> void launch_backward(struct kernel_device *device, const struct backward &b)
{
    constexpr int N = pack<T>::COUNT;
    unsigned grid = (unsigned)divide_up(b.rows, ROWS);
    bool aligned = cuda_aligned((const T *)b.dy, b.d) && cuda_aligned((const T *)b.r, b.d) &&
                   cuda_aligned((const T *)b.dx, b.d) && cuda_aligned(b.dresidual, b.d) &&
                   cuda_aligned(b.weight, b.d);
    if (aligned)
        WITH_HELD(divide_up(b.d, WARP * N), HELD,
                  backward_kernel<T, N, HELD><<<grid, THREADS, 0, device->stream>>>(b));
    else
        backward_kernel<T, 1, 0><<<grid, THREADS, 0, device->stream>>>(b);
}

template <typename T, int N>
int launch_dweight(struct kernel_device *device, const struct rmsnorm_backward_args *a)
{
    int64_t blocks = divide_up(a->rows, BLOCK_ROWS);
    dim3 tiles((unsigned)blocks, (unsigned)divide_up(a->d, WARP * N));
    float *partial = (float *)a->workspace;
    dweight_kernel<T, N><<<tiles, dim3(WARP, ROW_LANES), 0, device->stream>>>(
        (const T *)a->dy, (const T *)a->r, a->rstd, partial, a->rows, a->d);
    return cuda_add_parts(device, partial, blocks, a->d, a->d, a->dweight);
}

template <typename T> int add_dweight(struct kernel_device *device, const struct rmsnorm_backward_args *a)
{
    bool aligned = cuda_aligned((const T *)a->dy, a->d) && cuda_aligned((const T *)a->r, a->d);
    return aligned ? launch_dweight<T, pack<T>::COUNT>(device, a) : launch_dweight<T, 1>(device, a);
}

} // namespace

int cuda_rmsnorm_forward(struct kernel_device *device, const struct rmsnorm_forward_args *a)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (a->rows < 0 || a->d <= 0 || (a->residual == NULL && (a->x == NULL || a->residual_out != NULL)))
        return KERNEL_INVALID;
    if (!cuda_is_float(a->act) || a->rows > INT32_MAX)
        return KERNEL_UNSUPPORTED;
    if (a->rows == 0)
        return KERNEL_OK;
    const struct forward f = {a->x,    a->residual, a->weight, a->eps,  a->residual_out,
                              a->kept, a->y,        a->rstd,   a->rows, a->d};
    CUDA_WITH_TYPE(a->act, T, launch_forward<T>(device, f));
    return cuda_launched(device);
}

int64_t cuda_rmsnorm_backward_workspace(int64_t rows, int64_t d)
{
    return divide_up(rows, BLOCK_ROWS) * d * (int64_t)sizeof(float);
}

int cuda_rmsnorm_backward(struct kernel_device *device, const struct rmsnorm_backward_args *a)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (a->rows < 0 || a->d <= 0)
        return KERNEL_INVALID;
    if (!cuda_is_float(a->act) || a->rows > INT32_MAX)
        return KERNEL_UNSUPPORTED;
    if (a->rows == 0)
        return KERNEL_OK;
    if (a->dweight != NULL) /* first: dx may take dy's place */
        CUDA_WITH_TYPE(a->act, T, status = add_dweight<T>(device, a));
    if (status != KERNEL_OK)
        return status;
    const struct backward b = {a->dy, a->r, a->rstd, a->weight, a->dresidual, a->dx, a->rows, a->d};
    CUDA_WITH_TYPE(a->act, T, launch_backward<T>(device, b));
    return cuda_launched(device);
}
