/* mamba_infer.c: Mamba-1 layers with recurrent states, for runner.c.
 *
 * A sequence's state holds for each layer the convolution's [d_conv-1,c] and the scan's [n,c], so one step is
 * the same forward with one token a sequence. */
#include "engine/models/mamba_layer.h"

#include <inttypes.h>

enum { RUN_XZ = RUNNER_FAMILY, RUN_XC, RUN_X_DBL, RUN_DT, RUN_Y, RUN_OUTPUT, RUN_SCRATCH };

void mamba_runner_plan(const struct model_config *c, int64_t max_tokens, int32_t max_seqs,
                       const struct kernel_ops *ops, struct plan *plan)
{
    (void)max_seqs;
    const int64_t f = sizeof(float);
    plan_add(plan, RUN_XZ, PLAN_WORKSPACE, max_tokens * 2 * c->d_inner, f);
    plan_add(plan, RUN_XC, PLAN_WORKSPACE, max_tokens * c->d_inner, f);
    plan_add(plan, RUN_X_DBL, PLAN_WORKSPACE, max_tokens * (c->dt_rank + 2 * c->d_state), f);
    plan_add(plan, RUN_DT, PLAN_WORKSPACE, max_tokens * c->d_inner, f);
    plan_add(plan, RUN_Y, PLAN_WORKSPACE, max_tokens * c->d_inner, f);
    plan_add(plan, RUN_OUTPUT, PLAN_WORKSPACE, max_tokens * c->d_model, f);
    plan_add(plan, RUN_SCRATCH, PLAN_WORKSPACE, layer_linear_workspace(c, ops, max_tokens, 0), 1);
}

int mamba_forward(struct runner *runner, const struct forward_part *part, struct error *error)
{
    const struct model *model = runner->model;
    const struct model_config *c = &model->config;
    void *const *at = runner->buffers;
    const int64_t d = c->d_model, first = part->row_begin;
    struct layer_flow flow = {
        .model = model,
        .adapter = part->full,
        .runner = runner,
        .part = part,
        .act = TYPE_F32,
        .workspace = at[RUN_SCRATCH],
        .rows = part->rows,
        .n_seqs = part->n_seqs,
        .seq_starts = part->seq_starts,
        .residual = (float *)at[RUNNER_RESIDUAL] + first * d,
        .residual_out = (float *)at[RUNNER_RESIDUAL] + first * d,
        .normed = (float *)at[RUNNER_HIDDEN] + first * d,
        .xz = at[RUN_XZ],
        .xc = at[RUN_XC],
        .x_dbl = at[RUN_X_DBL],
        .dt = at[RUN_DT],
        .y = at[RUN_Y],
        .output = at[RUN_OUTPUT],
    };
    int status = 0;
    for (flow.layer = 0; !status && flow.layer < c->n_layers; flow.layer++) {
        if (part->states) {
            float *state = part->states->pool + flow.layer * mamba_layer_state_floats(c);
            flow.conv_state = (struct state_view){state, part->states->slot_floats, part->slots};
            flow.scan_state = (struct state_view){state + (c->d_conv - 1) * c->d_inner,
                                                  part->states->slot_floats, part->slots};
        }
        status = layer_forward(&flow);
        flow.x = flow.output;
    }
    if (status)
        return model_status(status, error, "layer %" PRId64, flow.layer - 1);
    return model_status(layer_norm(&flow, layer_norm_f(&flow)), error, "final norm");
}
