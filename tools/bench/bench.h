/* bench.h: what the modes of `adderd-bench` share: options, cases, the report, and the machine's ceilings, which
 * are measured first in every run so that each figure stands beside what this machine can do today. One file a
 * mode; main.c lists them. Single-threaded but for what a mode itself measures. */
#ifndef TOOLS_BENCH_BENCH_H
#define TOOLS_BENCH_BENCH_H

#include "engine/training/trainer.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum { BENCH_CASES_MOST = 256, BENCH_PRECISIONS = PRECISION_FP16 + 1 };

struct bench_options {
    const char *adderd;            /* the program to start, for modes that need a daemon */
    const char *models;            /* a models directory */
    const char *tasks, *documents; /* of evaluations: folders of definitions and data; NULL = none */
    int threads;                   /* 0 = all processors of the affinity mask */
    bool cuda;
    int index;                               /* of the GPU */
    const char *cases[BENCH_CASES_MOST + 1]; /* from the command line, NULL at the end */
    int n_cases;
};

/* ---- cases: one model in one way; cases.c ---- */

/* Words in any order after the model's name:
 *   64x512          rows of a micro-batch x tokens of a row; decoding: sequences x new tokens
 *   lora, full      what is trained; decoding: `lora` has an adapter attached
 *   default, sll, all, projections, or in_proj,x_proj,...   LoRA's targets; projections = all four
 *   r8              LoRA's rank, alpha twice that
 *   fp32, tf32, bf16, fp16
 *   recompute9      training: at least that level of recomputation
 *   within7.5       training: recompute what it takes to stay within so many GiB, weights included
 *   decode          decoding instead of training
 *   prompt64        decoding: tokens of each prompt
 *   evaluate        scoring hellaswag's documents; no BxL
 *   shots5, docs1000, tokens16384, seqs2048, states512
 *                   evaluating: examples in a prompt (0), the first so many documents (1000), tokens and sequences of a
 *                   batch, recurrent states that are kept (what the device has use for) */
struct bench_case {
    char model[64], text[160];
    bool decode, evaluate, adapted;
    int32_t batch;
    int64_t length, prompt, recompute, most_bytes, shots, documents, tokens, seqs, states;
    enum precision precision;
    enum adaptation adaptation;
    struct lora_config lora;
};
int bench_case_parse(const char *text, struct bench_case *ret_case, struct error *error);

/* What a case runs on, opened for it alone, so that no other's memory is counted. */
struct bench_bed {
    char folder[4096]; /* the model's */
    const struct kernel_ops *ops;
    struct kernel_device *device;
    struct model *model;
    double load_seconds;
    int64_t bytes; /* allocated once the model is there */
};
/* ops: the device's table, or a wrapper of it. */
int bench_bed_open(const struct bench_options *options, const struct bench_case *wanted,
                   const struct kernel_ops *ops, struct bench_bed *ret_bed, struct error *error);
void bench_bed_close(struct bench_bed *bed);
const struct kernel_ops *bench_backend(const struct bench_options *options);

/* ---- the report; main.c ---- */

/* Ceilings. CPU: sgemm on all threads (OpenBLAS's where it is installed) whatever the precision, memory far beyond
 * the last-level cache. GPU: the largest products of each precision, a copy within its memory. */
struct bench_machine {
    char name[128];
    double matrix[BENCH_PRECISIONS]; /* operations a second */
    double memory;                   /* bytes a second: read on a CPU, read and written on a GPU */
};

/* Prints as it goes and keeps everything for --json. */
struct bench_report {
    struct bench_machine machine;
    struct bench_table *tables;
    int n_tables;
    bool failed; /* out of memory: the JSON would be incomplete */
    struct {
        char model[64];
        int64_t batch, length;
        double rate, bytes; /* tokens a second, bytes a token */
    } full_fp32; /* the last full fine-tune in fp32: what others of the same model and shape beat */
};

/* Seconds of a monotonic clock. */
double bench_now(void);
/* Of count values (at least one); sorts them. */
double bench_median(double *values, int count);

/* Rows that follow belong to this table. */
void bench_title(struct bench_report *report, const char *title);
/* One figure. note may be NULL. */
void bench_row(struct bench_report *report, const char *name, double value, const char *unit,
               const char *note);
/* A row that the caller has printed; takes the reference. */
void bench_keep(struct bench_report *report, json_t *row);

/* The command line's cases, or a mode's own for the device. Lists end with NULL. */
const char *const *bench_cases(const struct bench_options *options, const char *const *cpu,
                               const char *const *cuda);
/* Runs each case of these kinds (of the others none). One that fails is one row less, for the rest are still worth
 * having. Returns 1 when any did. */
enum { BENCH_TRAINING = 1, BENCH_DECODING = 2, BENCH_EVALUATING = 4 };
typedef int bench_run(const struct bench_options *options, struct bench_report *report,
                      const struct bench_case *wanted, struct error *error);
int bench_run_cases(const struct bench_options *options, struct bench_report *report, int kinds,
                    const char *const *cases, bench_run *run);

/* ---- modes: each prints its rows and returns 0, or 1 after saying on stderr what went wrong ---- */

/* Sets report->machine, which the others need. */
int bench_machine(const struct bench_options *options, struct bench_report *report);
int bench_ops(const struct bench_options *options, struct bench_report *report);
int bench_train(const struct bench_options *options, struct bench_report *report);
int bench_paper(const struct bench_options *options, struct bench_report *report);
int bench_growth(const struct bench_options *options, struct bench_report *report);
int bench_decode(const struct bench_options *options, struct bench_report *report);
int bench_evaluate(const struct bench_options *options, struct bench_report *report);
int bench_serve(const struct bench_options *options, struct bench_report *report);

/* ---- steps, for `ops` to look into ---- */

/* Something that does the same step again and again. */
struct bench_steps {
    int (*open)(struct bench_steps *steps, const struct bench_options *options,
                const struct bench_case *wanted, struct bench_bed *bed, struct error *error);
    int (*step)(struct bench_steps *steps, struct error *error);
    void (*close)(struct bench_steps *steps);
    void *state;
};
extern const struct bench_steps bench_training_steps, bench_decoding_steps, bench_evaluating_steps;

#endif
