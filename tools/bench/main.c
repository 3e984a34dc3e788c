/* main.c: adderd-bench, the measurements behind docs/performance.md. Runs the modes named on the command line
 * in order, after the machine's own ceilings. */
#include "tools/bench/bench.h"

#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct bench_table {
    char title[128];
    json_t *rows; /* owned */
};

static const struct mode {
    const char *name;
    int (*run)(const struct bench_options *options, struct bench_report *report);
    const char *about;
} modes[] = {
    {"machine", NULL, "the ceilings alone: sgemm rate, memory bandwidth"},
    {"ops", bench_ops, "every kernel at hatchling's shapes, training and decoding"},
    {"train", bench_train, "LoRA training of hatchling through the trainer"},
    {"decode", bench_decode, "decoding with hatchling, 1 and 16 sequences"},
    {"serve", bench_serve, "the daemon: start, memory, latency under load"},
};
enum { N_MODES = sizeof(modes) / sizeof(modes[0]) };

double bench_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, compare);
    return values[count / 2];
}

/* ---- the report ---- */

void bench_title(struct bench_report *report, const char *title)
{
    printf("\n%s\n", title);
    fflush(stdout);
    struct bench_table *tables =
        realloc(report->tables, (size_t)(report->n_tables + 1) * sizeof(*report->tables));
    if (tables == NULL) {
        report->failed = true;
        return;
    }
    report->tables = tables;
    struct bench_table *table = &tables[report->n_tables++];
    snprintf(table->title, sizeof(table->title), "%s", title);
    table->rows = json_array();
}

static void keep(struct bench_report *report, json_t *row)
{
    if (report->n_tables == 0 || json_array_append_new(report->tables[report->n_tables - 1].rows, row) != 0)
        report->failed = true;
}

void bench_row(struct bench_report *report, const char *name, double value, const char *unit,
               const char *note)
{
    printf("  %-34s %10.4g %-8s %s\n", name, value, unit, note != NULL ? note : "");
    fflush(stdout);
    keep(report,
         json_pack("{s:s, s:f, s:s, s:s*}", "name", name, "value", value, "unit", unit, "note", note));
}

void bench_op(struct bench_report *report, const struct bench_op *op, double step_seconds)
{
    double arithmetic = op->flop / report->machine.sgemm, traffic = op->bytes / report->machine.read;
    double share = (arithmetic > traffic ? arithmetic : traffic) / op->seconds;
    printf("  %-34s %5.0f x %9.1f us %6.1f%% of step %8.1f GFLOP/s %7.1f GB/s %5.0f%% of ceiling\n", op->name,
           op->calls, 1e6 * op->seconds / op->calls, 100 * op->seconds / step_seconds,
           1e-9 * op->flop / op->seconds, 1e-9 * op->bytes / op->seconds, 100 * share);
    fflush(stdout);
    keep(report, json_pack("{s:s, s:f, s:f, s:f, s:f, s:f}", "name", op->name, "calls", op->calls, "seconds",
                           op->seconds, "flop", op->flop, "bytes", op->bytes, "ceiling_share", share));
}

static int write_json(const struct bench_report *report, const char *path)
{
    json_t *root = json_object();
    for (int i = 0; i < report->n_tables; i++)
        json_object_set(root, report->tables[i].title, report->tables[i].rows);
    int status = report->failed ? -1 : json_dump_file(root, path, JSON_INDENT(2));
    json_decref(root);
    if (status != 0)
        fprintf(stderr, "adderd-bench: cannot write %s\n", path);
    return status != 0;
}

/* ---- the command line ---- */

static void usage(FILE *file)
{
    fprintf(file, "usage: adderd-bench [options] [mode ...]\n\n"
                  "  --threads N      threads of the kernels (0: all processors)\n"
                  "  --adderd PATH    the program that `serve` starts (build/adderd)\n"
                  "  --models-dir DIR where hatchling is (models)\n"
                  "  --json FILE      write every figure there as well\n\n"
                  "modes, all of them when none is named; the machine is always measured first:\n");
    for (int i = 0; i < N_MODES; i++)
        fprintf(file, "  %-16s %s\n", modes[i].name, modes[i].about);
}

static const struct mode *mode_named(const char *name)
{
    for (int i = 0; i < N_MODES; i++)
        if (strcmp(modes[i].name, name) == 0)
            return &modes[i];
    return NULL;
}

static int run_modes(const struct bench_options *options, struct bench_report *report, char **names,
                     int count)
{
    for (int i = 0; i < count; i++) {
        if (mode_named(names[i]) == NULL) {
            fprintf(stderr, "adderd-bench: no mode \"%s\"; --help lists them\n", names[i]);
            return 2;
        }
    }
    int failed = bench_machine(options, report);
    for (int i = 0; i < N_MODES && !failed; i++) {
        bool wanted = count == 0;
        for (int j = 0; j < count; j++)
            wanted = wanted || strcmp(names[j], modes[i].name) == 0;
        if (wanted && modes[i].run != NULL)
            failed = modes[i].run(options, report);
    }
    return failed;
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"threads", required_argument, NULL, 't'},
        {"adderd", required_argument, NULL, 'a'},
        {"models-dir", required_argument, NULL, 'm'},
        {"json", required_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    struct bench_options options = {.adderd = "build/adderd", .models = "models"};
    struct bench_report report = {0};
    const char *json = NULL;
    int option;
    while ((option = getopt_long(argc, argv, "h", known, NULL)) != -1) {
        if (option == 't')
            options.threads = atoi(optarg);
        else if (option == 'a')
            options.adderd = optarg;
        else if (option == 'm')
            options.models = optarg;
        else if (option == 'j')
            json = optarg;
        else {
            usage(option == 'h' ? stdout : stderr);
            return option == 'h' ? 0 : 2;
        }
    }
    int failed = run_modes(&options, &report, argv + optind, argc - optind);
    if (json != NULL && !failed)
        failed = write_json(&report, json);
    for (int i = 0; i < report.n_tables; i++)
        json_decref(report.tables[i].rows);
    free(report.tables);
    return failed;
}
