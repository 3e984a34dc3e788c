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

#if defined(__AVX2__)
/* [sum of a's lanes 0..3 and b's ...] for four registers, within each 128-bit part. */
#if defined(__AVX512F__)
#define VEC_UNPACK_LOW(a, b)  _mm512_unpacklo_ps(a, b)
#define VEC_UNPACK_HIGH(a, b) _mm512_unpackhi_ps(a, b)
#define VEC_PAIR_LOW(a, b)    _mm512_shuffle_ps(a, b, 0x44)
#define VEC_PAIR_HIGH(a, b)   _mm512_shuffle_ps(a, b, 0xee)
#else
#define VEC_UNPACK_LOW(a, b)  _mm256_unpacklo_ps(a, b)
#define VEC_UNPACK_HIGH(a, b) _mm256_unpackhi_ps(a, b)
#define VEC_PAIR_LOW(a, b)    _mm256_shuffle_ps(a, b, 0x44)
#define VEC_PAIR_HIGH(a, b)   _mm256_shuffle_ps(a, b, 0xee)
#endif
VEC_INLINE vec vec_sum_quarters(vec a, vec b, vec c, vec d)
{
    vec ab = VEC_UNPACK_LOW(a, b) + VEC_UNPACK_HIGH(a, b); /* a0+a2 b0+b2 a1+a3 b1+b3 */
    vec cd = VEC_UNPACK_LOW(c, d) + VEC_UNPACK_HIGH(c, d);
    return VEC_PAIR_LOW(ab, cd) + VEC_PAIR_HIGH(ab, cd);
}
#endif

/* Lane i of the result is the sum of the lanes of v[i]. */
VEC_INLINE vec vec_sum_each(const vec v[VEC_LANES])
{
#if defined(__AVX512F__)
    vec p = vec_sum_quarters(v[0], v[1], v[2], v[3]), q = vec_sum_quarters(v[4], v[5], v[6], v[7]);
    vec r = vec_sum_quarters(v[8], v[9], v[10], v[11]), s = vec_sum_quarters(v[12], v[13], v[14], v[15]);
    vec pq = _mm512_shuffle_f32x4(p, q, 0x88) + _mm512_shuffle_f32x4(p, q, 0xdd); /* p02 p.. */
    vec rs = _mm512_shuffle_f32x4(r, s, 0x88) + _mm512_shuffle_f32x4(r, s, 0xdd);
    return _mm512_shuffle_f32x4(pq, rs, 0x88) + _mm512_shuffle_f32x4(pq, rs, 0xdd);
#elif defined(__AVX2__)
    vec p = vec_sum_quarters(v[0], v[1], v[2], v[3]), q = vec_sum_quarters(v[4], v[5], v[6], v[7]);
    return _mm256_permute2f128_ps(p, q, 0x20) + _mm256_permute2f128_ps(p, q, 0x31);
#else
    vec sum;
    for (int i = 0; i < VEC_LANES; i++)
        sum[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
    return sum;
#endif
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

/* 2^v; 0 below -150, infinity from 128 on. Relative error below 2e-7 where the result is a normal number, and
 * exactly 1 at 0. Coefficients: minimax for 2^r on [-1/2, 1/2], error 2.6e-9. */
VEC_INLINE vec vec_exp2(vec v)
{
    v = vec_min(vec_max(v, vec_set1(-151.0f)), vec_set1(129.0f));
    vec n = vec_round(v), r = v - n;
    vec p = vec_fma(vec_set1(1.5594677549111340e-04f), r, vec_set1(1.3406643904897303e-03f));
    p = vec_fma(p, r, vec_set1(9.6176929748887537e-03f));
    p = vec_fma(p, r, vec_set1(5.5503105509961792e-02f));
    p = vec_fma(p, r, vec_set1(2.4022652782876153e-01f));
    p = vec_fma(p, r, vec_set1(6.9314721496803955e-01f));
    p = vec_fma(p, r, vec_set1(1.0f));
    return vec_scale(p, n);
}

/* e^v, likewise: 0 below -104, infinity above 88.73. ln 2 in two parts (Cody and Waite 1980). */
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
