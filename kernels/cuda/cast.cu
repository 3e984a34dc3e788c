/* cast.cu: conversion between the storage types. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 256 };

template <typename To, typename From>
static __global__ void cast_kernel(To *__restrict__ to, const From *__restrict__ from, int64_t count,
                                   bool aligned)
{
    constexpr int N = pack<To>::COUNT > pack<From>::COUNT ? pack<To>::COUNT : pack<From>::COUNT;
    int64_t thread = (int64_t)blockIdx.x * THREADS + threadIdx.x, threads = (int64_t)gridDim.x * THREADS;
    int64_t packs = aligned ? count / N : 0;
    for (int64_t i = thread; i < packs; i += threads) {
        float v[N];
        load_pack(from + i * N, v);
        store_pack(to + i * N, v);
    }
    for (int64_t i = packs * N + thread; i < count; i += threads)
        to[i] = from_float<To>(to_float(from[i]));
}

int cuda_cast(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
              enum kernel_type from_type, int64_t count)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (count < 0)
        return KERNEL_INVALID;
    if (to_type == from_type)
        return cuda_copy(device, to, from, (size_t)count * kernel_type_size(to_type));
    if (!cuda_is_float(to_type) || !cuda_is_float(from_type))
        return KERNEL_UNSUPPORTED;
    if (count == 0)
        return KERNEL_OK;
    bool aligned = (uintptr_t)to % 16 == 0 && (uintptr_t)from % 16 == 0;
    unsigned grid = cuda_grid(device, count, THREADS * 8);
    CUDA_WITH_TYPE(to_type, To,
                   CUDA_WITH_TYPE(from_type, From,
                                  cast_kernel<<<grid, THREADS, 0, device->stream>>>(
                                      (To *)to, (const From *)from, count, aligned)));
    return cuda_launched(device);
}
