/* skinny.cuh: products of a matrix of activations with the few columns of a low-rank path, on tensor cores. */
#ifndef KERNELS_CUDA_SKINNY_CUH
#define KERNELS_CUDA_SKINNY_CUH

#include "kernels/cuda/common.cuh"

enum { SKINNY_RANK_MOST = 16 };

/* Either or both of
 *   project   low_out = wide weights^T scale        [rows,rank], of type `act`
 *   outer     gradient += scale * wide^T low_in     [columns,rank], or its transpose
 * wide is read once. */
struct skinny {
    int64_t rows, columns, rank;
    const void *wide; /* [rows,columns], BF16 or F16 */
    int64_t stride;
    enum kernel_type act;
    float scale;
    const float *weights; /* [rank,columns], or [columns,rank] when by_column; or NULL: no project */
    void *low_out;
    const void *low_in; /* [rows,rank] of type act */
    float *gradient;    /* laid out as weights would be; accumulates; or NULL: no outer */
    bool by_column;
    void *workspace;
    /* A small matrix that somebody needs in the type of the activations, on the way: pack_to = pack_scale * pack. */
    const float *pack;
    void *pack_to;
    float pack_scale;
    int64_t pack_count;
};

/* Whether cuda_skinny can: on Hopper, 16-bit activations in aligned rows, a rank of at most SKINNY_RANK_MOST. */
bool cuda_skinny_can(const struct kernel_device *device, const void *wide, int64_t stride, int64_t columns,
                     int64_t rank, enum kernel_type act);
/* Bytes of workspace; never less for more rows. */
int64_t cuda_skinny_workspace(int64_t rows, int64_t columns, int64_t rank);
int cuda_skinny(struct kernel_device *device, const struct skinny *s);

#endif
