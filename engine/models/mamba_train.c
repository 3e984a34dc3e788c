/* mamba_train.c: Mamba-1 layers forward and backward in a training pass, for pass.c.
 *
 * Kept of each layer: r, 1/rms, xz, x_dbl and a scan state every SCAN_CHUNK tokens, y only where out_proj
 * trains, and what LoRA keeps. rmsnorm(r), xc and dt cost little beside the products and are computed again
 * in the backward. Letters as in mamba_layer.c. */
#include "engine/models/mamba_layer.h"

#include <inttypes.h>

enum {
    PASS_RSTD = PASS_FAMILY, /* [n_layers+1,T] */
    PASS_XZ,                 /* [n_layers,T,2c] */
    PASS_X_DBL,              /* [n_layers,T,R+2n] */
    PASS_CHUNKS,             /* [n_layers,chunks,n,c] */
    PASS_U,                  /* [n_layers,projections,T,rank] */
    PASS_Y,                  /* [n_layers,T,c] where out_proj trains, else [T,c] and then also dy */
    PASS_DY,                 /* [T,c] where out_proj trains */
    PASS_XC,                 /* [T,c] */
    PASS_DT,                 /* [T,c] */
    PASS_DXC,                /* [T,c] */
    PASS_DDT,                /* [T,c] */
    PASS_DXZ,                /* [T,2c] */
    PASS_DX_DBL,             /* [T,R+2n] */
    PASS_DU,                 /* [T,rank] */
};

static int64_t max_chunks(int64_t tokens, int32_t seqs)
{
    int64_t n = seqs < tokens ? seqs : tokens;
    return (tokens + n * (SCAN_CHUNK - 1)) / SCAN_CHUNK;
}

static int projections(int targets)
{
    return __builtin_popcount((unsigned)targets & (TARGET_EMBEDDINGS - 1));
}

void mamba_pass_plan(const struct model_config *c, const struct plan_request *request,
                     const struct kernel_ops *ops, struct plan *plan)
{
    const int64_t f = sizeof(float), tokens = request->max_tokens, layers = c->n_layers;
    const int64_t inner = tokens * c->d_inner, width = tokens * (c->dt_rank + 2 * c->d_state);
    bool lora = request->adaptation == ADAPT_LORA;
    bool keep_y = !lora || request->lora.targets & TARGET_OUT_PROJ;
    plan_add(plan, PASS_RSTD, PLAN_ACTIVATION, (layers + 1) * tokens, f);
    plan_add(plan, PASS_XZ, PLAN_ACTIVATION, layers * 2 * inner, f);
    plan_add(plan, PASS_X_DBL, PLAN_ACTIVATION, layers * width, f);
    plan_add(plan, PASS_CHUNKS, PLAN_ACTIVATION, layers * max_chunks(tokens, request->max_seqs),
             c->d_state * c->d_inner * f);
    if (lora) {
        plan_add(plan, PASS_U, PLAN_ACTIVATION,
                 layers * projections(request->lora.targets) * tokens * request->lora.rank, f);
        plan_add(plan, PASS_DU, PLAN_WORKSPACE, tokens * request->lora.rank, f);
    }
    plan_add(plan, PASS_Y, keep_y ? PLAN_ACTIVATION : PLAN_WORKSPACE, (keep_y ? layers : 1) * inner, f);
    if (keep_y)
        plan_add(plan, PASS_DY, PLAN_WORKSPACE, inner, f);
    plan_add(plan, PASS_XC, PLAN_WORKSPACE, inner, f);
    plan_add(plan, PASS_DT, PLAN_WORKSPACE, inner, f);
    plan_add(plan, PASS_DXC, PLAN_WORKSPACE, inner, f);
    plan_add(plan, PASS_DDT, PLAN_WORKSPACE, inner, f);
    plan_add(plan, PASS_DXZ, PLAN_WORKSPACE, 2 * inner, f);
    plan_add(plan, PASS_DX_DBL, PLAN_WORKSPACE, width, f);
    plan_at_least(plan, PASS_SCRATCH,
                  ops->scan_backward_workspace(tokens, c->d_inner, c->d_state, request->max_seqs));
    plan_at_least(plan, PASS_SCRATCH, ops->rmsnorm_backward_workspace(tokens, c->d_model));
}

/* The flow of one layer: `layer` may be n_layers, whose norm is norm_f. */
static struct layer_flow pass_flow(const struct pass *pass, const struct batch *batch,
                                   const struct pass_options *options, int64_t layer)
{
    const struct model *model = pass->model;
    const struct model_config *c = &model->config;
    void *const *at = pass->buffers;
    const struct adapter *adapter = pass->adapter;
    const int64_t tokens = pass->max_tokens, d = c->d_model, inner = c->d_inner;
    const int64_t stored =
        layer < c->n_layers ? layer : 0; /* the final norm has no other buffers of its own */
    float *residual = (float *)at[PASS_RESIDUAL] + layer * tokens * d;
    struct layer_flow flow = {
        .model = model,
        .adapter = adapter,
        .linear = {.ops = model->ops,
                   .device = model->device,
                   .dropout = options->backward ? adapter->lora.dropout : 0,
                   .seed = options->dropout_seed,
                   .ones = at[PASS_ONES],
                   .du = at[PASS_DU]},
        .layer = layer,
        .rows = batch->n_tokens,
        .n_seqs = batch->n_seqs,
        .seq_starts = batch->seq_starts,
        .x = layer ? at[PASS_ROWS] : NULL,
        .residual = layer ? residual - tokens * d : residual,
        .residual_out = residual,
        .rstd = (float *)at[PASS_RSTD] + layer * tokens,
        .normed = at[PASS_NORMED],
        .xz = (float *)at[PASS_XZ] + stored * tokens * 2 * inner,
        .xc = at[PASS_XC],
        .x_dbl = (float *)at[PASS_X_DBL] + stored * tokens * (c->dt_rank + 2 * c->d_state),
        .dt = at[PASS_DT],
        .chunk_states =
            (float *)at[PASS_CHUNKS] + stored * max_chunks(tokens, pass->max_seqs) * c->d_state * inner,
        .y = (float *)at[PASS_Y] + (at[PASS_DY] ? stored * tokens * inner : 0),
        .output = at[PASS_ROWS],
    };
    if (at[PASS_U]) {
        flow.u_stride = tokens * adapter->lora.rank;
        flow.u = (float *)at[PASS_U] + stored * projections(adapter->lora.targets) * flow.u_stride;
    }
    return flow;
}

int mamba_pass_forward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                       struct error *error)
{
    const struct model_config *c = &pass->model->config;
    for (int64_t layer = 0; layer < c->n_layers; layer++) {
        struct layer_flow flow = pass_flow(pass, batch, options, layer);
        if (!options->backward)
            flow.chunk_states = NULL;
        int status = layer_forward(&flow);
        if (status)
            return model_status(status, error, "layer %" PRId64 " forward", layer);
        if (options->yield)
            options->yield(options->yield_arg);
    }
    struct layer_flow last = pass_flow(pass, batch, options, c->n_layers);
    return model_status(layer_norm(&last, layer_norm_f(&last)), error, "final norm");
}

static int norm_backward(const struct pass *pass, const struct layer_flow *flow, struct weight_view weight)
{
    struct rmsnorm_backward_args args = {.rows = flow->rows,
                                         .d = pass->model->config.d_model,
                                         .dy = pass->buffers[PASS_ROWS],
                                         .r = flow->residual_out,
                                         .rstd = flow->rstd,
                                         .weight = weight.data,
                                         .dresidual = pass->buffers[PASS_DRESIDUAL],
                                         .dweight = weight.grad,
                                         .workspace = pass->buffers[PASS_SCRATCH],
                                         .act = TYPE_F32};
    return pass->model->ops->rmsnorm_backward(pass->model->device, &args);
}

static float *layer_grad(const struct layer_flow *flow, enum layer_tensor kind)
{
    int64_t index = mamba_tensor_index(&flow->model->config, flow->layer, kind);
    return index < 0 ? NULL : model_view(flow->model, flow->adapter, index).grad;
}

static int scan_backward(const struct pass *pass, const struct layer_flow *flow, const float *dy)
{
    const struct model_config *c = &pass->model->config;
    void *const *at = pass->buffers;
    int64_t width = c->dt_rank + 2 * c->d_state;
    struct scan_backward_args args = {.tokens = flow->rows,
                                      .channels = c->d_inner,
                                      .d_state = c->d_state,
                                      .n_seqs = flow->n_seqs,
                                      .seq_starts = flow->seq_starts,
                                      .x = flow->xc,
                                      .dt = flow->dt,
                                      .b = flow->x_dbl + c->dt_rank,
                                      .c = flow->x_dbl + c->dt_rank + c->d_state,
                                      .z = flow->xz + c->d_inner,
                                      .x_stride = c->d_inner,
                                      .dt_stride = c->d_inner,
                                      .b_stride = width,
                                      .c_stride = width,
                                      .z_stride = 2 * c->d_inner,
                                      .a = model_derived(flow->model, flow->adapter) +
                                           flow->layer * c->d_state * c->d_inner,
                                      .d = layer_weight(flow, D_SKIP),
                                      .dt_bias = layer_weight(flow, DT_BIAS),
                                      .chunk_states = flow->chunk_states,
                                      .dy = dy,
                                      .dy_stride = c->d_inner,
                                      .dx = at[PASS_DXC],
                                      .ddt = at[PASS_DDT],
                                      .dz = (float *)at[PASS_DXZ] + c->d_inner,
                                      .dx_stride = c->d_inner,
                                      .ddt_stride = c->d_inner,
                                      .dz_stride = 2 * c->d_inner,
                                      .db = (float *)at[PASS_DX_DBL] + c->dt_rank,
                                      .dc = (float *)at[PASS_DX_DBL] + c->dt_rank + c->d_state,
                                      .db_stride = width,
                                      .dc_stride = width,
                                      .da_log = layer_grad(flow, A_LOG),
                                      .dd = layer_grad(flow, D_SKIP),
                                      .ddt_bias = layer_grad(flow, DT_BIAS),
                                      .workspace = at[PASS_SCRATCH],
                                      .act = TYPE_F32};
    return pass->model->ops->scan_backward(pass->model->device, &args);
}

static int conv_backward(const struct pass *pass, const struct layer_flow *flow)
{
    const struct model_config *c = &pass->model->config;
    struct conv_backward_args args = {.tokens = flow->rows,
                                      .channels = c->d_inner,
                                      .width = c->d_conv,
                                      .n_seqs = flow->n_seqs,
                                      .seq_starts = flow->seq_starts,
                                      .x = flow->xz,
                                      .x_stride = 2 * c->d_inner,
                                      .weight = layer_weight(flow, CONV),
                                      .bias = layer_weight(flow, CONV_BIAS),
                                      .dy = pass->buffers[PASS_DXC],
                                      .dy_stride = c->d_inner,
                                      .dx = pass->buffers[PASS_DXZ],
                                      .dx_stride = 2 * c->d_inner,
                                      .dweight = layer_grad(flow, CONV),
                                      .dbias = layer_grad(flow, CONV_BIAS),
                                      .act = TYPE_F32};
    return pass->model->ops->conv_backward(pass->model->device, &args);
}

static int project_backward(const struct layer_flow *flow, enum lora_target which, const float *x,
                            int64_t x_stride, const float *dy, int64_t dy_stride, float *dx,
                            int64_t dx_stride, bool accumulate)
{
    struct linear linear;
    layer_linear(flow, which, &linear);
    return linear_backward(&flow->linear, &linear, flow->rows, x, x_stride, dy, dy_stride,
                           layer_u(flow, which), dx, dx_stride, accumulate);
}

/* dresidual holds the gradient of the layer's output; leave there the gradient of its input. `below`:
 * something trains below this layer, so that its input's gradient is wanted; without it, stop at the lowest
 * tensor that trains. */
static int layer_backward(const struct pass *pass, const struct layer_flow *flow, bool below)
{
    const struct model_config *c = &pass->model->config;
    const struct adapter *adapter = pass->adapter;
    void *const *at = pass->buffers;
    float *dy = at[PASS_DY] ? at[PASS_DY] : at[PASS_Y];
    const int64_t width = c->dt_rank + 2 * c->d_state, inner = c->d_inner;
    bool want_in = below || adapter_trains(adapter, TARGET_IN_PROJ);
    bool want_scan =
        want_in || adapter_trains(adapter, TARGET_X_PROJ) || adapter_trains(adapter, TARGET_DT_PROJ);

    int status = project_backward(flow, TARGET_OUT_PROJ, flow->y, inner, at[PASS_DRESIDUAL], c->d_model,
                                  want_scan ? dy : NULL, inner, false);
    if (status || !want_scan)
        return status;
    status = layer_convolve(flow);
    if (!status)
        status = layer_project_dt(flow);
    if (!status)
        status = scan_backward(pass, flow, dy);
    if (!status)
        status = project_backward(flow, TARGET_DT_PROJ, flow->x_dbl, width, at[PASS_DDT], inner,
                                  at[PASS_DX_DBL], width, false);
    if (!status)
        status = project_backward(flow, TARGET_X_PROJ, flow->xc, inner, at[PASS_DX_DBL], width,
                                  want_in ? at[PASS_DXC] : NULL, inner, true);
    if (status || !want_in)
        return status;
    status = conv_backward(pass, flow);
    if (!status && adapter_trains(adapter, TARGET_IN_PROJ)) {
        struct layer_flow again = *flow; /* rmsnorm(r) once more: r is already the sum */
        again.x = NULL;
        again.residual = flow->residual_out;
        status = layer_norm(&again, layer_weight(flow, NORM));
    }
    if (!status)
        status = project_backward(flow, TARGET_IN_PROJ, flow->normed, c->d_model, at[PASS_DXZ], 2 * inner,
                                  below ? at[PASS_ROWS] : NULL, c->d_model, false);
    if (status || !below)
        return status;
    return norm_backward(pass, flow,
                         model_view(flow->model, adapter, mamba_tensor_index(c, flow->layer, NORM)));
}

int mamba_pass_backward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                        struct error *error)
{
    const struct model_config *c = &pass->model->config;
    struct layer_flow last = pass_flow(pass, batch, options, c->n_layers);
    int status = norm_backward(pass, &last, model_view(pass->model, pass->adapter, mamba_norm_f_index(c)));
    if (status)
        return model_status(status, error, "final norm backward");
    for (int64_t layer = c->n_layers - 1; layer >= 0; layer--) {
        struct layer_flow flow = pass_flow(pass, batch, options, layer);
        status = layer_backward(pass, &flow, layer > 0 || adapter_trains(pass->adapter, TARGET_EMBEDDINGS));
        if (status)
            return model_status(status, error, "layer %" PRId64 " backward", layer);
        if (options->yield)
            options->yield(options->yield_arg);
    }
    return 0;
}
