/* keys.cuh: logits and their ids as numbers that sort, for head.cu and sample.cu.
 *
 * A key is the logit's bits, made to sort as unsigned, above the id's complement: no two of a row are equal, and of
 * equal logits the lower id has the higher key. */
#ifndef KERNELS_CUDA_KEYS_CUH
#define KERNELS_CUDA_KEYS_CUH

#include "kernels/cuda/common.cuh"

typedef unsigned long long word; /* what integer atomics take */

/* 0 for NaN, which is below all. */
static __device__ __forceinline__ word key_of(float logit, int64_t id)
{
    if (isnan(logit))
        return 0;
    uint32_t bits = __float_as_uint(logit + 0.0f); /* -0 is 0 */
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (word)bits << 32 | (uint32_t) ~(uint32_t)id;
}

static __device__ __forceinline__ int32_t id_of(word key)
{
    return (int32_t) ~(uint32_t)key;
}

static __device__ __forceinline__ float logit_of(word key)
{
    uint32_t bits = (uint32_t)(key >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

static __device__ __forceinline__ word warp_highest(word v)
{
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        word other = __shfl_xor_sync(0xffffffffu, v, step);
        v = v > other ? v : other;
    }
    return v;
}

/* The highest of a block's, for every thread. All threads take part. */
template <int THREADS> static __device__ word block_highest(word v)
{
    __shared__ word partial[THREADS / WARP];
    v = warp_highest(v);
    __syncthreads(); /* an earlier call's readers are done */
    if (threadIdx.x % WARP == 0)
        partial[threadIdx.x / WARP] = v;
    __syncthreads();
    v = partial[0];
    for (int i = 1; i < THREADS / WARP; i++)
        v = v > partial[i] ? v : partial[i];
    return v;
}

/* Bytes of shared memory for block_top when a thread has at most so many ids. */
static inline size_t block_top_bytes(int32_t count, int64_t ids_a_thread)
{
    return (size_t)count * (size_t)ids_a_thread * sizeof(word);
}

/* The `count` highest keys of a row in descending order, to shared memory; 0 where there are no more. The row's ids are
 * divided among the threads in some way, and `own` is the thread's highest key. The count-th highest of those is a
 * bound: what is above it lies with `count` threads, so that `list` holds it. */
template <int THREADS>
static __device__ void block_top(const float *logits, int64_t vocab, word own, int32_t count, word *list,
                                 word *ret_keys)
{
    __shared__ word highest[THREADS];
    __shared__ int listed;
    __syncthreads();
    highest[threadIdx.x] = own;
    if (threadIdx.x == 0)
        listed = 0;
    __syncthreads();
    word bound = 0;
    if (threadIdx.x < WARP) {
        word left = ~(word)0;
        for (int32_t n = 0; n < count; n++) {
            word best = 0;
            for (int i = (int)threadIdx.x; i < THREADS; i += WARP)
                best = highest[i] < left && highest[i] > best ? highest[i] : best;
            left = warp_highest(best);
        }
        if (threadIdx.x == 0)
            ret_keys[0] = left;
    }
    __syncthreads();
    bound = ret_keys[0] > 0 ? ret_keys[0] : 1;
    for (int64_t i = threadIdx.x; i < vocab; i += THREADS) {
        word key = key_of(logits[i], i);
        if (key >= bound)
            list[atomicAdd(&listed, 1)] = key;
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
        word left = ~(word)0;
        for (int32_t n = 0; n < count; n++) {
            word best = 0;
            for (int i = (int)threadIdx.x; i < listed; i += WARP)
                best = list[i] < left && list[i] > best ? list[i] : best;
            left = warp_highest(best);
            if (threadIdx.x == 0)
                ret_keys[n] = left;
        }
    }
    __syncthreads();
}

#endif
