/* recording.cu: stretches of ops kept as CUDA graphs. The thread that owns the device captures its stream while the ops
 * queue as ever; what they were handed in host arrays is copied into memory of the recording, since the places where such
 * arrays usually travel are used again by others.
 *
 * Kernels of a recording also hold pointers into the areas that ops share (cuda_scratch). Those only move when one grows;
 * a recording remembers how often that had happened, and is not run once it has again. */
#include "kernels/cuda/common.cuh"

#include <stdlib.h>
#include <string.h>

/* A host array as it was when an op asked for it. */
struct recorded_array {
    struct recorded_array *next;
    void *device;
    size_t bytes;
    char host[];
};

struct kernel_recording {
    cudaGraphExec_t exec;
    struct recorded_array *arrays;
    uint64_t scratch_moves; /* the device's at the end */
    bool failed;            /* an op was asked for that cannot be part of it */
};

static int add_array(struct kernel_device *device, const void *host, size_t bytes,
                     struct recorded_array **ret_array)
{
    struct recorded_array *array = (struct recorded_array *)malloc(sizeof(*array) + bytes);
    if (array == NULL)
        return KERNEL_NO_MEMORY;
    array->bytes = bytes;
    if (bytes > 0)
        memcpy(array->host, host, bytes);
    int status = cuda_memory_alloc(device, bytes, &array->device);
    /* At once, and on a stream that is not captured. */
    if (status == KERNEL_OK && bytes > 0)
        status = cuda_check(device, cudaMemcpy(array->device, host, bytes, cudaMemcpyHostToDevice));
    if (status != KERNEL_OK) {
        free(array);
        return status;
    }
    array->next = device->recording->arrays;
    device->recording->arrays = array;
    *ret_array = array;
    return KERNEL_OK;
}

int cuda_record_array(struct kernel_device *device, const void *host, size_t bytes, const void **ret_device)
{
    struct recorded_array *array = device->recording->arrays;
    while (array != NULL && (array->bytes != bytes || (bytes > 0 && memcmp(array->host, host, bytes) != 0)))
        array = array->next;
    int status = array != NULL ? KERNEL_OK : add_array(device, host, bytes, &array);
    if (status == KERNEL_OK)
        *ret_device = array->device;
    return status;
}

int cuda_enter_unrecorded(struct kernel_device *device)
{
    if (device->recording == NULL)
        return cuda_enter(device);
    device->recording->failed = true;
    return KERNEL_INVALID;
}

/* Thread-local would forbid the allocations that an op may need. */
int cuda_record_begin(struct kernel_device *device)
{
    int status = cuda_enter_unrecorded(device);
    if (status != KERNEL_OK)
        return status;
    struct kernel_recording *recording = (struct kernel_recording *)calloc(1, sizeof(*recording));
    if (recording == NULL)
        return KERNEL_NO_MEMORY;
    status = cuda_check(device, cudaStreamBeginCapture(device->stream, cudaStreamCaptureModeRelaxed));
    if (status == KERNEL_OK)
        device->recording = recording;
    else
        free(recording);
    return status;
}

int cuda_record_end(struct kernel_device *device, struct kernel_recording **ret_recording)
{
    struct kernel_recording *recording = device->recording;
    cudaGraph_t graph = NULL;
    if (recording == NULL)
        return KERNEL_INVALID;
    int status = cuda_check(device, cudaStreamEndCapture(device->stream, &graph));
    if (status == KERNEL_OK && recording->failed)
        status = KERNEL_INVALID;
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaGraphInstantiate(&recording->exec, graph, 0));
    if (status == KERNEL_OK) /* whatever the driver still needs for it, now */
        status = cuda_check(device, cudaGraphUpload(recording->exec, device->stream));
    device->recording = NULL;
    recording->scratch_moves = device->scratch_moves;
    if (graph != NULL)
        (void)cudaGraphDestroy(graph);
    if (status == KERNEL_OK)
        *ret_recording = recording;
    else
        cuda_record_free(device, recording);
    return status;
}

int cuda_record_run(struct kernel_device *device, const struct kernel_recording *recording)
{
    int status = cuda_enter_unrecorded(device);
    if (status != KERNEL_OK)
        return status;
    if (recording->scratch_moves != device->scratch_moves)
        return KERNEL_UNSUPPORTED;
    return cuda_check(device, cudaGraphLaunch(recording->exec, device->stream));
}

void cuda_record_free(struct kernel_device *device, struct kernel_recording *recording)
{
    if (recording == NULL)
        return;
    if (recording->exec != NULL)
        (void)cudaGraphExecDestroy(recording->exec);
    while (recording->arrays != NULL) {
        struct recorded_array *array = recording->arrays;
        recording->arrays = array->next;
        cuda_memory_free(device, array->device);
        free(array);
    }
    free(recording);
}
