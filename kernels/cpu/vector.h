/* vector.h: a thin layer over the vector registers of one instruction set, chosen by the compiler's flags
 * (see isa.h): 16 floats with AVX-512, 8 with AVX2, 4 in plain code. Only for files compiled per instruction
 * set. Keep it narrow: what the kernels use, and nothing else.
 *
 * `vec` holds VEC_LANES floats; + - * / and comparisons of the compiler apply to it. Functions ending in _n
 * take the number of lanes in use, 1..VEC_LANES; loads fill the others with 0 and no byte outside is touched.
 * NaN propagates through all of the functions unless said otherwise. */
#ifndef KERNELS_CPU_VECTOR_H
#define KERNELS_CPU_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/convert.h"

#if defined(__AVX512F__)
#include <immintrin.h>
enum { VEC_LANES = 16 };
#elif defined(__AVX2__)
#include <immintrin.h>
enum { VEC_LANES = 8 };
#else
enum { VEC_LANES = 4 };
#endif

/* may_alias as in the compiler's own __m512. */
typedef float vec __attribute__((vector_size(4 * VEC_LANES), may_alias));
typedef int32_t vec_int __attribute__((vector_size(4 * VEC_LANES), may_alias));
typedef uint32_t vec_uint __attribute__((vector_size(4 * VEC_LANES), may_alias));

#define VEC_INLINE static inline __attribute__((always_inline, unused))

/* ---- loads and stores, unaligned ---- */

VEC_INLINE vec vec_set1(float x)
{
    return x - (vec){0};
}

VEC_INLINE vec vec_load(const float *p)
{
    vec v;
    memcpy(&v, p, sizeof(v));
    return v;
}

VEC_INLINE void vec_store(float *p, vec v)
{
    memcpy(p, &v, sizeof(v));
}

#if defined(__AVX512F__)

VEC_INLINE __mmask16 vec_mask(int64_t n)
{
    return (__mmask16)((1u << n) - 1);
}

VEC_INLINE vec vec_load_n(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps(vec_mask(n), p);
}

VEC_INLINE void vec_store_n(float *p, vec v, int64_t n)
{
    _mm512_mask_storeu_ps(p, vec_mask(n), v);
}

VEC_INLINE vec vec_from_bf16(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

VEC_INLINE vec vec_load_bf16(const uint16_t *p)
{
    return vec_from_bf16(_mm256_loadu_si256((const __m256i *)p));
}

VEC_INLINE vec vec_load_bf16_n(const uint16_t *p, int64_t n)
{
    return vec_from_bf16(_mm256_maskz_loadu_epi16(vec_mask(n), p));
}

VEC_INLINE vec vec_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

VEC_INLINE vec vec_load_f16_n(const uint16_t *p, int64_t n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(vec_mask(n), p));
}

#else

VEC_INLINE vec vec_load_n(const float *p, int64_t n)
{
    vec v = {0};
    memcpy(&v, p, (size_t)n * sizeof(float));
    return v;
}

VEC_INLINE void vec_store_n(float *p, vec v, int64_t n)
{
    memcpy(p, &v, (size_t)n * sizeof(float));
}

#if defined(__AVX2__)

VEC_INLINE vec vec_load_bf16(const uint16_t *p)
{
    __m128i h = _mm_loadu_si128((const __m128i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

VEC_INLINE vec vec_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

#else

VEC_INLINE vec vec_load_bf16(const uint16_t *p)
{
    vec_uint bits;
    for (int i = 0; i < VEC_LANES; i++)
        bits[i] = (uint32_t)p[i] << 16;
    return (vec)bits;
}

VEC_INLINE vec vec_load_f16(const uint16_t *p)
{
    vec v;
    for (int i = 0; i < VEC_LANES; i++)
        v[i] = f16_to_float(p[i]);
    return v;
}

#endif

VEC_INLINE vec vec_load_bf16_n(const uint16_t *p, int64_t n)
{
    uint16_t part[VEC_LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof(*p));
    return vec_load_bf16(part);
}

VEC_INLINE vec vec_load_f16_n(const uint16_t *p, int64_t n)
{
    uint16_t part[VEC_LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof(*p));
    return vec_load_f16(part);
}

#endif

/* For loops whose last vector is narrower: n is VEC_LANES, as a constant, in all but that one. */
VEC_INLINE vec vec_load_up_to(const float *p, int64_t n)
{
    return n == VEC_LANES ? vec_load(p) : vec_load_n(p, n);
}

VEC_INLINE void vec_store_up_to(float *p, vec v, int64_t n)
{
    if (n == VEC_LANES)
        vec_store(p, v);
    else
        vec_store_n(p, v, n);
}

/* p points at `type`, F32, BF16 or F16; a constant to the compiler wherever speed matters. */
VEC_INLINE vec vec_load_as(const void *p, enum kernel_type type)
{
    return type == TYPE_BF16  ? vec_load_bf16((const uint16_t *)p)
           : type == TYPE_F16 ? vec_load_f16((const uint16_t *)p)
                              : vec_load((const float *)p);
}

VEC_INLINE vec vec_load_as_n(const void *p, enum kernel_type type, int64_t n)
{
    return type == TYPE_BF16  ? vec_load_bf16_n((const uint16_t *)p, n)
           : type == TYPE_F16 ? vec_load_f16_n((const uint16_t *)p, n)
                              : vec_load_n((const float *)p, n);
}

/* ---- arithmetic ---- */

/* a * b + c, fused where the instruction set can. */
VEC_INLINE vec vec_fma(vec a, vec b, vec c)
{
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

/* c - a * b */
VEC_INLINE vec vec_fnma(vec a, vec b, vec c)
{
#if defined(__AVX512F__)
    return _mm512_fnmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fnmadd_ps(a, b, c);
#else
    return c - a * b;
#endif
}

/* where (a lane of a comparison's result: all ones or 0) picks x, y otherwise. */
VEC_INLINE vec vec_select(vec_int where, vec x, vec y)
{
    return (vec)(((vec_int)x & where) | ((vec_int)y & ~where));
}

/* The larger; v where it is NaN, limit's NaN is lost. */
VEC_INLINE vec vec_max(vec v, vec limit)
{
#if defined(__AVX512F__)
    return _mm512_max_ps(limit, v);
#elif defined(__AVX2__)
    return _mm256_max_ps(limit, v);
#else
    return vec_select(limit > v, limit, v);
#endif
}

/* The smaller, likewise. */
VEC_INLINE vec vec_min(vec v, vec limit)
{
#if defined(__AVX512F__)
    return _mm512_min_ps(limit, v);
#elif defined(__AVX2__)
    return _mm256_min_ps(limit, v);
#else
    return vec_select(limit < v, limit, v);
#endif
}

VEC_INLINE vec vec_abs(vec v)
{
    return (vec)((vec_int)v & 0x7fffffff);
}

VEC_INLINE vec vec_sqrt(vec v)
{
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(v);
#else
    for (int i = 0; i < VEC_LANES; i++)
        v[i] = sqrtf(v[i]);
    return v;
#endif
}

/* One bit a lane where a == b; NaN equals nothing. */
VEC_INLINE uint32_t vec_equal_bits(vec a, vec b)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
#else
    uint32_t bits = 0;
    for (int i = 0; i < VEC_LANES; i++)
        bits |= (uint32_t)(a[i] == b[i]) << i;
    return bits;
#endif
}

/* One bit a lane where a > b; false for NaN. */
VEC_INLINE uint32_t vec_greater_bits(vec a, vec b)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
#else
    uint32_t bits = 0;
    for (int i = 0; i < VEC_LANES; i++)
        bits |= (uint32_t)(a[i] > b[i]) << i;
    return bits;
#endif
}

/* ---- sums across lanes, always in the same order ---- */

#if defined(__AVX512F__)
#define VEC_UNPACK_LOW(a, b)  _mm512_unpacklo_ps(a, b)
#define VEC_UNPACK_HIGH(a, b) _mm512_unpackhi_ps(a, b)
#define VEC_PAIR_LOW(a, b)    _mm512_shuffle_ps(a, b, 0x44)
#define VEC_PAIR_HIGH(a, b)   _mm512_shuffle_ps(a, b, 0xee)
#elif defined(__AVX2__)
#define VEC_UNPACK_LOW(a, b)  _mm256_unpacklo_ps(a, b)
#define VEC_UNPACK_HIGH(a, b) _mm256_unpackhi_ps(a, b)
#define VEC_PAIR_LOW(a, b)    _mm256_shuffle_ps(a, b, 0x44)
#define VEC_PAIR_HIGH(a, b)   _mm256_shuffle_ps(a, b, 0xee)
#endif

/* Within each four lanes of the result, lane i is the sum of v[i]'s four lanes there. */
VEC_INLINE vec vec_sum_quarter(const vec v[4])
{
#if defined(__AVX2__)
    vec ab = VEC_UNPACK_LOW(v[0], v[1]) + VEC_UNPACK_HIGH(v[0], v[1]); /* a0+a2 b0+b2 a1+a3 b1+b3 */
    vec cd = VEC_UNPACK_LOW(v[2], v[3]) + VEC_UNPACK_HIGH(v[2], v[3]);
    return VEC_PAIR_LOW(ab, cd) + VEC_PAIR_HIGH(ab, cd);
#else
    vec sum;
    for (int i = 0; i < 4; i++)
        sum[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
    return sum;
#endif
}

/* Sums across lanes of VEC_LANES vectors, from VEC_LANES / 4 results of vec_sum_quarter: lane i belongs to
 * vector i. */
VEC_INLINE vec vec_sum_join(const vec q[VEC_LANES / 4])
{
#if defined(__AVX512F__)
    vec low = _mm512_shuffle_f32x4(q[0], q[1], 0x88) + _mm512_shuffle_f32x4(q[0], q[1], 0xdd);
    vec high = _mm512_shuffle_f32x4(q[2], q[3], 0x88) + _mm512_shuffle_f32x4(q[2], q[3], 0xdd);
    return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
#elif defined(__AVX2__)
    return _mm256_permute2f128_ps(q[0], q[1], 0x20) + _mm256_permute2f128_ps(q[0], q[1], 0x31);
#else
    return q[0];
#endif
}

/* Lane i of the result is the sum of the lanes of v[i]. */
VEC_INLINE vec vec_sum_each(const vec v[VEC_LANES])
{
    vec quarters[VEC_LANES / 4];
    for (int i = 0; i < VEC_LANES / 4; i++)
        quarters[i] = vec_sum_quarter(v + 4 * i);
    return vec_sum_join(quarters);
}

VEC_INLINE float vec_sum(vec v)
{
#if defined(__AVX512F__)
    __m256 w = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
    __m256 w = v;
#endif
#if defined(__AVX2__)
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

/* The largest lane; lanes that are NaN are passed over or returned, as it happens. */
VEC_INLINE float vec_largest(vec v)
{
    float largest = v[0];
    for (int i = 1; i < VEC_LANES; i++)
        largest = v[i] > largest ? v[i] : largest;
    return largest;
}

/* ---- transposition ---- */

/* v[i] lane j becomes v[j] lane i. */
VEC_INLINE void vec_transpose(vec v[VEC_LANES])
{
#if defined(__AVX2__)
    /* 4x4 blocks inside the 128-bit parts first, then the parts. */
    vec w[VEC_LANES];
    for (int i = 0; i < VEC_LANES; i += 4) {
        vec ab = VEC_UNPACK_LOW(v[i], v[i + 1]), cd = VEC_UNPACK_LOW(v[i + 2], v[i + 3]);
        w[i] = VEC_PAIR_LOW(ab, cd);
        w[i + 1] = VEC_PAIR_HIGH(ab, cd);
        ab = VEC_UNPACK_HIGH(v[i], v[i + 1]), cd = VEC_UNPACK_HIGH(v[i + 2], v[i + 3]);
        w[i + 2] = VEC_PAIR_LOW(ab, cd);
        w[i + 3] = VEC_PAIR_HIGH(ab, cd);
    }
#if defined(__AVX512F__)
    for (int i = 0; i < 4; i++) {
        vec low_01 = _mm512_shuffle_f32x4(w[i], w[i + 4], 0x88);  /* parts 0 2 of both */
        vec high_01 = _mm512_shuffle_f32x4(w[i], w[i + 4], 0xdd); /* parts 1 3 */
        vec low_23 = _mm512_shuffle_f32x4(w[i + 8], w[i + 12], 0x88);
        vec high_23 = _mm512_shuffle_f32x4(w[i + 8], w[i + 12], 0xdd);
        v[i] = _mm512_shuffle_f32x4(low_01, low_23, 0x88);
        v[i + 4] = _mm512_shuffle_f32x4(high_01, high_23, 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(low_01, low_23, 0xdd);
        v[i + 12] = _mm512_shuffle_f32x4(high_01, high_23, 0xdd);
    }
#else
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(w[i], w[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(w[i], w[i + 4], 0x31);
    }
#endif
#else
    for (int i = 0; i < VEC_LANES; i++)
        for (int j = 0; j < i; j++) {
            float swap = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = swap;
        }
#endif
}

/* ---- functions ---- */

/* p * 2^n for whole n in -252..254. */
VEC_INLINE vec vec_scale(vec p, vec n)
{
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, n);
#else
    vec_int whole = __builtin_convertvector(n, vec_int), half = whole >> 1;
    return p * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
#endif
}

VEC_INLINE vec vec_round(vec v)
{
#if defined(__AVX512F__)
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float shift = 0x1.8p23f; /* |v| is below 2^22 where this is used */
    return (v + shift) - shift;
#endif
}

/* 2^v for v <= 0; 0 below -150. Relative error below 2e-7 where the result is a normal number, and exactly 1 at
 * 0. Coefficients: minimax for 2^r on [-1/2, 1/2], error 2.6e-9. */
VEC_INLINE vec vec_exp2_decay(vec v)
{
    v = vec_max(v, vec_set1(-151.0f));
    vec n = vec_round(v), r = v - n;
    vec p = vec_fma(vec_set1(1.5594677549111340e-04f), r, vec_set1(1.3406643904897303e-03f));
    p = vec_fma(p, r, vec_set1(9.6176929748887537e-03f));
    p = vec_fma(p, r, vec_set1(5.5503105509961792e-02f));
    p = vec_fma(p, r, vec_set1(2.4022652782876153e-01f));
    p = vec_fma(p, r, vec_set1(6.9314721496803955e-01f));
    p = vec_fma(p, r, vec_set1(1.0f));
    return vec_scale(p, n);
}

/* e^v, as exact: 0 below -104, infinity above 88.73. ln 2 in two parts (Cody and Waite 1980). */
VEC_INLINE vec vec_exp(vec v)
{
    v = vec_min(vec_max(v, vec_set1(-105.0f)), vec_set1(89.5f));
    vec n = vec_round(v * 1.44269504088896341f);
    vec r = vec_fnma(n, vec_set1(-2.12194440e-4f), vec_fnma(n, vec_set1(0.693359375f), v));
    vec p = vec_fma(vec_set1(1.40612471132995e-03f), r, vec_set1(8.37901293266713e-03f));
    p = vec_fma(p, r, vec_set1(4.166477715048476e-02f));
    p = vec_fma(p, r, vec_set1(1.6666365417878914e-01f));
    p = vec_fma(p, r, vec_set1(5.000000434425241e-01f));
    p = vec_fma(p, r, vec_set1(1.0000000496461685f));
    p = vec_fma(p, r, vec_set1(1.0f));
    return vec_scale(p, n);
}

/* log(1 + e) for e in [0, 1]: 2 atanh(e / (2 + e)), an odd polynomial on [0, 1/3], relative error 4e-9. */
VEC_INLINE vec vec_log1p_unit(vec e)
{
    vec s = e / (e + 2.0f), q = s * s;
    vec p = vec_fma(vec_set1(1.400599335698071e-01f), q, vec_set1(1.400090265103164e-01f));
    p = vec_fma(p, q, vec_set1(2.0010763618314448e-01f));
    p = vec_fma(p, q, vec_set1(3.3333208142863713e-01f));
    p = vec_fma(p, q, vec_set1(1.0f));
    return (s + s) * p;
}

VEC_INLINE vec vec_softplus(vec v)
{
    vec tail = vec_log1p_unit(vec_exp(-vec_abs(v)));
    return vec_max(v, vec_set1(0.0f)) + tail;
}

VEC_INLINE vec vec_sigmoid(vec v)
{
    return 1.0f / (1.0f + vec_exp(-v));
}

#endif
