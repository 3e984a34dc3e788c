/* family.h: what a model family implements. A new family is one file and one line in family.c's table. */
#ifndef ENGINE_MODELS_FAMILY_H
#define ENGINE_MODELS_FAMILY_H

#include "engine/models/model.h"

#include <jansson.h>

/* One line of a family's table of tensors: what config implies, checked against the file. */
struct tensor_spec {
    char name[96];
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    bool fp32;     /* kept in fp32 whatever the file's type: A_log, D, biases, norms, conv */
    bool matrix;   /* weight decay applies */
    bool optional; /* tied lm_head */
};

struct family {
    const char *model_type; /* config.json's "model_type" */
    int (*parse_config)(const json_t *json, struct model_config *ret_config, struct error *error);
    /* The index-th tensor; returns false past the last. */
    bool (*tensor)(const struct model_config *config, int64_t index, struct tensor_spec *ret_spec);
    /* in x out of one LoRA target's matrix, and its tensor's name in a layer (-1 for the embeddings). False:
     * no such target. */
    bool (*target)(const struct model_config *config, enum lora_target target, int64_t layer, int64_t *ret_in,
                   int64_t *ret_out, char ret_name[96]);
    int64_t (*state_floats)(const struct model_config *config);
    /* Bytes of activations + workspace of a training pass, and of a runner. */
    int64_t (*pass_bytes)(const struct model_config *config, const struct plan_request *request,
                          const struct kernel_ops *ops);
    int64_t (*runner_bytes)(const struct model_config *config, int64_t max_tokens, int32_t max_seqs,
                            const struct kernel_ops *ops);
    /* The passes themselves: see mamba.c for the one there is. Owners of `pass` and `runner` are in pass.c
     * and runner.c. */
    int (*pass_run)(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                    struct pass_result *ret_result, struct error *error);
    int (*forward)(struct runner *runner, const struct forward_request *request, struct error *error);
};

/* NULL when unknown. */
const struct family *family_find(const char *model_type);

extern const struct family family_mamba;

#endif
