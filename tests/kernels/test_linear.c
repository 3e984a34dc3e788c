/* Matrix product, low-rank path, linear layer, embedding, norm, casts: the CPU backend against the reference. */
#include "tests/kernels/harness.h"

static const enum kernel_type weight_types[] = {TYPE_F32, TYPE_BF16, TYPE_F16};

struct gemm_case {
    int64_t m, n, k;
    bool transpose_a, transpose_b;
    enum kernel_type b_type;
    float alpha, beta;
    int64_t gap; /* stride beyond the row */
    bool b_activation, c_activation;
};

static void gemm_case(struct session *s, const void *param)
{
    const struct gemm_case *p = param;
    int64_t a_rows = p->transpose_a ? p->k : p->m, a_columns = p->transpose_a ? p->m : p->k;
    int64_t b_rows = p->transpose_b ? p->n : p->k, b_columns = p->transpose_b ? p->k : p->n;
    struct gemm_args args = {
        .m = p->m,
        .n = p->n,
        .k = p->k,
        .transpose_a = p->transpose_a,
        .transpose_b = p->transpose_b,
        .alpha = p->alpha,
        .beta = p->beta,
        .a = input_rows(s, "a", a_rows, a_columns, a_columns + p->gap, -1, 1),
        .a_stride = a_columns + p->gap,
        .b = input_weights(s, "b", p->b_type, b_rows, b_columns, b_columns + p->gap, -1, 1),
        .b_stride = b_columns + p->gap,
        .c = p->beta != 0.0f ? accumulated_rows(s, "c", p->m, p->n, p->n + p->gap, SUMMED)
                             : output_rows(s, "c", p->m, p->n, p->n + p->gap, SUMMED),
        .c_stride = p->n + p->gap,
        .b_type = p->b_type,
    };
    if (p->b_activation)
        mark_activation(s, args.b);
    if (p->c_activation)
        mark_activation(s, args.c);
    assert_int_equal(s->ops->gemm(s->device, &args), KERNEL_OK);
}

static void test_gemm(void **state)
{
    (void)state;
    static const int64_t sizes[][3] = {{1, 1, 1},   {3, 5, 7},     {1, 64, 96},  {1, 151, 65}, {2, 33, 64},
                                       {4, 48, 16}, {16, 40, 130}, {63, 65, 64}, {65, 17, 63}, {151, 96, 48},
                                       {7, 1, 300}, {1134, 20, 8}, {8, 300, 1}};
    static const float scales[][2] = {{1, 0}, {1, 1}, {0.5f, 0.25f}};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (int variant = 0; variant < 4 * 3 * 3; variant++) {
            struct gemm_case p = {
                .m = sizes[i][0],
                .n = sizes[i][1],
                .k = sizes[i][2],
                .transpose_a = variant & 1,
                .transpose_b = variant >> 1 & 1,
                .b_type = weight_types[variant / 4 % 3],
                .alpha = scales[variant / 12][0],
                .beta = scales[variant / 12][1],
                .gap = variant % 2 == 0 ? 0 : 3,
                .b_activation = variant / 4 % 3 == 0 && i % 2 == 0,
                .c_activation = (variant / 2 + i) % 2 == 0,
            };
            compare_backends(gemm_case, &p, "gemm %lldx%lldx%lld ta %d tb %d %s beta %g", (long long)p.m,
                             (long long)p.n, (long long)p.k, p.transpose_a, p.transpose_b,
                             kernel_type_name(p.b_type), (double)p.beta);
        }
    }
}

/* With beta 0 what C held does not matter, not even NaN; an inner size of 0 leaves beta C. */
static void test_gemm_edges(void **state)
{
    (void)state;
    struct gemm_case p = {.m = 5, .n = 18, .k = 0, .b_type = TYPE_F32, .alpha = 1, .beta = 0.5f};
    compare_backends(gemm_case, &p, "gemm with k 0, beta 0.5");
    p.beta = 0;
    compare_backends(gemm_case, &p, "gemm with k 0, beta 0");
    p = (struct gemm_case){.m = 0, .n = 18, .k = 4, .transpose_b = true, .b_type = TYPE_BF16, .alpha = 1};
    compare_backends(gemm_case, &p, "gemm without rows");
}

/* Large enough for several tiles in every direction, each with a narrower last one, and for sums in parts. */
static void test_gemm_tiles(void **state)
{
    (void)state;
    for (int variant = 0; variant < 4; variant++) {
        struct gemm_case p = {
            .m = 270,
            .n = 403,
            .k = 300,
            .transpose_a = variant & 1,
            .transpose_b = variant >> 1 & 1,
            .b_type = weight_types[variant % 3],
            .alpha = 0.5f,
            .beta = variant == 3 ? 1.0f : 0.0f,
            .gap = variant,
        };
        compare_backends(gemm_case, &p, "gemm in tiles, ta %d tb %d", p.transpose_a, p.transpose_b);
    }
}

/* Every way to few rows, with an inner size that is and is not a multiple of all vectors. */
static void test_gemm_few_rows(void **state)
{
    (void)state;
    for (int64_t m = 1; m <= 33; m = m < 6 ? m + 1 : m + 9) {
        for (int type = 0; type < 3; type++) {
            struct gemm_case p = {
                .m = m, .n = 131, .k = type == 0 ? 128 : 107, .transpose_b = true, .alpha = 1};
            p.b_type = weight_types[type];
            p.gap = type;
            compare_backends(gemm_case, &p, "gemm of %lld rows, %s", (long long)m,
                             kernel_type_name(p.b_type));
            p.k = 16;
            compare_backends(gemm_case, &p, "gemm of %lld short rows, %s", (long long)m,
                             kernel_type_name(p.b_type));
        }
    }
}

struct lora_case {
    int64_t rows, in, out, rank;
    float dropout;
    int64_t gap;
};

static void lora_case(struct session *s, const void *param)
{
    const struct lora_case *p = param;
    int64_t in_stride = p->in + p->gap, out_stride = p->out + p->gap;
    struct lora_forward_args f = {
        .rows = p->rows,
        .in = p->in,
        .out = p->out,
        .rank = p->rank,
        .x = input_rows(s, "x", p->rows, p->in, in_stride, -1, 1),
        .x_stride = in_stride,
        .a = input_floats(s, "a", p->rank * p->in, -1, 1),
        .b = input_floats(s, "b", p->out * p->rank, -1, 1),
        .scale = 1.5f,
        .dropout = p->dropout,
        .seed = 0x123456789abcdef0,
        .offset = 0xfffffff0, /* the counter crosses 32 bits */
        .u = output_floats(s, "u", p->rows * p->rank, SUMMED),
        .y = accumulated_rows(s, "y", p->rows, p->out, out_stride, SUMMED),
        .y_stride = out_stride,
    };
    assert_int_equal(s->ops->lora_forward(s->device, &f), KERNEL_OK);
}

static void test_lora(void **state)
{
    (void)state;
    static const int64_t rows[] = {1, 3, 63, 64, 65, 151};
    static const int64_t ranks[] = {1, 4, 8, 64};
    for (size_t i = 0; i < 6; i++) {
        for (size_t j = 0; j < 4; j++) {
            struct lora_case p = {.rows = rows[i],
                                  .in = i % 2 == 0 ? 40 : 33,
                                  .out = j % 2 == 0 ? 50 : 19,
                                  .rank = ranks[j],
                                  .dropout = (i + j) % 2 == 0 ? 0.0f : 0.25f,
                                  .gap = (int64_t)(i * j % 4)};
            compare_backends(lora_case, &p, "lora rows %lld rank %lld dropout %g", (long long)p.rows,
                             (long long)p.rank, (double)p.dropout);
        }
    }
    struct lora_case p = {.rows = 1134, .in = 24, .out = 48, .rank = 8, .dropout = 0.1f};
    compare_backends(lora_case, &p, "lora rows 1134");
    p = (struct lora_case){.rows = 130, .in = 100, .out = 150, .rank = 128, .dropout = 0.5f};
    compare_backends(lora_case, &p, "lora rank 128");
}

struct linear_case {
    int64_t rows, in, out, rank;
    enum kernel_type type;
    float dropout;
    bool bias, dx, accumulate, dweight, overwrite, adapter_gradients;
    bool in_two; /* calls of the backward: dx and dB, then what x is needed for */
    int64_t gap;
};

static struct linear_layer linear_layer_of(struct session *s, const struct linear_case *p)
{
    return (struct linear_layer){
        .in = p->in,
        .out = p->out,
        .weight = input_weights(s, "weight", p->type, p->out, p->in, p->in, -1, 1),
        .weight_type = p->type,
        .bias = p->bias ? input_floats(s, "bias", p->out, -1, 1) : NULL,
        .rank = p->rank,
        .a = p->rank > 0 ? input_floats(s, "a", p->rank * p->in, -1, 1) : NULL,
        .b = p->rank > 0 ? input_floats(s, "b", p->out * p->rank, -1, 1) : NULL,
        .scale = 1.5f,
        .dropout = p->dropout,
        .seed = 0x123456789abcdef0,
        .offset = 0xfffffff0, /* the counter crosses 32 bits */
    };
}

static void linear_case(struct session *s, const void *param)
{
    const struct linear_case *p = param;
    int64_t in_stride = p->in + p->gap, out_stride = p->out + p->gap;
    int64_t workspace = s->ops->linear_workspace(p->rows, p->in, p->out, p->rank);
    struct linear_forward_args f = {
        .layer = linear_layer_of(s, p),
        .rows = p->rows,
        .x = input_rows(s, "x", p->rows, p->in, in_stride, -1, 1),
        .x_stride = in_stride,
        /* The one number of a single row at rank 1 may have cancelled. */
        .u = p->rank > 0 ? output_floats(s, "u", p->rows * p->rank, 10 * SUMMED) : NULL,
        .y = output_rows(s, "y", p->rows, p->out, out_stride, SUMMED),
        .y_stride = out_stride,
        .workspace = scratch_bytes(s, "workspace", workspace),
    };
    assert_int_equal(s->ops->linear_forward(s->device, &f), KERNEL_OK);
    bool adapter = p->rank > 0 && p->adapter_gradients, x = p->dweight || adapter;
    struct linear_backward_args b = {
        .layer = f.layer,
        .rows = p->rows,
        .x = x ? f.x : NULL,
        .x_stride = x ? in_stride : 0,
        .dy = input_rows(s, "dy", p->rows, p->out, out_stride, -1, 1),
        .dy_stride = out_stride,
        .u = p->rank > 0 ? input_floats(s, "u_in", p->rows * p->rank, -4, 4) : NULL,
        .dx_stride = in_stride,
        .accumulate = p->accumulate,
        .dweight = !p->dweight    ? NULL
                   : p->overwrite ? output_rows(s, "dweight", p->out, p->in, p->in, SUMMED)
                                  : accumulated_rows(s, "dweight", p->out, p->in, p->in, SUMMED),
        .overwrite = p->overwrite,
        .dbias = p->dweight && p->bias ? accumulated_rows(s, "dbias", 1, p->out, p->out, SUMMED) : NULL,
        .da = adapter ? accumulated_rows(s, "da", p->rank, p->in, p->in, SUMMED) : NULL,
        .db = adapter ? accumulated_rows(s, "db", p->out, p->rank, p->rank, SUMMED) : NULL,
        .workspace = scratch_bytes(s, "workspace", workspace),
    };
    if (p->dx && p->accumulate)
        b.dx = accumulated_rows(s, "dx", p->rows, p->in, in_stride, SUMMED);
    else if (p->dx)
        b.dx = output_rows(s, "dx", p->rows, p->in, in_stride, SUMMED);
    if (!p->in_two) {
        assert_int_equal(s->ops->linear_backward(s->device, &b), KERNEL_OK);
        return;
    }
    struct linear_backward_args first = b;
    first.x = NULL;
    first.x_stride = 0;
    first.dweight = first.dbias = first.da = NULL;
    first.du = b.du = adapter ? output_floats(s, "du", p->rows * p->rank, 10 * SUMMED) : NULL;
    assert_int_equal(s->ops->linear_backward(s->device, &first), KERNEL_OK);
    b.dx = NULL;
    b.db = NULL;
    assert_int_equal(s->ops->linear_backward(s->device, &b), KERNEL_OK);
}

/* A case of its own, so that a small run has some of both. */
static void linear_large_case(struct session *s, const void *param)
{
    linear_case(s, param);
}

static void compare_linear(case_function function, const struct linear_case *p)
{
    compare_backends(function, p, "linear %lldx%lldx%lld rank %lld %s dropout %g gap %lld",
                     (long long)p->rows, (long long)p->in, (long long)p->out, (long long)p->rank,
                     kernel_type_name(p->type), (double)p->dropout, (long long)p->gap);
}

static void test_linear(void **state)
{
    (void)state;
    static const int64_t rows[] = {1, 3, 63, 64, 151}, ranks[] = {0, 1, 4, 8, 12, 64};
    static const int64_t sizes[][2] = {{40, 48}, {33, 19}, {64, 80}};
    for (int i = 0; i < 5 * 6 * 3; i++) {
        struct linear_case p = {.rows = rows[i % 5],
                                .rank = ranks[i / 5 % 6],
                                .in = sizes[i / 30][0],
                                .out = sizes[i / 30][1],
                                .type = weight_types[i / 3 % 3],
                                .dropout = i % 4 == 3 ? 0.25f : 0.0f,
                                .bias = i % 3 == 0,
                                .dx = i % 7 != 6,
                                .accumulate = i % 2 == 1,
                                .dweight = i % 3 == 1 || i % 6 == 0,
                                .overwrite = i % 2 == 0,
                                .adapter_gradients = i % 5 != 4,
                                .in_two = i % 5 < 2,
                                .gap = i % 4 == 1   ? 3
                                       : i % 4 == 2 ? 8
                                                    : 0};
        compare_linear(linear_case, &p);
    }
}

/* Sizes of several tiles in every direction, and slices of wider matrices as the model has them. */
static void test_linear_large(void **state)
{
    (void)state;
    static const struct linear_case cases[] = {
        {.rows = 1134, .in = 96, .out = 264, .rank = 8, .dx = true, .adapter_gradients = true},
        {.rows = 300,
         .in = 264,
         .out = 328,
         .rank = 8,
         .dx = true,
         .accumulate = true,
         .adapter_gradients = true,
         .gap = 8},
        {.rows = 300,
         .in = 328,
         .out = 264,
         .rank = 8,
         .dx = true,
         .adapter_gradients = true,
         .in_two = true},
        {.rows = 257, .in = 256, .out = 264, .rank = 24, .dx = true},
        {.rows = 130, .in = 520, .out = 264, .rank = 16, .dx = true, .adapter_gradients = true, .gap = 16},
        {.rows = 1134, .in = 48, .out = 80, .rank = 8, .dx = true, .adapter_gradients = true, .gap = 32},
        {.rows = 2500,
         .in = 40,
         .out = 48,
         .rank = 8,
         .dx = true,
         .dweight = true,
         .adapter_gradients = true},
        {.rows = 600,
         .in = 72,
         .out = 136,
         .rank = 16,
         .dx = true,
         .bias = true,
         .dweight = true,
         .overwrite = true},
        {.rows = 1134,
         .in = 77,
         .out = 90,
         .rank = 8,
         .dropout = 0.1f,
         .dx = true,
         .adapter_gradients = true},
        {.rows = 200, .in = 136, .out = 264, .rank = 128, .dx = true, .adapter_gradients = true},
        {.rows = 66,
         .in = 100,
         .out = 152,
         .rank = 256,
         .dropout = 0.5f,
         .dx = true,
         .adapter_gradients = true},
        {.rows = 33, .in = 24, .out = 40, .rank = 1024, .dx = true, .adapter_gradients = true},
        /* A few tiles more than a GPU's multiprocessors take at once. */
        {.rows = 17300, .in = 264, .out = 256, .rank = 4},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (int type = 0; type < 3; type++) {
            struct linear_case p = cases[i];
            p.type = weight_types[type];
            if (p.rows < 10000 || type == 1)
                compare_linear(linear_large_case, &p);
        }
    }
}

static void linear_narrow_case(struct session *s, const void *param)
{
    linear_case(s, param);
}

/* One side narrow, the other wide; last rows and columns short of a tile; rows for several rounds of all blocks, and few
 * enough that blocks share them. */
static void test_linear_narrow(void **state)
{
    (void)state;
    static const struct linear_case cases[] = {
        {.rows = 300, .in = 48, .out = 456, .rank = 8, .dx = true, .adapter_gradients = true, .gap = 16},
        {.rows = 300,
         .in = 456,
         .out = 80,
         .rank = 5,
         .dx = true,
         .accumulate = true,
         .adapter_gradients = true,
         .gap = 8},
        {.rows = 150, .in = 136, .out = 1160, .rank = 8, .dx = true, .adapter_gradients = true},
        {.rows = 9000,
         .in = 264,
         .out = 16,
         .rank = 8,
         .dx = true,
         .accumulate = true,
         .adapter_gradients = true},
        {.rows = 17100, .in = 8, .out = 264, .rank = 4, .dx = true, .adapter_gradients = true},
        {.rows = 150, .in = 1160, .out = 136, .rank = 8, .dx = true, .adapter_gradients = true},
        {.rows = 2060, .in = 2056, .out = 136, .rank = 8, .dx = true, .adapter_gradients = true},
        {.rows = 2060, .in = 72, .out = 2120, .rank = 7, .dx = true, .adapter_gradients = true, .gap = 8},
    };
    for (int type = 1; type < 3; type++) {
        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
            struct linear_case p = cases[i];
            p.type = weight_types[type];
            if (p.rows < 1000 || type == 1)
                compare_linear(linear_narrow_case, &p);
        }
    }
}

struct embedding_case {
    int64_t tokens, vocab, d_model, rank;
    enum kernel_type type;
    bool with_table;
};

static void embedding_case(struct session *s, const void *param)
{
    const struct embedding_case *p = param;
    struct embedding_forward_args f = {
        .tokens = p->tokens,
        .vocab = p->vocab,
        .d_model = p->d_model,
        .ids = input_ids(s, "ids", p->tokens, 0, (int32_t)p->vocab),
        .table = input_weights(s, "table", p->type, p->vocab, p->d_model, p->d_model, -1, 1),
        .table_type = p->type,
        .rank = p->rank,
        .lora_a = p->rank > 0 ? input_floats(s, "lora_a", p->rank * p->vocab, -1, 1) : NULL,
        .lora_b = p->rank > 0 ? input_floats(s, "lora_b", p->d_model * p->rank, -1, 1) : NULL,
        .scale = 0.75f,
        .y = output_rows(s, "y", p->tokens, p->d_model, p->d_model, SUMMED),
    };
    assert_int_equal(s->ops->embedding_forward(s->device, &f), KERNEL_OK);
    struct embedding_backward_args b = {
        .tokens = p->tokens,
        .vocab = p->vocab,
        .d_model = p->d_model,
        .ids = f.ids,
        .dy = input_floats(s, "dy", p->tokens * p->d_model, -1, 1),
        .dtable =
            p->with_table ? accumulated_rows(s, "dtable", p->vocab, p->d_model, p->d_model, SUMMED) : NULL,
        .rank = p->rank,
        .lora_a = f.lora_a,
        .lora_b = f.lora_b,
        .scale = f.scale,
        .da = p->rank > 0 ? accumulated_rows(s, "da", p->rank, p->vocab, p->vocab, SUMMED) : NULL,
        .db = p->rank > 0 ? accumulated_rows(s, "db", p->d_model, p->rank, p->rank, SUMMED) : NULL,
    };
    assert_int_equal(s->ops->embedding_backward(s->device, &b), KERNEL_OK);
}

static void test_embedding(void **state)
{
    (void)state;
    static const int64_t tokens[] = {1, 3, 63, 64, 65, 151, 1134};
    static const int64_t ranks[] = {0, 1, 4, 8, 64};
    for (size_t i = 0; i < 7; i++) {
        for (size_t j = 0; j < 5; j++) {
            struct embedding_case p = {.tokens = tokens[i],
                                       .vocab = i % 2 == 0 ? 13 : 130,
                                       .d_model = j % 2 == 0 ? 33 : 64,
                                       .rank = ranks[j],
                                       .type = weight_types[(i + j) % 3],
                                       .with_table = ranks[j] == 0 || i % 2 == 0};
            compare_backends(embedding_case, &p, "embedding tokens %lld rank %lld %s", (long long)p.tokens,
                             (long long)p.rank, kernel_type_name(p.type));
        }
    }
    static const struct embedding_case extremes[] = {{1134, 1, 64, 4, TYPE_F32, true},
                                                     {300, 70001, 5, 1, TYPE_BF16, true}};
    for (int i = 0; i < 2; i++)
        compare_backends(embedding_case, &extremes[i], "embedding vocabulary %lld",
                         (long long)extremes[i].vocab);
}

struct rmsnorm_case {
    int64_t rows, d;
    bool with_x, in_place, with_rstd, with_dweight, with_kept;
};

static void rmsnorm_case(struct session *s, const void *param)
{
    const struct rmsnorm_case *p = param;
    float *residual = p->in_place ? accumulated_rows(s, "residual", p->rows, p->d, p->d, ELEMENTWISE)
                                  : input_floats(s, "residual", p->rows * p->d, -2, 2);
    struct rmsnorm_forward_args f = {
        .rows = p->rows,
        .d = p->d,
        .x = p->with_x ? input_floats(s, "x", p->rows * p->d, -1, 1) : NULL,
        .residual = residual,
        .weight = input_floats(s, "weight", p->d, 0.5f, 1.5f),
        .eps = 1e-5f,
        .residual_out =
            p->in_place ? residual : output_floats(s, "residual_out", p->rows * p->d, ELEMENTWISE),
        .y = output_floats(s, "y", p->rows * p->d, ELEMENTWISE),
        .rstd = p->with_rstd ? output_floats(s, "rstd", p->rows, ELEMENTWISE) : NULL,
    };
    if (p->with_kept) {
        f.kept = output_floats(s, "kept", p->rows * p->d, ELEMENTWISE);
        mark_activation(s, f.kept);
    }
    assert_int_equal(s->ops->rmsnorm_forward(s->device, &f), KERNEL_OK);
    struct rmsnorm_forward_args alone = {
        .rows = p->rows,
        .d = p->d,
        .x = input_floats(s, "x alone", p->rows * p->d, -1, 1),
        .weight = f.weight,
        .eps = 1e-5f,
        .y = output_floats(s, "y alone", p->rows * p->d, ELEMENTWISE),
        .rstd = p->with_rstd ? output_floats(s, "rstd alone", p->rows, ELEMENTWISE) : NULL,
    };
    assert_int_equal(s->ops->rmsnorm_forward(s->device, &alone), KERNEL_OK);
    struct rmsnorm_backward_args b = {
        .rows = p->rows,
        .d = p->d,
        .dy = input_floats(s, "dy", p->rows * p->d, -1, 1),
        .r = input_floats(s, "r", p->rows * p->d, -2, 2),
        .rstd = input_floats(s, "rstd_in", p->rows, 0.2f, 2),
        .weight = f.weight,
        .dresidual = accumulated_rows(s, "dresidual", p->rows, p->d, p->d, SUMMED),
        .dx = p->with_kept ? output_floats(s, "dx", p->rows * p->d, SUMMED) : NULL,
        .dweight = p->with_dweight ? accumulated_rows(s, "dweight", 1, p->d, p->d, SUMMED) : NULL,
        .workspace = scratch_bytes(s, "workspace", s->ops->rmsnorm_backward_workspace(p->rows, p->d)),
    };
    assert_int_equal(s->ops->rmsnorm_backward(s->device, &b), KERNEL_OK);
}

static void test_rmsnorm(void **state)
{
    (void)state;
    static const int64_t rows[] = {0, 1, 3, 63, 64, 65, 151, 1134};
    static const int64_t widths[] = {1, 15, 64, 77, 768, 1600, 2560, 6400};
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < (rows[i] > 151 ? 5 : 8); j++) {
            struct rmsnorm_case p = {.rows = rows[i],
                                     .d = widths[j],
                                     .with_x = (i + j) % 3 != 0,
                                     .in_place = (i + j) % 2 == 0,
                                     .with_rstd = j != 2,
                                     .with_dweight = j != 1,
                                     .with_kept = (i + j) % 4 < 2};
            compare_backends(rmsnorm_case, &p, "rmsnorm %lldx%lld", (long long)p.rows, (long long)p.d);
        }
    }
}

struct cast_case {
    enum kernel_type from, to;
    int64_t count;
};

static void cast_case(struct session *s, const void *param)
{
    const struct cast_case *p = param;
    void *from = input_weights(s, "from", p->from, 1, p->count, p->count, -3, 3);
    /* Through the wanted type and back to float, which the harness can compare; both conversions are exact or
     * rounded alike, so nothing may differ. */
    void *to = scratch_bytes(s, "to", p->count * 4);
    float *back = output_floats(s, "back", p->count, 0);
    assert_int_equal(s->ops->cast(s->device, to, p->to, from, p->from, p->count), KERNEL_OK);
    assert_int_equal(s->ops->cast(s->device, back, TYPE_F32, to, p->to, p->count), KERNEL_OK);
}

static void test_cast(void **state)
{
    (void)state;
    static const int64_t counts[] = {0, 1, 3, 15, 17, 64, 1134, 70001};
    for (int i = 0; i < 9 * 8; i++) {
        struct cast_case p = {weight_types[i % 3], weight_types[i / 3 % 3], counts[i / 9]};
        compare_backends(cast_case, &p, "cast %s to %s x %lld", kernel_type_name(p.from),
                         kernel_type_name(p.to), (long long)p.count);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gemm),         cmocka_unit_test(test_gemm_edges),
        cmocka_unit_test(test_gemm_tiles),   cmocka_unit_test(test_gemm_few_rows),
        cmocka_unit_test(test_lora),         cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_large), cmocka_unit_test(test_linear_narrow),
        cmocka_unit_test(test_embedding),    cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_cast),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
