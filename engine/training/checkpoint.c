/* checkpoint.c: see checkpoint.h. The trainer's thread. */
#include "engine/training/checkpoint.h"

#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STATE_VERSION = 2, STATE_LIMIT = 1 << 20 };
#define STATE_FILE   "trainer_state.json"
#define TENSORS_FILE "optimizer.safetensors"

int kernel_check(int status, const char *what, struct error *error)
{
    int code = ERROR_INTERNAL;
    if (status == KERNEL_OK)
        return 0;
    if (status == KERNEL_NO_MEMORY)
        code = ERROR_NO_MEMORY;
    else if (status == KERNEL_UNSUPPORTED)
        code = ERROR_UNSUPPORTED;
    else if (status == KERNEL_DEVICE_LOST)
        code = ERROR_DEVICE;
    return error_set(error, code, "%s: %s", what, kernel_status_text(status));
}

static uint64_t mix(uint64_t h, uint64_t word)
{
    h ^= word;
    h = (h << 29 | h >> 35) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 32;
}

uint64_t fingerprint_add(uint64_t fingerprint, const void *data, size_t length)
{
    const unsigned char *bytes = data;
    uint64_t h = mix(fingerprint, length), word = 0;
    for (; length >= sizeof word; length -= sizeof word, bytes += sizeof word) {
        memcpy(&word, bytes, sizeof word);
        h = mix(h, word);
    }
    if (length) {
        word = 0;
        memcpy(&word, bytes, length);
        h = mix(h, word);
    }
    return h;
}

void checkpoint_path(const char *folder, int64_t step, char path[static 4096])
{
    snprintf(path, 4096, "%s/step-%" PRId64, folder, step);
}

static void join(char path[static 4096], const char *folder, const char *name)
{
    snprintf(path, 4096, "%s/%s", folder, name);
}

/* ---- folders that are whole or absent ---- */

static int sync_folder(const char *folder, struct error *error)
{
    char path[4096];
    struct dirent *entry;
    int code = 0;
    DIR *stream = opendir(folder);
    if (!stream)
        return error_set(error, ERROR_IO, "cannot open %s: %s", folder, strerror(errno));
    while (!code && (entry = readdir(stream))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        join(path, folder, entry->d_name);
        code = file_sync(path, error);
    }
    closedir(stream);
    return code ? code : file_sync(folder, error);
}

/* An empty hidden sibling of FOLDER/NAME to be filled. */
static int staging_open(const char *folder, const char *name, char staging[static 4096], struct error *error)
{
    snprintf(staging, 4096, "%s/.%s.tmp", folder, name);
    int code = file_remove_tree(staging, error);
    return code ? code : file_make_dirs(staging, error);
}

/* Give it its name once its content is durable. */
static int staging_publish(const char *staging, const char *path, struct error *error)
{
    int code = sync_folder(staging, error);
    return code ? code : file_rename_durable(staging, path, error);
}

int checkpoint_save_adapter(const char *folder, const char *name, const struct adapter *adapter,
                            const char *base_name, struct error *error)
{
    char path[4096], staging[4096];
    join(path, folder, name);
    if (!access(path, F_OK))
        return 0;
    int code = staging_open(folder, name, staging, error);
    if (!code)
        code = adapter_save(adapter, staging, base_name, error);
    if (!code)
        code = staging_publish(staging, path, error);
    if (code)
        file_remove_tree(staging, NULL);
    return code;
}

/* ---- tensors ---- */

enum { PARTS = 3 };
static const char *const part_names[PARTS] = {"param", "m", "v"};

static float *part_of(const struct parameter *parameter, int part)
{
    const struct param_slice *slice = &parameter->slice;
    return part == 0 ? slice->param : part == 1 ? slice->m : slice->v;
}

/* Parameters and moments as tensors in host memory, in the order of the file. On a device that is not the
 * host they are copied into *ret_staging first. */
static int gather_tensors(const struct adapter *adapter, struct tensor_view **ret_tensors,
                          char (**ret_names)[160], float **ret_staging, struct error *error)
{
    const struct kernel_ops *ops = model_ops(adapter->model);
    struct kernel_device *device = model_device(adapter->model);
    int64_t n_tensors = adapter->n_parameters * PARTS, total = 0;
    struct kernel_device_info info;
    float *staging = NULL;
    int code = kernel_check(ops->device_query(device, &info), "cannot query the device", error);
    if (code)
        return code;
    struct tensor_view *tensors = calloc((size_t)n_tensors, sizeof *tensors);
    char(*names)[160] = calloc((size_t)n_tensors, sizeof *names);
    for (int64_t i = 0; i < adapter->n_parameters; i++)
        total += adapter->parameters[i].slice.count * PARTS;
    if (!info.is_host)
        staging = malloc((size_t)total * sizeof *staging);
    if (!tensors || !names || (!info.is_host && !staging)) {
        code = error_set(error, ERROR_NO_MEMORY, "no memory to gather %" PRId64 " tensors", n_tensors);
        goto done;
    }
    float *next = staging;
    for (int64_t i = 0; i < n_tensors; i++) {
        const struct parameter *parameter = &adapter->parameters[i / PARTS];
        struct tensor_view *tensor = &tensors[i];
        float *data = part_of(parameter, (int)(i % PARTS));
        snprintf(names[i], sizeof names[i], "%s.%s", part_names[i % PARTS], parameter->name);
        tensor->name = names[i];
        tensor->type = TYPE_F32;
        tensor->n_dims = parameter->n_dims;
        memcpy(tensor->shape, parameter->shape, sizeof tensor->shape);
        tensor->count = parameter->slice.count;
        tensor->data = data;
        if (info.is_host)
            continue;
        code = kernel_check(ops->copy_out(device, next, data, (size_t)tensor->count * sizeof *next),
                            "cannot read parameters from the device", error);
        if (code)
            goto done;
        tensor->data = next;
        next += tensor->count;
    }
    *ret_tensors = tensors;
    *ret_names = names;
    *ret_staging = staging;
    return 0;
done:
    free(tensors);
    free(names);
    free(staging);
    return code;
}

static uint64_t add_tensor(uint64_t fingerprint, const struct tensor_view *tensor)
{
    fingerprint = fingerprint_add(fingerprint, tensor->name, strlen(tensor->name));
    return fingerprint_add(fingerprint, tensor->data, (size_t)tensor->count * sizeof(float));
}

/* ---- state ---- */

/* NaN has no JSON: it travels as null. */
static json_t *encode_real(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

static void encode_fingerprint(uint64_t fingerprint, char text[static 17])
{
    snprintf(text, 17, "%016" PRIx64, fingerprint);
}

static json_t *encode_state(const struct training_state *state, const struct training_identity *identity,
                            bool resumable_only, uint64_t tensors)
{
    char model[17], training[17], validation[17], hash[17];
    encode_fingerprint(identity->model, model);
    encode_fingerprint(identity->training_data, training);
    encode_fingerprint(identity->validation_data, validation);
    encode_fingerprint(tensors, hash);
    return json_pack(
        "{s:i, s:b, s:{s:O, s:s, s:s, s:s}, s:s, s:I, s:I, s:I, s:I, s:b, s:b, s:o, s:o, s:o, s:o, s:o, s:o,"
        " s:I, s:o, s:o, s:I, s:{s:o, s:I, s:I}}",
        "version", STATE_VERSION, "resumable_only", (int)resumable_only, "run", "spec", identity->spec,
        "model", model, "training_data", training, "validation_data", validation, "tensors", hash, "step",
        (json_int_t)state->step, "epoch", (json_int_t)state->cursor.epoch, "position",
        (json_int_t)state->cursor.position, "trained_tokens", (json_int_t)state->trained_tokens, "evaluating",
        (int)state->evaluating, "stopped", (int)state->stopped, "train_loss", encode_real(state->train_loss),
        "train_accuracy", encode_real(state->train_accuracy), "learning_rate",
        encode_real(state->learning_rate), "grad_norm", encode_real(state->grad_norm), "valid_loss",
        encode_real(state->valid_loss), "valid_accuracy", encode_real(state->valid_accuracy), "best_step",
        (json_int_t)state->best_step, "best_loss", encode_real(state->best_loss), "patience_loss",
        encode_real(state->patience_loss), "stale_evaluations", (json_int_t)state->stale_evaluations,
        "loss_scale", "scale", encode_real(state->loss_scale.scale), "good_steps",
        (json_int_t)state->loss_scale.good_steps, "skipped_steps",
        (json_int_t)state->loss_scale.skipped_steps);
}

static int write_state(const char *path, const struct training_state *state,
                       const struct training_identity *identity, bool resumable_only, uint64_t tensors,
                       struct error *error)
{
    char file[4096];
    int code = 0;
    join(file, path, STATE_FILE);
    json_t *json = encode_state(state, identity, resumable_only, tensors);
    /* 17 digits bring every double back bit for bit. */
    char *text = json ? json_dumps(json, JSON_INDENT(1) | JSON_REAL_PRECISION(17)) : NULL;
    if (!text)
        code = error_set(error, ERROR_NO_MEMORY, "no memory to write %s", file);
    else
        code = file_write_whole(file, text, strlen(text), error);
    free(text);
    json_decref(json);
    return code;
}

static int load_state(const char *path, json_t **ret_json, struct error *error)
{
    char file[4096], *text = NULL;
    size_t length = 0;
    json_error_t problem;
    join(file, path, STATE_FILE);
    int code = file_read(file, STATE_LIMIT, &text, &length, error);
    if (code)
        return code;
    json_t *json = json_loadb(text, length, 0, &problem);
    free(text);
    if (!json)
        return error_set(error, ERROR_CORRUPT, "%s is damaged: %s", file, problem.text);
    json_t *version = json_object_get(json, "version");
    if (!json_is_integer(version) || json_integer_value(version) != STATE_VERSION) {
        json_decref(json);
        return error_set(error, ERROR_CORRUPT, "%s is not of version %d", file, STATE_VERSION);
    }
    *ret_json = json;
    return 0;
}

/* A member of the state; *valid turns false when it is missing or of another kind. */
static int64_t state_integer(const json_t *json, const char *key, bool *valid)
{
    const json_t *value = json_object_get(json, key);
    *valid &= json_is_integer(value);
    return json_integer_value(value);
}

static double state_real(const json_t *json, const char *key, bool *valid)
{
    const json_t *value = json_object_get(json, key);
    *valid &= json_is_number(value) || json_is_null(value);
    return json_is_number(value) ? json_number_value(value) : (double)NAN;
}

static bool state_bool(const json_t *json, const char *key, bool *valid)
{
    const json_t *value = json_object_get(json, key);
    *valid &= json_is_boolean(value);
    return json_is_true(value);
}

static bool state_fingerprint(const json_t *json, const char *key, uint64_t *ret)
{
    const char *text = json_string_value(json_object_get(json, key));
    return text && sscanf(text, "%16" SCNx64, ret) == 1;
}

static int check_identity(const char *path, const json_t *run, const struct training_identity *identity,
                          struct error *error)
{
    const json_t *spec = json_object_get(run, "spec");
    const char *key;
    json_t *value;
    uint64_t model = 0, training = 0, validation = 0;
    if (!json_is_object(spec) || !state_fingerprint(run, "model", &model) ||
        !state_fingerprint(run, "training_data", &training) ||
        !state_fingerprint(run, "validation_data", &validation))
        return error_set(error, ERROR_CORRUPT, "%s does not say whose checkpoint it is", path);
    json_object_foreach(identity->spec, key, value)
    {
        if (!json_equal(value, json_object_get(spec, key)))
            return error_set_param(error, ERROR_INVALID, key,
                                   "the checkpoint %s was made with another %s: it cannot go on", path, key);
    }
    if (model != identity->model)
        return error_set_param(error, ERROR_INVALID, "model", "the checkpoint %s was made from another model",
                               path);
    if (training != identity->training_data)
        return error_set_param(error, ERROR_INVALID, "training_file",
                               "the checkpoint %s was made with other training data", path);
    if (validation != identity->validation_data)
        return error_set_param(error, ERROR_INVALID, "validation_file",
                               "the checkpoint %s was made with other validation data", path);
    return 0;
}

int checkpoint_read_state(const char *path, const struct training_identity *identity,
                          struct training_state *ret_state, struct error *error)
{
    json_t *json = NULL;
    int code = load_state(path, &json, error);
    if (code)
        return code;
    code = check_identity(path, json_object_get(json, "run"), identity, error);
    if (code)
        goto done;
    bool valid = true;
    const json_t *scale = json_object_get(json, "loss_scale");
    struct training_state state = {
        .step = state_integer(json, "step", &valid),
        .cursor = {state_integer(json, "epoch", &valid), state_integer(json, "position", &valid)},
        .trained_tokens = state_integer(json, "trained_tokens", &valid),
        .evaluating = state_bool(json, "evaluating", &valid),
        .stopped = state_bool(json, "stopped", &valid),
        .train_loss = state_real(json, "train_loss", &valid),
        .train_accuracy = state_real(json, "train_accuracy", &valid),
        .learning_rate = state_real(json, "learning_rate", &valid),
        .grad_norm = state_real(json, "grad_norm", &valid),
        .valid_loss = state_real(json, "valid_loss", &valid),
        .valid_accuracy = state_real(json, "valid_accuracy", &valid),
        .best_step = state_integer(json, "best_step", &valid),
        .best_loss = state_real(json, "best_loss", &valid),
        .patience_loss = state_real(json, "patience_loss", &valid),
        .stale_evaluations = state_integer(json, "stale_evaluations", &valid),
        .loss_scale = {state_real(scale, "scale", &valid), state_integer(scale, "good_steps", &valid),
                       state_integer(scale, "skipped_steps", &valid)},
    };
    if (!valid || state.step < 0 || state.cursor.epoch < 0 || state.cursor.position < 0 ||
        !(state.loss_scale.scale >= 0) || state.loss_scale.skipped_steps > state.step) {
        code = error_set(error, ERROR_CORRUPT, "the state in %s is damaged", path);
        goto done;
    }
    *ret_state = state;
done:
    json_decref(json);
    return code;
}

/* ---- whole checkpoints ---- */

/* Does the checkpoint at path hold the tensors of this fingerprint? */
static bool holds_tensors(const char *path, uint64_t tensors)
{
    json_t *json = NULL;
    uint64_t stored = 0;
    if (load_state(path, &json, NULL))
        return false;
    bool same = state_fingerprint(json, "tensors", &stored) && stored == tensors;
    json_decref(json);
    return same;
}

int checkpoint_write(const char *folder, const struct training_state *state,
                     const struct training_identity *identity, bool resumable_only,
                     const struct adapter *adapter, const char *base_name, struct error *error)
{
    struct tensor_view *tensors = NULL;
    char(*names)[160] = NULL;
    float *host = NULL;
    char path[4096], staging[4096], file[4096], name[64];
    int64_t n_tensors = adapter->n_parameters * PARTS;
    uint64_t fingerprint = 0;
    checkpoint_path(folder, state->step, path);
    int code = gather_tensors(adapter, &tensors, &names, &host, error);
    if (code)
        return code;
    for (int64_t i = 0; i < n_tensors; i++)
        fingerprint = add_tensor(fingerprint, &tensors[i]);
    if (holds_tensors(path, fingerprint)) {
        code = write_state(path, state, identity, resumable_only, fingerprint, error);
        goto done;
    }
    snprintf(name, sizeof name, "step-%" PRId64, state->step);
    code = staging_open(folder, name, staging, error);
    if (code)
        goto done;
    join(file, staging, TENSORS_FILE);
    code = adapter_save(adapter, staging, base_name, error);
    if (!code)
        code = safetensors_write(file, tensors, n_tensors, NULL, error);
    if (!code)
        code = write_state(staging, state, identity, resumable_only, fingerprint, error);
    if (!code)
        code = file_remove_tree(path, error);
    if (!code)
        code = staging_publish(staging, path, error);
    if (code)
        file_remove_tree(staging, NULL);
done:
    free(tensors);
    free(names);
    free(host);
    return code;
}

int checkpoint_read_tensors(const char *path, struct adapter *adapter, bool moments, struct error *error)
{
    const struct kernel_ops *ops = model_ops(adapter->model);
    struct kernel_device *device = model_device(adapter->model);
    struct safetensors *file = NULL;
    json_t *json = NULL;
    char name[4096];
    uint64_t expected = 0, found = 0;
    int64_t n_tensors = adapter->n_parameters * PARTS;
    join(name, path, TENSORS_FILE);
    int code = load_state(path, &json, error);
    if (!code)
        code = safetensors_open(name, &file, error);
    if (code)
        goto done;
    for (int pass = 0; pass < 2; pass++) { /* check all of it, then copy */
        for (int64_t i = 0; i < n_tensors; i++) {
            const struct parameter *parameter = &adapter->parameters[i / PARTS];
            int part = (int)(i % PARTS);
            snprintf(name, sizeof name, "%s.%s", part_names[part], parameter->name);
            const struct tensor_view *tensor = safetensors_find(file, name);
            if (!tensor || tensor->type != TYPE_F32 || tensor->count != parameter->slice.count) {
                code = error_set(error, ERROR_CORRUPT, "%s/%s lacks %s or has it in another size", path,
                                 TENSORS_FILE, name);
                goto done;
            }
            if (pass == 0)
                found = add_tensor(found, tensor);
            else if (part == 0 || moments)
                code = kernel_check(ops->copy_in(device, part_of(parameter, part), tensor->data,
                                                 (size_t)tensor->count * sizeof(float)),
                                    "cannot write parameters to the device", error);
            if (code)
                goto done;
        }
        if (pass == 0 && (!state_fingerprint(json, "tensors", &expected) || expected != found)) {
            code = error_set(error, ERROR_CORRUPT, "%s/%s is not what was written: its content has changed",
                             path, TENSORS_FILE);
            goto done;
        }
    }
    code = adapter_refresh(adapter, error);
done:
    safetensors_close(file);
    json_decref(json);
    return code;
}

static int compare_entries(const void *a, const void *b)
{
    int64_t x = ((const struct checkpoint_entry *)a)->step, y = ((const struct checkpoint_entry *)b)->step;
    return (x > y) - (x < y);
}

/* The step of "step-N", or -1. */
static int64_t step_of(const char *name)
{
    char *end;
    if (strncmp(name, "step-", 5) || name[5] < '0' || name[5] > '9')
        return -1;
    errno = 0;
    long long step = strtoll(name + 5, &end, 10);
    return *end || errno ? -1 : step;
}

int checkpoint_scan(const char *folder, int64_t newest, struct checkpoint_list *ret_list, struct error *error)
{
    struct checkpoint_list list = {0};
    char path[4096];
    struct dirent *entry;
    int code = 0;
    DIR *stream = opendir(folder);
    if (!stream && errno == ENOENT) {
        *ret_list = list;
        return 0;
    }
    if (!stream)
        return error_set(error, ERROR_IO, "cannot open %s: %s", folder, strerror(errno));
    while (!code && (entry = readdir(stream))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        int64_t step = step_of(entry->d_name);
        join(path, folder, entry->d_name);
        if (entry->d_name[0] == '.' || step > newest) {
            code = file_remove_tree(path, error);
            continue;
        }
        if (step < 0)
            continue;
        struct checkpoint_entry *grown =
            realloc(list.entries, (size_t)(list.count + 1) * sizeof *list.entries);
        json_t *json = NULL;
        if (!grown) {
            code = error_set(error, ERROR_NO_MEMORY, "no memory to list %s", folder);
            break;
        }
        list.entries = grown;
        load_state(path, &json, NULL); /* an old one that is damaged harms nobody until it is resumed from */
        list.entries[list.count++] =
            (struct checkpoint_entry){step, json_is_true(json_object_get(json, "resumable_only"))};
        json_decref(json);
    }
    closedir(stream);
    if (code) {
        free(list.entries);
        return code;
    }
    if (list.count)
        qsort(list.entries, (size_t)list.count, sizeof *list.entries, compare_entries);
    *ret_list = list;
    return 0;
}
