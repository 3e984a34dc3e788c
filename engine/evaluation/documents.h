/* documents.h: the documents of a task's file, each a JSON object, with the line it stands on.
 *
 *     jsonl   an object a line; blank lines are nothing
 *     csv     RFC 4180: fields may be quoted, quotes doubled, line ends inside them; every value is text
 *     tsv     fields between tabs, no quoting
 *
 * The columns of csv and tsv are named by the caller, or else by the first row. What is kept is the file's text and where each
 * document begins: as objects, files that clients make could take a hundred times as much memory. */
#ifndef ENGINE_EVALUATION_DOCUMENTS_H
#define ENGINE_EVALUATION_DOCUMENTS_H

#include "base/error.h"

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

enum document_format { DOCUMENTS_JSONL, DOCUMENTS_CSV, DOCUMENTS_TSV };

struct document {
    size_t offset; /* in the text */
    int64_t line;  /* from 1: the first of its lines */
};

struct documents {
    enum document_format format;
    char *text;
    size_t length;
    char *const *columns; /* [n_columns]: the caller's, or header */
    char **header;
    int n_columns;
    int64_t count, capacity;
    struct document *items;
};

/* Called every so often while documents are read; call may be NULL. */
struct documents_pause {
    void (*call)(void *arg);
    void *arg;
};
void documents_take_pause(const struct documents_pause *pause);

/* Read a file of at most 1 GiB. columns: NULL, or n_columns names that outlive the documents. A table's rows are checked, a JSONL
 * file's are not. Errors name the line, not the file. */
int documents_read(const char *path, enum document_format format, char *const *columns, int n_columns,
                   const struct documents_pause *pause, struct documents *ret_documents, struct error *error);
void documents_free(struct documents *documents);
/* Document `index` as a new object. Errors do not name the line. */
int documents_get(const struct documents *documents, int64_t index, json_t **ret_document,
                  struct error *error);

#endif
