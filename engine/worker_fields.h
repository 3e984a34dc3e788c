/* worker_fields.h: members of a frame's payload, checked. Each returns 0 or ERROR_INVALID with the member's
 * name as error->param. Strings point into the payload. Pure. */
#ifndef ENGINE_WORKER_FIELDS_H
#define ENGINE_WORKER_FIELDS_H

#include "base/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

int field_string(const json_t *payload, const char *key, const char **ret_value, struct error *error);
/* *ret_value is NULL for null. */
int field_optional_string(const json_t *payload, const char *key, const char **ret_value,
                          struct error *error);
int field_boolean(const json_t *payload, const char *key, bool *ret_value, struct error *error);
int field_integer(const json_t *payload, const char *key, int64_t least, int64_t most, int64_t *ret_value,
                  struct error *error);
int field_number(const json_t *payload, const char *key, double *ret_value, struct error *error);
int field_array(const json_t *payload, const char *key, const json_t **ret_value, struct error *error);
/* {"id","path"}. */
struct named_folder {
    const char *id;
    const char *path;
};
int field_folder(const json_t *payload, const char *key, struct named_folder *ret_value, struct error *error);
/* The same or null: then id and path are NULL. */
int field_optional_folder(const json_t *payload, const char *key, struct named_folder *ret_value,
                          struct error *error);

#endif
