/* Choosing tokens: each filter, penalty and bias by hand, a distribution, and the CPU backend against the
 * reference. */
#include "tests/kernels/harness.h"

enum { VOCAB = 8 };

static const struct sample_row plain_row = {
    .temperature = 1, .top_p = 1, .repetition_penalty = 1, .banned = -1};

static struct sample_args one_row(const float *logits, const struct sample_row *row, int32_t *id,
                                  float *logprob)
{
    return (struct sample_args){.rows = 1,
                                .vocab = VOCAB,
                                .logits = logits,
                                .logits_stride = VOCAB,
                                .row = row,
                                .ids = id,
                                .logprobs = logprob};
}

static int32_t choose(struct session *s, const float *logits, const struct sample_row *row)
{
    int32_t id = -1;
    float logprob;
    struct sample_args args = one_row(logits, row, &id, &logprob);
    assert_int_equal(s->ops->sample(s->device, &args), KERNEL_OK);
    return id;
}

/* The ids that ever come out over many draws, as bits. */
static uint32_t reachable(struct session *s, const float *logits, struct sample_row row)
{
    uint32_t seen = 0;
    row.seed = 5;
    for (row.position = 0; row.position < 600; row.position++)
        seen |= 1u << choose(s, logits, &row);
    return seen;
}

static void check_greedy(struct session *s)
{
    const float logits[VOCAB] = {1, 3, 2, 3, -1, 0, 0.5f, 2};
    struct sample_row row = plain_row;
    row.temperature = 0;
    assert_int_equal(choose(s, logits, &row), 1); /* ties to the lowest id */
    row.banned = 1;
    assert_int_equal(choose(s, logits, &row), 3);
    row.banned = -1;
    const struct logit_bias bias[] = {{4, 3.5f}, {4, 1.0f}, {1, -100.0f}};
    row.bias = bias;
    row.n_bias = 3;
    assert_int_equal(choose(s, logits, &row), 4);
    row.banned = 4;
    assert_int_equal(choose(s, logits, &row), 3);
}

static void check_penalties(struct session *s)
{
    const float logits[VOCAB] = {4, 3.5f, 3, -1, -9, -9, -9, -9};
    const int32_t history[] = {0, 0, 1, 1, 1, 2};
    struct sample_row row = plain_row;
    row.temperature = 0;
    row.history = history;
    row.n_history = 6;
    row.n_prompt = 2;
    row.repetition_penalty = 1.2f; /* 3.33, 2.92, 2.5 */
    assert_int_equal(choose(s, logits, &row), 0);
    row.presence_penalty = 2.0f; /* 0 is in the prompt alone */
    assert_int_equal(choose(s, logits, &row), 0);
    row.repetition_penalty = 1;
    row.n_prompt = 0;             /* 4-2, 3.5-2, 3-2 */
    row.frequency_penalty = 0.6f; /* 2-1.2, 1.5-1.8, 1-.6 */
    assert_int_equal(choose(s, logits, &row), 0);
    row.n_prompt = 1; /* 2-.6 */
    assert_int_equal(choose(s, logits, &row), 0);
    row.presence_penalty = 0;
    row.frequency_penalty = 1.0f; /* 4-1, 3.5-3, 3-1 */
    assert_int_equal(choose(s, logits, &row), 0);
    row.n_prompt = 0; /* 4-2, .5, 2: tie */
    assert_int_equal(choose(s, logits, &row), 0);
    row.frequency_penalty = 1.01f; /* 1.98, 0.47, 1.99 */
    assert_int_equal(choose(s, logits, &row), 2);
    row.frequency_penalty = 0;
    row.repetition_penalty = 10; /* a negative logit is multiplied, so it falls as well */
    const float low[VOCAB] = {-1, -2, -3, -4, -5, -6, -7, -8};
    assert_int_equal(choose(s, low, &row), 3);
}

static void check_filters(struct session *s)
{
    /* Probabilities 0.4 0.3 0.15 0.08 0.04 0.02 0.0075 0.0025, in a mixed order of ids. */
    static const float p[VOCAB] = {0.08f, 0.4f, 0.0025f, 0.3f, 0.02f, 0.15f, 0.04f, 0.0075f};
    float logits[VOCAB];
    for (int i = 0; i < VOCAB; i++)
        logits[i] = logf(p[i]) + 3;
    struct sample_row row = plain_row;
    row.top_k = 3;
    assert_int_equal(reachable(s, logits, row), 1u << 1 | 1u << 3 | 1u << 5);
    row.top_k = 1;
    assert_int_equal(reachable(s, logits, row), 1u << 1);
    row.top_k = 0;
    row.top_p = 0.6f; /* 0.4 is not enough, 0.7 is */
    assert_int_equal(reachable(s, logits, row), 1u << 1 | 1u << 3);
    row.top_p = 0.0f;
    assert_int_equal(reachable(s, logits, row), 1u << 1);
    row.top_p = 0.8f;
    row.top_k = 3; /* of the three, 0.4 0.3 0.15 become 0.47 0.35 0.18: two reach 0.8 */
    assert_int_equal(reachable(s, logits, row), 1u << 1 | 1u << 3);
    row.top_k = 0;
    row.top_p = 1;
    row.min_p = 0.3f; /* 0.12 and above */
    assert_int_equal(reachable(s, logits, row), 1u << 1 | 1u << 3 | 1u << 5);
    row.temperature = 0.5f; /* squares: 0.3 becomes 0.5625 of the highest, 0.15 becomes 0.14 */
    assert_int_equal(reachable(s, logits, row), 1u << 1 | 1u << 3);
    row.temperature = 1;
    row.banned = 1; /* then 0.3 is the highest: 0.09 and above */
    assert_int_equal(reachable(s, logits, row), 1u << 3 | 1u << 5);
    row = plain_row;
    row.top_k = 2;
    const float equal[VOCAB] = {1, 2, 2, 2, 2, 0, 0, 0};
    assert_int_equal(reachable(s, equal, row), 1u << 1 | 1u << 2); /* ties to the lowest ids */
    row.top_k = 0;
    row.banned = 4;
    assert_int_equal(reachable(s, equal, row) & 1u << 4, 0);
}

/* Pearson's chi-squared of 20000 draws; 7 degrees of freedom exceed 24.3 once in a thousand. The draws are
 * fixed. */
static void check_distribution(struct session *s)
{
    static const float p[VOCAB] = {0.3f, 0.05f, 0.2f, 0.1f, 0.05f, 0.15f, 0.1f, 0.05f};
    enum { DRAWS = 20000, ROWS = 50 };
    float logits[ROWS * VOCAB], logprobs[ROWS];
    struct sample_row rows[ROWS];
    int32_t ids[ROWS], counts[VOCAB] = {0};
    for (int i = 0; i < ROWS * VOCAB; i++)
        logits[i] = 0.5f * logf(p[i % VOCAB]);
    struct sample_args args = {.rows = ROWS,
                               .vocab = VOCAB,
                               .logits = logits,
                               .logits_stride = VOCAB,
                               .row = rows,
                               .ids = ids,
                               .logprobs = logprobs};
    for (int i = 0; i < DRAWS; i += ROWS) {
        for (int r = 0; r < ROWS; r++) {
            rows[r] = plain_row;
            rows[r].temperature = 0.5f;
            rows[r].seed = 99;
            rows[r].position = (uint64_t)(i + r);
        }
        assert_int_equal(s->ops->sample(s->device, &args), KERNEL_OK);
        for (int r = 0; r < ROWS; r++)
            counts[ids[r]]++;
    }
    double chi2 = 0;
    for (int i = 0; i < VOCAB; i++) {
        double expected = (double)p[i] * DRAWS;
        chi2 += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    assert_true(chi2 < 24.3);
}

/* The log-probabilities are the model's own, whatever was done to choose. */
static void check_logprobs(struct session *s)
{
    const float logits[VOCAB] = {0, 1, 2, 3, 4, 5, 6, 6};
    const struct logit_bias bias = {0, 50};
    struct sample_row row = plain_row;
    row.bias = &bias;
    row.n_bias = 1;
    row.n_top = 3;
    int32_t id, top_ids[KERNEL_TOP_MAX];
    float logprob, top_logprobs[KERNEL_TOP_MAX];
    struct sample_args args = one_row(logits, &row, &id, &logprob);
    args.top_ids = top_ids;
    args.top_logprobs = top_logprobs;
    assert_int_equal(s->ops->sample(s->device, &args), KERNEL_OK);
    double sum = 0;
    for (int i = 0; i < VOCAB; i++)
        sum += exp((double)logits[i]);
    assert_int_equal(id, 0);
    assert_true(fabs((double)logprob + log(sum)) < 1e-5);
    assert_int_equal(top_ids[0], 6);
    assert_int_equal(top_ids[1], 7);
    assert_int_equal(top_ids[2], 5);
    assert_true(fabs((double)top_logprobs[2] - (5 - log(sum))) < 1e-5);
}

/* Rows that a broken model or a bias can make: nothing crashes, nothing banned comes out. */
static void check_not_finite(struct session *s)
{
    struct sample_row row = plain_row;
    row.banned = 0;
    float logits[VOCAB];
    for (int i = 0; i < VOCAB; i++)
        logits[i] = -INFINITY;
    assert_int_not_equal(choose(s, logits, &row), 0);
    logits[3] = INFINITY;
    assert_int_equal(choose(s, logits, &row), 3);
    logits[3] = NAN;
    logits[5] = 1;
    assert_int_equal(choose(s, logits, &row), 5);
    for (int i = 0; i < VOCAB; i++)
        logits[i] = NAN;
    int32_t id = choose(s, logits, &row);
    assert_true(id >= 0 && id < VOCAB);
}

static void check_refusals(struct session *s)
{
    const float logits[VOCAB] = {0};
    const int32_t beyond[] = {VOCAB};
    const struct logit_bias bias = {-1, 1};
    int32_t id;
    float logprob;
    struct sample_row row = plain_row;
    struct sample_args args = one_row(logits, &row, &id, &logprob);
    row.temperature = -1;
    assert_int_equal(s->ops->sample(s->device, &args), KERNEL_INVALID);
    row.temperature = NAN;
    assert_int_equal(s->ops->sample(s->device, &args), KERNEL_INVALID);
    row = plain_row;
    row.history = beyond;
    row.n_history = 1;
    assert_int_equal(s->ops->sample(s->device, &args), KERNEL_INVALID);
    row = plain_row;
    row.bias = &bias;
    row.n_bias = 1;
    assert_int_equal(s->ops->sample(s->device, &args), KERNEL_INVALID);
}

typedef void (*sample_test)(struct session *s);

static void everywhere(void **state)
{
    sample_test test = *(sample_test *)*state;
    struct session s;
    session_open(&s, kernels_reference(), 1);
    test(&s);
    session_close(&s);
    for (int i = 0; tested_backend(i) != NULL; i++) {
        session_open(&s, tested_backend(i), 2);
        test(&s);
        session_close(&s);
    }
}

struct sample_case {
    int64_t rows, vocab, gap;
    float range; /* of the logits: a flat or a peaked distribution */
    bool plain;  /* the highest logit, with ties, and nothing else */
};

/* Every row with other settings. */
static void sample_case(struct session *s, const void *param)
{
    const struct sample_case *p = param;
    int64_t stride = p->vocab + p->gap;
    float *logits = input_rows(s, "logits", p->rows, p->vocab, stride, -p->range, p->range);
    struct sample_row rows[64];
    struct logit_bias bias[3] = {{0, 1.5f}, {(int32_t)p->vocab - 1, -2.0f}, {(int32_t)p->vocab / 2, 4.0f}};
    for (int64_t r = 0; r < p->rows; r++) {
        int32_t n_history = (int32_t)(random_next(s) % 50);
        rows[r] = (struct sample_row){
            .temperature = r % 5 == 0 ? 0.0f : 0.3f + 0.2f * (float)(r % 7),
            .top_k = r % 3 == 0 ? 0 : (int32_t)(random_next(s) % (uint64_t)(p->vocab + 20)),
            .top_p = r % 4 == 0 ? 1.0f : random_float(s, 0, 1),
            .min_p = r % 7 < 4 ? 0.0f : random_float(s, 0, 0.5f),
            .repetition_penalty = r % 2 == 0 ? 1.0f : 1.3f,
            .presence_penalty = r % 3 == 1 ? 0.5f : 0.0f,
            .frequency_penalty = r % 4 == 1 ? 0.3f : 0.0f,
            .history = input_ids(s, "history", n_history, 0, (int32_t)p->vocab),
            .n_history = n_history,
            .n_prompt = n_history / 2,
            .bias = bias,
            .n_bias = r % 3,
            .seed = 1000 + (uint64_t)r,
            .position = (uint64_t)(r * r),
            .banned = r % 2 == 0 ? -1 : (int32_t)(r % p->vocab),
            .n_top = (int32_t)(r % (KERNEL_TOP_MAX + 1) < p->vocab ? r % (KERNEL_TOP_MAX + 1) : p->vocab),
        };
    }
    for (int64_t r = 0; p->plain && r < p->rows; r++) {
        rows[r] = (struct sample_row){.top_p = 1, .repetition_penalty = 1, .banned = (int32_t)(r % 3) - 1};
        for (int64_t i = r; i < p->vocab; i += 7 + 100 * r)
            logits[r * stride + i] = p->range;
    }
    inputs_settle(s);
    struct sample_args args = {
        .rows = p->rows,
        .vocab = p->vocab,
        .logits = logits,
        .logits_stride = stride,
        .row = rows,
        .ids = output_ids(s, "ids", p->rows),
        .logprobs = output_floats(s, "logprobs", p->rows, SUMMED),
        .top_ids = output_ids(s, "top_ids", p->rows * KERNEL_TOP_MAX),
        .top_logprobs = output_floats(s, "top_logprobs", p->rows * KERNEL_TOP_MAX, SUMMED),
    };
    for (int64_t i = 0; i < p->rows * KERNEL_TOP_MAX; i++) /* beyond n_top nothing is written */
        args.top_logprobs[i] = 0.0f;
    assert_int_equal(s->ops->sample(s->device, &args), KERNEL_OK);
}

static void test_sample_compare(void **state)
{
    (void)state;
    static const struct sample_case cases[] = {
        {1, 1, 0, 1},
        {1, 2, 0, 1},
        {3, 15, 1, 3},
        {33, 16, 0, 0.1f},
        {33, 257, 3, 10},
        {33, 1003, 0, 0.5f},
        {33, 8191, 5, 4},
        {9, 50280, 0, 8},
        {9, 50280, 0, 0.2f},
        {30, 4097, 0, 15},
        {5, 3, 0, 1, true},
        {64, 1001, 2, 3, true},
        {17, 50280, 0, 8, true},
        {3, 50279, 4, 8, true},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        compare_backends(sample_case, &cases[i], "sample %lld of %lld, range %g", (long long)cases[i].rows,
                         (long long)cases[i].vocab, (double)cases[i].range);
}

#define SAMPLE_TEST(function)                                                                                \
    {                                                                                                        \
        .name = #function, .test_func = everywhere, .initial_state = &(sample_test)                          \
        {                                                                                                    \
            function                                                                                         \
        }                                                                                                    \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        SAMPLE_TEST(check_greedy),       SAMPLE_TEST(check_penalties),          SAMPLE_TEST(check_filters),
        SAMPLE_TEST(check_distribution), SAMPLE_TEST(check_logprobs),           SAMPLE_TEST(check_not_finite),
        SAMPLE_TEST(check_refusals),     cmocka_unit_test(test_sample_compare),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
