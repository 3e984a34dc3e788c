/* scan.cu: the selective scan, forward. Its shape is told in scan.cuh. */
#include "kernels/cuda/scan.cuh"

namespace
{

enum { TILE = 16, STEP_THREADS = 128 };

/* One token of a row's LANE_CHANNELS channels, under way. */
template <typename T> struct row_loads {
    struct four<T> x, dt, z;
};

template <typename T, bool LOCAL>
__device__ __forceinline__ struct row_loads<T> load_row(const struct scan_forward_args &a, int64_t t,
                                                        int64_t c, bool whole, bool inside) {
    struct row_loads<T> r;
    r.x = load_four<T>(a.x, a.x_stride, t, c, a.channels, whole, inside);
    r.dt = load_four<T>(a.dt, a.dt_stride, t, c, a.channels, whole, inside);
    if (!LOCAL)
        r.z = load_four<T>(a.z, a.z_stride, t, c, a.channels, whole, inside);
    return r;
}

/* LOCAL: from zero, only the span's last state and the sum of its delta. states, deltas: see scan_carry_kernel; NULL
 * unless split. */
template <typename T, typename SHAPE, bool LOCAL>
__global__ void __launch_bounds__(SCAN_THREADS)
    scan_kernel(struct scan_forward_args a, struct scan_spans spans, float *states, float *deltas, bool whole)
{
    constexpr int CHANNELS = SHAPE::CHANNELS, STATES = SHAPE::STATES, LANES = SHAPE::LANES;
    __shared__ __align__(16) float delta[TILE][CHANNELS], input[TILE][CHANNELS], out[TILE][CHANNELS];
    __shared__ __align__(16) float b[TILE][STATES], c[TILE][STATES];

    struct scan_span span = scan_span_at(spans, (int32_t)blockIdx.x);
    int64_t block_c = (int64_t)blockIdx.y * CHANNELS;

    /* As one of those that load and store. */
    int row = threadIdx.x / SHAPE::GROUPS, group_c = threadIdx.x % SHAPE::GROUPS * LANE_CHANNELS;
    int64_t load_c = block_c + group_c;
    float bias[LANE_CHANNELS], skip[LANE_CHANNELS];
    load_channels(a.dt_bias, load_c, a.channels, bias);
    load_channels(a.d, load_c, a.channels, skip);

    /* As one of those that scan. */
    int lane = threadIdx.x % LANES, scan_channel = threadIdx.x / LANES, n0 = lane * LANE_STATES;
    int64_t scan_c = block_c + scan_channel, state_size = a.d_state * a.channels;
    float rate[LANE_STATES], h[LANE_STATES], delta_sum = 0.0f;
    const float *from = LOCAL         ? NULL
                        : spans.split ? states + span.index * state_size
                                      : state_of(a.initial, span.seq);
#pragma unroll
    for (int i = 0; i < LANE_STATES; i++) {
        int64_t at = (n0 + i) * a.channels + scan_c;
        bool inside = scan_c < a.channels && n0 + i < a.d_state;
        rate[i] = inside ? a.a[at] * LOG2_E : 0.0f;
        h[i] = inside && from != NULL ? from[at] : 0.0f;
    }

    struct row_loads<T> next =
        load_row<T, LOCAL>(a, span.begin + row, load_c, whole, row < TILE && span.begin + row < span.end);
    for (int64_t t0 = span.begin; t0 < span.end; t0 += TILE) {
        struct row_loads<T> now = next;
        bool inside = row < TILE && t0 + row < span.end;
        if (!LOCAL && a.chunk_states != NULL && (t0 - span.begin) % SCAN_CHUNK == 0) {
            float *chunk = a.chunk_states + (span.chunk + (t0 - span.begin) / SCAN_CHUNK) * state_size;
#pragma unroll
            for (int i = 0; i < LANE_STATES; i++)
                if (scan_c < a.channels && n0 + i < a.d_state)
                    chunk[(n0 + i) * a.channels + scan_c] = h[i];
        }
        /* Tokens past the end have delta 0: they leave the state as it is. */
        if (row < TILE) {
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++) {
                float d = inside ? softplus(now.dt[i] + bias[i]) : 0.0f;
                delta[row][group_c + i] = d;
                input[row][group_c + i] = d * now.x[i];
            }
        }
        for (int i = threadIdx.x; i < TILE * STATES; i += SCAN_THREADS) {
            int64_t t = t0 + i / STATES, n = i % STATES;
            bool there = t < span.end && n < a.d_state;
            b[i / STATES][n] = there ? to_float(((const T *)a.b)[t * a.b_stride + n]) : 0.0f;
            if (!LOCAL)
                c[i / STATES][n] = there ? to_float(((const T *)a.c)[t * a.c_stride + n]) : 0.0f;
        }
        __syncthreads();
        int64_t next_t = t0 + TILE + row;
        next = load_row<T, LOCAL>(a, next_t, load_c, whole, row < TILE && next_t < span.end);

#pragma unroll
        for (int t = 0; t < TILE; t += 4) {
            float sums[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float d = delta[t + k][scan_channel], u = input[t + k][scan_channel];
                const float4 bs = *reinterpret_cast<const float4 *>(&b[t + k][n0]);
                const float bn[LANE_STATES] = {bs.x, bs.y, bs.z, bs.w};
#pragma unroll
                for (int i = 0; i < LANE_STATES; i++)
                    h[i] = fmaf(exp2_fast(d * rate[i]), h[i], u * bn[i]);
                if (LOCAL) {
                    delta_sum += d;
                } else {
                    const float4 cs = *reinterpret_cast<const float4 *>(&c[t + k][n0]);
                    sums[k] = fmaf(cs.x, h[0], fmaf(cs.y, h[1], fmaf(cs.z, h[2], cs.w * h[3])));
                }
            }
            if (!LOCAL) {
                reduce_scatter<4, LANES, 1>(sums, lane);
                if (lane % (LANES / 4) == 0)
                    out[t + lane / (LANES / 4)][scan_channel] = sums[0];
            }
        }
        __syncthreads();
        if (!LOCAL && inside) {
            float y[LANE_CHANNELS];
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++)
                y[i] = fmaf(skip[i], now.x[i], out[row][group_c + i]) * silu(now.z[i]);
            store_some((T *)a.y + (t0 + row) * a.y_stride + load_c, a.channels - load_c, whole, y);
        }
    }

    float *to = LOCAL ? states + span.index * state_size : span.last ? state_of(a.final, span.seq) : NULL;
    if (to == NULL || scan_c >= a.channels)
        return;
    if (LOCAL && lane == 0)
        deltas[span.index * a.channels + scan_c] = delta_sum;
#pragma unroll
    for (int i = 0; i < LANE_STATES; i++)
        if (n0 + i < a.d_state)
            to[(n0 + i) * a.channels + scan_c] = h[i];
}

/* One token a sequence: a thread a channel, each state read and written once. */
template <typename T> __global__ void __launch_bounds__(STEP_THREADS) step_kernel(struct scan_forward_args a)
{
    int32_t s = (int32_t)blockIdx.y;
    int64_t c = (int64_t)blockIdx.x * STEP_THREADS + threadIdx.x;
    if (c >= a.channels)
        return;
    const float *from = state_of(a.initial, s);
    float *to = state_of(a.final, s), *chunk = NULL;
    if (a.chunk_states != NULL)
        chunk = a.chunk_states + s * a.d_state * a.channels;
    const T *b = (const T *)a.b + s * a.b_stride, *cs = (const T *)a.c + s * a.c_stride;
    float x = to_float(((const T *)a.x)[s * a.x_stride + c]),
          z = to_float(((const T *)a.z)[s * a.z_stride + c]);
    float delta = softplus(to_float(((const T *)a.dt)[s * a.dt_stride + c]) + a.dt_bias[c]);
    float u = delta * x, out = a.d[c] * x, delta_log2 = delta * LOG2_E;
#pragma unroll 8
    for (int64_t n = 0; n < a.d_state; n++) {
        int64_t at = n * a.channels + c;
        float h = from != NULL ? from[at] : 0.0f;
        if (chunk != NULL)
            chunk[at] = h;
        h = fmaf(exp2_fast(delta_log2 * a.a[at]), h, u * to_float(b[n]));
        out = fmaf(to_float(cs[n]), h, out);
        if (to != NULL)
            to[at] = h;
    }
    ((T *)a.y)[s * a.y_stride + c] = from_float<T>(out * silu(z));
}

__global__ void prepare_kernel(struct scan_prepare_args p)
{
    int64_t count = p.channels * p.d_state;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        int64_t n = i / p.channels, c = i % p.channels;
        p.a[i] = -expf(p.a_log[c * p.d_state + n]);
    }
}

bool all_singles(const int32_t *seq_starts, int32_t n_seqs, int64_t tokens)
{
    if (tokens != n_seqs || n_seqs > UINT16_MAX)
        return false;
    for (int32_t s = 0; s < n_seqs; s++)
        if (seq_starts[s] != s)
            return false;
    return true;
}

template <typename T, typename SHAPE>
void launch(cudaStream_t stream, const struct scan_forward_args &a, const struct scan_spans &spans,
            float *states, float *deltas, bool whole)
{
    dim3 grid((unsigned)spans.n_spans, (unsigned)divide_up(a.channels, SHAPE::CHANNELS));
    if (spans.split) {
        scan_kernel<T, SHAPE, true><<<grid, SCAN_THREADS, 0, stream>>>(a, spans, states, deltas, whole);
        dim3 carries((unsigned)a.n_seqs, (unsigned)a.d_state, (unsigned)divide_up(a.channels, STEP_THREADS));
        scan_carry_kernel<false><<<carries, STEP_THREADS, 0, stream>>>(spans, a.a, a.channels, a.d_state,
                                                                       a.initial, deltas, states);
    }
    scan_kernel<T, SHAPE, false><<<grid, SCAN_THREADS, 0, stream>>>(a, spans, states, deltas, whole);
}

} // namespace

int cuda_scan_prepare(struct kernel_device *device, const struct scan_prepare_args *p)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    if (p->channels < 0 || p->d_state < 0)
        return KERNEL_INVALID;
    if (p->channels * p->d_state > 0)
        prepare_kernel<<<cuda_grid(device, p->channels * p->d_state, SCAN_THREADS), SCAN_THREADS, 0,
                         device->stream>>>(*p);
    return cuda_launched(device);
}

int cuda_scan_forward(struct kernel_device *device, const struct scan_forward_args *args)
{
    int status = cuda_enter(device);
    if (status != KERNEL_OK)
        return status;
    struct scan_forward_args a = *args;
    int64_t d = a.channels;
    if (d < 0 || a.d_state <= 0 || a.x_stride < d || a.dt_stride < d || a.z_stride < d || a.y_stride < d ||
        a.b_stride < a.d_state || a.c_stride < a.d_state ||
        !cuda_seqs_valid(a.seq_starts, a.n_seqs, a.tokens))
        return KERNEL_INVALID;
    if (!cuda_is_float(a.act) || a.d_state > SCAN_STATES_MOST)
        return KERNEL_UNSUPPORTED;
    if (a.n_seqs == 0 || d == 0)
        return KERNEL_OK;
    status = stage_slots(device, a.n_seqs, &a.initial);
    if (status == KERNEL_OK)
        status = stage_slots(device, a.n_seqs, &a.final);
    if (status != KERNEL_OK)
        return status;
    if (all_singles(a.seq_starts, a.n_seqs, a.tokens)) {
        dim3 grid((unsigned)divide_up(d, STEP_THREADS), (unsigned)a.n_seqs);
        CUDA_WITH_TYPE(a.act, T, step_kernel<T><<<grid, STEP_THREADS, 0, device->stream>>>(a));
        return cuda_launched(device);
    }
    bool whole = rows_aligned(a.x, a.x_stride, a.act) && rows_aligned(a.dt, a.dt_stride, a.act) &&
                 rows_aligned(a.z, a.z_stride, a.act) && rows_aligned(a.y, a.y_stride, a.act);
    struct scan_spans spans;
    status = scan_spans_make(device, a.seq_starts, a.n_seqs, d, a.d_state, &spans);
    void *scratch = NULL;
    if (status == KERNEL_OK && spans.split)
        status = cuda_scratch(device, CUDA_SCRATCH_OP,
                              (size_t)(spans.n_spans * (a.d_state + 1) * d) * sizeof(float), &scratch);
    if (status != KERNEL_OK)
        return status;
    float *states = (float *)scratch, *deltas = states + spans.n_spans * a.d_state * d;
    CUDA_WITH_TYPE(
        a.act, T,
        SCAN_WITH_SHAPE(a.d_state, SHAPE, launch<T, SHAPE>(device->stream, a, spans, states, deltas, whole)));
    return cuda_launched(device);
}
