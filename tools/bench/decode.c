/* decode.c: decoding with hatchling through the runner, one sequence alone and sixteen together: forward,
 * logits and the greedy choice of every step. Goals: alone, the time that reading the weights once would take
 * is 50% of a step; together, five times the tokens a second. */
#include "tools/bench/bench.h"

#include "engine/models/model.h"

#include <stdio.h>
#include <stdlib.h>

enum { SEQS_MOST = 16, WARM_STEPS = 16, STEPS = 200 };

struct decoder {
    struct model *model;
    struct runner *runner;
    struct state_pool *states;
    int32_t n_seqs;
    int32_t ids[SEQS_MOST], slots[SEQS_MOST], starts[SEQS_MOST + 1];
    float logprobs[SEQS_MOST];
    struct sample_row rows[SEQS_MOST];
};

static int step(struct decoder *decoder, struct error *error)
{
    const struct forward_request request = {.n_seqs = decoder->n_seqs,
                                            .seq_starts = decoder->starts,
                                            .ids = decoder->ids,
                                            .slots = decoder->slots,
                                            .states = decoder->states};
    const float *logits = NULL;
    int code = runner_forward(decoder->runner, &request, error);
    if (!code)
        code = runner_logits(decoder->runner, NULL, decoder->n_seqs, &logits, error);
    if (code)
        return code;
    const int64_t vocab = model_config(decoder->model)->vocab_size;
    const struct sample_args args = {.rows = decoder->n_seqs,
                                     .vocab = vocab,
                                     .logits = logits,
                                     .logits_stride = vocab,
                                     .row = decoder->rows,
                                     .ids = decoder->ids,
                                     .logprobs = decoder->logprobs};
    int status = model_ops(decoder->model)->sample(model_device(decoder->model), &args);
    return status ? error_set(error, ERROR_INTERNAL, "sample: %s", kernel_status_text(status)) : 0;
}

/* The median seconds of a step of n_seqs sequences. */
static int measure(struct model *model, int32_t n_seqs, double *ret_seconds, struct error *error)
{
    struct decoder decoder = {.model = model, .n_seqs = n_seqs};
    double seconds[STEPS];
    for (int32_t i = 0; i < n_seqs; i++) {
        decoder.ids[i] = 100 + i;
        decoder.slots[i] = i;
        decoder.starts[i + 1] = i + 1;
        decoder.rows[i] = (struct sample_row){.top_p = 1, .repetition_penalty = 1, .banned = -1};
    }
    int code = runner_create(model, n_seqs, n_seqs, &decoder.runner, error);
    if (!code)
        code = state_pool_create(model, n_seqs, &decoder.states, error);
    for (int32_t i = 0; i < n_seqs && !code; i++)
        code = state_pool_reset(decoder.states, i);
    for (int i = -WARM_STEPS; i < STEPS && !code; i++) {
        double began = bench_now();
        code = step(&decoder, error);
        if (i >= 0)
            seconds[i] = bench_now() - began;
    }
    if (!code)
        *ret_seconds = bench_median(seconds, STEPS);
    state_pool_free(decoder.states);
    runner_free(decoder.runner);
    return code;
}

static int run(struct bench_report *report, struct model *model, struct error *error)
{
    double alone = 0, together = 0, weights = (double)model_weight_bytes(model);
    int code = measure(model, 1, &alone, error);
    if (!code)
        code = measure(model, SEQS_MOST, &together, error);
    if (code)
        return code;
    bench_title(report, "decode, hatchling through the runner");
    bench_row(report, "step, 1 sequence", 1e3 * alone, "ms", "median");
    bench_row(report, "tokens a second, 1 sequence", 1 / alone, "1/s", NULL);
    bench_row(report, "weights", 1e-6 * weights, "MB", NULL);
    bench_row(report, "share of memory's bandwidth", 100 * weights / report->machine.read / alone, "%",
              "time to read the weights once over time taken; goal: 50");
    bench_row(report, "step, 16 sequences", 1e3 * together, "ms", "median");
    bench_row(report, "tokens a second, 16 sequences", SEQS_MOST / together, "1/s", NULL);
    bench_row(report, "tokens/s, 16 together over 1 alone", SEQS_MOST * alone / together, "x", "goal: 5");
    return 0;
}

int bench_decode(const struct bench_options *options, struct bench_report *report)
{
    struct kernel_device *device = NULL;
    struct model *model = NULL;
    struct error error = {0};
    char path[4096];
    snprintf(path, sizeof path, "%s/hatchling", options->models);
    int code = 0;
    if (kernels_cpu()->device_open(0, options->threads, &device))
        code = error_set(&error, ERROR_DEVICE, "cannot open the CPU");
    if (!code)
        code = model_open(path, kernels_cpu(), device, &model, &error);
    if (!code)
        code = run(report, model, &error);
    if (code)
        fprintf(stderr, "adderd-bench: decode: %s\n", error.message);
    model_close(model);
    if (device)
        kernels_cpu()->device_close(device);
    return code != 0;
}
