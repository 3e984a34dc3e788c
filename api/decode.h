/* decode.h: reading one JSON object field by field, each with its range. Private to api/.
 *
 * Every function leaves *value alone (the default the caller put there) when the key is absent or null,
 * returns 0, or returns -1 with *problem naming the field and what it may be. */
#ifndef API_DECODE_H
#define API_DECODE_H

#include "api/problem.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct decoder {
    const json_t *object; /* NULL reads as an empty object */
    const char *prefix;   /* of the fields' names in problems: "", "hyperparameters.lora." ... */
    struct problem *problem;
};

/* The value of key; NULL when absent or null. */
json_t *decode_get(const struct decoder *decoder, const char *key);
/* A problem 400 about key: "PREFIX.KEY: WORDS". */
int decode_refuse(const struct decoder *decoder, const char *key, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
int decode_integer(const struct decoder *decoder, const char *key, int64_t min, int64_t max, int64_t *value);
/* exclusive: min itself is out of range. */
int decode_number(const struct decoder *decoder, const char *key, double min, bool exclusive, double max,
                  double *value);
int decode_bool(const struct decoder *decoder, const char *key, bool *value);
/* The string stays the object's. At most max bytes, at least one. */
int decode_string(const struct decoder *decoder, const char *key, size_t max, const char **value);
/* One of the names; *value is its index. */
int decode_choice(const struct decoder *decoder, const char *key, const char *const *names, size_t count,
                  int *value);
/* An object, or NULL. */
int decode_object(const struct decoder *decoder, const char *key, json_t **value);
/* Refuses by name the first key that is not among the names. */
int decode_only(const struct decoder *decoder, const char *const *names, size_t count);
bool decode_name_in(const char *name, const char *const *names, size_t count);
/* Is it an integer, or a real that is one? */
bool decode_as_integer(const json_t *json, int64_t *value);
/* The object "metadata": at most 16 pairs, keys of 64, values of 512 characters. */
int decode_metadata(const struct decoder *decoder, json_t **ret_metadata);

#endif
