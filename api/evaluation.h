/* evaluation.h: units of an evaluation put together; what requests for evaluations have in common. Private to api/. */
#ifndef API_EVALUATION_H
#define API_EVALUATION_H

#include "api/decode.h"
#include "api/resources.h"

#include <stddef.h>

/* Does it have this metric? */
bool evaluation_unit_has(const struct evaluation_unit_resource *unit, const char *metric);
/* The sum over subtasks of one model, precision and shot count: micro is its mean over all examples, macro over subtasks. */
struct evaluation_sum {
    char task[160];                               /* the definition's task, or with _GROUP behind it */
    const struct evaluation_unit_resource *first; /* of what is summed: model, precision, shots, metrics */
    int64_t n_units, n, acc, acc_norm;
    int64_t tokens, tokens_run;
    double seconds;
    double micro_variance[2], macro[2], macro_variance[2]; /* of acc, acc_norm: sums */
    int64_t micro_freedom;
};
/* Sums over every task that has subtasks, and their groups, in the order of the units. *ret_sums: free() it. Returns how many, or
 * -1 (no memory). */
int64_t evaluation_sum_up(const struct evaluation_unit_resource *units, size_t count,
                          struct evaluation_sum **ret_sums);

/* evaluation_request.c: the keys of an evaluation but for its models and metadata, into settings without models (a new reference,
 * NULL with a problem) and the seed; and the settings as clients know them. */
enum { EVALUATION_KEYS = 7 };
extern const char *const evaluation_keys[EVALUATION_KEYS];
json_t *evaluation_settings_decode(const struct decoder *body, int64_t *ret_seed);
json_t *evaluation_settings_encode(const json_t *settings, int64_t seed);
/* A list of one or several names. NULL with a problem. */
json_t *evaluation_names_decode(const struct decoder *body, const char *key, size_t max);

/* job_evaluations.c: "evaluations" of a fine-tuning job into what struct job_request holds; *ret_evaluations stays as it is where there
 * are none. */
int job_evaluations_decode(const struct decoder *body, json_t **ret_evaluations);
/* As clients see it, with the evaluations that were made. null where evaluations is NULL. */
json_t *job_evaluations_encode(const char *evaluations, const char *jobs);

#endif
