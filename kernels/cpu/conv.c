/* conv.c: causal depthwise convolution with SiLU, forward (one token or many) and backward. A task takes a block of
 * channels, a vector of them at a time down the tokens of a sequence. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    WIDTH_MAX = 8,
    BLOCK_CHANNELS = 64,
    TASK_ELEMENTS = 4096, /* below this one thread does all */
    LONG_TOKENS = 32,     /* sequences of this many tokens on average are tasks of their own */
    SUM_TOKENS = 256, /* gradients are summed over so many tokens, then over the sums, for their precision */
};

static float *state_of(const struct state_view *view, int32_t seq)
{
    if (view->pool == NULL)
        return NULL;
    int64_t slot = view->slots != NULL ? view->slots[seq] : seq;
    return view->pool + slot * view->slot_stride;
}

/* w[k] lane j = weight[c + j, k]. */
VEC_INLINE void load_weights(const float *weight, int64_t width, int64_t c, int64_t n, vec *w)
{
    float columns[WIDTH_MAX][VEC_LANES] = {{0}};
    const float *from = weight + c * width;
    for (int64_t j = 0; j < n; j++)
        for (int64_t k = 0; k < width; k++)
            columns[k][j] = from[j * width + k];
    for (int64_t k = 0; k < width; k++)
        w[k] = vec_load(columns[k]);
}

/* ---- forward ---- */

struct forward_task {
    const struct conv_forward_args *args;
    int64_t blocks;         /* of channels */
    int64_t block_channels; /* of one block */
    bool by_sequence;       /* a task is one sequence, else all of them */
};

/* Rows before the sequence's start are those of the state, oldest first; NULL: zeros. */
VEC_INLINE vec input_at(const float *x, int64_t x_stride, const float *state, int64_t channels, int64_t width,
                        int64_t t, int64_t n)
{
    if (t >= 0)
        return vec_load_n(x + t * x_stride, n);
    return state != NULL ? vec_load_n(state + (width - 1 + t) * channels, n) : vec_set1(0.0f);
}

/* One vector of channels through one sequence. x, y, state, final already point at the channel. */
VEC_INLINE void forward_column(const struct conv_forward_args *a, int64_t width, const vec *w, vec bias,
                               const float *x, float *y, const float *state, float *final, int64_t length,
                               int64_t n)
{
    vec window[WIDTH_MAX]; /* inputs t - width + 1 .. t */
    for (int64_t k = 0; k + 1 < width; k++)
        window[k] = input_at(x, a->x_stride, state, a->channels, width, k - width + 1, n);
    for (int64_t t = 0; t < length; t++) {
        window[width - 1] = vec_load_n(x + t * a->x_stride, n);
        vec sum = bias;
        for (int64_t k = 0; k < width; k++)
            sum = vec_fma(w[k], window[k], sum);
        vec_store_n(y + t * a->y_stride, sum * vec_sigmoid(sum), n);
        for (int64_t k = 0; k + 1 < width; k++)
            window[k] = window[k + 1];
    }
    /* The window is the state that comes next, wherever the old one lay. */
    for (int64_t k = 0; final != NULL && k + 1 < width; k++)
        vec_store_n(final + k * a->channels, window[k], n);
}

VEC_INLINE void forward_columns(const struct conv_forward_args *a, int64_t width, int32_t first_seq,
                                int32_t end_seq, int64_t c, int64_t n)
{
    vec w[WIDTH_MAX];
    load_weights(a->weight, width, c, n, w);
    vec bias = a->bias != NULL ? vec_load_n(a->bias + c, n) : vec_set1(0.0f);
    for (int32_t s = first_seq; s < end_seq; s++) {
        int64_t start = a->seq_starts[s];
        const float *state = state_of(&a->initial, s);
        float *final = state_of(&a->final, s);
        forward_column(a, width, w, bias, (const float *)a->x + start * a->x_stride + c,
                       (float *)a->y + start * a->y_stride + c, state != NULL ? state + c : NULL,
                       final != NULL ? final + c : NULL, a->seq_starts[s + 1] - start, n);
    }
}

static void forward_block(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct forward_task *task = arg;
    const struct conv_forward_args *a = task->args;
    int32_t first_seq = 0, end_seq = a->n_seqs;
    if (task->by_sequence) {
        first_seq = (int32_t)(index / task->blocks);
        end_seq = first_seq + 1;
    }
    int64_t first = index % task->blocks * task->block_channels, end = first + task->block_channels;
    if (end > a->channels)
        end = a->channels;
    for (int64_t c = first; c < end; c += VEC_LANES) {
        int64_t n = end - c < VEC_LANES ? end - c : VEC_LANES;
        if (a->width == 4 && n == VEC_LANES)
            forward_columns(a, 4, first_seq, end_seq, c, VEC_LANES);
        else
            forward_columns(a, a->width, first_seq, end_seq, c, n);
    }
}

int CPU_NAME(cpu_conv_forward)(struct kernel_device *device, const struct conv_forward_args *a)
{
    int status = check_conv_forward(a);
    if (status == KERNEL_OK && a->width > WIDTH_MAX)
        status = KERNEL_UNSUPPORTED;
    if (status != KERNEL_OK || a->channels == 0)
        return status;
    bool small = a->tokens * a->channels <= TASK_ELEMENTS;
    struct forward_task task = {.args = a,
                                .block_channels = small ? a->channels : BLOCK_CHANNELS,
                                .by_sequence = !small && a->tokens >= LONG_TOKENS * (int64_t)a->n_seqs};
    task.blocks = (a->channels + task.block_channels - 1) / task.block_channels;
    cpu_parallel(device, task.blocks * (task.by_sequence ? a->n_seqs : 1), forward_block, &task);
    return KERNEL_OK;
}

/* ---- backward ---- */

/* One vector of channels: what is summed over tokens. */
struct column_sums {
    vec dweight[WIDTH_MAX], dbias;
};

VEC_INLINE void sums_add(struct column_sums *to, struct column_sums *from, int64_t width)
{
    for (int64_t k = 0; k < width; k++) {
        to->dweight[k] += from->dweight[k];
        from->dweight[k] = vec_set1(0.0f);
    }
    to->dbias += from->dbias;
    from->dbias = vec_set1(0.0f);
}

/* With p the pre-activation:  g[t] = dy[t] silu'(p[t]),  dx[t] = sum_k w[k] g[t+width-1-k],
 * dw[k] = sum_t g[t] x[t-width+1+k]. From the last token to the first, the next g's in a window. */
VEC_INLINE void backward_column(const struct conv_backward_args *a, int64_t width, const vec *w, vec bias,
                                int32_t s, int64_t c, int64_t n, struct column_sums *total)
{
    int64_t start = a->seq_starts[s], length = a->seq_starts[s + 1] - start;
    const float *x = (const float *)a->x + start * a->x_stride + c;
    const float *dy = (const float *)a->dy + start * a->dy_stride + c;
    float *dx = (float *)a->dx + start * a->dx_stride + c;
    struct column_sums sums;
    vec g[WIDTH_MAX]; /* g[k]: of token t + width - 1 - k */
    for (int64_t k = 0; k < width; k++)
        g[k] = sums.dweight[k] = vec_set1(0.0f);
    sums.dbias = vec_set1(0.0f);

    for (int64_t t = length - 1; t >= 0; t--) {
        vec in[WIDTH_MAX], p = bias, out = vec_set1(0.0f);
        for (int64_t k = 0; k < width; k++) {
            in[k] = input_at(x, a->x_stride, NULL, a->channels, width, t - width + 1 + k, n);
            p = vec_fma(w[k], in[k], p);
        }
        for (int64_t k = 0; k + 1 < width; k++)
            g[k] = g[k + 1];
        vec sigmoid = vec_sigmoid(p);
        vec slope = sigmoid * vec_fma(p, 1.0f - sigmoid, vec_set1(1.0f));
        g[width - 1] = vec_load_n(dy + t * a->dy_stride, n) * slope;
        for (int64_t k = 0; k < width; k++) {
            out = vec_fma(w[k], g[k], out);
            sums.dweight[k] = vec_fma(g[width - 1], in[k], sums.dweight[k]);
        }
        sums.dbias += g[width - 1];
        vec_store_n(dx + t * a->dx_stride, out, n);
        if (t % SUM_TOKENS == 0)
            sums_add(total, &sums, width);
    }
}

VEC_INLINE void backward_columns(const struct conv_backward_args *a, int64_t width, int64_t c, int64_t n)
{
    vec w[WIDTH_MAX];
    load_weights(a->weight, width, c, n, w);
    vec bias = a->bias != NULL ? vec_load_n(a->bias + c, n) : vec_set1(0.0f);
    struct column_sums total;
    for (int64_t k = 0; k < width; k++)
        total.dweight[k] = vec_set1(0.0f);
    total.dbias = vec_set1(0.0f);
    for (int32_t s = 0; s < a->n_seqs; s++)
        backward_column(a, width, w, bias, s, c, n, &total);

    if (a->dbias != NULL)
        vec_store_n(a->dbias + c, vec_load_n(a->dbias + c, n) + total.dbias, n);
    for (int64_t k = 0; a->dweight != NULL && k < width; k++)
        for (int64_t j = 0; j < n; j++)
            a->dweight[(c + j) * width + k] += total.dweight[k][j];
}

static void backward_block(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct conv_backward_args *a = *(const struct conv_backward_args *const *)arg;
    int64_t c = index * VEC_LANES;
    int64_t n = a->channels - c < VEC_LANES ? a->channels - c : VEC_LANES;
    if (a->width == 4 && n == VEC_LANES)
        backward_columns(a, 4, c, VEC_LANES);
    else
        backward_columns(a, a->width, c, n);
}

int CPU_NAME(cpu_conv_backward)(struct kernel_device *device, const struct conv_backward_args *a)
{
    int status = check_conv_backward(a);
    if (status == KERNEL_OK && a->width > WIDTH_MAX)
        status = KERNEL_UNSUPPORTED;
    if (status != KERNEL_OK)
        return status;
    cpu_parallel(device, (a->channels + VEC_LANES - 1) / VEC_LANES, backward_block, &a);
    return KERNEL_OK;
}
