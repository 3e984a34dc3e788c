/* trainer.c: the training run as a state machine. The device's owner thread.
 *
 *   micro-batch, micro-batch, ... -> optimizer step -> [evaluation, a batch at a time] -> report
 *        ^                                                                     |
 *        |                            [checkpoint] <---------------------------+
 *        +--------------------------------+----> finish: [reload the best], save the adapter
 *
 * Three rules make a resumed run equal the undisturbed one bit for bit.
 *   1. `state` changes at optimizer steps and at the end of evaluations, nowhere else; it and the tensors are
 *      what a checkpoint holds. What a half accumulated step has gathered lives in `partial` and is thrown
 *      away with it.
 *   2. Micro-batches add up gradients of the *sum* of losses; the optimizer divides by the number of targets
 *      of the whole step. So a step's gradient is the mean over all its targets, however they fall into
 *      micro-batches. An epoch's last step takes what micro-batches are left.
 *   3. Random numbers are functions of (seed, step, micro-batch) and (seed, epoch), never of a generator that
 *      has been running. */
#include "engine/training/trainer.h"

#include "base/file.h"
#include "engine/training/checkpoint.h"
#include "engine/training/workload.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

enum { LOCK_WAIT_MS = 30000, LOCK_RETRY_MS = 50 };
/* When adapters must show a gradient: one factor starts at zero and moves at step 1, so the other's first
 * gradient comes at step 2; one more for a target that only another target's adapter brings to life. */
enum { PROBE_STEP = 3 };
enum { N_TARGETS = 5, N_PROBES = 2 * N_TARGETS };
/* How much of the past the smoothed rates keep from step to step. */
static const double smoothing = 0.9;

/* The step that is being accumulated. */
struct partial_step {
    int32_t n_batches;
    struct data_cursor cursor; /* after the last of them */
    double seconds;
    int64_t n_tokens;
};

struct trainer {
    struct model *model;
    const struct kernel_ops *ops;
    struct kernel_device *device;
    struct training_spec spec;
    struct trainer_callbacks callbacks;
    char *base_name, *folder, *checkpoints_folder;
    int lock_fd;

    struct workload workload;
    struct training_identity identity;
    struct adapter *adapter;
    struct pass *pass;
    struct batch *batch;
    /* All parameters, ordered so that the factors of one LoRA target lie together: probe p is
     * [probe_starts[p], probe_starts[p+1]); the A factors of target t are probe 2t, its B factors 2t + 1. */
    struct param_slice *slices;
    int32_t n_slices;
    int32_t probe_starts[N_PROBES + 1];

    struct training_state state;
    struct partial_step partial;
    struct data_cursor evaluation; /* of its next batch */
    struct checkpoint_list checkpoints;
    /* best_step as the newest checkpoint has it: a run that goes on from there will ask for that one. */
    int64_t kept_best_step;
    bool finished;
    int failed; /* the error that ended the run */

    double smoothed_tokens, smoothed_seconds; /* of training passes */
    double smoothed_step_seconds;             /* from step to step, all included */
    double last_step_at;                      /* 0 = no step since opening */

    int64_t peak_bytes;  /* of the device, as it was read last */
    double peak_read_at; /* asking a driver takes its time: not at every step */
};

static double now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void __attribute__((format(printf, 3, 4)))
say(const struct trainer *trainer, const char *level, const char *format, ...)
{
    char text[512];
    va_list args;
    if (!trainer->callbacks.message)
        return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    trainer->callbacks.message(trainer->callbacks.arg, level, text);
}

/* ---- opening ---- */

static int take_lock(struct trainer *trainer, struct error *error)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/lock", trainer->folder);
    trainer->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0640);
    if (trainer->lock_fd < 0)
        return error_set(error, ERROR_IO, "cannot open %s: %s", path, strerror(errno));
    for (int waited_ms = 0; flock(trainer->lock_fd, LOCK_EX | LOCK_NB); waited_ms += LOCK_RETRY_MS) {
        if (errno != EWOULDBLOCK && errno != EINTR)
            return error_set(error, ERROR_IO, "cannot lock %s: %s", path, strerror(errno));
        if (waited_ms >= LOCK_WAIT_MS)
            return error_set(error, ERROR_BUSY, "another worker is still training this job: %s is locked",
                             path);
        if (trainer->callbacks.yield)
            trainer->callbacks.yield(trainer->callbacks.arg);
        nanosleep(&(struct timespec){.tv_nsec = LOCK_RETRY_MS * 1000000L}, NULL);
    }
    return 0;
}

static uint64_t fingerprint_dataset(const struct dataset *dataset)
{
    uint64_t h = 0;
    if (!dataset)
        return 0;
    h = fingerprint_add(h, dataset->starts, (size_t)(dataset->n_examples + 1) * sizeof *dataset->starts);
    h = fingerprint_add(h, dataset->ids, (size_t)dataset->n_tokens * sizeof *dataset->ids);
    return fingerprint_add(h, dataset->loss, (size_t)dataset->n_tokens);
}

/* Names, types, shapes and the first bytes of every weight: enough to tell two models apart without reading
 * all of a large one back from the device. */
static int fingerprint_model(const struct trainer *trainer, uint64_t *ret, struct error *error)
{
    char head[4096];
    uint64_t h = 0;
    for (int64_t i = 0; i < model_weight_count(trainer->model); i++) {
        const struct weight *weight = model_weight(trainer->model, i);
        size_t bytes = (size_t)weight->count * kernel_type_size(weight->type);
        bytes = bytes < sizeof head ? bytes : sizeof head;
        h = fingerprint_add(h, weight->name, strlen(weight->name));
        h = fingerprint_add(h, &weight->type, sizeof weight->type);
        h = fingerprint_add(h, weight->shape, (size_t)weight->n_dims * sizeof *weight->shape);
        int code = kernel_check(trainer->ops->copy_out(trainer->device, head, weight->data, bytes),
                                "cannot read weights from the device", error);
        if (code)
            return code;
        h = fingerprint_add(h, head, bytes);
    }
    *ret = h;
    return 0;
}

static int identify(struct trainer *trainer, struct error *error)
{
    struct training_identity *identity = &trainer->identity;
    identity->spec = training_spec_encode(&trainer->spec);
    if (!identity->spec ||
        json_object_set_new(identity->spec, "seed", json_sprintf("%" PRIu64, trainer->spec.seed)))
        return error_set(error, ERROR_NO_MEMORY, "no memory to describe the job");
    identity->training_data = fingerprint_dataset(trainer->workload.training);
    identity->validation_data = fingerprint_dataset(trainer->workload.validation);
    return fingerprint_model(trainer, &identity->model, error);
}

/* The probe that a parameter belongs to; -1 for none (full fine-tuning). */
static int probe_of(const struct trainer *trainer, const struct parameter *parameter)
{
    if (trainer->spec.adaptation != ADAPT_LORA)
        return -1;
    for (int target = 0; target < N_TARGETS; target++) {
        char part[64];
        snprintf(part, sizeof part, ".%s.", lora_target_name((enum lora_target)(1 << target)));
        if (strstr(parameter->name, part))
            return 2 * target +
                   (strstr(parameter->name, ".lora_A") || strstr(parameter->name, "_embedding_A") ? 0 : 1);
    }
    return -1;
}

/* Fill slices: what no probe covers first, then probe by probe. */
static int arrange_slices(struct trainer *trainer, struct error *error)
{
    const struct adapter *adapter = trainer->adapter;
    trainer->slices = calloc((size_t)adapter->n_parameters, sizeof *trainer->slices);
    if (!trainer->slices)
        return error_set(error, ERROR_NO_MEMORY, "no memory for %" PRId64 " parameters",
                         adapter->n_parameters);
    for (int probe = -1; probe < N_PROBES; probe++) {
        if (probe >= 0)
            trainer->probe_starts[probe] = trainer->n_slices;
        for (int64_t i = 0; i < adapter->n_parameters; i++)
            if (probe_of(trainer, &adapter->parameters[i]) == probe)
                trainer->slices[trainer->n_slices++] = adapter->parameters[i].slice;
    }
    trainer->probe_starts[N_PROBES] = trainer->n_slices;
    return 0;
}

static void say_plan(const struct trainer *trainer)
{
    const struct workload *work = &trainer->workload;
    const struct memory_plan *plan = &work->plan;
    const struct training_spec *spec = &trainer->spec;
    int64_t trainable = 0;
    for (int32_t i = 0; i < trainer->n_slices; i++)
        trainable += trainer->slices[i].count;
    say(trainer, "info",
        "%" PRId64
        " trainable parameters; plan %.1f MB beyond the model's %.1f MB: parameters %.1f, gradients "
        "%.1f, optimizer %.1f, converted weights %.1f, activations %.1f, workspace %.1f",
        trainable, 1e-6 * (double)plan->total_bytes, 1e-6 * (double)model_weight_bytes(trainer->model),
        1e-6 * (double)plan->parameter_bytes, 1e-6 * (double)plan->gradient_bytes,
        1e-6 * (double)plan->optimizer_bytes, 1e-6 * (double)plan->weight_bytes,
        1e-6 * (double)plan->activation_bytes, 1e-6 * (double)plan->workspace_bytes);
    if (plan->recompute)
        say(trainer, "info",
            "to fit into memory, activations are computed again in the backward: level %" PRId64
            " of %" PRId64,
            plan->recompute, model_recompute_levels(trainer->model));
    say(trainer, "info",
        "%" PRId64 " examples, %" PRId64 " tokens (%" PRId64 " bear loss), %" PRId64
        " validation examples; %" PRId64 " steps of %" PRId32 " x %" PRId32 " rows, at most %" PRId64
        " tokens a micro-batch",
        work->training->n_examples, work->training->n_tokens, work->training->n_loss_tokens,
        work->validation ? work->validation->n_examples : 0, work->total_steps,
        spec->gradient_accumulation_steps, spec->batch_size, work->max_tokens);
    if (!spec->packing && spec->max_seq_len > work->longest)
        say(trainer, "info",
            "max_seq_len is %" PRId64 ", the longest example has %" PRId64
            " tokens: memory is planned for that",
            spec->max_seq_len, work->longest);
    if (work->training->n_truncated)
        say(trainer, "warn", "%" PRId64 " training examples were cut to %" PRId64 " tokens",
            work->training->n_truncated, spec->max_seq_len);
    if (work->training->n_dropped)
        say(trainer, "warn", "%" PRId64 " of them were left out: nothing that bears loss remained",
            work->training->n_dropped);
    if (work->validation && work->validation->n_truncated)
        say(trainer, "warn", "%" PRId64 " validation examples were cut to %" PRId64 " tokens",
            work->validation->n_truncated, spec->max_seq_len);
    if (spec->warmup_steps >= work->total_steps)
        say(trainer, "warn",
            "warmup_steps is %" PRId64 " of %" PRId64 " steps: the learning rate never reaches its peak",
            spec->warmup_steps, work->total_steps);
}

/* The checkpoint to go on from: resume_from, or when that is gone the newest in the folder, which can only
 * have superseded it. */
static int find_resumed(const struct trainer *trainer, const char *resume_from, char path[static 4096],
                        struct error *error)
{
    struct checkpoint_list list = {0};
    snprintf(path, 4096, "%s", resume_from);
    if (!access(path, F_OK))
        return 0;
    int code = checkpoint_scan(trainer->checkpoints_folder, INT64_MAX, &list, error);
    if (code)
        return code;
    if (list.count)
        checkpoint_path(trainer->checkpoints_folder, list.entries[list.count - 1].step, path);
    else
        code = error_set(error, ERROR_NOT_FOUND, "the checkpoint %s is gone", resume_from);
    free(list.entries);
    return code;
}

static int resume(struct trainer *trainer, const char *resume_from, struct error *error)
{
    struct training_state state;
    char path[4096], best[4096];
    int code = find_resumed(trainer, resume_from, path, error);
    if (!code)
        code = checkpoint_read_state(path, &trainer->identity, &state, error);
    if (!code && state.step > trainer->workload.total_steps)
        code =
            error_set(error, ERROR_CORRUPT, "%s is of step %" PRId64 ", beyond the last", path, state.step);
    if (!code && trainer->spec.load_best_at_end && state.best_step) {
        checkpoint_path(trainer->checkpoints_folder, state.best_step, best);
        if (access(best, F_OK))
            code = error_set(error, ERROR_NOT_FOUND, "the best checkpoint %s is gone", best);
    }
    if (!code)
        code = checkpoint_read_tensors(path, trainer->adapter, true, error);
    if (code)
        return code;
    trainer->state = state;
    trainer->kept_best_step = state.best_step;
    say(trainer, "info", "resumed at step %" PRId64 " of %" PRId64, state.step,
        trainer->workload.total_steps);
    return 0;
}

/* Fresh runs begin with an empty folder: what an earlier attempt left is made again. */
static int prepare_folder(struct trainer *trainer, bool fresh, struct error *error)
{
    char adapter[4096];
    int code = file_make_dirs(trainer->checkpoints_folder, error);
    if (!code)
        code = file_sync(trainer->folder, error);
    if (!code)
        code = checkpoint_scan(trainer->checkpoints_folder, fresh ? -1 : trainer->state.step,
                               &trainer->checkpoints, error);
    if (!code && fresh) {
        snprintf(adapter, sizeof adapter, "%s/adapter", trainer->folder);
        code = file_remove_tree(adapter, error);
    }
    return code;
}

int trainer_open(const struct trainer_options *options, struct trainer **ret_trainer, struct error *error)
{
    struct trainer *trainer = calloc(1, sizeof *trainer);
    if (!trainer)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a trainer");
    trainer->lock_fd = -1;
    trainer->model = options->model;
    trainer->ops = model_ops(options->model);
    trainer->device = model_device(options->model);
    trainer->spec = options->spec;
    trainer->callbacks = options->callbacks;
    trainer->state.valid_loss = trainer->state.valid_accuracy = (double)NAN;
    trainer->state.train_loss = trainer->state.train_accuracy = (double)NAN;
    trainer->state.loss_scale = loss_scale_start(options->spec.precision);
    trainer->base_name = strdup(options->base_name);
    trainer->folder = strdup(options->folder);
    int code = 0;
    if (!trainer->base_name || !trainer->folder ||
        asprintf(&trainer->checkpoints_folder, "%s/checkpoints", options->folder) < 0) {
        trainer->checkpoints_folder = NULL;
        code = error_set(error, ERROR_NO_MEMORY, "no memory for a trainer");
        goto done;
    }
    const struct workload *work = &trainer->workload;
    code = file_make_dirs(trainer->folder, error);
    if (!code)
        code = take_lock(trainer, error);
    if (!code)
        code = workload_open(options, &trainer->workload, NULL, error);
    if (!code)
        code = workload_check_memory(options, work, error);
    if (!code)
        code = identify(trainer, error);
    if (!code)
        trainer->ops->device_reset_peak(trainer->device);
    if (!code)
        code = adapter_create(trainer->model, trainer->spec.adaptation, &trainer->spec.lora,
                              trainer->spec.seed, &trainer->adapter, error);
    if (!code)
        code = pass_create(trainer->model, trainer->adapter, &work->request, &trainer->pass, error);
    if (!code)
        code = arrange_slices(trainer, error);
    if (code)
        goto done;
    say_plan(trainer);
    if (!code && batch_create(work->max_tokens, work->max_seqs, &trainer->batch))
        code = error_set(error, ERROR_NO_MEMORY, "no memory for a batch of %" PRId64 " tokens",
                         work->max_tokens);
    if (!code && options->resume_from)
        code = resume(trainer, options->resume_from, error);
    if (!code)
        code = prepare_folder(trainer, !options->resume_from, error);
    trainer->partial.cursor = trainer->state.cursor;
done:
    if (code)
        trainer_close(trainer);
    else
        *ret_trainer = trainer;
    return code;
}

void trainer_close(struct trainer *trainer)
{
    if (!trainer)
        return;
    batch_free(trainer->batch);
    pass_free(trainer->pass);
    adapter_free(trainer->adapter);
    free(trainer->slices);
    free(trainer->checkpoints.entries);
    json_decref(trainer->identity.spec);
    workload_close(&trainer->workload);
    if (trainer->lock_fd >= 0)
        close(trainer->lock_fd);
    free(trainer->checkpoints_folder);
    free(trainer->folder);
    free(trainer->base_name);
    free(trainer);
}

/* ---- the schedule ---- */

static bool is_last_step(const struct trainer *trainer)
{
    return trainer->state.step == trainer->workload.total_steps;
}

static bool ended_epoch(const struct trainer *trainer)
{
    return trainer->state.cursor.position == 0;
}

/* Does something that happens every `every` steps (0 = at the end of each epoch) fall due after this step? */
static bool falls_due(const struct trainer *trainer, int64_t every)
{
    return is_last_step(trainer) || (every ? trainer->state.step % every == 0 : ended_epoch(trainer));
}

static bool is_best(const struct trainer *trainer)
{
    return trainer->state.step && trainer->state.best_step == trainer->state.step;
}

static bool checkpoint_falls_due(const struct trainer *trainer)
{
    if (!trainer->state.step || trainer->state.evaluating)
        return false;
    return falls_due(trainer, trainer->spec.checkpoint_steps) || trainer->state.stopped ||
           (trainer->spec.load_best_at_end && is_best(trainer));
}

static bool is_over(const struct trainer *trainer)
{
    return !trainer->state.evaluating && (is_last_step(trainer) || trainer->state.stopped);
}

/* ---- checkpoints ---- */

static struct checkpoint_entry *find_entry(const struct trainer *trainer, int64_t step)
{
    for (int64_t i = 0; i < trainer->checkpoints.count; i++)
        if (trainer->checkpoints.entries[i].step == step)
            return &trainer->checkpoints.entries[i];
    return NULL;
}

/* Remove all but the newest keep_checkpoints, the newest of any kind and the best: also the one that was the
 * best when the newest was written, which is where a run goes on that ends before the next. */
static int drop_checkpoints(struct trainer *trainer, struct error *error)
{
    struct checkpoint_list *list = &trainer->checkpoints;
    int32_t kept = 0;
    for (int64_t i = list->count - 1; i >= 0; i--) {
        struct checkpoint_entry entry = list->entries[i];
        char path[4096];
        bool wanted = !entry.resumable_only &&
                      (!trainer->spec.keep_checkpoints || kept < trainer->spec.keep_checkpoints);
        kept += wanted;
        bool best = entry.step == trainer->state.best_step || entry.step == trainer->kept_best_step;
        if (wanted || i == list->count - 1 || (trainer->spec.load_best_at_end && best))
            continue;
        checkpoint_path(trainer->checkpoints_folder, entry.step, path);
        int code = file_remove_tree(path, error);
        if (code)
            return code;
        memmove(&list->entries[i], &list->entries[i + 1], (size_t)(list->count - 1 - i) * sizeof entry);
        list->count--;
        if (trainer->callbacks.checkpoint_dropped)
            trainer->callbacks.checkpoint_dropped(trainer->callbacks.arg, entry.step);
    }
    return 0;
}

/* Parameters that overflowed in the last update would only show in the next loss: keep them off the disk. */
static int check_parameters(const struct trainer *trainer, struct error *error)
{
    double sum = 0;
    for (int32_t i = 0; i < trainer->n_slices && isfinite(sum); i++) {
        struct param_slice slice = trainer->slices[i];
        slice.grad = slice.param;
        int code = pass_squares(trainer->pass, &slice, 1, &sum, error);
        if (code)
            return code;
    }
    if (!isfinite(sum))
        return error_set(error, ERROR_DIVERGED, "a parameter became NaN or infinite at step %" PRId64,
                         trainer->state.step);
    return 0;
}

static int write_checkpoint(struct trainer *trainer, struct error *error)
{
    const struct training_state *state = &trainer->state;
    struct checkpoint_list *list = &trainer->checkpoints;
    bool resumable_only = !checkpoint_falls_due(trainer);
    char path[4096];
    int code = check_parameters(trainer, error);
    if (!code)
        code = drop_checkpoints(trainer, error);
    if (code)
        return code;
    struct checkpoint_entry *entries = realloc(list->entries, (size_t)(list->count + 1) * sizeof *entries);
    if (!entries)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a checkpoint");
    list->entries = entries;
    code = checkpoint_write(trainer->checkpoints_folder, state, &trainer->identity, resumable_only,
                            trainer->adapter, trainer->base_name, error);
    if (code)
        return code;
    struct checkpoint_entry *entry = find_entry(trainer, state->step);
    if (!entry)
        entry = &list->entries[list->count++];
    *entry = (struct checkpoint_entry){state->step, resumable_only};
    trainer->kept_best_step = state->best_step;
    if (!trainer->callbacks.checkpoint)
        return 0;
    checkpoint_path(trainer->checkpoints_folder, state->step, path);
    const struct training_checkpoint report = {
        .step = state->step,
        .folder = path,
        .train_loss = state->train_loss,
        .train_accuracy = state->train_accuracy,
        .valid_loss = state->valid_loss,
        .valid_accuracy = state->valid_accuracy,
        .best = is_best(trainer),
        .resumable_only = resumable_only,
    };
    trainer->callbacks.checkpoint(trainer->callbacks.arg, &report);
    return 0;
}

int trainer_checkpoint(struct trainer *trainer, struct error *error)
{
    if (trainer->failed)
        return error_set(error, trainer->failed, "the run has failed: there is nothing to keep");
    return find_entry(trainer, trainer->state.step) ? 0 : write_checkpoint(trainer, error);
}

/* ---- a step ---- */

/* Philox key of a micro-batch's dropout (the finalizer of splitmix64, Steele et al. 2014). */
static uint64_t dropout_seed(uint64_t seed, int64_t step, int32_t batch)
{
    uint64_t words[] = {(uint64_t)step, (uint64_t)batch};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        seed += UINT64_C(0x9e3779b97f4a7c15) + words[i];
        seed = (seed ^ seed >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        seed = (seed ^ seed >> 27) * UINT64_C(0x94d049bb133111eb);
        seed ^= seed >> 31;
    }
    return seed;
}

/* An adapter that takes no part in the forward pass has no gradient, and training it would be a lie. One
 * look, at step PROBE_STEP: each factor of a projection must have a gradient by then, and one of an
 * embedding's (the other's is that of tokens seen before, of which this step may have none). */
static int probe_gradients(const struct trainer *trainer, int64_t step, struct error *error)
{
    int64_t total_steps = trainer->workload.total_steps;
    if (trainer->state.loss_scale
            .skipped_steps) /* the factors move later then: the look is not worth a story */
        return 0;
    if (step != (total_steps < PROBE_STEP ? total_steps : PROBE_STEP))
        return 0;
    for (int t = 0; t < N_TARGETS; t++) {
        enum lora_target target = (enum lora_target)(1 << t);
        int n_live = 0, n_wanted = step == 1 || target == TARGET_EMBEDDINGS ? 1 : 2;
        if (trainer->probe_starts[2 * t] == trainer->probe_starts[2 * t + 2])
            continue;
        for (int probe = 2 * t; probe < 2 * t + 2; probe++) {
            int32_t begin = trainer->probe_starts[probe], end = trainer->probe_starts[probe + 1];
            double sum = 0;
            int code = pass_squares(trainer->pass, trainer->slices + begin, end - begin, &sum, error);
            if (code)
                return code;
            n_live += sum > 0;
        }
        if (n_live < n_wanted)
            return error_set_param(
                error, ERROR_INVALID, "lora.targets",
                "the adapter on %s takes no part in this model: its gradient is exactly zero "
                "at step %" PRId64,
                lora_target_name(target), step);
    }
    return 0;
}

/* What gradients of the step's sum of losses are multiplied by. */
static float loss_factor(const struct trainer *trainer)
{
    return loss_scale_factor(&trainer->state.loss_scale,
                             trainer->workload.max_tokens * trainer->spec.gradient_accumulation_steps);
}

/* Leave the parameters as they are, when a smaller scale of the loss may bring finite gradients. */
static int skip_update(struct trainer *trainer, int64_t step, struct error *error)
{
    double scale = trainer->state.loss_scale.scale;
    int status = 0;
    if (!loss_scale_skip(&trainer->state.loss_scale))
        return error_set(error, ERROR_DIVERGED, "the loss or its gradient became NaN or infinite");
    for (int32_t i = 0; !status && i < trainer->n_slices; i++)
        status = trainer->ops->zero(trainer->device, trainer->slices[i].grad,
                                    (size_t)trainer->slices[i].count * sizeof(float));
    say(trainer, "info",
        "step %" PRId64 " is skipped: a gradient overflowed with the loss times %.6g, which falls to %.6g",
        step, scale, trainer->state.loss_scale.scale);
    return kernel_check(status, "cannot clear the gradients", error);
}

/* Clip and apply the accumulated gradients. A step without a single target (examples of one token) changes
 * nothing. */
static int update_parameters(struct trainer *trainer, int64_t step, float learning_rate,
                             const struct pass_result *result, double *ret_norm, struct error *error)
{
    const struct training_spec *spec = &trainer->spec;
    double n_targets = (double)result->n_targets, clip = 1;
    double total =
        n_targets * (double)loss_factor(trainer); /* what the gradients are times those of the mean */
    *ret_norm = 0;
    if (!result->n_targets)
        return 0;
    double norm = sqrt(result->squares) / total;
    if (!isfinite(norm) || !isfinite(result->loss_sum)) {
        *ret_norm = (double)NAN;
        return skip_update(trainer, step, error);
    }
    int code = probe_gradients(trainer, step, error);
    if (code)
        return code;
    if (spec->max_grad_norm > 0 && norm > (double)spec->max_grad_norm)
        clip = (double)spec->max_grad_norm / norm;
    const struct adamw_args args = {
        .slices = trainer->slices,
        .n_slices = trainer->n_slices,
        .lr = learning_rate,
        .beta1 = spec->beta1,
        .beta2 = spec->beta2,
        .eps = spec->eps,
        .weight_decay = spec->weight_decay,
        .step = step - trainer->state.loss_scale.skipped_steps,
        .grad_scale = (float)(clip / total),
    };
    *ret_norm = norm;
    loss_scale_keep(&trainer->state.loss_scale);
    return kernel_check(trainer->ops->adamw(trainer->device, &args), "cannot update the parameters", error);
}

static void note_speed(struct trainer *trainer)
{
    double now = now_seconds(), previous = trainer->last_step_at;
    trainer->smoothed_tokens = smoothing * trainer->smoothed_tokens + (double)trainer->partial.n_tokens;
    trainer->smoothed_seconds = smoothing * trainer->smoothed_seconds + trainer->partial.seconds;
    if (previous > 0 && trainer->smoothed_step_seconds > 0)
        trainer->smoothed_step_seconds += (1 - smoothing) * (now - previous - trainer->smoothed_step_seconds);
    else
        trainer->smoothed_step_seconds = previous > 0 ? now - previous : trainer->partial.seconds;
    trainer->last_step_at = now;
}

static void read_peak(struct trainer *trainer)
{
    struct kernel_device_info info;
    double now = now_seconds();
    if (trainer->peak_bytes && now - trainer->peak_read_at < 1)
        return;
    if (trainer->ops->device_query(trainer->device, &info) == KERNEL_OK)
        trainer->peak_bytes = info.peak_bytes;
    trainer->peak_read_at = now;
}

static void report_step(const struct trainer *trainer)
{
    const struct training_state *state = &trainer->state;
    const struct training_metrics metrics = {
        .step = state->step,
        .total_steps = trainer->workload.total_steps,
        .epoch = state->cursor.epoch + !ended_epoch(trainer),
        .train_loss = state->train_loss,
        .train_accuracy = state->train_accuracy,
        .learning_rate = state->learning_rate,
        .grad_norm = state->grad_norm,
        .tokens_per_second =
            trainer->smoothed_seconds > 0 ? trainer->smoothed_tokens / trainer->smoothed_seconds : 0,
        .trained_tokens = state->trained_tokens,
        .has_valid = !isnan(state->valid_loss),
        .valid_loss = state->valid_loss,
        .valid_accuracy = state->valid_accuracy,
    };
    if (trainer->callbacks.metrics)
        trainer->callbacks.metrics(trainer->callbacks.arg, &metrics);
}

/* The step and its evaluation are over. */
static int conclude_step(struct trainer *trainer, struct error *error)
{
    read_peak(trainer);
    report_step(trainer);
    if (trainer->state.stopped)
        say(trainer, "info",
            "stopped early at step %" PRId64 ": %" PRId64
            " evaluations in a row without a validation loss under "
            "%.6g; the best was %.6g at step %" PRId64,
            trainer->state.step, trainer->state.stale_evaluations,
            trainer->state.patience_loss - (double)trainer->spec.early_stopping_min_delta,
            trainer->state.best_loss, trainer->state.best_step);
    return checkpoint_falls_due(trainer) ? write_checkpoint(trainer, error) : 0;
}

static int take_step(struct trainer *trainer, struct error *error)
{
    struct training_state *state = &trainer->state;
    const struct partial_step *partial = &trainer->partial;
    struct pass_result result;
    double norm = 0, started = now_seconds();
    int64_t step = state->step + 1;
    float learning_rate = training_learning_rate(&trainer->spec, step, trainer->workload.total_steps);
    int code = pass_collect(trainer->pass, trainer->slices, trainer->n_slices, &result, error);
    if (!code)
        code = update_parameters(trainer, step, learning_rate, &result, &norm, error);
    if (code) {
        error_prefix(error, "step %" PRId64 ": ", step);
        return code;
    }
    double n_targets = result.n_targets ? (double)result.n_targets : 1;
    state->step = step;
    state->cursor = partial->cursor;
    state->trained_tokens += partial->n_tokens;
    state->train_loss = isfinite(result.loss_sum) ? result.loss_sum / n_targets : (double)NAN;
    state->train_accuracy = (double)result.n_correct / n_targets;
    state->learning_rate = (double)learning_rate;
    state->grad_norm = norm;
    state->valid_loss = state->valid_accuracy = (double)NAN;
    state->evaluating = trainer->workload.validation && falls_due(trainer, trainer->spec.eval_steps);
    trainer->partial.seconds += now_seconds() - started;
    note_speed(trainer);
    trainer->partial = (struct partial_step){.cursor = state->cursor};
    trainer->evaluation = (struct data_cursor){0};
    return state->evaluating ? 0 : conclude_step(trainer, error);
}

/* No more than one pass lies queued: whoever else wants the device waits no longer than that. */
static int wait_for_pass(const struct trainer *trainer, struct error *error)
{
    return kernel_check(trainer->ops->synchronize(trainer->device), "the device failed", error);
}

static int advance_training(struct trainer *trainer, struct error *error)
{
    struct partial_step *partial = &trainer->partial;
    const struct training_spec *spec = &trainer->spec;
    int64_t step = trainer->state.step + 1;
    double started = now_seconds();
    int code = dataset_next_batch(trainer->workload.training, spec->seed, true, spec->batch_size,
                                  spec->packing, spec->max_seq_len, &partial->cursor, trainer->batch, error);
    if (code)
        return code;
    if (partial->n_batches && (code = wait_for_pass(trainer, error)))
        return code;
    const struct pass_options options = {
        .backward = true,
        .first = !partial->n_batches,
        .grad_scale = loss_factor(trainer),
        .dropout_seed = dropout_seed(spec->seed, step, partial->n_batches),
        .yield = trainer->callbacks.yield,
        .yield_arg = trainer->callbacks.arg,
    };
    code = pass_run(trainer->pass, trainer->batch, &options, error);
    if (code) {
        error_prefix(error, "step %" PRId64 ": ", step);
        return code;
    }
    partial->n_batches++;
    partial->n_tokens += trainer->batch->n_tokens;
    partial->seconds += now_seconds() - started;
    if (partial->n_batches < spec->gradient_accumulation_steps && partial->cursor.position)
        return 0;
    return take_step(trainer, error);
}

/* ---- evaluation ---- */

static void conclude_evaluation(struct trainer *trainer, const struct pass_result *result)
{
    struct training_state *state = &trainer->state;
    const struct training_spec *spec = &trainer->spec;
    state->evaluating = false;
    state->valid_loss = result->loss_sum / (double)result->n_targets;
    state->valid_accuracy = (double)result->n_correct / (double)result->n_targets;
    bool first = !state->best_step;
    if (first || state->valid_loss < state->best_loss) {
        state->best_step = state->step;
        state->best_loss = state->valid_loss;
    }
    if (first || state->valid_loss < state->patience_loss - (double)spec->early_stopping_min_delta) {
        state->patience_loss = state->valid_loss;
        state->stale_evaluations = 0;
    } else {
        state->stale_evaluations++;
    }
    state->stopped =
        spec->early_stopping_patience && state->stale_evaluations >= spec->early_stopping_patience;
}

static int advance_evaluation(struct trainer *trainer, struct error *error)
{
    const struct training_spec *spec = &trainer->spec;
    struct pass_result result;
    int code =
        dataset_next_batch(trainer->workload.validation, spec->seed, false, spec->batch_size, spec->packing,
                           spec->max_seq_len, &trainer->evaluation, trainer->batch, error);
    if (code)
        return code;
    if ((code = wait_for_pass(trainer, error)))
        return code;
    const struct pass_options options = {.yield = trainer->callbacks.yield,
                                         .yield_arg = trainer->callbacks.arg};
    code = pass_run(trainer->pass, trainer->batch, &options, error);
    bool more = trainer->evaluation.position;
    if (!code && !more)
        code = pass_collect(trainer->pass, NULL, 0, &result, error);
    if (!code && !more && !isfinite(result.loss_sum))
        code = error_set(error, ERROR_DIVERGED, "the loss is not finite");
    if (code)
        error_prefix(error, "evaluation after step %" PRId64 ": ", trainer->state.step);
    if (code || more)
        return code;
    conclude_evaluation(trainer, &result);
    return conclude_step(trainer, error);
}

/* ---- the end ---- */

static int finish(struct trainer *trainer, struct error *error)
{
    const struct training_state *state = &trainer->state;
    char path[4096];
    int code = 0;
    if (trainer->spec.load_best_at_end && state->best_step && state->best_step != state->step) {
        checkpoint_path(trainer->checkpoints_folder, state->best_step, path);
        code = checkpoint_read_tensors(path, trainer->adapter, false, error);
        if (!code)
            say(trainer, "info", "the adapter is that of step %" PRId64 ", the lowest validation loss (%.6g)",
                state->best_step, state->best_loss);
    }
    if (!code)
        code =
            checkpoint_save_adapter(trainer->folder, "adapter", trainer->adapter, trainer->base_name, error);
    if (!code)
        code = drop_checkpoints(trainer, error);
    trainer->finished = !code;
    return code;
}

int trainer_advance(struct trainer *trainer, struct error *error)
{
    int code = 0;
    if (trainer->failed)
        return error_set(error, trainer->failed, "the run has failed already");
    if (trainer->finished)
        return TRAINER_FINISHED;
    if (trainer->state.evaluating)
        code = advance_evaluation(trainer, error);
    else if (is_over(trainer))
        code = finish(trainer, error);
    else
        code = advance_training(trainer, error);
    trainer->failed = code;
    return code ? code : trainer->finished ? TRAINER_FINISHED : TRAINER_MORE;
}

void trainer_status(const struct trainer *trainer, struct trainer_status *ret_status)
{
    const struct workload *work = &trainer->workload;
    int64_t left = trainer->finished || trainer->state.stopped ? 0 : work->total_steps - trainer->state.step;
    *ret_status = (struct trainer_status){
        .step = trainer->state.step,
        .total_steps = work->total_steps,
        .trained_tokens = trainer->state.trained_tokens,
        .skipped_steps = trainer->state.loss_scale.skipped_steps,
        .loss_scale = trainer->state.loss_scale.scale > 0 ? trainer->state.loss_scale.scale : (double)NAN,
        .planned_bytes = model_weight_bytes(trainer->model) + work->plan.total_bytes,
        .peak_bytes = trainer->peak_bytes,
        .bytes_per_token = (double)trainer->peak_bytes / (double)work->max_tokens,
        .eta_seconds =
            trainer->smoothed_step_seconds > 0 ? (double)left * trainer->smoothed_step_seconds : (double)NAN,
    };
}
