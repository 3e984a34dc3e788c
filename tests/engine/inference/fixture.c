/* fixture.c: see fixture.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void must(int status, const struct error *error)
{
    if (status)
        fail_msg("%s", error->message);
}

void fixture_shape(struct fixture *fixture, int32_t max_seqs, int64_t prefill_tokens)
{
    struct error error = {0};
    generator_free(fixture->generator);
    fixture->generator = NULL;
    must(generator_create(fixture->model, fixture->tokenizer, max_seqs, prefill_tokens, &fixture->generator,
                          &error),
         &error);
}

int fixture_open(void **state)
{
    const char *source = getenv("ADDERD_SOURCE");
    char path[4096];
    struct error error = {0};
    struct fixture *fixture = calloc(1, sizeof *fixture);
    assert_non_null(fixture);
    assert_non_null(source);
    fixture->ops = kernels_cpu();
    assert_int_equal(fixture->ops->device_open(0, 2, &fixture->device), 0);
    snprintf(path, sizeof path, "%s/models/hatchling", source);
    must(model_open(path, fixture->ops, fixture->device, &fixture->model, &error), &error);
    must(tokenizer_load(path, &fixture->tokenizer, &error), &error);
    snprintf(path, sizeof path, "%s/tests/vectors/hatchling_forward.json", source);
    fixture->vectors = json_load_file(path, 0, NULL);
    assert_non_null(fixture->vectors);
    fixture_shape(fixture, 8, 64);
    *state = fixture;
    return 0;
}

int fixture_close(void **state)
{
    struct fixture *fixture = *state;
    generator_free(fixture->generator);
    tokenizer_free(fixture->tokenizer);
    model_close(fixture->model);
    fixture->ops->device_close(fixture->device);
    json_decref(fixture->vectors);
    free(fixture);
    return 0;
}

struct generation_params fixture_params(int32_t max_tokens)
{
    return (struct generation_params){
        .max_tokens = max_tokens, .top_p = 1, .repetition_penalty = 1, .seed = 1, .logprobs = -1};
}

struct token_list fixture_encode(const struct fixture *fixture, const char *text)
{
    struct token_list ids = {0};
    struct error error = {0};
    must(tokenizer_encode(fixture->tokenizer, text, strlen(text), &ids, &error), &error);
    return ids;
}

static void on_chunk(void *arg, int32_t index, const char *text, size_t length,
                     const struct scored_token *tokens, int32_t n_tokens, enum finish_reason finish)
{
    struct answer *answer = arg;
    assert_in_range(index, 0, ANSWER_CHOICES - 1);
    struct choice_answer *choice = &answer->choices[index];
    assert_int_equal(choice->finish, FINISH_NONE);
    assert_int_equal(answer->n_done, 0);
    assert_non_null(text);
    buffer_append(&choice->text, text, length);
    choice->finish = finish;
    choice->n_chunks++;
    for (int32_t i = 0; i < n_tokens; i++) {
        if (choice->n_tokens == choice->capacity) {
            choice->capacity = choice->capacity ? 2 * choice->capacity : 64;
            choice->tokens = realloc(choice->tokens, (size_t)choice->capacity * sizeof *choice->tokens);
            assert_non_null(choice->tokens);
        }
        struct token_answer *token = &choice->tokens[choice->n_tokens++];
        *token =
            (struct token_answer){.id = tokens[i].id, .logprob = tokens[i].logprob, .n_top = tokens[i].n_top};
        for (int32_t k = 0; k < tokens[i].n_top; k++) {
            token->top_ids[k] = tokens[i].top_ids[k];
            token->top_logprobs[k] = tokens[i].top_logprobs[k];
        }
    }
}

static void on_done(void *arg, int64_t prompt_tokens, int64_t completion_tokens, int code,
                    const struct error *error)
{
    struct answer *answer = arg;
    answer->n_done++;
    answer->code = code;
    answer->prompt_tokens = prompt_tokens;
    answer->completion_tokens = completion_tokens;
    assert_true(code == 0 || error->code == code);
}

uint64_t fixture_submit_request(struct fixture *fixture, const struct generation_request *request,
                                struct answer *answer)
{
    struct generation_request copy = *request;
    uint64_t id = 0;
    struct error error = {0};
    copy.callbacks = (struct generation_callbacks){.arg = answer, .chunk = on_chunk, .done = on_done};
    must(generator_submit(fixture->generator, &copy, &id, &error), &error);
    return id;
}

uint64_t fixture_submit_ids(struct fixture *fixture, const struct token_list *prompts, int32_t n_prompts,
                            int32_t n, const struct generation_params *params, bool stream,
                            struct answer *answer)
{
    struct generation_request request = {
        .n_prompts = n_prompts,
        .prompts = prompts,
        .n = n,
        .params = *params,
        .stream = stream,
    };
    return fixture_submit_request(fixture, &request, answer);
}

uint64_t fixture_submit(struct fixture *fixture, const char *prompt, int32_t n,
                        const struct generation_params *params, bool stream, struct answer *answer)
{
    struct token_list ids = fixture_encode(fixture, prompt);
    uint64_t id = fixture_submit_ids(fixture, &ids, 1, n, params, stream, answer);
    token_list_free(&ids);
    return id;
}

void fixture_run(struct fixture *fixture)
{
    struct error error = {0};
    int left;
    while ((left = generator_advance(fixture->generator, &error)) > 0)
        ;
    must(left, &error);
    assert_true(generator_idle(fixture->generator));
}

const char *answer_text(const struct answer *answer, int32_t choice)
{
    return answer->choices[choice].text.data ? answer->choices[choice].text.data : "";
}

void answer_free(struct answer *answer)
{
    for (int32_t i = 0; i < ANSWER_CHOICES; i++) {
        buffer_free(&answer->choices[i].text);
        free(answer->choices[i].tokens);
    }
    *answer = (struct answer){0};
}
