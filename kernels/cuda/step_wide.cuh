/* step_wide.cuh: inside of mamba_step where there are many rows: more than 8, up to STEP_WIDE_ROWS.
 *
 * The chain of step.cuh with kernels of other shapes: with 64 rows a product is no longer reading its weights alone, so
 * the copy engine brings weights and rows and the matrix product of a warpgroup multiplies them; a block of the scan
 * copies its sequences' states to shared memory long before its turn. Rows are taken 64 at a time. */
#ifndef KERNELS_CUDA_STEP_WIDE_CUH
#define KERNELS_CUDA_STEP_WIDE_CUH

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/step.cuh"

enum {
    STEP_WIDE_ROWS = 256,
    STEP_WIDE_GROUP = 64, /* most rows of a block of a product */
    STEP_WIDE_SHARED = 8, /* highest rank of an adapter that all rows share */
};

/* What a chain is captured for. Where all rows have the same adapter, of a low rank, it is a part of the products: its A
 * lies beside the rows in bf16, brought there as the chain begins, and x A^T comes about with x W^T, a cluster's sums of
 * it as well. Otherwise each row looks for its own. */
enum step_adapted { STEP_PLAIN, STEP_MIXED, STEP_SHARED };

struct step_wide_header {
    int32_t rows, rank, main; /* as step_header */
    int32_t ids[STEP_WIDE_ROWS], slots[STEP_WIDE_ROWS], adapters[STEP_WIDE_ROWS];
};

/* Sums over a row in parts: [part][rows], or [part][rows][STEP_RANK]. Arrays of rows have room for `rows` of them. */
struct step_wide_linear {
    CUtensorMap weight, x, a; /* [m,k], [rows,k], [STEP_WIDE_SHARED,k]: the shared adapter's A */
    enum step_adapted adapted;
    const struct step_wide_header *header;
    int rows, m, k;
    /* Set by step_wide_launch_linear. */
    int splits, stages;
    int own,
        owner_scale; /* rows that each block of a cluster finishes; row * owner_scale >> 16 is whose a row is */
    int parts, u_parts, factors; /* where in shared memory these begin */
    bool first;                  /* of the chain: the header is not there before the wait */
    float eps;
    const float *bias;                        /* [m] or NULL */
    const struct step_lora *lora, *next_lora; /* STEP_SHARED: no next_lora */
    struct step_parts squares, u, next_squares, next_u;
    /* IN */
    int inner;
    const float *conv, *conv_bias;
    float *states; /* of this layer: [slot][STEP_CONV-1][inner] */
    int64_t slot_stride;
    step_type *xc;
    float *z;
    /* X, HEAD */
    float *y; /* [rows,m] */
    /* OUT; HEAD reads r and writes the hidden states to h */
    float *r;
    const float *norm;
    step_type *h;
};

struct step_wide_embed {
    const struct step_wide_header *from; /* pinned host memory */
    struct step_wide_header *header;
    const step_type *table;
    int d;
    int64_t vocab;
    const float *norm;
    const struct step_lora *lora, *next_lora;
    float *r;
    step_type *h;
    struct step_parts next_squares, next_u; /* one part */
    int rows;
    /* STEP_SHARED: where A goes, and from where; see step_wide_factors. */
    step_type *factors; /* or NULL */
    const struct step_lora *layers_lora;
    int inner, layers;
};

struct step_wide_scan {
    const struct step_wide_header *header;
    int rows, inner, rank, width;
    const step_type *dt_proj;
    const float *a, *d, *dt_bias;
    float *states;
    int64_t slot_stride;
    const step_type *xc;
    const float *x_dbl, *z;
    step_type *y;
    const struct step_lora *lora;
    enum step_adapted adapted;
    struct step_parts next_u; /* STEP_MIXED */
    /* What the kernel behind reads: brought to the second-level cache when this one has nothing more to read. */
    const void *ahead;
    int64_t ahead_bytes;
};

/* A chain: what emits it is handed. */
struct step_wide {
    const struct mamba_step_args *args;
    const struct step_wide_header *from; /* pinned */
    const struct step_lora *table;       /* [n_layers+1][STEP_ADAPTERS] or NULL */
    void *workspace;
    int rows; /* room for so many: 16, 32, 64, 128 or 256 */
    enum step_adapted adapted;
};

int64_t step_wide_workspace(const struct mamba_step_args *a);
int step_wide_emit(struct kernel_device *device, const struct step_wide *chain);
int step_wide_launch_embed(struct kernel_device *device, const struct step_wide_embed *p);
int step_wide_launch_linear(struct kernel_device *device, enum step_mode mode, struct step_wide_linear *p);
int step_wide_launch_head(struct kernel_device *device, struct step_wide_linear *p);
int step_wide_launch_scan(struct kernel_device *device, const struct step_wide_scan *p);
/* A block of a product of that mode, of [m,k] and so many rows: its outputs and rows. */
int step_wide_linear_outputs(enum step_mode mode, int64_t m, int64_t k, int rows);
int step_wide_linear_rows(enum step_mode mode, int64_t m, int64_t k, int rows);
/* The parts of a row's sums that the scan makes. */
int step_wide_scan_parts(int64_t inner);

/* Where among the factors a layer's A of in_proj, x_proj or out_proj begins; as many elements as all take for target
 * STEP_IN of the layer behind the last. Rows beyond the rank are zeros. */
static __host__ __device__ inline int64_t step_wide_factors(int64_t d, int64_t inner, int64_t layer,
                                                            int target)
{
    return STEP_WIDE_SHARED * (layer * (d + 2 * inner) + (target == STEP_IN  ? 0
                                                          : target == STEP_X ? d
                                                                             : d + inner));
}

/* ---- for the kernels ---- */

/* The sums of 8 values each over LANES lanes: of value number scattered_index() on every lane. */
template <int LANES> static __device__ __forceinline__ float scatter_sum(const float (&v)[8])
{
    const int lane = threadIdx.x % LANES;
    float four[4], two[2];
    bool upper = lane & LANES / 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
        four[i] =
            (upper ? v[4 + i] : v[i]) + __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[4 + i], LANES / 2);
    upper = lane & LANES / 4;
#pragma unroll
    for (int i = 0; i < 2; i++)
        two[i] = (upper ? four[2 + i] : four[i]) +
                 __shfl_xor_sync(0xffffffffu, upper ? four[i] : four[2 + i], LANES / 4);
    upper = lane & LANES / 8;
    float sum = (upper ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, upper ? two[0] : two[1], LANES / 8);
#pragma unroll
    for (int step = LANES / 16; step > 0; step /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}
template <int LANES> static __device__ __forceinline__ int scattered_index(void)
{
    return (int)threadIdx.x % LANES / (LANES / 8);
}

#endif
