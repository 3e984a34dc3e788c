/* family.h: what a model family implements. A new family is one file and one line in family.c's table. */
#ifndef ENGINE_MODELS_FAMILY_H
#define ENGINE_MODELS_FAMILY_H

#include "engine/models/model.h"
#include "engine/models/plan.h"

#include <jansson.h>
#include <limits.h>

enum tensor_role { ROLE_OTHER, ROLE_EMBEDDING, ROLE_HEAD /* absent where the embeddings are the head */ };

/* One line of a family's table of tensors: what config implies, checked against the file. */
struct tensor_spec {
    char name[96];
    char old_name[96]; /* an older spelling that files may use instead, "" when none */
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    bool fp32;   /* kept in fp32 whatever the file's type: A_log, D, biases, norms, conv */
    bool matrix; /* weight decay applies */
    enum tensor_role role;
};

struct forward_part;

struct family {
    const char *model_type; /* config.json's "model_type" */
    int (*parse_config)(const json_t *json, struct model_config *ret_config, struct error *error);
    /* The index-th tensor; returns false past the last. */
    bool (*tensor)(const struct model_config *config, int64_t index, struct tensor_spec *ret_spec);
    /* A tensor that files may hold though nothing reads it (the head of a model that ties it). */
    bool (*ignored)(const struct model_config *config, const char *name);
    /* in x out of one LoRA target's matrix, and its module's name ("backbone.layers.0.mixer.in_proj"; layer
     * -1 for the embeddings). False: no such target. */
    bool (*target)(const struct model_config *config, enum lora_target target, int64_t layer, int64_t *ret_in,
                   int64_t *ret_out, char ret_name[96]);
    int64_t (*state_floats)(const struct model_config *config);
    /* What is computed from weights once instead of in every pass: its size, and the computation for a base
     * model (adapter NULL) or a full fine-tune. Returns a kernel_status. */
    int64_t (*derived_floats)(const struct model_config *config);
    int (*derive)(const struct model *model, const struct adapter *adapter, float *derived);
    /* Levels of recomputation beyond 0, see struct plan_request. */
    int64_t (*recompute_levels)(const struct model_config *config);
    /* The buffers of a training pass, and of a runner. */
    void (*pass_plan)(const struct model_config *config, const struct plan_request *request,
                      const struct kernel_ops *ops, struct plan *plan);
    void (*runner_plan)(const struct model_config *config, int64_t max_tokens, int32_t max_seqs,
                        enum kernel_type act, const struct kernel_ops *ops, struct plan *plan);
    /* Bytes on the host that a runner has for the family. */
    size_t (*runner_memory)(const struct model_config *config, int32_t max_seqs);
    /* The layers between the embeddings and the head, on input that pass.c has checked; the embeddings, the
     * head and the loss are pass.c's. Forward: from PASS_RESIDUAL to PASS_NORMED. Backward: from
     * PASS_ROWS to PASS_DRESIDUAL, stopping early below the lowest layer that trains. */
    int (*pass_forward)(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                        struct error *error);
    int (*pass_backward)(struct pass *pass, const struct batch *batch, const struct pass_options *options,
                         struct error *error);
    /* The same layers with recurrent states, for sequences that share their weights: from RUNNER_RESIDUAL to
     * RUNNER_HIDDEN. */
    int (*forward)(struct runner *runner, const struct forward_part *part, struct error *error);
    /* One token of every sequence of a part with states that is all of the request: from the ids (host memory) to
     * RUNNER_HIDDEN and RUNNER_LOGITS. Returns a kernel_status; KERNEL_UNSUPPORTED: the device has no such short
     * path, and nothing happened. */
    int (*step)(struct runner *runner, const struct forward_part *part, const int32_t *ids);
};

/* NULL when unknown. */
const struct family *family_find(const char *model_type);

/* ---- reading config.json: a missing key takes the fallback, a wrong one is an error that names it ---- */

enum { CONFIG_REQUIRED = INT_MIN };
int config_integer(const json_t *json, const char *key, int64_t fallback, int64_t low, int64_t high,
                   int64_t *ret_value, struct error *error);
int config_number(const json_t *json, const char *key, double fallback, double low, double high,
                  double *ret_value, struct error *error);
int config_boolean(const json_t *json, const char *key, bool fallback, bool *ret_value, struct error *error);
/* A string that must be one of `allowed` (closed by NULL); the fallback where the key is missing or null. */
int config_choice(const json_t *json, const char *key, const char *fallback, const char *const *allowed,
                  const char **ret_value, struct error *error);

extern const struct family family_mamba;

#endif
