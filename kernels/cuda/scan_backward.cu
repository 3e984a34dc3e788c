/* scan_backward.cu: the selective scan, backward. Its shape is told in scan.cuh.
 *
 * A block goes through its span from the last chunk to the first. With a chunk's inputs in shared memory, each thread
 * goes forward through the chunk from its stored state and leaves its states at every GROUP tokens in shared memory.
 * Then, group by group from the last, it goes forward again, now with every decay and state of the group in registers,
 * and back. With g the gradient of h:
 *   g_t = dout_t C_t + exp(delta_{t+1} A) g_{t+1}
 *   dC_t = sum_c dout h,  dB_t = sum_c g delta x,  dx = delta sum_n g B + D dout
 *   ddelta = x sum_n g B + sum_n g exp(delta A) h_{t-1} A,  dA = sum_t g exp(delta A) h_{t-1} delta
 * Sums over channels begin on the tensor cores (sum_quads), go on over the block's warps through shared memory, and
 * what every block of channels found goes to the workspace, as do each span's sums over tokens; a second launch adds
 * those up in a fixed order. */
#include <type_traits>

#include "kernels/cuda/scan_backward.cuh"

namespace
{

enum {
    GROUP = 8,
    GROUPS_OF_CHUNK = SCAN_CHUNK / GROUP,
    ROW_CHANNELS = 4, /* of a thread that loads and stores rows */
    SUM_THREADS = 128,
};

constexpr float LN_2 = 0.693147180559945309f;
/* What the tensor cores' cut of 13 bits takes from a product on average: half of 2^-10, over the mean of a mantissa's
 * reciprocal. */
constexpr float CUT_LOSS = 1.000352f;

/* The terms of db and dc are cut to what the tensor cores take where they end up in fewer bits anyway. */
template <typename T> constexpr bool is_bf16 = std::is_same<T, __nv_bfloat16>::value;

/* Of one token and channel. */
struct alignas(16) entry {
    float input; /* delta x; then the sum of g B */
    float dout;  /* then the sum of g exp(delta A) h A, over log2(e) */
    float delta;
    float out; /* the sum of C h, once it is known */
};

template <typename SHAPE> struct alignas(16) shared_memory {
    struct entry entries[SCAN_CHUNK][SHAPE::CHANNELS]; /* columns at place_of(channel) */
    float4 states[GROUPS_OF_CHUNK - 2][SHAPE::LANE_STATES / 4]
                 [SHAPE::THREADS]; /* before every group but the first and the last */
    float bc[SCAN_CHUNK][2 * SHAPE::STATES];
    float4 sums[2][GROUP / 2][SHAPE::THREADS]; /* a group's dB and dC, of quads of channels: see sum_quads */
};

/* Where a channel's entries are in a row: so that both neighbouring channels and every fourth one are in different
 * banks. */
__device__ __forceinline__ int place_of(int channel)
{
    return channel ^ (channel >> 3 & 3);
}

/* ---- a chunk in ---- */

/* A thread's channels of the four inputs at a row of the chunk, under way. */
template <typename T> struct row_loads {
    struct several<T, ROW_CHANNELS> x, dt, z, dy;
};

/* And as numbers. */
template <typename T> struct row_inputs {
    float x[ROW_CHANNELS], dt[ROW_CHANNELS], z[ROW_CHANNELS], dy[ROW_CHANNELS];

    __device__ __forceinline__ row_inputs(const struct row_loads<T> &in)
    {
        unpack(in.x, x);
        unpack(in.dt, dt);
        unpack(in.z, z);
        unpack(in.dy, dy);
    }
};

/* The threads of a row, and where they load. */
template <typename T, typename SHAPE, bool WHOLE> struct rows_of_chunk {
    enum {
        ROW_THREADS = SHAPE::CHANNELS / ROW_CHANNELS,
        PASS_ROWS = SHAPE::THREADS / ROW_THREADS, /* that all threads load */
        PASSES = SCAN_CHUNK / PASS_ROWS,
        BATCH = PASSES < 4 ? PASSES : 4, /* passes under way at the same time */
    };
    const tile_rows<T> x, dt, z, dy;
    int count, n; /* tokens of the chunk; channels from the thread's first on */
    unsigned c;   /* the thread's first */

    __device__ __forceinline__ rows_of_chunk(const struct scan_backward_args &a, int64_t t0, int tokens,
                                             int64_t first_channel)
        : x(a.x, a.x_stride, t0), dt(a.dt, a.dt_stride, t0), z(a.z, a.z_stride, t0),
          dy(a.dy, a.dy_stride, t0), count(tokens),
          n((int)min(a.channels - first_channel, (int64_t)ROW_CHANNELS)),
          c((unsigned)(WHOLE ? min(first_channel, a.channels - ROW_CHANNELS) : first_channel))
    {
    }
    __device__ __forceinline__ int row_of(int pass) const
    {
        return pass * PASS_ROWS + threadIdx.x / ROW_THREADS;
    }
    /* How many of the thread's channels are there in a row. */
    __device__ __forceinline__ int there(int row) const
    {
        return row < count ? n : 0;
    }
    /* A batch from `pass` on. What is not there is 0, or, WHOLE, some input of the chunk that is. */
    __device__ __forceinline__ void load(int pass, struct row_loads<T> (&batch)[BATCH]) const
    {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int row = row_of(pass + i), n_there = WHOLE ? ROW_CHANNELS : there(row);
            if (WHOLE)
                row = min(row, count - 1);
            batch[i].x = load_several<ROW_CHANNELS, WHOLE>(x.at(row, c), n_there);
            batch[i].dt = load_several<ROW_CHANNELS, WHOLE>(dt.at(row, c), n_there);
            batch[i].z = load_several<ROW_CHANNELS, WHOLE>(z.at(row, c), n_there);
            batch[i].dy = load_several<ROW_CHANNELS, WHOLE>(dy.at(row, c), n_there);
        }
    }
};

/* Tokens past the chunk's end have delta, input and dout 0, so that neither states nor gradients change there. */
template <typename T, typename SHAPE, bool WHOLE>
__device__ __forceinline__ void load_chunk(const struct scan_backward_args &a, shared_memory<SHAPE> &m,
                                           const rows_of_chunk<T, SHAPE, WHOLE> &rows, int64_t t0, int row_c,
                                           const float (&bias)[ROW_CHANNELS])
{
#pragma unroll 1
    for (int pass = 0; pass < rows.PASSES; pass += rows.BATCH) {
        struct row_loads<T> batch[rows.BATCH];
        rows.load(pass, batch);
#pragma unroll
        for (int p = 0; p < rows.BATCH; p++) {
            int row = rows.row_of(pass + p), there = rows.there(row);
            const struct row_inputs<T> in(batch[p]);
#pragma unroll
            for (int i = 0; i < ROW_CHANNELS; i++) {
                float mask = i < there ? 1.0f : 0.0f, delta = mask * softplus(in.dt[i] + bias[i]);
                float dout = mask * in.dy[i] * silu(in.z[i]);
                m.entries[row][place_of(row_c + i)] = {delta * in.x[i], dout, delta, 0.0f};
            }
        }
    }
    constexpr int FOURS = 2 * SHAPE::STATES / 4;
#pragma unroll
    for (int i = threadIdx.x; i < SCAN_CHUNK * FOURS; i += SHAPE::THREADS) {
        float v[4];
        unpack(load_bc_four<T, SHAPE, WHOLE>(a.b, a.b_stride, a.c, a.c_stride, a.d_state, t0, rows.count, i),
               v);
        *reinterpret_cast<float4 *>(&m.bc[i / FOURS][i % FOURS * 4]) = make_float4(v[0], v[1], v[2], v[3]);
    }
}

__device__ __forceinline__ void prefetch(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* Brings the inputs of the chunk that ends before t0, and its state, on their way to the second-level cache, where the
 * block's channels are there in full. */
template <typename T, typename SHAPE>
__device__ __forceinline__ void prefetch_chunk(const struct scan_backward_args &a, const float *states,
                                               int64_t t0, int64_t block_c)
{
    constexpr int LINE = 128, LINES = SHAPE::CHANNELS * sizeof(T) / LINE;
    if constexpr (LINES > 0) {
        constexpr int STATE_LINES = SHAPE::CHANNELS * sizeof(float) / LINE;
        if (block_c + SHAPE::CHANNELS > a.channels)
            return;
        for (int i = threadIdx.x; i < SCAN_CHUNK * LINES; i += SHAPE::THREADS) {
            int64_t t = t0 - 1 - i / LINES, c = block_c + i % LINES * (int)(LINE / sizeof(T));
            prefetch((const T *)a.x + t * a.x_stride + c);
            prefetch((const T *)a.dt + t * a.dt_stride + c);
            prefetch((const T *)a.z + t * a.z_stride + c);
            prefetch((const T *)a.dy + t * a.dy_stride + c);
        }
        for (int i = threadIdx.x; i < a.d_state * STATE_LINES; i += SHAPE::THREADS)
            prefetch(states + i / STATE_LINES * a.channels + block_c +
                     i % STATE_LINES * (int)(LINE / sizeof(float)));
    }
}

/* ---- sums over channels ---- */

/* D += A B on the tensor cores, 16 x 8 x 8, with the low 13 bits of the operands cut off. */
__device__ __forceinline__ void multiply_add(float (&d)[4], const float (&a)[4], float b0, float b1)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

/* Adds to `sums` the S values v over the four lanes of each quad, which are four channels: A holds two times two values
 * of each lane, and B is ones in the columns that shall have the two sums. `column` is where v's sums begin among the
 * eight; ones[j] is 1 in the lanes that hold column j of B. Afterwards a quad's lane q has in `sums` what four
 * consecutive values gave: of the v that went to columns 2q and 2q+1. EXACT: with what the cut took away, too. */
template <bool EXACT, int S>
__device__ __forceinline__ void sum_quads(const float (&v)[S], int column, const float (&ones)[8],
                                          float (&sums)[4])
{
#pragma unroll
    for (int i = 0; i < S; i += 4) {
        const float a[4] = {v[i], v[i + 2], v[i + 1], v[i + 3]};
        float b0 = ones[column + i / 2], b1 = ones[column + i / 2 + 1];
        if (EXACT) {
            float upper[4], lower[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                upper[j] = __uint_as_float(__float_as_uint(a[j]) & 0xffffe000u);
                lower[j] = a[j] - upper[j];
            }
            multiply_add(sums, upper, b0, b1);
            multiply_add(sums, lower, b0, b1);
        } else {
            multiply_add(sums, a, b0, b1);
        }
    }
}

/* Adds up a group's sums of quads over the block's channels. A float4 of m.sums holds, of token 2 * pair + (q >> 1),
 * the states 8 * lane + 4 * (q & 1) on, for one of QUADS quads of a warp. Where there are quads enough, two threads
 * share a sum. */
template <typename SHAPE>
__device__ __forceinline__ void sum_block(const shared_memory<SHAPE> &m, int64_t t0, int count,
                                          float *token_parts)
{
    constexpr int WARPS = SHAPE::THREADS / WARP, QUADS = SHAPE::LANE_STEP / 4, SHARE = QUADS > 1 ? 2 : 1;
    constexpr int COUNT = 2 * (GROUP / 2) * 4 * SHAPE::LANES * SHARE;
    static_assert(COUNT % SHAPE::THREADS == 0, "all threads take part in every turn");
#pragma unroll
    for (int turn = 0; turn < COUNT; turn += SHAPE::THREADS) {
        int i = turn + threadIdx.x, share = i % SHARE, q = i / SHARE % 4, lane = i / SHARE / 4 % SHAPE::LANES;
        int pair = i / SHARE / 4 / SHAPE::LANES % (GROUP / 2),
            which = i / SHARE / 4 / SHAPE::LANES / (GROUP / 2);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
#pragma unroll
            for (int quad = 0; quad < QUADS; quad += SHARE) {
                const float4 v = m.sums[which][pair][warp * WARP + (lane * QUADS + quad + share) * 4 + q];
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
        }
        if (SHARE == 2) {
            sum.x += __shfl_xor_sync(0xffffffffu, sum.x, 1);
            sum.y += __shfl_xor_sync(0xffffffffu, sum.y, 1);
            sum.z += __shfl_xor_sync(0xffffffffu, sum.z, 1);
            sum.w += __shfl_xor_sync(0xffffffffu, sum.w, 1);
        }
        int t = 2 * pair + q / 2;
        if (share == 0 && t < count)
            *reinterpret_cast<float4 *>(
                &token_parts[(t0 + t) * 2 * SHAPE::STATES + which * SHAPE::STATES + lane * 8 + q % 2 * 4]) =
                sum;
    }
}

/* ---- a group ---- */

/* What a thread carries from chunk to chunk. */
template <typename SHAPE> struct carried {
    float gradient[SHAPE::LANE_STATES]; /* of the state before the tokens done so far */
    float rate_sum[SHAPE::LANE_STATES]; /* dA */
    float skip_sum[ROW_CHANNELS], bias_sum[ROW_CHANNELS];
};

/* GROUP tokens forward. */
template <typename SHAPE>
__device__ __forceinline__ void step_group(const shared_memory<SHAPE> &m, int first, int place, int n0,
                                           const float (&rate)[SHAPE::LANE_STATES],
                                           float (&h)[SHAPE::LANE_STATES])
{
    constexpr int S = SHAPE::LANE_STATES;
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
        float delta = m.entries[first + t][place].delta, input = m.entries[first + t][place].input, b[S];
        load_shared(&m.bc[first + t][n0], b);
#pragma unroll
        for (int i = 0; i < S; i++)
            h[i] = fmaf(exp2_fast(delta * rate[i]), h[i], input * b[i]);
    }
}

/* What a thread needs of a pair of tokens. */
template <typename SHAPE> struct pair_inputs {
    float input[2], dout[2], delta[2], b[2][SHAPE::LANE_STATES], c[2][SHAPE::LANE_STATES];

    __device__ __forceinline__ void load(const shared_memory<SHAPE> &m, int t0, int place, int n0)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const struct entry v = m.entries[t0 + i][place];
            input[i] = v.input, dout[i] = v.dout, delta[i] = v.delta;
            load_shared(&m.bc[t0 + i][n0], b[i]);
            load_shared(&m.bc[t0 + i][SHAPE::STATES + n0], c[i]);
        }
    }
};

/* The sums over the states of LANES tokens of a group, from `first` on: a lane has that of its own. */
template <int LANES, int STEP>
__device__ __forceinline__ float sum_states(const float (&v)[GROUP], int first, int warp_lane)
{
    float sums[LANES];
#pragma unroll
    for (int i = 0; i < LANES; i++)
        sums[i] = v[first + i];
    reduce_scatter<LANES, LANES, STEP>(sums, warp_lane);
    return sums[0];
}

/* One group of tokens, forward from h, and back. A pair's sums are stored after the loads and the arithmetic of the next
 * pair, so that neither waits for them. RATES: dA is wanted. */
template <typename SHAPE, bool EXACT, bool RATES>
__device__ __forceinline__ void run_group(shared_memory<SHAPE> &m, int first, int place, int lane,
                                          const float (&rate)[SHAPE::LANE_STATES], const float (&ones)[8],
                                          float (&h)[SHAPE::LANE_STATES], struct carried<SHAPE> *k)
{
    constexpr int S = SHAPE::LANE_STATES, LANES = SHAPE::LANES, STEP = SHAPE::LANE_STEP, PAIRS = GROUP / 2;
    static_assert(S == 8 && GROUP % LANES == 0, "a token's sums are half of sum_quads' columns");
    int n0 = lane * S, warp_lane = threadIdx.x % WARP;
    float decay[GROUP][S], before[GROUP][S], sums[PAIRS][4] = {}, outs[GROUP];
    struct pair_inputs<SHAPE> now;
    now.load(m, first, place, n0);
#pragma unroll
    for (int p = 0; p <= PAIRS; p++) {
        if (p < PAIRS) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int t = 2 * p + j;
                float dc[S], out[2] = {}; /* two chains are half as long */
#pragma unroll
                for (int i = 0; i < S; i++) {
                    decay[t][i] = exp2_fast(now.delta[j] * rate[i]);
                    before[t][i] = h[i];
                    h[i] = fmaf(decay[t][i], h[i], now.input[j] * now.b[j][i]);
                    out[i % 2] = fmaf(now.c[j][i], h[i], out[i % 2]);
                    dc[i] = now.dout[j] * h[i];
                }
                sum_quads<EXACT>(dc, j * 4, ones, sums[p]);
                outs[t] = out[0] + out[1];
            }
            if (p + 1 < PAIRS)
                now.load(m, first + 2 * p + 2, place, n0);
        }
        if (p > 0) {
            float(&done)[4] = sums[p - 1];
            m.sums[1][p - 1][threadIdx.x] = make_float4(done[0], done[1], done[2], done[3]);
            if (2 * p % LANES == 0)
                m.entries[first + 2 * p - LANES + lane][place].out =
                    sum_states<LANES, STEP>(outs, 2 * p - LANES, warp_lane);
        }
    }
    float inputs[GROUP], throughs[GROUP];
#pragma unroll
    for (int p = PAIRS - 1; p >= -1; p--) {
        if (p >= 0) {
            sums[p][0] = sums[p][1] = sums[p][2] = sums[p][3] = 0.0f;
#pragma unroll
            for (int j = 1; j >= 0; j--) {
                int t = 2 * p + j;
                float db[S], input_sum[2] = {}, through_sum[2] = {};
#pragma unroll
                for (int i = 0; i < S; i++) {
                    float whole = fmaf(now.c[j][i], now.dout[j], k->gradient[i]);
                    db[i] = whole * now.input[j];
                    input_sum[i % 2] = fmaf(whole, now.b[j][i], input_sum[i % 2]);
                    k->gradient[i] = whole * decay[t][i];
                    float through = k->gradient[i] * before[t][i];
                    through_sum[i % 2] = fmaf(through, rate[i], through_sum[i % 2]);
                    if (RATES)
                        k->rate_sum[i] = fmaf(through, now.delta[j], k->rate_sum[i]);
                }
                sum_quads<EXACT>(db, j * 4, ones, sums[p]);
                inputs[t] = input_sum[0] + input_sum[1];
                throughs[t] = through_sum[0] + through_sum[1];
            }
            if (p > 0)
                now.load(m, first + 2 * p - 2, place, n0);
        }
        if (p + 1 < PAIRS) {
            float(&done)[4] = sums[p + 1];
            m.sums[0][p + 1][threadIdx.x] = make_float4(done[0], done[1], done[2], done[3]);
            if (2 * (p + 1) % LANES == 0) {
                float input = sum_states<LANES, STEP>(inputs, 2 * (p + 1), warp_lane);
                float through = sum_states<LANES, STEP>(throughs, 2 * (p + 1), warp_lane);
                if (LANES > 1)
                    __syncwarp(); /* all lanes of the channel have read these tokens' inputs */
                *reinterpret_cast<float2 *>(&m.entries[first + 2 * (p + 1) + lane][place]) =
                    make_float2(input, through);
            }
        }
    }
}

/* ---- a chunk out ---- */

/* dx, ddt, dz and y of a chunk, from what the groups left. */
template <typename T, typename SHAPE, bool WHOLE, bool SUMS>
__device__ __forceinline__ void store_chunk(const struct scan_backward_args &a, const shared_memory<SHAPE> &m,
                                            const rows_of_chunk<T, SHAPE, WHOLE> &rows, int64_t t0, int row_c,
                                            const float (&bias)[ROW_CHANNELS],
                                            const float (&skip)[ROW_CHANNELS], struct carried<SHAPE> *k)
{
    const tile_rows<T> dx_rows(a.dx, a.dx_stride, t0), ddt_rows(a.ddt, a.ddt_stride, t0),
        dz_rows(a.dz, a.dz_stride, t0), y_rows(a.y, a.y_stride, t0);
#pragma unroll 1
    for (int pass = 0; pass < rows.PASSES; pass += rows.BATCH) {
        struct row_loads<T> batch[rows.BATCH];
        rows.load(pass, batch);
#pragma unroll
        for (int p = 0; p < rows.BATCH; p++) {
            int row = rows.row_of(pass + p), there = rows.there(row);
            const struct row_inputs<T> in(batch[p]);
            float dx[ROW_CHANNELS], ddt[ROW_CHANNELS], dz[ROW_CHANNELS], y[ROW_CHANNELS];
#pragma unroll
            for (int i = 0; i < ROW_CHANNELS; i++) {
                const struct entry v = m.entries[row][place_of(row_c + i)];
                float gate = sigmoid(in.z[i]), gated = in.z[i] * gate, dout = in.dy[i] * gated;
                float out = fmaf(skip[i], in.x[i], v.out);
                y[i] = out * gated;
                dz[i] = in.dy[i] * out * fmaf(gated, 1.0f - gate, gate);
                dx[i] = fmaf(v.delta, v.input, skip[i] * dout);
                ddt[i] = fmaf(in.x[i], v.input, v.dout * LN_2) * sigmoid(in.dt[i] + bias[i]);
                if (SUMS && i < there) {
                    k->skip_sum[i] = fmaf(dout, in.x[i], k->skip_sum[i]);
                    k->bias_sum[i] += ddt[i];
                }
            }
            store_several<ROW_CHANNELS, WHOLE>(dx_rows.at(row, rows.c), there, dx);
            store_several<ROW_CHANNELS, WHOLE>(ddt_rows.at(row, rows.c), there, ddt);
            store_several<ROW_CHANNELS, WHOLE>(dz_rows.at(row, rows.c), there, dz);
            if (a.y != NULL)
                store_several<ROW_CHANNELS, WHOLE>(y_rows.at(row, rows.c), there, y);
        }
    }
}

/* The span's sums over tokens. Those of D and the bias lie with the threads that load rows: one thread a channel adds
 * them up. */
template <typename SHAPE>
__device__ __forceinline__ void store_sums(const struct scan_backward_args &a, shared_memory<SHAPE> &m,
                                           float *part, int64_t block_c, int64_t scan_c, int n0, int row_c,
                                           const float (&rate)[SHAPE::LANE_STATES],
                                           const struct carried<SHAPE> &k)
{
    constexpr int ROW_THREADS = SHAPE::CHANNELS / ROW_CHANNELS, PASS_ROWS = SHAPE::THREADS / ROW_THREADS;
    static_assert(2 * PASS_ROWS <= SCAN_CHUNK * 4, "the rows fit");
    int64_t size = a.channels * a.d_state;
#pragma unroll
    for (int i = 0; i < SHAPE::LANE_STATES; i++)
        if (scan_c < a.channels && n0 + i < a.d_state)
            part[scan_c * a.d_state + n0 + i] = k.rate_sum[i] * rate[i] * LN_2;
    float(*rows)[SHAPE::CHANNELS] = reinterpret_cast<float(*)[SHAPE::CHANNELS]>(m.entries);
    int row = threadIdx.x / ROW_THREADS;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROW_CHANNELS; i++) {
        rows[row][row_c + i] = k.skip_sum[i];
        rows[PASS_ROWS + row][row_c + i] = k.bias_sum[i];
    }
    __syncthreads();
    int64_t c = block_c + threadIdx.x;
    if (threadIdx.x >= SHAPE::CHANNELS || c >= a.channels)
        return;
    float skip = 0.0f, bias = 0.0f;
    for (int r = 0; r < PASS_ROWS; r++) {
        skip += rows[r][threadIdx.x];
        bias += rows[PASS_ROWS + r][threadIdx.x];
    }
    part[size + c] = skip;
    part[size + a.channels + c] = bias;
}

/* gradients: [spans][d_state][channels], of the state at each span's end, from later spans; NULL unless split. WHOLE:
 * see the forward. SUMS: those over tokens are wanted. */
template <typename T, typename SHAPE, bool WHOLE, bool SUMS>
__global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS)
    backward_kernel(struct scan_backward_args a, struct scan_spans spans, const float *gradients,
                    struct scan_parts parts)
{
    constexpr int S = SHAPE::LANE_STATES;
    extern __shared__ __align__(16) unsigned char raw[];
    shared_memory<SHAPE> &m = *reinterpret_cast<shared_memory<SHAPE> *>(raw);
    struct scan_span span = scan_span_at(spans, (int32_t)blockIdx.x);
    int64_t block_c = (int64_t)blockIdx.y * SHAPE::CHANNELS, state_size = a.d_state * a.channels;
    float *token_parts = parts.tokens + blockIdx.y * a.tokens * 2 * SHAPE::STATES;

    /* As one of those that load and store. */
    int row_c = threadIdx.x % (SHAPE::CHANNELS / ROW_CHANNELS) * ROW_CHANNELS;
    int64_t load_c = block_c + row_c;
    float bias[ROW_CHANNELS], skip[ROW_CHANNELS];
    load_some(a.dt_bias + load_c, a.channels - load_c, false, bias);
    load_some(a.d + load_c, a.channels - load_c, false, skip);

    /* As one of those that scan. */
    int warp_lane = threadIdx.x % WARP, lane = warp_lane / SHAPE::LANE_STEP, n0 = lane * S;
    int channel = threadIdx.x / WARP * SHAPE::WARP_CHANNELS + warp_lane % SHAPE::LANE_STEP;
    int64_t scan_c = block_c + channel;
    int place = place_of(channel);
    float rate[S], ones[8];
    struct carried<SHAPE> k = {
    };
    load_states(a.a, n0, a.d_state, scan_c, a.channels, rate);
    if (gradients != NULL)
        load_states(gradients + span.index * state_size, n0, a.d_state, scan_c, a.channels, k.gradient);
#pragma unroll
    for (int i = 0; i < S; i++)
        rate[i] *= LOG2_E;
#pragma unroll
    for (int i = 0; i < 8; i++)
        ones[i] = warp_lane / 4 == i ? 1.0f : 0.0f;

    int length = (int)(span.end - span.begin);
    for (int j = (length + SCAN_CHUNK - 1) / SCAN_CHUNK - 1; j >= 0; j--) {
        int64_t t0 = span.begin + j * SCAN_CHUNK;
        int count = min((int)SCAN_CHUNK, length - j * SCAN_CHUNK), groups = (count + GROUP - 1) / GROUP;
        float first[S], h[S];
        load_states(a.chunk_states + (span.chunk + j) * state_size, n0, a.d_state, scan_c, a.channels, first);
        const rows_of_chunk<T, SHAPE, WHOLE> rows(a, t0, count, load_c);
        load_chunk(a, m, rows, t0, row_c, bias);
        __syncthreads();
        if (j > 0)
            prefetch_chunk<T, SHAPE>(a, a.chunk_states + (span.chunk + j - 1) * state_size, t0, block_c);
#pragma unroll
        for (int i = 0; i < S; i++)
            h[i] = first[i];
#pragma unroll 1
        for (int g = 1; g < groups; g++) {
            step_group(m, (g - 1) * GROUP, place, n0, rate, h);
            if (g + 1 < groups)
#pragma unroll
                for (int i = 0; i < S / 4; i++)
                    m.states[g - 1][i][threadIdx.x] =
                        make_float4(h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]);
        }
#pragma unroll 1
        for (int g = groups - 1; g >= 0; g--) {
            if (g == 0) {
#pragma unroll
                for (int i = 0; i < S; i++)
                    h[i] = first[i];
            } else if (g + 1 < groups) {
#pragma unroll
                for (int i = 0; i < S / 4; i++) {
                    const float4 v = m.states[g - 1][i][threadIdx.x];
                    h[4 * i] = v.x, h[4 * i + 1] = v.y, h[4 * i + 2] = v.z, h[4 * i + 3] = v.w;
                }
            }
            run_group<SHAPE, !is_bf16<T>, SUMS>(m, g * GROUP, place, lane, rate, ones, h, &k);
            __syncthreads();
            sum_block(m, t0 + g * GROUP, count - g * GROUP, token_parts);
            __syncthreads();
        }
        store_chunk<T, SHAPE, WHOLE, SUMS>(a, m, rows, t0, row_c, bias, skip, &k);
        __syncthreads();
    }
    if (SUMS)
        store_sums(a, m, parts.channels + span.index * (state_size + 2 * a.channels), block_c, scan_c, n0,
                   row_c, rate, k);
}

/* db and dc: the sums over the blocks of channels, times scale, four at a time. */
template <typename T, typename SHAPE>
__global__ void __launch_bounds__(SUM_THREADS)
    sum_kernel(struct scan_backward_args a, const float *parts, int blocks, float scale)
{
    constexpr int FOURS = 2 * SHAPE::STATES / 4;
    int64_t i = (int64_t)blockIdx.x * SUM_THREADS + threadIdx.x, count = a.tokens * FOURS;
    if (i >= count)
        return;
    const float4 *from = reinterpret_cast<const float4 *>(parts) + i;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int j = 0; j < blocks; j++) {
        const float4 v = from[j * count];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const float sums[4] = {sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale};
    int64_t t = i / FOURS, n = i % FOURS * 4;
    bool is_c = n >= SHAPE::STATES;
    n = is_c ? n - SHAPE::STATES : n;
    T *to = is_c ? (T *)a.dc + t * a.dc_stride : (T *)a.db + t * a.db_stride;
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (n + j < a.d_state)
            to[n + j] = from_float<T>(sums[j]);
}

/* ---- the workspace ---- */

using few_states = scan_shape<8, 2, 128, 2>;  /* d_state up to 16 */
using many_states = scan_shape<8, 8, 128, 2>; /* up to 64 */

struct layout {
    int64_t tokens, channels, gradients, deltas, floats; /* where each begins, and the whole */
};

struct layout layout_of(int64_t tokens, int64_t channels, int64_t d_state, int64_t n_spans)
{
    bool few = d_state <= few_states::STATES;
    int64_t states = few ? few_states::STATES : many_states::STATES;
    int64_t block = few ? few_states::CHANNELS : many_states::CHANNELS;
    struct layout l;
    l.tokens = 0;
    l.channels = l.tokens + divide_up(channels, block) * tokens * 2 * states;
    l.gradients = l.channels + n_spans * channels * (d_state + 2);
    l.deltas = l.gradients + n_spans * channels * d_state;
    l.floats = l.deltas + n_spans * channels;
    return l;
}

template <typename T, typename SHAPE, bool WHOLE, bool SUMS>
int launch(struct kernel_device *device, const struct scan_backward_args &a, const struct scan_spans &spans,
           const struct layout &l)
{
    float *workspace = (float *)a.workspace, *gradients = NULL;
    int bytes = (int)sizeof(shared_memory<SHAPE>);
    if (bytes > device->shared_bytes)
        return KERNEL_UNSUPPORTED;
    int status = KERNEL_OK;
    if (spans.split) {
        gradients = workspace + l.gradients;
        const struct scan_local local = {a.channels, a.d_state,   a.dy,        a.dt,       a.z,
                                         a.c,        a.dy_stride, a.dt_stride, a.z_stride, a.c_stride,
                                         a.a,        a.dt_bias,   {},          a.act,      true};
        status = cuda_scan_local(device, &local, &spans, gradients, workspace + l.deltas);
        if (status != KERNEL_OK)
            return status;
    }
    struct scan_parts parts = {workspace + l.tokens, workspace + l.channels};
    dim3 grid((unsigned)spans.n_spans, (unsigned)divide_up(a.channels, SHAPE::CHANNELS));
    bool tiles = WHOLE && cuda_scan_backward_tiles_fit(device, a);
    if (tiles) {
        static_assert(!WHOLE || (SHAPE::CHANNELS == SCAN_PARTS_CHANNELS && SHAPE::STATES == 16),
                      "the same partial sums");
        status = cuda_scan_backward_tiles(device, a, spans, gradients, parts, SUMS);
    } else {
        status = cuda_check(device, cudaFuncSetAttribute(backward_kernel<T, SHAPE, WHOLE, SUMS>,
                                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        if (status == KERNEL_OK)
            backward_kernel<T, SHAPE, WHOLE, SUMS>
                <<<grid, SHAPE::THREADS, bytes, device->stream>>>(a, spans, gradients, parts);
    }
    if (status != KERNEL_OK)
        return status;
    int64_t fours = a.tokens * 2 * SHAPE::STATES / 4;
    sum_kernel<T, SHAPE><<<(unsigned)divide_up(fours, SUM_THREADS), SUM_THREADS, 0, device->stream>>>(
        a, workspace + l.tokens, (int)grid.y, is_bf16<T> && !tiles ? CUT_LOSS : 1.0f);
    return cuda_launched(device);
}

template <typename T>
int launch_shaped(struct kernel_device *device, const struct scan_backward_args &a,
                  const struct scan_spans &spans, const struct layout &l, bool whole)
{
    bool sums = a.da_log != NULL || a.dd != NULL || a.ddt_bias != NULL;
    if (a.d_state > few_states::STATES)
        return launch<T, many_states, false, true>(device, a, spans, l);
    if (!whole)
        return launch<T, few_states, false, true>(device, a, spans, l);
    if (sums)
        return launch<T, few_states, true, true>(device, a, spans, l);
    return launch<T, few_states, true, false>(device, a, spans, l);
}

} // namespace

int64_t cuda_scan_backward_workspace(int64_t tokens, int64_t channels, int64_t d_state, int32_t n_seqs)
{
    int64_t spans = scan_spans_most(tokens, channels, n_seqs);
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
    bool whole = d % ROW_CHANNELS == 0 && a.d_state == few_states::STATES &&
                 rows_aligned(a.x, a.x_stride, a.act) && rows_aligned(a.dt, a.dt_stride, a.act) &&
                 rows_aligned(a.z, a.z_stride, a.act) && rows_aligned(a.dy, a.dy_stride, a.act) &&
                 rows_aligned(a.b, a.b_stride, a.act) && rows_aligned(a.c, a.c_stride, a.act) &&
                 rows_aligned(a.dx, a.dx_stride, a.act) && rows_aligned(a.ddt, a.ddt_stride, a.act) &&
                 rows_aligned(a.dz, a.dz_stride, a.act) &&
                 (a.y == NULL || rows_aligned(a.y, a.y_stride, a.act));
    struct scan_spans spans;
    status = scan_spans_make(device, a.seq_starts, a.n_seqs, d, &spans);
    if (status != KERNEL_OK)
        return status;
    struct layout l = layout_of(a.tokens, d, a.d_state, spans.n_spans);
    if (d > 0)
        CUDA_WITH_TYPE(a.act, T, status = launch_shaped<T>(device, a, spans, l, whole));
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
