/* checkpoint.h: the state of a training run on disk, whole or not at all. The trainer's own; called on its
 * thread.
 *
 * FOLDER/step-N/
 *   adapter_config.json, adapter_model.safetensors   what adapter_save writes: the checkpoint is servable as
 *                                                    it is (model.safetensors and companions under `full`)
 *   optimizer.safetensors                            fp32: "param.NAME", "m.NAME", "v.NAME" of each parameter
 *   trainer_state.json                               struct training_state, whose run it is, a hash of the
 *                                                    above
 *
 * A checkpoint is made in a hidden sibling, synced and renamed; names that begin with a dot are debris of a
 * crash. */
#ifndef ENGINE_TRAINING_CHECKPOINT_H
#define ENGINE_TRAINING_CHECKPOINT_H

#include "base/error.h"
#include "engine/models/model.h"
#include "engine/text/dataset.h"
#include "engine/training/loss_scale.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Everything but tensors that decides what comes next, as of the last completed optimizer step. */
struct training_state {
    int64_t step;
    struct data_cursor cursor; /* of the next micro-batch; {epoch + 1, 0} at the end of an epoch */
    int64_t trained_tokens;
    bool evaluating; /* the evaluation that is due after `step` has not ended yet */
    bool stopped;    /* early stopping has ended the run */
    /* Of `step`, reported once its evaluation is over. valid_* are NaN when it had none. */
    double train_loss, train_accuracy, learning_rate, grad_norm, valid_loss, valid_accuracy;
    int64_t best_step; /* of the lowest validation loss so far; 0 = none yet */
    double best_loss;
    double patience_loss; /* what early stopping wants to see improved */
    int64_t stale_evaluations;
    struct loss_scale loss_scale;
};

/* Whose checkpoint it is: resuming under any other is refused. */
struct training_identity {
    json_t *spec;                                   /* hyperparameters and "seed" */
    uint64_t model, training_data, validation_data; /* fingerprints; 0 = no validation set */
};

struct checkpoint_entry {
    int64_t step;
    bool resumable_only;
};
struct checkpoint_list {
    struct checkpoint_entry *entries; /* in the order of their steps; free() it */
    int64_t count;
};

/* A running 64-bit hash (start with 0) that tells accidents apart: other data, a damaged file. */
uint64_t fingerprint_add(uint64_t fingerprint, const void *data, size_t length);

/* FOLDER/step-N into path. */
void checkpoint_path(const char *folder, int64_t step, char path[static 4096]);
/* Write the checkpoint of state->step. One of that step that holds the same tensors is kept, and gets the new
 * state alone. */
int checkpoint_write(const char *folder, const struct training_state *state,
                     const struct training_identity *identity, bool resumable_only,
                     const struct adapter *adapter, const char *base_name, struct error *error);
/* Check a checkpoint against the run and read its state; nothing is changed. */
int checkpoint_read_state(const char *path, const struct training_identity *identity,
                          struct training_state *ret_state, struct error *error);
/* Parameters, and when asked moments, into the adapter. ERROR_CORRUPT when anything is missing or damaged. */
int checkpoint_read_tensors(const char *path, struct adapter *adapter, bool moments, struct error *error);
/* What lies in folder (which need not exist), after removing debris and every checkpoint of a step above
 * `newest`. */
int checkpoint_scan(const char *folder, int64_t newest, struct checkpoint_list *ret_list,
                    struct error *error);

/* Fill FOLDER/NAME with adapter_save, whole or not at all; one that is there already stays. */
int checkpoint_save_adapter(const char *folder, const char *name, const struct adapter *adapter,
                            const char *base_name, struct error *error);

/* 0, or the error that a kernel's status means. */
int kernel_check(int status, const char *what, struct error *error);

#endif
