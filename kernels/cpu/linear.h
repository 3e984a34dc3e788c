/* linear.h: the parts of a linear layer's ops as this folder's ops want them. Pure. */
#ifndef KERNELS_CPU_LINEAR_H
#define KERNELS_CPU_LINEAR_H

#include "kernels/cpu/check.h"
#include "kernels/linear.h"

/* The gradients of a low-rank path; dx accumulates. */
struct lora_backward_args {
    int64_t rows, in, out, rank;
    const void *x;
    int64_t x_stride;
    const float *a, *b;
    float scale, dropout;
    uint64_t seed, offset;
    const float *u; /* [rows,rank] from the forward */
    const void *dy; /* [rows,out] */
    int64_t dy_stride;
    void *dx; /* [rows,in], accumulates, or NULL */
    int64_t dx_stride;
    float *da;   /* [rank,in] accumulates, or NULL */
    float *db;   /* [out,rank] accumulates, or NULL */
    float *du;   /* [rows,rank] */
    bool has_du; /* it is there already */
    enum kernel_type act;
};

static inline int check_linear_forward(const struct linear_forward_args *f)
{
    if (!linear_forward_valid(f))
        return KERNEL_INVALID;
    return check_weight(f->layer.weight_type) != KERNEL_OK ? KERNEL_UNSUPPORTED : check_act(f->act);
}

static inline int check_linear_backward(const struct linear_backward_args *b)
{
    if (!linear_backward_valid(b))
        return KERNEL_INVALID;
    return check_weight(b->layer.weight_type) != KERNEL_OK ? KERNEL_UNSUPPORTED : check_act(b->act);
}

/* du, the only thing that is ever in the workspace. */
static inline int64_t linear_du_bytes(int64_t rows, int64_t rank)
{
    return rows * rank * (int64_t)sizeof(float);
}

static inline struct lora_forward_args linear_forward_lora(const struct linear_forward_args *f)
{
    const struct linear_layer *layer = &f->layer;
    return (struct lora_forward_args){
        .rows = f->rows,
        .in = layer->in,
        .out = layer->out,
        .rank = layer->rank,
        .x = f->x,
        .x_stride = f->x_stride,
        .a = layer->a,
        .b = layer->b,
        .scale = layer->scale,
        .dropout = layer->dropout,
        .seed = layer->seed,
        .offset = layer->offset,
        .u = f->u,
        .y = f->y,
        .y_stride = f->y_stride,
    };
}

static inline struct lora_backward_args linear_backward_lora(const struct linear_backward_args *b)
{
    const struct linear_layer *layer = &b->layer;
    return (struct lora_backward_args){
        .rows = b->rows,
        .in = layer->in,
        .out = layer->out,
        .rank = layer->rank,
        .x = b->x,
        .x_stride = b->x_stride,
        .a = layer->a,
        .b = layer->b,
        .scale = layer->scale,
        .dropout = layer->dropout,
        .seed = layer->seed,
        .offset = layer->offset,
        .u = b->u,
        .dy = b->dy,
        .dy_stride = b->dy_stride,
        .dx = b->dx,
        .dx_stride = b->dx_stride,
        .da = b->da,
        .db = b->db,
        .du = b->du != NULL ? b->du : b->workspace,
        .has_du = linear_backward_continues(b),
    };
}

#endif
