/* evaluate.c: an evaluation, as a worker runs one, of hellaswag's documents: four choices behind a context that few-shot examples
 * make longer. Prompts, their forest, batches and scores are timed together; the bound beside each figure is the time that the
 * products of the tokens that are run need at the rate of large ones, and of the head where a token is scored. */
#include "tools/bench/bench.h"

#include "engine/evaluation/run.h"
#include "engine/text/tokenizer.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum { WARM_DOCUMENTS = 256 };

struct evaluating {
    json_t *order;
    struct evaluation_plan *plan;
    struct tokenizer *tokenizer;
    struct adapter *adapter; /* or NULL */
    struct evaluation_run *run;
    int64_t n_documents, n_scored, n_right; /* scored: tokens */
};

static void take_result(void *arg, const struct example_result *result)
{
    struct evaluating *evaluating = arg;
    const struct example *example = result->example;
    evaluating->n_documents++;
    evaluating->n_right += result->acc_norm;
    for (int i = 0; i < example->n_requests; i++)
        evaluating->n_scored += example->requests[i].n_ids - example->requests[i].n_context;
}

static void evaluating_close(struct bench_steps *steps)
{
    struct evaluating *evaluating = steps->state;
    if (!evaluating)
        return;
    evaluation_run_close(evaluating->run);
    adapter_free(evaluating->adapter);
    tokenizer_free(evaluating->tokenizer);
    evaluation_plan_free(evaluating->plan);
    json_decref(evaluating->order);
    free(evaluating);
    steps->state = NULL;
}

static json_t *make_order(const struct bench_options *options, const struct bench_case *wanted)
{
    json_t *definition = json_sprintf("%s/hellaswag.json", options->tasks);
    return json_pack("{s:[{s:s, s:o}], s:[I], s:I, s:i, s:s, s:{}}", "tasks", "name", "hellaswag",
                     "definition", definition, "num_fewshot", (json_int_t)wanted->shots, "limit",
                     (json_int_t)wanted->documents, "seed", 1234, "data_dir", options->documents, "files");
}

static int evaluating_open(struct bench_steps *steps, const struct bench_options *options,
                           const struct bench_case *wanted, struct bench_bed *bed, struct error *error)
{
    struct evaluating *evaluating = calloc(1, sizeof *evaluating);
    steps->state = evaluating;
    if (evaluating && options->documents)
        evaluating->order = make_order(options, wanted);
    if (!options->documents)
        return error_set(error, ERROR_INVALID, "--eval-data-dir says where hellaswag's documents are");
    if (!evaluating || !evaluating->order)
        return error_set(error, ERROR_NO_MEMORY, "no memory for an evaluation");
    int code = evaluation_plan_read(evaluating->order, &evaluating->plan, error);
    if (!code)
        code = tokenizer_load(bed->folder, &evaluating->tokenizer, error);
    if (!code && wanted->adapted)
        code = adapter_create(bed->model, wanted->adaptation, &wanted->lora, 1, &evaluating->adapter, error);
    const struct evaluation_run_options run = {.plan = evaluating->plan,
                                               .model = bed->model,
                                               .tokenizer = evaluating->tokenizer,
                                               .adapter = evaluating->adapter,
                                               .max_tokens = wanted->tokens,
                                               .max_seqs = (int32_t)wanted->seqs,
                                               .max_states = (int32_t)wanted->states,
                                               .arg = evaluating,
                                               .result = take_result};
    return code ? code : evaluation_run_open(&run, &evaluating->run, error);
}

static int evaluating_step(struct bench_steps *steps, struct error *error)
{
    struct evaluating *evaluating = steps->state;
    int status = evaluation_run_advance(evaluating->run, error);
    return status < 0 ? status : 0;
}

const struct bench_steps bench_evaluating_steps = {evaluating_open, evaluating_step, evaluating_close, NULL};

/* ---- the mode ---- */

/* Weights of a layer's products, times layers. */
static double product_weights(const struct model_config *c)
{
    double inner = (double)c->d_inner, low = (double)(c->dt_rank + 2 * c->d_state);
    return (double)c->n_layers * (3 * (double)c->d_model * inner + inner * low + (double)c->dt_rank * inner);
}

static enum precision precision_of(const struct model *model)
{
    enum kernel_type type = model_inference_type(model);
    return type == TYPE_BF16 ? PRECISION_BF16 : type == TYPE_F16 ? PRECISION_FP16 : PRECISION_FP32;
}

static int run_to_the_end(const struct bench_options *options, const struct bench_case *wanted,
                          struct bench_bed *bed, struct bench_steps *steps, double *ret_seconds,
                          struct error *error)
{
    int code = steps->open(steps, options, wanted, bed, error);
    struct evaluating *evaluating = steps->state;
    double began = bench_now();
    while (!code && (code = evaluation_run_advance(evaluating->run, error)) > 0)
        code = 0;
    *ret_seconds = bench_now() - began;
    return code;
}

static void print_row(struct bench_report *report, const struct bench_case *wanted,
                      const struct bench_bed *bed, const struct evaluating *evaluating, double seconds,
                      double peak_bytes)
{
    struct scorer_status status;
    const struct evaluation_unit *unit;
    const struct model_config *config = model_config(bed->model);
    evaluation_run_status(evaluating->run, &status, &unit);
    const double documents = (double)evaluating->n_documents, tokens = (double)status.tokens_run;
    const double flop =
        2 * (tokens * product_weights(config) +
             (double)evaluating->n_scored * (double)config->d_model * (double)config->vocab_size);
    const double share = flop / report->machine.matrix[precision_of(bed->model)] / seconds;
    printf("  %-36s %8.0f %9.1f %10.0f %10.0f %9.0f %8" PRId64 " %9.2f %7.1f%%\n", wanted->text, documents,
           documents / seconds, tokens / seconds, (double)status.tokens_said / seconds,
           (double)evaluating->n_scored, status.batches, peak_bytes / 0x1p30, 100 * share);
    fflush(stdout);
    bench_keep(report,
               json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "case", wanted->text,
                         "documents", documents, "seconds", seconds, "tokens_run", tokens, "tokens_said",
                         (double)status.tokens_said, "tokens_scored", (double)evaluating->n_scored, "batches",
                         (double)status.batches, "acc_norm", (double)evaluating->n_right / documents,
                         "peak_bytes", peak_bytes, "ceiling_share", share));
}

static int run_case(const struct bench_options *options, struct bench_report *report,
                    const struct bench_case *wanted, struct error *error)
{
    struct bench_bed bed = {0};
    struct bench_steps steps = bench_evaluating_steps;
    struct bench_case first = *wanted;
    struct kernel_device_info info;
    double seconds;
    int code = bench_bed_open(options, wanted, bench_backend(options), &bed, error);
    /* Once for everything that is made when it is first used. */
    first.documents = WARM_DOCUMENTS;
    if (!code)
        code = run_to_the_end(options, &first, &bed, &steps, &seconds, error);
    evaluating_close(&steps);
    if (!code)
        code = run_to_the_end(options, wanted, &bed, &steps, &seconds, error);
    if (!code && bed.ops->device_query(bed.device, &info))
        code = error_set(error, ERROR_DEVICE, "cannot query the device");
    if (!code)
        print_row(report, wanted, &bed, steps.state, seconds, (double)info.peak_bytes);
    evaluating_close(&steps);
    bench_bed_close(&bed);
    return code;
}

int bench_evaluate(const struct bench_options *options, struct bench_report *report)
{
    static const char *const cpu[] = {"hatchling evaluate docs100", "hatchling evaluate shots5 docs100",
                                      NULL};
    static const char *const cuda[] = {"130m evaluate",        "130m evaluate shots1", "130m evaluate shots3",
                                       "130m evaluate shots5", "1.4b evaluate",        "1.4b evaluate shots1",
                                       "1.4b evaluate shots3", "1.4b evaluate shots5", NULL};
    bench_title(report, "evaluate, hellaswag");
    printf("  %-36s %8s %9s %10s %10s %9s %8s %9s %8s\n", "", "examples", "a second", "tokens/s", "as asked",
           "scored", "batches", "peak GiB", "ceiling");
    return bench_run_cases(options, report, BENCH_EVALUATING, bench_cases(options, cpu, cuda), run_case);
}
