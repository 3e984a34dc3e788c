/* reference.h: the reference's ops, for its table and for entries of the vectorised table that have nothing
 * better. */
#ifndef KERNELS_CPU_REFERENCE_H
#define KERNELS_CPU_REFERENCE_H

#include "kernels/kernels.h"

struct lora_backward_args; /* linear.h */

int reference_cast(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
                   enum kernel_type from_type, int64_t count);
int reference_gemm(struct kernel_device *device, const struct gemm_args *args);
int reference_lora_forward(struct kernel_device *device, const struct lora_forward_args *args);
int reference_lora_backward(struct kernel_device *device, const struct lora_backward_args *args);
int64_t reference_linear_workspace(int64_t rows, int64_t in, int64_t out, int64_t rank);
int reference_linear_forward(struct kernel_device *device, const struct linear_forward_args *args);
int reference_linear_backward(struct kernel_device *device, const struct linear_backward_args *args);
int reference_embedding_forward(struct kernel_device *device, const struct embedding_forward_args *args);
int reference_embedding_backward(struct kernel_device *device, const struct embedding_backward_args *args);
int reference_rmsnorm_forward(struct kernel_device *device, const struct rmsnorm_forward_args *args);
int64_t reference_rmsnorm_backward_workspace(int64_t rows, int64_t d);
int reference_rmsnorm_backward(struct kernel_device *device, const struct rmsnorm_backward_args *args);
int reference_conv_forward(struct kernel_device *device, const struct conv_forward_args *args);
int reference_conv_backward(struct kernel_device *device, const struct conv_backward_args *args);
int reference_scan_prepare(struct kernel_device *device, const struct scan_prepare_args *args);
int reference_scan_forward(struct kernel_device *device, const struct scan_forward_args *args);
int64_t reference_scan_backward_workspace(int64_t tokens, int64_t channels, int64_t d_state, int32_t n_seqs);
int reference_scan_backward(struct kernel_device *device, const struct scan_backward_args *args);
int64_t reference_head_workspace(int64_t rows, int64_t d_model, int64_t vocab, bool backward);
int reference_head(struct kernel_device *device, const struct head_args *args);
int reference_adamw(struct kernel_device *device, const struct adamw_args *args);
int reference_grad_norm(struct kernel_device *device, const struct grad_norm_args *args);
int reference_sample(struct kernel_device *device, const struct sample_args *args);

#endif
