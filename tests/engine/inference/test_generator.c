/* test_generator.c: completions of hatchling: right, and the same whatever else runs beside them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const prompts[] = {
    "Once upon a time",
    "The dog ran to the park. He saw a big red ball and",
    "Tom",
    "Lily and her mom went to the store to buy some",
    "One day, a little bird was very sad because",
    "It was a cold winter morning. The snow was white and",
};
enum { N_PROMPTS = sizeof prompts / sizeof *prompts };

static struct token_list vector_ids(const json_t *vector, const char *key)
{
    struct token_list ids = {0};
    size_t i;
    json_t *id;
    json_array_foreach(json_object_get(vector, key), i, id)
        assert_int_equal(token_list_push(&ids, (int32_t)json_integer_value(id)), 0);
    return ids;
}

static void test_greedy_equals_the_vectors(void **state)
{
    struct fixture *fixture = *state;
    struct answer answers[8] = {0};
    struct generation_params params = fixture_params(48);
    params.logprobs = 1;
    size_t count = json_array_size(fixture->vectors);
    assert_in_range(count, 1, 8);
    for (size_t i = 0; i < count; i++) {
        struct token_list ids = vector_ids(json_array_get(fixture->vectors, i), "ids");
        fixture_submit_ids(fixture, &ids, 1, 1, &params, false, &answers[i]);
        token_list_free(&ids);
    }
    fixture_run(fixture);
    for (size_t i = 0; i < count; i++) {
        const json_t *vector = json_array_get(fixture->vectors, i);
        struct token_list expected = vector_ids(vector, "greedy_ids");
        const struct choice_answer *choice = &answers[i].choices[0];
        assert_int_equal(choice->n_tokens, expected.count);
        for (size_t t = 0; t < expected.count; t++)
            assert_int_equal(choice->tokens[t].id, expected.ids[t]);
        assert_string_equal(answer_text(&answers[i], 0),
                            json_string_value(json_object_get(vector, "greedy_text")));
        assert_int_equal(choice->n_chunks, 1);
        assert_int_equal(choice->finish, FINISH_LENGTH);
        assert_int_equal(answers[i].prompt_tokens, json_array_size(json_object_get(vector, "ids")));
        assert_int_equal(answers[i].completion_tokens, 48);
        token_list_free(&expected);
        answer_free(&answers[i]);
    }
}

/* Echo with max_tokens 0 is what scores a text; the prompt runs in chunks of 8 here. */
static void test_echo_scores_equal_the_vectors(void **state)
{
    struct fixture *fixture = *state;
    fixture_shape(fixture, 8, 8);
    struct generation_params params = fixture_params(0);
    params.echo = true;
    params.logprobs = 1;
    for (size_t i = 0; i < json_array_size(fixture->vectors); i++) {
        const json_t *vector = json_array_get(fixture->vectors, i);
        struct token_list ids = vector_ids(vector, "ids");
        struct answer answer = {0};
        fixture_submit_ids(fixture, &ids, 1, 1, &params, false, &answer);
        fixture_run(fixture);
        const struct choice_answer *choice = &answer.choices[0];
        assert_int_equal(choice->n_tokens, ids.count);
        assert_true(isnan(choice->tokens[0].logprob));
        assert_int_equal(choice->tokens[0].n_top, 0);
        for (size_t t = 0; t < ids.count; t++) {
            assert_int_equal(choice->tokens[t].id, ids.ids[t]);
            if (!t)
                continue;
            double expected =
                json_real_value(json_array_get(json_object_get(vector, "token_logprobs"), t - 1));
            assert_true(fabs((double)choice->tokens[t].logprob - expected) < 1e-3);
            assert_int_equal(choice->tokens[t].top_ids[0],
                             json_integer_value(json_array_get(json_object_get(vector, "argmax"), t - 1)));
        }
        assert_string_equal(answer_text(&answer, 0), json_string_value(json_object_get(vector, "prompt")));
        assert_int_equal(choice->finish, FINISH_LENGTH);
        assert_int_equal(answer.completion_tokens, 0);
        token_list_free(&ids);
        answer_free(&answer);
    }
    fixture_shape(fixture, 8, 64);
}

static void test_echo_has_the_prompt_and_the_generated_token(void **state)
{
    struct fixture *fixture = *state;
    struct generation_params params = fixture_params(1);
    params.echo = true;
    params.logprobs = 1;
    struct token_list ids[2] = {fixture_encode(fixture, prompts[0]), fixture_encode(fixture, prompts[2])};
    struct answer answer = {0};
    fixture_submit_ids(fixture, ids, 2, 2, &params, false, &answer);
    fixture_run(fixture);
    for (int32_t c = 0; c < 4; c++) {
        const struct choice_answer *choice = &answer.choices[c];
        assert_int_equal(choice->n_tokens, ids[c / 2].count + 1);
        const struct token_answer *last = &choice->tokens[choice->n_tokens - 1];
        /* Greedy: the very number that stands for the argmax. */
        assert_int_equal(last->n_top, 1);
        assert_int_equal(last->id, last->top_ids[0]);
        assert_true(last->logprob == last->top_logprobs[0]);
        assert_memory_equal(answer_text(&answer, c), prompts[c / 2 ? 2 : 0], strlen(prompts[c / 2 ? 2 : 0]));
        assert_true(choice->text.length > strlen(prompts[c / 2 ? 2 : 0]));
    }
    assert_int_equal(answer.prompt_tokens, ids[0].count + ids[1].count);
    assert_int_equal(answer.completion_tokens, 4);
    token_list_free(&ids[0]);
    token_list_free(&ids[1]);
    answer_free(&answer);
}

static void expect_same_alone_and_together(struct fixture *fixture, struct generation_params params)
{
    struct answer alone[N_PROMPTS] = {0}, together[N_PROMPTS] = {0};
    for (int i = 0; i < N_PROMPTS; i++) {
        params.seed = (uint64_t)i + 10;
        fixture_submit(fixture, prompts[i], 1, &params, false, &alone[i]);
        fixture_run(fixture);
    }
    /* Fewer seats than sequences, chunks shorter than prompts, arrivals while others run. */
    fixture_shape(fixture, 4, 5);
    for (int i = 0; i < N_PROMPTS; i++) {
        params.seed = (uint64_t)i + 10;
        fixture_submit(fixture, prompts[i], 1, &params, true, &together[i]);
        for (int k = 0; k < 3; k++)
            generator_advance(fixture->generator, NULL);
    }
    fixture_run(fixture);
    for (int i = 0; i < N_PROMPTS; i++) {
        assert_int_equal(together[i].n_done, 1);
        assert_true(alone[i].choices[0].text.length > 0);
        assert_string_equal(answer_text(&together[i], 0), answer_text(&alone[i], 0));
        assert_int_equal(together[i].choices[0].finish, alone[i].choices[0].finish);
        assert_int_equal(together[i].completion_tokens, alone[i].completion_tokens);
        assert_true(together[i].choices[0].n_chunks > 4);
        answer_free(&alone[i]);
        answer_free(&together[i]);
    }
    fixture_shape(fixture, 8, 64);
}

static void test_greedy_is_the_same_alone_and_together(void **state)
{
    expect_same_alone_and_together(*state, fixture_params(24));
}

static void test_sampling_is_the_same_alone_and_together(void **state)
{
    struct generation_params params = fixture_params(24);
    params.temperature = 0.9f;
    params.top_p = 0.95f;
    params.top_k = 50;
    expect_same_alone_and_together(*state, params);
}

static void test_samples_differ_from_each_other_and_come_again(void **state)
{
    struct fixture *fixture = *state;
    struct generation_params params = fixture_params(16);
    params.temperature = 1;
    struct answer first = {0}, again = {0};
    fixture_submit(fixture, prompts[1], 5, &params, false, &first);
    fixture_run(fixture);
    /* Three seats: two samples start later, from the copy of the prompt's state. */
    fixture_shape(fixture, 3, 4);
    fixture_submit(fixture, prompts[1], 5, &params, true, &again);
    fixture_run(fixture);
    int32_t different = 0;
    for (int32_t i = 0; i < 5; i++) {
        assert_string_equal(answer_text(&again, i), answer_text(&first, i));
        different += strcmp(answer_text(&first, i), answer_text(&first, 0)) != 0;
    }
    assert_true(different >= 3);
    struct token_list ids = fixture_encode(fixture, prompts[1]);
    assert_int_equal(first.prompt_tokens, ids.count);
    token_list_free(&ids);
    answer_free(&first);
    answer_free(&again);

    /* Greedy samples of one prompt are equal, so the copies are right. */
    params.temperature = 0;
    fixture_submit(fixture, prompts[1], 7, &params, false, &first);
    fixture_run(fixture);
    fixture_submit(fixture, prompts[1], 1, &params, false, &again);
    fixture_run(fixture);
    for (int32_t i = 0; i < 7; i++)
        assert_string_equal(answer_text(&first, i), answer_text(&again, 0));
    answer_free(&first);
    answer_free(&again);
    fixture_shape(fixture, 8, 64);
}

/* Whatever part of the greedy text is the stop string, the text ends right before it. */
static void test_stop_strings_across_tokens(void **state)
{
    struct fixture *fixture = *state;
    struct generation_params params = fixture_params(20);
    struct answer whole = {0};
    fixture_submit(fixture, prompts[0], 1, &params, false, &whole);
    fixture_run(fixture);
    const char *text = answer_text(&whole, 0);
    size_t length = strlen(text);
    assert_true(length > 30);
    for (size_t begin = 1; begin + 9 < length; begin += 3) {
        char stop[10];
        snprintf(stop, sizeof stop, "%s", text + begin);
        const char *list[] = {"never in the text", stop};
        params.stop = list;
        params.n_stop = 2;
        struct answer cut = {0}, streamed = {0};
        fixture_submit(fixture, prompts[0], 1, &params, false, &cut);
        fixture_submit(fixture, prompts[0], 1, &params, true, &streamed);
        fixture_run(fixture);
        size_t expected = (size_t)(strstr(text, stop) - text);
        assert_int_equal(cut.choices[0].text.length, expected);
        assert_memory_equal(answer_text(&cut, 0), text, expected);
        assert_string_equal(answer_text(&streamed, 0), answer_text(&cut, 0));
        assert_int_equal(cut.choices[0].finish, FINISH_STOP);
        assert_true(cut.completion_tokens <= 20);
        answer_free(&cut);
        answer_free(&streamed);
    }
    /* What was held back as a possible beginning comes out at the end. */
    char tail[8];
    snprintf(tail, sizeof tail, "%s", text + length - 4);
    strcat(tail, "~");
    const char *list[] = {tail};
    params.stop = list;
    params.n_stop = 1;
    struct answer held = {0};
    fixture_submit(fixture, prompts[0], 1, &params, true, &held);
    fixture_run(fixture);
    assert_string_equal(answer_text(&held, 0), text);
    assert_int_equal(held.choices[0].finish, FINISH_LENGTH);
    answer_free(&held);
    answer_free(&whole);
}

/* Logit bias makes end of text certain. */
static void test_end_of_text(void **state)
{
    struct fixture *fixture = *state;
    int32_t eos = model_config(fixture->model)->eos_id;
    struct logit_bias bias = {.id = eos, .bias = 1000};
    struct generation_params params = fixture_params(5);
    params.bias = &bias;
    params.n_bias = 1;
    params.logprobs = 2;
    params.echo = true;
    struct answer answer = {0};
    fixture_submit(fixture, prompts[2], 1, &params, false, &answer);
    fixture_run(fixture);
    const struct choice_answer *choice = &answer.choices[0];
    assert_string_equal(answer_text(&answer, 0), prompts[2]);
    assert_int_equal(choice->finish, FINISH_STOP);
    assert_int_equal(answer.completion_tokens, 1);
    const struct token_answer *last = &choice->tokens[choice->n_tokens - 1];
    assert_int_equal(last->id, eos);
    /* The scores are the model's own, before the bias. */
    assert_true(last->logprob < -0.1f && last->top_ids[0] != eos);
    answer_free(&answer);

    params.ignore_eos = true;
    fixture_submit(fixture, prompts[2], 1, &params, false, &answer);
    fixture_run(fixture);
    assert_int_equal(answer.choices[0].finish, FINISH_LENGTH);
    assert_int_equal(answer.completion_tokens, 5);
    for (int32_t t = 0; t < answer.choices[0].n_tokens; t++)
        assert_int_not_equal(answer.choices[0].tokens[t].id, eos);
    answer_free(&answer);
}

/* A stop string that is a special token, as a chat form's may be, though the text does not show it. */
static void test_a_special_token_stops(void **state)
{
    struct fixture *fixture = *state;
    static const char *const list[] = {"never in the text", "<|padding|>"};
    struct logit_bias bias = {.id = tokenizer_find(fixture->tokenizer, list[1]), .bias = 1000};
    struct generation_params params = fixture_params(5);
    params.bias = &bias;
    params.n_bias = 1;
    for (int n_stop = 1; n_stop <= 2; n_stop++) {
        struct answer answer = {0};
        params.stop = list;
        params.n_stop = n_stop;
        fixture_submit(fixture, prompts[2], 1, &params, true, &answer);
        fixture_run(fixture);
        assert_string_equal(answer_text(&answer, 0), "");
        assert_int_equal(answer.choices[0].finish, n_stop == 2 ? FINISH_STOP : FINISH_LENGTH);
        assert_int_equal(answer.completion_tokens, n_stop == 2 ? 1 : 5);
        answer_free(&answer);
    }
}

/* A character of four bytes comes token by token; nothing broken is ever shown. */
static void test_characters_are_shown_whole(void **state)
{
    struct fixture *fixture = *state;
    struct token_list snake = fixture_encode(fixture, "\xF0\x9F\x90\x8D");
    struct generation_params params = fixture_params(4);
    params.echo = true;
    assert_true(snake.count > 1);
    /* All but the last byte: what is held back at the end is shown as U+FFFD. */
    struct token_list part = snake;
    part.count--;
    params.max_tokens = 0;
    struct answer answer = {0};
    fixture_submit_ids(fixture, &part, 1, 1, &params, true, &answer);
    fixture_run(fixture);
    assert_non_null(strstr(answer_text(&answer, 0), "\xEF\xBF\xBD"));
    answer_free(&answer);
    /* The last byte as a generated token completes the prompt's character. */
    struct logit_bias bias = {.id = snake.ids[snake.count - 1], .bias = 1000};
    params.bias = &bias;
    params.n_bias = 1;
    params.max_tokens = 1;
    fixture_submit_ids(fixture, &part, 1, 1, &params, true, &answer);
    fixture_run(fixture);
    assert_string_equal(answer_text(&answer, 0), "\xF0\x9F\x90\x8D");
    answer_free(&answer);
    token_list_free(&snake);
}

static void test_an_empty_prompt_begins_a_text(void **state)
{
    struct fixture *fixture = *state;
    struct generation_params params = fixture_params(6);
    params.echo = true;
    params.logprobs = 0;
    struct answer answer = {0}, explicit = {0};
    fixture_submit(fixture, "", 1, &params, false, &answer);
    params.echo = false;
    fixture_submit(fixture, "<|endoftext|>", 1, &params, false, &explicit);
    fixture_run(fixture);
    assert_int_equal(answer.prompt_tokens, 0);
    assert_int_equal(explicit.prompt_tokens, 1);
    assert_int_equal(answer.choices[0].n_tokens, 6);
    assert_string_equal(answer_text(&answer, 0), answer_text(&explicit, 0));
    answer_free(&answer);
    answer_free(&explicit);
}

static void test_cancel_at_any_moment(void **state)
{
    struct fixture *fixture = *state;
    struct generation_params params = fixture_params(40);
    struct answer expected = {0};
    fixture_submit(fixture, prompts[3], 1, &params, false, &expected);
    fixture_run(fixture);
    fixture_shape(fixture, 3, 4);
    for (int moment = 0; moment < 12; moment++) {
        struct answer dropped = {0}, kept = {0};
        uint64_t id = fixture_submit(fixture, prompts[1], 4, &params, true, &dropped);
        fixture_submit(fixture, prompts[3], 1, &params, true, &kept);
        for (int k = 0; k < moment; k++)
            generator_advance(fixture->generator, NULL);
        assert_int_equal(dropped.n_done, 0);
        generator_cancel(fixture->generator, id);
        assert_int_equal(dropped.n_done, 1);
        assert_int_equal(dropped.code, ERROR_CANCELLED);
        generator_cancel(fixture->generator, id);
        generator_cancel(fixture->generator, 12345678);
        fixture_run(fixture);
        assert_int_equal(dropped.n_done, 1);
        assert_string_equal(answer_text(&kept, 0), answer_text(&expected, 0));
        answer_free(&dropped);
        answer_free(&kept);
        struct generator_status status;
        generator_status(fixture->generator, &status);
        assert_int_equal(status.running, 0);
        assert_int_equal(status.waiting, 0);
    }
    answer_free(&expected);
    fixture_shape(fixture, 8, 64);
}

static void test_freeing_ends_what_is_there(void **state)
{
    struct fixture *fixture = *state;
    struct generation_params params = fixture_params(40);
    struct answer answers[3] = {0};
    fixture_shape(fixture, 2, 64);
    for (int i = 0; i < 3; i++)
        fixture_submit(fixture, prompts[i], 1, &params, true, &answers[i]);
    for (int k = 0; k < 4; k++)
        generator_advance(fixture->generator, NULL);
    fixture_shape(fixture, 8, 64);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(answers[i].n_done, 1);
        assert_int_equal(answers[i].code, ERROR_CANCELLED);
        answer_free(&answers[i]);
    }
}

/* A prompt of many chunks does not keep a short one waiting until it is through. */
static void test_a_long_prompt_does_not_stall_others(void **state)
{
    struct fixture *fixture = *state;
    fixture_shape(fixture, 4, 128);
    struct token_list ids = {0};
    for (int i = 0; i < 3000; i++)
        assert_int_equal(token_list_push(&ids, 100 + i % 1000), 0);
    struct generation_params params = fixture_params(4);
    struct answer long_answer = {0}, short_answer = {0};
    fixture_submit_ids(fixture, &ids, 1, 1, &params, false, &long_answer);
    generator_advance(fixture->generator, NULL);
    fixture_submit(fixture, prompts[0], 1, &params, false, &short_answer);
    for (int k = 0; k < 9; k++)
        generator_advance(fixture->generator, NULL);
    assert_int_equal(short_answer.n_done, 1);
    assert_int_equal(long_answer.n_done, 0);
    fixture_run(fixture);
    assert_int_equal(long_answer.n_done, 1);
    assert_int_equal(long_answer.completion_tokens, 4);
    token_list_free(&ids);
    answer_free(&long_answer);
    answer_free(&short_answer);
    fixture_shape(fixture, 8, 64);
}

static void never_chunk(void *arg, int32_t index, const char *text, size_t length,
                        const struct scored_token *tokens, int32_t n_tokens, enum finish_reason finish)
{
    (void)arg, (void)index, (void)text, (void)length, (void)tokens, (void)n_tokens, (void)finish;
    fail();
}

static void never_done(void *arg, int64_t prompt_tokens, int64_t completion_tokens, int code,
                       const struct error *error)
{
    (void)arg, (void)prompt_tokens, (void)completion_tokens, (void)code, (void)error;
    fail();
}

static void expect_refused(struct fixture *fixture, const struct token_list *prompt, int32_t n,
                           struct generation_params params, const char *param)
{
    struct generation_request request = {
        .n_prompts = 1,
        .prompts = prompt,
        .n = n,
        .params = params,
        .callbacks = {.chunk = never_chunk, .done = never_done},
    };
    struct error error = {0};
    uint64_t id = 99;
    assert_int_equal(generator_submit(fixture->generator, &request, &id, &error), ERROR_INVALID);
    assert_string_equal(error.param, param);
    assert_int_equal(id, 99);
    assert_true(generator_idle(fixture->generator));
}

static void test_bad_requests_are_refused_by_name(void **state)
{
    struct fixture *fixture = *state;
    int32_t vocab_size = (int32_t)model_config(fixture->model)->vocab_size;
    int32_t good[] = {5, 6}, high[] = {5, vocab_size}, low[] = {-1};
    struct token_list prompt = {good, 2, 2}, too_high = {high, 2, 2}, too_low = {low, 1, 1};
    struct generation_params params = fixture_params(4);
    struct logit_bias bias = {.id = vocab_size, .bias = 1};
    expect_refused(fixture, &too_high, 1, params, "prompt");
    expect_refused(fixture, &too_low, 1, params, "prompt");
    expect_refused(fixture, &prompt, 0, params, "n");
    expect_refused(fixture, &prompt, 1, fixture_params(0), "max_tokens");
    expect_refused(fixture, &prompt, 1, fixture_params(-1), "max_tokens");
    params.temperature = NAN;
    expect_refused(fixture, &prompt, 1, params, "temperature");
    params = fixture_params(4);
    params.top_p = 1.5f;
    expect_refused(fixture, &prompt, 1, params, "top_p");
    params = fixture_params(4);
    params.repetition_penalty = 0;
    expect_refused(fixture, &prompt, 1, params, "repetition_penalty");
    params = fixture_params(4);
    params.logprobs = KERNEL_TOP_MAX + 1;
    expect_refused(fixture, &prompt, 1, params, "logprobs");
    params = fixture_params(4);
    params.bias = &bias;
    params.n_bias = 1;
    expect_refused(fixture, &prompt, 1, params, "logit_bias");
}

/* Rows of one step may use different adapters; each is served as if alone. */
static void test_adapters_share_a_step(void **state)
{
    struct fixture *fixture = *state;
    struct adapter *adapters[3] = {NULL};
    struct error error = {0};
    struct lora_config lora = {.targets = TARGETS_ALL, .rank = 4, .alpha = 64};
    for (int a = 1; a < 3; a++) {
        assert_int_equal(adapter_create(fixture->model, ADAPT_LORA, &lora, (uint64_t)a, &adapters[a], &error),
                         0);
        for (int64_t p = 0; p < adapters[a]->n_parameters; p++) {
            struct parameter *parameter = &adapters[a]->parameters[p];
            for (int64_t i = 0; i < parameter->slice.count; i++)
                parameter->slice.param[i] +=
                    (philox_uniform((uint64_t)(100 * a + p), (uint64_t)i) - 0.5f) * 0.05f;
        }
    }
    struct answer alone[3] = {0}, together[9] = {0};
    struct generation_params params = fixture_params(12);
    struct token_list ids = fixture_encode(fixture, prompts[4]);
    struct generation_request request = {.n_prompts = 1, .prompts = &ids, .n = 1, .params = params};
    for (int a = 0; a < 3; a++) {
        request.adapter = adapters[a];
        fixture_submit_request(fixture, &request, &alone[a]);
        if (a)
            assert_true(generator_uses(fixture->generator, adapters[a]));
        fixture_run(fixture);
        assert_false(generator_uses(fixture->generator, adapters[a]));
    }
    for (int i = 0; i < 9; i++) {
        request.adapter = adapters[i % 3];
        fixture_submit_request(fixture, &request, &together[i]);
    }
    fixture_run(fixture);
    assert_string_not_equal(answer_text(&alone[0], 0), answer_text(&alone[1], 0));
    assert_string_not_equal(answer_text(&alone[1], 0), answer_text(&alone[2], 0));
    for (int i = 0; i < 9; i++) {
        assert_string_equal(answer_text(&together[i], 0), answer_text(&alone[i % 3], 0));
        answer_free(&together[i]);
    }
    for (int a = 0; a < 3; a++) {
        answer_free(&alone[a]);
        adapter_free(adapters[a]);
    }
    token_list_free(&ids);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy_equals_the_vectors),
        cmocka_unit_test(test_echo_scores_equal_the_vectors),
        cmocka_unit_test(test_echo_has_the_prompt_and_the_generated_token),
        cmocka_unit_test(test_greedy_is_the_same_alone_and_together),
        cmocka_unit_test(test_sampling_is_the_same_alone_and_together),
        cmocka_unit_test(test_samples_differ_from_each_other_and_come_again),
        cmocka_unit_test(test_stop_strings_across_tokens),
        cmocka_unit_test(test_end_of_text),
        cmocka_unit_test(test_a_special_token_stops),
        cmocka_unit_test(test_characters_are_shown_whole),
        cmocka_unit_test(test_an_empty_prompt_begins_a_text),
        cmocka_unit_test(test_cancel_at_any_moment),
        cmocka_unit_test(test_freeing_ends_what_is_there),
        cmocka_unit_test(test_a_long_prompt_does_not_stall_others),
        cmocka_unit_test(test_bad_requests_are_refused_by_name),
        cmocka_unit_test(test_adapters_share_a_step),
    };
    return cmocka_run_group_tests(tests, fixture_open, fixture_close);
}
