/* task_definition.c: a definition's JSON to struct task, strictly. See task.h. */
#include "engine/evaluation/task.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SPLITS = 16, MAX_FILES = 16, MAX_FIELDS = 64, MAX_SUBTASKS = 1024, MAX_NAME = 63 };

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for a task");
}

/* Does `object` have keys of this list alone? The list is closed by NULL. */
static int check_keys(const json_t *object, struct error *error, const char *first, ...)
{
    const char *key;
    const json_t *value;
    json_object_foreach((json_t *)(uintptr_t)object, key, value)
    {
        bool known = false;
        va_list names;
        va_start(names, first);
        for (const char *name = first; name && !known; name = va_arg(names, const char *))
            known = !strcmp(key, name);
        va_end(names);
        if (!known)
            return error_set(error, ERROR_INVALID, "there is no key '%.60s' here", key);
    }
    return 0;
}

static bool is_name(const char *text)
{
    size_t length = strlen(text);
    return length && length <= MAX_NAME && strspn(text, "abcdefghijklmnopqrstuvwxyz0123456789_") == length;
}

/* A copy of the string at key; fallback (may be NULL) when it is absent. */
static int take_string(const json_t *object, const char *key, const char *fallback, char **ret_string,
                       struct error *error)
{
    const json_t *value = json_object_get(object, key);
    const char *string = value ? json_string_value(value) : fallback;
    if (!string)
        return error_set(error, ERROR_INVALID, "%s: %s", key, value ? "not a string" : "missing");
    if (json_is_string(value) && strlen(string) != json_string_length(value))
        return error_set(error, ERROR_INVALID, "%s: a NUL character", key);
    *ret_string = strdup(string);
    return *ret_string ? 0 : no_memory(error);
}

static int take_template(const json_t *value, struct template **ret_template, struct error *error)
{
    const char *text = json_string_value(value);
    if (!text)
        return error_set(error, ERROR_INVALID, value ? "not a string" : "missing");
    return template_parse(text, ret_template, error);
}

static int take_template_at(const json_t *object, const char *key, struct template **ret_template,
                            struct error *error)
{
    int status = take_template(json_object_get(object, key), ret_template, error);
    return status ? error_prefix(error, "%s: ", key) : 0;
}

static int take_template_list(const json_t *object, const char *key, struct template_list *list,
                              struct error *error)
{
    const json_t *value = json_object_get(object, key);
    list->single = !json_is_array(value);
    size_t count = list->single ? 1 : json_array_size(value);
    if (!value || count < 1 || count > TASK_MAX_CHOICES)
        return error_set(error, ERROR_INVALID, "%s: %s", key,
                         value ? "1 to 256 templates, or one that is a list" : "missing");
    if (!(list->items = calloc(count, sizeof *list->items)))
        return no_memory(error);
    for (; list->count < (int)count; list->count++) {
        const json_t *item = list->single ? value : json_array_get(value, (size_t)list->count);
        int status = take_template(item, &list->items[list->count], error);
        if (status && list->single)
            return error_prefix(error, "%s: ", key);
        if (status)
            return error_prefix(error, "%s[%d]: ", key, list->count);
    }
    return 0;
}

/* ---- splits ---- */

static int take_columns(const json_t *columns, struct task_file *file, struct error *error)
{
    size_t count = json_array_size(columns);
    if (!columns)
        return 0;
    if (file->format == DOCUMENTS_JSONL || !count || count > MAX_FIELDS)
        return error_set(error, ERROR_INVALID, "columns: 1 to %d names of a csv or tsv file", MAX_FIELDS);
    if (!(file->columns = calloc(count, sizeof *file->columns)))
        return no_memory(error);
    for (; file->n_columns < (int)count; file->n_columns++) {
        const char *name = json_string_value(json_array_get(columns, (size_t)file->n_columns));
        if (!name)
            return error_set(error, ERROR_INVALID, "columns[%d]: not a string", file->n_columns);
        if (!(file->columns[file->n_columns] = strdup(name)))
            return no_memory(error);
    }
    return 0;
}

static int take_fields(const json_t *fields, struct task_file *file, struct error *error)
{
    const char *name;
    const json_t *value;
    if (!fields)
        return 0;
    size_t count = json_object_size(fields);
    if (!json_is_object(fields) || !count || count > MAX_FIELDS)
        return error_set(error, ERROR_INVALID, "fields: an object of 1 to %d templates", MAX_FIELDS);
    if (!(file->fields = calloc(count, sizeof *file->fields)))
        return no_memory(error);
    json_object_foreach((json_t *)(uintptr_t)fields, name, value)
    {
        struct task_field *field = &file->fields[file->n_fields++];
        int status = take_template(value, &field->value, error);
        if (status)
            return error_prefix(error, "fields.%.60s: ", name);
        if (!(field->name = strdup(name)))
            return no_memory(error);
    }
    return 0;
}

static int take_file(const json_t *object, struct task_file *file, struct error *error)
{
    static const char *const formats[] = {"jsonl", "csv", "tsv"};
    if (!json_is_object(object))
        return error_set(error, ERROR_INVALID, "not an object");
    int status = check_keys(object, error, "file", "format", "columns", "fields", NULL);
    if (!status)
        status = take_template_at(object, "file", &file->path, error);
    if (status)
        return status;
    const char *format = json_string_value(json_object_get(object, "format"));
    size_t i = 0;
    while (i < 3 && (!format || strcmp(format, formats[i])))
        i++;
    if (i == 3)
        return error_set(error, ERROR_INVALID, "format: one of jsonl, csv, tsv");
    file->format = (enum document_format)i;
    status = take_columns(json_object_get(object, "columns"), file, error);
    return status ? status : take_fields(json_object_get(object, "fields"), file, error);
}

static int take_split(const char *name, const json_t *files, struct task_split *split, struct error *error)
{
    size_t count = json_array_size(files);
    if (!count || count > MAX_FILES)
        return error_set(error, ERROR_INVALID, "splits.%.60s: a list of 1 to %d files", name, MAX_FILES);
    split->name = strdup(name);
    split->files = calloc(count, sizeof *split->files);
    if (!split->name || !split->files)
        return no_memory(error);
    for (size_t i = 0; i < count; i++) {
        int status = take_file(json_array_get(files, i), &split->files[split->n_files++], error);
        if (status)
            return error_prefix(error, "splits.%.60s[%zu].", name, i);
    }
    return 0;
}

static int take_splits(const json_t *root, struct task *task, struct error *error)
{
    const json_t *splits = json_object_get(root, "splits"), *files;
    const char *name;
    size_t count = json_object_size(splits);
    if (!count || count > MAX_SPLITS)
        return error_set(error, ERROR_INVALID, "splits: %s",
                         splits ? "an object of 1 to 16 lists of files" : "missing");
    if (!(task->splits = calloc(count, sizeof *task->splits)))
        return no_memory(error);
    json_object_foreach((json_t *)(uintptr_t)splits, name, files)
    {
        int status = take_split(name, files, &task->splits[task->n_splits++], error);
        if (status)
            return status;
    }
    return 0;
}

static int find_split(const struct task *task, const json_t *name, int *ret_split, struct error *error)
{
    const char *wanted = json_string_value(name);
    for (int i = 0; wanted && i < task->n_splits; i++) {
        if (!strcmp(task->splits[i].name, wanted)) {
            *ret_split = i;
            return 0;
        }
    }
    if (!wanted)
        return error_set(error, ERROR_INVALID, name ? "not a string" : "missing");
    return error_set(error, ERROR_INVALID, "there is no split '%.60s'", wanted);
}

static int take_fewshot(const json_t *root, struct task *task, struct error *error)
{
    const json_t *fewshot = json_object_get(root, "fewshot");
    if (!fewshot)
        return 0;
    const json_t *from = json_object_get(fewshot, "from"), *sampler = json_object_get(fewshot, "sampler"),
                 *exclude = json_object_get(fewshot, "exclude_document");
    if (!json_is_object(fewshot))
        return error_set(error, ERROR_INVALID, "fewshot: not an object");
    int status = check_keys(fewshot, error, "from", "sampler", "exclude_document", NULL);
    if (status)
        return error_prefix(error, "fewshot: ");
    size_t count = json_array_size(from);
    if (!count || count > MAX_SPLITS)
        return error_set(error, ERROR_INVALID, "fewshot.from: a list of splits");
    if (!(task->pools = calloc(count, sizeof *task->pools)))
        return no_memory(error);
    for (size_t i = 0; i < count; i++) {
        status = find_split(task, json_array_get(from, i), &task->pools[task->n_pools++], error);
        if (status)
            return error_prefix(error, "fewshot.from[%zu]: ", i);
    }
    const char *name = sampler ? json_string_value(sampler) : "random";
    if (!name || (strcmp(name, "random") && strcmp(name, "first")))
        return error_set(error, ERROR_INVALID, "fewshot.sampler: random or first");
    if (exclude && !json_is_boolean(exclude))
        return error_set(error, ERROR_INVALID, "fewshot.exclude_document: true or false");
    task->first_n = !strcmp(name, "first");
    task->exclude_document = exclude ? json_is_true(exclude) : -1;
    return 0;
}

/* ---- the rest ---- */

static int take_gold(const json_t *root, struct task *task, struct error *error)
{
    const json_t *gold = json_object_get(root, "gold");
    if (!json_is_object(gold))
        return take_template_at(root, "gold", &task->gold, error);
    int status = check_keys(gold, error, "value", "among", NULL);
    if (!status)
        status = take_template_at(gold, "value", &task->gold, error);
    if (!status)
        status = take_template_list(gold, "among", &task->gold_among, error);
    return status ? error_prefix(error, "gold.") : 0;
}

static int refuse_keys(const json_t *root, const char *because, struct error *error, const char *first, ...)
{
    va_list names;
    va_start(names, first);
    const char *found = NULL;
    for (const char *name = first; name && !found; name = va_arg(names, const char *))
        found = json_object_get(root, name) ? name : NULL;
    va_end(names);
    return found ? error_set(error, ERROR_INVALID, "%s: not beside '%s'", found, because) : 0;
}

static int take_prompt(const json_t *root, struct task *task, struct error *error)
{
    int status;
    if (json_object_get(root, "target")) {
        task->kind = TASK_TARGET;
        status = refuse_keys(root, "target", error, "choices", "contexts", "continuation", "gold", NULL);
        if (!status)
            status = take_template_at(root, "context", &task->context, error);
        return status ? status : take_template_at(root, "target", &task->continuation, error);
    }
    if (json_object_get(root, "contexts")) {
        task->kind = TASK_CONTEXTS;
        status = refuse_keys(root, "contexts", error, "choices", "context", NULL);
        if (!status)
            status = take_template_list(root, "contexts", &task->choices, error);
        if (!status)
            status = take_template_at(root, "continuation", &task->continuation, error);
    } else {
        task->kind = TASK_CHOICES;
        status = refuse_keys(root, "choices", error, "continuation", NULL);
        if (!status)
            status = take_template_at(root, "context", &task->context, error);
        if (!status)
            status = take_template_list(root, "choices", &task->choices, error);
    }
    return status ? status : take_gold(root, task, error);
}

static int take_metrics(const json_t *root, struct task *task, struct error *error)
{
    static const struct {
        const char *name;
        unsigned bit;
    } known[] = {{"acc", METRIC_ACC}, {"acc_norm", METRIC_ACC_NORM}, {"perplexity", METRIC_PERPLEXITY}};
    const json_t *metrics = json_object_get(root, "metrics");
    unsigned allowed =
        task->kind == TASK_TARGET ? METRIC_ACC | METRIC_PERPLEXITY : METRIC_ACC | METRIC_ACC_NORM;
    for (size_t i = 0; i < json_array_size(metrics); i++) {
        const char *name = json_string_value(json_array_get(metrics, i));
        size_t j = 0;
        while (j < 3 && (!name || strcmp(known[j].name, name)))
            j++;
        if (j == 3 || !(known[j].bit & allowed))
            return error_set(error, ERROR_INVALID, "metrics[%zu]: %s", i,
                             task->kind == TASK_TARGET ? "of a target: perplexity or acc"
                                                       : "of choices: acc or acc_norm");
        task->metrics |= known[j].bit;
    }
    if (!task->metrics)
        return error_set(error, ERROR_INVALID, "metrics: %s", metrics ? "a list of names" : "missing");
    return 0;
}

static int take_group(const char *group, const json_t *names, struct task *task, struct error *error)
{
    size_t count = json_array_size(names);
    if (!is_name(group) || !count)
        return error_set(error, ERROR_INVALID, "subtasks.groups.%.60s: a list of names", group);
    if (count > (size_t)(MAX_SUBTASKS - task->n_subtasks))
        return error_set(error, ERROR_INVALID, "subtasks.groups.%.60s: more than %d subtasks", group,
                         MAX_SUBTASKS);
    struct subtask *grown =
        realloc(task->subtasks, ((size_t)task->n_subtasks + count) * sizeof *task->subtasks);
    if (!grown)
        return no_memory(error);
    task->subtasks = grown;
    for (size_t i = 0; i < count; i++) {
        const char *name = json_string_value(json_array_get(names, i));
        if (!name || !is_name(name))
            return error_set(error, ERROR_INVALID, "subtasks.groups.%.60s[%zu]: letters a-z, digits, _",
                             group, i);
        for (int j = 0; j < task->n_subtasks; j++)
            if (!strcmp(task->subtasks[j].name, name))
                return error_set(error, ERROR_INVALID, "subtasks.groups.%.60s[%zu]: '%s' is there already",
                                 group, i, name);
        struct subtask *subtask = &task->subtasks[task->n_subtasks++];
        subtask->name = strdup(name);
        subtask->group = strdup(group);
        if (!subtask->name || !subtask->group)
            return no_memory(error);
    }
    return 0;
}

static int take_subtasks(const json_t *root, struct task *task, struct error *error)
{
    const json_t *subtasks = json_object_get(root, "subtasks"), *groups, *names;
    const char *group;
    if (!subtasks)
        return 0;
    groups = json_object_get(subtasks, "groups");
    int status = check_keys(subtasks, error, "field", "groups", NULL);
    if (!status)
        status = take_string(subtasks, "field", NULL, &task->subtask_field, error);
    if (!status && (!json_object_size(groups) || json_object_size(groups) > MAX_SUBTASKS))
        status = error_set(error, ERROR_INVALID, "groups: an object of lists of names");
    if (status)
        return error_prefix(error, "subtasks.");
    json_object_foreach((json_t *)(uintptr_t)groups, group, names)
    {
        status = take_group(group, names, task, error);
        if (status)
            return status;
    }
    return 0;
}

static int take_all(const json_t *root, struct task *task, struct error *error)
{
    int status = check_keys(root, error, "task", "source", "splits", "documents", "fewshot", "description",
                            "context", "choices", "contexts", "continuation", "target", "gold",
                            "target_delimiter", "fewshot_delimiter", "metrics", "subtasks", NULL);
    if (!status)
        status = take_string(root, "task", NULL, &task->name, error);
    if (!status && !is_name(task->name))
        status = error_set(error, ERROR_INVALID, "task: 1 to %d of a-z, digits and _", MAX_NAME);
    if (!status)
        status = take_string(root, "source", "", &task->source, error);
    if (!status)
        status = take_splits(root, task, error);
    if (!status && (status = find_split(task, json_object_get(root, "documents"), &task->documents, error)))
        error_prefix(error, "documents: ");
    if (!status)
        status = take_fewshot(root, task, error);
    if (!status && json_object_get(root, "description"))
        status = take_template_at(root, "description", &task->description, error);
    if (!status)
        status = take_prompt(root, task, error);
    if (!status)
        status = take_string(root, "target_delimiter", " ", &task->target_delimiter, error);
    if (!status)
        status = take_string(root, "fewshot_delimiter", "\n\n", &task->fewshot_delimiter, error);
    if (!status)
        status = take_metrics(root, task, error);
    return status ? status : take_subtasks(root, task, error);
}

int task_parse(const char *text, size_t length, struct task **ret_task, struct error *error)
{
    json_error_t why;
    json_t *root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why);
    if (!root)
        return error_set(error, ERROR_INVALID, "line %d, column %d: %s", why.line, why.column, why.text);
    struct task *task = calloc(1, sizeof *task);
    int status = 0;
    if (!task)
        status = no_memory(error);
    else if (!json_is_object(root))
        status = error_set(error, ERROR_INVALID, "a definition is a JSON object");
    else
        status = take_all(root, task, error);
    json_decref(root);
    if (status)
        task_free(task);
    else
        *ret_task = task;
    return status;
}

/* ---- the end ---- */

static void free_list(struct template_list *list)
{
    for (int i = 0; i < list->count; i++)
        template_free(list->items[i]);
    free(list->items);
}

static void free_file(struct task_file *file)
{
    template_free(file->path);
    for (int i = 0; i < file->n_columns; i++)
        free(file->columns[i]);
    free(file->columns);
    for (int i = 0; i < file->n_fields; i++) {
        free(file->fields[i].name);
        template_free(file->fields[i].value);
    }
    free(file->fields);
}

void task_free(struct task *task)
{
    if (!task)
        return;
    for (int i = 0; i < task->n_splits; i++) {
        for (int j = 0; j < task->splits[i].n_files; j++)
            free_file(&task->splits[i].files[j]);
        free(task->splits[i].files);
        free(task->splits[i].name);
    }
    for (int i = 0; i < task->n_subtasks; i++) {
        free(task->subtasks[i].name);
        free(task->subtasks[i].group);
    }
    template_free(task->description);
    template_free(task->context);
    template_free(task->continuation);
    template_free(task->gold);
    free_list(&task->choices);
    free_list(&task->gold_among);
    free(task->splits);
    free(task->pools);
    free(task->subtasks);
    free(task->subtask_field);
    free(task->target_delimiter);
    free(task->fewshot_delimiter);
    free(task->source);
    free(task->name);
    free(task);
}
