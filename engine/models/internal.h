/* internal.h: what the files of this room share and nobody else sees: the structs behind model.h's opaque
 * names. One owner thread, the device's. */
#ifndef ENGINE_MODELS_INTERNAL_H
#define ENGINE_MODELS_INTERNAL_H

#include "engine/models/family.h"
#include "engine/models/model.h"
#include "engine/models/plan.h"

enum { CONFIG_LIMIT = 1 << 20, LORA_MAX_RANK = 1024 };

struct model {
    const struct family *family;
    const struct kernel_ops *ops;
    struct kernel_device *device;
    bool is_host; /* the device is the host: its ops take weights of any type as they are */
    enum kernel_type
        act;      /* of activations in inference: F32 on the host, else what the embeddings are stored in */
    bool tf32;    /* in inference, too */
    bool is_view; /* of a model that owns all that is pointed to */
    struct model_config config;
    char *folder;
    struct weight *weights;
    int64_t n_weights;
    int64_t embedding, head; /* indices into weights; the same one when tied */
    int64_t parameter_count;
    void *arena; /* all weights and derived */
    int64_t arena_bytes;
    float *derived;
};

/* 0, or the error that a kernel's status stands for. `what` says where: "layer 3", "head". */
int model_status(int status, struct error *error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Find a tensor that a spec wants and check its shape. `path` is for messages. */
int model_find_tensor(const struct safetensors *file, const struct tensor_spec *spec, const char *path,
                      const struct tensor_view **ret_view, struct error *error);
/* Every tensor of the file must be one that the family names; the first that is not is the error. */
int model_check_names(const struct model_config *config, const struct family *family,
                      const struct safetensors *file, const char *path, struct error *error);
/* Copies mapped tensors to the device, one after another, into another type when that differs: what is to be
 * converted passes through one area there, which grows to the largest of them. Zeroed but for the first two = ready. */
struct uploader {
    const struct kernel_ops *ops;
    struct kernel_device *device;
    void *staging;
    size_t staging_bytes;
};
int uploader_copy(struct uploader *uploader, const struct tensor_view *view, void *to,
                  enum kernel_type to_type, struct error *error);
void uploader_free(struct uploader *uploader);

/* A weight as a pass sees it: the base's, or the master copy of a full fine-tune with its gradient. */
struct weight_view {
    const void *data;
    enum kernel_type type;
    float *grad; /* NULL when frozen */
};
/* adapter: NULL or LoRA = the base's weights. */
struct weight_view model_view(const struct model *model, const struct adapter *adapter, int64_t index);
/* The family's projections: matrices that a pass multiplies with between the embeddings and the head. In a full fine-tune
 * nothing but linear_backward writes their gradients, and every backward writes all of them. */
bool model_is_projection(const struct model *model, int64_t index);
/* Weights in the type that products want, where model_view()'s have another. */
struct weight_copies {
    enum kernel_type type;
    void **data; /* [n_weights], NULL = none; or NULL altogether */
};
/* The same weight as a product reads it. copies may be NULL. */
struct weight_view model_product_view(const struct model *model, const struct adapter *adapter,
                                      const struct weight_copies *copies, int64_t index);
const float *model_derived(const struct model *model, const struct adapter *adapter);

/* The index-th element of an array on the device. */
static inline void *element_at(const void *array, int64_t index, enum kernel_type type)
{
    return (char *)(uintptr_t)array + index * (int64_t)kernel_type_size(type);
}

/* ---- adapter.c ---- */

/* The two factors of one LoRA target; layer -1 for the embeddings. */
struct lora_pair {
    struct param_slice *a, *b;
};
/* False when the adapter (may be NULL) does not adapt it. */
bool adapter_pair(const struct adapter *adapter, enum lora_target target, int64_t layer,
                  struct lora_pair *ret_pair);
/* Put an adapter's path (may be NULL or none) into the arguments of an embedding. */
void adapter_embed(const struct adapter *adapter, struct embedding_forward_args *args);
/* Do gradients of this adapter flow into the target (LoRA on it, or full)? */
bool adapter_trains(const struct adapter *adapter, enum lora_target target);
/* An adapter with all its tensors zero; derived is not computed. lora: read for ADAPT_LORA alone. */
int adapter_allocate(struct model *model, enum adaptation adaptation, const struct lora_config *lora,
                     bool trainable, struct adapter **ret_adapter, struct error *error);
/* Renew what a trainable full fine-tune derives from its parameters. */
int adapter_renew(const struct adapter *adapter, struct error *error);
/* Make adapter->copies of a full fine-tune that is served, where products want them. */
int adapter_make_copies(struct adapter *adapter, struct error *error);
/* Bytes of parameters (derived included) and of one copy of their gradients. */
int adapter_bytes(const struct model *model, enum adaptation adaptation, const struct lora_config *lora,
                  int64_t *ret_parameter_bytes, int64_t *ret_gradient_bytes, struct error *error);

/* ---- linear.c: one linear layer with whatever adapts it ---- */

struct linear {
    struct linear_layer layer;        /* dropout and seed are the pass's to set */
    float *dweight, *dbias, *da, *db; /* NULL where nothing trains */
};
/* bias: index of the bias tensor, or -1. */
void linear_bind(struct linear *linear, const struct model *model, const struct adapter *adapter,
                 const struct weight_copies *copies, int64_t weight, int64_t bias, enum lora_target target,
                 int64_t layer);

/* ---- pass.c ---- */

/* Buffers that every family's pass has, of the pass's type where no other is named. [T,d] ones are free for the
 * family between the steps named here. */
enum pass_buffer {
    PASS_IDS,      /* [T] i32 */
    PASS_TARGETS,  /* [T] i32: of the rows that the head sees, back to back */
    PASS_SUMS,     /* struct pass_sums; losses and right answers since the last pass_collect() */
    PASS_RESIDUAL, /* [T,d] fp32: the embeddings when the family's forward begins */
    PASS_NORMED,   /* [T,d]: the latest norm's output; the hidden states after the family's forward */
    PASS_ROWS, /* [T,d]: free in the family's forward; d(hidden) when its backward begins, free after that */
    PASS_DRESIDUAL, /* [T,d] fp32: zero when the family's backward begins, d(embeddings) when it ends;
                       in 16 bits the same buffer as PASS_RESIDUAL */
    PASS_SCRATCH,   /* the largest workspace of the layers' ops */
    PASS_HEAD,      /* the head's workspace, over that of the layers */
    PASS_WEIGHTS,   /* weights in the type of the products */
    PASS_FAMILY,    /* the family's own from here on */
};

/* ---- replay.c: a pass's layers, queued again as they were recorded ---- */

struct replay {
    int64_t n_tokens; /* the shape of the latest pass */
    int32_t n_seqs;
    int32_t *seq_starts; /* [max_seqs+1] */
    int64_t passes;      /* of that shape in a row */
    struct kernel_recording *
        *layers; /* [2*n_layers]: forward, then backward; each NULL until it is recorded */
};
enum { N_REPLAYS = 3 };
enum direction { FORWARD, BACKWARD };

struct pass {
    struct model *model;
    struct adapter *adapter;
    struct plan_request request; /* resolved: recompute is the level */
    void *arena;
    void *buffers[PLAN_MAX];
    int64_t head_bytes; /* of PASS_HEAD */
    struct weight_copies copies;
    int32_t *host_targets; /* [T] staging */
    int64_t n_targets;     /* since the last pass_collect() */
    bool fresh;            /* no backward since the step began: those of projections overwrite dweight */
    struct replay
        replays[N_REPLAYS]; /* of passes without a backward, with a step's first one, with another */
    struct replay *replay;  /* of the pass that runs, NULL where its layers are queued op by op */
};
/* The whole table of a pass, of a request that is resolved. */
void pass_plan(const struct model *model, const struct plan_request *request, struct plan *ret_plan);
/* The request with the recompute level that its limit asks for, and that level's table. */
int plan_resolve(const struct model *model, const struct plan_request *request,
                 struct plan_request *ret_request, struct plan *ret_plan, struct error *error);

/* A pass begins: decide how its layers are queued. */
void replay_begin(struct pass *pass, const struct batch *batch, const struct pass_options *options);
/* Queue one direction of one layer: what `work` queues, which is handed the pass and arg, or what it queued in an earlier
 * pass of this shape. Returns a kernel_status. */
typedef int layer_work(const struct pass *pass, const void *arg);
int replay_layer(const struct pass *pass, int64_t layer, enum direction direction, layer_work *work,
                 const void *arg);
int replay_create(struct pass *pass, struct error *error);
void replay_free(struct pass *pass);

/* ---- runner.c ---- */

enum runner_buffer {
    RUNNER_IDS,      /* [T] i32 */
    RUNNER_RESIDUAL, /* [T,d] fp32, the embeddings when the family begins */
    RUNNER_HIDDEN, /* [T,d] after the final norm when it ends; of the model's type of inference, as the next */
    RUNNER_ROWS,   /* [max_seqs,d] gathered for logits */
    RUNNER_LOGITS,   /* [max_logits,vocab] */
    RUNNER_TARGETS,  /* [score rows] i32 */
    RUNNER_LOGPROBS, /* [score rows] */
    RUNNER_ARGMAX,   /* [score rows] i32 */
    RUNNER_TOP_IDS,  /* [score rows,KERNEL_TOP_MAX] i32 */
    RUNNER_TOP_LOGPROBS,
    RUNNER_SCRATCH, /* head's workspace */
    RUNNER_U,       /* the adapters' [rows,rank], in slices of rows when a rank is large */
    RUNNER_FAMILY,
};

/* Rows of one part that use one LoRA adapter (NULL: none). */
struct lora_span {
    const struct adapter *adapter;
    int64_t row_begin, rows;
};

/* Sequences in a row that share their weights: the unit of a family's forward. */
struct forward_part {
    const struct adapter *full; /* whose weights; NULL = the base's */
    int64_t row_begin, rows;    /* in the runner's buffers */
    int32_t n_seqs;
    const int32_t *seq_starts;     /* [n_seqs+1], from 0 */
    const int32_t *from, *slots;   /* read, written; NULL when there are no states */
    struct state_pool *states;     /* or NULL */
    const struct lora_span *spans; /* cover all rows */
    int32_t n_spans;
};

struct runner {
    struct model *model;
    int64_t max_tokens, score_rows, u_floats;
    int32_t max_seqs, max_logits; /* rows of logits: as many as sequences, or none */
    void *arena;
    void *buffers[PLAN_MAX];
    int64_t scratch_bytes;
    int64_t n_rows; /* of the last forward */
    int32_t n_seqs;
    bool has_logits;          /* of the last rows, from a step */
    void (*yield)(void *arg); /* the request's */
    void *yield_arg;
    void *family_memory;        /* on the host: the family's, runner_memory() bytes */
    struct forward_part *parts; /* [max_seqs] of the last forward */
    int32_t n_parts;
    int32_t *starts;         /* [2*max_seqs] the parts' seq_starts */
    int32_t *last_rows;      /* [max_seqs] of the last forward */
    struct lora_span *spans; /* [max_seqs] */
};
/* Add what each span's adapter contributes to one linear layer's output. x and y point at the part's first
 * row. Activations have the model's type of inference, here and in the family's buffers. */
int runner_lora(struct runner *runner, const struct forward_part *part, enum lora_target target,
                int64_t layer, const void *x, int64_t x_stride, void *y, int64_t y_stride);
/* The weights of a full fine-tune (NULL: the base) in the type that inference computes in. */
struct weight_copies runner_copies(const struct model *model, const struct adapter *full);

#endif
