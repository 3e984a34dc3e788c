/* plan.h: the memory plan: one table of buffers whose sizes are known before the first allocation, and the
 * one arena that is carved by it. What model_plan() reports and what pass_create() allocates come from one
 * table. */
#ifndef ENGINE_MODELS_PLAN_H
#define ENGINE_MODELS_PLAN_H

#include "base/error.h"
#include "kernels/kernels.h"

#include <stdint.h>

enum { PLAN_MAX = 40, PLAN_ALIGNMENT = 64 };

/* What a buffer is for. Weights stay as long as the arena; activations live through a pass, workspace within one layer;
 * an overlay is used between layers alone and lies over the workspace. */
enum plan_use { PLAN_ACTIVATION, PLAN_WORKSPACE, PLAN_OVERLAY, PLAN_WEIGHTS };

struct plan_buffer {
    int64_t bytes; /* a multiple of PLAN_ALIGNMENT; 0 = not wanted */
    enum plan_use use;
};

/* Zeroed = empty. Indices are the owner's enum. */
struct plan {
    struct plan_buffer buffers[PLAN_MAX];
};

/* count elements of element_bytes each. */
void plan_add(struct plan *plan, int index, enum plan_use use, int64_t count, int64_t element_bytes);
/* Widen a workspace that several ops share. */
void plan_at_least(struct plan *plan, int index, int64_t bytes);
int64_t plan_bytes_of(const struct plan *plan, enum plan_use use);
/* Workspace and what lies over it. */
int64_t plan_shared_bytes(const struct plan *plan);
int64_t plan_bytes(const struct plan *plan);
/* bytes, rounded up to the alignment; saturates instead of overflowing. */
int64_t plan_round(int64_t bytes);

/* Allocate the arena and point each buffer into it; NULL for those not wanted. Free it with ops->memory_free.
 */
int plan_carve(const struct plan *plan, const struct kernel_ops *ops, struct kernel_device *device,
               void **ret_arena, void *ret_buffers[PLAN_MAX], struct error *error);

#endif
