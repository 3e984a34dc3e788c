/* scan.c: the selective scan forward, for whole sequences and for single steps. Called by the thread that
 * owns the device; the work runs on its pool.
 *
 * Channels are independent, so a vector holds neighbouring channels and everything of one (state, step,
 * output) stays in its lanes. A task is one sequence times SCAN_BLOCK channels; within it each vector of
 * channels walks the sequence with its d_state vectors of state in registers (d_state 16 on AVX-512) or in
 * the first-level cache. About twelve vector instructions an element of state, eight of them the exponential.
 */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    SCAN_BLOCK = 64,         /* channels of a task */
    STEP_BLOCK = 512,        /* and of one token's */
    SERIAL_UPDATES = 1 << 14 /* updates of one state element worth waking nobody for: a few microseconds */
};

struct forward {
    const struct scan_forward_args *args;
    struct kernel_device *device;
    int64_t block, blocks; /* channels of a task, and how many of those */
};

static int64_t at_most(int64_t a, int64_t limit)
{
    return a < limit ? a : limit;
}

static float *state_of(const struct state_view *view, int32_t seq)
{
    if (view->pool == NULL)
        return NULL;
    int64_t slot = view->slots != NULL ? view->slots[seq] : seq;
    return slot < 0 ? NULL : view->pool + slot * view->slot_stride;
}

/* Channels c .. c+lanes-1 through rows start..end-1. `states` is d_state, a constant where speed matters; h
 * and rate have room for as many. */
VEC_INLINE void scan_channels(const struct scan_forward_args *g, int64_t start, int64_t end, int64_t c,
                              int64_t lanes, int64_t states, const float *initial, float *final, float *chunk,
                              vec *h, vec *rate)
{
    const vec log2_e = vec_set1(1.44269504088896341f);
    const vec bias = vec_load_up_to(g->dt_bias + c, lanes), skip = vec_load_up_to(g->d + c, lanes);
    for (int64_t n = 0; n < states; n++) {
        rate[n] = vec_load_up_to(g->a + n * g->channels + c, lanes) * log2_e;
        h[n] = initial != NULL ? vec_load_up_to(initial + n * g->channels + c, lanes) : vec_set1(0);
    }
    for (int64_t t = start; t < end; t++) {
        if (chunk != NULL && (t - start) % SCAN_CHUNK == 0) {
            for (int64_t n = 0; n < states; n++)
                vec_store_up_to(chunk + n * g->channels + c, h[n], lanes);
            chunk += states * g->channels;
        }
        const float *b = (const float *)g->b + t * g->b_stride, *cs = (const float *)g->c + t * g->c_stride;
        vec x = vec_load_up_to((const float *)g->x + t * g->x_stride + c, lanes);
        vec z = vec_load_up_to((const float *)g->z + t * g->z_stride + c, lanes);
        vec delta = vec_softplus(vec_load_up_to((const float *)g->dt + t * g->dt_stride + c, lanes) + bias);
        vec input = delta * x, y = skip * x;
#pragma GCC unroll 16
        for (int64_t n = 0; n < states; n++) {
            h[n] = vec_fma(vec_exp2_decay(delta * rate[n]), h[n], input * b[n]);
            y = vec_fma(h[n], vec_set1(cs[n]), y);
        }
        vec_store_up_to((float *)g->y + t * g->y_stride + c, y * (z * vec_sigmoid(z)), lanes);
    }
    for (int64_t n = 0; final != NULL && n < states; n++)
        vec_store_up_to(final + n * g->channels + c, h[n], lanes);
}

static void sequence_task(void *arg, int64_t index, int thread)
{
    const struct forward *f = arg;
    const struct scan_forward_args *g = f->args;
    int32_t seq = (int32_t)(index / f->blocks);
    int64_t c = index % f->blocks * f->block, last = at_most(c + f->block, g->channels);
    int64_t start = g->seq_starts[seq], end = g->seq_starts[seq + 1];
    const float *initial = state_of(&g->initial, seq);
    float *final = state_of(&g->final, seq), *chunk = g->chunk_states;
    if (chunk != NULL)
        chunk += scan_chunk_count(g->seq_starts, seq) * g->d_state * g->channels;
    vec *h = cpu_scratch(f->device, thread), *rate = h + g->d_state;
    for (; c + VEC_LANES <= last; c += VEC_LANES) {
        if (g->d_state == 16) {
            vec h16[16], rate16[16];
            scan_channels(g, start, end, c, VEC_LANES, 16, initial, final, chunk, h16, rate16);
        } else {
            scan_channels(g, start, end, c, VEC_LANES, g->d_state, initial, final, chunk, h, rate);
        }
    }
    if (c < last)
        scan_channels(g, start, end, c, last - c, g->d_state, initial, final, chunk, h, rate);
}

/* ---- one token ---- */

/* Of each vector of channels of a block, while the states go by. */
struct step {
    vec delta_log2[STEP_BLOCK / VEC_LANES], input[STEP_BLOCK / VEC_LANES], y[STEP_BLOCK / VEC_LANES];
};

VEC_INLINE void step_begin(const struct scan_forward_args *g, struct step *w, int64_t t, int64_t c, int64_t v,
                           int64_t lanes)
{
    vec x = vec_load_up_to((const float *)g->x + t * g->x_stride + c, lanes);
    vec dt = vec_load_up_to((const float *)g->dt + t * g->dt_stride + c, lanes);
    vec delta = vec_softplus(dt + vec_load_up_to(g->dt_bias + c, lanes));
    w->delta_log2[v] = delta * 1.44269504088896341f;
    w->input[v] = delta * x;
    w->y[v] = vec_load_up_to(g->d + c, lanes) * x;
}

VEC_INLINE void step_state(struct step *w, const float *a, const float *before, float *after, float b,
                           float c, int64_t v, int64_t lanes)
{
    vec h = w->input[v] * b;
    if (before != NULL)
        h = vec_fma(vec_exp2_decay(w->delta_log2[v] * vec_load_up_to(a, lanes)),
                    vec_load_up_to(before, lanes), h);
    if (after != NULL)
        vec_store_up_to(after, h, lanes);
    w->y[v] = vec_fma(h, vec_set1(c), w->y[v]);
}

VEC_INLINE void step_end(const struct scan_forward_args *g, struct step *w, int64_t t, int64_t c, int64_t v,
                         int64_t lanes)
{
    vec z = vec_load_up_to((const float *)g->z + t * g->z_stride + c, lanes);
    vec_store_up_to((float *)g->y + t * g->y_stride + c, w->y[v] * (z * vec_sigmoid(z)), lanes);
}

static void step_task(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct forward *f = arg;
    const struct scan_forward_args *g = f->args;
    int32_t seq = (int32_t)(index / f->blocks);
    int64_t first = index % f->blocks * f->block, count = at_most(g->channels - first, f->block);
    int64_t t = g->seq_starts[seq], whole = count / VEC_LANES, rest = count % VEC_LANES;
    const float *b = (const float *)g->b + t * g->b_stride, *cs = (const float *)g->c + t * g->c_stride;
    const float *initial = state_of(&g->initial, seq);
    float *final = state_of(&g->final, seq);
    struct step w;
    for (int64_t v = 0; v < whole; v++)
        step_begin(g, &w, t, first + v * VEC_LANES, v, VEC_LANES);
    if (rest > 0)
        step_begin(g, &w, t, first + whole * VEC_LANES, whole, rest);
    for (int64_t n = 0; n < g->d_state; n++) {
        int64_t at = n * g->channels + first;
        const float *a = g->a + at, *before = initial != NULL ? initial + at : NULL;
        float *after = final != NULL ? final + at : NULL;
        for (int64_t v = 0; v < whole + (rest > 0); v++) {
            int64_t c = v * VEC_LANES;
            const float *before_c = before != NULL ? before + c : NULL;
            float *after_c = after != NULL ? after + c : NULL;
            if (v < whole)
                step_state(&w, a + c, before_c, after_c, b[n], cs[n], v, VEC_LANES);
            else
                step_state(&w, a + c, before_c, after_c, b[n], cs[n], v, rest);
        }
    }
    for (int64_t v = 0; v < whole; v++)
        step_end(g, &w, t, first + v * VEC_LANES, v, VEC_LANES);
    if (rest > 0)
        step_end(g, &w, t, first + whole * VEC_LANES, whole, rest);
}

/* Does every sequence have exactly one token? */
static bool is_step(const struct scan_forward_args *g)
{
    if (g->tokens != g->n_seqs || g->chunk_states != NULL)
        return false;
    for (int32_t s = 0; s < g->n_seqs; s++)
        if (g->seq_starts[s + 1] - g->seq_starts[s] != 1)
            return false;
    return true;
}

int CPU_NAME(cpu_scan_forward)(struct kernel_device *device, const struct scan_forward_args *g)
{
    int status = check_scan_forward(g);
    if (status == KERNEL_OK)
        status = cpu_scratch_reserve(device, 2 * (size_t)g->d_state * sizeof(vec));
    if (status != KERNEL_OK)
        return status;
    bool step = is_step(g);
    void (*task)(void *, int64_t, int) = step ? step_task : sequence_task;
    struct forward f = {.args = g, .device = device, .block = step ? STEP_BLOCK : SCAN_BLOCK};
    f.blocks = (g->channels + f.block - 1) / f.block;
    if (g->tokens * g->channels * g->d_state > SERIAL_UPDATES)
        cpu_parallel(device, g->n_seqs * f.blocks, task, &f);
    else
        for (int64_t i = 0; i < g->n_seqs * f.blocks; i++)
            task(&f, i, 0);
    return KERNEL_OK;
}
