/* plan.c: see plan.h. */
#include "engine/evaluation/plan.h"

#include "base/file.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_DEFINITION_BYTES = 4 << 20, MAX_SHOTS = 256, MAX_UNITS = 1 << 16 };

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for an evaluation");
}

/* ---- documents ---- */

/* An uploaded file of that name, whole or its last part, or one in the data folder. */
static int find_file(void *arg, const char *name, char **ret_path, struct error *error)
{
    const struct evaluation_plan *plan = arg;
    const json_t *files = json_object_get(plan->order, "files");
    const char *folder = json_string_value(json_object_get(plan->order, "data_dir"));
    const char *last = strrchr(name, '/');
    const char *uploaded = json_string_value(json_object_get(files, name));
    char *path = NULL;
    if (!uploaded && last)
        uploaded = json_string_value(json_object_get(files, last + 1));
    *ret_path = NULL;
    if (uploaded) {
        *ret_path = strdup(uploaded);
        return *ret_path ? 0 : no_memory(error);
    }
    if (!folder || strstr(name, "..") || name[0] == '/')
        return 0;
    if (asprintf(&path, "%s/%s", folder, name) < 0)
        return no_memory(error);
    if (access(path, R_OK)) {
        free(path);
        path = NULL;
    }
    *ret_path = path;
    return 0;
}

/* ---- tasks ---- */

static int add_unit(struct evaluation_plan *plan, const struct task *task, int subtask, int32_t shots,
                    struct error *error)
{
    if (plan->n_units == MAX_UNITS)
        return error_set_param(error, ERROR_INVALID, "tasks", "more than %d tasks and shot counts",
                               MAX_UNITS);
    if (plan->n_units == plan->capacity) {
        int capacity = plan->capacity ? 2 * plan->capacity : 64;
        struct evaluation_unit *units = realloc(plan->units, (size_t)capacity * sizeof *units);
        if (!units)
            return no_memory(error);
        plan->units = units;
        plan->capacity = capacity;
    }
    struct evaluation_unit *unit = &plan->units[plan->n_units++];
    *unit = (struct evaluation_unit){.task = task, .subtask = subtask, .shots = shots};
    snprintf(unit->name, sizeof unit->name, "%s%s%s", task->name, subtask < 0 ? "" : "_",
             subtask < 0 ? "" : task->subtasks[subtask].name);
    return 0;
}

/* Is the subtask meant by what stands behind the task's name? */
static bool is_meant(const struct subtask *subtask, const char *rest)
{
    return !*rest || !strcmp(rest + 1, subtask->name) || !strcmp(rest + 1, subtask->group);
}

static int add_units(struct evaluation_plan *plan, const struct task *task, const char *name,
                     const json_t *shots, struct error *error)
{
    const char *rest = name + strlen(task->name);
    size_t before = (size_t)plan->n_units, i;
    const json_t *item;
    if (strncmp(name, task->name, strlen(task->name)) || (*rest && *rest != '_'))
        return error_set_param(error, ERROR_INVALID, "tasks", "the definition of %s is of %s", name,
                               task->name);
    json_array_foreach(shots, i, item)
    {
        int32_t n = (int32_t)json_integer_value(item);
        int status = 0;
        if (!json_is_integer(item) || n < 0 || n > MAX_SHOTS)
            return error_set_param(error, ERROR_INVALID, "num_fewshot", "num_fewshot is 0 to %d", MAX_SHOTS);
        if (!task->n_subtasks && !*rest)
            status = add_unit(plan, task, -1, n, error);
        for (int j = 0; !status && j < task->n_subtasks; j++)
            if (is_meant(&task->subtasks[j], rest))
                status = add_unit(plan, task, j, n, error);
        if (status)
            return status;
    }
    if ((size_t)plan->n_units == before)
        return error_set_param(error, ERROR_NOT_FOUND, "tasks", "there is no task '%s'", name);
    return 0;
}

static int add_task(struct evaluation_plan *plan, const json_t *named, struct error *error)
{
    const char *name = json_string_value(json_object_get(named, "name"));
    const char *path = json_string_value(json_object_get(named, "definition"));
    char *text;
    size_t length;
    if (!path)
        return error_set_param(error, ERROR_INVALID, "tasks", "a task without a definition");
    int status = file_read(path, MAX_DEFINITION_BYTES, &text, &length, error);
    if (status)
        return status;
    struct task *task = NULL;
    status = task_parse(text, length, &task, error);
    free(text);
    if (status) {
        error_prefix(error, "the definition%s%s: ", name ? " of " : "", name ? name : "");
        snprintf(error->param, sizeof error->param, "tasks");
        return status;
    }
    plan->tasks[plan->n_tasks++] = task;
    return add_units(plan, task, name ? name : task->name, json_object_get(plan->order, "num_fewshot"),
                     error);
}

/* Results are kept by unit: two of one name would be taken for one. */
static int refuse_twice(const struct evaluation_plan *plan, struct error *error)
{
    json_t *seen = json_object();
    int status = seen ? 0 : no_memory(error);
    for (int i = 0; !status && i < plan->n_units; i++) {
        const struct evaluation_unit *unit = &plan->units[i];
        char key[sizeof unit->name + 16];
        snprintf(key, sizeof key, "%s/%" PRId32, unit->name, unit->shots);
        if (json_object_get(seen, key))
            status = error_set_param(error, ERROR_INVALID, "tasks",
                                     "%s at %" PRId32 " shots is there twice, by two of the tasks",
                                     unit->name, unit->shots);
        else if (json_object_set_new(seen, key, json_true()))
            status = no_memory(error);
    }
    json_decref(seen);
    return status;
}

int evaluation_plan_read(const json_t *order, struct evaluation_plan **ret_plan, struct error *error)
{
    const json_t *tasks = json_object_get(order, "tasks");
    size_t count = json_array_size(tasks);
    struct evaluation_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return no_memory(error);
    *plan = (struct evaluation_plan){
        .seed = (uint64_t)json_integer_value(json_object_get(order, "seed")),
        .limit = json_integer_value(json_object_get(order, "limit")),
        .max_length = (int32_t)json_integer_value(json_object_get(order, "max_length")),
        .share = !json_is_false(json_object_get(order, "share")),
        .order = order,
    };
    plan->source = (struct task_source){.arg = plan, .find = find_file};
    plan->tasks = calloc(count + 1, sizeof *plan->tasks);
    int status = plan->tasks ? 0 : no_memory(error);
    for (size_t i = 0; !status && i < count; i++)
        status = add_task(plan, json_array_get(tasks, i), error);
    if (!status && !plan->n_units)
        status = error_set_param(error, ERROR_INVALID, "tasks", "no task");
    if (!status)
        status = refuse_twice(plan, error);
    if (status)
        evaluation_plan_free(plan);
    else
        *ret_plan = plan;
    return status;
}

void evaluation_plan_free(struct evaluation_plan *plan)
{
    if (!plan)
        return;
    for (int i = 0; i < plan->n_tasks; i++)
        task_free(plan->tasks[i]);
    free(plan->tasks);
    free(plan->units);
    free(plan);
}

/* Once for all shot counts of a task. */
static void warn_of_pool(const struct prompts *prompts, const struct evaluation_unit *unit, json_t *warnings)
{
    const char *missing = prompts_missing_pool(prompts);
    if (!missing)
        return;
    json_t *warning = json_sprintf("%s takes its examples from %s: there is no file of the split %s",
                                   unit->name, prompts_pool_file(prompts), missing);
    for (size_t i = 0; i < json_array_size(warnings); i++)
        if (json_equal(json_array_get(warnings, i), warning)) {
            json_decref(warning);
            return;
        }
    json_array_append_new(warnings, warning);
}

/* More shots use all that fewer do: every text is rendered once, for the most of them. */
static int check_unit(const struct evaluation_plan *plan, struct evaluation_unit *unit, bool render,
                      json_t *warnings, struct error *error)
{
    const struct prompt_options options = {.shots = unit->shots, .limit = plan->limit};
    struct prompts *prompts;
    int status = prompts_open(unit->task, unit->subtask, &options, &plan->source, NULL, &prompts, error);
    if (status)
        return status;
    unit->count = prompts_count(prompts);
    warn_of_pool(prompts, unit, warnings);
    if (render)
        status = prompts_check(prompts, error);
    prompts_free(prompts);
    return status;
}

int evaluation_plan_check(struct evaluation_plan *plan, json_t *warnings, struct error *error)
{
    int32_t most = 0;
    for (int i = 0; i < plan->n_units; i++)
        most = plan->units[i].shots > most ? plan->units[i].shots : most;
    for (int i = 0; i < plan->n_units; i++) {
        struct evaluation_unit *unit = &plan->units[i];
        int status = check_unit(plan, unit, unit->shots == most, warnings, error);
        if (status)
            return error_prefix(error, "%s at %" PRId32 " shots: ", unit->name, unit->shots);
    }
    return 0;
}

int64_t evaluation_plan_examples(const struct evaluation_plan *plan)
{
    int64_t examples = 0;
    for (int i = 0; i < plan->n_units; i++)
        examples += plan->units[i].count;
    return examples;
}
