/* loss_scale.c: see loss_scale.h. Pure. */
#include "engine/training/loss_scale.h"

#include <math.h>

struct loss_scale loss_scale_start(enum precision precision)
{
    return (struct loss_scale){.scale = precision == PRECISION_FP16 ? LOSS_SCALE_START : 0};
}

float loss_scale_factor(const struct loss_scale *scale, int64_t step_tokens)
{
    if (scale->scale == 0)
        return 1;
    int exponent;
    frexp((double)step_tokens, &exponent);
    return (float)ldexp(scale->scale, 1 - exponent); /* over the power of two that is at most step_tokens */
}

void loss_scale_keep(struct loss_scale *scale)
{
    if (scale->scale == 0 || ++scale->good_steps < LOSS_SCALE_PATIENCE)
        return;
    scale->scale *= 2;
    scale->good_steps = 0;
}

bool loss_scale_skip(struct loss_scale *scale)
{
    if (scale->scale <= 1)
        return false;
    scale->scale /= 2;
    scale->good_steps = 0;
    scale->skipped_steps++;
    return true;
}
