/* test_step.c: mamba_step against the same step composed of the CPU's ops in fp32, from embeddings to logits, over
 * several steps: the first is launched kernel by kernel, the others are a graph. On CUDA alone. */
#include "tests/kernels/harness.h"

#include <stdio.h>

enum { STATE = 16, WIDTH = 4, LAYERS = 2, STEPS = 3, ADAPTERS = 3, SPARE_SLOTS = 3, ROWS_MOST = 256 };

/* Activations are rounded to bf16 five times a layer; the states and the residual stream are fp32. */
#define STEP_ERROR 1e-4

static const struct kernel_ops *cuda;
static struct kernel_device *device, *cpu;

struct shape {
    int64_t d, c, r, vocab;
    bool biases;
};

/* One array on both sides. */
struct both {
    void *host, *there;
    size_t bytes;
};

struct step_model {
    struct shape shape;
    struct both arrays[LAYERS * 20 + ADAPTERS * (LAYERS * 8 + 2) + 16];
    int n_arrays;
    uint64_t random;
    struct mamba_step_layer layers[LAYERS], there[LAYERS];
    struct mamba_step_lora lora[ADAPTERS][LAYERS], lora_there[ADAPTERS][LAYERS];
    struct mamba_step_adapter adapters[ADAPTERS], adapters_there[ADAPTERS];
    const void *embedding, *embedding_there;
    const float *norm_f, *norm_f_there;
};

static float draw(struct step_model *model)
{
    uint64_t z = model->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (float)((double)(z >> 40) * 0x1p-23 - 1.0);
}

/* `count` numbers around `middle`, of a type; the device's copy in *ret_there. */
static void *array(struct step_model *model, enum kernel_type type, int64_t count, float middle, float spread,
                   void *ret_there)
{
    struct both *both = &model->arrays[model->n_arrays++];
    assert_true((size_t)model->n_arrays < sizeof model->arrays / sizeof *model->arrays);
    both->bytes = (size_t)count * kernel_type_size(type);
    float *values = malloc((size_t)count * sizeof *values);
    both->host = malloc(both->bytes);
    assert_non_null(values);
    assert_non_null(both->host);
    for (int64_t i = 0; i < count; i++)
        values[i] = middle + spread * draw(model);
    assert_int_equal(kernels_reference()->cast(NULL, both->host, type, values, TYPE_F32, count), KERNEL_OK);
    free(values);
    assert_int_equal(cuda->memory_alloc(device, both->bytes, &both->there), KERNEL_OK);
    assert_int_equal(cuda->copy_in(device, both->there, both->host, both->bytes), KERNEL_OK);
    memcpy(ret_there, &both->there, sizeof both->there);
    return both->host;
}

static const float *floats(struct step_model *model, int64_t count, float middle, float spread,
                           const float **ret_there)
{
    return array(model, TYPE_F32, count, middle, spread, ret_there);
}

static void make_layer(struct step_model *model, int i)
{
    const struct shape *s = &model->shape;
    struct mamba_step_layer *l = &model->layers[i], *t = &model->there[i];
    float in = 1.7f / sqrtf((float)s->d), inner = 1.7f / sqrtf((float)s->c), low = 1.7f / sqrtf((float)s->r);
    l->norm = floats(model, s->d, 1, 0.3f, &t->norm);
    l->in_proj = array(model, TYPE_BF16, 2 * s->c * s->d, 0, in, &t->in_proj);
    l->x_proj = array(model, TYPE_BF16, (s->r + 2 * STATE) * s->c, 0, inner, &t->x_proj);
    l->dt_proj = array(model, TYPE_BF16, s->c * s->r, 0, low, &t->dt_proj);
    l->out_proj = array(model, TYPE_BF16, s->d * s->c, 0, 3 * inner, &t->out_proj);
    l->conv = floats(model, s->c * WIDTH, 0, 0.8f, &t->conv);
    l->conv_bias = floats(model, s->c, 0, 0.3f, &t->conv_bias);
    l->a = floats(model, STATE * s->c, -4, 3.9f, &t->a);
    l->d = floats(model, s->c, 1, 0.5f, &t->d);
    l->dt_bias = floats(model, s->c, -2, 1, &t->dt_bias);
    if (s->biases) {
        l->in_bias = floats(model, 2 * s->c, 0, 0.5f, &t->in_bias);
        l->out_bias = floats(model, s->d, 0, 0.5f, &t->out_bias);
    }
}

/* The first on everything, the second with a rank that is no multiple of 4 on some, the third with a high rank. */
static void make_adapter(struct step_model *model, int i)
{
    static const int64_t ranks[ADAPTERS] = {8, 5, 24};
    const struct shape *s = &model->shape;
    int64_t rank = ranks[i], width = s->r + 2 * STATE;
    struct mamba_step_adapter *adapter = &model->adapters[i], *there = &model->adapters_there[i];
    adapter->rank = rank;
    adapter->scale = 0.7f;
    *there = *adapter;
    if (i != 1) {
        adapter->embed_a = floats(model, rank * s->vocab, 0, 0.4f, &there->embed_a);
        adapter->embed_b = floats(model, s->d * rank, 0, 0.4f, &there->embed_b);
    }
    for (int64_t j = 0; j < LAYERS; j++) {
        struct mamba_step_lora *l = &model->lora[i][j], *t = &model->lora_there[i][j];
        l->in_a = floats(model, rank * s->d, 0, 1 / sqrtf((float)s->d), &t->in_a);
        l->in_b = floats(model, 2 * s->c * rank, 0, 0.5f, &t->in_b);
        l->x_a = floats(model, rank * s->c, 0, 1 / sqrtf((float)s->c), &t->x_a);
        l->x_b = floats(model, width * rank, 0, 0.5f, &t->x_b);
        if (i == 1)
            continue;
        l->dt_a = floats(model, rank * s->r, 0, 1 / sqrtf((float)s->r), &t->dt_a);
        l->dt_b = floats(model, s->c * rank, 0, 0.5f, &t->dt_b);
        l->out_a = floats(model, rank * s->c, 0, 1 / sqrtf((float)s->c), &t->out_a);
        l->out_b = floats(model, s->d * rank, 0, 0.5f, &t->out_b);
    }
    adapter->layers = model->lora[i];
    there->layers = model->lora_there[i];
}

static struct step_model *make_model(const struct shape *shape)
{
    struct step_model *model = calloc(1, sizeof *model);
    assert_non_null(model);
    model->shape = *shape;
    model->random = 17;
    model->embedding = array(model, TYPE_BF16, shape->vocab * shape->d, 0, 1, &model->embedding_there);
    model->norm_f = floats(model, shape->d, 1, 0.3f, &model->norm_f_there);
    for (int i = 0; i < LAYERS; i++)
        make_layer(model, i);
    for (int i = 0; i < ADAPTERS; i++)
        make_adapter(model, i);
    return model;
}

static void free_model(struct step_model *model)
{
    for (int i = 0; i < model->n_arrays; i++) {
        free(model->arrays[i].host);
        cuda->memory_free(device, model->arrays[i].there);
    }
    free(model);
}

/* ---- the same of the CPU's ops ---- */

/* Everything of a step, of which the outputs are compared. */
struct buffers {
    float *hidden, *logits, *states;              /* compared */
    float *r, *xz, *xc, *x_dbl, *dt, *y, *output; /* the reference's own */
};

static void multiply(const float *x, int64_t x_stride, int64_t rows, int64_t k, const void *weight, int64_t m,
                     const float *bias, float *y, int64_t y_stride)
{
    struct gemm_args args = {.m = rows,
                             .n = m,
                             .k = k,
                             .transpose_b = true,
                             .alpha = 1,
                             .a = x,
                             .a_stride = x_stride,
                             .b = weight,
                             .b_stride = k,
                             .c = y,
                             .c_stride = y_stride,
                             .act = TYPE_F32,
                             .b_type = TYPE_BF16};
    assert_int_equal(kernels_cpu()->gemm(cpu, &args), KERNEL_OK);
    for (int64_t i = 0; bias && i < rows * m; i++)
        y[i / m * y_stride + i % m] += bias[i % m];
}

static void adapt(const struct mamba_step_adapter *adapter, const float *a, const float *b, const float *x,
                  int64_t k, float *y, int64_t m)
{
    if (!a)
        return;
    for (int64_t j = 0; j < adapter->rank; j++) {
        double u = 0;
        for (int64_t i = 0; i < k; i++)
            u += (double)x[i] * (double)a[j * k + i];
        for (int64_t i = 0; i < m; i++)
            y[i] += adapter->scale * (float)u * b[i * adapter->rank + j];
    }
}

static void normalize(const struct shape *s, int64_t rows, const float *x, float *r, const float *weight,
                      float *y)
{
    struct rmsnorm_forward_args args = {.rows = rows,
                                        .d = s->d,
                                        .x = x,
                                        .residual = r,
                                        .weight = weight,
                                        .eps = 1e-5f,
                                        .residual_out = r,
                                        .y = y,
                                        .act = TYPE_F32};
    assert_int_equal(kernels_cpu()->rmsnorm_forward(cpu, &args), KERNEL_OK);
}

static void reference_layer(const struct step_model *model, int layer, const struct mamba_step_args *a,
                            struct buffers *b)
{
    const struct shape *s = &model->shape;
    const struct mamba_step_layer *l = &model->layers[layer];
    const int64_t rows = a->rows, width = s->r + 2 * STATE;
    int32_t starts[ROWS_MOST + 1];
    for (int32_t i = 0; i <= rows; i++)
        starts[i] = i;
    float *states = b->states + layer * (WIDTH - 1 + STATE) * s->c;
    struct state_view conv_state = {states, a->slot_stride, a->slots};
    struct state_view scan_state = {states + (WIDTH - 1) * s->c, a->slot_stride, a->slots};
#define ADAPT(factor, from, stride, k, to, to_stride, m)                                                     \
    for (int64_t n = 0; n < rows; n++)                                                                       \
        if (a->row_adapters && a->row_adapters[n] >= 0) {                                                    \
            const struct mamba_step_adapter *adapter = &model->adapters[a->row_adapters[n]];                 \
            adapt(adapter, adapter->layers[layer].factor##_a, adapter->layers[layer].factor##_b,             \
                  (from) + n * (stride), k, (to) + n * (to_stride), m);                                      \
        }
    normalize(s, rows, layer ? b->output : NULL, b->r, l->norm, b->hidden);
    multiply(b->hidden, s->d, rows, s->d, l->in_proj, 2 * s->c, l->in_bias, b->xz, 2 * s->c);
    ADAPT(in, b->hidden, s->d, s->d, b->xz, 2 * s->c, 2 * s->c)
    struct conv_forward_args conv = {.tokens = rows,
                                     .channels = s->c,
                                     .width = WIDTH,
                                     .n_seqs = (int32_t)rows,
                                     .seq_starts = starts,
                                     .x = b->xz,
                                     .x_stride = 2 * s->c,
                                     .weight = l->conv,
                                     .bias = l->conv_bias,
                                     .initial = conv_state,
                                     .final = conv_state,
                                     .y = b->xc,
                                     .y_stride = s->c,
                                     .act = TYPE_F32};
    assert_int_equal(kernels_cpu()->conv_forward(cpu, &conv), KERNEL_OK);
    multiply(b->xc, s->c, rows, s->c, l->x_proj, width, NULL, b->x_dbl, width);
    ADAPT(x, b->xc, s->c, s->c, b->x_dbl, width, width)
    multiply(b->x_dbl, width, rows, s->r, l->dt_proj, s->c, NULL, b->dt, s->c);
    ADAPT(dt, b->x_dbl, width, s->r, b->dt, s->c, s->c)
    struct scan_forward_args scan = {.tokens = rows,
                                     .channels = s->c,
                                     .d_state = STATE,
                                     .n_seqs = (int32_t)rows,
                                     .seq_starts = starts,
                                     .x = b->xc,
                                     .x_stride = s->c,
                                     .dt = b->dt,
                                     .dt_stride = s->c,
                                     .a = l->a,
                                     .b = b->x_dbl + s->r,
                                     .c = b->x_dbl + s->r + STATE,
                                     .b_stride = width,
                                     .c_stride = width,
                                     .d = l->d,
                                     .dt_bias = l->dt_bias,
                                     .z = b->xz + s->c,
                                     .z_stride = 2 * s->c,
                                     .initial = scan_state,
                                     .final = scan_state,
                                     .y = b->y,
                                     .y_stride = s->c,
                                     .act = TYPE_F32};
    assert_int_equal(kernels_cpu()->scan_forward(cpu, &scan), KERNEL_OK);
    multiply(b->y, s->c, rows, s->c, l->out_proj, s->d, l->out_bias, b->output, s->d);
    ADAPT(out, b->y, s->c, s->c, b->output, s->d, s->d)
#undef ADAPT
}

static void reference_step(const struct step_model *model, const struct mamba_step_args *a, struct buffers *b)
{
    const struct shape *s = &model->shape;
    for (int64_t n = 0; n < a->rows; n++) {
        float *r = b->r + n * s->d;
        int32_t id = a->ids[n];
        const uint16_t *table = model->embedding;
        kernels_reference()->cast(NULL, r, TYPE_F32, table + id * s->d, TYPE_BF16, s->d);
        if (!a->row_adapters || a->row_adapters[n] < 0)
            continue;
        const struct mamba_step_adapter *adapter = &model->adapters[a->row_adapters[n]];
        for (int64_t j = 0; adapter->embed_a && j < adapter->rank; j++)
            for (int64_t i = 0; i < s->d; i++)
                r[i] += adapter->scale * adapter->embed_a[j * s->vocab + id] *
                        adapter->embed_b[i * adapter->rank + j];
    }
    for (int i = 0; i < LAYERS; i++)
        reference_layer(model, i, a, b);
    normalize(s, a->rows, b->output, b->r, model->norm_f, b->hidden);
    multiply(b->hidden, s->d, a->rows, s->d, model->embedding, s->vocab, NULL, b->logits, s->vocab);
}

/* ---- comparing ---- */

static double error_of(const float *got, const float *wanted, int64_t count)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        difference += ((double)got[i] - (double)wanted[i]) * ((double)got[i] - (double)wanted[i]);
        size += (double)wanted[i] * (double)wanted[i];
    }
    return difference / size;
}

static void *zeroed(int64_t count)
{
    void *memory = calloc((size_t)count, sizeof(float));
    assert_non_null(memory);
    return memory;
}

static void *zeroed_there(int64_t bytes)
{
    void *memory = NULL;
    assert_int_equal(cuda->memory_alloc(device, (size_t)bytes, &memory), KERNEL_OK);
    assert_int_equal(cuda->zero(device, memory, (size_t)bytes), KERNEL_OK);
    return memory;
}

/* row_adapters NULL: none. The results of the last step in *ret_logits, [rows,vocab]. */
static void run_steps(const struct step_model *model, int64_t rows, const int32_t *row_adapters, bool compare,
                      float *ret_logits)
{
    const struct shape *s = &model->shape;
    const int64_t slots = rows + SPARE_SLOTS, stride = LAYERS * (WIDTH - 1 + STATE) * s->c;
    struct buffers b = {zeroed(rows * s->d),
                        zeroed(rows * s->vocab),
                        zeroed(slots * stride),
                        zeroed(rows * s->d),
                        zeroed(rows * 2 * s->c),
                        zeroed(rows * s->c),
                        zeroed(rows * (s->r + 2 * STATE)),
                        zeroed(rows * s->c),
                        zeroed(rows * s->c),
                        zeroed(rows * s->d)};
    int32_t ids[ROWS_MOST], slot_of[ROWS_MOST];
    struct mamba_step_args a = {.rows = rows,
                                .d_model = s->d,
                                .d_inner = s->c,
                                .d_state = STATE,
                                .d_conv = WIDTH,
                                .dt_rank = s->r,
                                .n_layers = LAYERS,
                                .vocab = s->vocab,
                                .eps = 1e-5f,
                                .type = TYPE_BF16,
                                .embedding = model->embedding_there,
                                .head = model->embedding_there,
                                .norm_f = model->norm_f_there,
                                .layers = model->there,
                                .adapters = model->adapters_there,
                                .n_adapters = row_adapters ? ADAPTERS : 0,
                                .ids = ids,
                                .slots = slot_of,
                                .row_adapters = row_adapters,
                                .slot_stride = stride};
    a.states = zeroed_there(slots * stride * 4);
    a.hidden = zeroed_there(rows * s->d * 2);
    a.logits = zeroed_there(rows * s->vocab * 4);
    a.workspace = zeroed_there(cuda->mamba_step_workspace(&a));
    float *hidden = zeroed(rows * s->d), *logits = zeroed(rows * s->vocab), *states = zeroed(slots * stride);
    void *raw = zeroed(rows * s->d);
    double worst[3] = {0};
    for (int step = 0; step < STEPS; step++) {
        for (int64_t n = 0; n < rows; n++) {
            ids[n] = (int32_t)((n * 131 + step * 977 + 5) % s->vocab);
            slot_of[n] = (int32_t)((n * 2 + 1) % slots); /* slots is odd or the rows below it suffice */
            if (slots % 2 == 0)
                slot_of[n] = (int32_t)(slots - 1 - n);
        }
        assert_int_equal(cuda->mamba_step(device, &a), KERNEL_OK);
        assert_int_equal(cuda->copy_out(device, raw, a.hidden, (size_t)(rows * s->d) * 2), KERNEL_OK);
        assert_int_equal(cuda->copy_out(device, logits, a.logits, (size_t)(rows * s->vocab) * 4), KERNEL_OK);
        assert_int_equal(cuda->copy_out(device, states, a.states, (size_t)(slots * stride) * 4), KERNEL_OK);
        if (!compare)
            continue;
        kernels_reference()->cast(NULL, hidden, TYPE_F32, raw, TYPE_BF16, rows * s->d);
        reference_step(model, &a, &b);
        const double errors[3] = {error_of(hidden, b.hidden, rows * s->d),
                                  error_of(logits, b.logits, rows * s->vocab),
                                  error_of(states, b.states, slots * stride)};
        for (int i = 0; i < 3; i++)
            if (!(errors[i] <= worst[i]))
                worst[i] = errors[i];
    }
    if (compare)
        print_message("d %d rows %2d %s: error of hidden %.1e, logits %.1e, states %.1e\n", (int)s->d,
                      (int)rows, row_adapters ? "adapted" : "base   ", worst[0], worst[1], worst[2]);
    for (int i = 0; compare && i < 3; i++)
        assert_true(worst[i] < STEP_ERROR);
    memcpy(ret_logits, logits, (size_t)(rows * s->vocab) * sizeof *logits);
    cuda->memory_free(device, a.states);
    cuda->memory_free(device, a.hidden);
    cuda->memory_free(device, a.logits);
    cuda->memory_free(device, a.workspace);
    float *const all[] = {b.hidden, b.logits, b.states, b.r,    b.xz,   b.xc,   b.x_dbl,
                          b.dt,     b.y,      b.output, hidden, logits, states, raw};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void check_shape(const struct shape *shape, const int64_t *rows, int n_rows)
{
    struct step_model *model = make_model(shape);
    for (int i = 0; i < n_rows; i++)
        for (int mix = 0; mix <= (rows[i] > 1 ? 2 : ADAPTERS); mix++) {
            /* The base, one adapter, all of them and the base; one row: the base, each adapter. */
            int32_t row_adapters[ROWS_MOST];
            for (int32_t n = 0; n < rows[i]; n++)
                row_adapters[n] = mix == 1 || rows[i] == 1 ? mix - 1 : (n * 5 + 1) % (ADAPTERS + 1) - 1;
            size_t count = (size_t)(rows[i] * shape->vocab);
            float *once = malloc(count * sizeof *once), *again = malloc(count * sizeof *again);
            run_steps(model, rows[i], mix ? row_adapters : NULL, true, once);
            run_steps(model, rows[i], mix ? row_adapters : NULL, false, again);
            assert_memory_equal(once, again, count * sizeof *once);
            free(once);
            free(again);
        }
    free_model(model);
}

static void test_small(void **state)
{
    (void)state;
    const int64_t rows[] = {1, 2, 3, 8, 9, 17, 33, 64, 65, 130, 256};
    check_shape(&(struct shape){96, 192, 8, 77, true}, rows, 11);
    check_shape(&(struct shape){256, 512, 16, 1001, false}, rows, 9);
}

static void test_large(void **state)
{
    (void)state;
    const int64_t rows[] = {1, 3, 16, 64};
    check_shape(&(struct shape){768, 1536, 48, 5000, false}, rows, 4);
    check_shape(&(struct shape){2560, 5120, 160, 500, false}, rows, 4);
}

/* What it does not do it says, and does nothing. */
static void test_unsupported(void **state)
{
    (void)state;
    struct step_model *model = make_model(&(struct shape){64, 128, 8, 10, false});
    int32_t ids[ROWS_MOST + 1] = {0}, slots[ROWS_MOST + 1] = {0};
    struct mamba_step_args good = {.rows = 1,
                                   .d_model = 64,
                                   .d_inner = 128,
                                   .d_state = STATE,
                                   .d_conv = WIDTH,
                                   .dt_rank = 8,
                                   .n_layers = LAYERS,
                                   .vocab = 10,
                                   .type = TYPE_BF16,
                                   .layers = model->there,
                                   .ids = ids,
                                   .slots = slots};
    struct mamba_step_args a = good;
    a.type = TYPE_F32;
    assert_int_equal(cuda->mamba_step(device, &a), KERNEL_UNSUPPORTED);
    a = good;
    a.rows = ROWS_MOST + 1;
    assert_int_equal(cuda->mamba_step(device, &a), KERNEL_UNSUPPORTED);
    a = good;
    a.dt_rank = 12;
    assert_int_equal(cuda->mamba_step(device, &a), KERNEL_UNSUPPORTED);
    a = good;
    a.d_state = 8;
    assert_int_equal(cuda->mamba_step(device, &a), KERNEL_UNSUPPORTED);
    a = good;
    ids[0] = 10;
    assert_int_equal(cuda->mamba_step(device, &a), KERNEL_INVALID);
    free_model(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small),
        cmocka_unit_test(test_large),
        cmocka_unit_test(test_unsupported),
    };
    cuda = kernels_cuda();
    const char *wanted = getenv("ADDERD_TEST_CUDA");
    if (!wanted || strcmp(wanted, "1") || !cuda || cuda->device_open(0, 0, &device) ||
        kernels_cpu()->device_open(0, 0, &cpu)) {
        printf("skipped: no GPU, or not asked for one\n");
        return 77;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    cuda->device_close(device);
    kernels_cpu()->device_close(cpu);
    return failed;
}
