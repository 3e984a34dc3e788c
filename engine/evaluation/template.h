/* template.h: the little language in which a task's definition makes text of a document's fields.
 *
 *     Question: {question.stem|strip}\nAnswer:
 *
 * `{path|filter:'argument'...}` stands for a field. A path is names and list indices with dots between; a name of a list that holds
 * objects takes that field of each of them. Filters work on text, on a list's items one by one:
 *
 *     strip                      without white space at both ends
 *     capitalize                 first character in title case, the rest in lower case
 *     replace:'a':'b'            every a by b, from the left
 *     without:'[':']'            without the shortest stretches from the one to the other within a line
 *     before:'x' after:'x'       what is before, or behind, the first x, which must be there
 *     before_last:'x'            what is before the last x, nothing when there is none
 *     after_last:'x'             what is behind the last x, everything when there is none
 *
 * A quote inside an argument is doubled; {{ and }} are braces. Definitions come from clients: nothing here loops, calls or grows
 * without bound. Pure; a parsed template is immutable. */
#ifndef ENGINE_EVALUATION_TEMPLATE_H
#define ENGINE_EVALUATION_TEMPLATE_H

#include "base/buffer.h"
#include "base/error.h"

#include <jansson.h>

struct template;

/* Errors name the column, from 1. */
int template_parse(const char *text, struct template **ret_template, struct error *error);
void template_free(struct template *template);

/* Append the text made of a document. Numbers are written as Python writes them; a null or a list is an error. */
int template_text(const struct template *template, const json_t *document, struct buffer *out,
                  struct error *error);
/* The value: of a template that is a single {...} what the field is, a list or a number too; text otherwise. */
int template_value(const struct template *template, const json_t *document, json_t **ret_value,
                   struct error *error);

#endif
