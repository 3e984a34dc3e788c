/* spec.c: a job's hyperparameters from JSON and back, and its learning rates. Pure. */
#include "engine/training/trainer.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- reading JSON, the first error sticking ---- */

struct reader {
    const json_t *object;
    const char *prefix; /* "lora." for keys inside it, "" at the top */
    struct error *error;
    int *code; /* 0 until something is wrong; later reads are no-ops */
};

static void fail(const struct reader *reader, const char *key, const char *problem)
{
    char name[64];
    snprintf(name, sizeof name, "%s%s", reader->prefix, key);
    *reader->code = error_set_param(reader->error, ERROR_INVALID, name, "%s %s", name, problem);
}

static const json_t *read_value(const struct reader *reader, const char *key)
{
    if (*reader->code)
        return NULL;
    const json_t *value = json_object_get(reader->object, key);
    if (!value)
        fail(reader, key, "is missing");
    return value;
}

static void check_integer(const struct reader *reader, const char *key, const json_t *value, int64_t min,
                          int64_t max, int64_t *ret)
{
    char problem[96];
    if (!json_is_integer(value)) {
        fail(reader, key, "must be an integer");
    } else if (json_integer_value(value) < min || json_integer_value(value) > max) {
        snprintf(problem, sizeof problem, "is %lld; it must be in %lld..%lld",
                 (long long)json_integer_value(value), (long long)min, (long long)max);
        fail(reader, key, problem);
    } else {
        *ret = json_integer_value(value);
    }
}

static int64_t read_integer(const struct reader *reader, const char *key, int64_t min, int64_t max)
{
    int64_t number = min;
    const json_t *value = read_value(reader, key);
    if (value)
        check_integer(reader, key, value, min, max, &number);
    return number;
}

static float check_number(const struct reader *reader, const char *key, const json_t *value, double min,
                          double max)
{
    char problem[96];
    double number = json_number_value(value);
    if (!json_is_number(value)) {
        fail(reader, key, "must be a number");
    } else if (!(number >= min && number <= max)) {
        snprintf(problem, sizeof problem, "is %g; it must be in %g..%g", number, min, max);
        fail(reader, key, problem);
    }
    return (float)number;
}

static float read_number(const struct reader *reader, const char *key, double min, double max)
{
    const json_t *value = read_value(reader, key);
    return value ? check_number(reader, key, value, min, max) : 0;
}

static bool read_bool(const struct reader *reader, const char *key)
{
    const json_t *value = read_value(reader, key);
    if (value && !json_is_boolean(value))
        fail(reader, key, "must be true or false");
    return json_is_true(value);
}

/* The index of the value among names (closed by NULL). */
static int read_choice(const struct reader *reader, const char *key, const char *const *names)
{
    const json_t *value = read_value(reader, key);
    if (!value)
        return 0;
    char problem[96] = "must be one of";
    for (int i = 0; names[i]; i++) {
        if (json_is_string(value) && !strcmp(json_string_value(value), names[i]))
            return i;
        size_t used = strlen(problem);
        snprintf(problem + used, sizeof problem - used, " %s", names[i]);
    }
    fail(reader, key, problem);
    return 0;
}

/* The object under key, or NULL when it is null and may be. */
static const json_t *read_object(const struct reader *reader, const char *key, bool nullable)
{
    const json_t *value = read_value(reader, key);
    if (!value || (nullable && json_is_null(value)))
        return NULL;
    if (!json_is_object(value)) {
        fail(reader, key, "must be an object");
        return NULL;
    }
    return value;
}

/* ---- the spec ---- */

static const char *const precisions[] = {"fp32", "tf32", "bf16", "fp16", NULL};
static const char *const adaptations[] = {"lora", "full", NULL};
static const char *const schedules[] = {"constant", "linear", "cosine", NULL};

/* Every bit of enum lora_target, in the order in which they are written. */
static const enum lora_target all_targets[] = {TARGET_IN_PROJ, TARGET_X_PROJ, TARGET_DT_PROJ, TARGET_OUT_PROJ,
                                               TARGET_EMBEDDINGS};

static int read_targets(const struct reader *reader)
{
    const json_t *value = read_value(reader, "targets"), *element;
    if (!value)
        return 0;
    if (json_is_string(value) && !strcmp(json_string_value(value), "sll"))
        return TARGETS_SLL;
    if (json_is_string(value) && !strcmp(json_string_value(value), "all"))
        return TARGETS_ALL;
    int targets = 0;
    size_t index;
    json_array_foreach(value, index, element)
    {
        int target = json_is_string(element) ? lora_target_from_name(json_string_value(element)) : 0;
        if (!target) {
            fail(reader, "targets",
                 "may name in_proj, x_proj, dt_proj, out_proj and embeddings and nothing else");
            return 0;
        }
        targets |= target;
    }
    if (!targets)
        fail(reader, "targets", "must be \"sll\", \"all\" or a list of at least one name");
    return targets;
}

static void read_lora(const struct reader *top, struct training_spec *spec)
{
    const json_t *object = read_object(top, "lora", spec->adaptation == ADAPT_FULL);
    if (!object || spec->adaptation == ADAPT_FULL)
        return;
    struct reader reader = {object, "lora.", top->error, top->code};
    spec->lora.targets = read_targets(&reader);
    spec->lora.rank = (int32_t)read_integer(&reader, "rank", 1, 4096);
    spec->lora.alpha = read_number(&reader, "alpha", 1e-6, 1e6);
    spec->lora.dropout = read_number(&reader, "dropout", 0, 0.99);
    spec->lora.rslora = read_bool(&reader, "rslora");
}

static void read_optimizer(const struct reader *top, struct training_spec *spec)
{
    const json_t *object = read_object(top, "optimizer", false);
    if (!object)
        return;
    struct reader reader = {object, "optimizer.", top->error, top->code};
    const json_t *betas = read_value(&reader, "betas");
    if (betas && json_array_size(betas) != 2) {
        fail(&reader, "betas", "must be two numbers");
    } else if (betas) {
        spec->beta1 = check_number(&reader, "betas", json_array_get(betas, 0), 0, 0.999999);
        spec->beta2 = check_number(&reader, "betas", json_array_get(betas, 1), 0, 0.999999);
    }
    spec->eps = read_number(&reader, "eps", 1e-16, 1);
    spec->weight_decay = read_number(&reader, "weight_decay", 0, 100);
}

static void read_early_stopping(const struct reader *top, struct training_spec *spec)
{
    const json_t *object = read_object(top, "early_stopping", true);
    if (!object)
        return;
    struct reader reader = {object, "early_stopping.", top->error, top->code};
    spec->early_stopping_patience = (int32_t)read_integer(&reader, "patience", 0, INT32_MAX);
    spec->early_stopping_min_delta = read_number(&reader, "min_delta", 0, 1e6);
}

int training_spec_decode(const json_t *json, struct training_spec *ret_spec, struct error *error)
{
    int code = 0;
    struct reader reader = {json, "", error, &code};
    struct training_spec spec = {0};
    if (!json_is_object(json))
        return error_set_param(error, ERROR_INVALID, "hyperparameters", "hyperparameters must be an object");
    spec.n_epochs = read_integer(&reader, "n_epochs", 1, 1000000);
    const json_t *max_steps = read_value(&reader, "max_steps");
    if (max_steps && !json_is_null(max_steps))
        check_integer(&reader, "max_steps", max_steps, 0, INT32_MAX, &spec.max_steps);
    spec.batch_size = (int32_t)read_integer(&reader, "batch_size", 1, 65536);
    spec.gradient_accumulation_steps =
        (int32_t)read_integer(&reader, "gradient_accumulation_steps", 1, 65536);
    spec.max_seq_len = read_integer(&reader, "max_seq_len", 2, 1 << 24);
    spec.packing = read_bool(&reader, "packing");
    spec.truncate = read_bool(&reader, "truncate_long_examples");
    spec.precision = (enum precision)read_choice(&reader, "precision", precisions);
    spec.adaptation = read_choice(&reader, "adaptation", adaptations) ? ADAPT_FULL : ADAPT_LORA;
    read_lora(&reader, &spec);
    spec.learning_rate = read_number(&reader, "learning_rate", 1e-12, 100);
    read_optimizer(&reader, &spec);
    spec.schedule = (enum lr_schedule)read_choice(&reader, "lr_schedule", schedules);
    spec.warmup_steps = read_integer(&reader, "warmup_steps", 0, INT32_MAX);
    spec.max_grad_norm = read_number(&reader, "max_grad_norm", 0, 1e9);
    spec.eval_steps = read_integer(&reader, "eval_steps", 0, INT32_MAX);
    spec.checkpoint_steps = read_integer(&reader, "checkpoint_steps", 0, INT32_MAX);
    spec.keep_checkpoints = (int32_t)read_integer(&reader, "keep_checkpoints", 0, INT32_MAX);
    read_early_stopping(&reader, &spec);
    spec.load_best_at_end = read_bool(&reader, "load_best_at_end");
    if (!code)
        *ret_spec = spec;
    return code;
}

json_t *training_spec_encode(const struct training_spec *spec)
{
    json_t *lora = json_null(), *early_stopping = json_null();
    if (spec->adaptation == ADAPT_LORA) {
        json_t *targets = json_array();
        for (size_t i = 0; i < sizeof all_targets / sizeof *all_targets; i++)
            if (spec->lora.targets & (int)all_targets[i])
                json_array_append_new(targets, json_string(lora_target_name(all_targets[i])));
        lora = json_pack("{s:o, s:i, s:f, s:f, s:b}", "targets", targets, "rank", (int)spec->lora.rank,
                         "alpha", (double)spec->lora.alpha, "dropout", (double)spec->lora.dropout, "rslora",
                         (int)spec->lora.rslora);
    }
    if (spec->early_stopping_patience)
        early_stopping = json_pack("{s:i, s:f}", "patience", (int)spec->early_stopping_patience, "min_delta",
                                   (double)spec->early_stopping_min_delta);
    return json_pack(
        "{s:I, s:I, s:i, s:i, s:I, s:b, s:b, s:s, s:s, s:o, s:f, s:{s:[f,f], s:f, s:f}, s:s, "
        "s:I, s:f, s:I, s:I,"
        " s:i, s:o, s:b}",
        "n_epochs", (json_int_t)spec->n_epochs, "max_steps", (json_int_t)spec->max_steps, "batch_size",
        (int)spec->batch_size, "gradient_accumulation_steps", (int)spec->gradient_accumulation_steps,
        "max_seq_len", (json_int_t)spec->max_seq_len, "packing", (int)spec->packing, "truncate_long_examples",
        (int)spec->truncate, "precision", precisions[spec->precision], "adaptation",
        adaptations[spec->adaptation == ADAPT_FULL], "lora", lora, "learning_rate",
        (double)spec->learning_rate, "optimizer", "betas", (double)spec->beta1, (double)spec->beta2, "eps",
        (double)spec->eps, "weight_decay", (double)spec->weight_decay, "lr_schedule",
        schedules[spec->schedule], "warmup_steps", (json_int_t)spec->warmup_steps, "max_grad_norm",
        (double)spec->max_grad_norm, "eval_steps", (json_int_t)spec->eval_steps, "checkpoint_steps",
        (json_int_t)spec->checkpoint_steps, "keep_checkpoints", (int)spec->keep_checkpoints, "early_stopping",
        early_stopping, "load_best_at_end", (int)spec->load_best_at_end);
}

const char *training_precision_name(enum precision precision)
{
    return precisions[precision];
}

enum kernel_type training_activation_type(enum precision precision)
{
    return precision == PRECISION_BF16 ? TYPE_BF16 : precision == PRECISION_FP16 ? TYPE_F16 : TYPE_F32;
}

float training_learning_rate(const struct training_spec *spec, int64_t step, int64_t total_steps)
{
    double peak = (double)spec->learning_rate;
    if (step <= spec->warmup_steps)
        return (float)(peak * (double)step / (double)spec->warmup_steps);
    double progress = (double)(step - 1 - spec->warmup_steps) / (double)(total_steps - spec->warmup_steps);
    switch (spec->schedule) {
    case SCHEDULE_LINEAR:
        return (float)(peak * (1 - progress));
    case SCHEDULE_COSINE:
        return (float)(peak * 0.5 * (1 + cos(M_PI * progress)));
    case SCHEDULE_CONSTANT:
        break;
    }
    return (float)peak;
}
