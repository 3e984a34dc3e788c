/* ops.h: the vectorised ops, as the files of isa_sources (meson.build) export them under the name of their
 * instruction set, see isa.h. backend.c, itself one of these files, gathers them into one table a set. */
#ifndef KERNELS_CPU_OPS_H
#define KERNELS_CPU_OPS_H

#include "kernels/cpu/isa.h"
#include "kernels/kernels.h"

struct lora_backward_args; /* linear.h */

int CPU_NAME(cpu_cast)(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
                       enum kernel_type from_type, int64_t count);
/* Between F32, BF16 and F16, on the calling thread. The arrays do not overlap. */
void CPU_NAME(cpu_convert)(void *to, enum kernel_type to_type, const void *from, enum kernel_type from_type,
                           int64_t count);
int CPU_NAME(cpu_gemm)(struct kernel_device *device, const struct gemm_args *args);
int CPU_NAME(cpu_lora_forward)(struct kernel_device *device, const struct lora_forward_args *args);
int CPU_NAME(cpu_lora_backward)(struct kernel_device *device, const struct lora_backward_args *args);
int64_t CPU_NAME(cpu_linear_workspace)(int64_t rows, int64_t in, int64_t out, int64_t rank);
int CPU_NAME(cpu_linear_forward)(struct kernel_device *device, const struct linear_forward_args *args);
int CPU_NAME(cpu_linear_backward)(struct kernel_device *device, const struct linear_backward_args *args);
int CPU_NAME(cpu_embedding_forward)(struct kernel_device *device, const struct embedding_forward_args *args);
int CPU_NAME(cpu_embedding_backward)(struct kernel_device *device,
                                     const struct embedding_backward_args *args);
int CPU_NAME(cpu_rmsnorm_forward)(struct kernel_device *device, const struct rmsnorm_forward_args *args);
int64_t CPU_NAME(cpu_rmsnorm_backward_workspace)(int64_t rows, int64_t d);
int CPU_NAME(cpu_rmsnorm_backward)(struct kernel_device *device, const struct rmsnorm_backward_args *args);
int CPU_NAME(cpu_conv_forward)(struct kernel_device *device, const struct conv_forward_args *args);
int CPU_NAME(cpu_conv_backward)(struct kernel_device *device, const struct conv_backward_args *args);
int CPU_NAME(cpu_scan_forward)(struct kernel_device *device, const struct scan_forward_args *args);
int64_t CPU_NAME(cpu_scan_backward_workspace)(int64_t tokens, int64_t channels, int64_t d_state,
                                              int32_t n_seqs);
int CPU_NAME(cpu_scan_backward)(struct kernel_device *device, const struct scan_backward_args *args);
int64_t CPU_NAME(cpu_head_workspace)(int64_t rows, int64_t d_model, int64_t vocab, bool backward);
int CPU_NAME(cpu_head)(struct kernel_device *device, const struct head_args *args);
int CPU_NAME(cpu_adamw)(struct kernel_device *device, const struct adamw_args *args);
int CPU_NAME(cpu_grad_norm)(struct kernel_device *device, const struct grad_norm_args *args);
int CPU_NAME(cpu_sample)(struct kernel_device *device, const struct sample_args *args);

/* The whole table, by backend.c. */
const struct kernel_ops *CPU_NAME(cpu_ops)(void);

#endif
