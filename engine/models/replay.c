/* replay.c: layers of a training pass that are recorded once and queued again as one unit each, where the device can
 * (kernels.h, record_begin). The device's owner thread, as pass.c.
 *
 * A layer is dozens of launches; with few tokens the host needs longer to make them than the device to run them. Where
 * two passes of a kind in a row have the same shape (tokens, boundaries), the second records its layers, and it and those
 * after it run what was recorded. A layer at a time, so that a pass still yields between layers, and requests are served
 * there. Token ids, targets and the loss's scale differ from pass to pass: they belong to the embeddings and the head,
 * which are queued as ever. So are passes with dropout, whose seeds are arguments. What a job computes does not depend on
 * any of this, not by a bit: the same kernels run in the same order. */
#include "engine/models/internal.h"

#include <stdlib.h>
#include <string.h>

static int64_t count_layers(const struct pass *pass)
{
    return 2 * pass->model->config.n_layers;
}

int replay_create(struct pass *pass, struct error *error)
{
    if (!pass->model->ops->record_begin)
        return 0;
    for (int i = 0; i < N_REPLAYS; i++) {
        struct replay *replay = &pass->replays[i];
        replay->seq_starts = calloc((size_t)pass->request.max_seqs + 1, sizeof *replay->seq_starts);
        replay->layers = calloc((size_t)count_layers(pass), sizeof(struct kernel_recording *));
        if (!replay->seq_starts || !replay->layers)
            return error_set(error, ERROR_NO_MEMORY, "no memory for a training pass");
    }
    return 0;
}

static void forget(const struct pass *pass, struct replay *replay)
{
    for (int64_t i = 0; replay->layers && i < count_layers(pass); i++) {
        if (replay->layers[i])
            pass->model->ops->record_free(pass->model->device, replay->layers[i]);
        replay->layers[i] = NULL;
    }
}

void replay_free(struct pass *pass)
{
    for (int i = 0; i < N_REPLAYS; i++) {
        forget(pass, &pass->replays[i]);
        free(pass->replays[i].layers);
        free(pass->replays[i].seq_starts);
    }
}

void replay_begin(struct pass *pass, const struct batch *batch, const struct pass_options *options)
{
    struct replay *replay = &pass->replays[!options->backward ? 0 : pass->fresh ? 1 : 2];
    const size_t bytes = ((size_t)batch->n_seqs + 1) * sizeof *batch->seq_starts;
    pass->replay = NULL;
    if (!replay->layers || (options->backward && pass->adapter->lora.dropout > 0))
        return;
    if (replay->n_tokens != batch->n_tokens || replay->n_seqs != batch->n_seqs ||
        memcmp(replay->seq_starts, batch->seq_starts, bytes) != 0) {
        forget(pass, replay);
        replay->n_tokens = batch->n_tokens;
        replay->n_seqs = batch->n_seqs;
        memcpy(replay->seq_starts, batch->seq_starts, bytes);
        replay->passes = 0;
    }
    if (replay->passes++)
        pass->replay = replay;
}

static int record(const struct pass *pass, layer_work *work, const void *arg,
                  struct kernel_recording **ret_recording)
{
    const struct kernel_ops *ops = pass->model->ops;
    int status = ops->record_begin(pass->model->device);
    if (status)
        return status;
    status = work(pass, arg);
    struct kernel_recording *recording = NULL;
    int ended = ops->record_end(pass->model->device, &recording);
    if (!status && !ended)
        *ret_recording = recording;
    else if (!ended)
        ops->record_free(pass->model->device, recording);
    return status ? status : ended;
}

int replay_layer(const struct pass *pass, int64_t layer, enum direction direction, layer_work *work,
                 const void *arg)
{
    const struct kernel_ops *ops = pass->model->ops;
    if (!pass->replay)
        return work(pass, arg);
    struct kernel_recording **at = &pass->replay->layers[2 * layer + direction];
    for (int attempt = 0; attempt < 2 && (*at || !record(pass, work, arg, at)); attempt++) {
        int status = ops->record_run(pass->model->device, *at);
        if (status != KERNEL_UNSUPPORTED)
            return status;
        ops->record_free(pass->model->device, *at);
        *at = NULL;
    }
    return work(pass, arg); /* where recording fails, the ops themselves say why, or just run */
}
