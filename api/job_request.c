/* job_request.c: POST /v1/fine_tuning/jobs into a struct job_request. Any thread.
 *
 * Hyperparameters come from three places: method.supervised.hyperparameters, hyperparameters, and the body
 * itself (what openai-python's extra_body adds); each key is read where it stands. What is left out is
 * resolved here, so that the job's row holds every value:
 *
 *   n_epochs "auto" = 3                batch_size "auto" = 8           learning_rate_multiplier "auto" = 1
 *   learning_rate 1e-3 for lora, 1e-4 for full (2e-4 to 2e-3 is the useful range for LoRA on Mamba), then
 *   times learning_rate_multiplier: the row's learning_rate is the peak the trainer uses
 *   max_steps 0 (as the epochs give)   gradient_accumulation_steps 1   max_seq_len 512     packing true
 *   truncate_long_examples false       adaptation lora
 *   precision "auto" (stays so here: what it becomes depends on the devices, which the scheduler knows)
 *   lora: rank 8, alpha 2 x rank, dropout 0, targets in_proj + x_proj, rslora false
 *   optimizer: betas [0.9, 0.999], eps 1e-8, weight_decay 0
 *   lr_schedule linear                 warmup_steps 0                  max_grad_norm 1 (0 = no clipping)
 *   eval_steps, checkpoint_steps 0 (at the end of each epoch)          keep_checkpoints 3
 *   early_stopping null                load_best_at_end false */
#include "api/requests.h"

#include "api/decode.h"
#include "api/evaluation.h"
#include "api/text.h"

#include <stdio.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const hyperparameter_names[] = {
    "n_epochs",         "batch_size",     "learning_rate_multiplier",
    "learning_rate",    "max_steps",      "gradient_accumulation_steps",
    "max_seq_len",      "packing",        "truncate_long_examples",
    "precision",        "adaptation",     "lora",
    "optimizer",        "lr_schedule",    "warmup_steps",
    "max_grad_norm",    "eval_steps",     "checkpoint_steps",
    "keep_checkpoints", "early_stopping", "load_best_at_end",
};
static const char *const body_names[] = {
    "model",    "training_file", "validation_file", "suffix",       "seed",
    "metadata", "method",        "hyperparameters", "integrations", "evaluations",
};

enum { SOURCE_METHOD, SOURCE_HYPERPARAMETERS, SOURCE_BODY, SOURCE_COUNT };
static const char *const source_prefixes[SOURCE_COUNT] = {
    [SOURCE_METHOD] = "method.supervised.hyperparameters.",
    [SOURCE_HYPERPARAMETERS] = "hyperparameters.",
    [SOURCE_BODY] = "",
};

struct sources {
    const json_t *objects[SOURCE_COUNT]; /* NULL where absent */
    struct problem *problem;
};

/* The place that gives key. */
static struct decoder source_of(const struct sources *sources, const char *key)
{
    int i = 0;
    while (i < SOURCE_COUNT - 1 && !json_object_get(sources->objects[i], key))
        i++;
    return (struct decoder){sources->objects[i], source_prefixes[i], sources->problem};
}

/* ---- finding the three places ---- */

static int method_decode(const struct decoder *body, json_t **ret_hyperparameters)
{
    static const char *const types[] = {"supervised"};
    static const char *const method_names[] = {"type", "supervised"};
    static const char *const supervised_names[] = {"hyperparameters"};
    json_t *object = NULL, *supervised = NULL;
    int type = -1;
    if (decode_object(body, "method", &object))
        return -1;
    if (!object)
        return 0;
    struct decoder method = {object, "method.", body->problem};
    if (decode_choice(&method, "type", types, COUNT(types), &type))
        return -1;
    if (type < 0)
        return decode_refuse(&method, "type", "is required, and must be \"supervised\".");
    if (decode_only(&method, method_names, COUNT(method_names)) ||
        decode_object(&method, "supervised", &supervised))
        return -1;
    struct decoder inner = {supervised, "method.supervised.", body->problem};
    if (supervised && decode_only(&inner, supervised_names, COUNT(supervised_names)))
        return -1;
    return decode_object(&inner, "hyperparameters", ret_hyperparameters);
}

/* No unknown key, and no key with two values. */
static int sources_check(const struct sources *sources)
{
    for (int i = 0; i < SOURCE_BODY; i++) {
        struct decoder decoder = {sources->objects[i], source_prefixes[i], sources->problem};
        if (decode_only(&decoder, hyperparameter_names, COUNT(hyperparameter_names)))
            return -1;
    }
    const char *names[COUNT(body_names) + COUNT(hyperparameter_names)];
    memcpy(names, body_names, sizeof body_names);
    memcpy(names + COUNT(body_names), hyperparameter_names, sizeof hyperparameter_names);
    struct decoder body = {sources->objects[SOURCE_BODY], "", sources->problem};
    if (decode_only(&body, names, COUNT(names)))
        return -1;

    for (size_t k = 0; k < COUNT(hyperparameter_names); k++) {
        const char *key = hyperparameter_names[k];
        struct decoder first = source_of(sources, key);
        const json_t *value = json_object_get(first.object, key);
        for (int i = 0; i < SOURCE_COUNT; i++) {
            const json_t *other = json_object_get(sources->objects[i], key);
            if (other && !json_equal(value, other))
                return decode_refuse(&first, key, "is given another value as %s%s.", source_prefixes[i], key);
        }
    }
    return 0;
}

/* ---- values ---- */

/* An integer or "auto". */
static int integer_or_auto(const struct sources *sources, const char *key, int64_t min, int64_t max,
                           int64_t *value)
{
    struct decoder decoder = source_of(sources, key);
    const json_t *json = decode_get(&decoder, key);
    if (json_is_string(json)) {
        if (strcmp(json_string_value(json), "auto"))
            return decode_refuse(&decoder, key,
                                 "must be \"auto\" or an integer from %lld to %lld, not \"%.40s\".",
                                 (long long)min, (long long)max, json_string_value(json));
        return 0;
    }
    return decode_integer(&decoder, key, min, max, value);
}

static int integer_at(const struct sources *sources, const char *key, int64_t min, int64_t max,
                      int64_t *value)
{
    struct decoder decoder = source_of(sources, key);
    return decode_integer(&decoder, key, min, max, value);
}

static int bool_at(const struct sources *sources, const char *key, bool *value)
{
    struct decoder decoder = source_of(sources, key);
    return decode_bool(&decoder, key, value);
}

static int choice_at(const struct sources *sources, const char *key, const char *const *names, size_t count,
                     int *value)
{
    struct decoder decoder = source_of(sources, key);
    return decode_choice(&decoder, key, names, count, value);
}

/* The object at key with its own names alone; *ret_inner reads it. prefix has room for the fields' names. */
static int object_at(const struct sources *sources, const char *key, const char *const *names, size_t count,
                     char prefix[96], struct decoder *ret_inner)
{
    struct decoder decoder = source_of(sources, key);
    json_t *object = NULL;
    if (decode_object(&decoder, key, &object))
        return -1;
    snprintf(prefix, 96, "%s%s.", decoder.prefix, key);
    *ret_inner = (struct decoder){object, prefix, sources->problem};
    return decode_only(ret_inner, names, count);
}

static const char *const target_names[] = {"embeddings", "in_proj", "x_proj", "dt_proj", "out_proj"};

/* Marks what an array names; -1 with a problem. */
static int target_names_decode(const struct decoder *lora, const json_t *given,
                               bool chosen[COUNT(target_names)])
{
    for (size_t i = 0; i < json_array_size(given); i++) {
        const char *name = json_string_value(json_array_get(given, i));
        size_t t = 0;
        while (name && t < COUNT(target_names) && strcmp(name, target_names[t]))
            t++;
        if (!name || t == COUNT(target_names))
            return decode_refuse(lora, "targets",
                                 "\"%.40s\" is none of in_proj, x_proj, dt_proj, out_proj and embeddings.",
                                 name ? name : "");
        if (chosen[t])
            return decode_refuse(lora, "targets", "names %s twice.", name);
        chosen[t] = true;
    }
    return 0;
}

/* lora.targets into an array of names in the order above; NULL with a problem. */
static json_t *targets_decode(const struct decoder *lora)
{
    bool chosen[COUNT(target_names)] = {false};
    const json_t *given = decode_get(lora, "targets");
    const char *preset = json_string_value(given);
    if (!given) {
        chosen[1] = chosen[2] = true;
    } else if (preset && (!strcmp(preset, "all") || !strcmp(preset, "sll"))) {
        for (size_t t = 0; t < COUNT(target_names); t++)
            chosen[t] = !strcmp(preset, "all") || strcmp(target_names[t], "dt_proj");
    } else if (!json_array_size(given)) {
        decode_refuse(lora, "targets", "must be \"sll\", \"all\" or an array of at least one name%s%.40s.",
                      preset ? ", not " : "", preset ? preset : "");
        return NULL;
    } else if (target_names_decode(lora, given, chosen)) {
        return NULL;
    }
    json_t *targets = json_array();
    for (size_t t = 0; targets && t < COUNT(target_names); t++)
        if (chosen[t])
            json_array_append_new(targets, json_string(target_names[t]));
    return targets;
}

static json_t *lora_decode(const struct sources *sources)
{
    static const char *const names[] = {"rank", "alpha", "dropout", "targets", "rslora"};
    char prefix[96];
    struct decoder lora;
    int64_t rank = 8;
    double dropout = 0;
    bool rslora = false;
    if (object_at(sources, "lora", names, COUNT(names), prefix, &lora) ||
        decode_integer(&lora, "rank", 1, 1024, &rank))
        return NULL;
    double alpha = 2 * (double)rank;
    if (decode_number(&lora, "alpha", 0.001, false, 65536, &alpha) ||
        decode_number(&lora, "dropout", 0, false, 0.95, &dropout) || decode_bool(&lora, "rslora", &rslora))
        return NULL;
    json_t *targets = targets_decode(&lora);
    return targets ? json_pack("{s:I, s:f, s:f, s:o, s:b}", "rank", (json_int_t)rank, "alpha", alpha,
                               "dropout", dropout, "targets", targets, "rslora", rslora)
                   : NULL;
}

static json_t *optimizer_decode(const struct sources *sources)
{
    static const char *const names[] = {"betas", "eps", "weight_decay"};
    char prefix[96];
    struct decoder optimizer;
    double betas[2] = {0.9, 0.999}, eps = 1e-8, weight_decay = 0;
    if (object_at(sources, "optimizer", names, COUNT(names), prefix, &optimizer) ||
        decode_number(&optimizer, "eps", 1e-16, false, 1, &eps) ||
        decode_number(&optimizer, "weight_decay", 0, false, 10, &weight_decay))
        return NULL;
    const json_t *given = decode_get(&optimizer, "betas");
    for (size_t i = 0; given && i < 2; i++) {
        const json_t *beta = json_array_get(given, i);
        betas[i] = json_number_value(beta);
        if (json_array_size(given) != 2 || !json_is_number(beta) || betas[i] < 0 || betas[i] > 0.999999) {
            decode_refuse(&optimizer, "betas", "must be two numbers from 0 to 0.999999.");
            return NULL;
        }
    }
    return json_pack("{s:[f, f], s:f, s:f}", "betas", betas[0], betas[1], "eps", eps, "weight_decay",
                     weight_decay);
}

static json_t *early_stopping_decode(const struct sources *sources, bool has_validation)
{
    static const char *const names[] = {"patience", "min_delta"};
    char prefix[96];
    struct decoder early;
    int64_t patience = 3;
    double min_delta = 0;
    if (object_at(sources, "early_stopping", names, COUNT(names), prefix, &early) ||
        decode_integer(&early, "patience", 1, 1000, &patience) ||
        decode_number(&early, "min_delta", 0, false, 1000, &min_delta))
        return NULL;
    if (!early.object)
        return json_null();
    if (!has_validation) {
        struct decoder decoder = source_of(sources, "early_stopping");
        decode_refuse(&decoder, "early_stopping", "needs a validation_file to judge by.");
        return NULL;
    }
    return json_pack("{s:I, s:f}", "patience", (json_int_t)patience, "min_delta", min_delta);
}

/* Every hyperparameter, resolved; NULL with a problem. */
static json_t *hyperparameters_decode(const struct sources *sources, bool has_validation)
{
    static const char *const precisions[] = {"auto", "fp32", "tf32", "bf16", "fp16"};
    static const char *const adaptations[] = {"lora", "full"};
    static const char *const schedules[] = {"constant", "linear", "cosine"};
    const int64_t many = 1000000000;
    int64_t n_epochs = 3, batch_size = 8, max_steps = 0, accumulation = 1, max_seq_len = 512,
            warmup_steps = 0;
    int64_t eval_steps = 0, checkpoint_steps = 0, keep_checkpoints = 3;
    double multiplier = 1, max_grad_norm = 1;
    bool packing = true, truncate = false, load_best = false;
    int precision = 0, adaptation = 0, schedule = 1;

    struct decoder at_multiplier = source_of(sources, "learning_rate_multiplier");
    const json_t *given = decode_get(&at_multiplier, "learning_rate_multiplier");
    bool automatic = json_is_string(given) && !strcmp(json_string_value(given), "auto");
    struct decoder at_rate = source_of(sources, "learning_rate");
    struct decoder at_norm = source_of(sources, "max_grad_norm");

    if (integer_or_auto(sources, "n_epochs", 1, 1000, &n_epochs) ||
        integer_or_auto(sources, "batch_size", 1, 1024, &batch_size) ||
        (!automatic &&
         decode_number(&at_multiplier, "learning_rate_multiplier", 0.001, false, 1000, &multiplier)) ||
        integer_at(sources, "max_steps", 0, many, &max_steps) ||
        integer_at(sources, "gradient_accumulation_steps", 1, 1024, &accumulation) ||
        integer_at(sources, "max_seq_len", 2, 1 << 20, &max_seq_len) ||
        bool_at(sources, "packing", &packing) || bool_at(sources, "truncate_long_examples", &truncate) ||
        choice_at(sources, "precision", precisions, COUNT(precisions), &precision) ||
        choice_at(sources, "adaptation", adaptations, COUNT(adaptations), &adaptation) ||
        choice_at(sources, "lr_schedule", schedules, COUNT(schedules), &schedule) ||
        integer_at(sources, "warmup_steps", 0, many, &warmup_steps) ||
        decode_number(&at_norm, "max_grad_norm", 0, false, 1e6, &max_grad_norm) ||
        integer_at(sources, "eval_steps", 0, many, &eval_steps) ||
        integer_at(sources, "checkpoint_steps", 0, many, &checkpoint_steps) ||
        integer_at(sources, "keep_checkpoints", 1, 1000, &keep_checkpoints) ||
        bool_at(sources, "load_best_at_end", &load_best))
        return NULL;
    double learning_rate = adaptation ? 1e-4 : 1e-3;
    if (decode_number(&at_rate, "learning_rate", 1e-9, false, 1, &learning_rate))
        return NULL;
    learning_rate *= multiplier;
    if (learning_rate > 1) {
        decode_refuse(&at_multiplier, "learning_rate_multiplier",
                      "makes the learning rate %g; it may be at most 1.", learning_rate);
        return NULL;
    }
    if (load_best && !has_validation) {
        struct decoder decoder = source_of(sources, "load_best_at_end");
        decode_refuse(&decoder, "load_best_at_end", "needs a validation_file to judge by.");
        return NULL;
    }

    json_t *lora = NULL, *optimizer = NULL, *early_stopping = NULL;
    lora = lora_decode(sources);
    optimizer = lora ? optimizer_decode(sources) : NULL;
    early_stopping = optimizer ? early_stopping_decode(sources, has_validation) : NULL;
    if (!early_stopping) {
        json_decref(optimizer);
        json_decref(lora);
        return NULL;
    }
    return json_pack(
        "{s:I, s:I, s:f, s:f, s:I, s:I, s:I, s:b, s:b, s:s, s:s, s:o, s:o, s:s, s:I, s:f, s:I, s:I, "
        "s:I, s:o, s:b}",
        "n_epochs", (json_int_t)n_epochs, "batch_size", (json_int_t)batch_size, "learning_rate_multiplier",
        multiplier, "learning_rate", learning_rate, "max_steps", (json_int_t)max_steps,
        "gradient_accumulation_steps", (json_int_t)accumulation, "max_seq_len", (json_int_t)max_seq_len,
        "packing", packing, "truncate_long_examples", truncate, "precision", precisions[precision],
        "adaptation", adaptations[adaptation], "lora", lora, "optimizer", optimizer, "lr_schedule",
        schedules[schedule], "warmup_steps", (json_int_t)warmup_steps, "max_grad_norm", max_grad_norm,
        "eval_steps", (json_int_t)eval_steps, "checkpoint_steps", (json_int_t)checkpoint_steps,
        "keep_checkpoints", (json_int_t)keep_checkpoints, "early_stopping", early_stopping,
        "load_best_at_end", load_best);
}

/* ---- the rest of the body ---- */

static int suffix_check(const struct decoder *body, const char *suffix)
{
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    if (strlen(suffix) > 64 || suffix[strspn(suffix, allowed)])
        return decode_refuse(body, "suffix", "must be 1 to 64 letters, digits, '-', '_' or '.'.");
    return 0;
}

int job_request_decode(const json_t *json, struct job_request *ret_request, struct problem *problem)
{
    struct decoder body = {json, "", problem};
    struct job_request request = {0};
    const char *model = NULL, *training_file = NULL, *validation_file = "", *suffix = "";
    json_t *method = NULL, *hyperparameters = NULL, *metadata = NULL;
    int64_t seed = -1;

    /* What is said when a value below could not be made and nothing more precise was said. */
    problem_set(problem, 503, "out_of_memory", NULL, "The server is out of memory.");
    if (method_decode(&body, &method) || decode_object(&body, "hyperparameters", &hyperparameters))
        return -1;
    struct sources sources = {{method, hyperparameters, json}, problem};
    if (sources_check(&sources) || decode_string(&body, "model", MODEL_ID_BYTES - 1, &model))
        return -1;
    if (!model)
        return decode_refuse(&body, "model", "is required: the id of a base model.");
    if (decode_string(&body, "training_file", ID_BYTES - 1, &training_file))
        return -1;
    if (!training_file)
        return decode_refuse(&body, "training_file", "is required: the id of an uploaded file.");
    if (decode_string(&body, "validation_file", ID_BYTES - 1, &validation_file) ||
        decode_string(&body, "suffix", 256, &suffix) || suffix_check(&body, suffix) ||
        decode_integer(&body, "seed", 0, INT64_C(9007199254740991), &seed) ||
        decode_metadata(&body, &metadata))
        return -1;
    const json_t *integrations = decode_get(&body, "integrations");
    if (integrations && !(json_is_array(integrations) && !json_array_size(integrations)))
        return decode_refuse(&body, "integrations", "there are none here; leave it out.");

    if (job_evaluations_decode(&body, &request.evaluations))
        return -1;
    json_t *resolved = hyperparameters_decode(&sources, *validation_file);
    if (!resolved) {
        json_decref(request.evaluations);
        return -1;
    }
    snprintf(request.model, sizeof request.model, "%s", model);
    snprintf(request.training_file, sizeof request.training_file, "%s", training_file);
    snprintf(request.validation_file, sizeof request.validation_file, "%s", validation_file);
    snprintf(request.suffix, sizeof request.suffix, "%s", suffix);
    request.has_seed = seed >= 0;
    request.seed = seed >= 0 ? (uint64_t)seed : 0;
    request.metadata = json_incref(metadata);
    request.hyperparameters = resolved;
    *ret_request = request;
    return 0;
}

void job_request_free(struct job_request *request)
{
    json_decref(request->metadata);
    json_decref(request->hyperparameters);
    json_decref(request->evaluations);
    request->metadata = request->hyperparameters = request->evaluations = NULL;
}
