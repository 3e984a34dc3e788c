/* metrics.h: counters and histograms in Prometheus' text format. Loop thread only; nothing here allocates
 * after create. */
#ifndef DAEMON_METRICS_H
#define DAEMON_METRICS_H

#include "base/buffer.h"

#include <stdint.h>

struct metrics;
struct metrics *metrics_create(void);
void metrics_free(struct metrics *metrics);

enum histogram {
    HISTOGRAM_TIME_TO_FIRST_TOKEN, /* adder_time_to_first_token_seconds */
    HISTOGRAM_INTER_TOKEN_LATENCY, /* adder_inter_token_latency_seconds */
    HISTOGRAM_REQUEST_LATENCY,     /* adder_e2e_request_latency_seconds */
    HISTOGRAM_HTTP_LATENCY,        /* adder_http_request_seconds */
    HISTOGRAM_COMMIT_SECONDS,      /* adder_store_commit_seconds */
    HISTOGRAM_COUNT
};
void metrics_observe(struct metrics *metrics, enum histogram histogram, double seconds);

enum counter {
    COUNTER_PROMPT_TOKENS,     /* adder_prompt_tokens_total */
    COUNTER_GENERATION_TOKENS, /* adder_generation_tokens_total */
    COUNTER_WORKER_RESTARTS,   /* adder_worker_restarts_total */
    COUNTER_TRAINED_TOKENS,    /* adder_trained_tokens_total */
    COUNTER_COUNT
};
void metrics_add(struct metrics *metrics, enum counter counter, double amount);
/* adder_http_requests_total{endpoint,status}. endpoint: a route's name, static. */
void metrics_http_request(struct metrics *metrics, const char *endpoint, int status);

/* Everything above in text form; gauges that have an owner elsewhere are appended by the caller with
 * metrics_gauge. */
void metrics_write(const struct metrics *metrics, struct buffer *text);
/* One label, NAME="VALUE" with VALUE escaped, as metrics_gauge takes it. Cut at size when longer. */
void metrics_label(char *ret_label, size_t size, const char *name, const char *value);
/* help and type lines are written when labels is NULL or first is true. labels: "device=\"cpu\"" or NULL. */
void metrics_gauge(struct buffer *text, const char *name, const char *help, const char *labels, double value,
                   int first);

#endif
