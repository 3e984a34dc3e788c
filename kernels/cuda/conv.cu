/* conv.cu: causal depthwise convolution with SiLU. A thread takes a few neighbouring channels through a run of
 * tokens, with the last inputs in registers; a run may cross from one sequence into the next, where those are set
 * again. A width without a kernel of its own reads every tap from memory (WIDTH 0). */
#include "kernels/cuda/vector.cuh"

namespace
{

enum {
    LANE_CHANNELS = 4,
    BLOCK_THREADS = 128,
    RUN = 16,          /* tokens of a thread, forward */
    RUN_BACKWARD = 32, /* each costs width - 1 more tokens */
    WIDTH_MOST = 64,
};

/* Inputs of a thread's channels at position t, which may lie before the sequence's first token. */
template <typename T>
__device__ __forceinline__ void input_at(const T *x, int64_t stride, int64_t t, int64_t start,
                                         const float *state, int64_t channels, int64_t width, int64_t c,
                                         bool whole, float (&out)[LANE_CHANNELS])
{
    if (t >= start) {
        load_some(x + t * stride + c, channels - c, whole, out);
        return;
    }
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++)
        out[i] = state != NULL && c + i < channels ? state[(width - 1 + t - start) * channels + c + i] : 0.0f;
}

template <int WIDTH> struct taps {
    float weight[WIDTH][LANE_CHANNELS], bias[LANE_CHANNELS];

    __device__ __forceinline__ taps(const float *w, const float *b, int64_t channels, int64_t c)
    {
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) {
            bool inside = c + i < channels;
            bias[i] = inside && b != NULL ? b[c + i] : 0.0f;
#pragma unroll
            for (int k = 0; k < WIDTH; k++)
                weight[k][i] = inside ? w[(c + i) * WIDTH + k] : 0.0f;
        }
    }
};

template <typename T, int WIDTH>
__global__ void __launch_bounds__(BLOCK_THREADS) forward_kernel(struct conv_forward_args a, bool whole)
{
    int64_t c = ((int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x) * LANE_CHANNELS;
    int64_t t = (int64_t)blockIdx.x * RUN, last = min(t + RUN, a.tokens);
    if (c >= a.channels)
        return;
    const T *x = (const T *)a.x;
    const taps<WIDTH> w(a.weight, a.bias, a.channels, c);
    float window[WIDTH][LANE_CHANNELS];
    int32_t s = part_of(a.seq_starts, a.n_seqs, t);
    int64_t start = a.seq_starts[s], end = a.seq_starts[s + 1];
    bool fresh = true;
    for (; t < last; t++) {
        while (t >= end) {
            start = end;
            end = a.seq_starts[++s + 1];
            fresh = true;
        }
        if (fresh) {
            const float *state = state_of(a.initial, s);
#pragma unroll
            for (int k = 1; k < WIDTH; k++)
                input_at(x, a.x_stride, t - WIDTH + k, start, state, a.channels, WIDTH, c, whole, window[k]);
            fresh = false;
        }
        float y[LANE_CHANNELS];
#pragma unroll
        for (int k = 1; k < WIDTH; k++)
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++)
                window[k - 1][i] = window[k][i];
        load_some(x + t * a.x_stride + c, a.channels - c, whole, window[WIDTH - 1]);
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) {
            float sum = w.bias[i];
#pragma unroll
            for (int k = 0; k < WIDTH; k++)
                sum = fmaf(w.weight[k][i], window[k][i], sum);
            y[i] = silu(sum);
        }
        store_some((T *)a.y + t * a.y_stride + c, a.channels - c, whole, y);
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
    if (c >= a.channels)
        return;
    const float *from = state_of(a.initial, s);
    float *to = state_of(a.final, s);
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

/* Tokens t0 .. t0+RUN_BACKWARD-1 of the inputs' gradient, and those outputs' part in the gradients of weight and bias.
 * The walk goes on for width - 1 tokens, whose outputs read the run's last inputs. parts: [runs][width + 1][channels],
 * or NULL. */
template <typename T, int WIDTH>
__global__ void __launch_bounds__(BLOCK_THREADS)
    backward_kernel(struct conv_backward_args a, float *parts, bool whole)
{
    int64_t c = ((int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x) * LANE_CHANNELS;
    int64_t first = (int64_t)blockIdx.x * RUN_BACKWARD, last = min(first + RUN_BACKWARD, a.tokens);
    if (c >= a.channels)
        return;
    const T *x = (const T *)a.x, *dy = (const T *)a.dy;
    const taps<WIDTH> w(a.weight, a.bias, a.channels, c);
    float window[WIDTH][LANE_CHANNELS];     /* inputs t-WIDTH+1 .. t */
    float slope[WIDTH][LANE_CHANNELS] = {}; /* gradients of the pre-activations t-WIDTH+1 .. t */
    float sums[WIDTH + 1][LANE_CHANNELS] = {};
    int32_t s = part_of(a.seq_starts, a.n_seqs, first);
    int64_t start = a.seq_starts[s], end = a.seq_starts[s + 1];
    bool fresh = true;
    for (int64_t t = first; t < last + WIDTH - 1; t++) {
        /* Past the end of the last sequence, zeros move through. A new sequence cannot be entered before the one that
         * ends has given its last inputs their gradients: its outputs do not reach them. */
        bool inside = t < a.tokens;
        while (inside && t >= end) {
            start = end;
            end = a.seq_starts[++s + 1];
            fresh = true;
        }
        if (fresh) {
#pragma unroll
            for (int k = 1; k < WIDTH; k++)
                input_at(x, a.x_stride, t - WIDTH + k, start, NULL, a.channels, WIDTH, c, whole, window[k]);
            fresh = false;
        }
        float grad[LANE_CHANNELS] = {};
#pragma unroll
        for (int k = 1; k < WIDTH; k++)
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++) {
                window[k - 1][i] = window[k][i];
                slope[k - 1][i] = slope[k][i];
            }
        if (inside) {
            load_some(x + t * a.x_stride + c, a.channels - c, whole, window[WIDTH - 1]);
            load_some(dy + t * a.dy_stride + c, a.channels - c, whole, grad);
        }
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) {
            float sum = w.bias[i];
#pragma unroll
            for (int k = 0; k < WIDTH; k++)
                sum = fmaf(w.weight[k][i], window[k][i], sum);
            slope[WIDTH - 1][i] = grad[i] * silu_slope(sum);
        }
        if (t < last) {
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++) {
#pragma unroll
                for (int k = 0; k < WIDTH; k++)
                    sums[k][i] = fmaf(slope[WIDTH - 1][i], window[k][i], sums[k][i]);
                sums[WIDTH][i] += slope[WIDTH - 1][i];
            }
        }
        /* Output j = t-WIDTH+1+m read the input t-WIDTH+1 through tap WIDTH-1-m, if both are of one sequence. */
        int64_t input = t - WIDTH + 1;
        if (input < first)
            continue;
        int64_t input_end = end;
        if (input < start) {
            int32_t owner = part_of(a.seq_starts, a.n_seqs, input);
            input_end = a.seq_starts[owner + 1];
        }
        float dx[LANE_CHANNELS] = {};
#pragma unroll
        for (int m = 0; m < WIDTH; m++)
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++)
                if (input + m < input_end)
                    dx[i] = fmaf(w.weight[WIDTH - 1 - m][i], slope[m][i], dx[i]);
        store_some((T *)a.dx + input * a.dx_stride + c, a.channels - c, whole, dx);
    }
    if (parts == NULL)
        return;
    float *part = parts + (int64_t)blockIdx.x * (WIDTH + 1) * a.channels;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++)
        if (c + i < a.channels) {
#pragma unroll
            for (int k = 0; k < WIDTH; k++)
                part[(c + i) * WIDTH + k] = sums[k][i];
            part[WIDTH * a.channels + c + i] = sums[WIDTH][i];
        }
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
template <typename T> __global__ void backward_any_kernel(struct conv_backward_args a, float *parts)
{
    int64_t c = (int64_t)blockIdx.y * BLOCK_THREADS + threadIdx.x;
    int64_t first = (int64_t)blockIdx.x * RUN_BACKWARD, last = min(first + RUN_BACKWARD, a.tokens);
    if (c >= a.channels)
        return;
    float slope[RUN_BACKWARD + WIDTH_MOST];
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

/* out[i] += the sum over p of parts[p * stride + i]. Eight threads an element take every eighth part each. */
enum { PART_LANES = 8 };
__global__ void add_parts_kernel(const float *parts, int64_t n_parts, int64_t stride, int64_t count,
                                 float *out)
{
    __shared__ float sums[PART_LANES][WARP];
    int64_t i = (int64_t)blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (i < count)
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
    unsigned runs = (unsigned)divide_up(a.tokens, RUN);
    dim3 grid(runs, (unsigned)divide_up(a.channels, BLOCK_THREADS * LANE_CHANNELS));
    if (a.width == 2)
        forward_kernel<T, 2><<<grid, BLOCK_THREADS, 0, stream>>>(a, whole);
    else if (a.width == 3)
        forward_kernel<T, 3><<<grid, BLOCK_THREADS, 0, stream>>>(a, whole);
    else if (a.width == 4)
        forward_kernel<T, 4><<<grid, BLOCK_THREADS, 0, stream>>>(a, whole);
    else
        forward_any_kernel<T><<<dim3((unsigned)a.tokens, (unsigned)divide_up(a.channels, BLOCK_THREADS)),
                                BLOCK_THREADS, 0, stream>>>(a);
}

template <typename T>
void backward_launch(cudaStream_t stream, const struct conv_backward_args &a, float *parts, bool whole)
{
    unsigned runs = (unsigned)divide_up(a.tokens, RUN_BACKWARD);
    dim3 grid(runs, (unsigned)divide_up(a.channels, BLOCK_THREADS * LANE_CHANNELS));
    if (a.width == 2)
        backward_kernel<T, 2><<<grid, BLOCK_THREADS, 0, stream>>>(a, parts, whole);
    else if (a.width == 3)
        backward_kernel<T, 3><<<grid, BLOCK_THREADS, 0, stream>>>(a, parts, whole);
    else if (a.width == 4)
        backward_kernel<T, 4><<<grid, BLOCK_THREADS, 0, stream>>>(a, parts, whole);
    else
        backward_any_kernel<T>
            <<<dim3(runs, (unsigned)divide_up(a.channels, BLOCK_THREADS)), BLOCK_THREADS, 0, stream>>>(a,
                                                                                                       parts);
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
    bool whole = rows_aligned(a.x, a.x_stride, a.act) && rows_aligned(a.y, a.y_stride, a.act);
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
    bool whole = rows_aligned(a.x, a.x_stride, a.act) && rows_aligned(a.dy, a.dy_stride, a.act) &&
                 rows_aligned(a.dx, a.dx_stride, a.act);
    int64_t runs = divide_up(a.tokens, RUN_BACKWARD), run_floats = (a.width + 1) * a.channels;
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
