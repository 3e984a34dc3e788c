/* peer.c: see peer.h. */
#include "peer.h"

#include "base/file.h"
#include "base/log.h"
#include "engine/worker.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PATIENCE_MS = 60000 };

char model_folder[4096], work_folder[64];

json_t *folder_json(const char *id, const char *path)
{
    return json_pack("{s:s, s:s}", "id", id, "path", path);
}

json_t *model_json(void)
{
    return folder_json("hatchling", model_folder);
}

void peer_send(struct peer *peer, enum frame_type type, uint64_t id, json_t *payload)
{
    struct buffer out = {0};
    assert_non_null(payload);
    assert_int_equal(frame_encode(type, id, payload, &out), 0);
    for (size_t sent = 0; sent < out.length;) {
        ssize_t n = send(peer->fd, out.data + sent, out.length - sent, MSG_NOSIGNAL);
        assert_true(n > 0);
        sent += (size_t)n;
    }
    buffer_free(&out);
}

struct frame peer_receive_any(struct peer *peer)
{
    struct frame frame;
    struct error error = {0};
    int got;
    while ((got = frame_decode(&peer->in, &frame, &error)) == 0) {
        char bytes[65536];
        struct pollfd wanted = {.fd = peer->fd, .events = POLLIN};
        if (poll(&wanted, 1, PATIENCE_MS) <= 0)
            fail_msg("the worker said nothing for %d ms", PATIENCE_MS);
        ssize_t n = recv(peer->fd, bytes, sizeof bytes, 0);
        if (n <= 0)
            fail_msg("the worker is gone");
        buffer_append(&peer->in, bytes, (size_t)n);
    }
    if (got < 0)
        fail_msg("%s", error.message);
    return frame;
}

struct frame peer_receive(struct peer *peer)
{
    for (;;) {
        struct frame frame = peer_receive_any(peer);
        if (frame.type != FRAME_STATUS)
            return frame;
        json_decref(frame.payload);
    }
}

json_t *peer_expect(struct peer *peer, enum frame_type type, uint64_t id)
{
    struct frame frame = peer_receive(peer);
    if (frame.type != type || frame.id != id) {
        char *text = json_dumps(frame.payload, 0);
        fail_msg("\"%s\" %llu instead of \"%s\" %llu: %s", frame_type_name(frame.type),
                 (unsigned long long)frame.id, frame_type_name(type), (unsigned long long)id, text);
    }
    return frame.payload;
}

void peer_fork(struct peer *peer, const char *device, const struct kernel_ops *ops)
{
    int ends[2];
    *peer = (struct peer){0};
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    fflush(NULL);
    peer->pid = fork();
    assert_true(peer->pid >= 0);
    if (!peer->pid) {
        close(ends[0]);
        log_configure(LOG_ERROR, LOG_TEXT, "worker cpu");
        const struct worker_options options = {.fd = ends[1], .device = device, .threads = 2, .ops = ops};
        _exit(worker_run(&options));
    }
    close(ends[1]);
    peer->fd = ends[0];
}

void peer_start_on(struct peer *peer, const struct kernel_ops *ops)
{
    peer_fork(peer, "cpu", ops);
    struct frame hello = peer_receive_any(peer);
    assert_int_equal(hello.type, FRAME_HELLO);
    assert_int_equal(json_integer_value(json_object_get(hello.payload, "version")), PROTOCOL_VERSION);
    assert_int_equal(json_integer_value(json_object_get(hello.payload, "pid")), peer->pid);
    json_decref(hello.payload);
    /* So rare a heartbeat that an answer which waited for it would be missed. */
    peer_send(peer, FRAME_CONFIGURE, 0,
              json_pack("{s:i, s:i, s:i}", "max_seqs", 4, "prefill_tokens", 64, "heartbeat_ms", 3600000));
}

void peer_start(struct peer *peer)
{
    peer_start_on(peer, NULL);
}

int peer_wait(struct peer *peer)
{
    int status = 0;
    for (int waited_ms = 0; waitpid(peer->pid, &status, WNOHANG) == 0; waited_ms += 5) {
        if (waited_ms > PATIENCE_MS) {
            kill(peer->pid, SIGKILL);
            fail_msg("the worker does not end");
        }
        usleep(5000);
    }
    if (peer->fd >= 0)
        close(peer->fd);
    buffer_free(&peer->in);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void peer_stop(struct peer *peer)
{
    peer_send(peer, FRAME_SHUTDOWN, 0, json_object());
    assert_int_equal(peer_wait(peer), 0);
}

const char *text_of(const json_t *payload, const char *key)
{
    const char *text = json_string_value(json_object_get(payload, key));
    return text ? text : "(none)";
}

int64_t integer_of(const json_t *payload, const char *key)
{
    return json_integer_value(json_object_get(payload, key));
}

json_t *complete_json(const char *prompt, int max_tokens, bool stream)
{
    return json_pack(
        "{s:o, s:n, s:[s], s:b, s:i, s:i, s:f, s:f, s:f, s:i, s:f, s:f, s:f, s:n, s:[], s:i, s:n, "
        "s:b, s:b, s:b}",
        "model", model_json(), "adapter", "prompts", prompt, "chat", 0, "n", 1, "max_tokens", max_tokens,
        "temperature", 0.0, "top_p", 1.0, "min_p", 0.0, "top_k", 0, "repetition_penalty", 1.0,
        "presence_penalty", 0.0, "frequency_penalty", 0.0, "logit_bias", "stop", "seed", 7, "logprobs",
        "echo", 0, "ignore_eos", 0, "stream", (int)stream);
}

char *peer_completion(struct peer *peer, uint64_t id, json_t *payload, int *ret_chunks)
{
    struct buffer text = {0};
    int chunks = 0;
    peer_send(peer, FRAME_COMPLETE, id, payload);
    for (;;) {
        struct frame frame = peer_receive(peer);
        assert_int_equal(frame.id, id);
        if (frame.type == FRAME_DONE) {
            json_decref(frame.payload);
            break;
        }
        if (frame.type != FRAME_CHUNK)
            fail_msg("%s", text_of(frame.payload, "message"));
        buffer_append_string(&text, text_of(frame.payload, "text"));
        chunks++;
        json_decref(frame.payload);
    }
    if (ret_chunks)
        *ret_chunks = chunks;
    return buffer_take(&text, NULL);
}

void expect_failed(struct peer *peer, uint64_t id, const char *code, const char *param)
{
    json_t *failed = peer_expect(peer, FRAME_FAILED, id);
    assert_string_equal(text_of(failed, "code"), code);
    if (param)
        assert_string_equal(text_of(failed, "param"), param);
    assert_true(strlen(text_of(failed, "message")) > 8);
    json_decref(failed);
}

void write_work_file(const char *name, const char *text, char path[128])
{
    struct error error = {0};
    snprintf(path, 128, "%s/%s", work_folder, name);
    if (file_write_whole(path, text, strlen(text), &error))
        fail_msg("%s", error.message);
}

int peer_setup(void **state)
{
    (void)state;
    const char *source = getenv("ADDERD_SOURCE");
    assert_non_null(source);
    snprintf(model_folder, sizeof model_folder, "%s/models/hatchling", source);
    snprintf(work_folder, sizeof work_folder, "/tmp/test_worker-XXXXXX");
    assert_non_null(mkdtemp(work_folder));
    return 0;
}

int peer_teardown(void **state)
{
    (void)state;
    return file_remove_tree(work_folder, NULL);
}

/* ---- jobs ---- */

void write_examples(const char *name, char path[128])
{
    struct buffer text = {0};
    for (int i = 0; i < EXAMPLES; i++)
        buffer_printf(&text,
                      "{\"prompt\": \"Number %d is\", \"completion\": \" a number of many, the %dth.\"}\n", i,
                      i);
    write_work_file(name, text.data, path);
    buffer_free(&text);
}

static json_t *spec_json(void)
{
    json_t *spec = json_loads(
        "{\"n_epochs\": 3, \"max_steps\": 8, \"batch_size\": 2, \"gradient_accumulation_steps\": 2,"
        " \"max_seq_len\": 64, \"packing\": false, \"truncate_long_examples\": false, \"precision\": "
        "\"fp32\","
        " \"adaptation\": \"lora\", \"lora\": {\"rank\": 4, \"alpha\": 8, \"dropout\": 0.1,"
        " \"targets\": [\"in_proj\", \"x_proj\"], \"rslora\": false}, \"learning_rate\": 0.002,"
        " \"optimizer\": {\"betas\": [0.9, 0.999], \"eps\": 1e-8, \"weight_decay\": 0.01},"
        " \"lr_schedule\": \"linear\", \"warmup_steps\": 2, \"max_grad_norm\": 1.0, \"eval_steps\": 4,"
        " \"checkpoint_steps\": 2, \"keep_checkpoints\": 2, \"early_stopping\": null,"
        " \"load_best_at_end\": false, \"learning_rate_multiplier\": 1}",
        0, NULL);
    assert_non_null(spec);
    return spec;
}

json_t *job_json(const char *job, const char *training_file)
{
    return json_pack("{s:s, s:i, s:o, s:s, s:n, s:o, s:i}", "job", job, "attempt", 1, "model", model_json(),
                     "training_file", training_file, "validation_file", "hyperparameters", spec_json(),
                     "seed", 42);
}

json_t *start_json(const char *job, const char *training_file, const char *resume_from)
{
    char folder[128];
    json_t *payload = job_json(job, training_file);
    snprintf(folder, sizeof folder, "%s/%s", work_folder, job);
    assert_int_equal(file_make_dirs(folder, NULL), 0);
    json_object_set_new(payload, "folder", json_string(folder));
    json_object_set_new(payload, "resume_from", resume_from ? json_string(resume_from) : json_null());
    return payload;
}

bool job_report_add(struct job_report *report, const struct frame *frame, const char *job)
{
    const json_t *payload = frame->payload;
    if (frame->type == FRAME_CHUNK || frame->type == FRAME_DONE) {
        report->n_chunks += frame->type == FRAME_CHUNK;
        report->n_done += frame->type == FRAME_DONE;
        return true;
    }
    if (frame->type == FRAME_FAILED)
        fail_msg("%s", text_of(payload, "message"));
    assert_int_equal(frame->id, 0);
    assert_string_equal(text_of(payload, "job"), job);
    assert_int_equal(integer_of(payload, "attempt"), 1);
    int64_t step = integer_of(payload, "step");
    if (frame->type == FRAME_JOB_METRICS) {
        assert_in_range(step, 1, STEPS);
        assert_int_equal(integer_of(payload, "total_steps"), STEPS);
        report->losses[step] = json_real_value(json_object_get(payload, "train_loss"));
        report->n_metrics++;
    } else if (frame->type == FRAME_JOB_CHECKPOINT) {
        report->n_checkpoints++;
        snprintf(report->checkpoint, sizeof report->checkpoint, "%s", text_of(payload, "folder"));
        report->resumable_only = json_is_true(json_object_get(payload, "resumable_only"));
    } else if (frame->type == FRAME_JOB_CHECKPOINT_DROPPED) {
        report->n_dropped++;
    } else if (frame->type == FRAME_JOB_ENDED) {
        snprintf(report->status, sizeof report->status, "%s", text_of(payload, "status"));
        snprintf(report->folder, sizeof report->folder, "%s", text_of(payload, "folder"));
        report->resumable = json_is_true(json_object_get(payload, "resumable"));
        report->step = step;
        const json_t *error = json_object_get(payload, "error");
        if (!json_is_null(error) && strcmp(report->status, "failed"))
            fail_msg("%s", text_of(error, "message"));
        return false;
    } else {
        assert_int_equal(frame->type, FRAME_JOB_MESSAGE);
    }
    return true;
}

void job_report_read(struct job_report *report, struct peer *peer, const char *job)
{
    bool more = true;
    while (more) {
        struct frame frame = peer_receive(peer);
        more = job_report_add(report, &frame, job);
        json_decref(frame.payload);
    }
}
