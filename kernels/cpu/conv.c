/* conv.c: causal depthwise convolution with SiLU, forward (one token or many) and backward. A task takes a block of
 * channels down the rows of a sequence, so that memory is read in order; what belongs to its channels (weights turned to
 * rows, sums of gradients) stays in the first cache. */
#include "kernels/cpu/check.h"
#include "kernels/cpu/device.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    WIDTH_MAX = 8,
    BLOCK_CHANNELS = 256,
    BACKWARD_CHANNELS = 128,
    TASK_ELEMENTS = 4096, /* below this one thread does all */
    LONG_TOKENS = 32,     /* sequences of this many tokens on average are tasks of their own */
    SEGMENT_TOKENS =
        256, /* a long sequence is cut into these; sums of gradients as well, for their precision */
};

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static float *state_of(const struct state_view *view, int32_t seq)
{
    if (view->pool == NULL)
        return NULL;
    int64_t slot = view->slots != NULL ? view->slots[seq] : seq;
    return slot < 0 ? NULL : view->pool + slot * view->slot_stride;
}

/* A block of channels: [width][count] of weights, [count] of biases; zeros up to a whole vector. These and the
 * gradients' sums are accessed in whole vectors: a masked store delays the load that follows it. */
struct block_weights {
    float rows[WIDTH_MAX][BLOCK_CHANNELS], bias[BLOCK_CHANNELS];
};

static const float zeros[BLOCK_CHANNELS];

/* *even: lanes 0, 2, 4 ... of a and b, *odd: the others. */
VEC_INLINE void deinterleave(vec a, vec b, vec *even, vec *odd)
{
    vec_int even_lanes, odd_lanes;
    for (int i = 0; i < VEC_LANES; i++) {
        even_lanes[i] = 2 * i;
        odd_lanes[i] = 2 * i + 1;
    }
    *even = __builtin_shuffle(a, b, even_lanes);
    *odd = __builtin_shuffle(a, b, odd_lanes);
}

static void load_weights(struct block_weights *to, const float *weight, const float *bias, int64_t width,
                         int64_t first, int64_t count)
{
    int64_t c = 0;
    weight += first * width;
    for (; width == 4 && c + VEC_LANES <= count; c += VEC_LANES) {
        const float *from = weight + c * 4;
        vec low[2], high[2], rows[4]; /* low: of the first half of the channels, by the parity of k */
        deinterleave(vec_load(from), vec_load(from + VEC_LANES), &low[0], &low[1]);
        deinterleave(vec_load(from + 2 * VEC_LANES), vec_load(from + 3 * VEC_LANES), &high[0], &high[1]);
        deinterleave(low[0], high[0], &rows[0], &rows[2]);
        deinterleave(low[1], high[1], &rows[1], &rows[3]);
        for (int k = 0; k < 4; k++)
            vec_store(to->rows[k] + c, rows[k]);
    }
    int64_t padded = divide_up(count, VEC_LANES) * VEC_LANES;
    for (; c < padded; c++)
        for (int64_t k = 0; k < width; k++)
            to->rows[k][c] = c < count ? weight[c * width + k] : 0.0f;
    memcpy(to->bias, zeros, sizeof(zeros));
    if (bias != NULL)
        memcpy(to->bias, bias + first, (size_t)count * sizeof(float));
}

/* Row t of a sequence that begins at x; before its start the state's, oldest first, or zeros. All already point at the
 * block's first channel. */
static const float *input_row(const float *x, int64_t x_stride, const float *state, int64_t channels,
                              int64_t width, int64_t t)
{
    if (t >= 0)
        return x + t * x_stride;
    return state != NULL ? state + (width - 1 + t) * channels : zeros;
}

/* ---- forward ---- */

struct forward_task {
    const struct conv_forward_args *args;
    int64_t blocks;         /* of channels */
    int64_t block_channels; /* of one block */
    int64_t segments;       /* of the longest sequence */
    bool by_sequence;       /* a task is a segment of one sequence, else all of them */
};

VEC_INLINE void forward_row(const struct block_weights *w, const float *const *in, int64_t width, float *y,
                            int64_t count)
{
    for (int64_t c = 0; c < count; c += VEC_LANES) {
        int64_t n = smaller(count - c, VEC_LANES);
        vec sum = vec_load(w->bias + c);
        for (int64_t k = 0; k < width; k++)
            sum = vec_fma(vec_load(w->rows[k] + c), vec_load_n(in[k] + c, n), sum);
        vec_store_n(y + c, sum * vec_sigmoid(sum), n);
    }
}

static void forward_segment(const struct conv_forward_args *a, const struct block_weights *w, int32_t s,
                            int64_t first, int64_t count, int64_t begin, int64_t end)
{
    int64_t start = a->seq_starts[s], length = a->seq_starts[s + 1] - start;
    const float *x = (const float *)a->x + start * a->x_stride + first;
    float *y = (float *)a->y + start * a->y_stride + first;
    const float *state = state_of(&a->initial, s), *in[WIDTH_MAX];
    float *final = state_of(&a->final, s);
    if (state != NULL)
        state += first;
    for (int64_t t = begin; t < smaller(end, length); t++) {
        for (int64_t k = 0; k < a->width; k++)
            in[k] = input_row(x, a->x_stride, state, a->channels, a->width, t - a->width + 1 + k);
        if (a->width == 4)
            forward_row(w, in, 4, y + t * a->y_stride, count);
        else
            forward_row(w, in, a->width, y + t * a->y_stride, count);
    }
    /* The task that has read the old state writes the new one: they may be one. Entry k is read for the entries before
     * it alone. */
    for (int64_t k = 0; begin == 0 && final != NULL && k < a->width - 1; k++)
        memmove(final + first + k * a->channels,
                input_row(x, a->x_stride, state, a->channels, a->width, length - a->width + 1 + k),
                (size_t)count * sizeof(float));
}

static void forward_block(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct forward_task *task = arg;
    const struct conv_forward_args *a = task->args;
    int64_t block = index % task->blocks, segment = index / task->blocks % task->segments;
    int64_t end = smaller(task->block_channels * (block + 1), a->channels);
    struct block_weights w;
    for (int64_t first = task->block_channels * block; first < end; first += BLOCK_CHANNELS) {
        int64_t count = smaller(end - first, BLOCK_CHANNELS);
        load_weights(&w, a->weight, a->bias, a->width, first, count);
        if (task->by_sequence) {
            int32_t s = (int32_t)(index / task->blocks / task->segments);
            forward_segment(a, &w, s, first, count, segment * SEGMENT_TOKENS, (segment + 1) * SEGMENT_TOKENS);
            continue;
        }
        for (int32_t s = 0; s < a->n_seqs; s++)
            forward_segment(a, &w, s, first, count, 0, a->tokens);
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
                                .segments = 1,
                                .by_sequence = !small && a->tokens >= LONG_TOKENS * (int64_t)a->n_seqs};
    task.blocks = divide_up(a->channels, task.block_channels);
    for (int32_t s = 0; task.by_sequence && s < a->n_seqs; s++) {
        int64_t segments = divide_up(a->seq_starts[s + 1] - a->seq_starts[s], SEGMENT_TOKENS);
        task.segments = segments > task.segments ? segments : task.segments;
    }
    cpu_parallel(device, task.blocks * (task.by_sequence ? task.segments * a->n_seqs : 1), forward_block,
                 &task);
    return KERNEL_OK;
}

/* ---- backward ---- */

/* Of one block of channels. */
struct block_gradients {
    float g[WIDTH_MAX][BACKWARD_CHANNELS]; /* of the pre-activations of the last width tokens, a ring */
    float dweight[WIDTH_MAX][BACKWARD_CHANNELS], dbias[BACKWARD_CHANNELS];             /* of this segment */
    float dweight_total[WIDTH_MAX][BACKWARD_CHANNELS], dbias_total[BACKWARD_CHANNELS]; /* of those before */
};

static void add_to_total(float *total, float *sums)
{
    for (int64_t c = 0; c < BACKWARD_CHANNELS; c++) {
        total[c] += sums[c];
        sums[c] = 0.0f;
    }
}

/* With p the pre-activation:  g[t] = dy[t] silu'(p[t]),  dx[t] = sum_k w[k] g[t+width-1-k],
 * dw[k] += g[t] x[t-width+1+k]. g[k] is that of token t + width - 1 - k; g[width-1] is written here. */
VEC_INLINE void backward_row(const struct block_weights *w, struct block_gradients *sums,
                             const float *const *in, float *const *g, int64_t width, const float *dy,
                             float *dx, int64_t count)
{
    for (int64_t c = 0; c < count; c += VEC_LANES) {
        int64_t n = smaller(count - c, VEC_LANES);
        vec p = vec_load(w->bias + c);
        for (int64_t k = 0; k < width; k++)
            p = vec_fma(vec_load(w->rows[k] + c), vec_load_n(in[k] + c, n), p);
        vec sigmoid = vec_sigmoid(p);
        vec slope = sigmoid * vec_fma(p, 1.0f - sigmoid, vec_set1(1.0f));
        vec now = vec_load_n(dy + c, n) * slope;
        vec_store(g[width - 1] + c, now);
        vec out = vec_set1(0.0f);
        for (int64_t k = 0; k < width; k++) {
            out = vec_fma(vec_load(w->rows[k] + c), vec_load(g[k] + c), out);
            float *dweight = sums->dweight[k] + c;
            vec_store(dweight, vec_fma(now, vec_load_n(in[k] + c, n), vec_load(dweight)));
        }
        vec_store(sums->dbias + c, vec_load(sums->dbias + c) + now);
        vec_store_n(dx + c, out, n);
    }
}

/* From the last token to the first. */
static void backward_sequence(const struct conv_backward_args *a, const struct block_weights *w,
                              struct block_gradients *sums, int32_t s, int64_t first, int64_t count)
{
    int64_t start = a->seq_starts[s], length = a->seq_starts[s + 1] - start;
    const float *x = (const float *)a->x + start * a->x_stride + first;
    const float *dy = (const float *)a->dy + start * a->dy_stride + first, *in[WIDTH_MAX];
    float *dx = (float *)a->dx + start * a->dx_stride + first, *g[WIDTH_MAX];
    memset(sums->g, 0, sizeof(sums->g));
    for (int64_t t = length - 1; t >= 0; t--) {
        for (int64_t k = 0; k < a->width; k++) {
            in[k] = input_row(x, a->x_stride, NULL, a->channels, a->width, t - a->width + 1 + k);
            g[k] = sums->g[(t + a->width - 1 - k) % a->width];
        }
        if (a->width == 4)
            backward_row(w, sums, in, g, 4, dy + t * a->dy_stride, dx + t * a->dx_stride, count);
        else
            backward_row(w, sums, in, g, a->width, dy + t * a->dy_stride, dx + t * a->dx_stride, count);
        if (t % SEGMENT_TOKENS != 0)
            continue;
        for (int64_t k = 0; k < a->width; k++)
            add_to_total(sums->dweight_total[k], sums->dweight[k]);
        add_to_total(sums->dbias_total, sums->dbias);
    }
}

static void backward_block(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct conv_backward_args *a = *(const struct conv_backward_args *const *)arg;
    int64_t first = index * BACKWARD_CHANNELS, count = smaller(a->channels - first, BACKWARD_CHANNELS);
    struct block_weights w;
    struct block_gradients sums;
    load_weights(&w, a->weight, a->bias, a->width, first, count);
    memset(&sums, 0, sizeof(sums));
    for (int32_t s = 0; s < a->n_seqs; s++)
        backward_sequence(a, &w, &sums, s, first, count);
    for (int64_t c = 0; a->dbias != NULL && c < count; c++)
        a->dbias[first + c] += sums.dbias_total[c];
    for (int64_t c = 0; a->dweight != NULL && c < count; c++)
        for (int64_t k = 0; k < a->width; k++)
            a->dweight[(first + c) * a->width + k] += sums.dweight_total[k][c];
}

int CPU_NAME(cpu_conv_backward)(struct kernel_device *device, const struct conv_backward_args *a)
{
    int status = check_conv_backward(a);
    if (status == KERNEL_OK && a->width > WIDTH_MAX)
        status = KERNEL_UNSUPPORTED;
    if (status != KERNEL_OK)
        return status;
    cpu_parallel(device, divide_up(a->channels, BACKWARD_CHANNELS), backward_block, &a);
    return KERNEL_OK;
}
