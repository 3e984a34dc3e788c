/* plan.c: see plan.h. Pure arithmetic, and the one allocation. */
#include "engine/models/plan.h"

#include "engine/models/internal.h"

#include <inttypes.h>

int64_t plan_round(int64_t bytes)
{
    return bytes > INT64_MAX - PLAN_ALIGNMENT
               ? INT64_MAX / PLAN_ALIGNMENT * PLAN_ALIGNMENT
               : (bytes + PLAN_ALIGNMENT - 1) / PLAN_ALIGNMENT * PLAN_ALIGNMENT;
}

void plan_add(struct plan *plan, int index, enum plan_use use, int64_t count, int64_t element_bytes)
{
    int64_t bytes;
    if (__builtin_mul_overflow(count, element_bytes, &bytes))
        bytes = INT64_MAX;
    plan->buffers[index] = (struct plan_buffer){plan_round(bytes), use};
}

void plan_at_least(struct plan *plan, int index, int64_t bytes)
{
    if (plan->buffers[index].bytes < bytes)
        plan_add(plan, index, PLAN_WORKSPACE, bytes, 1);
}

static int64_t add_saturating(int64_t a, int64_t b)
{
    int64_t sum;
    return __builtin_add_overflow(a, b, &sum) ? INT64_MAX : sum;
}

int64_t plan_bytes_of(const struct plan *plan, enum plan_use use)
{
    int64_t bytes = 0;
    for (int i = 0; i < PLAN_MAX; i++)
        if (plan->buffers[i].use == use)
            bytes = add_saturating(bytes, plan->buffers[i].bytes);
    return bytes;
}

int64_t plan_shared_bytes(const struct plan *plan)
{
    int64_t workspace = plan_bytes_of(plan, PLAN_WORKSPACE), overlay = plan_bytes_of(plan, PLAN_OVERLAY);
    return workspace > overlay ? workspace : overlay;
}

int64_t plan_bytes(const struct plan *plan)
{
    return add_saturating(plan_bytes_of(plan, PLAN_WEIGHTS),
                          add_saturating(plan_bytes_of(plan, PLAN_ACTIVATION), plan_shared_bytes(plan)));
}

/* Point the buffers of one use one behind another; returns the byte after the last. */
static char *carve(const struct plan *plan, enum plan_use use, char *next, void *buffers[PLAN_MAX])
{
    for (int i = 0; i < PLAN_MAX; i++) {
        if (plan->buffers[i].use != use || !plan->buffers[i].bytes)
            continue;
        buffers[i] = next;
        next += plan->buffers[i].bytes;
    }
    return next;
}

int plan_carve(const struct plan *plan, const struct kernel_ops *ops, struct kernel_device *device,
               void **ret_arena, void *ret_buffers[PLAN_MAX], struct error *error)
{
    int64_t bytes = plan_bytes(plan);
    void *arena = NULL;
    int status = bytes == INT64_MAX ? KERNEL_NO_MEMORY : ops->memory_alloc(device, (size_t)bytes, &arena);
    if (status)
        return model_status(status, error, "an arena of %" PRId64 " bytes", bytes);
    for (int i = 0; i < PLAN_MAX; i++)
        ret_buffers[i] = NULL;
    char *shared = carve(plan, PLAN_ACTIVATION, carve(plan, PLAN_WEIGHTS, arena, ret_buffers), ret_buffers);
    carve(plan, PLAN_WORKSPACE, shared, ret_buffers);
    carve(plan, PLAN_OVERLAY, shared, ret_buffers);
    *ret_arena = arena;
    return 0;
}

int64_t model_recompute_levels(const struct model *model)
{
    return model->family->recompute_levels(&model->config);
}

/* What a plan of these buffers takes in all. */
static int64_t total_bytes(const struct memory_plan *fixed, const struct plan *plan)
{
    return add_saturating(plan_bytes(plan),
                          fixed->parameter_bytes + fixed->gradient_bytes + fixed->optimizer_bytes);
}

/* Resolve, and the bytes that no level changes. */
static int resolve(const struct model *model, const struct plan_request *request,
                   struct plan_request *ret_request, struct plan *ret_plan, struct memory_plan *ret_fixed,
                   struct error *error)
{
    struct plan_request resolved = *request;
    int64_t levels = model_recompute_levels(model);
    if (request->max_tokens < 1 || request->max_tokens > INT32_MAX || request->max_seqs < 1)
        return error_set(error, ERROR_INVALID, "a training batch holds from 1 to %d tokens", INT32_MAX);
    if (request->recompute < 0 || request->byte_limit < 0)
        return error_set(error, ERROR_INVALID, "a recompute level and a limit of bytes are at least 0");
    *ret_fixed = (struct memory_plan){0};
    int code = adapter_bytes(model, request->adaptation, &request->lora, &ret_fixed->parameter_bytes,
                             &ret_fixed->gradient_bytes, error);
    if (code)
        return code;
    ret_fixed->optimizer_bytes = 2 * ret_fixed->gradient_bytes;
    if (resolved.recompute > levels)
        resolved.recompute = levels;
    pass_plan(model, &resolved, ret_plan);
    while (request->byte_limit && resolved.recompute < levels &&
           total_bytes(ret_fixed, ret_plan) > request->byte_limit) {
        resolved.recompute++;
        pass_plan(model, &resolved, ret_plan);
    }
    *ret_request = resolved;
    return 0;
}

int plan_resolve(const struct model *model, const struct plan_request *request,
                 struct plan_request *ret_request, struct plan *ret_plan, struct error *error)
{
    struct memory_plan fixed;
    return resolve(model, request, ret_request, ret_plan, &fixed, error);
}

int model_plan(const struct model *model, const struct plan_request *request, struct memory_plan *ret_plan,
               struct error *error)
{
    struct memory_plan result;
    struct plan_request resolved;
    struct plan plan;
    int code = resolve(model, request, &resolved, &plan, &result, error);
    if (code)
        return code;
    result.weight_bytes = plan_bytes_of(&plan, PLAN_WEIGHTS);
    result.activation_bytes = plan_bytes_of(&plan, PLAN_ACTIVATION);
    result.workspace_bytes = plan_shared_bytes(&plan);
    result.total_bytes = total_bytes(&result, &plan);
    result.recompute = resolved.recompute;
    *ret_plan = result;
    return 0;
}
