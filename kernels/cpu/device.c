/* device.c: opening a CPU device, its memory, its scratch. The reference and the vectorised backend share it.
 * Called by the thread that owns the device. */
#include "kernels/cpu/device.h"

#include <malloc.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { ALIGNMENT = 64, LARGE_PAGE = 2 << 20 };

static int processor_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0)
        return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

int cpu_device_open(int index, int threads, struct kernel_device **ret_device)
{
    if (index != 0 || threads < 0)
        return KERNEL_INVALID;
    struct kernel_device *device = calloc(1, sizeof(*device));
    if (device == NULL)
        return KERNEL_NO_MEMORY;
    device->n_threads = threads > 0 ? threads : processor_count();
    if (device->n_threads > CPU_THREADS_MAX)
        device->n_threads = CPU_THREADS_MAX;
    int status = thread_pool_create(device->n_threads, &device->pool);
    if (status != KERNEL_OK) {
        free(device);
        return status;
    }
    *ret_device = device;
    return KERNEL_OK;
}

void cpu_device_close(struct kernel_device *device)
{
    if (device == NULL)
        return;
    thread_pool_destroy(device->pool);
    for (int i = 0; i < CPU_THREADS_MAX; i++)
        cpu_memory_free(device, device->scratch[i].pointer);
    free(device);
}

/* MemAvailable of /proc/meminfo counts the page cache that can be dropped; sysconf's free pages do not. */
static int64_t available_bytes(void)
{
    int64_t kib = -1;
    FILE *file = fopen("/proc/meminfo", "re");
    if (file != NULL) {
        char line[128];
        while (kib < 0 && fgets(line, sizeof(line), file) != NULL)
            if (strncmp(line, "MemAvailable:", 13) == 0)
                kib = strtoll(line + 13, NULL, 10);
        fclose(file);
    }
    if (kib >= 0)
        return kib * 1024;
    return (int64_t)sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);
}

int cpu_device_query(struct kernel_device *device, struct kernel_device_info *ret_info)
{
    static const char *const isa_names[CPU_ISA_COUNT] = {"plain", "AVX2", "AVX-512"};
    struct kernel_device_info info = {0};
    snprintf(info.name, sizeof(info.name), "cpu (%s, %d thread%s)", isa_names[device->isa], device->n_threads,
             device->n_threads == 1 ? "" : "s");
    info.total_bytes = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    info.free_bytes = available_bytes();
    info.allocated_bytes = device->allocated_bytes;
    info.peak_bytes = device->peak_bytes;
    info.threads = device->n_threads;
    info.is_host = true;
    *ret_info = info;
    return KERNEL_OK;
}

void cpu_device_reset_peak(struct kernel_device *device)
{
    device->peak_bytes = device->allocated_bytes;
}

/* A CPU that fails takes the process along. */
const char *cpu_device_fault(const struct kernel_device *device)
{
    (void)device;
    return NULL;
}

/* The padding lets a vector load that starts inside the last line stay inside the allocation. Large blocks
 * ask for large pages: weights that stream by in decoding are read a third faster so. */
static void *alloc_aligned(size_t bytes)
{
    size_t alignment = bytes >= 2 * (size_t)LARGE_PAGE ? LARGE_PAGE : ALIGNMENT;
    if (bytes > SIZE_MAX - 2 * (size_t)LARGE_PAGE)
        return NULL;
    size_t padded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (padded == 0)
        padded = ALIGNMENT;
    void *pointer = NULL;
    if (posix_memalign(&pointer, alignment, padded) != 0)
        return NULL;
    if (alignment == LARGE_PAGE)
        (void)madvise(pointer, padded / LARGE_PAGE * LARGE_PAGE, MADV_HUGEPAGE);
    return pointer;
}

int cpu_memory_alloc(struct kernel_device *device, size_t bytes, void **ret_pointer)
{
    void *pointer = alloc_aligned(bytes);
    if (pointer == NULL)
        return KERNEL_NO_MEMORY;
    device->allocated_bytes += (int64_t)malloc_usable_size(pointer);
    if (device->peak_bytes < device->allocated_bytes)
        device->peak_bytes = device->allocated_bytes;
    *ret_pointer = pointer;
    return KERNEL_OK;
}

void cpu_memory_free(struct kernel_device *device, void *pointer)
{
    device->allocated_bytes -= (int64_t)malloc_usable_size(pointer); /* 0 of NULL */
    free(pointer);
}

int cpu_memory_copy(struct kernel_device *device, void *to, const void *from, size_t bytes)
{
    (void)device;
    if (bytes > 0)
        memmove(to, from, bytes);
    return KERNEL_OK;
}

int cpu_memory_zero(struct kernel_device *device, void *pointer, size_t bytes)
{
    (void)device;
    if (bytes > 0)
        memset(pointer, 0, bytes);
    return KERNEL_OK;
}

int cpu_synchronize(struct kernel_device *device)
{
    (void)device;
    return KERNEL_OK;
}

/* What is queued is done already. */
int cpu_mark(struct kernel_device *device, int slot)
{
    struct timespec now;
    if (slot < 0 || slot >= KERNEL_MARKS)
        return KERNEL_INVALID;
    clock_gettime(CLOCK_MONOTONIC, &now);
    device->marks[slot] = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    return KERNEL_OK;
}

int cpu_mark_seconds(struct kernel_device *device, int from, int to, double *ret_seconds)
{
    if (from < 0 || from >= KERNEL_MARKS || to < 0 || to >= KERNEL_MARKS)
        return KERNEL_INVALID;
    *ret_seconds = device->marks[to] - device->marks[from];
    return KERNEL_OK;
}

int cpu_scratch_reserve(struct kernel_device *device, size_t bytes)
{
    for (int i = 0; i < device->n_threads; i++) {
        struct cpu_scratch_area *area = &device->scratch[i];
        if (area->bytes >= bytes)
            continue;
        cpu_memory_free(device, area->pointer);
        *area = (struct cpu_scratch_area){0};
        void *pointer = NULL;
        int status = cpu_memory_alloc(device, bytes, &pointer);
        if (status != KERNEL_OK)
            return status;
        *area = (struct cpu_scratch_area){.pointer = pointer, .bytes = bytes};
    }
    return KERNEL_OK;
}
