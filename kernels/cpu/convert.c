/* convert.c: arrays from one storage type to another. Single elements are in convert.h. */
#include "kernels/cpu/convert.h"

#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum { BLOCK = 32768 };

typedef uint16_t vec_half __attribute__((vector_size(2 * VEC_LANES)));

VEC_INLINE void store_bf16(uint16_t *to, vec v)
{
    vec_uint bits = (vec_uint)v, quiet = bits >> 16 | 0x40;
    vec_uint rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vec_uint is_nan = (vec_uint)(v != v);
    vec_half half = __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), vec_half);
    memcpy(to, &half, sizeof(half));
}

VEC_INLINE void store_f16(uint16_t *to, vec v)
{
#if defined(__AVX512F__)
    __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(to, &half, sizeof(half));
#elif defined(__AVX2__)
    __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(to, &half, sizeof(half));
#else
    for (int i = 0; i < VEC_LANES; i++)
        to[i] = f16_from_float(v[i]);
#endif
}

VEC_INLINE void convert(char *to, enum kernel_type to_type, const char *from, enum kernel_type from_type,
                        int64_t count)
{
    int64_t i = 0;
    for (; i + VEC_LANES <= count; i += VEC_LANES) {
        vec v = vec_load_as(from + i * storage_bytes(from_type), from_type);
        void *at = to + i * storage_bytes(to_type);
        if (to_type == TYPE_BF16)
            store_bf16(at, v);
        else if (to_type == TYPE_F16)
            store_f16(at, v);
        else
            vec_store(at, v);
    }
    for (; i < count; i++)
        store_from_float(to, to_type, i, load_as_float(from, from_type, i));
}

void CPU_NAME(cpu_convert)(void *to, enum kernel_type to_type, const void *from, enum kernel_type from_type,
                           int64_t count)
{
    if (from_type == to_type)
        memcpy(to, from, (size_t)count * kernel_type_size(to_type));
    else if (from_type == TYPE_F32 && to_type == TYPE_BF16)
        convert(to, TYPE_BF16, from, TYPE_F32, count);
    else if (from_type == TYPE_F32)
        convert(to, TYPE_F16, from, TYPE_F32, count);
    else if (from_type == TYPE_BF16 && to_type == TYPE_F32)
        convert(to, TYPE_F32, from, TYPE_BF16, count);
    else if (from_type == TYPE_BF16)
        convert(to, TYPE_F16, from, TYPE_BF16, count);
    else if (to_type == TYPE_F32)
        convert(to, TYPE_F32, from, TYPE_F16, count);
    else
        convert(to, TYPE_BF16, from, TYPE_F16, count);
}

struct cast_task {
    void *to;
    const void *from;
    enum kernel_type to_type, from_type;
    int64_t count;
};

static void cast_block(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct cast_task *task = arg;
    int64_t first = index * BLOCK, count = task->count - first < BLOCK ? task->count - first : BLOCK;
    CPU_NAME(cpu_convert)
    ((char *)task->to + first * storage_bytes(task->to_type), task->to_type,
     (const char *)task->from + first * storage_bytes(task->from_type), task->from_type, count);
}

int CPU_NAME(cpu_cast)(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
                       enum kernel_type from_type, int64_t count)
{
    if (count < 0)
        return KERNEL_INVALID;
    if (to_type == from_type)
        return cpu_memory_copy(device, to, from, (size_t)count * kernel_type_size(to_type));
    if (to_type == TYPE_I32 || from_type == TYPE_I32)
        return KERNEL_UNSUPPORTED;
    struct cast_task task = {
        .to = to, .from = from, .to_type = to_type, .from_type = from_type, .count = count};
    cpu_parallel(device, (count + BLOCK - 1) / BLOCK, cast_block, &task);
    return KERNEL_OK;
}
