/* decode.c: completions through the generator, as serving makes them: B requests at once, each a prompt of random
 * tokens and so many new ones, greedy, streamed. The bound beside each figure is the time that memory needs to read
 * the weights once and every sequence's state both ways. */
#include "tools/bench/bench.h"

#include "engine/inference/generator.h"

#include <stdio.h>
#include <stdlib.h>

enum { PREFILL_TOKENS_MOST = 8192, ADVANCES_MOST = 1 << 16 };

struct decoding {
    struct bench_bed *bed;
    struct adapter *adapter; /* or NULL */
    struct tokenizer *tokenizer;
    struct generator *generator;
    int64_t prefill_tokens;
    int64_t completion_tokens; /* of requests that are done */
    int failed;                /* the code of one that failed */
};

static void take_chunk(void *arg, int32_t index, const char *text, size_t length,
                       const struct scored_token *tokens, int32_t n_tokens, enum finish_reason finish)
{
    (void)arg, (void)index, (void)text, (void)length, (void)tokens, (void)n_tokens, (void)finish;
}

static void take_end(void *arg, int64_t prompt_tokens, int64_t completion_tokens, int code,
                     const struct error *error)
{
    struct decoding *decoding = arg;
    (void)prompt_tokens, (void)error;
    decoding->completion_tokens += completion_tokens;
    if (code)
        decoding->failed = code;
}

static int submit(struct decoding *decoding, const struct bench_case *wanted, int32_t index,
                  struct error *error)
{
    struct token_list prompt = {0};
    uint64_t id;
    int code = 0;
    for (int64_t t = 0; t < wanted->prompt && !code; t++)
        code = token_list_push(&prompt, (int32_t)(philox_uniform((uint64_t)index, (uint64_t)t) *
                                                  (float)tokenizer_size(decoding->tokenizer)));
    const struct generation_request request = {
        .adapter = decoding->adapter,
        .n_prompts = 1,
        .prompts = &prompt,
        .n = 1,
        .params = {.max_tokens = (int32_t)wanted->length,
                   .top_p = 1,
                   .repetition_penalty = 1,
                   .logprobs = -1,
                   .ignore_eos = true},
        .stream = true,
        .callbacks = {decoding, take_chunk, take_end},
    };
    code = code ? error_set(error, code, "no memory for a prompt")
                : generator_submit(decoding->generator, &request, &id, error);
    token_list_free(&prompt);
    return code;
}

static void decoding_close(struct bench_steps *steps)
{
    struct decoding *decoding = steps->state;
    if (!decoding)
        return;
    generator_free(decoding->generator);
    tokenizer_free(decoding->tokenizer);
    adapter_free(decoding->adapter);
    free(decoding);
    steps->state = NULL;
}

/* Everything submitted, nothing run. */
static int prepare(struct bench_steps *steps, const struct bench_case *wanted, struct bench_bed *bed,
                   struct error *error)
{
    struct decoding *decoding = calloc(1, sizeof *decoding);
    steps->state = decoding;
    if (!decoding)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a decoding run");
    decoding->bed = bed;
    int64_t tokens = wanted->batch * wanted->prompt;
    decoding->prefill_tokens = tokens < PREFILL_TOKENS_MOST ? tokens : PREFILL_TOKENS_MOST;
    int code = tokenizer_load(bed->folder, &decoding->tokenizer, error);
    if (!code && wanted->adapted)
        code = adapter_create(bed->model, wanted->adaptation, &wanted->lora, 1, &decoding->adapter, error);
    if (!code)
        code = generator_create(bed->model, decoding->tokenizer, wanted->batch, decoding->prefill_tokens,
                                &decoding->generator, error);
    for (int32_t i = 0; i < wanted->batch && !code; i++)
        code = submit(decoding, wanted, i, error);
    return code;
}

static int decoding_step(struct bench_steps *steps, struct error *error)
{
    struct decoding *decoding = steps->state;
    int code = generator_advance(decoding->generator, error);
    if (code < 0)
        return code;
    return decoding->failed ? error_set(error, decoding->failed, "a completion failed") : 0;
}

/* Past the prompts. */
static int decoding_open(struct bench_steps *steps, const struct bench_options *options,
                         const struct bench_case *wanted, struct bench_bed *bed, struct error *error)
{
    (void)options;
    int code = prepare(steps, wanted, bed, error);
    if (code)
        return code;
    const struct decoding *decoding = steps->state;
    int64_t chunks = wanted->batch * wanted->prompt / decoding->prefill_tokens + 2;
    for (int64_t i = 0; i < chunks && !code; i++)
        code = decoding_step(steps, error);
    return code;
}

const struct bench_steps bench_decoding_steps = {decoding_open, decoding_step, decoding_close, NULL};

/* ---- the mode ---- */

/* Runs to the end. *ret_step: the median seconds of an advance, which most often is one token for everybody. */
static int run_completions(struct bench_steps *steps, double *ret_step, double *ret_all, struct error *error)
{
    struct decoding *decoding = steps->state;
    double *seconds = malloc(ADVANCES_MOST * sizeof *seconds), all = bench_now();
    int n = 0, code = seconds ? 0 : error_set(error, ERROR_NO_MEMORY, "no memory for the times of steps");
    while (!code && n < ADVANCES_MOST && !generator_idle(decoding->generator)) {
        double began = bench_now();
        code = decoding_step(steps, error);
        seconds[n++] = bench_now() - began;
    }
    if (!code) {
        *ret_all = bench_now() - all;
        *ret_step = bench_median(seconds, n);
    }
    free(seconds);
    return code;
}

static int run_case(const struct bench_options *options, struct bench_report *report,
                    const struct bench_case *wanted, struct error *error)
{
    struct bench_bed bed = {0};
    struct bench_steps steps = bench_decoding_steps;
    struct kernel_device_info info = {0};
    double step = 0, all = 0;
    int code = bench_bed_open(options, wanted, bench_backend(options), &bed, error);
    /* Once for everything that is made when it is first used. */
    for (int run = 0; run < 2 && !code; run++) {
        code = prepare(&steps, wanted, &bed, error);
        if (!code)
            code = run_completions(&steps, &step, &all, error);
        if (!code && run == 1 && bed.ops->device_query(bed.device, &info))
            code = error_set(error, ERROR_DEVICE, "cannot query the device");
        if (!code && run == 1) {
            double tokens = (double)((struct decoding *)steps.state)->completion_tokens;
            double bytes = (double)model_weight_bytes(bed.model) +
                           2 * (double)wanted->batch * (double)model_state_bytes(bed.model);
            double rate = wanted->batch / step, share = bytes / report->machine.memory / step;
            printf("  %-44s %9.3f %10.0f %10.0f %9.3f %7.1f%%\n", wanted->text, 1e3 * step, rate,
                   tokens / all, (double)info.peak_bytes / 0x1p30, 100 * share);
            fflush(stdout);
            bench_keep(report, json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f}", "case", wanted->text,
                                         "step_seconds", step, "tokens_per_second", rate,
                                         "tokens_per_second_with_prompts", tokens / all, "seconds", all,
                                         "peak_bytes", (double)info.peak_bytes, "ceiling_share", share));
        }
        decoding_close(&steps);
    }
    bench_bed_close(&bed);
    return code;
}

int bench_decode(const struct bench_options *options, struct bench_report *report)
{
    static const char *const cpu[] = {"hatchling 1x200 decode", "hatchling 16x200 decode", NULL};
    static const char *const cuda[] = {"130m 1x128 decode",
                                       "130m 64x128 decode",
                                       "130m 256x128 decode",
                                       "1.4b 1x128 decode",
                                       "1.4b 64x128 decode",
                                       "2.8b 1x128 decode",
                                       "2.8b 64x128 decode",
                                       "2.8b 128x128 prompt2048 decode",
                                       "130m 1x128 decode lora projections",
                                       "130m 64x128 decode lora projections",
                                       "2.8b 1x128 decode lora projections",
                                       "2.8b 64x128 decode lora projections",
                                       NULL};
    bench_title(report, "decode");
    printf("  %-44s %9s %10s %10s %9s %8s\n", "", "ms a step", "tokens/s", "in all", "peak GiB", "ceiling");
    return bench_run_cases(options, report, BENCH_DECODING, bench_cases(options, cpu, cuda), run_case);
}
