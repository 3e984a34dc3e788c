/* documents.c: see documents.h. Blocking. */
#include "engine/evaluation/documents.h"

#include "base/buffer.h"
#include "base/file.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FILE_BYTES = 1 << 30, MAX_COLUMNS = 256 };

void documents_free(struct documents *documents)
{
    for (int64_t i = 0; i < documents->count; i++)
        json_decref(documents->items[i].fields);
    free(documents->items);
    *documents = (struct documents){0};
}

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for documents");
}

/* Takes the reference. */
static int push(struct documents *documents, json_t *fields, int64_t line, struct error *error)
{
    if (documents->count == documents->capacity) {
        int64_t capacity = documents->capacity ? documents->capacity * 2 : 256;
        struct document *items = realloc(documents->items, (size_t)capacity * sizeof *items);
        if (!items) {
            json_decref(fields);
            return no_memory(error);
        }
        documents->items = items;
        documents->capacity = capacity;
    }
    documents->items[documents->count++] = (struct document){fields, line};
    return 0;
}

/* ---- JSONL ---- */

static int read_jsonl(const char *text, size_t length, struct documents *documents, struct error *error)
{
    const char *end = text + length;
    int status = 0;
    for (int64_t line = 1; !status && text < end; line++) {
        const char *stop = memchr(text, '\n', (size_t)(end - text));
        size_t n = (size_t)((stop ? stop : end) - text);
        size_t blank = 0;
        while (blank < n && strchr(" \t\r", text[blank]))
            blank++;
        if (blank < n) {
            json_error_t why;
            json_t *fields = json_loadb(text, n, JSON_REJECT_DUPLICATES, &why);
            if (!fields)
                status = error_set(error, ERROR_INVALID, "line %" PRId64 ": %s", line, why.text);
            else if (!json_is_object(fields))
                status = error_set(error, ERROR_INVALID, "line %" PRId64 " is not a JSON object", line);
            if (status)
                json_decref(fields);
            else
                status = push(documents, fields, line, error);
        }
        text += n + 1;
    }
    return status;
}

/* ---- tables ---- */

struct table {
    const char *at, *end;
    bool quotes;          /* CSV's */
    char separator;       /* between fields */
    int64_t line;         /* of `at` */
    struct buffer fields; /* of the row, one behind another */
    int n_fields;
    size_t ends[MAX_COLUMNS]; /* where each field ends in `fields` */
};

static bool at_line_end(const struct table *table)
{
    return table->at == table->end || *table->at == '\n' ||
           (*table->at == '\r' && (table->quotes || table->at + 1 == table->end || table->at[1] == '\n'));
}

static int read_quoted(struct table *table, struct error *error)
{
    int64_t opened = table->line;
    for (table->at++;; table->at++) {
        if (table->at == table->end)
            return error_set(error, ERROR_INVALID, "line %" PRId64 ": a quote that is not closed", opened);
        if (*table->at == '"' && (++table->at == table->end || *table->at != '"'))
            return 0;
        table->line += *table->at == '\n';
        buffer_append(&table->fields, table->at, 1);
    }
}

/* Take the next row. */
static int read_row(struct table *table, struct error *error)
{
    int64_t line = table->line;
    buffer_clear(&table->fields);
    table->n_fields = 0;
    for (bool more = true; more;) {
        if (table->n_fields == MAX_COLUMNS)
            return error_set(error, ERROR_INVALID, "line %" PRId64 " has more than %d fields", line,
                             MAX_COLUMNS);
        if (table->quotes && table->at < table->end && *table->at == '"') {
            int status = read_quoted(table, error);
            if (status)
                return status;
        }
        while (!at_line_end(table) && *table->at != table->separator)
            buffer_append(&table->fields, table->at++, 1);
        table->ends[table->n_fields++] = table->fields.length;
        more = !at_line_end(table);
        table->at += more;
    }
    if (table->at < table->end && *table->at == '\r')
        table->at++;
    if (table->at < table->end && *table->at == '\n')
        table->at++;
    table->line++;
    return table->fields.failed ? no_memory(error) : 0;
}

static const char *field_of(const struct table *table, int i, size_t *ret_length)
{
    size_t begin = i ? table->ends[i - 1] : 0;
    *ret_length = table->ends[i] - begin;
    return table->fields.data ? table->fields.data + begin : "";
}

static int push_row(const struct table *table, char *const *names, int n_names, int64_t line,
                    struct documents *documents, struct error *error)
{
    if (table->n_fields != n_names)
        return error_set(error, ERROR_INVALID, "line %" PRId64 " has %d fields, not %d", line,
                         table->n_fields, n_names);
    json_t *fields = json_object();
    for (int i = 0; i < n_names; i++) {
        size_t length;
        const char *text = field_of(table, i, &length);
        json_t *value = json_stringn(text, length);
        if (!value) {
            json_decref(fields);
            return error_set(error, ERROR_INVALID, "line %" PRId64 ": field %d is not UTF-8", line, i + 1);
        }
        if (json_object_set_new(fields, names[i], value)) {
            json_decref(fields);
            return no_memory(error);
        }
    }
    return push(documents, fields, line, error);
}

static int read_table(struct table *table, char *const *columns, int n_columns, struct documents *documents,
                      struct error *error)
{
    char *header[MAX_COLUMNS];
    int n_header = 0, status = 0;
    while (!status && table->at < table->end) {
        int64_t line = table->line;
        status = read_row(table, error);
        if (status || (table->n_fields == 1 && !table->fields.length))
            continue;
        if (columns || n_header) {
            status = push_row(table, columns ? columns : header, columns ? n_columns : n_header, line,
                              documents, error);
            continue;
        }
        for (; !status && n_header < table->n_fields; n_header++) {
            size_t length;
            const char *text = field_of(table, n_header, &length);
            if (!(header[n_header] = strndup(text, length))) {
                status = no_memory(error);
                break;
            }
        }
    }
    while (n_header)
        free(header[--n_header]);
    return status;
}

int documents_read(const char *path, enum document_format format, char *const *columns, int n_columns,
                   struct documents *ret_documents, struct error *error)
{
    struct documents documents = {0};
    char *data;
    size_t length;
    int status = file_read(path, MAX_FILE_BYTES, &data, &length, error);
    if (status)
        return status;
    size_t mark = length >= 3 && !memcmp(data, "\xEF\xBB\xBF", 3) ? 3 : 0; /* a byte order mark */
    if (format == DOCUMENTS_JSONL) {
        status = read_jsonl(data + mark, length - mark, &documents, error);
    } else {
        struct table table = {.at = data + mark,
                              .end = data + length,
                              .quotes = format == DOCUMENTS_CSV,
                              .separator = format == DOCUMENTS_CSV ? ',' : '\t',
                              .line = 1};
        status = read_table(&table, columns, n_columns, &documents, error);
        buffer_free(&table.fields);
    }
    free(data);
    if (status)
        documents_free(&documents);
    else
        *ret_documents = documents;
    return status;
}
