/* task.c: documents of a task and what it makes of each. See task.h. */
#include "engine/evaluation/task.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LIST_BYTES = 16 << 20, MAX_FILE_NAME = 255 };

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for a document");
}

/* ---- rendering ---- */

static int render(const struct template *template, const json_t *document, const char *key, char **ret_text,
                  struct error *error)
{
    struct buffer text = {0};
    int status = template_text(template, document, &text, error);
    if (status) {
        buffer_free(&text);
        return error_prefix(error, "%s: ", key);
    }
    *ret_text = buffer_take(&text, NULL);
    return *ret_text ? 0 : no_memory(error);
}

static void free_texts(char **texts, int count)
{
    for (int i = 0; i < count; i++)
        free(texts[i]);
    free(texts);
}

/* The list as texts, all there or none. */
static int render_list(const struct template_list *list, const json_t *document, const char *key,
                       char ***ret_texts, int *ret_count, struct error *error)
{
    json_t *value = NULL;
    int status = 0;
    size_t count = (size_t)list->count;
    if (list->single) {
        status = template_value(list->items[0], document, &value, error);
        if (!status && !json_is_array(value))
            status = error_set(error, ERROR_INVALID, "not a list");
        count = json_array_size(value);
        if (!status && (count < 1 || count > TASK_MAX_CHOICES))
            status =
                error_set(error, ERROR_INVALID, "a list of %zu items (1 to %d)", count, TASK_MAX_CHOICES);
        if (status) {
            json_decref(value);
            return error_prefix(error, "%s: ", key);
        }
    }
    char **texts = calloc(count, sizeof *texts);
    size_t bytes = 0;
    if (!texts)
        status = no_memory(error);
    for (size_t i = 0; !status && i < count; i++) {
        struct buffer text = {0};
        if (list->single) {
            const json_t *item = json_array_get(value, i);
            if (json_is_string(item))
                buffer_append(&text, json_string_value(item), json_string_length(item));
            else
                status = error_set(error, ERROR_INVALID, "%s[%zu]: not text", key, i);
        } else if ((status = template_text(list->items[i], document, &text, error))) {
            error_prefix(error, "%s[%zu]: ", key, i);
        }
        bytes += text.length;
        if (!status && bytes > MAX_LIST_BYTES)
            status = error_set(error, ERROR_INVALID, "%s: more than %d bytes of text", key, MAX_LIST_BYTES);
        if (!status && !(texts[i] = buffer_take(&text, NULL)))
            status = no_memory(error);
        buffer_free(&text);
    }
    json_decref(value);
    if (status)
        free_texts(texts, texts ? (int)count : 0);
    else {
        *ret_texts = texts;
        *ret_count = (int)count;
    }
    return status;
}

static int index_among(const char *text, char **texts, int count)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(texts[i], text))
            return i;
    return -1;
}

/* The index that digits say, or a boolean (false, true), or -1. */
static int64_t index_said(const char *text)
{
    size_t length = strlen(text);
    if (!strcmp(text, "True") || !strcmp(text, "False"))
        return text[0] == 'T';
    return length && length < 10 && strspn(text, "0123456789") == length ? strtol(text, NULL, 10) : -1;
}

static int find_gold(const struct task *task, const json_t *document, struct task_text *text,
                     struct error *error)
{
    char *value, **among = NULL;
    int n_among = 0, status = render(task->gold, document, "gold", &value, error);
    if (status)
        return status;
    int64_t gold;
    if (task->gold_among.count) {
        status = render_list(&task->gold_among, document, "gold.among", &among, &n_among, error);
        gold = status ? -1 : index_among(value, among, n_among);
        if (!status && gold < 0)
            status = error_set(error, ERROR_INVALID, "gold: '%.60s' is none of gold.among", value);
    } else {
        gold = index_said(value);
        if (gold < 0)
            gold = index_among(value, text->choices, text->n_choices);
        if (gold < 0)
            status = error_set(error, ERROR_INVALID, "gold: '%.60s' is neither a choice nor an index", value);
    }
    if (!status && gold >= text->n_choices)
        status = error_set(error, ERROR_INVALID, "gold: %" PRId64 " is outside the choices 0 to %d", gold,
                           text->n_choices - 1);
    if (!status)
        text->gold = (int)gold;
    free_texts(among, n_among);
    free(value);
    return status;
}

void task_text_free(struct task_text *text)
{
    free(text->context);
    free(text->continuation);
    free_texts(text->choices, text->n_choices);
    *text = (struct task_text){0};
}

int task_render(const struct task *task, const json_t *document, struct task_text *ret_text,
                struct error *error)
{
    struct task_text text = {0};
    int status = 0;
    if (task->kind == TASK_TARGET) {
        text.n_choices = (text.choices = calloc(1, sizeof *text.choices)) ? 1 : 0;
        status = text.choices ? render(task->continuation, document, "target", &text.choices[0], error)
                              : no_memory(error);
    } else {
        status = render_list(&task->choices, document, task->kind == TASK_CONTEXTS ? "contexts" : "choices",
                             &text.choices, &text.n_choices, error);
        if (!status)
            status = find_gold(task, document, &text, error);
    }
    if (!status && task->kind == TASK_CONTEXTS)
        status = render(task->continuation, document, "continuation", &text.continuation, error);
    if (!status && task->kind != TASK_CONTEXTS)
        status = render(task->context, document, "context", &text.context, error);
    if (status)
        task_text_free(&text);
    else
        *ret_text = text;
    return status;
}

/* ---- documents ---- */

void task_documents_free(struct task_documents *documents)
{
    documents_free(&documents->documents);
    free(documents->file);
    *documents = (struct task_documents){0};
}

/* Where no document is meant: the fields of the subtask alone. */
static json_t *subtask_fields(const struct task *task, int subtask)
{
    return subtask < 0 ? json_object()
                       : json_pack("{s:s}", task->subtask_field, task->subtasks[subtask].name);
}

static int add_fields(const struct task *task, int subtask, const struct task_file *file, json_t *document,
                      struct error *error)
{
    if (subtask >= 0 &&
        json_object_set_new(document, task->subtask_field, json_string(task->subtasks[subtask].name)))
        return no_memory(error);
    for (int i = 0; i < file->n_fields; i++) {
        json_t *value;
        int status = template_value(file->fields[i].value, document, &value, error);
        if (status)
            return error_prefix(error, "fields.%s: ", file->fields[i].name);
        if (json_object_set_new(document, file->fields[i].name, value))
            return no_memory(error);
    }
    return 0;
}

int task_at_document(const struct task_documents *documents, int64_t index, struct error *error)
{
    return error_prefix(error, "%.200s line %" PRId64 ": ", documents->file,
                        documents->documents.items[index].line);
}

int task_document(const struct task_documents *documents, int64_t index, json_t **ret_document,
                  struct error *error)
{
    json_t *document;
    int status = documents_get(&documents->documents, index, &document, error);
    if (!status) {
        status = add_fields(documents->task, documents->subtask, documents->entry, document, error);
        if (status)
            json_decref(document);
    }
    if (status)
        return task_at_document(documents, index, error);
    *ret_document = document;
    return 0;
}

static int read_file(const struct task_file *file, const char *path, const struct task_source *source,
                     struct documents *ret_documents, struct error *error)
{
    struct documents documents;
    int status =
        documents_read(path, file->format, file->columns, file->n_columns, &source->pause, &documents, error);
    if (!status && !documents.count) {
        documents_free(&documents);
        status = error_set(error, ERROR_INVALID, "there are no documents in it");
    }
    if (!status)
        *ret_documents = documents;
    return status;
}

int task_load(const struct task *task, int subtask, const int *splits, int n_splits,
              const struct task_source *source, struct task_documents *ret_documents, int *ret_split,
              struct error *error)
{
    struct buffer wanted = {0};
    json_t *fields = subtask_fields(task, subtask);
    int status = fields ? 0 : no_memory(error);
    bool found = false;
    for (int i = 0; !status && !found && i < n_splits; i++) {
        const struct task_split *split = &task->splits[splits[i]];
        for (int j = 0; !status && !found && j < split->n_files; j++) {
            char *name = NULL, *path = NULL;
            status = render(split->files[j].path, fields, "file", &name, error);
            if (!status && strlen(name) > MAX_FILE_NAME)
                status = error_set(error, ERROR_INVALID, "file: a name of more than %d bytes", MAX_FILE_NAME);
            if (!status)
                status = source->find(source->arg, name, &path, error);
            if (!status && path) {
                struct documents documents;
                status = read_file(&split->files[j], path, source, &documents, error);
                if (status) {
                    error_prefix(error, "%.200s: ", name);
                } else {
                    *ret_documents =
                        (struct task_documents){documents, name, task, &split->files[j], subtask};
                    *ret_split = splits[i];
                    name = NULL;
                    found = true;
                }
            } else if (!status) {
                buffer_printf(&wanted, "%s%s", wanted.length ? " or " : "", name);
            }
            free(name);
            free(path);
        }
    }
    if (!status && !found)
        status = error_set(error, ERROR_NOT_FOUND, "%s%s%s wants the file %.200s%s%.160s", task->name,
                           subtask < 0 ? "" : "_", subtask < 0 ? "" : task->subtasks[subtask].name,
                           wanted.data ? wanted.data : "", *task->source ? ", from " : "", task->source);
    buffer_free(&wanted);
    json_decref(fields);
    return status;
}
