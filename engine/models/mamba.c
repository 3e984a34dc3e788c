/* mamba.c: the Mamba-1 family (Gu and Dao 2023) as Hugging Face's MambaForCausalLM names and shapes it:
 * config, table of tensors, forward, backward and step, written by hand over the device's ops.
 *
 * One layer, with d = d_model, c = d_inner, n = d_state, R = dt_rank:
 *   r        = residual + the layer before's output            [T,d] fp32
 *   xz       = rmsnorm(r) in_proj^T                            [T,2c] = x | z
 *   xc       = silu(conv(x))                                   [T,c]
 *   x_dbl    = xc x_proj^T                                     [T,R+2n] = dt_low | B | C
 *   dt       = dt_low dt_proj^T                                [T,c]; its bias and softplus are the scan's
 *   y        = scan(xc, dt, A, B, C, D) * silu(z)              [T,c]
 *   output   = y out_proj^T                                    [T,d]
 * x, z, dt_low, B and C are strided views, never copies.
 *
 * Training keeps r, 1/rms, xz, x_dbl and a scan state every SCAN_CHUNK tokens of each layer, y only where
 * out_proj trains, and what LoRA keeps. rmsnorm(r), xc and dt cost little beside the products and are
 * computed again in the backward.
 *
 * A sequence's state holds for each layer the convolution's [d_conv-1,c] and the scan's [n,c], so one step is
 * the same forward with one token a sequence. Runs on the device's owner thread. */
#include "engine/models/internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* ---- config ---- */

static int parse_sizes(const json_t *json, struct model_config *config, struct error *error)
{
    int code;
    int64_t expand;
    if ((code =
             config_integer(json, "vocab_size", CONFIG_REQUIRED, 1, 1 << 24, &config->vocab_size, error)) ||
        (code = config_integer(json, "hidden_size", CONFIG_REQUIRED, 1, 1 << 16, &config->d_model, error)) ||
        (code =
             config_integer(json, "num_hidden_layers", CONFIG_REQUIRED, 1, 4096, &config->n_layers, error)) ||
        (code = config_integer(json, "state_size", 16, 1, 1024, &config->d_state, error)) ||
        (code = config_integer(json, "conv_kernel", 4, 2, 64, &config->d_conv, error)) ||
        (code = config_integer(json, "expand", 2, 1, 16, &expand, error)) ||
        (code = config_integer(json, "intermediate_size", expand * config->d_model, 1, 1 << 18,
                               &config->d_inner, error)))
        return code;
    const json_t *rank = json_object_get(json, "time_step_rank");
    if (!rank || (json_is_string(rank) && !strcmp(json_string_value(rank), "auto"))) {
        config->dt_rank = (config->d_model + 15) / 16;
        return 0;
    }
    if (!json_is_integer(rank) || json_integer_value(rank) < 1 || json_integer_value(rank) > 1 << 16)
        return error_set_param(error, ERROR_INVALID, "time_step_rank",
                               "time_step_rank must be \"auto\" or a whole number from 1 to 65536");
    config->dt_rank = json_integer_value(rank);
    return 0;
}

static int parse_config(const json_t *json, struct model_config *ret_config, struct error *error)
{
    static const char *const activations[] = {"silu", "swish", NULL};
    static const char *const templates[] = {"alpaca", "chatml", NULL};
    struct model_config config = {0};
    const char *text;
    double eps;
    int64_t bos, eos, pad;
    int code = parse_sizes(json, &config, error);
    if (code)
        return code;
    int64_t last = config.vocab_size - 1;
    if ((code = config_choice(json, "hidden_act", "silu", activations, &text, error)) ||
        (code = config_number(json, "layer_norm_epsilon", 1e-5, 0, 1, &eps, error)) ||
        (code = config_boolean(json, "tie_word_embeddings", true, &config.tie_embeddings, error)) ||
        (code = config_boolean(json, "use_conv_bias", true, &config.conv_bias, error)) ||
        (code = config_boolean(json, "use_bias", false, &config.proj_bias, error)) ||
        (code = config_integer(json, "bos_token_id", -1, -1, last, &bos, error)) ||
        (code = config_integer(json, "eos_token_id", -1, -1, last, &eos, error)) ||
        (code = config_integer(json, "pad_token_id", -1, -1, last, &pad, error)) ||
        (code = config_choice(json, "chat_template", "", templates, &text, error)))
        return code;
    config.norm_eps = (float)eps;
    config.bos_id = (int32_t)bos;
    config.eos_id = (int32_t)eos;
    config.pad_id = (int32_t)pad;
    snprintf(config.chat_template, sizeof config.chat_template, "%s", text);
    *ret_config = config;
    return 0;
}

/* ---- tensors ---- */

/* Index 0: the embeddings; then each layer's, those that every config has first; norm_f; the head of its
 * own. */

enum layer_tensor {
    NORM,
    IN_PROJ,
    CONV,
    X_PROJ,
    DT_PROJ,
    DT_BIAS,
    A_LOG,
    D_SKIP,
    OUT_PROJ,
    LAYER_ALWAYS,
    CONV_BIAS = LAYER_ALWAYS, /* with conv_bias */
    IN_BIAS,                  /* with proj_bias, and the next */
    OUT_BIAS,
    LAYER_KINDS,
};

static int64_t layer_tensors(const struct model_config *c)
{
    return LAYER_ALWAYS + c->conv_bias + 2 * c->proj_bias;
}

/* -1 where the config has no such tensor. */
static int64_t tensor_index(const struct model_config *c, int64_t layer, enum layer_tensor kind)
{
    int64_t first = 1 + layer * layer_tensors(c);
    if (kind < LAYER_ALWAYS)
        return first + (int64_t)kind;
    if (kind == CONV_BIAS)
        return c->conv_bias ? first + LAYER_ALWAYS : -1;
    return c->proj_bias ? first + LAYER_ALWAYS + c->conv_bias + (kind == OUT_BIAS) : -1;
}

static int64_t norm_f_index(const struct model_config *c)
{
    return 1 + c->n_layers * layer_tensors(c);
}

static void layer_spec(const struct model_config *c, int64_t layer, enum layer_tensor kind,
                       struct tensor_spec *spec)
{
    const int64_t d = c->d_model, inner = c->d_inner, n = c->d_state;
    const struct {
        const char *name;
        int n_dims;
        int64_t shape[3];
        bool fp32, matrix;
    } table[LAYER_KINDS] = {
        [NORM] = {"norm.weight", 1, {d}, true, false},
        [IN_PROJ] = {"mixer.in_proj.weight", 2, {2 * inner, d}, false, true},
        [CONV] = {"mixer.conv1d.weight", 3, {inner, 1, c->d_conv}, true, true},
        [X_PROJ] = {"mixer.x_proj.weight", 2, {c->dt_rank + 2 * n, inner}, false, true},
        [DT_PROJ] = {"mixer.dt_proj.weight", 2, {inner, c->dt_rank}, false, true},
        [DT_BIAS] = {"mixer.dt_proj.bias", 1, {inner}, true, false},
        [A_LOG] = {"mixer.A_log", 2, {inner, n}, true, false},
        [D_SKIP] = {"mixer.D", 1, {inner}, true, false},
        [OUT_PROJ] = {"mixer.out_proj.weight", 2, {d, inner}, false, true},
        [CONV_BIAS] = {"mixer.conv1d.bias", 1, {inner}, true, false},
        [IN_BIAS] = {"mixer.in_proj.bias", 1, {2 * inner}, true, false},
        [OUT_BIAS] = {"mixer.out_proj.bias", 1, {d}, true, false},
    };
    *spec = (struct tensor_spec){
        .n_dims = table[kind].n_dims, .fp32 = table[kind].fp32, .matrix = table[kind].matrix};
    memcpy(spec->shape, table[kind].shape, sizeof table[kind].shape);
    snprintf(spec->name, sizeof spec->name, "backbone.layers.%" PRId64 ".%s", layer, table[kind].name);
}

static bool tensor(const struct model_config *c, int64_t index, struct tensor_spec *ret_spec)
{
    struct tensor_spec table = {.n_dims = 2, .shape = {c->vocab_size, c->d_model}, .matrix = true};
    if (index == 0) {
        *ret_spec = table;
        ret_spec->role = ROLE_EMBEDDING;
        strcpy(ret_spec->name, "backbone.embeddings.weight");
        strcpy(ret_spec->old_name, "backbone.embedding.weight");
        return true;
    }
    if (index < norm_f_index(c)) {
        int64_t layer = (index - 1) / layer_tensors(c);
        for (int kind = 0; kind < LAYER_KINDS; kind++)
            if (tensor_index(c, layer, (enum layer_tensor)kind) == index)
                layer_spec(c, layer, (enum layer_tensor)kind, ret_spec);
        return true;
    }
    if (index == norm_f_index(c)) {
        *ret_spec = (struct tensor_spec){.n_dims = 1, .shape = {c->d_model}, .fp32 = true};
        strcpy(ret_spec->name, "backbone.norm_f.weight");
        return true;
    }
    if (index > norm_f_index(c) + 1 || c->tie_embeddings)
        return false;
    *ret_spec = table;
    ret_spec->role = ROLE_HEAD;
    strcpy(ret_spec->name, "lm_head.weight");
    return true;
}

static bool ignored(const struct model_config *c, const char *name)
{
    return c->tie_embeddings && !strcmp(name, "lm_head.weight");
}

static bool target(const struct model_config *c, enum lora_target which, int64_t layer, int64_t *ret_in,
                   int64_t *ret_out, char ret_name[96])
{
    const struct {
        enum lora_target target;
        int64_t in, out;
    } table[] = {{TARGET_IN_PROJ, c->d_model, 2 * c->d_inner},
                 {TARGET_X_PROJ, c->d_inner, c->dt_rank + 2 * c->d_state},
                 {TARGET_DT_PROJ, c->dt_rank, c->d_inner},
                 {TARGET_OUT_PROJ, c->d_inner, c->d_model},
                 {TARGET_EMBEDDINGS, c->vocab_size, c->d_model}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (table[i].target != which)
            continue;
        *ret_in = table[i].in;
        *ret_out = table[i].out;
        if (which == TARGET_EMBEDDINGS)
            snprintf(ret_name, 96, "backbone.embeddings");
        else
            snprintf(ret_name, 96, "backbone.layers.%" PRId64 ".mixer.%s", layer, lora_target_name(which));
        return true;
    }
    return false;
}

/* ---- states and derived weights ---- */

static int64_t layer_state_floats(const struct model_config *c)
{
    return c->d_inner * (c->d_conv - 1 + c->d_state);
}

static int64_t state_floats(const struct model_config *c)
{
    return c->n_layers * layer_state_floats(c);
}

/* A = -exp(A_log) of every layer, transposed for the scan: [n_layers][d_state][d_inner]. */
static int64_t derived_floats(const struct model_config *c)
{
    return c->n_layers * c->d_state * c->d_inner;
}

static int derive(const struct model *model, const struct adapter *adapter, float *derived)
{
    const struct model_config *c = &model->config;
    int status = 0;
    for (int64_t layer = 0; !status && layer < c->n_layers; layer++) {
        struct scan_prepare_args args = {.channels = c->d_inner,
                                         .d_state = c->d_state,
                                         .a_log =
                                             model_view(model, adapter, tensor_index(c, layer, A_LOG)).data,
                                         .a = derived + layer * c->d_state * c->d_inner};
        status = model->ops->scan_prepare(model->device, &args);
    }
    return status;
}

/* ---- one layer forward, in training and in inference ---- */

struct layer_flow {
    const struct model *model;
    const struct adapter *adapter; /* its weights, and its LoRA unless `runner` applies several */
    struct runner *runner;         /* NULL in training */
    const struct forward_part *part;
    struct linear_context linear;
    int64_t layer, rows;
    int32_t n_seqs;
    const int32_t *seq_starts;
    struct state_view conv_state, scan_state;
    const float *x;        /* what is added to the residual stream, or NULL */
    const float *residual; /* may be residual_out */
    float *residual_out, *rstd, *normed, *xz, *xc, *x_dbl, *dt, *chunk_states, *y, *output;
    float *u; /* [projections that LoRA adapts][max tokens][rank] of this layer, in training */
    int64_t u_stride;
};

static const float *fp32_weight(const struct layer_flow *flow, enum layer_tensor kind)
{
    int64_t index = tensor_index(&flow->model->config, flow->layer, kind);
    return index < 0 ? NULL : model_view(flow->model, flow->adapter, index).data;
}

/* Where the rank products of one projection are kept in training. */
static float *flow_u(const struct layer_flow *flow, enum lora_target which)
{
    struct lora_pair pair;
    if (!flow->u || !adapter_pair(flow->adapter, which, flow->layer, &pair))
        return NULL;
    return flow->u +
           __builtin_popcount((unsigned)flow->adapter->lora.targets & ((unsigned)which - 1)) * flow->u_stride;
}

static void flow_linear(const struct layer_flow *flow, enum lora_target which, struct linear *ret_linear)
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
    int64_t bias = table[i].bias == LAYER_KINDS ? -1 : tensor_index(c, flow->layer, table[i].bias);
    linear_bind(ret_linear, flow->model, flow->adapter, tensor_index(c, flow->layer, table[i].weight), bias,
                which, flow->layer);
}

static int project(const struct layer_flow *flow, enum lora_target which, const float *x, int64_t x_stride,
                   float *y, int64_t y_stride)
{
    struct linear linear;
    flow_linear(flow, which, &linear);
    int status =
        linear_forward(&flow->linear, &linear, flow->rows, x, x_stride, y, y_stride, flow_u(flow, which));
    if (!status && flow->runner)
        status = runner_lora(flow->runner, flow->part, which, flow->layer, x, x_stride, y, y_stride);
    return status;
}

static int norm(const struct layer_flow *flow, const float *weight)
{
    struct rmsnorm_forward_args args = {.rows = flow->rows,
                                        .d = flow->model->config.d_model,
                                        .x = flow->x,
                                        .residual = flow->residual,
                                        .weight = weight,
                                        .eps = flow->model->config.norm_eps,
                                        .residual_out = flow->residual_out,
                                        .y = flow->normed,
                                        .rstd = flow->rstd,
                                        .act = TYPE_F32};
    return flow->model->ops->rmsnorm_forward(flow->model->device, &args);
}

/* xc from xz. */
static int convolve(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    struct conv_forward_args args = {.tokens = flow->rows,
                                     .channels = c->d_inner,
                                     .width = c->d_conv,
                                     .n_seqs = flow->n_seqs,
                                     .seq_starts = flow->seq_starts,
                                     .x = flow->xz,
                                     .x_stride = 2 * c->d_inner,
                                     .weight = fp32_weight(flow, CONV),
                                     .bias = fp32_weight(flow, CONV_BIAS),
                                     .initial = flow->conv_state,
                                     .final = flow->conv_state,
                                     .y = flow->xc,
                                     .y_stride = c->d_inner,
                                     .act = TYPE_F32};
    return flow->model->ops->conv_forward(flow->model->device, &args);
}

/* dt from x_dbl. */
static int project_dt(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    return project(flow, TARGET_DT_PROJ, flow->x_dbl, c->dt_rank + 2 * c->d_state, flow->dt, c->d_inner);
}

static int scan(const struct layer_flow *flow)
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
                                     .b = flow->x_dbl + c->dt_rank,
                                     .c = flow->x_dbl + c->dt_rank + c->d_state,
                                     .b_stride = width,
                                     .c_stride = width,
                                     .d = fp32_weight(flow, D_SKIP),
                                     .dt_bias = fp32_weight(flow, DT_BIAS),
                                     .z = flow->xz + c->d_inner,
                                     .z_stride = 2 * c->d_inner,
                                     .initial = flow->scan_state,
                                     .final = flow->scan_state,
                                     .chunk_states = flow->chunk_states,
                                     .y = flow->y,
                                     .y_stride = c->d_inner,
                                     .act = TYPE_F32};
    return flow->model->ops->scan_forward(flow->model->device, &args);
}

static int layer_forward(const struct layer_flow *flow)
{
    const struct model_config *c = &flow->model->config;
    int status = norm(flow, fp32_weight(flow, NORM));
    if (!status)
        status = project(flow, TARGET_IN_PROJ, flow->normed, c->d_model, flow->xz, 2 * c->d_inner);
    if (!status)
        status = convolve(flow);
    if (!status)
        status = project(flow, TARGET_X_PROJ, flow->xc, c->d_inner, flow->x_dbl, c->dt_rank + 2 * c->d_state);
    if (!status)
        status = project_dt(flow);
    if (!status)
        status = scan(flow);
    if (!status)
        status = project(flow, TARGET_OUT_PROJ, flow->y, c->d_inner, flow->output, c->d_model);
    return status;
}

static const float *norm_f_weight(const struct layer_flow *flow)
{
    return model_view(flow->model, flow->adapter, norm_f_index(&flow->model->config)).data;
}

/* ---- inference ---- */

enum { RUN_XZ = RUNNER_FAMILY, RUN_XC, RUN_X_DBL, RUN_DT, RUN_Y, RUN_OUTPUT };

static void runner_plan(const struct model_config *c, int64_t max_tokens, int32_t max_seqs,
                        const struct kernel_ops *ops, struct plan *plan)
{
    (void)max_seqs, (void)ops;
    const int64_t f = sizeof(float);
    plan_add(plan, RUN_XZ, PLAN_WORKSPACE, max_tokens * 2 * c->d_inner, f);
    plan_add(plan, RUN_XC, PLAN_WORKSPACE, max_tokens * c->d_inner, f);
    plan_add(plan, RUN_X_DBL, PLAN_WORKSPACE, max_tokens * (c->dt_rank + 2 * c->d_state), f);
    plan_add(plan, RUN_DT, PLAN_WORKSPACE, max_tokens * c->d_inner, f);
    plan_add(plan, RUN_Y, PLAN_WORKSPACE, max_tokens * c->d_inner, f);
    plan_add(plan, RUN_OUTPUT, PLAN_WORKSPACE, max_tokens * c->d_model, f);
}

static int forward(struct runner *runner, const struct forward_part *part, struct error *error)
{
    const struct model *model = runner->model;
    const struct model_config *c = &model->config;
    void *const *at = runner->buffers;
    const int64_t d = c->d_model, first = part->row_begin;
    struct layer_flow flow = {
        .model = model,
        .adapter = part->full,
        .runner = runner,
        .part = part,
        .linear = {.ops = model->ops, .device = model->device, .ones = at[RUNNER_ONES]},
        .rows = part->rows,
        .n_seqs = part->n_seqs,
        .seq_starts = part->seq_starts,
        .residual = (float *)at[RUNNER_RESIDUAL] + first * d,
        .residual_out = (float *)at[RUNNER_RESIDUAL] + first * d,
        .normed = (float *)at[RUNNER_HIDDEN] + first * d,
        .xz = at[RUN_XZ],
        .xc = at[RUN_XC],
        .x_dbl = at[RUN_X_DBL],
        .dt = at[RUN_DT],
        .y = at[RUN_Y],
        .output = at[RUN_OUTPUT],
    };
    int status = 0;
    for (flow.layer = 0; !status && flow.layer < c->n_layers; flow.layer++) {
        if (part->states) {
            float *state = part->states->pool + flow.layer * layer_state_floats(c);
            flow.conv_state = (struct state_view){state, part->states->slot_floats, part->slots};
            flow.scan_state = (struct state_view){state + (c->d_conv - 1) * c->d_inner,
                                                  part->states->slot_floats, part->slots};
        }
        status = layer_forward(&flow);
        flow.x = flow.output;
    }
    if (status)
        return model_status(status, error, "layer %" PRId64, flow.layer - 1);
    return model_status(norm(&flow, norm_f_weight(&flow)), error, "final norm");
}

/* ---- training ---- */

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

static void mamba_pass_plan(const struct model_config *c, const struct plan_request *request,
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

static int pass_forward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
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
    return model_status(norm(&last, norm_f_weight(&last)), error, "final norm");
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
    int64_t index = tensor_index(&flow->model->config, flow->layer, kind);
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
                                      .d = fp32_weight(flow, D_SKIP),
                                      .dt_bias = fp32_weight(flow, DT_BIAS),
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
                                      .weight = fp32_weight(flow, CONV),
                                      .bias = fp32_weight(flow, CONV_BIAS),
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
    flow_linear(flow, which, &linear);
    return linear_backward(&flow->linear, &linear, flow->rows, x, x_stride, dy, dy_stride,
                           flow_u(flow, which), dx, dx_stride, accumulate);
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
    status = convolve(flow);
    if (!status)
        status = project_dt(flow);
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
        status = norm(&again, fp32_weight(flow, NORM));
    }
    if (!status)
        status = project_backward(flow, TARGET_IN_PROJ, flow->normed, c->d_model, at[PASS_DXZ], 2 * inner,
                                  below ? at[PASS_ROWS] : NULL, c->d_model, false);
    if (status || !below)
        return status;
    return norm_backward(pass, flow, model_view(flow->model, adapter, tensor_index(c, flow->layer, NORM)));
}

static int pass_backward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                         struct error *error)
{
    const struct model_config *c = &pass->model->config;
    struct layer_flow last = pass_flow(pass, batch, options, c->n_layers);
    int status = norm_backward(pass, &last, model_view(pass->model, pass->adapter, norm_f_index(c)));
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

const struct family family_mamba = {
    .model_type = "mamba",
    .parse_config = parse_config,
    .tensor = tensor,
    .ignored = ignored,
    .target = target,
    .state_floats = state_floats,
    .derived_floats = derived_floats,
    .derive = derive,
    .pass_plan = mamba_pass_plan,
    .runner_plan = runner_plan,
    .pass_forward = pass_forward,
    .pass_backward = pass_backward,
    .forward = forward,
};
