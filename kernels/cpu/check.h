/* check.h: whether an op's arguments can be right, the same for the reference and the vectorised backend: a
 * negative size or a row longer than its stride is KERNEL_INVALID, a type the CPU does not do is
 * KERNEL_UNSUPPORTED. Pure. */
#ifndef KERNELS_CPU_CHECK_H
#define KERNELS_CPU_CHECK_H

#include "kernels/kernels.h"

/* Activations are fp32 on the CPU. */
static inline int check_act(enum kernel_type act)
{
    return act == TYPE_F32 ? KERNEL_OK : KERNEL_UNSUPPORTED;
}

static inline int check_weight(enum kernel_type type)
{
    return type == TYPE_F32 || type == TYPE_BF16 || type == TYPE_F16 ? KERNEL_OK : KERNEL_UNSUPPORTED;
}

static inline int check_valid(bool valid, enum kernel_type act)
{
    return valid ? check_act(act) : KERNEL_INVALID;
}

/* Boundaries that begin at 0, never go back and end at `tokens`. */
static inline bool seqs_valid(const int32_t *seq_starts, int32_t n_seqs, int64_t tokens)
{
    if (n_seqs < 0 || tokens < 0)
        return false;
    if (n_seqs == 0)
        return tokens == 0;
    for (int32_t s = 0; s < n_seqs; s++)
        if (seq_starts[s] > seq_starts[s + 1])
            return false;
    return seq_starts[0] == 0 && seq_starts[n_seqs] == tokens;
}

static inline int check_gemm(const struct gemm_args *g)
{
    if (g->m < 0 || g->n < 0 || g->k < 0 || g->a_stride < (g->transpose_a ? g->m : g->k) ||
        g->b_stride < (g->transpose_b ? g->k : g->n) || g->c_stride < g->n)
        return KERNEL_INVALID;
    return check_weight(g->b_type) != KERNEL_OK ? KERNEL_UNSUPPORTED : check_act(g->act);
}

static inline bool dropout_valid(float p)
{
    return p >= 0.0f && p < 1.0f;
}

static inline int check_lora_forward(const struct lora_forward_args *l)
{
    return check_valid(l->rows >= 0 && l->in >= 0 && l->out >= 0 && l->rank > 0 && l->x_stride >= l->in &&
                           l->y_stride >= l->out && dropout_valid(l->dropout),
                       l->act);
}

static inline int check_embedding_forward(const struct embedding_forward_args *e)
{
    if (e->tokens < 0 || e->vocab < 0 || e->d_model < 0 || (e->lora_a != NULL && e->rank <= 0))
        return KERNEL_INVALID;
    return check_weight(e->table_type) != KERNEL_OK ? KERNEL_UNSUPPORTED : check_act(e->act);
}

static inline int check_embedding_backward(const struct embedding_backward_args *e)
{
    bool lora = e->da != NULL || e->db != NULL;
    return check_valid(e->tokens >= 0 && e->vocab >= 0 && e->d_model >= 0 && (!lora || e->rank > 0), e->act);
}

static inline int check_rmsnorm_forward(const struct rmsnorm_forward_args *n)
{
    return check_valid(n->rows >= 0 && n->d > 0 &&
                           (n->residual != NULL || (n->x != NULL && n->residual_out == NULL)),
                       n->act);
}

static inline int check_rmsnorm_backward(const struct rmsnorm_backward_args *n)
{
    return check_valid(n->rows >= 0 && n->d > 0, n->act);
}

static inline int check_conv_forward(const struct conv_forward_args *c)
{
    return check_valid(c->channels >= 0 && c->width > 0 && c->x_stride >= c->channels &&
                           c->y_stride >= c->channels && seqs_valid(c->seq_starts, c->n_seqs, c->tokens),
                       c->act);
}

static inline int check_conv_backward(const struct conv_backward_args *c)
{
    return check_valid(c->channels >= 0 && c->width > 0 && c->x_stride >= c->channels &&
                           c->dy_stride >= c->channels && c->dx_stride >= c->channels &&
                           seqs_valid(c->seq_starts, c->n_seqs, c->tokens),
                       c->act);
}

static inline int check_scan_forward(const struct scan_forward_args *s)
{
    int64_t d = s->channels;
    return check_valid(d >= 0 && s->d_state > 0 && s->x_stride >= d && s->dt_stride >= d &&
                           s->z_stride >= d && s->y_stride >= d && s->b_stride >= s->d_state &&
                           s->c_stride >= s->d_state && seqs_valid(s->seq_starts, s->n_seqs, s->tokens),
                       s->act);
}

static inline int check_scan_backward(const struct scan_backward_args *s)
{
    int64_t d = s->channels;
    bool inputs = s->x_stride >= d && s->dt_stride >= d && s->z_stride >= d && s->dy_stride >= d &&
                  s->b_stride >= s->d_state && s->c_stride >= s->d_state;
    bool outputs = s->dx_stride >= d && s->ddt_stride >= d && s->dz_stride >= d &&
                   s->db_stride >= s->d_state && s->dc_stride >= s->d_state &&
                   (s->y == NULL || s->y_stride >= d);
    return check_valid(d >= 0 && s->d_state > 0 && inputs && outputs &&
                           seqs_valid(s->seq_starts, s->n_seqs, s->tokens),
                       s->act);
}

/* needed: what head_workspace() of the backend says for these arguments. */
static inline int check_head(const struct head_args *h, int64_t needed)
{
    bool top = h->n_top >= 0 && h->n_top <= KERNEL_TOP_MAX && (h->top_ids == NULL || h->n_top <= h->vocab);
    if (h->rows < 0 || h->d_model < 0 || h->vocab <= 0 || !top || h->workspace_bytes < needed)
        return KERNEL_INVALID;
    return check_weight(h->weight_type) != KERNEL_OK ? KERNEL_UNSUPPORTED : check_act(h->act);
}

static inline int check_adamw(const struct adamw_args *a)
{
    if (a->n_slices < 0 || a->step < 1)
        return KERNEL_INVALID;
    for (int32_t s = 0; s < a->n_slices; s++)
        if (a->slices[s].copy != NULL && check_weight(a->slices[s].copy_type) != KERNEL_OK)
            return KERNEL_UNSUPPORTED;
    return KERNEL_OK;
}

/* Ids of the caller are in host memory, so that looking at all of them is cheap. */
static inline bool sample_row_valid(const struct sample_row *row, int64_t vocab)
{
    bool filters = row->temperature >= 0.0f && row->top_k >= 0 && row->top_p >= 0.0f && row->min_p >= 0.0f &&
                   row->min_p <= 1.0f && row->repetition_penalty > 0.0f;
    if (!filters || row->n_history < 0 || row->n_prompt < 0 || row->n_prompt > row->n_history ||
        row->n_bias < 0 || row->n_top < 0 || row->n_top > KERNEL_TOP_MAX)
        return false;
    for (int32_t i = 0; i < row->n_history; i++)
        if (row->history[i] < 0 || row->history[i] >= vocab)
            return false;
    for (int32_t i = 0; i < row->n_bias; i++)
        if (row->bias[i].id < 0 || row->bias[i].id >= vocab)
            return false;
    return true;
}

static inline int check_sample(const struct sample_args *s)
{
    if (s->rows < 0 || s->vocab <= 0 || s->vocab > INT32_MAX || s->logits_stride < s->vocab)
        return KERNEL_INVALID;
    for (int64_t r = 0; r < s->rows; r++)
        if (!sample_row_valid(&s->row[r], s->vocab))
            return KERNEL_INVALID;
    return KERNEL_OK;
}

#endif
