/* main.c: adderd-bench, the measurements behind docs/performance.md. Runs the modes named on the command line
 * in order, after the machine's own ceilings. */
#include "tools/bench/bench.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct bench_table {
    char title[128];
    json_t *rows; /* owned */
};

enum { ON_CPU = 1, ON_CUDA = 2 };
static const struct mode {
    const char *name;
    int devices; /* where it runs when no mode is named */
    int (*run)(const struct bench_options *options, struct bench_report *report);
    const char *about;
} modes[] = {
    {"machine", ON_CPU | ON_CUDA, NULL, "the ceilings alone: products, memory bandwidth"},
    {"ops", ON_CPU | ON_CUDA, bench_ops, "where a step's time goes, by operation and shape"},
    {"train", ON_CPU | ON_CUDA, bench_train, "training steps: tokens a second, memory"},
    {"paper", ON_CUDA, bench_paper, "the same for every precision and adaptation, 130m to 2.8b"},
    {"growth", ON_CUDA, bench_growth, "the same for rows of 512 to 65,536 tokens"},
    {"decode", ON_CPU | ON_CUDA, bench_decode, "completions through the generator"},
    {"evaluate", 0, bench_evaluate,
     "an evaluation of hellaswag at several shot counts; wants --eval-data-dir"},
    {"serve", ON_CPU, bench_serve, "the daemon: start, memory, latency under load"},
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

void bench_keep(struct bench_report *report, json_t *row)
{
    if (report->n_tables == 0 || json_array_append_new(report->tables[report->n_tables - 1].rows, row) != 0)
        report->failed = true;
}

void bench_row(struct bench_report *report, const char *name, double value, const char *unit,
               const char *note)
{
    printf("  %-34s %10.4g %-8s %s\n", name, value, unit, note != NULL ? note : "");
    fflush(stdout);
    bench_keep(report,
               json_pack("{s:s, s:f, s:s, s:s*}", "name", name, "value", value, "unit", unit, "note", note));
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
    fprintf(
        file,
        "usage: adderd-bench [options] [mode ...]\n\n"
        "  --device DEVICE  cpu (the default) or cuda:N\n"
        "  --threads N      threads of the CPU's kernels (0: all processors)\n"
        "  --models-dir DIR where the models are (models)\n"
        "  --tasks-dir DIR  where the tasks' definitions are (tasks)\n"
        "  --eval-data-dir DIR  where their documents are\n"
        "  --case CASE      for ops, train, decode and evaluate instead of their own; several are taken:\n"
        "                   'MODEL BxL [lora|full] [TARGETS] [rN] [fp32|tf32|bf16|fp16] [withinG] "
        "[recomputeN]'\n"
        "                   'MODEL BxL decode [lora] [promptN]'\n"
        "                   'MODEL evaluate [lora] [shotsN] [docsN]'\n"
        "  --adderd PATH    the program that `serve` starts (build/adderd)\n"
        "  --json FILE      write every figure there as well\n\n"
        "modes, all that the device has when none is named; its ceilings are always measured first:\n");
    for (int i = 0; i < N_MODES; i++)
        fprintf(file, "  %-16s %s\n", modes[i].name, modes[i].about);
}

static bool read_device(const char *name, struct bench_options *options)
{
    char *end;
    options->cuda = strncmp(name, "cuda:", 5) == 0;
    options->index = options->cuda ? (int)strtol(name + 5, &end, 10) : 0;
    return options->cuda ? name[5] != '\0' && *end == '\0' : strcmp(name, "cpu") == 0;
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
    for (int i = 0; i < N_MODES && report->machine.memory > 0; i++) {
        bool wanted = count == 0 && (modes[i].devices & (options->cuda ? ON_CUDA : ON_CPU)) != 0;
        for (int j = 0; j < count; j++)
            wanted = wanted || strcmp(names[j], modes[i].name) == 0;
        if (wanted && modes[i].run != NULL)
            failed |= modes[i].run(options, report);
    }
    return failed;
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"device", required_argument, NULL, 'd'},
        {"threads", required_argument, NULL, 't'},
        {"case", required_argument, NULL, 'c'},
        {"adderd", required_argument, NULL, 'a'},
        {"models-dir", required_argument, NULL, 'm'},
        {"tasks-dir", required_argument, NULL, 'k'},
        {"eval-data-dir", required_argument, NULL, 'e'},
        {"json", required_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    struct bench_options options = {.adderd = "build/adderd", .models = "models", .tasks = "tasks"};
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
        else if (option == 'k')
            options.tasks = optarg;
        else if (option == 'e')
            options.documents = optarg;
        else if (option == 'j')
            json = optarg;
        else if (option == 'c' && options.n_cases < BENCH_CASES_MOST)
            options.cases[options.n_cases++] = optarg;
        else if (option != 'd' || !read_device(optarg, &options)) {
            usage(option == 'h' ? stdout : stderr);
            return option == 'h' ? 0 : 2;
        }
    }
    if (options.cuda && kernels_cuda() == NULL) {
        fprintf(stderr, "adderd-bench: this build has no CUDA\n");
        return 1;
    }
    int failed = run_modes(&options, &report, argv + optind, argc - optind);
    if (json != NULL)
        failed |= write_json(&report, json);
    for (int i = 0; i < report.n_tables; i++)
        json_decref(report.tables[i].rows);
    free(report.tables);
    return failed;
}
