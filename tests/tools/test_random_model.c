/* test_random_model.c: what random-model writes opens as a model, in one file and in shards, and is the same
 * every time; its weights are such that a forward is finite and not flat. RANDOM_MODEL names the program. */
#include "tests/engine/models/support.h"

#include "engine/text/tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static char *make(const char *options)
{
    char command[1024];
    char *folder = make_folder();
    snprintf(command, sizeof command, "%s tiny %s --tokenizer %s %s", getenv("RANDOM_MODEL"), folder,
             source_path("tests/vectors/tokenizers/gpt-neox-20b.json"), options);
    assert_int_equal(system(command), 0);
    return folder;
}

static bool has_file(const char *folder, const char *name)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    if (file)
        fclose(file);
    return file != NULL;
}

static bool same_weights(const struct model *a, const struct model *b)
{
    assert_int_equal(model_weight_count(a), model_weight_count(b));
    bool same = true;
    for (int64_t i = 0; i < model_weight_count(a); i++) {
        const struct weight *x = model_weight(a, i), *y = model_weight(b, i);
        assert_string_equal(x->name, y->name);
        assert_int_equal(x->type, y->type);
        assert_int_equal(x->count, y->count);
        same = same && !memcmp(x->data, y->data, (size_t)x->count * kernel_type_size(x->type));
    }
    return same;
}

static void test_layouts(void **state)
{
    char *whole = make(""), *sharded = make("--shard-bytes 100000"), *other = make("--seed 1");
    assert_true(has_file(whole, "model.safetensors") && !has_file(whole, "model.safetensors.index.json"));
    assert_true(has_file(sharded, "model.safetensors.index.json") && !has_file(sharded, "model.safetensors"));
    assert_true(has_file(sharded, "model-00001-of-00003.safetensors"));
    struct model *one = open_model(*state, whole), *two = open_model(*state, sharded);
    struct model *three = open_model(*state, other);
    assert_int_equal(model_config(one)->vocab_size, 50280);
    assert_true(same_weights(one, two));
    assert_false(same_weights(one, three));
    model_close(one);
    model_close(two);
    model_close(three);
    remove_folder(sharded);
    remove_folder(other);

    /* One file over what were several. */
    const char *tokenizer = source_path("tests/vectors/tokenizers/gpt-neox-20b.json");
    char command[2048];
    snprintf(command, sizeof command,
             "%s tiny %s --shard-bytes 100000 --tokenizer %s && %s tiny %s --dtype fp32 --tokenizer %s",
             getenv("RANDOM_MODEL"), whole, tokenizer, getenv("RANDOM_MODEL"), whole, tokenizer);
    assert_int_equal(system(command), 0);
    one = open_model(*state, whole);
    assert_int_equal(model_weight(one, 0)->type, TYPE_F32);
    model_close(one);
    remove_folder(whole);
}

static void test_forward(void **state)
{
    static const int32_t ids[] = {5, 50276, 17, 17, 4000};
    char *folder = make("--dtype fp16");
    struct model *model = open_model(*state, folder);
    float *logits = all_logits(model, NULL, ids, 5);
    double sum = 0;
    for (int64_t i = 0; i < 5 * model_config(model)->vocab_size; i++)
        sum += (double)logits[i] * (double)logits[i];
    double deviation = sqrt(sum / (5.0 * (double)model_config(model)->vocab_size));
    assert_true(isfinite(deviation) && deviation > 0.01 && deviation < 10);
    free(logits);
    model_close(model);

    struct tokenizer *tokenizer = NULL;
    struct error error = {0};
    check_ok(tokenizer_load(folder, &tokenizer, &error), &error);
    assert_true(tokenizer_size(tokenizer) <= 50280);
    tokenizer_free(tokenizer);
    remove_folder(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_layouts), cmocka_unit_test(test_forward)};
    return cmocka_run_group_tests_name("random model", tests, open_cpu, close_backend);
}
