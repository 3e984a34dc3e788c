/* pass.c: one training or evaluation pass over a micro-batch: embeddings, the family's layers, head and loss,
 * and back again.
 *
 * The head is the widest product of a small model. Where many rows have no target (prompts) it runs over the others
 * alone: they are gathered run by run before it and its gradient is spread out after it. Everything is allocated by
 * pass_create; pass_run allocates nothing and waits for nothing: loss and count of right answers add up on the device
 * until pass_collect fetches them. The device's owner thread alone uses a pass. */
#include "engine/models/internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* What PASS_SUMS holds. */
struct pass_sums {
    double loss_sum;
    int64_t n_correct;
    double squares; /* of the gradients that were asked for last */
};

/* ---- memory ---- */

/* Bytes of a weight's copy in the type of the products; 0 where they read the weight itself: that of the base, or a
 * full fine-tune's fp32 master. The host's ops convert as they read, so it never copies. An embedding that is not the
 * head is only looked up. */
static int64_t copy_bytes(const struct model *model, const struct plan_request *request, int64_t index)
{
    const struct weight *weight = &model->weights[index];
    enum kernel_type type = request->adaptation == ADAPT_FULL ? TYPE_F32 : weight->type;
    if (weight->fp32 || type == request->act || model->is_host ||
        (index == model->embedding && index != model->head))
        return 0;
    return plan_round(weight->count * (int64_t)kernel_type_size(request->act));
}

void pass_plan(const struct model *model, const struct plan_request *request, struct plan *ret_plan)
{
    const struct model_config *config = &model->config;
    const int64_t tokens = request->max_tokens, stream = tokens * config->d_model;
    const int64_t size = (int64_t)kernel_type_size(request->act);
    struct plan plan = {0};
    int64_t weight_bytes = 0;
    for (int64_t i = 0; i < model->n_weights; i++)
        weight_bytes += copy_bytes(model, request, i);
    plan_add(&plan, PASS_IDS, PLAN_ACTIVATION, tokens, sizeof(int32_t));
    plan_add(&plan, PASS_TARGETS, PLAN_ACTIVATION, tokens, sizeof(int32_t));
    plan_add(&plan, PASS_SUMS, PLAN_ACTIVATION, 1, sizeof(struct pass_sums));
    plan_add(&plan, PASS_RESIDUAL, PLAN_ACTIVATION, stream, sizeof(float));
    plan_add(&plan, PASS_NORMED, PLAN_ACTIVATION, stream, size);
    plan_add(&plan, PASS_ROWS, PLAN_ACTIVATION, stream, size);
    if (request->act == TYPE_F32) /* otherwise nothing reads the stream any more when its gradient begins */
        plan_add(&plan, PASS_DRESIDUAL, PLAN_ACTIVATION, stream, sizeof(float));
    plan_add(&plan, PASS_HEAD, PLAN_OVERLAY,
             model->ops->head_workspace(tokens, config->d_model, config->vocab_size, true), 1);
    plan_add(&plan, PASS_WEIGHTS, PLAN_WEIGHTS, weight_bytes, 1);
    model->family->pass_plan(config, request, model->ops, &plan);
    *ret_plan = plan;
}

/* Fill PASS_WEIGHTS. */
static int copy_weights(struct pass *pass, struct error *error)
{
    const struct model *model = pass->model;
    char *next = pass->buffers[PASS_WEIGHTS];
    int status = 0;
    pass->copies.type = pass->request.act;
    if (!next)
        return 0;
    pass->copies.data = calloc((size_t)model->n_weights, sizeof *pass->copies.data);
    if (!pass->copies.data)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a training pass");
    for (int64_t i = 0; !status && i < model->n_weights; i++) {
        const struct weight *weight = &model->weights[i];
        int64_t bytes = copy_bytes(model, &pass->request, i);
        if (!bytes)
            continue;
        pass->copies.data[i] = next;
        next += bytes;
        if (pass->adapter->adaptation == ADAPT_FULL) {
            struct param_slice *slice = &pass->adapter->parameters[i].slice;
            slice->copy = pass->copies.data[i];
            slice->copy_type = pass->copies.type;
        } else {
            status = model->ops->cast(model->device, pass->copies.data[i], pass->copies.type, weight->data,
                                      weight->type, weight->count);
        }
    }
    return status ? model_status(status, error, "converted weights") : adapter_refresh(pass->adapter, error);
}

int pass_create(struct model *model, struct adapter *adapter, const struct plan_request *request,
                struct pass **ret_pass, struct error *error)
{
    struct plan plan;
    if (adapter->model != model)
        return error_set(error, ERROR_INVALID, "an adapter of another model");
    struct pass *pass = calloc(1, sizeof *pass);
    if (!pass)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a training pass");
    pass->model = model;
    pass->adapter = adapter;
    pass->request = *request;
    pass->request.adaptation = adapter->adaptation;
    pass->request.lora = adapter->lora;
    int code = plan_resolve(model, &pass->request, &pass->request, &plan, error);
    if (code)
        goto done;
    pass->head_bytes = plan.buffers[PASS_HEAD].bytes;
    pass->host_targets = malloc((size_t)request->max_tokens * sizeof *pass->host_targets);
    if (!pass->host_targets)
        code = error_set(error, ERROR_NO_MEMORY, "no memory for a training pass");
    if (!code)
        code = replay_create(pass, error);
    if (!code)
        code = plan_carve(&plan, model->ops, model->device, &pass->arena, pass->buffers, error);
    if (!pass->buffers[PASS_DRESIDUAL])
        pass->buffers[PASS_DRESIDUAL] = pass->buffers[PASS_RESIDUAL];
    for (int64_t i = 0; adapter->adaptation == ADAPT_FULL && i < model->n_weights; i++)
        adapter->parameters[i].slice.keep_grad = model_is_projection(model, i);
    if (!code)
        code = copy_weights(pass, error);
    if (!code)
        code =
            model_status(model->ops->zero(model->device, pass->buffers[PASS_SUMS], sizeof(struct pass_sums)),
                         error, "sums");
done:
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
    for (int64_t i = 0; pass->adapter->adaptation == ADAPT_FULL && i < pass->model->n_weights; i++) {
        struct param_slice *slice = &pass->adapter->parameters[i].slice;
        if (pass->copies.data && pass->copies.data[i])
            slice->copy = NULL;
        slice->keep_grad = false;
    }
    free(pass->copies.data);
    replay_free(pass);
    if (pass->arena)
        pass->model->ops->memory_free(pass->model->device, pass->arena);
    free(pass->host_targets);
    free(pass);
}

/* ---- the batch ---- */

static int check_batch(const struct pass *pass, const struct batch *batch, struct error *error)
{
    const int64_t vocab = pass->model->config.vocab_size;
    if (batch->n_tokens < 1 || batch->n_tokens > pass->request.max_tokens || batch->n_seqs < 1 ||
        batch->n_seqs > pass->request.max_seqs)
        return error_set(error, ERROR_INVALID,
                         "a batch of %" PRId64 " tokens in %" PRId32 " sequences where %" PRId64
                         " in %" PRId32 " fit",
                         batch->n_tokens, batch->n_seqs, pass->request.max_tokens, pass->request.max_seqs);
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
static int move_counted(const struct pass *pass, const struct batch *batch, void *spread, void *packed,
                        bool to_packed)
{
    const struct model *model = pass->model;
    const int64_t d = model->config.d_model;
    const enum kernel_type act = pass->request.act;
    int64_t begin, end = 0, at = 0;
    int status = 0;
    while (!status && next_run(batch, end, &begin, &end)) {
        void *one = element_at(spread, begin * d, act), *other = element_at(packed, at * d, act);
        status = model->ops->copy(model->device, to_packed ? other : one, to_packed ? one : other,
                                  (size_t)((end - begin) * d) * kernel_type_size(act));
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

/* Gathering costs a pass over the rows or two; below this share of rows without a target it saves less. */
static bool worth_gathering(int64_t counted, int64_t tokens)
{
    return counted < tokens - tokens / 8;
}

/* Loss of the rows that count, added to the sums; going backward, d(hidden) in PASS_ROWS as well. `counted`: how many
 * rows do, at least one. */
static int head(const struct pass *pass, const struct batch *batch, const struct pass_options *options,
                int64_t counted)
{
    const struct model *model = pass->model;
    const struct kernel_ops *ops = model->ops;
    void *const *at = pass->buffers;
    const int64_t d = model->config.d_model;
    const bool gather = worth_gathering(counted, batch->n_tokens);
    struct weight_view weight = model_product_view(model, pass->adapter, &pass->copies, model->head);
    struct head_args args = {.rows = gather ? counted : batch->n_tokens,
                             .d_model = d,
                             .vocab = model->config.vocab_size,
                             .hidden = gather ? at[PASS_ROWS] : at[PASS_NORMED],
                             .weight = weight.data,
                             .weight_type = weight.type,
                             .act = pass->request.act,
                             .tf32 = pass->request.tf32,
                             .targets = at[PASS_TARGETS],
                             .loss_sum = &((struct pass_sums *)at[PASS_SUMS])->loss_sum,
                             .n_correct = &((struct pass_sums *)at[PASS_SUMS])->n_correct,
                             .d_weight = options->backward ? weight.grad : NULL,
                             .grad_scale = options->grad_scale,
                             .workspace = at[PASS_HEAD],
                             .workspace_bytes = pass->head_bytes};
    if (options->backward)
        args.d_hidden = gather ? at[PASS_DRESIDUAL] : at[PASS_ROWS];
    int64_t n = 0;
    for (int64_t t = 0; gather && t < batch->n_tokens; t++)
        if (batch->targets[t] >= 0)
            pass->host_targets[n++] = batch->targets[t];
    int status = ops->copy_in(model->device, at[PASS_TARGETS], gather ? pass->host_targets : batch->targets,
                              (size_t)args.rows * sizeof *pass->host_targets);
    if (!status && gather)
        status = move_counted(pass, batch, at[PASS_NORMED], at[PASS_ROWS], true);
    if (!status)
        status = ops->head(model->device, &args);
    if (!status && options->backward && gather) {
        status = ops->zero(model->device, at[PASS_ROWS],
                           (size_t)(batch->n_tokens * d) * kernel_type_size(pass->request.act));
        if (!status)
            status = move_counted(pass, batch, at[PASS_ROWS], at[PASS_DRESIDUAL], false);
    }
    if (!status && options->backward)
        status = ops->zero(model->device, at[PASS_DRESIDUAL], (size_t)(batch->n_tokens * d) * sizeof(float));
    return status;
}

/* ---- the pass ---- */

static int backward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                    struct error *error)
{
    int code = pass->model->family->pass_backward(pass, batch, options, error);
    pass->fresh = false;
    if (!code && adapter_trains(pass->adapter, TARGET_EMBEDDINGS))
        code = model_status(embed_backward(pass, batch), error, "embeddings backward");
    return code;
}

int pass_run(struct pass *pass, const struct batch *batch, const struct pass_options *options,
             struct error *error)
{
    int64_t counted = 0;
    int code = check_batch(pass, batch, error);
    if (!code && options->backward && !pass->adapter->trainable)
        code = error_set(error, ERROR_INVALID, "an adapter that is only served cannot be trained");
    if (!code)
        code = adapter_renew(pass->adapter, error);
    if (!code) {
        pass->fresh |= options->first;
        replay_begin(pass, batch, options);
    }
    if (!code)
        code = model_status(embed(pass, batch), error, "embeddings");
    if (!code)
        code = pass->model->family->pass_forward(pass, batch, options, error);
    for (int64_t t = 0; !code && t < batch->n_tokens; t++)
        counted += batch->targets[t] >= 0;
    if (code || !counted)
        return code;
    code = model_status(head(pass, batch, options, counted), error, "head");
    if (!code && options->backward)
        code = backward(pass, batch, options, error);
    if (!code)
        pass->n_targets += counted;
    return code;
}

static int queue_squares(const struct pass *pass, const struct param_slice *slices, int32_t n_slices)
{
    struct pass_sums *sums = pass->buffers[PASS_SUMS];
    const struct grad_norm_args args = {slices, n_slices, &sums->squares};
    return pass->model->ops->grad_norm(pass->model->device, &args);
}

int pass_squares(struct pass *pass, const struct param_slice *slices, int32_t n_slices, double *ret_sum,
                 struct error *error)
{
    const struct pass_sums *sums = pass->buffers[PASS_SUMS];
    int status = queue_squares(pass, slices, n_slices);
    if (!status)
        status = pass->model->ops->copy_out(pass->model->device, ret_sum, &sums->squares, sizeof *ret_sum);
    return model_status(status, error, "gradient norm");
}

int pass_collect(struct pass *pass, const struct param_slice *slices, int32_t n_slices,
                 struct pass_result *ret_result, struct error *error)
{
    const struct model *model = pass->model;
    struct pass_sums sums;
    int status = n_slices ? queue_squares(pass, slices, n_slices) : 0;
    if (!status)
        status = model->ops->copy_out(model->device, &sums, pass->buffers[PASS_SUMS], sizeof sums);
    if (!status)
        status = model->ops->zero(model->device, pass->buffers[PASS_SUMS], sizeof sums);
    if (status)
        return model_status(status, error, "loss");
    *ret_result = (struct pass_result){sums.loss_sum, pass->n_targets, sums.n_correct, sums.squares};
    pass->n_targets = 0;
    return 0;
}
