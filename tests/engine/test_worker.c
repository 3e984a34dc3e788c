/* test_worker.c: a worker, spoken to as the daemon does: models, texts, completions. */
#include "peer.h"

#include "base/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

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
    };
    return cmocka_run_group_tests(tests, peer_setup, peer_teardown);
}
