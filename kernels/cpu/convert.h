/* convert.h: bfloat16 and IEEE half to and from float, one element, without hardware help. Rounding is to
 * nearest, ties to even; NaN stays NaN (quiet, sign kept); overflow gives infinity. Pure. */
#ifndef KERNELS_CPU_CONVERT_H
#define KERNELS_CPU_CONVERT_H

#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"

static inline uint32_t float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline float bf16_to_float(uint16_t half)
{
    return float_from_bits((uint32_t)half << 16);
}

static inline uint16_t bf16_from_float(float value)
{
    uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) /* NaN: rounding could carry it into infinity */
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = half >> 10 & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;
    if (exponent == 0x1f) /* infinity, or NaN made quiet */
        return float_from_bits(sign | 0x7f800000u | mantissa << 13 | (mantissa != 0 ? 0x400000u : 0));
    if (exponent == 0) { /* zero and subnormals: mantissa x 2^-24 */
        float magnitude = (float)mantissa * 0x1p-24f;
        return sign != 0 ? -magnitude : magnitude;
    }
    return float_from_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
}

static inline uint16_t f16_from_float(float value)
{
    uint32_t bits = float_bits(value);
    uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
    if (bits >= 0x477ff000u) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (bits < 0x38800000u) {
        /* Below 2^-14: adding 0.5 puts the last bit of the sum at 2^-24, the spacing of subnormals, so that
         * the addition itself rounds. */
        float shifted = float_from_bits(bits) + 0.5f;
        return (uint16_t)(sign | (float_bits(shifted) - float_bits(0.5f)));
    }
    uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

/* Bytes of an F32, BF16 or F16 element, where `type` is a constant and a call would cost more than the element. */
static inline int64_t storage_bytes(enum kernel_type type)
{
    return type == TYPE_F32 ? 4 : 2;
}

/* Element `index` of an array of F32, BF16 or F16. */
static inline float load_as_float(const void *array, enum kernel_type type, int64_t index)
{
    if (type == TYPE_BF16)
        return bf16_to_float(((const uint16_t *)array)[index]);
    if (type == TYPE_F16)
        return f16_to_float(((const uint16_t *)array)[index]);
    return ((const float *)array)[index];
}

static inline void store_from_float(void *array, enum kernel_type type, int64_t index, float value)
{
    if (type == TYPE_BF16)
        ((uint16_t *)array)[index] = bf16_from_float(value);
    else if (type == TYPE_F16)
        ((uint16_t *)array)[index] = f16_from_float(value);
    else
        ((float *)array)[index] = value;
}

#endif
