/* task.h: an evaluation task as data: a definition parsed and checked, and what it makes of a document.
 *
 * A definition is a JSON object (docs/evaluation.md has the guide; a bad one is refused with the place):
 *
 *     "task"         its name: [a-z0-9_]
 *     "source"       where its files come from, for the person who has to get one
 *     "splits"       {"validation": [FILE, ...], ...}: of each split's files the first that is there is used
 *         FILE       {"file": TEMPLATE, "format": "jsonl"|"csv"|"tsv", "columns": [NAME...] (csv and tsv without a header
 *                    row), "fields": {NAME: TEMPLATE...}: fields made of the file's own, in this order}
 *     "documents"    the split under test
 *     "fewshot"      {"from": [SPLIT...]: the first that is there, "sampler": "random" | "first",
 *                    "exclude_document": true = one more is drawn and the document itself removed; so it is anyway where the
 *                    pool is the split under test}
 *     "description"  TEMPLATE that opens every prompt
 *     "context"      TEMPLATE
 *     "choices"      [TEMPLATE...] or a TEMPLATE that is a list     one context, a continuation each
 *  or "contexts"     the same                                        a context each, with
 *     "continuation" TEMPLATE                                        one continuation
 *  or "target"       TEMPLATE                                        a continuation to be scored by itself
 *     "gold"         TEMPLATE: the right one's index, from 0, or its text; or {"value": TEMPLATE, "among": as choices}: its
 *                    index is that of value
 *     "target_delimiter" (" "), "fewshot_delimiter" (empty line)
 *     "metrics"      of ["acc", "acc_norm"], or for a target ["perplexity", "acc"]
 *     "subtasks"     {"field": NAME, "groups": {GROUP: [SUBTASK...]}}: a task TASK_SUBTASK for each, alike but for the value
 *                    that templates find in that field
 *
 * A parsed task is immutable. */
#ifndef ENGINE_EVALUATION_TASK_H
#define ENGINE_EVALUATION_TASK_H

#include "base/error.h"
#include "engine/evaluation/documents.h"
#include "engine/evaluation/template.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum { TASK_MAX_CHOICES = 256 };

enum task_kind { TASK_CHOICES, TASK_CONTEXTS, TASK_TARGET };
enum { METRIC_ACC = 1 << 0, METRIC_ACC_NORM = 1 << 1, METRIC_PERPLEXITY = 1 << 2 };

/* Templates one by one, or one that is a list. */
struct template_list {
    int count;
    struct template **items;
    bool single;
};

struct task_field {
    char *name;
    struct template *value;
};

struct task_file {
    struct template *path;
    enum document_format format;
    char **columns;
    int n_columns;
    struct task_field *fields;
    int n_fields;
};

struct task_split {
    char *name;
    struct task_file *files;
    int n_files;
};

struct subtask {
    char *name, *group;
};

struct task {
    char *name, *source;
    struct task_split *splits;
    int n_splits;
    int documents; /* a split's index */
    int *pools;    /* splits that examples come from; [n_pools] */
    int n_pools;
    bool first_n;
    int exclude_document; /* -1 = where the pool is the split under test */
    enum task_kind kind;
    struct template *description, *context, *continuation, *gold;
    struct template_list choices; /* or contexts */
    struct template_list gold_among;
    char *target_delimiter, *fewshot_delimiter;
    unsigned metrics;
    char *subtask_field; /* NULL = it is one task */
    struct subtask *subtasks;
    int n_subtasks;
};

/* Errors begin with the key at fault, as in "splits.test[0].file: column 3: ...". */
int task_parse(const char *text, size_t length, struct task **ret_task, struct error *error);
void task_free(struct task *task);

/* What a task makes of one document. */
struct task_text {
    char *context;      /* "" for TASK_CONTEXTS */
    int n_choices;      /* 1 for TASK_TARGET */
    char **choices;     /* or contexts, or the target */
    char *continuation; /* of TASK_CONTEXTS, else NULL */
    int gold;
};
int task_render(const struct task *task, const json_t *document, struct task_text *ret_text,
                struct error *error);
void task_text_free(struct task_text *text);

/* Finds the file that a definition calls `name`: sets *ret_path (to be freed), or to NULL where there is none. */
struct task_source {
    void *arg;
    int (*find)(void *arg, const char *name, char **ret_path, struct error *error);
    struct documents_pause pause;
};

/* A split's documents. */
struct task_documents {
    struct documents documents;
    char *file; /* as the definition calls it */
    const struct task *task;
    const struct task_file *entry;
    int subtask;
};
/* subtask: an index, or -1. *ret_split is the index (into `splits`, an array of n) of the split that was there. */
int task_load(const struct task *task, int subtask, const int *splits, int n_splits,
              const struct task_source *source, struct task_documents *ret_documents, int *ret_split,
              struct error *error);
void task_documents_free(struct task_documents *documents);
/* Document `index`, with the fields that its file's entry makes, and the subtask's. Errors name file and line. */
int task_document(const struct task_documents *documents, int64_t index, json_t **ret_document,
                  struct error *error);
/* Prefix an error about a document with its file and line. */
int task_at_document(const struct task_documents *documents, int64_t index, struct error *error);

#endif
