/* machine.c: what this machine can do at best, measured with other people's code where there is any: sgemm by
 * OpenBLAS on as many threads as the kernels get, memory by plain loops over arrays far larger than any cache.
 * The kernels' own product of the same size is printed beside it. */
#include "tools/bench/bench.h"

#include <cblas.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/kernels.h"

enum { SIZE = 2048, REPEATS = 5, THREADS_MOST = 256, CALM_US = 300000 };
static const size_t array_bytes = (size_t)512 << 20;

struct stretch {
    pthread_t thread;
    const uint64_t *from;
    uint64_t *to; /* NULL: read alone */
    size_t words;
    uint64_t sum; /* so that the reading is not optimised away */
};

static void *walk(void *arg)
{
    struct stretch *s = arg;
    if (s->to != NULL) {
        memcpy(s->to, s->from, s->words * sizeof(*s->to));
        return NULL;
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < s->words; i++)
        sum ^= s->from[i];
    s->sum = sum;
    return NULL;
}

/* Best seconds of walking the array in `threads` stretches; a copy takes the first half to the second. */
static double walk_seconds(uint64_t *array, int threads, bool copy)
{
    struct stretch stretches[THREADS_MOST];
    size_t words = array_bytes / sizeof(*array), half = words / 2,
           each = (copy ? half : words) / (size_t)threads;
    double best = 1e9;
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double began = bench_now();
        int started = 0;
        for (int i = 0; i < threads; i++) {
            uint64_t *from = array + (size_t)i * each;
            stretches[i] = (struct stretch){.from = from, .to = copy ? from + half : NULL, .words = each};
            if (pthread_create(&stretches[i].thread, NULL, walk, &stretches[i]) != 0)
                break;
            started++;
        }
        for (int i = 0; i < started; i++)
            pthread_join(stretches[i].thread, NULL);
        double seconds = bench_now() - began;
        if (started == threads && seconds < best)
            best = seconds;
    }
    return best;
}

static double sgemm_seconds(const float *a, const float *b, float *c, int threads)
{
    double best = 1e9;
    openblas_set_num_threads(threads);
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double began = bench_now();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, SIZE, SIZE, SIZE, 1.0f, a, SIZE, b, SIZE, 0.0f,
                    c, SIZE);
        double seconds = bench_now() - began;
        best = seconds < best ? seconds : best;
    }
    openblas_set_num_threads(1);
    usleep(CALM_US); /* its threads spin for a while after their last work */
    return best;
}

static double kernels_seconds(const struct kernel_ops *ops, struct kernel_device *device, const float *a,
                              const float *b, float *c)
{
    struct gemm_args args = {.m = SIZE,
                             .n = SIZE,
                             .k = SIZE,
                             .alpha = 1.0f,
                             .a = a,
                             .a_stride = SIZE,
                             .b = b,
                             .b_stride = SIZE,
                             .c = c,
                             .c_stride = SIZE};
    double best = 1e9;
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double began = bench_now();
        if (ops->gemm(device, &args) != KERNEL_OK)
            return 1e9;
        double seconds = bench_now() - began;
        best = seconds < best ? seconds : best;
    }
    return best;
}

int bench_machine(const struct bench_options *options, struct bench_report *report)
{
    const struct kernel_ops *ops = kernels_cpu();
    struct kernel_device *device = NULL;
    struct kernel_device_info info;
    size_t matrix = (size_t)SIZE * SIZE;
    uint64_t *array = malloc(array_bytes);
    int failed = 1;
    if (array == NULL || ops->device_open(0, options->threads, &device) != KERNEL_OK ||
        ops->device_query(device, &info) != KERNEL_OK) {
        fprintf(stderr, "adderd-bench: cannot open the CPU device, or no %zu MiB to walk over\n",
                array_bytes >> 20);
        goto done;
    }
    memset(array, 1, array_bytes);
    float *a = (float *)(void *)array, *b = a + matrix, *c = b + matrix;
    for (size_t i = 0; i < 2 * matrix; i++)
        a[i] = (float)(i % 13) - 6.0f;

    int threads = info.threads < THREADS_MOST ? info.threads : THREADS_MOST;
    double flop = 2.0 * SIZE * SIZE * SIZE;
    struct bench_machine *machine = &report->machine;
    machine->threads = threads;
    bench_title(report, "machine");
    bench_row(report, "threads", threads, "", info.name);
    machine->sgemm = flop / sgemm_seconds(a, b, c, threads);
    bench_row(report, "sgemm 2048^3, OpenBLAS", 1e-9 * machine->sgemm, "GFLOP/s", NULL);
    bench_row(report, "sgemm 2048^3, kernels", 1e-9 * flop / kernels_seconds(ops, device, a, b, c), "GFLOP/s",
              NULL);
    machine->read = (double)array_bytes / walk_seconds(array, threads, false);
    bench_row(report, "memory, read", 1e-9 * machine->read, "GB/s", NULL);
    machine->copy = (double)array_bytes / walk_seconds(array, threads, true);
    bench_row(report, "memory, copy", 1e-9 * machine->copy, "GB/s", "read and written bytes together");
    failed = 0;
done:
    ops->device_close(device);
    free(array);
    return failed;
}
