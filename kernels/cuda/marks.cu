/* marks.cu: times on the device's own clock, by events that are made when a slot is first used. Called by the thread
 * that owns the device. */
#include "kernels/cuda/common.cuh"

#include <stdlib.h>

void cuda_marks_free(struct kernel_device *device)
{
    for (int i = 0; device->marks != NULL && i < KERNEL_MARKS; i++)
        if (device->marks[i] != NULL)
            (void)cudaEventDestroy(device->marks[i]);
    free(device->marks);
}

int cuda_mark(struct kernel_device *device, int slot)
{
    int status = cuda_enter_unrecorded(device);
    if (status != KERNEL_OK)
        return status;
    if (slot < 0 || slot >= KERNEL_MARKS)
        return KERNEL_INVALID;
    if (device->marks == NULL)
        device->marks = (cudaEvent_t *)calloc(KERNEL_MARKS, sizeof(*device->marks));
    if (device->marks == NULL)
        return KERNEL_NO_MEMORY;
    if (device->marks[slot] == NULL)
        status = cuda_check(device, cudaEventCreate(&device->marks[slot]));
    return status == KERNEL_OK ? cuda_check(device, cudaEventRecord(device->marks[slot], device->stream))
                               : status;
}

int cuda_mark_seconds(struct kernel_device *device, int from, int to, double *ret_seconds)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (from < 0 || from >= KERNEL_MARKS || to < 0 || to >= KERNEL_MARKS || device->marks == NULL ||
        device->marks[from] == NULL || device->marks[to] == NULL)
        return KERNEL_INVALID;
    float ms = 0;
    status = cuda_check(device, cudaEventSynchronize(device->marks[to]));
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaEventElapsedTime(&ms, device->marks[from], device->marks[to]));
    if (status == KERNEL_OK)
        *ret_seconds = 1e-3 * (double)ms;
    return status;
}
