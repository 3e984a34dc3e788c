/* job_evaluations.c: the evaluations that a fine-tuning job names, decoded and encoded. Any thread.
 *
 *   tasks, num_fewshot, limit, seed, max_length, reuse_states, precision    as of an evaluation
 *   at          "end": of what the job ends with; "checkpoints": of every checkpoint; or both in a list. "end", or where the
 *               best is to be kept "checkpoints"
 *   keep_best   null: the job's model is what training ends with; {"task", "metric", "num_fewshot"}: it is the checkpoint that is
 *               best by this metric. task may be left out where there is one, num_fewshot is the first, as
 *               the precision */
#include "api/evaluation.h"

#include "api/encode.h"
#include "api/requests.h"

#include <string.h>

static const char *const places[] = {"checkpoints", "end"};
static const char *const metrics[] = {"acc", "acc_norm", "acc_macro", "acc_norm_macro", "perplexity"};
#define COUNT(array) (sizeof(array) / sizeof *(array))

static json_t *at_decode(const struct decoder *body, bool keeps_best)
{
    if (!decode_get(body, "at"))
        return json_pack("[s]", places[!keeps_best]);
    json_t *list = evaluation_names_decode(body, "at", COUNT(places));
    bool by_checkpoint = false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *place = json_string_value(json_array_get(list, i));
        by_checkpoint |= !strcmp(place, places[0]);
        if (decode_name_in(place, places, COUNT(places)))
            continue;
        decode_refuse(body, "at", "must be \"checkpoints\", \"end\" or both, not \"%.40s\".", place);
        json_decref(list);
        return NULL;
    }
    if (list && keeps_best && !by_checkpoint) {
        decode_refuse(body, "at", "must have \"checkpoints\" where the best of them is kept.");
        json_decref(list);
        return NULL;
    }
    return list;
}

static bool list_has(const json_t *list, const json_t *value)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (json_equal(json_array_get(list, i), value))
            return true;
    return false;
}

/* json_null() where nothing is asked; NULL with a problem. */
static json_t *best_decode(const struct decoder *body, const json_t *settings)
{
    static const char *const names[] = {"task", "metric", "num_fewshot"};
    const json_t *tasks = json_object_get(settings, "tasks"),
                 *shots = json_object_get(settings, "num_fewshot");
    const char *task = json_array_size(tasks) == 1 ? json_string_value(json_array_get(tasks, 0)) : NULL;
    int64_t n = json_integer_value(json_array_get(shots, 0));
    int metric = -1;
    json_t *object = NULL;
    if (decode_object(body, "keep_best", &object))
        return NULL;
    if (!object)
        return json_null();
    struct decoder best = {object, "evaluations.keep_best.", body->problem};
    if (decode_only(&best, names, COUNT(names)) || decode_string(&best, "task", MODEL_ID_BYTES - 1, &task) ||
        decode_choice(&best, "metric", metrics, COUNT(metrics), &metric) ||
        decode_integer(&best, "num_fewshot", 0, INT32_MAX, &n))
        return NULL;
    json_t *wanted = json_string(task ? task : ""), *shot_count = json_integer(n);
    json_t *result = NULL;
    if (!task)
        decode_refuse(&best, "task", "is required where there are several.");
    else if (!list_has(tasks, wanted))
        decode_refuse(&best, "task", "'%.200s' is not among the tasks.", task);
    else if (metric < 0)
        decode_refuse(&best, "metric", "is required.");
    else if (!list_has(shots, shot_count))
        decode_refuse(&best, "num_fewshot", "%lld is not among the shot counts.", (long long)n);
    else
        result = json_pack("{s:O, s:s, s:O}", "task", wanted, "metric", metrics[metric], "num_fewshot",
                           shot_count);
    json_decref(wanted);
    json_decref(shot_count);
    return result;
}

int job_evaluations_decode(const struct decoder *body, json_t **ret_evaluations)
{
    const char *names[EVALUATION_KEYS + 2] = {"at", "keep_best"};
    json_t *object = NULL;
    int64_t seed;
    if (decode_object(body, "evaluations", &object))
        return -1;
    if (!object)
        return 0;
    struct decoder inner = {object, "evaluations.", body->problem};
    memcpy(names + 2, evaluation_keys, EVALUATION_KEYS * sizeof *evaluation_keys);
    if (decode_only(&inner, names, COUNT(names)))
        return -1;
    json_t *settings = evaluation_settings_decode(&inner, &seed);
    json_t *best = settings ? best_decode(&inner, settings) : NULL;
    json_t *at = best ? at_decode(&inner, json_is_object(best)) : NULL;
    json_t *evaluations = at ? json_pack("{s:O, s:I, s:O, s:O}", "settings", settings, "seed",
                                         (json_int_t)seed, "at", at, "keep_best", best)
                             : NULL;
    json_decref(settings);
    json_decref(best);
    json_decref(at);
    if (!evaluations)
        return -1;
    *ret_evaluations = evaluations;
    return 0;
}

json_t *job_evaluations_encode(const char *evaluations, const char *jobs)
{
    if (!evaluations)
        return json_null();
    json_t *stored = encode_stored(evaluations);
    json_t *json = evaluation_settings_encode(json_object_get(stored, "settings"),
                                              json_integer_value(json_object_get(stored, "seed")));
    if (json && (json_object_set(json, "at", json_object_get(stored, "at")) ||
                 json_object_set(json, "keep_best", json_object_get(stored, "keep_best")) ||
                 json_object_set_new(json, "jobs", jobs ? encode_stored(jobs) : json_array()))) {
        json_decref(json);
        json = NULL;
    }
    json_decref(stored);
    return json;
}
