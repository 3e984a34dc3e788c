/* scan_tile.cuh: tokens of a scan on their way through shared memory. A block walks through a span a tile of tokens at a
 * time; while it computes on one tile, the next one is copied. */
#ifndef KERNELS_CUDA_SCAN_TILE_CUH
#define KERNELS_CUDA_SCAN_TILE_CUH

#include <cuda_pipeline.h>

#include "kernels/cuda/scan.cuh"

/* S states of C neighbouring channels in a thread, L lanes a channel, in blocks of T threads, B of them on a
 * multiprocessor, and tiles of K tokens. Neighbouring channels share what is read of B and C; more lanes a channel make
 * more warps, and every lane makes its part of what is needed once a token and channel. */
template <int S, int L, int C, int T, int B, int K> struct tile_shape {
    enum {
        LANE_STATES = S,
        LANE_CHANNELS = C,
        LANES = L,
        THREADS = T,
        BLOCKS = B,
        TILE = K,
        STATES = S * L,
        LANE_STEP = WARP / L, /* between the lanes of a channel */
        WARP_CHANNELS = LANE_STEP * C,
        CHANNELS = T / WARP * WARP_CHANNELS,
    };
};

/* A token as the states' recurrence takes it: of a thread's channels, delta and delta x. */
template <int CH> struct alignas(8 * CH) scaled {
    float delta[CH], u[CH];
};

/* A piece of a row: 16 bytes that are copied by themselves, or an element that the thread moves. */
template <bool WHOLE, typename T>
static __device__ __forceinline__ void copy_piece(T *to, const T *from, bool inside)
{
    if constexpr (WHOLE)
        __pipeline_memcpy_async(to, from, 16, inside ? 0 : 16);
    else
        *to = inside ? *from : from_float<T>(0.0f);
}

/* Rows of ARRAYS matrices of the tile's tokens and the block's channels, as they are in memory. The lanes of a channel
 * read different rows at the same time, so that rows are shifted against each other. */
template <typename T, typename SHAPE, int ARRAYS> struct alignas(16) row_tile {
    T v[ARRAYS][SHAPE::TILE][SHAPE::CHANNELS];
    T behind[SHAPE::LANES]
            [SHAPE::CHANNELS]; /* what a turn that looks beyond the tile reads; nobody writes it */

    static __device__ __forceinline__ int column(int row, int channel)
    {
        return channel ^ row % SHAPE::LANES * SHAPE::WARP_CHANNELS;
    }
};

/* A thread's part in filling row_tiles: pieces of every ROWS-th row. */
template <typename T, typename SHAPE, int ARRAYS, bool WHOLE> struct row_copier {
    enum {
        PIECE = WHOLE ? 16 / (int)sizeof(T) : 1,
        PIECES = SHAPE::CHANNELS / PIECE, /* of a row */
        ROWS = SHAPE::THREADS / PIECES > 0 ? SHAPE::THREADS / PIECES : 1,
        TURNS = SHAPE::THREADS / PIECES > 0 ? 1 : PIECES / SHAPE::THREADS, /* to a row */
    };
    static_assert((PIECES % SHAPE::THREADS == 0 || SHAPE::THREADS % PIECES == 0) && SHAPE::TILE % ROWS == 0 &&
                      ROWS % SHAPE::LANES == 0,
                  "whole rows");
    const T *next[ARRAYS];
    int64_t stride[ARRAYS];
    int first, channel, n; /* n: channels from `channel` on */

    /* n_channels: from the block's first on. */
    __device__ __forceinline__ row_copier(int64_t n_channels)
        : first(threadIdx.x / PIECES), channel(threadIdx.x % PIECES * PIECE),
          n((int)min(n_channels, (int64_t)SHAPE::CHANNELS) - channel)
    {
    }
    __device__ __forceinline__ void begin(int which, const void *rows, int64_t row_stride)
    {
        stride[which] = row_stride;
        next[which] = (const T *)rows + first * row_stride + channel;
    }
    /* The next tile, of which `left` tokens are there; zeros beyond. */
    __device__ __forceinline__ void copy(struct row_tile<T, SHAPE, ARRAYS> *tile, int left)
    {
        left -= first;
#pragma unroll
        for (int which = 0; which < ARRAYS; which++) {
#pragma unroll
            for (int row = 0; row < SHAPE::TILE; row += ROWS) {
#pragma unroll
                for (int turn = 0; turn < TURNS; turn++) {
                    int shift = turn * SHAPE::THREADS * PIECE;
                    copy_piece<WHOLE>(&tile->v[which][first + row][tile->column(first, channel + shift)],
                                      next[which] + shift, row < left && shift < n);
                }
                next[which] += ROWS * stride[which];
            }
        }
    }
};

/* MATRICES = 2: B and C, or one of them, of a tile's tokens: in floats, and as they are in memory. */
template <typename T, typename SHAPE, int MATRICES> struct alignas(16) state_tile {
    enum { FOURS = MATRICES * SHAPE::STATES / 4 }; /* of a token */
    float v[SHAPE::TILE][MATRICES * SHAPE::STATES];
    struct several<T, 4> raw[SHAPE::TILE][FOURS];
};

/* A thread's part in filling state_tiles: four neighbouring values of every ROWS-th token. WHOLE: d_state is STATES, and
 * rows are aligned. */
template <typename T, typename SHAPE, int MATRICES, bool WHOLE> struct state_copier {
    using tile_type = struct state_tile<T, SHAPE, MATRICES>;
    enum {
        FOURS = tile_type::FOURS,
        ROWS = SHAPE::THREADS / FOURS < SHAPE::TILE ? SHAPE::THREADS / FOURS : SHAPE::TILE,
    };
    static_assert(SHAPE::THREADS % FOURS == 0 && SHAPE::TILE % ROWS == 0, "whole rows");
    const T *next;
    int64_t stride;
    int first, four, n; /* states from its first on */

    __device__ __forceinline__ state_copier(const void *b, int64_t b_stride, const void *c, int64_t c_stride,
                                            int64_t d_state)
        : first(threadIdx.x / FOURS), four(threadIdx.x % FOURS)
    {
        bool is_c = four * 4 >= SHAPE::STATES;
        int at = four * 4 % SHAPE::STATES;
        stride = is_c ? c_stride : b_stride;
        next = (const T *)(is_c ? c : b) + first * stride + at;
        n = (int)d_state - at;
    }
    __device__ __forceinline__ void copy(tile_type *tile, int left)
    {
        left -= first;
        if (first < ROWS)
#pragma unroll
            for (int row = 0; row < SHAPE::TILE; row += ROWS, next += ROWS * stride) {
                struct several<T, 4> *to = &tile->raw[first + row][four];
                if constexpr (WHOLE)
                    __pipeline_memcpy_async(to, next, sizeof *to, row < left ? 0 : sizeof *to);
                else
                    *to = load_several<4, false>(next, row < left ? n : 0);
            }
    }
    /* Of the thread's own values, once they are there. */
    __device__ __forceinline__ void convert(tile_type *tile) const
    {
        if (first < ROWS)
#pragma unroll
            for (int row = 0; row < SHAPE::TILE; row += ROWS) {
                float out[4];
                unpack(tile->raw[first + row][four], out);
                *reinterpret_cast<float4 *>(&tile->v[first + row][four * 4]) =
                    make_float4(out[0], out[1], out[2], out[3]);
            }
    }
};

#endif
