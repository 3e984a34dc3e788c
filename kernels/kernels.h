/* kernels.h: every operation the engine asks of a device, as one table per backend.
 *
 * One operation = one contract here, two implementations: kernels/cpu/X.c and kernels/cuda/X.cu. This header
 * includes nothing of the project and knows nothing of models, files or jobs. Keep it narrow.
 *
 * Conventions
 *   - Tokens of all sequences lie back to back ("ragged", no padding anywhere): T rows in all, sequence s
 *     owns rows seq_starts[s] .. seq_starts[s+1]-1 (int32, n_seqs + 1 entries, first 0, last T; host
 *     memory). Recurrent ops start each sequence from its own initial state and never look across a
 *     boundary. A batch with one document a row and a packed batch are the same thing here.
 *   - Row-major, channels last. A `_stride` is the distance between rows in elements, so that a slice of
 *     a wider matrix (x and z inside xz, dt|B|C inside x_dbl) is passed without a copy.
 *   - Storage types: weights are F32, BF16 or F16 as their `_type` says. Activations have the type of
 *     `act` (the CPU backend takes F32 alone and answers KERNEL_UNSUPPORTED otherwise). Norm weights, A,
 *     D, dt bias, adapters' master copies, gradients, recurrent state and every reduction are fp32
 *     always.
 *   - "accumulates" = adds to what is there; all other outputs are overwritten. An output pointer that is
 *     documented "or NULL" is skipped when NULL.
 *   - An op queues work on the device's stream and returns a status; it never exits, logs or allocates.
 *     On the CPU the work is done on return. Results do not depend on the number of threads, bit for bit:
 *     reductions run in a fixed order over fixed partitions.
 *   - Workspace: ops that need scratch proportional to the problem take it from the caller (`workspace`,
 *     whose size the sibling *_workspace function tells: never less for more rows or sequences). */
#ifndef KERNELS_KERNELS_H
#define KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum kernel_status {
    KERNEL_OK = 0,
    KERNEL_INVALID = -1,     /* arguments that cannot be right (a bug of the caller) */
    KERNEL_UNSUPPORTED = -2, /* type, size or alignment this backend does not do */
    KERNEL_NO_MEMORY = -3,
    KERNEL_DEVICE_LOST = -4, /* sticky: every later call returns it */
};

enum kernel_type { TYPE_F32, TYPE_BF16, TYPE_F16, TYPE_I32 };

/* Bytes of one element. */
size_t kernel_type_size(enum kernel_type type);
/* "float32", "bfloat16" ...; never NULL. */
const char *kernel_type_name(enum kernel_type type);
/* What a status means, for an error message; never NULL. */
const char *kernel_status_text(int status);

/* An open device: its stream, its threads, its own small scratch. Opaque; one owner thread at a time. */
struct kernel_device;
/* Ops with their arguments, to be queued again; see record_begin. */
struct kernel_recording;

struct kernel_device_info {
    char name[128];      /* "cpu (AVX-512, 2 threads)" */
    int64_t total_bytes; /* memory of the device, or of the host for the CPU */
    int64_t free_bytes;
    int64_t allocated_bytes; /* by this device now: memory_alloc's and what its ops keep */
    int64_t peak_bytes;      /* the most that allocated_bytes has been since it opened or device_reset_peak */
    int threads;             /* CPU threads, 1 on a GPU */
    bool is_host;            /* device pointers are host pointers */
};

/* ---- linear algebra ---- */

/* C[M,N] = alpha * op(A) op(B) + beta * C. op(A) is [M,K], op(B) is [K,N].
 * A linear layer y = x W^T with W [out,in]: A = x, B = W, transpose_b. Its input gradient: A = dy, B = W. Its
 * weight gradient: A = dy, transpose_a, B = x, beta = 1, C in fp32 whatever the activations are. A has type
 * `act`, B b_type, C c_type (F32, or `act`). Sums are fp32. beta 0 ignores C's content. */
struct gemm_args {
    int64_t m, n, k;
    bool transpose_a, transpose_b;
    float alpha, beta;
    const void *a; /* [M,K], or [K,M] when transpose_a */
    int64_t a_stride;
    const void *b; /* [K,N], or [N,K] when transpose_b */
    int64_t b_stride;
    void *c; /* [M,N] */
    int64_t c_stride;
    enum kernel_type act, b_type, c_type;
    bool tf32; /* F32 operands may be rounded to TF32's 10 bits of mantissa; the CPU does not */
};

/* Low-rank path of one linear layer alone, for rows with an adapter of their own among others: y += scale *
 * (dropout(x) A^T) B^T, accumulating into y, which already holds x W^T. Source: Hu et al. 2021, eq. 3. Dropout as in
 * linear_layer. */
struct lora_forward_args {
    int64_t rows, in, out, rank;
    const void *x; /* [rows,in] */
    int64_t x_stride;
    const float *a; /* [rank,in] */
    const float *b; /* [out,rank] */
    float scale;
    float dropout; /* 0 = none */
    uint64_t seed, offset;
    float *u; /* [rows,rank] scratch: dropout(x) A^T */
    void *y;  /* [rows,out], accumulates */
    int64_t y_stride;
    enum kernel_type act;
};

/* One linear layer with whatever adapts it (Hu et al. 2021, eq. 3):
 *   y = x W^T + bias + scale * (dropout(x) A^T) B^T
 * Dropout keeps an element with probability 1 - p and divides by 1 - p; its mask is philox_uniform(seed, offset
 * + row * in + column) >= p, so it can be replayed in the backward and after a restart. */
struct linear_layer {
    int64_t in, out;
    const void *weight; /* [out,in] */
    enum kernel_type weight_type;
    const float *bias;  /* [out] or NULL */
    int64_t rank;       /* 0: no adapter, and the rest is not read */
    const float *a, *b; /* [rank,in] and [out,rank] */
    float scale, dropout;
    uint64_t seed, offset;
};
struct linear_forward_args {
    struct linear_layer layer;
    int64_t rows;
    const void *x; /* [rows,in] */
    int64_t x_stride;
    void *u; /* [rows,rank] out: dropout(x) A^T, kept for the backward */
    void *y; /* [rows,out] */
    int64_t y_stride;
    enum kernel_type act; /* of x, u and y */
    bool tf32;
    void *workspace;
};
struct linear_backward_args {
    struct linear_layer layer;
    int64_t rows;
    const void *x; /* [rows,in]; read for the gradients of weights and adapter alone */
    int64_t x_stride;
    const void *dy; /* [rows,out] */
    int64_t dy_stride;
    const void *u; /* from the forward */
    /* [rows,rank] or NULL. For a backward in two calls, where x is not there yet when dx is wanted: the first, without da,
     * leaves here what the second, with da but without db and dx, goes on with. */
    void *du;
    void *dx; /* [rows,in] or NULL */
    int64_t dx_stride;
    bool accumulate; /* dx += instead of = */
    float *dweight;  /* [out,in] accumulates, or NULL */
    bool overwrite;  /* dweight = instead of += */
    float *dbias;    /* [out] accumulates, or NULL */
    float *da, *db;  /* as A and B, accumulate; both NULL or neither where there is no du */
    enum kernel_type act;
    bool tf32;
    void *workspace;
};

/* ---- token embedding ---- */

/* y[t] = table[ids[t]] (+ scale * B A[:,ids[t]] when lora_a is not NULL). */
struct embedding_forward_args {
    int64_t tokens, vocab, d_model;
    const int32_t *ids; /* [tokens], device memory, each in 0..vocab-1 (checked by the caller) */
    const void *table;  /* [vocab,d_model] */
    enum kernel_type table_type, act;
    int64_t rank;
    const float *lora_a; /* [rank,vocab] or NULL */
    const float *lora_b; /* [d_model,rank] */
    float scale;
    void *y; /* [tokens,d_model] */
};
/* Scatter-add in token order (deterministic). Each output accumulates, or NULL. */
struct embedding_backward_args {
    int64_t tokens, vocab, d_model;
    const int32_t *ids;
    const void *dy; /* [tokens,d_model] */
    enum kernel_type act;
    float *dtable; /* [vocab,d_model] or NULL */
    int64_t rank;
    const float *lora_a, *lora_b;
    float scale;
    float *da; /* [rank,vocab] or NULL */
    float *db; /* [d_model,rank] or NULL */
};

/* ---- RMSNorm with residual ---- */

/* r = residual + x (one of them may be NULL); y = r / sqrt(mean(r^2) + eps) * weight. The residual stream is fp32
 * always. residual_out may be residual (in place).
 * With `kept`, y and rstd are of r as `act` holds it, which is what is kept: half the memory of the stream, and the
 * backward, or this op once more on x = kept alone, sees to the bit what the forward saw. */
struct rmsnorm_forward_args {
    int64_t rows, d;
    const void *x;         /* [rows,d] or NULL */
    const float *residual; /* [rows,d] or NULL */
    const float *weight;   /* [d] */
    float eps;
    float *residual_out; /* [rows,d]: r; NULL where residual is NULL */
    void *kept;          /* [rows,d]: r, rounded; or NULL */
    void *y;             /* [rows,d] */
    float *rstd;         /* [rows], kept for the backward, or NULL */
    enum kernel_type act;
};
/* Given dy and the gradient that reached r from later layers (dresidual, in), overwrite dresidual in place
 * with the gradient of r; the caller hands the same values to both x and residual, whose gradients are equal.
 */
struct rmsnorm_backward_args {
    int64_t rows, d;
    const void *dy;    /* [rows,d] */
    const void *r;     /* [rows,d]: kept of the forward, or its residual_out where act is F32 */
    const float *rstd; /* [rows] */
    const float *weight;
    float *dresidual; /* [rows,d] in and out */
    void *dx;         /* [rows,d]: dresidual once more, rounded, for x; or NULL; may be dy (in place) */
    float *dweight;   /* [d] accumulates, or NULL */
    void *workspace;
    enum kernel_type act;
};

/* ---- causal depthwise convolution + SiLU ---- */

/* Recurrent state lives in a pool of equal slots: the state of sequence s for this layer begins at
 * pool + slots[s] * slot_stride (fp32 elements). slots NULL with pool not NULL means slots[s] = s. A slot below 0 is none: that
 * sequence starts from zero (in), or its state is not kept (out). Several sequences may start from one slot, but a slot that one of
 * them is kept in is read by no other. */
struct state_view {
    float *pool; /* NULL: no slots at all */
    int64_t slot_stride;
    const int32_t *slots; /* [n_seqs], host memory */
};

/* y[t,c] = silu(bias[c] + sum_{k<width} weight[c,k] x[t-width+1+k, c]), inputs before the sequence's start
 * from the state. State layout: [width-1][channels], oldest input first. */
struct conv_forward_args {
    int64_t tokens, channels, width;
    int32_t n_seqs;
    const int32_t *seq_starts; /* [n_seqs+1] */
    const void *x;             /* [tokens,channels] */
    int64_t x_stride;
    const float *weight;              /* [channels,width] */
    const float *bias;                /* [channels] or NULL */
    struct state_view initial, final; /* may be the same pool */
    void *y;                          /* [tokens,channels] */
    int64_t y_stride;
    enum kernel_type act;
};
/* Initial states are zero in training. Recomputes the pre-activation. */
struct conv_backward_args {
    int64_t tokens, channels, width;
    int32_t n_seqs;
    const int32_t *seq_starts;
    const void *x;
    int64_t x_stride;
    const float *weight, *bias;
    const void *dy; /* [tokens,channels] */
    int64_t dy_stride;
    void *dx; /* [tokens,channels] */
    int64_t dx_stride;
    float *dweight; /* [channels,width] accumulates, or NULL */
    float *dbias;   /* [channels] accumulates, or NULL */
    enum kernel_type act;
};

/* ---- Mamba-1 selective scan ---- */

/* Gu and Dao 2023, algorithm 2, with dt's softplus, the D skip and the z gate fused:
 *   delta[t,c] = softplus(dt[t,c] + dt_bias[c])
 *   h[t,n,c]   = exp(delta * A[n,c]) h[t-1,n,c] + delta * B[t,n] * x[t,c]
 *   y[t,c]     = (sum_n C[t,n] h[t,n,c] + D[c] x[t,c]) * silu(z[t,c])
 * softplus(v) = v for v > 20, log1p(exp(v)) otherwise. A = -exp(A_log), transposed to [d_state,channels].
 * State layout: [d_state][channels]. chunk_states keeps the state at the start of every SCAN_CHUNK tokens of
 * every sequence for the backward: for sequence s, chunk j at index (sum over earlier sequences of their
 * chunk counts) + j, each [d_state][channels]; scan_chunk_count() tells how many there are. */
enum { SCAN_CHUNK = 64 };
struct scan_forward_args {
    int64_t tokens, channels, d_state;
    int32_t n_seqs;
    const int32_t *seq_starts;
    const void *x; /* [tokens,channels]: the convolution's output */
    int64_t x_stride;
    const void *dt; /* [tokens,channels]: dt_proj's output without its bias */
    int64_t dt_stride;
    const float *a;    /* [d_state,channels], negative */
    const void *b, *c; /* [tokens,d_state] */
    int64_t b_stride, c_stride;
    const float *d;       /* [channels] */
    const float *dt_bias; /* [channels] */
    const void *z;        /* [tokens,channels] */
    int64_t z_stride;
    struct state_view initial, final;
    float *chunk_states; /* or NULL */
    void *y;             /* [tokens,channels] */
    int64_t y_stride;
    enum kernel_type act;
};
/* Initial states zero. Recomputes h from chunk_states; nothing of size T x channels x d_state is ever stored. With BF16
 * activations the terms of db and dc may be rounded to 11 bits before they are summed in fp32, as a product of matrices
 * does it. */
struct scan_backward_args {
    int64_t tokens, channels, d_state;
    int32_t n_seqs;
    const int32_t *seq_starts;
    const void *x, *dt, *b, *c, *z;
    int64_t x_stride, dt_stride, b_stride, c_stride, z_stride;
    const float *a, *d, *dt_bias;
    const float *chunk_states;
    const void *dy; /* [tokens,channels] */
    int64_t dy_stride;
    void *dx, *ddt, *dz; /* [tokens,channels] */
    int64_t dx_stride, ddt_stride, dz_stride;
    void *db, *dc; /* [tokens,d_state], strides as given; summed over channels */
    int64_t db_stride, dc_stride;
    float *da_log;   /* [channels,d_state] accumulates (gradient of A_log itself), or NULL */
    float *dd;       /* [channels] accumulates, or NULL */
    float *ddt_bias; /* [channels] accumulates, or NULL */
    void *y;         /* [tokens,channels]: the forward's output once more, or NULL */
    int64_t y_stride;
    void *workspace;
    enum kernel_type act;
};

/* a[n,c] = -exp(a_log[c,n]). */
struct scan_prepare_args {
    int64_t channels, d_state;
    const float *a_log; /* [channels,d_state] */
    float *a;           /* [d_state,channels] */
};

/* ---- one step of Mamba-1 ---- */

/* One token of each of `rows` sequences through a whole model, from ids to logits, as one op: at one token a sequence
 * the ops above are so short that the gaps between them would cost more than they do. The same formulas as theirs, with
 * x_dbl = dt_low | B | C. Backends answer KERNEL_UNSUPPORTED where they have no such path for the types, sizes or rows,
 * and a backend without any leaves mamba_step NULL: then the ops do it. */
struct mamba_step_layer {
    const float *norm;                                 /* [d_model] */
    const void *in_proj, *x_proj, *dt_proj, *out_proj; /* of `type` */
    const float *in_bias, *out_bias;                   /* or NULL */
    const float *conv, *conv_bias;                     /* [d_inner,d_conv], [d_inner] or NULL */
    const float *a, *d, *dt_bias;                      /* as scan_forward's */
};
/* The LoRA factors of one layer, or NULL where it is not adapted. */
struct mamba_step_lora {
    const float *in_a, *in_b, *x_a, *x_b, *dt_a, *dt_b, *out_a, *out_b;
};
struct mamba_step_adapter {
    int64_t rank;
    float scale;
    const float *embed_a, *embed_b;       /* [rank,vocab] and [d_model,rank], or NULL */
    const struct mamba_step_lora *layers; /* [n_layers], host memory */
};
struct mamba_step_args {
    int64_t rows, d_model, d_inner, d_state, d_conv, dt_rank, n_layers, vocab;
    float eps;
    enum kernel_type type;                     /* of the matrices, the embeddings and the head */
    const void *embedding, *head;              /* [vocab,d_model] */
    const float *norm_f;                       /* [d_model] */
    const struct mamba_step_layer *layers;     /* [n_layers], host memory */
    const struct mamba_step_adapter *adapters; /* [n_adapters], host memory */
    int32_t n_adapters;
    const int32_t *ids, *slots;  /* [rows], host memory; each id in 0..vocab-1, all slots different */
    const int32_t *row_adapters; /* [rows], host memory: index of the row's adapter, -1 = none; or NULL */
    float *
        states; /* a slot's, layer after layer: the convolution's [d_conv-1,d_inner], the scan's [d_state,d_inner] */
    int64_t slot_stride;
    void *hidden;  /* [rows,d_model] out, after the final norm, of `type` */
    float *logits; /* [rows,vocab] out */
    void *workspace;
};

/* ---- head, loss, scores ---- */

/* logits = hidden W^T, in row chunks, never [T,vocab] at once. targets[t] < 0: ignored, its outputs are 0.
 * With d_hidden, also the gradient of grad_scale * sum over counted t of -log p(target). grad_scale may be
 * NULL-free zero. */
struct head_args {
    int64_t rows, d_model, vocab;
    const void *hidden; /* [rows,d_model] after the final norm */
    const void *weight; /* [vocab,d_model] */
    enum kernel_type weight_type, act;
    bool tf32;
    const int32_t *targets; /* [rows], device memory */
    float *logprobs;        /* [rows]: log p(target), or NULL */
    int32_t *argmax;        /* [rows] or NULL; ties go to the lowest id. Computed for ignored rows as well */
    int32_t n_top;          /* 0..KERNEL_TOP_MAX */
    int32_t *top_ids;       /* [rows,n_top], descending, ties to the lowest id; or NULL */
    float *top_logprobs;    /* [rows,n_top] */
    double
        *loss_sum; /* one number: accumulates -log p(target) over counted rows, in a fixed order; or NULL */
    int64_t *n_correct; /* one number: accumulates counted rows whose argmax is their target; or NULL */
    void *d_hidden;     /* [rows,d_model] or NULL */
    float *d_weight;    /* [vocab,d_model] accumulates, or NULL */
    float grad_scale;
    void *workspace;
    int64_t workspace_bytes;
};
enum { KERNEL_TOP_MAX = 20 };

/* ---- optimizer ---- */

struct param_slice {
    int64_t count;
    float *param, *m, *v; /* master weights and moments, fp32 */
    float *grad;
    bool keep_grad; /* adamw need not zero it: the next one overwrites it */
    bool decay;     /* weight decay applies (matrices, not norms and biases) */
    void *copy; /* the parameters in the type that passes compute with, written by every update; or NULL */
    enum kernel_type copy_type;
};
/* Loshchilov and Hutter 2019 (decoupled decay), bias-corrected as in Adam. Gradients are multiplied by
 * grad_scale first (1/accumulation x clip). All slices in one call. Zeroes the gradients when it is done, but
 * for those of keep_grad, which it leaves. */
struct adamw_args {
    const struct param_slice *slices; /* host memory */
    int32_t n_slices;
    float lr, beta1, beta2, eps, weight_decay;
    int64_t step; /* 1 for the first */
    float grad_scale;
};
/* *sum = sum of squares over all gradients, in double, in a fixed order. NaN and inf propagate. */
struct grad_norm_args {
    const struct param_slice *slices;
    int32_t n_slices;
    double *sum; /* one number */
};

/* ---- sampling ---- */

struct logit_bias {
    int32_t id;
    float bias;
};
/* One row's way of choosing. Order: repetition, presence and frequency penalties, logit bias, then
 * (temperature > 0) temperature, top-k, top-p, min-p; temperature 0 = the highest adjusted logit, ties to the
 * lowest id. The draw walks the ids that are left in ascending order of id until their running sum of
 * probabilities passes it. */
struct sample_row {
    float temperature;
    int32_t top_k;            /* 0 = off */
    float top_p, min_p;       /* 1 and 0 = off */
    float repetition_penalty; /* 1 = off; over prompt and generated (Keskar 2019) */
    float presence_penalty,
        frequency_penalty;  /* 0 = off; over generated tokens alone, as OpenAI defines them */
    const int32_t *history; /* prompt then generated ids, host memory */
    int32_t n_history, n_prompt;
    const struct logit_bias *bias;
    int32_t n_bias;
    uint64_t seed, position; /* the draw is philox_uniform(seed, position) */
    int32_t banned;          /* an id that may not be chosen (end of text under ignore_eos), or -1 */
    int32_t n_top;           /* how many of top_ids are wanted, 0..KERNEL_TOP_MAX */
};
struct sample_args {
    int64_t rows, vocab;
    const float *logits; /* [rows,vocab], device memory, not changed */
    int64_t logits_stride;
    const struct sample_row *row; /* [rows], host */
    int32_t *ids;                 /* [rows], host */
    float *logprobs;     /* [rows], host: of the chosen id under the model itself (before penalties and
                            temperature) */
    int32_t *top_ids;    /* [rows,KERNEL_TOP_MAX], host, or NULL; of the model itself, n_top of each row */
    float *top_logprobs; /* [rows,KERNEL_TOP_MAX] */
};

/* ---- the table ---- */

enum { KERNEL_MARKS = 4096 };

struct kernel_ops {
    const char *name; /* "cpu", "cuda" */

    /* index: which device of this kind. threads: 0 = all processors of the affinity mask (CPU only). */
    int (*device_open)(int index, int threads, struct kernel_device **ret_device);
    void (*device_close)(struct kernel_device *device);
    int (*device_query)(struct kernel_device *device, struct kernel_device_info *ret_info);
    void (*device_reset_peak)(struct kernel_device *device);
    /* Why the device is lost, in its driver's words; NULL while it is not. */
    const char *(*device_fault)(const struct kernel_device *device);
    /* Device memory, 64-byte aligned, not zeroed. */
    int (*memory_alloc)(struct kernel_device *device, size_t bytes, void **ret_pointer);
    void (*memory_free)(struct kernel_device *device, void *pointer);
    /* The host array may change as soon as copy_in returns, and is complete when copy_out returns. copy_in of little
     * waits for nothing. */
    int (*copy_in)(struct kernel_device *device, void *to_device, const void *from_host, size_t bytes);
    int (*copy_out)(struct kernel_device *device, void *to_host, const void *from_device, size_t bytes);
    int (*copy)(struct kernel_device *device, void *to, const void *from, size_t bytes);
    int (*zero)(struct kernel_device *device, void *pointer, size_t bytes);
    /* Convert count elements between types. */
    int (*cast)(struct kernel_device *device, void *to, enum kernel_type to_type, const void *from,
                enum kernel_type from_type, int64_t count);
    /* Wait for everything queued. */
    int (*synchronize)(struct kernel_device *device);
    /* Note in a slot (0..KERNEL_MARKS-1) the time at which the device has done what is queued so far; and the seconds
     * from one slot's mark to a later one's, waiting for both. For measuring: a mark waits for nothing. */
    int (*mark)(struct kernel_device *device, int slot);
    int (*mark_seconds)(struct kernel_device *device, int from, int to, double *ret_seconds);

    /* Record instead of run: the ops queued between record_begin and record_end are kept with their arguments, host arrays
     * copied, and record_run queues all of them at once, as often as it is asked. They read what device memory holds then;
     * the memory itself must stay. Not among them: what hands values to or from the host (copy_in, copy_out, synchronize,
     * mark, sample) and mamba_step, which answer KERNEL_INVALID, as does record_end then. After an error of an op or of
     * record_end there is no recording. record_run answers KERNEL_UNSUPPORTED, and does nothing, when memory that ops
     * keep among themselves has moved since: free it, and record anew. All NULL where a device gains nothing by it. */
    int (*record_begin)(struct kernel_device *device);
    int (*record_end)(struct kernel_device *device, struct kernel_recording **ret_recording);
    int (*record_run)(struct kernel_device *device, const struct kernel_recording *recording);
    void (*record_free)(struct kernel_device *device, struct kernel_recording *recording);

    int (*gemm)(struct kernel_device *, const struct gemm_args *);
    int (*lora_forward)(struct kernel_device *, const struct lora_forward_args *);
    /* The larger of the forward's and the backward's. */
    int64_t (*linear_workspace)(int64_t rows, int64_t in, int64_t out, int64_t rank);
    int (*linear_forward)(struct kernel_device *, const struct linear_forward_args *);
    int (*linear_backward)(struct kernel_device *, const struct linear_backward_args *);
    int (*embedding_forward)(struct kernel_device *, const struct embedding_forward_args *);
    int (*embedding_backward)(struct kernel_device *, const struct embedding_backward_args *);
    int (*rmsnorm_forward)(struct kernel_device *, const struct rmsnorm_forward_args *);
    int64_t (*rmsnorm_backward_workspace)(int64_t rows, int64_t d);
    int (*rmsnorm_backward)(struct kernel_device *, const struct rmsnorm_backward_args *);
    int (*conv_forward)(struct kernel_device *, const struct conv_forward_args *);
    int (*conv_backward)(struct kernel_device *, const struct conv_backward_args *);
    int (*scan_prepare)(struct kernel_device *, const struct scan_prepare_args *);
    int (*scan_forward)(struct kernel_device *, const struct scan_forward_args *);
    int64_t (*scan_backward_workspace)(int64_t tokens, int64_t channels, int64_t d_state, int32_t n_seqs);
    int (*scan_backward)(struct kernel_device *, const struct scan_backward_args *);
    /* NULL where there is none. The workspace belongs to one caller, who neither frees nor writes it between steps. */
    int64_t (*mamba_step_workspace)(const struct mamba_step_args *);
    int (*mamba_step)(struct kernel_device *, const struct mamba_step_args *);
    int64_t (*head_workspace)(int64_t rows, int64_t d_model, int64_t vocab, bool backward);
    int (*head)(struct kernel_device *, const struct head_args *);
    int (*adamw)(struct kernel_device *, const struct adamw_args *);
    int (*grad_norm)(struct kernel_device *, const struct grad_norm_args *);
    int (*sample)(struct kernel_device *, const struct sample_args *);
};

/* One-token steps are conv_forward and scan_forward with one token a sequence; a backend takes its short path
 * there. */

/* The plain reference: scalar, one thread, written to be read. Every other backend is compared with it. */
const struct kernel_ops *kernels_reference(void);
/* Vectorised (AVX2 or AVX-512, chosen at run time; plain code elsewhere) and threaded. */
const struct kernel_ops *kernels_cpu(void);
/* NVIDIA GPUs; NULL when the build has no CUDA. device_open(index) answers KERNEL_UNSUPPORTED without a driver and
 * KERNEL_INVALID when there is no such GPU. Activations are F32, BF16 or F16. */
const struct kernel_ops *kernels_cuda(void);

/* Chunks of SCAN_CHUNK tokens over all sequences: how many states chunk_states holds. */
int64_t scan_chunk_count(const int32_t *seq_starts, int32_t n_seqs);

/* Counter-based uniform in [0,1): Philox4x32-10 (Salmon et al. 2011), first word of block `counter` under key
 * `seed`, its top 24 bits scaled by 2^-24. The same on every device. */
float philox_uniform(uint64_t seed, uint64_t counter);

#endif
