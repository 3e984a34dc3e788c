/* fragments.cuh: products of a warp and small products of a warpgroup, for kernels that add a low-rank path to tiles of
 * 64 columns under the 128-byte swizzle. For sm_90a alone, as hopper.cuh.
 *
 * A right factor of 8 columns by 16, in two registers: lane l has rows 2 (l % 4), the next, and both 8 further down, of
 * column l / 4. A result of 16 by 8, in four: rows l / 4 and 8 further down of columns 2 (l % 4) and the next. */
#ifndef KERNELS_CUDA_FRAGMENTS_CUH
#define KERNELS_CUDA_FRAGMENTS_CUH

#include <type_traits>

#include "kernels/cuda/hopper.cuh"

#if CUDA_HOPPER

enum { TILE_ROW_BYTES = 128 }; /* of 64 columns */

/* c += a b, 16 by 8 by 16. */
template <typename T>
static __device__ __forceinline__ void multiply_fragment(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                         uint32_t b1)
{
    if constexpr (std::is_same<T, __half>::value)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Sixteen by sixteen elements of a tile as a left factor, or their transpose: rows from `tile` on, 16-byte pieces from
 * `piece` on. */
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_fragment(uint32_t tile, int lane, int piece, uint32_t (&a)[4])
{
    int row = TRANSPOSED ? lane % 8 + lane / 16 * 8 : lane % 16;
    piece += TRANSPOSED ? lane / 8 % 2 : lane / 16;
    uint32_t at = tile + row * TILE_ROW_BYTES + ((piece ^ (row % 8)) * 16);
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(at)
                     : "memory");
}

/* Eight by eight elements, two of a row a lane, to two of a column. */
static __device__ __forceinline__ uint32_t transpose_fragment(uint32_t v)
{
    uint32_t t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
    return t;
}

template <typename T> static __device__ __forceinline__ uint32_t pair_of(T low, T high)
{
    T both[2] = {low, high};
    uint32_t r;
    memcpy(&r, both, sizeof(r));
    return r;
}
template <typename T> static __device__ __forceinline__ uint32_t pair_rounded(float low, float high)
{
    return pair_of(from_float<T>(low), from_float<T>(high));
}

/* A low-rank path's first factor, scaled, [8,k] for product_64x8: boxes of 64 k, zeros beyond k and rank. From rows of k
 * that are `stride` apart, or rows of rank where not BY_RANK; by THREADS threads. */
template <typename T, bool BY_RANK, int THREADS>
static __device__ __forceinline__ void load_first(unsigned char *to, const float *factor, int64_t stride,
                                                  float scale, int k, int rank)
{
    const int pieces = (k + 63) / 64 * 8; /* of 8 k */
#pragma unroll 2
    for (int i = threadIdx.x; i < pieces * 8; i += THREADS) {
        const int r = BY_RANK ? i / pieces : i % 8, piece = BY_RANK ? i % pieces : i / 8;
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int at = piece * 8 + j;
            v[j] = r < rank && at < k ? factor[BY_RANK ? r * stride + at : (int64_t)at * rank + r] : 0.0f;
        }
        uint4 packed = {
            pair_rounded<T>(scale * v[0], scale * v[1]), pair_rounded<T>(scale * v[2], scale * v[3]),
            pair_rounded<T>(scale * v[4], scale * v[5]), pair_rounded<T>(scale * v[6], scale * v[7])};
        *(uint4 *)(to + piece / 8 * (8 * TILE_ROW_BYTES) + r * TILE_ROW_BYTES + (piece % 8 ^ r) * 16) =
            packed;
    }
}

/* d[64,64] = A[64,16] B[16,64] of a warpgroup, or += when `add`; B in rows of 64 n (a tile of 64 rows of k), or K_MAJOR in rows of 64 k. d as
 * product_64x256's. */
template <typename T, bool K_MAJOR>
static __device__ __forceinline__ void product_64x64(float (&d)[32], uint64_t a, uint64_t b, int add)
{
#define PRODUCT(TYPE)                                                                                        \
    asm volatile("{\n"                                                                                       \
                 ".reg .pred p;\n"                                                                           \
                 "setp.ne.b32 p, %34, 0;\n"                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                            \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                    \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"            \
                 "}, %32, %33, p, 1, 1, 0, %35;\n"                                                           \
                 "}"                                                                                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),       \
                   "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),   \
                   "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),             \
                   "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),             \
                   "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])              \
                 : "l"(a), "l"(b), "r"(add), "n"(K_MAJOR ? 0 : 1))
    if constexpr (std::is_same<T, __half>::value)
        PRODUCT("f16");
    else
        PRODUCT("bf16");
#undef PRODUCT
}

/* d[64,8] = A[64,16] B[16,8], or +=; B in rows of 64 k. */
template <typename T>
static __device__ __forceinline__ void product_64x8(float (&d)[4], uint64_t a, uint64_t b, int add)
{
#define PRODUCT(TYPE)                                                                                        \
    asm volatile("{\n"                                                                                       \
                 ".reg .pred p;\n"                                                                           \
                 "setp.ne.b32 p, %6, 0;\n"                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPE "." TYPE                                  \
                 " {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n"                                               \
                 "}"                                                                                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
                 : "l"(a), "l"(b), "r"(add))
    if constexpr (std::is_same<T, __half>::value)
        PRODUCT("f16");
    else
        PRODUCT("bf16");
#undef PRODUCT
}

#endif

#endif
