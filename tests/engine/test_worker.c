/* test_worker.c: a worker in a process of its own, spoken to as the daemon does. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/log.h"
#include "engine/protocol.h"
#include "engine/worker.h"
#include "kernels/kernels.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE_MS = 60000 };

/* ---- the daemon's end ---- */

struct peer {
    int fd;
    pid_t pid;
    struct buffer in;
};

static char model_folder[4096], work_folder[64];

static json_t *folder_json(const char *id, const char *path)
{
    return json_pack("{s:s, s:s}", "id", id, "path", path);
}

static json_t *model_json(void)
{
    return folder_json("hatchling", model_folder);
}

static void peer_send(struct peer *peer, enum frame_type type, uint64_t id, json_t *payload)
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

/* The next frame, STATUS too. The caller drops its payload. */
static struct frame peer_receive_any(struct peer *peer)
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

static struct frame peer_receive(struct peer *peer)
{
    for (;;) {
        struct frame frame = peer_receive_any(peer);
        if (frame.type != FRAME_STATUS)
            return frame;
        json_decref(frame.payload);
    }
}

/* The next frame, which must be of this type and id. */
static json_t *peer_expect(struct peer *peer, enum frame_type type, uint64_t id)
{
    struct frame frame = peer_receive(peer);
    if (frame.type != type || frame.id != id) {
        char *text = json_dumps(frame.payload, 0);
        fail_msg("\"%s\" %llu instead of \"%s\" %llu: %s", frame_type_name(frame.type),
                 (unsigned long long)frame.id, frame_type_name(type), (unsigned long long)id, text);
    }
    return frame.payload;
}

/* ops: NULL for the device's own. */
static void peer_fork(struct peer *peer, const char *device, const struct kernel_ops *ops)
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

static void peer_start_on(struct peer *peer, const struct kernel_ops *ops)
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

static void peer_start(struct peer *peer)
{
    peer_start_on(peer, NULL);
}

/* Wait for the process; its exit status, or 128 + signal. */
static int peer_wait(struct peer *peer)
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

static void peer_stop(struct peer *peer)
{
    peer_send(peer, FRAME_SHUTDOWN, 0, json_object());
    assert_int_equal(peer_wait(peer), 0);
}

static const char *text_of(const json_t *payload, const char *key)
{
    const char *text = json_string_value(json_object_get(payload, key));
    return text ? text : "(none)";
}

static int64_t integer_of(const json_t *payload, const char *key)
{
    return json_integer_value(json_object_get(payload, key));
}

static json_t *complete_json(const char *prompt, int max_tokens, bool stream)
{
    return json_pack(
        "{s:o, s:n, s:[s], s:b, s:i, s:i, s:f, s:f, s:f, s:i, s:f, s:f, s:f, s:n, s:[], s:i, s:n, "
        "s:b, s:b, s:b}",
        "model", model_json(), "adapter", "prompts", prompt, "chat", 0, "n", 1, "max_tokens", max_tokens,
        "temperature", 0.0, "top_p", 1.0, "min_p", 0.0, "top_k", 0, "repetition_penalty", 1.0,
        "presence_penalty", 0.0, "frequency_penalty", 0.0, "logit_bias", "stop", "seed", 7, "logprobs",
        "echo", 0, "ignore_eos", 0, "stream", (int)stream);
}

/* All text of one completion, to be freed. */
static char *peer_completion(struct peer *peer, uint64_t id, json_t *payload, int *ret_chunks)
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

static void expect_failed(struct peer *peer, uint64_t id, const char *code, const char *param)
{
    json_t *failed = peer_expect(peer, FRAME_FAILED, id);
    assert_string_equal(text_of(failed, "code"), code);
    if (param)
        assert_string_equal(text_of(failed, "param"), param);
    assert_true(strlen(text_of(failed, "message")) > 8);
    json_decref(failed);
}

static void write_work_file(const char *name, const char *text, char path[128])
{
    struct error error = {0};
    snprintf(path, 128, "%s/%s", work_folder, name);
    if (file_write_whole(path, text, strlen(text), &error))
        fail_msg("%s", error.message);
}

static int setup(void **state)
{
    (void)state;
    const char *source = getenv("ADDERD_SOURCE");
    assert_non_null(source);
    snprintf(model_folder, sizeof model_folder, "%s/models/hatchling", source);
    snprintf(work_folder, sizeof work_folder, "/tmp/test_worker-XXXXXX");
    assert_non_null(mkdtemp(work_folder));
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    return file_remove_tree(work_folder, NULL);
}

/* ---- models, texts, completions ---- */

static void test_loading_and_the_heartbeat(void **state)
{
    (void)state;
    struct peer peer;
    peer_start(&peer);
    peer_send(&peer, FRAME_LOAD, 1, json_pack("{s:o}", "model", model_json()));
    json_t *loaded = peer_expect(&peer, FRAME_LOADED, 1);
    assert_string_equal(text_of(loaded, "model"), "hatchling");
    assert_string_equal(text_of(loaded, "family"), "mamba");
    assert_int_equal(integer_of(loaded, "vocab_size"), 8192);
    assert_true(integer_of(loaded, "state_bytes") > 0 && integer_of(loaded, "weight_bytes") > 0);
    json_decref(loaded);

    peer_send(&peer, FRAME_CONFIGURE, 0,
              json_pack("{s:i, s:i, s:i}", "max_seqs", 4, "prefill_tokens", 64, "heartbeat_ms", 20));
    for (int beats = 0; beats < 3;) {
        struct frame frame = peer_receive_any(&peer);
        assert_int_equal(frame.type, FRAME_STATUS);
        assert_true(integer_of(frame.payload, "total_bytes") > 0);
        const json_t *models = json_object_get(frame.payload, "models");
        if (json_array_size(models) == 1) {
            assert_string_equal(json_string_value(json_array_get(models, 0)), "hatchling");
            beats++;
        }
        json_decref(frame.payload);
    }

    peer_send(&peer, FRAME_LOAD, 2, json_pack("{s:o}", "model", folder_json("x", "/nowhere")));
    json_decref(peer_expect(&peer, FRAME_FAILED, 2));
    peer_send(&peer, FRAME_LOAD, 3, json_object());
    expect_failed(&peer, 3, "invalid", "model");
    peer_send(&peer, FRAME_LOADED, 4, json_object());
    expect_failed(&peer, 4, "invalid", NULL);
    peer_stop(&peer);
}

static void link_into(const char *folder, const char *name, const char *target)
{
    char from[4096], to[4096 + 64];
    snprintf(from, sizeof from, "%s/%s", folder, name);
    snprintf(to, sizeof to, "%s", target);
    assert_int_equal(symlink(to, from), 0);
}

static void test_a_tokenizer_that_does_not_fit_is_refused(void **state)
{
    (void)state;
    struct peer peer;
    char folder[128], path[4096 + 64], file[256];
    snprintf(folder, sizeof folder, "%s/misfit", work_folder);
    assert_int_equal(file_make_dirs(folder, NULL), 0);
    snprintf(path, sizeof path, "%s/config.json", model_folder);
    link_into(folder, "config.json", path);
    snprintf(path, sizeof path, "%s/model.safetensors", model_folder);
    link_into(folder, "model.safetensors", path);

    peer_start(&peer);
    peer_send(&peer, FRAME_LOAD, 1, json_pack("{s:o}", "model", folder_json("misfit", folder)));
    json_decref(peer_expect(&peer, FRAME_FAILED, 1)); /* none at all */

    /* hatchling's own with one token more. */
    json_error_t reason;
    snprintf(path, sizeof path, "%s/tokenizer.json", model_folder);
    json_t *tokenizer = json_load_file(path, 0, &reason);
    assert_non_null(tokenizer);
    json_array_append_new(json_object_get(tokenizer, "added_tokens"),
                          json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", 8192, "content", "<|more|>",
                                    "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special",
                                    1));
    snprintf(file, sizeof file, "%s/tokenizer.json", folder);
    assert_int_equal(json_dump_file(tokenizer, file, 0), 0);
    json_decref(tokenizer);
    peer_send(&peer, FRAME_LOAD, 2, json_pack("{s:o}", "model", folder_json("misfit", folder)));
    json_t *failed = peer_expect(&peer, FRAME_FAILED, 2);
    assert_non_null(strstr(text_of(failed, "message"), "does not fit"));
    json_decref(failed);
    peer_stop(&peer);
}

static void test_texts_and_tokens(void **state)
{
    (void)state;
    struct peer peer;
    peer_start(&peer);
    static const char text[] = "Once upon a time <|endoftext|> caf\xC3\xA9";
    peer_send(&peer, FRAME_TOKENIZE, 1,
              json_pack("{s:o, s:s, s:b}", "model", model_json(), "text", text, "add_special_tokens", 1));
    json_t *tokens = peer_expect(&peer, FRAME_TOKENS, 1);
    json_t *list = json_object_get(tokens, "tokens");
    assert_true(json_array_size(list) > 4);
    peer_send(&peer, FRAME_DETOKENIZE, 2, json_pack("{s:o, s:O}", "model", model_json(), "tokens", list));
    json_t *back = peer_expect(&peer, FRAME_TEXT, 2);
    assert_string_equal(text_of(back, "text"), text);
    json_decref(back);
    json_decref(tokens);

    /* An answer that fits no frame is refused, and the worker lives on. */
    json_t *many = json_array();
    for (int i = 0; i < PROTOCOL_MAX_PAYLOAD / 12; i++)
        json_array_append_new(many, json_integer(0)); /* <|endoftext|>, 13 bytes */
    peer_send(&peer, FRAME_DETOKENIZE, 5, json_pack("{s:o, s:o}", "model", model_json(), "tokens", many));
    expect_failed(&peer, 5, "invalid", NULL);

    peer_send(&peer, FRAME_DETOKENIZE, 3, json_pack("{s:o, s:[i]}", "model", model_json(), "tokens", 8192));
    expect_failed(&peer, 3, "invalid", "tokens");
    peer_send(&peer, FRAME_TOKENIZER_INFO, 4, json_pack("{s:o}", "model", model_json()));
    json_t *info = peer_expect(&peer, FRAME_INFO, 4);
    assert_string_equal(text_of(info, "eos_token"), "<|endoftext|>");
    assert_true(json_is_null(json_object_get(info, "chat_template")));
    json_decref(info);
    peer_stop(&peer);
}

static void test_completions(void **state)
{
    (void)state;
    struct peer peer;
    peer_start(&peer);
    int chunks;
    char *whole = peer_completion(&peer, 1, complete_json("Once upon a time", 12, false), &chunks);
    assert_int_equal(chunks, 1);
    char *streamed = peer_completion(&peer, 2, complete_json("Once upon a time", 12, true), &chunks);
    assert_true(chunks > 5);
    assert_true(strlen(whole) > 10);
    assert_string_equal(whole, streamed);
    free(streamed);

    /* The end of it as a stop string, in a chat's clothes: roles are refused by name, good ones answered. */
    json_t *stopped = complete_json("Once upon a time", 12, false);
    json_object_set_new(stopped, "stop", json_pack("[s]", whole + strlen(whole) - 6));
    char *cut = peer_completion(&peer, 3, stopped, NULL);
    assert_int_equal(strlen(cut), strlen(whole) - 6);
    assert_memory_equal(cut, whole, strlen(cut));
    free(cut);
    json_t *chat = complete_json("", 6, false);
    json_object_set_new(chat, "chat", json_true());
    json_object_set_new(chat, "prompts", json_array());
    json_object_set_new(chat, "messages",
                        json_pack("[{s:s, s:s}]", "role", "user", "content", "Tell a story."));
    char *reply = peer_completion(&peer, 4, chat, NULL);
    assert_true(reply[0] != ' ');
    free(reply);
    free(whole);

    /* Scores: index 0 has none; the chosen token is among the alternatives. */
    json_t *scored = complete_json("Once upon", 1, false);
    json_object_set_new(scored, "logprobs", json_integer(2));
    json_object_set_new(scored, "echo", json_true());
    json_object_set_new(scored, "prompts", json_pack("[[i, i, i]]", 300, 128, 301));
    peer_send(&peer, FRAME_COMPLETE, 5, scored);
    json_t *chunk = peer_expect(&peer, FRAME_CHUNK, 5);
    const json_t *tokens = json_object_get(chunk, "tokens");
    assert_int_equal(json_array_size(tokens), 4);
    assert_true(json_is_null(json_object_get(json_array_get(tokens, 0), "logprob")));
    for (size_t i = 1; i < 4; i++) {
        const json_t *token = json_array_get(tokens, i);
        double logprob = json_real_value(json_object_get(token, "logprob"));
        bool listed = false;
        for (size_t k = 0; k < json_array_size(json_object_get(token, "top")); k++) {
            const json_t *pair = json_array_get(json_object_get(token, "top"), k);
            listed |= json_real_value(json_array_get(pair, 1)) == logprob;
        }
        assert_true(listed && logprob < 0);
    }
    /* A byte that is no character by itself is told as a byte. */
    const json_t *bytes = json_object_get(json_array_get(tokens, 1), "bytes");
    if (bytes)
        assert_int_equal(json_array_size(bytes), 1);
    json_decref(chunk);
    json_decref(peer_expect(&peer, FRAME_DONE, 5));
    peer_stop(&peer);
}

static void expect_refused(struct peer *peer, const char *key, json_t *value, const char *param)
{
    static uint64_t id = 1000;
    json_t *payload = complete_json("Once", 4, false);
    if (value)
        json_object_set_new(payload, key, value);
    else
        json_object_del(payload, key);
    peer_send(peer, FRAME_COMPLETE, ++id, payload);
    expect_failed(peer, id, "invalid", param);
}

static void test_bad_completions_are_refused_by_name(void **state)
{
    (void)state;
    struct peer peer;
    peer_start(&peer);
    expect_refused(&peer, "temperature", NULL, "temperature");
    expect_refused(&peer, "temperature", json_string("hot"), "temperature");
    expect_refused(&peer, "prompts", json_pack("[[i]]", 8192), "prompt");
    expect_refused(&peer, "prompts", json_pack("[[s]]", "a"), "prompt");
    expect_refused(&peer, "prompts", json_pack("[f]", 0.5), "prompt");
    expect_refused(&peer, "prompts", json_array(), "prompt");
    expect_refused(&peer, "logit_bias", json_pack("{s:f}", "9999", 1.0), "logit_bias");
    expect_refused(&peer, "logit_bias", json_pack("{s:f}", "x", 1.0), "logit_bias");
    expect_refused(&peer, "logprobs", json_integer(21), "logprobs");
    expect_refused(&peer, "stop", json_pack("[i]", 1), "stop");
    expect_refused(&peer, "max_tokens", json_integer(0), "max_tokens");
    json_t *payload = complete_json("Once", 4, false);
    json_object_set_new(payload, "adapter", folder_json("ft:x", "/nowhere"));
    peer_send(&peer, FRAME_COMPLETE, 5, payload);
    json_decref(peer_expect(&peer, FRAME_FAILED, 5));
    free(peer_completion(&peer, 6, complete_json("Once", 4, false), NULL));
    peer_stop(&peer);
}

static void test_cancel(void **state)
{
    (void)state;
    struct peer peer;
    peer_start(&peer);
    json_t *endless = complete_json("Once", 1000000, true);
    json_object_set_new(endless, "ignore_eos", json_true());
    peer_send(&peer, FRAME_COMPLETE, 1, endless);
    json_decref(peer_expect(&peer, FRAME_CHUNK, 1));
    peer_send(&peer, FRAME_CANCEL, 77, json_object());
    peer_send(&peer, FRAME_CANCEL, 1, json_object());
    for (;;) {
        struct frame frame = peer_receive(&peer);
        assert_int_equal(frame.id, 1);
        bool failed = frame.type == FRAME_FAILED;
        if (failed)
            assert_string_equal(text_of(frame.payload, "code"), "cancelled");
        else
            assert_int_equal(frame.type, FRAME_CHUNK);
        json_decref(frame.payload);
        if (failed)
            break;
    }
    peer_stop(&peer);
}

/* Both sides write without reading: more than any socket buffer holds, in both directions. */
static void test_a_slow_reader_stops_nobody(void **state)
{
    (void)state;
    struct peer peer;
    peer_start(&peer);
    enum { ROUNDS = 400, WORDS = 1200 };
    struct buffer text = {0};
    for (int i = 0; i < WORDS; i++)
        buffer_append_string(&text, "the dog ");
    for (uint64_t i = 1; i <= ROUNDS; i++)
        peer_send(
            &peer, FRAME_TOKENIZE, i,
            json_pack("{s:o, s:s, s:b}", "model", model_json(), "text", text.data, "add_special_tokens", 0));
    for (uint64_t i = 1; i <= ROUNDS; i++) {
        json_t *tokens = peer_expect(&peer, FRAME_TOKENS, i);
        assert_true(json_array_size(json_object_get(tokens, "tokens")) >= WORDS);
        json_decref(tokens);
    }
    buffer_free(&text);
    peer_stop(&peer);
}

static void test_what_is_no_frame_ends_it(void **state)
{
    (void)state;
    struct peer peer;
    peer_start(&peer);
    static const char garbage[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_int_equal(send(peer.fd, garbage, sizeof garbage - 1, 0), sizeof garbage - 1);
    assert_int_equal(peer_wait(&peer), 1);
}

/* ---- jobs ---- */

enum { EXAMPLES = 12, STEPS = 8 };

static void write_examples(const char *name, char path[128])
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

static json_t *job_json(const char *job, const char *training_file)
{
    return json_pack("{s:s, s:i, s:o, s:s, s:n, s:o, s:i}", "job", job, "attempt", 1, "model", model_json(),
                     "training_file", training_file, "validation_file", "hyperparameters", spec_json(),
                     "seed", 42);
}

static json_t *start_json(const char *job, const char *training_file, const char *resume_from)
{
    char folder[128];
    json_t *payload = job_json(job, training_file);
    snprintf(folder, sizeof folder, "%s/%s", work_folder, job);
    assert_int_equal(file_make_dirs(folder, NULL), 0);
    json_object_set_new(payload, "folder", json_string(folder));
    json_object_set_new(payload, "resume_from", resume_from ? json_string(resume_from) : json_null());
    return payload;
}

/* What a job reported until it ended. */
struct job_report {
    double losses[STEPS + 1]; /* by step */
    int n_metrics, n_checkpoints, n_dropped, n_chunks, n_done;
    char checkpoint[256]; /* the newest */
    bool resumable_only;  /* of it */
    char status[32], folder[256];
    bool resumable;
    int64_t step;
};

/* Take one frame in. Returns false after JOB_ENDED. */
static bool job_report_add(struct job_report *report, const struct frame *frame, const char *job)
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

static void job_report_read(struct job_report *report, struct peer *peer, const char *job)
{
    bool more = true;
    while (more) {
        struct frame frame = peer_receive(peer);
        more = job_report_add(report, &frame, job);
        json_decref(frame.payload);
    }
}

static void test_validation(void **state)
{
    (void)state;
    struct peer peer;
    char good[128], bad[128];
    write_examples("good.jsonl", good);
    write_work_file("bad.jsonl",
                    "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n\nnot json\n", bad);
    peer_start(&peer);
    peer_send(&peer, FRAME_JOB_VALIDATE, 5, job_json("job-1", good));
    json_t *valid = peer_expect(&peer, FRAME_JOB_VALIDATED, 5);
    assert_string_equal(text_of(valid, "job"), "job-1");
    assert_int_equal(integer_of(valid, "attempt"), 1);
    assert_int_equal(integer_of(valid, "examples"), EXAMPLES);
    assert_int_equal(integer_of(valid, "total_steps"), STEPS);
    assert_true(integer_of(valid, "planned_bytes") > 0);
    json_decref(valid);

    peer_send(&peer, FRAME_JOB_VALIDATE, 6, job_json("job-2", bad));
    json_t *invalid = peer_expect(&peer, FRAME_JOB_INVALID, 6);
    assert_string_equal(text_of(invalid, "job"), "job-2");
    assert_string_equal(text_of(invalid, "param"), "training_file");
    const json_t *lines = json_object_get(invalid, "lines");
    assert_int_equal(json_array_size(lines), 2);
    assert_int_equal(integer_of(json_array_get(lines, 0), "line"), 2);
    assert_int_equal(integer_of(json_array_get(lines, 1), "line"), 4);
    assert_string_equal(text_of(json_array_get(lines, 1), "file"), "training_file");
    assert_true(strlen(text_of(json_array_get(lines, 1), "reason")) > 5);
    json_decref(invalid);

    json_t *payload = job_json("job-3", good);
    json_object_set_new(json_object_get(payload, "hyperparameters"), "batch_size", json_integer(0));
    peer_send(&peer, FRAME_JOB_VALIDATE, 7, payload);
    invalid = peer_expect(&peer, FRAME_JOB_INVALID, 7);
    assert_string_equal(text_of(invalid, "param"), "batch_size");
    assert_int_equal(json_array_size(json_object_get(invalid, "lines")), 0);
    json_decref(invalid);
    peer_stop(&peer);
}

/* The same job three times: alone; with completions beside it; paused in the middle and resumed by another
 * process. Its losses are the same, bit for bit. */
static void test_a_job_alone_in_company_and_interrupted(void **state)
{
    (void)state;
    struct peer peer;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    char *base = peer_completion(&peer, 1, complete_json("Number 3 is", 8, false), NULL);
    struct job_report alone = {0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("alone", data, NULL));
    job_report_read(&alone, &peer, "alone");
    assert_string_equal(alone.status, "succeeded");
    assert_int_equal(alone.n_metrics, STEPS);
    assert_int_equal(alone.step, STEPS);
    assert_true(alone.n_checkpoints >= 4 && alone.n_dropped >= 2);
    assert_true(alone.losses[STEPS] < alone.losses[1]);

    /* Its adapter is served at once, and differs from the base. */
    json_t *payload = complete_json("Number 3 is", 8, false);
    json_object_set_new(payload, "adapter", folder_json("ft:alone", alone.folder));
    char *tuned = peer_completion(&peer, 2, payload, NULL);
    assert_string_not_equal(tuned, base);
    peer_send(&peer, FRAME_UNLOAD, 0, json_pack("{s:s}", "adapter", "ft:alone"));
    payload = complete_json("Number 3 is", 8, false);
    json_object_set_new(payload, "adapter", folder_json("ft:alone", alone.folder));
    char *again = peer_completion(&peer, 3, payload, NULL);
    assert_string_equal(again, tuned);
    free(again);
    free(tuned);
    free(base);

    struct job_report company = {0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("company", data, NULL));
    for (uint64_t i = 0; i < 4; i++)
        peer_send(&peer, FRAME_COMPLETE, 100 + i, complete_json("The dog", 6, true));
    job_report_read(&company, &peer, "company");
    assert_string_equal(company.status, "succeeded");
    assert_int_equal(company.n_done, 4);
    assert_true(company.n_chunks > 8);
    assert_memory_equal(company.losses, alone.losses, sizeof alone.losses);

    struct job_report paused = {0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("paused", data, NULL));
    bool more = true, asked = false;
    while (more) {
        struct frame frame = peer_receive(&peer);
        more = job_report_add(&paused, &frame, "paused");
        json_decref(frame.payload);
        if (paused.n_metrics == 3 && !asked) {
            asked = true;
            peer_send(&peer, FRAME_JOB_STOP, 0,
                      json_pack("{s:s, s:i, s:s}", "job", "paused", "attempt", 1, "reason", "pause"));
        }
    }
    assert_string_equal(paused.status, "paused");
    assert_true(paused.resumable);
    assert_true(paused.n_metrics >= 3 && paused.n_metrics < STEPS);
    peer_stop(&peer);
    peer_start(&peer);
    peer_send(&peer, FRAME_JOB_START, 0, start_json("paused", data, paused.checkpoint));
    job_report_read(&paused, &peer, "paused");
    assert_string_equal(paused.status, "succeeded");
    assert_memory_equal(paused.losses, alone.losses, sizeof alone.losses);
    peer_stop(&peer);
}

static void start_and_wait_for_metrics(struct peer *peer, const char *job, const char *data,
                                       struct job_report *report)
{
    *report = (struct job_report){0};
    peer_send(peer, FRAME_JOB_START, 0, start_json(job, data, NULL));
    while (!report->n_metrics) {
        struct frame frame = peer_receive(peer);
        assert_true(job_report_add(report, &frame, job));
        json_decref(frame.payload);
    }
}

static void test_stopping_a_job(void **state)
{
    (void)state;
    struct peer peer;
    struct job_report report;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    start_and_wait_for_metrics(&peer, "cancelled", data, &report);
    /* Another attempt's, another job's: nothing happens. */
    peer_send(&peer, FRAME_JOB_STOP, 0,
              json_pack("{s:s, s:i, s:s}", "job", "cancelled", "attempt", 9, "reason", "cancel"));
    peer_send(&peer, FRAME_JOB_STOP, 0,
              json_pack("{s:s, s:i, s:s}", "job", "other", "attempt", 1, "reason", "cancel"));
    peer_send(&peer, FRAME_JOB_STOP, 0,
              json_pack("{s:s, s:i, s:s}", "job", "cancelled", "attempt", 1, "reason", "cancel"));
    job_report_read(&report, &peer, "cancelled");
    assert_string_equal(report.status, "cancelled");
    assert_true(report.n_metrics < STEPS);

    /* One that cannot start says so. */
    report = (struct job_report){0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("broken", "/nowhere.jsonl", NULL));
    job_report_read(&report, &peer, "broken");
    assert_string_equal(report.status, "failed");

    /* SHUTDOWN pauses. */
    start_and_wait_for_metrics(&peer, "shut", data, &report);
    peer_send(&peer, FRAME_SHUTDOWN, 0, json_object());
    job_report_read(&report, &peer, "shut");
    assert_string_equal(report.status, "paused");
    assert_true(report.resumable);
    assert_int_equal(access(report.checkpoint, F_OK), 0);
    assert_int_equal(peer_wait(&peer), 0);
}

/* ---- memory ---- */

static int64_t capacity; /* of the device below, in the worker's process */

/* A device of that size, on which nobody else is. */
static int query_small_device(struct kernel_device *device, struct kernel_device_info *ret_info)
{
    int status = kernels_cpu()->device_query(device, ret_info);
    ret_info->total_bytes = capacity;
    ret_info->free_bytes = capacity > ret_info->allocated_bytes ? capacity - ret_info->allocated_bytes : 0;
    return status;
}

static void peer_start_small(struct peer *peer, int64_t bytes)
{
    static struct kernel_ops ops;
    ops = *kernels_cpu();
    ops.device_query = query_small_device;
    capacity = bytes;
    peer_start_on(peer, &ops);
}

static json_t *plan_json(const char *training_file, int batch_size, int max_seq_len)
{
    json_t *payload = job_json("planned", training_file);
    json_t *spec = json_object_get(payload, "hyperparameters");
    json_object_set_new(spec, "batch_size", json_integer(batch_size));
    json_object_set_new(spec, "max_seq_len", json_integer(max_seq_len));
    json_object_set_new(spec, "packing", json_true());
    return payload;
}

static void test_what_cannot_fit_is_told_beforehand(void **state)
{
    (void)state;
    struct peer peer;
    char small[128], large[128];
    struct buffer text = {0};
    write_examples("small.jsonl", small);
    for (int i = 0; i < 20000; i++)
        buffer_printf(&text, "{\"text\": \"The %dth dog barks at the %dth cat, and so on.\"}\n", i, i);
    write_work_file("large.jsonl", text.data, large);
    buffer_free(&text);
    peer_start_small(&peer, (int64_t)400 << 20);

    /* Fits whatever the data is: they are not looked at. */
    peer_send(&peer, FRAME_JOB_PLAN, 1, plan_json("/nowhere.jsonl", 2, 64));
    json_t *planned = peer_expect(&peer, FRAME_JOB_PLANNED, 1);
    assert_true(integer_of(planned, "planned_bytes") > 1 << 20);
    json_decref(planned);
    /* Fits because there is so little data. */
    peer_send(&peer, FRAME_JOB_PLAN, 2, plan_json(small, 256, 512));
    json_decref(peer_expect(&peer, FRAME_JOB_PLANNED, 2));
    peer_send(&peer, FRAME_JOB_PLAN, 3, plan_json(large, 256, 512));
    json_t *failed = peer_expect(&peer, FRAME_FAILED, 3);
    assert_string_equal(text_of(failed, "code"), "no_memory");
    long long needed, weights, available;
    int batch_size, accumulation;
    if (sscanf(text_of(failed, "message"),
               "the job needs %lld bytes beyond the model's %lld, with all recomputed that can be; %lld are "
               "free; "
               "batch_size %d with gradient_accumulation_steps %d fits",
               &needed, &weights, &available, &batch_size, &accumulation) != 5)
        fail_msg("%s", text_of(failed, "message"));
    json_decref(failed);
    assert_true(needed > available && available < 400 << 20 && batch_size >= 1);
    assert_int_equal(batch_size * accumulation, 256 * 2);
    /* And what it says is so, the same as validation finds. */
    peer_send(&peer, FRAME_JOB_PLAN, 4, plan_json(large, batch_size, 512));
    json_decref(peer_expect(&peer, FRAME_JOB_PLANNED, 4));
    peer_send(&peer, FRAME_JOB_VALIDATE, 5, plan_json(large, batch_size, 512));
    json_decref(peer_expect(&peer, FRAME_JOB_VALIDATED, 5));
    peer_send(&peer, FRAME_JOB_VALIDATE, 6, plan_json(large, 2 * batch_size, 512));
    json_t *invalid = peer_expect(&peer, FRAME_JOB_INVALID, 6);
    assert_string_equal(text_of(invalid, "code"), "no_memory");
    json_decref(invalid);
    /* Not even one row of so many tokens. */
    peer_send(&peer, FRAME_JOB_PLAN, 7, plan_json(large, 8, 1 << 17));
    failed = peer_expect(&peer, FRAME_FAILED, 7);
    assert_non_null(strstr(text_of(failed, "message"), "; max_seq_len "));
    json_decref(failed);
    peer_stop(&peer);

    /* The model itself. */
    peer_start_small(&peer, 4 << 20);
    peer_send(&peer, FRAME_LOAD, 1, json_pack("{s:o}", "model", model_json()));
    failed = peer_expect(&peer, FRAME_FAILED, 1);
    assert_string_equal(text_of(failed, "code"), "no_memory");
    assert_non_null(strstr(text_of(failed, "message"), "bytes of weights"));
    json_decref(failed);
    peer_stop(&peer);
}

/* The next STATUS: allocated bytes, and how many models are loaded. */
static int64_t read_status(struct peer *peer, size_t *ret_models)
{
    peer_send(peer, FRAME_CONFIGURE, 0,
              json_pack("{s:i, s:i, s:i}", "max_seqs", 4, "prefill_tokens", 64, "heartbeat_ms", 3600000));
    struct frame frame = peer_receive_any(peer);
    assert_int_equal(frame.type, FRAME_STATUS);
    int64_t bytes = integer_of(frame.payload, "allocated_bytes");
    *ret_models = json_array_size(json_object_get(frame.payload, "models"));
    json_decref(frame.payload);
    return bytes;
}

static void load(struct peer *peer, const char *id)
{
    peer_send(peer, FRAME_LOAD, 1, json_pack("{s:o}", "model", folder_json(id, model_folder)));
    json_decref(peer_expect(peer, FRAME_LOADED, 1));
}

/* Rather than fail, or recompute, a job takes the room of a model that nobody uses; and afterwards all its memory is
 * back. */
static void test_idle_models_make_room_for_a_job(void **state)
{
    (void)state;
    struct peer peer;
    struct job_report report = {0};
    size_t n_models;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    load(&peer, "hatchling");
    int64_t alone = read_status(&peer, &n_models);
    load(&peer, "twin");
    int64_t both = read_status(&peer, &n_models);
    assert_int_equal(n_models, 2);
    peer_send(&peer, FRAME_JOB_START, 0, start_json("roomy", data, NULL));
    int64_t most = 0, planned = 0;
    for (bool more = true; more;) {
        struct frame frame = peer_receive(&peer);
        more = job_report_add(&report, &frame, "roomy");
        if (frame.type == FRAME_JOB_METRICS) {
            most = integer_of(frame.payload, "peak_memory_bytes");
            planned = integer_of(frame.payload, "planned_memory_bytes");
        }
        json_decref(frame.payload);
    }
    assert_true(most > both && planned > 0 && most - both < planned);
    assert_true(read_status(&peer, &n_models) < both + (both - alone) / 8); /* what ops keep */
    assert_int_equal(n_models, 2);
    peer_stop(&peer);

    peer_start_small(&peer, most - (1 << 20));
    load(&peer, "hatchling");
    load(&peer, "twin");
    report = (struct job_report){0};
    peer_send(&peer, FRAME_JOB_START, 0, start_json("tight", data, NULL));
    job_report_read(&report, &peer, "tight");
    assert_string_equal(report.status, "succeeded");
    read_status(&peer, &n_models);
    assert_int_equal(n_models, 1);
    peer_stop(&peer);
}

/* ---- faults ---- */

enum { FAULTY_STEP = 6 };
static const char driver_words[] = "an illegal memory access was encountered";
static int steps_until_fault, fault_status;

/* A backend whose optimizer fails at one step. What is counted here is counted in the worker's process. */
static int failing_adamw(struct kernel_device *device, const struct adamw_args *args)
{
    return --steps_until_fault ? kernels_cpu()->adamw(device, args) : fault_status;
}

static const char *failing_fault(const struct kernel_device *device)
{
    (void)device;
    return steps_until_fault <= 0 && fault_status == KERNEL_DEVICE_LOST ? driver_words : NULL;
}

/* A worker whose device fails in the middle of a job says why and ends, without a word about the job's end; another
 * one goes on from its checkpoint, and the losses are those of the undisturbed run. */
static void fault_and_resume(const char *job, int status, const char *words)
{
    struct peer peer;
    struct job_report report = {0}, alone = {0};
    char data[128], undisturbed[64];
    struct kernel_ops ops = *kernels_cpu();
    ops.adamw = failing_adamw;
    ops.device_fault = failing_fault;
    steps_until_fault = FAULTY_STEP;
    fault_status = status;
    write_examples("train.jsonl", data);
    peer_start_on(&peer, &ops);
    peer_send(&peer, FRAME_JOB_START, 0, start_json(job, data, NULL));
    for (bool more = true; more;) {
        struct frame frame = peer_receive(&peer);
        if (frame.type == FRAME_FAULT) {
            if (!strstr(text_of(frame.payload, "reason"), words))
                fail_msg("%s", text_of(frame.payload, "reason"));
            more = false;
        } else {
            assert_true(job_report_add(&report, &frame, job));
        }
        json_decref(frame.payload);
    }
    assert_int_equal(peer_wait(&peer), 1);
    assert_int_equal(report.n_metrics, FAULTY_STEP - 1);

    peer_start(&peer);
    peer_send(&peer, FRAME_JOB_START, 0, start_json(job, data, report.checkpoint));
    job_report_read(&report, &peer, job);
    assert_string_equal(report.status, "succeeded");
    snprintf(undisturbed, sizeof undisturbed, "%s-undisturbed", job);
    peer_send(&peer, FRAME_JOB_START, 0, start_json(undisturbed, data, NULL));
    job_report_read(&alone, &peer, undisturbed);
    assert_memory_equal(report.losses, alone.losses, sizeof alone.losses);
    peer_stop(&peer);
}

static void test_a_lost_device_ends_it(void **state)
{
    (void)state;
    fault_and_resume("lost", KERNEL_DEVICE_LOST, driver_words);
}

static void test_memory_that_runs_out_ends_it(void **state)
{
    (void)state;
    fault_and_resume("starved", KERNEL_NO_MEMORY, "out of memory");
}

static void test_a_device_that_does_not_open_is_told(void **state)
{
    (void)state;
    struct peer peer;
    peer_fork(&peer, "cuda:999", NULL);
    struct frame frame = peer_receive_any(&peer);
    assert_int_equal(frame.type, FRAME_FAULT);
    assert_non_null(strstr(text_of(frame.payload, "reason"), kernels_cuda() ? "cuda:999" : "no CUDA"));
    json_decref(frame.payload);
    assert_int_equal(peer_wait(&peer), 1);
}

static void test_the_end_of_the_stream_ends_it(void **state)
{
    (void)state;
    struct peer peer;
    struct job_report report;
    char data[128];
    write_examples("train.jsonl", data);
    peer_start(&peer);
    close(peer.fd);
    peer.fd = -1;
    assert_int_equal(peer_wait(&peer), 1);

    peer_start(&peer);
    start_and_wait_for_metrics(&peer, "orphan", data, &report);
    close(peer.fd);
    peer.fd = -1;
    assert_int_equal(peer_wait(&peer), 1);
    char adapter[128];
    snprintf(adapter, sizeof adapter, "%s/orphan/adapter", work_folder);
    assert_int_not_equal(access(adapter, F_OK), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loading_and_the_heartbeat),
        cmocka_unit_test(test_a_tokenizer_that_does_not_fit_is_refused),
        cmocka_unit_test(test_texts_and_tokens),
        cmocka_unit_test(test_completions),
        cmocka_unit_test(test_bad_completions_are_refused_by_name),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_a_slow_reader_stops_nobody),
        cmocka_unit_test(test_what_is_no_frame_ends_it),
        cmocka_unit_test(test_validation),
        cmocka_unit_test(test_a_job_alone_in_company_and_interrupted),
        cmocka_unit_test(test_stopping_a_job),
        cmocka_unit_test(test_what_cannot_fit_is_told_beforehand),
        cmocka_unit_test(test_idle_models_make_room_for_a_job),
        cmocka_unit_test(test_a_lost_device_ends_it),
        cmocka_unit_test(test_memory_that_runs_out_ends_it),
        cmocka_unit_test(test_a_device_that_does_not_open_is_told),
        cmocka_unit_test(test_the_end_of_the_stream_ends_it),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
