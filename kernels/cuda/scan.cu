/* scan.cu: the selective scan, forward. How the work is divided is told in scan.cuh.
 *
 * A thread has all or some of the states of two neighbouring channels, so that what it reads of B and C serves both.
 * Where lanes share a channel, tokens go by turns of as many: what is computed once per token and channel (softplus, the
 * gate) is the work of one lane, which hands delta and delta x to the others through shared memory; sums over the states
 * come back through shuffles, each to the lane whose token it is. All that is read comes through shared memory, a tile of
 * tokens ahead (scan_tile.cuh).
 *
 * The exponentials alone, at 16 a clock and multiprocessor, are most of the time that this takes. */
#include "kernels/cuda/scan_tile.cuh"

namespace
{

enum { STEP_THREADS = 128, FEW_LANES_FROM = 65536 /* channels times spans */ };

template <typename T, typename SHAPE> struct alignas(16) forward_memory {
    enum { X, DT, Z, ARRAYS };
    struct row_tile<T, SHAPE, ARRAYS> rows[2];
    struct state_tile<T, SHAPE, 2> states[2];
    /* The tokens of a turn, each made by one lane of its channel, and of the next one. */
    struct scaled<SHAPE::LANE_CHANNELS> turns[2][SHAPE::LANES > 1 ? SHAPE::THREADS : 1];
};

/* A thread's states into [d_state][channels]. */
template <bool WHOLE, int S, int CH>
__device__ __forceinline__ void store_chunk(float *to, int64_t n0, int64_t d_state, int64_t c,
                                            int64_t channels, const float (&h)[CH][S])
{
    to += n0 * channels + c;
#pragma unroll
    for (int i = 0; i < S; i++, to += channels) {
        float v[CH];
#pragma unroll
        for (int k = 0; k < CH; k++)
            v[k] = h[k][i];
        store_several<CH, WHOLE>(to, n0 + i < d_state ? (int)(channels - c) : 0, v);
    }
}

/* states: what the spans begin from, [spans][d_state][channels]; NULL unless split. */
template <typename T, typename SHAPE, bool WHOLE>
__global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS)
    scan_kernel(struct scan_forward_args a, struct scan_spans spans, const float *states)
{
    constexpr int S = SHAPE::LANE_STATES, LANES = SHAPE::LANES, CH = SHAPE::LANE_CHANNELS, TILE = SHAPE::TILE;
    using memory = struct forward_memory<T, SHAPE>;
    using raw = struct several<T, CH>;
    __shared__ memory m;

    struct scan_span span = scan_span_at(spans, (int32_t)blockIdx.x);
    int64_t block_c = (int64_t)blockIdx.y * SHAPE::CHANNELS;
    int length = (int)(span.end - span.begin);
    struct row_copier<T, SHAPE, memory::ARRAYS, WHOLE> row_copier(a.channels - block_c);
    row_copier.begin(memory::X, (const T *)a.x + span.begin * a.x_stride + block_c, a.x_stride);
    row_copier.begin(memory::DT, (const T *)a.dt + span.begin * a.dt_stride + block_c, a.dt_stride);
    row_copier.begin(memory::Z, (const T *)a.z + span.begin * a.z_stride + block_c, a.z_stride);
    struct state_copier<T, SHAPE, 2, WHOLE> state_copier((const T *)a.b + span.begin * a.b_stride, a.b_stride,
                                                         (const T *)a.c + span.begin * a.c_stride, a.c_stride,
                                                         a.d_state);
    row_copier.copy(&m.rows[0], length);
    state_copier.copy(&m.states[0], length);
    __pipeline_commit();

    int warp_lane = threadIdx.x % WARP, lane = warp_lane / SHAPE::LANE_STEP, n0 = lane * S;
    int channel = threadIdx.x / WARP * SHAPE::WARP_CHANNELS + warp_lane % SHAPE::LANE_STEP * CH;
    int64_t c = block_c + channel, state_size = a.d_state * a.channels;
    bool active = c < a.channels;
    const float *from = states != NULL ? states + span.index * state_size : state_of(a.initial, span.seq);
    float rate[CH][S], h[CH][S], bias[CH], skip[CH];
#pragma unroll
    for (int k = 0; k < CH; k++) {
        bias[k] = active ? a.dt_bias[c + k] : 0.0f;
        skip[k] = active ? a.d[c + k] : 0.0f;
        load_states(a.a, n0, a.d_state, c + k, a.channels, rate[k]);
        load_states(from, n0, a.d_state, c + k, a.channels, h[k]);
#pragma unroll
        for (int i = 0; i < S; i++)
            rate[k][i] *= LOG2_E;
    }
    T *y = (T *)a.y + (span.begin + lane) * a.y_stride + c;
    const struct scaled<CH> *tokens = &m.turns[0][threadIdx.x / WARP * WARP + warp_lane % SHAPE::LANE_STEP];

    /* The lane's token of a turn. Tokens past the end have delta 0: they leave the states as they are. */
    auto read = [&](const T *own, int which, float(&out)[CH]) {
        unpack(*reinterpret_cast<const raw *>(own + which * TILE * SHAPE::CHANNELS), out);
    };
    auto scale = [&](const T *own, bool inside) {
        float x[CH], dt[CH];
        read(own, memory::X, x);
        read(own, memory::DT, dt);
        struct scaled<CH> token;
#pragma unroll
        for (int k = 0; k < CH; k++) {
            token.delta[k] = softplus(dt[k] + (inside ? bias[k] : -INFINITY));
            token.u[k] = token.delta[k] * x[k];
        }
        return token;
    };
    __pipeline_wait_prior(0);
    state_copier.convert(&m.states[0]);
    __syncthreads();
    int buffer = 0, left = active ? length - lane : 0; /* tokens from the lane's next on */
    for (int t0 = 0; t0 < length; t0 += TILE, buffer = 1 - buffer) {
        if (a.chunk_states != NULL && t0 % SCAN_CHUNK == 0)
            store_chunk<WHOLE>(a.chunk_states + (span.chunk + t0 / SCAN_CHUNK) * state_size, n0, a.d_state, c,
                               a.channels, h);
        if (t0 + TILE < length) {
            row_copier.copy(&m.rows[1 - buffer], length - t0 - TILE);
            state_copier.copy(&m.states[1 - buffer], length - t0 - TILE);
        }
        __pipeline_commit();
        const T *own = &m.rows[buffer].v[0][lane][m.rows[0].column(lane, channel)];
        const float *bc = &m.states[buffer].v[0][n0];
        struct scaled<CH> next = scale(own, left > 0);
#pragma unroll 1
        for (int q = 0; q < TILE; q += 2 * LANES) {
#pragma unroll
            for (int turn = 0; turn < 2; turn++) {
                float sums[LANES * CH];
                struct scaled<CH> now = next;
                if (LANES > 1) {
                    m.turns[turn % 2][threadIdx.x] = next;
                    __syncwarp();
                }
                /* The next turn's delta depend on nothing here: they are made while this one's states wait. After the
                 * tile's last turn they are made of what lies behind, and not used. */
                next = scale(own + LANES * SHAPE::CHANNELS, left > LANES);
#pragma unroll
                for (int j = 0; j < LANES; j++) {
                    float b[S], cs[S];
                    if (LANES > 1)
                        now = tokens[turn % 2 * SHAPE::THREADS + j * SHAPE::LANE_STEP];
                    load_shared(bc + j * 2 * SHAPE::STATES, b);
                    load_shared(bc + j * 2 * SHAPE::STATES + SHAPE::STATES, cs);
#pragma unroll
                    for (int k = 0; k < CH; k++) {
                        float sum = 0.0f;
#pragma unroll
                        for (int i = 0; i < S; i++) {
                            h[k][i] = fmaf(exp2_fast(now.delta[k] * rate[k][i]), h[k][i], now.u[k] * b[i]);
                            sum = fmaf(cs[i], h[k][i], sum);
                        }
                        sums[j * CH + k] = sum;
                    }
                }
                reduce_scatter<LANES * CH, LANES, SHAPE::LANE_STEP>(sums, warp_lane);
                float out[CH], x[CH], z[CH];
                read(own, memory::X, x);
                read(own, memory::Z, z);
#pragma unroll
                for (int k = 0; k < CH; k++)
                    out[k] = fmaf(skip[k], x[k], sums[k]) * silu(z[k]);
                store_several<CH, WHOLE>(y, left > 0 ? (int)(a.channels - c) : 0, out);
                y += LANES * a.y_stride;
                own += LANES * SHAPE::CHANNELS;
                bc += LANES * 2 * SHAPE::STATES;
                left -= LANES;
            }
        }
        __pipeline_wait_prior(0);
        state_copier.convert(&m.states[1 - buffer]);
        __syncthreads();
    }

    float *to = span.last ? state_of(a.final, span.seq) : NULL;
    if (to != NULL)
#pragma unroll
        for (int k = 0; k < CH; k++)
            store_states(to, n0, a.d_state, c + k, a.channels, h[k]);
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

template <typename T, typename SHAPE, bool WHOLE>
void launch(cudaStream_t stream, const struct scan_forward_args &a, const struct scan_spans &spans,
            const float *states)
{
    dim3 grid((unsigned)spans.n_spans, (unsigned)divide_up(a.channels, SHAPE::CHANNELS));
    scan_kernel<T, SHAPE, WHOLE><<<grid, SHAPE::THREADS, 0, stream>>>(a, spans, states);
}

/* As few lanes a channel as leave warps enough. */
template <typename T>
void launch_shaped(cudaStream_t stream, const struct scan_forward_args &a, const struct scan_spans &spans,
                   const float *states, bool whole)
{
    constexpr int TILE = 32 / (int)sizeof(T);
    if (a.d_state > 16)
        launch<T, tile_shape<16, 4, 1, 128, 4, TILE>, false>(stream, a, spans, states);
    else if (!whole)
        launch<T, tile_shape<4, 4, 1, 128, 4, TILE>, false>(stream, a, spans, states);
    else if (spans.pairs >= FEW_LANES_FROM)
        launch<T, tile_shape<16, 1, 2, 64, 6, TILE>, true>(stream, a, spans, states);
    else
        launch<T, tile_shape<4, 4, 2, 128, 5, 2 * TILE>, true>(stream, a, spans, states);
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
        prepare_kernel<<<cuda_grid(device, p->channels * p->d_state, STEP_THREADS), STEP_THREADS, 0,
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
    bool whole = a.d_state == 16 && d * (int64_t)kernel_type_size(a.act) % 16 == 0 &&
                 rows_aligned(a.x, a.x_stride, a.act) && rows_aligned(a.dt, a.dt_stride, a.act) &&
                 rows_aligned(a.z, a.z_stride, a.act) && rows_aligned(a.b, a.b_stride, a.act) &&
                 rows_aligned(a.c, a.c_stride, a.act) && rows_aligned(a.y, a.y_stride, a.act) &&
                 rows_aligned(a.chunk_states, d, TYPE_F32);
    struct scan_spans spans;
    status = scan_spans_make(device, a.seq_starts, a.n_seqs, d, &spans);
    void *states = NULL;
    if (status == KERNEL_OK && spans.split)
        status = cuda_scratch(device, CUDA_SCRATCH_OP,
                              (size_t)(spans.n_spans * (a.d_state + 1) * d) * sizeof(float), &states);
    if (status == KERNEL_OK && spans.split) {
        const struct scan_local local = {d,   a.d_state,  a.x,         a.dt,  NULL,
                                         a.b, a.x_stride, a.dt_stride, 0,     a.b_stride,
                                         a.a, a.dt_bias,  a.initial,   a.act, false};
        status = cuda_scan_local(device, &local, &spans, (float *)states,
                                 (float *)states + spans.n_spans * a.d_state * d);
    }
    if (status != KERNEL_OK)
        return status;
    CUDA_WITH_TYPE(a.act, T, launch_shaped<T>(device->stream, a, spans, (const float *)states, whole));
    return cuda_launched(device);
}
