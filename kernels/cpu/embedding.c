/* embedding.c: rows of the token table, with the adapter's low-rank path. In the backward, tokens go by in blocks of
 * BLOCK_TOKENS; within one, each output column belongs to one task, which adds tokens in order. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    TASK_TOKENS = 16,
    BLOCK_TOKENS = 256,
    BLOCK_COLUMNS = 4 * VEC_LANES,
    RANKS_AT_ONCE = 8, /* accumulators that fit the registers */
};

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* to[r, i] = from[i, r]: the adapter's B with d_model along the vectors. */
static void transpose(float *to, const float *from, int64_t d_model, int64_t rank)
{
    for (int64_t i = 0; i < d_model; i++)
        for (int64_t r = 0; r < rank; r++)
            to[r * d_model + i] = from[i * rank + r];
}

/* ---- forward ---- */

struct forward_task {
    const struct embedding_forward_args *args;
    const float *b; /* [rank, d_model], or NULL without an adapter */
};

VEC_INLINE void forward_token(const struct forward_task *task, int64_t token, enum kernel_type type)
{
    const struct embedding_forward_args *a = task->args;
    int64_t id = a->ids[token];
    const char *row = (const char *)a->table + id * a->d_model * storage_bytes(type);
    float *y = (float *)a->y + token * a->d_model;
    for (int64_t i = 0; i < a->d_model; i += VEC_LANES) {
        int64_t n = smaller(a->d_model - i, VEC_LANES);
        vec v = vec_load_as_n(row + i * storage_bytes(type), type, n);
        vec sum = vec_set1(0.0f);
        for (int64_t r = 0; task->b != NULL && r < a->rank; r++)
            sum = vec_fma(vec_load_n(task->b + r * a->d_model + i, n), vec_set1(a->lora_a[r * a->vocab + id]),
                          sum);
        vec_store_n(y + i, vec_fma(sum, vec_set1(a->scale), v), n);
    }
}

static void forward_tokens(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct forward_task *task = arg;
    int64_t end = smaller((index + 1) * TASK_TOKENS, task->args->tokens);
    for (int64_t t = index * TASK_TOKENS; t < end; t++) {
        if (task->args->table_type == TYPE_BF16)
            forward_token(task, t, TYPE_BF16);
        else if (task->args->table_type == TYPE_F16)
            forward_token(task, t, TYPE_F16);
        else
            forward_token(task, t, TYPE_F32);
    }
}

int CPU_NAME(cpu_embedding_forward)(struct kernel_device *device, const struct embedding_forward_args *a)
{
    int status = check_embedding_forward(a);
    if (status == KERNEL_OK && a->lora_a != NULL)
        status = cpu_scratch_reserve(device, (size_t)(a->rank * a->d_model) * sizeof(float));
    if (status != KERNEL_OK)
        return status;
    struct forward_task task = {.args = a};
    if (a->lora_a != NULL) {
        transpose(cpu_scratch(device, 0), a->lora_b, a->d_model, a->rank);
        task.b = cpu_scratch(device, 0);
    }
    cpu_parallel(device, divide_up(a->tokens, TASK_TOKENS), forward_tokens, &task);
    return KERNEL_OK;
}

/* ---- backward ---- */

struct backward_task {
    const struct embedding_backward_args *args;
    int64_t first, count; /* the block of tokens */
    float *b;             /* [rank, d_model] */
    float *a_columns;     /* [BLOCK_TOKENS, rank]: scale A[:, id] */
    float *du;            /* [BLOCK_TOKENS, rank]: scale dy B */
};

/* What the block's tokens need of the adapter. */
static void backward_tokens(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct backward_task *task = arg;
    const struct embedding_backward_args *a = task->args;
    int64_t end = smaller((index + 1) * TASK_TOKENS, task->count);
    for (int64_t t = index * TASK_TOKENS; t < end; t++) {
        const float *dy = (const float *)a->dy + (task->first + t) * a->d_model;
        for (int64_t r = 0; r < a->rank; r++) {
            vec sum = vec_set1(0.0f);
            for (int64_t i = 0; i < a->d_model; i += VEC_LANES) {
                int64_t n = smaller(a->d_model - i, VEC_LANES);
                sum = vec_fma(vec_load_n(dy + i, n), vec_load_n(task->b + r * a->d_model + i, n), sum);
            }
            task->du[t * a->rank + r] = a->scale * vec_sum(sum);
            task->a_columns[t * a->rank + r] = a->scale * a->lora_a[r * a->vocab + a->ids[task->first + t]];
        }
    }
}

/* Columns i .. i+n-1 of dB, some ranks at a time. */
static void add_db(const struct backward_task *task, int64_t i, int64_t n)
{
    const struct embedding_backward_args *a = task->args;
    const float *dy = (const float *)a->dy + task->first * a->d_model + i;
    for (int64_t first = 0; first < a->rank; first += RANKS_AT_ONCE) {
        int64_t ranks = smaller(a->rank - first, RANKS_AT_ONCE);
        vec sums[RANKS_AT_ONCE];
        for (int64_t r = 0; r < RANKS_AT_ONCE; r++)
            sums[r] = vec_set1(0.0f);
        for (int64_t t = 0; t < task->count; t++) {
            vec v = vec_load_n(dy + t * a->d_model, n);
            for (int64_t r = 0; r < ranks; r++)
                sums[r] = vec_fma(v, vec_set1(task->a_columns[t * a->rank + first + r]), sums[r]);
        }
        for (int64_t j = 0; j < n; j++)
            for (int64_t r = 0; r < ranks; r++)
                a->db[(i + j) * a->rank + first + r] += sums[r][j];
    }
}

static void backward_columns(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct backward_task *task = arg;
    const struct embedding_backward_args *a = task->args;
    int64_t first = index * BLOCK_COLUMNS, end = smaller(first + BLOCK_COLUMNS, a->d_model);
    for (int64_t t = 0; a->dtable != NULL && t < task->count; t++) {
        const float *dy = (const float *)a->dy + (task->first + t) * a->d_model;
        float *row = a->dtable + a->ids[task->first + t] * a->d_model;
        for (int64_t i = first; i < end; i += VEC_LANES) {
            int64_t n = smaller(end - i, VEC_LANES);
            vec_store_n(row + i, vec_load_n(row + i, n) + vec_load_n(dy + i, n), n);
        }
    }
    for (int64_t i = first; a->db != NULL && i < end; i += VEC_LANES)
        add_db(task, i, smaller(end - i, VEC_LANES));
}

/* One row of dA. */
static void backward_rank(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct backward_task *task = arg;
    const struct embedding_backward_args *a = task->args;
    float *row = a->da + index * a->vocab;
    for (int64_t t = 0; t < task->count; t++)
        row[a->ids[task->first + t]] += task->du[t * a->rank + index];
}

int CPU_NAME(cpu_embedding_backward)(struct kernel_device *device, const struct embedding_backward_args *a)
{
    int status = check_embedding_backward(a);
    bool lora = a->da != NULL || a->db != NULL;
    int64_t floats = lora ? a->rank * (a->d_model + 2 * BLOCK_TOKENS) : 0;
    if (status == KERNEL_OK)
        status = cpu_scratch_reserve(device, (size_t)floats * sizeof(float));
    if (status != KERNEL_OK)
        return status;
    struct backward_task task = {.args = a};
    if (lora) {
        task.b = cpu_scratch(device, 0);
        task.a_columns = task.b + a->rank * a->d_model;
        task.du = task.a_columns + a->rank * BLOCK_TOKENS;
        transpose(task.b, a->lora_b, a->d_model, a->rank);
    }
    for (; task.first < a->tokens; task.first += BLOCK_TOKENS) {
        task.count = smaller(a->tokens - task.first, BLOCK_TOKENS);
        if (lora)
            cpu_parallel(device, divide_up(task.count, TASK_TOKENS), backward_tokens, &task);
        if (a->dtable != NULL || a->db != NULL)
            cpu_parallel(device, divide_up(a->d_model, BLOCK_COLUMNS), backward_columns, &task);
        if (a->da != NULL)
            cpu_parallel(device, a->rank, backward_rank, &task);
    }
    return KERNEL_OK;
}
