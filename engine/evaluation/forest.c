/* forest.c: see forest.h.
 *
 * Rows are sorted; then each row's path is the last one's up to what both have in common, and a node of its own behind that. The
 * nodes of the current path are on a stack. A row that leaves the path within a node cuts the node: a new one takes the upper part
 * and the place on the stack. At the end short inner nodes are given to their children, nodes are put in order, and every scored
 * position finds the node that it lies in by going up from where its row ends. */
#include "engine/evaluation/forest.h"

#include <stdlib.h>
#include <string.h>

struct builder {
    const struct forest_row *rows;
    int32_t n_rows;
    int32_t *order; /* [n_rows] by ids */
    int32_t *ends;  /* [n_rows]: the node in which each row ends; -1 for a row of which nothing is run */
    struct forest_node *nodes; /* [2 * n_rows] */
    int32_t n_nodes;
    int32_t *stack; /* [n_nodes]: the current path */
    int32_t n_stack;
};

static int32_t run_length(const struct forest_row *row)
{
    return row->n_ids > row->n_context ? row->n_ids - 1 : 0;
}

static int32_t common_length(const struct forest_row *a, const struct forest_row *b)
{
    int32_t n = run_length(a) < run_length(b) ? run_length(a) : run_length(b), i = 0;
    while (i < n && a->ids[i] == b->ids[i])
        i++;
    return i;
}

static int compare_rows(const void *left, const void *right, void *arg)
{
    const struct forest_row *rows = arg;
    const int32_t i = *(const int32_t *)left, j = *(const int32_t *)right;
    const int32_t common = common_length(&rows[i], &rows[j]);
    const int32_t n = run_length(&rows[i]), m = run_length(&rows[j]);
    if (common < n && common < m)
        return rows[i].ids[common] < rows[j].ids[common] ? -1 : 1;
    if (n != m)
        return n < m ? -1 : 1;
    return (i > j) - (i < j);
}

static int32_t new_node(struct builder *builder, int32_t parent, int32_t start, int32_t end,
                        const int32_t *ids)
{
    builder->nodes[builder->n_nodes] =
        (struct forest_node){.parent = parent, .start = start, .end = end, .ids = ids};
    return builder->n_nodes++;
}

/* Leave the path at `length`: afterwards the stack's top, if any, ends there. */
static void leave_path(struct builder *builder, int32_t length)
{
    while (builder->n_stack && builder->nodes[builder->stack[builder->n_stack - 1]].start >= length)
        builder->n_stack--;
    if (!builder->n_stack)
        return;
    int32_t at = builder->stack[builder->n_stack - 1];
    struct forest_node *lower = &builder->nodes[at];
    if (lower->end == length)
        return;
    int32_t upper = new_node(builder, lower->parent, lower->start, length, lower->ids);
    lower->parent = upper;
    lower->ids += length - lower->start;
    lower->start = length;
    builder->stack[builder->n_stack - 1] = upper;
}

static void add_row(struct builder *builder, int32_t index, int32_t common)
{
    const struct forest_row *row = &builder->rows[index];
    int32_t length = run_length(row);
    leave_path(builder, common);
    if (length > common) {
        int32_t parent = builder->n_stack ? builder->stack[builder->n_stack - 1] : -1;
        builder->stack[builder->n_stack++] = new_node(builder, parent, common, length, row->ids + common);
    }
    builder->ends[index] = builder->n_stack && length ? builder->stack[builder->n_stack - 1] : -1;
}

/* ---- after the last row ---- */

/* Parents first. Nodes above others were made later only by cutting, so an order by (start, index) will do: a child starts where
 * its parent ends. */
struct placed {
    int32_t start, index;
};

static int compare_placed(const void *left, const void *right)
{
    const struct placed *a = left, *b = right;
    return a->start != b->start ? (a->start > b->start) - (a->start < b->start)
                                : (a->index > b->index) - (a->index < b->index);
}

/* Is the node too short to be shared? Then its children have its tokens, too, and if rows end in it it stays beside them. */
static void give_to_children(struct builder *builder, const struct placed *placed)
{
    for (int32_t i = 0; i < builder->n_nodes; i++) {
        struct forest_node *node = &builder->nodes[placed[i].index];
        if (node->parent < 0)
            continue;
        const struct forest_node *parent = &builder->nodes[node->parent];
        if (parent->end - parent->start >= FOREST_LEAST_SHARED)
            continue;
        node->ids -= parent->end - parent->start;
        node->start = parent->start;
        node->parent = parent->parent;
    }
}

/* Which nodes remain: those in which a row ends, and all above them. */
static int32_t keep_nodes(struct builder *builder, bool *kept)
{
    int32_t count = 0;
    for (int32_t i = 0; i < builder->n_rows; i++)
        for (int32_t at = builder->ends[i]; at >= 0 && !kept[at]; at = builder->nodes[at].parent) {
            kept[at] = true;
            count++;
        }
    return count;
}

static void link_nodes(struct forest *forest)
{
    for (int32_t i = 0; i < forest->n_nodes; i++) {
        struct forest_node *node = &forest->nodes[i];
        forest->n_tokens += node->end - node->start;
        if (node->parent >= 0) {
            node->level = forest->nodes[node->parent].level + 1;
            forest->nodes[node->parent].n_children++;
        }
    }
    for (int32_t i = forest->n_nodes; i-- > 0;) {
        int32_t parent = forest->nodes[i].parent;
        if (parent >= 0 && forest->nodes[parent].height <= forest->nodes[i].height)
            forest->nodes[parent].height = forest->nodes[i].height + 1;
    }
}

static int compare_marks(const void *left, const void *right)
{
    const struct forest_mark *a = left, *b = right;
    if (a->position != b->position)
        return a->position < b->position ? -1 : 1;
    return (a->row > b->row) - (a->row < b->row);
}

/* Two passes over all scored positions: count a node's, then place them. */
static void place_marks(const struct builder *builder, struct forest *forest)
{
    for (int pass = 0; pass < 2; pass++) {
        int32_t next = 0;
        for (int32_t i = 0; pass && i < forest->n_nodes; i++) {
            forest->nodes[i].first_mark = next;
            next += forest->nodes[i].n_marks;
            forest->nodes[i].n_marks = 0;
        }
        for (int32_t row = 0; row < builder->n_rows; row++) {
            int32_t at = builder->ends[row];
            for (int32_t position = run_length(&builder->rows[row]) - 1;
                 at >= 0 && position >= builder->rows[row].n_context - 1; position--) {
                while (position < forest->nodes[at].start)
                    at = forest->nodes[at].parent;
                struct forest_node *node = &forest->nodes[at];
                if (pass)
                    forest->marks[node->first_mark + node->n_marks] = (struct forest_mark){row, position};
                node->n_marks++;
            }
        }
    }
    for (int32_t i = 0; i < forest->n_nodes; i++)
        qsort(forest->marks + forest->nodes[i].first_mark, (size_t)forest->nodes[i].n_marks,
              sizeof *forest->marks, compare_marks);
}

static int finish(struct builder *builder, struct forest *forest, struct error *error)
{
    const size_t n = (size_t)builder->n_nodes + 1;
    struct placed *placed = malloc(n * sizeof *placed);
    bool *kept = calloc(n, sizeof *kept);
    int32_t *names = malloc(n * sizeof *names);
    int status = ERROR_NO_MEMORY;
    if (!placed || !kept || !names)
        goto done;
    for (int32_t i = 0; i < builder->n_nodes; i++)
        placed[i] = (struct placed){builder->nodes[i].start, i};
    qsort(placed, (size_t)builder->n_nodes, sizeof *placed, compare_placed);
    give_to_children(builder, placed);
    int32_t n_kept = keep_nodes(builder, kept);
    forest->nodes = malloc(((size_t)n_kept + 1) * sizeof *forest->nodes);
    forest->marks = malloc(((size_t)forest->n_marks + 1) * sizeof *forest->marks);
    if (!forest->nodes || !forest->marks)
        goto done;
    for (int32_t i = 0; i < builder->n_nodes; i++) {
        int32_t index = placed[i].index;
        if (!kept[index])
            continue;
        names[index] = forest->n_nodes;
        struct forest_node node = builder->nodes[index];
        node.parent = node.parent < 0 ? -1 : names[node.parent];
        forest->nodes[forest->n_nodes++] = node;
    }
    for (int32_t i = 0; i < builder->n_rows; i++)
        if (builder->ends[i] >= 0)
            builder->ends[i] = names[builder->ends[i]];
    link_nodes(forest);
    place_marks(builder, forest);
    status = 0;
done:
    free(placed);
    free(kept);
    free(names);
    return status ? error_set(error, status, "no memory for the prompts' prefixes") : 0;
}

int forest_create(const struct forest_row *rows, int32_t n_rows, bool share, struct forest *ret_forest,
                  struct error *error)
{
    const size_t n = (size_t)n_rows + 1;
    struct forest forest = {0};
    struct builder builder = {.rows = rows, .n_rows = n_rows};
    builder.order = malloc(n * sizeof *builder.order);
    builder.ends = malloc(n * sizeof *builder.ends);
    builder.nodes = malloc(2 * n * sizeof *builder.nodes);
    builder.stack = malloc(2 * n * sizeof *builder.stack);
    int status = 0;
    if (!builder.order || !builder.ends || !builder.nodes || !builder.stack)
        status = error_set(error, ERROR_NO_MEMORY, "no memory for the prompts' prefixes");
    for (int32_t i = 0; !status && i < n_rows; i++) {
        builder.order[i] = i;
        forest.n_row_tokens += run_length(&rows[i]);
        forest.n_marks += rows[i].n_ids - rows[i].n_context;
    }
    if (!status) {
        qsort_r(builder.order, (size_t)n_rows, sizeof *builder.order, compare_rows, (void *)(uintptr_t)rows);
        for (int32_t i = 0; i < n_rows; i++) {
            const int32_t row = builder.order[i];
            const int32_t common = i && share ? common_length(&rows[builder.order[i - 1]], &rows[row]) : 0;
            if (!common)
                builder.n_stack = 0;
            add_row(&builder, row, common);
        }
        status = finish(&builder, &forest, error);
    }
    free(builder.order);
    free(builder.ends);
    free(builder.nodes);
    free(builder.stack);
    if (status)
        forest_free(&forest);
    else
        *ret_forest = forest;
    return status;
}

void forest_free(struct forest *forest)
{
    free(forest->nodes);
    free(forest->marks);
    *forest = (struct forest){0};
}
