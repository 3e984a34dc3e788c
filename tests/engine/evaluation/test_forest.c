/* The prefix forest: what is shared, that every row is a path, and that nothing depends on the rows' order. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "engine/evaluation/forest.h"

#include <stdlib.h>
#include <string.h>

static struct forest make(const struct forest_row *rows, int32_t n_rows, bool share)
{
    struct forest forest;
    assert_int_equal(forest_create(rows, n_rows, share, &forest, NULL), 0);
    return forest;
}

/* The node that holds a row's position and its mark, found by looking at all. */
static const struct forest_node *node_of(const struct forest *forest, int32_t row, int32_t position)
{
    const struct forest_node *found = NULL;
    for (int32_t i = 0; i < forest->n_nodes; i++) {
        const struct forest_node *node = &forest->nodes[i];
        for (int32_t j = 0; j < node->n_marks; j++) {
            const struct forest_mark *mark = &forest->marks[node->first_mark + j];
            if (mark->row != row || mark->position != position)
                continue;
            assert_null(found);
            assert_true(position >= node->start && position < node->end);
            found = node;
        }
    }
    return found;
}

/* Every scored position is in one node, and the way from there to the root spells the row. */
static void check(const struct forest *forest, const struct forest_row *rows, int32_t n_rows)
{
    int32_t n_marks = 0;
    int64_t n_tokens = 0;
    for (int32_t i = 0; i < forest->n_nodes; i++) {
        const struct forest_node *node = &forest->nodes[i];
        assert_true(node->parent < i && node->end > node->start);
        assert_int_equal(node->start, node->parent < 0 ? 0 : forest->nodes[node->parent].end);
        if (node->parent >= 0)
            assert_true(forest->nodes[node->parent].height > node->height &&
                        forest->nodes[node->parent].level == node->level - 1);
        if (node->n_children)
            assert_true(node->end - node->start >= FOREST_LEAST_SHARED);
        n_tokens += node->end - node->start;
    }
    for (int32_t row = 0; row < n_rows; row++) {
        for (int32_t position = rows[row].n_context - 1; position < rows[row].n_ids - 1; position++) {
            const struct forest_node *node = node_of(forest, row, position);
            if (!node)
                fail_msg("position %d of row %d is nowhere", position, row);
            assert_memory_equal(node->ids, rows[row].ids + node->start,
                                (size_t)(position + 1 - node->start) * sizeof(int32_t));
            while (node->parent >= 0) {
                node = &forest->nodes[node->parent];
                assert_memory_equal(node->ids, rows[row].ids + node->start,
                                    (size_t)(node->end - node->start) * sizeof(int32_t));
            }
            n_marks++;
        }
    }
    assert_int_equal(forest->n_marks, n_marks);
    assert_true(forest->n_tokens == n_tokens);
}

#define ROW(context, ...)                                                                                    \
    {                                                                                                        \
        .ids = (const int32_t[]){__VA_ARGS__}, .n_ids = sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t),  \
        .n_context = (context)                                                                               \
    }

static void test_choices_fork_behind_their_context(void **state)
{
    (void)state;
    const struct forest_row rows[] = {ROW(6, 1, 2, 3, 4, 5, 6, 7, 8), ROW(6, 1, 2, 3, 4, 5, 6, 9, 8),
                                      ROW(6, 1, 2, 3, 4, 5, 6, 9, 9, 9)};
    struct forest forest = make(rows, 3, true);
    check(&forest, rows, 3);
    /* Six tokens once, then 7 | 9 | 9 9: the 9 that two of them share is no node. */
    assert_int_equal(forest.n_nodes, 4);
    assert_int_equal(forest.n_tokens, 6 + 1 + 1 + 2);
    assert_int_equal(forest.n_row_tokens, 7 + 7 + 8);
    assert_int_equal(forest.nodes[0].n_children, 3);
    assert_int_equal(forest.nodes[0].n_marks, 3);
    forest_free(&forest);
    forest = make(rows, 3, false);
    check(&forest, rows, 3);
    assert_int_equal(forest.n_nodes, 3);
    assert_int_equal(forest.n_tokens, forest.n_row_tokens);
    forest_free(&forest);
}

static void test_letters_are_targets_of_one_row(void **state)
{
    (void)state;
    const struct forest_row rows[] = {ROW(5, 1, 2, 3, 4, 5, 6), ROW(5, 1, 2, 3, 4, 5, 7),
                                      ROW(5, 1, 2, 3, 4, 5, 8), ROW(5, 1, 2, 3, 4, 5, 8)};
    struct forest forest = make(rows, 4, true);
    check(&forest, rows, 4);
    assert_int_equal(forest.n_nodes, 1);
    assert_int_equal(forest.nodes[0].n_marks, 4);
    forest_free(&forest);
}

static void test_shared_prefix_of_documents(void **state)
{
    (void)state;
    const struct forest_row rows[] = {
        ROW(9, 1, 2, 3, 4, 20, 21, 22, 23, 24, 50, 51),
        ROW(9, 1, 2, 3, 4, 20, 21, 22, 23, 24, 60, 61),
        ROW(8, 1, 2, 3, 4, 30, 31, 32, 33, 50),
        ROW(8, 1, 2, 3, 4, 30, 31, 32, 33, 60, 61),
        ROW(4, 1, 2, 3, 4, 5),
        ROW(1, 8, 9),
    };
    struct forest forest = make(rows, 6, true);
    check(&forest, rows, 6);
    assert_int_equal(forest.n_tokens, 4 + (5 + 1 + 1) + (4 + 1) + 1);
    forest_free(&forest);
}

/* A short stretch that a row ends in: the row keeps it to itself, those that go on have it, too. */
static void test_short_stretches_are_not_shared(void **state)
{
    (void)state;
    const struct forest_row rows[] = {ROW(1, 1, 2, 3), ROW(2, 1, 2, 3, 4), ROW(1, 1, 2, 4, 5)};
    struct forest forest = make(rows, 3, true);
    check(&forest, rows, 3);
    assert_int_equal(forest.n_nodes, 3);
    assert_int_equal(forest.n_tokens, 2 + 3 + 3);
    forest_free(&forest);
}

static void test_nothing_to_score(void **state)
{
    (void)state;
    const struct forest_row rows[] = {ROW(3, 1, 2, 3), ROW(1, 1)};
    struct forest forest = make(rows, 2, true);
    assert_int_equal(forest.n_nodes, 0);
    assert_int_equal(forest.n_marks, 0);
    forest_free(&forest);
    forest = make(rows, 0, true);
    assert_int_equal(forest.n_nodes, 0);
    forest_free(&forest);
}

static uint32_t next(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 16;
}

/* Random rows over three ids, so that all sorts of overlaps occur; and the same in another order. */
static void test_random_rows(void **state)
{
    (void)state;
    enum { ROWS = 60, LONGEST = 24 };
    static int32_t ids[ROWS][LONGEST];
    uint32_t seed = 7;
    for (int round = 0; round < 60; round++) {
        struct forest_row rows[ROWS], turned[ROWS];
        int32_t n_rows = 1 + (int32_t)(next(&seed) % ROWS);
        uint32_t n_symbols = 1 + next(&seed) % 3;
        for (int32_t i = 0; i < n_rows; i++) {
            int32_t n = 1 + (int32_t)(next(&seed) % LONGEST);
            for (int32_t j = 0; j < n; j++)
                ids[i][j] = (int32_t)(next(&seed) % (j < 8 ? 1 : n_symbols));
            rows[i] = (struct forest_row){ids[i], n, 1 + (int32_t)(next(&seed) % (uint32_t)n)};
            turned[n_rows - 1 - i] = rows[i];
        }
        struct forest forest = make(rows, n_rows, true), other = make(turned, n_rows, true);
        check(&forest, rows, n_rows);
        check(&other, turned, n_rows);
        assert_int_equal(forest.n_nodes, other.n_nodes);
        assert_true(forest.n_tokens == other.n_tokens && forest.n_tokens <= forest.n_row_tokens);
        forest_free(&forest);
        forest_free(&other);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choices_fork_behind_their_context),
        cmocka_unit_test(test_letters_are_targets_of_one_row),
        cmocka_unit_test(test_shared_prefix_of_documents),
        cmocka_unit_test(test_short_stretches_are_not_shared),
        cmocka_unit_test(test_nothing_to_score),
        cmocka_unit_test(test_random_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
