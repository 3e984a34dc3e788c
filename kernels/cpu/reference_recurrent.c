/* reference_recurrent.c: causal convolution and Mamba-1 selective scan. See reference.c. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/reference.h"

static float *state_of(const struct state_view *view, int32_t seq)
{
    if (view->pool == NULL)
        return NULL;
    int64_t slot = view->slots != NULL ? view->slots[seq] : seq;
    return slot < 0 ? NULL : view->pool + slot * view->slot_stride;
}

static double sigmoid(double v)
{
    return 1.0 / (1.0 + exp(-v));
}

/* d/dv of v sigmoid(v). */
static double silu_slope(double v)
{
    double s = sigmoid(v);
    return s * (1.0 + v * (1.0 - s));
}

/* ---- convolution */

/* Input of channel c at position t of a sequence whose rows begin at x; before the start, from the state. */
static float conv_input(const float *x, int64_t x_stride, const float *state, int64_t channels, int64_t width,
                        int64_t t, int64_t c)
{
    if (t >= 0)
        return x[t * x_stride + c];
    return state != NULL ? state[(width - 1 + t) * channels + c] : 0.0f;
}

static void conv_forward_sequence(const struct conv_forward_args *v, int32_t s)
{
    int64_t start = v->seq_starts[s], length = v->seq_starts[s + 1] - start;
    const float *x = (const float *)v->x + start * v->x_stride;
    float *y = (float *)v->y + start * v->y_stride;
    const float *initial = state_of(&v->initial, s);
    float *final = state_of(&v->final, s);

    for (int64_t t = 0; t < length; t++) {
        for (int64_t c = 0; c < v->channels; c++) {
            double sum = v->bias != NULL ? (double)v->bias[c] : 0.0;
            for (int64_t k = 0; k < v->width; k++)
                sum += (double)v->weight[c * v->width + k] * (double)conv_input(x, v->x_stride, initial,
                                                                                v->channels, v->width,
                                                                                t - v->width + 1 + k, c);
            y[t * v->y_stride + c] = (float)(sum * sigmoid(sum));
        }
    }
    /* Entry j is written after every entry that reads it (j - length and before), so the pools may be one. */
    for (int64_t j = 0; final != NULL && j < v->width - 1; j++)
        for (int64_t c = 0; c < v->channels; c++)
            final[j * v->channels + c] =
                conv_input(x, v->x_stride, initial, v->channels, v->width, length - v->width + 1 + j, c);
}

int reference_conv_forward(struct kernel_device *device, const struct conv_forward_args *v)
{
    (void)device;
    int status = check_conv_forward(v);
    for (int32_t s = 0; status == KERNEL_OK && s < v->n_seqs; s++)
        conv_forward_sequence(v, s);
    return status;
}

/* Gradient of the pre-activation at t. */
static double conv_slope(const struct conv_backward_args *v, const float *x, const float *dy, int64_t t,
                         int64_t c)
{
    double sum = v->bias != NULL ? (double)v->bias[c] : 0.0;
    for (int64_t k = 0; k < v->width; k++)
        sum += (double)v->weight[c * v->width + k] *
               (double)conv_input(x, v->x_stride, NULL, v->channels, v->width, t - v->width + 1 + k, c);
    return (double)dy[t * v->dy_stride + c] * silu_slope(sum);
}

static void conv_backward_channel(const struct conv_backward_args *v, int64_t c)
{
    double dbias = 0;
    for (int32_t s = 0; s < v->n_seqs; s++) {
        int64_t start = v->seq_starts[s], length = v->seq_starts[s + 1] - start;
        const float *x = (const float *)v->x + start * v->x_stride;
        const float *dy = (const float *)v->dy + start * v->dy_stride;
        float *dx = (float *)v->dx + start * v->dx_stride;
        for (int64_t t = 0; t < length; t++) {
            dbias += conv_slope(v, x, dy, t, c);
            /* x[t] reached the outputs t .. t+width-1. */
            double sum = 0;
            for (int64_t k = 0; k < v->width; k++)
                if (t + v->width - 1 - k < length)
                    sum +=
                        (double)v->weight[c * v->width + k] * conv_slope(v, x, dy, t + v->width - 1 - k, c);
            dx[t * v->dx_stride + c] = (float)sum;
        }
    }
    if (v->dbias != NULL)
        v->dbias[c] = (float)((double)v->dbias[c] + dbias);
}

static void conv_backward_weight(const struct conv_backward_args *v, int64_t c, int64_t k)
{
    double sum = 0;
    for (int32_t s = 0; s < v->n_seqs; s++) {
        int64_t start = v->seq_starts[s], length = v->seq_starts[s + 1] - start;
        const float *x = (const float *)v->x + start * v->x_stride;
        const float *dy = (const float *)v->dy + start * v->dy_stride;
        for (int64_t t = 0; t < length; t++)
            sum += conv_slope(v, x, dy, t, c) *
                   (double)conv_input(x, v->x_stride, NULL, v->channels, v->width, t - v->width + 1 + k, c);
    }
    float *out = &v->dweight[c * v->width + k];
    *out = (float)((double)*out + sum);
}

int reference_conv_backward(struct kernel_device *device, const struct conv_backward_args *v)
{
    (void)device;
    int status = check_conv_backward(v);
    if (status != KERNEL_OK)
        return status;
    for (int64_t c = 0; c < v->channels; c++) {
        for (int64_t k = 0; v->dweight != NULL && k < v->width; k++)
            conv_backward_weight(v, c, k);
        conv_backward_channel(v, c);
    }
    return KERNEL_OK;
}

/* ---- selective scan */

static double softplus(double v)
{
    return v > 20.0 ? v : log1p(exp(v));
}

static double softplus_slope(double v)
{
    return v > 20.0 ? 1.0 : sigmoid(v);
}

int reference_scan_prepare(struct kernel_device *device, const struct scan_prepare_args *p)
{
    (void)device;
    if (p->channels < 0 || p->d_state < 0)
        return KERNEL_INVALID;
    for (int64_t c = 0; c < p->channels; c++)
        for (int64_t n = 0; n < p->d_state; n++)
            p->a[n * p->channels + c] = -expf(p->a_log[c * p->d_state + n]);
    return KERNEL_OK;
}

/* One channel through one sequence. h: room for [d_state]. */
static void scan_forward_channel(const struct scan_forward_args *v, int32_t s, int64_t first_chunk, int64_t c,
                                 double *h)
{
    int64_t start = v->seq_starts[s], length = v->seq_starts[s + 1] - start;
    const float *initial = state_of(&v->initial, s);
    float *final = state_of(&v->final, s);
    for (int64_t n = 0; n < v->d_state; n++)
        h[n] = initial != NULL ? (double)initial[n * v->channels + c] : 0.0;

    for (int64_t i = 0; i < length; i++) {
        int64_t t = start + i;
        if (v->chunk_states != NULL && i % SCAN_CHUNK == 0) {
            float *chunk = v->chunk_states + (first_chunk + i / SCAN_CHUNK) * v->d_state * v->channels;
            for (int64_t n = 0; n < v->d_state; n++)
                chunk[n * v->channels + c] = (float)h[n];
        }
        const float *bt = (const float *)v->b + t * v->b_stride, *ct = (const float *)v->c + t * v->c_stride;
        double x = (double)((const float *)v->x)[t * v->x_stride + c];
        double z = (double)((const float *)v->z)[t * v->z_stride + c];
        double delta = softplus((double)((const float *)v->dt)[t * v->dt_stride + c] + (double)v->dt_bias[c]);
        double out = (double)v->d[c] * x;
        for (int64_t n = 0; n < v->d_state; n++) {
            h[n] = exp(delta * (double)v->a[n * v->channels + c]) * h[n] + delta * (double)bt[n] * x;
            out += (double)ct[n] * h[n];
        }
        ((float *)v->y)[t * v->y_stride + c] = (float)(out * z * sigmoid(z));
    }
    for (int64_t n = 0; final != NULL && n < v->d_state; n++)
        final[n * v->channels + c] = (float)h[n];
}

int reference_scan_forward(struct kernel_device *device, const struct scan_forward_args *v)
{
    int status = check_scan_forward(v);
    if (status == KERNEL_OK)
        status = cpu_scratch_reserve(device, (size_t)v->d_state * sizeof(double));
    if (status != KERNEL_OK)
        return status;
    int64_t first_chunk = 0;
    for (int32_t s = 0; s < v->n_seqs; s++) {
        for (int64_t c = 0; c < v->channels; c++)
            scan_forward_channel(v, s, first_chunk, c, cpu_scratch(device, 0));
        first_chunk += scan_chunk_count(&v->seq_starts[s], 1);
    }
    return KERNEL_OK;
}

/* The states of one channel over one sequence, and the sums over channels of dB and dC; all in double. */
struct scan_trace {
    double *h;       /* [length + 1, d_state]; h[0] is the initial state, zero */
    double *db, *dc; /* [tokens, d_state] */
    double *carry;   /* [d_state]: gradient of h[t] from later tokens */
    double *da;      /* [d_state] */
};

int64_t reference_scan_backward_workspace(int64_t tokens, int64_t channels, int64_t d_state, int32_t n_seqs)
{
    (void)channels;
    (void)n_seqs;
    return (3 * tokens + 3) * d_state * (int64_t)sizeof(double);
}

static double scan_delta(const struct scan_backward_args *v, int64_t t, int64_t c)
{
    return softplus((double)((const float *)v->dt)[t * v->dt_stride + c] + (double)v->dt_bias[c]);
}

static void scan_recompute(const struct scan_backward_args *v, int32_t s, int64_t c, double *h)
{
    const float *x = v->x, *b = v->b;
    int64_t start = v->seq_starts[s];
    memset(h, 0, (size_t)v->d_state * sizeof(*h));
    for (int64_t t = start; t < v->seq_starts[s + 1]; t++, h += v->d_state) {
        double delta = scan_delta(v, t, c);
        for (int64_t n = 0; n < v->d_state; n++)
            h[v->d_state + n] = exp(delta * (double)v->a[n * v->channels + c]) * h[n] +
                                delta * (double)b[t * v->b_stride + n] * (double)x[t * v->x_stride + c];
    }
}

/* One token of one channel, backwards. h and before: the states after and before token t. Returns the
 * gradient of dt. */
static double scan_backward_token(const struct scan_backward_args *v, const struct scan_trace *trace,
                                  int64_t t, int64_t c, const double *h, const double *before, double *ret_dd)
{
    const float *bt = (const float *)v->b + t * v->b_stride, *ct = (const float *)v->c + t * v->c_stride;
    double x = (double)((const float *)v->x)[t * v->x_stride + c];
    double z = (double)((const float *)v->z)[t * v->z_stride + c];
    double dy = (double)((const float *)v->dy)[t * v->dy_stride + c];
    double delta = scan_delta(v, t, c);

    double out = (double)v->d[c] * x; /* before the gate */
    for (int64_t n = 0; n < v->d_state; n++)
        out += (double)ct[n] * h[n];
    ((float *)v->dz)[t * v->dz_stride + c] = (float)(dy * out * silu_slope(z));
    if (v->y != NULL)
        ((float *)v->y)[t * v->y_stride + c] = (float)(out * z * sigmoid(z));

    double dout = dy * z * sigmoid(z);
    double dx = dout * (double)v->d[c], ddelta = 0;
    for (int64_t n = 0; n < v->d_state; n++) {
        double a = (double)v->a[n * v->channels + c], decay = exp(delta * a);
        double dh = dout * (double)ct[n] + trace->carry[n];
        trace->dc[t * v->d_state + n] += dout * h[n];
        trace->db[t * v->d_state + n] += dh * delta * x;
        trace->da[n] += dh * delta * decay * before[n];
        ddelta += dh * (a * decay * before[n] + (double)bt[n] * x);
        dx += dh * delta * (double)bt[n];
        trace->carry[n] = dh * decay;
    }
    ((float *)v->dx)[t * v->dx_stride + c] = (float)dx;
    *ret_dd = dout * x;
    return ddelta *
           softplus_slope((double)((const float *)v->dt)[t * v->dt_stride + c] + (double)v->dt_bias[c]);
}

static void scan_backward_channel(const struct scan_backward_args *v, const struct scan_trace *trace,
                                  int64_t c)
{
    double dd = 0, ddt_bias = 0;
    memset(trace->da, 0, (size_t)v->d_state * sizeof(*trace->da));
    for (int32_t s = 0; s < v->n_seqs; s++) {
        int64_t start = v->seq_starts[s], length = v->seq_starts[s + 1] - start;
        scan_recompute(v, s, c, trace->h);
        memset(trace->carry, 0, (size_t)v->d_state * sizeof(*trace->carry));
        for (int64_t i = length - 1; i >= 0; i--) {
            const double *before = trace->h + i * v->d_state;
            double dd_token;
            double ddt = scan_backward_token(v, trace, start + i, c, before + v->d_state, before, &dd_token);
            ((float *)v->ddt)[(start + i) * v->ddt_stride + c] = (float)ddt;
            ddt_bias += ddt;
            dd += dd_token;
        }
    }
    if (v->dd != NULL)
        v->dd[c] = (float)((double)v->dd[c] + dd);
    if (v->ddt_bias != NULL)
        v->ddt_bias[c] = (float)((double)v->ddt_bias[c] + ddt_bias);
    for (int64_t n = 0; v->da_log != NULL && n < v->d_state; n++) {
        /* A = -exp(A_log), so dA/dA_log = A. */
        float *out = &v->da_log[c * v->d_state + n];
        *out = (float)((double)*out + trace->da[n] * (double)v->a[n * v->channels + c]);
    }
}

/* Recomputes every state from the start of its sequence, so that an error in chunk_states cannot hide. */
int reference_scan_backward(struct kernel_device *device, const struct scan_backward_args *v)
{
    (void)device;
    int status = check_scan_backward(v);
    if (status != KERNEL_OK)
        return status;
    double *work = v->workspace;
    struct scan_trace trace = {
        .db = work,
        .dc = work + v->tokens * v->d_state,
        .h = work + 2 * v->tokens * v->d_state,
        .carry = work + (3 * v->tokens + 1) * v->d_state,
        .da = work + (3 * v->tokens + 2) * v->d_state,
    };
    memset(work, 0, (size_t)(2 * v->tokens * v->d_state) * sizeof(*work));
    for (int64_t c = 0; c < v->channels; c++)
        scan_backward_channel(v, &trace, c);
    for (int64_t t = 0; t < v->tokens; t++) {
        for (int64_t n = 0; n < v->d_state; n++) {
            ((float *)v->db)[t * v->db_stride + n] = (float)trace.db[t * v->d_state + n];
            ((float *)v->dc)[t * v->dc_stride + n] = (float)trace.dc[t * v->d_state + n];
        }
    }
    return KERNEL_OK;
}
