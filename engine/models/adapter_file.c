/* adapter_file.c: adapters on disk: PEFT's layout for LoRA (adapter_config.json, adapter_model.safetensors),
 * a model folder for a full fine-tune. Reading is strict: what PEFT offers and this room does not do is
 * refused by name, since an adapter that is half applied is worse than none. Blocking; the device's owner
 * thread. */
#include "engine/models/internal.h"

#include "base/file.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TOKENIZER_LIMIT = 64 << 20 };

static int join(char path[PATH_MAX], const char *folder, const char *name, struct error *error)
{
    if (snprintf(path, PATH_MAX, "%s/%s", folder, name) >= PATH_MAX)
        return error_set(error, ERROR_INVALID, "path too long: %s", folder);
    return 0;
}

/* ---- reading PEFT's config ---- */

/* Keys that would change what the adapter computes, with the values that leave it as it is. Absent and null
 * are always fine. */
static int check_neutral(const json_t *json, const char *path, struct error *error)
{
    static const char *const off[] = {
        "fan_in_fan_out",      "use_dora",        "lora_bias",         "megatron_config",
        "layers_to_transform", "exclude_modules", "target_parameters", "trainable_token_indices",
        "modules_to_save",     "rank_pattern",    "alpha_pattern",     "alora_invocation_tokens",
        "layer_replication",   "use_qalora"};
    /* The others (pissa, olora, loftq ...) start from a base whose weights they change. */
    static const char *const plain_starts[] = {"gaussian", "eva", "orthogonal"};
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        const json_t *value = json_object_get(json, off[i]);
        bool neutral = !value || json_is_null(value) || json_is_false(value) ||
                       (json_is_object(value) && !json_object_size(value)) ||
                       (json_is_array(value) && !json_array_size(value));
        if (!neutral)
            return error_set_param(error, ERROR_UNSUPPORTED, off[i], "%s: %s is not supported", path, off[i]);
    }
    const json_t *bias = json_object_get(json, "bias");
    if (bias && (!json_is_string(bias) || strcmp(json_string_value(bias), "none")))
        return error_set_param(error, ERROR_UNSUPPORTED, "bias", "%s: bias must be \"none\"", path);
    const json_t *start = json_object_get(json, "init_lora_weights");
    bool plain = !json_is_string(start);
    for (size_t i = 0; !plain && i < sizeof plain_starts / sizeof *plain_starts; i++)
        plain = !strcmp(json_string_value(start), plain_starts[i]);
    if (!plain)
        return error_set_param(
            error, ERROR_UNSUPPORTED, "init_lora_weights",
            "%s: init_lora_weights \"%.32s\" is not supported: it changes the base model's "
            "weights",
            path, json_string_value(start));
    return 0;
}

static int parse_targets(const json_t *json, const char *path, int *ret_targets, struct error *error)
{
    const json_t *modules = json_object_get(json, "target_modules");
    int targets = 0;
    if (!json_is_array(modules) || !json_array_size(modules))
        return error_set_param(error, ERROR_UNSUPPORTED, "target_modules",
                               "%s: target_modules must be a list of module names", path);
    for (size_t i = 0; i < json_array_size(modules); i++) {
        const char *name = json_string_value(json_array_get(modules, i));
        int target = name ? lora_target_from_name(name) : 0;
        if (!target)
            return error_set_param(error, ERROR_INVALID, "target_modules",
                                   "%s: target %.64s matches no tensor of the model", path,
                                   name ? name : "that is not a string");
        targets |= target;
    }
    *ret_targets = targets;
    return 0;
}

static int parse_peft_config(const char *path, struct lora_config *ret_lora, struct error *error)
{
    char *text = NULL;
    size_t length;
    struct lora_config lora = {0};
    static const char *const kinds[] = {"LORA", NULL};
    const char *kind;
    int64_t rank;
    double alpha, dropout;
    int code = file_read(path, CONFIG_LIMIT, &text, &length, error);
    if (code)
        return code;
    json_error_t json_error;
    json_t *json = json_loadb(text, length, JSON_REJECT_DUPLICATES, &json_error);
    if (!json_is_object(json)) {
        code = error_set(error, ERROR_CORRUPT, "%s is not a JSON object: %s", path,
                         json ? "another value" : json_error.text);
        goto done;
    }
    if ((code = config_choice(json, "peft_type", NULL, kinds, &kind, error)) ||
        (code = config_integer(json, "r", CONFIG_REQUIRED, 1, LORA_MAX_RANK, &rank, error)) ||
        (code = config_number(json, "lora_alpha", 8, 1e-6, 1e6, &alpha, error)) ||
        (code = config_number(json, "lora_dropout", 0, 0, 0.999, &dropout, error)) ||
        (code = config_boolean(json, "use_rslora", false, &lora.rslora, error))) {
        error_prefix(error, "%s: ", path);
        goto done;
    }
    if (!kind) {
        code = error_set_param(error, ERROR_INVALID, "peft_type", "%s: peft_type is missing", path);
        goto done;
    }
    if ((code = check_neutral(json, path, error)) || (code = parse_targets(json, path, &lora.targets, error)))
        goto done;
    lora.rank = (int32_t)rank;
    lora.alpha = (float)alpha;
    lora.dropout = (float)dropout;
    *ret_lora = lora;
done:
    json_decref(json);
    free(text);
    return code;
}

/* ---- loading ---- */

static int load_lora(struct adapter *adapter, const char *path, struct error *error)
{
    struct safetensors *file = NULL;
    int code = safetensors_open(path, &file, error);
    if (code)
        return code;
    struct uploader uploader = {.ops = adapter->model->ops, .device = adapter->model->device};
    for (int64_t i = 0; !code && i < adapter->n_parameters; i++) {
        const struct parameter *parameter = &adapter->parameters[i];
        const struct tensor_view *view;
        struct tensor_spec spec = {.n_dims = parameter->n_dims};
        memcpy(spec.shape, parameter->shape, sizeof spec.shape);
        snprintf(spec.name, sizeof spec.name, "%s", parameter->name);
        code = model_find_tensor(file, &spec, path, &view, error);
        if (!code)
            code = uploader_copy(&uploader, view, parameter->slice.param, TYPE_F32, error);
    }
    uploader_free(&uploader);
    for (int64_t i = 0; !code && i < safetensors_count(file); i++) {
        const char *name = safetensors_at(file, i)->name;
        if (!adapter_find(adapter, name))
            code = error_set(error, ERROR_INVALID,
                             "%s: tensor %s belongs to no target of its adapter_config.json", path, name);
    }
    safetensors_close(file);
    return code;
}

static int load_full(struct adapter *adapter, const char *folder, struct error *error)
{
    const struct model *model = adapter->model;
    struct safetensors *file = NULL;
    int code = safetensors_open(folder, &file, error);
    if (code)
        return code;
    struct uploader uploader = {.ops = model->ops, .device = model->device};
    code = model_check_names(&model->config, model->family, file, folder, error);
    for (int64_t i = 0; !code && i < model->n_weights; i++) {
        const struct tensor_view *view;
        struct tensor_spec spec;
        model->family->tensor(&model->config, i, &spec);
        code = model_find_tensor(file, &spec, folder, &view, error);
        if (!code)
            code = uploader_copy(&uploader, view, adapter->parameters[i].slice.param, TYPE_F32, error);
    }
    uploader_free(&uploader);
    if (!code)
        code = model_status(model->family->derive(model, adapter, adapter->derived), error, "%s", folder);
    safetensors_close(file);
    return code;
}

int adapter_load(struct model *model, const char *folder, bool trainable, struct adapter **ret_adapter,
                 struct error *error)
{
    char config_path[PATH_MAX], path[PATH_MAX];
    struct lora_config lora = {0};
    struct adapter *adapter = NULL;
    int code = join(config_path, folder, "adapter_config.json", error);
    if (!code)
        code = join(path, folder, "adapter_model.safetensors", error);
    if (code)
        return code;
    bool is_lora = !access(config_path, F_OK);
    if (is_lora)
        code = parse_peft_config(config_path, &lora, error);
    if (!code)
        code = adapter_allocate(model, is_lora ? ADAPT_LORA : ADAPT_FULL, &lora, trainable, &adapter, error);
    if (code)
        return code;
    code = is_lora ? load_lora(adapter, path, error) : load_full(adapter, folder, error);
    if (!code)
        code = adapter_make_copies(adapter, error);
    if (code)
        adapter_free(adapter);
    else
        *ret_adapter = adapter;
    return code;
}

/* ---- saving ---- */

/* The shortest decimal that reads back as this float: 0.1, not 0.10000000149. */
static json_t *float_json(float value)
{
    char text[32];
    if (value == floorf(value) && fabsf(value) < 1e9f)
        return json_integer((json_int_t)value);
    for (int digits = 1; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)value);
        if (strtof(text, NULL) == value)
            break;
    }
    return json_real(strtod(text, NULL));
}

static int save_peft_config(const struct adapter *adapter, const char *folder, const char *base_name,
                            struct error *error)
{
    char path[PATH_MAX];
    int code = join(path, folder, "adapter_config.json", error);
    if (code)
        return code;
    json_t *modules = json_array();
    for (int bit = 1; bit <= TARGET_EMBEDDINGS; bit <<= 1)
        if (adapter->lora.targets & bit)
            json_array_append_new(modules, json_string(lora_target_name((enum lora_target)bit)));
    json_t *json = json_pack(
        "{s:s, s:s, s:s, s:i, s:o, s:o, s:o, s:s, s:b, s:b, s:b, s:{}, s:{}, s:n}", "peft_type", "LORA",
        "task_type", "CAUSAL_LM", "base_model_name_or_path", base_name, "r", (int)adapter->lora.rank,
        "lora_alpha", float_json(adapter->lora.alpha), "lora_dropout", float_json(adapter->lora.dropout),
        "target_modules", modules, "bias", "none", "fan_in_fan_out", 0, "inference_mode", 1, "use_rslora",
        (int)adapter->lora.rslora, "rank_pattern", "alpha_pattern", "modules_to_save");
    char *text = json ? json_dumps(json, JSON_INDENT(2)) : NULL;
    json_decref(json);
    if (!text)
        return error_set(error, ERROR_INVALID, "the base model's name is not UTF-8, or memory ran out");
    code = file_write_whole(path, text, strlen(text), error);
    free(text);
    return code;
}

/* All parameters to host memory, parameter i as types[i] (fp32 when types is NULL), and from there to the
 * file. */
static int save_tensors(const struct adapter *adapter, const char *path, const enum kernel_type *types,
                        struct error *error)
{
    static const char *const metadata[] = {"format", "pt", NULL};
    const struct model *model = adapter->model;
    const struct kernel_ops *host = kernels_reference();
    struct kernel_device *host_device = NULL;
    int64_t n = adapter->n_parameters, bytes = 0, widest = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t count = adapter->parameters[i].slice.count;
        bytes += plan_round(count * (int64_t)kernel_type_size(types ? types[i] : TYPE_F32));
        widest = count > widest ? count : widest;
    }
    struct tensor_view *views = calloc((size_t)n, sizeof *views);
    char *data = malloc((size_t)bytes), *next = data;
    float *staged = malloc((size_t)widest * sizeof *staged);
    int code = 0, status = views && data && staged ? host->device_open(0, 1, &host_device) : KERNEL_NO_MEMORY;
    for (int64_t i = 0; !status && i < n; i++) {
        const struct parameter *parameter = &adapter->parameters[i];
        enum kernel_type type = types ? types[i] : TYPE_F32;
        size_t count = (size_t)parameter->slice.count;
        views[i] = (struct tensor_view){.name = parameter->name,
                                        .type = type,
                                        .n_dims = parameter->n_dims,
                                        .count = parameter->slice.count,
                                        .data = next};
        memcpy(views[i].shape, parameter->shape, sizeof views[i].shape);
        status = model->ops->copy_out(model->device, type == TYPE_F32 ? (void *)next : (void *)staged,
                                      parameter->slice.param, count * sizeof(float));
        if (!status && type != TYPE_F32)
            status = host->cast(host_device, next, type, staged, TYPE_F32, parameter->slice.count);
        next += plan_round((int64_t)(count * kernel_type_size(type)));
    }
    code = model_status(status, error, "%s", path);
    if (!code)
        code = safetensors_write(path, views, n, metadata, error);
    if (host_device)
        host->device_close(host_device);
    free(staged);
    free(data);
    free(views);
    return code;
}

/* Copy one of the base model's files; one that the base lacks is left out. */
static int copy_file(const struct adapter *adapter, const char *folder, const char *name, struct error *error)
{
    char from[PATH_MAX], to[PATH_MAX];
    char *data;
    size_t length;
    int code = join(from, adapter->model->folder, name, error);
    if (!code)
        code = join(to, folder, name, error);
    if (code || (access(from, F_OK) && errno == ENOENT))
        return code;
    code = file_read(from, TOKENIZER_LIMIT, &data, &length, error);
    if (code)
        return code;
    code = file_write_whole(to, data, length, error);
    free(data);
    return code;
}

static int save_full(const struct adapter *adapter, const char *folder, struct error *error)
{
    static const char *const beside[] = {"config.json", "tokenizer.json", "tokenizer_config.json"};
    const struct model *model = adapter->model;
    char path[PATH_MAX];
    int code = join(path, folder, "model.safetensors", error);
    if (code)
        return code;
    enum kernel_type *types = malloc((size_t)model->n_weights * sizeof *types);
    if (!types)
        return error_set(error, ERROR_NO_MEMORY, "no memory to save %s", path);
    for (int64_t i = 0; i < model->n_weights; i++)
        types[i] = model->weights[i].file_type;
    code = save_tensors(adapter, path, types, error);
    free(types);
    for (size_t i = 0; !code && i < sizeof beside / sizeof *beside; i++)
        code = copy_file(adapter, folder, beside[i], error);
    return code;
}

int adapter_save(const struct adapter *adapter, const char *folder, const char *base_name,
                 struct error *error)
{
    char path[PATH_MAX];
    if (adapter->adaptation == ADAPT_FULL)
        return save_full(adapter, folder, error);
    int code = join(path, folder, "adapter_model.safetensors", error);
    if (!code)
        code = save_tensors(adapter, path, NULL, error);
    if (!code)
        code = save_peft_config(adapter, folder, base_name, error);
    return code;
}
