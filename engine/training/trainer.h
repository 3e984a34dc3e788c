/* trainer.h: one fine-tuning job as a machine that is advanced by small steps.
 *
 * The worker calls trainer_advance() in a loop, serving other requests in between. Everything that decides
 * the next step (parameters, moments, data cursor, schedule, best metric, seeds) is in the checkpoint, so a
 * run that is interrupted and resumed gives the same losses bit for bit. */
#ifndef ENGINE_TRAINING_TRAINER_H
#define ENGINE_TRAINING_TRAINER_H

#include "base/error.h"
#include "engine/models/model.h"
#include "engine/text/dataset.h"
#include "engine/text/tokenizer.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum precision { PRECISION_FP32, PRECISION_TF32, PRECISION_BF16, PRECISION_FP16 };
enum lr_schedule { SCHEDULE_CONSTANT, SCHEDULE_LINEAR, SCHEDULE_COSINE };

/* The job's hyperparameters, resolved: names and meaning as in API.md. */
struct training_spec {
    int64_t n_epochs, max_steps; /* max_steps 0 = as many as the epochs give */
    int32_t batch_size;          /* rows of a micro-batch */
    int32_t gradient_accumulation_steps;
    int64_t max_seq_len;
    bool packing, truncate;
    enum precision precision;
    enum adaptation adaptation;
    struct lora_config lora;
    float learning_rate;
    float beta1, beta2, eps, weight_decay;
    enum lr_schedule schedule;
    int64_t warmup_steps;
    float max_grad_norm;      /* 0 = no clipping */
    int64_t eval_steps;       /* 0 = at the end of each epoch */
    int64_t checkpoint_steps; /* 0 = at the end of each epoch */
    int32_t keep_checkpoints;
    int32_t early_stopping_patience; /* evaluations without improvement; 0 = off */
    float early_stopping_min_delta;
    bool load_best_at_end;
    uint64_t seed;
};
/* From the JSON the daemon sends (every key present, see protocol.h); ERROR_INVALID names a key that is
 * missing or of the wrong kind. */
int training_spec_decode(const json_t *json, struct training_spec *ret_spec, struct error *error);
/* The learning rate of optimizer step `step` (1 for the first) of total_steps: linear warm-up to the peak
 * over warmup_steps, then constant, linear to 0 or half a cosine to 0. */
float training_learning_rate(const struct training_spec *spec, int64_t step, int64_t total_steps);

struct training_metrics {
    int64_t step, total_steps, epoch;
    double train_loss, train_accuracy; /* means over the step's targets */
    double learning_rate, grad_norm;
    double tokens_per_second; /* smoothed over the last steps */
    int64_t trained_tokens;   /* so far, resumed runs included */
    bool has_valid;
    double valid_loss, valid_accuracy; /* of the whole validation set */
};

struct training_checkpoint {
    int64_t step;
    const char *folder; /* whole and durable when this is reported */
    double valid_loss;  /* NaN when there is no validation set */
    double train_loss;
    double train_accuracy, valid_accuracy;
    bool best;
};

/* Reports, on the calling thread, in order. */
struct trainer_callbacks {
    void *arg;
    void (*message)(void *arg, const char *level, const char *text); /* "info", "warn" */
    void (*metrics)(void *arg, const struct training_metrics *metrics);
    void (*checkpoint)(void *arg, const struct training_checkpoint *checkpoint);
    /* Between layers of a micro-batch; may be NULL. */
    void (*yield)(void *arg);
};

struct trainer_options {
    struct model *model;
    const struct tokenizer *tokenizer;
    const char *base_name; /* written into adapters */
    struct training_spec spec;
    const char *training_file, *validation_file; /* paths; validation may be NULL */
    const char *folder;                          /* the job's own: checkpoints/step-N and adapter/ go there */
    const char *resume_from;                     /* a checkpoint's folder, or NULL */
    struct trainer_callbacks callbacks;
};

struct trainer;

/* Load the data, plan memory (reported through message), allocate, resume. */
int trainer_open(const struct trainer_options *options, struct trainer **ret_trainer, struct error *error);
void trainer_close(struct trainer *trainer);

enum { TRAINER_MORE = 1, TRAINER_FINISHED = 2 };
/* One micro-batch (with the optimizer step, evaluation and checkpoint that fall due after it; evaluation
 * advances one batch at a time, too). TRAINER_FINISHED after the last: then the adapter is in FOLDER/adapter.
 * A NaN loss is ERROR_DIVERGED and names the step; the last good checkpoint stays. */
int trainer_advance(struct trainer *trainer, struct error *error);
/* Write a checkpoint of the last completed optimizer step now (pause, shutdown); reported through the
 * callback. A step that is half accumulated is dropped and done again after resuming. */
int trainer_checkpoint(struct trainer *trainer, struct error *error);

struct trainer_status {
    int64_t step, total_steps, trained_tokens;
    int64_t planned_bytes, peak_bytes;
    double bytes_per_token; /* peak / tokens of a micro-batch */
    double eta_seconds;
};
void trainer_status(const struct trainer *trainer, struct trainer_status *ret_status);

#endif
