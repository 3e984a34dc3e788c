/* device.cu: an open GPU: its stream, its cuBLAS, its memory, and the way of host arrays to it. Called by the thread
 * that owns the device. */
#include "kernels/cuda/common.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    STAGING_BYTES = 1 << 20,
    STAGING_ALIGNMENT = 256,
    SMALL_BYTES = STAGING_BYTES, /* a copy through pinned memory pays, and waits for nothing */
    CACHED_BYTES = 4096,             /* of an array that is kept, at least: growing waits for the device */
};
static const size_t BLAS_WORKSPACE_BYTES = (size_t)32 << 20; /* what cuBLAS recommends for Hopper */

/* For good: what the first failing call said is the reason, later ones only repeat it. */
static int lose_device(struct kernel_device *device, const char *reason)
{
    if (device->status == KERNEL_OK)
        snprintf(device->fault, sizeof(device->fault), "%s", reason);
    device->status = KERNEL_DEVICE_LOST;
    return KERNEL_DEVICE_LOST;
}

int cuda_check(struct kernel_device *device, cudaError_t code)
{
    switch (code) {
    case cudaSuccess:
        return KERNEL_OK;
    case cudaErrorMemoryAllocation:
        (void)cudaGetLastError(); /* it would show again after the next launch */
        return KERNEL_NO_MEMORY;
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
        (void)cudaGetLastError();
        return KERNEL_INVALID;
    case cudaErrorStreamCaptureUnsupported: /* of a recording, which ends with it */
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorLaunchOutOfResources:
        (void)cudaGetLastError();
        return KERNEL_UNSUPPORTED;
    default:
        return lose_device(device, cudaGetErrorString(code));
    }
}

int cuda_check_blas(struct kernel_device *device, cublasStatus_t code)
{
    switch (code) {
    case CUBLAS_STATUS_SUCCESS:
        return KERNEL_OK;
    case CUBLAS_STATUS_ALLOC_FAILED:
        return KERNEL_NO_MEMORY;
    case CUBLAS_STATUS_INVALID_VALUE:
        return KERNEL_INVALID;
    case CUBLAS_STATUS_NOT_SUPPORTED:
    case CUBLAS_STATUS_ARCH_MISMATCH:
        return KERNEL_UNSUPPORTED;
    default:
        if (device->recording != NULL) /* nothing ran: a device that is lost says so again */
            return KERNEL_UNSUPPORTED;
        char reason[32];
        snprintf(reason, sizeof(reason), "cuBLAS failed with %d", (int)code);
        return lose_device(device, reason);
    }
}

int cuda_enter(struct kernel_device *device)
{
    if (device->status != KERNEL_OK)
        return device->status;
    return cuda_check(device, cudaSetDevice(device->index));
}

int cuda_launched(struct kernel_device *device)
{
    return cuda_check(device, cudaGetLastError());
}

/* ---- memory, all of it counted ---- */

static int allocate(struct kernel_device *device, size_t bytes, void **ret_pointer)
{
    struct cuda_allocation *allocation = (struct cuda_allocation *)malloc(sizeof(*allocation));
    if (allocation == NULL)
        return KERNEL_NO_MEMORY;
    allocation->bytes = bytes > 0 ? bytes : 1;
    int status = cuda_check(device, cudaMalloc(&allocation->pointer, allocation->bytes));
    if (status != KERNEL_OK) {
        free(allocation);
        return status;
    }
    allocation->next = device->allocations;
    device->allocations = allocation;
    device->allocated_bytes += (int64_t)allocation->bytes;
    if (device->peak_bytes < device->allocated_bytes)
        device->peak_bytes = device->allocated_bytes;
    *ret_pointer = allocation->pointer;
    return KERNEL_OK;
}

/* cudaFree waits for the device, so what is queued may still use the memory. */
static void release(struct kernel_device *device, void *pointer)
{
    struct cuda_allocation **at = &device->allocations;
    while (*at != NULL && (*at)->pointer != pointer)
        at = &(*at)->next;
    if (*at == NULL)
        return;
    struct cuda_allocation *found = *at;
    *at = found->next;
    device->allocated_bytes -= (int64_t)found->bytes;
    free(found);
    (void)cuda_check(device, cudaFree(pointer));
}

/* ---- open, close, query ---- */

static int staging_create(struct kernel_device *device, struct cuda_staging *half, size_t bytes)
{
    int status = cuda_check(device, cudaMallocHost((void **)&half->host, bytes));
    if (status == KERNEL_OK)
        status = allocate(device, bytes, (void **)&half->device);
    half->bytes = status == KERNEL_OK ? bytes : 0;
    return status;
}

static void staging_free(struct kernel_device *device, struct cuda_staging *half)
{
    (void)cudaFreeHost(half->host);
    release(device, half->device);
    half->host = half->device = NULL;
    half->used = half->bytes = 0;
}

static int open_parts(struct kernel_device *device)
{
    int status = cuda_check(device, cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2 && status == KERNEL_OK; i++) {
        status =
            cuda_check(device, cudaEventCreateWithFlags(&device->staging[i].copied, cudaEventDisableTiming));
        if (status == KERNEL_OK)
            status = staging_create(device, &device->staging[i], STAGING_BYTES);
    }
    if (status == KERNEL_OK)
        status = allocate(device, BLAS_WORKSPACE_BYTES, &device->blas_workspace);
    if (status == KERNEL_OK)
        status = cuda_blas_load(&device->cublas);
    if (status == KERNEL_OK)
        status = cuda_check_blas(device, device->cublas->create(&device->blas));
    if (status == KERNEL_OK)
        status = cuda_check_blas(device, device->cublas->set_stream(device->blas, device->stream));
    if (status == KERNEL_OK)
        status = cuda_check_blas(device, device->cublas->set_workspace(device->blas, device->blas_workspace,
                                                                       BLAS_WORKSPACE_BYTES));
    if (status == KERNEL_OK)
        status = cuda_check_blas(device,
                                 device->cublas->set_atomics_mode(device->blas, CUBLAS_ATOMICS_NOT_ALLOWED));
    /* A product that is split keeps its parts in fp32, whatever the type of its result. */
    if (status == KERNEL_OK)
        status = cuda_check_blas(
            device, device->cublas->set_math_mode(
                        device->blas, (cublasMath_t)(CUBLAS_DEFAULT_MATH |
                                                     CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
    return status;
}

int cuda_device_open(int index, int threads, struct kernel_device **ret_device)
{
    (void)threads;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess)
        return KERNEL_UNSUPPORTED; /* no driver, or none that is new enough */
    if (index < 0 || index >= count)
        return KERNEL_INVALID;
    struct kernel_device *device = (struct kernel_device *)calloc(1, sizeof(*device));
    if (device == NULL)
        return KERNEL_NO_MEMORY;
    device->index = index;
    int status = cuda_check(device, cudaSetDevice(index));
    if (status == KERNEL_OK)
        status = cuda_check(
            device, cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index));
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaDeviceGetAttribute(&device->shared_bytes,
                                                           cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    int major = 0, minor = 0;
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    device->hopper = major == 9 && minor == 0;
    if (status == KERNEL_OK)
        status = open_parts(device);
    if (status != KERNEL_OK) {
        cuda_device_close(device);
        return status;
    }
    *ret_device = device;
    return KERNEL_OK;
}

void cuda_device_close(struct kernel_device *device)
{
    if (device == NULL)
        return;
    (void)cudaSetDevice(device->index);
    if (device->stream != NULL)
        (void)cudaStreamSynchronize(device->stream);
    cuda_steps_close(device);
    if (device->blas != NULL)
        (void)device->cublas->destroy(device->blas);
    for (int i = 0; i < 2; i++) {
        staging_free(device, &device->staging[i]);
        if (device->staging[i].copied != NULL)
            (void)cudaEventDestroy(device->staging[i].copied);
    }
    for (int i = 0; i < CUDA_CACHED_COUNT; i++)
        free(device->cached[i].host);
    (void)cudaFreeHost(device->results);
    cuda_marks_free(device);
    while (device->allocations != NULL)
        release(device, device->allocations->pointer);
    if (device->stream != NULL)
        (void)cudaStreamDestroy(device->stream);
    (void)cudaGetLastError();
    free(device);
}

int cuda_device_query(struct kernel_device *device, struct kernel_device_info *ret_info)
{
    struct cudaDeviceProp properties;
    size_t free_bytes = 0, total_bytes = 0;
    int status = cuda_enter(device);
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaGetDeviceProperties(&properties, device->index));
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaMemGetInfo(&free_bytes, &total_bytes));
    if (status != KERNEL_OK)
        return status;
    struct kernel_device_info info = {};
    snprintf(info.name, sizeof(info.name), "%.90s (sm_%d%d)", properties.name, properties.major,
             properties.minor);
    info.total_bytes = (int64_t)total_bytes;
    info.free_bytes = (int64_t)free_bytes;
    info.allocated_bytes = device->allocated_bytes;
    info.peak_bytes = device->peak_bytes;
    info.threads = 1;
    *ret_info = info;
    return KERNEL_OK;
}

void cuda_device_reset_peak(struct kernel_device *device)
{
    device->peak_bytes = device->allocated_bytes;
}

const char *cuda_device_fault(const struct kernel_device *device)
{
    return device->status == KERNEL_OK ? NULL : device->fault;
}

int cuda_memory_alloc(struct kernel_device *device, size_t bytes, void **ret_pointer)
{
    int status = cuda_enter(device);
    return status == KERNEL_OK ? allocate(device, bytes, ret_pointer) : status;
}

void cuda_memory_free(struct kernel_device *device, void *pointer)
{
    if (pointer != NULL && cuda_enter(device) == KERNEL_OK)
        release(device, pointer);
}

/* ---- pinned memory ---- */

/* Goes on with the other half, once the copies out of it are made, and makes it large enough. */
static int staging_turn(struct kernel_device *device, size_t bytes)
{
    int status =
        cuda_check(device, cudaEventRecord(device->staging[device->staging_now].copied, device->stream));
    if (status != KERNEL_OK)
        return status;
    device->staging_now = 1 - device->staging_now;
    struct cuda_staging *half = &device->staging[device->staging_now];
    status = cuda_check(device, cudaEventSynchronize(half->copied));
    half->used = 0;
    if (status != KERNEL_OK || half->bytes >= bytes)
        return status;
    /* Kernels may still read this half's device side; cudaFree waits for them. */
    staging_free(device, half);
    return staging_create(device, half, bytes);
}

/* A place of so many bytes on both sides. */
static int staging_reserve(struct kernel_device *device, size_t bytes, char **ret_host, char **ret_device)
{
    size_t padded = (bytes + STAGING_ALIGNMENT - 1) / STAGING_ALIGNMENT * STAGING_ALIGNMENT;
    struct cuda_staging *half = &device->staging[device->staging_now];
    if (half->bytes - half->used < padded) {
        int status = staging_turn(device, padded);
        if (status != KERNEL_OK)
            return status;
        half = &device->staging[device->staging_now];
    }
    *ret_host = half->host + half->used;
    *ret_device = half->device + half->used;
    half->used += padded;
    return KERNEL_OK;
}

static int copy_in_pinned(struct kernel_device *device, void *to, const void *from, size_t bytes)
{
    char *pinned, *unused;
    int status = staging_reserve(device, bytes, &pinned, &unused);
    if (status != KERNEL_OK)
        return status;
    memcpy(pinned, from, bytes);
    return cuda_check(device, cudaMemcpyAsync(to, pinned, bytes, cudaMemcpyHostToDevice, device->stream));
}

/* ---- copies ---- */

/* What is too large for pinned memory is waited for, since the caller's array may change on return. */
int cuda_copy_in(struct kernel_device *device, void *to_device, const void *from_host, size_t bytes)
{
    int status = cuda_enter_unrecorded(device);
    if (status != KERNEL_OK || bytes == 0)
        return status;
    if (bytes <= SMALL_BYTES)
        return copy_in_pinned(device, to_device, from_host, bytes);
    status = cuda_check(device,
                        cudaMemcpyAsync(to_device, from_host, bytes, cudaMemcpyHostToDevice, device->stream));
    return status == KERNEL_OK ? cuda_synchronize(device) : status;
}

int cuda_copy_out(struct kernel_device *device, void *to_host, const void *from_device, size_t bytes)
{
    int status = cuda_enter_unrecorded(device);
    if (status != KERNEL_OK || bytes == 0)
        return status;
    char *through = (char *)to_host, *unused;
    if (bytes <= SMALL_BYTES)
        status = staging_reserve(device, bytes, &through, &unused);
    if (status == KERNEL_OK)
        status = cuda_check(
            device, cudaMemcpyAsync(through, from_device, bytes, cudaMemcpyDeviceToHost, device->stream));
    if (status == KERNEL_OK)
        status = cuda_synchronize(device);
    if (status == KERNEL_OK && through != to_host)
        memcpy(to_host, through, bytes);
    return status;
}

int cuda_copy(struct kernel_device *device, void *to, const void *from, size_t bytes)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK || bytes == 0)
        return status;
    return cuda_check(device, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, device->stream));
}

int cuda_zero(struct kernel_device *device, void *pointer, size_t bytes)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK || bytes == 0)
        return status;
    return cuda_check(device, cudaMemsetAsync(pointer, 0, bytes, device->stream));
}

int cuda_synchronize(struct kernel_device *device)
{
    int status = cuda_enter_unrecorded(device);
    return status == KERNEL_OK ? cuda_check(device, cudaStreamSynchronize(device->stream)) : status;
}

/* ---- host arrays, scratch ---- */

int cuda_stage(struct kernel_device *device, const void *host, size_t bytes, const void **ret_device)
{
    if (device->recording != NULL)
        return cuda_record_array(device, host, bytes, ret_device);
    char *pinned, *to;
    int status = staging_reserve(device, bytes, &pinned, &to);
    if (status == KERNEL_OK && bytes > 0) {
        memcpy(pinned, host, bytes);
        status =
            cuda_check(device, cudaMemcpyAsync(to, pinned, bytes, cudaMemcpyHostToDevice, device->stream));
    }
    if (status == KERNEL_OK)
        *ret_device = to;
    return status;
}

static int cached_grow(struct kernel_device *device, struct cuda_cached *entry, size_t bytes)
{
    if (entry->capacity >= bytes)
        return KERNEL_OK;
    size_t capacity = CACHED_BYTES;
    while (capacity < bytes)
        capacity *= 2;
    release(device, entry->device);
    free(entry->host);
    *entry = (struct cuda_cached){};
    entry->host = malloc(capacity);
    int status = entry->host != NULL ? allocate(device, capacity, &entry->device) : KERNEL_NO_MEMORY;
    entry->capacity = status == KERNEL_OK ? capacity : 0;
    return status;
}

/* The array that was asked for least recently makes room: its copy is overwritten behind all that reads it. */
int cuda_stage_cached(struct kernel_device *device, const void *host, size_t bytes, const void **ret_device)
{
    if (device->recording != NULL)
        return cuda_record_array(device, host, bytes, ret_device);
    struct cuda_cached *oldest = &device->cached[0];
    device->uses_of_cache++;
    for (int i = 0; i < CUDA_CACHED_COUNT; i++) {
        struct cuda_cached *entry = &device->cached[i];
        if (entry->used < oldest->used)
            oldest = entry;
        if (entry->used == 0 || entry->bytes != bytes || (bytes > 0 && memcmp(entry->host, host, bytes) != 0))
            continue;
        entry->used = device->uses_of_cache;
        *ret_device = entry->device;
        return KERNEL_OK;
    }
    oldest->used = 0; /* holds nothing until the copy is queued */
    int status = cached_grow(device, oldest, bytes > 0 ? bytes : 1);
    if (status == KERNEL_OK && bytes > 0)
        status = copy_in_pinned(device, oldest->device, host, bytes);
    if (status != KERNEL_OK)
        return status;
    if (bytes > 0)
        memcpy(oldest->host, host, bytes);
    oldest->bytes = bytes;
    oldest->used = device->uses_of_cache;
    *ret_device = oldest->device;
    return KERNEL_OK;
}

int cuda_scratch(struct kernel_device *device, enum cuda_scratch_area area, size_t bytes, void **ret_pointer)
{
    if (device->scratch[area].bytes < bytes) {
        release(device, device->scratch[area].pointer);
        device->scratch_moves++;
        device->scratch[area].pointer = NULL;
        device->scratch[area].bytes = 0;
        int status = allocate(device, bytes, &device->scratch[area].pointer);
        if (status != KERNEL_OK)
            return status;
        device->scratch[area].bytes = bytes;
    }
    *ret_pointer = device->scratch[area].pointer;
    return KERNEL_OK;
}

int cuda_results(struct kernel_device *device, size_t bytes, void **ret_pointer)
{
    if (device->results_bytes < bytes) {
        (void)cudaFreeHost(device->results);
        device->results = NULL;
        device->results_bytes = 0;
        int status = cuda_check(device, cudaMallocHost(&device->results, bytes));
        if (status != KERNEL_OK)
            return status;
        device->results_bytes = bytes;
    }
    *ret_pointer = device->results;
    return KERNEL_OK;
}
