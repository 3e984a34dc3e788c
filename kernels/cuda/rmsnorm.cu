/* rmsnorm.cu: RMSNorm with its residual. Threads of a row hold it in registers, a pack or a few each: every array is read
 * once and written once, and that is all the time it takes. Rows too long or too crooked for that are read a second
 * time. Where the weight's gradient is wanted, threads take several rows one after the other and add up their columns,
 * and another kernel adds those parts in order. */
#include "kernels/cuda/vector.cuh"

namespace
{

enum {
    BLOCK_THREADS = 256, /* wanted: several rows where they are short */
    ROW_THREADS_MOST = 512,
    COLUMN_THREADS = 256,
    PARTS_WANTED = 1 << 20, /* floats: enough threads for a large device */
};

/* The sum over the threads of a row, threadIdx.x, whole warps. `turn`: of the calls of a kernel, so that one barrier is
 * enough. */
__device__ __forceinline__ float row_sum(float v, int turn)
{
    __shared__ float partial[2][ROW_THREADS_MOST / WARP];
    int warps = blockDim.x / WARP, first = threadIdx.y * warps;
    v = warp_sum(v);
    if (threadIdx.x % WARP == 0)
        partial[turn % 2][first + threadIdx.x / WARP] = v;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < warps; i++)
        sum += partial[turn % 2][first + i];
    return sum;
}

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

/* HELD: packs a thread, 0 = any number, read again. */
template <typename T, int N, int HELD>
__global__ void __launch_bounds__(ROW_THREADS_MOST) forward_kernel(struct forward f)
{
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, step = (int64_t)blockDim.x * N;
    int64_t first = (int64_t)threadIdx.x * N, start = row * f.d;
    bool active = row < f.rows;
    float squares = 0.0f;
    [[maybe_unused]] float held[HELD > 0 ? HELD : 1][N];
    if constexpr (HELD > 0) {
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (active && first + p * step < f.d)
                squares += take_sum<T>(f, start + first + p * step, held[p]);
    } else {
        for (int64_t i = first; active && i < f.d; i += step)
            squares += take_sum<T>(f, start + i, held[0]);
    }
    float rstd = 1.0f / sqrtf(row_sum(squares, 0) / (float)f.d + f.eps);
    if (!active)
        return;
    if constexpr (HELD > 0) {
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (first + p * step < f.d)
                write_y<T>(f, start + first + p * step, first + p * step, rstd, held[p]);
    } else {
        for (int64_t i = first; i < f.d; i += step) {
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
    float *parts; /* [divide_up(rows, rows_of_part)][d] */
    int64_t rows, d, rows_of_part;
};

/* One row's dot product of dy weight and r at one pack. */
template <int N>
__device__ __forceinline__ float dot(const float (&dy)[N], const float (&w)[N], const float (&r)[N])
{
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++)
        sum = fmaf(dy[j] * w[j], r[j], sum);
    return sum;
}

template <typename T, int N>
__device__ __forceinline__ void write_gradient(const struct backward &b, int64_t at, float rstd, float scale,
                                               const float (&dy)[N], const float (&w)[N], const float (&r)[N],
                                               float (&out)[N])
{
#pragma unroll
    for (int j = 0; j < N; j++)
        out[j] += rstd * (dy[j] * w[j] - r[j] * scale);
    store_pack(b.dresidual + at, out);
    if (b.dx != NULL)
        store_pack((T *)b.dx + at, out);
}

/* With h = r rstd and g = dy weight:  dr = rstd (g - h mean(g h)), dweight = the sum over the rows of dy h. HELD: packs
 * a thread of each of rows_of_part rows, which it takes one after the other. SUMS: the part of dweight is wanted. */
template <typename T, int N, int HELD, bool SUMS>
__global__ void __launch_bounds__(ROW_THREADS_MOST) backward_kernel(struct backward b)
{
    int64_t part = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, step = (int64_t)blockDim.x * N;
    int64_t first = (int64_t)threadIdx.x * N;
    float w[HELD][N], sums[HELD][N] = {};
#pragma unroll
    for (int p = 0; p < HELD; p++)
        if (int64_t i = first + p * step; i < b.d)
            load_pack(b.weight + i, w[p]);
    for (int turn = 0; turn < b.rows_of_part; turn++) {
        int64_t row = part * b.rows_of_part + turn, start = row * b.d;
        bool active = row < b.rows;
        float dy[HELD][N], r[HELD][N], out[HELD][N], sum = 0.0f, rstd = active ? b.rstd[row] : 0.0f;
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (int64_t i = first + p * step; active && i < b.d) {
                load_pack((const T *)b.dy + start + i, dy[p]);
                load_pack((const T *)b.r + start + i, r[p]);
                load_pack((const float *)b.dresidual + start + i, out[p]);
                sum += dot(dy[p], w[p], r[p]);
            }
        float scale = row_sum(sum, turn) / (float)b.d * rstd * rstd; /* mean(g h) rstd */
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (int64_t i = first + p * step; active && i < b.d) {
                write_gradient<T>(b, start + i, rstd, scale, dy[p], w[p], r[p], out[p]);
#pragma unroll
                for (int j = 0; j < N; j++)
                    sums[p][j] = fmaf(dy[p][j], r[p][j] * rstd, sums[p][j]);
            }
    }
    if (SUMS && part * b.rows_of_part < b.rows)
#pragma unroll
        for (int p = 0; p < HELD; p++)
            if (int64_t i = first + p * step; i < b.d)
                store_pack(b.parts + part * b.d + i, sums[p]);
}

/* Any row, read twice. */
template <typename T, int N>
__global__ void __launch_bounds__(ROW_THREADS_MOST) backward_any_kernel(struct backward b)
{
    int64_t row = blockIdx.x, step = (int64_t)blockDim.x * N, first = (int64_t)threadIdx.x * N;
    float dy[N], w[N], r[N], out[N], sum = 0.0f, rstd = b.rstd[row];
    for (int64_t i = first; i < b.d; i += step) {
        load_pack((const T *)b.dy + row * b.d + i, dy);
        load_pack((const T *)b.r + row * b.d + i, r);
        load_pack(b.weight + i, w);
        sum += dot(dy, w, r);
    }
    float scale = row_sum(sum, 0) / (float)b.d * rstd * rstd;
    for (int64_t i = first; i < b.d; i += step) {
        load_pack((const T *)b.dy + row * b.d + i, dy);
        load_pack((const T *)b.r + row * b.d + i, r);
        load_pack(b.weight + i, w);
        load_pack((const float *)b.dresidual + row * b.d + i, out);
        write_gradient<T>(b, row * b.d + i, rstd, scale, dy, w, r, out);
    }
}

/* The parts of dweight where rows are read twice. */
template <typename T> __global__ void dweight_kernel(struct backward b)
{
    int64_t column = (int64_t)blockIdx.y * COLUMN_THREADS + threadIdx.x;
    if (column >= b.d)
        return;
    int64_t first = (int64_t)blockIdx.x * b.rows_of_part, end = min(first + b.rows_of_part, b.rows);
    float sum = 0.0f;
    for (int64_t row = first; row < end; row++)
        sum = fmaf(to_float(((const T *)b.dy)[row * b.d + column]),
                   to_float(((const T *)b.r)[row * b.d + column]) * b.rstd[row], sum);
    b.parts[(int64_t)blockIdx.x * b.d + column] = sum;
}

/* ---- launches ---- */

/* How rows of so many packs are divided: packs a thread, 0 where there are too many. */
int held_of(int64_t packs)
{
    int64_t held = divide_up(packs, ROW_THREADS_MOST);
    return held <= 2 ? (int)held : 0;
}

/* Threads of a row, and rows of a block. */
dim3 block_of(int64_t packs, int held)
{
    int64_t threads = divide_up(divide_up(packs, held), WARP) * WARP, rows = BLOCK_THREADS / threads;
    return dim3((unsigned)threads, (unsigned)(rows > 0 ? rows : 1));
}

#define WITH_HELD(held, HELD, ...)                                                                           \
    do {                                                                                                     \
        if ((held) == 1) {                                                                                   \
            constexpr int HELD = 1;                                                                          \
            __VA_ARGS__;                                                                                     \
        } else {                                                                                             \
            constexpr int HELD = 2;                                                                          \
            __VA_ARGS__;                                                                                     \
        }                                                                                                    \
    } while (0)

template <typename T> void launch_forward(struct kernel_device *device, const struct forward &f)
{
    constexpr int N = pack<T>::COUNT;
    bool aligned = cuda_aligned((const T *)f.x, f.d) && cuda_aligned((const T *)f.kept, f.d) &&
                   cuda_aligned((const T *)f.y, f.d) && cuda_aligned(f.residual, f.d) &&
                   cuda_aligned(f.residual_out, f.d) && cuda_aligned(f.weight, f.d);
    int64_t packs = divide_up(f.d, N);
    int held = held_of(packs);
    if (!aligned) {
        forward_kernel<T, 1, 0><<<(unsigned)f.rows, ROW_THREADS_MOST, 0, device->stream>>>(f);
    } else if (held == 0) {
        forward_kernel<T, N, 0><<<(unsigned)f.rows, ROW_THREADS_MOST, 0, device->stream>>>(f);
    } else {
        dim3 block = block_of(packs, held);
        WITH_HELD(held, HELD,
                  forward_kernel<T, N, HELD>
                  <<<(unsigned)divide_up(f.rows, block.y), block, 0, device->stream>>>(f));
    }
}

template <typename T> int launch_backward(struct kernel_device *device, struct backward b, float *dweight)
{
    constexpr int N = pack<T>::COUNT;
    bool aligned = cuda_aligned((const T *)b.dy, b.d) && cuda_aligned((const T *)b.r, b.d) &&
                   cuda_aligned((const T *)b.dx, b.d) && cuda_aligned(b.dresidual, b.d) &&
                   cuda_aligned(b.weight, b.d);
    int64_t packs = divide_up(b.d, N), n_parts = divide_up(b.rows, b.rows_of_part);
    int held = held_of(packs);
    if (!aligned || held == 0) {
        if (dweight != NULL) { /* first: dx may take dy's place */
            dim3 tiles((unsigned)n_parts, (unsigned)divide_up(b.d, COLUMN_THREADS));
            dweight_kernel<T><<<tiles, COLUMN_THREADS, 0, device->stream>>>(b);
        }
        if (aligned)
            backward_any_kernel<T, N><<<(unsigned)b.rows, ROW_THREADS_MOST, 0, device->stream>>>(b);
        else
            backward_any_kernel<T, 1><<<(unsigned)b.rows, ROW_THREADS_MOST, 0, device->stream>>>(b);
    } else {
        dim3 block = block_of(packs, held);
        if (dweight == NULL) {
            b.rows_of_part = 1;
            WITH_HELD(held, HELD,
                      backward_kernel<T, N, HELD, false>
                      <<<(unsigned)divide_up(b.rows, block.y), block, 0, device->stream>>>(b));
        } else {
            WITH_HELD(held, HELD,
                      backward_kernel<T, N, HELD, true>
                      <<<(unsigned)divide_up(n_parts, block.y), block, 0, device->stream>>>(b));
        }
    }
    if (dweight == NULL)
        return cuda_launched(device);
    return cuda_add_parts(device, b.parts, n_parts, b.d, b.d, dweight);
}

/* Rows whose share of dweight is one part. */
int64_t rows_of_part(int64_t rows, int64_t d)
{
    int64_t count = divide_up(rows * d, PARTS_WANTED);
    return count > 0 ? count : 1;
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

/* The most for any number of rows up to this. */
int64_t cuda_rmsnorm_backward_workspace(int64_t rows, int64_t d)
{
    int64_t parts = PARTS_WANTED / d + 1;
    return (rows < parts ? rows : parts) * d * (int64_t)sizeof(float);
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
    const struct backward b = {a->dy,
                               a->r,
                               a->rstd,
                               a->weight,
                               a->dresidual,
                               a->dx,
                               (float *)a->workspace,
                               a->rows,
                               a->d,
                               rows_of_part(a->rows, a->d)};
    CUDA_WITH_TYPE(a->act, T, status = launch_backward<T>(device, b, a->dweight));
    return status;
}
