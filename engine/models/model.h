/* model.h: a base model on a device, adapters on it, and the three ways through it: training pass, forward
 * with state, step.
 *
 * A family (Mamba-1 in mamba.c, ...) fills `struct family`; nothing outside a family's file asks which one it
 * is. All functions run on the device's owner thread. A model is loaded once and shared by jobs and requests;
 * its weights are frozen, except in a `full` training job, which works on its own fp32 copy. */
#ifndef ENGINE_MODELS_MODEL_H
#define ENGINE_MODELS_MODEL_H

#include "base/error.h"
#include "engine/models/safetensors.h"
#include "engine/text/dataset.h"
#include "kernels/kernels.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct model_config {
    char family[32]; /* "mamba" */
    int64_t vocab_size, d_model, n_layers, d_inner, d_state, d_conv, dt_rank;
    float norm_eps;
    bool tie_embeddings, conv_bias, proj_bias;
    int32_t bos_id, eos_id, pad_id; /* -1 where absent */
    char chat_template[32];         /* "", "alpaca", "chatml" */
};

/* A weight on the device. */
struct weight {
    char name[96]; /* Hugging Face's: backbone.layers.0.mixer.in_proj.weight */
    enum kernel_type type;
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t count;
    void *data;                 /* device memory */
    enum kernel_type file_type; /* as the file stores it; a full fine-tune is saved in it */
    bool matrix;                /* weight decay applies in full fine-tuning */
    bool fp32;                  /* whatever the file's type: nothing that a big product reads */
};

struct model;

/* Read FOLDER/config.json and its safetensors, check every tensor's name, type and shape, put the weights on
 * the device in their stored types. A missing, extra-dimensional or wrongly sized tensor is an error that
 * names it. */
int model_open(const char *folder, const struct kernel_ops *ops, struct kernel_device *device,
               struct model **ret_model, struct error *error);
void model_close(struct model *model);
const struct model_config *model_config(const struct model *model);
const struct kernel_ops *model_ops(const struct model *model);
struct kernel_device *model_device(const struct model *model);
int64_t model_weight_count(const struct model *model);
const struct weight *model_weight(const struct model *model, int64_t index);
int64_t model_weight_bytes(const struct model *model); /* on the device */
int64_t model_parameter_count(const struct model *model);
/* What activations are in inference: fp32 on the host, elsewhere what the base is stored in. A comparison may ask for
 * fp32 there too, before it makes runners and adapters. */
enum kernel_type model_inference_type(const struct model *model);
void model_infer_in_fp32(struct model *model);
/* The same weights, not a copy of them, with inference in another type; tf32: its products may round F32 factors to TF32. ERROR_UNSUPPORTED
 * on the host, but for F32. Closed as a model is, before it. */
int model_open_view(const struct model *model, enum kernel_type type, bool tf32, struct model **ret_view,
                    struct error *error);
bool model_infers_in_tf32(const struct model *model);

/* ---- adaptation: what is trained ---- */

enum adaptation { ADAPT_LORA, ADAPT_FULL };

enum lora_target {
    TARGET_IN_PROJ = 1 << 0,
    TARGET_X_PROJ = 1 << 1,
    TARGET_DT_PROJ = 1 << 2,
    TARGET_OUT_PROJ = 1 << 3,
    TARGET_EMBEDDINGS = 1 << 4,
};
/* Presets (PAPER.md): sll = embeddings, in_proj, x_proj, out_proj; all = sll and dt_proj. The default is
 * in_proj, x_proj. */
enum {
    TARGETS_DEFAULT = TARGET_IN_PROJ | TARGET_X_PROJ,
    TARGETS_SLL = TARGET_EMBEDDINGS | TARGET_IN_PROJ | TARGET_X_PROJ | TARGET_OUT_PROJ,
    TARGETS_ALL = TARGETS_SLL | TARGET_DT_PROJ,
};
/* "in_proj" -> TARGET_IN_PROJ; 0 when the name is none of them. */
int lora_target_from_name(const char *name);
const char *lora_target_name(enum lora_target target);

/* One trainable tensor: slices of one arena on the device. grad, m, v are NULL in an adapter that is only
 * served. */
struct parameter {
    char name[128]; /* PEFT's name for adapters, Hugging Face's for full */
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    struct param_slice slice;
};

struct lora_config {
    int targets; /* bits of enum lora_target */
    int32_t rank;
    float alpha, dropout;
    bool rslora; /* scale = alpha / sqrt(rank) instead of alpha / rank */
};

/* An adapter (LoRA tensors) or a full set of fp32 master weights, for training or for serving. */
struct adapter {
    struct model *model;
    enum adaptation adaptation;
    struct lora_config lora;
    float scale;
    int64_t n_parameters;
    struct parameter *parameters;
    void *arena; /* one device allocation behind all parameters */
    int64_t arena_bytes;
    float *derived; /* full: what the family computes from parameters (Mamba: -exp(A_log)). Every pass and
                       forward of a trainable adapter renews it, so whoever changes parameters need not know
                       of it */
    void **copies;  /* full, served by a device that computes in 16 bits: [n_parameters] the matrices in that
                      type, NULL where the parameter itself is read; or NULL */
    void *copies_arena;
    bool trainable;
};

/* A new trainable adapter: A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming with a = sqrt(5), as PEFT; embeddings: A =
 * 0, B ~ N(0,1) as PEFT), the other factor 0; or a copy of the model's weights for full. Draws come from
 * philox(seed). ERROR_INVALID when a target matches no tensor of the model. */
int adapter_create(struct model *model, enum adaptation adaptation, const struct lora_config *lora,
                   uint64_t seed, struct adapter **ret_adapter, struct error *error);
/* Read a PEFT folder (adapter_config.json, adapter_model.safetensors), or for a full fine-tune a model folder
 * (model.safetensors). Every tensor must match the model; tensors or targets that match nothing are errors
 * that name them. */
int adapter_load(struct model *model, const char *folder, bool trainable, struct adapter **ret_adapter,
                 struct error *error);
/* Write that layout into an existing folder. base_name goes to base_model_name_or_path. A full fine-tune is
 * saved as model.safetensors (types as the base stored them: master weights themselves go to checkpoints)
 * with the base's config.json and tokenizer.json copied beside it, so that the folder is a model of its own.
 */
int adapter_save(const struct adapter *adapter, const char *folder, const char *base_name,
                 struct error *error);
void adapter_free(struct adapter *adapter);
/* Renew what was made of parameters that have been written: their copies in a pass's type. */
int adapter_refresh(const struct adapter *adapter, struct error *error);
/* The parameter of that name, or NULL. */
struct parameter *adapter_find(struct adapter *adapter, const char *name);

/* ---- memory plan ---- */

/* What a training pass is to be. Activations and products have the type `act`; the residual stream, parameters,
 * gradients and all sums are fp32 always.
 *
 * Recomputation: a family can do without some of what it keeps from the forward for the backward, in
 * model_recompute_levels() steps, the cheapest first (Mamba: all layers one after another without the steps' sizes dt, then
 * without the convolution's output, and so on down to the residual stream). The results are the same bits at every level. */
struct plan_request {
    enum adaptation adaptation;
    struct lora_config lora;
    int64_t max_tokens; /* of a micro-batch */
    int32_t max_seqs;
    enum kernel_type act;
    bool tf32;          /* F32 products may be rounded to TF32 */
    int64_t recompute;  /* at least this level */
    int64_t byte_limit; /* recompute as much more as it takes to stay within it; 0 = no limit */
};
struct memory_plan {
    int64_t
        weight_bytes; /* the base's or the master weights in the type of the products, where that differs */
    int64_t parameter_bytes; /* adapter or master weights */
    int64_t gradient_bytes, optimizer_bytes;
    int64_t activation_bytes, workspace_bytes;
    int64_t total_bytes; /* beyond the base weights, which are loaded already; may exceed the limit */
    int64_t recompute;   /* the level, at most model_recompute_levels() */
};
int64_t model_recompute_levels(const struct model *model);
/* Sizes alone; allocates nothing. */
int model_plan(const struct model *model, const struct plan_request *request, struct memory_plan *ret_plan,
               struct error *error);

/* ---- training pass ---- */

/* One arena for activations, gradients of activations, workspace and converted weights, sized by the plan of the same
 * request (whose adaptation and lora are the adapter's own). A full fine-tune in 16 bits gets its parameters' copies
 * here (param_slice.copy), and those of its projections keep their gradients (param_slice.keep_grad): one pass at a time, slices are taken from the adapter after this, and whoever writes
 * parameters other than by adamw calls adapter_refresh(). */
struct pass;
int pass_create(struct model *model, struct adapter *adapter, const struct plan_request *request,
                struct pass **ret_pass, struct error *error);
void pass_free(struct pass *pass);

struct pass_options {
    bool backward;    /* false = evaluate */
    bool first;       /* of a step: gradients of earlier steps are done with; see param_slice.keep_grad */
    float grad_scale; /* gradients accumulated are grad_scale * d(sum over targets of -log p) */
    uint64_t dropout_seed; /* philox key for this micro-batch; dropout applies in backward passes alone */
    /* Called between layers so that the caller can serve waiting requests on the same thread; NULL = never.
     * It must not touch this pass or adapter. */
    void (*yield)(void *arg);
    void *yield_arg;
};
struct pass_result {
    double loss_sum; /* sum over targets of -log p; may be NaN or infinite */
    int64_t n_targets;
    int64_t n_correct; /* targets that are the argmax */
    double squares;    /* of the gradients that were asked for; may be NaN or infinite */
};
/* Forward, and backward when asked, of one micro-batch (host memory, free to change on return). Gradients accumulate
 * into the adapter's slices, the result on the device: nothing is waited for. */
int pass_run(struct pass *pass, const struct batch *batch, const struct pass_options *options,
             struct error *error);
/* Wait for the results of all micro-batches since the last pass_collect(), and for the sum of squares over gradients (n_slices
 * may be 0). */
int pass_collect(struct pass *pass, const struct param_slice *slices, int32_t n_slices,
                 struct pass_result *ret_result, struct error *error);
/* Wait for that sum alone. */
int pass_squares(struct pass *pass, const struct param_slice *slices, int32_t n_slices, double *ret_sum,
                 struct error *error);

/* ---- inference ---- */

/* A run of rows that uses one adapter (NULL = the base). */
struct adapter_span {
    const struct adapter *adapter;
    int32_t seq_begin, seq_end; /* sequences, spans in order and covering all of them */
};

/* Fixed-size recurrent states of up to n_slots sequences: pool[slot][state_floats]. */
struct state_pool {
    struct model *model;
    int32_t n_slots;
    int64_t slot_floats;
    float *pool; /* device memory */
};
int64_t model_state_bytes(const struct model *model); /* of one sequence */
int state_pool_create(struct model *model, int32_t n_slots, struct state_pool **ret_pool,
                      struct error *error);
void state_pool_free(struct state_pool *pool);
int state_pool_reset(struct state_pool *pool, int32_t slot);
int state_pool_copy(struct state_pool *pool, int32_t to, int32_t from);

/* Scratch for forwards of up to max_tokens tokens in up to max_seqs sequences. */
struct runner;
int runner_create(struct model *model, int64_t max_tokens, int32_t max_seqs, struct runner **ret_runner,
                  struct error *error);
/* The same for scores alone: it takes no steps and has no room for logits, but scores as many rows at a time as a head of this model
 * works best with. */
int runner_create_for_scores(struct model *model, int64_t max_tokens, int32_t max_seqs,
                             struct runner **ret_runner, struct error *error);
void runner_free(struct runner *runner);

struct forward_request {
    int32_t n_seqs;
    const int32_t *seq_starts; /* [n_seqs+1]; every sequence has at least one token */
    const int32_t *ids;        /* [seq_starts[n_seqs]], host */
    const int32_t *slots;      /* [n_seqs]: state read from and written back to; all different */
    const int32_t *
        from; /* [n_seqs]: state read from, where that is another, or several sequences' one; NULL = slots. Here and there
                            -1: starts from zero, is not kept. What is written for one sequence must not be read for another */
    struct state_pool *states; /* NULL: every sequence starts from zero and no state is kept */
    const struct adapter_span *spans;
    int32_t n_spans; /* 0 = the base for all */
    /* As pass_options': called between layers, NULL = never. It must not touch this runner or these states. */
    void (*yield)(void *arg);
    void *yield_arg;
};
/* Run the tokens through the model and update the states. One token a sequence takes the families' step path.
 * The hidden states after the final norm stay in the runner until its next call. */
int runner_forward(struct runner *runner, const struct forward_request *request, struct error *error);
/* Logits of chosen rows (token indices of the last forward; NULL = the last row of every sequence) into the
 * runner's own buffer [n_rows, vocab], fp32, device memory, valid until the next call. n_rows is at most
 * max_seqs. spans matter where a full fine-tune has a head of its own: those of the last forward are used. */
int runner_logits(struct runner *runner, const int32_t *rows, int32_t n_rows, const float **ret_logits,
                  struct error *error);
/* Scores of the last forward's rows [row_begin,row_end) against targets (host, < 0 = skip), in chunks: log
 * p(target), argmax and the n_top best, all host memory; any output may be NULL. */
int runner_score(struct runner *runner, int64_t row_begin, int64_t row_end, const int32_t *targets,
                 float *logprobs, int32_t *argmax, int32_t n_top, int32_t *top_ids, float *top_logprobs,
                 struct error *error);
/* The same for rows anywhere in the last forward, each as often as is liked, at most runner_score_most() and all of one set of
 * weights: log p(target), and the most probable token. */
int runner_score_rows(struct runner *runner, const int32_t *rows, int64_t n_rows, const int32_t *targets,
                      float *logprobs, int32_t *argmax, struct error *error);
int64_t runner_score_most(const struct runner *runner);

#endif
