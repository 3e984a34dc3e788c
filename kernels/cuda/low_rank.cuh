/* low_rank.cuh: the parts of a low-rank path that see the dropout mask; lora.cu. u and du have the type of the
 * activations. */
#ifndef KERNELS_CUDA_LOW_RANK_CUH
#define KERNELS_CUDA_LOW_RANK_CUH

#include "kernels/cuda/common.cuh"

/* u = dropout(x) A^T */
int cuda_low_rank_project(struct kernel_device *device, const struct linear_forward_args *f);
/* dx += mask * (du A) */
int cuda_low_rank_expand(struct kernel_device *device, const struct linear_backward_args *b, const void *du);
/* dA += du^T dropout(x) */
int cuda_low_rank_outer(struct kernel_device *device, const struct linear_backward_args *b, const void *du);

#endif
