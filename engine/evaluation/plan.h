/* plan.h: what an evaluation is to do: its tasks and shot counts as a list of units, each a (sub)task at one number of shots, and
 * where the documents are. Read from the daemon's order, checked against the documents before anything runs. One thread. */
#ifndef ENGINE_EVALUATION_PLAN_H
#define ENGINE_EVALUATION_PLAN_H

#include "engine/evaluation/prompts.h"

#include <jansson.h>

struct evaluation_unit {
    char name[128]; /* the task's, or TASK_SUBTASK */
    const struct task *task;
    int subtask;
    int32_t shots;
    int64_t count; /* documents; set by the check */
};

struct evaluation_plan {
    int n_tasks;
    struct task **tasks;
    int n_units, capacity;
    struct evaluation_unit *units;
    uint64_t seed;
    int64_t limit;      /* documents of a unit, 0 = all */
    int32_t max_length; /* as prompt_options' */
    bool share;
    const json_t *order;       /* the caller's; "files" and "data_dir" are looked up in it */
    struct task_source source; /* its pause is the caller's to set */
};

/* order: {"tasks": [{"name","definition": path}...], "num_fewshot": [n...], "limit": n|null, "seed", "max_length": n|null,
 * "share": bool, "data_dir": path|null, "files": {name: path}}. It outlives the plan. A task's name is that of its definition, or
 * with _SUBTASK or _GROUP behind it; null = the definition's. Errors name the definition and the place in it. */
int evaluation_plan_read(const json_t *order, struct evaluation_plan **ret_plan, struct error *error);
void evaluation_plan_free(struct evaluation_plan *plan);
/* Read and render every document and example, and count them. Errors name file and line. warnings: a list of texts is appended to, of
 * what makes results differ from the harness's. */
int evaluation_plan_check(struct evaluation_plan *plan, json_t *warnings, struct error *error);
int64_t evaluation_plan_examples(const struct evaluation_plan *plan);

#endif
