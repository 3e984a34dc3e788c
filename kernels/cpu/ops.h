/* ops.h: the vectorised ops, as the files of isa_sources (meson.build) export them under the name of their
 * instruction set, see isa.h. backend.c, itself one of these files, gathers them into one table a set. */
#ifndef KERNELS_CPU_OPS_H
#define KERNELS_CPU_OPS_H

#include "kernels/cpu/isa.h"
#include "kernels/kernels.h"

int CPU_NAME(cpu_gemm)(struct kernel_device *device, const struct gemm_args *args);
int CPU_NAME(cpu_lora_forward)(struct kernel_device *device, const struct lora_forward_args *args);
int CPU_NAME(cpu_lora_backward)(struct kernel_device *device, const struct lora_backward_args *args);
int CPU_NAME(cpu_scan_forward)(struct kernel_device *device, const struct scan_forward_args *args);
int64_t CPU_NAME(cpu_scan_backward_workspace)(int64_t tokens, int64_t channels, int64_t d_state,
                                              int32_t n_seqs);
int CPU_NAME(cpu_scan_backward)(struct kernel_device *device, const struct scan_backward_args *args);
int64_t CPU_NAME(cpu_head_workspace)(int64_t rows, int64_t d_model, int64_t vocab, bool backward);
int CPU_NAME(cpu_head)(struct kernel_device *device, const struct head_args *args);

#endif
