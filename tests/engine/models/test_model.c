/* test_model.c: opening models: the configs of real checkpoints, older names, and files that do not fit. */
#include "tests/engine/models/support.h"

#include "engine/models/family.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

static struct model_config parse(const char *text)
{
    struct error error = {0};
    struct model_config config = {0};
    json_t *json = json_loads(text, 0, NULL);
    assert_non_null(json);
    check_ok(family_mamba.parse_config(json, &config, &error), &error);
    json_decref(json);
    return config;
}

static int64_t parameters(const struct model_config *config)
{
    struct tensor_spec spec;
    int64_t total = 0;
    for (int64_t i = 0; family_mamba.tensor(config, i, &spec); i++) {
        int64_t count = 1;
        for (int d = 0; d < spec.n_dims; d++)
            count *= spec.shape[d];
        total += count;
    }
    return total;
}

/* The published sizes, as their config.json has them: parameters as published with a tied head. */
static void test_real_configs(void **state)
{
    (void)state;
    static const struct {
        int64_t hidden, layers, parameters, rank;
    } sizes[] = {{768, 24, 129135360, 48},
                 {1024, 48, 371516416, 64},
                 {1536, 48, 793204224, 96},
                 {2048, 48, 1372178432, 128},
                 {2560, 64, 2768345600, 160}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char text[1024];
        snprintf(
            text, sizeof text,
            "{\"architectures\":[\"MambaForCausalLM\"],\"bos_token_id\":0,\"conv_kernel\":4,\"d_inner\":%lld,"
            "\"d_model\":%lld,\"eos_token_id\":0,\"expand\":2,\"fused_add_norm\":true,\"hidden_act\":"
            "\"silu\","
            "\"hidden_size\":%lld,\"intermediate_size\":%lld,\"layer_norm_epsilon\":1e-05,\"model_type\":"
            "\"mamba\",\"n_layer\":%lld,\"num_hidden_layers\":%lld,\"pad_token_id\":0,\"residual_in_fp32\":"
            "true,"
            "\"rms_norm\":true,\"ssm_cfg\":{},\"state_size\":16,\"time_step_rank\":%lld,\"use_bias\":false,"
            "\"use_conv_bias\":true,\"use_cache\":true,\"vocab_size\":50280}",
            (long long)(2 * sizes[i].hidden), (long long)sizes[i].hidden, (long long)sizes[i].hidden,
            (long long)(2 * sizes[i].hidden), (long long)sizes[i].layers, (long long)sizes[i].layers,
            (long long)sizes[i].rank);
        struct model_config config = parse(text);
        assert_int_equal(config.d_inner, 2 * sizes[i].hidden);
        assert_int_equal(config.dt_rank, sizes[i].rank);
        assert_true(config.tie_embeddings && config.conv_bias && !config.proj_bias);
        assert_int_equal(parameters(&config), sizes[i].parameters);
    }
    struct model_config config = parse("{\"vocab_size\":10,\"hidden_size\":40,\"num_hidden_layers\":1,"
                                       "\"time_step_rank\":\"auto\",\"expand\":3,\"bos_token_id\":null,"
                                       "\"pad_token_id\":4,\"chat_template\":\"chatml\"}");
    assert_int_equal(config.dt_rank, 3);
    assert_int_equal(config.d_inner, 120);
    assert_int_equal(config.d_state, 16);
    assert_int_equal(config.bos_id, -1);
    assert_int_equal(config.pad_id, 4);
    assert_string_equal(config.chat_template, "chatml");
}

static void test_bad_configs(void **state)
{
    static const struct {
        const char *text, *param;
        int code;
    } cases[] = {
        {"{\"model_type\":\"mamba\",\"hidden_size\":8,\"num_hidden_layers\":1}", "vocab_size", ERROR_INVALID},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"num_hidden_layers\":1}", "hidden_size", ERROR_INVALID},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"hidden_size\":\"8\",\"num_hidden_layers\":1}",
         "hidden_size", ERROR_INVALID},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"hidden_size\":8,\"num_hidden_layers\":0}",
         "num_hidden_layers", ERROR_INVALID},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"hidden_size\":8,\"num_hidden_layers\":1,\"state_"
         "size\":-3}",
         "state_size", ERROR_INVALID},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"hidden_size\":8,\"num_hidden_layers\":1,"
         "\"time_step_rank\":\"wide\"}",
         "time_step_rank", ERROR_INVALID},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"hidden_size\":8,\"num_hidden_layers\":1,\"hidden_"
         "act\":"
         "\"gelu\"}",
         "hidden_act", ERROR_UNSUPPORTED},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"hidden_size\":8,\"num_hidden_layers\":1,"
         "\"layer_norm_epsilon\":true}",
         "layer_norm_epsilon", ERROR_INVALID},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"hidden_size\":8,\"num_hidden_layers\":1,\"use_bias\":"
         "1}",
         "use_bias", ERROR_INVALID},
        {"{\"model_type\":\"mamba\",\"vocab_size\":8,\"hidden_size\":8,\"num_hidden_layers\":1,\"eos_token_"
         "id\":8}",
         "eos_token_id", ERROR_INVALID},
        {"{\"model_type\":\"llama\"}", "model_type", ERROR_UNSUPPORTED},
        {"{}", "model_type", ERROR_UNSUPPORTED},
    };
    const struct backend *backend = *state;
    char *folder = make_folder();
    struct error error = {0};
    struct model *model = NULL;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text(folder, "config.json", cases[i].text);
        check_error(model_open(folder, backend->ops, backend->device, &model, &error), cases[i].code, &error,
                    cases[i].param);
        assert_string_equal(error.param, cases[i].param);
        assert_non_null(strstr(error.message, "config.json"));
    }
    write_text(folder, "config.json", "{\"model_type\":");
    check_error(model_open(folder, backend->ops, backend->device, &model, &error), ERROR_CORRUPT, &error,
                "config.json");
    check_error(model_open("/nowhere", backend->ops, backend->device, &model, &error), ERROR_NOT_FOUND,
                &error, "/nowhere/config.json");
    assert_null(model);
    remove_folder(folder);
}

/* ---- tensors ---- */

static const char config_text[] = "{\"model_type\":\"mamba\",\"vocab_size\":11,\"hidden_size\":8,"
                                  "\"num_hidden_layers\":2,\"state_size\":4,\"time_step_rank\":2}";

/* Rewrite a model's file with one tensor renamed, reshaped or left out (new_name NULL), or one more added
 * (name NULL). */
static void edit_model(const char *folder, const char *name, const char *new_name, bool flatten)
{
    struct error error = {0};
    struct safetensors *file = NULL;
    struct tensor_view views[64];
    char path[PATH_MAX];
    static const float extra[4] = {1, 2, 3, 4};
    int64_t n = 0;
    check_ok(safetensors_open(folder, &file, &error), &error);
    for (int64_t i = 0; i < safetensors_count(file); i++) {
        views[n] = *safetensors_at(file, i);
        if (name && !strcmp(views[n].name, name)) {
            if (!new_name)
                continue;
            views[n].name = new_name;
            if (flatten) {
                views[n].n_dims = 1;
                views[n].shape[0] = views[n].count;
            }
        }
        n++;
    }
    if (!name)
        views[n++] = (struct tensor_view){new_name, TYPE_F32, 1, {4}, 4, extra};
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    check_ok(safetensors_write(path, views, n, NULL, &error), &error);
    safetensors_close(file);
}

static void test_bad_tensors(void **state)
{
    static const struct {
        const char *name, *new_name;
        bool flatten;
        const char *message;
    } cases[] = {
        {"backbone.layers.1.mixer.x_proj.weight", NULL, false,
         "tensor backbone.layers.1.mixer.x_proj.weight is missing"},
        {"backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.A_log", true,
         "tensor backbone.layers.0.mixer.A_log has shape [64] where the config implies [16, 4]"},
        {"backbone.norm_f.weight", "backbone.norm_g.weight", false,
         "tensor backbone.norm_g.weight is not part"},
        {NULL, "backbone.layers.2.norm.weight", false, "tensor backbone.layers.2.norm.weight is not part"},
        {NULL, "backbone.embedding.weight", false, "tensor backbone.embedding.weight is not part"},
    };
    const struct backend *backend = *state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *folder = make_random_model(config_text, 1, TYPE_F32);
        struct error error = {0};
        struct model *model = NULL;
        edit_model(folder, cases[i].name, cases[i].new_name, cases[i].flatten);
        check_error(model_open(folder, backend->ops, backend->device, &model, &error), ERROR_CORRUPT, &error,
                    cases[i].message);
        remove_folder(folder);
    }
}

static void test_good_variants(void **state)
{
    const struct backend *backend = *state;
    char *folder = make_random_model(config_text, 1, TYPE_BF16);
    static const int32_t ids[] = {3, 1, 4, 1, 5};
    struct model *model = open_model(backend, folder);
    float *expected = all_logits(model, NULL, ids, 5);
    assert_int_equal(model_parameter_count(model), parameters(model_config(model)));
    assert_int_equal(model_state_bytes(model), 2 * 16 * (3 + 4) * 4);
    assert_true(model_weight_bytes(model) > model_parameter_count(model) * 2);
    for (int64_t i = 0; i < model_weight_count(model); i++) { /* matrices stay narrow, the rest is fp32 */
        const struct weight *weight = model_weight(model, i);
        assert_int_equal(weight->type,
                         weight->n_dims == 2 && !strstr(weight->name, "A_log") ? TYPE_BF16 : TYPE_F32);
    }
    model_close(model);
    /* The original packages' name of the embeddings, and a tied head that was saved all the same. */
    edit_model(folder, "backbone.embeddings.weight", "backbone.embedding.weight", false);
    edit_model(folder, NULL, "lm_head.weight", false);
    model = open_model(backend, folder);
    float *found = all_logits(model, NULL, ids, 5);
    assert_memory_equal(found, expected, 5 * 11 * sizeof *found);
    free(found);
    free(expected);
    model_close(model);
    remove_folder(folder);
}

static void test_hatchling(void **state)
{
    struct model *model = open_model(*state, "models/hatchling");
    assert_int_equal(model_parameter_count(model), 9105664);
    assert_string_equal(model_config(model)->family, "mamba");
    assert_int_equal(model_config(model)->eos_id, 0);
    assert_int_equal(model_config(model)->pad_id, 1);
    model_close(model);
    model_close(NULL);
}

/* ---- memory ---- */

static const struct kernel_ops *real_ops;
static int allocations_left;

static int failing_alloc(struct kernel_device *device, size_t bytes, void **ret_pointer)
{
    return allocations_left-- > 0 ? real_ops->memory_alloc(device, bytes, ret_pointer) : KERNEL_NO_MEMORY;
}

/* Everything that this room allocates on a device, in turn; returns the first failure. */
static int use_memory(const struct kernel_ops *ops, struct kernel_device *device, const char *folder,
                      struct error *error)
{
    const struct lora_config lora = {.targets = TARGETS_ALL, .rank = 2, .alpha = 2};
    struct model *model = NULL;
    struct adapter *adapter = NULL, *full = NULL;
    struct pass *pass = NULL;
    struct runner *runner = NULL;
    struct state_pool *pool = NULL;
    int code = model_open(folder, ops, device, &model, error);
    if (!code)
        code = adapter_create(model, ADAPT_LORA, &lora, 1, &adapter, error);
    if (!code)
        code = adapter_load(model, folder, false, &full, error); /* a model folder is a full fine-tune */
    if (!code)
        code = pass_create(model, adapter, &(struct plan_request){.max_tokens = 10, .max_seqs = 2}, &pass,
                           error);
    if (!code)
        code = runner_create(model, 10, 2, &runner, error);
    if (!code)
        code = state_pool_create(model, 3, &pool, error);
    state_pool_free(pool);
    runner_free(runner);
    pass_free(pass);
    adapter_free(full);
    adapter_free(adapter);
    model_close(model);
    return code;
}

static void test_no_memory(void **state)
{
    const struct backend *backend = *state;
    struct kernel_ops ops = *backend->ops;
    char *folder = make_random_model(config_text, 1, TYPE_BF16);
    int code = ERROR_NO_MEMORY, tries = 0;
    real_ops = backend->ops;
    ops.memory_alloc = failing_alloc;
    for (; code == ERROR_NO_MEMORY; tries++) {
        struct error error = {0};
        allocations_left = tries;
        code = use_memory(&ops, backend->device, folder, &error);
        assert_int_equal(error.code, code);
    }
    assert_int_equal(code, 0);
    assert_true(tries > 6);
    remove_folder(folder);
}

static void test_limits(void **state)
{
    struct error error = {0};
    struct model *model = open_model(*state, "models/hatchling");
    struct runner *runner = NULL;
    struct state_pool *pool = NULL;
    struct memory_plan plan;
    struct plan_request huge = {ADAPT_FULL, {0}, INT32_MAX, INT32_MAX};
    check_ok(model_plan(model, &huge, &plan, &error), &error);
    assert_true(plan.total_bytes > INT64_C(1) << 46);
    huge.max_tokens++;
    check_error(model_plan(model, &huge, &plan, &error), ERROR_INVALID, &error, "tokens");
    check_error(runner_create(model, 0, 1, &runner, &error), ERROR_INVALID, &error, "token");
    check_error(state_pool_create(model, 0, &pool, &error), ERROR_INVALID, &error, "slot");
    check_ok(state_pool_create(model, 1, &pool, &error), &error);
    assert_int_equal(state_pool_reset(pool, 1), ERROR_INVALID);
    assert_int_equal(state_pool_copy(pool, 0, -1), ERROR_INVALID);
    state_pool_free(pool);
    model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_real_configs), cmocka_unit_test(test_bad_configs),
        cmocka_unit_test(test_bad_tensors),  cmocka_unit_test(test_good_variants),
        cmocka_unit_test(test_hatchling),    cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_limits),
    };
    return run_on_both(tests);
}
