/* optimizer.c: AdamW and the gradient norm over many slices at once. All slices are cut into blocks of BLOCK elements; a
 * block is a task. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum { BLOCK = 8192 };

typedef double vec_double __attribute__((vector_size(8 * VEC_LANES)));

static int64_t slice_blocks(const struct param_slice *slice)
{
    return (slice->count + BLOCK - 1) / BLOCK;
}

static int64_t count_blocks(const struct param_slice *slices, int32_t n_slices)
{
    int64_t count = 0;
    for (int32_t s = 0; s < n_slices; s++)
        count += slice_blocks(&slices[s]);
    return count;
}

/* The slice that block `index` of all lies in, and the elements [first, end) of it. */
static const struct param_slice *find_block(const struct param_slice *slices, int64_t index,
                                            int64_t *ret_first, int64_t *ret_end)
{
    const struct param_slice *slice = slices;
    for (; index >= slice_blocks(slice); slice++)
        index -= slice_blocks(slice);
    *ret_first = index * BLOCK;
    *ret_end = *ret_first + BLOCK < slice->count ? *ret_first + BLOCK : slice->count;
    return slice;
}

struct adamw_task {
    const struct adamw_args *args;
    float step_size;    /* lr / (1 - beta1^step) */
    float root_scale;   /* 1 / sqrt(1 - beta2^step) */
    float rest1, rest2; /* 1 - beta */
};

static void adamw_block(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct adamw_task *task = arg;
    const struct adamw_args *a = task->args;
    int64_t first, end;
    const struct param_slice *slice = find_block(a->slices, index, &first, &end);
    float shrink = slice->decay ? a->lr * a->weight_decay : 0.0f;
    for (int64_t i = first; i < end; i += VEC_LANES) {
        int64_t n = end - i < VEC_LANES ? end - i : VEC_LANES;
        vec g = vec_load_n(slice->grad + i, n) * a->grad_scale;
        vec m = vec_fma(vec_load_n(slice->m + i, n), vec_set1(a->beta1), g * task->rest1);
        vec v = vec_fma(vec_load_n(slice->v + i, n), vec_set1(a->beta2), g * g * task->rest2);
        vec p = vec_load_n(slice->param + i, n);
        vec root = vec_fma(vec_sqrt(v), vec_set1(task->root_scale), vec_set1(a->eps));
        vec move = vec_fma(p, vec_set1(shrink), task->step_size * (m / root));
        vec_store_n(slice->m + i, m, n);
        vec_store_n(slice->v + i, v, n);
        vec_store_n(slice->param + i, p - move, n);
    }
    if (!slice->keep_grad)
        memset(slice->grad + first, 0, (size_t)(end - first) * sizeof(float));
    if (slice->copy != NULL)
        CPU_NAME(cpu_convert)
    ((char *)slice->copy + first * (int64_t)kernel_type_size(slice->copy_type), slice->copy_type,
     slice->param + first, TYPE_F32, end - first);
}

int CPU_NAME(cpu_adamw)(struct kernel_device *device, const struct adamw_args *a)
{
    int status = check_adamw(a);
    if (status != KERNEL_OK)
        return status;
    double beta1 = (double)a->beta1, beta2 = (double)a->beta2;
    struct adamw_task task = {
        .args = a,
        .step_size = (float)((double)a->lr / (1.0 - pow(beta1, (double)a->step))),
        .root_scale = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)a->step))),
        .rest1 = (float)(1.0 - beta1),
        .rest2 = (float)(1.0 - beta2),
    };
    cpu_parallel(device, count_blocks(a->slices, a->n_slices), adamw_block, &task);
    return KERNEL_OK;
}

struct norm_task {
    const struct grad_norm_args *args;
    double *sums; /* one a block */
};

/* In double throughout: a gradient of 1e30 has a norm. */
static void norm_block(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct norm_task *task = arg;
    int64_t first, end;
    const struct param_slice *slice = find_block(task->args->slices, index, &first, &end);
    vec_double sums = {0};
    for (int64_t i = first; i < end; i += VEC_LANES) {
        int64_t n = end - i < VEC_LANES ? end - i : VEC_LANES;
        vec_double g = __builtin_convertvector(vec_load_n(slice->grad + i, n), vec_double);
        sums += g * g;
    }
    double sum = 0;
    for (int lane = 0; lane < VEC_LANES; lane++)
        sum += sums[lane];
    task->sums[index] = sum;
}

int CPU_NAME(cpu_grad_norm)(struct kernel_device *device, const struct grad_norm_args *a)
{
    if (a->n_slices < 0)
        return KERNEL_INVALID;
    int64_t blocks = count_blocks(a->slices, a->n_slices);
    int status = cpu_scratch_reserve(device, (size_t)blocks * sizeof(double));
    if (status != KERNEL_OK)
        return status;
    struct norm_task task = {.args = a, .sums = cpu_scratch(device, 0)};
    cpu_parallel(device, blocks, norm_block, &task);
    double sum = 0;
    for (int64_t i = 0; i < blocks; i++)
        sum += task.sums[i];
    *a->sum = sum;
    return KERNEL_OK;
}
