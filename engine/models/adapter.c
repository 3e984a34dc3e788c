/* adapter.c: what is trained: the list of its tensors, their one arena on the device, and their first values.
 *
 * Order of parameters. LoRA: the embeddings' pair, then for each layer the pairs of its targets in the order
 * of enum lora_target, A before B. Full: the model's own order of weights. So a tensor is found by arithmetic
 * in every pass, never by name. Arena: parameters, derived, then (trainable) gradients, first and second
 * moments. Runs on the device's owner thread. */
#include "engine/models/internal.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TARGETS_PROJECTIONS = TARGET_IN_PROJ | TARGET_X_PROJ | TARGET_DT_PROJ | TARGET_OUT_PROJ };

static const struct {
    enum lora_target target;
    const char *name;
} target_names[] = {{TARGET_IN_PROJ, "in_proj"},
                    {TARGET_X_PROJ, "x_proj"},
                    {TARGET_DT_PROJ, "dt_proj"},
                    {TARGET_OUT_PROJ, "out_proj"},
                    {TARGET_EMBEDDINGS, "embeddings"}};

int lora_target_from_name(const char *name)
{
    for (size_t i = 0; i < sizeof target_names / sizeof *target_names; i++)
        if (!strcmp(target_names[i].name, name))
            return (int)target_names[i].target;
    return 0;
}

const char *lora_target_name(enum lora_target target)
{
    for (size_t i = 0; i < sizeof target_names / sizeof *target_names; i++)
        if (target_names[i].target == target)
            return target_names[i].name;
    return "unknown";
}

/* ---- the list of parameters ---- */

/* A growing list: parameters NULL = count alone. */
struct parameter_list {
    struct parameter *parameters;
    int64_t n;
};

static void add_parameter(struct parameter_list *list, const char *name, const int64_t *shape, int n_dims,
                          bool decay)
{
    if (list->parameters) {
        struct parameter *parameter = &list->parameters[list->n];
        snprintf(parameter->name, sizeof parameter->name, "%s", name);
        parameter->n_dims = n_dims;
        parameter->slice.count = 1;
        parameter->slice.decay = decay;
        for (int i = 0; i < n_dims; i++) {
            parameter->shape[i] = shape[i];
            parameter->slice.count *= shape[i];
        }
    }
    list->n++;
}

/* PEFT's two tensors for one target. An embedding's factors are parameters of their own there, not modules.
 */
static void add_pair(const struct model *model, const struct lora_config *lora, enum lora_target target,
                     int64_t layer, struct parameter_list *list)
{
    int64_t in, out;
    char module[96], name[128];
    if (!model->family->target(&model->config, target, layer, &in, &out, module))
        return;
    for (int b = 0; b < 2; b++) {
        if (target == TARGET_EMBEDDINGS)
            snprintf(name, sizeof name, "base_model.model.%s.lora_embedding_%c", module, b ? 'B' : 'A');
        else
            snprintf(name, sizeof name, "base_model.model.%s.lora_%c.weight", module, b ? 'B' : 'A');
        const int64_t shape[2] = {b ? out : lora->rank, b ? lora->rank : in};
        add_parameter(list, name, shape, 2, true);
    }
}

static void list_parameters(const struct model *model, enum adaptation adaptation,
                            const struct lora_config *lora, struct parameter_list *list)
{
    if (adaptation == ADAPT_FULL) {
        for (int64_t i = 0; i < model->n_weights; i++) {
            const struct weight *weight = &model->weights[i];
            add_parameter(list, weight->name, weight->shape, weight->n_dims, weight->matrix);
        }
        return;
    }
    if (lora->targets & TARGET_EMBEDDINGS)
        add_pair(model, lora, TARGET_EMBEDDINGS, -1, list);
    for (int64_t layer = 0; layer < model->config.n_layers; layer++)
        for (int bit = 1; bit <= TARGET_OUT_PROJ; bit <<= 1)
            if (lora->targets & bit)
                add_pair(model, lora, (enum lora_target)bit, layer, list);
}

static int check_lora(const struct model *model, const struct lora_config *lora, struct error *error)
{
    if (lora->rank < 1 || lora->rank > LORA_MAX_RANK)
        return error_set_param(error, ERROR_INVALID, "rank", "the rank of an adapter must be from 1 to %d",
                               LORA_MAX_RANK);
    if (!(lora->alpha > 0) || !isfinite(lora->alpha))
        return error_set_param(error, ERROR_INVALID, "alpha", "alpha must be a positive number");
    if (!(lora->dropout >= 0 && lora->dropout < 1))
        return error_set_param(error, ERROR_INVALID, "dropout", "dropout must be at least 0 and less than 1");
    if (!lora->targets || lora->targets & ~TARGETS_ALL)
        return error_set_param(error, ERROR_INVALID, "targets", "an adapter needs at least one known target");
    for (size_t i = 0; i < sizeof target_names / sizeof *target_names; i++) {
        enum lora_target target = target_names[i].target;
        int64_t in, out;
        char module[96];
        if (lora->targets & (int)target &&
            !model->family->target(&model->config, target, target == TARGET_EMBEDDINGS ? -1 : 0, &in, &out,
                                   module))
            return error_set_param(error, ERROR_INVALID, "targets",
                                   "target %s matches no tensor of this %s model", target_names[i].name,
                                   model->config.family);
    }
    return 0;
}

/* The list itself; free() it. */
static int make_parameters(const struct model *model, enum adaptation adaptation,
                           const struct lora_config *lora, struct parameter **ret_parameters, int64_t *ret_n,
                           struct error *error)
{
    struct parameter_list list = {0};
    int code = adaptation == ADAPT_LORA ? check_lora(model, lora, error) : 0;
    if (code)
        return code;
    list_parameters(model, adaptation, lora, &list);
    list.parameters = calloc((size_t)list.n, sizeof *list.parameters);
    if (!list.parameters)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a list of %" PRId64 " parameters", list.n);
    list.n = 0;
    list_parameters(model, adaptation, lora, &list);
    *ret_parameters = list.parameters;
    *ret_n = list.n;
    return 0;
}

static int64_t slices_bytes(const struct parameter *parameters, int64_t n)
{
    int64_t bytes = 0;
    for (int64_t i = 0; i < n; i++)
        bytes += plan_round(parameters[i].slice.count * (int64_t)sizeof(float));
    return bytes;
}

static int64_t derived_bytes(const struct model *model, enum adaptation adaptation)
{
    return adaptation == ADAPT_FULL
               ? plan_round(model->family->derived_floats(&model->config) * (int64_t)sizeof(float))
               : 0;
}

int adapter_bytes(const struct model *model, enum adaptation adaptation, const struct lora_config *lora,
                  int64_t *ret_parameter_bytes, int64_t *ret_gradient_bytes, struct error *error)
{
    struct parameter *parameters;
    int64_t n;
    int code = make_parameters(model, adaptation, lora, &parameters, &n, error);
    if (code)
        return code;
    *ret_gradient_bytes = slices_bytes(parameters, n);
    *ret_parameter_bytes = *ret_gradient_bytes + derived_bytes(model, adaptation);
    free(parameters);
    return 0;
}

/* ---- making one ---- */

int adapter_allocate(struct model *model, enum adaptation adaptation, const struct lora_config *lora,
                     bool trainable, struct adapter **ret_adapter, struct error *error)
{
    struct adapter *adapter = calloc(1, sizeof *adapter);
    if (!adapter)
        return error_set(error, ERROR_NO_MEMORY, "no memory for an adapter");
    adapter->model = model;
    adapter->adaptation = adaptation;
    adapter->trainable = trainable;
    if (adaptation == ADAPT_LORA) {
        adapter->lora = *lora;
        adapter->scale =
            lora->rslora ? lora->alpha / sqrtf((float)lora->rank) : lora->alpha / (float)lora->rank;
    }
    int code = make_parameters(model, adaptation, lora, &adapter->parameters, &adapter->n_parameters, error);
    if (code) {
        adapter_free(adapter);
        return code;
    }
    int64_t copy_bytes = slices_bytes(adapter->parameters, adapter->n_parameters);
    int64_t derived = derived_bytes(model, adaptation);
    adapter->arena_bytes = copy_bytes * (trainable ? 4 : 1) + derived;
    int status = model->ops->memory_alloc(model->device, (size_t)adapter->arena_bytes, &adapter->arena);
    if (!status)
        status = model->ops->zero(model->device, adapter->arena, (size_t)adapter->arena_bytes);
    if (status) {
        code = model_status(status, error, "%" PRId64 " bytes of trainable parameters", adapter->arena_bytes);
        adapter_free(adapter);
        return code;
    }
    char *next = adapter->arena;
    adapter->derived = derived ? (float *)(void *)(next + copy_bytes) : NULL;
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        struct param_slice *slice = &adapter->parameters[i].slice;
        slice->param = (float *)(void *)next;
        if (trainable) {
            slice->grad = (float *)(void *)(next + copy_bytes + derived);
            slice->m = (float *)(void *)(next + 2 * copy_bytes + derived);
            slice->v = (float *)(void *)(next + 3 * copy_bytes + derived);
        }
        next += plan_round(slice->count * (int64_t)sizeof(float));
    }
    *ret_adapter = adapter;
    return 0;
}

static float standard_normal(uint64_t seed, uint64_t counter)
{
    const double two_pi = 6.283185307179586;
    double u = 1.0 - (double)philox_uniform(seed, 2 * counter),
           v = (double)philox_uniform(seed, 2 * counter + 1);
    return (float)(sqrt(-2.0 * log(u)) * cos(two_pi * v)); /* Box and Muller 1958 */
}

/* The factor that is drawn, A of a projection or B of the embeddings; the other stays zero, so that a new
 * adapter changes nothing. */
static int draw_factors(struct adapter *adapter, uint64_t seed, struct error *error)
{
    const struct model *model = adapter->model;
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        struct parameter *parameter = &adapter->parameters[i];
        bool embeddings = adapter->lora.targets & TARGET_EMBEDDINGS && i < 2;
        if ((i & 1) != (embeddings ? 1 : 0))
            continue;
        float *values = malloc((size_t)parameter->slice.count * sizeof *values);
        if (!values)
            return error_set(error, ERROR_NO_MEMORY, "no memory to initialise %s", parameter->name);
        /* The upper half of the counters is the initialisation's: shuffling and dropout stay below. */
        uint64_t counter = UINT64_C(1) << 63 | (uint64_t)i << 40;
        float bound = 1.0f / sqrtf((float)parameter->shape[1]);
        for (int64_t k = 0; k < parameter->slice.count; k++)
            values[k] = embeddings ? standard_normal(seed, counter / 2 + (uint64_t)k)
                                   : (2.0f * philox_uniform(seed, counter + (uint64_t)k) - 1.0f) * bound;
        int status = model->ops->copy_in(model->device, parameter->slice.param, values,
                                         (size_t)parameter->slice.count * sizeof *values);
        free(values);
        if (status)
            return model_status(status, error, "%s", parameter->name);
    }
    return 0;
}

static int copy_weights(struct adapter *adapter, struct error *error)
{
    const struct model *model = adapter->model;
    for (int64_t i = 0; i < model->n_weights; i++) {
        const struct weight *weight = &model->weights[i];
        int status = model->ops->cast(model->device, adapter->parameters[i].slice.param, TYPE_F32,
                                      weight->data, weight->type, weight->count);
        if (status)
            return model_status(status, error, "master copy of %s", weight->name);
    }
    return model_status(model->family->derive(model, adapter, adapter->derived), error, "master weights");
}

int adapter_create(struct model *model, enum adaptation adaptation, const struct lora_config *lora,
                   uint64_t seed, struct adapter **ret_adapter, struct error *error)
{
    struct adapter *adapter;
    int code = adapter_allocate(model, adaptation, lora, true, &adapter, error);
    if (code)
        return code;
    code = adaptation == ADAPT_FULL ? copy_weights(adapter, error) : draw_factors(adapter, seed, error);
    if (code)
        adapter_free(adapter);
    else
        *ret_adapter = adapter;
    return code;
}

int adapter_make_copies(struct adapter *adapter, struct error *error)
{
    const struct model *model = adapter->model;
    const enum kernel_type type = model->act;
    if (adapter->adaptation != ADAPT_FULL || adapter->trainable || type == TYPE_F32)
        return 0;
    int64_t bytes = 0;
    for (int64_t i = 0; i < model->n_weights; i++)
        if (!model->weights[i].fp32)
            bytes += plan_round(model->weights[i].count * (int64_t)kernel_type_size(type));
    adapter->copies = calloc((size_t)model->n_weights, sizeof *adapter->copies);
    if (!adapter->copies)
        return error_set(error, ERROR_NO_MEMORY, "no memory for an adapter");
    int status = model->ops->memory_alloc(model->device, (size_t)bytes, &adapter->copies_arena);
    char *next = adapter->copies_arena;
    for (int64_t i = 0; i < model->n_weights && !status; i++) {
        const struct weight *weight = &model->weights[i];
        if (weight->fp32)
            continue;
        adapter->copies[i] = next;
        status = model->ops->cast(model->device, next, type, adapter->parameters[i].slice.param, TYPE_F32,
                                  weight->count);
        next += plan_round(weight->count * (int64_t)kernel_type_size(type));
    }
    return model_status(status, error, "%" PRId64 " bytes of weights in %s", bytes, kernel_type_name(type));
}

void adapter_free(struct adapter *adapter)
{
    if (!adapter)
        return;
    if (adapter->copies_arena)
        adapter->model->ops->memory_free(adapter->model->device, adapter->copies_arena);
    free(adapter->copies);
    if (adapter->arena)
        adapter->model->ops->memory_free(adapter->model->device, adapter->arena);
    free(adapter->parameters);
    free(adapter);
}

struct parameter *adapter_find(struct adapter *adapter, const char *name)
{
    for (int64_t i = 0; i < adapter->n_parameters; i++)
        if (!strcmp(adapter->parameters[i].name, name))
            return &adapter->parameters[i];
    return NULL;
}

/* ---- in a pass ---- */

bool adapter_trains(const struct adapter *adapter, enum lora_target target)
{
    return adapter->adaptation == ADAPT_FULL || adapter->lora.targets & (int)target;
}

bool adapter_pair(const struct adapter *adapter, enum lora_target target, int64_t layer,
                  struct lora_pair *ret_pair)
{
    if (!adapter || adapter->adaptation != ADAPT_LORA || !(adapter->lora.targets & (int)target))
        return false;
    int targets = adapter->lora.targets, index = 0;
    if (target != TARGET_EMBEDDINGS)
        index = !!(targets & TARGET_EMBEDDINGS) +
                (int)layer * __builtin_popcount((unsigned)targets & TARGETS_PROJECTIONS) +
                __builtin_popcount((unsigned)targets & ((unsigned)target - 1));
    ret_pair->a = &adapter->parameters[2 * index].slice;
    ret_pair->b = &adapter->parameters[2 * index + 1].slice;
    return true;
}

void adapter_embed(const struct adapter *adapter, struct embedding_forward_args *args)
{
    struct lora_pair pair;
    if (!adapter_pair(adapter, TARGET_EMBEDDINGS, -1, &pair))
        return;
    args->rank = adapter->lora.rank;
    args->lora_a = pair.a->param;
    args->lora_b = pair.b->param;
    args->scale = adapter->scale;
}

int adapter_refresh(const struct adapter *adapter, struct error *error)
{
    const struct model *model = adapter->model;
    int status = 0;
    for (int64_t i = 0; !status && i < adapter->n_parameters; i++) {
        const struct param_slice *slice = &adapter->parameters[i].slice;
        if (slice->copy)
            status = model->ops->cast(model->device, slice->copy, slice->copy_type, slice->param, TYPE_F32,
                                      slice->count);
    }
    return model_status(status, error, "copies of the parameters");
}

int adapter_renew(const struct adapter *adapter, struct error *error)
{
    if (!adapter || adapter->adaptation != ADAPT_FULL || !adapter->trainable)
        return 0;
    return model_status(adapter->model->family->derive(adapter->model, adapter, adapter->derived), error,
                        "master weights");
}
