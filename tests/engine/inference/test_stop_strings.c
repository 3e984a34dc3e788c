/* test_stop_strings.c: where a text ends, and how much of it is certain before that. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/inference/stop_strings.h"

#include <string.h>

static void expect(const char *const *strings, int32_t count, const char *text, bool found, size_t keep)
{
    struct stop_strings stops;
    size_t got = 999;
    assert_int_equal(stop_strings_create(&stops, strings, count), 0);
    assert_int_equal(stop_strings_find(&stops, text, strlen(text), &got), found);
    assert_int_equal(got, keep);
    stop_strings_free(&stops);
}

static void test_text_before_the_stop_string_is_kept(void **state)
{
    (void)state;
    const char *const stops[] = {"\n\n", "END"};
    expect(stops, 2, "one END two", true, 4);
    expect(stops, 2, "one\n\ntwo END", true, 3);
    expect(stops, 2, "END", true, 0);
    expect(stops, 2, "", false, 0);
    expect(stops, 2, "nothing", false, 7);
}

static void test_a_beginning_is_held_back(void **state)
{
    (void)state;
    const char *const stops[] = {"\n\n", "END", "ENOUGH"};
    expect(stops, 3, "one\n", false, 3);
    expect(stops, 3, "one E", false, 4);
    expect(stops, 3, "one EN", false, 4);
    expect(stops, 3, "one ENO", false, 4);
    expect(stops, 3, "one EX", false, 6);
    expect(stops, 3, "E", false, 0);
}

static void test_of_overlapping_ones_the_first_complete_counts(void **state)
{
    (void)state;
    const char *const stops[] = {"abc", "b"};
    expect(stops, 2, "xabc", true, 2);
    const char *const nested[] = {"c", "abc"};
    expect(nested, 2, "xabc", true, 1);
    const char *const repeated[] = {"aab"};
    expect(repeated, 1, "aaab", true, 1);
    expect(repeated, 1, "aaa", false, 1);
}

static void test_characters_of_many_bytes(void **state)
{
    (void)state;
    const char *const stops[] = {"\xE2\x82\xAC!"};
    expect(stops, 1, "5 \xE2\x82\xAC", false, 2);
    expect(stops, 1, "5 \xE2\x82\xAC!", true, 2);
    expect(stops, 1, "5 \xE2\x82\xAC?", false, 6);
}

static void test_none_and_empty_ones_never_stop(void **state)
{
    (void)state;
    const char *const stops[] = {"", ""};
    expect(stops, 2, "text", false, 4);
    expect(NULL, 0, "text", false, 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_text_before_the_stop_string_is_kept),
        cmocka_unit_test(test_a_beginning_is_held_back),
        cmocka_unit_test(test_of_overlapping_ones_the_first_complete_counts),
        cmocka_unit_test(test_characters_of_many_bytes),
        cmocka_unit_test(test_none_and_empty_ones_never_stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
