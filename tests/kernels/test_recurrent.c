/* Convolution and scan: the CPU backend against the reference, and one token at a time against all at once.
 */
#include "tests/kernels/harness.h"

struct recurrent_case {
    int64_t tokens, channels, size; /* size: the convolution's width, the scan's d_state */
    enum cut cut;
    int64_t gap;
    bool initial, final, one_pool, permuted, with_extras; /* extras: bias, chunk states */
};

static void add_states(struct session *s, const struct recurrent_case *p, int32_t n_seqs, int64_t state_size,
                       struct state_view *initial, struct state_view *final)
{
    int64_t stride = state_size + 5;
    *initial = *final = (struct state_view){0};
    int32_t *from = p->permuted ? permuted_slots(s, n_seqs, !p->one_pool) : NULL,
            *slots = p->permuted && !p->one_pool ? permuted_slots(s, n_seqs, false) : from;
    if (p->one_pool) {
        float *pool = accumulated_rows(s, "states", n_seqs, state_size, stride, SUMMED);
        *initial = *final = (struct state_view){.pool = pool, .slot_stride = stride, .slots = slots};
        return;
    }
    if (p->initial)
        *initial = (struct state_view){
            .pool = input_rows(s, "initial", n_seqs, state_size, stride, -1, 1),
            .slot_stride = stride,
            .slots = from,
        };
    if (p->final)
        *final = (struct state_view){
            .pool = p->permuted ? accumulated_rows(s, "final", n_seqs, state_size, stride, SUMMED)
                                : output_rows(s, "final", n_seqs, state_size, stride, SUMMED),
            .slot_stride = stride,
            .slots = slots,
        };
}

static void conv_forward_case(struct session *s, const void *param)
{
    const struct recurrent_case *p = param;
    int64_t stride = p->channels + p->gap;
    struct conv_forward_args v = {.tokens = p->tokens, .channels = p->channels, .width = p->size};
    v.seq_starts = cut_tokens(s, p->cut, p->tokens, &v.n_seqs);
    v.x = input_rows(s, "x", p->tokens, p->channels, stride, -2, 2);
    v.x_stride = stride;
    v.weight = input_floats(s, "weight", p->channels * p->size, -1, 1);
    v.bias = p->with_extras ? input_floats(s, "bias", p->channels, -1, 1) : NULL;
    add_states(s, p, v.n_seqs, (p->size - 1) * p->channels, &v.initial, &v.final);
    v.y = output_rows(s, "y", p->tokens, p->channels, stride, SUMMED);
    v.y_stride = stride;
    assert_int_equal(s->ops->conv_forward(s->device, &v), KERNEL_OK);
}

static void conv_backward_case(struct session *s, const void *param)
{
    const struct recurrent_case *p = param;
    int64_t stride = p->channels + p->gap;
    struct conv_backward_args v = {.tokens = p->tokens, .channels = p->channels, .width = p->size};
    v.seq_starts = cut_tokens(s, p->cut, p->tokens, &v.n_seqs);
    v.x = input_rows(s, "x", p->tokens, p->channels, stride, -2, 2);
    v.x_stride = stride;
    v.weight = input_floats(s, "weight", p->channels * p->size, -1, 1);
    v.bias = p->with_extras ? input_floats(s, "bias", p->channels, -1, 1) : NULL;
    v.dy = input_rows(s, "dy", p->tokens, p->channels, stride, -1, 1);
    v.dy_stride = stride;
    v.dx = output_rows(s, "dx", p->tokens, p->channels, stride, SUMMED);
    v.dx_stride = stride;
    if (p->initial)
        v.dweight = accumulated_rows(s, "dweight", p->channels, p->size, p->size, SUMMED);
    if (p->final)
        v.dbias = accumulated_rows(s, "dbias", 1, p->channels, p->channels, SUMMED);
    assert_int_equal(s->ops->conv_backward(s->device, &v), KERNEL_OK);
}

/* A as training leaves it: -1 .. -16 and a little more; delta from 1e-3 to beyond softplus's switch at 20. */
static const float *input_a(struct session *s, int64_t d_state, int64_t channels)
{
    return input_floats(s, "a", d_state * channels, -16, -0.05f);
}

static void scan_forward_case(struct session *s, const void *param)
{
    const struct recurrent_case *p = param;
    int64_t stride = p->channels + p->gap, bc_stride = 2 * p->size + (p->gap > 0 ? 3 : 0);
    struct scan_forward_args v = {.tokens = p->tokens, .channels = p->channels, .d_state = p->size};
    v.seq_starts = cut_tokens(s, p->cut, p->tokens, &v.n_seqs);
    v.x = input_rows(s, "x", p->tokens, p->channels, stride, -2, 2);
    v.x_stride = stride;
    v.dt = input_rows(s, "dt", p->tokens, p->channels, stride, -7, p->with_extras ? 24.0f : 1.0f);
    v.dt_stride = stride;
    v.a = input_a(s, p->size, p->channels);
    v.b = input_rows(s, "b|c", p->tokens, 2 * p->size, bc_stride, -1, 1);
    v.c = (const float *)v.b + p->size;
    v.b_stride = v.c_stride = bc_stride;
    v.d = input_floats(s, "d", p->channels, -1, 1);
    v.dt_bias = input_floats(s, "dt_bias", p->channels, -1, 0);
    v.z = input_rows(s, "z", p->tokens, p->channels, stride, -4, 4);
    v.z_stride = stride;
    add_states(s, p, v.n_seqs, p->size * p->channels, &v.initial, &v.final);
    if (p->with_extras)
        v.chunk_states = output_floats(
            s, "chunk_states", scan_chunk_count(v.seq_starts, v.n_seqs) * p->size * p->channels, SUMMED);
    v.y = output_rows(s, "y", p->tokens, p->channels, stride, SUMMED);
    v.y_stride = stride;
    assert_int_equal(s->ops->scan_forward(s->device, &v), KERNEL_OK);
}

static void scan_backward_case(struct session *s, const void *param)
{
    const struct recurrent_case *p = param;
    int64_t stride = p->channels + p->gap, bc_stride = 2 * p->size + (p->gap > 0 ? 3 : 0);
    struct scan_backward_args v = {.tokens = p->tokens, .channels = p->channels, .d_state = p->size};
    v.seq_starts = cut_tokens(s, p->cut, p->tokens, &v.n_seqs);
    v.x = input_rows(s, "x", p->tokens, p->channels, stride, -2, 2);
    v.dt = input_rows(s, "dt", p->tokens, p->channels, stride, -7, p->with_extras ? 24.0f : 1.0f);
    v.a = input_a(s, p->size, p->channels);
    v.b = input_rows(s, "b|c", p->tokens, 2 * p->size, bc_stride, -1, 1);
    v.c = (const float *)v.b + p->size;
    v.d = input_floats(s, "d", p->channels, -1, 1);
    v.dt_bias = input_floats(s, "dt_bias", p->channels, -1, 0);
    v.z = input_rows(s, "z", p->tokens, p->channels, stride, -4, 4);
    v.dy = input_rows(s, "dy", p->tokens, p->channels, stride, -1, 1);
    v.x_stride = v.dt_stride = v.z_stride = v.dy_stride = stride;
    v.b_stride = v.c_stride = bc_stride;

    float *chunk_states = output_floats(
        s, "chunk_states", scan_chunk_count(v.seq_starts, v.n_seqs) * p->size * p->channels, SUMMED);
    struct scan_forward_args f = {
        .tokens = v.tokens,
        .channels = v.channels,
        .d_state = v.d_state,
        .n_seqs = v.n_seqs,
        .seq_starts = v.seq_starts,
        .x = v.x,
        .x_stride = stride,
        .dt = v.dt,
        .dt_stride = stride,
        .a = v.a,
        .b = v.b,
        .c = v.c,
        .b_stride = bc_stride,
        .c_stride = bc_stride,
        .d = v.d,
        .dt_bias = v.dt_bias,
        .z = v.z,
        .z_stride = stride,
        .chunk_states = chunk_states,
        .y = output_rows(s, "y", p->tokens, p->channels, stride, SUMMED),
        .y_stride = stride,
    };
    assert_int_equal(s->ops->scan_forward(s->device, &f), KERNEL_OK);

    v.chunk_states = chunk_states;
    v.dx = output_rows(s, "dx", p->tokens, p->channels, stride, SUMMED);
    v.ddt = output_rows(s, "ddt", p->tokens, p->channels, stride, SUMMED);
    v.dz = output_rows(s, "dz", p->tokens, p->channels, stride, SUMMED);
    v.dx_stride = v.ddt_stride = v.dz_stride = v.y_stride = stride;
    if (p->permuted)
        v.y = output_rows(s, "y again", p->tokens, p->channels, stride, SUMMED);
    v.db = output_rows(s, "db|dc", p->tokens, 2 * p->size, bc_stride, SUMMED);
    v.dc = (float *)v.db + p->size;
    v.db_stride = v.dc_stride = bc_stride;
    if (p->initial)
        v.da_log = accumulated_rows(s, "da_log", p->channels, p->size, p->size, SUMMED);
    if (p->final)
        /* A single channel's is one sum of either sign, with nothing beside it to be small against. */
        v.dd = accumulated_rows(s, "dd", 1, p->channels, p->channels, p->channels == 1 ? 1e-10 : SUMMED);
    if (p->initial || p->final)
        v.ddt_bias = accumulated_rows(s, "ddt_bias", 1, p->channels, p->channels, SUMMED);
    v.workspace = scratch_bytes(s, "workspace",
                                s->ops->scan_backward_workspace(p->tokens, p->channels, p->size, v.n_seqs));
    assert_int_equal(s->ops->scan_backward(s->device, &v), KERNEL_OK);
}

static void sweep(case_function function, const char *name, const int64_t sizes[3])
{
    static const int64_t tokens[] = {1, 3, 63, 64, 65, 151, 1134};
    static const int64_t channels[] = {1, 19, 32, 50};
    int i = 0;
    for (int length = 0; length < 7; length++) {
        for (enum cut cut = CUT_ONE; cut < CUT_COUNT; cut++) {
            for (int variant = 0; variant < 3; variant++, i++) {
                struct recurrent_case p = {
                    .tokens = tokens[length],
                    .channels = tokens[length] > 200 ? 19 : channels[i % 4],
                    .size = sizes[i % 3],
                    .cut = cut,
                    .gap = i % 2 * 7,
                    .initial = variant != 0,
                    .final = variant != 1,
                    .one_pool = variant == 2 && i % 2 == 0,
                    .permuted = i % 5 < 3,
                    .with_extras = i % 4 < 2,
                };
                compare_backends(function, &p, "%s tokens %lld channels %lld size %lld cut %d variant %d",
                                 name, (long long)p.tokens, (long long)p.channels, (long long)p.size,
                                 (int)cut, variant);
            }
        }
    }
}

static void test_conv_forward(void **state)
{
    (void)state;
    sweep(conv_forward_case, "conv_forward", (const int64_t[]){4, 2, 3});
}

static void test_conv_backward(void **state)
{
    (void)state;
    sweep(conv_backward_case, "conv_backward", (const int64_t[]){4, 2, 3});
}

static void test_scan_forward(void **state)
{
    (void)state;
    sweep(scan_forward_case, "scan_forward", (const int64_t[]){16, 5, 8});
}

static void test_scan_backward(void **state)
{
    (void)state;
    sweep(scan_backward_case, "scan_backward", (const int64_t[]){16, 5, 8});
}

/* Rows and states as a GPU reads them 16 bytes at a time, and batches of every size that it divides its own way: few
 * long sequences, which are cut, up to many. */
static void test_shapes(void **state)
{
    (void)state;
    static const struct {
        int64_t tokens, channels;
        enum cut cut;
    } shapes[] = {{151, 64, CUT_ONE},    {1134, 32, CUT_ONE},    {700, 96, CUT_MIXED},
                  {600, 200, CUT_SHORT}, {1600, 200, CUT_SHORT}, {3100, 200, CUT_SHORT}};
    int count = best_backend() == kernels_cpu() ? 3 : 6; /* the rest would be slow and tell nothing there */
    for (int i = 0; i < count; i++) {
        for (int variant = 0; variant < 2; variant++) {
            struct recurrent_case p = {
                .tokens = shapes[i].tokens,
                .channels = shapes[i].channels,
                .size = 16,
                .cut = shapes[i].cut,
                .initial = variant == 1,
                .final = variant == 1,
                .permuted = true,
                .with_extras = true,
            };
            compare_backends(scan_forward_case, &p, "scan_forward shape %d variant %d", i, variant);
            compare_backends(scan_backward_case, &p, "scan_backward shape %d variant %d", i, variant);
            p.size = 4;
            compare_backends(conv_forward_case, &p, "conv_forward shape %d variant %d", i, variant);
            compare_backends(conv_backward_case, &p, "conv_backward shape %d variant %d", i, variant);
        }
    }
}

/* What is planned for a batch is enough for every smaller one. */
static void test_scan_backward_workspace(void **state)
{
    (void)state;
    const struct kernel_ops *backends[] = {kernels_reference(), kernels_cpu()};
    for (int b = 0; b < 2; b++) {
        int64_t before = 0;
        for (int32_t n_seqs = 1; n_seqs <= 100; n_seqs++) {
            int64_t bytes = backends[b]->scan_backward_workspace(500, 50, 16, n_seqs);
            assert_true(bytes >= before);
            before = bytes;
        }
    }
}

struct prepare_case {
    int64_t channels, d_state;
};

static void scan_prepare_case(struct session *s, const void *param)
{
    const struct prepare_case *p = param;
    struct scan_prepare_args args = {
        .channels = p->channels,
        .d_state = p->d_state,
        .a_log = input_floats(s, "a_log", p->channels * p->d_state, -3, 3),
        .a = output_floats(s, "a", p->channels * p->d_state, ELEMENTWISE),
    };
    assert_int_equal(s->ops->scan_prepare(s->device, &args), KERNEL_OK);
}

static void test_scan_prepare(void **state)
{
    (void)state;
    static const struct prepare_case cases[] = {{1, 1}, {19, 16}, {96, 5}, {300, 16}};
    for (int i = 0; i < 4; i++)
        compare_backends(scan_prepare_case, &cases[i], "scan_prepare %lld", (long long)cases[i].channels);
}

enum { STEP_TOKENS = 21, STEP_CHANNELS = 37, STEP_STATE = 16, STEP_WIDTH = 4 };

static void assert_near(const float *a, const float *b, int64_t count, double tolerance)
{
    for (int64_t i = 0; i < count; i++)
        if (!(fabs((double)a[i] - (double)b[i]) <= tolerance))
            fail_msg("element %lld: %g and %g", (long long)i, (double)a[i], (double)b[i]);
}

/* Two sequences decoded together, a token of each a call, with their states in permuted slots, give what the
 * parallel forms give. */
static void test_conv_steps(void **state)
{
    (void)state;
    enum { STATE = (STEP_WIDTH - 1) * STEP_CHANNELS };
    struct session s;
    session_open(&s, best_backend(), 2);
    float *x = input_floats(&s, "x", 2 * STEP_TOKENS * STEP_CHANNELS, -1, 1);
    float *whole = output_floats(&s, "whole", 2 * STEP_TOKENS * STEP_CHANNELS, 0);
    float *pool = output_floats(&s, "pool", 3 * STATE, 0);
    memset(pool, 0, 3 * STATE * sizeof(float));
    const int32_t starts[] = {0, STEP_TOKENS, 2 * STEP_TOKENS}, step_starts[] = {0, 1, 2}, slots[] = {2, 0};
    struct conv_forward_args v = {
        .tokens = 2 * STEP_TOKENS,
        .channels = STEP_CHANNELS,
        .width = STEP_WIDTH,
        .n_seqs = 2,
        .seq_starts = starts,
        .x = x,
        .x_stride = STEP_CHANNELS,
        .weight = input_floats(&s, "weight", STEP_CHANNELS * STEP_WIDTH, -1, 1),
        .bias = input_floats(&s, "bias", STEP_CHANNELS, -1, 1),
        .y = whole,
        .y_stride = STEP_CHANNELS,
    };
    assert_int_equal(s.ops->conv_forward(s.device, &v), KERNEL_OK);

    float *step_y = output_floats(&s, "step_y", 2 * STEP_CHANNELS, 0);
    v.tokens = 2;
    v.seq_starts = step_starts;
    v.x_stride = STEP_TOKENS * STEP_CHANNELS;
    v.initial = v.final = (struct state_view){.pool = pool, .slot_stride = STATE, .slots = slots};
    v.y = step_y;
    for (int64_t t = 0; t < STEP_TOKENS; t++) {
        v.x = x + t * STEP_CHANNELS;
        assert_int_equal(s.ops->conv_forward(s.device, &v), KERNEL_OK);
        for (int64_t q = 0; q < 2; q++)
            assert_near(step_y + q * STEP_CHANNELS, whole + (q * STEP_TOKENS + t) * STEP_CHANNELS,
                        STEP_CHANNELS, 1e-6);
    }
    session_close(&s);
}

static void test_scan_steps(void **state)
{
    (void)state;
    enum { STATE = STEP_STATE * STEP_CHANNELS, ALL = 2 * STEP_TOKENS * STEP_CHANNELS };
    struct session s;
    session_open(&s, best_backend(), 2);
    float *x = input_floats(&s, "x", ALL, -1, 1), *dt = input_floats(&s, "dt", ALL, -4, 1);
    float *z = input_floats(&s, "z", ALL, -2, 2),
          *bc = input_floats(&s, "bc", 4 * STEP_TOKENS * STEP_STATE, -1, 1);
    float *whole = output_floats(&s, "whole", ALL, 0);
    float *pool = output_floats(&s, "pool", 3 * STATE, 0), *last = output_floats(&s, "last", 2 * STATE, 0);
    memset(pool, 0, 3 * STATE * sizeof(float));
    const int32_t starts[] = {0, STEP_TOKENS, 2 * STEP_TOKENS}, step_starts[] = {0, 1, 2}, slots[] = {2, 0};
    struct scan_forward_args v = {
        .tokens = 2 * STEP_TOKENS,
        .channels = STEP_CHANNELS,
        .d_state = STEP_STATE,
        .n_seqs = 2,
        .seq_starts = starts,
        .x = x,
        .x_stride = STEP_CHANNELS,
        .dt = dt,
        .dt_stride = STEP_CHANNELS,
        .a = input_a(&s, STEP_STATE, STEP_CHANNELS),
        .b = bc,
        .c = bc + STEP_STATE,
        .b_stride = 2 * STEP_STATE,
        .c_stride = 2 * STEP_STATE,
        .d = input_floats(&s, "d", STEP_CHANNELS, -1, 1),
        .dt_bias = input_floats(&s, "dt_bias", STEP_CHANNELS, -1, 1),
        .z = z,
        .z_stride = STEP_CHANNELS,
        .final = {.pool = last, .slot_stride = STATE},
        .y = whole,
        .y_stride = STEP_CHANNELS,
    };
    assert_int_equal(s.ops->scan_forward(s.device, &v), KERNEL_OK);

    float *step_y = output_floats(&s, "step_y", 2 * STEP_CHANNELS, 0);
    v.tokens = 2;
    v.seq_starts = step_starts;
    v.x_stride = v.dt_stride = v.z_stride = STEP_TOKENS * STEP_CHANNELS;
    v.b_stride = v.c_stride = STEP_TOKENS * 2 * STEP_STATE;
    v.initial = v.final = (struct state_view){.pool = pool, .slot_stride = STATE, .slots = slots};
    v.y = step_y;
    for (int64_t t = 0; t < STEP_TOKENS; t++) {
        v.x = x + t * STEP_CHANNELS;
        v.dt = dt + t * STEP_CHANNELS;
        v.z = z + t * STEP_CHANNELS;
        v.b = bc + t * 2 * STEP_STATE;
        v.c = bc + t * 2 * STEP_STATE + STEP_STATE;
        assert_int_equal(s.ops->scan_forward(s.device, &v), KERNEL_OK);
        for (int64_t q = 0; q < 2; q++)
            assert_near(step_y + q * STEP_CHANNELS, whole + (q * STEP_TOKENS + t) * STEP_CHANNELS,
                        STEP_CHANNELS, 1e-5);
    }
    assert_near(pool + 2 * STATE, last, STATE, 1e-5);
    assert_near(pool, last + STATE, STATE, 1e-5);
    session_close(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conv_forward), cmocka_unit_test(test_conv_backward),
        cmocka_unit_test(test_scan_forward), cmocka_unit_test(test_scan_backward),
        cmocka_unit_test(test_shapes),       cmocka_unit_test(test_scan_backward_workspace),
        cmocka_unit_test(test_scan_prepare), cmocka_unit_test(test_conv_steps),
        cmocka_unit_test(test_scan_steps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
