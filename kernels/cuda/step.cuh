/* step.cuh: inside of mamba_step: what its kernels are handed, and how each is launched.
 *
 * One token of up to STEP_ROWS sequences is a chain of four kernels a layer, each as short as reading its weights:
 *
 *   embed     r = embedding(ids), h = r * norm                        once
 *   in_proj   x | z = rstd(r) * h in_proj^T; xc = silu(conv(x))       ┐
 *   x_proj    x_dbl = xc x_proj^T                                     │ of
 *   scan      dt = x_dbl dt_proj^T, the state's step, y = . silu(z)   │ each layer
 *   out_proj  r += y out_proj^T, h = r * the next norm                ┘
 *   head      logits = rstd(r) * h head^T                             once
 *
 * A row's 1/rms only scales, so it is applied behind the product whose input it belongs to: out_proj writes sums of
 * squares of its part of the rows, and whoever needs 1/rms adds them. The adapters' x A^T come about in the same way,
 * part by part where x is made, and are added up where B multiplies them; no pass over the activations is their own.
 *
 * The chain runs by programmatic dependent launch: a kernel starts while those before it still run, loads what no
 * kernel of the chain writes (weights, its sequences' states), and then waits for the one before it. Since every kernel
 * waits before it writes or reads anything else, all is ordered as if one kernel ran after the other. */
#ifndef KERNELS_CUDA_STEP_CUH
#define KERNELS_CUDA_STEP_CUH

#include "kernels/cuda/common.cuh"

enum {
    STEP_ROWS = 8,      /* most rows of one step; more are step_wide.cuh's */
    STEP_ADAPTERS = 16, /* most different adapters in one step */
    STEP_RANK = 64,     /* highest rank */
    STEP_AHEAD = 16,    /* highest rank of the adapter whose factors a kernel loads before it waits */
    STEP_STATE = 16,    /* d_state */
    STEP_CONV = 4,      /* d_conv */
    STEP_DT_RANK = 256, /* highest dt_rank */
    STEP_THREADS = 256,
    STEP_SCAN_CHANNELS = 32, /* of one block of the scan */
};

typedef __nv_bfloat16 step_type; /* of weights, and of what the tensor cores multiply with them */

/* What changes from step to step. */
struct step_header {
    int32_t rows;
    int32_t rank; /* the highest of the adapters */
    int32_t main; /* the adapter whose factors are worth having ahead, or -1 */
    int32_t ids[STEP_ROWS], slots[STEP_ROWS], adapters[STEP_ROWS]; /* adapters: -1 = none */
};

/* One adapter on one layer; behind the layers', the one on the embeddings, as `in`. */
enum step_target { STEP_IN, STEP_X, STEP_DT, STEP_OUT, STEP_TARGETS };
struct step_lora {
    const float *a[STEP_TARGETS], *b[STEP_TARGETS];
    int rank;
    float scale;
};

/* Sums over a row that several blocks make parts of: [part][STEP_ROWS], or for x A^T [part][STEP_ROWS][STEP_RANK]. */
struct step_parts {
    float *values;
    int count;
};

enum step_mode { STEP_MODE_IN, STEP_MODE_X, STEP_MODE_OUT, STEP_MODE_HEAD };

struct step_linear {
    const struct step_header *header;
    const step_type *weight; /* [m,k] */
    const step_type *x;      /* [STEP_ROWS,k] */
    const float *bias;       /* [m] or NULL */
    int m, k;
    int tiles;  /* of outputs */
    int splits; /* of k, a block each: the cluster; step_launch_linear sets these three */
    int ahead;  /* where in shared memory that begins */
    bool first; /* of the chain: the header is not there before the wait */
    float eps;
    struct step_parts squares;         /* IN, HEAD: of r */
    const struct step_lora *lora;      /* [STEP_ADAPTERS] of this layer, or NULL */
    struct step_parts u;               /* x A^T */
    const struct step_lora *next_lora; /* of the layer of the next product */
    struct step_parts next_u;          /* out: this one's results times that one's A */
    /* IN */
    int inner;
    const float *conv, *conv_bias;
    float *states; /* of this layer: [slot][STEP_CONV-1][inner] */
    int64_t slot_stride;
    step_type *xc; /* [STEP_ROWS,inner] */
    float *z;      /* [STEP_ROWS,inner] */
    /* X, HEAD */
    float *y; /* [rows,m] */
    /* OUT; HEAD reads r and norm */
    float *r;                       /* [STEP_ROWS,m] (HEAD: k) */
    const float *norm;              /* [m]: the norm behind (HEAD: norm_f) */
    step_type *h;                   /* [STEP_ROWS,m] */
    struct step_parts next_squares; /* out */
    step_type *hidden;              /* HEAD, out: [rows,k] */
};

struct step_embed {
    const struct step_header *from; /* pinned host memory */
    struct step_header *header;
    const step_type *table;
    int d;
    int64_t vocab;
    const float *norm;
    const struct step_lora *lora; /* the embeddings', or NULL */
    const struct step_lora *next_lora;
    float *r;
    step_type *h;
    struct step_parts next_squares, next_u; /* one part */
};

struct step_scan {
    const struct step_header *header;
    int inner, rank, width; /* width: of x_dbl */
    const step_type *dt_proj;
    const float *a, *d, *dt_bias;
    float *states; /* of this layer: [slot][STEP_STATE][inner] */
    int64_t slot_stride;
    const step_type *xc;
    const float *x_dbl, *z;
    step_type *y;
    const struct step_lora *lora;
    struct step_parts next_u;
};

/* ---- one row: the whole step in one kernel, step_one.cu ---- */

enum {
    STEP_ONE_TILES = 8,    /* of 8 ranks: most of the adapter */
    STEP_ONE_BLOCKS = 160, /* most */
};

/* Bytes from the beginning of shared memory, in front of which weights pass through. */
struct step_one_room {
    int x, sums, x_dbl, own_x, own_z, own_y, own_h, u;
};

struct step_one {
    int rank, layers, vocab, id; /* rank: of dt */
    uint32_t tag; /* of the first layer; those above, one for each layer, are this step's too */
    float eps;
    int lora_rank, u_tiles[STEP_TARGETS]; /* 0 without an adapter; 0 where it is not on these matrices */
    float lora_scale;
    const struct step_lora *lora;         /* in the table's first row */
    const struct mamba_step_layer *layer; /* [layers], device memory */
    const void *embedding, *head;
    const float *norm_f;
    float *states;  /* the slot's */
    uint64_t *mail; /* zeroed before the first step, and nobody else's */
    step_type *hidden;
    float *logits;
    /* step_launch_one sets these */
    int ring; /* stages of weights */
    struct step_one_room room;
    /* Of the mail; of h, xc, y and the u two values in a word, u in parts of blocks. */
    uint64_t *h, *squares, *xc, *x_dbl, *y, *u_in, *u_out;
};

/* Bytes of mail. */
int64_t step_one_mail(const struct mamba_step_args *a);
/* KERNEL_UNSUPPORTED, and nothing done, where the sizes do not suit. */
int step_launch_one(struct kernel_device *device, struct step_one *p, int64_t d_model, int64_t d_inner);

int step_launch_embed(struct kernel_device *device, const struct step_embed *p);
int step_launch_linear(struct kernel_device *device, enum step_mode mode, struct step_linear *p);
int step_launch_scan(struct kernel_device *device, const struct step_scan *p);
/* How many parts a product of that mode with m outputs makes. */
int step_linear_tiles(enum step_mode mode, int64_t m);

/* ---- for the kernels ---- */

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define STEP_HOPPER 0 /* kernels without bodies, which mamba_step does not launch */
#pragma nv_diag_suppress 177
#else
#define STEP_HOPPER 1
#endif

/* The kernel behind may start. */
static __device__ __forceinline__ void step_release(void)
{
#if STEP_HOPPER
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* All that the kernels before wrote is there. */
static __device__ __forceinline__ void step_wait(void)
{
#if STEP_HOPPER
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* 16 bytes of a weight, which nobody reads again soon. */
static __device__ __forceinline__ uint4 step_load_weight(const step_type *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* 16 bytes on their way to shared memory, where they are after step_copies_wait() and a barrier. */
static __device__ __forceinline__ void step_copy(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from)
                 : "memory");
}

/* `count` floats, a multiple of 4, by the threads i of n. */
static __device__ __forceinline__ void step_copy_floats(float *to, const float *from, int count, int i, int n)
{
    for (int at = i * 4; at < count; at += n * 4)
        step_copy(to + at, from + at);
}

static __device__ __forceinline__ void step_copies_wait(void)
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* c[16,8] += a[16,16] b[16,8] in fp32. Lane 4 g + q has rows g and g + 8 of a and column g of b. Which elements of k
 * are called which does not matter as long as a and b agree: here a lane's are consecutive in memory. */
static __device__ __forceinline__ void step_multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                     uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* 32 elements of k: two rows of weights, one column. */
static __device__ __forceinline__ void step_multiply_32(float (&c)[4], uint4 upper, uint4 lower, uint4 x)
{
    step_multiply(c, upper.x, lower.x, upper.y, lower.y, x.x, x.y);
    step_multiply(c, upper.z, lower.z, upper.w, lower.w, x.z, x.w);
}

static __device__ __forceinline__ float step_dot(const float *a, const float *b, int n)
{
    float sum = 0.0f;
    if (n % 4 == 0) {
#pragma unroll 2
        for (int j = 0; j < n; j += 4) {
            float4 v = *reinterpret_cast<const float4 *>(a + j);
            sum += v.x * b[j] + v.y * b[j + 1] + v.z * b[j + 2] + v.w * b[j + 3];
        }
        return sum;
    }
    for (int j = 0; j < n; j++)
        sum += a[j] * b[j];
    return sum;
}

/* A launch that may begin before the one in front of it ends. */
template <typename Kernel, typename Params>
static inline int step_launch(struct kernel_device *device, Kernel kernel, dim3 grid, int threads,
                              size_t shared, int cluster, bool chained, const Params &params)
{
    cudaLaunchAttribute attributes[2];
    int n = 0;
    if (chained) {
        attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[n++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[n].id = cudaLaunchAttributeClusterDimension;
        attributes[n].val.clusterDim.x = (unsigned)cluster;
        attributes[n].val.clusterDim.y = 1;
        attributes[n++].val.clusterDim.z = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = device->stream;
    config.attrs = attributes;
    config.numAttrs = (unsigned)n;
    return cuda_check(device, cudaLaunchKernelEx(&config, kernel, params));
}

#endif
