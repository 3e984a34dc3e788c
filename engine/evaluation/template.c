/* template.c: see template.h. */
#include "engine/evaluation/template.h"

#include "engine/evaluation/python_text.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TEXT = 8 << 20 }; /* bytes that a template or a filter makes */
enum { MAX_ARGUMENTS = 2, MAX_STEPS = 16, MAX_FILTERS = 16, MAX_PIECES = 256, MAX_ARGUMENT_BYTES = 255 };

/* ---- filters ---- */

struct filter {
    const char *name;
    int n_arguments;
    /* Append the filtered text to out. */
    int (*apply)(const char *text, size_t length, char *const *arguments, struct buffer *out,
                 struct error *error);
};

static int check_size(const struct buffer *out, struct error *error)
{
    return out->length <= MAX_TEXT ? 0
                                   : error_set(error, ERROR_INVALID, "more than %d bytes of text", MAX_TEXT);
}

/* The first mark of n bytes. Marks are short; and memmem() reads all of the text at each call in a sanitized build. */
static const char *find(const char *text, const char *end, const char *mark, size_t n)
{
    while ((size_t)(end - text) >= n && (text = memchr(text, mark[0], (size_t)(end - text) - n + 1))) {
        if (!memcmp(text, mark, n))
            return text;
        text++;
    }
    return NULL;
}

static int filter_strip(const char *text, size_t length, char *const *arguments, struct buffer *out,
                        struct error *error)
{
    (void)arguments;
    (void)error;
    size_t begin = python_leading_space(text, length);
    size_t end = length - python_trailing_space(text + begin, length - begin);
    buffer_append(out, text + begin, end - begin);
    return 0;
}

static int filter_capitalize(const char *text, size_t length, char *const *arguments, struct buffer *out,
                             struct error *error)
{
    (void)arguments;
    (void)error;
    python_capitalize(text, length, out);
    return 0;
}

static int filter_replace(const char *text, size_t length, char *const *arguments, struct buffer *out,
                          struct error *error)
{
    const size_t n = strlen(arguments[0]);
    const char *end = text + length, *found;
    while ((found = find(text, end, arguments[0], n))) {
        buffer_append(out, text, (size_t)(found - text));
        buffer_append_string(out, arguments[1]);
        text = found + n;
        if (check_size(out, error))
            return ERROR_INVALID;
    }
    buffer_append(out, text, (size_t)(end - text));
    return 0;
}

static int filter_without(const char *text, size_t length, char *const *arguments, struct buffer *out,
                          struct error *error)
{
    (void)error;
    const size_t n_open = strlen(arguments[0]), n_close = strlen(arguments[1]);
    const char *end = text + length, *open, *line_end = NULL;
    bool closed = true; /* is there a closing mark before line_end? */
    while ((open = find(text, end, arguments[0], n_open))) {
        const char *inside = open + n_open, *close = NULL;
        if (!line_end || inside > line_end) {
            line_end = memchr(inside, '\n', (size_t)(end - inside));
            line_end = line_end ? line_end : end;
            closed = true;
        }
        if (closed)
            close = find(inside, line_end, arguments[1], n_close);
        closed = close != NULL;
        const char *keep = close ? open : open + 1; /* unclosed: look again behind its first byte */
        buffer_append(out, text, (size_t)(keep - text));
        text = close ? close + n_close : keep;
    }
    buffer_append(out, text, (size_t)(end - text));
    return 0;
}

static int missing_mark(const char *mark, struct error *error)
{
    return error_set(error, ERROR_INVALID, "'%.40s' is not in the text", mark);
}

static int filter_before(const char *text, size_t length, char *const *arguments, struct buffer *out,
                         struct error *error)
{
    const char *found = find(text, text + length, arguments[0], strlen(arguments[0]));
    if (!found)
        return missing_mark(arguments[0], error);
    buffer_append(out, text, (size_t)(found - text));
    return 0;
}

static int filter_after(const char *text, size_t length, char *const *arguments, struct buffer *out,
                        struct error *error)
{
    const size_t n = strlen(arguments[0]);
    const char *found = find(text, text + length, arguments[0], n);
    if (!found)
        return missing_mark(arguments[0], error);
    buffer_append(out, found + n, length - (size_t)(found - text) - n);
    return 0;
}

static const char *find_last(const char *text, size_t length, const char *mark)
{
    const size_t n = strlen(mark);
    for (size_t at = length >= n ? length - n + 1 : 0; at-- > 0;)
        if (!memcmp(text + at, mark, n))
            return text + at;
    return NULL;
}

static int filter_before_last(const char *text, size_t length, char *const *arguments, struct buffer *out,
                              struct error *error)
{
    (void)error;
    const char *found = find_last(text, length, arguments[0]);
    buffer_append(out, text, found ? (size_t)(found - text) : 0);
    return 0;
}

static int filter_after_last(const char *text, size_t length, char *const *arguments, struct buffer *out,
                             struct error *error)
{
    (void)error;
    const char *found = find_last(text, length, arguments[0]);
    const char *from = found ? found + strlen(arguments[0]) : text;
    buffer_append(out, from, (size_t)(text + length - from));
    return 0;
}

static const struct filter filters[] = {
    {"strip", 0, filter_strip},
    {"capitalize", 0, filter_capitalize},
    {"replace", 2, filter_replace},
    {"without", 2, filter_without},
    {"before", 1, filter_before},
    {"after", 1, filter_after},
    {"before_last", 1, filter_before_last},
    {"after_last", 1, filter_after_last},
};

static const struct filter *find_filter(const char *name, size_t length)
{
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++)
        if (strlen(filters[i].name) == length && !memcmp(filters[i].name, name, length))
            return &filters[i];
    return NULL;
}

/* ---- parsing ---- */

struct filter_call {
    const struct filter *filter;
    char *arguments[MAX_ARGUMENTS];
};

/* Text, or a field: then n_steps > 0. */
struct piece {
    char *text;
    int n_steps, n_calls;
    char *steps[MAX_STEPS];
    struct filter_call calls[MAX_FILTERS];
};

struct template
{
    int n_pieces;
    struct piece *pieces;
};

struct parser {
    const char *begin, *at;
    struct error *error;
};

static void piece_free(struct piece *piece)
{
    free(piece->text);
    for (int i = 0; i < piece->n_steps; i++)
        free(piece->steps[i]);
    for (int i = 0; i < piece->n_calls; i++)
        for (int j = 0; j < MAX_ARGUMENTS; j++)
            free(piece->calls[i].arguments[j]);
}

void template_free(struct template *template)
{
    if (!template)
        return;
    for (int i = 0; i < template->n_pieces; i++)
        piece_free(&template->pieces[i]);
    free(template->pieces);
    free(template);
}

__attribute__((format(printf, 2, 3))) static int refuse(struct parser *parser, const char *format, ...)
{
    char what[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    return error_set(parser->error, ERROR_INVALID, "column %td: %s", parser->at - parser->begin + 1, what);
}

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for a template");
}

/* 'text with a '' quote' */
static int parse_argument(struct parser *parser, char **ret_argument)
{
    struct buffer argument = {0};
    const char *open = parser->at;
    if (*parser->at++ != '\'') {
        parser->at = open;
        return refuse(parser, "an argument begins with a quote");
    }
    for (;; parser->at++) {
        if (!*parser->at) {
            parser->at = open;
            buffer_free(&argument);
            return refuse(parser, "a quote that is not closed");
        }
        if (*parser->at == '\'' && *++parser->at != '\'')
            break;
        buffer_append(&argument, parser->at, 1);
        if (argument.length > MAX_ARGUMENT_BYTES) {
            parser->at = open;
            buffer_free(&argument);
            return refuse(parser, "an argument of more than %d bytes", MAX_ARGUMENT_BYTES);
        }
    }
    *ret_argument = buffer_take(&argument, NULL);
    return *ret_argument ? 0 : no_memory(parser->error);
}

static int parse_filter(struct parser *parser, struct piece *piece)
{
    if (piece->n_calls == MAX_FILTERS)
        return refuse(parser, "more than %d filters", MAX_FILTERS);
    size_t length = strcspn(parser->at, ":|}'");
    const struct filter *filter = find_filter(parser->at, length);
    if (!filter)
        return refuse(parser, "no filter is called '%.*s'", (int)(length < 40 ? length : 40), parser->at);
    struct filter_call *call = &piece->calls[piece->n_calls++];
    *call = (struct filter_call){.filter = filter};
    parser->at += length;
    for (int i = 0; i < filter->n_arguments; i++) {
        if (*parser->at != ':')
            return refuse(parser, "%s takes %d arguments", filter->name, filter->n_arguments);
        parser->at++;
        int status = parse_argument(parser, &call->arguments[i]);
        if (status)
            return status;
        if (i == 0 && !*call->arguments[i])
            return refuse(parser, "the first argument of %s is empty", filter->name);
    }
    if (filter->apply == filter_without && !*call->arguments[1])
        return refuse(parser, "the second argument of %s is empty", filter->name);
    return 0;
}

/* Behind the opening brace. */
static int parse_field(struct parser *parser, struct piece *piece)
{
    do {
        size_t length = strcspn(parser->at, ".|{}");
        if (!length)
            return refuse(parser, "a name is missing");
        if (piece->n_steps == MAX_STEPS)
            return refuse(parser, "more than %d names", MAX_STEPS);
        if (!(piece->steps[piece->n_steps] = strndup(parser->at, length)))
            return no_memory(parser->error);
        piece->n_steps++;
        parser->at += length;
    } while (*parser->at == '.' && parser->at++);
    while (*parser->at == '|') {
        parser->at++;
        int status = parse_filter(parser, piece);
        if (status)
            return status;
    }
    if (*parser->at != '}')
        return refuse(parser, *parser->at ? "'}' is missing" : "'{' is not closed");
    parser->at++;
    return 0;
}

static int parse_text(struct parser *parser, struct piece *piece)
{
    struct buffer text = {0};
    while (*parser->at) {
        size_t plain = strcspn(parser->at, "{}");
        buffer_append(&text, parser->at, plain);
        parser->at += plain;
        if (!*parser->at || (*parser->at == '{' && parser->at[1] != '{'))
            break;
        if (parser->at[0] != parser->at[1]) {
            buffer_free(&text);
            return refuse(parser, "a '}' that nothing opened (write }} for a brace)");
        }
        buffer_append(&text, parser->at, 1);
        parser->at += 2;
    }
    piece->text = buffer_take(&text, NULL);
    return piece->text ? 0 : no_memory(parser->error);
}

static int parse_piece(struct parser *parser, struct piece *piece)
{
    if (parser->at[0] == '{' && parser->at[1] != '{') {
        parser->at++;
        return parse_field(parser, piece);
    }
    return parse_text(parser, piece);
}

int template_parse(const char *text, struct template **ret_template, struct error *error)
{
    struct parser parser = {text, text, error};
    struct template *template = calloc(1, sizeof *template);
    int status = template ? 0 : no_memory(error);
    while (!status && *parser.at) {
        if (template->n_pieces == MAX_PIECES) {
            status = refuse(&parser, "more than %d pieces", MAX_PIECES);
            break;
        }
        struct piece *pieces = realloc(template->pieces, (size_t)(template->n_pieces + 1) * sizeof *pieces);
        if (!pieces) {
            status = no_memory(error);
            break;
        }
        template->pieces = pieces;
        pieces[template->n_pieces] = (struct piece){0};
        status = parse_piece(&parser, &pieces[template->n_pieces++]);
    }
    if (status)
        template_free(template);
    else
        *ret_template = template;
    return status;
}

/* ---- rendering ---- */

/* The index that a name of digits is, or -1. */
static int64_t index_of(const char *name)
{
    size_t length = strlen(name);
    return length < 10 && strspn(name, "0123456789") == length ? strtol(name, NULL, 10) : -1;
}

/* A new reference to what the steps lead to. */
static int resolve(const json_t *value, char *const *steps, int n_steps, json_t **ret_value,
                   struct error *error)
{
    int status = 0;
    if (!n_steps) {
        *ret_value = json_incref((json_t *)(uintptr_t)value);
        return 0;
    }
    const char *name = steps[0];
    if (json_is_object(value)) {
        const json_t *field = json_object_get(value, name);
        if (!field)
            return error_set(error, ERROR_INVALID, "there is no field '%.60s'", name);
        return resolve(field, steps + 1, n_steps - 1, ret_value, error);
    }
    if (!json_is_array(value))
        return error_set(error, ERROR_INVALID, "'%.60s' is asked of what has no fields", name);
    int64_t index = index_of(name);
    if (index >= 0) {
        const json_t *item = json_array_get(value, (size_t)index);
        if (!item)
            return error_set(error, ERROR_INVALID, "item %" PRId64 " of a list of %zu", index,
                             json_array_size(value));
        return resolve(item, steps + 1, n_steps - 1, ret_value, error);
    }
    json_t *items = json_array(), *item;
    for (size_t i = 0; !status && i < json_array_size(value); i++) {
        status = resolve(json_array_get(value, i), steps, n_steps, &item, error);
        if (!status && json_array_append_new(items, item))
            status = no_memory(error);
    }
    if (status)
        json_decref(items);
    else
        *ret_value = items;
    return status;
}

/* repr() of a float: the fewest digits that are that number; an exponent below 1e-4 and from 1e16 on. */
static void append_real(double value, struct buffer *out)
{
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value)
            break;
    }
    if (strchr(text, 'e') && fabs(value) >= 1 && fabs(value) < 1e16)
        snprintf(text, sizeof text, "%.0f", value);
    buffer_append_string(out, text);
    if (!strpbrk(text, ".en"))
        buffer_append_string(out, ".0");
}

static int append_text(const json_t *value, struct buffer *out, struct error *error)
{
    switch (json_typeof(value)) {
    case JSON_STRING:
        buffer_append(out, json_string_value(value), json_string_length(value));
        return 0;
    case JSON_INTEGER:
        buffer_printf(out, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        return 0;
    case JSON_REAL:
        append_real(json_real_value(value), out);
        return 0;
    case JSON_TRUE:
    case JSON_FALSE:
        buffer_append_string(out, json_is_true(value) ? "True" : "False");
        return 0;
    case JSON_NULL:
    case JSON_ARRAY:
    case JSON_OBJECT:
    default:
        return error_set(error, ERROR_INVALID, "%s is not text",
                         json_is_null(value)    ? "null"
                         : json_is_array(value) ? "a list"
                                                : "an object");
    }
}

/* One filter over text, or over a list's items, of which *left bytes may be made. */
static int apply(const struct filter_call *call, const json_t *value, size_t *left, json_t **ret_value,
                 struct error *error)
{
    int status = 0;
    if (json_is_array(value)) {
        json_t *items = json_array(), *item;
        for (size_t i = 0; !status && i < json_array_size(value); i++) {
            status = apply(call, json_array_get(value, i), left, &item, error);
            if (!status && json_array_append_new(items, item))
                status = no_memory(error);
        }
        if (status)
            json_decref(items);
        else
            *ret_value = items;
        return status;
    }
    struct buffer text = {0}, out = {0};
    status = append_text(value, &text, error);
    if (!status && text.failed)
        status = no_memory(error);
    if (!status)
        status = check_size(&text, error);
    if (!status)
        status = call->filter->apply(text.data ? text.data : "", text.length, call->arguments, &out, error);
    if (!status && out.length > *left)
        status = error_set(error, ERROR_INVALID, "more than %d bytes of text", MAX_TEXT);
    if (!status) {
        json_t *filtered = out.failed ? NULL : json_stringn(out.data ? out.data : "", out.length);
        if (filtered)
            *ret_value = filtered;
        else
            status = no_memory(error);
        *left -= out.length;
    }
    buffer_free(&text);
    buffer_free(&out);
    return status;
}

/* Prefix the message with the field that it is about. */
static int in_field(const struct piece *piece, struct error *error)
{
    return error_prefix(error, "{%s%s}: ", piece->steps[0], piece->n_steps > 1 ? "..." : "");
}

static int field_value(const struct piece *piece, const json_t *document, json_t **ret_value,
                       struct error *error)
{
    json_t *value;
    int status = resolve(document, piece->steps, piece->n_steps, &value, error);
    for (int i = 0; !status && i < piece->n_calls; i++) {
        json_t *filtered;
        size_t left = MAX_TEXT;
        status = apply(&piece->calls[i], value, &left, &filtered, error);
        json_decref(value);
        if (status)
            error_prefix(error, "%s: ", piece->calls[i].filter->name);
        else
            value = filtered;
    }
    if (status)
        return in_field(piece, error);
    *ret_value = value;
    return 0;
}

int template_text(const struct template *template, const json_t *document, struct buffer *out,
                  struct error *error)
{
    int status = 0;
    for (int i = 0; !status && i < template->n_pieces; i++) {
        const struct piece *piece = &template->pieces[i];
        json_t *value;
        if (!piece->n_steps) {
            buffer_append_string(out, piece->text);
            continue;
        }
        status = field_value(piece, document, &value, error);
        if (status)
            break;
        if ((status = append_text(value, out, error)))
            in_field(piece, error);
        json_decref(value);
        if (!status)
            status = check_size(out, error);
    }
    if (!status && out->failed)
        status = no_memory(error);
    return status;
}

int template_value(const struct template *template, const json_t *document, json_t **ret_value,
                   struct error *error)
{
    if (template->n_pieces == 1 && template->pieces[0].n_steps)
        return field_value(&template->pieces[0], document, ret_value, error);
    struct buffer text = {0};
    int status = template_text(template, document, &text, error);
    if (!status) {
        json_t *value = json_stringn(text.data ? text.data : "", text.length);
        if (value)
            *ret_value = value;
        else
            status = no_memory(error);
    }
    buffer_free(&text);
    return status;
}
