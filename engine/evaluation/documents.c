/* documents.c: see documents.h. Blocking. */
#include "engine/evaluation/documents.h"

#include "base/buffer.h"
#include "base/file.h"
#include "engine/text/unicode.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FILE_BYTES = 1 << 30, MAX_COLUMNS = 256 };

void documents_free(struct documents *documents)
{
    for (int i = 0; documents->header && i < documents->n_columns; i++)
        free(documents->header[i]);
    free(documents->header);
    free(documents->text);
    free(documents->items);
    *documents = (struct documents){0};
}

void documents_take_pause(const struct documents_pause *pause)
{
    if (pause->call)
        pause->call(pause->arg);
}

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for documents");
}

static int push(struct documents *documents, size_t offset, int64_t line, struct error *error)
{
    if (documents->count == documents->capacity) {
        int64_t capacity = documents->capacity ? documents->capacity * 2 : 256;
        struct document *items = realloc(documents->items, (size_t)capacity * sizeof *items);
        if (!items)
            return no_memory(error);
        documents->items = items;
        documents->capacity = capacity;
    }
    documents->items[documents->count++] = (struct document){offset, line};
    return 0;
}

/* ---- JSONL ---- */

static size_t line_length(const struct documents *documents, size_t offset)
{
    const char *begin = documents->text + offset;
    const char *end = memchr(begin, '\n', documents->length - offset);
    return end ? (size_t)(end - begin) : documents->length - offset;
}

static int read_jsonl(struct documents *documents, size_t at, const struct documents_pause *pause,
                      struct error *error)
{
    int status = 0;
    for (int64_t line = 1; !status && at < documents->length; line++) {
        size_t length = line_length(documents, at);
        if (strspn(documents->text + at, " \t\r") < length)
            status = push(documents, at, line, error);
        at += length + 1;
        documents_take_pause(pause);
    }
    return status;
}

static int get_jsonl(const struct documents *documents, size_t offset, json_t **ret_document,
                     struct error *error)
{
    json_error_t why;
    json_t *document =
        json_loadb(documents->text + offset, line_length(documents, offset), JSON_REJECT_DUPLICATES, &why);
    if (!document)
        return error_set(error, ERROR_INVALID, "%s", why.text);
    if (!json_is_object(document)) {
        json_decref(document);
        return error_set(error, ERROR_INVALID, "not a JSON object");
    }
    *ret_document = document;
    return 0;
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

static void table_init(const struct documents *documents, size_t offset, struct table *table)
{
    table->at = documents->text + offset;
    table->end = documents->text + documents->length;
    table->quotes = documents->format == DOCUMENTS_CSV;
    table->separator = table->quotes ? ',' : '\t';
    table->line = 1;
    table->fields = (struct buffer){0};
}

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

/* The row's fields are text that a document can have. */
static int check_fields(const struct table *table, int64_t line, struct error *error)
{
    for (int i = 0; i < table->n_fields; i++) {
        size_t length;
        const char *text = field_of(table, i, &length);
        if (memchr(text, '\0', length))
            return error_set(error, ERROR_INVALID, "line %" PRId64 ": field %d has a NUL character", line,
                             i + 1);
        if (utf8_valid_prefix(text, length) != length)
            return error_set(error, ERROR_INVALID, "line %" PRId64 ": field %d is not UTF-8", line, i + 1);
    }
    return 0;
}

static int take_header(const struct table *table, struct documents *documents, struct error *error)
{
    if (!(documents->header = calloc((size_t)table->n_fields, sizeof *documents->header)))
        return no_memory(error);
    documents->columns = documents->header;
    for (; documents->n_columns < table->n_fields; documents->n_columns++) {
        size_t length;
        const char *text = field_of(table, documents->n_columns, &length);
        if (!(documents->header[documents->n_columns] = strndup(text, length)))
            return no_memory(error);
    }
    return 0;
}

static int read_table(struct documents *documents, size_t at, const struct documents_pause *pause,
                      struct error *error)
{
    struct table table;
    int status = 0;
    table_init(documents, at, &table);
    while (!status && table.at < table.end) {
        const size_t offset = (size_t)(table.at - documents->text);
        const int64_t line = table.line;
        documents_take_pause(pause);
        status = read_row(&table, error);
        if (status || (table.n_fields == 1 && !table.fields.length))
            continue;
        if ((status = check_fields(&table, line, error)))
            break;
        if (!documents->columns)
            status = take_header(&table, documents, error);
        else if (table.n_fields != documents->n_columns)
            status = error_set(error, ERROR_INVALID, "line %" PRId64 " has %d fields, not %d", line,
                               table.n_fields, documents->n_columns);
        else
            status = push(documents, offset, line, error);
    }
    buffer_free(&table.fields);
    return status;
}

static int get_row(const struct documents *documents, size_t offset, json_t **ret_document,
                   struct error *error)
{
    struct table table;
    table_init(documents, offset, &table);
    json_t *document = json_object();
    int status = document ? read_row(&table, error) : no_memory(error);
    for (int i = 0; !status && i < documents->n_columns; i++) {
        size_t length;
        const char *text = field_of(&table, i, &length);
        if (json_object_set_new(document, documents->columns[i], json_stringn(text, length)))
            status = no_memory(error);
    }
    buffer_free(&table.fields);
    if (status)
        json_decref(document);
    else
        *ret_document = document;
    return status;
}

/* ---- both ---- */

int documents_get(const struct documents *documents, int64_t index, json_t **ret_document,
                  struct error *error)
{
    const size_t offset = documents->items[index].offset;
    return documents->format == DOCUMENTS_JSONL ? get_jsonl(documents, offset, ret_document, error)
                                                : get_row(documents, offset, ret_document, error);
}

int documents_read(const char *path, enum document_format format, char *const *columns, int n_columns,
                   const struct documents_pause *pause, struct documents *ret_documents, struct error *error)
{
    struct documents documents = {.format = format, .columns = columns, .n_columns = n_columns};
    int status = file_read(path, MAX_FILE_BYTES, &documents.text, &documents.length, error);
    if (status)
        return status;
    size_t mark =
        documents.length >= 3 && !memcmp(documents.text, "\xEF\xBB\xBF", 3) ? 3 : 0; /* a byte order mark */
    status = format == DOCUMENTS_JSONL ? read_jsonl(&documents, mark, pause, error)
                                       : read_table(&documents, mark, pause, error);
    if (status)
        documents_free(&documents);
    else
        *ret_documents = documents;
    return status;
}
