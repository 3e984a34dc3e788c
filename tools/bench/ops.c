/* ops.c: `adderd-bench ops`: where the time of a step goes, by operation and shape, with each operation where it
 * stands in the engine's own step, so that caches and memory are as they are in use.
 *
 * The engine gets a table of ops that wraps the device's: each call is put between two marks on the device's
 * timeline, and counted with its arithmetic and the bytes that it must move at least (each input read once, each
 * output written once). Single-threaded; one profile at a time. */
#include "tools/bench/bench.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WARM_STEPS = 2, STEPS = 3, EVALUATING_STEPS = 20, ROWS_MOST = 256, CALLS_MOST = KERNEL_MARKS / 2 };

/* What an op costs at least. */
struct cost {
    char name[96];
    double flop, bytes;
    enum precision precision; /* of the products */
};

struct row {
    char name[96];
    double calls, seconds, flop, bytes;
    enum precision precision;
};

static struct profile {
    const struct kernel_ops *ops; /* the wrapped table */
    struct kernel_ops wrapper;
    struct row rows[ROWS_MOST];
    int n_rows;
    int calls
        [CALLS_MOST]; /* row of each call since the last collection: call i lies between marks 2i and 2i + 1 */
    int n_calls;
    int status; /* of a mark that failed */
} profile;

/* ---- calls ---- */

static int row_of(const struct cost *cost)
{
    int i = 0;
    while (i < profile.n_rows && strcmp(profile.rows[i].name, cost->name) != 0)
        i++;
    if (i == ROWS_MOST)
        return ROWS_MOST - 1; /* more kinds than any model has: the last one takes the rest */
    if (i == profile.n_rows) {
        profile.n_rows++;
        profile.rows[i] = (struct row){.precision = cost->precision};
        memcpy(profile.rows[i].name, cost->name, sizeof cost->name);
    }
    return i;
}

/* Add the times of the calls since the last collection to their rows. Waits for the device. */
static void collect(struct kernel_device *device)
{
    for (int i = 0; i < profile.n_calls; i++) {
        double seconds = 0;
        int status = profile.ops->mark_seconds(device, 2 * i, 2 * i + 1, &seconds);
        if (status != KERNEL_OK)
            profile.status = status;
        profile.rows[profile.calls[i]].seconds += seconds;
    }
    profile.n_calls = 0;
}

static void begin(struct kernel_device *device)
{
    if (profile.n_calls == CALLS_MOST)
        collect(device);
    int status = profile.ops->mark(device, 2 * profile.n_calls);
    if (status != KERNEL_OK)
        profile.status = status;
}

static int end(struct kernel_device *device, const struct cost *cost, int result)
{
    struct row *row = &profile.rows[row_of(cost)];
    int status = profile.ops->mark(device, 2 * profile.n_calls + 1);
    if (status != KERNEL_OK)
        profile.status = status;
    profile.calls[profile.n_calls++] = (int)(row - profile.rows);
    row->calls++;
    row->flop += cost->flop;
    row->bytes += cost->bytes;
    return result;
}

/* ---- what each op costs ---- */

static double size_of(enum kernel_type type)
{
    return (double)kernel_type_size(type);
}

static enum precision precision_of(enum kernel_type act, bool tf32)
{
    return act == TYPE_BF16  ? PRECISION_BF16
           : act == TYPE_F16 ? PRECISION_FP16
           : tf32            ? PRECISION_TF32
                             : PRECISION_FP32;
}

static struct cost __attribute__((format(printf, 4, 5)))
cost_of(double flop, double bytes, enum precision precision, const char *format, ...)
{
    struct cost cost = {.flop = flop, .bytes = bytes, .precision = precision};
    va_list args;
    va_start(args, format);
    vsnprintf(cost.name, sizeof cost.name, format, args);
    va_end(args);
    return cost;
}

static struct cost cost_gemm(const struct gemm_args *a)
{
    double m = (double)a->m, n = (double)a->n, k = (double)a->k;
    return cost_of(2 * m * n * k,
                   m * k * size_of(a->act) + k * n * size_of(a->b_type) +
                       m * n * size_of(a->c_type) * (a->beta != 0 ? 2 : 1),
                   precision_of(a->act, a->tf32), "gemm %" PRId64 " x %" PRId64 " x %" PRId64, a->m, a->n,
                   a->k);
}

static struct cost cost_lora_forward(const struct lora_forward_args *a)
{
    double rows = (double)a->rows, in = (double)a->in, out = (double)a->out, rank = (double)a->rank;
    return cost_of(2 * rows * rank * (in + out), rows * (in + 2 * out) * size_of(a->act),
                   precision_of(a->act, false), "lora_forward %" PRId64 " > %" PRId64, a->in, a->out);
}

static struct cost cost_linear_forward(const struct linear_forward_args *a)
{
    const struct linear_layer *l = &a->layer;
    double rows = (double)a->rows, in = (double)l->in, out = (double)l->out, rank = (double)l->rank;
    return cost_of(2 * rows * (in * out + rank * (in + out)),
                   rows * (in + out + rank) * size_of(a->act) + in * out * size_of(l->weight_type),
                   precision_of(a->act, a->tf32), "linear_forward %" PRId64 " > %" PRId64 " r%" PRId64, l->in,
                   l->out, l->rank);
}

static struct cost cost_linear_backward(const struct linear_backward_args *a)
{
    const struct linear_layer *l = &a->layer;
    double rows = (double)a->rows, in = (double)l->in, out = (double)l->out, rank = (double)l->rank;
    double size = size_of(a->act), flop = 0, bytes = rows * out * size;
    if (a->dx) {
        flop += 2 * rows * in * out + (rank > 0 ? 2 * rows * rank * (in + out) : 0);
        bytes += rows * in * size * (a->accumulate ? 2 : 1) + in * out * size_of(l->weight_type);
    }
    if (a->da)
        flop += 2 * rows * rank * (in + out) + (a->dx ? 0 : 2 * rows * rank * out);
    if (a->dweight) {
        flop += 2 * rows * in * out;
        bytes += (a->overwrite ? 1 : 2) * in * out * sizeof(float);
    }
    if (a->da || a->dweight)
        bytes += rows * (in + rank) * size;
    return cost_of(flop, bytes, precision_of(a->act, a->tf32),
                   "linear_backward %" PRId64 " > %" PRId64 " r%" PRId64 "%s%s", l->in, l->out, l->rank,
                   a->dx ? " dx" : "", a->da || a->dweight ? " dw" : "");
}

static struct cost cost_embedding_forward(const struct embedding_forward_args *a)
{
    double elements = (double)a->tokens * (double)a->d_model;
    return cost_of(a->lora_a ? 2 * elements * (double)a->rank : 0,
                   elements * (size_of(a->table_type) + size_of(a->act)), precision_of(a->act, false),
                   "embedding_forward");
}

static struct cost cost_embedding_backward(const struct embedding_backward_args *a)
{
    double elements = (double)a->tokens * (double)a->d_model;
    return cost_of(a->da ? 4 * elements * (double)a->rank : 0,
                   elements * (size_of(a->act) + (a->dtable ? 2 * sizeof(float) : 0)),
                   precision_of(a->act, false), "embedding_backward");
}

static struct cost cost_rmsnorm_forward(const struct rmsnorm_forward_args *a)
{
    double elements = (double)a->rows * (double)a->d, size = size_of(a->act);
    bool changes = a->x || a->residual_out != a->residual;
    return cost_of(4 * elements,
                   elements * ((a->x ? size : 0) + sizeof(float) + (changes ? sizeof(float) : 0) +
                               (a->kept ? size : 0) + size),
                   precision_of(a->act, false), "rmsnorm_forward");
}

static struct cost cost_rmsnorm_backward(const struct rmsnorm_backward_args *a)
{
    double elements = (double)a->rows * (double)a->d;
    return cost_of(8 * elements, elements * (size_of(a->act) + 3 * sizeof(float)),
                   precision_of(a->act, false), "rmsnorm_backward");
}

static struct cost cost_conv_forward(const struct conv_forward_args *a)
{
    double elements = (double)a->tokens * (double)a->channels;
    double state = (double)a->n_seqs * (double)(a->channels * (a->width - 1)) * sizeof(float);
    return cost_of(2 * elements * (double)a->width,
                   2 * elements * size_of(a->act) +
                       state * ((a->initial.pool != NULL) + (a->final.pool != NULL)),
                   precision_of(a->act, false), "conv_forward");
}

static struct cost cost_conv_backward(const struct conv_backward_args *a)
{
    double elements = (double)a->tokens * (double)a->channels;
    return cost_of(6 * elements * (double)a->width, 3 * elements * size_of(a->act),
                   precision_of(a->act, false), "conv_backward");
}

static double chunk_bytes(const int32_t *seq_starts, int32_t n_seqs, int64_t channels, int64_t d_state)
{
    return (double)scan_chunk_count(seq_starts, n_seqs) * (double)(channels * d_state) * sizeof(float);
}

/* For each element of state an exponential, counted as one operation, and three multiplications with additions. */
static struct cost cost_scan_forward(const struct scan_forward_args *a)
{
    double elements = (double)a->tokens * (double)a->channels, size = size_of(a->act);
    double state = (double)a->n_seqs * (double)(a->channels * a->d_state) * sizeof(float);
    double bytes = (4 * elements + 2 * (double)(a->tokens * a->d_state)) * size;
    bytes += state * ((a->initial.pool != NULL) + (a->final.pool != NULL));
    if (a->chunk_states)
        bytes += chunk_bytes(a->seq_starts, a->n_seqs, a->channels, a->d_state);
    return cost_of(7 * elements * (double)a->d_state, bytes, precision_of(a->act, false), "scan_forward");
}

static struct cost cost_scan_backward(const struct scan_backward_args *a)
{
    double elements = (double)a->tokens * (double)a->channels;
    double bytes = ((a->y ? 8 : 7) * elements + 4 * (double)(a->tokens * a->d_state)) * size_of(a->act) +
                   chunk_bytes(a->seq_starts, a->n_seqs, a->channels, a->d_state);
    return cost_of(20 * elements * (double)a->d_state, bytes, precision_of(a->act, false), "scan_backward");
}

static struct cost cost_scan_prepare(const struct scan_prepare_args *a)
{
    double elements = (double)(a->channels * a->d_state);
    return cost_of(elements, 2 * elements * sizeof(float), PRECISION_FP32, "scan_prepare");
}

/* Every matrix once, every row's states both ways, the logits. */
static struct cost cost_mamba_step(const struct mamba_step_args *a)
{
    double d = (double)a->d_model, inner = (double)a->d_inner, rows = (double)a->rows;
    double low = (double)a->dt_rank, n = (double)a->d_state, layers = (double)a->n_layers;
    double layer = inner * (3 * d + 2 * low + 2 * n), head = (double)a->vocab * d;
    double state = inner * (n + (double)a->d_conv - 1) * sizeof(float);
    return cost_of(2 * rows * (layers * layer + head),
                   (layers * layer + head) * size_of(a->type) +
                       rows * (2 * layers * state + (double)a->vocab * sizeof(float)),
                   precision_of(a->type, false), "mamba_step");
}

static struct cost cost_head(const struct head_args *a)
{
    double rows = (double)a->rows, d = (double)a->d_model, vocab = (double)a->vocab;
    double products = 1 + (a->d_hidden != NULL) + (a->d_weight != NULL);
    return cost_of(2 * products * rows * d * vocab,
                   rows * d * size_of(a->act) * (a->d_hidden ? 2 : 1) + vocab * d * size_of(a->weight_type) +
                       (a->d_weight ? 2 * vocab * d * sizeof(float) : 0),
                   precision_of(a->act, a->tf32), "head%s", a->d_hidden ? " and its gradient" : "");
}

static struct cost cost_adamw(const struct adamw_args *a)
{
    double count = 0, zeros = 0, copies = 0;
    for (int32_t i = 0; i < a->n_slices; i++) {
        count += (double)a->slices[i].count;
        zeros += a->slices[i].keep_grad ? 0 : (double)a->slices[i].count * sizeof(float);
        copies += a->slices[i].copy ? (double)a->slices[i].count * size_of(a->slices[i].copy_type) : 0;
    }
    return cost_of(16 * count, 7 * count * sizeof(float) + zeros + copies, PRECISION_FP32, "adamw");
}

static struct cost cost_grad_norm(const struct grad_norm_args *a)
{
    double count = 0;
    for (int32_t i = 0; i < a->n_slices; i++)
        count += (double)a->slices[i].count;
    return cost_of(2 * count, count * sizeof(float), PRECISION_FP32, "grad_norm");
}

static struct cost cost_sample(const struct sample_args *a)
{
    double elements = (double)a->rows * (double)a->vocab;
    return cost_of(elements, elements * sizeof(float), PRECISION_FP32, "sample");
}

/* ---- the wrapper ---- */

#define WRAP(op)                                                                                             \
    static int wrap_##op(struct kernel_device *device, const struct op##_args *args)                         \
    {                                                                                                        \
        struct cost cost = cost_##op(args);                                                                  \
        begin(device);                                                                                       \
        return end(device, &cost, profile.ops->op(device, args));                                            \
    }
WRAP(gemm)
WRAP(lora_forward)
WRAP(linear_forward)
WRAP(linear_backward)
WRAP(embedding_forward)
WRAP(embedding_backward)
WRAP(rmsnorm_forward)
WRAP(rmsnorm_backward)
WRAP(conv_forward)
WRAP(conv_backward)
WRAP(scan_prepare)
WRAP(scan_forward)
WRAP(scan_backward)
WRAP(head)
WRAP(adamw)
WRAP(grad_norm)
WRAP(sample)

/* Where the backend has no path for it, the other ops follow: nothing is counted. */
static int wrap_mamba_step(struct kernel_device *device, const struct mamba_step_args *args)
{
    struct cost cost = cost_mamba_step(args);
    begin(device);
    int status = profile.ops->mamba_step(device, args);
    return status == KERNEL_UNSUPPORTED ? status : end(device, &cost, status);
}

static int wrap_copy_in(struct kernel_device *device, void *to, const void *from, size_t bytes)
{
    struct cost cost = cost_of(0, (double)bytes, PRECISION_FP32, "copy_in");
    begin(device);
    return end(device, &cost, profile.ops->copy_in(device, to, from, bytes));
}

static int wrap_copy_out(struct kernel_device *device, void *to, const void *from, size_t bytes)
{
    struct cost cost = cost_of(0, (double)bytes, PRECISION_FP32, "copy_out");
    begin(device);
    return end(device, &cost, profile.ops->copy_out(device, to, from, bytes));
}

static int wrap_copy(struct kernel_device *device, void *to, const void *from, size_t bytes)
{
    struct cost cost = cost_of(0, 2 * (double)bytes, PRECISION_FP32, "copy");
    begin(device);
    return end(device, &cost, profile.ops->copy(device, to, from, bytes));
}

static int wrap_zero(struct kernel_device *device, void *pointer, size_t bytes)
{
    struct cost cost = cost_of(0, (double)bytes, PRECISION_FP32, "zero");
    begin(device);
    return end(device, &cost, profile.ops->zero(device, pointer, bytes));
}

static int wrap_cast(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
                     enum kernel_type from_type, int64_t count)
{
    struct cost cost =
        cost_of(0, (double)count * (size_of(to_type) + size_of(from_type)), PRECISION_FP32, "cast");
    begin(device);
    return end(device, &cost, profile.ops->cast(device, to, to_type, from, from_type, count));
}

static const struct kernel_ops *wrap(const struct kernel_ops *ops)
{
    profile = (struct profile){.ops = ops, .wrapper = *ops};
    struct kernel_ops *wrapper = &profile.wrapper;
    wrapper->record_begin = NULL; /* marks cannot be recorded */
    wrapper->copy_in = wrap_copy_in;
    wrapper->copy_out = wrap_copy_out;
    wrapper->copy = wrap_copy;
    wrapper->zero = wrap_zero;
    wrapper->cast = wrap_cast;
    wrapper->gemm = wrap_gemm;
    wrapper->lora_forward = wrap_lora_forward;
    wrapper->linear_forward = wrap_linear_forward;
    wrapper->linear_backward = wrap_linear_backward;
    wrapper->embedding_forward = wrap_embedding_forward;
    wrapper->embedding_backward = wrap_embedding_backward;
    wrapper->rmsnorm_forward = wrap_rmsnorm_forward;
    wrapper->rmsnorm_backward = wrap_rmsnorm_backward;
    wrapper->conv_forward = wrap_conv_forward;
    wrapper->conv_backward = wrap_conv_backward;
    wrapper->scan_prepare = wrap_scan_prepare;
    wrapper->scan_forward = wrap_scan_forward;
    wrapper->scan_backward = wrap_scan_backward;
    if (ops->mamba_step != NULL)
        wrapper->mamba_step = wrap_mamba_step;
    wrapper->head = wrap_head;
    wrapper->adamw = wrap_adamw;
    wrapper->grad_norm = wrap_grad_norm;
    wrapper->sample = wrap_sample;
    return wrapper;
}

/* What was called so far is not counted. */
static void forget(struct kernel_device *device)
{
    collect(device);
    profile.n_rows = 0;
}

/* ---- the mode ---- */

static int compare_rows(const void *a, const void *b)
{
    const struct row *x = a, *y = b;
    return (x->seconds < y->seconds) - (x->seconds > y->seconds);
}

/* The share of the ceiling: the time that the arithmetic would need at the rate of products, or the bytes at
 * memory's, whichever is longer, over the time taken. */
static void print_rows(struct bench_report *report, int steps, double step)
{
    double inside = 0;
    qsort(profile.rows, (size_t)profile.n_rows, sizeof *profile.rows, compare_rows);
    printf("  %-34s %6s %10s %8s %8s %9s %9s %8s\n", "", "calls", "us a call", "ms", "of step", "TFLOP/s",
           "GB/s", "ceiling");
    for (int i = 0; i < profile.n_rows; i++) {
        const struct row *row = &profile.rows[i];
        double calls = row->calls / steps, seconds = row->seconds / steps;
        double flop = row->flop / steps, bytes = row->bytes / steps;
        double arithmetic = flop / report->machine.matrix[row->precision];
        double traffic = bytes / report->machine.memory;
        double share = (arithmetic > traffic ? arithmetic : traffic) / seconds;
        inside += seconds;
        printf("  %-34s %6.0f %10.1f %8.3f %7.1f%% %9.2f %9.1f %7.0f%%\n", row->name, calls,
               1e6 * seconds / calls, 1e3 * seconds, 100 * seconds / step, 1e-12 * flop / seconds,
               1e-9 * bytes / seconds, 100 * share);
        bench_keep(report,
                   json_pack("{s:s, s:f, s:f, s:f, s:f, s:f}", "name", row->name, "calls", calls, "seconds",
                             seconds, "flop", flop, "bytes", bytes, "ceiling_share", share));
    }
    printf("  %-34s %6s %10s %8.3f %7.1f%%\n", "between ops", "", "", 1e3 * (step - inside),
           100 * (step - inside) / step);
    printf("  %-34s %6s %10s %8.3f\n", "step, with the marks", "", "", 1e3 * step);
    bench_keep(report, json_pack("{s:s, s:f}", "name", "between ops", "seconds", step - inside));
    bench_keep(report, json_pack("{s:s, s:f}", "name", "step", "seconds", step));
    fflush(stdout);
}

static int run_case(const struct bench_options *options, struct bench_report *report,
                    const struct bench_case *wanted, struct error *error)
{
    struct bench_steps steps = wanted->decode     ? bench_decoding_steps
                               : wanted->evaluate ? bench_evaluating_steps
                                                  : bench_training_steps;
    const int n_steps = wanted->evaluate ? EVALUATING_STEPS : STEPS; /* those differ from each other */
    struct bench_bed bed = {0};
    char title[256];
    int code = bench_bed_open(options, wanted, wrap(bench_backend(options)), &bed, error);
    if (!code)
        code = steps.open(&steps, options, wanted, &bed, error);
    for (int i = 0; i < WARM_STEPS && !code; i++)
        code = steps.step(&steps, error);
    if (!code)
        forget(bed.device);
    double began = bench_now();
    for (int i = 0; i < n_steps && !code; i++)
        code = steps.step(&steps, error);
    double step = (bench_now() - began) / n_steps;
    if (!code)
        collect(bed.device);
    if (!code && profile.status)
        code = error_set(error, ERROR_DEVICE, "marks: %s", kernel_status_text(profile.status));
    if (!code) {
        snprintf(title, sizeof title, "ops, %s", wanted->text);
        bench_title(report, title);
        print_rows(report, n_steps, step);
    }
    steps.close(&steps);
    bench_bed_close(&bed);
    return code;
}

int bench_ops(const struct bench_options *options, struct bench_report *report)
{
    static const char *const cpu[] = {"hatchling 8x256 lora", "hatchling 1x64 decode",
                                      "hatchling 16x64 decode", NULL};
    static const char *const cuda[] = {"130m 64x512 lora projections bf16",
                                       "1.4b 8x512 lora projections bf16",
                                       "130m 64x512 full bf16",
                                       "130m 1x128 decode",
                                       "2.8b 64x128 decode",
                                       NULL};
    return bench_run_cases(options, report, BENCH_TRAINING | BENCH_DECODING | BENCH_EVALUATING,
                           bench_cases(options, cpu, cuda), run_case);
}
