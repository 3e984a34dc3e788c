/* test_evaluations.c: evaluations: requests decoded, results and reports encoded. */
#include "api/requests.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static int decode(const char *body, struct evaluation_request *request, struct problem *problem)
{
    json_t *json = json_loads(body, 0, NULL);
    assert_non_null(json);
    int status = evaluation_request_decode(json, request, problem);
    json_decref(json);
    return status;
}

static void test_requests(void **state)
{
    (void)state;
    static const struct {
        const char *body, *settings;
        uint64_t seed;
    } cases[] = {
        {"{\"model\":\"m\",\"tasks\":\"piqa\"}",
         "{\"models\":[\"m\"],\"tasks\":[\"piqa\"],\"num_fewshot\":[0],\"limit\":null,\"max_length\":null,"
         "\"share\":true,\"precisions\":[\"auto\"]}",
         1234},
        {"{\"model\":[\"m\",\"n\"],\"tasks\":[\"a\",\"b\"],\"num_fewshot\":[0,5.0],\"limit\":7,\"max_"
         "length\":2048,"
         "\"reuse_states\":false,\"precision\":[\"fp32\",\"bf16\"],\"seed\":0,\"metadata\":{\"a\":\"b\"}}",
         "{\"models\":[\"m\",\"n\"],\"tasks\":[\"a\",\"b\"],\"num_fewshot\":[0,5],\"limit\":7,\"max_length\":"
         "2048,\"share\":false,\"precisions\":[\"fp32\",\"bf16\"]}",
         0},
        {"{\"model\":\"m\",\"tasks\":[\"a\"],\"num_fewshot\":3,\"limit\":null,\"seed\":null}",
         "{\"models\":[\"m\"],\"tasks\":[\"a\"],\"num_fewshot\":[3],\"limit\":null,\"max_length\":null,"
         "\"share\":true,\"precisions\":[\"auto\"]}",
         1234},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct evaluation_request request;
        struct problem problem;
        if (decode(cases[i].body, &request, &problem))
            fail_msg("%s", problem.message);
        json_t *settings = json_loads(cases[i].settings, 0, NULL);
        assert_true(json_equal(request.settings, settings));
        assert_true(request.seed == cases[i].seed);
        json_decref(settings);
        evaluation_request_free(&request);
    }
}

static void test_requests_that_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *body, *message;
    } cases[] = {
        {"{\"tasks\":[\"a\"]}", "model: is required."},
        {"{\"model\":\"m\"}", "tasks: is required."},
        {"{\"model\":[],\"tasks\":[\"a\"]}", "model: must be one value or a list of 1 to 64."},
        {"{\"model\":\"m\",\"tasks\":[1]}", "tasks: element 0 must be a string of 1 to 255 bytes."},
        {"{\"model\":\"m\",\"tasks\":[\"a\",\"a\"]}", "tasks: a is there twice."},
        {"{\"model\":\"m\",\"tasks\":\"a\",\"num_fewshot\":[1,257]}",
         "num_fewshot: element 1 must be an integer from 0 to 256."},
        {"{\"model\":\"m\",\"tasks\":\"a\",\"num_fewshot\":\"3\"}",
         "num_fewshot: element 0 must be an integer from 0 to 256."},
        {"{\"model\":\"m\",\"tasks\":\"a\",\"precision\":[\"auto\",\"fp32\"]}",
         "precision: \"auto\" must stand by itself."},
        {"{\"model\":\"m\",\"tasks\":\"a\",\"num_fewshots\":3}", "Unknown parameter: num_fewshots."},
        {"{\"model\":\"m\",\"tasks\":\"a\",\"metadata\":{\"\":\"x\"}}",
         "metadata: keys must be 1 to 64 characters long."},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct evaluation_request request;
        struct problem problem;
        assert_int_equal(decode(cases[i].body, &request, &problem), -1);
        assert_int_equal(problem.status, 400);
        assert_string_equal(problem.message, cases[i].message);
    }
}

static struct evaluation_unit_resource unit(const char *model, const char *precision, const char *task,
                                            const char *group, int64_t shots, int64_t n, int64_t acc)
{
    struct evaluation_unit_resource made = {.num_fewshot = shots, .n = n, .acc = acc, .acc_norm = n - acc};
    strcpy(made.model, model);
    strcpy(made.precision, precision);
    strcpy(made.task, task);
    strcpy(made.parent, group[0] ? "mmlu" : task);
    strcpy(made.group, group);
    strcpy(made.metrics, "acc");
    return made;
}

static struct job_resource evaluation(void)
{
    static char settings[] = "{\"models\":[\"m\"],\"tasks\":[\"a\"],\"num_fewshot\":[0],\"limit\":null,\"max_"
                             "length\":null,\"share\":true}";
    return (struct job_resource){.kind = JOB_EVALUATION,
                                 .id = "eval-1",
                                 .hyperparameters = settings,
                                 .status = JOB_SUCCEEDED,
                                 .queue_position = -1,
                                 .tokens_per_second = (double)NAN,
                                 .eta_seconds = (double)NAN};
}

static double number(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_number(value))
        fail_msg("%s is no number", key);
    return json_number_value(value);
}

static bool near(double a, double b)
{
    return fabs(a - b) < 1e-12;
}

static void test_results(void **state)
{
    (void)state;
    struct job_resource job = evaluation();
    struct evaluation_unit_resource units[] = {
        unit("m", "fp32", "mmlu_a", "stem", 0, 4, 1),
        unit("m", "fp32", "mmlu_b", "other", 0, 10, 9),
        unit("m", "fp32", "lambada", "", 0, 2, 1),
        unit("m", "fp32", "one", "", 0, 1, 1),
    };
    strcpy(units[2].metrics, "perplexity acc");
    units[2].log_likelihood = -3;
    units[2].log_likelihood_squared = 5; /* -1, -2 */
    json_t *json = evaluation_encode(&job, units, 4, 0);
    assert_non_null(json);
    const json_t *results = json_object_get(json, "results");
    assert_int_equal(json_array_size(results), 7); /* mmlu, its two groups, four units */
    const json_t *whole = json_array_get(results, 0);
    assert_string_equal(json_string_value(json_object_get(whole, "task")), "mmlu");
    assert_true(near(number(whole, "acc"), 10.0 / 14) && near(number(whole, "acc_macro"), (0.25 + 0.9) / 2));
    const double a = 0.25 * 0.75 / 3, b = 0.9 * 0.1 / 9; /* squared errors */
    assert_true(near(number(whole, "acc_stderr"), sqrt((3 * a * 4 + 9 * b * 10) / 12 / 14)));
    assert_true(near(number(whole, "acc_macro_stderr"), sqrt(a + b) / 2));
    const json_t *perplexity = json_array_get(results, 5);
    assert_true(near(number(perplexity, "perplexity"), exp(1.5)));
    assert_true(near(number(perplexity, "perplexity_stderr"), exp(1.5) * sqrt(0.5 / 2)));
    const json_t *one = json_array_get(results, 6);
    assert_true(near(number(one, "acc"), 1) && json_is_null(json_object_get(one, "acc_stderr")));
    json_decref(json);
    json = evaluation_encode(&job, NULL, 0, 0);
    assert_true(json_is_null(json_object_get(json, "results")));
    json_decref(json);
}

static void test_report(void **state)
{
    (void)state;
    struct job_resource job = evaluation();
    struct evaluation_unit_resource units[] = {
        unit("base", "fp32", "a", "", 0, 100, 40),         unit("base", "fp32", "a", "", 1, 100, 44),
        unit("base", "fp32", "a", "", 5, 100, 48),         unit("base", "fp32", "mmlu_x", "stem", 0, 50, 10),
        unit("base", "fp32", "mmlu_x", "stem", 1, 50, 15), unit("base", "fp32", "mmlu_y", "stem", 0, 50, 10),
        unit("base", "fp32", "mmlu_y", "stem", 1, 50, 10), unit("tuned", "fp32", "a", "", 0, 100, 40),
        unit("tuned", "fp32", "a", "", 1, 100, 43),        unit("base", "bf16", "a", "", 0, 100, 42),
        unit("base", "bf16", "a", "", 1, 100, 44),
    };
    json_t *report = evaluation_report_encode(&job, units, sizeof units / sizeof *units);
    assert_non_null(report);
    const json_t *tables = json_object_get(report, "tables"), *base = json_array_get(tables, 0),
                 *tasks = json_object_get(base, "tasks");
    assert_int_equal(json_array_size(tables), 3);
    assert_int_equal(json_array_size(tasks), 2);
    const json_t *a = json_array_get(tasks, 0), *mmlu = json_array_get(tasks, 1);
    assert_true(near(number(json_object_get(a, "gain"), "5"), 0.08));
    assert_true(near(number(json_object_get(a, "relative_gain"), "1"), 0.1));
    assert_true(near(number(a, "aipss"), 0.15));
    assert_string_equal(json_string_value(json_object_get(mmlu, "task")), "mmlu");
    assert_true(near(number(mmlu, "aipss"), 0.25)); /* 20 to 25 of 100 */
    assert_true(near(number(base, "aipss"), 0.2));
    assert_int_equal(json_array_size(json_object_get(report, "shares")), 1); /* of one precision */
    const json_t *share = json_array_get(json_object_get(report, "shares"), 0);
    assert_string_equal(json_string_value(json_object_get(share, "model")), "tuned");
    assert_true(near(number(share, "share"), 0.075 / 0.2));
    const json_t *divergence = json_array_get(json_object_get(report, "divergence"), 0);
    assert_int_equal(json_array_size(json_object_get(report, "divergence")), 1);
    assert_true(near(number(divergence, "mean_absolute"), 0.01));
    assert_int_equal(number(divergence, "spikes"), 1);
    assert_int_equal(number(divergence, "n"), 2);
    json_decref(report);

    /* Nothing to gain over: no 0 shots, a score of 0, nothing scored. */
    struct evaluation_unit_resource few[] = {
        unit("m", "fp32", "a", "", 1, 10, 5), unit("m", "fp32", "b", "", 0, 10, 0),
        unit("m", "fp32", "b", "", 1, 10, 5), unit("m", "fp32", "c", "", 0, 0, 0)};
    report = evaluation_report_encode(&job, few, 4);
    base = json_array_get(json_object_get(report, "tables"), 0);
    assert_true(json_is_null(json_object_get(base, "aipss")));
    assert_int_equal(json_array_size(json_object_get(base, "tasks")), 2);
    json_decref(report);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_requests),
        cmocka_unit_test(test_requests_that_are_refused),
        cmocka_unit_test(test_results),
        cmocka_unit_test(test_report),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
