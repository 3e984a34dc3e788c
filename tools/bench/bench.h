/* bench.h: what the modes of `adderd-bench` share: options, the report, and the machine's ceilings, which are
 * measured first in every run so that each figure stands beside what this machine can do today. One file a
 * mode; main.c lists them. Single-threaded but for what a mode itself measures. */
#ifndef TOOLS_BENCH_BENCH_H
#define TOOLS_BENCH_BENCH_H

#include <stdbool.h>
#include <stdint.h>

struct bench_options {
    const char *adderd; /* the program to start, for modes that need a daemon */
    const char *models; /* a models directory with hatchling in it */
    int threads;        /* 0 = all processors of the affinity mask */
};

/* Ceilings: OpenBLAS's sgemm on all threads (2048 cubed), and memory far beyond the last-level cache. */
struct bench_machine {
    int threads;
    double sgemm;      /* operations a second */
    double read, copy; /* bytes a second; copy counts what is read and what is written */
};

/* Prints as it goes and keeps everything for --json. */
struct bench_report {
    struct bench_machine machine;
    struct bench_table *tables;
    int n_tables;
    bool failed; /* out of memory: the JSON would be incomplete */
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

/* One kind of operation within a step. */
struct bench_op {
    const char *name;
    double calls;       /* a step */
    double seconds;     /* a step, all calls */
    double flop, bytes; /* a step: arithmetic, and memory that must move at least once */
};
/* The share of the ceiling: the time that sgemm's rate or memory's bandwidth would need, whichever is longer,
 * over the time taken. step_seconds: of the whole step, for the share of it. */
void bench_op(struct bench_report *report, const struct bench_op *op, double step_seconds);

/* A mode: prints its rows, returns 0, or 1 after saying on stderr what went wrong. report->machine is set for
 * all but bench_machine, which sets it. */
int bench_machine(const struct bench_options *options, struct bench_report *report);
int bench_ops(const struct bench_options *options, struct bench_report *report);
int bench_train(const struct bench_options *options, struct bench_report *report);
int bench_decode(const struct bench_options *options, struct bench_report *report);
int bench_serve(const struct bench_options *options, struct bench_report *report);

#endif
