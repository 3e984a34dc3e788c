/* threads.h: a pool of threads that run one parallel region at a time. Narrow on purpose: no queue, no
 * futures, no nesting. One owner thread starts regions and takes part in them as thread 0. */
#ifndef KERNELS_CPU_THREADS_H
#define KERNELS_CPU_THREADS_H

#include <stdint.h>

struct thread_pool;

/* n_threads counts the owner: n_threads - 1 are created. Returns 0 or KERNEL_NO_MEMORY. */
int thread_pool_create(int n_threads, struct thread_pool **ret_pool);
/* NULL-safe. */
void thread_pool_destroy(struct thread_pool *pool);

/* Calls task(arg, index, thread) once for every index in 0..n_tasks-1 and returns when all are done. The
 * owner takes indices from the front, the others from the back, so a thread mostly has neighbouring tasks, and
 * the same ones in the next region of the same size. `thread` is 0..n_threads-1 and no two tasks of the same
 * thread overlap. What a task wrote is visible to the owner afterwards and to every later region. */
void thread_pool_run(struct thread_pool *pool, int64_t n_tasks,
                     void (*task)(void *arg, int64_t index, int thread), void *arg);

#endif
