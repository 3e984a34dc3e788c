/* threads.c: the pool behind cpu_parallel. The owner runs thread_pool_run; the workers live here.
 *
 * Decoding one token takes about a hundred regions of a few microseconds each, so a region must cost about
 * one microsecond, and an idle daemon must cost nothing. Hence:
 *
 *   - All that workers look at is one 64-bit ticket: the number of the region and the range of tasks not yet
 *     claimed. A thread claims a task by a compare-and-swap that takes one off, the owner at the front,
 *     workers at the back: so neighbouring tasks, and from one region to the next the same tasks, mostly fall
 *     to the same thread, whose caches hold what they need; yet whoever is done early takes what is left.
 *     Whoever holds a claim knows that the region cannot end before it is done, so the region's plain fields
 *     (task, arg) are stable while it reads them. The region's number keeps a thread with an old ticket from
 *     claiming in a new region.
 *   - The owner does not wait for workers to arrive, only for claimed tasks to finish. A worker that was
 *     asleep or preempted costs nothing but its help: the owner takes the tasks itself.
 *   - A worker without work spins for SPIN_NS, which bridges the gaps inside a token, then sleeps on a futex.
 *     Sleepers are counted, so that no system call is made while all are awake. */
#include "kernels/cpu/threads.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kernels/kernels.h"

enum { SPIN_NS = 40000, SPIN_CHECK = 64, CACHE_LINE = 64 };

/* A ticket: region << 44 | end of the range << 22 | its beginning. */
enum { RANGE_BITS = 22, TASKS_MAX = (1 << RANGE_BITS) - 1 };

struct worker {
    struct thread_pool *pool;
    pthread_t handle;
    int thread;
};

struct thread_pool {
    /* Written by the owner between regions, read by holders of a claim. */
    void (*task)(void *arg, int64_t index, int thread);
    void *arg;

    _Alignas(CACHE_LINE) _Atomic uint64_t ticket;
    _Alignas(CACHE_LINE) _Atomic uint32_t unfinished; /* tasks of this region not yet done; a futex */
    _Atomic uint32_t owner_sleeps;
    _Alignas(CACHE_LINE) _Atomic uint32_t region; /* changes with every region and at the end; a futex */
    _Atomic uint32_t sleepers;
    _Atomic bool ending;

    int n_workers;
    struct worker *workers;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t expected)
{
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int how_many)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, how_many, NULL, NULL, 0);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static uint32_t range_begin(uint64_t ticket)
{
    return (uint32_t)ticket & TASKS_MAX;
}

static uint32_t range_end(uint64_t ticket)
{
    return (uint32_t)(ticket >> RANGE_BITS) & TASKS_MAX;
}

/* Runs tasks of the present region until none is left to claim. Returns how many it ran. */
static uint32_t run_claimed(struct thread_pool *pool, int thread)
{
    uint32_t done = 0;
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    while (range_begin(ticket) != range_end(ticket)) {
        uint64_t left = thread == 0 ? ticket + 1 : ticket - ((uint64_t)1 << RANGE_BITS);
        if (!atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, left, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        pool->task(pool->arg, thread == 0 ? range_begin(ticket) : range_end(ticket) - 1, thread);
        done++;
        /* Tasks are reported before another region could be seen: only the present one's are claimable, since
         * it cannot end while this thread's own reports are outstanding. */
        ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    }
    return done;
}

static void report_done(struct thread_pool *pool, uint32_t done)
{
    if (atomic_fetch_sub(&pool->unfinished, done) == done && atomic_load(&pool->owner_sleeps) != 0)
        futex_wake(&pool->unfinished, 1);
}

/* Spins until the region is no longer `seen`. Returns false when it has spun for SPIN_NS in vain. */
static bool spin_for_region(struct thread_pool *pool, uint32_t seen)
{
    int64_t until = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < SPIN_CHECK; i++) {
            if (atomic_load_explicit(&pool->region, memory_order_acquire) != seen)
                return true;
            relax();
        }
    } while (now_ns() < until);
    return false;
}

static void *worker_main(void *arg)
{
    struct worker *worker = arg;
    struct thread_pool *pool = worker->pool;
    uint32_t seen = 0;

    for (;;) {
        if (!spin_for_region(pool, seen)) {
            atomic_fetch_add(&pool->sleepers, 1);
            while (atomic_load(&pool->region) == seen)
                futex_wait(&pool->region, seen);
            atomic_fetch_sub(&pool->sleepers, 1);
        }
        seen = atomic_load_explicit(&pool->region, memory_order_acquire);
        if (atomic_load_explicit(&pool->ending, memory_order_acquire))
            return NULL;
        uint32_t done = run_claimed(pool, worker->thread);
        if (done > 0)
            report_done(pool, done);
    }
}

static void wait_unfinished(struct thread_pool *pool)
{
    int64_t until = 0;
    for (;;) {
        for (int i = 0; i < SPIN_CHECK; i++) {
            if (atomic_load_explicit(&pool->unfinished, memory_order_acquire) == 0)
                return;
            relax();
        }
        if (until == 0)
            until = now_ns() + SPIN_NS;
        if (now_ns() < until)
            continue;
        atomic_store(&pool->owner_sleeps, 1);
        uint32_t unfinished;
        while ((unfinished = atomic_load(&pool->unfinished)) != 0)
            futex_wait(&pool->unfinished, unfinished);
        atomic_store(&pool->owner_sleeps, 0);
        return;
    }
}

/* Makes a change visible to every worker and wakes at most how_many sleepers. */
static void announce(struct thread_pool *pool, int how_many)
{
    atomic_fetch_add(&pool->region, 1);
    if (atomic_load(&pool->sleepers) > 0)
        futex_wake(&pool->region, how_many);
}

static void run_region(struct thread_pool *pool, uint32_t n_tasks)
{
    uint64_t region = (atomic_load_explicit(&pool->ticket, memory_order_relaxed) >> 2 * RANGE_BITS) + 1;
    atomic_store_explicit(&pool->unfinished, n_tasks, memory_order_relaxed);
    atomic_store_explicit(&pool->ticket, region << 2 * RANGE_BITS | (uint64_t)n_tasks << RANGE_BITS,
                          memory_order_release);
    announce(pool, (int)n_tasks - 1);

    uint32_t done = run_claimed(pool, 0);
    if (atomic_fetch_sub_explicit(&pool->unfinished, done, memory_order_acq_rel) != done)
        wait_unfinished(pool);
}

void thread_pool_run(struct thread_pool *pool, int64_t n_tasks,
                     void (*task)(void *arg, int64_t index, int thread), void *arg)
{
    if (n_tasks <= 1 || pool->n_workers == 0 || n_tasks > TASKS_MAX) {
        for (int64_t i = 0; i < n_tasks; i++)
            task(arg, i, 0);
        return;
    }
    pool->task = task;
    pool->arg = arg;
    run_region(pool, (uint32_t)n_tasks);
}

int thread_pool_create(int n_threads, struct thread_pool **ret_pool)
{
    struct thread_pool *pool = aligned_alloc(CACHE_LINE, sizeof(*pool));
    if (pool == NULL)
        return KERNEL_NO_MEMORY;
    *pool = (struct thread_pool){0};
    pool->workers = calloc((size_t)n_threads, sizeof(*pool->workers));
    if (pool->workers == NULL) {
        free(pool);
        return KERNEL_NO_MEMORY;
    }

    /* Signals belong to the owner: workers inherit a mask that blocks all of them. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    for (int i = 0; i < n_threads - 1 && !failed; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].thread = i + 1;
        failed = pthread_create(&pool->workers[i].handle, NULL, worker_main, &pool->workers[i]);
        if (!failed)
            pool->n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        thread_pool_destroy(pool);
        return KERNEL_NO_MEMORY;
    }
    *ret_pool = pool;
    return KERNEL_OK;
}

void thread_pool_destroy(struct thread_pool *pool)
{
    if (pool == NULL)
        return;
    atomic_store(&pool->ending, true);
    announce(pool, INT_MAX);
    for (int i = 0; i < pool->n_workers; i++)
        pthread_join(pool->workers[i].handle, NULL);
    free(pool->workers);
    free(pool);
}
