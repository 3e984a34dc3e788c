/* mamba.h: what the files of the Mamba-1 family share: where its tensors lie in the model's list, and its ways
 * through the layers as family.h describes them. */
#ifndef ENGINE_MODELS_MAMBA_H
#define ENGINE_MODELS_MAMBA_H

#include "engine/models/internal.h"

/* Index 0: the embeddings; then each layer's, those that every config has first; norm_f; the head of its
 * own. */
enum layer_tensor {
    NORM,
    IN_PROJ,
    CONV,
    X_PROJ,
    DT_PROJ,
    DT_BIAS,
    A_LOG,
    D_SKIP,
    OUT_PROJ,
    LAYER_ALWAYS,
    CONV_BIAS = LAYER_ALWAYS, /* with conv_bias */
    IN_BIAS,                  /* with proj_bias, and the next */
    OUT_BIAS,
    LAYER_KINDS,
};

/* -1 where the config has no such tensor. */
int64_t mamba_tensor_index(const struct model_config *config, int64_t layer, enum layer_tensor kind);
int64_t mamba_norm_f_index(const struct model_config *config);
/* A sequence's state of one layer: the convolution's [d_conv-1,c], then the scan's [n,c]. */
int64_t mamba_layer_state_floats(const struct model_config *config);

/* mamba_train.c */
int64_t mamba_recompute_levels(const struct model_config *config);
void mamba_pass_plan(const struct model_config *config, const struct plan_request *request,
                     const struct kernel_ops *ops, struct plan *plan);
int mamba_pass_forward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                       struct error *error);
int mamba_pass_backward(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                        struct error *error);

/* mamba_infer.c */
void mamba_runner_plan(const struct model_config *config, int64_t max_tokens, int32_t max_seqs,
                       enum kernel_type act, const struct kernel_ops *ops, struct plan *plan);
size_t mamba_runner_memory(const struct model_config *config, int32_t max_seqs);
int mamba_forward(struct runner *runner, const struct forward_part *part, struct error *error);
int mamba_step(struct runner *runner, const struct forward_part *part, const int32_t *ids);

#endif
