/* device.cu: an open GPU: its stream, its cuBLAS, its memory, and the way of host arrays to it. Called by the thread
 * that owns the device. */
#include "kernels/cuda/common.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STAGING_BYTES = 1 << 20, STAGING_ALIGNMENT = 256 };
static const size_t BLAS_WORKSPACE_BYTES = (size_t)32 << 20; /* what cuBLAS recommends for Hopper */

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
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorLaunchOutOfResources:
        (void)cudaGetLastError();
        return KERNEL_UNSUPPORTED;
    default:
        device->status = KERNEL_DEVICE_LOST;
        return KERNEL_DEVICE_LOST;
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
        device->status = KERNEL_DEVICE_LOST;
        return KERNEL_DEVICE_LOST;
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

/* ---- open, close, query ---- */

static int staging_create(struct kernel_device *device, struct cuda_staging *half, size_t bytes)
{
    int status = cuda_check(device, cudaMallocHost((void **)&half->host, bytes));
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaMalloc((void **)&half->device, bytes));
    half->bytes = status == KERNEL_OK ? bytes : 0;
    return status;
}

static void staging_free(struct cuda_staging *half)
{
    (void)cudaFreeHost(half->host);
    (void)cudaFree(half->device);
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
        status = cuda_check(device, cudaMalloc(&device->blas_workspace, BLAS_WORKSPACE_BYTES));
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
    if (status == KERNEL_OK)
        status = cuda_check_blas(device, device->cublas->set_math_mode(device->blas, CUBLAS_DEFAULT_MATH));
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
    if (device->blas != NULL)
        (void)device->cublas->destroy(device->blas);
    (void)cudaFree(device->blas_workspace);
    for (int i = 0; i < 2; i++) {
        staging_free(&device->staging[i]);
        if (device->staging[i].copied != NULL)
            (void)cudaEventDestroy(device->staging[i].copied);
    }
    for (int i = 0; i < CUDA_SCRATCH_COUNT; i++)
        (void)cudaFree(device->scratch[i].pointer);
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
    info.threads = 1;
    *ret_info = info;
    return KERNEL_OK;
}

/* ---- memory ---- */

int cuda_memory_alloc(struct kernel_device *device, size_t bytes, void **ret_pointer)
{
    void *pointer = NULL;
    int status = cuda_enter(device);
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaMalloc(&pointer, bytes > 0 ? bytes : 1));
    if (status == KERNEL_OK)
        *ret_pointer = pointer;
    return status;
}

/* cudaFree waits for the device, so what is queued may still use the memory. */
void cuda_memory_free(struct kernel_device *device, void *pointer)
{
    if (pointer != NULL && cuda_enter(device) == KERNEL_OK)
        (void)cuda_check(device, cudaFree(pointer));
}

/* From pageable memory: the caller's array may change on return, so the copy is waited for. */
int cuda_copy_in(struct kernel_device *device, void *to_device, const void *from_host, size_t bytes)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK || bytes == 0)
        return status;
    status = cuda_check(device,
                        cudaMemcpyAsync(to_device, from_host, bytes, cudaMemcpyHostToDevice, device->stream));
    return status == KERNEL_OK ? cuda_synchronize(device) : status;
}

int cuda_copy_out(struct kernel_device *device, void *to_host, const void *from_device, size_t bytes)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK || bytes == 0)
        return status;
    status = cuda_check(device,
                        cudaMemcpyAsync(to_host, from_device, bytes, cudaMemcpyDeviceToHost, device->stream));
    return status == KERNEL_OK ? cuda_synchronize(device) : status;
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
    int status = cuda_enter(device);
    return status == KERNEL_OK ? cuda_check(device, cudaStreamSynchronize(device->stream)) : status;
}

/* ---- host arrays, scratch ---- */

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
    staging_free(half);
    return staging_create(device, half, bytes);
}

int cuda_stage(struct kernel_device *device, const void *host, size_t bytes, const void **ret_device)
{
    size_t padded = (bytes + STAGING_ALIGNMENT - 1) / STAGING_ALIGNMENT * STAGING_ALIGNMENT;
    struct cuda_staging *half = &device->staging[device->staging_now];
    if (half->bytes - half->used < padded) {
        int status = staging_turn(device, padded);
        if (status != KERNEL_OK)
            return status;
        half = &device->staging[device->staging_now];
    }
    char *from = half->host + half->used, *to = half->device + half->used;
    if (bytes > 0) {
        memcpy(from, host, bytes);
        int status =
            cuda_check(device, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, device->stream));
        if (status != KERNEL_OK)
            return status;
    }
    half->used += padded;
    *ret_device = to;
    return KERNEL_OK;
}

int cuda_scratch(struct kernel_device *device, enum cuda_scratch_area area, size_t bytes, void **ret_pointer)
{
    if (device->scratch[area].bytes < bytes) {
        (void)cudaFree(device->scratch[area].pointer); /* waits for what uses it */
        device->scratch[area].pointer = NULL;
        device->scratch[area].bytes = 0;
        int status = cuda_check(device, cudaMalloc(&device->scratch[area].pointer, bytes));
        if (status != KERNEL_OK)
            return status;
        device->scratch[area].bytes = bytes;
    }
    *ret_pointer = device->scratch[area].pointer;
    return KERNEL_OK;
}
