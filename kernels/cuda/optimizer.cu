/* optimizer.cu: AdamW and the gradient norm over many slices in one launch. All slices are cut into blocks of BLOCK
 * elements; a thread block finds its slice among the first blocks of all, which travel with the slices. */
#include "kernels/cuda/common.cuh"

#include <math.h>
#include <stdlib.h>

enum { THREADS = 256, BLOCK = 4096 };

/* Slices and the number of the first block of each, n_slices + 1 of them, on the device. */
struct slice_list {
    const struct param_slice *slices;
    const int64_t *first_block;
    int32_t n_slices;
    int64_t blocks;
};

static int stage_slices(struct kernel_device *device, const struct param_slice *slices, int32_t n_slices,
                        struct slice_list *ret_list)
{
    struct slice_list list = {};
    list.n_slices = n_slices;
    int64_t *first_block = (int64_t *)malloc(((size_t)n_slices + 1) * sizeof(*first_block));
    if (first_block == NULL)
        return KERNEL_NO_MEMORY;
    for (int32_t s = 0; s < n_slices; s++) {
        first_block[s] = list.blocks;
        list.blocks += divide_up(slices[s].count, BLOCK);
    }
    first_block[n_slices] = list.blocks;
    int status = cuda_stage_array(device, slices, n_slices, &list.slices);
    if (status == KERNEL_OK)
        status = cuda_stage_array(device, first_block, (int64_t)n_slices + 1, &list.first_block);
    free(first_block);
    if (status == KERNEL_OK && list.blocks > INT32_MAX)
        status = KERNEL_UNSUPPORTED;
    if (status == KERNEL_OK)
        *ret_list = list;
    return status;
}

/* The slice of this thread block and the elements [first, end) of it. */
static __device__ struct param_slice find_block(const struct slice_list &list, int64_t *ret_first,
                                                int64_t *ret_end)
{
    int32_t low = 0, high = list.n_slices; /* first_block[low] <= block < first_block[high] */
    while (high - low > 1) {
        int32_t middle = (low + high) / 2;
        if (list.first_block[middle] <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    struct param_slice slice = list.slices[low];
    *ret_first = (blockIdx.x - list.first_block[low]) * BLOCK;
    *ret_end = *ret_first + BLOCK < slice.count ? *ret_first + BLOCK : slice.count;
    return slice;
}

struct adamw_factors {
    float grad_scale, beta1, beta2, rest1, rest2; /* rest = 1 - beta */
    float eps, shrink;                            /* shrink = lr weight_decay */
    float step_size;                              /* lr / (1 - beta1^step) */
    float root_scale;                             /* 1 / sqrt(1 - beta2^step) */
};

static __device__ __forceinline__ void adamw_element(const struct adamw_factors &f, float shrink, float &p,
                                                     float &m, float &v, float g)
{
    g *= f.grad_scale;
    m = fmaf(m, f.beta1, g * f.rest1);
    v = fmaf(v, f.beta2, g * g * f.rest2);
    float root = fmaf(sqrtf(v), f.root_scale, f.eps);
    p -= fmaf(p, shrink, f.step_size * (m / root));
}

static __device__ __forceinline__ bool aligned16(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

/* N consecutive parameters in the type of the copy; N > 1 where it is aligned. */
template <int N>
static __device__ __forceinline__ void store_copy(const struct param_slice &slice, int64_t at,
                                                  const float (&p)[N])
{
    if (slice.copy == NULL)
        return;
    if (slice.copy_type == TYPE_F32) {
        store_pack((float *)slice.copy + at, p);
        return;
    }
    uint16_t halves[N];
#pragma unroll
    for (int j = 0; j < N; j++)
        halves[j] = slice.copy_type == TYPE_BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(p[j]))
                                                 : __half_as_ushort(__float2half_rn(p[j]));
    uint16_t *to = (uint16_t *)slice.copy + at;
    if constexpr (N == 4)
        *reinterpret_cast<ushort4 *>(to) = make_ushort4(halves[0], halves[1], halves[2], halves[3]);
    else
        to[0] = halves[0];
}

static __global__ void adamw_kernel(struct slice_list list, struct adamw_factors f)
{
    int64_t first, end;
    struct param_slice slice = find_block(list, &first, &end);
    float shrink = slice.decay ? f.shrink : 0.0f;
    int64_t i = first + threadIdx.x;
    if (aligned16(slice.param) && aligned16(slice.m) && aligned16(slice.v) && aligned16(slice.grad) &&
        aligned16(slice.copy)) {
        int64_t whole = first + (end - first) / 4 * 4;
        for (int64_t at = first + (int64_t)threadIdx.x * 4; at < whole; at += THREADS * 4) {
            float p[4], m[4], v[4], g[4];
            load_pack(slice.param + at, p);
            load_pack(slice.m + at, m);
            load_pack(slice.v + at, v);
            load_pack(slice.grad + at, g);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                adamw_element(f, shrink, p[j], m[j], v[j], g[j]);
                g[j] = 0.0f;
            }
            store_pack(slice.param + at, p);
            store_copy(slice, at, p);
            store_pack(slice.m + at, m);
            store_pack(slice.v + at, v);
            if (!slice.keep_grad)
                store_pack(slice.grad + at, g);
        }
        i = whole + threadIdx.x;
    }
    for (; i < end; i += THREADS) {
        adamw_element(f, shrink, slice.param[i], slice.m[i], slice.v[i], slice.grad[i]);
        if (!slice.keep_grad)
            slice.grad[i] = 0.0f;
        float p[1] = {slice.param[i]};
        store_copy(slice, i, p);
    }
}

int cuda_adamw(struct kernel_device *device, const struct adamw_args *a)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (a->n_slices < 0 || a->step < 1)
        return KERNEL_INVALID;
    for (int32_t s = 0; s < a->n_slices; s++)
        if (a->slices[s].copy != NULL && !cuda_is_float(a->slices[s].copy_type))
            return KERNEL_UNSUPPORTED;
    struct slice_list list;
    status = stage_slices(device, a->slices, a->n_slices, &list);
    if (status != KERNEL_OK || list.blocks == 0)
        return status;
    double beta1 = (double)a->beta1, beta2 = (double)a->beta2;
    struct adamw_factors f = {};
    f.grad_scale = a->grad_scale;
    f.beta1 = a->beta1;
    f.beta2 = a->beta2;
    f.rest1 = (float)(1.0 - beta1);
    f.rest2 = (float)(1.0 - beta2);
    f.eps = a->eps;
    f.shrink = a->lr * a->weight_decay;
    f.step_size = (float)((double)a->lr / (1.0 - pow(beta1, (double)a->step)));
    f.root_scale = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)a->step)));
    adamw_kernel<<<(unsigned)list.blocks, THREADS, 0, device->stream>>>(list, f);
    return cuda_launched(device);
}

/* ---- gradient norm, in double throughout: a gradient of 1e30 has a norm ---- */

static __global__ void norm_kernel(struct slice_list list, double *__restrict__ sums)
{
    int64_t first, end;
    struct param_slice slice = find_block(list, &first, &end);
    double sum = 0;
    for (int64_t i = first + threadIdx.x; i < end; i += THREADS)
        sum += (double)slice.grad[i] * (double)slice.grad[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0)
        sums[blockIdx.x] = sum;
}

static __global__ void total_kernel(const double *__restrict__ sums, int64_t count,
                                    double *__restrict__ ret_sum)
{
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += THREADS)
        sum += sums[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0)
        *ret_sum = sum;
}

int cuda_grad_norm(struct kernel_device *device, const struct grad_norm_args *a)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (a->n_slices < 0)
        return KERNEL_INVALID;
    struct slice_list list;
    status = stage_slices(device, a->slices, a->n_slices, &list);
    if (status != KERNEL_OK)
        return status;
    if (list.blocks == 0)
        return cuda_zero(device, a->sum, sizeof(*a->sum));
    void *sums = NULL;
    status = cuda_scratch(device, CUDA_SCRATCH_OP, (size_t)list.blocks * sizeof(double), &sums);
    if (status != KERNEL_OK)
        return status;
    norm_kernel<<<(unsigned)list.blocks, THREADS, 0, device->stream>>>(list, (double *)sums);
    total_kernel<<<1, THREADS, 0, device->stream>>>((const double *)sums, list.blocks, a->sum);
    return cuda_launched(device);
}
