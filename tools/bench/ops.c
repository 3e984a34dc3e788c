/* ops.c: `adderd-bench ops`: every kernel where it stands in a step of hatchling, so that caches and memory are
 * as they are in use: sixteen layers with weights and activations of their own, random contents. Training is
 * one forward, backward and update of LoRA (in_proj and x_proj) over 8 sequences of 256 tokens; decoding is one
 * token for each of 1 and 16 sequences, once for each way to store the weights. What the engine adds on top
 * shows in the difference to `train` and `decode`. */
#include "tools/bench/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

enum {
    D_MODEL = 256,
    N_LAYER = 16,
    D_INNER = 512,
    D_STATE = 16,
    DT_RANK = 16,
    D_CONV = 4,
    VOCAB = 8192,
    X_DBL = DT_RANK + 2 * D_STATE,
    RANK = 8,
    SEQS = 8,
    SEQ_TOKENS = 256,
    SEQS_MOST = 16,
    TRAIN_STEPS = 3,
    DECODE_STEPS = 400,
    TRAIN_BYTES = 1 << 30,
    DECODE_BYTES = 128 << 20,
};
static const double projections =
    D_MODEL * 2.0 * D_INNER + D_INNER * X_DBL + DT_RANK * D_INNER + D_INNER * D_MODEL;
static const double parameters =
    N_LAYER * (D_MODEL * 2.0 * D_INNER + D_INNER * X_DBL + DT_RANK * D_INNER + D_INNER * D_MODEL +
               D_INNER * (D_CONV + D_STATE + 3.0) + D_MODEL) +
    VOCAB * D_MODEL + D_MODEL;
/* Arithmetic of the scan an element of state: exponential 12, update and output 6; twice the rest backwards. */
static const double scan_flop = 18, scan_backward_flop = 34;

struct adapter {
    float *a, *b, *da, *db, *u;
    int64_t in, out;
};

struct layer {
    void *in_proj, *x_proj, *dt_proj, *out_proj; /* stored as model.type */
    float *conv_weight, *conv_bias, *a, *d, *dt_bias, *norm;
    struct adapter in_adapter, x_adapter;
    float *normed, *residual, *rstd, *xz, *conv, *x_dbl, *dt, *y, *chunk_states;
    float *conv_state, *scan_state; /* [SEQS_MOST] slots */
};

enum kind {
    EMBEDDING,
    NORM,
    IN_PROJ,
    CONV,
    X_PROJ,
    DT_PROJ,
    SCAN,
    OUT_PROJ,
    LORA,
    HEAD,
    NORM_BACK,
    IN_PROJ_BACK,
    CONV_BACK,
    X_PROJ_BACK,
    DT_PROJ_BACK,
    SCAN_BACK,
    OUT_PROJ_BACK,
    LORA_BACK,
    UPDATE,
    N_KINDS,
};
static const char *const kind_names[N_KINDS] = {
    "embedding",
    "rmsnorm",
    "in_proj 256 -> 1024",
    "conv + silu",
    "x_proj 512 -> 48",
    "dt_proj 16 -> 512",
    "scan",
    "out_proj 512 -> 256",
    "lora",
    "head",
    "rmsnorm backward",
    "in_proj dx",
    "conv backward",
    "x_proj dx",
    "dt_proj dx",
    "scan backward",
    "out_proj dx",
    "lora backward",
    "grad norm + adamw",
};

struct model {
    const struct kernel_ops *ops;
    struct kernel_device *device;
    enum kernel_type type;
    int64_t rows;
    int32_t n_seqs;
    int32_t starts[SEQS_MOST + 1];
    struct layer layers[N_LAYER];
    void *table;
    float *final_norm, *embedded, *out, *logits, *dresidual, *dxz, *dconv, *dx_dbl, *ddt, *dy, *du;
    int32_t *ids, *targets;
    float *logprobs;
    void *workspace;
    int64_t workspace_bytes;
    struct param_slice slices[N_LAYER * 4];
    struct bench_op meters[N_KINDS];
    int status; /* the first that was not KERNEL_OK */
    uint64_t random;
    char *arena; /* everything above lies in it, as the engine would have it */
    int64_t arena_bytes, arena_used;
};

/* ---- making the model ---- */

static void *take(struct model *m, int64_t bytes)
{
    int64_t padded = (bytes + 63) / 64 * 64;
    if (m->status == KERNEL_OK && padded > m->arena_bytes - m->arena_used)
        m->status = KERNEL_NO_MEMORY;
    if (m->status != KERNEL_OK)
        return NULL;
    m->arena_used += padded;
    return m->arena + m->arena_used - padded;
}

static float *take_floats(struct model *m, int64_t count, float low, float high)
{
    float *array = take(m, count * (int64_t)sizeof(float));
    for (int64_t i = 0; array != NULL && i < count; i++) {
        m->random = m->random * 6364136223846793005u + 1442695040888963407u;
        array[i] = low + (high - low) * (float)(m->random >> 40) * 0x1p-24f;
    }
    return array;
}

static void *take_weights(struct model *m, int64_t count, float most)
{
    if (m->type == TYPE_F32)
        return take_floats(m, count, -most, most);
    void *narrow = take(m, count * (int64_t)kernel_type_size(m->type));
    int64_t used = m->arena_used;
    float *wide = take_floats(m, count, -most, most);
    if (wide != NULL)
        m->status = m->ops->cast(m->device, narrow, m->type, wide, TYPE_F32, count);
    m->arena_used = used;
    return narrow;
}

static void take_adapter(struct model *m, struct adapter *adapter, int64_t in, int64_t out,
                         struct param_slice *slices)
{
    float **moments[4] = {&slices[0].m, &slices[0].v, &slices[1].m, &slices[1].v};
    int64_t counts[2] = {RANK * in, out * RANK};
    adapter->in = in;
    adapter->out = out;
    adapter->a = take_floats(m, counts[0], -0.06f, 0.06f);
    adapter->b = take_floats(m, counts[1], -0.06f, 0.06f);
    adapter->da = take_floats(m, counts[0], 0, 0);
    adapter->db = take_floats(m, counts[1], 0, 0);
    adapter->u = take_floats(m, m->rows * RANK, 0, 0);
    for (int i = 0; i < 4; i++)
        *moments[i] = take_floats(m, counts[i / 2], 0, 0);
    slices[0].count = counts[0], slices[0].param = adapter->a, slices[0].grad = adapter->da;
    slices[1].count = counts[1], slices[1].param = adapter->b, slices[1].grad = adapter->db;
}

static void take_layer(struct model *m, int index, bool training)
{
    struct layer *l = &m->layers[index];
    int64_t rows = m->rows;
    l->in_proj = take_weights(m, 2 * D_INNER * D_MODEL, 0.1f);
    l->x_proj = take_weights(m, X_DBL * D_INNER, 0.1f);
    l->dt_proj = take_weights(m, D_INNER * DT_RANK, 0.2f);
    l->out_proj = take_weights(m, D_MODEL * D_INNER, 0.1f);
    l->conv_weight = take_floats(m, D_INNER * D_CONV, -0.5f, 0.5f);
    l->conv_bias = take_floats(m, D_INNER, -0.5f, 0.5f);
    l->a = take_floats(m, D_STATE * D_INNER, -16, -1);
    l->d = take_floats(m, D_INNER, 0.5f, 1);
    l->dt_bias = take_floats(m, D_INNER, -6, -2);
    l->norm = take_floats(m, D_MODEL, 0.5f, 1);
    if (training || index == 0) {
        l->normed = take_floats(m, rows * D_MODEL, 0, 0);
        l->residual = take_floats(m, rows * D_MODEL, 0, 0);
        l->rstd = take_floats(m, rows, 0, 0);
        l->xz = take_floats(m, rows * 2 * D_INNER, 0, 0);
        l->conv = take_floats(m, rows * D_INNER, 0, 0);
        l->x_dbl = take_floats(m, rows * X_DBL, 0, 0);
        l->dt = take_floats(m, rows * D_INNER, 0, 0);
        l->y = take_floats(m, rows * D_INNER, 0, 0);
    } else { /* a step forgets each layer's activations */
        const struct layer *first = &m->layers[0];
        l->normed = first->normed, l->residual = first->residual, l->rstd = first->rstd, l->xz = first->xz;
        l->conv = first->conv, l->x_dbl = first->x_dbl, l->dt = first->dt, l->y = first->y;
    }
    if (training) {
        l->chunk_states = take_floats(m, scan_chunk_count(m->starts, m->n_seqs) * D_STATE * D_INNER, 0, 0);
        take_adapter(m, &l->in_adapter, D_MODEL, 2 * D_INNER, &m->slices[4 * index]);
        take_adapter(m, &l->x_adapter, D_INNER, X_DBL, &m->slices[4 * index + 2]);
    } else {
        l->conv_state = take_floats(m, SEQS_MOST * (D_CONV - 1) * D_INNER, -1, 1);
        l->scan_state = take_floats(m, SEQS_MOST * D_STATE * D_INNER, -1, 1);
    }
}

static void take_model(struct model *m, bool training)
{
    int64_t rows = m->rows;
    m->table = take_weights(m, VOCAB * D_MODEL, 0.1f);
    m->final_norm = take_floats(m, D_MODEL, 0.5f, 1);
    m->embedded = take_floats(m, rows * D_MODEL, 0, 0);
    m->out = take_floats(m, rows * D_MODEL, 0, 0);
    m->dresidual = take_floats(m, rows * D_MODEL, 0, 0);
    m->ids = take(m, rows * (int64_t)sizeof(int32_t));
    for (int64_t t = 0; m->ids != NULL && t < rows; t++)
        m->ids[t] = (int32_t)(t * 4099 % VOCAB);
    if (training) {
        m->dxz = take_floats(m, rows * 2 * D_INNER, 0, 0);
        m->dconv = take_floats(m, rows * D_INNER, 0, 0);
        m->dx_dbl = take_floats(m, rows * X_DBL, 0, 0);
        m->ddt = take_floats(m, rows * D_INNER, 0, 0);
        m->dy = take_floats(m, rows * D_INNER, 0, 0);
        m->du = take_floats(m, rows * RANK, 0, 0);
        m->targets = m->ids;
        m->logprobs = take_floats(m, rows, 0, 0);
        int64_t needs[3] = {m->ops->head_workspace(rows, D_MODEL, VOCAB, true),
                            m->ops->scan_backward_workspace(rows, D_INNER, D_STATE, m->n_seqs),
                            m->ops->rmsnorm_backward_workspace(rows, D_MODEL)};
        for (int i = 0; i < 3; i++)
            m->workspace_bytes = needs[i] > m->workspace_bytes ? needs[i] : m->workspace_bytes;
        m->workspace = take(m, m->workspace_bytes);
    } else {
        m->logits = take_floats(m, rows * VOCAB, 0, 0);
    }
    for (int i = 0; i < N_LAYER; i++)
        take_layer(m, i, training);
}

/* ---- calls, each measured ---- */

static void count(struct model *m, enum kind kind, double began, int status, double flop, double bytes)
{
    struct bench_op *meter = &m->meters[kind];
    meter->calls++;
    meter->seconds += bench_now() - began;
    meter->flop += flop;
    meter->bytes += bytes;
    if (m->status == KERNEL_OK)
        m->status = status;
}

/* y[rows,out] = x W^T, or with `back` dx[rows,in] (+)= dy W. */
static void linear(struct model *m, enum kind kind, const void *weight, int64_t in, int64_t out, bool back,
                   const float *from, int64_t from_stride, float *to, int64_t to_stride, float beta)
{
    struct gemm_args g = {.m = m->rows, .n = back ? in : out, .k = back ? out : in, .transpose_b = !back};
    g.alpha = 1.0f, g.beta = beta;
    g.a = from, g.a_stride = from_stride;
    g.b = weight, g.b_stride = in, g.b_type = m->type;
    g.c = to, g.c_stride = to_stride;
    double began = bench_now();
    int status = m->ops->gemm(m->device, &g);
    double rows = (double)m->rows, matrix = (double)(in * out);
    count(m, kind, began, status, 2 * rows * matrix,
          matrix * (double)kernel_type_size(m->type) + rows * (double)(in + out) * sizeof(float));
}

static void norm(struct model *m, const float *x, const float *residual, const float *weight,
                 struct layer *to)
{
    struct rmsnorm_forward_args n = {
        .rows = m->rows, .d = D_MODEL, .x = x, .residual = residual, .weight = weight};
    n.eps = 1e-5f, n.residual_out = to->residual, n.y = to->normed, n.rstd = to->rstd;
    double began = bench_now();
    int status = m->ops->rmsnorm_forward(m->device, &n);
    count(m, NORM, began, status, 4.0 * (double)m->rows * D_MODEL, 16.0 * (double)m->rows * D_MODEL);
}

static void norm_back(struct model *m, const float *dy, const float *weight, const struct layer *from)
{
    struct rmsnorm_backward_args n = {.rows = m->rows, .d = D_MODEL, .dy = dy, .weight = weight};
    n.r = from->residual, n.rstd = from->rstd, n.dresidual = m->dresidual, n.workspace = m->workspace;
    double began = bench_now();
    int status = m->ops->rmsnorm_backward(m->device, &n);
    count(m, NORM_BACK, began, status, 8.0 * (double)m->rows * D_MODEL, 16.0 * (double)m->rows * D_MODEL);
}

static void adapt(struct model *m, const struct adapter *d, const float *x, float *y, int64_t y_stride)
{
    struct lora_forward_args l = {.rows = m->rows, .in = d->in, .out = d->out, .rank = RANK, .scale = 1.0f};
    l.x = x, l.x_stride = d->in, l.a = d->a, l.b = d->b, l.u = d->u, l.y = y, l.y_stride = y_stride;
    double began = bench_now(), rows = (double)m->rows;
    int status = m->ops->lora_forward(m->device, &l);
    count(m, LORA, began, status, 2 * rows * RANK * (double)(d->in + d->out),
          4 * rows * (double)(d->in + 2 * d->out));
}

static void adapt_back(struct model *m, const struct adapter *d, const float *x, const float *dy,
                       int64_t dy_stride, float *dx)
{
    struct lora_backward_args l = {.rows = m->rows, .in = d->in, .out = d->out, .rank = RANK, .scale = 1.0f};
    l.x = x, l.x_stride = d->in, l.a = d->a, l.b = d->b, l.u = d->u, l.dy = dy, l.dy_stride = dy_stride;
    l.dx = dx, l.dx_stride = d->in, l.da = d->da, l.db = d->db, l.du = m->du;
    double began = bench_now(), rows = (double)m->rows;
    int status = m->ops->lora_backward(m->device, &l);
    count(m, LORA_BACK, began, status, 4 * rows * RANK * (double)(d->in + d->out),
          4 * rows * (double)(3 * d->in + 2 * d->out));
}

static void convolve(struct model *m, struct layer *l)
{
    struct conv_forward_args v = {
        .tokens = m->rows, .channels = D_INNER, .width = D_CONV, .n_seqs = m->n_seqs};
    v.seq_starts = m->starts, v.x = l->xz, v.x_stride = 2 * D_INNER;
    v.weight = l->conv_weight, v.bias = l->conv_bias, v.y = l->conv, v.y_stride = D_INNER;
    v.initial = (struct state_view){.pool = l->conv_state, .slot_stride = (D_CONV - 1) * D_INNER};
    v.final = v.initial;
    double began = bench_now();
    int status = m->ops->conv_forward(m->device, &v);
    count(m, CONV, began, status, 24.0 * (double)m->rows * D_INNER, 8.0 * (double)m->rows * D_INNER);
}

static void scan(struct model *m, struct layer *l)
{
    struct scan_forward_args s = {
        .tokens = m->rows, .channels = D_INNER, .d_state = D_STATE, .n_seqs = m->n_seqs};
    s.seq_starts = m->starts, s.x = l->conv, s.x_stride = D_INNER, s.dt = l->dt, s.dt_stride = D_INNER,
    s.a = l->a;
    s.b = l->x_dbl + DT_RANK, s.c = l->x_dbl + DT_RANK + D_STATE, s.b_stride = s.c_stride = X_DBL;
    s.d = l->d, s.dt_bias = l->dt_bias, s.z = l->xz + D_INNER, s.z_stride = 2 * D_INNER;
    s.initial = (struct state_view){.pool = l->scan_state, .slot_stride = D_STATE * D_INNER};
    s.final = s.initial, s.chunk_states = l->chunk_states, s.y = l->y, s.y_stride = D_INNER;
    double began = bench_now(), elements = (double)m->rows * D_INNER * D_STATE;
    int status = m->ops->scan_forward(m->device, &s);
    count(m, SCAN, began, status, scan_flop * elements,
          16.0 * (double)m->rows * D_INNER + (l->scan_state != NULL ? 8 * elements : 0));
}

/* ---- steps ---- */

static void forward(struct model *m, bool adapters)
{
    struct embedding_forward_args e = {.tokens = m->rows, .vocab = VOCAB, .d_model = D_MODEL, .ids = m->ids};
    e.table = m->table, e.table_type = m->type, e.y = m->embedded;
    double began = bench_now(), embedded_bytes = (double)m->rows * D_MODEL;
    count(m, EMBEDDING, began, m->ops->embedding_forward(m->device, &e), 0,
          embedded_bytes * (sizeof(float) + (double)kernel_type_size(m->type)));
    const float *residual = m->embedded, *x = NULL;
    for (int i = 0; i < N_LAYER; i++) {
        struct layer *l = &m->layers[i];
        norm(m, x, residual, l->norm, l);
        linear(m, IN_PROJ, l->in_proj, D_MODEL, 2 * D_INNER, false, l->normed, D_MODEL, l->xz, 2 * D_INNER,
               0);
        if (adapters)
            adapt(m, &l->in_adapter, l->normed, l->xz, 2 * D_INNER);
        convolve(m, l);
        linear(m, X_PROJ, l->x_proj, D_INNER, X_DBL, false, l->conv, D_INNER, l->x_dbl, X_DBL, 0);
        if (adapters)
            adapt(m, &l->x_adapter, l->conv, l->x_dbl, X_DBL);
        linear(m, DT_PROJ, l->dt_proj, DT_RANK, D_INNER, false, l->x_dbl, X_DBL, l->dt, D_INNER, 0);
        scan(m, l);
        linear(m, OUT_PROJ, l->out_proj, D_INNER, D_MODEL, false, l->y, D_INNER, m->out, D_MODEL, 0);
        residual = l->residual;
        x = m->out;
    }
}

static void backward_layer(struct model *m, struct layer *l)
{
    linear(m, OUT_PROJ_BACK, l->out_proj, D_INNER, D_MODEL, true, m->dresidual, D_MODEL, m->dy, D_INNER, 0);

    struct scan_backward_args s = {
        .tokens = m->rows, .channels = D_INNER, .d_state = D_STATE, .n_seqs = m->n_seqs};
    s.seq_starts = m->starts, s.x = l->conv, s.x_stride = D_INNER, s.dt = l->dt, s.dt_stride = D_INNER,
    s.a = l->a;
    s.b = l->x_dbl + DT_RANK, s.c = l->x_dbl + DT_RANK + D_STATE, s.b_stride = s.c_stride = X_DBL;
    s.d = l->d, s.dt_bias = l->dt_bias, s.z = l->xz + D_INNER, s.z_stride = 2 * D_INNER;
    s.chunk_states = l->chunk_states, s.dy = m->dy, s.dy_stride = D_INNER, s.workspace = m->workspace;
    s.dx = m->dconv, s.dx_stride = D_INNER, s.ddt = m->ddt, s.ddt_stride = D_INNER;
    s.dz = m->dxz + D_INNER, s.dz_stride = 2 * D_INNER;
    s.db = m->dx_dbl + DT_RANK, s.dc = m->dx_dbl + DT_RANK + D_STATE, s.db_stride = s.dc_stride = X_DBL;
    double began = bench_now(), channels = (double)m->rows * D_INNER;
    count(m, SCAN_BACK, began, m->ops->scan_backward(m->device, &s), scan_backward_flop * channels * D_STATE,
          28 * channels);

    linear(m, DT_PROJ_BACK, l->dt_proj, DT_RANK, D_INNER, true, m->ddt, D_INNER, m->dx_dbl, X_DBL, 0);
    linear(m, X_PROJ_BACK, l->x_proj, D_INNER, X_DBL, true, m->dx_dbl, X_DBL, m->dconv, D_INNER, 1);
    adapt_back(m, &l->x_adapter, l->conv, m->dx_dbl, X_DBL, m->dconv);

    struct conv_backward_args v = {
        .tokens = m->rows, .channels = D_INNER, .width = D_CONV, .n_seqs = m->n_seqs};
    v.seq_starts = m->starts, v.x = l->xz, v.x_stride = 2 * D_INNER, v.weight = l->conv_weight;
    v.bias = l->conv_bias, v.dy = m->dconv, v.dy_stride = D_INNER, v.dx = m->dxz, v.dx_stride = 2 * D_INNER;
    began = bench_now();
    count(m, CONV_BACK, began, m->ops->conv_backward(m->device, &v), 40 * channels, 12 * channels);

    linear(m, IN_PROJ_BACK, l->in_proj, D_MODEL, 2 * D_INNER, true, m->dxz, 2 * D_INNER, m->out, D_MODEL, 0);
    adapt_back(m, &l->in_adapter, l->normed, m->dxz, 2 * D_INNER, m->out);
    norm_back(m, m->out, l->norm, l);
}

static void train_step(struct model *m)
{
    forward(m, true);
    /* The last layer's buffers stand in for the final norm's. */
    struct layer *last = &m->layers[N_LAYER - 1];
    struct head_args h = {.rows = m->rows, .d_model = D_MODEL, .vocab = VOCAB, .hidden = last->normed};
    h.weight = m->table, h.weight_type = m->type, h.targets = m->targets, h.logprobs = m->logprobs;
    h.d_hidden = m->out, h.grad_scale = 1.0f / (float)m->rows;
    h.workspace = m->workspace, h.workspace_bytes = m->workspace_bytes;
    double began = bench_now();
    count(m, HEAD, began, m->ops->head(m->device, &h), 4.0 * (double)m->rows * D_MODEL * VOCAB,
          8.0 * (double)m->rows * D_MODEL + (double)kernel_type_size(m->type) * VOCAB * D_MODEL);
    m->ops->zero(m->device, m->dresidual, (size_t)m->rows * D_MODEL * sizeof(float));
    norm_back(m, m->out, m->final_norm, last);
    for (int i = N_LAYER - 1; i >= 0; i--)
        backward_layer(m, &m->layers[i]);

    double sum = 0, floats = 0;
    for (int i = 0; i < N_LAYER * 4; i++)
        floats += (double)m->slices[i].count;
    struct grad_norm_args norm_args = {.slices = m->slices, .n_slices = N_LAYER * 4, .ret_sum = &sum};
    struct adamw_args adamw = {.slices = m->slices, .n_slices = N_LAYER * 4, .lr = 1e-4f, .beta1 = 0.9f};
    adamw.beta2 = 0.999f, adamw.eps = 1e-8f, adamw.step = 1, adamw.grad_scale = 1.0f;
    began = bench_now();
    int status = m->ops->grad_norm(m->device, &norm_args);
    if (status == KERNEL_OK)
        status = m->ops->adamw(m->device, &adamw);
    count(m, UPDATE, began, status, 16 * floats, 32 * floats);
}

static void decode_step(struct model *m)
{
    forward(m, false);
    struct layer *last = &m->layers[N_LAYER - 1];
    norm(m, m->out, last->residual, m->final_norm, last);
    linear(m, HEAD, m->table, D_MODEL, VOCAB, false, last->normed, D_MODEL, m->logits, VOCAB, 0);
}

/* ---- modes ---- */

/* Prints what each kind took a step; returns the seconds of a step, 0 when something failed. */
static double report_steps(struct model *m, struct bench_report *report, int steps, double seconds)
{
    double step = seconds / steps;
    if (m->status != KERNEL_OK) {
        fprintf(stderr, "adderd-bench: %s\n", kernel_status_text(m->status));
        return 0;
    }
    for (int i = 0; i < N_KINDS; i++) {
        struct bench_op op = m->meters[i];
        if (op.calls <= 0)
            continue;
        op.name = kind_names[i];
        op.calls /= steps, op.seconds /= steps, op.flop /= steps, op.bytes /= steps;
        bench_op(report, &op, step);
    }
    bench_row(report, "step", 1e3 * step, "ms", NULL);
    bench_row(report, "tokens a second", (double)m->rows / step, "1/s", NULL);
    return step;
}

/* One warm-up step, then `steps` measured. Returns the seconds of one. */
static double run_steps(struct model *m, struct bench_report *report, void (*step)(struct model *m),
                        int steps)
{
    if (m->status == KERNEL_OK)
        step(m);
    memset(m->meters, 0, sizeof(m->meters));
    double began = bench_now();
    for (int i = 0; i < steps && m->status == KERNEL_OK; i++)
        step(m);
    return report_steps(m, report, steps, bench_now() - began);
}

static double run_case(const struct kernel_ops *ops, struct kernel_device *device,
                       struct bench_report *report, enum kernel_type type, int32_t n_seqs, bool training)
{
    struct model *m = calloc(1, sizeof(*m));
    if (m == NULL)
        return 0;
    int64_t tokens = training ? SEQ_TOKENS : 1;
    m->ops = ops;
    m->device = device;
    m->type = type;
    m->n_seqs = n_seqs;
    m->rows = n_seqs * tokens;
    for (int32_t s = 0; s <= n_seqs; s++)
        m->starts[s] = (int32_t)(s * tokens);
    char title[128];
    if (training)
        snprintf(title, sizeof(title), "ops, LoRA training, %d x %d tokens, %s weights", SEQS, SEQ_TOKENS,
                 kernel_type_name(type));
    else
        snprintf(title, sizeof(title), "ops, decoding %d sequence%s, %s weights", n_seqs,
                 n_seqs == 1 ? "" : "s", kernel_type_name(type));
    bench_title(report, title);
    m->arena_bytes = training ? TRAIN_BYTES : DECODE_BYTES;
    void *arena = NULL;
    m->status = ops->memory_alloc(device, (size_t)m->arena_bytes, &arena);
    m->arena = arena;
    take_model(m, training);
    double step = training ? run_steps(m, report, train_step, TRAIN_STEPS)
                           : run_steps(m, report, decode_step, DECODE_STEPS);
    if (step > 0 && training) {
        bench_row(report, "share of sgemm at 4N a token",
                  100 * 4 * parameters * (double)m->rows / step / report->machine.sgemm, "%", NULL);
    } else if (step > 0 && n_seqs == 1) {
        double bytes = (N_LAYER * projections + (double)VOCAB * D_MODEL) * (double)kernel_type_size(type);
        bench_row(report, "share of memory's bandwidth", 100 * bytes / report->machine.read / step, "%",
                  "time to read the matrices once over time taken");
    }
    ops->memory_free(device, arena);
    free(m);
    return step;
}

int bench_ops(const struct bench_options *options, struct bench_report *report)
{
    static const enum kernel_type types[] = {TYPE_F32, TYPE_BF16};
    const struct kernel_ops *ops = kernels_cpu();
    struct kernel_device *device;
    int status = ops->device_open(0, options->threads, &device);
    if (status != KERNEL_OK) {
        fprintf(stderr, "adderd-bench: %s\n", kernel_status_text(status));
        return 1;
    }
    bool good = true;
    for (int i = 0; i < 2 && good; i++) {
        good = run_case(ops, device, report, types[i], SEQS, true) > 0;
        double one = good ? run_case(ops, device, report, types[i], 1, false) : 0;
        double many = one > 0 ? run_case(ops, device, report, types[i], SEQS_MOST, false) : 0;
        good = many > 0;
        if (good)
            bench_row(report, "tokens/s, 16 together over 1 alone", SEQS_MOST * one / many, "x", NULL);
    }
    ops->device_close(device);
    return !good;
}
