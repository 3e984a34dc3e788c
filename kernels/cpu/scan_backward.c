/* scan_backward.c: gradients of the selective scan. Called by the thread that owns the device; the work runs
 * on its pool.
 *
 * With v = dt + dt_bias, delta = softplus(v), E = exp(delta A), p = C.h + D x (before the gate) and the
 * gradient g_p = g_y silu(z), walking back from the last token with G = gradient of h[t] from t on:
 *   G[n]   += C[n] g_p
 *   dC[n]   = sum over channels of g_p h[n]
 *   dB[n]   = sum over channels of G[n] delta x
 *   dx      = D g_p + delta sum_n G[n] B[n]
 *   ddelta  = x sum_n G[n] B[n] + sum_n G[n] E[n] h[t-1,n] A[n]
 *   dA[n]  += G[n] E[n] h[t-1,n] delta
 *   G[n]   *= E[n]                                            (handed to t-1)
 *   ddt     = ddelta sigmoid(v),  dz = g_y p silu'(z),  dA_log = dA A.
 *
 * A vector holds neighbouring channels, as in scan.c. For each chunk, last first, one sweep forward from the
 * chunk's state fills a trace (E and E h[t-1] of every step: 128 KiB at d_state 16, second-level cache) and
 * does what needs h; one sweep back does the rest.
 *
 * Partition, the same for any number of threads: a task is SCAN_BLOCK channels of a group of sequences. Sums
 * over channels (dB, dC) are kept for each block of channels, sums over tokens (dA, dD, d dt_bias) for each
 * group, both in the caller's workspace; a second region adds them up in order. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    SCAN_BLOCK = 64, /* channels of a task */
    GROUPS_MOST = 16,
    SUM_ROWS = 64,     /* tokens of a task of the second region */
    FIXED_STATES = 16, /* the d_state whose loops are unrolled */
};

static int64_t at_most(int64_t a, int64_t limit)
{
    return a < limit ? a : limit;
}

struct backward {
    const struct scan_backward_args *args;
    struct kernel_device *device;
    int64_t blocks; /* of channels */
    int64_t groups, group_seqs;
    float *token_sums;   /* [blocks, tokens, 2, d_state]: dB and dC of a block of channels */
    float *channel_sums; /* [groups, d_state + 2, channels]: dA, dD, d dt_bias of a group of sequences */
};

/* A thread's scratch. Of each step of a chunk: decay E and carried E h[t-1], [SCAN_CHUNK, d_state]; delta,
 * [SCAN_CHUNK]. Of the walk: state, gradient G, the sum for dA, and A, [d_state]. */
struct trace {
    vec *decay, *carried, *delta;
    vec *state, *gradient, *rate_sum, *a;
};

static int64_t trace_vectors(int64_t states)
{
    return SCAN_CHUNK * (2 * states + 1) + 4 * states;
}

static struct trace trace_at(vec *scratch, int64_t states)
{
    struct trace t = {.decay = scratch};
    t.carried = t.decay + SCAN_CHUNK * states;
    t.delta = t.carried + SCAN_CHUNK * states;
    t.state = t.delta + SCAN_CHUNK;
    t.gradient = t.state + states;
    t.rate_sum = t.gradient + states;
    t.a = t.rate_sum + states;
    return t;
}

/* One vector of channels: what scan_columns and its sweeps share. */
struct column {
    const struct scan_backward_args *args;
    int64_t c, lanes; /* lanes: VEC_LANES as a constant but for the last vector */
    vec bias, skip;
    vec skip_sum, bias_sum; /* dD, d dt_bias */
    float *token_sums;      /* [tokens, 2, d_state] of this block */
    bool first;             /* of the block: overwrite token_sums */
};

VEC_INLINE vec column_load(const struct column *k, const void *matrix, int64_t stride, int64_t t,
                           int64_t lanes)
{
    return vec_load_up_to((const float *)matrix + t * stride + k->c, lanes);
}

VEC_INLINE void column_store(const struct column *k, void *matrix, int64_t stride, int64_t t, vec v,
                             int64_t lanes)
{
    vec_store_up_to((float *)matrix + t * stride + k->c, v, lanes);
}

/* sums[i] (+)= sum over the lanes of vector i, joined from quarters. */
VEC_INLINE void add_sums(float *sums, const vec *quarters, int64_t count, bool overwrite)
{
    vec old = overwrite ? vec_set1(0) : vec_load_up_to(sums, count);
    vec_store_up_to(sums, old + vec_sum_join(quarters), count);
}

/* Rows t0 .. t0+count-1 forward from the chunk's state. */
VEC_INLINE void sweep_forward(const struct column *k, const struct trace *w, const float *chunk, int64_t t0,
                              int64_t count, int64_t lanes, int64_t states)
{
    const struct scan_backward_args *g = k->args;
    vec fixed[FIXED_STATES], *state = states == FIXED_STATES ? fixed : w->state;
    for (int64_t n = 0; n < states; n++)
        state[n] = vec_load_up_to(chunk + n * g->channels + k->c, lanes);
    for (int64_t i = 0; i < count; i++) {
        int64_t t = t0 + i;
        const float *b = (const float *)g->b + t * g->b_stride, *cs = (const float *)g->c + t * g->c_stride;
        float *sums = k->token_sums + (2 * t + 1) * states;
        vec x = column_load(k, g->x, g->x_stride, t, lanes), z = column_load(k, g->z, g->z_stride, t, lanes);
        vec dy = column_load(k, g->dy, g->dy_stride, t, lanes);
        vec delta = vec_softplus(column_load(k, g->dt, g->dt_stride, t, lanes) + k->bias);
        vec delta_log2 = delta * 1.44269504088896341f, input = delta * x, out = k->skip * x;
        vec gate = vec_sigmoid(z), dout = dy * (z * gate);
        vec *decays = w->decay + i * states, *carried = w->carried + i * states;
        for (int64_t base = 0; base < states; base += VEC_LANES) {
            vec quarters[VEC_LANES / 4];
#pragma GCC unroll 4
            for (int64_t q = 0; q < VEC_LANES / 4; q++) {
                vec terms[4] = {0};
                for (int64_t j = 0; j < 4 && base + 4 * q + j < states; j++) {
                    int64_t n = base + 4 * q + j;
                    vec decay = vec_exp2_decay(delta_log2 * w->a[n]), from_before = decay * state[n];
                    decays[n] = decay;
                    carried[n] = from_before;
                    state[n] = vec_fma(input, vec_set1(b[n]), from_before);
                    out = vec_fma(state[n], vec_set1(cs[n]), out);
                    terms[j] = dout * state[n];
                }
                quarters[q] = vec_sum_quarter(terms);
            }
            add_sums(sums + base, quarters, at_most(states - base, VEC_LANES), k->first);
        }
        w->delta[i] = delta;
        column_store(k, g->dz, g->dz_stride, t, dy * out * (gate * (1.0f + z * (1.0f - gate))), lanes);
        if (g->y != NULL)
            column_store(k, g->y, g->y_stride, t, out * (z * gate), lanes);
    }
}

/* The same rows backwards. rates: dA is wanted, a constant. */
VEC_INLINE void sweep_back(struct column *k, const struct trace *w, int64_t t0, int64_t count, int64_t lanes,
                           int64_t states, bool rates)
{
    const struct scan_backward_args *g = k->args;
    vec fixed[FIXED_STATES], *gradient = states == FIXED_STATES ? fixed : w->gradient;
    vec skip_sum = vec_set1(0), bias_sum = vec_set1(0);
    for (int64_t n = 0; n < states; n++)
        gradient[n] = w->gradient[n];
    for (int64_t i = count - 1; i >= 0; i--) {
        int64_t t = t0 + i;
        const float *b = (const float *)g->b + t * g->b_stride, *cs = (const float *)g->c + t * g->c_stride;
        const vec *decay = w->decay + i * states, *carried = w->carried + i * states;
        float *sums = k->token_sums + 2 * t * states;
        vec x = column_load(k, g->x, g->x_stride, t, lanes), z = column_load(k, g->z, g->z_stride, t, lanes);
        vec dy = column_load(k, g->dy, g->dy_stride, t, lanes), delta = w->delta[i];
        vec v = column_load(k, g->dt, g->dt_stride, t, lanes) + k->bias;
        vec dout = dy * (z * vec_sigmoid(z)), input = delta * x, dinput = vec_set1(0), drate = vec_set1(0);
        for (int64_t base = 0; base < states; base += VEC_LANES) {
            vec quarters[VEC_LANES / 4];
#pragma GCC unroll 4
            for (int64_t q = 0; q < VEC_LANES / 4; q++) {
                vec terms[4] = {0};
                for (int64_t j = 0; j < 4 && base + 4 * q + j < states; j++) {
                    int64_t n = base + 4 * q + j;
                    vec whole = vec_fma(vec_set1(cs[n]), dout, gradient[n]), through = whole * carried[n];
                    terms[j] = whole * input;
                    dinput = vec_fma(whole, vec_set1(b[n]), dinput);
                    drate = vec_fma(through, w->a[n], drate);
                    if (rates)
                        w->rate_sum[n] = vec_fma(through, delta, w->rate_sum[n]);
                    gradient[n] = whole * decay[n];
                }
                quarters[q] = vec_sum_quarter(terms);
            }
            add_sums(sums + base, quarters, at_most(states - base, VEC_LANES), k->first);
        }
        vec ddt = vec_fma(x, dinput, drate) * vec_sigmoid(v);
        column_store(k, g->dx, g->dx_stride, t, vec_fma(delta, dinput, k->skip * dout), lanes);
        column_store(k, g->ddt, g->ddt_stride, t, ddt, lanes);
        skip_sum = vec_fma(dout, x, skip_sum);
        bias_sum += ddt;
    }
    k->skip_sum += skip_sum;
    k->bias_sum += bias_sum;
    for (int64_t n = 0; n < states; n++)
        w->gradient[n] = gradient[n];
}

/* One vector of channels through the sequences first..last-1; `chunk` is the first one's first state. */
VEC_INLINE void scan_column(struct column *k, const struct trace *w, int32_t first, int32_t last,
                            const float *chunk, float *channel_sums, int64_t lanes, int64_t states)
{
    const struct scan_backward_args *g = k->args;
    k->bias = vec_load_up_to(g->dt_bias + k->c, lanes);
    k->skip = vec_load_up_to(g->d + k->c, lanes);
    k->skip_sum = k->bias_sum = vec_set1(0);
    for (int64_t n = 0; n < states; n++) {
        w->a[n] = vec_load_up_to(g->a + n * g->channels + k->c, lanes);
        w->rate_sum[n] = vec_set1(0);
    }
    for (int32_t s = first; s < last; s++) {
        int64_t start = g->seq_starts[s], length = g->seq_starts[s + 1] - start;
        int64_t chunks = scan_chunk_count(g->seq_starts + s, 1);
        for (int64_t n = 0; n < states; n++)
            w->gradient[n] = vec_set1(0);
        for (int64_t j = chunks - 1; j >= 0; j--) {
            int64_t offset = j * SCAN_CHUNK, count = at_most(length - offset, SCAN_CHUNK);
            sweep_forward(k, w, chunk + j * states * g->channels, start + offset, count, lanes, states);
            if (g->da_log != NULL)
                sweep_back(k, w, start + offset, count, lanes, states, true);
            else
                sweep_back(k, w, start + offset, count, lanes, states, false);
        }
        chunk += chunks * states * g->channels;
    }
    for (int64_t n = 0; n < states; n++)
        vec_store_up_to(channel_sums + n * g->channels + k->c, w->rate_sum[n] * w->a[n], lanes);
    vec_store_up_to(channel_sums + states * g->channels + k->c, k->skip_sum, lanes);
    vec_store_up_to(channel_sums + (states + 1) * g->channels + k->c, k->bias_sum, lanes);
}

static void backward_task(void *arg, int64_t index, int thread)
{
    const struct backward *p = arg;
    const struct scan_backward_args *g = p->args;
    int64_t block = index % p->blocks, group = index / p->blocks, states = g->d_state;
    int64_t start = block * SCAN_BLOCK, end = at_most(start + SCAN_BLOCK, g->channels);
    int32_t first = (int32_t)(group * p->group_seqs);
    int32_t last = g->n_seqs - first < p->group_seqs ? g->n_seqs : first + (int32_t)p->group_seqs;
    const float *chunk = g->chunk_states + scan_chunk_count(g->seq_starts, first) * states * g->channels;
    float *channel_sums = p->channel_sums + group * (states + 2) * g->channels;
    struct trace w = trace_at(cpu_scratch(p->device, thread), states);
    for (int64_t c = start; c < end; c += VEC_LANES) {
        struct column k = {.args = g, .c = c, .first = c == start};
        k.token_sums = p->token_sums + block * g->tokens * 2 * states;
        if (end - c < VEC_LANES)
            scan_column(&k, &w, first, last, chunk, channel_sums, end - c, states);
        else if (states == FIXED_STATES)
            scan_column(&k, &w, first, last, chunk, channel_sums, VEC_LANES, FIXED_STATES);
        else
            scan_column(&k, &w, first, last, chunk, channel_sums, VEC_LANES, states);
    }
}

/* ---- the second region: sums over blocks of channels for some tokens, over groups for some channels ---- */

static void sum_tokens(const struct backward *p, int64_t t)
{
    const struct scan_backward_args *g = p->args;
    int64_t states = g->d_state;
    float *outputs[2] = {(float *)g->db + t * g->db_stride, (float *)g->dc + t * g->dc_stride};
    for (int64_t n = 0; n < 2 * states; n++) {
        float sum = 0;
        for (int64_t block = 0; block < p->blocks; block++)
            sum += p->token_sums[(block * g->tokens + t) * 2 * states + n];
        outputs[n / states][n % states] = sum;
    }
}

static void sum_channel(const struct backward *p, int64_t c)
{
    const struct scan_backward_args *g = p->args;
    int64_t states = g->d_state;
    for (int64_t n = 0; n < states + 2; n++) {
        float *out = n < states    ? (g->da_log != NULL ? &g->da_log[c * states + n] : NULL)
                     : n == states ? (g->dd != NULL ? &g->dd[c] : NULL)
                                   : (g->ddt_bias != NULL ? &g->ddt_bias[c] : NULL);
        for (int64_t group = 0; out != NULL && group < p->groups; group++)
            *out += p->channel_sums[(group * (states + 2) + n) * g->channels + c];
    }
}

static int64_t token_tasks(const struct backward *p)
{
    return (p->args->tokens + SUM_ROWS - 1) / SUM_ROWS;
}

static void sum_task(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct backward *p = arg;
    const struct scan_backward_args *g = p->args;
    if (index < token_tasks(p)) {
        for (int64_t t = index * SUM_ROWS; t < g->tokens && t < (index + 1) * SUM_ROWS; t++)
            sum_tokens(p, t);
        return;
    }
    int64_t block = index - token_tasks(p);
    for (int64_t c = block * SCAN_BLOCK; c < g->channels && c < (block + 1) * SCAN_BLOCK; c++)
        sum_channel(p, c);
}

static void partition(struct backward *p, int64_t channels, int32_t n_seqs)
{
    p->blocks = (channels + SCAN_BLOCK - 1) / SCAN_BLOCK;
    p->group_seqs = ((int64_t)n_seqs + GROUPS_MOST - 1) / GROUPS_MOST;
    p->groups = p->group_seqs > 0 ? (n_seqs + p->group_seqs - 1) / p->group_seqs : 0;
}

int64_t CPU_NAME(cpu_scan_backward_workspace)(int64_t tokens, int64_t channels, int64_t d_state,
                                              int32_t n_seqs)
{
    struct backward p = {0};
    partition(&p, channels, n_seqs);
    /* 17 sequences make fewer groups than 16 do: what is planned for many must do for fewer. */
    int64_t groups = at_most(n_seqs, GROUPS_MOST);
    int64_t floats = p.blocks * tokens * 2 * d_state + groups * (d_state + 2) * channels;
    return floats * (int64_t)sizeof(float);
}

int CPU_NAME(cpu_scan_backward)(struct kernel_device *device, const struct scan_backward_args *g)
{
    int status = check_scan_backward(g);
    if (status == KERNEL_OK)
        status = cpu_scratch_reserve(device, (size_t)trace_vectors(g->d_state) * sizeof(vec));
    if (status != KERNEL_OK)
        return status;
    struct backward p = {.args = g, .device = device, .token_sums = g->workspace};
    partition(&p, g->channels, g->n_seqs);
    p.channel_sums = p.token_sums + p.blocks * g->tokens * 2 * g->d_state;
    cpu_parallel(device, p.groups * p.blocks, backward_task, &p);
    bool channels = g->da_log != NULL || g->dd != NULL || g->ddt_bias != NULL;
    cpu_parallel(device, token_tasks(&p) + (channels ? p.blocks : 0), sum_task, &p);
    return KERNEL_OK;
}
