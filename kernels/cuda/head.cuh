/* head.cuh: what head.cu, which does every case, and head_fused.cu, which does the frequent one, share. */
#ifndef KERNELS_CUDA_HEAD_CUH
#define KERNELS_CUDA_HEAD_CUH

#include "kernels/cuda/common.cuh"

/* What rows came to, for the sums. At the beginning of the workspace. */
struct head_scores {
    float *logprobs; /* [rows]: of the target; 0 where it is ignored */
    int32_t *right;  /* [rows]: 1 where the target is the argmax */
};

static inline int64_t head_scores_bytes(int64_t rows)
{
    return divide_up(rows * (int64_t)(sizeof(float) + sizeof(int32_t)), 256) * 256;
}

static inline struct head_scores head_scores_of(const struct head_args *h)
{
    float *logprobs = (float *)h->workspace;
    return {logprobs, (int32_t *)(logprobs + h->rows)};
}

struct head_matrix {
    const void *p;
    int64_t stride;
    bool transposed;
    enum kernel_type type;
};

/* C[m,n] = alpha op(A) op(B) + beta C, C dense. */
int head_product(struct kernel_device *device, int64_t m, int64_t n, int64_t k, const struct head_matrix &a,
                 const struct head_matrix &b, bool tf32, float alpha, void *c, enum kernel_type c_type,
                 float beta);

/* Whether head_fused does these (checked) arguments. */
bool head_fused_can(const struct kernel_device *device, const struct head_args *h);
/* Beyond head_scores_bytes. */
int64_t head_fused_workspace(int64_t rows, int64_t d_model, int64_t vocab, bool backward);
/* All but the sums over rows. */
int head_fused(struct kernel_device *device, const struct head_args *h);

#endif
