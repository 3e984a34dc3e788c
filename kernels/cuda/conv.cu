/* conv.cu: causal depthwise convolution with SiLU. A thread takes a few neighbouring channels through a run of tokens,
 * with the last inputs in registers and the next batches of rows on their way through shared memory; a run may cross from
 * one sequence into the next, where those are set again. A width without a kernel of its own, or rows that cannot be read
 * some channels at a time, are left to kernels that read every tap from memory. */
#include <cuda_pipeline.h>

#include "kernels/cuda/vector.cuh"

namespace
{

enum {
    LANE_CHANNELS = 4,
    BLOCK_THREADS = 128,
    RUN_LEAST = 16, /* tokens of a thread; each run reads width - 1 more, and the backward twice that */
    RUN_MOST = 96,
    RUN_STEP = 4,
    MULTIPROCESSORS = 132, /* of a large device: what runs are made for, whichever it is */
    FORWARD_BLOCKS = 8,    /* of a multiprocessor */
    BACKWARD_BLOCKS = 5,
    BATCH = 4, /* tokens that a thread waits for at a time */
    DEPTH = 3, /* batches: under way, and one at hand */
    WIDTH_MOST = 64,
};

/* Tokens of a thread's run: those with which the rounds of blocks that a grid takes are soonest done, each as long as a
 * run and what it takes to begin. Depends on the sizes alone, as sums over runs do. */
int64_t run_of(int64_t tokens, int64_t channels, int64_t blocks_of_multiprocessor)
{
    const int64_t begin = 8, at_once = blocks_of_multiprocessor * MULTIPROCESSORS;
    int64_t best = RUN_LEAST, least = INT64_MAX, columns = divide_up(channels, BLOCK_THREADS * LANE_CHANNELS);
    for (int64_t run = RUN_LEAST; run <= RUN_MOST; run += RUN_STEP) {
        int64_t time = divide_up(divide_up(tokens, run) * columns, at_once) * (run + begin);
        if (time < least) {
            least = time;
            best = run;
        }
    }
    return best;
}

/* A thread's channels of a row as they are in memory. */
template <typename T> struct alignas(LANE_CHANNELS * sizeof(T)) lane_row {
    T v[LANE_CHANNELS];
};

/* Rows on their way to a thread's channels, through shared memory, so that they wait in no registers: token t0 + i of
 * `count` has place i % (DEPTH BATCH). Nobody else reads what a thread has copied. */
template <typename T> struct row_ring {
    struct lane_row<T> (*rows)[BLOCK_THREADS]; /* [DEPTH * BATCH] */
    const T *next;
    int64_t stride;

    __device__ __forceinline__ row_ring(struct lane_row<T> (*rows)[BLOCK_THREADS], const void *p, int64_t at,
                                        int64_t stride)
        : rows(rows), next((const T *)p + at), stride(stride)
    {
    }
    /* Asks for the next batch, as far as there are tokens. at: of its first token in the ring. */
    __device__ __forceinline__ void copy(int at, int64_t count)
    {
#pragma unroll
        for (int j = 0; j < BATCH; j++, next += stride)
            if (j < count)
                __pipeline_memcpy_async(&rows[at + j][threadIdx.x], next, sizeof(struct lane_row<T>));
    }
    __device__ __forceinline__ const struct lane_row<T> &row(int at) const {
        return rows[at][threadIdx.x];
    }
};

/* Inputs of a thread's channels at position t, which may lie before the sequence's first token. */
template <typename T>
__device__ __forceinline__ void input_at(const T *x, int64_t stride, int64_t t, int64_t start,
                                         const float *state, int64_t channels, int64_t width, int64_t c,
                                         float (&out)[LANE_CHANNELS])
{
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        if (t >= start)
            out[i] = to_float(x[t * stride + c + i]);
        else
            out[i] = state != NULL ? state[(width - 1 + t - start) * channels + c + i] : 0.0f;
    }
}

template <int WIDTH> struct taps {
    float weight[WIDTH][LANE_CHANNELS], bias[LANE_CHANNELS];

    __device__ __forceinline__ taps(const float *w, const float *b, int64_t c)
    {
        constexpr int COUNT = WIDTH * LANE_CHANNELS;
        float all[COUNT]; /* a channel's taps are neighbours */
        static_assert(LANE_CHANNELS == 4, "16 bytes of each");
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 v = *reinterpret_cast<const float4 *>(w + c * WIDTH + i);
            all[i] = v.x, all[i + 1] = v.y, all[i + 2] = v.z, all[i + 3] = v.w;
        }
        const float4 v =
            b != NULL ? *reinterpret_cast<const float4 *>(b + c) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        bias[0] = v.x, bias[1] = v.y, bias[2] = v.z, bias[3] = v.w;
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
#pragma unroll
            for (int k = 0; k < WIDTH; k++)
                weight[k][i] = all[i * WIDTH + k];
    }
    __device__ __forceinline__ float apply(const float (&window)[WIDTH][LANE_CHANNELS], int i) const
    {
        float sum = bias[i];
#pragma unroll
        for (int k = 0; k < WIDTH; k++)
            sum = fmaf(weight[k][i], window[k][i], sum);
        return sum;
    }
};

/* Moves the rows of a window up by one. */
template <int WIDTH> __device__ __forceinline__ void move_up(float (&window)[WIDTH][LANE_CHANNELS])
{
#pragma unroll
    for (int k = 1; k < WIDTH; k++)
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            window[k - 1][i] = window[k][i];
}

/* One token forward: its input into the window, its output stored. */
template <typename T, int WIDTH>
__device__ __forceinline__ void step_forward(const taps<WIDTH> &w, const struct lane_row<T> &x,
                                             float (&window)[WIDTH][LANE_CHANNELS], T *to)
{
    struct lane_row<T> y;
    move_up(window);
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        window[WIDTH - 1][i] = to_float(x.v[i]);
        y.v[i] = from_float<T>(silu(w.apply(window, i)));
    }
    *reinterpret_cast<struct lane_row<T> *>(to) = y;
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(BLOCK_THREADS, FORWARD_BLOCKS)
    forward_kernel(struct conv_forward_args a, int64_t run)
{
    __shared__ struct lane_row<T> rows[DEPTH * BATCH][BLOCK_THREADS];
    int64_t c = ((int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x) * LANE_CHANNELS;
    int64_t first = (int64_t)blockIdx.x * run, last = min(first + run, a.tokens);
    if (c >= a.channels)
        return;
    struct row_ring<T> ring(rows, a.x, first * a.x_stride + c, a.x_stride);
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) {
        ring.copy(i * BATCH, last - first - i * BATCH);
        __pipeline_commit();
    }
    const taps<WIDTH> w(a.weight, a.bias, c);
    float window[WIDTH][LANE_CHANNELS]; /* inputs t-WIDTH+1 .. t */
    int32_t s = part_of(a.seq_starts, a.n_seqs, first);
    int64_t end = a.seq_starts[s + 1];
    auto begin = [&](int64_t t, int64_t start) {
#pragma unroll
        for (int k = 1; k < WIDTH; k++)
            input_at((const T *)a.x, a.x_stride, t - WIDTH + k, start, state_of(a.initial, s), a.channels,
                     WIDTH, c, window[k]);
    };
    begin(first, a.seq_starts[s]);
    T *y = (T *)a.y + first * a.y_stride + c;
    int at = 0;
    for (int64_t t = first; t < last; t += BATCH, at = (at + BATCH) % (DEPTH * BATCH)) {
        ring.copy((at + (DEPTH - 1) * BATCH) % (DEPTH * BATCH), last - t - (DEPTH - 1) * BATCH);
        __pipeline_commit();
        __pipeline_wait_prior(DEPTH - 1);
        if (t + BATCH <= min(end, last)) {
#pragma unroll
            for (int j = 0; j < BATCH; j++, y += a.y_stride)
                step_forward(w, ring.row(at + j), window, y);
            continue;
        }
#pragma unroll 1
        for (int j = 0; j < BATCH && t + j < last; j++, y += a.y_stride) {
            if (t + j == end) {
                while (t + j >= a.seq_starts[s + 1])
                    s++;
                end = a.seq_starts[s + 1];
                begin(t + j, t + j);
            }
            step_forward(w, ring.row(at + j), window, y);
        }
    }
}

/* Any width: one output a thread. */
template <typename T> __global__ void forward_any_kernel(struct conv_forward_args a)
{
    int64_t t = blockIdx.x, c = (int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x;
    if (c >= a.channels)
        return;
    int32_t s = part_of(a.seq_starts, a.n_seqs, t);
    int64_t start = a.seq_starts[s];
    const float *state = state_of(a.initial, s);
    float sum = a.bias != NULL ? a.bias[c] : 0.0f;
    for (int64_t k = 0; k < a.width; k++) {
        int64_t from = t - a.width + 1 + k;
        float x = 0.0f;
        if (from >= start)
            x = to_float(((const T *)a.x)[from * a.x_stride + c]);
        else if (state != NULL)
            x = state[(a.width - 1 + from - start) * a.channels + c];
        sum = fmaf(a.weight[c * a.width + k], x, sum);
    }
    ((T *)a.y)[t * a.y_stride + c] = from_float<T>(silu(sum));
}

/* The last width - 1 inputs of every sequence. An entry is read by none but its own thread, and before it is written:
 * the pools may be one. */
template <typename T> __global__ void final_kernel(struct conv_forward_args a)
{
    int32_t s = (int32_t)blockIdx.x;
    int64_t c = (int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x;
    const float *from = state_of(a.initial, s);
    float *to = state_of(a.final, s);
    if (c >= a.channels || to == NULL)
        return;
    int64_t start = a.seq_starts[s], end = a.seq_starts[s + 1];
    for (int64_t j = 0; j < a.width - 1; j++) {
        int64_t t = end - a.width + 1 + j;
        float x = 0.0f;
        if (t >= start)
            x = to_float(((const T *)a.x)[t * a.x_stride + c]);
        else if (from != NULL)
            x = from[(a.width - 1 + t - start) * a.channels + c];
        to[j * a.channels + c] = x;
    }
}

/* One token a sequence: the state moves up by one entry as it is read. */
template <typename T> __global__ void step_kernel(struct conv_forward_args a)
{
    int32_t s = (int32_t)blockIdx.x;
    int64_t c = (int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x, last = a.width - 1;
    if (c >= a.channels)
        return;
    const float *from = state_of(a.initial, s), *weight = a.weight + c * a.width;
    float *to = state_of(a.final, s);
    float x = to_float(((const T *)a.x)[s * a.x_stride + c]), sum = a.bias != NULL ? a.bias[c] : 0.0f;
    for (int64_t j = 0; j < last; j++) {
        float old = from != NULL ? from[j * a.channels + c] : 0.0f;
        sum = fmaf(weight[j], old, sum);
        if (to != NULL && j > 0)
            to[(j - 1) * a.channels + c] = old;
    }
    if (to != NULL && last > 0)
        to[(last - 1) * a.channels + c] = x;
    ((T *)a.y)[s * a.y_stride + c] = from_float<T>(silu(fmaf(weight[last], x, sum)));
}

/* ---- backward ---- */

/* What a thread carries through its run. */
template <int WIDTH> struct carried {
    float window[WIDTH][LANE_CHANNELS]; /* inputs t-WIDTH+1 .. t */
    float slope[WIDTH][LANE_CHANNELS];  /* gradients of the pre-activations t-WIDTH+1 .. t */
    float sums[WIDTH + 1][LANE_CHANNELS];
};

/* One output's gradient into `slope`. */
template <typename T, int WIDTH, bool SUMS>
__device__ __forceinline__ void step_backward(const taps<WIDTH> &w, const struct lane_row<T> &x,
                                              const struct lane_row<T> &dy, bool own,
                                              struct carried<WIDTH> *k)
{
    move_up(k->window);
    move_up(k->slope);
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        k->window[WIDTH - 1][i] = to_float(x.v[i]);
        float slope = to_float(dy.v[i]) * silu_slope(w.apply(k->window, i));
        k->slope[WIDTH - 1][i] = slope;
        if (SUMS && own) {
#pragma unroll
            for (int m = 0; m < WIDTH; m++)
                k->sums[m][i] = fmaf(slope, k->window[m][i], k->sums[m][i]);
            k->sums[WIDTH][i] += slope;
        }
    }
}

/* The gradient of the input WIDTH - 1 tokens back: the output m tokens after it read it through tap WIDTH-1-m. */
template <typename T, int WIDTH>
__device__ __forceinline__ void store_gradient(const taps<WIDTH> &w, const struct carried<WIDTH> &k, T *to)
{
    struct lane_row<T> dx;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        float sum = 0.0f;
#pragma unroll
        for (int m = 0; m < WIDTH; m++)
            sum = fmaf(w.weight[WIDTH - 1 - m][i], k.slope[m][i], sum);
        dx.v[i] = from_float<T>(sum);
    }
    *reinterpret_cast<struct lane_row<T> *>(to) = dx;
}

/* Tokens first .. first+run-1 of the inputs' gradient, and those outputs' part in the gradients of weight and bias. At
 * the run's end the walk goes on for the width - 1 tokens whose outputs read the run's last inputs, or with zeros where
 * the sequence ends. parts: [runs][width + 1][channels], if SUMS. */
template <typename T, int WIDTH, bool SUMS>
__global__ void __launch_bounds__(BLOCK_THREADS, SUMS ? BACKWARD_BLOCKS - 1 : BACKWARD_BLOCKS)
    backward_kernel(struct conv_backward_args a, int64_t run, float *parts)
{
    __shared__ struct lane_row<T> rows[2][DEPTH * BATCH][BLOCK_THREADS];
    int64_t c = ((int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x) * LANE_CHANNELS;
    int64_t first = (int64_t)blockIdx.x * run, last = min(first + run, a.tokens);
    int64_t walk_end = min(last + WIDTH - 1, a.tokens);
    if (c >= a.channels)
        return;
    struct row_ring<T> inputs(rows[0], a.x, first * a.x_stride + c, a.x_stride);
    struct row_ring<T> grads(rows[1], a.dy, first * a.dy_stride + c, a.dy_stride);
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) {
        inputs.copy(i * BATCH, walk_end - first - i * BATCH);
        grads.copy(i * BATCH, walk_end - first - i * BATCH);
        __pipeline_commit();
    }
    const taps<WIDTH> w(a.weight, a.bias, c);
    struct carried<WIDTH> k = {
    };
    int32_t s = part_of(a.seq_starts, a.n_seqs, first);
    int64_t end = a.seq_starts[s + 1], own = first; /* the first input of the run in this sequence */
#pragma unroll
    for (int j = 1; j < WIDTH; j++)
        input_at((const T *)a.x, a.x_stride, first - WIDTH + j, a.seq_starts[s], NULL, a.channels, WIDTH, c,
                 k.window[j]);
    T *dx = (T *)a.dx + (first - WIDTH + 1) * a.dx_stride + c; /* of the input WIDTH - 1 tokens back */
    /* No outputs read the sequence's last inputs but those behind. */
    auto finish = [&]() {
        T *to = dx;
#pragma unroll
        for (int j = 1; j < WIDTH; j++, to += a.dx_stride) {
            move_up(k.slope);
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++)
                k.slope[WIDTH - 1][i] = 0.0f;
            if (end - WIDTH + j >= own && end - WIDTH + j < last)
                store_gradient(w, k, to);
        }
    };
    bool finished = false;
    int at = 0;
    for (int64_t t = first; t < walk_end; t += BATCH, at = (at + BATCH) % (DEPTH * BATCH)) {
        int ahead = (at + (DEPTH - 1) * BATCH) % (DEPTH * BATCH);
        inputs.copy(ahead, walk_end - t - (DEPTH - 1) * BATCH);
        grads.copy(ahead, walk_end - t - (DEPTH - 1) * BATCH);
        __pipeline_commit();
        __pipeline_wait_prior(DEPTH - 1);
        if (t + BATCH <= min(end, walk_end) && t >= own + WIDTH - 1) {
#pragma unroll
            for (int j = 0; j < BATCH; j++, dx += a.dx_stride) {
                step_backward<T, WIDTH, SUMS>(w, inputs.row(at + j), grads.row(at + j), t + j < last, &k);
                store_gradient(w, k, dx);
            }
            continue;
        }
#pragma unroll 1
        for (int j = 0; j < BATCH && t + j < walk_end; j++, dx += a.dx_stride) {
            if (t + j == end) {
                finish();
                if (end >= last) {
                    finished = true;
                    walk_end = end;
                    break;
                }
                own = end;
                while (own >= a.seq_starts[s + 1])
                    s++;
                end = a.seq_starts[s + 1];
#pragma unroll
                for (int m = 0; m < WIDTH; m++)
#pragma unroll
                    for (int i = 0; i < LANE_CHANNELS; i++)
                        k.window[m][i] = k.slope[m][i] = 0.0f;
            }
            step_backward<T, WIDTH, SUMS>(w, inputs.row(at + j), grads.row(at + j), t + j < last, &k);
            if (t + j >= own + WIDTH - 1)
                store_gradient(w, k, dx);
        }
    }
    if (!finished && end == walk_end)
        finish();
    if (!SUMS)
        return;
    float *part = parts + (int64_t)blockIdx.x * (WIDTH + 1) * a.channels;
    float weights[LANE_CHANNELS * WIDTH];
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS * WIDTH; i++)
        weights[i] = k.sums[i % WIDTH][i / WIDTH];
    store_pack(part + c * WIDTH, weights);
    store_pack(part + WIDTH * a.channels + c, k.sums[WIDTH]);
}

/* Gradient of the pre-activation of one channel at t, any width. */
template <typename T>
__device__ float slope_any(const struct conv_backward_args &a, int64_t t, int64_t start, int64_t c)
{
    float sum = a.bias != NULL ? a.bias[c] : 0.0f;
    for (int64_t k = 0; k < a.width; k++) {
        int64_t from = t - a.width + 1 + k;
        if (from >= start)
            sum = fmaf(a.weight[c * a.width + k], to_float(((const T *)a.x)[from * a.x_stride + c]), sum);
    }
    return to_float(((const T *)a.dy)[t * a.dy_stride + c]) * silu_slope(sum);
}

/* Any width: one channel's run a thread, the pre-activations' gradients of the run and width - 1 more in local
 * memory. */
template <typename T>
__global__ void backward_any_kernel(struct conv_backward_args a, int64_t run, float *parts)
{
    int64_t c = (int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x;
    int64_t first = (int64_t)blockIdx.x * run, last = min(first + run, a.tokens);
    if (c >= a.channels)
        return;
    float slope[RUN_MOST + WIDTH_MOST];
    int32_t s = part_of(a.seq_starts, a.n_seqs, first);
    int64_t end = min(last + a.width - 1, a.tokens);
    for (int64_t t = first; t < end; t++) {
        while (t >= a.seq_starts[s + 1])
            s++;
        slope[t - first] = slope_any<T>(a, t, a.seq_starts[s], c);
    }
    s = part_of(a.seq_starts, a.n_seqs, first);
    for (int64_t t = first; t < last; t++) {
        while (t >= a.seq_starts[s + 1])
            s++;
        float dx = 0.0f;
        for (int64_t m = 0; m < a.width && t + m < a.seq_starts[s + 1]; m++)
            dx = fmaf(a.weight[c * a.width + a.width - 1 - m], slope[t + m - first], dx);
        ((T *)a.dx)[t * a.dx_stride + c] = from_float<T>(dx);
    }
    if (parts == NULL)
        return;
    float *part = parts + (int64_t)blockIdx.x * (a.width + 1) * a.channels;
    float bias = 0.0f;
    for (int64_t t = first; t < last; t++)
        bias += slope[t - first];
    part[a.width * a.channels + c] = bias;
    for (int64_t k = 0; k < a.width; k++) {
        float sum = 0.0f;
        s = part_of(a.seq_starts, a.n_seqs, first);
        for (int64_t t = first; t < last; t++) {
            while (t >= a.seq_starts[s + 1])
                s++;
            int64_t from = t - a.width + 1 + k;
            if (from >= a.seq_starts[s])
                sum = fmaf(slope[t - first], to_float(((const T *)a.x)[from * a.x_stride + c]), sum);
        }
        part[c * a.width + k] = sum;
    }
}

/* out[i] += the sum over p of parts[p * stride + i]. PART_LANES threads an element share them. */
enum { PART_LANES = 32 };
__global__ void add_parts_kernel(const float *parts, int64_t n_parts, int64_t stride, int64_t count,
                                 float *out)
{
    __shared__ float sums[PART_LANES][WARP];
    int64_t i = (int64_t)blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (i < count)
#pragma unroll 4
        for (int64_t p = threadIdx.y; p < n_parts; p += PART_LANES)
            sum += parts[p * stride + i];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || i >= count)
        return;
    for (int lane = 1; lane < PART_LANES; lane++)
        sum += sums[lane][threadIdx.x];
    out[i] += sum;
}

/* Whether the parameters may be read 16 bytes at a time, of LANE_CHANNELS channels together. */
bool taps_aligned(const float *weight, const float *bias, int64_t channels)
{
    return channels % LANE_CHANNELS == 0 && (uintptr_t)weight % 16 == 0 && (uintptr_t)bias % 16 == 0;
}

bool all_singles(const int32_t *seq_starts, int32_t n_seqs, int64_t tokens)
{
    if (tokens != n_seqs)
        return false;
    for (int32_t s = 0; s < n_seqs; s++)
        if (seq_starts[s] != s)
            return false;
    return true;
}

template <typename T> void forward_launch(cudaStream_t stream, const struct conv_forward_args &a, bool whole)
{
    int64_t run = run_of(a.tokens, a.channels, FORWARD_BLOCKS);
    dim3 grid((unsigned)divide_up(a.tokens, run),
              (unsigned)divide_up(a.channels, BLOCK_THREADS * LANE_CHANNELS));
    if (whole && a.width == 2)
        forward_kernel<T, 2><<<grid, BLOCK_THREADS, 0, stream>>>(a, run);
    else if (whole && a.width == 3)
        forward_kernel<T, 3><<<grid, BLOCK_THREADS, 0, stream>>>(a, run);
    else if (whole && a.width == 4)
        forward_kernel<T, 4><<<grid, BLOCK_THREADS, 0, stream>>>(a, run);
    else
        forward_any_kernel<T><<<dim3((unsigned)a.tokens, (unsigned)divide_up(a.channels, BLOCK_THREADS)),
                                BLOCK_THREADS, 0, stream>>>(a);
}

template <typename T, int WIDTH>
void backward_launch_width(cudaStream_t stream, const struct conv_backward_args &a, float *parts)
{
    int64_t run = run_of(a.tokens, a.channels, BACKWARD_BLOCKS);
    dim3 grid((unsigned)divide_up(a.tokens, run),
              (unsigned)divide_up(a.channels, BLOCK_THREADS * LANE_CHANNELS));
    if (parts != NULL)
        backward_kernel<T, WIDTH, true><<<grid, BLOCK_THREADS, 0, stream>>>(a, run, parts);
    else
        backward_kernel<T, WIDTH, false><<<grid, BLOCK_THREADS, 0, stream>>>(a, run, NULL);
}

template <typename T>
void backward_launch(cudaStream_t stream, const struct conv_backward_args &a, float *parts, bool whole)
{
    int64_t run = run_of(a.tokens, a.channels, BACKWARD_BLOCKS);
    if (whole && a.width == 2)
        backward_launch_width<T, 2>(stream, a, parts);
    else if (whole && a.width == 3)
        backward_launch_width<T, 3>(stream, a, parts);
    else if (whole && a.width == 4)
        backward_launch_width<T, 4>(stream, a, parts);
    else
        backward_any_kernel<T>
            <<<dim3((unsigned)divide_up(a.tokens, run), (unsigned)divide_up(a.channels, BLOCK_THREADS)),
               BLOCK_THREADS, 0, stream>>>(a, run, parts);
}

} // namespace

int cuda_add_parts(struct kernel_device *device, const float *parts, int64_t n_parts, int64_t stride,
                   int64_t count, float *out)
{
    if (n_parts > 0 && count > 0)
        add_parts_kernel<<<(unsigned)divide_up(count, WARP), dim3(WARP, PART_LANES), 0, device->stream>>>(
            parts, n_parts, stride, count, out);
    return cuda_launched(device);
}

int cuda_conv_forward(struct kernel_device *device, const struct conv_forward_args *args)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    struct conv_forward_args a = *args;
    if (a.channels < 0 || a.width <= 0 || a.x_stride < a.channels || a.y_stride < a.channels ||
        !cuda_seqs_valid(a.seq_starts, a.n_seqs, a.tokens))
        return KERNEL_INVALID;
    if (!cuda_is_float(a.act))
        return KERNEL_UNSUPPORTED;
    if (a.n_seqs == 0 || a.channels == 0)
        return KERNEL_OK;
    bool singles = all_singles(a.seq_starts, a.n_seqs, a.tokens);
    bool whole = taps_aligned(a.weight, a.bias, a.channels) && rows_aligned(a.x, a.x_stride, a.act) &&
                 rows_aligned(a.y, a.y_stride, a.act);
    status = cuda_stage_array(device, a.seq_starts, a.n_seqs + 1, &a.seq_starts);
    if (status == KERNEL_OK)
        status = stage_slots(device, a.n_seqs, &a.initial);
    if (status == KERNEL_OK)
        status = stage_slots(device, a.n_seqs, &a.final);
    if (status != KERNEL_OK)
        return status;
    dim3 per_channel((unsigned)a.n_seqs, (unsigned)divide_up(a.channels, BLOCK_THREADS));
    if (singles) {
        CUDA_WITH_TYPE(a.act, T, step_kernel<T><<<per_channel, BLOCK_THREADS, 0, device->stream>>>(a));
        return cuda_launched(device);
    }
    if (a.tokens > 0)
        CUDA_WITH_TYPE(a.act, T, forward_launch<T>(device->stream, a, whole));
    if (a.final.pool != NULL)
        CUDA_WITH_TYPE(a.act, T, final_kernel<T><<<per_channel, BLOCK_THREADS, 0, device->stream>>>(a));
    return cuda_launched(device);
}

int cuda_conv_backward(struct kernel_device *device, const struct conv_backward_args *args)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    struct conv_backward_args a = *args;
    if (a.channels < 0 || a.width <= 0 || a.x_stride < a.channels || a.dy_stride < a.channels ||
        a.dx_stride < a.channels || !cuda_seqs_valid(a.seq_starts, a.n_seqs, a.tokens))
        return KERNEL_INVALID;
    if (!cuda_is_float(a.act) || a.width > WIDTH_MOST)
        return KERNEL_UNSUPPORTED;
    if (a.tokens == 0 || a.channels == 0)
        return KERNEL_OK;
    bool whole = taps_aligned(a.weight, a.bias, a.channels) && rows_aligned(a.x, a.x_stride, a.act) &&
                 rows_aligned(a.dy, a.dy_stride, a.act) && rows_aligned(a.dx, a.dx_stride, a.act);
    int64_t runs = divide_up(a.tokens, run_of(a.tokens, a.channels, BACKWARD_BLOCKS)),
            run_floats = (a.width + 1) * a.channels;
    void *parts = NULL;
    if (a.dweight != NULL || a.dbias != NULL)
        status = cuda_scratch(device, CUDA_SCRATCH_OP, (size_t)(runs * run_floats) * sizeof(float), &parts);
    if (status == KERNEL_OK)
        status = cuda_stage_array(device, a.seq_starts, a.n_seqs + 1, &a.seq_starts);
    if (status != KERNEL_OK)
        return status;
    CUDA_WITH_TYPE(a.act, T, backward_launch<T>(device->stream, a, (float *)parts, whole));
    status = cuda_launched(device);
    if (a.dweight != NULL && status == KERNEL_OK)
        status = cuda_add_parts(device, (float *)parts, runs, run_floats, a.width * a.channels, a.dweight);
    if (a.dbias != NULL && status == KERNEL_OK)
        status = cuda_add_parts(device, (float *)parts + a.width * a.channels, runs, run_floats, a.channels,
                                a.dbias);
    return status;
}
