/* mamba_train.c: Mamba-1 layers forward and backward in a training pass, for pass.c. Letters as in mamba_layer.c.
 *
 * Of each layer the backward needs r and 1/rms, rmsnorm(r), xz, xc, x_dbl, dt, a scan state every SCAN_CHUNK tokens,
 * and what LoRA keeps. y comes out of the scan's backward once more. Under F32 each r stays where its sum was made and
 * the stream moves on from buffer to buffer; in 16 bits the stream is one fp32 buffer, and what is kept is r rounded,
 * as the norm took it.
 *
 * Recomputation. What enum kept_kind names can be had again, the earlier kinds for less time a byte than the later
 * ones. A level up, and one layer more does without one of them: first all layers without dt, then without xc, and so
 * on. The layers without share one slot with the last layer, whose content is still there when the backward begins with
 * it, so that the first level of each kind saves memory and costs nothing. The ops run again on the same values in the
 * same order: the same bits. */
#include "engine/models/mamba_layer.h"

#include <inttypes.h>

enum {
    PASS_R = PASS_FAMILY, /* [n_layers+1,T,d]; under F32 without layer 0's, which is PASS_RESIDUAL */
    PASS_RSTD,            /* [n_layers+1,T] fp32 */
    PASS_NORMS,           /* [slots,T,d]; the last slot is PASS_NORMED */
    PASS_XZ,              /* [slots,T,2c] */
    PASS_XC,              /* [slots,T,c] */
    PASS_X_DBL,           /* [slots,T,R+2n] */
    PASS_DT,              /* [slots,T,c] */
    PASS_CHUNKS,          /* [slots,chunks,n,c] fp32 */
    PASS_U,               /* [n_layers,projections,T,rank] */
    PASS_Y,               /* [T,c] */
    PASS_DY,              /* [T,c] */
    PASS_DXC,             /* [T,c] */
    PASS_DXZ,             /* [T,2c]; x's half holds the gradient of dt until that of x takes its place */
    PASS_DX_DBL,          /* [T,R+2n] */
    PASS_DU,              /* [T,rank] of out_proj, whose dx is wanted before y is there again */
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

/* ---- recomputation ---- */

enum kept_kind {
    KEPT_DT,
    KEPT_XC,
    KEPT_NORM, /* of n_layers+1: the last is norm_f's */
    KEPT_XZ,
    KEPT_SCAN, /* x_dbl and the chunk states */
    KEPT_KINDS,
};

static int64_t kept_count(const struct model_config *c, enum kept_kind kind)
{
    return c->n_layers + (kind == KEPT_NORM);
}

int64_t mamba_recompute_levels(const struct model_config *c)
{
    int64_t levels = 0;
    for (int kind = 0; kind < KEPT_KINDS; kind++)
        levels += kept_count(c, (enum kept_kind)kind) - 1;
    return levels;
}

/* How many slots there are of a kind; the last one is shared. rmsnorm(r) is there for the gradients of in_proj alone. */
static int64_t kept_slots(const struct model_config *c, const struct plan_request *request,
                          enum kept_kind kind)
{
    int64_t level = request->recompute;
    if (kind == KEPT_NORM && request->adaptation == ADAPT_LORA && !(request->lora.targets & TARGET_IN_PROJ))
        return 1;
    for (int k = 0; k < (int)kind; k++)
        level -= kept_count(c, (enum kept_kind)k) - 1;
    int64_t count = kept_count(c, kind);
    return level <= 0 ? count : level < count ? count - level : 1;
}

static int64_t kept_slot(const struct pass *pass, int64_t layer, enum kept_kind kind)
{
    int64_t last = kept_slots(&pass->model->config, &pass->request, kind) - 1;
    return layer < last ? layer : last;
}

/* Has a later layer written to the slot since this one's forward? */
static bool is_lost(const struct pass *pass, int64_t layer, enum kept_kind kind)
{
    const struct model_config *c = &pass->model->config;
    return layer >= kept_slots(c, &pass->request, kind) - 1 && layer < kept_count(c, kind) - 1;
}

/* ---- the plan ---- */

void mamba_pass_plan(const struct model_config *c, const struct plan_request *request,
                     const struct kernel_ops *ops, struct plan *plan)
{
    const int64_t f = sizeof(float), size = (int64_t)kernel_type_size(request->act);
    const int64_t tokens = request->max_tokens, layers = c->n_layers;
    const int64_t inner = tokens * c->d_inner, width = tokens * (c->dt_rank + 2 * c->d_state);
    const int64_t rank = request->adaptation == ADAPT_LORA ? request->lora.rank : 0;
    plan_add(plan, PASS_R, PLAN_ACTIVATION, (layers + (request->act != TYPE_F32)) * tokens * c->d_model,
             size);
    plan_add(plan, PASS_RSTD, PLAN_ACTIVATION, (layers + 1) * tokens, f);
    plan_add(plan, PASS_NORMS, PLAN_ACTIVATION, (kept_slots(c, request, KEPT_NORM) - 1) * tokens * c->d_model,
             size);
    plan_add(plan, PASS_XZ, PLAN_ACTIVATION, kept_slots(c, request, KEPT_XZ) * 2 * inner, size);
    plan_add(plan, PASS_XC, PLAN_ACTIVATION, kept_slots(c, request, KEPT_XC) * inner, size);
    plan_add(plan, PASS_X_DBL, PLAN_ACTIVATION, kept_slots(c, request, KEPT_SCAN) * width, size);
    plan_add(plan, PASS_DT, PLAN_ACTIVATION, kept_slots(c, request, KEPT_DT) * inner, size);
    plan_add(plan, PASS_CHUNKS, PLAN_ACTIVATION,
             kept_slots(c, request, KEPT_SCAN) * max_chunks(tokens, request->max_seqs),
             c->d_state * c->d_inner * f);
    plan_add(plan, PASS_U, PLAN_ACTIVATION, layers * projections(request->lora.targets) * tokens * rank,
             size);
    plan_add(plan, PASS_Y, PLAN_WORKSPACE, inner, size);
    plan_add(plan, PASS_DY, PLAN_WORKSPACE, inner, size);
    plan_add(plan, PASS_DXC, PLAN_WORKSPACE, inner, size);
    plan_add(plan, PASS_DXZ, PLAN_WORKSPACE, 2 * inner, size);
    plan_add(plan, PASS_DX_DBL, PLAN_WORKSPACE, width, size);
    plan_add(plan, PASS_DU, PLAN_WORKSPACE, request->lora.targets & TARGET_OUT_PROJ ? tokens * rank : 0,
             size);
    plan_at_least(plan, PASS_SCRATCH,
                  ops->scan_backward_workspace(tokens, c->d_inner, c->d_state, request->max_seqs));
    plan_at_least(plan, PASS_SCRATCH, ops->rmsnorm_backward_workspace(tokens, c->d_model));
    plan_at_least(plan, PASS_SCRATCH, layer_linear_workspace(c, ops, tokens, rank));
}

/* The flow of one layer: `layer` may be n_layers, whose norm is norm_f and which has nothing else. */
static struct layer_flow pass_flow(const struct pass *pass, const struct batch *batch,
                                   const struct pass_options *options, int64_t layer)
{
    const struct model *model = pass->model;
    const struct model_config *c = &model->config;
    const struct plan_request *request = &pass->request;
    const enum kernel_type act = request->act;
    void *const *at = pass->buffers;
    const struct adapter *adapter = pass->adapter;
    const int64_t tokens = request->max_tokens, d = c->d_model, inner = c->d_inner;
    const int64_t scan_slot = kept_slot(pass, layer, KEPT_SCAN);
    struct layer_flow flow = {
        .model = model,
        .adapter = adapter,
        .copies = &pass->copies,
        .act = act,
        .tf32 = request->tf32,
        .fresh = pass->fresh,
        .dropout = options->backward ? adapter->lora.dropout : 0,
        .seed = options->dropout_seed,
        .workspace = at[PASS_SCRATCH],
        .layer = layer,
        .rows = batch->n_tokens,
        .n_seqs = batch->n_seqs,
        .seq_starts = batch->seq_starts,
        .x = layer ? at[PASS_ROWS] : NULL,
        .residual = at[PASS_RESIDUAL],
        .residual_out = at[PASS_RESIDUAL],
        .rstd = (float *)at[PASS_RSTD] + layer * tokens,
        .normed = at[PASS_NORMED],
        .xz = element_at(at[PASS_XZ], kept_slot(pass, layer, KEPT_XZ) * tokens * 2 * inner, act),
        .xc = element_at(at[PASS_XC], kept_slot(pass, layer, KEPT_XC) * tokens * inner, act),
        .x_dbl = element_at(at[PASS_X_DBL], scan_slot * tokens * (c->dt_rank + 2 * c->d_state), act),
        .dt = element_at(at[PASS_DT], kept_slot(pass, layer, KEPT_DT) * tokens * inner, act),
        .chunk_states =
            (float *)at[PASS_CHUNKS] + scan_slot * max_chunks(tokens, request->max_seqs) * c->d_state * inner,
        .y = at[PASS_Y],
        .output = at[PASS_ROWS],
    };
    if (layer < kept_slots(c, request, KEPT_NORM) - 1)
        flow.normed = element_at(at[PASS_NORMS], layer * tokens * d, act);
    if (act != TYPE_F32) {
        flow.kept = element_at(at[PASS_R], layer * tokens * d, act);
    } else if (layer) {
        flow.residual_out = (float *)at[PASS_R] + (layer - 1) * tokens * d;
        flow.residual = layer > 1 ? flow.residual_out - tokens * d : at[PASS_RESIDUAL];
    }
    if (at[PASS_U] && layer < c->n_layers) {
        flow.u_stride = tokens * adapter->lora.rank;
        flow.u = element_at(at[PASS_U], layer * projections(adapter->lora.targets) * flow.u_stride, act);
    }
    return flow;
}

/* ---- forward ---- */

static int forward_work(const struct pass *pass, const void *flow)
{
    (void)pass;
    return layer_forward(flow);
}

int mamba_pass_forward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                       struct error *error)
{
    const struct model_config *c = &pass->model->config;
    for (int64_t layer = 0; layer < c->n_layers; layer++) {
        struct layer_flow flow = pass_flow(pass, batch, options, layer);
        if (!options->backward)
            flow.chunk_states = NULL;
        int status = replay_layer(pass, layer, FORWARD, forward_work, &flow);
        if (status)
            return model_status(status, error, "layer %" PRId64 " forward", layer);
        if (options->yield)
            options->yield(options->yield_arg);
    }
    struct layer_flow last = pass_flow(pass, batch, options, c->n_layers);
    return model_status(layer_norm(&last, layer_norm_f(&last)), error, "final norm");
}

/* ---- backward ---- */

/* r of the layer as its norm took it. */
static const void *kept_r(const struct layer_flow *flow)
{
    return flow->act == TYPE_F32 ? (const void *)flow->residual_out : flow->kept;
}

static int norm_again(const struct layer_flow *flow)
{
    struct layer_flow again = *flow;
    again.x = kept_r(flow);
    again.residual = NULL;
    again.residual_out = NULL;
    again.kept = NULL;
    return layer_norm(&again, layer_weight(flow, NORM));
}

static int norm_backward(const struct pass *pass, const struct layer_flow *flow, struct weight_view weight)
{
    struct rmsnorm_backward_args args = {.rows = flow->rows,
                                         .d = pass->model->config.d_model,
                                         .dy = pass->buffers[PASS_ROWS],
                                         .r = kept_r(flow),
                                         .rstd = flow->rstd,
                                         .weight = weight.data,
                                         .dresidual = pass->buffers[PASS_DRESIDUAL],
                                         .dx = flow->act == TYPE_F32 ? NULL : pass->buffers[PASS_ROWS],
                                         .dweight = weight.grad,
                                         .workspace = pass->buffers[PASS_SCRATCH],
                                         .act = flow->act};
    return pass->model->ops->rmsnorm_backward(pass->model->device, &args);
}

static float *layer_grad(const struct layer_flow *flow, enum layer_tensor kind)
{
    int64_t index = mamba_tensor_index(&flow->model->config, flow->layer, kind);
    return index < 0 ? NULL : model_view(flow->model, flow->adapter, index).grad;
}

static int scan_backward(const struct pass *pass, const struct layer_flow *flow, void *y)
{
    const struct model_config *c = &pass->model->config;
    const enum kernel_type act = flow->act;
    void *const *at = pass->buffers;
    int64_t width = c->dt_rank + 2 * c->d_state;
    struct scan_backward_args args = {.tokens = flow->rows,
                                      .channels = c->d_inner,
                                      .d_state = c->d_state,
                                      .n_seqs = flow->n_seqs,
                                      .seq_starts = flow->seq_starts,
                                      .x = flow->xc,
                                      .dt = flow->dt,
                                      .b = element_at(flow->x_dbl, c->dt_rank, act),
                                      .c = element_at(flow->x_dbl, c->dt_rank + c->d_state, act),
                                      .z = element_at(flow->xz, c->d_inner, act),
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
                                      .dy = at[PASS_DY],
                                      .dy_stride = c->d_inner,
                                      .dx = at[PASS_DXC],
                                      .ddt = at[PASS_DXZ],
                                      .dz = element_at(at[PASS_DXZ], c->d_inner, act),
                                      .dx_stride = c->d_inner,
                                      .ddt_stride = 2 * c->d_inner,
                                      .dz_stride = 2 * c->d_inner,
                                      .db = element_at(at[PASS_DX_DBL], c->dt_rank, act),
                                      .dc = element_at(at[PASS_DX_DBL], c->dt_rank + c->d_state, act),
                                      .db_stride = width,
                                      .dc_stride = width,
                                      .da_log = layer_grad(flow, A_LOG),
                                      .dd = layer_grad(flow, D_SKIP),
                                      .ddt_bias = layer_grad(flow, DT_BIAS),
                                      .y = y,
                                      .y_stride = c->d_inner,
                                      .workspace = at[PASS_SCRATCH],
                                      .act = act};
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
                                      .act = flow->act};
    return pass->model->ops->conv_backward(pass->model->device, &args);
}

/* What of one projection's backward is wanted: gradients of what trains (needs x), dx, or both. Or dx first and what needs
 * x later: then du is where the adapter's part is left in between, and B's gradient comes with dx. */
struct projected {
    enum lora_target which;
    const void *x; /* NULL: no gradients of what needs it */
    int64_t x_stride;
    const void *dy;
    int64_t dy_stride;
    void *du; /* or NULL */
    void *dx; /* or NULL */
    int64_t dx_stride;
    bool accumulate;
};

static int project_backward(const struct layer_flow *flow, const struct projected *p)
{
    struct linear linear;
    layer_linear(flow, p->which, &linear);
    struct linear_backward_args args = {.layer = linear.layer,
                                        .rows = flow->rows,
                                        .x = p->x,
                                        .x_stride = p->x_stride,
                                        .dy = p->dy,
                                        .dy_stride = p->dy_stride,
                                        .u = layer_u(flow, p->which),
                                        .du = p->du,
                                        .dx = p->dx,
                                        .dx_stride = p->dx_stride,
                                        .accumulate = p->accumulate,
                                        .act = flow->act,
                                        .tf32 = flow->tf32,
                                        .workspace = flow->workspace};
    if (p->x) {
        args.dweight = linear.dweight;
        args.overwrite = flow->fresh;
        args.dbias = linear.dbias;
        args.da = linear.da;
    }
    if (!p->x == !!p->du)
        args.db = linear.db;
    if (!args.dx && !args.dweight && !args.dbias && !args.da)
        return 0;
    return flow->model->ops->linear_backward(flow->model->device, &args);
}

/* Bring back what the layer's forward left and later layers have overwritten: all but rmsnorm(r), unless that is
 * needed here. */
static int restore(const struct pass *pass, const struct layer_flow *flow)
{
    const int64_t layer = flow->layer;
    const bool scan_lost = is_lost(pass, layer, KEPT_SCAN);
    int status = 0;
    if (is_lost(pass, layer, KEPT_XZ)) {
        if (is_lost(pass, layer, KEPT_NORM))
            status = norm_again(flow);
        if (!status)
            status = layer_project_in(flow);
    }
    if (!status && is_lost(pass, layer, KEPT_XC))
        status = layer_convolve(flow);
    if (!status && scan_lost)
        status = layer_project_x(flow);
    if (!status && is_lost(pass, layer, KEPT_DT))
        status = layer_project_dt(flow);
    if (!status && scan_lost)
        status = layer_scan(flow);
    return status;
}

/* The gradient of the layer's output, in the pass's type. */
static const void *output_gradient(const struct pass *pass)
{
    return pass->buffers[pass->request.act == TYPE_F32 ? PASS_DRESIDUAL : PASS_ROWS];
}

/* out_proj: dy, and / or the gradients of what trains there, from y; du as in struct projected. */
static int out_backward(const struct pass *pass, const struct layer_flow *flow, const void *y, void *du,
                        void *dy)
{
    const struct model_config *c = &pass->model->config;
    const struct projected out = {.which = TARGET_OUT_PROJ,
                                  .x = y,
                                  .x_stride = c->d_inner,
                                  .dy = output_gradient(pass),
                                  .dy_stride = c->d_model,
                                  .du = du,
                                  .dx = dy,
                                  .dx_stride = c->d_inner};
    return project_backward(flow, &out);
}

/* PASS_DRESIDUAL holds the gradient of the layer's output; leave there the gradient of its input. Where nothing trains
 * below this layer its input's gradient is not wanted: stop at the lowest tensor that trains. */
static int backward_work(const struct pass *pass, const void *arg)
{
    const struct layer_flow *flow = arg;
    const bool below = flow->layer > 0 || adapter_trains(pass->adapter, TARGET_EMBEDDINGS);
    const struct model_config *c = &pass->model->config;
    const struct adapter *adapter = pass->adapter;
    void *const *at = pass->buffers;
    const int64_t width = c->dt_rank + 2 * c->d_state, inner = c->d_inner;
    const bool want_in = below || adapter_trains(adapter, TARGET_IN_PROJ);
    const bool want_out = adapter_trains(adapter, TARGET_OUT_PROJ);
    const bool want_scan =
        want_in || adapter_trains(adapter, TARGET_X_PROJ) || adapter_trains(adapter, TARGET_DT_PROJ);

    int status = restore(pass, flow);
    if (!status && !want_scan) {
        status = layer_scan(flow);
        return status ? status : out_backward(pass, flow, flow->y, NULL, NULL);
    }
    if (!status)
        status = out_backward(pass, flow, NULL, at[PASS_DU], at[PASS_DY]);
    if (!status)
        status = scan_backward(pass, flow, want_out ? flow->y : NULL);
    if (!status && want_out)
        status = out_backward(pass, flow, flow->y, at[PASS_DU], NULL);
    const struct projected dt = {.which = TARGET_DT_PROJ,
                                 .x = flow->x_dbl,
                                 .x_stride = width,
                                 .dy = at[PASS_DXZ],
                                 .dy_stride = 2 * inner,
                                 .dx = at[PASS_DX_DBL],
                                 .dx_stride = width};
    if (!status)
        status = project_backward(flow, &dt);
    const struct projected x = {.which = TARGET_X_PROJ,
                                .x = flow->xc,
                                .x_stride = inner,
                                .dy = at[PASS_DX_DBL],
                                .dy_stride = width,
                                .dx = want_in ? at[PASS_DXC] : NULL,
                                .dx_stride = inner,
                                .accumulate = true};
    if (!status)
        status = project_backward(flow, &x);
    if (status || !want_in)
        return status;
    status = conv_backward(pass, flow);
    if (!status && adapter_trains(adapter, TARGET_IN_PROJ) && is_lost(pass, flow->layer, KEPT_NORM) &&
        !is_lost(pass, flow->layer, KEPT_XZ))
        status = norm_again(flow);
    const struct projected in = {.which = TARGET_IN_PROJ,
                                 .x = flow->normed,
                                 .x_stride = c->d_model,
                                 .dy = at[PASS_DXZ],
                                 .dy_stride = 2 * inner,
                                 .dx = below ? at[PASS_ROWS] : NULL,
                                 .dx_stride = c->d_model};
    if (!status)
        status = project_backward(flow, &in);
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
        status = replay_layer(pass, layer, BACKWARD, backward_work, &flow);
        if (status)
            return model_status(status, error, "layer %" PRId64 " backward", layer);
        if (options->yield)
            options->yield(options->yield_arg);
    }
    return 0;
}
