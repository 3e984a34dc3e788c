/* machine.c: what this machine can do at best. On a CPU by other people's code: sgemm by OpenBLAS on as many
 * threads as the kernels get, memory by plain loops over arrays far larger than any cache, and the kernels' own
 * product of the same size beside it. On a GPU: large products of each precision (cuBLAS's, behind the kernels'
 * gemm) on random numbers, for zeros run faster, and a large copy within its memory. */
#include "tools/bench/bench.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/kernels.h"

enum { SIZE = 2048, GPU_SIZE = 8192, REPEATS = 5, THREADS_MOST = 256, CALM_US = 300000 };
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

/* Loaded when it is wanted: nothing else needs it, and a machine with a GPU often lacks it. */
struct openblas {
    void (*sgemm)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                  const float *a, int a_stride, const float *b, int b_stride, float beta, float *c,
                  int c_stride);
    void (*set_threads)(int threads);
};

static bool openblas_load(struct openblas *ret_openblas)
{
    void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return false;
    *(void **)&ret_openblas->sgemm = dlsym(library, "cblas_sgemm");
    *(void **)&ret_openblas->set_threads = dlsym(library, "openblas_set_num_threads");
    return ret_openblas->sgemm != NULL && ret_openblas->set_threads != NULL;
}

static double sgemm_seconds(const struct openblas *openblas, const float *a, const float *b, float *c,
                            int threads)
{
    double best = 1e9;
    enum { ROW_MAJOR = 101, NOT_TRANSPOSED = 111 };
    openblas->set_threads(threads);
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double began = bench_now();
        openblas->sgemm(ROW_MAJOR, NOT_TRANSPOSED, NOT_TRANSPOSED, SIZE, SIZE, SIZE, 1.0f, a, SIZE, b, SIZE,
                        0.0f, c, SIZE);
        double seconds = bench_now() - began;
        best = seconds < best ? seconds : best;
    }
    openblas->set_threads(1);
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

static int measure_cpu(const struct bench_options *options, struct bench_report *report)
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
    snprintf(machine->name, sizeof machine->name, "%s", info.name);
    bench_title(report, "machine");
    bench_row(report, "threads", threads, "", info.name);
    struct openblas openblas;
    double own = flop / kernels_seconds(ops, device, a, b, c), sgemm = own;
    if (openblas_load(&openblas)) {
        sgemm = flop / sgemm_seconds(&openblas, a, b, c, threads);
        bench_row(report, "sgemm 2048^3, OpenBLAS", 1e-9 * sgemm, "GFLOP/s", NULL);
    }
    bench_row(report, "sgemm 2048^3, kernels", 1e-9 * own, "GFLOP/s", NULL);
    for (int i = 0; i < BENCH_PRECISIONS; i++)
        machine->matrix[i] = sgemm;
    machine->memory = (double)array_bytes / walk_seconds(array, threads, false);
    bench_row(report, "memory, read", 1e-9 * machine->memory, "GB/s", NULL);
    bench_row(report, "memory, copy", 1e-9 * (double)array_bytes / walk_seconds(array, threads, true), "GB/s",
              "read and written bytes together");
    failed = 0;
done:
    ops->device_close(device);
    free(array);
    return failed;
}

/* ---- a GPU ---- */

struct gpu {
    const struct kernel_ops *ops;
    struct kernel_device *device;
    char *memory;  /* three matrices of float */
    int64_t bytes; /* of one */
    int status;
};

/* Random numbers in -1..1 into the first two matrices, of this type. */
static int fill_matrices(struct gpu *gpu, enum kernel_type type)
{
    int64_t count = (int64_t)GPU_SIZE * GPU_SIZE;
    float *host = malloc((size_t)gpu->bytes);
    uint64_t random = 1;
    int status = host != NULL ? KERNEL_OK : KERNEL_NO_MEMORY;
    for (int i = 0; i < 2 && status == KERNEL_OK; i++) {
        for (int64_t j = 0; j < count; j++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            host[j] = (float)(random >> 40) * 0x1p-23f - 1;
        }
        status = gpu->ops->copy_in(gpu->device, gpu->memory + 2 * gpu->bytes, host, (size_t)gpu->bytes);
        if (status == KERNEL_OK)
            status = gpu->ops->cast(gpu->device, gpu->memory + i * gpu->bytes, type,
                                    gpu->memory + 2 * gpu->bytes, TYPE_F32, count);
    }
    free(host);
    return status;
}

static int multiply(struct gpu *gpu, enum precision precision, enum kernel_type type)
{
    const struct gemm_args args = {.m = GPU_SIZE,
                                   .n = GPU_SIZE,
                                   .k = GPU_SIZE,
                                   .transpose_b = true,
                                   .alpha = 1,
                                   .a = gpu->memory,
                                   .a_stride = GPU_SIZE,
                                   .b = gpu->memory + gpu->bytes,
                                   .b_stride = GPU_SIZE,
                                   .c = gpu->memory + 2 * gpu->bytes,
                                   .c_stride = GPU_SIZE,
                                   .act = type,
                                   .b_type = type,
                                   .c_type = type,
                                   .tf32 = precision == PRECISION_TF32};
    return gpu->ops->gemm(gpu->device, &args);
}

/* The median seconds of a product, or with precision < 0 of a copy of one matrix and a half. */
static double gpu_seconds(struct gpu *gpu, int precision, enum kernel_type type)
{
    enum { WARM = 2, TIMES = 9 };
    double seconds[TIMES];
    for (int i = -WARM; i < TIMES && gpu->status == KERNEL_OK; i++) {
        int status = gpu->ops->mark(gpu->device, 0);
        if (status == KERNEL_OK)
            status = precision >= 0
                         ? multiply(gpu, (enum precision)precision, type)
                         : gpu->ops->copy(gpu->device, gpu->memory, gpu->memory + gpu->bytes * 3 / 2,
                                          (size_t)gpu->bytes * 3 / 2);
        if (status == KERNEL_OK)
            status = gpu->ops->mark(gpu->device, 1);
        if (status == KERNEL_OK)
            status = gpu->ops->mark_seconds(gpu->device, 0, 1, &seconds[i < 0 ? 0 : i]);
        gpu->status = status;
    }
    return gpu->status == KERNEL_OK ? bench_median(seconds, TIMES) : 1;
}

static int measure_gpu(const struct bench_options *options, struct bench_report *report)
{
    static const enum kernel_type types[BENCH_PRECISIONS] = {[PRECISION_FP32] = TYPE_F32,
                                                             [PRECISION_TF32] = TYPE_F32,
                                                             [PRECISION_BF16] = TYPE_BF16,
                                                             [PRECISION_FP16] = TYPE_F16};
    struct gpu gpu = {.ops = kernels_cuda(), .bytes = (int64_t)GPU_SIZE * GPU_SIZE * (int64_t)sizeof(float)};
    struct kernel_device_info info;
    void *memory = NULL;
    struct bench_machine *machine = &report->machine;
    gpu.status = gpu.ops->device_open(options->index, 0, &gpu.device);
    if (gpu.status == KERNEL_OK)
        gpu.status = gpu.ops->device_query(gpu.device, &info);
    if (gpu.status == KERNEL_OK)
        gpu.status = gpu.ops->memory_alloc(gpu.device, (size_t)(3 * gpu.bytes), &memory);
    gpu.memory = memory;
    if (gpu.status == KERNEL_OK) {
        snprintf(machine->name, sizeof machine->name, "%s", info.name);
        bench_title(report, "machine");
        bench_row(report, "memory", 1e-9 * (double)info.total_bytes, "GB", info.name);
    }
    for (int i = 0; i < BENCH_PRECISIONS && gpu.status == KERNEL_OK; i++) {
        char name[64];
        if (i == 0 || types[i] != types[i - 1])
            gpu.status = fill_matrices(&gpu, types[i]);
        machine->matrix[i] = 2.0 * GPU_SIZE * GPU_SIZE * GPU_SIZE / gpu_seconds(&gpu, i, types[i]);
        snprintf(name, sizeof name, "product %d^3, %s", GPU_SIZE, training_precision_name((enum precision)i));
        if (gpu.status == KERNEL_OK)
            bench_row(report, name, 1e-12 * machine->matrix[i], "TFLOP/s", "random numbers");
    }
    machine->memory = 3 * (double)gpu.bytes / gpu_seconds(&gpu, -1, TYPE_F32);
    if (gpu.status == KERNEL_OK)
        bench_row(report, "memory, copy", 1e-9 * machine->memory, "GB/s", "read and written bytes together");
    else
        fprintf(stderr, "adderd-bench: cuda:%d: %s\n", options->index, kernel_status_text(gpu.status));
    if (gpu.device != NULL) {
        gpu.ops->memory_free(gpu.device, memory);
        gpu.ops->device_close(gpu.device);
    }
    return gpu.status != KERNEL_OK;
}

int bench_machine(const struct bench_options *options, struct bench_report *report)
{
    return options->cuda ? measure_gpu(options, report) : measure_cpu(options, report);
}
