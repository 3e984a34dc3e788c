/* train.c: LoRA training of hatchling through the trainer, 8 rows of 256 tokens a step: reading the data, the
 * passes, the optimizer and the reports, as a job has them. The goal is 35% of sgemm's rate at 4N operations
 * a token: 2N for the forward, 2N for the gradients of the activations. */
#include "tools/bench/bench.h"

#include "base/file.h"
#include "engine/training/trainer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ROWS = 8, ROW_TOKENS = 256, WARM_STEPS = 2, STEPS = 12, WORDS = 60000 };

struct bed {
    char folder[64]; /* the job's, temporary */
    char data[128];
    struct kernel_device *device;
    struct model *model;
    struct tokenizer *tokenizer;
    struct trainer *trainer;
};

/* One long text of more tokens than the run takes: packing cuts it into full rows. */
static int write_text(const char *path)
{
    static const char *const words[] = {"the",     "river", "of",   "a",   "small", "house",
                                        "and",     "its",   "king", "who", "said",  "that",
                                        "nothing", "was",   "lost", "in",  "winter"};
    FILE *file = fopen(path, "w");
    if (!file)
        return -1;
    fputs("{\"text\": \"", file);
    for (int i = 0; i < WORDS; i++)
        fprintf(file, "%s ", words[(unsigned)(philox_uniform(1, (uint64_t)i) * 17.0f)]);
    fputs("\"}\n", file);
    return fclose(file);
}

static int open_bed(const struct bench_options *options, struct bed *bed, struct error *error)
{
    char path[4096];
    struct trainer_options job = {
        .base_name = "hatchling",
        .spec = {.n_epochs = 1,
                 .max_steps = WARM_STEPS + STEPS,
                 .batch_size = ROWS,
                 .gradient_accumulation_steps = 1,
                 .max_seq_len = ROW_TOKENS,
                 .packing = true,
                 .adaptation = ADAPT_LORA,
                 .lora = {.targets = TARGETS_DEFAULT, .rank = 8, .alpha = 16},
                 .learning_rate = 1e-4f,
                 .beta1 = 0.9f,
                 .beta2 = 0.999f,
                 .eps = 1e-8f,
                 .max_grad_norm = 1,
                 .checkpoint_steps = WARM_STEPS + STEPS},
        .training_file = bed->data,
        .folder = bed->folder,
    };
    snprintf(bed->folder, sizeof bed->folder, "/tmp/adderd-bench-XXXXXX");
    if (!mkdtemp(bed->folder))
        return error_set(error, ERROR_IO, "cannot make a folder in /tmp");
    snprintf(bed->data, sizeof bed->data, "%s/text.jsonl", bed->folder);
    if (write_text(bed->data))
        return error_set(error, ERROR_IO, "cannot write %s", bed->data);
    if (kernels_cpu()->device_open(0, options->threads, &bed->device))
        return error_set(error, ERROR_DEVICE, "cannot open the CPU");
    snprintf(path, sizeof path, "%s/hatchling", options->models);
    int code = model_open(path, kernels_cpu(), bed->device, &bed->model, error);
    if (code)
        return code;
    snprintf(path, sizeof path, "%s/hatchling/tokenizer.json", options->models);
    code = tokenizer_load(path, &bed->tokenizer, error);
    if (code)
        return code;
    job.model = bed->model;
    job.tokenizer = bed->tokenizer;
    return trainer_open(&job, &bed->trainer, error);
}

static void close_bed(struct bed *bed)
{
    trainer_close(bed->trainer);
    tokenizer_free(bed->tokenizer);
    model_close(bed->model);
    if (bed->device)
        kernels_cpu()->device_close(bed->device);
    file_remove_tree(bed->folder, NULL);
}

/* All but the last step are timed: with that one the checkpoint is written. */
static int run_steps(struct bed *bed, double seconds[STEPS - 1], int64_t *ret_tokens, struct error *error)
{
    struct trainer_status before, after;
    for (int i = -WARM_STEPS; i < STEPS - 1; i++) {
        if (i == 0)
            trainer_status(bed->trainer, &before);
        double began = bench_now();
        int code = trainer_advance(bed->trainer, error);
        if (code < 0)
            return code;
        if (i >= 0)
            seconds[i] = bench_now() - began;
    }
    trainer_status(bed->trainer, &after);
    *ret_tokens = (after.trained_tokens - before.trained_tokens) / (STEPS - 1);
    return 0;
}

int bench_train(const struct bench_options *options, struct bench_report *report)
{
    struct bed bed = {0};
    struct error error = {0};
    double seconds[STEPS - 1];
    int64_t tokens = 0;
    int code = open_bed(options, &bed, &error);
    if (!code)
        code = run_steps(&bed, seconds, &tokens, &error);
    if (code) {
        fprintf(stderr, "adderd-bench: train: %s\n", error.message);
    } else {
        struct trainer_status status;
        trainer_status(bed.trainer, &status);
        double step = bench_median(seconds, STEPS - 1), rate = (double)tokens / step;
        double work = 4 * (double)model_parameter_count(bed.model);
        bench_title(report, "train, LoRA on hatchling through the trainer, 8 x 256 tokens");
        bench_row(report, "step", 1e3 * step, "ms", "median");
        bench_row(report, "tokens a step", (double)tokens, "", NULL);
        bench_row(report, "tokens a second", rate, "1/s", NULL);
        bench_row(report, "share of sgemm at 4N a token", 100 * work * rate / report->machine.sgemm, "%",
                  "goal: 35");
        bench_row(report, "peak memory", 1e-6 * (double)status.peak_bytes, "MB", "weights included");
        bench_row(report, "memory a token", 1e-3 * status.bytes_per_token, "kB", "of a micro-batch");
    }
    close_bed(&bed);
    return code != 0;
}
