/* added_tokens.c: see added_tokens.h. Follows the matching of Hugging Face's AddedVocabulary: a match that
 * single_word forbids is skipped whole, and white space taken on the right does not move the search. */
#include "engine/text/added_tokens.h"

#include "base/error.h"
#include "engine/text/unicode.h"

#include <stdlib.h>

static int grow(void *array, size_t element, int32_t count, int32_t *capacity)
{
    if (count < *capacity)
        return 0;
    int32_t larger = *capacity ? 2 * *capacity : 64;
    void **pointer = array;
    void *grown = realloc(*pointer, (size_t)larger * element);
    if (!grown)
        return ERROR_NO_MEMORY;
    *pointer = grown;
    *capacity = larger;
    return 0;
}

static int32_t child_of(const struct added_tokens *set, int32_t node, unsigned char byte)
{
    if (node == 0)
        return set->first[byte];
    int32_t child = set->nodes[node].child;
    while (child && set->nodes[child].byte != byte)
        child = set->nodes[child].sibling;
    return child;
}

static int32_t new_node(struct added_tokens *set, int32_t parent, unsigned char byte)
{
    if (grow(&set->nodes, sizeof *set->nodes, set->n_nodes, &set->node_capacity))
        return ERROR_NO_MEMORY;
    int32_t node = set->n_nodes++;
    set->nodes[node] = (struct added_node){.token = -1, .byte = byte};
    if (node == 0)
        return 0;
    if (parent == 0) {
        set->first[byte] = node;
    } else {
        set->nodes[node].sibling = set->nodes[parent].child;
        set->nodes[parent].child = node;
    }
    return node;
}

int added_tokens_add(struct added_tokens *set, const char *content, size_t length,
                     const struct added_token *token)
{
    if (set->n_nodes == 0 && new_node(set, 0, 0) < 0)
        return ERROR_NO_MEMORY;
    if (grow(&set->tokens, sizeof *set->tokens, set->n_tokens, &set->token_capacity))
        return ERROR_NO_MEMORY;
    int32_t node = 0;
    for (size_t i = 0; i < length; i++) {
        int32_t child = child_of(set, node, (unsigned char)content[i]);
        if (!child)
            child = new_node(set, node, (unsigned char)content[i]);
        if (child < 0)
            return ERROR_NO_MEMORY;
        node = child;
    }
    if (set->nodes[node].token < 0)
        set->nodes[node].token = set->n_tokens;
    set->tokens[set->n_tokens++] = *token;
    return 0;
}

void added_tokens_clear(struct added_tokens *set)
{
    free(set->tokens);
    free(set->nodes);
    *set = (struct added_tokens){0};
}

/* The longest token that begins at text: its index, or -1. */
static int32_t longest(const struct added_tokens *set, const char *text, size_t length, size_t *ret_length)
{
    int32_t found = -1, node = 0;
    for (size_t i = 0; i < length; i++) {
        node = child_of(set, node, (unsigned char)text[i]);
        if (!node)
            break;
        if (set->nodes[node].token >= 0) {
            found = set->nodes[node].token;
            *ret_length = i + 1;
        }
    }
    return found;
}

static bool touches_word(const char *text, size_t length, size_t begin, size_t end)
{
    size_t n;
    int32_t next = -1;
    if (end < length && utf8_scan(text + end, length - end, &next) > 0 && unicode_is_word(next))
        return true;
    return begin > 0 && unicode_is_word(unicode_last(text, begin, &n));
}

bool added_tokens_next(const struct added_tokens *set, const char *text, size_t length, size_t done,
                       size_t *from, struct added_match *ret_match)
{
    if (set->n_tokens == 0)
        return false;
    while (*from < length) {
        size_t begin = *from, size = 0;
        int32_t found = longest(set, text + begin, length - begin, &size);
        if (found < 0) {
            ++*from;
            continue;
        }
        const struct added_token *token = &set->tokens[found];
        size_t end = begin + size;
        *from = end;
        if (token->single_word && touches_word(text, length, begin, end))
            continue;
        if (token->lstrip) {
            begin -= unicode_trailing_space(text, begin);
            if (begin < done)
                begin = done;
        }
        if (token->rstrip)
            end += unicode_leading_space(text + end, length - end);
        *ret_match = (struct added_match){token->id, begin, end};
        return true;
    }
    return false;
}
