/* test_metrics.c: the text that Prometheus reads, to the byte where it matters. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon/metrics.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int occurrences(const char *text, const char *part)
{
    int n = 0;
    for (; (text = strstr(text, part)); text++)
        n++;
    return n;
}

static void expect_line(const char *text, const char *line)
{
    char wanted[512];
    snprintf(wanted, sizeof wanted, "\n%s\n", line);
    if (!strstr(text, wanted))
        fail_msg("no line '%s' in:\n%s", line, text);
}

static void test_everything(void **state)
{
    (void)state;
    struct metrics *metrics = metrics_create();
    assert_non_null(metrics);
    metrics_add(metrics, COUNTER_PROMPT_TOKENS, 3);
    metrics_add(metrics, COUNTER_PROMPT_TOKENS, 0.5);
    metrics_add(metrics, COUNTER_TRAINED_TOKENS, 12345678901.0);
    metrics_http_request(metrics, "/v1/files/{id}", 200);
    metrics_http_request(metrics, "/v1/files/{id}", 200);
    metrics_http_request(metrics, "/v1/files/{id}", 404);
    metrics_observe(metrics, HISTOGRAM_COMMIT_SECONDS, 0.0005); /* on a bound: within it */
    metrics_observe(metrics, HISTOGRAM_COMMIT_SECONDS, 0.25);
    metrics_observe(metrics, HISTOGRAM_COMMIT_SECONDS, 0.0625);
    metrics_observe(metrics, HISTOGRAM_COMMIT_SECONDS, 1000);
    struct buffer text = {0};
    metrics_write(metrics, &text);
    assert_false(text.failed);
    assert_true(text.length && text.data[text.length - 1] == '\n');
    assert_int_equal(strncmp(text.data, "# HELP ", 7), 0);

    expect_line(text.data, "adder_prompt_tokens_total 3.5");
    expect_line(text.data, "adder_generation_tokens_total 0");
    expect_line(text.data, "adder_trained_tokens_total 12345678901");
    expect_line(text.data, "# TYPE adder_http_requests_total counter\n"
                           "adder_http_requests_total{endpoint=\"/v1/files/{id}\",status=\"200\"} 2\n"
                           "adder_http_requests_total{endpoint=\"/v1/files/{id}\",status=\"404\"} 1");
    expect_line(text.data, "# TYPE adder_store_commit_seconds histogram\n"
                           "adder_store_commit_seconds_bucket{le=\"0.0005\"} 1\n"
                           "adder_store_commit_seconds_bucket{le=\"0.001\"} 1\n"
                           "adder_store_commit_seconds_bucket{le=\"0.0025\"} 1\n"
                           "adder_store_commit_seconds_bucket{le=\"0.005\"} 1\n"
                           "adder_store_commit_seconds_bucket{le=\"0.01\"} 1\n"
                           "adder_store_commit_seconds_bucket{le=\"0.025\"} 1\n"
                           "adder_store_commit_seconds_bucket{le=\"0.05\"} 1\n"
                           "adder_store_commit_seconds_bucket{le=\"0.1\"} 2\n"
                           "adder_store_commit_seconds_bucket{le=\"0.25\"} 3\n"
                           "adder_store_commit_seconds_bucket{le=\"0.5\"} 3\n"
                           "adder_store_commit_seconds_bucket{le=\"1\"} 3\n"
                           "adder_store_commit_seconds_bucket{le=\"2.5\"} 3\n"
                           "adder_store_commit_seconds_bucket{le=\"5\"} 3\n"
                           "adder_store_commit_seconds_bucket{le=\"+Inf\"} 4\n"
                           "adder_store_commit_seconds_sum 1000.313\n"
                           "adder_store_commit_seconds_count 4");
    /* One HELP and one TYPE each, and HELP right before TYPE. */
    int families = occurrences(text.data, "# HELP ");
    assert_int_equal(families, COUNTER_COUNT + 1 + HISTOGRAM_COUNT);
    assert_int_equal(occurrences(text.data, "# TYPE "), families);
    assert_int_equal(occurrences(text.data, "_bucket{le=\"+Inf\"}"), HISTOGRAM_COUNT);
    buffer_free(&text);
    metrics_free(metrics);
    metrics_free(NULL);
}

static void test_many_endpoints_are_bounded(void **state)
{
    (void)state;
    struct metrics *metrics = metrics_create();
    assert_non_null(metrics);
    for (int round = 0; round < 2; round++)
        for (int status = 0; status < 700; status++)
            metrics_http_request(metrics, "/x", 1000 + status);
    struct buffer text = {0};
    metrics_write(metrics, &text);
    expect_line(text.data, "adder_http_requests_total{endpoint=\"/x\",status=\"1510\"} 2");
    expect_line(text.data,
                "adder_http_requests_total{endpoint=\"other\",status=\"0\"} 378"); /* 2 * (700 - 511) */
    buffer_free(&text);
    metrics_free(metrics);
}

static void test_gauges(void **state)
{
    (void)state;
    struct buffer text = {0};
    char label[64];
    metrics_gauge(&text, "adder_plain", "Back\\slash and\nline.", NULL, 1, 0);
    metrics_label(label, sizeof label, "device", "a\"b\\c\nd");
    metrics_gauge(&text, "adder_two", "Two.", label, (double)NAN, 1);
    metrics_label(label, sizeof label, "device", "cpu");
    metrics_gauge(&text, "adder_two", "Two.", label, (double)INFINITY, 0);
    metrics_gauge(&text, "adder_two", "Two.", "device=\"x\",n=\"1\"", -0.1, 0);
    assert_string_equal(text.data, "# HELP adder_plain Back\\\\slash and\\nline.\n"
                                   "# TYPE adder_plain gauge\n"
                                   "adder_plain 1\n"
                                   "# HELP adder_two Two.\n"
                                   "# TYPE adder_two gauge\n"
                                   "adder_two{device=\"a\\\"b\\\\c\\nd\"} NaN\n"
                                   "adder_two{device=\"cpu\"} +Inf\n"
                                   "adder_two{device=\"x\",n=\"1\"} -0.1\n");
    buffer_free(&text);
    char tight[] = "................";
    metrics_label(tight, 12, "device", "\"\"\"");
    assert_string_equal(tight, "device=\"\\\"\"");
    metrics_label(tight, 8, "device", "cpu");
    assert_string_equal(tight, "");
    /* What was written reads back as the same double. */
    const double values[] = {1.0 / 3, 1e-300, 123456789.123456789, 0x1p60};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        metrics_gauge(&text, "g", "", "a=\"b\"", values[i], 0);
        assert_true(strtod(strchr(text.data, ' '), NULL) == values[i]);
        buffer_free(&text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_everything),
        cmocka_unit_test(test_many_endpoints_are_bounded),
        cmocka_unit_test(test_gauges),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
