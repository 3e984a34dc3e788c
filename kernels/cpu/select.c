/* select.c: which instruction set this processor gets. Pure; any thread. */
#include "kernels/cpu/device.h"

const struct kernel_ops *cpu_ops_plain(void);
#if defined(__x86_64__)
const struct kernel_ops *cpu_ops_avx2(void);
const struct kernel_ops *cpu_ops_avx512(void);
#endif

enum cpu_isa cpu_isa_detect(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2)
        return avx512 ? CPU_AVX512 : CPU_AVX2;
#endif
    return CPU_PLAIN;
}

const struct kernel_ops *cpu_ops_of(enum cpu_isa isa)
{
#if defined(__x86_64__)
    if (isa == CPU_AVX512)
        return cpu_ops_avx512();
    if (isa == CPU_AVX2)
        return cpu_ops_avx2();
#endif
    (void)isa;
    return cpu_ops_plain();
}

const struct kernel_ops *kernels_cpu(void)
{
    return cpu_ops_of(cpu_isa_detect());
}
