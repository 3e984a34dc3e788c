/* test_gradients.c: the training pass: gradients against the official vectors and against differences of the
 * loss; packing, accumulation, dropout, divergence. */
#include "tests/engine/models/support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static struct adapter *new_adapter(struct model *model, enum adaptation adaptation,
                                   const struct lora_config *lora)
{
    struct error error = {0};
    struct adapter *adapter = NULL;
    check_ok(adapter_create(model, adaptation, lora, 11, &adapter, &error), &error);
    return adapter;
}

static struct pass *new_pass(struct model *model, struct adapter *adapter, int64_t tokens, int32_t seqs)
{
    struct error error = {0};
    struct pass *pass = NULL;
    const struct plan_request request = {.max_tokens = tokens, .max_seqs = seqs};
    check_ok(pass_create(model, adapter, &request, &pass, &error), &error);
    return pass;
}

static struct pass_result run(struct pass *pass, const struct batch *batch,
                              const struct pass_options *options)
{
    struct error error = {0};
    struct pass_result result = {0};
    check_ok(pass_run(pass, batch, options, &error), &error);
    check_ok(pass_collect(pass, NULL, 0, &result, &error), &error);
    return result;
}

static void zero_gradients(const struct adapter *adapter)
{
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        const struct param_slice *slice = &adapter->parameters[i].slice;
        assert_int_equal(
            model_ops(adapter->model)
                ->zero(model_device(adapter->model), slice->grad, (size_t)slice->count * sizeof(float)),
            0);
    }
}

/* All gradients of an adapter, back to back. */
static float *all_gradients(const struct adapter *adapter, int64_t *ret_count)
{
    int64_t total = 0, at = 0;
    for (int64_t i = 0; i < adapter->n_parameters; i++)
        total += adapter->parameters[i].slice.count;
    float *gradients = malloc((size_t)total * sizeof *gradients);
    assert_non_null(gradients);
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        const struct param_slice *slice = &adapter->parameters[i].slice;
        float *one = read_device(adapter->model, slice->grad, slice->count);
        memcpy(gradients + at, one, (size_t)slice->count * sizeof *one);
        free(one);
        at += slice->count;
    }
    *ret_count = total;
    return gradients;
}

/* ---- the official vectors ---- */

static void check_vectors(const struct backend *backend, const char *name, const struct lora_config *lora)
{
    char path[128];
    snprintf(path, sizeof path, "tests/vectors/tiny_mamba/%s", name);
    struct safetensors *file = open_vector(path);
    struct model *model = open_model(backend, "tests/vectors/tiny_mamba");
    struct adapter *adapter = new_adapter(model, lora ? ADAPT_LORA : ADAPT_FULL, lora);
    for (int64_t i = 0; lora && i < adapter->n_parameters; i++) {
        float *values = copy_floats(file, adapter->parameters[i].name, NULL);
        write_device(model, adapter->parameters[i].slice.param, values, adapter->parameters[i].slice.count);
        free(values);
    }
    int64_t n;
    int32_t *ids = copy_ints(file, "input_ids", &n), *labels = copy_ints(file, "labels", NULL);
    int32_t length = (int32_t)n / 2;
    struct batch *batch = new_batch(n, 2);
    batch_add(batch, ids, labels, length);
    batch_add(batch, ids + length, labels + length, length);

    struct pass *pass = new_pass(model, adapter, n + 3, 4); /* roomier than the batch */
    struct pass_options options = {.backward = true, .grad_scale = 1.0f / (float)batch->n_targets};
    struct pass_result result = run(pass, batch, &options);
    float *loss = copy_floats(file, "loss", NULL);
    assert_int_equal(result.n_targets, batch->n_targets);
    assert_true(fabs(result.loss_sum / (double)result.n_targets - (double)*loss) < 1e-5);
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        const struct parameter *parameter = &adapter->parameters[i];
        char grad_name[160];
        int64_t count;
        snprintf(grad_name, sizeof grad_name, "grad.%s", parameter->name);
        float *expected = copy_floats(file, grad_name, &count);
        float *found = read_device(model, parameter->slice.grad, parameter->slice.count);
        assert_int_equal(count, parameter->slice.count);
        double error = relative_error(found, expected, count);
        if (!(error < 1e-4))
            fail_msg("%s: relative error %g", grad_name, error);
        free(expected);
        free(found);
    }
    /* The same tensors through inference. */
    float *logits = copy_floats(file, "logits", NULL);
    for (int32_t s = 0; s < 2; s++) {
        int64_t row = length * model_config(model)->vocab_size;
        float *found = all_logits(model, adapter, ids + s * length, length);
        assert_true(largest_difference(found, logits + s * row, row) < 1e-4);
        free(found);
    }
    free(logits);
    free(loss);
    free(ids);
    free(labels);
    drop_batch(batch);
    pass_free(pass);
    adapter_free(adapter);
    model_close(model);
    safetensors_close(file);
}

static void test_full_vectors(void **state)
{
    check_vectors(*state, "full.safetensors", NULL);
}

static void test_lora_vectors(void **state)
{
    const struct lora_config lora = {.targets = TARGETS_ALL, .rank = 4, .alpha = 8};
    check_vectors(*state, "lora_r4_alpha8.safetensors", &lora);
}

/* ---- every branch against differences of the loss ---- */

/* Odd sizes, a head of its own, biases everywhere. */
static const char biased_config[] =
    "{\"model_type\":\"mamba\",\"vocab_size\":37,\"hidden_size\":12,\"num_hidden_layers\":2,\"state_size\":3,"
    "\"time_step_rank\":2,\"conv_kernel\":3,\"use_bias\":true,\"tie_word_embeddings\":false}";
/* The opposite: tied, no biases at all. */
static const char plain_config[] =
    "{\"model_type\":\"mamba\",\"vocab_size\":29,\"hidden_size\":8,\"num_hidden_layers\":2,\"state_size\":4,"
    "\"time_step_rank\":\"auto\",\"intermediate_size\":20,\"use_conv_bias\":false}";

static struct batch *random_batch(int32_t vocab, const int32_t *lengths, int32_t n_seqs, uint64_t seed)
{
    struct batch *batch = new_batch(256, n_seqs);
    for (int32_t s = 0; s < n_seqs; s++) {
        int32_t ids[128], labels[128];
        for (int32_t t = 0; t < lengths[s]; t++) {
            ids[t] = (int32_t)draw(&seed, (uint32_t)vocab);
            labels[t] = draw(&seed, 4) ? ids[t] : -100; /* runs with holes */
        }
        batch_add(batch, ids, labels, lengths[s]);
    }
    return batch;
}

static void shift_parameters(const struct adapter *adapter, const float *direction, float scale)
{
    int64_t at = 0;
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        const struct param_slice *slice = &adapter->parameters[i].slice;
        float *values = read_device(adapter->model, slice->param, slice->count);
        for (int64_t k = 0; k < slice->count; k++)
            values[k] += scale * direction[at + k];
        write_device(adapter->model, slice->param, values, slice->count);
        free(values);
        at += slice->count;
    }
}

/* The slope of the loss along the gradient is the gradient's square; every tensor is checked by itself too. */
static void check_slopes(struct model *model, struct adapter *adapter, float dropout_seed)
{
    static const int32_t lengths[] = {20, 1, 70, 5};
    struct batch *batch = random_batch((int32_t)model_config(model)->vocab_size, lengths, 4, 3);
    struct pass *pass = new_pass(model, adapter, 256, 4);
    struct pass_options options = {.backward = true, .grad_scale = 1, .dropout_seed = (uint64_t)dropout_seed};
    int64_t total, at = 0;
    zero_gradients(adapter);
    run(pass, batch, &options);
    float *gradients = all_gradients(adapter, &total);
    float *direction = calloc((size_t)total, sizeof *direction);
    assert_non_null(direction);
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        int64_t count = adapter->parameters[i].slice.count;
        double square = 0;
        for (int64_t k = 0; k < count; k++)
            square += (double)gradients[at + k] * (double)gradients[at + k];
        if (square > 1e-6) {
            float step = (float)(0.02 / sqrt(square));
            memcpy(direction + at, gradients + at, (size_t)count * sizeof *direction);
            shift_parameters(adapter, direction, step);
            double above = run(pass, batch, &options).loss_sum;
            shift_parameters(adapter, direction, -2 * step);
            double below = run(pass, batch, &options).loss_sum;
            shift_parameters(adapter, direction, step);
            double slope = (above - below) / (2 * (double)step);
            if (!(fabs(slope - square) < 0.01 * square + 0.002 * sqrt(square)))
                fail_msg("%s: slope %g where the gradient says %g", adapter->parameters[i].name, slope,
                         square);
            memset(direction + at, 0, (size_t)count * sizeof *direction);
        }
        at += count;
    }
    free(direction);
    free(gradients);
    pass_free(pass);
    drop_batch(batch);
}

static void test_full_slopes(void **state)
{
    const char *const configs[] = {biased_config, plain_config};
    for (size_t i = 0; i < 2; i++) {
        char *folder = make_random_model(configs[i], 21, TYPE_F32);
        struct model *model = open_model(*state, folder);
        struct adapter *adapter = new_adapter(model, ADAPT_FULL, NULL);
        check_slopes(model, adapter, 0);
        adapter_free(adapter);
        model_close(model);
        remove_folder(folder);
    }
}

/* The mask of a dropout is part of the function, so slopes hold under it as well. */
static void test_lora_slopes(void **state)
{
    const struct lora_config lora = {
        .targets = TARGETS_ALL, .rank = 3, .alpha = 3, .dropout = 0.3f, .rslora = true};
    char *folder = make_random_model(biased_config, 22, TYPE_BF16);
    struct model *model = open_model(*state, folder);
    struct adapter *adapter = random_adapter(model, &lora, 4);
    check_slopes(model, adapter, 77);
    adapter_free(adapter);
    model_close(model);
    remove_folder(folder);
}

/* Each subset of targets stops its backward somewhere else, and must find the gradients that all of them find. */
static void test_lora_subsets(void **state)
{
    static const int32_t lengths[] = {9, 66};
    const struct lora_config all = {.targets = TARGETS_ALL, .rank = 2, .alpha = 4};
    char *folder = make_random_model(plain_config, 23, TYPE_F32);
    struct model *model = open_model(*state, folder);
    struct batch *batch = random_batch(29, lengths, 2, 9);
    struct pass_options options = {.backward = true, .grad_scale = 0.5f};
    for (int targets = 1; targets <= TARGETS_ALL; targets++) {
        /* Reference: all targets, those outside the subset with a zero B (a zero A and B for the embeddings). */
        struct lora_config lora = all;
        lora.targets = targets;
        struct adapter *whole = random_adapter(model, &all, 6), *part = new_adapter(model, ADAPT_LORA, &lora);
        for (int64_t i = 0; i < whole->n_parameters; i++) {
            struct parameter *parameter = &whole->parameters[i], *same = adapter_find(part, parameter->name);
            float *values = read_device(model, parameter->slice.param, parameter->slice.count);
            if (same)
                write_device(model, same->slice.param, values, same->slice.count);
            else
                memset(values, 0, (size_t)parameter->slice.count * sizeof *values);
            write_device(model, parameter->slice.param, values, parameter->slice.count);
            free(values);
        }
        struct pass *one = new_pass(model, whole, 80, 2), *two = new_pass(model, part, 80, 2);
        double loss = run(one, batch, &options).loss_sum;
        assert_true(fabs(run(two, batch, &options).loss_sum - loss) < 1e-5 * loss);
        for (int64_t i = 0; i < part->n_parameters; i++) {
            struct parameter *parameter = &part->parameters[i], *same = adapter_find(whole, parameter->name);
            float *found = read_device(model, parameter->slice.grad, parameter->slice.count);
            float *expected = read_device(model, same->slice.grad, same->slice.count);
            double error = relative_error(found, expected, same->slice.count);
            if (!(error < 1e-5))
                fail_msg("targets %x: %s: relative error %g", (unsigned)targets, parameter->name, error);
            free(found);
            free(expected);
        }
        pass_free(one);
        pass_free(two);
        adapter_free(whole);
        adapter_free(part);
    }
    drop_batch(batch);
    model_close(model);
    remove_folder(folder);
}

/* ---- properties of the pass ---- */

/* The first backward of a step needs no zeros where an update leaves gradients as they are; those after it add up. A pass
 * without a target in between changes nothing. */
static void test_first_of_step(void **state)
{
    static const int32_t lengths[] = {17, 30};
    struct model *model = open_model(*state, "models/hatchling");
    struct adapter *adapter = new_adapter(model, ADAPT_FULL, NULL);
    struct batch *batch = random_batch((int32_t)model_config(model)->vocab_size, lengths, 2, 5);
    struct pass *pass = new_pass(model, adapter, 64, 2);
    struct pass_options options = {.backward = true, .first = true, .grad_scale = 1};
    int64_t count, n_kept = 0;
    run(pass, batch, &options);
    float *once = all_gradients(adapter, &count), *again, *twice;
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        const struct param_slice *slice = &adapter->parameters[i].slice;
        n_kept += slice->keep_grad;
        if (!slice->keep_grad)
            assert_int_equal(model_ops(model)->zero(model_device(model), slice->grad,
                                                    (size_t)slice->count * sizeof(float)),
                             0);
    }
    assert_int_equal(n_kept, 4 * model_config(model)->n_layers);
    int32_t *targets = malloc((size_t)batch->n_tokens * sizeof *targets);
    assert_non_null(targets);
    memcpy(targets, batch->targets, (size_t)batch->n_tokens * sizeof *targets);
    for (int64_t t = 0; t < batch->n_tokens; t++)
        batch->targets[t] = -100;
    run(pass, batch, &options);
    memcpy(batch->targets, targets, (size_t)batch->n_tokens * sizeof *targets);
    options.first = false;
    run(pass, batch, &options);
    again = all_gradients(adapter, &count);
    assert_true(relative_error(again, once, count) < 1e-6);
    run(pass, batch, &options);
    twice = all_gradients(adapter, &count);
    for (int64_t i = 0; i < count; i++)
        once[i] *= 2;
    assert_true(relative_error(twice, once, count) < 1e-6);
    free(once);
    free(again);
    free(twice);
    free(targets);
    pass_free(pass);
    adapter_free(adapter);
    drop_batch(batch);
    model_close(model);
}

/* A packed batch is its documents: the same losses, the sum of their gradients. */
static void check_packing(struct model *model, struct adapter *adapter, double tolerance)
{
    static const int32_t lengths[] = {1, 5, 70, 64, 33};
    struct batch *packed = random_batch((int32_t)model_config(model)->vocab_size, lengths, 5, 5);
    struct pass *pass = new_pass(model, adapter, 256, 5);
    struct pass_options options = {.backward = true, .grad_scale = 0.25f};
    int64_t count;
    zero_gradients(adapter);
    struct pass_result together = run(pass, packed, &options);
    float *expected = all_gradients(adapter, &count);
    zero_gradients(adapter);
    struct pass_result apart = {0};
    for (int32_t s = 0; s < 5; s++) {
        int32_t starts[] = {0, lengths[s]};
        struct batch one = {.n_tokens = lengths[s],
                            .n_seqs = 1,
                            .ids = packed->ids + packed->seq_starts[s],
                            .targets = packed->targets + packed->seq_starts[s],
                            .seq_starts = starts};
        struct pass_result result = run(pass, &one, &options);
        apart.loss_sum += result.loss_sum;
        apart.n_targets += result.n_targets;
        apart.n_correct += result.n_correct;
    }
    float *found = all_gradients(adapter, &count);
    assert_true(fabs(together.loss_sum - apart.loss_sum) < tolerance * apart.loss_sum);
    assert_int_equal(together.n_targets, apart.n_targets);
    assert_int_equal(together.n_correct, apart.n_correct);
    assert_true(relative_error(found, expected, count) < tolerance);
    /* Evaluating says the same loss and leaves the gradients alone. */
    options.backward = false;
    assert_true(fabs(run(pass, packed, &options).loss_sum - together.loss_sum) < 1e-6 * together.loss_sum);
    float *after = all_gradients(adapter, &count);
    assert_memory_equal(after, found, (size_t)count * sizeof *found);
    free(after);
    free(expected);
    free(found);
    pass_free(pass);
    drop_batch(packed);
}

static void test_packing(void **state)
{
    const struct lora_config lora = {.targets = TARGETS_ALL, .rank = 2, .alpha = 4};
    struct model *model = open_model(*state, "tests/vectors/tiny_mamba");
    struct adapter *full = new_adapter(model, ADAPT_FULL, NULL), *adapter = random_adapter(model, &lora, 3);
    check_packing(model, full, 1e-5);
    check_packing(model, adapter, 1e-5);
    adapter_free(full);
    adapter_free(adapter);
    model_close(model);
}

static void test_dropout(void **state)
{
    static const int32_t lengths[] = {30, 12};
    const struct lora_config lora = {.targets = TARGETS_DEFAULT, .rank = 2, .alpha = 4, .dropout = 0.5f};
    struct model *model = open_model(*state, "tests/vectors/tiny_mamba");
    struct adapter *adapter = random_adapter(model, &lora, 3);
    struct batch *batch = random_batch(64, lengths, 2, 1);
    struct pass *pass = new_pass(model, adapter, 64, 2);
    struct pass_options options = {.backward = true, .grad_scale = 1, .dropout_seed = 1};
    double first = run(pass, batch, &options).loss_sum;
    assert_true(run(pass, batch, &options).loss_sum == first);
    options.dropout_seed = 2;
    assert_true(run(pass, batch, &options).loss_sum != first);
    options.backward = false;
    double evaluated = run(pass, batch, &options).loss_sum;
    options.dropout_seed = 3;
    assert_true(run(pass, batch, &options).loss_sum == evaluated);
    pass_free(pass);
    drop_batch(batch);
    adapter_free(adapter);
    model_close(model);
}

static void count_yield(void *arg)
{
    ++*(int *)arg;
}

static void test_yield_and_empty(void **state)
{
    static const int32_t lengths[] = {8};
    const struct lora_config lora = {.targets = TARGETS_DEFAULT, .rank = 2, .alpha = 4};
    struct model *model = open_model(*state, "tests/vectors/tiny_mamba");
    struct adapter *adapter = random_adapter(model, &lora, 3);
    struct batch *batch = random_batch(64, lengths, 1, 1);
    struct pass *pass = new_pass(model, adapter, 64, 2);
    int yields = 0;
    struct pass_options options = {
        .backward = true, .grad_scale = 1, .yield = count_yield, .yield_arg = &yields};
    run(pass, batch, &options);
    assert_int_equal(yields, 4); /* two layers, there and back */
    /* No target at all: no loss, no gradient, no failure. */
    for (int32_t t = 0; t < 8; t++)
        batch->targets[t] = -100;
    zero_gradients(adapter);
    struct pass_result result = run(pass, batch, &options);
    assert_true(result.loss_sum == 0 && result.n_targets == 0);
    int64_t count;
    float *gradients = all_gradients(adapter, &count);
    for (int64_t i = 0; i < count; i++)
        assert_true(gradients[i] == 0);
    free(gradients);
    pass_free(pass);
    drop_batch(batch);
    adapter_free(adapter);
    model_close(model);
}

static void test_failures(void **state)
{
    static const int32_t lengths[] = {8};
    struct error error = {0};
    struct model *model = open_model(*state, "tests/vectors/tiny_mamba");
    struct adapter *adapter = new_adapter(model, ADAPT_FULL, NULL);
    struct batch *batch = random_batch(64, lengths, 1, 1);
    struct pass *pass = new_pass(model, adapter, 8, 1);
    struct pass_options options = {.backward = true, .grad_scale = 1};
    struct pass_result result;
    batch->ids[3] = 64;
    check_error(pass_run(pass, batch, &options, &error), ERROR_INVALID, &error, "row 3");
    batch->ids[3] = 1;
    batch->n_tokens = 9;
    check_error(pass_run(pass, batch, &options, &error), ERROR_INVALID, &error, "9 tokens");
    batch->n_tokens = 8;
    float nan_value = NAN;
    write_device(model, adapter->parameters[2].slice.param, &nan_value, 1);
    result = run(pass, batch, &options); /* not finite: the caller's to judge */
    assert_false(isfinite(result.loss_sum));
    pass_free(pass);
    drop_batch(batch);
    adapter_free(adapter);
    model_close(model);
}

/* ---- recomputation ---- */

static struct pass *pass_at_level(struct model *model, struct adapter *adapter, int64_t level)
{
    struct error error = {0};
    struct pass *pass = NULL;
    const struct plan_request request = {.max_tokens = 200, .max_seqs = 4, .recompute = level};
    check_ok(pass_create(model, adapter, &request, &pass, &error), &error);
    return pass;
}

/* Losses and gradients of two micro-batches are the same bits at every level. */
static void check_levels(struct model *model, struct adapter *adapter)
{
    static const int32_t lengths[2][3] = {{70, 1, 65}, {64, 128, 3}};
    const struct pass_options options = {.backward = true, .grad_scale = 1, .dropout_seed = 5};
    struct batch *batches[2];
    struct pass_result expected[2];
    float *gradients = NULL;
    int64_t count, levels = model_recompute_levels(model);
    assert_true(levels > 0);
    for (int i = 0; i < 2; i++)
        batches[i] = random_batch(model_config(model)->vocab_size, lengths[i], 3, (uint64_t)i);
    for (int64_t level = 0; level <= levels; level++) {
        struct pass *pass = pass_at_level(model, adapter, level);
        zero_gradients(adapter);
        for (int i = 0; i < 2; i++) {
            struct pass_result result = run(pass, batches[i], &options);
            if (!level)
                expected[i] = result;
            assert_memory_equal(&result, &expected[i], sizeof result);
        }
        float *values = all_gradients(adapter, &count);
        if (!level)
            gradients = values;
        assert_memory_equal(values, gradients, (size_t)count * sizeof *values);
        if (level)
            free(values);
        pass_free(pass);
    }
    free(gradients);
    drop_batch(batches[0]);
    drop_batch(batches[1]);
}

static void test_recompute(void **state)
{
    struct backend *backend = *state;
    struct error error = {0};
    const struct lora_config all = {.targets = TARGETS_ALL, .rank = 3, .alpha = 6, .dropout = 0.1f};
    const struct lora_config one = {.targets = TARGET_X_PROJ, .rank = 2, .alpha = 2};
    char *folder = make_random_model("{\"model_type\":\"mamba\",\"vocab_size\":37,\"hidden_size\":12,"
                                     "\"num_hidden_layers\":4,\"state_size\":3,\"use_bias\":true}",
                                     8, TYPE_F32);
    struct model *model = NULL;
    check_ok(model_open(folder, backend->ops, backend->device, &model, &error), &error);
    struct adapter *adapters[] = {random_adapter(model, &all, 4), random_adapter(model, &one, 4),
                                  new_adapter(model, ADAPT_FULL, NULL)};
    for (size_t i = 0; i < sizeof adapters / sizeof *adapters; i++) {
        check_levels(model, adapters[i]);
        adapter_free(adapters[i]);
    }
    model_close(model);
    remove_folder(folder);
}

/* A limit takes as much recomputation as it needs and no more; a limit out of reach takes all there is. */
static void test_limit(void **state)
{
    struct error error = {0};
    struct model *model = open_model(*state, "models/hatchling");
    struct plan_request request = {ADAPT_LORA, {.targets = TARGETS_ALL, .rank = 8, .alpha = 8}, 512, 8};
    struct memory_plan plan, limited;
    int64_t levels = model_recompute_levels(model), last = INT64_MAX;
    for (int64_t level = 0; level <= levels; level++) {
        request.recompute = level;
        check_ok(model_plan(model, &request, &plan, &error), &error);
        assert_int_equal(plan.recompute, level);
        assert_true(plan.total_bytes < last);
        last = plan.total_bytes;
        struct plan_request with_limit = request;
        with_limit.recompute = 0;
        with_limit.byte_limit = plan.total_bytes;
        check_ok(model_plan(model, &with_limit, &limited, &error), &error);
        assert_memory_equal(&limited, &plan, sizeof plan);
        with_limit.byte_limit--;
        check_ok(model_plan(model, &with_limit, &limited, &error), &error);
        assert_int_equal(limited.recompute, level < levels ? level + 1 : levels);
    }
    request.recompute = levels + 1;
    check_ok(model_plan(model, &request, &plan, &error), &error);
    assert_int_equal(plan.recompute, levels);
    request.recompute = -1;
    check_error(model_plan(model, &request, &plan, &error), ERROR_INVALID, &error, "recompute");
    model_close(model);
}

/* ---- the plan ---- */

static const struct kernel_ops *counted_ops;
static int64_t counted_bytes, counted_allocations;

static int counting_alloc(struct kernel_device *device, size_t bytes, void **ret_pointer)
{
    counted_bytes += (int64_t)bytes;
    counted_allocations++;
    return counted_ops->memory_alloc(device, bytes, ret_pointer);
}

static void test_plan(void **state)
{
    struct backend *backend = *state;
    struct error error = {0};
    struct kernel_ops counting = *backend->ops;
    counted_ops = backend->ops;
    counting.memory_alloc = counting_alloc;
    const struct plan_request requests[] = {
        {ADAPT_FULL, {0}, 100, 3},
        {ADAPT_LORA, {.targets = TARGETS_DEFAULT, .rank = 4, .alpha = 8}, 100, 3},
        {ADAPT_LORA, {.targets = TARGETS_ALL, .rank = 7, .alpha = 8}, 1, 9},
        {ADAPT_LORA, {.targets = TARGET_EMBEDDINGS, .rank = 1, .alpha = 8}, 4096, 64},
        {ADAPT_LORA, {.targets = TARGET_OUT_PROJ, .rank = 1, .alpha = 8}, 63, 63},
    };
    const char *const configs[] = {biased_config, plain_config};
    for (size_t c = 0; c < 2; c++) {
        char *folder = make_random_model(configs[c], 30, TYPE_BF16);
        struct model *model = NULL;
        check_ok(model_open(folder, &counting, backend->device, &model, &error), &error);
        for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) {
            struct memory_plan plan;
            struct adapter *adapter;
            counted_bytes = counted_allocations = 0;
            check_ok(model_plan(model, &requests[i], &plan, &error), &error);
            assert_int_equal(counted_allocations, 0);
            check_ok(adapter_create(model, requests[i].adaptation, &requests[i].lora, 1, &adapter, &error),
                     &error);
            struct pass *pass = new_pass(model, adapter, requests[i].max_tokens, requests[i].max_seqs);
            assert_int_equal(counted_allocations, 2);
            assert_int_equal(counted_bytes, plan.total_bytes);
            assert_int_equal(plan.total_bytes, plan.weight_bytes + plan.parameter_bytes +
                                                   plan.gradient_bytes + plan.optimizer_bytes +
                                                   plan.activation_bytes + plan.workspace_bytes);
            /* Nothing is allocated inside a step, whatever the batch's shape. */
            struct batch *batch = new_batch(requests[i].max_tokens, requests[i].max_seqs);
            int32_t ids[100] = {1, 2, 3, 4};
            int32_t length = (int32_t)(requests[i].max_tokens / requests[i].max_seqs);
            for (int32_t s = 0; length && s < requests[i].max_seqs; s++)
                batch_add(batch, ids, NULL, length > 100 ? 100 : length);
            if (!length)
                batch_add(batch, ids, NULL, 1);
            struct pass_options options = {.backward = true, .grad_scale = 1};
            run(pass, batch, &options);
            assert_int_equal(counted_allocations, 2);
            drop_batch(batch);
            pass_free(pass);
            adapter_free(adapter);
        }
        struct plan_request bad = requests[1];
        struct memory_plan plan;
        bad.lora.rank = 0;
        check_error(model_plan(model, &bad, &plan, &error), ERROR_INVALID, &error, "rank");
        bad.lora.rank = 4;
        bad.lora.targets = 0;
        check_error(model_plan(model, &bad, &plan, &error), ERROR_INVALID, &error, "target");
        model_close(model);
        remove_folder(folder);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_vectors),
        cmocka_unit_test(test_lora_vectors),
        cmocka_unit_test(test_full_slopes),
        cmocka_unit_test(test_lora_slopes),
        cmocka_unit_test(test_lora_subsets),
        cmocka_unit_test(test_first_of_step),
        cmocka_unit_test(test_packing),
        cmocka_unit_test(test_dropout),
        cmocka_unit_test(test_yield_and_empty),
        cmocka_unit_test(test_failures),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_recompute),
        cmocka_unit_test(test_limit),
    };
    return run_on_both(tests);
}
