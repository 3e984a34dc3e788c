/* mamba_layer.c: one Mamba-1 layer forward, written by hand over the device's ops; training and inference share
 * it.
 *
 * With d = d_model, c = d_inner, n = d_state, R = dt_rank:
 *   r        = residual + the layer before's output            [T,d] fp32
 *   xz       = rmsnorm(r) in_proj^T                            [T,2c] = x | z
 *   xc       = silu(conv(x))                                   [T,c]
 *   x_dbl    = xc x_proj^T                                     [T,R+2n] = dt_low | B | C
 *   dt       = dt_low dt_proj^T                                [T,c]; its bias and softplus are the scan's
 *   y        = scan(xc, dt, A, B, C, D) * silu(z)              [T,c]
 *   output   = y out_proj^T                                    [T,d]
 * x, z, dt_low, B and C are strided views, never copies. */
#include "engine/models/mamba_layer.h"

const float *layer_weight(const struct layer_flow *flow, enum layer_tensor kind)
{
    int64_t index = mamba_tensor_index(&flow->model->config, flow->layer, kind);
    return index < 0 ? NULL : model_view(flow->model, flow->adapter, index).data;
}

void *layer_u(const struct layer_flow *flow, enum lora_target which)
{
    struct lora_pair pair;
    if (!flow->u || !adapter_pair(flow->adapter, which, flow->layer, &pair))
        return NULL;
    int index = __builtin_popcount((unsigned)flow->adapter->lora.targets & ((unsigned)which - 1));
    return element_at(flow->u, index * flow->u_stride, flow->act);
}

void layer_linear(const struct layer_flow *flow, enum lora_target which, struct linear *ret_linear)
{
    static const struct {
        enum lora_target target;
        enum layer_tensor weight, bias;
    } table[] = {{TARGET_IN_PROJ, IN_PROJ, IN_BIAS},
                 {TARGET_X_PROJ, X_PROJ, LAYER_KINDS},
                 {TARGET_DT_PROJ, DT_PROJ, LAYER_KINDS}, /* its bias belongs to the scan */
                 {TARGET_OUT_PROJ, OUT_PROJ, OUT_BIAS}};
    const struct model_config *c = &flow->model->config;
    int i = 0;
    while (table[i].target != which)
        i++;
    int64_t bias = table[i].bias == LAYER_KINDS ? -1 : mamba_tensor_index(c, flow->layer, table[i].bias);
    linear_bind(ret_linear, flow->model, flow->adapter, flow->copies,
                mamba_tensor_index(c, flow->layer, table[i].weight), bias, which, flow->layer);
    ret_linear->layer.dropout = flow->dropout;
    ret_linear->layer.seed = flow->seed;
}

int64_t layer_linear_workspace(const struct model_config *c, const struct kernel_ops *ops, int64_t rows,
                               int64_t rank)
{
    int64_t most = 0;
    for (int bit = TARGET_IN_PROJ; bit <= TARGET_OUT_PROJ; bit <<= 1) {
        int64_t in, out;
        char name[96];
        if (!family_mamba.target(c, (enum lora_target)bit, 0, &in, &out, name))
            continue;
        int64_t bytes = ops->linear_workspace(rows, in, out, rank);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static int project(const struct layer_flow *flow, enum lora_target which, const void *x, int64_t x_stride,
                   void *y, int64_t y_stride)
{
    struct linear linear;
    layer_linear(flow, which, &linear);
    struct linear_forward_args args = {.layer = linear.layer,
                                       .rows = flow->rows,
                                       .x = x,
                                       .x_stride = x_stride,
                                       .u = layer_u(flow, which),
                                       .y = y,
                                       .y_stride = y_stride,
                                       .act = flow->act,
                                       .tf32 = flow->tf32,
                                       .workspace = flow->workspace};
    int status = flow->model->ops->linear_forward(flow->model->device, &args);
    if (!status && flow->runner)
        status = runner_lora(flow->runner, flow->part, which, flow->layer, x, x_stride, y, y_stride);
    return status;
}

int layer_norm(const struct layer_flow *flow, const float *weight)
{
    struct rmsnorm_forward_args args = {.rows = flow->rows,
                                        .d = flow->model->config.d_model,
                                        .x = flow->x,
                                        .residual = flow->residual,
                                        .weight = weight,
                                        .eps = flow->model->config.norm_eps,
                                        .residual_out = flow->residual_out,
                                        .kept = flow->kept,
                                        .y = flow->normed,
                                        .rstd = flow->rstd,
                                        .act = flow->act};
    return flow->model->ops->rmsnorm_forward(flow->model->device, &args);
}

int layer_project_in(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    return project(flow, TARGET_IN_PROJ, flow->normed, c->d_model, flow->xz, 2 * c->d_inner);
}

int layer_convolve(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    struct conv_forward_args args = {.tokens = flow->rows,
                                     .channels = c->d_inner,
                                     .width = c->d_conv,
                                     .n_seqs = flow->n_seqs,
                                     .seq_starts = flow->seq_starts,
                                     .x = flow->xz,
                                     .x_stride = 2 * c->d_inner,
                                     .weight = layer_weight(flow, CONV),
                                     .bias = layer_weight(flow, CONV_BIAS),
                                     .initial = flow->conv_from,
                                     .final = flow->conv_to,
                                     .y = flow->xc,
                                     .y_stride = c->d_inner,
                                     .act = flow->act};
    return flow->model->ops->conv_forward(flow->model->device, &args);
}

int layer_project_x(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    return project(flow, TARGET_X_PROJ, flow->xc, c->d_inner, flow->x_dbl, c->dt_rank + 2 * c->d_state);
}

int layer_project_dt(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    return project(flow, TARGET_DT_PROJ, flow->x_dbl, c->dt_rank + 2 * c->d_state, flow->dt, c->d_inner);
}

int layer_scan(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    int64_t width = c->dt_rank + 2 * c->d_state;
    struct scan_forward_args args = {.tokens = flow->rows,
                                     .channels = c->d_inner,
                                     .d_state = c->d_state,
                                     .n_seqs = flow->n_seqs,
                                     .seq_starts = flow->seq_starts,
                                     .x = flow->xc,
                                     .x_stride = c->d_inner,
                                     .dt = flow->dt,
                                     .dt_stride = c->d_inner,
                                     .a = model_derived(flow->model, flow->adapter) +
                                          flow->layer * c->d_state * c->d_inner,
                                     .b = element_at(flow->x_dbl, c->dt_rank, flow->act),
                                     .c = element_at(flow->x_dbl, c->dt_rank + c->d_state, flow->act),
                                     .b_stride = width,
                                     .c_stride = width,
                                     .d = layer_weight(flow, D_SKIP),
                                     .dt_bias = layer_weight(flow, DT_BIAS),
                                     .z = element_at(flow->xz, c->d_inner, flow->act),
                                     .z_stride = 2 * c->d_inner,
                                     .initial = flow->scan_from,
                                     .final = flow->scan_to,
                                     .chunk_states = flow->chunk_states,
                                     .y = flow->y,
                                     .y_stride = c->d_inner,
                                     .act = flow->act};
    return flow->model->ops->scan_forward(flow->model->device, &args);
}

int layer_forward(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    int status = layer_norm(flow, layer_weight(flow, NORM));
    if (!status)
        status = layer_project_in(flow);
    if (!status)
        status = layer_convolve(flow);
    if (!status)
        status = layer_project_x(flow);
    if (!status)
        status = layer_project_dt(flow);
    if (!status)
        status = layer_scan(flow);
    if (!status)
        status = project(flow, TARGET_OUT_PROJ, flow->y, c->d_inner, flow->output, c->d_model);
    return status;
}

const float *layer_norm_f(const struct layer_flow *flow)
{
    return model_view(flow->model, flow->adapter, mamba_norm_f_index(&flow->model->config)).data;
}
