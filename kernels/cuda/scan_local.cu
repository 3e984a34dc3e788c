/* scan_local.cu: the first two passes of a split scan (scan.cuh). Each span is run by itself, from zero: forward for the
 * state that it ends with, in the backward, from its end, for the gradient of the state before it. Then one thread for
 * every state goes over a sequence's spans, and each ends up with what comes from those before it.
 *
 * Nothing is summed over the states here, so that exponentials, at 16 a clock and multiprocessor, would hold up
 * everything else: some of them are polynomials. */
#include "kernels/cuda/scan_tile.cuh"

namespace
{

enum {
    CARRY_THREADS = 128,
    AT_ONCE = 8,     /* spans that a thread asks for together */
    POLYNOMIALS = 2, /* of a channel's 16 states */
};

/* 2^v, v <= 0, without the special functions' unit: v = n + f, 2^f by a polynomial of least relative error, 1e-7. */
__device__ __forceinline__ float exp2_polynomial(float v)
{
    constexpr float ROUND = 12582912.0f; /* 1.5 2^23: what is added to it is rounded to an integer */
    v = fmaxf(v, -126.0f);
    float n = v + ROUND, f = v - (n - ROUND), p = 1.3398874e-3f;
    p = fmaf(p, f, 9.6184373e-3f);
    p = fmaf(p, f, 5.5503324e-2f);
    p = fmaf(p, f, 2.4022648e-1f);
    p = fmaf(p, f, 6.9314720e-1f);
    p = fmaf(p, f, 1.0f);
    return __int_as_float(__float_as_int(p) + (__float_as_int(n) << 23));
}

/* The rows of a tile: x, delta, and in the backward z. */
template <typename T, typename SHAPE, bool REVERSE> struct alignas(16) local_memory {
    enum { X, DT, Z, ARRAYS = REVERSE ? 3 : 2 };
    struct row_tile<T, SHAPE, ARRAYS> rows[2];
    struct state_tile<T, SHAPE, 1> states[2];
    struct scaled<SHAPE::LANE_CHANNELS> turns[2][SHAPE::LANES > 1 ? SHAPE::THREADS : 1];
};

/* Tokens go by in the order of the recurrence: in the backward strides are negative. */
template <typename T, typename SHAPE, bool WHOLE, bool REVERSE>
__global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS)
    local_kernel(struct scan_local l, struct scan_spans spans, float *states, float *deltas)
{
    constexpr int S = SHAPE::LANE_STATES, LANES = SHAPE::LANES, CH = SHAPE::LANE_CHANNELS, TILE = SHAPE::TILE;
    using memory = struct local_memory<T, SHAPE, REVERSE>;
    using raw = struct several<T, CH>;
    __shared__ memory m;

    struct scan_span span = scan_span_at(spans, (int32_t)blockIdx.x);
    if (REVERSE ? span.first : span.last)
        return; /* nothing comes after it */
    int64_t block_c = (int64_t)blockIdx.y * SHAPE::CHANNELS, first = REVERSE ? span.end - 1 : span.begin;
    int64_t sign = REVERSE ? -1 : 1;
    int length = (int)(span.end - span.begin);
    struct row_copier<T, SHAPE, memory::ARRAYS, WHOLE> row_copier(l.channels - block_c);
    row_copier.begin(memory::X, (const T *)l.x + first * l.x_stride + block_c, sign * l.x_stride);
    row_copier.begin(memory::DT, (const T *)l.dt + first * l.dt_stride + block_c, sign * l.dt_stride);
    if constexpr (REVERSE)
        row_copier.begin(memory::Z, (const T *)l.z + first * l.z_stride + block_c, sign * l.z_stride);
    struct state_copier<T, SHAPE, 1, WHOLE> state_copier((const T *)l.b + first * l.b_stride,
                                                         sign * l.b_stride, NULL, 0, l.d_state);
    row_copier.copy(&m.rows[0], length);
    state_copier.copy(&m.states[0], length);
    __pipeline_commit();

    int warp_lane = threadIdx.x % WARP, lane = warp_lane / SHAPE::LANE_STEP, n0 = lane * S;
    int channel = threadIdx.x / WARP * SHAPE::WARP_CHANNELS + warp_lane % SHAPE::LANE_STEP * CH;
    int64_t c = block_c + channel;
    bool active = c < l.channels;
    float rate[CH][S], h[CH][S] = {}, bias[CH], delta_sum[CH] = {};
#pragma unroll
    for (int k = 0; k < CH; k++) {
        bias[k] = active ? l.dt_bias[c + k] : 0.0f;
        load_states(l.a, n0, l.d_state, c + k, l.channels, rate[k]);
#pragma unroll
        for (int i = 0; i < S; i++)
            rate[k][i] *= LOG2_E;
    }
    const struct scaled<CH> *tokens = &m.turns[0][threadIdx.x / WARP * WARP + warp_lane % SHAPE::LANE_STEP];
    auto read = [&](const T *own, int which, float(&out)[CH]) {
        unpack(*reinterpret_cast<const raw *>(own + which * TILE * SHAPE::CHANNELS), out);
    };
    /* The lane's token of a turn. Tokens past the end have delta 0 and u 0. */
    auto scale = [&](const T *own, bool inside) {
        float x[CH], dt[CH];
        read(own, memory::X, x);
        read(own, memory::DT, dt);
        struct scaled<CH> token;
        [[maybe_unused]] float z[CH];
        if constexpr (REVERSE)
            read(own, memory::Z, z);
#pragma unroll
        for (int k = 0; k < CH; k++) {
            token.delta[k] = softplus(dt[k] + (inside ? bias[k] : -INFINITY));
            if constexpr (REVERSE)
                token.u[k] = x[k] * silu(z[k]); /* zeros beyond the end */
            else
                token.u[k] = token.delta[k] * x[k];
        }
        return token;
    };
    __pipeline_wait_prior(0);
    state_copier.convert(&m.states[0]);
    __syncthreads();
    int buffer = 0, left = active ? length - lane : 0; /* tokens from the lane's next on */
    for (int t0 = 0; t0 < length; t0 += TILE, buffer = 1 - buffer) {
        if (t0 + TILE < length) {
            row_copier.copy(&m.rows[1 - buffer], length - t0 - TILE);
            state_copier.copy(&m.states[1 - buffer], length - t0 - TILE);
        }
        __pipeline_commit();
        const T *own = &m.rows[buffer].v[0][lane][m.rows[0].column(lane, channel)];
        const float *b_row = &m.states[buffer].v[0][n0];
        struct scaled<CH> next = scale(own, left > 0);
#pragma unroll 1
        for (int q = 0; q < TILE; q += 2 * LANES) {
#pragma unroll
            for (int turn = 0; turn < 2; turn++) {
                struct scaled<CH> now = next;
                if (LANES > 1) {
                    m.turns[turn][threadIdx.x] = next;
                    __syncwarp();
                }
                next = scale(own + LANES * SHAPE::CHANNELS,
                             left > LANES); /* not used after the tile's last turn */
#pragma unroll
                for (int j = 0; j < LANES; j++) {
                    float b[S];
                    if (LANES > 1)
                        now = tokens[turn * SHAPE::THREADS + j * SHAPE::LANE_STEP];
                    load_shared(b_row + j * SHAPE::STATES, b);
#pragma unroll
                    for (int k = 0; k < CH; k++) {
                        delta_sum[k] += now.delta[k];
#pragma unroll
                        for (int i = 0; i < S; i++) {
                            float power = now.delta[k] * rate[k][i];
                            float decay = i * LANES < POLYNOMIALS ? exp2_polynomial(power) : exp2_fast(power);
                            if (REVERSE)
                                h[k][i] = decay * fmaf(now.u[k], b[i], h[k][i]);
                            else
                                h[k][i] = fmaf(decay, h[k][i], now.u[k] * b[i]);
                        }
                    }
                }
                own += LANES * SHAPE::CHANNELS;
                b_row += LANES * SHAPE::STATES;
                left -= LANES;
            }
        }
        __pipeline_wait_prior(0);
        state_copier.convert(&m.states[1 - buffer]);
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < CH; k++) {
        store_states(states + span.index * l.d_state * l.channels, n0, l.d_state, c + k, l.channels, h[k]);
        if (lane == 0 && active)
            deltas[span.index * l.channels + c + k] = delta_sum[k];
    }
}

/* Goes over a sequence's spans from the first (or, REVERSE, the last): what they end with by themselves becomes what
 * they begin from. deltas: sums over the spans. */
template <bool REVERSE>
__global__ void carry_kernel(struct scan_local l, struct scan_spans spans, const float *deltas, float *states)
{
    int64_t s = blockIdx.x, n = blockIdx.y, c = (int64_t)blockIdx.z * CARRY_THREADS + threadIdx.x;
    if (c >= l.channels)
        return;
    int64_t at = n * l.channels + c;
    float rate = l.a[at] * LOG2_E, h = 0.0f;
    const float *from = state_of(l.initial, (int32_t)s);
    if (from != NULL)
        h = from[at];
    int32_t first = spans.span_starts[s], count = spans.span_starts[s + 1] - first;
    for (int32_t i = 0; i < count; i += AT_ONCE) {
        float local[AT_ONCE], decay[AT_ONCE], *to[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            int64_t span = first + (REVERSE ? count - 1 - i - j : i + j);
            bool goes_on = i + j < count - 1; /* the last one was not run */
            to[j] = states + span * l.d_state * l.channels + at;
            local[j] = goes_on ? *to[j] : 0.0f;
            decay[j] = goes_on ? exp2_fast(rate * deltas[span * l.channels + c]) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (i + j < count)
                *to[j] = h;
            h = fmaf(decay[j], h, local[j]);
        }
    }
}

template <typename T, typename SHAPE, bool WHOLE>
void launch(cudaStream_t stream, const struct scan_local &l, const struct scan_spans &spans, float *states,
            float *deltas)
{
    dim3 grid((unsigned)spans.n_spans, (unsigned)divide_up(l.channels, SHAPE::CHANNELS));
    dim3 carries((unsigned)spans.n_seqs, (unsigned)l.d_state, (unsigned)divide_up(l.channels, CARRY_THREADS));
    if (l.reverse) {
        local_kernel<T, SHAPE, WHOLE, true><<<grid, SHAPE::THREADS, 0, stream>>>(l, spans, states, deltas);
        carry_kernel<true><<<carries, CARRY_THREADS, 0, stream>>>(l, spans, deltas, states);
    } else {
        local_kernel<T, SHAPE, WHOLE, false><<<grid, SHAPE::THREADS, 0, stream>>>(l, spans, states, deltas);
        carry_kernel<false><<<carries, CARRY_THREADS, 0, stream>>>(l, spans, deltas, states);
    }
}

} // namespace

int cuda_scan_local(struct kernel_device *device, const struct scan_local *l, const struct scan_spans *spans,
                    float *states, float *deltas)
{
    bool whole = l->d_state == 16 && l->channels * (int64_t)kernel_type_size(l->act) % 16 == 0 &&
                 rows_aligned(l->x, l->x_stride, l->act) && rows_aligned(l->dt, l->dt_stride, l->act) &&
                 rows_aligned(l->z, l->z_stride, l->act) && rows_aligned(l->b, l->b_stride, l->act);
    CUDA_WITH_TYPE(l->act, T, {
        constexpr int TILE = 32 / (int)sizeof(T);
        if (whole)
            launch<T, tile_shape<16, 1, 2, 64, 6, TILE>, true>(device->stream, *l, *spans, states, deltas);
        else if (l->d_state <= 16)
            launch<T, tile_shape<16, 1, 1, 64, 6, TILE>, false>(device->stream, *l, *spans, states, deltas);
        else
            launch<T, tile_shape<16, 4, 1, 128, 4, TILE>, false>(device->stream, *l, *spans, states, deltas);
    });
    return cuda_launched(device);
}
