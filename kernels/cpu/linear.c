/* linear.c: a linear layer with its bias, its adapter and its gradients, composed of this backend's products and its
 * low-rank path. Called by the thread that owns the device; the work runs on its pool. */
#include "kernels/cpu/linear.h"

#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum { TASK_ELEMENTS = 8192, BLOCK_COLUMNS = 64 };

static int64_t at_most(int64_t a, int64_t limit)
{
    return a < limit ? a : limit;
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

int64_t CPU_NAME(cpu_linear_workspace)(int64_t rows, int64_t in, int64_t out, int64_t rank)
{
    (void)in;
    (void)out;
    return linear_du_bytes(rows, rank);
}

/* ---- bias ---- */

struct bias_task {
    const struct linear_forward_args *args;
    int64_t rows; /* of one task */
};

static void bias_task(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct bias_task *task = arg;
    const struct linear_forward_args *f = task->args;
    int64_t row = index * task->rows, end = at_most(row + task->rows, f->rows);
    for (; row < end; row++)
        memcpy((float *)f->y + row * f->y_stride, f->layer.bias, (size_t)f->layer.out * sizeof(float));
}

/* dbias += the sum of dy's rows, in order. */
static void dbias_task(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct linear_backward_args *b = arg;
    int64_t end = at_most((index + 1) * BLOCK_COLUMNS, b->layer.out);
    for (int64_t c = index * BLOCK_COLUMNS; c < end; c += VEC_LANES) {
        int64_t n = at_most(end - c, VEC_LANES);
        vec sum = vec_set1(0);
        for (int64_t row = 0; row < b->rows; row++)
            sum += vec_load_n((const float *)b->dy + row * b->dy_stride + c, n);
        vec_store_n(b->dbias + c, vec_load_n(b->dbias + c, n) + sum, n);
    }
}

/* ---- the ops ---- */

int CPU_NAME(cpu_linear_forward)(struct kernel_device *device, const struct linear_forward_args *f)
{
    const struct linear_layer *layer = &f->layer;
    int status = check_linear_forward(f);
    if (status != KERNEL_OK || f->rows == 0)
        return status;
    if (layer->bias != NULL && layer->out > 0) {
        struct bias_task task = {f, divide_up(TASK_ELEMENTS, layer->out)};
        cpu_parallel(device, divide_up(f->rows, task.rows), bias_task, &task);
    }
    struct gemm_args product = linear_forward_product(f, layer->bias != NULL ? 1.0f : 0.0f);
    status = CPU_NAME(cpu_gemm)(device, &product);
    if (status != KERNEL_OK || layer->rank == 0)
        return status;
    struct lora_forward_args lora = linear_forward_lora(f);
    return CPU_NAME(cpu_lora_forward)(device, &lora);
}

int CPU_NAME(cpu_linear_backward)(struct kernel_device *device, const struct linear_backward_args *b)
{
    int status = check_linear_backward(b);
    if (status == KERNEL_OK && b->dweight != NULL) {
        struct gemm_args product = linear_dweight_product(b);
        status = CPU_NAME(cpu_gemm)(device, &product);
    }
    if (b->rows == 0)
        return status;
    if (status == KERNEL_OK && b->dbias != NULL)
        cpu_parallel(device, divide_up(b->layer.out, BLOCK_COLUMNS), dbias_task, (void *)(uintptr_t)b);
    if (status == KERNEL_OK && b->dx != NULL) {
        struct gemm_args product = linear_dx_product(b, b->accumulate ? 1.0f : 0.0f);
        status = CPU_NAME(cpu_gemm)(device, &product);
    }
    if (status != KERNEL_OK || b->layer.rank == 0 || (b->dx == NULL && b->da == NULL && b->db == NULL))
        return status;
    struct lora_backward_args lora = linear_backward_lora(b);
    return CPU_NAME(cpu_lora_backward)(device, &lora);
}
