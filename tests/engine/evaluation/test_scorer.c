/* Scores of hatchling: those of one plain forward, and the same bits however the work is cut. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "engine/evaluation/scorer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DOCUMENTS = 6, CHOICES = 3, ROWS = DOCUMENTS * CHOICES, LONGEST = 250 };

struct fixture {
    const struct kernel_ops *ops;
    struct kernel_device *device;
    struct model *model;
    int32_t ids[ROWS][LONGEST];
    struct forest_row rows[ROWS];
};

static void must(int status, const struct error *error)
{
    if (status < 0)
        fail_msg("%s", error->message);
}

static uint32_t next(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 16;
}

/* Half of the documents begin with the same 90 tokens; choices share their document's, of 1 to 140, and then have 0 to 8. */
static void make_rows(struct fixture *fixture)
{
    uint32_t seed = 3;
    for (int32_t i = 0; i < DOCUMENTS; i++) {
        int32_t *first = fixture->ids[i * CHOICES], n = 0;
        for (uint32_t shared = 5; i % 2 && n < 90; n++)
            first[n] = (int32_t)(next(&shared) % 8000);
        for (int32_t end = n + 1 + (int32_t)(next(&seed) % 140); n < end; n++)
            first[n] = (int32_t)(next(&seed) % 8000);
        for (int32_t j = 0; j < CHOICES; j++) {
            int32_t *ids = fixture->ids[i * CHOICES + j], length = n + (int32_t)(next(&seed) % 9);
            if (j)
                memcpy(ids, first, (size_t)n * sizeof *ids);
            for (int32_t at = n; at < length; at++)
                ids[at] = (int32_t)(next(&seed) % 8000);
            fixture->rows[i * CHOICES + j] = (struct forest_row){ids, length, n};
        }
    }
}

static int open_fixture(void **state)
{
    char path[4096];
    struct error error = {0};
    struct fixture *fixture = calloc(1, sizeof *fixture);
    assert_non_null(fixture);
    fixture->ops = kernels_cpu();
    assert_int_equal(fixture->ops->device_open(0, 2, &fixture->device), 0);
    snprintf(path, sizeof path, "%s/models/hatchling", getenv("ADDERD_SOURCE"));
    must(model_open(path, fixture->ops, fixture->device, &fixture->model, &error), &error);
    make_rows(fixture);
    *state = fixture;
    return 0;
}

static int close_fixture(void **state)
{
    struct fixture *fixture = *state;
    model_close(fixture->model);
    fixture->ops->device_close(fixture->device);
    free(fixture);
    return 0;
}

struct way {
    int64_t max_tokens;
    int32_t max_seqs, max_states, window; /* rows of a window */
    bool share, backwards;
};

static struct scorer_status score(const struct fixture *fixture, const struct way *way,
                                  struct request_score *scores)
{
    struct error error = {0};
    struct scorer *scorer;
    struct scorer_status status;
    struct scorer_options options = {.max_tokens = way->max_tokens,
                                     .max_seqs = way->max_seqs,
                                     .max_states = way->max_states,
                                     .share = way->share};
    must(scorer_create(fixture->model, &options, &scorer, &error), &error);
    for (int32_t begin = 0; begin < ROWS; begin += way->window) {
        struct forest_row rows[ROWS];
        struct request_score window[ROWS];
        int32_t n = ROWS - begin < way->window ? ROWS - begin : way->window, more;
        for (int32_t i = 0; i < n; i++)
            rows[i] = fixture->rows[begin + (way->backwards ? n - 1 - i : i)];
        must(scorer_begin(scorer, rows, n, window, &error), &error);
        while ((more = scorer_advance(scorer, &error)) > 0)
            ;
        must(more, &error);
        for (int32_t i = 0; i < n; i++) {
            assert_int_equal(window[i].n_missing, 0);
            scores[begin + (way->backwards ? n - 1 - i : i)] = window[i];
        }
    }
    scorer_status(scorer, &status);
    scorer_free(scorer);
    return status;
}

static void test_scores_are_those_of_a_plain_forward(void **state)
{
    const struct fixture *fixture = *state;
    const struct way way = {2048, 32, 32, ROWS, true, false};
    struct request_score scores[ROWS];
    struct error error = {0};
    struct runner *runner;
    score(fixture, &way, scores);
    must(runner_create(fixture->model, LONGEST, 1, &runner, &error), &error);
    for (int32_t i = 0; i < ROWS; i++) {
        const struct forest_row *row = &fixture->rows[i];
        const int32_t starts[] = {0, row->n_ids};
        struct forward_request request = {.n_seqs = 1, .seq_starts = starts, .ids = row->ids};
        int32_t targets[LONGEST], argmax[LONGEST];
        float logprobs[LONGEST];
        double sum = 0;
        bool greedy = true;
        for (int32_t t = 0; t < row->n_ids; t++)
            targets[t] = t + 1 < row->n_ids ? row->ids[t + 1] : -1;
        must(runner_forward(runner, &request, &error), &error);
        must(runner_score(runner, 0, row->n_ids, targets, logprobs, argmax, 0, NULL, NULL, &error), &error);
        for (int32_t t = row->n_context - 1; t < row->n_ids - 1; t++) {
            sum += (double)logprobs[t];
            greedy = greedy && argmax[t] == targets[t];
        }
        assert_true(fabs(sum - scores[i].log_likelihood) < 1e-3);
        assert_int_equal(scores[i].greedy, greedy);
    }
    runner_free(runner);
}

static void test_the_same_bits_however_it_is_cut(void **state)
{
    const struct fixture *fixture = *state;
    static const struct way ways[] = {
        {4096, 64, 64, ROWS, true, false},  {4096, 64, 64, ROWS, true, true}, {128, 64, 9, ROWS, true, false},
        {200, 4, 4, ROWS, true, false},     {4096, 64, 64, 3, true, false},   {128, 1, 5, 7, true, true},
        {4096, 64, 64, ROWS, false, false}, {4096, 64, 2, 1, false, false},   {137, 3, 3, 5, false, true},
    };
    struct request_score first[ROWS], scores[ROWS];
    struct scorer_status whole = score(fixture, &ways[0], first);
    for (size_t i = 1; i < sizeof ways / sizeof *ways; i++) {
        struct scorer_status status = score(fixture, &ways[i], scores);
        for (int32_t row = 0; row < ROWS; row++) {
            assert_true(first[row].log_likelihood == scores[row].log_likelihood);
            assert_int_equal(first[row].greedy, scores[row].greedy);
        }
        assert_true(status.tokens_said == whole.tokens_said);
        assert_true(ways[i].share ? status.tokens_run >= whole.tokens_run
                                  : status.tokens_run == status.tokens_said);
    }
    assert_true(2 * whole.tokens_run < whole.tokens_said);
}

/* The most probable continuation is greedy, and another is not. */
static void test_greedy(void **state)
{
    const struct fixture *fixture = *state;
    struct error error = {0};
    struct runner *runner;
    struct scorer *scorer;
    const int32_t *context = fixture->rows[0].ids, n = fixture->rows[0].n_context;
    const int32_t starts[] = {0, n};
    int32_t ids[2][LONGEST], targets[LONGEST], argmax[LONGEST];
    must(runner_create(fixture->model, LONGEST, 1, &runner, &error), &error);
    struct forward_request request = {.n_seqs = 1, .seq_starts = starts, .ids = context};
    memset(targets, 0, sizeof targets);
    must(runner_forward(runner, &request, &error), &error);
    must(runner_score(runner, 0, n, targets, NULL, argmax, 0, NULL, NULL, &error), &error);
    for (int i = 0; i < 2; i++) {
        memcpy(ids[i], context, (size_t)n * sizeof *ids[i]);
        ids[i][n] = argmax[n - 1] + i;
    }
    const struct forest_row rows[] = {{ids[0], n + 1, n}, {ids[1], n + 1, n}};
    struct request_score scores[2];
    struct scorer_options options = {.max_tokens = 512, .max_seqs = 4, .max_states = 4, .share = true};
    must(scorer_create(fixture->model, &options, &scorer, &error), &error);
    must(scorer_begin(scorer, rows, 2, scores, &error), &error);
    while (scorer_advance(scorer, &error) > 0)
        ;
    assert_true(scores[0].greedy && !scores[1].greedy);
    assert_true(scores[0].log_likelihood > scores[1].log_likelihood);
    scorer_free(scorer);
    runner_free(runner);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scores_are_those_of_a_plain_forward),
        cmocka_unit_test(test_the_same_bits_however_it_is_cut),
        cmocka_unit_test(test_greedy),
    };
    return cmocka_run_group_tests(tests, open_fixture, close_fixture);
}
