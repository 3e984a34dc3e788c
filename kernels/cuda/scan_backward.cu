/* scan_backward.cu: the selective scan, backward. Its shape is told in scan.cuh.
 *
 * A block goes through its span from the last chunk to the first. With a chunk's delta, delta x and gradient before the
 * gate in shared memory, each thread goes forward through the chunk from its stored state and leaves its states at
 * every GROUP tokens in shared memory. Then, group by group from the last, it goes forward again, now with every decay
 * and decayed state of the group in registers, and back. With g the gradient of h:
 *   g_t = dout_t C_t + exp(delta_{t+1} A) g_{t+1}
 *   dC_t = sum_c dout h,  dB_t = sum_c g delta x,  dx = delta sum_n g B + D dout
 *   ddelta = x sum_n g B + sum_n g exp(delta A) h_{t-1} A,  dA = sum_t g exp(delta A) h_{t-1} delta
 * Sums over channels are made within the block; what every block of channels found goes to the workspace, as do each
 * span's sums over tokens, and a second launch adds those up in a fixed order. */
#include "kernels/cuda/scan.cuh"

namespace
{

enum {
    GROUP = 8,
    GROUPS_OF_CHUNK = SCAN_CHUNK / GROUP,
    WARPS = SCAN_THREADS / WARP,
    TILE = 16,
    SUM_THREADS = 128,
};

constexpr float LN_2 = 0.693147180559945309f;

template <typename SHAPE> struct shared_memory {
    float4 states[GROUPS_OF_CHUNK][SCAN_THREADS]; /* before every group */
    float b[SCAN_CHUNK][SHAPE::STATES];
    float c[SCAN_CHUNK][SHAPE::STATES];
    float sums[2][WARPS][GROUP][2][SHAPE::STATES]; /* dB and dC of a warp's channels */
    /* A group's rows are read before they are written over with what its tokens gave. */
    float delta[SCAN_CHUNK][SHAPE::CHANNELS]; /* then sum of g exp(delta A) h A, over log2(e) */
    float input[SCAN_CHUNK][SHAPE::CHANNELS]; /* then sum of C h */
    float dout[SCAN_CHUNK][SHAPE::CHANNELS];  /* then sum of g B */
};

/* Where the results go that are not yet sums of everything. */
struct parts {
    float *tokens;   /* [channel blocks][tokens][dB | dC] */
    float *channels; /* [spans][dA_log (channels x d_state) | dD | dbias] */
};

/* The sums of v over the warp's channels, for this lane's states, into `to` [STATES]. */
template <typename SHAPE>
__device__ __forceinline__ void sum_channels(float (&v)[LANE_STATES], int lane, int n0, float *to)
{
    constexpr int COUNT = SHAPE::WARP_CHANNELS;
    reduce_scatter<LANE_STATES, COUNT, SHAPE::LANES>(v, lane);
    int k = lane / SHAPE::LANES;
    if constexpr (COUNT >= LANE_STATES) {
        if (k % (COUNT / LANE_STATES) == 0)
            to[n0 + k / (COUNT / LANE_STATES)] = v[0];
    } else {
#pragma unroll
        for (int i = 0; i < LANE_STATES / COUNT; i++)
            to[n0 + k * (LANE_STATES / COUNT) + i] = v[i];
    }
}

/* Sums over the states of four tokens: a lane keeps one token's, of token lane / (LANES / 4). */
template <typename SHAPE> __device__ __forceinline__ float sum_states(float (&v)[4], int lane)
{
    reduce_scatter<4, SHAPE::LANES, 1>(v, lane);
    return v[0];
}

/* A thread's values of one token. */
struct token {
    float delta, input, dout;
    float b[LANE_STATES], c[LANE_STATES];
};

template <typename SHAPE>
__device__ __forceinline__ struct token token_at(const shared_memory<SHAPE> &m, int t, int channel, int n0)
{
    const float4 b = *reinterpret_cast<const float4 *>(&m.b[t][n0]);
    const float4 c = *reinterpret_cast<const float4 *>(&m.c[t][n0]);
    struct token k = {m.delta[t][channel],
                      m.input[t][channel],
                      m.dout[t][channel],
                      {b.x, b.y, b.z, b.w},
                      {c.x, c.y, c.z, c.w}};
    return k;
}

/* A chunk's shared inputs. Tokens past its end have delta, input and dout 0, so that neither states nor gradients
 * change there. */
template <typename T, typename SHAPE>
__device__ __forceinline__ void load_chunk(const struct scan_backward_args &a, shared_memory<SHAPE> &m,
                                           int64_t t0, int count, int64_t load_c, int group_c,
                                           const float (&bias)[LANE_CHANNELS], bool whole)
{
#pragma unroll
    for (int row = threadIdx.x / SHAPE::GROUPS; row < SCAN_CHUNK; row += SHAPE::PASS_ROWS) {
        bool inside = row < count;
        struct four<T> x = load_four<T>(a.x, a.x_stride, t0 + row, load_c, a.channels, whole, inside);
        struct four<T> dt = load_four<T>(a.dt, a.dt_stride, t0 + row, load_c, a.channels, whole, inside);
        struct four<T> z = load_four<T>(a.z, a.z_stride, t0 + row, load_c, a.channels, whole, inside);
        struct four<T> dy = load_four<T>(a.dy, a.dy_stride, t0 + row, load_c, a.channels, whole, inside);
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) {
            float delta = inside ? softplus(dt[i] + bias[i]) : 0.0f;
            m.delta[row][group_c + i] = delta;
            m.input[row][group_c + i] = delta * x[i];
            m.dout[row][group_c + i] = dy[i] * silu(z[i]);
        }
    }
    for (int i = threadIdx.x; i < SCAN_CHUNK * SHAPE::STATES; i += SCAN_THREADS) {
        int t = i / SHAPE::STATES, n = i % SHAPE::STATES;
        bool there = t < count && n < a.d_state;
        m.b[t][n] = there ? to_float(((const T *)a.b)[(t0 + t) * a.b_stride + n]) : 0.0f;
        m.c[t][n] = there ? to_float(((const T *)a.c)[(t0 + t) * a.c_stride + n]) : 0.0f;
    }
}

/* What a thread carries from chunk to chunk. */
struct carried {
    float gradient[LANE_STATES]; /* of the state before the tokens done so far */
    float rate_sum[LANE_STATES]; /* dA */
    float skip_sum[LANE_CHANNELS], bias_sum[LANE_CHANNELS];
};

/* One group of tokens, forward from the stored state and back. */
template <typename SHAPE>
__device__ __forceinline__ void run_group(shared_memory<SHAPE> &m, int first, int buffer, int channel,
                                          int lane, const float (&rate)[LANE_STATES], struct carried *k)
{
    int n0 = lane * LANE_STATES, warp = threadIdx.x / WARP, warp_lane = threadIdx.x % WARP;
    float decay[GROUP][LANE_STATES], decayed[GROUP][LANE_STATES], sums[4], outs[GROUP / 4];
    const float4 state = m.states[first / GROUP][threadIdx.x];
    float h[LANE_STATES] = {state.x, state.y, state.z, state.w};
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
        struct token v = token_at(m, first + t, channel, n0);
        float dc[LANE_STATES], out = 0.0f;
#pragma unroll
        for (int i = 0; i < LANE_STATES; i++) {
            decay[t][i] = exp2_fast(v.delta * rate[i]);
            decayed[t][i] = decay[t][i] * h[i];
            h[i] = fmaf(v.input, v.b[i], decayed[t][i]);
            out = fmaf(v.c[i], h[i], out);
            dc[i] = v.dout * h[i];
        }
        sum_channels<SHAPE>(dc, warp_lane, n0, m.sums[buffer][warp][t][1]);
        sums[t % 4] = out;
        if (t % 4 == 3)
            outs[t / 4] = sum_states<SHAPE>(sums, lane);
    }
    float through_sums[4], input_sums[4], throughs[GROUP / 4], inputs[GROUP / 4];
#pragma unroll
    for (int t = GROUP - 1; t >= 0; t--) {
        struct token v = token_at(m, first + t, channel, n0);
        float db[LANE_STATES], through_sum = 0.0f, input_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < LANE_STATES; i++) {
            float whole = fmaf(v.c[i], v.dout, k->gradient[i]), through = whole * decayed[t][i];
            db[i] = whole * v.input;
            input_sum = fmaf(whole, v.b[i], input_sum);
            through_sum = fmaf(through, rate[i], through_sum);
            k->rate_sum[i] = fmaf(through, v.delta, k->rate_sum[i]);
            k->gradient[i] = whole * decay[t][i];
        }
        sum_channels<SHAPE>(db, warp_lane, n0, m.sums[buffer][warp][t][0]);
        through_sums[t % 4] = through_sum;
        input_sums[t % 4] = input_sum;
        if (t % 4 == 0) {
            throughs[t / 4] = sum_states<SHAPE>(through_sums, lane);
            inputs[t / 4] = sum_states<SHAPE>(input_sums, lane);
        }
    }
    __syncwarp(); /* a channel's lanes are of one warp, and all have read */
    constexpr int SHARE = SHAPE::LANES / 4;
    if (lane % SHARE == 0) {
#pragma unroll
        for (int q = 0; q < GROUP / 4; q++) {
            int t = first + 4 * q + lane / SHARE;
            m.input[t][channel] = outs[q];
            m.delta[t][channel] = throughs[q];
            m.dout[t][channel] = inputs[q];
        }
    }
}

/* Adds up the warps' dB and dC of a group. */
template <typename SHAPE>
__device__ __forceinline__ void sum_warps(const struct scan_backward_args &a, const shared_memory<SHAPE> &m,
                                          int buffer, int64_t t0, int count, float *token_parts)
{
    for (int i = threadIdx.x; i < GROUP * 2 * SHAPE::STATES; i += SCAN_THREADS) {
        int t = i / (2 * SHAPE::STATES), which = i / SHAPE::STATES % 2, n = i % SHAPE::STATES;
        float sum = m.sums[buffer][0][t][which][n];
#pragma unroll
        for (int w = 1; w < WARPS; w++)
            sum += m.sums[buffer][w][t][which][n];
        if (t < count && n < a.d_state)
            token_parts[(t0 + t) * 2 * a.d_state + which * a.d_state + n] = sum;
    }
}

/* dx, ddt and dz of a chunk, from what the groups left. */
template <typename T, typename SHAPE>
__device__ __forceinline__ void store_chunk(const struct scan_backward_args &a, const shared_memory<SHAPE> &m,
                                            int64_t t0, int count, int64_t load_c, int group_c,
                                            const float (&bias)[LANE_CHANNELS],
                                            const float (&skip)[LANE_CHANNELS], bool whole, struct carried *k)
{
    for (int row = threadIdx.x / SHAPE::GROUPS; row < count; row += SHAPE::PASS_ROWS) {
        int64_t t = t0 + row;
        struct four<T> x = load_four<T>(a.x, a.x_stride, t, load_c, a.channels, whole, true);
        struct four<T> dt = load_four<T>(a.dt, a.dt_stride, t, load_c, a.channels, whole, true);
        struct four<T> z = load_four<T>(a.z, a.z_stride, t, load_c, a.channels, whole, true);
        struct four<T> dy = load_four<T>(a.dy, a.dy_stride, t, load_c, a.channels, whole, true);
        float dx[LANE_CHANNELS], ddt[LANE_CHANNELS], dz[LANE_CHANNELS], y[LANE_CHANNELS];
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) {
            float v = dt[i] + bias[i], delta = softplus(v), gate = sigmoid(z[i]), dout = dy[i] * z[i] * gate;
            float input = m.dout[row][group_c + i], through = m.delta[row][group_c + i] * LN_2;
            float out = fmaf(skip[i], x[i], m.input[row][group_c + i]);
            dz[i] = dy[i] * out * gate * (1.0f + z[i] * (1.0f - gate));
            y[i] = out * z[i] * gate;
            dx[i] = fmaf(delta, input, skip[i] * dout);
            ddt[i] = fmaf(x[i], input, through) * (v > 20.0f ? 1.0f : sigmoid(v));
            k->skip_sum[i] = fmaf(dout, x[i], k->skip_sum[i]);
            k->bias_sum[i] += ddt[i];
        }
        int64_t n = a.channels - load_c;
        store_some((T *)a.dx + t * a.dx_stride + load_c, n, whole, dx);
        store_some((T *)a.ddt + t * a.ddt_stride + load_c, n, whole, ddt);
        store_some((T *)a.dz + t * a.dz_stride + load_c, n, whole, dz);
        if (a.y != NULL)
            store_some((T *)a.y + t * a.y_stride + load_c, n, whole, y);
    }
}

/* The span's sums over tokens. Those of D and the bias lie with the threads that load rows: one thread a channel adds
 * them up. */
template <typename SHAPE>
__device__ __forceinline__ void store_sums(const struct scan_backward_args &a, shared_memory<SHAPE> &m,
                                           float *part, int64_t block_c, int channel, int lane, int group_c,
                                           const float (&rate)[LANE_STATES], const struct carried &k)
{
    int64_t c = block_c + channel, size = a.channels * a.d_state;
#pragma unroll
    for (int i = 0; i < LANE_STATES; i++) {
        int64_t n = lane * LANE_STATES + i;
        if (c < a.channels && n < a.d_state)
            part[c * a.d_state + n] = k.rate_sum[i] * rate[i] * LN_2;
    }
    static_assert(SHAPE::PASS_ROWS <= SCAN_CHUNK, "the rows fit");
    __syncthreads();
    int row = threadIdx.x / SHAPE::GROUPS;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        m.delta[row][group_c + i] = k.skip_sum[i];
        m.input[row][group_c + i] = k.bias_sum[i];
    }
    __syncthreads();
    c = block_c + threadIdx.x;
    if (threadIdx.x >= SHAPE::CHANNELS || c >= a.channels)
        return;
    float skip = 0.0f, bias = 0.0f;
    for (int r = 0; r < SHAPE::PASS_ROWS; r++) {
        skip += m.delta[r][threadIdx.x];
        bias += m.input[r][threadIdx.x];
    }
    part[size + c] = skip;
    part[size + a.channels + c] = bias;
}

/* gradients: [spans][d_state][channels], of the state at each span's end, from later spans; NULL unless split. */
template <typename T, typename SHAPE>
__global__ void __launch_bounds__(SCAN_THREADS, 2)
    backward_kernel(struct scan_backward_args a, struct scan_spans spans, const float *gradients,
                    struct parts parts, bool whole)
{
    extern __shared__ __align__(16) unsigned char raw[];
    shared_memory<SHAPE> &m = *reinterpret_cast<shared_memory<SHAPE> *>(raw);
    struct scan_span span = scan_span_at(spans, (int32_t)blockIdx.x);
    int64_t block_c = (int64_t)blockIdx.y * SHAPE::CHANNELS, state_size = a.d_state * a.channels;
    float *token_parts = parts.tokens + blockIdx.y * a.tokens * 2 * a.d_state;

    int group_c = threadIdx.x % SHAPE::GROUPS * LANE_CHANNELS;
    int64_t load_c = block_c + group_c;
    float bias[LANE_CHANNELS], skip[LANE_CHANNELS];
    load_channels(a.dt_bias, load_c, a.channels, bias);
    load_channels(a.d, load_c, a.channels, skip);

    int lane = threadIdx.x % SHAPE::LANES, channel = threadIdx.x / SHAPE::LANES, n0 = lane * LANE_STATES;
    int64_t scan_c = block_c + channel;
    float rate[LANE_STATES];
    struct carried k = {};
#pragma unroll
    for (int i = 0; i < LANE_STATES; i++) {
        int64_t at = (n0 + i) * a.channels + scan_c;
        bool inside = scan_c < a.channels && n0 + i < a.d_state;
        rate[i] = inside ? a.a[at] * LOG2_E : 0.0f;
        if (inside && gradients != NULL)
            k.gradient[i] = gradients[span.index * state_size + at];
    }

    int64_t chunks = divide_up(span.end - span.begin, SCAN_CHUNK);
    for (int64_t j = chunks - 1; j >= 0; j--) {
        int64_t t0 = span.begin + j * SCAN_CHUNK;
        int count = (int)min((int64_t)SCAN_CHUNK, span.end - t0), groups = (count + GROUP - 1) / GROUP;
        const float *chunk = a.chunk_states + (span.chunk + j) * state_size;
        float h[LANE_STATES];
#pragma unroll
        for (int i = 0; i < LANE_STATES; i++)
            h[i] = scan_c < a.channels && n0 + i < a.d_state ? chunk[(n0 + i) * a.channels + scan_c] : 0.0f;
        load_chunk<T>(a, m, t0, count, load_c, group_c, bias, whole);
        __syncthreads();
        for (int g = 0; g < groups; g++) {
            m.states[g][threadIdx.x] = make_float4(h[0], h[1], h[2], h[3]);
            if (g + 1 == groups)
                break;
#pragma unroll
            for (int t = 0; t < GROUP; t++) {
                float delta = m.delta[g * GROUP + t][channel], input = m.input[g * GROUP + t][channel];
                const float4 b = *reinterpret_cast<const float4 *>(&m.b[g * GROUP + t][n0]);
                const float bn[LANE_STATES] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int i = 0; i < LANE_STATES; i++)
                    h[i] = fmaf(exp2_fast(delta * rate[i]), h[i], input * bn[i]);
            }
        }
        for (int g = groups - 1; g >= 0; g--) {
            run_group(m, g * GROUP, g % 2, channel, lane, rate, &k);
            __syncthreads();
            sum_warps(a, m, g % 2, t0 + g * GROUP, count - g * GROUP, token_parts);
        }
        store_chunk<T>(a, m, t0, count, load_c, group_c, bias, skip, whole, &k);
    }
    store_sums(a, m, parts.channels + span.index * (state_size + 2 * a.channels), block_c, channel, lane,
               group_c, rate, k);
}

/* Of one span alone: the gradient of the state before it, when nothing comes from later spans, and the sum of its
 * delta. */
template <typename T, typename SHAPE>
__global__ void __launch_bounds__(SCAN_THREADS)
    local_kernel(struct scan_backward_args a, struct scan_spans spans, float *gradients, float *deltas,
                 bool whole)
{
    constexpr int CHANNELS = SHAPE::CHANNELS, STATES = SHAPE::STATES;
    __shared__ __align__(16) float delta[TILE][CHANNELS], dout[TILE][CHANNELS], c[TILE][STATES];
    struct scan_span span = scan_span_at(spans, (int32_t)blockIdx.x);
    int64_t block_c = (int64_t)blockIdx.y * CHANNELS, state_size = a.d_state * a.channels;
    int row = threadIdx.x / SHAPE::GROUPS, group_c = threadIdx.x % SHAPE::GROUPS * LANE_CHANNELS;
    int64_t load_c = block_c + group_c;
    float bias[LANE_CHANNELS];
    load_channels(a.dt_bias, load_c, a.channels, bias);

    int lane = threadIdx.x % SHAPE::LANES, channel = threadIdx.x / SHAPE::LANES, n0 = lane * LANE_STATES;
    int64_t scan_c = block_c + channel;
    float rate[LANE_STATES], gradient[LANE_STATES] = {}, delta_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LANE_STATES; i++)
        rate[i] =
            scan_c < a.channels && n0 + i < a.d_state ? a.a[(n0 + i) * a.channels + scan_c] * LOG2_E : 0.0f;

    for (int64_t tiles = divide_up(span.end - span.begin, TILE), j = tiles - 1; j >= 0; j--) {
        int64_t t0 = span.begin + j * TILE;
        if (row < TILE) {
            bool inside = t0 + row < span.end;
            struct four<T> dt = load_four<T>(a.dt, a.dt_stride, t0 + row, load_c, a.channels, whole, inside);
            struct four<T> z = load_four<T>(a.z, a.z_stride, t0 + row, load_c, a.channels, whole, inside);
            struct four<T> dy = load_four<T>(a.dy, a.dy_stride, t0 + row, load_c, a.channels, whole, inside);
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++) {
                delta[row][group_c + i] = inside ? softplus(dt[i] + bias[i]) : 0.0f;
                dout[row][group_c + i] = dy[i] * silu(z[i]);
            }
        }
        for (int i = threadIdx.x; i < TILE * STATES; i += SCAN_THREADS) {
            int64_t t = t0 + i / STATES, n = i % STATES;
            c[i / STATES][n] =
                t < span.end && n < a.d_state ? to_float(((const T *)a.c)[t * a.c_stride + n]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int t = TILE - 1; t >= 0; t--) {
            float d = delta[t][channel], grad = dout[t][channel];
            const float4 cs = *reinterpret_cast<const float4 *>(&c[t][n0]);
            const float cn[LANE_STATES] = {cs.x, cs.y, cs.z, cs.w};
#pragma unroll
            for (int i = 0; i < LANE_STATES; i++)
                gradient[i] = fmaf(cn[i], grad, gradient[i]) * exp2_fast(d * rate[i]);
            delta_sum += d;
        }
        __syncthreads();
    }
    if (scan_c >= a.channels)
        return;
    if (lane == 0)
        deltas[span.index * a.channels + scan_c] = delta_sum;
#pragma unroll
    for (int i = 0; i < LANE_STATES; i++)
        if (n0 + i < a.d_state)
            gradients[span.index * state_size + (n0 + i) * a.channels + scan_c] = gradient[i];
}

/* db and dc: the sums over the blocks of channels. */
template <typename T>
__global__ void __launch_bounds__(SUM_THREADS)
    sum_kernel(struct scan_backward_args a, const float *parts, int blocks)
{
    int64_t i = (int64_t)blockIdx.x * SUM_THREADS + threadIdx.x, count = a.tokens * 2 * a.d_state;
    if (i >= count)
        return;
    float sum = 0.0f;
#pragma unroll 8
    for (int j = 0; j < blocks; j++)
        sum += parts[j * count + i];
    int64_t t = i / (2 * a.d_state), n = i % (2 * a.d_state);
    if (n < a.d_state)
        ((T *)a.db)[t * a.db_stride + n] = from_float<T>(sum);
    else
        ((T *)a.dc)[t * a.dc_stride + n - a.d_state] = from_float<T>(sum);
}

/* ---- the workspace ---- */

struct layout {
    int64_t tokens, channels, gradients, deltas, floats; /* where each begins, and the whole */
};

struct layout layout_of(int64_t tokens, int64_t channels, int64_t d_state, int64_t n_spans)
{
    struct layout l;
    l.tokens = 0;
    l.channels = l.tokens + divide_up(channels, scan_block_channels(d_state)) * tokens * 2 * d_state;
    l.gradients = l.channels + n_spans * channels * (d_state + 2);
    l.deltas = l.gradients + n_spans * channels * d_state;
    l.floats = l.deltas + n_spans * channels;
    return l;
}

template <typename T, typename SHAPE>
int launch(struct kernel_device *device, const struct scan_backward_args &a, const struct scan_spans &spans,
           const struct layout &l, bool whole)
{
    float *workspace = (float *)a.workspace, *gradients = NULL;
    dim3 grid((unsigned)spans.n_spans, (unsigned)divide_up(a.channels, SHAPE::CHANNELS));
    if (spans.split) {
        gradients = workspace + l.gradients;
        local_kernel<T, SHAPE>
            <<<grid, SCAN_THREADS, 0, device->stream>>>(a, spans, gradients, workspace + l.deltas, whole);
        dim3 carries((unsigned)a.n_seqs, (unsigned)a.d_state, (unsigned)divide_up(a.channels, SUM_THREADS));
        struct state_view none = {NULL, 0, NULL};
        scan_carry_kernel<true><<<carries, SUM_THREADS, 0, device->stream>>>(
            spans, a.a, a.channels, a.d_state, none, workspace + l.deltas, gradients);
    }
    int bytes = (int)sizeof(shared_memory<SHAPE>);
    int status = cuda_check(device, cudaFuncSetAttribute(backward_kernel<T, SHAPE>,
                                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (status != KERNEL_OK)
        return status;
    struct parts parts = {workspace + l.tokens, workspace + l.channels};
    backward_kernel<T, SHAPE>
        <<<grid, SCAN_THREADS, bytes, device->stream>>>(a, spans, gradients, parts, whole);
    sum_kernel<T>
        <<<(unsigned)divide_up(a.tokens * 2 * a.d_state, SUM_THREADS), SUM_THREADS, 0, device->stream>>>(
            a, workspace + l.tokens, (int)grid.y);
    return cuda_launched(device);
}

} // namespace

int64_t cuda_scan_backward_workspace(int64_t tokens, int64_t channels, int64_t d_state, int32_t n_seqs)
{
    int64_t spans = scan_spans_most(tokens, channels, d_state, n_seqs);
    return layout_of(tokens, channels, d_state, spans).floats * (int64_t)sizeof(float);
}

int cuda_scan_backward(struct kernel_device *device, const struct scan_backward_args *args)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    struct scan_backward_args a = *args;
    int64_t d = a.channels;
    if (d < 0 || a.d_state <= 0 || a.x_stride < d || a.dt_stride < d || a.z_stride < d || a.dy_stride < d ||
        a.b_stride < a.d_state || a.c_stride < a.d_state || a.dx_stride < d || a.ddt_stride < d ||
        a.dz_stride < d || a.db_stride < a.d_state || a.dc_stride < a.d_state ||
        (a.y != NULL && a.y_stride < d) || !cuda_seqs_valid(a.seq_starts, a.n_seqs, a.tokens))
        return KERNEL_INVALID;
    if (!cuda_is_float(a.act) || a.d_state > SCAN_STATES_MOST)
        return KERNEL_UNSUPPORTED;
    if (a.tokens == 0)
        return KERNEL_OK;
    bool whole = rows_aligned(a.x, a.x_stride, a.act) && rows_aligned(a.dt, a.dt_stride, a.act) &&
                 rows_aligned(a.z, a.z_stride, a.act) && rows_aligned(a.dy, a.dy_stride, a.act) &&
                 rows_aligned(a.dx, a.dx_stride, a.act) && rows_aligned(a.ddt, a.ddt_stride, a.act) &&
                 rows_aligned(a.dz, a.dz_stride, a.act) &&
                 (a.y == NULL || rows_aligned(a.y, a.y_stride, a.act));
    struct scan_spans spans;
    status = scan_spans_make(device, a.seq_starts, a.n_seqs, d, a.d_state, &spans);
    if (status != KERNEL_OK)
        return status;
    struct layout l = layout_of(a.tokens, d, a.d_state, spans.n_spans);
    if (d > 0)
        CUDA_WITH_TYPE(
            a.act, T,
            SCAN_WITH_SHAPE(a.d_state, SHAPE, status = launch<T, SHAPE>(device, a, spans, l, whole)));
    int64_t size = d * a.d_state, stride = size + 2 * d;
    const float *parts = (const float *)a.workspace + l.channels;
    if (a.da_log != NULL && status == KERNEL_OK)
        status = cuda_add_parts(device, parts, spans.n_spans, stride, size, a.da_log);
    if (a.dd != NULL && status == KERNEL_OK)
        status = cuda_add_parts(device, parts + size, spans.n_spans, stride, d, a.dd);
    if (a.ddt_bias != NULL && status == KERNEL_OK)
        status = cuda_add_parts(device, parts + size + d, spans.n_spans, stride, d, a.ddt_bias);
    return status;
}
