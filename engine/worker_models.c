/* worker_models.c: see worker_models.h. */
#include "engine/worker_models.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* A base's adapters above this count go, the least recently used first, as soon as they are not in use. */
enum { MAX_IDLE_ADAPTERS = 32 };

static double now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void free_adapter(struct loaded_adapter *adapter)
{
    adapter_free(adapter->adapter);
    free(adapter->id);
    free(adapter->path);
    free(adapter);
}

static void free_model(struct loaded_model *model)
{
    if (!model)
        return;
    generator_free(model->generator);
    while (model->adapters) {
        struct loaded_adapter *next = model->adapters->next;
        free_adapter(model->adapters);
        model->adapters = next;
    }
    tokenizer_free(model->tokenizer);
    if (model->model)
        model_close(model->model);
    free(model->id);
    free(model->path);
    free(model);
}

static int load_model(struct loaded_models *models, const struct named_folder *name,
                      struct loaded_model **ret_model, struct error *error)
{
    double start = now_seconds();
    struct loaded_model *model = calloc(1, sizeof *model);
    if (!model)
        return error_set(error, ERROR_NO_MEMORY, "no memory for model \"%s\"", name->id);
    int status;
    model->id = strdup(name->id);
    model->path = strdup(name->path);
    if (!model->id || !model->path) {
        status = error_set(error, ERROR_NO_MEMORY, "no memory for model \"%s\"", name->id);
        goto failed;
    }
    status = model_open(name->path, models->ops, models->device, &model->model, error);
    if (!status)
        status = tokenizer_load(name->path, &model->tokenizer, error);
    if (status) {
        error_prefix(error, "model \"%s\": ", name->id);
        goto failed;
    }
    int64_t vocab_size = model_config(model->model)->vocab_size;
    if (tokenizer_size(model->tokenizer) > vocab_size) {
        status =
            error_set(error, ERROR_CORRUPT,
                      "model \"%s\": its tokenizer does not fit: it has %d tokens, the model has embeddings "
                      "for %lld",
                      name->id, tokenizer_size(model->tokenizer), (long long)vocab_size);
        goto failed;
    }
    status = generator_create(model->model, model->tokenizer, models->max_seqs, models->prefill_tokens,
                              &model->generator, error);
    if (status)
        goto failed;
    model->load_seconds = now_seconds() - start;
    *ret_model = model;
    return 0;
failed:
    free_model(model);
    return status;
}

static bool model_is_used(const struct loaded_model *model)
{
    return model->n_holders || !generator_idle(model->generator);
}

bool loaded_models_make_room(struct loaded_models *models)
{
    bool found = false;
    for (struct loaded_model *model = models->first; model; model = model->next) {
        if (!model_is_used(model)) {
            model->forgotten = true;
            found = true;
        }
    }
    loaded_models_sweep(models);
    return found;
}

static int query(const struct loaded_models *models, struct kernel_device_info *ret_info, struct error *error)
{
    int status = models->ops->device_query(models->device, ret_info);
    return status ? error_set(error, ERROR_DEVICE, "cannot query the device: %s", kernel_status_text(status))
                  : 0;
}

/* Bytes of a model's weights as they lie on disk; they take as much on the device. A folder with an index is read by it, and a
 * model.safetensors beside it is not. */
static int64_t stored_bytes(const char *folder)
{
    static const char suffix[] = ".safetensors", whole[] = "model.safetensors";
    int64_t bytes = 0;
    DIR *dir = opendir(folder);
    bool indexed = dir && !faccessat(dirfd(dir), "model.safetensors.index.json", F_OK, 0);
    for (struct dirent *item; dir && (item = readdir(dir));) {
        size_t length = strlen(item->d_name);
        struct stat st;
        if (length >= sizeof suffix && !strcmp(item->d_name + length - (sizeof suffix - 1), suffix) &&
            !strcmp(item->d_name, whole) != indexed && !fstatat(dirfd(dir), item->d_name, &st, 0))
            bytes += st.st_size;
    }
    if (dir)
        closedir(dir);
    return bytes;
}

/* A host gives out more memory than it has, and then kills; so weights are held against what is free before they are
 * loaded. */
static int check_room(struct loaded_models *models, const struct named_folder *name, int64_t needed,
                      struct error *error)
{
    struct kernel_device_info info;
    int status = query(models, &info, error);
    if (!status && needed > info.free_bytes && loaded_models_make_room(models))
        status = query(models, &info, error);
    if (!status && needed > info.free_bytes)
        status = error_set_param(
            error, ERROR_NO_MEMORY, "model",
            "model \"%s\" has %lld bytes of weights; of the %lld bytes of this device %lld are free",
            name->id, (long long)needed, (long long)info.total_bytes, (long long)info.free_bytes);
    return status;
}

int loaded_models_get(struct loaded_models *models, const struct named_folder *name,
                      struct loaded_model **ret_model, struct error *error)
{
    for (struct loaded_model *model = models->first; model; model = model->next) {
        if (!model->forgotten && !strcmp(model->id, name->id) && !strcmp(model->path, name->path)) {
            *ret_model = model;
            return 0;
        }
    }
    struct kernel_device_info before, after;
    struct loaded_model *model;
    int64_t bytes = stored_bytes(name->path);
    int status = check_room(models, name, bytes, error);
    if (!status)
        status = query(models, &before, error);
    if (!status && models->loading)
        models->loading(models->loading_arg, bytes);
    if (!status)
        status = load_model(models, name, &model, error);
    if (status == ERROR_NO_MEMORY && loaded_models_make_room(models) &&
        !(status = query(models, &before, error)))
        status = load_model(models, name, &model, error);
    if (status)
        return status;
    if (!query(models, &after, NULL))
        model->device_bytes = after.allocated_bytes - before.allocated_bytes;
    model->next = models->first;
    models->first = model;
    *ret_model = model;
    return 0;
}

int loaded_models_get_adapter(struct loaded_models *models, struct loaded_model *model,
                              const struct named_folder *name, const struct adapter **ret_adapter,
                              struct error *error)
{
    for (struct loaded_adapter *adapter = model->adapters; adapter; adapter = adapter->next) {
        if (!adapter->forgotten && !strcmp(adapter->id, name->id) && !strcmp(adapter->path, name->path)) {
            adapter->used_at = ++models->clock;
            *ret_adapter = adapter->adapter;
            return 0;
        }
    }
    struct loaded_adapter *adapter = calloc(1, sizeof *adapter);
    if (adapter) {
        adapter->id = strdup(name->id);
        adapter->path = strdup(name->path);
    }
    int status;
    if (!adapter || !adapter->id || !adapter->path)
        status = error_set(error, ERROR_NO_MEMORY, "no memory for adapter \"%s\"", name->id);
    else if ((status = adapter_load(model->model, name->path, false, &adapter->adapter, error)))
        error_prefix(error, "adapter \"%s\": ", name->id);
    if (status) {
        if (adapter)
            free_adapter(adapter);
        return status;
    }
    adapter->used_at = ++models->clock;
    adapter->next = model->adapters;
    model->adapters = adapter;
    model->n_adapters++;
    *ret_adapter = adapter->adapter;
    return 0;
}

static void hold_adapter(struct loaded_model *model, const struct adapter *held, int32_t change)
{
    for (struct loaded_adapter *adapter = model->adapters; adapter; adapter = adapter->next)
        if (adapter->adapter == held)
            adapter->n_holders += change;
}

void loaded_models_hold_adapter(struct loaded_model *model, const struct adapter *adapter)
{
    hold_adapter(model, adapter, 1);
}

void loaded_models_release_adapter(struct loaded_model *model, const struct adapter *adapter)
{
    hold_adapter(model, adapter, -1);
}

void loaded_models_forget_model(struct loaded_models *models, const char *id)
{
    for (struct loaded_model *model = models->first; model; model = model->next)
        if (!strcmp(model->id, id))
            model->forgotten = true;
}

void loaded_models_forget_adapter(struct loaded_models *models, const char *id)
{
    for (struct loaded_model *model = models->first; model; model = model->next)
        for (struct loaded_adapter *adapter = model->adapters; adapter; adapter = adapter->next)
            if (!strcmp(adapter->id, id))
                adapter->forgotten = true;
}

/* The adapter to free next, as the link that points to it, or NULL. */
static struct loaded_adapter **find_dispensable(struct loaded_model *model)
{
    bool crowded = model->n_adapters > MAX_IDLE_ADAPTERS;
    struct loaded_adapter **oldest = NULL;
    for (struct loaded_adapter **at = &model->adapters; *at; at = &(*at)->next) {
        if ((!crowded && !(*at)->forgotten) || (*at)->n_holders ||
            generator_uses(model->generator, (*at)->adapter))
            continue;
        if ((*at)->forgotten)
            return at;
        if (!oldest || (*at)->used_at < (*oldest)->used_at)
            oldest = at;
    }
    return oldest;
}

void loaded_models_sweep(struct loaded_models *models)
{
    for (struct loaded_model **at = &models->first; *at;) {
        struct loaded_model *model = *at;
        if (model->forgotten && !model_is_used(model)) {
            *at = model->next;
            free_model(model);
            continue;
        }
        for (struct loaded_adapter **link; (link = find_dispensable(model));) {
            struct loaded_adapter *adapter = *link;
            *link = adapter->next;
            model->n_adapters--;
            free_adapter(adapter);
        }
        at = &model->next;
    }
}

void loaded_models_free(struct loaded_models *models)
{
    while (models->first) {
        struct loaded_model *next = models->first->next;
        free_model(models->first);
        models->first = next;
    }
}

bool loaded_models_idle(const struct loaded_models *models)
{
    for (const struct loaded_model *model = models->first; model; model = model->next)
        if (!generator_idle(model->generator))
            return false;
    return true;
}
