/* linear.c: a linear layer of the model with its bias, its adapter and their gradients, found and put together for
 * the device's op. */
#include "engine/models/internal.h"

void linear_bind(struct linear *linear, const struct model *model, const struct adapter *adapter,
                 const struct weight_copies *copies, int64_t weight, int64_t bias, enum lora_target target,
                 int64_t layer)
{
    struct weight_view matrix = model_product_view(model, adapter, copies, weight);
    struct lora_pair pair;
    *linear = (struct linear){
        .layer = {.in = model->weights[weight].shape[1],
                  .out = model->weights[weight].shape[0],
                  .weight = matrix.data,
                  .weight_type = matrix.type},
        .dweight = matrix.grad,
    };
    if (bias >= 0) {
        struct weight_view view = model_view(model, adapter, bias);
        linear->layer.bias = view.data;
        linear->dbias = view.grad;
    }
    if (adapter_pair(adapter, target, layer, &pair)) {
        linear->layer.rank = adapter->lora.rank;
        linear->layer.scale = adapter->scale;
        linear->layer.a = pair.a->param;
        linear->layer.b = pair.b->param;
        linear->da = pair.a->grad;
        linear->db = pair.b->grad;
        /* Each target's mask has 2^40 draws of the micro-batch's stream to itself. */
        linear->layer.offset = ((uint64_t)(layer + 1) * 8 + (uint64_t)__builtin_ctz(target)) << 40;
    }
}
