/* isa.h: one source, several instruction sets. The files listed as isa_sources in meson.build are compiled
 * once for each set, with CPU_ISA defined as its name; what they export is named through CPU_NAME, so that
 * CPU_NAME(cpu_gemm) is cpu_gemm_avx512 in one library and cpu_gemm_plain in another. Everything else in such
 * a file is static, headers' inline functions too: a function that two libraries both export could be linked
 * from the wrong one and fault on an older processor. */
#ifndef KERNELS_CPU_ISA_H
#define KERNELS_CPU_ISA_H

#define CPU_NAME_JOIN(name, isa)   name##_##isa
#define CPU_NAME_EXPAND(name, isa) CPU_NAME_JOIN(name, isa)
#define CPU_NAME(name)             CPU_NAME_EXPAND(name, CPU_ISA)

#endif
