/* test_forward.c: inference against the official vectors: logits, scores, greedy text; and against itself: steps,
 * chunks, batches and mixed adapters give what one plain forward gives. */
#include "tests/engine/models/support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_PROMPTS = 4, MAX_PROMPT = 256 };

struct prompts {
    json_t *json;
    int32_t n, starts[MAX_PROMPTS + 1], ids[MAX_PROMPTS * MAX_PROMPT];
};

static void load_prompts(struct prompts *prompts)
{
    prompts->json = load_json("tests/vectors/hatchling_forward.json");
    json_t *list = json_is_array(prompts->json) ? prompts->json : json_object_get(prompts->json, "prompts");
    prompts->n = (int32_t)json_array_size(list);
    assert_int_equal(prompts->n, MAX_PROMPTS);
    prompts->starts[0] = 0;
    for (int32_t i = 0; i < prompts->n; i++) {
        json_t *ids = json_object_get(json_array_get(list, (size_t)i), "ids");
        int32_t n = (int32_t)json_array_size(ids);
        assert_in_range(n, 1, MAX_PROMPT);
        for (int32_t t = 0; t < n; t++)
            prompts->ids[prompts->starts[i] + t] =
                (int32_t)json_integer_value(json_array_get(ids, (size_t)t));
        prompts->starts[i + 1] = prompts->starts[i] + n;
    }
}

static json_t *prompt_field(const struct prompts *prompts, int32_t i, const char *key)
{
    json_t *list = json_is_array(prompts->json) ? prompts->json : json_object_get(prompts->json, "prompts");
    json_t *field = json_object_get(json_array_get(list, (size_t)i), key);
    assert_non_null(field);
    return field;
}

static int32_t argmax_of(const float *logits, int64_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* All prompts in one ragged forward. */
static void test_hatchling_scores(void **state)
{
    struct prompts prompts;
    struct error error = {0};
    struct model *model = open_model(*state, "models/hatchling");
    struct runner *runner = NULL;
    load_prompts(&prompts);
    int32_t rows = prompts.starts[prompts.n];
    check_ok(runner_create(model, rows, 32, &runner, &error), &error);
    struct forward_request request = {.n_seqs = prompts.n, .seq_starts = prompts.starts, .ids = prompts.ids};
    check_ok(runner_forward(runner, &request, &error), &error);

    int32_t targets[MAX_PROMPTS * MAX_PROMPT], argmax[MAX_PROMPTS * MAX_PROMPT],
        top_ids[MAX_PROMPTS * MAX_PROMPT * 3];
    float logprobs[MAX_PROMPTS * MAX_PROMPT], top_logprobs[MAX_PROMPTS * MAX_PROMPT * 3];
    for (int32_t i = 0; i < prompts.n; i++)
        for (int32_t t = prompts.starts[i]; t < prompts.starts[i + 1]; t++)
            targets[t] = t + 1 < prompts.starts[i + 1] ? prompts.ids[t + 1] : -1;
    check_ok(runner_score(runner, 0, rows, targets, logprobs, argmax, 3, top_ids, top_logprobs, &error),
             &error);
    for (int32_t i = 0; i < prompts.n; i++) {
        json_t *expected = prompt_field(&prompts, i, "token_logprobs");
        json_t *expected_argmax = prompt_field(&prompts, i, "argmax");
        for (int32_t t = prompts.starts[i]; t < prompts.starts[i + 1]; t++) {
            size_t at = (size_t)(t - prompts.starts[i]);
            assert_int_equal(argmax[t], json_integer_value(json_array_get(expected_argmax, at)));
            if (targets[t] < 0) {
                assert_true(logprobs[t] == 0);
                continue;
            }
            assert_true(fabs((double)logprobs[t] - json_real_value(json_array_get(expected, at))) < 1e-3);
            assert_int_equal(top_ids[3 * t], argmax[t]);
            assert_true(top_logprobs[3 * t] >= top_logprobs[3 * t + 1] &&
                        top_logprobs[3 * t + 1] >= top_logprobs[3 * t + 2]);
            if (top_ids[3 * t] == targets[t])
                assert_true(top_logprobs[3 * t] == logprobs[t]);
        }
    }
    runner_free(runner);
    model_close(model);
    json_decref(prompts.json);
}

static void test_hatchling_logits(void **state)
{
    struct prompts prompts;
    struct model *model = open_model(*state, "models/hatchling");
    struct safetensors *file = open_vector("tests/vectors/hatchling_logits_prompt0.safetensors");
    int64_t count;
    float *expected = copy_floats(file, "logits", &count);
    load_prompts(&prompts);
    assert_int_equal(count, prompts.starts[1] * model_config(model)->vocab_size);
    float *logits = all_logits(model, NULL, prompts.ids, prompts.starts[1]);
    assert_true(largest_difference(logits, expected, count) < 2e-3);
    free(logits);
    free(expected);
    safetensors_close(file);
    model_close(model);
    json_decref(prompts.json);
}

/* Prefill of all prompts together, then steps of four sequences in slots that are not in order. The plain
 * reference is slow, and says enough in a dozen steps. */
static void test_hatchling_greedy(void **state)
{
    const struct backend *backend = *state;
    const size_t n_steps = backend->ops == kernels_reference() ? 12 : 48;
    struct prompts prompts;
    struct error error = {0};
    struct model *model = open_model(*state, "models/hatchling");
    struct runner *runner = NULL;
    struct state_pool *pool = NULL;
    const int64_t vocab = model_config(model)->vocab_size;
    const int32_t slots[MAX_PROMPTS] = {2, 0, 3, 1}, steps[MAX_PROMPTS + 1] = {0, 1, 2, 3, 4};
    load_prompts(&prompts);
    check_ok(state_pool_create(model, MAX_PROMPTS, &pool, &error), &error);
    check_ok(runner_create(model, prompts.starts[prompts.n], MAX_PROMPTS, &runner, &error), &error);
    struct forward_request request = {.n_seqs = prompts.n,
                                      .seq_starts = prompts.starts,
                                      .ids = prompts.ids,
                                      .slots = slots,
                                      .states = pool};
    int32_t next[MAX_PROMPTS];
    for (size_t step = 0; step < n_steps; step++) {
        const float *logits;
        check_ok(runner_forward(runner, &request, &error), &error);
        check_ok(runner_logits(runner, NULL, 0, &logits, &error), &error);
        float *values = read_device(model, logits, prompts.n * vocab);
        for (int32_t i = 0; i < prompts.n; i++) {
            json_t *expected = prompt_field(&prompts, i, "greedy_ids");
            assert_int_equal(json_array_size(expected), 48);
            next[i] = argmax_of(values + i * vocab, vocab);
            assert_int_equal(next[i], json_integer_value(json_array_get(expected, step)));
        }
        free(values);
        request.seq_starts = steps;
        request.ids = next;
    }
    runner_free(runner);
    state_pool_free(pool);
    model_close(model);
    json_decref(prompts.json);
}

/* ---- consistency, on a random model ---- */

static const char config_text[] =
    "{\"model_type\":\"mamba\",\"vocab_size\":61,\"hidden_size\":24,\"num_hidden_layers\":3,\"state_size\":5,"
    "\"time_step_rank\":3,\"conv_kernel\":4,\"use_bias\":true,\"tie_word_embeddings\":false}";

static void random_ids(int32_t *ids, int32_t n, uint64_t seed)
{
    for (int32_t i = 0; i < n; i++)
        ids[i] = (int32_t)draw(&seed, 61);
}

/* Feed one sequence in pieces; the logits of every row must be those of one forward. */
static void check_pieces(struct model *model, const struct adapter *adapter, const int32_t *ids, int32_t n,
                         const int32_t *pieces, const float *expected, double tolerance)
{
    struct error error = {0};
    struct runner *runner = NULL;
    struct state_pool *pool = NULL;
    const int64_t vocab = model_config(model)->vocab_size;
    check_ok(state_pool_create(model, 2, &pool, &error), &error);
    check_ok(runner_create(model, n, n, &runner, &error), &error);
    int32_t rows[256], slot = 1;
    for (int32_t i = 0; i < 256; i++)
        rows[i] = i;
    for (int32_t at = 0, i = 0; at < n; i++) {
        int32_t length = pieces[i] < n - at ? pieces[i] : n - at, starts[] = {0, length};
        if (pieces[i] == 0) { /* once more from the pieces' beginning */
            i = -1;
            continue;
        }
        struct adapter_span span = {adapter, 0, 1};
        struct forward_request request = {.n_seqs = 1,
                                          .seq_starts = starts,
                                          .ids = ids + at,
                                          .slots = &slot,
                                          .states = pool,
                                          .spans = &span,
                                          .n_spans = 1};
        const float *logits;
        check_ok(runner_forward(runner, &request, &error), &error);
        check_ok(runner_logits(runner, rows, length, &logits, &error), &error);
        float *values = read_device(model, logits, length * vocab);
        assert_true(largest_difference(values, expected + at * vocab, length * vocab) < tolerance);
        free(values);
        at += length;
        /* Snapshots move between slots without a trace. */
        assert_int_equal(state_pool_copy(pool, 1 - slot, slot), 0);
        assert_int_equal(state_pool_reset(pool, slot), 0);
        slot = 1 - slot;
    }
    runner_free(runner);
    state_pool_free(pool);
}

static void test_steps_equal_parallel(void **state)
{
    static const int32_t singles[] = {1, 0}, mixed[] = {5, 1, 2, 66, 1, 1, 3, 0};
    struct error error = {0};
    struct lora_config lora = {.targets = TARGETS_ALL, .rank = 3, .alpha = 6};
    int32_t ids[150];
    char *folder = make_random_model(config_text, 1, TYPE_BF16);
    struct model *model = open_model(*state, folder);
    struct adapter *adapter = random_adapter(model, &lora, 5), *full = NULL;
    check_ok(adapter_create(model, ADAPT_FULL, NULL, 0, &full, &error), &error);
    random_ids(ids, 150, 1);
    const struct adapter *const adapters[] = {NULL, adapter, full};
    for (size_t i = 0; i < 3; i++) {
        float *expected = all_logits(model, adapters[i], ids, 150);
        check_pieces(model, adapters[i], ids, 150, singles, expected, 1e-4);
        check_pieces(model, adapters[i], ids, 150, mixed, expected, 1e-4);
        free(expected);
    }
    adapter_free(adapter);
    adapter_free(full);
    model_close(model);
    remove_folder(folder);
}

static void test_hatchling_steps(void **state)
{
    static const int32_t singles[] = {1, 0};
    struct prompts prompts;
    load_prompts(&prompts);
    struct model *model = open_model(*state, "models/hatchling");
    float *expected = all_logits(model, NULL, prompts.ids, prompts.starts[1]);
    check_pieces(model, NULL, prompts.ids, prompts.starts[1], singles, expected, 1e-4);
    free(expected);
    model_close(model);
    json_decref(prompts.json);
}

/* Base, two LoRA adapters of different ranks and targets, a full fine-tune, and the base again, in one forward. */
static void test_mixed_adapters(void **state)
{
    enum { SEQS = 7 };
    static const int32_t lengths[SEQS] = {3, 70, 1, 9, 4, 2, 5};
    struct error error = {0};
    struct lora_config wide = {.targets = TARGETS_ALL, .rank = 200, .alpha = 20};
    struct lora_config narrow = {
        .targets = TARGET_X_PROJ | TARGET_EMBEDDINGS, .rank = 2, .alpha = 4, .rslora = true};
    char *folder = make_random_model(config_text, 2, TYPE_F16);
    struct model *model = open_model(*state, folder);
    struct adapter *one = random_adapter(model, &wide, 7), *two = random_adapter(model, &narrow, 8),
                   *full = NULL;
    check_ok(adapter_create(model, ADAPT_FULL, NULL, 0, &full, &error), &error);
    for (int64_t i = 0; i < full->n_parameters; i++) { /* move it away from the base */
        struct param_slice *slice = &full->parameters[i].slice;
        float *values = read_device(model, slice->param, slice->count);
        for (int64_t k = 0; k < slice->count; k++)
            values[k] += 0.05f * (philox_uniform(9, (uint64_t)k) - 0.5f);
        write_device(model, slice->param, values, slice->count);
        free(values);
    }
    const struct adapter_span spans[] = {{NULL, 0, 1}, {one, 1, 3}, {two, 3, 4}, {full, 4, 6}, {NULL, 6, 7}};
    const int64_t vocab = model_config(model)->vocab_size;
    int32_t starts[SEQS + 1] = {0}, ids[128], rows[128], targets[128];
    for (int32_t s = 0; s < SEQS; s++)
        starts[s + 1] = starts[s] + lengths[s];
    random_ids(ids, starts[SEQS], 3);
    for (int32_t i = 0; i < 128; i++) {
        rows[i] = i;
        targets[i] = ids[(i + 1) % starts[SEQS]];
    }
    struct runner *runner = NULL;
    check_ok(runner_create(model, 128, 128, &runner, &error), &error);
    struct forward_request request = {
        .n_seqs = SEQS, .seq_starts = starts, .ids = ids, .spans = spans, .n_spans = 5};
    const float *logits;
    float logprobs[128];
    check_ok(runner_forward(runner, &request, &error), &error);
    check_ok(runner_logits(runner, rows, starts[SEQS], &logits, &error), &error);
    check_ok(runner_score(runner, 0, starts[SEQS], targets, logprobs, NULL, 0, NULL, NULL, &error), &error);
    float *values = read_device(model, logits, starts[SEQS] * vocab);
    for (int32_t i = 0; i < 5; i++)
        for (int32_t s = spans[i].seq_begin; s < spans[i].seq_end; s++) {
            float *alone = all_logits(model, spans[i].adapter, ids + starts[s], lengths[s]);
            assert_true(largest_difference(values + starts[s] * vocab, alone, lengths[s] * vocab) < 1e-5);
            for (int32_t t = 0; t < lengths[s]; t++) { /* the scores used the same heads */
                double sum = 0;
                for (int64_t v = 0; v < vocab; v++)
                    sum += exp((double)alone[t * vocab + v]);
                double logprob = (double)alone[t * vocab + targets[starts[s] + t]] - log(sum);
                assert_true(fabs(logprob - (double)logprobs[starts[s] + t]) < 1e-4);
            }
            free(alone);
        }
    /* Rows out of order, across parts. */
    const int32_t picked[] = {starts[6], 0, starts[4] + 1, starts[1] + 5};
    check_ok(runner_logits(runner, picked, 4, &logits, &error), &error);
    for (int32_t i = 0; i < 4; i++) {
        float *row = read_device(model, logits + i * vocab, vocab);
        assert_true(largest_difference(row, values + picked[i] * vocab, vocab) < 1e-5);
        free(row);
    }
    free(values);
    runner_free(runner);
    adapter_free(one);
    adapter_free(two);
    adapter_free(full);
    model_close(model);
    remove_folder(folder);
}

/* ---- in the type that the base is stored in ---- */

/* Prompts, then steps along the official continuations; the logits of step i at [i][prompt][vocab]. */
static float *follow_prompts(struct model *model, const struct prompts *prompts,
                             const struct adapter_span *spans, int32_t n_spans, size_t n_steps)
{
    struct error error = {0};
    struct runner *runner = NULL;
    struct state_pool *pool = NULL;
    const int64_t vocab = model_config(model)->vocab_size, rows = MAX_PROMPTS * vocab;
    const int32_t slots[MAX_PROMPTS] = {2, 0, 3, 1}, steps[MAX_PROMPTS + 1] = {0, 1, 2, 3, 4};
    int32_t next[MAX_PROMPTS];
    float *all = malloc(n_steps * (size_t)rows * sizeof *all);
    assert_non_null(all);
    check_ok(state_pool_create(model, MAX_PROMPTS, &pool, &error), &error);
    check_ok(runner_create(model, prompts->starts[MAX_PROMPTS], MAX_PROMPTS, &runner, &error), &error);
    struct forward_request request = {.n_seqs = MAX_PROMPTS,
                                      .seq_starts = prompts->starts,
                                      .ids = prompts->ids,
                                      .slots = slots,
                                      .states = pool,
                                      .spans = spans,
                                      .n_spans = n_spans};
    for (size_t step = 0; step < n_steps; step++) {
        const float *logits;
        check_ok(runner_forward(runner, &request, &error), &error);
        check_ok(runner_logits(runner, NULL, 0, &logits, &error), &error);
        float *values = read_device(model, logits, rows);
        memcpy(all + (int64_t)step * rows, values, (size_t)rows * sizeof *values);
        free(values);
        for (int32_t i = 0; i < MAX_PROMPTS; i++)
            next[i] =
                (int32_t)json_integer_value(json_array_get(prompt_field(prompts, i, "greedy_ids"), step));
        request.seq_starts = steps;
        request.ids = next;
    }
    runner_free(runner);
    state_pool_free(pool);
    return all;
}

/* The base alone, then with adapters on some sequences: near the same in fp32, and the same bits again. */
static void test_stored_type(void **state)
{
    enum { STEPS = 12 };
    const struct backend *backend = *state;
    struct error error = {0};
    struct prompts prompts;
    struct model *model = NULL, *exact = open_model(backend, "models/hatchling");
    check_ok(model_open(source_path("models/hatchling"), backend->ops, backend->device, &model, &error),
             &error);
    load_prompts(&prompts);
    const struct lora_config wide = {.targets = TARGETS_ALL, .rank = 8, .alpha = 4};
    const struct lora_config narrow = {.targets = TARGETS_DEFAULT, .rank = 3, .alpha = 3};
    const int64_t vocab = model_config(model)->vocab_size;
    for (int adapted = 0; adapted < 2; adapted++) {
        float *logits[3];
        for (int i = 0; i < 3; i++) { /* as stored, again, in fp32 */
            struct model *one = i < 2 ? model : exact;
            struct adapter *first = random_adapter(one, &wide, 3), *second = random_adapter(one, &narrow, 4);
            const struct adapter_span spans[] = {{NULL, 0, 1}, {first, 1, 3}, {second, 3, 4}};
            logits[i] = follow_prompts(one, &prompts, spans, adapted ? 3 : 0, STEPS);
            adapter_free(first);
            adapter_free(second);
        }
        int64_t count = STEPS * MAX_PROMPTS * vocab;
        assert_memory_equal(logits[0], logits[1], (size_t)count * sizeof(float));
        double bound = model_inference_type(model) == TYPE_F32 ? 1e-5 : 0.03;
        assert_true(relative_error(logits[0], logits[2], count) < bound);
        for (int i = 0; i < 3; i++)
            free(logits[i]);
    }
    model_close(model);
    model_close(exact);
    json_decref(prompts.json);
}

static void test_bad_requests(void **state)
{
    struct error error = {0};
    char *folder = make_random_model(config_text, 3, TYPE_F32);
    struct model *model = open_model(*state, folder);
    struct runner *runner = NULL;
    const int32_t starts[] = {0, 2, 4}, empty[] = {0, 2, 2}, ids[] = {1, 2, 3, 4}, bad[] = {1, 61, 2, 3};
    const struct adapter_span gap = {NULL, 0, 1};
    const float *logits;
    float logprob;
    check_ok(runner_create(model, 4, 2, &runner, &error), &error);
    const struct {
        struct forward_request request;
        const char *message;
    } cases[] = {
        {{.n_seqs = 3, .seq_starts = starts, .ids = ids}, "3 sequences"},
        {{.n_seqs = 2, .seq_starts = empty, .ids = ids}, "sequence 1 has no tokens"},
        {{.n_seqs = 2, .seq_starts = starts, .ids = bad}, "token id 61"},
        {{.n_seqs = 2, .seq_starts = starts, .ids = ids, .spans = &gap, .n_spans = 1}, "cover all"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_error(runner_forward(runner, &cases[i].request, &error), ERROR_INVALID, &error,
                    cases[i].message);
    check_error(runner_logits(runner, NULL, 0, &logits, &error), ERROR_INVALID, &error, "rows");
    struct forward_request good = {.n_seqs = 2, .seq_starts = starts, .ids = ids};
    check_ok(runner_forward(runner, &good, &error), &error);
    check_error(runner_logits(runner, (int32_t[]){4}, 1, &logits, &error), ERROR_INVALID, &error, "row 4");
    check_error(runner_score(runner, 0, 5, ids, &logprob, NULL, 0, NULL, NULL, &error), ERROR_INVALID, &error,
                "rows 0..5");
    runner_free(runner);
    model_close(model);
    remove_folder(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hatchling_scores),     cmocka_unit_test(test_hatchling_logits),
        cmocka_unit_test(test_hatchling_steps),      cmocka_unit_test(test_hatchling_greedy),
        cmocka_unit_test(test_steps_equal_parallel), cmocka_unit_test(test_mixed_adapters),
        cmocka_unit_test(test_bad_requests),         cmocka_unit_test(test_stored_type),
    };
    return run_on_both(tests);
}
