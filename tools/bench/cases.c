/* cases.c: reading a case, and opening what it runs on. */
#include "tools/bench/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- words ---- */

static bool read_targets(const char *word, int *ret_targets)
{
    static const struct {
        const char *name;
        int targets;
    } presets[] = {{"default", TARGETS_DEFAULT},
                   {"sll", TARGETS_SLL},
                   {"all", TARGETS_ALL},
                   {"projections", TARGETS_ALL & ~TARGET_EMBEDDINGS}};
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++)
        if (!strcmp(word, presets[i].name)) {
            *ret_targets = presets[i].targets;
            return true;
        }
    char list[128], *at = NULL;
    int targets = 0;
    snprintf(list, sizeof list, "%s", word);
    for (char *name = strtok_r(list, ",", &at); name; name = strtok_r(NULL, ",", &at)) {
        int target = lora_target_from_name(name);
        if (!target)
            return false;
        targets |= target;
    }
    *ret_targets = targets;
    return targets != 0;
}

/* A whole word of `prefix` and a number. */
static bool read_number(const char *word, const char *prefix, int64_t *ret_number)
{
    size_t n = strlen(prefix);
    char *end;
    if (strncmp(word, prefix, n) || word[n] < '0' || word[n] > '9')
        return false;
    *ret_number = strtoll(word + n, &end, 10);
    return !*end && *ret_number > 0 && *ret_number <= INT32_MAX;
}

static bool read_word(const char *word, struct bench_case *wanted)
{
    int64_t number;
    char *end;
    for (int i = 0; i < BENCH_PRECISIONS; i++)
        if (!strcmp(word, training_precision_name((enum precision)i))) {
            wanted->precision = (enum precision)i;
            return true;
        }
    if (!strcmp(word, "lora") || !strcmp(word, "full")) {
        wanted->adapted = true;
        wanted->adaptation = *word == 'f' ? ADAPT_FULL : ADAPT_LORA;
        return true;
    }
    if (!strncmp(word, "within", 6)) {
        wanted->most_bytes = (int64_t)(strtod(word + 6, &end) * 0x1p30);
        return !*end && wanted->most_bytes > 0;
    }
    if (read_number(word, "recompute", &wanted->recompute))
        return true;
    if (!strcmp(word, "decode"))
        return wanted->decode = true;
    if (!strcmp(word, "evaluate"))
        return wanted->evaluate = true;
    if (read_number(word, "prompt", &wanted->prompt) || read_number(word, "shots", &wanted->shots) ||
        read_number(word, "docs", &wanted->documents) || read_number(word, "tokens", &wanted->tokens) ||
        read_number(word, "seqs", &wanted->seqs) || read_number(word, "states", &wanted->states))
        return true;
    if (read_number(word, "r", &number)) {
        wanted->lora.rank = (int32_t)number;
        return true;
    }
    number = strtoll(word, &end, 10);
    if (number > 0 && number <= INT32_MAX && *end == 'x') {
        wanted->batch = (int32_t)number;
        return read_number(end, "x", &wanted->length);
    }
    return read_targets(word, &wanted->lora.targets);
}

int bench_case_parse(const char *text, struct bench_case *ret_case, struct error *error)
{
    struct bench_case wanted = {.prompt = 64,
                                .documents = 1000,
                                .precision = PRECISION_FP32,
                                .lora = {.targets = TARGETS_DEFAULT, .rank = 8}};
    char words[sizeof wanted.text], *at = NULL;
    if (snprintf(words, sizeof words, "%s", text) >= (int)sizeof words)
        return error_set(error, ERROR_INVALID, "a case is too long: %s", text);
    strcpy(wanted.text, words);
    char *word = strtok_r(words, " ", &at);
    snprintf(wanted.model, sizeof wanted.model, "%s", word ? word : "");
    while ((word = strtok_r(NULL, " ", &at)))
        if (!read_word(word, &wanted))
            return error_set(error, ERROR_INVALID, "\"%s\" of the case \"%s\" means nothing", word, text);
    if (!*wanted.model || (!wanted.batch && !wanted.evaluate))
        return error_set(error, ERROR_INVALID, "the case \"%s\" lacks its model or its size", text);
    wanted.lora.alpha = 2 * (float)wanted.lora.rank;
    *ret_case = wanted;
    return 0;
}

/* ---- beds ---- */

const struct kernel_ops *bench_backend(const struct bench_options *options)
{
    return options->cuda ? kernels_cuda() : kernels_cpu();
}

int bench_bed_open(const struct bench_options *options, const struct bench_case *wanted,
                   const struct kernel_ops *ops, struct bench_bed *ret_bed, struct error *error)
{
    struct bench_bed bed = {.ops = ops};
    snprintf(bed.folder, sizeof bed.folder, "%s/%s", options->models, wanted->model);
    int status = ops->device_open(options->index, options->threads, &bed.device);
    if (status)
        return error_set(error, ERROR_DEVICE, "cannot open the device: %s", kernel_status_text(status));
    double began = bench_now();
    struct kernel_device_info info;
    int code = model_open(bed.folder, ops, bed.device, &bed.model, error);
    bed.load_seconds = bench_now() - began;
    if (!code && ops->device_query(bed.device, &info))
        code = error_set(error, ERROR_DEVICE, "cannot query the device");
    if (code) {
        bench_bed_close(&bed);
        return code;
    }
    bed.bytes = info.allocated_bytes;
    *ret_bed = bed;
    return 0;
}

void bench_bed_close(struct bench_bed *bed)
{
    model_close(bed->model);
    if (bed->device)
        bed->ops->device_close(bed->device);
    *bed = (struct bench_bed){0};
}

/* ---- lists of cases ---- */

const char *const *bench_cases(const struct bench_options *options, const char *const *cpu,
                               const char *const *cuda)
{
    return options->n_cases ? options->cases : options->cuda ? cuda : cpu;
}

int bench_run_cases(const struct bench_options *options, struct bench_report *report, int kinds,
                    const char *const *cases, bench_run *run)
{
    int failed = 0;
    for (; *cases; cases++) {
        struct bench_case wanted;
        struct error error = {0};
        int code = bench_case_parse(*cases, &wanted, &error);
        if (!code && !(kinds & (wanted.decode     ? BENCH_DECODING
                                : wanted.evaluate ? BENCH_EVALUATING
                                                  : BENCH_TRAINING)))
            continue;
        if (!code)
            code = run(options, report, &wanted, &error);
        if (code) {
            printf("  %-44s %s\n", *cases, error.message);
            fflush(stdout);
            failed = 1;
        }
    }
    return failed;
}
