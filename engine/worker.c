/* worker.c: the process that owns one device: its main loop. One thread.
 *
 * The loop takes in frames, answers what can be answered at once, gives the running job a quantum (one
 * micro-batch), then the generators theirs (one step each). So that completions do not wait for a whole
 * micro-batch, the trainer calls worker_yield between layers, and the same is done there, with two
 * differences: frames that start, stop or look into jobs only join a queue, for a trainer is in the middle of
 * its work; and generation takes no more time than training had since its last turn.
 *
 * The process lives for the daemon at the other end of the stream. When the stream ends it leaves at once, in
 * the middle of whatever it does: a job's last checkpoint is whole at any moment, and the next daemon may
 * already be starting that job again. */
#include "engine/worker_internal.h"

#include "base/log.h"

#include <ctype.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum {
    DEFAULT_MAX_SEQS = 16,
    DEFAULT_PREFILL_TOKENS = 512,
    DEFAULT_HEARTBEAT_MS = 1000,
    MAX_CREDIT_US = 50000, /* generation takes no longer turns than this, whatever training took */
    DRAIN_MS = 5000,       /* for the last frames */
    CPU_NICENESS = 5,      /* the daemon answers first */
    SLOW_DISK_BYTES_PER_MS = 20000,
};

int64_t worker_now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

void worker_fault(struct worker *worker, const struct error *error)
{
    struct error *fault = &worker->fault;
    const char *driver = worker->device ? worker->ops->device_fault(worker->device) : NULL;
    if (fault->code)
        return;
    error_set(fault, error->code, "%s%s%.100s%s", error->message, driver ? " (" : "", driver ? driver : "",
              driver ? ")" : "");
    log_write(LOG_ERROR, "the worker must end", "job", worker->job.name, "reason", fault->message, NULL);
}

void worker_fail(struct worker *worker, uint64_t id, const struct error *error)
{
    if (error->code == ERROR_DEVICE)
        worker_fault(worker, error);
    worker_stream_send(&worker->stream, FRAME_FAILED, id, frame_error_payload(error));
}

/* ---- frames that are answered at once ---- */

static int get_model(struct worker *worker, const json_t *payload, struct loaded_model **ret_model,
                     struct error *error)
{
    struct named_folder name;
    int status = field_folder(payload, "model", &name, error);
    return status ? status : loaded_models_get(&worker->models, &name, ret_model, error);
}

static int answer_load(struct worker *worker, uint64_t id, const json_t *payload, struct error *error)
{
    struct loaded_model *model;
    int status = get_model(worker, payload, &model, error);
    if (status)
        return status;
    worker_stream_send(
        &worker->stream, FRAME_LOADED, id,
        json_pack("{s:o, s:s, s:I, s:I, s:I, s:I, s:f}", "model", frame_text(model->id, strlen(model->id)),
                  "family", model_config(model->model)->family, "vocab_size",
                  (json_int_t)model_config(model->model)->vocab_size, "parameters",
                  (json_int_t)model_parameter_count(model->model), "weight_bytes",
                  (json_int_t)model_weight_bytes(model->model), "state_bytes",
                  (json_int_t)model_state_bytes(model->model), "seconds", model->load_seconds));
    return 0;
}

static int answer_tokenize(struct worker *worker, uint64_t id, const json_t *payload, struct error *error)
{
    struct loaded_model *model;
    const char *text;
    struct token_list ids = {0};
    int status = field_string(payload, "text", &text, error);
    if (!status)
        status = get_model(worker, payload, &model, error);
    if (!status)
        status = tokenizer_encode(model->tokenizer, text,
                                  json_string_length(json_object_get(payload, "text")), &ids, error);
    if (!status) {
        json_t *tokens = json_array();
        for (size_t i = 0; i < ids.count; i++)
            json_array_append_new(tokens, json_integer(ids.ids[i]));
        worker_stream_send(&worker->stream, FRAME_TOKENS, id, json_pack("{s:o}", "tokens", tokens));
    }
    token_list_free(&ids);
    return status;
}

static int answer_detokenize(struct worker *worker, uint64_t id, const json_t *payload, struct error *error)
{
    struct loaded_model *model;
    const json_t *tokens, *token;
    struct token_list ids = {0};
    struct buffer text = {0};
    size_t i;
    int status = field_array(payload, "tokens", &tokens, error);
    if (!status)
        status = get_model(worker, payload, &model, error);
    if (status)
        return status;
    json_array_foreach(tokens, i, token)
    {
        json_int_t value = json_is_integer(token) ? json_integer_value(token) : -1;
        if (value < 0 || value >= tokenizer_size(model->tokenizer)) {
            status = error_set_param(error, ERROR_INVALID, "tokens",
                                     "token %zu is not an id of the vocabulary (0 to %d)", i,
                                     tokenizer_size(model->tokenizer) - 1);
            goto done;
        }
        if ((status = token_list_push(&ids, (int32_t)value)))
            goto done;
    }
    status = tokenizer_decode(model->tokenizer, ids.ids, ids.count, false, &text, error);
    if (!status)
        worker_stream_send(&worker->stream, FRAME_TEXT, id,
                           json_pack("{s:o}", "text", frame_text(text.data ? text.data : "", text.length)));
done:
    token_list_free(&ids);
    buffer_free(&text);
    return status;
}

static json_t *encode_special(const struct tokenizer *tokenizer, int32_t id)
{
    size_t length = 0;
    const char *bytes = id >= 0 ? tokenizer_bytes(tokenizer, id, &length) : NULL;
    return bytes ? frame_text(bytes, length) : json_null();
}

static int answer_tokenizer_info(struct worker *worker, uint64_t id, const json_t *payload,
                                 struct error *error)
{
    struct loaded_model *model;
    int status = get_model(worker, payload, &model, error);
    if (status)
        return status;
    const struct model_config *config = model_config(model->model);
    const struct tokenizer *tokenizer = model->tokenizer;
    worker_stream_send(
        &worker->stream, FRAME_INFO, id,
        json_pack("{s:o, s:o, s:o, s:o}", "eos_token", encode_special(tokenizer, config->eos_id), "bos_token",
                  encode_special(tokenizer, config->bos_id), "pad_token",
                  encode_special(tokenizer, config->pad_id), "chat_template",
                  config->chat_template[0] ? json_string(config->chat_template) : json_null()));
    return 0;
}

static int configure(struct worker *worker, const json_t *payload, struct error *error)
{
    int64_t max_seqs, prefill_tokens, heartbeat_ms;
    int status;
    if ((status = field_integer(payload, "max_seqs", 1, 1 << 16, &max_seqs, error)) ||
        (status = field_integer(payload, "prefill_tokens", 1, 1 << 20, &prefill_tokens, error)) ||
        (status = field_integer(payload, "heartbeat_ms", 1, 3600 * 1000, &heartbeat_ms, error)))
        return status;
    worker->models.max_seqs = (int32_t)max_seqs;
    worker->models.prefill_tokens = prefill_tokens;
    worker->heartbeat_ms = heartbeat_ms;
    worker->next_heartbeat_ms = 0;
    return 0;
}

static void forget(struct worker *worker, const json_t *payload)
{
    const char *model = json_string_value(json_object_get(payload, "model"));
    const char *adapter = json_string_value(json_object_get(payload, "adapter"));
    if (model)
        loaded_models_forget_model(&worker->models, model);
    if (adapter)
        loaded_models_forget_adapter(&worker->models, adapter);
}

/* ---- frames ---- */

static void append_waiting(struct worker *worker, struct waiting_frame *waiting)
{
    waiting->next = NULL;
    if (worker->waiting_last)
        worker->waiting_last->next = waiting;
    else
        worker->waiting_first = waiting;
    worker->waiting_last = waiting;
}

static int put_off(struct worker *worker, struct frame *frame, struct error *error)
{
    struct waiting_frame *waiting = calloc(1, sizeof *waiting);
    if (!waiting)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a frame");
    waiting->frame = *frame;
    json_incref(frame->payload);
    append_waiting(worker, waiting);
    return 0;
}

/* Take a frame that waits out of its list; previous: the one before it, or NULL. Free it. */
static struct waiting_frame *unlink_waiting(struct worker *worker, struct waiting_frame *previous)
{
    struct waiting_frame **link = previous ? &previous->next : &worker->waiting_first, *found = *link;
    *link = found->next;
    if (worker->waiting_last == found)
        worker->waiting_last = previous;
    return found;
}

static void free_waiting(struct waiting_frame *waiting)
{
    json_decref(waiting->frame.payload);
    free(waiting);
}

/* A request that is still put off is never begun. Returns false where there is none of that id. */
static bool cancel_waiting(struct worker *worker, uint64_t id)
{
    struct waiting_frame *found = worker->waiting_first, *previous = NULL;
    struct error error = {0};
    for (; found && found->frame.id != id; found = found->next)
        previous = found;
    if (!id || !found)
        return false;
    error_set(&error, ERROR_CANCELLED, "cancelled");
    worker_fail(worker, id, &error);
    free_waiting(unlink_waiting(worker, previous));
    return true;
}

/* The same for a job that waits for room. */
static bool stop_waiting(struct worker *worker, const json_t *stop)
{
    struct waiting_frame *previous = NULL;
    for (struct waiting_frame *found = worker->waiting_first; found; previous = found, found = found->next)
        if (found->for_room && worker_job_stop_unstarted(worker, found->frame.payload, stop)) {
            free_waiting(unlink_waiting(worker, previous));
            return true;
        }
    return false;
}

static void dispatch(struct worker *worker, struct frame *frame)
{
    struct error error = {0};
    const json_t *payload = frame->payload;
    int status = 0;
    switch (frame->type) {
    case FRAME_COMPLETE:
        worker_complete(worker, frame->id, payload);
        break;
    case FRAME_CANCEL:
        if (!cancel_waiting(worker, frame->id))
            worker_cancel(worker, frame->id);
        break;
    case FRAME_LOAD:
        status = answer_load(worker, frame->id, payload, &error);
        break;
    case FRAME_TOKENIZE:
        status = answer_tokenize(worker, frame->id, payload, &error);
        break;
    case FRAME_DETOKENIZE:
        status = answer_detokenize(worker, frame->id, payload, &error);
        break;
    case FRAME_TOKENIZER_INFO:
        status = answer_tokenizer_info(worker, frame->id, payload, &error);
        break;
    case FRAME_CONFIGURE:
        status = configure(worker, payload, &error);
        break;
    case FRAME_UNLOAD:
        forget(worker, payload);
        break;
    case FRAME_JOB_PLAN:
        if (!worker_job_plan(worker, frame->id, payload, true))
            status = put_off(worker, frame, &error);
        break;
    case FRAME_EVALUATION_VALIDATE:
    case FRAME_EVALUATION_START:
    case FRAME_JOB_VALIDATE:
    case FRAME_JOB_START:
    case FRAME_JOB_STOP:
    case FRAME_SHUTDOWN:
        status = put_off(worker, frame, &error);
        break;
    default:
        status = error_set(&error, ERROR_INVALID, "a worker does not answer \"%s\" frames",
                           frame_type_name(frame->type));
    }
    if (status)
        worker_fail(worker, frame->id, &error);
    json_decref(frame->payload);
}

/* The next of the frames that had to wait, if one may be handled now. Not from inside a trainer call. */
static bool handle_waiting(struct worker *worker)
{
    struct waiting_frame *waiting = worker->waiting_first, *previous = NULL;
    for (; waiting && waiting->for_room && !loaded_models_idle(&worker->models); waiting = waiting->next)
        previous = waiting;
    if (!waiting)
        return false;
    unlink_waiting(worker, previous);
    const struct frame *frame = &waiting->frame;
    if (frame->type == FRAME_JOB_START && !worker_job_start(worker, frame->payload)) {
        waiting->for_room = true;
        append_waiting(worker, waiting);
        return true;
    }
    if (frame->type == FRAME_JOB_VALIDATE)
        worker_job_validate(worker, frame->id, frame->payload);
    else if (frame->type == FRAME_JOB_PLAN)
        worker_job_plan(worker, frame->id, frame->payload, false);
    else if (frame->type == FRAME_JOB_STOP && !stop_waiting(worker, frame->payload))
        worker_job_stop(worker, frame->payload);
    else if (frame->type == FRAME_EVALUATION_VALIDATE)
        worker_evaluation_validate(worker, frame->id, frame->payload);
    else if (frame->type == FRAME_EVALUATION_START)
        worker_evaluation_start(worker, frame->payload);
    else if (frame->type == FRAME_SHUTDOWN)
        worker->shutdown = true;
    free_waiting(waiting);
    return true;
}

/* ---- the loop's parts ---- */

/* What of the device's memory this process holds: on the host its resident pages. */
static int64_t resident_bytes(const struct worker *worker)
{
    if (!worker->device_info.is_host)
        return worker->device_info.total_bytes - worker->device_info.free_bytes;
    long long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file) {
        if (fscanf(file, "%*s %lld", &pages) != 1)
            pages = 0;
        fclose(file);
    }
    return (int64_t)pages * sysconf(_SC_PAGESIZE);
}

static void send_status(struct worker *worker, int64_t grace_ms)
{
    worker->ops->device_query(worker->device, &worker->device_info);
    int running = 0, waiting = 0;
    json_t *models = json_array();
    for (const struct loaded_model *model = worker->models.first; model; model = model->next) {
        struct generator_status status;
        generator_status(model->generator, &status);
        running += status.running;
        waiting += status.waiting;
        json_array_append_new(models, frame_text(model->id, strlen(model->id)));
    }
    worker_stream_send(&worker->stream, FRAME_STATUS, 0,
                       json_pack("{s:I, s:I, s:I, s:I, s:I, s:i, s:i, s:o}", "total_bytes",
                                 (json_int_t)worker->device_info.total_bytes, "free_bytes",
                                 (json_int_t)worker->device_info.free_bytes, "resident_bytes",
                                 (json_int_t)resident_bytes(worker), "allocated_bytes",
                                 (json_int_t)worker->device_info.allocated_bytes, "grace_ms",
                                 (json_int_t)grace_ms, "running", running, "waiting", waiting, "models",
                                 models));
}

/* A model is about to be loaded: from a disk that is slow the daemon waits for the next heartbeat accordingly. */
static void on_loading(void *arg, int64_t bytes)
{
    struct worker *worker = arg;
    send_status(worker, bytes / SLOW_DISK_BYTES_PER_MS);
    worker_stream_flush(&worker->stream);
}

/* Take in and give out frames, and the heartbeat when it is due. Returns 0 or why the process must end. */
static int pump(struct worker *worker)
{
    int64_t now_ms = worker_now_us() / 1000;
    if (now_ms >= worker->next_heartbeat_ms) {
        worker->next_heartbeat_ms = now_ms + worker->heartbeat_ms;
        send_status(worker, 0);
    }
    worker_stream_pump(&worker->stream);
    struct frame frame;
    while (worker_stream_next(&worker->stream, &frame) > 0)
        dispatch(worker, &frame);
    worker_stream_flush(&worker->stream);
    return worker->stream.failure ? worker->stream.failure : worker->fault.code;
}

/* One quantum of every generator that has work. Their requests hear of failures themselves. */
static void generate(struct worker *worker)
{
    for (struct loaded_model *model = worker->models.first; model; model = model->next) {
        struct error error = {0};
        if (generator_idle(model->generator) || generator_advance(model->generator, &error) >= 0)
            continue;
        log_write(LOG_ERROR, "generation failed", "model", model->id, "reason", error.message, NULL);
        if (error.code == ERROR_DEVICE)
            worker_fault(worker, &error);
    }
}

/* Generation's turn while a job trains: as long as training took since the last one, debts included. Returns
 * as pump(). */
static int generate_in_turn(struct worker *worker)
{
    int64_t now = worker_now_us();
    worker->credit_us += now - worker->trained_since_us;
    if (worker->credit_us > MAX_CREDIT_US)
        worker->credit_us = MAX_CREDIT_US;
    int status = pump(worker);
    while (!status && worker->credit_us > 0 && !loaded_models_idle(&worker->models)) {
        generate(worker);
        status = pump(worker);
        int64_t before = now;
        now = worker_now_us();
        worker->credit_us -= now - before;
    }
    if (worker->credit_us > 0)
        worker->credit_us = 0; /* nothing waits: time is not saved up */
    worker->trained_since_us = worker_now_us();
    return status;
}

/* The last words of a process that ends by itself; to nobody, when it ends because the daemon is gone. */
static void send_fault(struct worker *worker)
{
    const char *reason = worker->fault.message;
    if (worker->fault.code)
        worker_stream_send(&worker->stream, FRAME_FAULT, 0,
                           json_pack("{s:o}", "reason", frame_text(reason, strlen(reason))));
    worker_stream_drain(&worker->stream, worker->fault.code ? DRAIN_MS : 0);
}

void worker_yield(void *arg)
{
    struct worker *worker = arg;
    if (!generate_in_turn(worker))
        return;
    log_write(LOG_WARN, "leaving in the middle of a job", "reason",
              worker->fault.code ? worker->fault.message : worker->stream.error.message, NULL);
    send_fault(worker);
    _exit(EXIT_FAILURE);
}

static int milliseconds_to_heartbeat(const struct worker *worker)
{
    int64_t left = worker->next_heartbeat_ms - worker_now_us() / 1000;
    return left > 0 ? (int)left : 0;
}

static int run_loop(struct worker *worker)
{
    for (;;) {
        bool busy = worker->job.trainer || worker->evaluation || worker->waiting_first ||
                    !loaded_models_idle(&worker->models);
        if (!busy)
            worker_stream_wait(&worker->stream, milliseconds_to_heartbeat(worker));
        int status = pump(worker);
        while (!status && !worker->shutdown && handle_waiting(worker))
            status = pump(worker);
        if (!status && worker->shutdown)
            return 0;
        if (!status && worker->job.trainer) {
            worker_job_advance(worker);
            status = worker->job.trainer ? generate_in_turn(worker) : pump(worker);
        } else if (!status && worker->evaluation && !worker_evaluation_waits(worker)) {
            worker_evaluation_advance(worker);
            status = worker->evaluation ? generate_in_turn(worker) : pump(worker);
        } else if (!status) {
            generate(worker);
        }
        loaded_models_sweep(&worker->models);
        if (status)
            return status;
    }
}

/* ---- opening and closing ---- */

/* The number in "cuda:N", or -1. */
static int cuda_index(const char *name)
{
    if (strncmp(name, "cuda:", 5) != 0 || !isdigit((unsigned char)name[5]))
        return -1;
    char *end;
    long index = strtol(name + 5, &end, 10);
    return *end == '\0' && index < 1000 ? (int)index : -1;
}

static int open_device(struct worker *worker, struct error *error)
{
    const char *name = worker->options->device;
    bool is_cpu = !strcmp(name, "cpu");
    int index = is_cpu ? 0 : cuda_index(name);
    if (index < 0)
        return error_set_param(error, ERROR_INVALID, "device", "\"%s\" is not a device: cpu or cuda:N", name);
    if (is_cpu)
        setpriority(PRIO_PROCESS, 0, CPU_NICENESS); /* inherited by the device's threads */
    worker->ops = worker->options->ops ? worker->options->ops : is_cpu ? kernels_cpu() : kernels_cuda();
    if (worker->ops == NULL)
        return error_set_param(error, ERROR_UNSUPPORTED, "device", "this build has no CUDA backend");
    int status = worker->ops->device_open(index, worker->options->threads, &worker->device);
    if (status == KERNEL_UNSUPPORTED)
        return error_set(error, ERROR_DEVICE,
                         "device %s does not open: no NVIDIA driver (or one too old), or no cuBLAS", name);
    if (status == KERNEL_INVALID)
        return error_set(error, ERROR_DEVICE, "device %s does not open: there is no such GPU", name);
    if (status == KERNEL_OK)
        status = worker->ops->device_query(worker->device, &worker->device_info);
    if (status != KERNEL_OK)
        return error_set(error, ERROR_DEVICE, "device %s does not open: %s", name,
                         kernel_status_text(status));
    worker->idle_bytes = worker->device_info.allocated_bytes;
    worker->models.ops = worker->ops;
    worker->models.device = worker->device;
    worker->models.loading = on_loading;
    worker->models.loading_arg = worker;
    return 0;
}

static void send_hello(struct worker *worker)
{
    const struct kernel_device_info *info = &worker->device_info;
    worker_stream_send(&worker->stream, FRAME_HELLO, 0,
                       json_pack("{s:i, s:s, s:o, s:i, s:i, s:I, s:I}", "version", PROTOCOL_VERSION, "device",
                                 worker->options->device, "device_name",
                                 frame_text(info->name, strlen(info->name)), "pid", (int)getpid(), "threads",
                                 info->threads, "total_bytes", (json_int_t)info->total_bytes, "free_bytes",
                                 (json_int_t)info->free_bytes));
}

static void close_worker(struct worker *worker)
{
    worker_job_abandon(worker);
    worker_evaluation_abandon(worker);
    loaded_models_free(&worker->models);
    worker_stream_drain(&worker->stream, DRAIN_MS);
    while (worker->waiting_first)
        free_waiting(unlink_waiting(worker, NULL));
    if (worker->device)
        worker->ops->device_close(worker->device);
    worker_stream_free(&worker->stream);
}

int worker_run(const struct worker_options *options)
{
    /* The daemon says when to end: signals to the whole group (Ctrl-C, a stopping service) are for it, and
     * its death is ours. */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);

    struct worker worker = {
        .options = options,
        .models = {.max_seqs = DEFAULT_MAX_SEQS, .prefill_tokens = DEFAULT_PREFILL_TOKENS},
        .heartbeat_ms = DEFAULT_HEARTBEAT_MS,
    };
    struct error error = {0};
    int status = worker_stream_open(&worker.stream, options->fd, &error);
    if (!status)
        status = open_device(&worker, &error);
    if (status) {
        worker_fault(&worker, &error);
        send_fault(&worker);
        close_worker(&worker);
        return EXIT_FAILURE;
    }
    send_hello(&worker);
    log_write(LOG_INFO, "worker ready", "device", worker.device_info.name, NULL);
    status = run_loop(&worker);
    if (!status) {
        worker_job_pause(&worker);
        worker_evaluation_stop(&worker, NULL, 0, "paused");
    } else if (worker.fault.code)
        send_fault(&worker);
    else
        log_write(LOG_WARN, "the worker ends", "reason", worker.stream.error.message, NULL);
    close_worker(&worker);
    return status ? EXIT_FAILURE : EXIT_SUCCESS;
}
