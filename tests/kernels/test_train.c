/* Head with loss, optimizer, gradient norm: the CPU backend against the reference. */
#include "tests/kernels/harness.h"

static const enum kernel_type weight_types[] = {TYPE_F32, TYPE_BF16, TYPE_F16};

struct head_case {
    int64_t rows, d_model, vocab;
    enum kernel_type type;
    int32_t n_top;
    bool scores, backward, d_weight;
    bool whole_numbers; /* logits that are exact in any order, with ties */
    float spread;       /* of hidden; 0 = 1 */
};

static void head_case(struct session *s, const void *param)
{
    const struct head_case *p = param;
    float range = p->whole_numbers ? 0.0f : 1.0f, spread = p->spread > 0 ? p->spread : range;
    float *hidden = input_floats(s, "hidden", p->rows * p->d_model, -spread, spread);
    void *weight = input_weights(s, "weight", p->type, p->vocab, p->d_model, p->d_model, -range, range);
    if (p->whole_numbers) { /* hidden (1, 0, 0 ...), weight (id mod 3, 0 ...) */
        for (int64_t t = 0; t < p->rows; t++)
            hidden[t * p->d_model] = 1.0f;
        for (int64_t j = 0; j < p->vocab; j++) {
            float value = (float)(j % 3);
            char *to = (char *)weight + (size_t)(j * p->d_model) * kernel_type_size(p->type);
            assert_int_equal(kernels_reference()->cast(NULL, to, p->type, &value, TYPE_F32, 1), KERNEL_OK);
        }
        inputs_settle(s);
    }
    double *loss_sum = scratch_bytes(s, "loss_sum", sizeof(double));
    int64_t *n_correct = scratch_bytes(s, "n_correct", sizeof(int64_t));
    *loss_sum = 1.5; /* both accumulate */
    *n_correct = 3;
    int64_t workspace = s->ops->head_workspace(p->rows, p->d_model, p->vocab, p->backward);
    struct head_args h = {
        .rows = p->rows,
        .d_model = p->d_model,
        .vocab = p->vocab,
        .hidden = hidden,
        .weight = weight,
        .weight_type = p->type,
        .targets = input_ids(s, "targets", p->rows, -(int32_t)p->vocab / 4 - 1, (int32_t)p->vocab),
        .logprobs = p->scores ? output_floats(s, "logprobs", p->rows, SUMMED) : NULL,
        .argmax = p->scores ? output_ids(s, "argmax", p->rows) : NULL,
        .n_top = p->n_top,
        .top_ids = p->n_top > 0 ? output_ids(s, "top_ids", p->rows * p->n_top) : NULL,
        .top_logprobs = p->n_top > 0 ? output_floats(s, "top_logprobs", p->rows * p->n_top, SUMMED) : NULL,
        .loss_sum = p->scores ? loss_sum : NULL,
        .n_correct = p->scores ? n_correct : NULL,
        .d_hidden = p->backward ? output_floats(s, "d_hidden", p->rows * p->d_model, SUMMED) : NULL,
        .d_weight =
            p->d_weight ? accumulated_rows(s, "d_weight", p->vocab, p->d_model, p->d_model, SUMMED) : NULL,
        .grad_scale = 0.125f,
        .workspace = scratch_bytes(s, "workspace", workspace),
        .workspace_bytes = workspace,
    };
    float *loss = output_floats(s, "loss", 1, SUMMED);
    int32_t *correct = output_ids(s, "correct", 1);
    assert_int_equal(s->ops->head(s->device, &h), KERNEL_OK);
    *loss = (float)*loss_sum;
    *correct = (int32_t)*n_correct;
}

static void test_head(void **state)
{
    (void)state;
    static const int64_t rows[] = {1, 3, 63, 64, 65, 151};
    static const int64_t vocabs[] = {2, 33, 256, 1003};
    for (int i = 0; i < 6; i++) {
        for (int j = 0; j < 4; j++) {
            struct head_case p = {
                .rows = rows[i],
                .d_model = j % 2 == 0 ? 24 : 31,
                .vocab = vocabs[j],
                .type = weight_types[(i + j) % 3],
                .n_top = j == 0 ? i % 3 : (i + j) % 2 * (i == 1 ? 1 : KERNEL_TOP_MAX),
                .scores = (i + j) % 3 != 0,
                .backward = (i + j) % 4 != 0,
                .d_weight = (i + j) % 4 == 1,
            };
            compare_backends(head_case, &p, "head rows %lld vocab %lld %s", (long long)p.rows,
                             (long long)p.vocab, kernel_type_name(p.type));
        }
    }
    struct head_case p = {
        .rows = 1134, .d_model = 8, .vocab = 130, .scores = true, .backward = true, .d_weight = true};
    compare_backends(head_case, &p, "head rows 1134");
    /* What a GPU does without logits in memory: whole pieces of 64 columns, ids by eights. */
    static const int64_t tiles[][3] = {
        {1, 64, 8}, {63, 64, 264}, {129, 128, 1000}, {150, 128, 520}, {257, 64, 256}};
    for (int i = 0; i < 5; i++) {
        for (int j = 0; j < 6; j++) {
            p = (struct head_case){.rows = tiles[i][0],
                                   .d_model = tiles[i][1],
                                   .vocab = tiles[i][2],
                                   .type = j < 3 ? TYPE_BF16 : TYPE_F16};
            p.scores = true;
            p.backward = j % 3 > 0;
            p.d_weight = j % 3 > 1;
            compare_backends(head_case, &p, "head in tiles, %s, rows %lld vocab %lld",
                             kernel_type_name(p.type), (long long)p.rows, (long long)p.vocab);
        }
    }
}

/* Losses of hundreds: targets whose probability no float holds. */
static void test_head_far_off(void **state)
{
    (void)state;
    struct head_case p = {
        .rows = 70, .d_model = 64, .vocab = 600, .type = TYPE_BF16, .scores = true, .spread = 60};
    compare_backends(head_case, &p, "head with improbable targets");
    p.type = TYPE_F16;
    p.spread = 15;
    p.backward = p.d_weight = true;
    compare_backends(head_case, &p, "head with improbable targets, fp16");
}

static void test_head_ties(void **state)
{
    (void)state;
    struct head_case p = {
        .rows = 5, .d_model = 8, .vocab = 67, .n_top = 20, .scores = true, .whole_numbers = true};
    for (int i = 0; i < 3; i++) {
        p.type = weight_types[i];
        compare_backends(head_case, &p, "head with ties, %s", kernel_type_name(p.type));
    }
    struct head_case tiles = {
        .rows = 70, .d_model = 64, .vocab = 600, .type = TYPE_BF16, .scores = true, .whole_numbers = true};
    compare_backends(head_case, &tiles, "head with ties in tiles");
}

struct optimizer_case {
    int64_t counts[3];
    int64_t step;
    float weight_decay, grad_scale;
    enum kernel_type copy_type;
};

/* The copy of a slice's parameters holds what a cast of them gives. */
static void check_copy(const struct param_slice *slice)
{
    size_t size = kernel_type_size(slice->copy_type);
    for (int64_t i = 0; slice->copy != NULL && i < slice->count; i++) {
        float rounded = 0;
        assert_int_equal(
            kernels_reference()->cast(NULL, &rounded, slice->copy_type, &slice->param[i], TYPE_F32, 1),
            KERNEL_OK);
        assert_memory_equal((char *)slice->copy + (size_t)i * size, &rounded, size);
    }
}

static void optimizer_case(struct session *s, const void *param)
{
    const struct optimizer_case *p = param;
    static const char *const names[3][4] = {
        {"p0", "m0", "v0", "g0"}, {"p1", "m1", "v1", "g1"}, {"p2", "m2", "v2", "g2"}};
    struct param_slice slices[3];
    for (int i = 0; i < 3; i++) {
        int64_t n = p->counts[i];
        slices[i] = (struct param_slice){
            .count = n,
            .param = accumulated_rows(s, names[i][0], 1, n, n, ELEMENTWISE),
            .m = accumulated_rows(s, names[i][1], 1, n, n, ELEMENTWISE),
            .v = accumulated_rows(s, names[i][2], 1, n, n, ELEMENTWISE),
            .grad = accumulated_rows(s, names[i][3], 1, n, n, ELEMENTWISE),
            .keep_grad = i == 1,
            .decay = i != 1,
            .copy_type = p->copy_type,
        };
        if (i > 0) /* the second one off its alignment */
            slices[i].copy = (char *)scratch_bytes(s, "copy", n * 4 + 4) + (i == 2 ? 4 : 0);
        for (int64_t j = 0; j < n; j++)
            slices[i].v[j] = slices[i].v[j] * slices[i].v[j];
    }
    double *sum = scratch_bytes(s, "sum", sizeof *sum);
    struct grad_norm_args norm = {.slices = slices, .n_slices = 3, .sum = sum};
    float *ret_norm = output_floats(s, "norm", 1, ELEMENTWISE);
    assert_int_equal(s->ops->grad_norm(s->device, &norm), KERNEL_OK);
    *ret_norm = (float)*sum;
    struct adamw_args a = {
        .slices = slices,
        .n_slices = 3,
        .lr = 1e-2f,
        .beta1 = 0.9f,
        .beta2 = 0.999f,
        .eps = 1e-8f,
        .weight_decay = p->weight_decay,
        .step = p->step,
        .grad_scale = p->grad_scale,
    };
    assert_int_equal(s->ops->adamw(s->device, &a), KERNEL_OK);
    for (int i = 0; i < 3; i++)
        for (int64_t j = 0; j < p->counts[i]; j++)
            assert_true(i == 1 ? slices[i].grad[j] != 0.0f : slices[i].grad[j] == 0.0f);
    for (int i = 0; i < 3; i++)
        check_copy(&slices[i]);
}

static void test_optimizer(void **state)
{
    (void)state;
    static const struct optimizer_case cases[] = {
        {{1, 3, 63}, 1, 0.0f, 1.0f, TYPE_F32},
        {{64, 0, 65}, 2, 0.1f, 0.25f, TYPE_BF16},
        {{151, 1134, 7}, 1000, 0.01f, 1e-3f, TYPE_F16},
        {{70001, 33000, 17}, 7, 0.1f, 0.5f, TYPE_BF16},
    };
    for (int i = 0; i < 4; i++)
        compare_backends(optimizer_case, &cases[i], "optimizer step %lld", (long long)cases[i].step);
}

/* One step by hand: m = 0.1 g, v = 0.001 g^2, both corrected to g and g^2, so p moves by lr g / |g| and the
 * decay. */
static void test_adamw_first_step(void **state)
{
    (void)state;
    const struct kernel_ops *const backends[] = {kernels_reference(), kernels_cpu()};
    for (int i = 0; i < 2; i++) {
        struct session s;
        session_open(&s, backends[i], 1);
        float p[2] = {2.0f, -1.0f}, m[2] = {0}, v[2] = {0}, g[2] = {6.0f, -0.002f};
        struct param_slice slice = {.count = 2, .param = p, .m = m, .v = v, .grad = g, .decay = true};
        struct adamw_args a = {.slices = &slice,
                               .n_slices = 1,
                               .lr = 0.1f,
                               .beta1 = 0.9f,
                               .beta2 = 0.999f,
                               .eps = 1e-8f,
                               .weight_decay = 0.5f,
                               .step = 1,
                               .grad_scale = 0.5f};
        assert_int_equal(s.ops->adamw(s.device, &a), KERNEL_OK);
        assert_true(fabsf(p[0] - (2.0f - 0.1f - 0.1f)) < 1e-6f);
        assert_true(fabsf(p[1] - (-1.0f + 0.1f + 0.05f)) < 2e-6f); /* eps shows a little */
        assert_true(fabsf(m[0] - 0.3f) < 1e-6f && fabsf(v[0] - 0.009f) < 1e-6f);
        session_close(&s);
    }
}

static void test_grad_norm_not_finite(void **state)
{
    (void)state;
    const struct kernel_ops *const backends[] = {kernels_reference(), kernels_cpu()};
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 2; i++) {
        struct session s;
        session_open(&s, backends[i], 2);
        static float g[100003];
        struct param_slice slice = {.count = 100003, .grad = g};
        double sum = 0;
        struct grad_norm_args a = {.slices = &slice, .n_slices = 1, .sum = &sum};
        for (int j = 0; j < 3; j++) {
            for (int at = 0; at < 100003; at += 50001) {
                g[at] = bad[j];
                assert_int_equal(s.ops->grad_norm(s.device, &a), KERNEL_OK);
                assert_true(j == 0 ? isnan(sum) : isinf(sum));
                g[at] = 0;
            }
        }
        g[7] = 3e30f; /* its square is beyond float, not beyond double */
        assert_int_equal(s.ops->grad_norm(s.device, &a), KERNEL_OK);
        assert_true(fabs(sum / 9e60 - 1) < 1e-6);
        g[7] = 0;
        session_close(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head),
        cmocka_unit_test(test_head_far_off),
        cmocka_unit_test(test_head_ties),
        cmocka_unit_test(test_optimizer),
        cmocka_unit_test(test_adamw_first_step),
        cmocka_unit_test(test_grad_norm_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
