/* linear.h: the products of a linear layer as arguments for a backend's own gemm. Pure; C and C++. */
#ifndef KERNELS_LINEAR_H
#define KERNELS_LINEAR_H

#include "kernels/kernels.h"

/* y = x W^T, on top of what y holds when beta is 1. */
static inline struct gemm_args linear_forward_product(const struct linear_forward_args *f, float beta)
{
    struct gemm_args g = {0};
    g.m = f->rows, g.n = f->layer.out, g.k = f->layer.in;
    g.transpose_b = true;
    g.alpha = 1.0f, g.beta = beta;
    g.a = f->x, g.a_stride = f->x_stride;
    g.b = f->layer.weight, g.b_stride = f->layer.in;
    g.c = f->y, g.c_stride = f->y_stride;
    g.act = g.c_type = f->act;
    g.b_type = f->layer.weight_type;
    g.tf32 = f->tf32;
    return g;
}

/* dx = dy W, likewise. */
static inline struct gemm_args linear_dx_product(const struct linear_backward_args *b, float beta)
{
    struct gemm_args g = {0};
    g.m = b->rows, g.n = b->layer.in, g.k = b->layer.out;
    g.alpha = 1.0f, g.beta = beta;
    g.a = b->dy, g.a_stride = b->dy_stride;
    g.b = b->layer.weight, g.b_stride = b->layer.in;
    g.c = b->dx, g.c_stride = b->dx_stride;
    g.act = g.c_type = b->act;
    g.b_type = b->layer.weight_type;
    g.tf32 = b->tf32;
    return g;
}

/* dW += dy^T x, or = with overwrite. */
static inline struct gemm_args linear_dweight_product(const struct linear_backward_args *b)
{
    struct gemm_args g = {0};
    g.m = b->layer.out, g.n = b->layer.in, g.k = b->rows;
    g.transpose_a = true;
    g.alpha = 1.0f, g.beta = b->overwrite ? 0.0f : 1.0f;
    g.a = b->dy, g.a_stride = b->dy_stride;
    g.b = b->x, g.b_stride = b->x_stride;
    g.c = b->dweight, g.c_stride = b->layer.in;
    g.act = g.b_type = b->act;
    g.c_type = TYPE_F32;
    g.tf32 = b->tf32;
    return g;
}

/* Sizes, strides and dropout; types are the backend's matter. */
static inline bool linear_layer_valid(const struct linear_layer *layer)
{
    return layer->in >= 0 && layer->out >= 0 && layer->rank >= 0 &&
           (layer->rank == 0 || (layer->dropout >= 0.0f && layer->dropout < 1.0f));
}

static inline bool linear_forward_valid(const struct linear_forward_args *f)
{
    return linear_layer_valid(&f->layer) && f->rows >= 0 && f->x_stride >= f->layer.in &&
           f->y_stride >= f->layer.out;
}

static inline bool linear_backward_valid(const struct linear_backward_args *b)
{
    bool reads_x = b->dweight != NULL || b->da != NULL;
    return linear_layer_valid(&b->layer) && b->rows >= 0 && (!reads_x || b->x_stride >= b->layer.in) &&
           b->dy_stride >= b->layer.out && (b->dx == NULL || b->dx_stride >= b->layer.in) &&
           ((b->da == NULL) == (b->db == NULL) || (b->du != NULL && (b->da == NULL || b->dx == NULL)));
}

/* Whether this is the second call of a backward in two: du is there. */
static inline bool linear_backward_continues(const struct linear_backward_args *b)
{
    return b->du != NULL && b->da != NULL && b->db == NULL;
}

#endif
