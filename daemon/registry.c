/* registry.c: see registry.h. A chained hash map by id, and beside it an array in the order of lists. */
#include "daemon/registry.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

struct node {
    struct model_entry entry;
    struct node *next; /* in its bucket */
};

struct registry {
    struct node **buckets;
    size_t n_buckets, n_nodes; /* n_buckets: a power of two, at least n_nodes */
    struct node **listed;      /* [n_listed], all but checkpoints */
    size_t n_listed, listed_capacity, n_bases;
    char default_model[MODEL_ID_BYTES]; /* "" = the only base */
};

/* ---- the map ---- */

static size_t hash(const char *id)
{
    uint64_t value = 0xcbf29ce484222325u; /* FNV-1a */
    for (; *id; id++)
        value = (value ^ (unsigned char)*id) * 0x100000001b3u;
    return (size_t)(value ^ value >> 32);
}

static struct node **slot(const struct registry *registry, const char *id)
{
    struct node **link = &registry->buckets[hash(id) & (registry->n_buckets - 1)];
    while (*link && strcmp((*link)->entry.resource.id, id))
        link = &(*link)->next;
    return link;
}

static int grow(struct registry *registry, struct error *error)
{
    if (registry->n_nodes >= registry->n_buckets) {
        size_t n_buckets = registry->n_buckets ? 2 * registry->n_buckets : 64;
        struct node **buckets = calloc(n_buckets, sizeof(struct node *));
        if (!buckets)
            return error_set(error, ERROR_NO_MEMORY, "no memory for the models");
        for (size_t i = 0; i < registry->n_buckets; i++)
            for (struct node *node = registry->buckets[i], *next; node; node = next) {
                next = node->next;
                struct node **bucket = &buckets[hash(node->entry.resource.id) & (n_buckets - 1)];
                node->next = *bucket;
                *bucket = node;
            }
        free(registry->buckets);
        registry->buckets = buckets;
        registry->n_buckets = n_buckets;
    }
    if (registry->n_listed == registry->listed_capacity) {
        size_t capacity = registry->listed_capacity ? 2 * registry->listed_capacity : 64;
        struct node **listed = reallocarray(registry->listed, capacity, sizeof(struct node *));
        if (!listed)
            return error_set(error, ERROR_NO_MEMORY, "no memory for the models");
        registry->listed = listed;
        registry->listed_capacity = capacity;
    }
    return 0;
}

/* entry is copied. */
static int insert(struct registry *registry, const struct model_entry *entry, struct error *error)
{
    const char *id = entry->resource.id;
    struct node *old = registry->n_buckets ? *slot(registry, id) : NULL;
    if (old) {
        if (strcmp(old->entry.path, entry->path) || old->entry.is_base != entry->is_base ||
            old->entry.is_checkpoint != entry->is_checkpoint)
            return error_set(error, ERROR_INVALID, "the model '%s' exists twice: %s and %s", id,
                             old->entry.path, entry->path);
        old->entry = *entry;
        return 0;
    }
    int code = grow(registry, error);
    if (code)
        return code;
    struct node *node = malloc(sizeof *node);
    if (!node)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the model '%s'", id);
    node->entry = *entry;
    node->next = NULL;
    *slot(registry, id) = node;
    registry->n_nodes++;
    if (!entry->is_checkpoint)
        registry->listed[registry->n_listed++] = node;
    registry->n_bases += entry->is_base;
    return 0;
}

/* ---- folders ---- */

static int add_folder(struct registry *registry, const char *models_dir, const char *name,
                      struct error *error)
{
    struct model_entry entry = {.is_base = true, .step = -1};
    char config[sizeof entry.path + 16];
    int length = snprintf(entry.path, sizeof entry.path, "%s%s%s", models_dir,
                          models_dir[strlen(models_dir) - 1] == '/' ? "" : "/", name);
    struct stat st;
    if (length < 0 || (size_t)length >= sizeof entry.path)
        return error_set(error, ERROR_INVALID, "the path of the model '%s' in %s is too long", name,
                         models_dir);
    snprintf(config, sizeof config, "%s/config.json", entry.path);
    if (stat(config, &st) || !S_ISREG(st.st_mode))
        return 0; /* no model */
    struct model_resource *resource = &entry.resource;
    if (snprintf(resource->id, sizeof resource->id, "%s", name) >= (int)sizeof resource->id)
        return error_set(error, ERROR_INVALID, "the name of the model folder %s is too long", entry.path);
    resource->created = st.st_mtime;
    snprintf(resource->owned_by, sizeof resource->owned_by, "adderd");
    memcpy(resource->root, resource->id, sizeof resource->root);
    memcpy(entry.base, resource->id, sizeof entry.base);
    return insert(registry, &entry, error);
}

static int scan(struct registry *registry, const char *models_dir, struct error *error)
{
    DIR *dir = opendir(models_dir);
    if (!dir)
        return error_set(error, errno == ENOENT ? ERROR_NOT_FOUND : ERROR_IO,
                         "cannot open the models folder %s: %s", models_dir, strerror(errno));
    int code = 0;
    while (!code) {
        errno = 0;
        struct dirent *item = readdir(dir);
        if (!item) {
            if (errno)
                code = error_set(error, ERROR_IO, "cannot read the models folder %s: %s", models_dir,
                                 strerror(errno));
            break;
        }
        if (item->d_name[0] != '.')
            code = add_folder(registry, models_dir, item->d_name, error);
    }
    closedir(dir);
    return code;
}

static int older(const void *a, const void *b)
{
    const struct model_resource *left = &(*(struct node *const *)a)->entry.resource;
    const struct model_resource *right = &(*(struct node *const *)b)->entry.resource;
    if (left->created != right->created)
        return left->created < right->created ? -1 : 1;
    return strcmp(left->id, right->id);
}

/* ---- the rest ---- */

int registry_create(const char *const *models_dirs, int n_models_dirs, const char *default_model,
                    const struct adapter_row *rows, size_t n_rows, struct registry **ret_registry,
                    struct error *error)
{
    struct registry *registry = calloc(1, sizeof *registry);
    if (!registry)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the models");
    int code = grow(registry, error);
    for (int i = 0; !code && i < n_models_dirs; i++)
        code = scan(registry, models_dirs[i], error);
    if (!code && registry->n_listed)
        qsort(registry->listed, registry->n_listed, sizeof(struct node *), older);
    for (size_t i = 0; !code && i < n_rows; i++)
        code = registry_add(registry, &rows[i], error);
    if (!code && default_model) {
        if (!registry_find(registry, default_model))
            code = error_set(error, ERROR_NOT_FOUND,
                             "the default model '%s' is in none of the models folders", default_model);
        snprintf(registry->default_model, sizeof registry->default_model, "%s", default_model);
    }
    if (code) {
        registry_free(registry);
        return code;
    }
    *ret_registry = registry;
    return 0;
}

void registry_free(struct registry *registry)
{
    if (!registry)
        return;
    for (size_t i = 0; i < registry->n_buckets; i++)
        for (struct node *node = registry->buckets[i], *next; node; node = next) {
            next = node->next;
            free(node);
        }
    free(registry->buckets);
    free(registry->listed);
    free(registry);
}

const struct model_entry *registry_find(const struct registry *registry, const char *id)
{
    const struct node *node = *slot(registry, id);
    return node ? &node->entry : NULL;
}

const struct model_entry *registry_default(const struct registry *registry)
{
    if (registry->default_model[0])
        return registry_find(registry, registry->default_model);
    /* Bases come first in the list. */
    return registry->n_bases == 1 ? &registry->listed[0]->entry : NULL;
}

int registry_add(struct registry *registry, const struct adapter_row *row, struct error *error)
{
    struct model_entry entry = {
        .resource = row->model,
        .full = row->full,
        .is_checkpoint = row->step >= 0,
        .step = row->step,
    };
    memcpy(entry.path, row->path, sizeof entry.path);
    memcpy(entry.base, row->model.root, sizeof entry.base);
    memcpy(entry.job, row->job, sizeof entry.job);
    return insert(registry, &entry, error);
}

void registry_remove(struct registry *registry, const char *id)
{
    struct node **link = slot(registry, id), *node = *link;
    if (!node)
        return;
    for (size_t i = 0; i < registry->n_listed; i++)
        if (registry->listed[i] == node) {
            registry->n_listed--;
            memmove(&registry->listed[i], &registry->listed[i + 1],
                    (registry->n_listed - i) * sizeof(struct node *));
            break;
        }
    registry->n_bases -= node->entry.is_base;
    registry->n_nodes--;
    *link = node->next;
    free(node);
}

size_t registry_count(const struct registry *registry)
{
    return registry->n_listed;
}

const struct model_entry *registry_at(const struct registry *registry, size_t index)
{
    return index < registry->n_listed ? &registry->listed[index]->entry : NULL;
}
