/* worker_models.h: what a worker has loaded: base models, each with its tokenizer, its generator and the
 * adapters that requests have named. Loaded on demand, adapters dropped when there are many and they are not
 * used, models when they are told to go or memory runs out. The worker's thread alone. */
#ifndef ENGINE_WORKER_MODELS_H
#define ENGINE_WORKER_MODELS_H

#include "base/error.h"
#include "engine/inference/generator.h"
#include "engine/models/model.h"
#include "engine/text/tokenizer.h"
#include "engine/worker_fields.h"

/* An adapter in memory. */
struct loaded_adapter {
    struct loaded_adapter *next;
    char *id, *path;
    struct adapter *adapter;
    uint64_t used_at;
    int32_t n_holders; /* evaluations of it */
    bool forgotten;    /* freed once nothing uses it */
};

struct loaded_model {
    struct loaded_model *next;
    char *id, *path;
    struct model *model;
    struct tokenizer *tokenizer;
    struct generator *generator;
    struct loaded_adapter *adapters;
    int32_t n_adapters;
    int32_t n_holders; /* jobs that train on it, evaluations */
    double load_seconds;
    int64_t device_bytes; /* that loading it has taken: weights, generator */
    bool forgotten;
};

struct loaded_models {
    const struct kernel_ops *ops;
    struct kernel_device *device;
    int32_t max_seqs;
    int64_t prefill_tokens;
    struct loaded_model *first;
    uint64_t clock;
    /* Called before so many bytes are read from disk and nothing else is done meanwhile. */
    void (*loading)(void *arg, int64_t bytes);
    void *loading_arg;
};

/* The model of that id and folder, loaded now if it was not. It stays until the next sweep after its
 * generator is idle and nobody holds it. */
int loaded_models_get(struct loaded_models *models, const struct named_folder *name,
                      struct loaded_model **ret_model, struct error *error);
int loaded_models_get_adapter(struct loaded_models *models, struct loaded_model *model,
                              const struct named_folder *name, const struct adapter **ret_adapter,
                              struct error *error);
/* An adapter that loaded_models_get_adapter() gave stays while it is held. */
void loaded_models_hold_adapter(struct loaded_model *model, const struct adapter *adapter);
void loaded_models_release_adapter(struct loaded_model *model, const struct adapter *adapter);
/* Free every model that nothing uses. Returns whether there was one. Not from a generator's callback. */
bool loaded_models_make_room(struct loaded_models *models);
/* New requests will load it again; those under way keep it. */
void loaded_models_forget_model(struct loaded_models *models, const char *id);
void loaded_models_forget_adapter(struct loaded_models *models, const char *id);
/* Free what is forgotten or over the bound, and not used. Not from a generator's callback. */
void loaded_models_sweep(struct loaded_models *models);
/* Everything; requests still there end with ERROR_CANCELLED. */
void loaded_models_free(struct loaded_models *models);
bool loaded_models_idle(const struct loaded_models *models);

#endif
