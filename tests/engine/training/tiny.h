/* tiny.h: a model small enough to be trained hundreds of times in a test, its tokenizer and data, in a
 * temporary folder; and a log of what a trainer reports. Helpers assert by cmocka. */
#ifndef TESTS_ENGINE_TRAINING_TINY_H
#define TESTS_ENGINE_TRAINING_TINY_H

#include "engine/training/trainer.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

enum { TINY_MAX_STEPS = 256, TINY_MAX_NOTES = 64 };

struct tiny {
    char folder[256]; /* model/, train.jsonl, valid.jsonl, and what a test makes */
    char train[512], valid[512], job[512];
    const struct kernel_ops *ops;
    struct kernel_device *device;
    struct model *model;
    struct tokenizer *tokenizer;
};
/* On the CPU, or on the first GPU under ADDERD_TEST_CUDA=1. dead: every out_proj is zero, so that no gradient reaches what lies before it in its layer. */
void tiny_open(struct tiny *tiny, bool dead);
void tiny_close(struct tiny *tiny);
/* A file of n examples; `first` varies them. */
void tiny_write_data(const char *path, int n, int first);
/* Options of a small LoRA job in tiny->job, which is emptied. */
struct trainer_options tiny_options(struct tiny *tiny);

/* What a trainer reported. A step that is reported again must be reported in the same words. */
struct run_log {
    struct training_metrics metrics[TINY_MAX_STEPS]; /* by step */
    bool reported[TINY_MAX_STEPS];
    struct training_checkpoint checkpoints[TINY_MAX_NOTES]; /* without their folder */
    int n_checkpoints;
    int64_t dropped[TINY_MAX_NOTES];
    int n_dropped;
    char newest[4096]; /* folder of the last checkpoint, "" = none */
    char messages[8192];
};
void run_log_attach(struct run_log *log, struct trainer_options *options);
/* Open, advance to the end, close. Returns how many advances it took. */
int run_whole(const struct trainer_options *options);
/* The same steps with the same numbers, bit for bit; tokens per second are not compared. */
void assert_same_runs(const struct run_log *a, const struct run_log *b);
void assert_same_files(const char *a, const char *b);
bool path_exists(const char *format, ...) __attribute__((format(printf, 1, 2)));
int count_entries(const char *folder);

#endif
