/* narrow.cuh: a linear layer with its adapter where one side is narrow: everything that its forward or its backward has to
 * read and write goes past once. */
#ifndef KERNELS_CUDA_NARROW_CUH
#define KERNELS_CUDA_NARROW_CUH

#include "kernels/cuda/common.cuh"

/* The forward is `transposed`, the backward is not:
 *     middle = first_scale * x first^T,  y (+)= x W^T + second_scale * middle second^T
 *     first_gradient += first_scale * x^T middle_in,  second_gradient += other^T middle
 * In the forward x is x and middle u, first is A and second B. In the backward x is dy and middle du, first is B and second
 * A, `other` is the layer's x and middle_in its u. */
struct narrow_layer {
    int64_t rows, k, n, rank;
    const void *x; /* [rows,k] */
    int64_t x_stride;
    const void *weight; /* [n,k] when transposed, [k,n] otherwise */
    bool transposed, accumulate;
    void *y; /* [rows,n] */
    int64_t y_stride;
    const float *first, *second; /* [rank,k] and [n,rank] when transposed, [k,rank] and [rank,n] otherwise */
    float first_scale, second_scale;
    void *middle; /* [rows,rank], or NULL */
    /* Not when transposed. */
    const void *other; /* [rows,n] */
    int64_t other_stride;
    const void *middle_in;                   /* [rows,rank] */
    float *first_gradient, *second_gradient; /* laid out as first and second */
    enum kernel_type act;                    /* of x, weight, y, other, middle */
    void *workspace;
};

enum { NARROW_RANKS = 8 }; /* the most of a rank, and how many numbers a row of partial gradients has */

/* Whether cuda_narrow can: on Hopper, 16 bits, a rank of at most NARROW_RANKS, one side narrow and the other wide. */
bool cuda_narrow_can(const struct kernel_device *device, const struct narrow_layer *l);
/* Bytes of workspace for the backward; never less for more rows. */
int64_t cuda_narrow_workspace(int64_t rows, int64_t in, int64_t out);
int cuda_narrow(struct kernel_device *device, const struct narrow_layer *l);

/* ---- between the files that do it ---- */

/* y is wide; widen.cu. */
bool cuda_widen_can(const struct kernel_device *device, const struct narrow_layer *l);
int cuda_widen(struct kernel_device *device, const struct narrow_layer *l);

/* gradient += scale * the sum of n_parts parts in order, each [columns][NARROW_RANKS]. */
struct narrow_sum {
    const float *parts;
    int64_t n_parts, columns;
    float scale, *gradient;
    bool by_column; /* gradient is [columns,rank], otherwise [rank,columns] */
};
int cuda_narrow_add(struct kernel_device *device, const struct narrow_sum *sums, int64_t rank);

#endif
