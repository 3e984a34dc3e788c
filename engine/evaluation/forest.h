/* forest.h: the prefix trees of many rows of token ids, and where in them scores are wanted. Pure.
 *
 * Every row is a path from a root; rows that begin alike share the nodes of what they share, so a model that is run over each node
 * once, from its parent's recurrent state, has run over all rows. A shared stretch of fewer than FOREST_LEAST_SHARED tokens is not
 * worth a state: it stays with each of its children. The forest depends on the rows alone, not on their order. */
#ifndef ENGINE_EVALUATION_FOREST_H
#define ENGINE_EVALUATION_FOREST_H

#include "base/error.h"

#include <stdbool.h>
#include <stdint.h>

enum { FOREST_LEAST_SHARED = 4 };

/* One row: its last n_ids - n_context ids are to be scored. n_context >= 1. */
struct forest_row {
    const int32_t *ids;
    int32_t n_ids, n_context;
};

/* What follows the token at `position` of the row's path: ids[position + 1]. */
struct forest_mark {
    int32_t row, position;
};

struct forest_node {
    int32_t parent; /* -1 = a root */
    int32_t level;  /* 0 = a root */
    int32_t height; /* 0 = no children */
    int32_t n_children;
    int32_t start, end;          /* positions on the path */
    const int32_t *ids;          /* those of its own: [end - start], in one of the rows */
    int32_t first_mark, n_marks; /* by position, then row */
};

struct forest {
    int32_t n_nodes;
    struct forest_node *nodes; /* parents before their children */
    int32_t n_marks;
    struct forest_mark *marks;
    int64_t n_tokens;     /* of all nodes */
    int64_t n_row_tokens; /* of all rows, each run by itself */
};

/* The last id of a row is never run: nothing is asked of what follows it. share = false gives every row a tree of its own, which
 * shows what sharing is worth. The rows' ids must outlive the forest. Returns 0 or ERROR_NO_MEMORY. */
int forest_create(const struct forest_row *rows, int32_t n_rows, bool share, struct forest *ret_forest,
                  struct error *error);
void forest_free(struct forest *forest);

#endif
