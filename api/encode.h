/* encode.h: parts that several resources' JSON has. Private to api/. New references; NULL when out of memory. */
#ifndef API_ENCODE_H
#define API_ENCODE_H

#include "api/resources.h"

/* jansson has no NaN: a number that is not known, or that diverged, is null. */
json_t *encode_number(double value);
json_t *encode_time(int64_t seconds); /* 0 -> null */
/* Text that the store keeps as JSON; null when there is none. */
json_t *encode_stored(const char *text);
/* {"code","message","param"}, or null. */
json_t *encode_job_error(const struct job_resource *job);

#endif
