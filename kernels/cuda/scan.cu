/* scan.cu: the selective scan, forward. Its shape is told in scan.cuh.
 *
 * What is computed once per token and channel (softplus, the gate) is the work of one lane of the channel: of QUAD
 * tokens at a time, each lane takes its part, and hands delta and delta x to the others through shuffles. The sums over
 * the states come back the same way, each to the lane whose token it is. Only B and C go through shared memory. */
#include "kernels/cuda/scan.cuh"

namespace
{

enum { TILE = 16, QUAD = 4, STEP_THREADS = 128, WARPS_WANTED = 2000 };

/* A lane's tokens of a quad, under way. */
template <typename T, int OWN> struct own_tokens {
    T x[OWN], dt[OWN], z[OWN];
};

/* And once they are needed. Tokens past the end, of which `left` may leave some, have delta 0: they leave the state as
 * it is. */
template <int OWN> struct own_inputs {
    float delta[OWN], x[OWN], z[OWN];

    template <typename T>
    __device__ __forceinline__ own_inputs(const struct own_tokens<T, OWN> &in, float bias, int left)
    {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            delta[i] = (i < left ? 1.0f : 0.0f) * softplus(to_float(in.dt[i]) + bias);
            x[i] = to_float(in.x[i]);
            z[i] = to_float(in.z[i]);
        }
    }
};

/* Where a lane's next token to load is, and the next to store. */
template <typename T> struct cursor {
    const T *x, *dt, *z;
    T *y;

    __device__ __forceinline__ cursor(const struct scan_forward_args &a, int64_t t, int64_t c)
        : x((const T *)a.x + t * a.x_stride + c), dt((const T *)a.dt + t * a.dt_stride + c),
          z((const T *)a.z + t * a.z_stride + c), y((T *)a.y + t * a.y_stride + c)
    {
    }
};

/* left: tokens from the lane's next on. */
template <typename T, int OWN, bool LOCAL>
__device__ __forceinline__ void load_own(const struct scan_forward_args &a, int left, struct cursor<T> *at,
                                         struct own_tokens<T, OWN> *own)
{
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        bool inside = i < left;
        int64_t rows = i == OWN - 1 ? QUAD - OWN + 1 : 1;
        own->x[i] = inside ? *at->x : from_float<T>(0.0f);
        own->dt[i] = inside ? *at->dt : from_float<T>(0.0f);
        if (!LOCAL)
            own->z[i] = inside ? *at->z : from_float<T>(0.0f);
        at->x += rows * a.x_stride;
        at->dt += rows * a.dt_stride;
        at->z += rows * a.z_stride;
    }
}

/* A thread's part of the tiles' B and C: four neighbouring values of every ROWS-th token. WHOLE: d_state is STATES, and
 * rows are aligned. */
template <typename T, typename SHAPE, bool WHOLE> struct tile_part {
    enum {
        FOURS = 2 * SHAPE::STATES / 4, /* of a token */
        ROWS = SHAPE::THREADS / FOURS,
        COUNT = TILE / ROWS,
    };
    static_assert(SHAPE::THREADS % FOURS == 0 && TILE % ROWS == 0, "whole rows");
    const T *next;
    int64_t stride;
    int n; /* states from the thread's first on */
    struct several<T, 4> v[COUNT];

    __device__ __forceinline__ tile_part(const struct scan_forward_args &a, int64_t t)
    {
        int at = threadIdx.x % FOURS * 4, is_c = at >= SHAPE::STATES;
        at -= is_c * SHAPE::STATES;
        stride = is_c ? a.c_stride : a.b_stride;
        next = (const T *)(is_c ? a.c : a.b) + (t + threadIdx.x / FOURS) * stride + at;
        n = (int)a.d_state - at;
    }
    /* left: tokens from the tile's first on. */
    __device__ __forceinline__ void load(int left)
    {
        left -= threadIdx.x / FOURS;
#pragma unroll
        for (int i = 0; i < COUNT; i++, next += ROWS * stride)
            v[i] = load_several<4, WHOLE>(next, i * ROWS < left ? n : 0);
    }
    __device__ __forceinline__ void store(float (&tile)[TILE][2 * SHAPE::STATES]) const
    {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            *reinterpret_cast<float4 *>(&tile[i * ROWS + threadIdx.x / FOURS][threadIdx.x % FOURS * 4]) =
                make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
    }
};

/* LOCAL: from zero, only the span's last state and the sum of its delta. states, deltas: see scan_carry_kernel; NULL
 * unless split. */
template <typename T, typename SHAPE, bool WHOLE, bool LOCAL>
__global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS)
    scan_kernel(struct scan_forward_args a, struct scan_spans spans, float *states, float *deltas)
{
    constexpr int S = SHAPE::LANE_STATES, LANES = SHAPE::LANES, OWN = QUAD / LANES;
    __shared__ __align__(16) float tiles[2][TILE][2 * SHAPE::STATES];

    struct scan_span span = scan_span_at(spans, (int32_t)blockIdx.x);
    int warp_lane = threadIdx.x % WARP, lane = warp_lane / SHAPE::LANE_STEP, n0 = lane * S;
    int64_t c = (int64_t)blockIdx.y * SHAPE::CHANNELS + threadIdx.x / WARP * SHAPE::WARP_CHANNELS +
                warp_lane % SHAPE::LANE_STEP;
    bool active = c < a.channels;
    int64_t state_size = a.d_state * a.channels;
    const float *from = LOCAL         ? NULL
                        : spans.split ? states + span.index * state_size
                                      : state_of(a.initial, span.seq);
    float rate[S], h[S], delta_sum = 0.0f;
    float bias = active ? a.dt_bias[c] : 0.0f, skip = active ? a.d[c] : 0.0f;
    load_states(a.a, n0, a.d_state, c, a.channels, rate);
    load_states(from, n0, a.d_state, c, a.channels, h);
#pragma unroll
    for (int i = 0; i < S; i++)
        rate[i] *= LOG2_E;

    /* A thread without a channel has no tokens, but takes part in what a block does together. */
    int length = (int)(span.end - span.begin), own_length = active ? length - lane * OWN : 0;
    struct cursor<T> at(a, span.begin + lane * OWN, c);
    struct own_tokens<T, OWN> next = {
    };
    load_own<T, OWN, LOCAL>(a, own_length, &at, &next);
    struct own_inputs<OWN> now(next, bias, own_length);
    load_own<T, OWN, LOCAL>(a, own_length - QUAD, &at, &next);
    struct tile_part<T, SHAPE, WHOLE> part(a, span.begin);
    part.load(length);
    part.store(tiles[0]);
    __syncthreads();
    int buffer = 0;
    for (int t0 = 0; t0 < length; t0 += TILE, buffer = 1 - buffer) {
        if (!LOCAL && a.chunk_states != NULL && t0 % SCAN_CHUNK == 0)
            store_states(a.chunk_states + (span.chunk + t0 / SCAN_CHUNK) * state_size, n0, a.d_state, c,
                         a.channels, h);
        part.load(length - t0 - TILE);
#pragma unroll 1
        for (int q = 0; q < TILE; q += QUAD) {
            /* The next quad's delta depend on nothing here: they are made while this one's states wait. */
            int left = own_length - t0 - q;
            const struct own_inputs<OWN> soon(next, bias, left - QUAD);
            load_own<T, OWN, LOCAL>(a, left - 2 * QUAD, &at, &next);
            float sums[QUAD];
#pragma unroll
            for (int j = 0; j < QUAD; j++) {
                const float *row = tiles[buffer][q + j];
                float b[S], cs[S], d = now.delta[j % OWN], u = d * now.x[j % OWN], sum[2] = {};
                load_shared(row + n0, b);
                if (!LOCAL)
                    load_shared(row + SHAPE::STATES + n0, cs);
                if (LANES > 1) {
                    int source = j / OWN * SHAPE::LANE_STEP + warp_lane % SHAPE::LANE_STEP;
                    d = __shfl_sync(0xffffffffu, d, source);
                    u = __shfl_sync(0xffffffffu, u, source);
                }
#pragma unroll
                for (int i = 0; i < S; i++) {
                    h[i] = fmaf(exp2_fast(d * rate[i]), h[i], u * b[i]);
                    if (!LOCAL)
                        sum[i % 2] = fmaf(cs[i], h[i], sum[i % 2]); /* two chains are half as long */
                }
                sums[j] = sum[0] + sum[1];
                delta_sum += d;
            }
            if constexpr (!LOCAL) {
                reduce_scatter<QUAD, LANES, SHAPE::LANE_STEP>(sums, warp_lane);
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    float y = fmaf(skip, now.x[i], sums[i]) * silu(now.z[i]);
                    if (i < left)
                        *at.y = from_float<T>(y);
                    at.y += (i == OWN - 1 ? QUAD - OWN + 1 : 1) * a.y_stride;
                }
            }
            now = soon;
        }
        part.store(tiles[1 - buffer]);
        __syncthreads();
    }

    float *to = LOCAL ? states + span.index * state_size : span.last ? state_of(a.final, span.seq) : NULL;
    if (to != NULL)
        store_states(to, n0, a.d_state, c, a.channels, h);
    if (LOCAL && lane == 0 && active)
        deltas[span.index * a.channels + c] = delta_sum;
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
            float *states, float *deltas)
{
    dim3 grid((unsigned)spans.n_spans, (unsigned)divide_up(a.channels, SHAPE::CHANNELS));
    if (spans.split) {
        scan_kernel<T, SHAPE, WHOLE, true><<<grid, SHAPE::THREADS, 0, stream>>>(a, spans, states, deltas);
        dim3 carries((unsigned)a.n_seqs, (unsigned)a.d_state, (unsigned)divide_up(a.channels, STEP_THREADS));
        scan_carry_kernel<false><<<carries, STEP_THREADS, 0, stream>>>(spans, a.a, a.channels, a.d_state,
                                                                       a.initial, deltas, states);
    }
    scan_kernel<T, SHAPE, WHOLE, false><<<grid, SHAPE::THREADS, 0, stream>>>(a, spans, states, deltas);
}

/* As few lanes a channel as leave warps enough. */
template <typename T>
void launch_shaped(cudaStream_t stream, const struct scan_forward_args &a, const struct scan_spans &spans,
                   float *states, float *deltas, bool whole)
{
    const int64_t wanted = (int64_t)WARPS_WANTED * WARP;
    if (a.d_state > 16)
        launch<T, scan_shape<16, 4, 128, 4>, false>(stream, a, spans, states, deltas);
    else if (!whole)
        launch<T, scan_shape<4, 4, 128, 4>, false>(stream, a, spans, states, deltas);
    else if (spans.pairs >= wanted)
        launch<T, scan_shape<16, 1, 128, 4>, true>(stream, a, spans, states, deltas);
    else if (2 * spans.pairs >= wanted)
        launch<T, scan_shape<8, 2, 128, 5>, true>(stream, a, spans, states, deltas);
    else
        launch<T, scan_shape<4, 4, 128, 8>, true>(stream, a, spans, states, deltas);
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
    bool whole =
        a.d_state == 16 && rows_aligned(a.b, a.b_stride, a.act) && rows_aligned(a.c, a.c_stride, a.act);
    struct scan_spans spans;
    status = scan_spans_make(device, a.seq_starts, a.n_seqs, d, &spans);
    void *scratch = NULL;
    if (status == KERNEL_OK && spans.split)
        status = cuda_scratch(device, CUDA_SCRATCH_OP,
                              (size_t)(spans.n_spans * (a.d_state + 1) * d) * sizeof(float), &scratch);
    if (status != KERNEL_OK)
        return status;
    float *states = (float *)scratch, *deltas = states + spans.n_spans * a.d_state * d;
    CUDA_WITH_TYPE(a.act, T, launch_shaped<T>(device->stream, a, spans, states, deltas, whole));
    return cuda_launched(device);
}
