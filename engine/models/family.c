/* family.c: the table of model families, and how they read config.json. Pure. */
#include "engine/models/family.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const struct family *const families[] = {&family_mamba};

const struct family *family_find(const char *model_type)
{
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (!strcmp(families[i]->model_type, model_type))
            return families[i];
    return NULL;
}

int config_integer(const json_t *json, const char *key, int64_t fallback, int64_t low, int64_t high,
                   int64_t *ret_value, struct error *error)
{
    const json_t *value = json_object_get(json, key);
    if ((!value || json_is_null(value)) && fallback != CONFIG_REQUIRED) {
        *ret_value = fallback;
        return 0;
    }
    if (!json_is_integer(value) || json_integer_value(value) < low || json_integer_value(value) > high)
        return error_set_param(error, ERROR_INVALID, key,
                               "%s must be a whole number from %" PRId64 " to %" PRId64, key, low, high);
    *ret_value = json_integer_value(value);
    return 0;
}

int config_number(const json_t *json, const char *key, double fallback, double low, double high,
                  double *ret_value, struct error *error)
{
    const json_t *value = json_object_get(json, key);
    if (!value || json_is_null(value)) {
        *ret_value = fallback;
        return 0;
    }
    if (!json_is_number(value) || !(json_number_value(value) >= low && json_number_value(value) <= high))
        return error_set_param(error, ERROR_INVALID, key, "%s must be a number from %g to %g", key, low,
                               high);
    *ret_value = json_number_value(value);
    return 0;
}

int config_boolean(const json_t *json, const char *key, bool fallback, bool *ret_value, struct error *error)
{
    const json_t *value = json_object_get(json, key);
    if (value && !json_is_null(value) && !json_is_boolean(value))
        return error_set_param(error, ERROR_INVALID, key, "%s must be true or false", key);
    *ret_value = json_is_boolean(value) ? json_is_true(value) : fallback;
    return 0;
}

int config_choice(const json_t *json, const char *key, const char *fallback, const char *const *allowed,
                  const char **ret_value, struct error *error)
{
    const json_t *value = json_object_get(json, key);
    if (!value || json_is_null(value)) {
        *ret_value = fallback;
        return 0;
    }
    for (const char *const *one = allowed; *one; one++)
        if (json_is_string(value) && !strcmp(*one, json_string_value(value))) {
            *ret_value = *one;
            return 0;
        }
    char list[256] = "";
    for (const char *const *one = allowed; *one; one++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s\"%s\"", one == allowed ? "" : ", ",
                 *one);
    return error_set_param(error, ERROR_UNSUPPORTED, key, "%s must be one of %s", key, list);
}
