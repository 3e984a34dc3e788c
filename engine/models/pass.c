/* pass.c: one training or evaluation pass over a micro-batch: embeddings, the family's layers, head and loss,
 * and back again.
 *
 * The head is the widest product of a small model, so it runs over the rows that have a target alone: they
 * are gathered run by run before it and its gradient is spread out after it. Everything is allocated by
 * pass_create; pass_run allocates nothing. The device's owner thread alone uses a pass. */
#include "engine/models/internal.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void pass_plan(const struct model *model, const struct plan_request *request, struct plan *ret_plan)
{
    const struct model_config *config = &model->config;
    const int64_t tokens = request->max_tokens, stream = tokens * config->d_model;
    struct plan plan = {0};
    plan_add(&plan, PASS_IDS, PLAN_ACTIVATION, tokens, sizeof(int32_t));
    plan_add(&plan, PASS_TARGETS, PLAN_ACTIVATION, tokens, sizeof(int32_t));
    plan_add(&plan, PASS_LOGPROBS, PLAN_ACTIVATION, tokens, sizeof(float));
    plan_add(&plan, PASS_ARGMAX, PLAN_ACTIVATION, tokens, sizeof(int32_t));
    plan_add(&plan, PASS_RESIDUAL, PLAN_ACTIVATION, (config->n_layers + 1) * stream, sizeof(float));
    plan_add(&plan, PASS_NORMED, PLAN_WORKSPACE, stream, sizeof(float));
    plan_add(&plan, PASS_ROWS, PLAN_WORKSPACE, stream, sizeof(float));
    plan_add(&plan, PASS_DRESIDUAL, PLAN_WORKSPACE, stream, sizeof(float));
    plan_add(&plan, PASS_SCRATCH, PLAN_WORKSPACE,
             model->ops->head_workspace(tokens, config->d_model, config->vocab_size, true), 1);
    if (config->proj_bias)
        plan_add(&plan, PASS_ONES, PLAN_WORKSPACE, tokens, sizeof(float));
    model->family->pass_plan(config, request, model->ops, &plan);
    *ret_plan = plan;
}

int pass_create(struct model *model, struct adapter *adapter, int64_t max_tokens, int32_t max_seqs,
                struct pass **ret_pass, struct error *error)
{
    struct plan plan;
    if (max_tokens < 1 || max_tokens > INT32_MAX || max_seqs < 1)
        return error_set(error, ERROR_INVALID, "a training batch holds from 1 to %d tokens", INT32_MAX);
    if (adapter->model != model)
        return error_set(error, ERROR_INVALID, "an adapter of another model");
    struct pass *pass = calloc(1, sizeof *pass);
    if (!pass)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a training pass");
    pass->model = model;
    pass->adapter = adapter;
    pass->max_tokens = max_tokens;
    pass->max_seqs = max_seqs;
    struct plan_request request = {adapter->adaptation, adapter->lora, max_tokens, max_seqs};
    pass_plan(model, &request, &plan);
    pass->scratch_bytes = plan.buffers[PASS_SCRATCH].bytes;
    pass->host_targets = malloc((size_t)max_tokens * sizeof *pass->host_targets);
    pass->host_logprobs = malloc((size_t)max_tokens * sizeof *pass->host_logprobs);
    pass->host_argmax = malloc((size_t)max_tokens * sizeof *pass->host_argmax);
    int code = 0;
    if (!pass->host_targets || !pass->host_logprobs || !pass->host_argmax)
        code = error_set(error, ERROR_NO_MEMORY, "no memory for a training pass");
    if (!code)
        code = plan_carve(&plan, model->ops, model->device, &pass->arena, pass->buffers, error);
    if (!code)
        code = linear_fill_ones(model, pass->buffers[PASS_ONES], max_tokens, error);
    if (code)
        pass_free(pass);
    else
        *ret_pass = pass;
    return code;
}

void pass_free(struct pass *pass)
{
    if (!pass)
        return;
    if (pass->arena)
        pass->model->ops->memory_free(pass->model->device, pass->arena);
    free(pass->host_targets);
    free(pass->host_logprobs);
    free(pass->host_argmax);
    free(pass);
}

/* ---- the batch ---- */

static int check_batch(const struct pass *pass, const struct batch *batch, struct error *error)
{
    const int64_t vocab = pass->model->config.vocab_size;
    if (batch->n_tokens < 1 || batch->n_tokens > pass->max_tokens || batch->n_seqs < 1 ||
        batch->n_seqs > pass->max_seqs)
        return error_set(error, ERROR_INVALID,
                         "a batch of %" PRId64 " tokens in %" PRId32 " sequences where %" PRId64
                         " in %" PRId32 " fit",
                         batch->n_tokens, batch->n_seqs, pass->max_tokens, pass->max_seqs);
    if (batch->seq_starts[0] != 0 || batch->seq_starts[batch->n_seqs] != batch->n_tokens)
        return error_set(error, ERROR_INVALID, "a batch's sequences must cover its tokens");
    for (int32_t s = 0; s < batch->n_seqs; s++)
        if (batch->seq_starts[s + 1] <= batch->seq_starts[s])
            return error_set(error, ERROR_INVALID, "sequence %" PRId32 " has no tokens", s);
    for (int64_t t = 0; t < batch->n_tokens; t++)
        if (batch->ids[t] < 0 || batch->ids[t] >= vocab || batch->targets[t] >= vocab)
            return error_set(error, ERROR_INVALID,
                             "a token id at row %" PRId64 " is outside the vocabulary of %" PRId64, t, vocab);
    return 0;
}

/* The next run of rows that have targets, from row `begin` on: *ret_end one past it. False when there is
 * none. */
static bool next_run(const struct batch *batch, int64_t begin, int64_t *ret_begin, int64_t *ret_end)
{
    while (begin < batch->n_tokens && batch->targets[begin] < 0)
        begin++;
    int64_t end = begin;
    while (end < batch->n_tokens && batch->targets[end] >= 0)
        end++;
    *ret_begin = begin;
    *ret_end = end;
    return end > begin;
}

/* Copy the rows that count between [T,d] (`spread`) and back to back (`packed`), in either direction. */
static int move_counted(const struct pass *pass, const struct batch *batch, float *spread, float *packed,
                        bool to_packed)
{
    const struct model *model = pass->model;
    const int64_t d = model->config.d_model;
    int64_t begin, end = 0, at = 0;
    int status = 0;
    while (!status && next_run(batch, end, &begin, &end)) {
        float *one = spread + begin * d, *other = packed + at * d;
        status = model->ops->copy(model->device, to_packed ? other : one, to_packed ? one : other,
                                  (size_t)((end - begin) * d) * sizeof(float));
        at += end - begin;
    }
    return status;
}

/* ---- the ends of the model ---- */

static int embed(const struct pass *pass, const struct batch *batch)
{
    const struct model *model = pass->model;
    struct weight_view table = model_view(model, pass->adapter, model->embedding);
    struct embedding_forward_args args = {.tokens = batch->n_tokens,
                                          .vocab = model->config.vocab_size,
                                          .d_model = model->config.d_model,
                                          .ids = pass->buffers[PASS_IDS],
                                          .table = table.data,
                                          .table_type = table.type,
                                          .act = TYPE_F32,
                                          .y = pass->buffers[PASS_RESIDUAL]};
    adapter_embed(pass->adapter, &args);
    int status = model->ops->copy_in(model->device, pass->buffers[PASS_IDS], batch->ids,
                                     (size_t)batch->n_tokens * sizeof *batch->ids);
    return status ? status : model->ops->embedding_forward(model->device, &args);
}

static int embed_backward(const struct pass *pass, const struct batch *batch)
{
    const struct model *model = pass->model;
    struct lora_pair pair;
    struct embedding_backward_args args = {.tokens = batch->n_tokens,
                                           .vocab = model->config.vocab_size,
                                           .d_model = model->config.d_model,
                                           .ids = pass->buffers[PASS_IDS],
                                           .dy = pass->buffers[PASS_DRESIDUAL],
                                           .act = TYPE_F32,
                                           .dtable = model_view(model, pass->adapter, model->embedding).grad};
    if (adapter_pair(pass->adapter, TARGET_EMBEDDINGS, -1, &pair)) {
        args.rank = pass->adapter->lora.rank;
        args.lora_a = pair.a->param;
        args.lora_b = pair.b->param;
        args.scale = pass->adapter->scale;
        args.da = pair.a->grad;
        args.db = pair.b->grad;
    }
    return model->ops->embedding_backward(model->device, &args);
}

/* Loss of the rows that count; going backward, d(hidden) spread out in PASS_ROWS as well. *ret_counted: rows.
 */
static int head(const struct pass *pass, const struct batch *batch, const struct pass_options *options,
                int64_t *ret_counted)
{
    const struct model *model = pass->model;
    const struct kernel_ops *ops = model->ops;
    void *const *at = pass->buffers;
    struct weight_view weight = model_view(model, pass->adapter, model->head);
    int64_t counted = 0;
    for (int64_t t = 0; t < batch->n_tokens; t++)
        if (batch->targets[t] >= 0)
            pass->host_targets[counted++] = batch->targets[t];
    *ret_counted = counted;
    if (!counted)
        return 0;
    struct head_args args = {.rows = counted,
                             .d_model = model->config.d_model,
                             .vocab = model->config.vocab_size,
                             .hidden = at[PASS_ROWS],
                             .weight = weight.data,
                             .weight_type = weight.type,
                             .act = TYPE_F32,
                             .targets = at[PASS_TARGETS],
                             .logprobs = at[PASS_LOGPROBS],
                             .argmax = at[PASS_ARGMAX],
                             .d_hidden = options->backward ? at[PASS_DRESIDUAL] : NULL,
                             .d_weight = options->backward ? weight.grad : NULL,
                             .grad_scale = options->grad_scale,
                             .workspace = at[PASS_SCRATCH],
                             .workspace_bytes = pass->scratch_bytes};
    size_t stream_bytes = (size_t)(batch->n_tokens * model->config.d_model) * sizeof(float);
    int status = ops->copy_in(model->device, at[PASS_TARGETS], pass->host_targets,
                              (size_t)counted * sizeof *pass->host_targets);
    if (!status)
        status = move_counted(pass, batch, at[PASS_NORMED], at[PASS_ROWS], true);
    if (!status)
        status = ops->head(model->device, &args);
    if (!status && options->backward) {
        status = ops->zero(model->device, at[PASS_ROWS], stream_bytes);
        if (!status)
            status = move_counted(pass, batch, at[PASS_ROWS], at[PASS_DRESIDUAL], false);
        if (!status)
            status = ops->zero(model->device, at[PASS_DRESIDUAL], stream_bytes);
    }
    return status;
}

/* ---- the pass ---- */

static int backward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                    struct error *error)
{
    int code = pass->model->family->pass_backward(pass, batch, options, error);
    if (!code && adapter_trains(pass->adapter, TARGET_EMBEDDINGS))
        code = model_status(embed_backward(pass, batch), error, "embeddings backward");
    return code;
}

static int collect(const struct pass *pass, int64_t counted, struct pass_result *ret_result,
                   struct error *error)
{
    const struct model *model = pass->model;
    struct pass_result result = {.n_targets = counted};
    int status = model->ops->copy_out(model->device, pass->host_logprobs, pass->buffers[PASS_LOGPROBS],
                                      (size_t)counted * sizeof *pass->host_logprobs);
    if (!status)
        status = model->ops->copy_out(model->device, pass->host_argmax, pass->buffers[PASS_ARGMAX],
                                      (size_t)counted * sizeof *pass->host_argmax);
    if (status)
        return model_status(status, error, "loss");
    for (int64_t i = 0; i < counted; i++) {
        result.loss_sum -= (double)pass->host_logprobs[i];
        result.n_correct += pass->host_argmax[i] == pass->host_targets[i];
    }
    if (!isfinite(result.loss_sum))
        return error_set(error, ERROR_DIVERGED, "the loss is not finite");
    *ret_result = result;
    return 0;
}

int pass_run(struct pass *pass, const struct batch *batch, const struct pass_options *options,
             struct pass_result *ret_result, struct error *error)
{
    int64_t counted = 0;
    int code = check_batch(pass, batch, error);
    if (!code && options->backward && !pass->adapter->trainable)
        code = error_set(error, ERROR_INVALID, "an adapter that is only served cannot be trained");
    if (!code)
        code = adapter_renew(pass->adapter, error);
    if (!code)
        code = model_status(embed(pass, batch), error, "embeddings");
    if (!code)
        code = pass->model->family->pass_forward(pass, batch, options, error);
    if (!code)
        code = model_status(head(pass, batch, options, &counted), error, "head");
    if (!code && options->backward && counted > 0)
        code = backward(pass, batch, options, error);
    return code ? code : collect(pass, counted, ret_result, error);
}
