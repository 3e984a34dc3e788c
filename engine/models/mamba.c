/* mamba.c: the Mamba-1 family (Gu and Dao 2023) as Hugging Face's MambaForCausalLM names and shapes it: its
 * config, its table of tensors, what it derives from them, and its place in the table of families. The layer
 * itself is in mamba_layer.c, training in mamba_train.c, inference in mamba_infer.c. Runs on the device's
 * owner thread. */
#include "engine/models/mamba.h"

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

static int64_t layer_tensors(const struct model_config *c)
{
    return LAYER_ALWAYS + c->conv_bias + 2 * c->proj_bias;
}

int64_t mamba_tensor_index(const struct model_config *c, int64_t layer, enum layer_tensor kind)
{
    int64_t first = 1 + layer * layer_tensors(c);
    if (kind < LAYER_ALWAYS)
        return first + (int64_t)kind;
    if (kind == CONV_BIAS)
        return c->conv_bias ? first + LAYER_ALWAYS : -1;
    return c->proj_bias ? first + LAYER_ALWAYS + c->conv_bias + (kind == OUT_BIAS) : -1;
}

int64_t mamba_norm_f_index(const struct model_config *c)
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
    if (index < mamba_norm_f_index(c)) {
        int64_t layer = (index - 1) / layer_tensors(c);
        for (int kind = 0; kind < LAYER_KINDS; kind++)
            if (mamba_tensor_index(c, layer, (enum layer_tensor)kind) == index)
                layer_spec(c, layer, (enum layer_tensor)kind, ret_spec);
        return true;
    }
    if (index == mamba_norm_f_index(c)) {
        *ret_spec = (struct tensor_spec){.n_dims = 1, .shape = {c->d_model}, .fp32 = true};
        strcpy(ret_spec->name, "backbone.norm_f.weight");
        return true;
    }
    if (index > mamba_norm_f_index(c) + 1 || c->tie_embeddings)
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

int64_t mamba_layer_state_floats(const struct model_config *c)
{
    return c->d_inner * (c->d_conv - 1 + c->d_state);
}

static int64_t state_floats(const struct model_config *c)
{
    return c->n_layers * mamba_layer_state_floats(c);
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
        struct scan_prepare_args args = {
            .channels = c->d_inner,
            .d_state = c->d_state,
            .a_log = model_view(model, adapter, mamba_tensor_index(c, layer, A_LOG)).data,
            .a = derived + layer * c->d_state * c->d_inner};
        status = model->ops->scan_prepare(model->device, &args);
    }
    return status;
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
    .recompute_levels = mamba_recompute_levels,
    .pass_plan = mamba_pass_plan,
    .runner_plan = mamba_runner_plan,
    .runner_memory = mamba_runner_memory,
    .pass_forward = mamba_pass_forward,
    .pass_backward = mamba_pass_backward,
    .forward = mamba_forward,
    .step = mamba_step,
};
