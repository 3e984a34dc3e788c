/* gemm.cu: matrix products through cuBLAS, which is column-major: row-major C = op(A) op(B) is C^T = op(B)^T op(A)^T
 * there. fp32 is fp32 throughout (no TF32); BF16 and F16 multiply exactly and add in fp32.
 *
 * cuBLAS wants A and B of one type. Where B's differs from the activations', B is converted a panel of columns of
 * op(B) at a time into the device's scratch, which stays small whatever the size of the weight. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 256, PANEL_ELEMENTS = 16 << 20, PANEL_ALIGNMENT = 64 };

static cudaDataType_t blas_type(enum kernel_type type)
{
    return type == TYPE_BF16 ? CUDA_R_16BF : type == TYPE_F16 ? CUDA_R_16F : CUDA_R_32F;
}

static int64_t at_least_one(int64_t stride)
{
    return stride > 0 ? stride : 1; /* of an empty matrix */
}

/* C[:, first .. first+n) with B already of the type of A; b points at that panel. */
static int multiply(struct kernel_device *device, const struct gemm_args *g, int64_t first, int64_t n,
                    const void *b, int64_t b_stride)
{
    cudaDataType_t type = blas_type(g->act);
    cublasComputeType_t compute =
        g->tf32 && g->act == TYPE_F32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    char *c = (char *)g->c + first * (int64_t)kernel_type_size(g->c_type);
    return cuda_check_blas(
        device, device->cublas->gemm_ex(device->blas, g->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                                        g->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, n, g->m, g->k, &g->alpha,
                                        b, type, at_least_one(b_stride), g->a, type,
                                        at_least_one(g->a_stride), &g->beta, c, blas_type(g->c_type),
                                        at_least_one(g->c_stride), compute, CUBLAS_GEMM_DEFAULT));
}

/* to[rows,columns], dense, from rows `stride` apart. */
template <typename To, typename From>
static __global__ void convert_kernel(To *__restrict__ to, const From *__restrict__ from, int64_t stride,
                                      int64_t rows, int64_t columns)
{
    int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (column >= columns)
        return;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
        to[row * columns + column] = from_float<To>(to_float(from[row * stride + column]));
}

static int convert_panel(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
                         enum kernel_type from_type, int64_t stride, int64_t rows, int64_t columns)
{
    dim3 grid((unsigned)divide_up(columns, THREADS), (unsigned)(rows < 4096 ? rows : 4096));
    CUDA_WITH_TYPE(to_type, To,
                   CUDA_WITH_TYPE(from_type, From,
                                  convert_kernel<<<grid, THREADS, 0, device->stream>>>(
                                      (To *)to, (const From *)from, stride, rows, columns)));
    return cuda_launched(device);
}

static int multiply_converted(struct kernel_device *device, const struct gemm_args *g)
{
    int64_t width = PANEL_ELEMENTS / at_least_one(g->k) / PANEL_ALIGNMENT * PANEL_ALIGNMENT;
    width = width < PANEL_ALIGNMENT ? (int64_t)PANEL_ALIGNMENT : width;
    width = width < g->n ? width : g->n;
    void *panel = NULL;
    int status = cuda_scratch(device, CUDA_SCRATCH_GEMM,
                              (size_t)(width * at_least_one(g->k)) * kernel_type_size(g->act), &panel);
    for (int64_t first = 0; first < g->n && status == KERNEL_OK; first += width) {
        int64_t n = g->n - first < width ? g->n - first : width;
        int64_t rows = g->transpose_b ? n : g->k, columns = g->transpose_b ? g->k : n;
        int64_t offset = g->transpose_b ? first * g->b_stride : first;
        const char *from = (const char *)g->b + offset * (int64_t)kernel_type_size(g->b_type);
        if (rows > 0 && columns > 0)
            status = convert_panel(device, panel, g->act, from, g->b_type, g->b_stride, rows, columns);
        if (status == KERNEL_OK)
            status = multiply(device, g, first, n, panel, columns);
    }
    return status;
}

int cuda_gemm(struct kernel_device *device, const struct gemm_args *g)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (g->m < 0 || g->n < 0 || g->k < 0 || g->a_stride < (g->transpose_a ? g->m : g->k) ||
        g->b_stride < (g->transpose_b ? g->k : g->n) || g->c_stride < g->n)
        return KERNEL_INVALID;
    if (!cuda_is_float(g->act) || !cuda_is_float(g->b_type) || (g->c_type != TYPE_F32 && g->c_type != g->act))
        return KERNEL_UNSUPPORTED;
    if (g->m == 0 || g->n == 0)
        return KERNEL_OK;
    if (g->act != g->b_type)
        return multiply_converted(device, g);
    return multiply(device, g, 0, g->n, g->b, g->b_stride);
}
