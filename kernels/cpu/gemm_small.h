/* gemm_small.h: products on one thread for shapes that a BLAS does poorly: few rows (decoding: the weights
 * are read once, straight from their storage) or one very short side (adapters). The callers cut their work
 * into tasks and run these on the pieces. The order of every sum depends on the piece's shape alone. */
#ifndef KERNELS_CPU_GEMM_SMALL_H
#define KERNELS_CPU_GEMM_SMALL_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/cpu/isa.h"
#include "kernels/kernels.h"

/* C[m,n] = alpha * A B + beta * C, with A's element (i,l) at a[i * a_row + l * a_column]. beta 0 ignores C's
 * content. */
struct small_gemm {
    int64_t m, n, k;
    float alpha, beta;
    const float *a;
    int64_t a_row, a_column;
    const void *b;
    int64_t b_stride;
    enum kernel_type b_type;
    float *c;
    int64_t c_stride;
};

/* B is [k,n] and F32: vectors along n, A broadcast. For any m; k may be long (gradients of adapters) or
 * short. */
void CPU_NAME(gemm_small_columns)(const struct small_gemm *g);

/* The columns that gemm_small_columns takes at once when n are left: whole vectors, as many as the registers
 * hold and leaving no single one behind where it can, then what is left. Packed panels of B have these
 * widths. */
int64_t CPU_NAME(gemm_panel_width)(int64_t n);

/* B is [n,k] (a linear layer's weight), a_column is 1: vectors along k, one dot product an element of C. */
void CPU_NAME(gemm_small_dots)(const struct small_gemm *g);

#endif
