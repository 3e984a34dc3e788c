/* device.h: inside of a CPU device, for the files of kernels/cpu alone. A device belongs to one thread at a
 * time; its pool's threads run only inside cpu_parallel. */
#ifndef KERNELS_CPU_DEVICE_H
#define KERNELS_CPU_DEVICE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/threads.h"
#include "kernels/kernels.h"

/* What the vectorised ops are compiled for, worst first. */
enum cpu_isa {
    CPU_PLAIN,
    CPU_AVX2,   /* AVX2, FMA, F16C */
    CPU_AVX512, /* AVX-512 F, BW, VL, DQ, and all of the above */
};
enum { CPU_ISA_COUNT = 3, CPU_THREADS_MAX = 256 };

struct cpu_scratch_area {
    void *pointer; /* 64-byte aligned */
    size_t bytes;
};

struct kernel_device {
    enum cpu_isa isa; /* of the table that opened it */
    int n_threads;    /* with the owner */
    struct thread_pool *pool;
    int64_t allocated_bytes, peak_bytes;
    struct cpu_scratch_area scratch[CPU_THREADS_MAX];
    double marks[KERNEL_MARKS]; /* seconds of a monotonic clock */
};

/* The best that this processor has, and the table for one that it has. kernels_cpu() is the table of the best. */
enum cpu_isa cpu_isa_detect(void);
const struct kernel_ops *cpu_ops_of(enum cpu_isa isa);

/* The functions shared by both backends' tables. */
int cpu_device_open(int index, int threads, struct kernel_device **ret_device);
void cpu_device_close(struct kernel_device *device);
int cpu_device_query(struct kernel_device *device, struct kernel_device_info *ret_info);
void cpu_device_reset_peak(struct kernel_device *device);
const char *cpu_device_fault(const struct kernel_device *device);
int cpu_memory_alloc(struct kernel_device *device, size_t bytes, void **ret_pointer);
void cpu_memory_free(struct kernel_device *device, void *pointer);
int cpu_memory_copy(struct kernel_device *device, void *to, const void *from, size_t bytes);
int cpu_memory_zero(struct kernel_device *device, void *pointer, size_t bytes);
int cpu_synchronize(struct kernel_device *device);
int cpu_mark(struct kernel_device *device, int slot);
int cpu_mark_seconds(struct kernel_device *device, int from, int to, double *ret_seconds);

/* Runs task(arg, index, thread) for index 0..n_tasks-1 on the device's threads; returns when all are done.
 * Which thread takes which index is not fixed, so a result must depend on `index` alone: cut work into the
 * same tasks whatever the number of threads, and reduce over tasks in order afterwards. Not to be called from
 * a task. */
static inline void cpu_parallel(struct kernel_device *device, int64_t n_tasks,
                                void (*task)(void *arg, int64_t index, int thread), void *arg)
{
    thread_pool_run(device->pool, n_tasks, task, arg);
}

/* Scratch of each thread. An op reserves before its regions, so that nothing fails inside one: after a
 * successful reserve of `bytes`, cpu_scratch(device, t) is good for that many for every thread t until the
 * next reserve. Contents do not survive an op. Areas only grow. */
int cpu_scratch_reserve(struct kernel_device *device, size_t bytes);
static inline void *cpu_scratch(struct kernel_device *device, int thread)
{
    return device->scratch[thread].pointer;
}

#endif
