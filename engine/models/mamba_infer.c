/* mamba_infer.c: Mamba-1 layers with recurrent states, for runner.c.
 *
 * A sequence's state holds for each layer the convolution's [d_conv-1,c] and the scan's [n,c], so one step is
 * the same forward with one token a sequence. Where the device has a step of its own for that, it is one op. */
#include "engine/models/mamba_layer.h"

#include <inttypes.h>

enum { RUN_XZ = RUNNER_FAMILY, RUN_XC, RUN_X_DBL, RUN_DT, RUN_Y, RUN_OUTPUT, RUN_SCRATCH, RUN_STEP };

/* What mamba_step hands to the op, each step anew: pointers into the model and its adapters. */
enum { STEP_ADAPTERS_MOST = 16 };
struct step_memory {
    struct mamba_step_layer *layers;     /* [n_layers] */
    struct mamba_step_adapter *adapters; /* [STEP_ADAPTERS_MOST] */
    struct mamba_step_lora *lora;        /* [STEP_ADAPTERS_MOST,n_layers] */
    int32_t *row_adapters;               /* [max_seqs] */
    size_t bytes;
};

static struct step_memory step_memory(const struct model_config *c, int32_t max_seqs, void *base)
{
    const size_t layers = (size_t)c->n_layers;
    const size_t lora = layers * sizeof(struct mamba_step_layer);
    const size_t adapters = lora + STEP_ADAPTERS_MOST * layers * sizeof(struct mamba_step_lora);
    const size_t rows = adapters + STEP_ADAPTERS_MOST * sizeof(struct mamba_step_adapter);
    char *at = base;
    struct step_memory memory = {.bytes = rows + (size_t)max_seqs * sizeof(int32_t)};
    if (at) {
        memory.layers = (void *)at;
        memory.lora = (void *)(at + lora);
        memory.adapters = (void *)(at + adapters);
        memory.row_adapters = (void *)(at + rows);
    }
    return memory;
}

size_t mamba_runner_memory(const struct model_config *c, int32_t max_seqs)
{
    return step_memory(c, max_seqs, NULL).bytes;
}

static struct mamba_step_args step_sizes(const struct model_config *c, enum kernel_type act)
{
    return (struct mamba_step_args){.d_model = c->d_model,
                                    .d_inner = c->d_inner,
                                    .d_state = c->d_state,
                                    .d_conv = c->d_conv,
                                    .dt_rank = c->dt_rank,
                                    .n_layers = c->n_layers,
                                    .vocab = c->vocab_size,
                                    .eps = c->norm_eps,
                                    .type = act};
}

void mamba_runner_plan(const struct model_config *c, int64_t max_tokens, int32_t max_seqs,
                       enum kernel_type act, const struct kernel_ops *ops, struct plan *plan)
{
    (void)max_seqs;
    const int64_t size = (int64_t)kernel_type_size(act);
    plan_add(plan, RUN_XZ, PLAN_WORKSPACE, max_tokens * 2 * c->d_inner, size);
    plan_add(plan, RUN_XC, PLAN_WORKSPACE, max_tokens * c->d_inner, size);
    plan_add(plan, RUN_X_DBL, PLAN_WORKSPACE, max_tokens * (c->dt_rank + 2 * c->d_state), size);
    plan_add(plan, RUN_DT, PLAN_WORKSPACE, max_tokens * c->d_inner, size);
    plan_add(plan, RUN_Y, PLAN_WORKSPACE, max_tokens * c->d_inner, size);
    plan_add(plan, RUN_OUTPUT, PLAN_WORKSPACE, max_tokens * c->d_model, size);
    plan_add(plan, RUN_SCRATCH, PLAN_WORKSPACE, layer_linear_workspace(c, ops, max_tokens, 0), 1);
    if (ops->mamba_step) {
        struct mamba_step_args sizes = step_sizes(c, act);
        plan_add(plan, RUN_STEP, PLAN_WORKSPACE, ops->mamba_step_workspace(&sizes), 1);
    }
}

int mamba_forward(struct runner *runner, const struct forward_part *part, struct error *error)
{
    const struct model *model = runner->model;
    const struct model_config *c = &model->config;
    const struct weight_copies copies = runner_copies(model, part->full);
    void *const *at = runner->buffers;
    const int64_t d = c->d_model, first = part->row_begin;
    struct layer_flow flow = {
        .model = model,
        .adapter = part->full,
        .runner = runner,
        .part = part,
        .copies = &copies,
        .act = model->act,
        .tf32 = model->tf32,
        .workspace = at[RUN_SCRATCH],
        .rows = part->rows,
        .n_seqs = part->n_seqs,
        .seq_starts = part->seq_starts,
        .residual = (float *)at[RUNNER_RESIDUAL] + first * d,
        .residual_out = (float *)at[RUNNER_RESIDUAL] + first * d,
        .normed = element_at(at[RUNNER_HIDDEN], first * d, model->act),
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
            float *state = part->states->pool + flow.layer * mamba_layer_state_floats(c);
            const int64_t stride = part->states->slot_floats, conv = (c->d_conv - 1) * c->d_inner;
            flow.conv_from = (struct state_view){state, stride, part->from};
            flow.conv_to = (struct state_view){state, stride, part->slots};
            flow.scan_from = (struct state_view){state + conv, stride, part->from};
            flow.scan_to = (struct state_view){state + conv, stride, part->slots};
        }
        status = layer_forward(&flow);
        flow.x = flow.output;
        if (!status && runner->yield)
            runner->yield(runner->yield_arg);
    }
    if (status)
        return model_status(status, error, "layer %" PRId64, flow.layer - 1);
    return model_status(layer_norm(&flow, layer_norm_f(&flow)), error, "final norm");
}

/* ---- a step as one op ---- */

/* The tensors of one layer of one set of weights. */
struct layer_tensors {
    const struct model *model;
    const struct adapter *full;
    struct weight_copies copies;
    int64_t layer;
    bool uniform; /* all matrices have the type of inference */
};

static const void *matrix(struct layer_tensors *tensors, enum layer_tensor kind)
{
    int64_t index = mamba_tensor_index(&tensors->model->config, tensors->layer, kind);
    struct weight_view view = model_product_view(tensors->model, tensors->full, &tensors->copies, index);
    tensors->uniform = tensors->uniform && view.type == tensors->model->act;
    return view.data;
}

static const float *vector(const struct layer_tensors *tensors, enum layer_tensor kind)
{
    int64_t index = mamba_tensor_index(&tensors->model->config, tensors->layer, kind);
    return index < 0 ? NULL : model_view(tensors->model, tensors->full, index).data;
}

/* False where a matrix has another type than the activations. */
static bool bind_layers(const struct model *model, const struct adapter *full,
                        struct mamba_step_layer *layers)
{
    const struct model_config *c = &model->config;
    struct layer_tensors tensors = {model, full, runner_copies(model, full), 0, true};
    for (; tensors.layer < c->n_layers; tensors.layer++)
        layers[tensors.layer] = (struct mamba_step_layer){
            .norm = vector(&tensors, NORM),
            .in_proj = matrix(&tensors, IN_PROJ),
            .x_proj = matrix(&tensors, X_PROJ),
            .dt_proj = matrix(&tensors, DT_PROJ),
            .out_proj = matrix(&tensors, OUT_PROJ),
            .in_bias = vector(&tensors, IN_BIAS),
            .out_bias = vector(&tensors, OUT_BIAS),
            .conv = vector(&tensors, CONV),
            .conv_bias = vector(&tensors, CONV_BIAS),
            .a = model_derived(model, full) + tensors.layer * c->d_state * c->d_inner,
            .d = vector(&tensors, D_SKIP),
            .dt_bias = vector(&tensors, DT_BIAS),
        };
    return tensors.uniform;
}

static void bind_adapter(const struct model *model, const struct adapter *adapter,
                         struct mamba_step_lora *lora, struct mamba_step_adapter *ret_adapter)
{
    struct lora_pair pair;
    *ret_adapter =
        (struct mamba_step_adapter){.rank = adapter->lora.rank, .scale = adapter->scale, .layers = lora};
    if (adapter_pair(adapter, TARGET_EMBEDDINGS, -1, &pair)) {
        ret_adapter->embed_a = pair.a->param;
        ret_adapter->embed_b = pair.b->param;
    }
    for (int64_t layer = 0; layer < model->config.n_layers; layer++) {
        struct mamba_step_lora *to = &lora[layer];
        *to = (struct mamba_step_lora){0};
        if (adapter_pair(adapter, TARGET_IN_PROJ, layer, &pair)) {
            to->in_a = pair.a->param;
            to->in_b = pair.b->param;
        }
        if (adapter_pair(adapter, TARGET_X_PROJ, layer, &pair)) {
            to->x_a = pair.a->param;
            to->x_b = pair.b->param;
        }
        if (adapter_pair(adapter, TARGET_DT_PROJ, layer, &pair)) {
            to->dt_a = pair.a->param;
            to->dt_b = pair.b->param;
        }
        if (adapter_pair(adapter, TARGET_OUT_PROJ, layer, &pair)) {
            to->out_a = pair.a->param;
            to->out_b = pair.b->param;
        }
    }
}

/* The adapters of the part's spans, each once. False where there are too many. */
static bool bind_adapters(const struct model *model, const struct forward_part *part,
                          const struct step_memory *memory, int32_t *ret_count)
{
    const struct adapter *bound[STEP_ADAPTERS_MOST];
    int32_t count = 0;
    for (int32_t i = 0; i < part->n_spans; i++) {
        const struct lora_span *span = &part->spans[i];
        int32_t at = span->adapter ? 0 : -1;
        while (at >= 0 && at < count && bound[at] != span->adapter)
            at++;
        if (at == STEP_ADAPTERS_MOST)
            return false;
        if (at == count) {
            bound[count] = span->adapter;
            bind_adapter(model, span->adapter, memory->lora + count * model->config.n_layers,
                         &memory->adapters[count]);
            count++;
        }
        for (int64_t row = 0; row < span->rows; row++)
            memory->row_adapters[span->row_begin + row] = at;
    }
    *ret_count = count;
    return true;
}

int mamba_step(struct runner *runner, const struct forward_part *part, const int32_t *ids)
{
    const struct model *model = runner->model;
    const struct model_config *c = &model->config;
    const struct weight_copies copies = runner_copies(model, part->full);
    if (!model->ops->mamba_step)
        return KERNEL_UNSUPPORTED;
    struct step_memory memory = step_memory(c, runner->max_seqs, runner->family_memory);
    struct weight_view embedding = model_product_view(model, part->full, &copies, model->embedding);
    struct weight_view head = model_product_view(model, part->full, &copies, model->head);
    struct mamba_step_args args = step_sizes(c, model->act);
    if (embedding.type != model->act || head.type != model->act ||
        !bind_layers(model, part->full, memory.layers) ||
        !bind_adapters(model, part, &memory, &args.n_adapters))
        return KERNEL_UNSUPPORTED;
    args.rows = part->rows;
    args.embedding = embedding.data;
    args.head = head.data;
    args.norm_f = model_view(model, part->full, mamba_norm_f_index(c)).data;
    args.layers = memory.layers;
    args.adapters = memory.adapters;
    args.ids = ids;
    args.slots = part->slots;
    args.row_adapters = args.n_adapters ? memory.row_adapters : NULL;
    args.states = part->states->pool;
    args.slot_stride = part->states->slot_floats;
    args.hidden = runner->buffers[RUNNER_HIDDEN];
    args.logits = runner->buffers[RUNNER_LOGITS];
    args.workspace = runner->buffers[RUN_STEP];
    return model->ops->mamba_step(model->device, &args);
}
