/* runner.c: inference: ragged forwards with recurrent states, logits of chosen rows, scores in chunks.
 *
 * A request's sequences may use different adapters. Those that share their weights (the base with any LoRA
 * adapters, or one full fine-tune) form a part, whose rows lie back to back: the big products run over the
 * whole part, the adapters' small ones over their own rows. Everything is allocated when the runner is
 * created; the device's owner thread alone uses it. */
#include "engine/models/internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { SCORE_ROWS = 512, DEVICE_SCORE_ROWS = 8192, U_FLOATS_PER_ROW = 64 };

/* ---- making one ---- */

static void plan_runner(const struct runner *runner, struct plan *plan)
{
    const struct model *model = runner->model;
    const struct model_config *config = &model->config;
    int64_t tokens = runner->max_tokens, seqs = runner->max_seqs, scored = runner->score_rows;
    int64_t act_bytes = (int64_t)kernel_type_size(model->act);
    *plan = (struct plan){0};
    plan_add(plan, RUNNER_IDS, PLAN_WORKSPACE, tokens, sizeof(int32_t));
    plan_add(plan, RUNNER_RESIDUAL, PLAN_WORKSPACE, tokens * config->d_model, sizeof(float));
    plan_add(plan, RUNNER_HIDDEN, PLAN_WORKSPACE, tokens * config->d_model, act_bytes);
    plan_add(plan, RUNNER_ROWS, PLAN_WORKSPACE, (seqs > scored ? seqs : scored) * config->d_model, act_bytes);
    plan_add(plan, RUNNER_LOGITS, PLAN_WORKSPACE, (int64_t)runner->max_logits * config->vocab_size,
             sizeof(float));
    plan_add(plan, RUNNER_TARGETS, PLAN_WORKSPACE, scored, sizeof(int32_t));
    plan_add(plan, RUNNER_LOGPROBS, PLAN_WORKSPACE, scored, sizeof(float));
    plan_add(plan, RUNNER_ARGMAX, PLAN_WORKSPACE, scored, sizeof(int32_t));
    plan_add(plan, RUNNER_TOP_IDS, PLAN_WORKSPACE, scored * KERNEL_TOP_MAX, sizeof(int32_t));
    plan_add(plan, RUNNER_TOP_LOGPROBS, PLAN_WORKSPACE, scored * KERNEL_TOP_MAX, sizeof(float));
    plan_add(plan, RUNNER_SCRATCH, PLAN_WORKSPACE,
             model->ops->head_workspace(scored, config->d_model, config->vocab_size, false), 1);
    plan_add(plan, RUNNER_U, PLAN_WORKSPACE, runner->u_floats, sizeof(float));
    model->family->runner_plan(config, tokens, runner->max_seqs, model->act, model->ops, plan);
}

static int make_runner(struct model *model, int64_t max_tokens, int32_t max_seqs, int32_t max_logits,
                       int64_t score_rows, struct runner **ret_runner, struct error *error)
{
    struct plan plan;
    if (max_tokens < 1 || max_tokens > INT32_MAX || max_seqs < 1)
        return error_set(error, ERROR_INVALID, "a runner needs room for at least one token");
    struct runner *runner = calloc(1, sizeof *runner);
    if (!runner)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a runner");
    runner->model = model;
    runner->max_tokens = max_tokens;
    runner->max_seqs = max_seqs;
    runner->max_logits = max_logits;
    runner->score_rows = max_tokens < score_rows ? max_tokens : score_rows;
    runner->u_floats = max_tokens * U_FLOATS_PER_ROW;
    if (runner->u_floats < LORA_MAX_RANK)
        runner->u_floats = LORA_MAX_RANK;
    plan_runner(runner, &plan);
    runner->scratch_bytes = plan.buffers[RUNNER_SCRATCH].bytes;
    runner->parts = calloc((size_t)max_seqs, sizeof *runner->parts);
    runner->spans = calloc((size_t)max_seqs, sizeof *runner->spans);
    runner->starts = calloc((size_t)max_seqs * 2, sizeof *runner->starts);
    runner->last_rows = calloc((size_t)max_seqs, sizeof *runner->last_rows);
    runner->family_memory = calloc(1, model->family->runner_memory(&model->config, max_seqs));
    int code = 0;
    if (!runner->family_memory || !runner->parts || !runner->spans || !runner->starts || !runner->last_rows)
        code = error_set(error, ERROR_NO_MEMORY, "no memory for a runner");
    if (!code)
        code = plan_carve(&plan, model->ops, model->device, &runner->arena, runner->buffers, error);
    if (code)
        runner_free(runner);
    else
        *ret_runner = runner;
    return code;
}

int runner_create(struct model *model, int64_t max_tokens, int32_t max_seqs, struct runner **ret_runner,
                  struct error *error)
{
    return make_runner(model, max_tokens, max_seqs, max_seqs, SCORE_ROWS, ret_runner, error);
}

int runner_create_for_scores(struct model *model, int64_t max_tokens, int32_t max_seqs,
                             struct runner **ret_runner, struct error *error)
{
    struct kernel_device_info info;
    if (model->ops->device_query(model->device, &info))
        return error_set(error, ERROR_DEVICE, "cannot query the device");
    return make_runner(model, max_tokens, max_seqs, 0, info.is_host ? SCORE_ROWS : DEVICE_SCORE_ROWS,
                       ret_runner, error);
}

void runner_free(struct runner *runner)
{
    if (!runner)
        return;
    if (runner->arena)
        runner->model->ops->memory_free(runner->model->device, runner->arena);
    free(runner->family_memory);
    free(runner->parts);
    free(runner->spans);
    free(runner->starts);
    free(runner->last_rows);
    free(runner);
}

/* ---- forward ---- */

static int check_spans(const struct runner *runner, const struct forward_request *request,
                       struct error *error)
{
    int32_t next = 0;
    for (int32_t i = 0; i < request->n_spans; i++) {
        const struct adapter_span *span = &request->spans[i];
        if (span->seq_begin != next || span->seq_end <= span->seq_begin)
            return error_set(error, ERROR_INVALID, "adapter spans must follow one another");
        if (span->adapter && span->adapter->model != runner->model)
            return error_set(error, ERROR_INVALID, "an adapter of another model");
        next = span->seq_end;
    }
    if (request->n_spans && next != request->n_seqs)
        return error_set(error, ERROR_INVALID, "adapter spans must cover all sequences");
    return 0;
}

static int check_request(const struct runner *runner, const struct forward_request *request,
                         struct error *error)
{
    if (request->n_seqs < 1 || request->n_seqs > runner->max_seqs)
        return error_set(error, ERROR_INVALID, "%" PRId32 " sequences where 1 to %" PRId32 " fit",
                         request->n_seqs, runner->max_seqs);
    if (request->seq_starts[0] != 0)
        return error_set(error, ERROR_INVALID, "the first sequence must start at row 0");
    for (int32_t s = 0; s < request->n_seqs; s++) {
        if (request->seq_starts[s + 1] <= request->seq_starts[s])
            return error_set(error, ERROR_INVALID, "sequence %" PRId32 " has no tokens", s);
        const int32_t none = request->from ? -1 : 0;
        if (request->states &&
            (!request->slots || request->slots[s] < none || request->slots[s] >= request->states->n_slots ||
             (request->from && (request->from[s] < none || request->from[s] >= request->states->n_slots))))
            return error_set(error, ERROR_INVALID, "sequence %" PRId32 " has no state slot", s);
    }
    int64_t rows = request->seq_starts[request->n_seqs];
    if (rows > runner->max_tokens)
        return error_set(error, ERROR_INVALID, "%" PRId64 " tokens where %" PRId64 " fit", rows,
                         runner->max_tokens);
    for (int64_t t = 0; t < rows; t++)
        if (request->ids[t] < 0 || request->ids[t] >= runner->model->config.vocab_size)
            return error_set(error, ERROR_INVALID,
                             "token id %" PRId32 " is outside the vocabulary of %" PRId64, request->ids[t],
                             runner->model->config.vocab_size);
    if (request->states && request->states->model != runner->model)
        return error_set(error, ERROR_INVALID, "states of another model");
    return check_spans(runner, request, error);
}

static const struct adapter *full_of(const struct adapter *adapter)
{
    return adapter && adapter->adaptation == ADAPT_FULL ? adapter : NULL;
}

/* Group the request's sequences into runner->parts. */
static void make_parts(struct runner *runner, const struct forward_request *request)
{
    const struct adapter_span whole = {NULL, 0, request->n_seqs};
    const struct adapter_span *spans = request->n_spans ? request->spans : &whole;
    int32_t n_spans = request->n_spans ? request->n_spans : 1, n_placed = 0, n_starts = 0;
    const int32_t *seq_starts = request->seq_starts;
    runner->n_parts = 0;
    for (int32_t i = 0; i < n_spans;) {
        const struct adapter *full = full_of(spans[i].adapter);
        struct forward_part *part = &runner->parts[runner->n_parts++];
        int32_t first = spans[i].seq_begin, last = first;
        *part = (struct forward_part){.full = full,
                                      .row_begin = seq_starts[first],
                                      .states = request->states,
                                      .from = !request->states ? NULL
                                              : request->from  ? request->from + first
                                                               : request->slots + first,
                                      .slots = request->states ? request->slots + first : NULL,
                                      .seq_starts = runner->starts + n_starts,
                                      .spans = runner->spans + n_placed};
        for (; i < n_spans && full_of(spans[i].adapter) == full; i++) {
            int64_t begin = seq_starts[spans[i].seq_begin];
            last = spans[i].seq_end;
            runner->spans[n_placed++] = (struct lora_span){full ? NULL : spans[i].adapter,
                                                           begin - part->row_begin, seq_starts[last] - begin};
            part->n_spans++;
        }
        part->n_seqs = last - first;
        part->rows = seq_starts[last] - part->row_begin;
        for (int32_t s = first; s <= last; s++)
            runner->starts[n_starts++] = seq_starts[s] - seq_starts[first];
    }
}

struct weight_copies runner_copies(const struct model *model, const struct adapter *full)
{
    return (struct weight_copies){model->act, full ? full->copies : NULL};
}

static struct weight_view product_view(const struct model *model, const struct adapter *full, int64_t index)
{
    struct weight_copies copies = runner_copies(model, full);
    return model_product_view(model, full, &copies, index);
}

/* The embeddings of a part's tokens, each span with its adapter. */
static int embed(const struct runner *runner, const struct forward_part *part)
{
    const struct model *model = runner->model;
    struct weight_view table = product_view(model, part->full, model->embedding);
    int status = 0;
    for (int32_t i = 0; !status && i < part->n_spans; i++) {
        const struct lora_span *span = &part->spans[i];
        int64_t row = part->row_begin + span->row_begin;
        struct embedding_forward_args args = {.tokens = span->rows,
                                              .vocab = model->config.vocab_size,
                                              .d_model = model->config.d_model,
                                              .ids = (const int32_t *)runner->buffers[RUNNER_IDS] + row,
                                              .table = table.data,
                                              .table_type = table.type,
                                              .act = TYPE_F32,
                                              .y = (float *)runner->buffers[RUNNER_RESIDUAL] +
                                                   row * model->config.d_model};
        adapter_embed(span->adapter, &args);
        status = model->ops->embedding_forward(model->device, &args);
    }
    return status;
}

int runner_lora(struct runner *runner, const struct forward_part *part, enum lora_target target,
                int64_t layer, const void *x, int64_t x_stride, void *y, int64_t y_stride)
{
    const struct model *model = runner->model;
    int64_t in, out;
    int status = 0;
    for (int32_t i = 0; !status && i < part->n_spans; i++) {
        const struct lora_span *span = &part->spans[i];
        struct lora_pair pair;
        if (!adapter_pair(span->adapter, target, layer, &pair))
            continue;
        int32_t rank = span->adapter->lora.rank;
        in = pair.a->count / rank;
        out = pair.b->count / rank;
        int64_t slice = runner->u_floats / rank;
        for (int64_t row = 0; !status && row < span->rows; row += slice) {
            int64_t at = span->row_begin + row;
            struct lora_forward_args args = {.rows = span->rows - row < slice ? span->rows - row : slice,
                                             .in = in,
                                             .out = out,
                                             .rank = rank,
                                             .x = element_at(x, at * x_stride, model->act),
                                             .x_stride = x_stride,
                                             .a = pair.a->param,
                                             .b = pair.b->param,
                                             .scale = span->adapter->scale,
                                             .u = runner->buffers[RUNNER_U],
                                             .y = element_at(y, at * y_stride, model->act),
                                             .y_stride = y_stride,
                                             .act = model->act};
            status = model->ops->lora_forward(model->device, &args);
        }
    }
    return status;
}

/* By the family's short path, or KERNEL_UNSUPPORTED. */
static int step(struct runner *runner, const struct forward_request *request)
{
    if (!request->states || request->from || !runner->max_logits || runner->n_parts != 1 ||
        runner->n_rows != runner->n_seqs)
        return KERNEL_UNSUPPORTED;
    return runner->model->family->step(runner, &runner->parts[0], request->ids);
}

static int forward(struct runner *runner, const struct forward_request *request, struct error *error)
{
    const struct model *model = runner->model;
    int code = 0;
    for (int32_t i = 0; !code && i < runner->n_parts; i++)
        code = adapter_renew(runner->parts[i].full, error);
    if (code)
        return code;
    int status = step(runner, request);
    runner->has_logits = !status;
    if (status != KERNEL_UNSUPPORTED)
        return model_status(status, error, "step");
    status = model->ops->copy_in(model->device, runner->buffers[RUNNER_IDS], request->ids,
                                 (size_t)runner->n_rows * sizeof *request->ids);
    code = model_status(status, error, "token ids");
    for (int32_t i = 0; !code && i < runner->n_parts; i++) {
        const struct forward_part *part = &runner->parts[i];
        code = model_status(embed(runner, part), error, "embeddings");
        if (!code)
            code = model->family->forward(runner, part, error);
    }
    return code;
}

int runner_forward(struct runner *runner, const struct forward_request *request, struct error *error)
{
    int code = check_request(runner, request, error);
    if (code)
        return code;
    make_parts(runner, request);
    runner->has_logits = false;
    runner->yield = request->yield;
    runner->yield_arg = request->yield_arg;
    runner->n_seqs = request->n_seqs;
    runner->n_rows = request->seq_starts[request->n_seqs];
    for (int32_t s = 0; s < request->n_seqs; s++)
        runner->last_rows[s] = request->seq_starts[s + 1] - 1;
    code = forward(runner, request, error);
    if (code)
        runner->n_rows = runner->n_seqs = runner->n_parts = 0;
    return code;
}

/* ---- logits ---- */

/* The weights that made a row. */
static const struct adapter *full_at(const struct runner *runner, int64_t row)
{
    int32_t i = 0;
    while (i + 1 < runner->n_parts && row >= runner->parts[i + 1].row_begin)
        i++;
    return runner->parts[i].full;
}

int runner_logits(struct runner *runner, const int32_t *rows, int32_t n_rows, const float **ret_logits,
                  struct error *error)
{
    const struct model *model = runner->model;
    const struct model_config *config = &model->config;
    float *logits = runner->buffers[RUNNER_LOGITS];
    void *hidden = runner->buffers[RUNNER_HIDDEN], *gathered = runner->buffers[RUNNER_ROWS];
    const enum kernel_type act = model->act;
    const int64_t d = config->d_model;
    int status = 0;
    if (!rows) {
        if (runner->has_logits) {
            *ret_logits = logits;
            return 0;
        }
        rows = runner->last_rows;
        n_rows = runner->n_seqs;
    }
    if (n_rows < 1 || n_rows > runner->max_logits)
        return error_set(error, ERROR_INVALID, "logits of %" PRId32 " rows where 1 to %" PRId32 " fit",
                         n_rows, runner->max_logits);
    bool in_place = true;
    for (int32_t i = 0; i < n_rows; i++) {
        if (rows[i] < 0 || rows[i] >= runner->n_rows)
            return error_set(error, ERROR_INVALID, "row %" PRId32 " is not one of the last forward's",
                             rows[i]);
        in_place = in_place && rows[i] == rows[0] + i;
    }
    for (int32_t i = 0; !in_place && !status && i < n_rows; i++)
        status = model->ops->copy(model->device, element_at(gathered, i * d, act),
                                  element_at(hidden, rows[i] * d, act), (size_t)d * kernel_type_size(act));
    const void *from = in_place ? element_at(hidden, rows[0] * d, act) : gathered;
    for (int32_t i = 0, end; !status && i < n_rows; i = end) {
        const struct adapter *full = full_at(runner, rows[i]);
        for (end = i + 1; end < n_rows && full_at(runner, rows[end]) == full;)
            end++;
        struct weight_view head = product_view(model, full, model->head);
        struct gemm_args args = {.m = end - i,
                                 .n = config->vocab_size,
                                 .k = d,
                                 .transpose_b = true,
                                 .alpha = 1,
                                 .a = element_at(from, i * d, act),
                                 .a_stride = d,
                                 .b = head.data,
                                 .b_stride = d,
                                 .c = logits + i * config->vocab_size,
                                 .c_stride = config->vocab_size,
                                 .act = act,
                                 .b_type = head.type,
                                 .c_type = TYPE_F32,
                                 .tf32 = model->tf32};
        status = model->ops->gemm(model->device, &args);
    }
    runner->has_logits = false; /* another choice of rows is there */
    if (status)
        return model_status(status, error, "head");
    *ret_logits = logits;
    return 0;
}

/* ---- scores ---- */

/* One chunk of rows that share the weights of row `row`; the outputs are the chunk's own. */
static int score_chunk(const struct runner *runner, int64_t row, const void *hidden, int64_t rows,
                       const int32_t *targets, float *logprobs, int32_t *argmax, int32_t n_top,
                       int32_t *top_ids, float *top_logprobs)
{
    const struct model *model = runner->model;
    const struct kernel_ops *ops = model->ops;
    void *const *buffers = runner->buffers;
    struct weight_view head = product_view(model, full_at(runner, row), model->head);
    bool top = n_top && top_ids && top_logprobs;
    struct head_args args = {.rows = rows,
                             .d_model = model->config.d_model,
                             .vocab = model->config.vocab_size,
                             .hidden = hidden,
                             .weight = head.data,
                             .weight_type = head.type,
                             .act = model->act,
                             .tf32 = model->tf32,
                             .targets = buffers[RUNNER_TARGETS],
                             .logprobs = logprobs ? buffers[RUNNER_LOGPROBS] : NULL,
                             .argmax = argmax ? buffers[RUNNER_ARGMAX] : NULL,
                             .n_top = top ? n_top : 0,
                             .top_ids = top ? buffers[RUNNER_TOP_IDS] : NULL,
                             .top_logprobs = top ? buffers[RUNNER_TOP_LOGPROBS] : NULL,
                             .workspace = buffers[RUNNER_SCRATCH],
                             .workspace_bytes = runner->scratch_bytes};
    const struct {
        void *to;
        int index;
        int64_t bytes;
    } outputs[] = {{logprobs, RUNNER_LOGPROBS, (int64_t)sizeof *logprobs},
                   {argmax, RUNNER_ARGMAX, (int64_t)sizeof *argmax},
                   {top ? top_ids : NULL, RUNNER_TOP_IDS, n_top * (int64_t)sizeof *top_ids},
                   {top ? top_logprobs : NULL, RUNNER_TOP_LOGPROBS, n_top * (int64_t)sizeof *top_logprobs}};
    int status =
        ops->copy_in(model->device, buffers[RUNNER_TARGETS], targets, (size_t)rows * sizeof *targets);
    if (!status)
        status = ops->head(model->device, &args);
    for (size_t i = 0; !status && i < sizeof outputs / sizeof *outputs; i++)
        if (outputs[i].to)
            status = ops->copy_out(model->device, outputs[i].to, buffers[outputs[i].index],
                                   (size_t)(rows * outputs[i].bytes));
    return status;
}

int runner_score(struct runner *runner, int64_t row_begin, int64_t row_end, const int32_t *targets,
                 float *logprobs, int32_t *argmax, int32_t n_top, int32_t *top_ids, float *top_logprobs,
                 struct error *error)
{
    int64_t vocab = runner->model->config.vocab_size;
    if (row_begin < 0 || row_end > runner->n_rows || row_begin > row_end)
        return error_set(error, ERROR_INVALID, "rows %" PRId64 "..%" PRId64 " are not the last forward's",
                         row_begin, row_end);
    if (n_top < 0 || n_top > KERNEL_TOP_MAX || n_top > vocab)
        return error_set(error, ERROR_INVALID, "at most %d alternatives a token", KERNEL_TOP_MAX);
    for (int64_t i = 0; i < row_end - row_begin; i++)
        if (targets[i] >= vocab)
            return error_set(error, ERROR_INVALID,
                             "token id %" PRId32 " is outside the vocabulary of %" PRId64, targets[i], vocab);
    for (int64_t row = row_begin, rows; row < row_end; row += rows) {
        const struct adapter *full = full_at(runner, row);
        rows = 1;
        while (rows < runner->score_rows && row + rows < row_end && full_at(runner, row + rows) == full)
            rows++;
        int64_t at = row - row_begin;
        const void *hidden = element_at(runner->buffers[RUNNER_HIDDEN], row * runner->model->config.d_model,
                                        runner->model->act);
        int status = score_chunk(runner, row, hidden, rows, targets + at, logprobs ? logprobs + at : NULL,
                                 argmax ? argmax + at : NULL, n_top, top_ids ? top_ids + at * n_top : NULL,
                                 top_logprobs ? top_logprobs + at * n_top : NULL);
        if (status)
            return model_status(status, error, "head");
    }
    return 0;
}

int64_t runner_score_most(const struct runner *runner)
{
    return runner->score_rows;
}

int runner_score_rows(struct runner *runner, const int32_t *rows, int64_t n_rows, const int32_t *targets,
                      float *logprobs, int32_t *argmax, struct error *error)
{
    const struct model *model = runner->model;
    const int64_t d = model->config.d_model;
    void *gathered = runner->buffers[RUNNER_ROWS];
    int status;
    if (n_rows < 1 || n_rows > runner->score_rows)
        return error_set(error, ERROR_INVALID, "scores of %" PRId64 " rows where 1 to %" PRId64 " fit",
                         n_rows, runner->score_rows);
    for (int64_t i = 0; i < n_rows; i++)
        if (rows[i] < 0 || rows[i] >= runner->n_rows || targets[i] < 0 ||
            targets[i] >= model->config.vocab_size || full_at(runner, rows[i]) != full_at(runner, rows[0]))
            return error_set(error, ERROR_INVALID, "row %" PRId32 " cannot be scored against %" PRId32,
                             rows[i], targets[i]);
    /* Rows are looked up as embeddings are; the ids of the last forward have done their work. */
    const struct embedding_forward_args gather = {.tokens = n_rows,
                                                  .vocab = runner->n_rows,
                                                  .d_model = d,
                                                  .ids = runner->buffers[RUNNER_IDS],
                                                  .table = runner->buffers[RUNNER_HIDDEN],
                                                  .table_type = model->act,
                                                  .act = model->act,
                                                  .y = gathered};
    status =
        model->ops->copy_in(model->device, runner->buffers[RUNNER_IDS], rows, (size_t)n_rows * sizeof *rows);
    if (!status)
        status = model->ops->embedding_forward(model->device, &gather);
    if (!status)
        status = score_chunk(runner, rows[0], gathered, n_rows, targets, logprobs, argmax, 0, NULL, NULL);
    return status ? model_status(status, error, "head") : 0;
}
