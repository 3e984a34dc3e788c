/* test_adapter.c: adapters as PEFT lays them out: what is created, saved and loaded again, and what is refused. */
#include "tests/engine/models/support.h"

#include "base/file.h"
#include "engine/models/internal.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const int32_t ids[] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5};
enum { N_IDS = sizeof ids / sizeof *ids };

static struct model *tiny(void **state)
{
    return open_model(*state, "tests/vectors/tiny_mamba");
}

static void test_names(void **state)
{
    (void)state;
    assert_int_equal(lora_target_from_name("in_proj"), TARGET_IN_PROJ);
    assert_int_equal(lora_target_from_name("embeddings"), TARGET_EMBEDDINGS);
    assert_int_equal(lora_target_from_name("conv1d"), 0);
    for (int bit = 1; bit <= TARGET_EMBEDDINGS; bit <<= 1)
        assert_int_equal(lora_target_from_name(lora_target_name((enum lora_target)bit)), bit);
}

/* Order, names and shapes, and that a new adapter changes nothing. */
static void test_create(void **state)
{
    struct error error = {0};
    struct model *model = tiny(state);
    const struct lora_config lora = {.targets = TARGETS_ALL, .rank = 4, .alpha = 8, .rslora = true};
    struct adapter *adapter = NULL, *again = NULL, *other = NULL;
    check_ok(adapter_create(model, ADAPT_LORA, &lora, 1, &adapter, &error), &error);
    check_ok(adapter_create(model, ADAPT_LORA, &lora, 1, &again, &error), &error);
    check_ok(adapter_create(model, ADAPT_LORA, &lora, 2, &other, &error), &error);
    assert_true(adapter->scale == 4.0f);
    assert_int_equal(adapter->n_parameters, 2 * (1 + 2 * 4));
    static const struct {
        int64_t index;
        const char *name;
        int64_t rows, columns;
    } expected[] = {
        {0, "base_model.model.backbone.embeddings.lora_embedding_A", 4, 64},
        {1, "base_model.model.backbone.embeddings.lora_embedding_B", 32, 4},
        {2, "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight", 4, 32},
        {3, "base_model.model.backbone.layers.0.mixer.in_proj.lora_B.weight", 128, 4},
        {4, "base_model.model.backbone.layers.0.mixer.x_proj.lora_A.weight", 4, 64},
        {7, "base_model.model.backbone.layers.0.mixer.dt_proj.lora_B.weight", 64, 4},
        {16, "base_model.model.backbone.layers.1.mixer.out_proj.lora_A.weight", 4, 64},
        {17, "base_model.model.backbone.layers.1.mixer.out_proj.lora_B.weight", 32, 4},
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        const struct parameter *parameter = &adapter->parameters[expected[i].index];
        assert_string_equal(parameter->name, expected[i].name);
        assert_int_equal(parameter->n_dims, 2);
        assert_int_equal(parameter->shape[0], expected[i].rows);
        assert_int_equal(parameter->shape[1], expected[i].columns);
        assert_ptr_equal(adapter_find(adapter, expected[i].name), parameter);
    }
    assert_null(adapter_find(adapter, "nothing"));
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        const struct param_slice *slice = &adapter->parameters[i].slice;
        float *values = read_device(model, slice->param, slice->count);
        float *same = read_device(model, again->parameters[i].slice.param, slice->count);
        float *different = read_device(model, other->parameters[i].slice.param, slice->count);
        bool drawn = i == 1 || (i >= 2 && i % 2 == 0);
        double bound = i == 1 ? 6 : 1 / sqrt((double)adapter->parameters[i].shape[1]), square = 0;
        assert_memory_equal(values, same, (size_t)slice->count * sizeof *values);
        assert_true((memcmp(values, different, (size_t)slice->count * sizeof *values) != 0) == drawn);
        for (int64_t k = 0; k < slice->count; k++) {
            assert_true(drawn ? fabs((double)values[k]) <= bound : values[k] == 0);
            square += (double)values[k] * (double)values[k];
        }
        double variance = i == 1 ? 1 : bound * bound / 3;
        if (drawn && slice->count >= 128) /* U(-b,b) and N(0,1) have these second moments */
            assert_true(fabs(square / (double)slice->count / variance - 1) < 0.35);
        free(values);
        free(same);
        free(different);
    }
    float *base = all_logits(model, NULL, ids, N_IDS), *adapted = all_logits(model, adapter, ids, N_IDS);
    assert_true(largest_difference(base, adapted, N_IDS * 64) < 1e-6);
    free(base);
    free(adapted);
    adapter_free(adapter);
    adapter_free(again);
    adapter_free(other);
    adapter_free(NULL);
    model_close(model);
}

static void test_refused_settings(void **state)
{
    static const struct {
        struct lora_config lora;
        const char *message;
    } cases[] = {
        {{.targets = TARGETS_DEFAULT, .rank = 0, .alpha = 1}, "rank"},
        {{.targets = TARGETS_DEFAULT, .rank = LORA_MAX_RANK + 1, .alpha = 1}, "rank"},
        {{.targets = TARGETS_DEFAULT, .rank = 1, .alpha = 0}, "alpha"},
        {{.targets = TARGETS_DEFAULT, .rank = 1, .alpha = NAN}, "alpha"},
        {{.targets = TARGETS_DEFAULT, .rank = 1, .alpha = 1, .dropout = 1}, "dropout"},
        {{.targets = 0, .rank = 1, .alpha = 1}, "target"},
        {{.targets = 1 << 9, .rank = 1, .alpha = 1}, "target"},
    };
    struct model *model = tiny(state);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error error = {0};
        struct adapter *adapter = NULL;
        check_error(adapter_create(model, ADAPT_LORA, &cases[i].lora, 0, &adapter, &error), ERROR_INVALID,
                    &error, cases[i].message);
        assert_null(adapter);
    }
    model_close(model);
}

static void test_save_and_load(void **state)
{
    struct error error = {0};
    struct model *model = tiny(state);
    const struct lora_config lora = {
        .targets = TARGETS_SLL, .rank = 3, .alpha = 6.5f, .dropout = 0.1f, .rslora = true};
    struct adapter *adapter = random_adapter(model, &lora, 3), *loaded = NULL;
    char *folder = make_folder(), path[PATH_MAX];
    check_ok(adapter_save(adapter, folder, "tiny \"mamba\"", &error), &error);
    for (int trainable = 0; trainable < 2; trainable++) {
        check_ok(adapter_load(model, folder, trainable, &loaded, &error), &error);
        assert_memory_equal(&loaded->lora, &adapter->lora, offsetof(struct lora_config, rslora));
        assert_true(loaded->lora.rslora && loaded->scale == adapter->scale &&
                    loaded->trainable == !!trainable);
        assert_true(!loaded->parameters[0].slice.grad == !trainable);
        float *expected = all_logits(model, adapter, ids, N_IDS),
              *found = all_logits(model, loaded, ids, N_IDS);
        assert_memory_equal(found, expected, N_IDS * 64 * sizeof *found);
        free(expected);
        free(found);
        adapter_free(loaded);
    }
    /* The layout that PEFT reads. */
    snprintf(path, sizeof path, "%s/adapter_config.json", folder);
    json_t *config = json_load_file(path, 0, NULL);
    assert_non_null(config);
    json_t *expected =
        json_pack("{s:s, s:s, s:s, s:i, s:f, s:f, s:[s,s,s,s], s:s, s:b, s:b, s:b, s:{}, s:{}, s:n}",
                  "peft_type", "LORA", "task_type", "CAUSAL_LM", "base_model_name_or_path", "tiny \"mamba\"",
                  "r", 3, "lora_alpha", 6.5, "lora_dropout", 0.1, "target_modules", "in_proj", "x_proj",
                  "out_proj", "embeddings", "bias", "none", "fan_in_fan_out", 0, "inference_mode", 1,
                  "use_rslora", 1, "rank_pattern", "alpha_pattern", "modules_to_save");
    assert_true(json_equal(config, expected));
    json_decref(config);
    json_decref(expected);
    struct safetensors *file = NULL;
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    check_ok(safetensors_open(path, &file, &error), &error);
    assert_int_equal(safetensors_count(file), adapter->n_parameters);
    const struct tensor_view *view =
        safetensors_find(file, "base_model.model.backbone.layers.1.mixer.x_proj.lora_B.weight");
    assert_true(view && view->type == TYPE_F32 && view->shape[0] == 34 && view->shape[1] == 3);
    safetensors_close(file);
    adapter_free(adapter);
    model_close(model);
    remove_folder(folder);
}

/* ---- files that are refused ---- */

static void edit_config(const char *folder, const char *key, json_t *value)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/adapter_config.json", folder);
    json_t *config = json_load_file(path, 0, NULL);
    assert_non_null(config);
    if (value)
        assert_int_equal(json_object_set_new(config, key, value), 0);
    else
        json_object_del(config, key);
    assert_int_equal(json_dump_file(config, path, 0), 0);
    json_decref(config);
}

static void test_refused_configs(void **state)
{
    static const struct {
        const char *key, *value;
        int code;
    } cases[] = {
        {"peft_type", "\"IA3\"", ERROR_UNSUPPORTED},
        {"peft_type", NULL, ERROR_INVALID},
        {"r", "0", ERROR_INVALID},
        {"r", NULL, ERROR_INVALID},
        {"lora_alpha", "\"many\"", ERROR_INVALID},
        {"lora_dropout", "2", ERROR_INVALID},
        {"target_modules", "[\"in_proj\",\"q_proj\"]", ERROR_INVALID},
        {"target_modules", "[]", ERROR_UNSUPPORTED},
        {"target_modules", "\".*proj\"", ERROR_UNSUPPORTED},
        {"bias", "\"all\"", ERROR_UNSUPPORTED},
        {"use_dora", "true", ERROR_UNSUPPORTED},
        {"fan_in_fan_out", "true", ERROR_UNSUPPORTED},
        {"rank_pattern", "{\"in_proj\":4}", ERROR_UNSUPPORTED},
        {"alpha_pattern", "{\"in_proj\":4}", ERROR_UNSUPPORTED},
        {"modules_to_save", "[\"lm_head\"]", ERROR_UNSUPPORTED},
        {"layers_to_transform", "[0]", ERROR_UNSUPPORTED},
        {"layer_replication", "[[0,1],[0,1]]", ERROR_UNSUPPORTED},
        {"init_lora_weights", "\"pissa\"", ERROR_UNSUPPORTED},
    };
    struct model *model = tiny(state);
    const struct lora_config lora = {.targets = TARGETS_DEFAULT, .rank = 2, .alpha = 2};
    struct adapter *adapter = random_adapter(model, &lora, 3), *loaded = NULL;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error error = {0};
        char *folder = make_folder();
        check_ok(adapter_save(adapter, folder, "base", &error), &error);
        edit_config(folder, cases[i].key,
                    cases[i].value ? json_loads(cases[i].value, JSON_DECODE_ANY, NULL) : NULL);
        check_error(adapter_load(model, folder, false, &loaded, &error), cases[i].code, &error, "");
        assert_string_equal(error.param, cases[i].key);
        remove_folder(folder);
    }
    assert_null(loaded);
    adapter_free(adapter);
    model_close(model);
}

static void test_refused_tensors(void **state)
{
    struct error error = {0};
    struct model *model = tiny(state);
    const struct lora_config lora = {.targets = TARGETS_DEFAULT, .rank = 2, .alpha = 2};
    struct adapter *adapter = random_adapter(model, &lora, 3), *loaded = NULL;
    char *folder = make_folder(), path[PATH_MAX];
    check_ok(adapter_save(adapter, folder, "base", &error), &error);
    /* Fewer targets than tensors, more targets than tensors, another rank. */
    edit_config(folder, "target_modules", json_pack("[s]", "in_proj"));
    check_error(adapter_load(model, folder, false, &loaded, &error), ERROR_INVALID, &error,
                "x_proj.lora_A.weight");
    edit_config(folder, "target_modules", json_pack("[s,s,s]", "in_proj", "x_proj", "dt_proj"));
    check_error(adapter_load(model, folder, false, &loaded, &error), ERROR_CORRUPT, &error, "dt_proj");
    edit_config(folder, "target_modules", json_pack("[s,s]", "in_proj", "x_proj"));
    edit_config(folder, "r", json_integer(3));
    check_error(adapter_load(model, folder, false, &loaded, &error), ERROR_CORRUPT, &error, "[2, 32]");
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    assert_int_equal(unlink(path), 0);
    check_error(adapter_load(model, folder, false, &loaded, &error), ERROR_NOT_FOUND, &error, path);
    /* An adapter of a wider model. */
    struct model *hatchling = open_model(*state, "models/hatchling");
    check_ok(adapter_save(adapter, folder, "base", &error), &error);
    check_error(adapter_load(hatchling, folder, false, &loaded, &error), ERROR_CORRUPT, &error,
                "lora_A.weight");
    model_close(hatchling);
    assert_null(loaded);
    adapter_free(adapter);
    model_close(model);
    remove_folder(folder);
}

/* ---- full ---- */

static const char mixed_config[] = "{\"model_type\":\"mamba\",\"vocab_size\":64,\"hidden_size\":8,"
                                   "\"num_hidden_layers\":2,\"state_size\":4,\"time_step_rank\":2}";

/* A full fine-tune is saved in the base's own types as a model of its own. */
static void test_full(void **state)
{
    struct error error = {0};
    char *base_folder = make_random_model(mixed_config, 5, TYPE_BF16), *folder = make_folder(),
         path[PATH_MAX];
    write_text(base_folder, "tokenizer.json", "{\"a\":1}");
    struct model *model = open_model(*state, base_folder);
    struct adapter *adapter = NULL, *loaded = NULL;
    check_ok(adapter_create(model, ADAPT_FULL, NULL, 0, &adapter, &error), &error);
    assert_int_equal(adapter->n_parameters, model_weight_count(model));
    float *base = all_logits(model, NULL, ids, N_IDS), *copy = all_logits(model, adapter, ids, N_IDS);
    assert_true(largest_difference(base, copy, N_IDS * 64) < 1e-5);
    /* Halving and doubling are exact in bf16, so the saved model must be equal to the last bit. A_log counts:
     * what is derived from it must follow. */
    for (int64_t i = 0; i < adapter->n_parameters; i++) {
        struct param_slice *slice = &adapter->parameters[i].slice;
        float *values = read_device(model, slice->param, slice->count);
        for (int64_t k = 0; k < slice->count; k++)
            values[k] *= i % 3 ? 0.5f : 2.0f;
        write_device(model, slice->param, values, slice->count);
        free(values);
    }
    float *changed = all_logits(model, adapter, ids, N_IDS);
    assert_true(largest_difference(base, changed, N_IDS * 64) > 1e-2);
    check_ok(adapter_save(adapter, folder, "base", &error), &error);
    check_ok(adapter_load(model, folder, false, &loaded, &error), &error);
    assert_true(loaded->adaptation == ADAPT_FULL && !loaded->trainable);
    float *found = all_logits(model, loaded, ids, N_IDS);
    assert_memory_equal(found, changed, N_IDS * 64 * sizeof *found);
    struct model *own = open_model(*state, folder);
    float *alone = all_logits(own, NULL, ids, N_IDS);
    assert_true(largest_difference(alone, changed, N_IDS * 64) < 1e-4);
    for (int64_t i = 0; i < model_weight_count(model); i++)
        assert_int_equal(model_weight(own, i)->file_type, model_weight(model, i)->file_type);
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    assert_int_equal(access(path, F_OK), 0);
    free(base);
    free(copy);
    free(changed);
    free(found);
    free(alone);
    model_close(own);
    adapter_free(loaded);
    adapter_free(adapter);
    model_close(model);
    remove_folder(folder);
    remove_folder(base_folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_create),
        cmocka_unit_test(test_refused_settings),
        cmocka_unit_test(test_save_and_load),
        cmocka_unit_test(test_refused_configs),
        cmocka_unit_test(test_refused_tensors),
        cmocka_unit_test(test_full),
    };
    return run_on_both(tests);
}
