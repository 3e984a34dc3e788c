/* rmsnorm.c: RMSNorm with residual, forward and backward. Rows are independent, but for the weight's gradient, which
 * sums over them: in blocks of BLOCK_ROWS into the workspace, then over the blocks in order. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    BLOCK_ROWS = 64,
    BLOCK_COLUMNS = 64,
    TASK_ELEMENTS = 8192, /* a task shorter than a few microseconds is not worth sharing */
};

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

struct forward_task {
    const struct rmsnorm_forward_args *args;
    int64_t rows; /* of one task */
};

VEC_INLINE vec residual_sum(const float *x, const float *residual, int64_t i, int64_t n)
{
    if (residual == NULL)
        return vec_load_n(x + i, n);
    vec r = vec_load_n(residual + i, n);
    if (x != NULL)
        r += vec_load_n(x + i, n);
    return r;
}

static void forward_row(const struct rmsnorm_forward_args *a, int64_t row)
{
    int64_t d = a->d, whole = d / VEC_LANES * VEC_LANES;
    const float *x = a->x != NULL ? (const float *)a->x + row * d : NULL;
    const float *residual = a->residual != NULL ? a->residual + row * d : NULL;
    float *out = a->residual != NULL ? a->residual_out + row * d : NULL, *y = (float *)a->y + row * d;
    const float *r = out != NULL ? out : x;

    vec squares = vec_set1(0.0f);
    for (int64_t i = 0; i < whole; i += VEC_LANES) {
        vec v = residual_sum(x, residual, i, VEC_LANES);
        if (out != NULL)
            vec_store(out + i, v);
        squares = vec_fma(v, v, squares);
    }
    if (whole < d) {
        vec v = residual_sum(x, residual, whole, d - whole);
        if (out != NULL)
            vec_store_n(out + whole, v, d - whole);
        squares = vec_fma(v, v, squares);
    }
    float rstd = 1.0f / sqrtf(vec_sum(squares) / (float)d + a->eps);
    for (int64_t i = 0; i < whole; i += VEC_LANES)
        vec_store(y + i, vec_load(r + i) * rstd * vec_load(a->weight + i));
    if (whole < d) {
        vec v = vec_load_n(r + whole, d - whole) * rstd * vec_load_n(a->weight + whole, d - whole);
        vec_store_n(y + whole, v, d - whole);
    }
    if (a->kept != NULL)
        memcpy((float *)a->kept + row * d, r, (size_t)d * sizeof *r);
    if (a->rstd != NULL)
        a->rstd[row] = rstd;
}

static void forward_rows(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct forward_task *task = arg;
    int64_t end = (index + 1) * task->rows;
    if (end > task->args->rows)
        end = task->args->rows;
    for (int64_t row = index * task->rows; row < end; row++)
        forward_row(task->args, row);
}

int CPU_NAME(cpu_rmsnorm_forward)(struct kernel_device *device, const struct rmsnorm_forward_args *a)
{
    int status = check_rmsnorm_forward(a);
    if (status != KERNEL_OK)
        return status;
    struct forward_task task = {.args = a, .rows = divide_up(TASK_ELEMENTS, a->d)};
    cpu_parallel(device, divide_up(a->rows, task.rows), forward_rows, &task);
    return KERNEL_OK;
}

int64_t CPU_NAME(cpu_rmsnorm_backward_workspace)(int64_t rows, int64_t d)
{
    return divide_up(rows, BLOCK_ROWS) * d * (int64_t)sizeof(float);
}

/* g = dy weight for n lanes. */
VEC_INLINE vec weighted(const struct rmsnorm_backward_args *a, const float *dy, int64_t i, int64_t n)
{
    return vec_load_n(dy + i, n) * vec_load_n(a->weight + i, n);
}

/* With h = r rstd and g = dy weight:  dr = rstd (g - h mean(g h)),  dweight = sum over rows of dy h.
 * partial: [d], sums of this block so far, or NULL. */
static void backward_row(const struct rmsnorm_backward_args *a, int64_t row, float *partial)
{
    int64_t d = a->d;
    const float *dy = (const float *)a->dy + row * d, *r = (const float *)a->r + row * d;
    float *dresidual = a->dresidual + row * d, rstd = a->rstd[row];

    vec sum = vec_set1(0.0f);
    for (int64_t i = 0; i < d; i += VEC_LANES) {
        int64_t n = d - i < VEC_LANES ? d - i : VEC_LANES;
        sum = vec_fma(weighted(a, dy, i, n), vec_load_n(r + i, n), sum);
    }
    float scale = vec_sum(sum) / (float)d * rstd * rstd; /* mean(g h) rstd */
    for (int64_t i = 0; i < d; i += VEC_LANES) {
        int64_t n = d - i < VEC_LANES ? d - i : VEC_LANES;
        vec dr = rstd * vec_fnma(vec_load_n(r + i, n), vec_set1(scale), weighted(a, dy, i, n));
        vec_store_n(dresidual + i, vec_load_n(dresidual + i, n) + dr, n);
        if (partial != NULL) {
            vec h = vec_load_n(r + i, n) * rstd;
            vec_store_n(partial + i, vec_fma(vec_load_n(dy + i, n), h, vec_load_n(partial + i, n)), n);
        }
    }
    if (a->dx != NULL)
        memcpy((float *)a->dx + row * d, dresidual, (size_t)d * sizeof *dresidual);
}

static void backward_rows(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct rmsnorm_backward_args *a = arg;
    float *partial = NULL;
    if (a->dweight != NULL) {
        partial = (float *)a->workspace + index * a->d;
        memset(partial, 0, (size_t)a->d * sizeof(*partial));
    }
    int64_t end = (index + 1) * BLOCK_ROWS < a->rows ? (index + 1) * BLOCK_ROWS : a->rows;
    for (int64_t row = index * BLOCK_ROWS; row < end; row++)
        backward_row(a, row, partial);
}

static void reduce_columns(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct rmsnorm_backward_args *a = arg;
    int64_t end = (index + 1) * BLOCK_COLUMNS < a->d ? (index + 1) * BLOCK_COLUMNS : a->d;
    for (int64_t i = index * BLOCK_COLUMNS; i < end; i += VEC_LANES) {
        int64_t n = end - i < VEC_LANES ? end - i : VEC_LANES;
        vec sum = vec_set1(0.0f);
        for (int64_t block = 0; block < divide_up(a->rows, BLOCK_ROWS); block++)
            sum += vec_load_n((const float *)a->workspace + block * a->d + i, n);
        vec_store_n(a->dweight + i, vec_load_n(a->dweight + i, n) + sum, n);
    }
}

int CPU_NAME(cpu_rmsnorm_backward)(struct kernel_device *device, const struct rmsnorm_backward_args *a)
{
    int status = check_rmsnorm_backward(a);
    if (status != KERNEL_OK)
        return status;
    struct rmsnorm_backward_args args = *a;
    cpu_parallel(device, divide_up(a->rows, BLOCK_ROWS), backward_rows, &args);
    if (a->dweight != NULL)
        cpu_parallel(device, divide_up(a->d, BLOCK_COLUMNS), reduce_columns, &args);
    return KERNEL_OK;
}
