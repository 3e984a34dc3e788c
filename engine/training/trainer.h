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
    int64_t n_epochs;
    int64_t max_steps;  /* optimizer steps; when not 0 it alone decides, over as many epochs as it takes */
    int32_t batch_size; /* rows of a micro-batch */
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
    int64_t eval_steps;       /* 0 = at the end of each epoch; the last step always evaluates */
    int64_t checkpoint_steps; /* 0 = at the end of each epoch; the last step always has one */
    /* The newest so many stay, 0 = all. Dropping happens before the next one is written and at the end, so
     * that whoever records them has had time to learn of the newest. */
    int32_t keep_checkpoints;
    /* Stop after so many evaluations in a row that do not improve by more than min_delta; 0 = off. */
    int32_t early_stopping_patience;
    float early_stopping_min_delta;
    bool load_best_at_end; /* a new best evaluation writes a checkpoint; the best one is never dropped */
    uint64_t seed;
};
/* From the "hyperparameters" the daemon sends (every key present, see protocol.h); ERROR_INVALID names a key
 * that is missing, of the wrong kind or out of range. `lora` may be null under `full`, `early_stopping` null
 * for off, max_steps null for 0. The seed travels beside them in the frame: the caller sets ret_spec->seed.
 */
int training_spec_decode(const json_t *json, struct training_spec *ret_spec, struct error *error);
/* The inverse, with every key; NULL when out of memory. */
json_t *training_spec_encode(const struct training_spec *spec);
/* "fp32" ... */
const char *training_precision_name(enum precision precision);
/* What a pass of that precision computes with: F32 for fp32 and tf32. */
enum kernel_type training_activation_type(enum precision precision);
/* The learning rate of optimizer step `step` (1 for the first) of total_steps: linear warm-up that reaches
 * the peak at step warmup_steps, then constant, linear or half a cosine from the peak at step warmup_steps +
 * 1 to the 0 that would come after the last (no step is wasted on a rate of 0). */
float training_learning_rate(const struct training_spec *spec, int64_t step, int64_t total_steps);

struct training_metrics {
    int64_t step, total_steps;
    int64_t epoch;                     /* 1 for the first */
    double train_loss, train_accuracy; /* means over the step's targets */
    double learning_rate;
    double grad_norm;         /* NaN at a step that was skipped */
    double tokens_per_second; /* smoothed over the last steps; of the time inside training passes */
    int64_t trained_tokens;   /* so far, resumed runs included */
    bool has_valid;
    double valid_loss, valid_accuracy; /* of the whole validation set */
};

struct training_checkpoint {
    int64_t step;
    const char *folder; /* whole and durable when this is reported */
    double valid_loss;  /* of the evaluation at this step, NaN when there was none */
    double train_loss;
    double train_accuracy, valid_accuracy;
    bool best;
    bool resumable_only; /* written for a pause at a step where the schedule has none */
};

/* Reports, on the calling thread, in order. */
struct trainer_callbacks {
    void *arg;
    void (*message)(void *arg, const char *level, const char *text); /* "info", "warn" */
    void (*metrics)(void *arg, const struct training_metrics *metrics);
    void (*checkpoint)(void *arg, const struct training_checkpoint *checkpoint);
    /* That step's folder is gone (keep_checkpoints, or a pause's that a newer one has replaced). */
    void (*checkpoint_dropped)(void *arg, int64_t step);
    /* While a data file is read and its epochs are counted, between layers of a micro-batch, and while
     * waiting for the folder's lock; may be NULL. */
    void (*yield)(void *arg);
    /* The plan would be better (nothing recomputed) or possible with more of the device's memory: give up what can be
     * given up, and say whether there was something. From trainer_open alone; may be NULL. */
    bool (*make_room)(void *arg);
};

struct trainer_options {
    struct model *model;
    const struct tokenizer *tokenizer;
    const char *base_name; /* written into adapters */
    struct training_spec spec;
    const char *training_file, *validation_file; /* paths; validation may be NULL */
    const char *folder;                          /* the job's own: checkpoints/step-N and adapter/ go there */
    const char *resume_from;                     /* a checkpoint's folder, or NULL */
    /* trainer_bound, trainer_inspect: of the device's memory that is in use now, what will be free when the job starts
     * (other models, other jobs). */
    int64_t reclaimable_bytes;
    struct trainer_callbacks callbacks;
};

/* What a job would be, without running it. */
struct trainer_inspection {
    int64_t examples, tokens, loss_tokens; /* of the training set */
    int64_t validation_examples;
    int64_t total_steps;
    int64_t planned_bytes; /* weights included */
};
/* Lines of a data file that cannot be used: filled (n_line_errors > 0) when that is why a call failed. */
struct trainer_bad_lines {
    const char *file; /* "training_file" or "validation_file" */
    int64_t n_line_errors;
    struct dataset_line_error line_errors[DATASET_LISTED_ERRORS];
};
/* Load and check the data, count the steps, plan the memory; allocates nothing on the device and writes
 * nothing: folder, resume_from and callbacks are not used. ret_bad is always written (n_line_errors 0 when
 * lines are not to blame); error->param names the file or hyperparameter at fault. A plan that does not fit is
 * ERROR_NO_MEMORY, which says what is needed, what is free, and what would fit. */
int trainer_inspect(const struct trainer_options *options, struct trainer_inspection *ret_inspection,
                    struct trainer_bad_lines *ret_bad, struct error *error);

/* Does the largest micro-batch that the hyperparameters allow fit, whatever the data is? 1 and *ret_planned_bytes
 * (weights included), 0 when that depends on the data (trainer_inspect tells), or an error. Reads no file. */
int trainer_bound(const struct trainer_options *options, int64_t *ret_planned_bytes, struct error *error);

struct trainer;

/* Take FOLDER/lock (waiting up to 30 s for another worker to let go, then ERROR_BUSY), load the data, plan
 * memory (reported through message), allocate, resume. A resume_from whose folder is gone stands for the
 * newest checkpoint there is. Those newer than the one resumed from are removed; they will be made again, and
 * the steps after it are reported again in the same words. A checkpoint of another spec, model or data is
 * refused with ERROR_INVALID, a plan beyond the device's free memory with ERROR_NO_MEMORY. */
int trainer_open(const struct trainer_options *options, struct trainer **ret_trainer, struct error *error);
void trainer_close(struct trainer *trainer);

enum { TRAINER_MORE = 1, TRAINER_FINISHED = 2 };
/* One micro-batch (with the optimizer step, evaluation and checkpoint that fall due after it; evaluation
 * advances one batch at a time, too). TRAINER_FINISHED after the last: then the adapter is in FOLDER/adapter.
 * A NaN loss is ERROR_DIVERGED and names the step; the last good checkpoint stays. In fp16 it only skips the step while
 * the scale of the loss can fall: the step's data count as seen, the parameters stay as they are, a message says so. */
int trainer_advance(struct trainer *trainer, struct error *error);
/* Write a checkpoint of the last completed optimizer step now (pause, shutdown); reported through the
 * callback, unless that step has one already. A step that is half accumulated, and an evaluation that is not
 * over, are done again after resuming. The run itself may go on. */
int trainer_checkpoint(struct trainer *trainer, struct error *error);

struct trainer_status {
    int64_t step, total_steps, trained_tokens;
    int64_t skipped_steps; /* of step, those whose gradients overflowed in fp16 */
    double loss_scale;     /* NaN where the precision needs none */
    int64_t planned_bytes; /* weights included */
    int64_t peak_bytes; /* the most that the device's ops have held since trainer_open, whoever it was for */
    double bytes_per_token; /* peak / tokens of the largest micro-batch */
    double eta_seconds;
};
void trainer_status(const struct trainer *trainer, struct trainer_status *ret_status);

#endif
