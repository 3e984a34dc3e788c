/* mamba_layer.h: one Mamba-1 layer forward, as training and inference run it. */
#ifndef ENGINE_MODELS_MAMBA_LAYER_H
#define ENGINE_MODELS_MAMBA_LAYER_H

#include "engine/models/mamba.h"

/* Where one layer reads and writes. */
struct layer_flow {
    const struct model *model;
    const struct adapter *adapter; /* its weights, and its LoRA unless `runner` applies several */
    struct runner *runner;         /* NULL in training */
    const struct forward_part *part;
    const struct weight_copies *copies; /* or NULL */
    enum kernel_type act;               /* of every buffer below that is not fp32 */
    bool tf32;
    bool fresh;    /* the backward's: gradients of projections are written, not added to */
    float dropout; /* of LoRA, and its philox key */
    uint64_t seed;
    void *workspace; /* of the linear layers */
    int64_t layer, rows;
    int32_t n_seqs;
    const int32_t *seq_starts;
    struct state_view conv_from, conv_to, scan_from, scan_to;
    const void *x;         /* what is added to the residual stream, or NULL */
    const float *residual; /* may be residual_out, or NULL */
    float *residual_out, *rstd, *chunk_states;
    void *kept; /* the residual stream in `act`, or NULL */
    void *normed, *xz, *xc, *x_dbl, *dt, *y, *output;
    void *u; /* [projections that LoRA adapts][max tokens][rank] of this layer, in training */
    int64_t u_stride;
};

/* From the residual stream to `output`. Every function here returns a kernel_status. */
int layer_forward(const struct layer_flow *flow);

/* Its parts, which the backward runs again. */
int layer_norm(const struct layer_flow *flow, const float *weight);
/* xz from the norm's output. */
int layer_project_in(const struct layer_flow *flow);
/* xc from xz. */
int layer_convolve(const struct layer_flow *flow);
/* x_dbl from xc. */
int layer_project_x(const struct layer_flow *flow);
/* dt from x_dbl. */
int layer_project_dt(const struct layer_flow *flow);
/* y and chunk_states. */
int layer_scan(const struct layer_flow *flow);

/* The largest workspace of the four projections. */
int64_t layer_linear_workspace(const struct model_config *config, const struct kernel_ops *ops, int64_t rows,
                               int64_t rank);

/* An fp32 tensor of the layer; NULL where the config has none. */
const float *layer_weight(const struct layer_flow *flow, enum layer_tensor kind);
const float *layer_norm_f(const struct layer_flow *flow);
/* The projection that `which` adapts, bound to its weights and adapter. */
void layer_linear(const struct layer_flow *flow, enum lora_target which, struct linear *ret_linear);
/* Where the rank products of one projection are kept in training; NULL where there are none. */
void *layer_u(const struct layer_flow *flow, enum lora_target which);

#endif
