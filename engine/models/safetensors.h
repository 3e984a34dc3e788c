/* safetensors.h: weights by bounds-checked mmap, and writing them whole or not at all.
 *
 * Format (huggingface/safetensors): 8 bytes little-endian header length, a JSON object of name -> {dtype,
 * shape, data_offsets}, then the data. A model is one model.safetensors, or shards named by
 * model.safetensors.index.json. */
#ifndef ENGINE_MODELS_SAFETENSORS_H
#define ENGINE_MODELS_SAFETENSORS_H

#include "base/error.h"
#include "kernels/kernels.h"

#include <stdint.h>

enum { TENSOR_MAX_DIMS = 4 };

/* One tensor in a mapped file. `data` is only as aligned as the file has it: read with memcpy or the cast op.
 */
struct tensor_view {
    const char *name;
    enum kernel_type type;
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t count; /* elements */
    const void *data;
};

struct safetensors;

/* path: a .safetensors file, a .safetensors.index.json, or a folder that holds one of them (index first).
 * Every offset is checked: inside the file, not overlapping, equal to shape x type. Errors name the file and
 * the tensor. */
int safetensors_open(const char *path, struct safetensors **ret_file, struct error *error);
void safetensors_close(struct safetensors *file);
int64_t safetensors_count(const struct safetensors *file);
const struct tensor_view *safetensors_at(const struct safetensors *file, int64_t index);
/* NULL when absent. */
const struct tensor_view *safetensors_find(const struct safetensors *file, const char *name);

/* Write tensors (host memory) durably: temporary name, fsync, rename. metadata: pairs of strings closed by
 * NULL, or NULL. */
int safetensors_write(const char *path, const struct tensor_view *tensors, int64_t count,
                      const char *const *metadata, struct error *error);

#endif
