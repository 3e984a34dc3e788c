/* loss_scale.h: dynamic loss scaling for fp16 (Micikevicius et al. 2018): gradients are computed of the loss times a
 * power of two, so that small ones do not vanish below what fp16 can hold. A step whose gradients overflow is skipped
 * and halves the scale; LOSS_SCALE_PATIENCE good ones in a row double it. Part of a run's state: a resumed run has the
 * same scales at the same steps. */
#ifndef ENGINE_TRAINING_LOSS_SCALE_H
#define ENGINE_TRAINING_LOSS_SCALE_H

#include "engine/training/trainer.h"

#include <stdbool.h>
#include <stdint.h>

enum { LOSS_SCALE_START = 65536, LOSS_SCALE_PATIENCE = 2000 };

struct loss_scale {
    double scale;       /* of the mean loss over a step's targets; 0 = this precision needs none */
    int64_t good_steps; /* since the scale changed */
    int64_t skipped_steps;
};

struct loss_scale loss_scale_start(enum precision precision);
/* What the sum of losses is multiplied by, with up to step_tokens of them in a step: 1 without scaling. A power of two,
 * so that dividing by it again is exact. */
float loss_scale_factor(const struct loss_scale *scale, int64_t step_tokens);
/* After a step whose gradients were applied. */
void loss_scale_keep(struct loss_scale *scale);
/* After one whose gradients were not finite: true when a smaller scale may help and the step is skipped, false when
 * there is none and the run has diverged. */
bool loss_scale_skip(struct loss_scale *scale);

#endif
