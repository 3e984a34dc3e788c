/* metrics.c: see metrics.h. Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (0.0.4). */
#include "daemon/metrics.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BUCKETS = 20, MAX_HTTP = 512 };

static const struct {
    const char *name, *help;
    double bounds[MAX_BUCKETS]; /* upper, ascending; 0 ends them; +Inf follows by itself */
} histograms[HISTOGRAM_COUNT] = {
    [HISTOGRAM_TIME_TO_FIRST_TOKEN] = {"adder_time_to_first_token_seconds",
                                       "From a completion's arrival to its first token.",
                                       {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1,
                                        2.5, 5, 7.5, 10, 20, 40, 80}},
    [HISTOGRAM_INTER_TOKEN_LATENCY] = {"adder_inter_token_latency_seconds",
                                       "Between two tokens of one sequence.",
                                       {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15,
                                        0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5}},
    [HISTOGRAM_REQUEST_LATENCY] = {"adder_e2e_request_latency_seconds",
                                   "From a completion's arrival to its last byte.",
                                   {0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50,
                                    60, 120}},
    [HISTOGRAM_HTTP_LATENCY] = {"adder_http_request_seconds",
                                "From a request's arrival to its answer, all endpoints.",
                                {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5,
                                 10}},
    [HISTOGRAM_COMMIT_SECONDS] = {"adder_store_commit_seconds",
                                  "A transaction of the store, its fsync included.",
                                  {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5,
                                   5}},
};

static const struct {
    const char *name, *help;
} counters[COUNTER_COUNT] = {
    [COUNTER_PROMPT_TOKENS] = {"adder_prompt_tokens_total", "Tokens of prompts that were processed."},
    [COUNTER_GENERATION_TOKENS] = {"adder_generation_tokens_total", "Tokens that were generated."},
    [COUNTER_WORKER_RESTARTS] = {"adder_worker_restarts_total", "Workers that ended and were started again."},
    [COUNTER_TRAINED_TOKENS] = {"adder_trained_tokens_total", "Tokens that jobs were trained on."},
};

struct http_count {
    const char *endpoint; /* static */
    int status;
    int64_t count;
};

struct metrics {
    struct {
        int64_t counts[MAX_BUCKETS + 1]; /* one bucket's own; what is above every bound comes last */
        double sum;
    } histograms[HISTOGRAM_COUNT];
    double counters[COUNTER_COUNT];
    struct http_count http[MAX_HTTP]; /* endpoints times statuses are few; the last slot takes the rest */
    int n_http;
};

struct metrics *metrics_create(void)
{
    return calloc(1, sizeof(struct metrics));
}

void metrics_free(struct metrics *metrics)
{
    free(metrics);
}

void metrics_observe(struct metrics *metrics, enum histogram histogram, double seconds)
{
    const double *bounds = histograms[histogram].bounds;
    int bucket = 0;
    while (bucket < MAX_BUCKETS && bounds[bucket] > 0 && seconds > bounds[bucket])
        bucket++;
    metrics->histograms[histogram].counts[bucket]++;
    metrics->histograms[histogram].sum += seconds;
}

void metrics_add(struct metrics *metrics, enum counter counter, double amount)
{
    metrics->counters[counter] += amount;
}

void metrics_http_request(struct metrics *metrics, const char *endpoint, int status)
{
    for (int i = 0; i < metrics->n_http; i++)
        if (metrics->http[i].status == status && !strcmp(metrics->http[i].endpoint, endpoint)) {
            metrics->http[i].count++;
            return;
        }
    if (metrics->n_http == MAX_HTTP - 1) {
        endpoint = "other";
        status = 0;
    } else if (metrics->n_http == MAX_HTTP) {
        metrics->http[MAX_HTTP - 1].count++;
        return;
    }
    metrics->http[metrics->n_http++] = (struct http_count){endpoint, status, 1};
}

/* The shortest of the usual forms that reads back as the same double. */
static void write_number(struct buffer *text, double value)
{
    if (isnan(value)) {
        buffer_append_string(text, "NaN");
    } else if (isinf(value)) {
        buffer_append_string(text, value > 0 ? "+Inf" : "-Inf");
    } else {
        char number[32];
        snprintf(number, sizeof number, "%.15g", value);
        if (strtod(number, NULL) != value) /* exactly: that is the point */
            snprintf(number, sizeof number, "%.17g", value);
        buffer_append_string(text, number);
    }
}

static void write_family(struct buffer *text, const char *name, const char *help, const char *type)
{
    buffer_printf(text, "# HELP %s ", name);
    for (const char *c = help; *c; c++) {
        if (*c == '\n')
            buffer_append_string(text, "\\n");
        else if (*c == '\\')
            buffer_append_string(text, "\\\\");
        else
            buffer_append(text, c, 1);
    }
    buffer_printf(text, "\n# TYPE %s %s\n", name, type);
}

void metrics_label(char *ret_label, size_t size, const char *name, const char *value)
{
    /* Room is kept for the closing quote, and an escape is never cut in two. */
    int start = snprintf(ret_label, size, "%s=\"", name);
    if (start < 0 || (size_t)start + 2 > size) {
        if (size)
            ret_label[0] = '\0';
        return;
    }
    size_t length = (size_t)start;
    for (const char *c = value; *c; c++) {
        char escape = *c == '\n' ? 'n' : *c == '"' || *c == '\\' ? *c : '\0';
        if (length + (escape ? 2 : 1) + 2 > size)
            break;
        if (escape)
            ret_label[length++] = '\\';
        ret_label[length++] = escape ? escape : *c;
    }
    ret_label[length++] = '"';
    ret_label[length] = '\0';
}

static void write_histogram(const struct metrics *metrics, enum histogram histogram, struct buffer *text)
{
    const char *name = histograms[histogram].name;
    const double *bounds = histograms[histogram].bounds;
    const int64_t *counts = metrics->histograms[histogram].counts;
    write_family(text, name, histograms[histogram].help, "histogram");
    int64_t total = 0;
    int bucket = 0;
    for (; bucket < MAX_BUCKETS && bounds[bucket] > 0; bucket++) {
        total += counts[bucket];
        buffer_printf(text, "%s_bucket{le=\"", name);
        write_number(text, bounds[bucket]);
        buffer_printf(text, "\"} %lld\n", (long long)total);
    }
    total += counts[bucket];
    buffer_printf(text, "%s_bucket{le=\"+Inf\"} %lld\n%s_sum ", name, (long long)total, name);
    write_number(text, metrics->histograms[histogram].sum);
    buffer_printf(text, "\n%s_count %lld\n", name, (long long)total);
}

void metrics_write(const struct metrics *metrics, struct buffer *text)
{
    for (int i = 0; i < COUNTER_COUNT; i++) {
        write_family(text, counters[i].name, counters[i].help, "counter");
        buffer_printf(text, "%s ", counters[i].name);
        write_number(text, metrics->counters[i]);
        buffer_append_string(text, "\n");
    }
    write_family(text, "adder_http_requests_total", "Requests that were answered.", "counter");
    for (int i = 0; i < metrics->n_http; i++) {
        const struct http_count *http = &metrics->http[i];
        char endpoint[256];
        metrics_label(endpoint, sizeof endpoint, "endpoint", http->endpoint);
        buffer_printf(text, "adder_http_requests_total{%s,status=\"%d\"} %lld\n", endpoint, http->status,
                      (long long)http->count);
    }
    for (int i = 0; i < HISTOGRAM_COUNT; i++)
        write_histogram(metrics, (enum histogram)i, text);
}

void metrics_gauge(struct buffer *text, const char *name, const char *help, const char *labels, double value,
                   int first)
{
    if (!labels || first)
        write_family(text, name, help, "gauge");
    buffer_append_string(text, name);
    if (labels)
        buffer_printf(text, "{%s}", labels);
    buffer_append_string(text, " ");
    write_number(text, value);
    buffer_append_string(text, "\n");
}
