/* vector.cuh: pieces that the kernels over tokens and channels share: a few neighbouring elements at a time, the
 * activation functions in fp32, where a token belongs, states in a pool, and sums of partial results. */
#ifndef KERNELS_CUDA_VECTOR_CUH
#define KERNELS_CUDA_VECTOR_CUH

#include "kernels/cuda/common.cuh"

/* ---- N neighbouring elements ---- */

template <int BYTES> struct word;
template <> struct word<2> {
    using type = uint16_t;
};
template <> struct word<4> {
    using type = uint32_t;
};
template <> struct word<8> {
    using type = uint2;
};
template <> struct word<16> {
    using type = uint4;
};

/* The first n of N elements, the others 0. whole: p is aligned for N elements, or for 16 bytes if those are more. */
template <typename T, int N>
static __device__ __forceinline__ void load_some(const T *p, int64_t n, bool whole, float (&out)[N])
{
    constexpr int BYTES = N * sizeof(T) < 16 ? (int)(N * sizeof(T)) : 16, COUNT = BYTES / (int)sizeof(T);
    using W = typename word<BYTES>::type;
    if (whole && n >= N) {
#pragma unroll
        for (int i = 0; i < N; i += COUNT) {
            W raw = *reinterpret_cast<const W *>(p + i);
            const T *v = reinterpret_cast<const T *>(&raw);
#pragma unroll
            for (int j = 0; j < COUNT; j++)
                out[i + j] = to_float(v[j]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        out[i] = i < n ? to_float(p[i]) : 0.0f;
}

template <typename T, int N>
static __device__ __forceinline__ void store_some(T *p, int64_t n, bool whole, const float (&in)[N])
{
    constexpr int BYTES = N * sizeof(T) < 16 ? (int)(N * sizeof(T)) : 16, COUNT = BYTES / (int)sizeof(T);
    using W = typename word<BYTES>::type;
    if (whole && n >= N) {
#pragma unroll
        for (int i = 0; i < N; i += COUNT) {
            W raw;
            T *v = reinterpret_cast<T *>(&raw);
#pragma unroll
            for (int j = 0; j < COUNT; j++)
                v[j] = from_float<T>(in[i + j]);
            *reinterpret_cast<W *>(p + i) = raw;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < n)
            p[i] = from_float<T>(in[i]);
}

/* Whether rows that begin at p, `stride` elements of a type apart, may be accessed 16 bytes at a time. */
static inline bool rows_aligned(const void *p, int64_t stride, enum kernel_type type)
{
    return (uintptr_t)p % 16 == 0 && stride * (int64_t)kernel_type_size(type) % 16 == 0;
}

/* ---- functions ---- */

static __device__ __forceinline__ float exp2_fast(float v)
{
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

static __device__ __forceinline__ float reciprocal_fast(float v)
{
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

constexpr float LOG2_E = 1.44269504088896341f;

static __device__ __forceinline__ float sigmoid(float v)
{
    return reciprocal_fast(1.0f + exp2_fast(v * -LOG2_E));
}

/* v sigmoid(v) and its slope. */
static __device__ __forceinline__ float silu(float v)
{
    return v * sigmoid(v);
}

static __device__ __forceinline__ float silu_slope(float v)
{
    float s = sigmoid(v);
    return s * (1.0f + v * (1.0f - s));
}

/* log(1 + e^v) = max(v, 0) + log1p(e^-|v|), with log1p(u) = u p(u) for u in 0..1: p of least relative error, 3e-7. */
static __device__ __forceinline__ float softplus(float v)
{
    float u = exp2_fast(fabsf(v) * -LOG2_E), p = -0.00853921007f;
    p = fmaf(p, u, 0.0440896340f);
    p = fmaf(p, u, -0.107681714f);
    p = fmaf(p, u, 0.177452415f);
    p = fmaf(p, u, -0.244954631f);
    p = fmaf(p, u, 0.332754791f);
    p = fmaf(p, u, -0.499974042f);
    p = fmaf(p, u, 0.999999821f);
    return fmaf(p, u, fmaxf(v, 0.0f));
}

/* ---- sequences ---- */

/* The s with starts[s] <= i < starts[s+1], for i below starts[n]; empty ones are passed over. */
static __device__ __forceinline__ int32_t part_of(const int32_t *starts, int32_t n, int64_t i)
{
    int32_t low = 0, high = n;
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (starts[middle] <= i)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* A view whose slots, if any, are on the device. */
static __device__ __forceinline__ float *state_of(const struct state_view &view, int32_t seq)
{
    if (view.pool == NULL)
        return NULL;
    int32_t slot = view.slots != NULL ? view.slots[seq] : seq;
    return slot < 0 ? NULL : view.pool + slot * view.slot_stride;
}

/* Puts the device's copy of the slots in the place of the caller's. */
static inline int stage_slots(struct kernel_device *device, int32_t n_seqs, struct state_view *view)
{
    if (view->pool == NULL || view->slots == NULL)
        return KERNEL_OK;
    return cuda_stage_array(device, view->slots, n_seqs, &view->slots);
}

/* ---- partial sums ---- */

/* out[i] += the sum over p of parts[p * stride + i], i < count, in an order that depends on the number of parts
 * alone. */
int cuda_add_parts(struct kernel_device *device, const float *parts, int64_t n_parts, int64_t stride,
                   int64_t count, float *out);

#endif
