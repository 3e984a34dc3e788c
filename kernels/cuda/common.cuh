/* common.cuh: inside of the CUDA backend, for the files of kernels/cuda alone: the open device, how an op begins
 * and ends, host arrays on their way to the device, and the small device functions that kernels share.
 *
 * An op runs on the thread that owns the device and looks like this:
 *
 *     int cuda_thing(struct kernel_device *device, const struct thing_args *a)
 *     {
 *         int status = cuda_enter(device);   // sticky status, current device
 *         ... check arguments: KERNEL_INVALID, KERNEL_UNSUPPORTED; nothing to do: KERNEL_OK ...
 *         CUDA_WITH_TYPE(a->act, T, thing_kernel<T><<<grid, block, 0, device->stream>>>(...));
 *         return cuda_launched(device);
 *     }
 *
 * Rules: activations are float, __nv_bfloat16 or __half (a template parameter T); arithmetic is fp32. Results depend
 * on no order of arrival: no float atomics, partitions follow from sizes alone. Sizes and offsets are int64.
 * Accesses of 16 bytes where cuda_aligned() says that they may be, single elements otherwise. */
#ifndef KERNELS_CUDA_COMMON_CUH
#define KERNELS_CUDA_COMMON_CUH

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" {
#include "kernels/kernels.h"
}

/* ---- the device ---- */

/* Areas of device memory that ops use among themselves. They only grow, and an op owns its area until it returns. */
enum cuda_scratch_area {
    CUDA_SCRATCH_OP,     /* any op that does not call another with the same area */
    CUDA_SCRATCH_GEMM,   /* cuda_gemm's: weights widened or narrowed to the type of the activations */
    CUDA_SCRATCH_SAMPLE, /* sample's counters, which begin at zero and keep their place */
    CUDA_SCRATCH_COUNT,
};

/* Host arrays travel through pinned memory, which must not change before its copy was made. Two halves: one fills while
 * the copies out of the other finish. */
struct cuda_staging {
    char *host, *device;
    size_t used, bytes; /* of this half */
    cudaEvent_t copied; /* recorded when the half was left */
};

/* A host array that is on the device already; see cuda_stage_cached. */
struct cuda_cached {
    void *host, *device;
    size_t bytes, capacity;
    uint64_t used; /* the device's uses_of_cache when it was last asked for */
};
enum { CUDA_CACHED_COUNT = 16 };

struct cuda_allocation {
    struct cuda_allocation *next;
    void *pointer;
    size_t bytes;
};

/* What is used of cuBLAS; blas.cu. */
struct cuda_blas {
    decltype(&cublasCreate_v2) create;
    decltype(&cublasDestroy_v2) destroy;
    decltype(&cublasSetStream_v2) set_stream;
    decltype(&cublasSetWorkspace_v2) set_workspace;
    decltype(&cublasSetAtomicsMode) set_atomics_mode;
    decltype(&cublasSetMathMode) set_math_mode;
    decltype(&cublasGemmEx_64) gemm_ex;
};
/* KERNEL_UNSUPPORTED where the library is not installed. */
int cuda_blas_load(const struct cuda_blas **ret_blas);

struct kernel_device {
    int index;
    int status;     /* KERNEL_DEVICE_LOST for good once a call says so */
    char fault[96]; /* why */
    int multiprocessors;
    int shared_bytes; /* most that a block can opt in to */
    bool hopper;      /* runs what is compiled for sm_90a */
    cudaStream_t stream;
    const struct cuda_blas *cublas;
    cublasHandle_t blas;
    void *blas_workspace; /* fixed, so that cuBLAS chooses and sums the same way every time */
    struct cuda_staging staging[2];
    int staging_now; /* the half that fills */
    struct cuda_cached cached[CUDA_CACHED_COUNT];
    void *results; /* see cuda_results */
    size_t results_bytes;
    uint64_t uses_of_cache;
    struct kernel_recording *recording; /* being made, or NULL; recording.cu */
    uint64_t scratch_moves;             /* how often an area of cuda_scratch has moved */
    struct cuda_steps *steps;           /* step.cu's, NULL before the first step */
    struct cuda_allocation *allocations;
    int64_t allocated_bytes, peak_bytes;
    cudaEvent_t *marks; /* [KERNEL_MARKS], each NULL until it is used; marks.cu */
    struct {
        void *pointer;
        size_t bytes;
    } scratch[CUDA_SCRATCH_COUNT];
};

/* KERNEL_OK, or the sticky status. Makes the device current on this thread. */
int cuda_enter(struct kernel_device *device);
/* The same for ops that cannot be part of a recording; recording.cu. */
int cuda_enter_unrecorded(struct kernel_device *device);
/* What a code of the runtime means: out of memory and wrong launches pass; everything else is the end of the device. */
int cuda_check(struct kernel_device *device, cudaError_t code);
int cuda_check_blas(struct kernel_device *device, cublasStatus_t code);
/* The status of the launches since the last call. */
int cuda_launched(struct kernel_device *device);
/* A copy of a host array on the device, 256-byte aligned, good for what is queued before the op returns. The host array
 * may change as soon as this returns. bytes 0 gives a valid pointer. An op asks twice at most: there are two halves, and
 * a third array could take the place of the first. */
int cuda_stage(struct kernel_device *device, const void *host, size_t bytes, const void **ret_device);
/* The same for what many ops in a row are handed (boundaries, slots, slices): one of the last CUDA_CACHED_COUNT arrays
 * with the same contents is there already, and nothing is copied. An op asks for fewer than that many. */
int cuda_stage_cached(struct kernel_device *device, const void *host, size_t bytes, const void **ret_device);
/* What cuda_stage and cuda_stage_cached do while a recording is made: the array is the recording's. */
int cuda_record_array(struct kernel_device *device, const void *host, size_t bytes, const void **ret_device);
/* At least `bytes` of device memory, 256-byte aligned, contents undefined. */
int cuda_scratch(struct kernel_device *device, enum cuda_scratch_area area, size_t bytes, void **ret_pointer);
/* At least `bytes` of the host's memory that kernels can write, for the few numbers that an op returns: a kernel stores
 * them there, and they are read after cuda_synchronize. The op's until it returns. */
int cuda_results(struct kernel_device *device, size_t bytes, void **ret_pointer);

template <typename T>
static inline int cuda_stage_array(struct kernel_device *device, const T *host, int64_t count,
                                   const T **ret_device)
{
    const void *copy = NULL;
    int status = cuda_stage_cached(device, host, (size_t)count * sizeof(T), &copy);
    *ret_device = (const T *)copy;
    return status;
}

/* ---- types ---- */

static inline bool cuda_is_float(enum kernel_type type)
{
    return type == TYPE_F32 || type == TYPE_BF16 || type == TYPE_F16;
}

/* Runs the statement with T naming the C++ type of `type`, which cuda_is_float() accepted. */
#define CUDA_WITH_TYPE(type, T, ...)                                                                         \
    do {                                                                                                     \
        if ((type) == TYPE_BF16) {                                                                           \
            using T = __nv_bfloat16;                                                                         \
            __VA_ARGS__;                                                                                     \
        } else if ((type) == TYPE_F16) {                                                                     \
            using T = __half;                                                                                \
            __VA_ARGS__;                                                                                     \
        } else {                                                                                             \
            using T = float;                                                                                 \
            __VA_ARGS__;                                                                                     \
        }                                                                                                    \
    } while (0)

static __device__ __forceinline__ float to_float(float v)
{
    return v;
}
static __device__ __forceinline__ float to_float(__nv_bfloat16 v)
{
    return __bfloat162float(v);
}
static __device__ __forceinline__ float to_float(__half v)
{
    return __half2float(v);
}
template <typename T> static __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v)
{
    return v;
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v)
{
    return __float2bfloat16_rn(v);
}
template <> __device__ __forceinline__ __half from_float<__half>(float v)
{
    return __float2half_rn(v);
}

/* ---- 16 bytes at a time ---- */

/* Elements of T in 16 bytes. */
template <typename T> struct pack {
    enum { COUNT = 16 / sizeof(T) };
    T v[COUNT];
};

/* Whether rows of `stride` elements that begin at p can be read 16 bytes at a time. A NULL pointer is aligned. */
template <typename T> static inline bool cuda_aligned(const T *p, int64_t stride)
{
    return (uintptr_t)p % 16 == 0 && stride * (int64_t)sizeof(T) % 16 == 0;
}

/* N consecutive elements as floats: whole packs (pack::COUNT is 4 for float, 8 for the halves) where p is known to be
 * aligned, or one element anywhere. */
template <typename T, int N> static __device__ __forceinline__ void load_pack(const T *p, float (&out)[N])
{
    constexpr int COUNT = pack<T>::COUNT;
    static_assert(N == 1 || N % COUNT == 0, "whole packs");
    if constexpr (N == 1) {
        out[0] = to_float(p[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += COUNT) {
            uint4 raw = *reinterpret_cast<const uint4 *>(p + i);
            const T *v = reinterpret_cast<const T *>(&raw);
#pragma unroll
            for (int j = 0; j < COUNT; j++)
                out[i + j] = to_float(v[j]);
        }
    }
}

template <typename T, int N> static __device__ __forceinline__ void store_pack(T *p, const float (&in)[N])
{
    constexpr int COUNT = pack<T>::COUNT;
    static_assert(N == 1 || N % COUNT == 0, "whole packs");
    if constexpr (N == 1) {
        p[0] = from_float<T>(in[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += COUNT) {
            uint4 raw;
            T *v = reinterpret_cast<T *>(&raw);
#pragma unroll
            for (int j = 0; j < COUNT; j++)
                v[j] = from_float<T>(in[i + j]);
            *reinterpret_cast<uint4 *>(p + i) = raw;
        }
    }
}

/* ---- reductions within a block, in a fixed order ---- */

enum { WARP = 32 };

template <typename V> static __device__ __forceinline__ V warp_sum(V v)
{
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

static __device__ __forceinline__ float warp_max(float v)
{
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

/* The sum over a block of THREADS (a multiple of WARP, at most 1024), given to every thread. All threads take part. */
template <int THREADS, typename V> static __device__ __forceinline__ V block_sum(V v)
{
    static_assert(THREADS % WARP == 0 && THREADS <= 1024, "whole warps");
    __shared__ V partial[THREADS / WARP];
    v = warp_sum(v);
    __syncthreads(); /* an earlier call's readers are done */
    if (threadIdx.x % WARP == 0)
        partial[threadIdx.x / WARP] = v;
    __syncthreads();
    V sum = partial[0];
    for (int i = 1; i < THREADS / WARP; i++)
        sum += partial[i];
    return sum;
}

static inline __host__ __device__ int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Blocks for a grid-stride loop over `count` items, `per_block` of them a block at a time. Only for elementwise work:
 * which thread does what then changes no result. */
static inline unsigned cuda_grid(const struct kernel_device *device, int64_t count, int64_t per_block)
{
    int64_t blocks = divide_up(count, per_block), most = (int64_t)device->multiprocessors * 16;
    return (unsigned)(blocks < most ? (blocks > 0 ? blocks : 1) : most);
}

/* ---- the ops; contracts in kernels.h ---- */

int cuda_device_open(int index, int threads, struct kernel_device **ret_device);
void cuda_device_close(struct kernel_device *device);
int cuda_device_query(struct kernel_device *device, struct kernel_device_info *ret_info);
void cuda_device_reset_peak(struct kernel_device *device);
const char *cuda_device_fault(const struct kernel_device *device);
int cuda_memory_alloc(struct kernel_device *device, size_t bytes, void **ret_pointer);
void cuda_memory_free(struct kernel_device *device, void *pointer);
int cuda_copy_in(struct kernel_device *device, void *to_device, const void *from_host, size_t bytes);
int cuda_copy_out(struct kernel_device *device, void *to_host, const void *from_device, size_t bytes);
int cuda_copy(struct kernel_device *device, void *to, const void *from, size_t bytes);
int cuda_zero(struct kernel_device *device, void *pointer, size_t bytes);
int cuda_cast(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
              enum kernel_type from_type, int64_t count);
int cuda_synchronize(struct kernel_device *device);
int cuda_mark(struct kernel_device *device, int slot);
int cuda_mark_seconds(struct kernel_device *device, int from, int to, double *ret_seconds);
void cuda_marks_free(struct kernel_device *device);
int cuda_record_begin(struct kernel_device *device);
int cuda_record_end(struct kernel_device *device, struct kernel_recording **ret_recording);
int cuda_record_run(struct kernel_device *device, const struct kernel_recording *recording);
void cuda_record_free(struct kernel_device *device, struct kernel_recording *recording);

int cuda_gemm(struct kernel_device *device, const struct gemm_args *a);
int cuda_lora_forward(struct kernel_device *device, const struct lora_forward_args *a);
int64_t cuda_linear_workspace(int64_t rows, int64_t in, int64_t out, int64_t rank);
int cuda_linear_forward(struct kernel_device *device, const struct linear_forward_args *a);
int cuda_linear_backward(struct kernel_device *device, const struct linear_backward_args *a);
int cuda_embedding_forward(struct kernel_device *device, const struct embedding_forward_args *a);
int cuda_embedding_backward(struct kernel_device *device, const struct embedding_backward_args *a);
int cuda_rmsnorm_forward(struct kernel_device *device, const struct rmsnorm_forward_args *a);
int64_t cuda_rmsnorm_backward_workspace(int64_t rows, int64_t d);
int cuda_rmsnorm_backward(struct kernel_device *device, const struct rmsnorm_backward_args *a);
int cuda_conv_forward(struct kernel_device *device, const struct conv_forward_args *a);
int cuda_conv_backward(struct kernel_device *device, const struct conv_backward_args *a);
int cuda_scan_prepare(struct kernel_device *device, const struct scan_prepare_args *a);
int cuda_scan_forward(struct kernel_device *device, const struct scan_forward_args *a);
int64_t cuda_scan_backward_workspace(int64_t tokens, int64_t channels, int64_t d_state, int32_t n_seqs);
int cuda_scan_backward(struct kernel_device *device, const struct scan_backward_args *a);
int64_t cuda_mamba_step_workspace(const struct mamba_step_args *a);
int cuda_mamba_step(struct kernel_device *device, const struct mamba_step_args *a);
void cuda_steps_close(struct kernel_device *device);
int64_t cuda_head_workspace(int64_t rows, int64_t d_model, int64_t vocab, bool backward);
int cuda_head(struct kernel_device *device, const struct head_args *a);
int cuda_adamw(struct kernel_device *device, const struct adamw_args *a);
int cuda_grad_norm(struct kernel_device *device, const struct grad_norm_args *a);
int cuda_sample(struct kernel_device *device, const struct sample_args *a);

/* Boundaries that begin at 0, never go back and end at `tokens`. */
static inline bool cuda_seqs_valid(const int32_t *seq_starts, int32_t n_seqs, int64_t tokens)
{
    if (n_seqs < 0 || tokens < 0)
        return false;
    if (n_seqs == 0)
        return tokens == 0;
    for (int32_t s = 0; s < n_seqs; s++)
        if (seq_starts[s] > seq_starts[s + 1])
            return false;
    return seq_starts[0] == 0 && seq_starts[n_seqs] == tokens;
}

#endif
