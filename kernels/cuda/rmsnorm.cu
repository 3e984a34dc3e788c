/* rmsnorm.cu: RMSNorm with its residual. Forward: a block a row. Backward: a block a row for the rows' own gradients,
 * and, when the weight wants one, blocks of BLOCK_ROWS rows whose sums a second kernel adds in order. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 256, BLOCK_ROWS = 64, REDUCE_THREADS = 128 };

/* residual may be residual_out: each element is read and written by one thread. */
template <typename T, int N>
static __global__ void forward_kernel(const T *__restrict__ x, const float *residual,
                                      const float *__restrict__ weight, float eps, float *residual_out,
                                      T *__restrict__ y, float *__restrict__ rstd_out, int64_t d)
{
    int64_t row = (int64_t)blockIdx.x * d;
    float squares = 0.0f;
    for (int64_t i = (int64_t)threadIdx.x * N; i < d; i += THREADS * N) {
        float r[N];
        load_pack(residual + row + i, r);
        if (x != NULL) {
            float v[N];
            load_pack(x + row + i, v);
#pragma unroll
            for (int j = 0; j < N; j++)
                r[j] += v[j];
        }
        store_pack(residual_out + row + i, r);
#pragma unroll
        for (int j = 0; j < N; j++)
            squares = fmaf(r[j], r[j], squares);
    }
    float rstd = 1.0f / sqrtf(block_sum<THREADS>(squares) / (float)d + eps);
    for (int64_t i = (int64_t)threadIdx.x * N; i < d; i += THREADS * N) {
        float r[N], w[N];
        load_pack(residual_out + row + i, r);
        load_pack(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; j++)
            r[j] = r[j] * rstd * w[j];
        store_pack(y + row + i, r);
    }
    if (rstd_out != NULL && threadIdx.x == 0)
        rstd_out[blockIdx.x] = rstd;
}

/* Elements at a time for rows of d that begin at these pointers. */
template <typename T>
static bool rows_aligned(const T *a, const T *b, const float *c, const float *e, int64_t d)
{
    return cuda_aligned(a, d) && cuda_aligned(b, d) && cuda_aligned(c, d) && cuda_aligned(e, d);
}

template <typename T>
static void launch_forward(struct kernel_device *device, const struct rmsnorm_forward_args *a)
{
    const T *x = (const T *)a->x;
    T *y = (T *)a->y;
    unsigned grid = (unsigned)a->rows;
    if (rows_aligned<T>(x, y, a->residual, a->residual_out, a->d) && cuda_aligned(a->weight, a->d))
        forward_kernel<T, pack<T>::COUNT><<<grid, THREADS, 0, device->stream>>>(
            x, a->residual, a->weight, a->eps, a->residual_out, y, a->rstd, a->d);
    else
        forward_kernel<T, 1><<<grid, THREADS, 0, device->stream>>>(x, a->residual, a->weight, a->eps,
                                                                   a->residual_out, y, a->rstd, a->d);
}

int cuda_rmsnorm_forward(struct kernel_device *device, const struct rmsnorm_forward_args *a)
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
    CUDA_WITH_TYPE(a->act, T, launch_forward<T>(device, a));
    return cuda_launched(device);
}

/* ---- backward ---- */

int64_t cuda_rmsnorm_backward_workspace(int64_t rows, int64_t d)
{
    return divide_up(rows, BLOCK_ROWS) * d * (int64_t)sizeof(float);
}

/* With h = r rstd and g = dy weight:  dr = rstd (g - h mean(g h)). */
template <typename T, int N>
static __global__ void backward_kernel(const T *__restrict__ dy, const float *__restrict__ r,
                                       const float *__restrict__ rstd_in, const float *__restrict__ weight,
                                       float *__restrict__ dresidual, int64_t d)
{
    int64_t row = (int64_t)blockIdx.x * d;
    float rstd = rstd_in[blockIdx.x], sum = 0.0f;
    for (int64_t i = (int64_t)threadIdx.x * N; i < d; i += THREADS * N) {
        float g[N], w[N], h[N];
        load_pack(dy + row + i, g);
        load_pack(weight + i, w);
        load_pack(r + row + i, h);
#pragma unroll
        for (int j = 0; j < N; j++)
            sum = fmaf(g[j] * w[j], h[j], sum);
    }
    float scale = block_sum<THREADS>(sum) / (float)d * rstd * rstd; /* mean(g h) rstd */
    for (int64_t i = (int64_t)threadIdx.x * N; i < d; i += THREADS * N) {
        float g[N], w[N], h[N], out[N];
        load_pack(dy + row + i, g);
        load_pack(weight + i, w);
        load_pack(r + row + i, h);
        load_pack(dresidual + row + i, out);
#pragma unroll
        for (int j = 0; j < N; j++)
            out[j] += rstd * (g[j] * w[j] - h[j] * scale);
        store_pack(dresidual + row + i, out);
    }
}

/* partial[block][column] = sum over BLOCK_ROWS rows of dy h. */
template <typename T>
static __global__ void dweight_kernel(const T *__restrict__ dy, const float *__restrict__ r,
                                      const float *__restrict__ rstd, float *__restrict__ partial,
                                      int64_t rows, int64_t d)
{
    int64_t column = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (column >= d)
        return;
    int64_t first = (int64_t)blockIdx.x * BLOCK_ROWS;
    int64_t end = first + BLOCK_ROWS < rows ? first + BLOCK_ROWS : rows;
    float sum = 0.0f;
    for (int64_t row = first; row < end; row++)
        sum = fmaf(to_float(dy[row * d + column]), r[row * d + column] * rstd[row], sum);
    partial[(int64_t)blockIdx.x * d + column] = sum;
}

static __global__ void reduce_kernel(const float *__restrict__ partial, float *__restrict__ dweight,
                                     int64_t blocks, int64_t d)
{
    int64_t column = (int64_t)blockIdx.x * REDUCE_THREADS + threadIdx.x;
    if (column >= d)
        return;
    float sum = 0.0f;
    for (int64_t block = 0; block < blocks; block++)
        sum += partial[block * d + column];
    dweight[column] += sum;
}

template <typename T>
static void launch_backward(struct kernel_device *device, const struct rmsnorm_backward_args *a)
{
    const T *dy = (const T *)a->dy;
    unsigned grid = (unsigned)a->rows;
    if (rows_aligned<T>(dy, dy, a->r, a->dresidual, a->d) && cuda_aligned(a->weight, a->d))
        backward_kernel<T, pack<T>::COUNT>
            <<<grid, THREADS, 0, device->stream>>>(dy, a->r, a->rstd, a->weight, a->dresidual, a->d);
    else
        backward_kernel<T, 1>
            <<<grid, THREADS, 0, device->stream>>>(dy, a->r, a->rstd, a->weight, a->dresidual, a->d);
    if (a->dweight == NULL)
        return;
    int64_t blocks = divide_up(a->rows, BLOCK_ROWS);
    dim3 tiles((unsigned)blocks, (unsigned)divide_up(a->d, THREADS));
    float *partial = (float *)a->workspace;
    dweight_kernel<T><<<tiles, THREADS, 0, device->stream>>>(dy, a->r, a->rstd, partial, a->rows, a->d);
    reduce_kernel<<<(unsigned)divide_up(a->d, REDUCE_THREADS), REDUCE_THREADS, 0, device->stream>>>(
        partial, a->dweight, blocks, a->d);
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
    CUDA_WITH_TYPE(a->act, T, launch_backward<T>(device, a));
    return cuda_launched(device);
}
