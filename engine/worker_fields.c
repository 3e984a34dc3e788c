/* worker_fields.c: see worker_fields.h. */
#include "engine/worker_fields.h"

static int wrong(struct error *error, const char *key, const json_t *value, const char *wanted)
{
    if (!value)
        return error_set_param(error, ERROR_INVALID, key, "\"%s\" is missing", key);
    return error_set_param(error, ERROR_INVALID, key, "\"%s\" must be %s", key, wanted);
}

int field_string(const json_t *payload, const char *key, const char **ret_value, struct error *error)
{
    const json_t *value = json_object_get(payload, key);
    if (!json_is_string(value))
        return wrong(error, key, value, "a string");
    *ret_value = json_string_value(value);
    return 0;
}

int field_optional_string(const json_t *payload, const char *key, const char **ret_value, struct error *error)
{
    const json_t *value = json_object_get(payload, key);
    if (!json_is_string(value) && !json_is_null(value))
        return wrong(error, key, value, "a string or null");
    *ret_value = json_string_value(value);
    return 0;
}

int field_boolean(const json_t *payload, const char *key, bool *ret_value, struct error *error)
{
    const json_t *value = json_object_get(payload, key);
    if (!json_is_boolean(value))
        return wrong(error, key, value, "true or false");
    *ret_value = json_is_true(value);
    return 0;
}

int field_integer(const json_t *payload, const char *key, int64_t least, int64_t most, int64_t *ret_value,
                  struct error *error)
{
    const json_t *value = json_object_get(payload, key);
    if (!json_is_integer(value))
        return wrong(error, key, value, "an integer");
    int64_t integer = json_integer_value(value);
    if (integer < least || integer > most)
        return error_set_param(error, ERROR_INVALID, key, "\"%s\" must be between %lld and %lld", key,
                               (long long)least, (long long)most);
    *ret_value = integer;
    return 0;
}

int field_number(const json_t *payload, const char *key, double *ret_value, struct error *error)
{
    const json_t *value = json_object_get(payload, key);
    if (!json_is_number(value))
        return wrong(error, key, value, "a number");
    *ret_value = json_number_value(value);
    return 0;
}

int field_array(const json_t *payload, const char *key, const json_t **ret_value, struct error *error)
{
    const json_t *value = json_object_get(payload, key);
    if (!json_is_array(value))
        return wrong(error, key, value, "an array");
    *ret_value = value;
    return 0;
}

int field_folder(const json_t *payload, const char *key, struct named_folder *ret_value, struct error *error)
{
    const json_t *value = json_object_get(payload, key);
    struct named_folder folder = {
        .id = json_string_value(json_object_get(value, "id")),
        .path = json_string_value(json_object_get(value, "path")),
    };
    if (!folder.id || !folder.path)
        return wrong(error, key, value, "an object with \"id\" and \"path\"");
    *ret_value = folder;
    return 0;
}

int field_optional_folder(const json_t *payload, const char *key, struct named_folder *ret_value,
                          struct error *error)
{
    if (json_is_null(json_object_get(payload, key))) {
        *ret_value = (struct named_folder){0};
        return 0;
    }
    return field_folder(payload, key, ret_value, error);
}
