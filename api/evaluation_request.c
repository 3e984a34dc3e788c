/* evaluation_request.c: POST /v1/evaluations into a struct evaluation_request. Any thread.
 *
 *   model         required: an id of a base model, an adapter or a checkpoint, or a list of up to 64 of them
 *   tasks         required: names of tasks, or ids of uploaded definitions
 *   num_fewshot   0: a number of examples, or a list of up to 16
 *   limit         null: the first so many documents of each task
 *   seed          1234: of the few-shot examples
 *   max_length    null: prompts have what they have (the state of a recurrent model does not grow). n drops ids on the left as a
 *                 harness with that max_length does
 *   precision     "auto", what the base is stored in on a GPU and fp32 on a CPU; fp32, tf32, bf16, fp16, or a list of these
 *   reuse_states  true: false runs every request from its beginning, to see what sharing is worth */
#include "api/requests.h"

#include "api/decode.h"
#include "api/evaluation.h"

#include <string.h>

enum { MAX_SHOTS = 256 };

/* One value or a list as a list: a new reference. NULL: refused. */
static json_t *list_of(const struct decoder *body, const char *key, size_t max)
{
    json_t *value = decode_get(body, key);
    json_t *list = json_is_array(value) ? json_deep_copy(value) : json_pack("[O]", value);
    if (list && json_array_size(list) >= 1 && json_array_size(list) <= max)
        return list;
    json_decref(list);
    decode_refuse(body, key, "must be one value or a list of 1 to %zu.", max);
    return NULL;
}

static bool has_twice(const json_t *list, size_t index)
{
    for (size_t i = 0; i < index; i++)
        if (json_equal(json_array_get(list, i), json_array_get(list, index)))
            return true;
    return false;
}

json_t *evaluation_names_decode(const struct decoder *body, const char *key, size_t max)
{
    if (!decode_get(body, key)) {
        decode_refuse(body, key, "is required.");
        return NULL;
    }
    json_t *list = list_of(body, key, max);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *item = json_array_get(list, i);
        size_t length = json_string_length(item);
        if (!json_is_string(item) || !length || length >= MODEL_ID_BYTES)
            decode_refuse(body, key, "element %zu must be a string of 1 to %d bytes.", i, MODEL_ID_BYTES - 1);
        else if (has_twice(list, i))
            decode_refuse(body, key, "%.200s is there twice.", json_string_value(item));
        else
            continue;
        json_decref(list);
        return NULL;
    }
    return list;
}

static json_t *shots_decode(const struct decoder *body)
{
    if (!decode_get(body, "num_fewshot"))
        return json_pack("[i]", 0);
    json_t *list = list_of(body, "num_fewshot", EVALUATION_MAX_SHOT_COUNTS);
    for (size_t i = 0; i < json_array_size(list); i++) {
        int64_t shots = -1;
        if (!decode_as_integer(json_array_get(list, i), &shots) || shots < 0 || shots > MAX_SHOTS)
            decode_refuse(body, "num_fewshot", "element %zu must be an integer from 0 to %d.", i, MAX_SHOTS);
        else if (has_twice(list, i))
            decode_refuse(body, "num_fewshot", "%d is there twice.", (int)shots);
        else if (!json_array_set_new(list, i, json_integer(shots)))
            continue;
        json_decref(list);
        return NULL;
    }
    return list;
}

static json_t *integer_or_null(int64_t value)
{
    return value ? json_integer(value) : json_null();
}

const char *const evaluation_keys[EVALUATION_KEYS] = {"tasks",      "num_fewshot",  "limit",    "seed",
                                                      "max_length", "reuse_states", "precision"};

/* "auto" stands alone: what it comes to might be another of the list. */
static json_t *precisions_decode(const struct decoder *body)
{
    static const char *const names[] = {"auto", "fp32", "tf32", "bf16", "fp16"};
    enum { COUNT = sizeof names / sizeof *names };
    if (!decode_get(body, "precision"))
        return json_pack("[s]", names[0]);
    json_t *list = evaluation_names_decode(body, "precision", COUNT);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (!decode_name_in(name, names, COUNT))
            decode_refuse(body, "precision",
                          "must be auto, fp32, tf32, bf16 or fp16, or a list, not \"%.40s\".", name);
        else if (!strcmp(name, names[0]) && json_array_size(list) > 1)
            decode_refuse(body, "precision", "\"auto\" must stand by itself.");
        else
            continue;
        json_decref(list);
        return NULL;
    }
    return list;
}

json_t *evaluation_settings_decode(const struct decoder *body, int64_t *ret_seed)
{
    int64_t limit = 0, max_length = 0, seed = 1234;
    bool share = true;
    if (decode_integer(body, "limit", 1, INT32_MAX, &limit) ||
        decode_integer(body, "seed", 0, INT64_C(9007199254740991), &seed) ||
        decode_integer(body, "max_length", 2, 1 << 20, &max_length) ||
        decode_bool(body, "reuse_states", &share))
        return NULL;
    json_t *tasks = evaluation_names_decode(body, "tasks", EVALUATION_MAX_TASKS);
    json_t *shots = tasks ? shots_decode(body) : NULL;
    json_t *precisions = shots ? precisions_decode(body) : NULL;
    json_t *settings = precisions
                           ? json_pack("{s:O, s:O, s:O, s:o, s:o, s:b}", "tasks", tasks, "num_fewshot", shots,
                                       "precisions", precisions, "limit", integer_or_null(limit),
                                       "max_length", integer_or_null(max_length), "share", (int)share)
                           : NULL;
    json_decref(precisions);
    json_decref(tasks);
    json_decref(shots);
    *ret_seed = seed;
    return settings;
}

json_t *evaluation_settings_encode(const json_t *settings, int64_t seed)
{
    json_t *precisions = json_object_get(settings, "precisions");
    return json_pack("{s:O?, s:o, s:O?, s:O?, s:O?, s:O?, s:I}", "tasks", json_object_get(settings, "tasks"),
                     "precision", precisions ? json_incref(precisions) : json_pack("[s]", "auto"),
                     "num_fewshot", json_object_get(settings, "num_fewshot"), "limit",
                     json_object_get(settings, "limit"), "max_length",
                     json_object_get(settings, "max_length"), "reuse_states",
                     json_object_get(settings, "share"), "seed", (json_int_t)seed);
}

int evaluation_request_decode(const json_t *json, struct evaluation_request *ret_request,
                              struct problem *problem)
{
    struct decoder body = {json, "", problem};
    const char *names[EVALUATION_KEYS + 2] = {"model", "metadata"};
    int64_t seed = 0;
    json_t *metadata = NULL;
    memcpy(names + 2, evaluation_keys, sizeof evaluation_keys);
    problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    if (decode_only(&body, names, sizeof names / sizeof *names) || decode_metadata(&body, &metadata))
        return -1;
    json_t *models = evaluation_names_decode(&body, "model", EVALUATION_MAX_MODELS);
    json_t *settings = models ? evaluation_settings_decode(&body, &seed) : NULL;
    if (settings && json_object_set(settings, "models", models)) {
        json_decref(settings);
        settings = NULL;
    }
    json_decref(models);
    if (!settings)
        return -1;
    *ret_request = (struct evaluation_request){
        .metadata = json_incref(metadata), .seed = (uint64_t)seed, .settings = settings};
    return 0;
}

void evaluation_request_free(struct evaluation_request *request)
{
    json_decref(request->metadata);
    json_decref(request->settings);
    *request = (struct evaluation_request){0};
}
