/* test_store_evaluations.c: what evaluations have scored: sums, ranges, pages, rows said twice. */
#include "fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int make_evaluation(struct fixture *fixture, const char *id)
{
    struct told told = {0};
    struct job_resource job = make_job(id);
    job.kind = JOB_EVALUATION;
    job.training_file[0] = '\0';
    store_job_insert(fixture->store, &job, NULL, tell, &told);
    fixture_run(fixture);
    return told.code;
}

static struct evaluation_unit_resource unit_of(const char *task, int64_t shots)
{
    struct evaluation_unit_resource unit = {.model = "hatchling",
                                            .precision = "fp32",
                                            .parent = "mmlu",
                                            .group = "stem",
                                            .num_fewshot = shots,
                                            .metrics = "acc",
                                            .pool = "dev.csv",
                                            .tokens = 100,
                                            .tokens_run = 30,
                                            .seconds = 0.5};
    snprintf(unit.task, sizeof unit.task, "%s", task);
    return unit;
}

static int insert(struct fixture *fixture, const char *evaluation,
                  const struct evaluation_unit_resource *unit, int64_t first, size_t count)
{
    struct told told = {0};
    struct evaluation_row *rows = calloc(count + 1, sizeof *rows);
    for (size_t i = 0; i < count; i++) {
        rows[i] = (struct evaluation_row){.document = first + (int64_t)i,
                                          .acc = (first + (int64_t)i) % 2,
                                          .acc_norm = true,
                                          .log_likelihood = first + (int64_t)i == 9 ? (double)NAN : -0.5};
        assert_true(asprintf(&rows[i].detail, "{\"doc\":%zu}", (size_t)first + i) > 0);
    }
    store_evaluation_insert(fixture->store, evaluation, unit, rows, count, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.calls, 1);
    return told.code;
}

struct units {
    int code;
    size_t count;
    struct evaluation_unit_resource items[8];
};

static void on_units(void *arg, int code, const struct evaluation_unit_resource *items, size_t count)
{
    struct units *units = arg;
    units->code = code;
    units->count = count;
    assert_true(count <= 8);
    if (count)
        memcpy(units->items, items, count * sizeof *items);
}

static void on_scored(void *arg, int code, const char *scored)
{
    assert_int_equal(code, 0);
    snprintf(arg, 512, "%s", scored);
}

static void test_batches_add_up(void **state)
{
    struct fixture *fixture = *state;
    struct evaluation_unit_resource unit = unit_of("mmlu_anatomy", 5), other = unit_of("mmlu_anatomy", 0);
    struct units units;
    char scored[512];
    assert_int_equal(make_evaluation(fixture, "eval-1"), 0);
    assert_int_equal(make_evaluation(fixture, "eval-2"), 0);
    assert_int_equal(insert(fixture, "eval-1", &unit, 4, 3), 0);
    assert_int_equal(insert(fixture, "eval-1", &other, 8, 2), 0);
    assert_int_equal(insert(fixture, "eval-1", &unit, 0, 2), 0);
    assert_int_equal(insert(fixture, "eval-1", &unit, 5, 2),
                     0); /* again: the rows stand, the cost was paid */
    assert_int_equal(insert(fixture, "eval-1", &unit, 0, 0), 0); /* nothing became whole */
    assert_int_equal(insert(fixture, "eval-2", &unit, 7, 1), 0);
    assert_int_equal(insert(fixture, "eval-3", &unit, 7, 1), ERROR_NOT_FOUND);

    store_evaluation_units(fixture->store, "eval-1", on_units, &units);
    fixture_run(fixture);
    assert_int_equal(units.code, 0);
    assert_int_equal(units.count, 2);
    const struct evaluation_unit_resource *first = &units.items[0];
    assert_string_equal(first->task, "mmlu_anatomy");
    assert_string_equal(first->group, "stem");
    assert_string_equal(first->pool, "dev.csv");
    assert_int_equal(first->num_fewshot, 5);
    assert_int_equal(first->n, 5);
    assert_int_equal(first->acc, 2);
    assert_int_equal(first->acc_norm, 5);
    assert_int_equal(first->tokens, 400);
    assert_int_equal(first->tokens_run, 120);
    assert_true(first->seconds == 2 && first->log_likelihood == -2.5 &&
                first->log_likelihood_squared == 1.25);
    assert_int_equal(units.items[1].n, 2);
    assert_true(isnan(units.items[1].log_likelihood) && isnan(units.items[1].log_likelihood_squared));

    store_evaluation_scored(fixture->store, "eval-1", on_scored, scored);
    fixture_run(fixture);
    assert_string_equal(
        scored, "{\"hatchling\":{\"fp32/mmlu_anatomy/5\":[[0,1],[4,6]],\"fp32/mmlu_anatomy/0\":[[8,9]]}}");
    store_evaluation_scored(fixture->store, "eval-none", on_scored, scored);
    store_evaluation_units(fixture->store, "eval-none", on_units, &units);
    fixture_run(fixture);
    assert_string_equal(scored, "{}");
    assert_int_equal(units.count, 0);
}

struct page {
    size_t count;
    int64_t last;
    bool has_more;
    char details[128];
};

static void on_examples(void *arg, int code, const struct evaluation_example *items, size_t count,
                        bool has_more)
{
    struct page *page = arg;
    assert_int_equal(code, 0);
    page->count = count;
    page->has_more = has_more;
    for (size_t i = 0; i < count; i++) {
        assert_string_equal(items[i].unit.model, "hatchling");
        strcat(page->details, items[i].detail);
        page->last = items[i].sequence;
    }
}

static void test_examples_page_by_page(void **state)
{
    struct fixture *fixture = *state;
    struct evaluation_unit_resource unit = unit_of("piqa", 1);
    struct page page = {0};
    assert_int_equal(make_evaluation(fixture, "eval-1"), 0);
    assert_int_equal(insert(fixture, "eval-1", &unit, 2, 2), 0);
    assert_int_equal(insert(fixture, "eval-1", &unit, 0, 1), 0);
    store_evaluation_examples(fixture->store, "eval-1", 0, 2, on_examples, &page);
    fixture_run(fixture);
    assert_int_equal(page.count, 2);
    assert_true(page.has_more);
    store_evaluation_examples(fixture->store, "eval-1", page.last, 2, on_examples, &page);
    fixture_run(fixture);
    assert_int_equal(page.count, 1);
    assert_false(page.has_more);
    assert_string_equal(page.details, "{\"doc\":2}{\"doc\":3}{\"doc\":0}");
}

static void count_page(void *arg, int code, const struct evaluation_example *items, size_t count,
                       bool has_more)
{
    (void)items;
    assert_int_equal(code, 0);
    *(struct page *)arg = (struct page){.count = count, .has_more = has_more};
}

/* A page has as many long examples as are a megabyte. */
static void test_pages_of_long_examples(void **state)
{
    struct fixture *fixture = *state;
    struct evaluation_unit_resource unit = unit_of("piqa", 1);
    struct evaluation_row *rows = calloc(4, sizeof *rows);
    struct page page;
    struct told told = {0};
    assert_int_equal(make_evaluation(fixture, "eval-1"), 0);
    for (int i = 0; i < 4; i++) {
        rows[i].document = i;
        assert_true(asprintf(&rows[i].detail, "{\"a\":\"%0600000d\"}", 0) > 0);
    }
    store_evaluation_insert(fixture->store, "eval-1", &unit, rows, 4, tell, &told);
    fixture_run(fixture);
    assert_int_equal(told.code, 0);
    for (int64_t after = 0; after < 4; after += 2) {
        store_evaluation_examples(fixture->store, "eval-1", after, 64, count_page, &page);
        fixture_run(fixture);
        assert_int_equal(page.count, 2);
        assert_int_equal(page.has_more, !after);
    }
}

struct listed {
    size_t count;
    char last[ID_BYTES];
    enum job_kind kind;
};

static void on_jobs(void *arg, int code, const struct job_resource *items, size_t count, bool has_more)
{
    struct listed *listed = arg;
    (void)has_more;
    assert_int_equal(code, 0);
    listed->count = count;
    for (size_t i = 0; i < count; i++) {
        snprintf(listed->last, sizeof listed->last, "%s", items[i].id);
        listed->kind = items[i].kind;
    }
}

static void on_file_deleted(void *arg, int code, const struct error *error)
{
    (void)error;
    *(int *)arg = code;
}

static void test_kinds_are_kept_apart(void **state)
{
    struct fixture *fixture = *state;
    struct listed listed;
    struct told told = {0};
    int code = 1;
    assert_int_equal(insert_job(fixture, "ftjob-1"), 0);
    assert_int_equal(insert_file(fixture, "file-documents"), 0);
    struct job_resource job = make_job("eval-1");
    char settings[] = "{\"files\":{\"a\":\"file-documents\"}}";
    job.kind = JOB_EVALUATION;
    job.training_file[0] = '\0';
    job.hyperparameters = settings;
    store_job_insert(fixture->store, &job, NULL, tell, &told);
    for (int kind = 0; kind < 2; kind++) {
        struct list_query query = {.limit = 10, .job_kind = kind ? JOB_EVALUATION : JOB_FINE_TUNING};
        store_job_list(fixture->store, &query, on_jobs, &listed);
        fixture_run(fixture);
        assert_int_equal(listed.count, 1);
        assert_string_equal(listed.last, kind ? "eval-1" : "ftjob-1");
        assert_int_equal(listed.kind, kind ? JOB_EVALUATION : JOB_FINE_TUNING);
    }
    store_file_delete(fixture->store, "file-documents", on_file_deleted, &code);
    fixture_run(fixture);
    assert_int_equal(code, ERROR_BUSY);
    job.status = JOB_CANCELLED;
    store_job_finish(fixture->store, &job, NULL, NULL, "The job was cancelled", NULL, NULL);
    store_file_delete(fixture->store, "file-documents", on_file_deleted, &code);
    fixture_run(fixture);
    assert_int_equal(code, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_batches_add_up, fixture_setup, fixture_teardown),
        cmocka_unit_test_setup_teardown(test_examples_page_by_page, fixture_setup, fixture_teardown),
        cmocka_unit_test_setup_teardown(test_pages_of_long_examples, fixture_setup, fixture_teardown),
        cmocka_unit_test_setup_teardown(test_kinds_are_kept_apart, fixture_setup, fixture_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
