/* decode.c: see decode.h. Any thread. */
#include "api/decode.h"

#include "api/text.h"
#include "base/buffer.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

json_t *decode_get(const struct decoder *decoder, const char *key)
{
    json_t *value = json_object_get(decoder->object, key);
    return json_is_null(value) ? NULL : value;
}

int decode_refuse(const struct decoder *decoder, const char *key, const char *format, ...)
{
    char param[128], words[768];
    snprintf(param, sizeof param, "%s%s", decoder->prefix, key);
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    return problem_set(decoder->problem, 400, "invalid_value", param, "%s: %s", param, words);
}

/* What a client sent, short enough for a message. */
static const char *shown(const json_t *value, char text[64])
{
    if (json_is_object(value) || json_is_array(value)) {
        snprintf(text, 64, "%s", json_is_object(value) ? "an object" : "an array");
        return text;
    }
    char *full = json_dumps(value, JSON_ENCODE_ANY | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(12));
    snprintf(text, 64, "%.55s%s", full ? full : "?", full && strlen(full) > 55 ? "..." : "");
    free(full);
    return text;
}

bool decode_as_integer(const json_t *json, int64_t *value)
{
    if (json_is_integer(json)) {
        *value = json_integer_value(json);
        return true;
    }
    double real = json_is_real(json) ? json_real_value(json) : 0.5;
    if (real != floor(real) || fabs(real) > 9007199254740992.0)
        return false;
    *value = (int64_t)real;
    return true;
}

int decode_integer(const struct decoder *decoder, const char *key, int64_t min, int64_t max, int64_t *value)
{
    const json_t *json = decode_get(decoder, key);
    int64_t number;
    char text[64];
    if (!json)
        return 0;
    if (!decode_as_integer(json, &number) || number < min || number > max)
        return decode_refuse(decoder, key, "must be an integer from %" PRId64 " to %" PRId64 ", not %s.", min,
                             max, shown(json, text));
    *value = number;
    return 0;
}

int decode_number(const struct decoder *decoder, const char *key, double min, bool exclusive, double max,
                  double *value)
{
    const json_t *json = decode_get(decoder, key);
    char text[64];
    if (!json)
        return 0;
    double number = json_number_value(json);
    if (!json_is_number(json) || number < min || (exclusive && number <= min) || number > max)
        return decode_refuse(decoder, key, "must be a number %s %g and at most %g, not %s.",
                             exclusive ? "greater than" : "of at least", min, max, shown(json, text));
    *value = number;
    return 0;
}

int decode_bool(const struct decoder *decoder, const char *key, bool *value)
{
    const json_t *json = decode_get(decoder, key);
    char text[64];
    if (!json)
        return 0;
    if (!json_is_boolean(json))
        return decode_refuse(decoder, key, "must be true or false, not %s.", shown(json, text));
    *value = json_is_true(json);
    return 0;
}

int decode_string(const struct decoder *decoder, const char *key, size_t max, const char **value)
{
    const json_t *json = decode_get(decoder, key);
    char text[64];
    if (!json)
        return 0;
    if (!json_is_string(json))
        return decode_refuse(decoder, key, "must be a string, not %s.", shown(json, text));
    size_t length = json_string_length(json);
    if (!length || length > max)
        return decode_refuse(decoder, key, "must be a string of 1 to %zu bytes; it has %zu.", max, length);
    *value = json_string_value(json);
    return 0;
}

int decode_choice(const struct decoder *decoder, const char *key, const char *const *names, size_t count,
                  int *value)
{
    const json_t *json = decode_get(decoder, key);
    char text[64];
    if (!json)
        return 0;
    for (size_t i = 0; json_is_string(json) && i < count; i++)
        if (!strcmp(json_string_value(json), names[i])) {
            *value = (int)i;
            return 0;
        }
    struct buffer list = {0};
    for (size_t i = 0; i < count; i++)
        buffer_printf(&list, "%s\"%s\"", i ? ", " : "", names[i]);
    decode_refuse(decoder, key, "must be one of %s, not %s.", list.data ? list.data : "", shown(json, text));
    buffer_free(&list);
    return -1;
}

int decode_object(const struct decoder *decoder, const char *key, json_t **value)
{
    json_t *json = decode_get(decoder, key);
    char text[64];
    if (!json)
        return 0;
    if (!json_is_object(json))
        return decode_refuse(decoder, key, "must be an object, not %s.", shown(json, text));
    *value = json;
    return 0;
}

bool decode_name_in(const char *name, const char *const *names, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (!strcmp(name, names[i]))
            return true;
    return false;
}

int decode_only(const struct decoder *decoder, const char *const *names, size_t count)
{
    /* jansson's iterators want a mutable object and change nothing. */
    json_t *object = (json_t *)(uintptr_t)decoder->object;
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        if (decode_name_in(key, names, count))
            continue;
        char param[128];
        snprintf(param, sizeof param, "%s%.60s", decoder->prefix, key);
        return problem_set(decoder->problem, 400, "unknown_parameter", param, "Unknown parameter: %s.",
                           param);
    }
    return 0;
}

int decode_metadata(const struct decoder *body, json_t **ret_metadata)
{
    json_t *metadata = NULL;
    if (decode_object(body, "metadata", &metadata))
        return -1;
    if (json_object_size(metadata) > 16)
        return decode_refuse(body, "metadata", "may hold at most 16 pairs; it has %zu.",
                             json_object_size(metadata));
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value)
    {
        if (!*key || text_count(key, strlen(key)) > 64)
            return decode_refuse(body, "metadata", "keys must be 1 to 64 characters long.");
        if (!json_is_string(value) || text_count(json_string_value(value), json_string_length(value)) > 512)
            return decode_refuse(body, "metadata",
                                 "the value of \"%.64s\" must be a string of at most 512 characters.", key);
    }
    *ret_metadata = metadata;
    return 0;
}
