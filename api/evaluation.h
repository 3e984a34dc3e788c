/* evaluation.h: units of an evaluation put together. Private to api/. */
#ifndef API_EVALUATION_H
#define API_EVALUATION_H

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

#endif
