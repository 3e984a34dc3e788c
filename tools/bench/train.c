/* train.c: training steps as a job takes them: a micro-batch of B rows of L random tokens through the engine's
 * pass, the gradients' norm, the optimizer; the data's reading and the checkpoints are left out. Three modes over
 * lists of cases: `train` (what people run), `paper` (precisions by adaptations), `growth` (the same number of
 * tokens in ever longer rows).
 *
 * A figure is the median of 6 steps after 3 (of 3 after 2 where they are slow). Arithmetic is counted as 4 N
 * operations a token for LoRA (forward 2 N, gradients of the activations 2 N) and 6 N for a full fine-tune; N = all
 * parameters. */
#include "tools/bench/bench.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WARM_STEPS = 3, STEPS = 6, SLOW_WARM_STEPS = 2, SLOW_STEPS = 3 };
static const double slow_seconds = 0.2; /* steps that take longer are as even, and fewer do */

struct training {
    struct bench_bed *bed;
    struct adapter *adapter;
    struct pass *pass;
    struct batch *batch;
    struct param_slice *slices;
    int64_t planned_bytes, recompute, step;
    double loss; /* of the last step, a target */
};

/* Rows of random tokens, each to be predicted from those before it. */
static int make_batch(const struct bench_case *wanted, int64_t vocab, struct batch **ret_batch,
                      struct error *error)
{
    struct batch *batch;
    int64_t length = wanted->length, tokens = wanted->batch * length;
    if (batch_create(tokens, wanted->batch, &batch))
        return error_set(error, ERROR_NO_MEMORY, "no memory for a batch of %" PRId64 " tokens", tokens);
    for (int64_t t = 0; t < tokens; t++)
        batch->ids[t] = (int32_t)((double)philox_uniform(1, (uint64_t)t) * (double)vocab);
    for (int64_t t = 0; t < tokens; t++)
        batch->targets[t] = t % length + 1 < length ? batch->ids[t + 1] : -100;
    for (int32_t s = 0; s <= wanted->batch; s++)
        batch->seq_starts[s] = (int32_t)(s * length);
    batch->n_tokens = tokens;
    batch->n_seqs = wanted->batch;
    batch->n_targets = tokens - wanted->batch;
    *ret_batch = batch;
    return 0;
}

static void training_close(struct bench_steps *steps)
{
    struct training *training = steps->state;
    if (!training)
        return;
    pass_free(training->pass);
    adapter_free(training->adapter);
    batch_free(training->batch);
    free(training->slices);
    free(training);
    steps->state = NULL;
}

static int training_open(struct bench_steps *steps, const struct bench_options *options,
                         const struct bench_case *wanted, struct bench_bed *bed, struct error *error)
{
    (void)options;
    struct training *training = calloc(1, sizeof *training);
    struct model *model = bed->model;
    const struct plan_request request = {.adaptation = wanted->adaptation,
                                         .lora = wanted->lora,
                                         .max_tokens = wanted->batch * wanted->length,
                                         .max_seqs = wanted->batch,
                                         .act = training_activation_type(wanted->precision),
                                         .tf32 = wanted->precision == PRECISION_TF32,
                                         .recompute = wanted->recompute,
                                         .byte_limit =
                                             wanted->most_bytes ? wanted->most_bytes - bed->bytes : 0};
    struct memory_plan plan;
    steps->state = training;
    if (!training)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a training run");
    training->bed = bed;
    int code = model_plan(model, &request, &plan, error);
    if (!code)
        code = make_batch(wanted, model_config(model)->vocab_size, &training->batch, error);
    if (!code)
        code = adapter_create(model, wanted->adaptation, &wanted->lora, 1, &training->adapter, error);
    if (!code)
        code = pass_create(model, training->adapter, &request, &training->pass, error);
    if (code)
        return code;
    training->planned_bytes = bed->bytes + plan.total_bytes;
    training->recompute = plan.recompute;
    training->slices = calloc((size_t)training->adapter->n_parameters, sizeof *training->slices);
    if (!training->slices)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a training run");
    for (int64_t i = 0; i < training->adapter->n_parameters; i++)
        training->slices[i] = training->adapter->parameters[i].slice;
    return 0;
}

static int training_step(struct bench_steps *steps, struct error *error)
{
    struct training *training = steps->state;
    const struct kernel_ops *ops = training->bed->ops;
    struct kernel_device *device = training->bed->device;
    const struct pass_options options = {.backward = true, .first = true, .grad_scale = 1};
    const int32_t n_slices = (int32_t)training->adapter->n_parameters;
    struct pass_result result;
    int code = pass_run(training->pass, training->batch, &options, error);
    if (!code)
        code = pass_collect(training->pass, training->slices, n_slices, &result, error);
    if (code)
        return code;
    training->loss = result.loss_sum / (double)result.n_targets;
    const struct adamw_args adamw = {.slices = training->slices,
                                     .n_slices = n_slices,
                                     .lr = 1e-4f,
                                     .beta1 = 0.9f,
                                     .beta2 = 0.999f,
                                     .eps = 1e-8f,
                                     .step = ++training->step,
                                     .grad_scale = 1 / (float)result.n_targets};
    int status = 0;
    if (isfinite(result.squares)) /* fp16 may overflow: such a step changes nothing, in a job neither */
        status = ops->adamw(device, &adamw);
    if (!status)
        status = ops->synchronize(device);
    return status ? error_set(error, ERROR_DEVICE, "optimizer: %s", kernel_status_text(status)) : 0;
}

const struct bench_steps bench_training_steps = {training_open, training_step, training_close, NULL};

/* ---- cases ---- */

static int report_case(struct bench_report *report, const struct bench_case *wanted,
                       const struct training *training, double step, struct error *error)
{
    struct kernel_device_info info;
    const struct bench_bed *bed = training->bed;
    if (bed->ops->device_query(bed->device, &info))
        return error_set(error, ERROR_DEVICE, "cannot query the device");
    double tokens = (double)training->batch->n_tokens, rate = tokens / step;
    double peak = (double)info.peak_bytes, bytes = peak / tokens;
    double flop =
        (wanted->adaptation == ADAPT_FULL ? 6 : 4) * (double)model_parameter_count(bed->model) * tokens;
    double share = flop / step / report->machine.matrix[wanted->precision];
    if (wanted->adaptation == ADAPT_FULL && wanted->precision == PRECISION_FP32) {
        memcpy(report->full_fp32.model, wanted->model, sizeof wanted->model);
        report->full_fp32.batch = wanted->batch, report->full_fp32.length = wanted->length;
        report->full_fp32.rate = rate, report->full_fp32.bytes = bytes;
    }
    printf("  %-44s %9.2f %9.0f %8.3f %8.3f %9.1f %6.1f%% %9" PRId64 " %7.3f %6.1f", wanted->text, 1e3 * step,
           rate, peak / 0x1p30, (double)training->planned_bytes / 0x1p30, bytes / 1e3, 100 * share,
           training->recompute, training->loss, bed->load_seconds);
    json_t *row = json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:f, s:f}", "case", wanted->text,
                            "step_seconds", step, "tokens_per_second", rate, "peak_bytes", peak,
                            "planned_bytes", (double)training->planned_bytes, "bytes_per_token", bytes,
                            "ceiling_share", share, "recompute", (json_int_t)training->recompute, "loss",
                            training->loss, "load_seconds", bed->load_seconds);
    if (!strcmp(report->full_fp32.model, wanted->model) && report->full_fp32.batch == wanted->batch &&
        report->full_fp32.length == wanted->length) {
        double faster = rate / report->full_fp32.rate, saved = 1 - bytes / report->full_fp32.bytes;
        printf(" %8.2fx %8.1f%%", faster, 100 * saved);
        json_object_set_new(row, "speed_over_full_fp32", json_real(faster));
        json_object_set_new(row, "bytes_saved_of_full_fp32", json_real(saved));
    }
    printf("\n");
    fflush(stdout);
    bench_keep(report, row);
    return 0;
}

static int run_case(const struct bench_options *options, struct bench_report *report,
                    const struct bench_case *wanted, struct error *error)
{
    struct bench_bed bed = {0};
    struct bench_steps steps = bench_training_steps;
    double seconds[STEPS];
    int code = bench_bed_open(options, wanted, bench_backend(options), &bed, error);
    if (!code)
        code = steps.open(&steps, options, wanted, &bed, error);
    int warm = WARM_STEPS, n_steps = STEPS;
    for (int i = 0; i < warm + n_steps && !code; i++) {
        double began = bench_now();
        code = steps.step(&steps, error);
        double taken = bench_now() - began;
        if (i == SLOW_WARM_STEPS - 1 && taken > slow_seconds)
            warm = SLOW_WARM_STEPS, n_steps = SLOW_STEPS;
        if (i >= warm)
            seconds[i - warm] = taken;
    }
    if (!code)
        code = report_case(report, wanted, steps.state, bench_median(seconds, n_steps), error);
    steps.close(&steps);
    bench_bed_close(&bed);
    return code;
}

static void title(struct bench_report *report, const char *text)
{
    bench_title(report, text);
    printf("  %-44s %9s %9s %8s %8s %9s %7s %9s %7s %6s %9s %9s\n", "", "ms a step", "tokens/s", "peak GiB",
           "planned", "kB/token", "ceiling", "recompute", "loss", "load s", "full fp32", "saved");
}

static int run_cases(const struct bench_options *options, struct bench_report *report, const char *text,
                     const char *const *cases)
{
    title(report, text);
    return bench_run_cases(options, report, BENCH_TRAINING, cases, run_case);
}

int bench_train(const struct bench_options *options, struct bench_report *report)
{
    static const char *const cpu[] = {"hatchling 8x256 lora", NULL};
    /* `within`: half of what the best of others needs at that shape. */
    static const char *const cuda[] = {"130m 16x512 lora projections bf16",
                                       "130m 64x512 lora projections bf16",
                                       "130m 64x512 lora projections bf16 within14.75",
                                       "370m 16x512 lora projections bf16",
                                       "790m 8x512 lora projections bf16",
                                       "790m 8x512 lora projections bf16 within5.25",
                                       "1.4b 8x512 lora projections bf16",
                                       "1.4b 8x512 lora projections bf16 within7.2",
                                       "2.8b 8x512 lora projections bf16",
                                       "2.8b 8x512 lora projections bf16 within12.2",
                                       "130m 8x2048 lora projections bf16",
                                       "130m 1x16384 lora projections bf16",
                                       "130m 16x512 full bf16",
                                       "130m 64x512 full bf16",
                                       "790m 8x512 full bf16",
                                       "1.4b 8x512 full bf16",
                                       "2.8b 8x512 full bf16",
                                       "130m 16x512 full fp32",
                                       "130m 64x512 full fp32",
                                       "790m 8x512 full fp32",
                                       "1.4b 8x512 full fp32",
                                       "2.8b 8x512 full fp32",
                                       "790m 8x512 full tf32",
                                       NULL};
    return run_cases(options, report, "train", bench_cases(options, cpu, cuda));
}

/* Every precision and adaptation against full fp32, which comes first at each shape; then LoRA in 16 bits again, in no more
 * memory than the paper's headline leaves it (65.5% less a token, and a little). */
int bench_paper(const struct bench_options *options, struct bench_report *report)
{
    static const double paper_saving = 0.66;
    static const char *const shapes[] = {"130m 64x512", "370m 16x512", "790m 8x512", "1.4b 8x512",
                                         "2.8b 8x512"};
    static const char *const adaptations[] = {"full", "lora sll", "lora all"};
    char text[128];
    const char *const one[] = {text, NULL};
    int failed = 0;
    title(report, "precisions and adaptations");
    for (int shape = 0; shape < 5; shape++) {
        for (int adaptation = 0; adaptation < 3; adaptation++)
            for (int precision = 0; precision < BENCH_PRECISIONS; precision++) {
                snprintf(text, sizeof text, "%s %s %s", shapes[shape], adaptations[adaptation],
                         training_precision_name((enum precision)precision));
                failed |= bench_run_cases(options, report, BENCH_TRAINING, one, run_case);
            }
        if (strncmp(shapes[shape], report->full_fp32.model, strcspn(shapes[shape], " ")) != 0)
            continue; /* it failed */
        const double limit = (1 - paper_saving) * report->full_fp32.bytes *
                             (double)(report->full_fp32.batch * report->full_fp32.length);
        for (int precision = PRECISION_BF16; precision < BENCH_PRECISIONS; precision++) {
            snprintf(text, sizeof text, "%s lora all %s within%.3f", shapes[shape],
                     training_precision_name((enum precision)precision), limit / 0x1p30);
            failed |= bench_run_cases(options, report, BENCH_TRAINING, one, run_case);
        }
    }
    return failed;
}

int bench_growth(const struct bench_options *options, struct bench_report *report)
{
    enum { TOKENS = 65536, SHORTEST = 512, LENGTHS = 8 };
    char texts[LENGTHS][96];
    const char *cases[LENGTHS + 1] = {NULL};
    int length = SHORTEST;
    for (int i = 0; i < LENGTHS; i++, length *= 2) {
        snprintf(texts[i], sizeof texts[i], "130m %dx%d lora projections bf16", TOKENS / length, length);
        cases[i] = texts[i];
    }
    return run_cases(options, report, "growth with length", cases);
}
