/* documents.h: the documents of a task's file, each a JSON object, with the line it stands on.
 *
 *     jsonl   an object a line; blank lines are nothing
 *     csv     RFC 4180: fields may be quoted, quotes doubled, line ends inside them; every value is text
 *     tsv     fields between tabs, no quoting
 *
 * The columns of csv and tsv are named by the caller, or else by the first row. */
#ifndef ENGINE_EVALUATION_DOCUMENTS_H
#define ENGINE_EVALUATION_DOCUMENTS_H

#include "base/error.h"

#include <jansson.h>
#include <stdint.h>

enum document_format { DOCUMENTS_JSONL, DOCUMENTS_CSV, DOCUMENTS_TSV };

struct document {
    json_t *fields; /* an object */
    int64_t line;   /* from 1: the first of its lines */
};

struct documents {
    int64_t count, capacity;
    struct document *items;
};

/* Read a file of at most 1 GiB. columns: NULL, or n_columns names. Errors name the line, not the file. */
int documents_read(const char *path, enum document_format format, char *const *columns, int n_columns,
                   struct documents *ret_documents, struct error *error);
void documents_free(struct documents *documents);

#endif
