/* Every backward against finite differences of its forward, on the reference and on the CPU backend.
 *
 * L = sum of fixed random numbers times the outputs, in double. For a parameter p with gradient g and a
 * direction d, L(p + eps d) - L(p - eps d) is compared with g . ((p + eps d) - (p - eps d)), the latter with
 * the values that float really took. Two widths are combined (Richardson) so that the third derivative drops
 * out: what is left is of order eps^5 and the rounding of the forward's outputs. */
#include "tests/kernels/harness.h"

#include <stdio.h>

struct param {
    const char *name;
    float *values;
    const float *gradient;
    int64_t rows, columns, stride;
};

struct problem {
    struct session session;
    void *args;
    double (*loss)(struct problem *problem);
    struct param params[8];
    int n_params;
    int64_t out_rows, out_columns;
    float *y;
    const float *weights; /* of the loss; also dy */
};

static double weighted_sum(const struct problem *p)
{
    double sum = 0;
    for (int64_t i = 0; i < p->out_rows * p->out_columns; i++)
        sum += (double)p->y[i] * (double)p->weights[i];
    return sum;
}

static void problem_open(struct problem *p, const struct kernel_ops *ops, int64_t out_rows,
                         int64_t out_columns)
{
    memset(p, 0, sizeof(*p));
    session_open(&p->session, ops, 2);
    p->out_rows = out_rows;
    p->out_columns = out_columns;
    p->y = output_floats(&p->session, "y", out_rows * out_columns, 0);
    p->weights = input_floats(&p->session, "loss", out_rows * out_columns, -1, 1);
}

/* A gradient that accumulates begins at zero here. */
static float *add_param(struct problem *p, const char *name, float *values, int64_t rows, int64_t columns,
                        int64_t stride)
{
    int64_t count = (rows - 1) * stride + columns;
    float *gradient = output_floats(&p->session, name, count, 0);
    memset(gradient, 0, (size_t)count * sizeof(*gradient));
    p->params[p->n_params++] = (struct param){.name = name,
                                              .values = values,
                                              .gradient = gradient,
                                              .rows = rows,
                                              .columns = columns,
                                              .stride = stride};
    return gradient;
}

struct predicted {
    double sum;     /* what the gradient says the difference is */
    double squares; /* of the terms of that sum: its size when they do not cancel */
};

/* L(p + eps d) - L(p - eps d), and what the gradient says it is. */
static double difference(struct problem *p, const struct param *param, const float *saved,
                         const float *direction, float eps, struct predicted *ret_predicted)
{
    int64_t count = (param->rows - 1) * param->stride + param->columns;
    double sides[2];
    struct predicted predicted = {0};
    for (int side = 0; side < 2; side++) {
        float sign = side == 0 ? 1.0f : -1.0f;
        for (int64_t i = 0; i < count; i++) {
            if (i % param->stride >= param->columns)
                continue;
            param->values[i] = saved[i] + sign * eps * direction[i];
            double term = (double)sign * (double)param->gradient[i] * (double)param->values[i];
            predicted.sum += term;
            double size = (double)param->gradient[i] * (double)(eps * direction[i]);
            predicted.squares += size * size;
        }
        sides[side] = p->loss(p);
    }
    memcpy(param->values, saved, (size_t)count * sizeof(*saved));
    *ret_predicted = predicted;
    return sides[0] - sides[1];
}

static void check_direction(struct problem *p, const struct param *param, const float *saved,
                            const float *direction, float eps, double tolerance, const char *what)
{
    struct predicted wide_predicted, narrow_predicted;
    double wide = difference(p, param, saved, direction, eps, &wide_predicted);
    double narrow = difference(p, param, saved, direction, eps / 2, &narrow_predicted);
    double measured = 8 * narrow - wide, predicted = 8 * narrow_predicted.sum - wide_predicted.sum;
    double scale = fabs(measured) + 6 * sqrt(wide_predicted.squares) + 0.3 * (double)eps;
    if (!(fabs(measured - predicted) <= tolerance * scale))
        fail_msg("%s, %s of %s: gradient says %.9g, differences say %.9g", p->session.ops->name, what,
                 param->name, predicted, measured);
}

/* Random directions, which an error anywhere would show in, then single elements. */
static void check_gradients(struct problem *p, float eps, double tolerance)
{
    for (int i = 0; i < p->n_params; i++) {
        const struct param *param = &p->params[i];
        int64_t count = (param->rows - 1) * param->stride + param->columns;
        float *saved = malloc((size_t)count * sizeof(*saved)),
              *direction = malloc((size_t)count * sizeof(*direction));
        assert_non_null(saved);
        assert_non_null(direction);
        memcpy(saved, param->values, (size_t)count * sizeof(*saved));
        for (int trial = 0; trial < 4; trial++) {
            for (int64_t j = 0; j < count; j++)
                direction[j] = random_float(&p->session, -1, 1);
            check_direction(p, param, saved, direction, eps, tolerance, "a direction");
        }
        for (int trial = 0; trial < 6; trial++) {
            memset(direction, 0, (size_t)count * sizeof(*direction));
            int64_t row = (int64_t)(random_next(&p->session) % (uint64_t)param->rows);
            int64_t column = (int64_t)(random_next(&p->session) % (uint64_t)param->columns);
            direction[row * param->stride + column] = 1.0f;
            check_direction(p, param, saved, direction, 4 * eps, 4 * tolerance, "an element");
        }
        free(saved);
        free(direction);
    }
    session_close(&p->session);
}

static float *free_floats(struct problem *p, const char *name, int64_t count, float low, float high)
{
    return input_floats(&p->session, name, count, low, high);
}

/* ---- linear layer: y = x W^T */

static double gemm_loss(struct problem *p)
{
    assert_int_equal(p->session.ops->gemm(p->session.device, p->args), KERNEL_OK);
    return weighted_sum(p);
}

static void gemm_gradients(const struct kernel_ops *ops)
{
    enum { ROWS = 9, IN = 13, OUT = 17 };
    struct problem p;
    problem_open(&p, ops, ROWS, OUT);
    float *x = free_floats(&p, "x", ROWS * IN, -1, 1), *w = free_floats(&p, "w", OUT * IN, -1, 1);
    struct gemm_args forward = {.m = ROWS,
                                .n = OUT,
                                .k = IN,
                                .transpose_b = true,
                                .alpha = 1,
                                .a = x,
                                .a_stride = IN,
                                .b = w,
                                .b_stride = IN,
                                .c = p.y,
                                .c_stride = OUT};
    struct gemm_args dx = {.m = ROWS,
                           .n = IN,
                           .k = OUT,
                           .alpha = 1,
                           .a = p.weights,
                           .a_stride = OUT,
                           .b = w,
                           .b_stride = IN,
                           .c = add_param(&p, "gemm x", x, ROWS, IN, IN),
                           .c_stride = IN};
    struct gemm_args dw = {.m = OUT,
                           .n = IN,
                           .k = ROWS,
                           .transpose_a = true,
                           .alpha = 1,
                           .beta = 1,
                           .a = p.weights,
                           .a_stride = OUT,
                           .b = x,
                           .b_stride = IN,
                           .c = add_param(&p, "gemm w", w, OUT, IN, IN),
                           .c_stride = IN};
    assert_int_equal(ops->gemm(p.session.device, &dx), KERNEL_OK);
    assert_int_equal(ops->gemm(p.session.device, &dw), KERNEL_OK);
    p.args = &forward;
    p.loss = gemm_loss;
    check_gradients(&p, 0.05f, 1e-4);
}

/* ---- linear layer with everything */

static double linear_loss(struct problem *p)
{
    assert_int_equal(p->session.ops->linear_forward(p->session.device, p->args), KERNEL_OK);
    return weighted_sum(p);
}

static void linear_gradients(const struct kernel_ops *ops)
{
    enum { ROWS = 10, IN = 21, OUT = 18, RANK = 3 };
    struct problem p;
    problem_open(&p, ops, ROWS, OUT);
    float *x = free_floats(&p, "x", ROWS * IN, -1, 1), *w = free_floats(&p, "w", OUT * IN, -1, 1);
    float *bias = free_floats(&p, "bias", OUT, -1, 1);
    float *a = free_floats(&p, "a", RANK * IN, -1, 1), *b = free_floats(&p, "b", OUT * RANK, -1, 1);
    void *workspace = scratch_bytes(&p.session, "workspace", ops->linear_workspace(ROWS, IN, OUT, RANK));
    struct linear_forward_args f = {.layer = {.in = IN,
                                              .out = OUT,
                                              .weight = w,
                                              .bias = bias,
                                              .rank = RANK,
                                              .a = a,
                                              .b = b,
                                              .scale = 0.5f,
                                              .dropout = 0.3f,
                                              .seed = 7,
                                              .offset = 1000},
                                    .rows = ROWS,
                                    .x = x,
                                    .x_stride = IN,
                                    .u = output_floats(&p.session, "u", ROWS * RANK, 0),
                                    .y = p.y,
                                    .y_stride = OUT,
                                    .workspace = workspace};
    p.args = &f;
    p.loss = linear_loss;
    (void)linear_loss(&p);
    struct linear_backward_args g = {.layer = f.layer,
                                     .rows = ROWS,
                                     .x = x,
                                     .x_stride = IN,
                                     .dy = p.weights,
                                     .dy_stride = OUT,
                                     .u = f.u,
                                     .dx = add_param(&p, "linear x", x, ROWS, IN, IN),
                                     .dx_stride = IN,
                                     .dweight = add_param(&p, "linear w", w, OUT, IN, IN),
                                     .dbias = add_param(&p, "linear bias", bias, 1, OUT, OUT),
                                     .da = add_param(&p, "linear a", a, RANK, IN, IN),
                                     .db = add_param(&p, "linear b", b, OUT, RANK, RANK),
                                     .workspace = workspace};
    assert_int_equal(ops->linear_backward(p.session.device, &g), KERNEL_OK);
    check_gradients(&p, 0.05f, 1e-4);
}

/* ---- embedding with its low-rank path */

static double embedding_loss(struct problem *p)
{
    assert_int_equal(p->session.ops->embedding_forward(p->session.device, p->args), KERNEL_OK);
    return weighted_sum(p);
}

static void embedding_gradients(const struct kernel_ops *ops)
{
    enum { TOKENS = 23, VOCAB = 12, D = 17, RANK = 4 };
    struct problem p;
    problem_open(&p, ops, TOKENS, D);
    float *table = free_floats(&p, "table", VOCAB * D, -1, 1);
    float *a = free_floats(&p, "a", RANK * VOCAB, -1, 1), *b = free_floats(&p, "b", D * RANK, -1, 1);
    struct embedding_forward_args f = {.tokens = TOKENS,
                                       .vocab = VOCAB,
                                       .d_model = D,
                                       .ids = input_ids(&p.session, "ids", TOKENS, 0, VOCAB),
                                       .table = table,
                                       .rank = RANK,
                                       .lora_a = a,
                                       .lora_b = b,
                                       .scale = 0.5f,
                                       .y = p.y};
    struct embedding_backward_args g = {.tokens = TOKENS,
                                        .vocab = VOCAB,
                                        .d_model = D,
                                        .ids = f.ids,
                                        .dy = p.weights,
                                        .dtable = add_param(&p, "table", table, VOCAB, D, D),
                                        .rank = RANK,
                                        .lora_a = a,
                                        .lora_b = b,
                                        .scale = 0.5f,
                                        .da = add_param(&p, "embedding a", a, RANK, VOCAB, VOCAB),
                                        .db = add_param(&p, "embedding b", b, D, RANK, RANK)};
    assert_int_equal(ops->embedding_backward(p.session.device, &g), KERNEL_OK);
    p.args = &f;
    p.loss = embedding_loss;
    check_gradients(&p, 0.05f, 1e-4);
}

/* ---- norm: the loss sees y and, as later layers do, the residual */

static double rmsnorm_loss(struct problem *p)
{
    const struct rmsnorm_forward_args *n = p->args;
    assert_int_equal(p->session.ops->rmsnorm_forward(p->session.device, n), KERNEL_OK);
    double sum = weighted_sum(p);
    for (int64_t i = 0; i < n->rows * n->d; i++)
        sum += 0.5 * (double)p->weights[n->rows * n->d - 1 - i] * (double)n->residual_out[i];
    return sum;
}

static void rmsnorm_gradients(const struct kernel_ops *ops)
{
    enum { ROWS = 7, D = 21 };
    struct problem p;
    problem_open(&p, ops, ROWS, D);
    float *x = free_floats(&p, "x", ROWS * D, -1, 1),
          *residual = free_floats(&p, "residual", ROWS * D, -1, 1);
    float *weight = free_floats(&p, "weight", D, 0.5f, 1.5f);
    struct rmsnorm_forward_args f = {.rows = ROWS,
                                     .d = D,
                                     .x = x,
                                     .residual = residual,
                                     .weight = weight,
                                     .eps = 1e-5f,
                                     .residual_out = output_floats(&p.session, "r", ROWS * D, 0),
                                     .y = p.y,
                                     .rstd = output_floats(&p.session, "rstd", ROWS, 0)};
    p.args = &f;
    p.loss = rmsnorm_loss;
    (void)rmsnorm_loss(&p);
    float *dresidual = add_param(&p, "norm x", x, ROWS, D, D);
    for (int64_t i = 0; i < ROWS * D; i++)
        dresidual[i] = 0.5f * p.weights[ROWS * D - 1 - i];
    struct rmsnorm_backward_args g = {
        .rows = ROWS,
        .d = D,
        .dy = p.weights,
        .r = f.residual_out,
        .rstd = f.rstd,
        .weight = weight,
        .dresidual = dresidual,
        .dweight = add_param(&p, "norm weight", weight, 1, D, D),
        .workspace = scratch_bytes(&p.session, "workspace", ops->rmsnorm_backward_workspace(ROWS, D))};
    assert_int_equal(ops->rmsnorm_backward(p.session.device, &g), KERNEL_OK);
    memcpy(add_param(&p, "norm residual", residual, ROWS, D, D), dresidual, ROWS * D * sizeof(float));
    check_gradients(&p, 0.02f, 1e-4);
}

/* ---- convolution over sequences of 5, 1, 2 and 9 tokens */

static const int32_t starts[] = {0, 5, 6, 8, 17};
enum { SEQS = 4, TOKENS = 17 };

static double conv_loss(struct problem *p)
{
    assert_int_equal(p->session.ops->conv_forward(p->session.device, p->args), KERNEL_OK);
    return weighted_sum(p);
}

static void conv_gradients(const struct kernel_ops *ops)
{
    enum { CHANNELS = 19, WIDTH = 4, STRIDE = 24 };
    struct problem p;
    problem_open(&p, ops, TOKENS, CHANNELS);
    float *x = free_floats(&p, "x", TOKENS * STRIDE, -1, 1);
    float *weight = free_floats(&p, "weight", CHANNELS * WIDTH, -1, 1),
          *bias = free_floats(&p, "bias", CHANNELS, -1, 1);
    struct conv_forward_args f = {.tokens = TOKENS,
                                  .channels = CHANNELS,
                                  .width = WIDTH,
                                  .n_seqs = SEQS,
                                  .seq_starts = starts,
                                  .x = x,
                                  .x_stride = STRIDE,
                                  .weight = weight,
                                  .bias = bias,
                                  .y = p.y,
                                  .y_stride = CHANNELS};
    struct conv_backward_args g = {.tokens = TOKENS,
                                   .channels = CHANNELS,
                                   .width = WIDTH,
                                   .n_seqs = SEQS,
                                   .seq_starts = starts,
                                   .x = x,
                                   .x_stride = STRIDE,
                                   .weight = weight,
                                   .bias = bias,
                                   .dy = p.weights,
                                   .dy_stride = CHANNELS,
                                   .dx = add_param(&p, "conv x", x, TOKENS, CHANNELS, STRIDE),
                                   .dx_stride = STRIDE,
                                   .dweight = add_param(&p, "conv weight", weight, CHANNELS, WIDTH, WIDTH),
                                   .dbias = add_param(&p, "conv bias", bias, 1, CHANNELS, CHANNELS)};
    assert_int_equal(ops->conv_backward(p.session.device, &g), KERNEL_OK);
    p.args = &f;
    p.loss = conv_loss;
    check_gradients(&p, 0.02f, 1e-4);
}

/* ---- scan; A_log goes through scan_prepare */

struct scan_problem {
    struct scan_prepare_args prepare;
    struct scan_forward_args forward;
};

static double scan_loss(struct problem *p)
{
    const struct scan_problem *scan = p->args;
    assert_int_equal(p->session.ops->scan_prepare(p->session.device, &scan->prepare), KERNEL_OK);
    assert_int_equal(p->session.ops->scan_forward(p->session.device, &scan->forward), KERNEL_OK);
    return weighted_sum(p);
}

static void scan_gradients_cut(const struct kernel_ops *ops, int64_t tokens, const int32_t *seq_starts,
                               int32_t n_seqs)
{
    enum { CHANNELS = 19, STATE = 5, BC = 2 * STATE + 1 };
    struct problem p;
    problem_open(&p, ops, tokens, CHANNELS);
    float *x = free_floats(&p, "x", tokens * CHANNELS, -1, 1),
          *dt = free_floats(&p, "dt", tokens * CHANNELS, -3, 1);
    float *z = free_floats(&p, "z", tokens * CHANNELS, -2, 2);
    float *b = free_floats(&p, "b", tokens * BC, -1, 1), *c = free_floats(&p, "c", tokens * BC, -1, 1);
    float *a_log = free_floats(&p, "a_log", CHANNELS * STATE, -1, 1);
    float *d = free_floats(&p, "d", CHANNELS, -1, 1), *dt_bias = free_floats(&p, "dt_bias", CHANNELS, -1, 0);
    float *a = output_floats(&p.session, "a", CHANNELS * STATE, 0);
    float *chunks =
        output_floats(&p.session, "chunks", scan_chunk_count(seq_starts, n_seqs) * CHANNELS * STATE, 0);
    struct scan_problem scan = {
        .prepare = {.channels = CHANNELS, .d_state = STATE, .a_log = a_log, .a = a},
        .forward = {.tokens = tokens,
                    .channels = CHANNELS,
                    .d_state = STATE,
                    .n_seqs = n_seqs,
                    .seq_starts = seq_starts,
                    .x = x,
                    .x_stride = CHANNELS,
                    .dt = dt,
                    .dt_stride = CHANNELS,
                    .a = a,
                    .b = b,
                    .c = c,
                    .b_stride = BC,
                    .c_stride = BC,
                    .d = d,
                    .dt_bias = dt_bias,
                    .z = z,
                    .z_stride = CHANNELS,
                    .chunk_states = chunks,
                    .y = p.y,
                    .y_stride = CHANNELS},
    };
    p.args = &scan;
    p.loss = scan_loss;
    (void)scan_loss(&p);
    int64_t workspace = ops->scan_backward_workspace(tokens, CHANNELS, STATE, n_seqs);
    struct scan_backward_args g = {.tokens = tokens,
                                   .channels = CHANNELS,
                                   .d_state = STATE,
                                   .n_seqs = n_seqs,
                                   .seq_starts = seq_starts,
                                   .x = x,
                                   .dt = dt,
                                   .b = b,
                                   .c = c,
                                   .z = z,
                                   .x_stride = CHANNELS,
                                   .dt_stride = CHANNELS,
                                   .b_stride = BC,
                                   .c_stride = BC,
                                   .z_stride = CHANNELS,
                                   .a = a,
                                   .d = d,
                                   .dt_bias = dt_bias,
                                   .chunk_states = chunks,
                                   .dy = p.weights,
                                   .dy_stride = CHANNELS,
                                   .dx = add_param(&p, "scan x", x, tokens, CHANNELS, CHANNELS),
                                   .ddt = add_param(&p, "scan dt", dt, tokens, CHANNELS, CHANNELS),
                                   .dz = add_param(&p, "scan z", z, tokens, CHANNELS, CHANNELS),
                                   .dx_stride = CHANNELS,
                                   .ddt_stride = CHANNELS,
                                   .dz_stride = CHANNELS,
                                   .db = add_param(&p, "scan b", b, tokens, STATE, BC),
                                   .dc = add_param(&p, "scan c", c, tokens, STATE, BC),
                                   .db_stride = BC,
                                   .dc_stride = BC,
                                   .da_log = add_param(&p, "scan a_log", a_log, CHANNELS, STATE, STATE),
                                   .dd = add_param(&p, "scan d", d, 1, CHANNELS, CHANNELS),
                                   .ddt_bias = add_param(&p, "scan dt_bias", dt_bias, 1, CHANNELS, CHANNELS),
                                   .workspace = scratch_bytes(&p.session, "workspace", workspace)};
    assert_int_equal(ops->scan_backward(p.session.device, &g), KERNEL_OK);
    check_gradients(&p, 0.02f, 2e-4);
}

static void scan_gradients(const struct kernel_ops *ops)
{
    scan_gradients_cut(ops, TOKENS, starts, SEQS);
    /* Over the ends of chunks. */
    scan_gradients_cut(ops, 135, (const int32_t[]){0, 131, 135}, 2);
}

/* ---- head: minus the sum of log-probabilities */

static double head_loss(struct problem *p)
{
    const struct head_args *h = p->args;
    assert_int_equal(p->session.ops->head(p->session.device, h), KERNEL_OK);
    double sum = 0;
    for (int64_t t = 0; t < h->rows; t++)
        sum -= (double)h->logprobs[t];
    return 0.5 * sum;
}

static void head_gradients(const struct kernel_ops *ops)
{
    enum { ROWS = 13, D = 17, VOCAB = 37 };
    struct problem p;
    problem_open(&p, ops, ROWS, 1);
    float *hidden = free_floats(&p, "hidden", ROWS * D, -1, 1),
          *weight = free_floats(&p, "weight", VOCAB * D, -1, 1);
    int64_t bytes = ops->head_workspace(ROWS, D, VOCAB, true);
    struct head_args g = {.rows = ROWS,
                          .d_model = D,
                          .vocab = VOCAB,
                          .hidden = hidden,
                          .weight = weight,
                          .targets = input_ids(&p.session, "targets", ROWS, -10, VOCAB),
                          .logprobs = p.y,
                          .d_hidden = add_param(&p, "hidden", hidden, ROWS, D, D),
                          .d_weight = add_param(&p, "head weight", weight, VOCAB, D, D),
                          .grad_scale = 0.5f,
                          .workspace = scratch_bytes(&p.session, "workspace", bytes),
                          .workspace_bytes = bytes};
    assert_int_equal(ops->head(p.session.device, &g), KERNEL_OK);
    struct head_args forward = g;
    forward.d_hidden = NULL;
    forward.d_weight = NULL;
    p.args = &forward;
    p.loss = head_loss;
    check_gradients(&p, 0.02f, 2e-4);
}

typedef void (*gradient_test)(const struct kernel_ops *ops);

static void every_backend(void **state)
{
    gradient_test test = *(gradient_test *)*state;
    test(kernels_reference());
    for (int i = 0; tested_backend(i) != NULL; i++)
        test(tested_backend(i));
}

#define GRADIENT_TEST(function)                                                                              \
    {                                                                                                        \
        .name = #function, .test_func = every_backend, .initial_state = &(gradient_test)                     \
        {                                                                                                    \
            function                                                                                         \
        }                                                                                                    \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        GRADIENT_TEST(gemm_gradients),    GRADIENT_TEST(linear_gradients), GRADIENT_TEST(embedding_gradients),
        GRADIENT_TEST(rmsnorm_gradients), GRADIENT_TEST(conv_gradients),   GRADIENT_TEST(scan_gradients),
        GRADIENT_TEST(head_gradients),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
