/* added_tokens.h: finds added tokens in text: leftmost, then longest, in one pass over a trie. Built once
 * while loading, then read by any thread. */
#ifndef ENGINE_TEXT_ADDED_TOKENS_H
#define ENGINE_TEXT_ADDED_TOKENS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct added_token {
    int32_t id;
    bool single_word;    /* only where no word character touches it */
    bool lstrip, rstrip; /* takes the white space on that side with it */
};

struct added_node {
    int32_t child, sibling; /* 0 = none (the root is nobody's child) */
    int32_t token;          /* index into tokens, -1 = no token ends here */
    unsigned char byte;
};

struct added_tokens {
    struct added_token *tokens;
    struct added_node *nodes; /* nodes[0] is the root */
    int32_t n_tokens, n_nodes, token_capacity, node_capacity;
    int32_t first[256]; /* the root's children by byte, 0 = none */
};

struct added_match {
    int32_t id;
    size_t begin, end; /* with the white space it takes */
};

/* Returns 0 or ERROR_NO_MEMORY. */
int added_tokens_add(struct added_tokens *set, const char *content, size_t length,
                     const struct added_token *token);
/* The next match at or after *from, which moves past it. Text before `done` is taken already (by the match
 * before, whose white space may reach past *from). False when there is none. */
bool added_tokens_next(const struct added_tokens *set, const char *text, size_t length, size_t done,
                       size_t *from, struct added_match *ret_match);
void added_tokens_clear(struct added_tokens *set);

#endif
