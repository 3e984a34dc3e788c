/* The Mersenne Twister against values from CPython 3.11: random.Random(seed), then the calls named in each test. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/error.h"
#include "base/random_mt.h"

static void test_words(void **state)
{
    (void)state;
    static const uint32_t words_1234[] = {4150886329, 3342196574, 1892932127, 501869158, 32175636},
                          words_0[] = {3626764237, 1654615998, 3255389356},
                          words_large[] = {404802386, 2407860725, 957238923};
    struct random_mt random;
    random_mt_seed(&random, 1234);
    for (int i = 0; i < 5; i++)
        assert_int_equal(random_mt_bits(&random, 32), words_1234[i]);
    for (int i = 5; i < 10000; i++)
        random_mt_bits(&random, 32);
    assert_int_equal(random_mt_bits(&random, 32), 2299709130);
    /* A key of two words. */
    random_mt_seed(&random, ((uint64_t)1 << 53) - 1);
    for (int i = 0; i < 3; i++)
        assert_int_equal(random_mt_bits(&random, 32), words_large[i]);
    random_mt_seed(&random, 0);
    for (int i = 0; i < 3; i++)
        assert_int_equal(random_mt_bits(&random, 32), words_0[i]);
}

static void test_bits_of_other_sizes(void **state)
{
    (void)state;
    struct random_mt random;
    random_mt_seed(&random, 0);
    for (int i = 0; i < 3; i++)
        random_mt_bits(&random, 32);
    assert_int_equal(random_mt_bits(&random, 7), 113);
    assert_int_equal(random_mt_bits(&random, 7), 53);
    assert_int_equal(random_mt_bits(&random, 7), 5);
    assert_int_equal(random_mt_bits(&random, 53), 8696133065399866);
    assert_int_equal(random_mt_bits(&random, 53), 4376848748439138);
    assert_true(random_mt_bits(&random, 64) == UINT64_C(16938433693753131896));
}

static void test_below(void **state)
{
    (void)state;
    static const struct {
        uint64_t n, drawn;
    } draws[] = {{1, 0},
                 {2, 0},
                 {3, 0},
                 {10, 1},
                 {1838, 1652},
                 {UINT64_C(1) << 33, 2500648409},
                 {UINT64_C(1) << 63, UINT64_C(1815566295097997766)}};
    struct random_mt random;
    random_mt_seed(&random, 1234);
    for (size_t i = 0; i < sizeof draws / sizeof *draws; i++)
        assert_true(random_mt_below(&random, draws[i].n) == draws[i].drawn);
}

/* One generator for all samples: each must also take exactly as many words as Python does. Sizes at both sides of the border
 * between Python's two ways of drawing. */
static void test_samples(void **state)
{
    (void)state;
    static const struct {
        int64_t n, k, drawn[7]; /* of more than 7: the first six and the last */
    } samples[] = {
        {1838, 4, {1593, 902, 239, 15}},
        {1838, 4, {185, 1652, 1192, 71}},
        {5, 5, {0, 4, 1, 3, 2}},
        {21, 3, {0, 20, 11}},
        {22, 3, {20, 19, 15}},
        {21, 5, {19, 14, 4, 2, 5}},
        {22, 5, {3, 0, 16, 15, 7}},
        {85, 6, {8, 69, 59, 84, 76, 11}},
        {86, 6, {65, 74, 5, 34, 71, 8}},
        {84, 6, {82, 38, 61, 45, 34, 31}},
        {1, 1, {0}},
        {10, 0, {0}},
        {300, 20, {232, 271, 9, 260, 36, 2, 177}},
        {277, 22, {56, 271, 72, 156, 232, 20, 243}},
        {278, 22, {23, 241, 87, 225, 265, 224, 80}},
        {1000, 22, {594, 929, 965, 275, 995, 158, 38}},
        {2251, 3, {898, 2075, 359}},
        {1045, 86, {649, 625, 943, 135, 527, 149, 409}},
        {1046, 86, {566, 232, 768, 561, 438, 609, 298}},
    };
    struct random_mt random;
    int64_t drawn[100];
    random_mt_seed(&random, 1234);
    for (size_t i = 0; i < sizeof samples / sizeof *samples; i++) {
        int64_t k = samples[i].k;
        assert_int_equal(random_mt_sample(&random, samples[i].n, k, drawn), 0);
        for (int64_t j = 0; j < k && j < (k > 7 ? 6 : 7); j++)
            assert_int_equal(drawn[j], samples[i].drawn[j]);
        if (k > 7)
            assert_int_equal(drawn[k - 1], samples[i].drawn[6]);
    }
    assert_int_equal(random_mt_bits(&random, 32), 2282331192);
}

static void test_a_sample_larger_than_its_pool(void **state)
{
    (void)state;
    struct random_mt random;
    int64_t drawn[4];
    random_mt_seed(&random, 1234);
    assert_int_equal(random_mt_sample(&random, 3, 4, drawn), ERROR_INVALID);
    assert_int_equal(random_mt_sample(&random, 3, -1, drawn), ERROR_INVALID);
    assert_int_equal(random_mt_sample(&random, 0, 0, drawn), 0);
    assert_int_equal(random_mt_bits(&random, 32), 4150886329); /* nothing was drawn */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_words),
        cmocka_unit_test(test_bits_of_other_sizes),
        cmocka_unit_test(test_below),
        cmocka_unit_test(test_samples),
        cmocka_unit_test(test_a_sample_larger_than_its_pool),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
