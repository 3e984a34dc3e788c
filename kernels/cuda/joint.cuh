/* joint.cuh: C = [A | A2] [B | B2]^T on Hopper's own instructions: a product with a second, short inner dimension, so
 * that what a low-rank adapter adds costs no pass over C. */
#ifndef KERNELS_CUDA_JOINT_CUH
#define KERNELS_CUDA_JOINT_CUH

#include "kernels/cuda/common.cuh"

/* Strides in elements. B is [n,k] and B2 [n,k2] when transposed, [k,n] and [k2,n] otherwise. */
struct joint_product {
    int64_t m, n, k, k2;
    const void *a, *b, *a2, *b2;
    int64_t a_stride, b_stride, a2_stride, b2_stride;
    void *c;
    int64_t c_stride;
    bool transposed, accumulate;
    enum kernel_type act; /* of all five, BF16 or F16 */
};

/* Whether cuda_joint_product can: the GPU, the type, rows that are multiples of 16 bytes. */
bool cuda_joint_can(const struct kernel_device *device, const struct joint_product *p);
int cuda_joint_product(struct kernel_device *device, const struct joint_product *p);

#endif
