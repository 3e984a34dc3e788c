/* model.c: opening a base model: its config, the check of every tensor against what the config implies, and
 * one device arena that holds all weights. Also the sequences' recurrent states, a pool of equal slots. Runs
 * on the device's owner thread; an open model does not change. */
#include "engine/models/internal.h"

#include "base/file.h"

#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int model_status(int status, struct error *error, const char *format, ...)
{
    static const struct {
        int status, code;
    } codes[] = {{KERNEL_INVALID, ERROR_INTERNAL},
                 {KERNEL_UNSUPPORTED, ERROR_UNSUPPORTED},
                 {KERNEL_NO_MEMORY, ERROR_NO_MEMORY},
                 {KERNEL_DEVICE_LOST, ERROR_DEVICE}};
    if (!status)
        return 0;
    int code = ERROR_INTERNAL;
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (codes[i].status == status)
            code = codes[i].code;
    char what[128];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    return error_set(error, code, "%s: %s", what, kernel_status_text(status));
}

/* ---- config ---- */

static int read_config(const char *folder, struct model_config *ret_config, const struct family **ret_family,
                       struct error *error)
{
    char path[PATH_MAX];
    char *text = NULL;
    size_t length;
    if (snprintf(path, sizeof path, "%s/config.json", folder) >= (int)sizeof path)
        return error_set(error, ERROR_INVALID, "path too long: %s", folder);
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
    const char *model_type = json_string_value(json_object_get(json, "model_type"));
    const struct family *family = model_type ? family_find(model_type) : NULL;
    if (!family) {
        code = error_set_param(error, ERROR_UNSUPPORTED, "model_type",
                               "%s: model_type %s%.64s%s is not supported", path, model_type ? "\"" : "",
                               model_type ? model_type : "(missing)", model_type ? "\"" : "");
        goto done;
    }
    struct model_config config = {0};
    code = family->parse_config(json, &config, error);
    if (code) {
        error_prefix(error, "%s: ", path);
        goto done;
    }
    snprintf(config.family, sizeof config.family, "%s", family->model_type);
    *ret_config = config;
    *ret_family = family;
done:
    json_decref(json);
    free(text);
    return code;
}

/* ---- tensors ---- */

static void format_shape(char *text, size_t size, const int64_t *shape, int n_dims)
{
    size_t used = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < n_dims && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRId64, i ? ", " : "", shape[i]);
    if (used < size)
        snprintf(text + used, size - used, "]");
}

int model_find_tensor(const struct safetensors *file, const struct tensor_spec *spec, const char *path,
                      const struct tensor_view **ret_view, struct error *error)
{
    const struct tensor_view *view = safetensors_find(file, spec->name);
    if (!view && *spec->old_name)
        view = safetensors_find(file, spec->old_name);
    if (!view)
        return error_set(error, ERROR_CORRUPT, "%s: tensor %s is missing", path, spec->name);
    if (view->type == TYPE_I32)
        return error_set(error, ERROR_CORRUPT, "%s: tensor %s holds integers", path, view->name);
    bool same = view->n_dims == spec->n_dims;
    for (int i = 0; same && i < spec->n_dims; i++)
        same = view->shape[i] == spec->shape[i];
    if (!same) {
        char has[96], wants[96];
        format_shape(has, sizeof has, view->shape, view->n_dims);
        format_shape(wants, sizeof wants, spec->shape, spec->n_dims);
        return error_set(error, ERROR_CORRUPT, "%s: tensor %s has shape %s where the config implies %s", path,
                         view->name, has, wants);
    }
    *ret_view = view;
    return 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

int model_check_names(const struct model_config *config, const struct family *family,
                      const struct safetensors *file, const char *path, struct error *error)
{
    struct tensor_spec spec;
    int64_t n = 0, known = 0;
    while (family->tensor(config, n, &spec))
        n++;
    char(*names)[sizeof spec.name] = malloc((size_t)(2 * n) * sizeof *names);
    const char **sorted = malloc((size_t)(2 * n) * sizeof *sorted);
    int code = names && sorted ? 0 : error_set(error, ERROR_NO_MEMORY, "no memory to check %s", path);
    for (int64_t i = 0; !code && i < n; i++) {
        family->tensor(config, i, &spec);
        /* A tensor in both spellings: the older one is the stranger. */
        bool old = *spec.old_name && !safetensors_find(file, spec.name);
        memcpy(names[known], old ? spec.old_name : spec.name, sizeof *names);
        sorted[known] = names[known];
        known++;
    }
    if (!code)
        qsort(sorted, (size_t)known, sizeof *sorted, compare_names);
    for (int64_t i = 0; !code && i < safetensors_count(file); i++) {
        const char *name = safetensors_at(file, i)->name;
        if (!bsearch(&name, sorted, (size_t)known, sizeof *sorted, compare_names) &&
            !family->ignored(config, name))
            code = error_set(error, ERROR_CORRUPT, "%s: tensor %s is not part of a %s model of this config",
                             path, name, family->model_type);
    }
    free(names);
    free(sorted);
    return code;
}

int uploader_copy(struct uploader *uploader, const struct tensor_view *view, void *to,
                  enum kernel_type to_type, struct error *error)
{
    const struct kernel_ops *ops = uploader->ops;
    size_t bytes = (size_t)view->count * kernel_type_size(view->type);
    int status = 0;
    if (!view->count)
        return 0;
    if (view->type == to_type)
        return model_status(ops->copy_in(uploader->device, to, view->data, bytes), error, "tensor %s",
                            view->name);
    if (uploader->staging_bytes < bytes) {
        uploader_free(uploader);
        status = ops->memory_alloc(uploader->device, bytes, &uploader->staging);
        uploader->staging_bytes = status ? 0 : bytes;
    }
    if (!status)
        status = ops->copy_in(uploader->device, uploader->staging, view->data, bytes);
    if (!status)
        status = ops->cast(uploader->device, to, to_type, uploader->staging, view->type, view->count);
    return model_status(status, error, "tensor %s", view->name);
}

/* Freeing waits for what still reads it. */
void uploader_free(struct uploader *uploader)
{
    if (uploader->staging)
        uploader->ops->memory_free(uploader->device, uploader->staging);
    uploader->staging = NULL;
    uploader->staging_bytes = 0;
}

/* Fill model->weights from the family's table, data still unset. */
static int list_weights(struct model *model, const struct safetensors *file, const char *path,
                        struct error *error)
{
    struct tensor_spec spec;
    const struct tensor_view *view;
    int64_t n = 0;
    while (model->family->tensor(&model->config, n, &spec))
        n++;
    model->weights = calloc((size_t)n, sizeof *model->weights);
    if (!model->weights)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the tensors of %s", path);
    model->n_weights = n;
    model->embedding = model->head = -1;
    for (int64_t i = 0; i < n; i++) {
        model->family->tensor(&model->config, i, &spec);
        int code = model_find_tensor(file, &spec, path, &view, error);
        if (code)
            return code;
        struct weight *weight = &model->weights[i];
        memcpy(weight->name, spec.name, sizeof weight->name);
        weight->type = spec.fp32 ? TYPE_F32 : view->type;
        weight->file_type = view->type;
        weight->n_dims = view->n_dims;
        memcpy(weight->shape, view->shape, sizeof weight->shape);
        weight->count = view->count;
        weight->matrix = spec.matrix;
        weight->fp32 = spec.fp32;
        if (spec.role == ROLE_EMBEDDING)
            model->embedding = i;
        if (spec.role == ROLE_HEAD)
            model->head = i;
        model->parameter_count += view->count;
        model->arena_bytes += plan_round(view->count * (int64_t)kernel_type_size(weight->type));
    }
    if (model->head < 0)
        model->head = model->embedding;
    model->arena_bytes += plan_round(model->family->derived_floats(&model->config) * (int64_t)sizeof(float));
    return 0;
}

static int load_weights(struct model *model, const struct safetensors *file, struct error *error)
{
    struct uploader uploader = {.ops = model->ops, .device = model->device};
    int status = model->ops->memory_alloc(model->device, (size_t)model->arena_bytes, &model->arena), code = 0;
    if (status)
        return model_status(status, error, "%" PRId64 " bytes of weights", model->arena_bytes);
    char *next = model->arena;
    for (int64_t i = 0; i < model->n_weights && !code; i++) {
        struct weight *weight = &model->weights[i];
        struct tensor_spec spec;
        const struct tensor_view *view;
        model->family->tensor(&model->config, i, &spec);
        weight->data = next;
        next += plan_round(weight->count * (int64_t)kernel_type_size(weight->type));
        code = model_find_tensor(file, &spec, model->folder, &view, error);
        if (!code)
            code = uploader_copy(&uploader, view, weight->data, weight->type, error);
    }
    uploader_free(&uploader);
    model->derived = (float *)(void *)next;
    return code ? code : model_status(model->family->derive(model, NULL, model->derived), error, "weights");
}

int model_open(const char *folder, const struct kernel_ops *ops, struct kernel_device *device,
               struct model **ret_model, struct error *error)
{
    struct safetensors *file = NULL;
    struct model *model = calloc(1, sizeof *model);
    if (!model)
        return error_set(error, ERROR_NO_MEMORY, "no memory to open %s", folder);
    model->ops = ops;
    model->device = device;
    struct kernel_device_info info;
    int code = model_status(ops->device_query(device, &info), error, "device");
    if (!code) {
        model->is_host = info.is_host;
        model->folder = strdup(folder);
        if (!model->folder)
            code = error_set(error, ERROR_NO_MEMORY, "no memory to open %s", folder);
    }
    if (!code)
        code = read_config(folder, &model->config, &model->family, error);
    if (!code)
        code = safetensors_open(folder, &file, error);
    if (!code)
        code = model_check_names(&model->config, model->family, file, folder, error);
    if (!code)
        code = list_weights(model, file, folder, error);
    if (!code)
        model->act = model->is_host ? TYPE_F32 : model->weights[model->embedding].type;
    if (!code)
        code = load_weights(model, file, error);
    safetensors_close(file);
    if (code)
        model_close(model);
    else
        *ret_model = model;
    return code;
}

void model_close(struct model *model)
{
    if (!model)
        return;
    if (model->is_view) {
        free(model);
        return;
    }
    if (model->arena)
        model->ops->memory_free(model->device, model->arena);
    free(model->weights);
    free(model->folder);
    free(model);
}

const struct model_config *model_config(const struct model *model)
{
    return &model->config;
}

const struct kernel_ops *model_ops(const struct model *model)
{
    return model->ops;
}

struct kernel_device *model_device(const struct model *model)
{
    return model->device;
}

int64_t model_weight_count(const struct model *model)
{
    return model->n_weights;
}

const struct weight *model_weight(const struct model *model, int64_t index)
{
    return &model->weights[index];
}

int64_t model_weight_bytes(const struct model *model)
{
    return model->arena_bytes;
}

int64_t model_parameter_count(const struct model *model)
{
    return model->parameter_count;
}

enum kernel_type model_inference_type(const struct model *model)
{
    return model->act;
}

void model_infer_in_fp32(struct model *model)
{
    model->act = TYPE_F32;
}

int model_open_view(const struct model *model, enum kernel_type type, bool tf32, struct model **ret_view,
                    struct error *error)
{
    if (model->is_host && (type != TYPE_F32 || tf32))
        return error_set_param(error, ERROR_UNSUPPORTED, "precision",
                               "the CPU computes in fp32 and nothing else");
    struct model *view = malloc(sizeof *view);
    if (!view)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a model");
    *view = *model;
    view->act = type;
    view->tf32 = tf32;
    view->is_view = true;
    *ret_view = view;
    return 0;
}

bool model_infers_in_tf32(const struct model *model)
{
    return model->tf32;
}

struct weight_view model_view(const struct model *model, const struct adapter *adapter, int64_t index)
{
    const struct weight *weight = &model->weights[index];
    if (adapter && adapter->adaptation == ADAPT_FULL) {
        const struct param_slice *slice = &adapter->parameters[index].slice;
        return (struct weight_view){slice->param, TYPE_F32, slice->grad};
    }
    return (struct weight_view){weight->data, weight->type, NULL};
}

struct weight_view model_product_view(const struct model *model, const struct adapter *adapter,
                                      const struct weight_copies *copies, int64_t index)
{
    struct weight_view view = model_view(model, adapter, index);
    if (copies && copies->data && copies->data[index]) {
        view.data = copies->data[index];
        view.type = copies->type;
    }
    return view;
}

bool model_is_projection(const struct model *model, int64_t index)
{
    const struct weight *weight = &model->weights[index];
    return weight->matrix && !weight->fp32 && index != model->embedding && index != model->head;
}

const float *model_derived(const struct model *model, const struct adapter *adapter)
{
    return adapter && adapter->adaptation == ADAPT_FULL ? adapter->derived : model->derived;
}

/* ---- recurrent states ---- */

int64_t model_state_bytes(const struct model *model)
{
    return model->family->state_floats(&model->config) * (int64_t)sizeof(float);
}

int state_pool_create(struct model *model, int32_t n_slots, struct state_pool **ret_pool, struct error *error)
{
    int64_t slot_bytes = model_state_bytes(model);
    if (n_slots < 1)
        return error_set(error, ERROR_INVALID, "a state pool needs at least one slot");
    struct state_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a state pool");
    pool->model = model;
    pool->n_slots = n_slots;
    pool->slot_floats = slot_bytes / (int64_t)sizeof(float);
    size_t bytes = (size_t)n_slots * (size_t)slot_bytes;
    void *memory = NULL;
    int status = model->ops->memory_alloc(model->device, bytes, &memory);
    pool->pool = memory;
    if (!status)
        status = model->ops->zero(model->device, memory, bytes);
    if (status) {
        state_pool_free(pool);
        return model_status(status, error, "%zu bytes of recurrent state", bytes);
    }
    *ret_pool = pool;
    return 0;
}

void state_pool_free(struct state_pool *pool)
{
    if (!pool)
        return;
    if (pool->pool)
        pool->model->ops->memory_free(pool->model->device, pool->pool);
    free(pool);
}

int state_pool_reset(struct state_pool *pool, int32_t slot)
{
    if (slot < 0 || slot >= pool->n_slots)
        return ERROR_INVALID;
    return model_status(pool->model->ops->zero(pool->model->device, pool->pool + slot * pool->slot_floats,
                                               (size_t)pool->slot_floats * sizeof(float)),
                        NULL, "state");
}

int state_pool_copy(struct state_pool *pool, int32_t to, int32_t from)
{
    if (to < 0 || to >= pool->n_slots || from < 0 || from >= pool->n_slots)
        return ERROR_INVALID;
    if (to == from)
        return 0;
    return model_status(pool->model->ops->copy(pool->model->device, pool->pool + to * pool->slot_floats,
                                               pool->pool + from * pool->slot_floats,
                                               (size_t)pool->slot_floats * sizeof(float)),
                        NULL, "state");
}
