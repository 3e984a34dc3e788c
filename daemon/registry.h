/* registry.h: the models that exist, in memory: folders of the models directories, adapters and checkpoints
 * of the store. So that resolving a model id, or listing models, asks no disk. Loop thread only. */
#ifndef DAEMON_REGISTRY_H
#define DAEMON_REGISTRY_H

#include "base/error.h"
#include "daemon/store.h"

#include <stdbool.h>
#include <stddef.h>

struct model_entry {
    struct model_resource resource;
    char path[4096];
    bool is_base, full;
    bool is_checkpoint; /* answered by id, left out of the list */
    char base[MODEL_ID_BYTES];
    char job[ID_BYTES]; /* "" for a base */
    int64_t step;       /* checkpoint's; -1 otherwise */
};

struct registry;

/* Scan the models directories (each folder with a config.json is a model, its id the folder's name; hidden
 * ones are passed over) and take in the rows. One id in two places is ERROR_INVALID, which names both; a
 * default model that does not exist is ERROR_NOT_FOUND. default_model may be NULL. */
int registry_create(const char *const *models_dirs, int n_models_dirs, const char *default_model,
                    const struct adapter_row *rows, size_t n_rows, struct registry **ret_registry,
                    struct error *error);
void registry_free(struct registry *registry);
/* NULL when unknown. The pointer holds until the next add or remove. */
const struct model_entry *registry_find(const struct registry *registry, const char *id);
/* --default-model, or the only base, or NULL. */
const struct model_entry *registry_default(const struct registry *registry);
/* ERROR_INVALID when the id is taken by another path; a row with the same path replaces the old one. */
int registry_add(struct registry *registry, const struct adapter_row *row, struct error *error);
void registry_remove(struct registry *registry, const char *id);
/* The list: bases, then adapters, each oldest first; checkpoints are left out. */
size_t registry_count(const struct registry *registry);
const struct model_entry *registry_at(const struct registry *registry, size_t index);

#endif
