/* head.c: the output layer and its loss. Called by the thread that owns the device; the work runs on its pool.
 *
 * Rows go through in chunks whose logits stay in the last-level cache. Rows that nothing is wanted of (ignored
 * targets, when neither argmax nor top ids are asked for: the prompts in training) are left out, so a chunk is
 * a gathered set of rows. For each: logits by one product, then each row's scores, which leave the gradient of
 * the logits in their place, then the products for d_hidden and d_weight. */
#include <string.h>

#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    CHUNK_ROWS = 256,
    CHUNK_ROWS_LEAST = 64,
    CHUNK_BYTES = 8 << 20, /* of logits, wanted */
};

static int64_t chunk_rows(int64_t rows, int64_t vocab)
{
    int64_t chunk = CHUNK_BYTES / (vocab * (int64_t)sizeof(float));
    if (chunk < CHUNK_ROWS_LEAST)
        chunk = CHUNK_ROWS_LEAST;
    if (chunk > CHUNK_ROWS)
        chunk = CHUNK_ROWS;
    return rows < chunk ? rows : chunk;
}

struct chunk {
    const struct head_args *args;
    int64_t count;    /* rows in it */
    float *logits;    /* [count,vocab], then their gradient */
    float *hidden;    /* [count,d_model], gathered */
    float *d_hidden;  /* [count,d_model], to be scattered */
    int64_t *sources; /* [count]: row of the caller */
    float *logprobs;  /* [count]: of the target; 0 when ignored */
    int32_t *argmax;  /* [count] */
};

int64_t CPU_NAME(cpu_head_workspace)(int64_t rows, int64_t d_model, int64_t vocab, bool backward)
{
    int64_t row_floats = vocab + d_model * (backward ? 2 : 1);
    int64_t scores = (int64_t)(sizeof(int64_t) + sizeof(float) + sizeof(int32_t));
    return chunk_rows(rows, vocab) * (row_floats * (int64_t)sizeof(float) + scores);
}

static void chunk_carve(struct chunk *k)
{
    const struct head_args *g = k->args;
    int64_t rows = chunk_rows(g->rows, g->vocab);
    k->sources = g->workspace;
    k->logprobs = (float *)(void *)(k->sources + rows);
    k->argmax = (int32_t *)(void *)(k->logprobs + rows);
    k->logits = (float *)(void *)(k->argmax + rows);
    k->hidden = k->logits + rows * g->vocab;
    k->d_hidden = k->hidden + rows * g->d_model;
}

/* ---- one row ---- */

static float row_max(const float *logits, int64_t vocab)
{
    vec most = vec_set1(-INFINITY);
    int64_t j = 0;
    for (; j + VEC_LANES <= vocab; j += VEC_LANES)
        most = vec_max(vec_load(logits + j), most);
    float max = vec_largest(most);
    for (; j < vocab; j++)
        max = logits[j] > max ? logits[j] : max;
    return max;
}

/* Puts exp(logit - max) in the logits' place and returns the sum. */
static float row_exp(float *logits, int64_t vocab, float max)
{
    vec sum[4] = {0};
    int64_t j = 0, lane = 0;
    for (; j + VEC_LANES <= vocab; j += VEC_LANES, lane = (lane + 1) % 4) {
        vec e = vec_exp(vec_load(logits + j) - max);
        vec_store(logits + j, e);
        sum[lane] += e;
    }
    if (j < vocab) {
        vec e = vec_exp(vec_load_n(logits + j, vocab - j) - max);
        vec_store_n(logits + j, e, vocab - j);
        for (int64_t i = vocab - j; i < VEC_LANES; i++)
            e[i] = 0.0f;
        sum[lane] += e;
    }
    return vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* The first id with the largest logit; 0 when all are NaN. */
static int32_t row_find(const float *logits, int64_t vocab, float max)
{
    int64_t j = 0;
    for (; j + VEC_LANES <= vocab; j += VEC_LANES) {
        uint32_t bits = vec_equal_bits(vec_load(logits + j), vec_set1(max));
        if (bits != 0)
            return (int32_t)j + __builtin_ctz(bits);
    }
    for (; j < vocab; j++)
        if (logits[j] == max)
            return (int32_t)j;
    return 0;
}

struct top {
    int32_t count, wanted;
    int32_t ids[KERNEL_TOP_MAX];
    float logits[KERNEL_TOP_MAX];
};

/* Keeps the list in descending order; an equal logit goes behind those already there. */
static void top_offer(struct top *top, int32_t id, float logit)
{
    if (top->count == top->wanted && !(logit > top->logits[top->count - 1]))
        return;
    int32_t at = top->count < top->wanted ? top->count++ : top->count - 1;
    for (; at > 0 && !(top->logits[at - 1] >= logit); at--) {
        top->ids[at] = top->ids[at - 1];
        top->logits[at] = top->logits[at - 1];
    }
    top->ids[at] = id;
    top->logits[at] = logit;
}

static void row_top(const float *logits, int64_t vocab, struct top *top)
{
    int64_t j = 0;
    for (; j < vocab && top->count < top->wanted; j++)
        top_offer(top, (int32_t)j, logits[j]);
    for (; j + VEC_LANES <= vocab; j += VEC_LANES) {
        uint32_t bits = vec_greater_bits(vec_load(logits + j), vec_set1(top->logits[top->wanted - 1]));
        for (; bits != 0; bits &= bits - 1) {
            int64_t id = j + __builtin_ctz(bits);
            top_offer(top, (int32_t)id, logits[id]);
        }
    }
    for (; j < vocab; j++)
        top_offer(top, (int32_t)j, logits[j]);
}

static void row_task(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct chunk *k = arg;
    const struct head_args *g = k->args;
    int64_t row = k->sources[index];
    float *logits = k->logits + index * g->vocab;
    int32_t target = g->targets[row];
    bool gradient = g->d_hidden != NULL || g->d_weight != NULL;
    struct top top = {.wanted = g->top_ids != NULL ? g->n_top : 0};

    float max = row_max(logits, g->vocab);
    if (g->argmax != NULL || g->n_correct != NULL)
        k->argmax[index] = row_find(logits, g->vocab, max);
    if (target < 0) {
        k->logprobs[index] = 0.0f;
        if (gradient)
            memset(logits, 0, (size_t)g->vocab * sizeof(float));
        return;
    }
    if (top.wanted > 0)
        row_top(logits, g->vocab, &top);
    float target_logit = logits[target];
    float sum = row_exp(logits, g->vocab, max), log_sum = logf(sum);
    k->logprobs[index] = (target_logit - max) - log_sum;
    for (int32_t i = 0; i < top.count; i++) {
        g->top_ids[row * g->n_top + i] = top.ids[i];
        g->top_logprobs[row * g->n_top + i] = (top.logits[i] - max) - log_sum;
    }
    if (gradient) {
        float scale = g->grad_scale / sum;
        int64_t j = 0;
        for (; j + VEC_LANES <= g->vocab; j += VEC_LANES)
            vec_store(logits + j, vec_load(logits + j) * scale);
        for (; j < g->vocab; j++)
            logits[j] *= scale;
        logits[target] -= g->grad_scale;
    }
}

/* What the rows of a chunk came to, in order. */
static void chunk_scores(const struct chunk *k)
{
    const struct head_args *g = k->args;
    for (int64_t i = 0; i < k->count; i++) {
        int64_t row = k->sources[i];
        if (g->logprobs != NULL)
            g->logprobs[row] = k->logprobs[i];
        if (g->loss_sum != NULL)
            *g->loss_sum -= (double)k->logprobs[i];
        if (g->argmax != NULL)
            g->argmax[row] = k->argmax[i];
        if (g->n_correct != NULL)
            *g->n_correct += k->argmax[i] == g->targets[row];
    }
}

/* ---- chunks ---- */

static int chunk_run(struct kernel_device *device, struct chunk *k)
{
    const struct head_args *g = k->args;
    struct gemm_args logits = {
        .m = k->count, .n = g->vocab, .k = g->d_model, .transpose_b = true, .alpha = 1.0f};
    logits.a = k->hidden, logits.a_stride = g->d_model;
    logits.b = g->weight, logits.b_stride = g->d_model, logits.b_type = g->weight_type;
    logits.c = k->logits, logits.c_stride = g->vocab;
    int status = CPU_NAME(cpu_gemm)(device, &logits);
    if (status != KERNEL_OK)
        return status;
    cpu_parallel(device, k->count, row_task, k);
    chunk_scores(k);

    if (g->d_hidden != NULL) {
        struct gemm_args back = {.m = k->count, .n = g->d_model, .k = g->vocab, .alpha = 1.0f};
        back.a = k->logits, back.a_stride = g->vocab;
        back.b = g->weight, back.b_stride = g->d_model, back.b_type = g->weight_type;
        back.c = k->d_hidden, back.c_stride = g->d_model;
        status = CPU_NAME(cpu_gemm)(device, &back);
        for (int64_t i = 0; status == KERNEL_OK && i < k->count; i++)
            memcpy((float *)g->d_hidden + k->sources[i] * g->d_model, k->d_hidden + i * g->d_model,
                   (size_t)g->d_model * sizeof(float));
    }
    if (g->d_weight != NULL && status == KERNEL_OK) {
        struct gemm_args sum = {.m = g->vocab, .n = g->d_model, .k = k->count, .transpose_a = true};
        sum.alpha = sum.beta = 1.0f;
        sum.a = k->logits, sum.a_stride = g->vocab;
        sum.b = k->hidden, sum.b_stride = g->d_model;
        sum.c = g->d_weight, sum.c_stride = g->d_model;
        status = CPU_NAME(cpu_gemm)(device, &sum);
    }
    return status;
}

/* Outputs of a row that is ignored. */
static void clear_outputs(const struct head_args *g, int64_t row)
{
    if (g->logprobs != NULL)
        g->logprobs[row] = 0.0f;
    for (int32_t i = 0; g->top_ids != NULL && i < g->n_top; i++) {
        g->top_ids[row * g->n_top + i] = 0;
        g->top_logprobs[row * g->n_top + i] = 0.0f;
    }
    if (g->d_hidden != NULL)
        memset((float *)g->d_hidden + row * g->d_model, 0, (size_t)g->d_model * sizeof(float));
}

int CPU_NAME(cpu_head)(struct kernel_device *device, const struct head_args *g)
{
    bool backward = g->d_hidden != NULL || g->d_weight != NULL;
    int status = check_head(g, CPU_NAME(cpu_head_workspace)(g->rows, g->d_model, g->vocab, backward));
    if (status != KERNEL_OK)
        return status;
    for (int64_t row = 0; row < g->rows; row++)
        if (g->targets[row] >= g->vocab)
            return KERNEL_INVALID;
    struct chunk k = {.args = g};
    int64_t limit = chunk_rows(g->rows, g->vocab);
    chunk_carve(&k);
    for (int64_t row = 0; row < g->rows && status == KERNEL_OK; row++) {
        if (g->targets[row] < 0)
            clear_outputs(g, row);
        if (g->targets[row] >= 0 || g->argmax != NULL) {
            memcpy(k.hidden + k.count * g->d_model, (const float *)g->hidden + row * g->d_model,
                   (size_t)g->d_model * sizeof(float));
            k.sources[k.count++] = row;
        }
        if (k.count == limit || (row == g->rows - 1 && k.count > 0)) {
            status = chunk_run(device, &k);
            k.count = 0;
        }
    }
    return status;
}
