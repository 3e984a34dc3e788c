/* linear.c: a linear layer with its bias, its LoRA path and its gradients, composed of the device's ops.
 *
 * Low-rank adaptation: y = x W^T + scale * (dropout(x) A^T) B^T (Hu et al. 2021, eq. 3). A bias is a product
 * with a column of ones, forward and backward, so that no op is needed for it alone. */
#include "engine/models/internal.h"

#include <stdlib.h>

void linear_bind(struct linear *linear, const struct model *model, const struct adapter *adapter,
                 int64_t weight, int64_t bias, enum lora_target target, int64_t layer)
{
    *linear = (struct linear){
        .in = model->weights[weight].shape[1],
        .out = model->weights[weight].shape[0],
        .weight = model_view(model, adapter, weight),
    };
    if (bias >= 0) {
        struct weight_view view = model_view(model, adapter, bias);
        linear->bias = view.data;
        linear->dbias = view.grad;
    }
    if (adapter_pair(adapter, target, layer, &linear->lora)) {
        linear->has_lora = true;
        linear->rank = adapter->lora.rank;
        linear->scale = adapter->scale;
        /* Each target's mask has 2^40 draws of the micro-batch's stream to itself. */
        linear->offset = ((uint64_t)(layer + 1) * 8 + (uint64_t)__builtin_ctz(target)) << 40;
    }
}

int linear_fill_ones(const struct model *model, float *ones, int64_t count, struct error *error)
{
    if (!ones)
        return 0;
    float *values = malloc((size_t)count * sizeof *values);
    if (!values)
        return error_set(error, ERROR_NO_MEMORY, "no memory for biases");
    for (int64_t i = 0; i < count; i++)
        values[i] = 1;
    int status = model->ops->copy_in(model->device, ones, values, (size_t)count * sizeof *values);
    free(values);
    return model_status(status, error, "biases");
}

int linear_forward(const struct linear_context *context, const struct linear *linear, int64_t rows,
                   const float *x, int64_t x_stride, float *y, int64_t y_stride, float *u)
{
    const struct kernel_ops *ops = context->ops;
    int status = 0;
    if (linear->bias) {
        struct gemm_args spread = {.m = rows,
                                   .n = linear->out,
                                   .k = 1,
                                   .alpha = 1,
                                   .a = context->ones,
                                   .a_stride = 1,
                                   .b = linear->bias,
                                   .b_stride = linear->out,
                                   .c = y,
                                   .c_stride = y_stride,
                                   .act = TYPE_F32,
                                   .b_type = TYPE_F32};
        status = ops->gemm(context->device, &spread);
    }
    struct gemm_args product = {.m = rows,
                                .n = linear->out,
                                .k = linear->in,
                                .transpose_b = true,
                                .alpha = 1,
                                .beta = linear->bias ? 1 : 0,
                                .a = x,
                                .a_stride = x_stride,
                                .b = linear->weight.data,
                                .b_stride = linear->in,
                                .c = y,
                                .c_stride = y_stride,
                                .act = TYPE_F32,
                                .b_type = linear->weight.type};
    if (!status)
        status = ops->gemm(context->device, &product);
    if (!status && linear->has_lora) {
        struct lora_forward_args lora = {.rows = rows,
                                         .in = linear->in,
                                         .out = linear->out,
                                         .rank = linear->rank,
                                         .x = x,
                                         .x_stride = x_stride,
                                         .a = linear->lora.a->param,
                                         .b = linear->lora.b->param,
                                         .scale = linear->scale,
                                         .dropout = context->dropout,
                                         .seed = context->seed,
                                         .offset = linear->offset,
                                         .u = u,
                                         .y = y,
                                         .y_stride = y_stride,
                                         .act = TYPE_F32};
        status = ops->lora_forward(context->device, &lora);
    }
    return status;
}

/* dW += dy^T x, dbias += dy^T 1: a full fine-tune's. */
static int weight_gradients(const struct linear_context *context, const struct linear *linear, int64_t rows,
                            const float *x, int64_t x_stride, const float *dy, int64_t dy_stride)
{
    struct gemm_args args = {.m = linear->out,
                             .n = linear->in,
                             .k = rows,
                             .transpose_a = true,
                             .alpha = 1,
                             .beta = 1,
                             .a = dy,
                             .a_stride = dy_stride,
                             .b = x,
                             .b_stride = x_stride,
                             .c = linear->weight.grad,
                             .c_stride = linear->in,
                             .act = TYPE_F32,
                             .b_type = TYPE_F32};
    int status = context->ops->gemm(context->device, &args);
    if (!status && linear->dbias) {
        struct gemm_args sum = {.m = 1,
                                .n = linear->out,
                                .k = rows,
                                .alpha = 1,
                                .beta = 1,
                                .a = context->ones,
                                .a_stride = rows,
                                .b = dy,
                                .b_stride = dy_stride,
                                .c = linear->dbias,
                                .c_stride = linear->out,
                                .act = TYPE_F32,
                                .b_type = TYPE_F32};
        status = context->ops->gemm(context->device, &sum);
    }
    return status;
}

int linear_backward(const struct linear_context *context, const struct linear *linear, int64_t rows,
                    const float *x, int64_t x_stride, const float *dy, int64_t dy_stride, const float *u,
                    float *dx, int64_t dx_stride, bool accumulate)
{
    const struct kernel_ops *ops = context->ops;
    int status = 0;
    if (linear->weight.grad)
        status = weight_gradients(context, linear, rows, x, x_stride, dy, dy_stride);
    if (!status && dx) {
        struct gemm_args args = {.m = rows,
                                 .n = linear->in,
                                 .k = linear->out,
                                 .alpha = 1,
                                 .beta = accumulate ? 1 : 0,
                                 .a = dy,
                                 .a_stride = dy_stride,
                                 .b = linear->weight.data,
                                 .b_stride = linear->in,
                                 .c = dx,
                                 .c_stride = dx_stride,
                                 .act = TYPE_F32,
                                 .b_type = linear->weight.type};
        status = ops->gemm(context->device, &args);
    }
    if (!status && linear->has_lora) {
        struct lora_backward_args lora = {.rows = rows,
                                          .in = linear->in,
                                          .out = linear->out,
                                          .rank = linear->rank,
                                          .x = x,
                                          .x_stride = x_stride,
                                          .a = linear->lora.a->param,
                                          .b = linear->lora.b->param,
                                          .scale = linear->scale,
                                          .dropout = context->dropout,
                                          .seed = context->seed,
                                          .offset = linear->offset,
                                          .u = u,
                                          .dy = dy,
                                          .dy_stride = dy_stride,
                                          .dx = dx,
                                          .dx_stride = dx_stride,
                                          .da = linear->lora.a->grad,
                                          .db = linear->lora.b->grad,
                                          .du = context->du,
                                          .act = TYPE_F32};
        status = ops->lora_backward(context->device, &lora);
    }
    return status;
}
