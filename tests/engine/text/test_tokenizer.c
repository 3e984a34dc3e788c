/* test_tokenizer.c: ids and text against Hugging Face's, exactly; streams; limits; refusals. */
#include "support.h"

#include "engine/text/unicode.h"

#include <jansson.h>
#include <time.h>

static json_t *read_json(const char *relative)
{
    json_error_t why;
    json_t *json = json_load_file(source_path(relative), 0, &why);
    if (!json)
        fail_msg("%s: %s", relative, why.text);
    return json;
}

static void check_decoded(const struct tokenizer *tokenizer, const struct token_list *ids, bool skip_special,
                          const json_t *expected)
{
    struct buffer text = {0};
    struct error error = {0};
    assert_int_equal(tokenizer_decode(tokenizer, ids->ids, ids->count, skip_special, &text, &error), 0);
    assert_int_equal(text.length, json_string_length(expected));
    assert_memory_equal(text.data ? text.data : "", json_string_value(expected), text.length);
    buffer_free(&text);
}

static void check_case(const struct tokenizer *tokenizer, const json_t *object)
{
    const json_t *text = json_object_get(object, "text"), *ids = json_object_get(object, "ids");
    struct token_list got = {0};
    struct error error = {0};
    assert_int_equal(
        tokenizer_encode(tokenizer, json_string_value(text), json_string_length(text), &got, &error), 0);
    bool same = got.count == json_array_size(ids);
    for (size_t i = 0; same && i < got.count; i++)
        same = got.ids[i] == json_integer_value(json_array_get(ids, i));
    if (!same)
        fail_msg("other ids for \"%s\"", json_string_value(text));
    check_decoded(tokenizer, &got, false, json_object_get(object, "decoded"));
    if (json_object_get(object, "without_special"))
        check_decoded(tokenizer, &got, true, json_object_get(object, "without_special"));
    token_list_free(&got);
}

static void test_vectors(void **state)
{
    (void)state;
    json_t *vectors = read_json("tests/vectors/tokenizer.json");
    const char *const files[][2] = {{"hatchling", HATCHLING}, {"gpt-neox-20b", NEOX}};
    for (size_t i = 0; i < 2; i++) {
        struct tokenizer *tokenizer = load_tokenizer(files[i][1]);
        const json_t *cases = json_object_get(vectors, files[i][0]);
        assert_true(json_array_size(cases) > 10);
        for (size_t j = 0; j < json_array_size(cases); j++)
            check_case(tokenizer, json_array_get(cases, j));
        tokenizer_free(tokenizer);
    }
    json_decref(vectors);
}

/* tokenizer.json with some keys replaced and added tokens appended, loaded. */
static int load_patched(const char *relative, json_t *patch, const json_t *added,
                        struct tokenizer **ret_tokenizer, struct error *error)
{
    json_t *json = read_json(relative);
    json_object_update_recursive(json, patch);
    json_t *list = json_object_get(json, "added_tokens");
    for (size_t i = 0; i < json_array_size(added); i++)
        json_array_append(list, json_array_get(added, i));
    char path[64], *text = json_dumps(json, JSON_COMPACT);
    temporary_file(path, text, strlen(text));
    int status = tokenizer_load(path, ret_tokenizer, error);
    unlink(path);
    free(text);
    json_decref(json);
    return status;
}

static void test_unicode_vectors(void **state)
{
    (void)state;
    json_t *vectors = read_json("tests/vectors/tokenizer_unicode.json");
    for (size_t i = 0; i < json_array_size(vectors); i++) {
        json_t *variant = json_array_get(vectors, i);
        const char *name = json_string_value(json_object_get(variant, "tokenizer"));
        struct tokenizer *tokenizer = NULL;
        struct error error = {0};
        if (load_patched(strcmp(name, "hatchling") ? NEOX : HATCHLING, json_object_get(variant, "patch"),
                         json_object_get(variant, "added_tokens"), &tokenizer, &error))
            fail_msg("%s", error.message);
        const json_t *cases = json_object_get(variant, "cases");
        assert_int_equal(json_array_size(cases), 150);
        for (size_t j = 0; j < json_array_size(cases); j++)
            check_case(tokenizer, json_array_get(cases, j));
        tokenizer_free(tokenizer);
    }
    json_decref(vectors);
}

static void test_lookup(void **state)
{
    (void)state;
    struct tokenizer *tokenizer = load_tokenizer("models/hatchling"); /* a folder serves as well */
    assert_int_equal(tokenizer_size(tokenizer), 8192);
    assert_int_equal(tokenizer_find(tokenizer, "<|endoftext|>"), 0);
    assert_true(tokenizer_is_special(tokenizer, 0));
    assert_false(tokenizer_is_special(tokenizer, 2828));
    assert_false(tokenizer_is_special(tokenizer, -1));
    assert_false(tokenizer_is_special(tokenizer, 8192));
    assert_int_equal(tokenizer_find(tokenizer, "no such token"), -1);
    assert_int_equal(tokenizer_find(tokenizer, "\xC4\xA0world"), 1116); /* "Ġworld" */
    size_t length;
    assert_memory_equal(tokenizer_bytes(tokenizer, 1116, &length), " world", 6);
    assert_int_equal(length, 6);
    assert_null(tokenizer_bytes(tokenizer, 8192, &length));
    assert_int_equal(length, 0);
    assert_null(tokenizer_bytes(tokenizer, -1, &length));

    struct buffer text = {0};
    struct error error = {0};
    const int32_t wrong[] = {2828, 8192};
    assert_int_equal(tokenizer_decode(tokenizer, wrong, 2, false, &text, &error), ERROR_INVALID);
    assert_non_null(strstr(error.message, "8192"));
    struct token_list none = {0};
    assert_int_equal(tokenizer_encode(tokenizer, "", 0, &none, &error), 0);
    assert_int_equal(none.count, 0);
    buffer_free(&text);
    tokenizer_free(tokenizer);

    /* Vocabulary token "ĠĠ" and the added token of two real spaces are two things. */
    tokenizer = load_tokenizer(NEOX);
    assert_int_equal(tokenizer_size(tokenizer), 50277);
    assert_int_not_equal(tokenizer_find(tokenizer, "  "), tokenizer_find(tokenizer, "\xC4\xA0\xC4\xA0"));
    tokenizer_free(tokenizer);
}

static void test_continued(void **state)
{
    (void)state;
    json_t *patch = json_pack("{s:{s:s,s:b,s:b}}", "pre_tokenizer", "type", "ByteLevel", "add_prefix_space",
                              1, "trim_offsets", 1);
    struct tokenizer *tokenizer = NULL;
    assert_int_equal(load_patched(HATCHLING, patch, NULL, &tokenizer, NULL), 0);
    struct token_list start = {0}, rest = {0};
    assert_int_equal(tokenizer_encode(tokenizer, "world", 5, &start, NULL), 0);
    assert_int_equal(tokenizer_encode_continued(tokenizer, " world", 6, &rest, NULL), 0);
    assert_int_equal(start.count, 1);
    assert_int_equal(start.ids[0], 1116);
    assert_int_equal(rest.ids[0], 1116);
    assert_int_equal(tokenizer_encode_continued(tokenizer, "world", 5, &rest, NULL), 0);
    assert_int_not_equal(rest.ids[1], 1116);
    token_list_free(&start);
    token_list_free(&rest);
    tokenizer_free(tokenizer);
    json_decref(patch);
}

static size_t put_character(char *to, uint64_t *seed)
{
    static const uint32_t limits[] = {0x80, 0x80, 0x800, 0x10000, 0x110000};
    uint32_t c = (uint32_t)(draw(seed) % limits[draw(seed) % 5]);
    if (c >= 0xD800 && c < 0xE000)
        c = ' ';
    if (c < 0x80) {
        to[0] = (char)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6)
        to[i] = (char)(0x80 | (c & 0x3F));
    to[0] = (char)((0xF00 >> n & 0xF0) | c);
    return n;
}

/* Texts of the vectors, cut anywhere: what begins one has the ids of its head, and then those of the rest. */
static void test_cuts(void **state)
{
    (void)state;
    json_t *vectors = read_json("tests/vectors/tokenizer.json");
    const char *const files[][2] = {{"hatchling", HATCHLING}, {"gpt-neox-20b", NEOX}};
    int64_t n_cuts = 0;
    for (size_t i = 0; i < 2; i++) {
        struct tokenizer *tokenizer = load_tokenizer(files[i][1]);
        const json_t *cases = json_object_get(vectors, files[i][0]);
        for (size_t j = 0; j < json_array_size(cases); j++) {
            const json_t *json = json_object_get(json_array_get(cases, j), "text");
            const char *text = json_string_value(json);
            const size_t length = json_string_length(json) < 300 ? json_string_length(json) : 300;
            struct token_list whole = {0};
            assert_int_equal(tokenizer_encode(tokenizer, text, length, &whole, NULL), 0);
            for (size_t begin = 0; begin <= length; begin++) {
                const size_t cut = tokenizer_cut(tokenizer, text, begin);
                struct token_list parts = {0};
                assert_true(cut < begin || !begin);
                if (!cut)
                    continue;
                n_cuts++;
                assert_int_equal(tokenizer_encode(tokenizer, text, cut, &parts, NULL), 0);
                assert_int_equal(
                    tokenizer_encode_continued(tokenizer, text + cut, length - cut, &parts, NULL), 0);
                assert_int_equal(parts.count, whole.count);
                assert_memory_equal(parts.ids, whole.ids, whole.count * sizeof *whole.ids);
                token_list_free(&parts);
            }
            token_list_free(&whole);
        }
        tokenizer_free(tokenizer);
    }
    assert_true(n_cuts > 100);
    json_decref(vectors);
}

static void test_round_trips(void **state)
{
    (void)state;
    struct tokenizer *tokenizer = load_tokenizer(HATCHLING); /* no normalizer: nothing may change */
    uint64_t seed = 7;
    for (int round = 0; round < 3000; round++) {
        char text[400];
        size_t length = 0, count = draw(&seed) % 90;
        for (size_t i = 0; i < count; i++)
            length += put_character(text + length, &seed);
        assert_int_equal(utf8_valid_prefix(text, length), length);
        struct token_list ids = {0};
        struct buffer back = {0};
        assert_int_equal(tokenizer_encode(tokenizer, text, length, &ids, NULL), 0);
        assert_int_equal(tokenizer_decode(tokenizer, ids.ids, ids.count, false, &back, NULL), 0);
        assert_int_equal(back.length, length);
        if (length)
            assert_memory_equal(back.data, text, length);
        token_list_free(&ids);
        buffer_free(&back);
    }
    tokenizer_free(tokenizer);
}

/* Expected values: Python's bytes.decode("utf-8", "replace"). */
static void test_invalid_utf8(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"a\xFF"
         "b",
         "a\uFFFDb"},
        {"\xC3", "\uFFFD"},
        {"\xE2\x82", "\uFFFD"},
        {"\xE2\x82"
         "A",
         "\uFFFDA"},
        {"\xE2\x28\xA1", "\uFFFD(\uFFFD"},
        {"\xF0\x9F\x98", "\uFFFD"},
        {"\xF0\x9F\xE2\x82\xAC", "\uFFFD€"},
        {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},           /* a surrogate */
        {"\xC0\xAF", "\uFFFD\uFFFD"},                     /* overlong */
        {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"}, /* past U+10FFFF */
        {"\x80\x80", "\uFFFD\uFFFD"},
        {"\xF1\x80\x80\xF1\x80", "\uFFFD\uFFFD"},
    };
    struct tokenizer *tokenizer = load_tokenizer(HATCHLING);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct token_list got = {0}, expected = {0};
        assert_int_equal(tokenizer_encode(tokenizer, cases[i][0], strlen(cases[i][0]), &got, NULL), 0);
        assert_int_equal(tokenizer_encode(tokenizer, cases[i][1], strlen(cases[i][1]), &expected, NULL), 0);
        assert_int_equal(got.count, expected.count);
        assert_memory_equal(got.ids, expected.ids, got.count * sizeof *got.ids);
        struct buffer text = {0};
        unsigned char held[4];
        size_t n_held = 0;
        for (const char *byte = cases[i][0]; *byte; byte++)
            utf8_feed(held, &n_held, byte, 1, &text);
        utf8_finish(&n_held, &text);
        assert_string_equal(text.data, cases[i][1]);
        buffer_free(&text);
        token_list_free(&got);
        token_list_free(&expected);
    }
    tokenizer_free(tokenizer);
}

static void test_streams(void **state)
{
    (void)state;
    const char *const files[] = {HATCHLING, NEOX};
    uint64_t seed = 11;
    for (size_t f = 0; f < 2; f++) {
        struct tokenizer *tokenizer = load_tokenizer(files[f]);
        for (int round = 0; round < 500; round++) {
            int32_t ids[60];
            for (size_t i = 0; i < 60; i++) /* single bytes often: they make and break characters */
                ids[i] =
                    (int32_t)(draw(&seed) % (draw(&seed) % 3 ? 260 : (uint64_t)tokenizer_size(tokenizer)));
            bool skip = round % 2;
            struct buffer whole = {0}, pieces = {0};
            struct token_stream stream = {0};
            assert_int_equal(tokenizer_decode(tokenizer, ids, 60, skip, &whole, NULL), 0);
            for (size_t i = 0; i < 60; i++) {
                token_stream_push(&stream, tokenizer, ids[i], skip, &pieces);
                assert_int_equal(utf8_valid_prefix(pieces.data, pieces.length), pieces.length);
            }
            token_stream_flush(&stream, &pieces);
            assert_int_equal(whole.length, pieces.length);
            assert_memory_equal(whole.data, pieces.data, whole.length);
            buffer_free(&whole);
            buffer_free(&pieces);
        }
        tokenizer_free(tokenizer);
    }
}

/* A megabyte in one piece takes a fraction of a second; quadratic code would take hours. */
static void test_long_words(void **state)
{
    (void)state;
    enum { LENGTH = 1 << 20 };
    static const char *const units[] = {"a", " ",  "ab",   "\xCC\x81\xCC\xA3", "\xF0\x9F\x99\x82",
                                        "!", "\n", "\xFF", "<|endoftext|",     "0"};
    char *text = malloc(LENGTH);
    assert_non_null(text);
    struct tokenizer *tokenizer = load_tokenizer(NEOX);
    for (size_t u = 0; u <= sizeof units / sizeof *units; u++) {
        uint64_t seed = 3;
        size_t n = u < sizeof units / sizeof *units ? strlen(units[u]) : 0, length = 0;
        for (; n && length + n <= LENGTH; length += n)
            memcpy(text + length, units[u], n);
        for (; !n && length < LENGTH; length++)
            text[length] = (char)('a' + draw(&seed) % 26);
        struct token_list ids = {0};
        clock_t begin = clock();
        assert_int_equal(tokenizer_encode(tokenizer, text, length, &ids, NULL), 0);
        double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
        assert_true(ids.count > 0);
        if (seconds > 10)
            fail_msg("%.1f s for a megabyte of case %zu", seconds, u);
        token_list_free(&ids);
    }
    tokenizer_free(tokenizer);
    free(text);
}

static void refuse(const char *key, json_t *value, int code, const char *expected)
{
    json_t *patch = json_pack("{s:o}", key, value);
    struct tokenizer *tokenizer = NULL;
    struct error error = {0};
    int status = load_patched(HATCHLING, patch, NULL, &tokenizer, &error);
    if (status != code || !strstr(error.message, expected))
        fail_msg("status %d, \"%s\" where \"%s\" was expected", status, error.message, expected);
    assert_null(tokenizer);
    json_decref(patch);
}

static json_t *added_token(const char *content, int id)
{
    return json_pack("[{s:s,s:i,s:b,s:b,s:b,s:b,s:b}]", "content", content, "id", id, "special", 0,
                     "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0);
}

static void test_refusals(void **state)
{
    (void)state;
    refuse("normalizer", json_pack("{s:s}", "type", "NFKC"), ERROR_UNSUPPORTED, "NFKC");
    refuse("normalizer",
           json_pack("{s:s,s:[{s:s},{s:s}]}", "type", "Sequence", "normalizers", "type", "NFC", "type",
                     "Lowercase"),
           ERROR_UNSUPPORTED, "Lowercase");
    refuse("pre_tokenizer", json_pack("{s:s}", "type", "Metaspace"), ERROR_UNSUPPORTED, "Metaspace");
    refuse("pre_tokenizer", json_null(), ERROR_UNSUPPORTED, "pre_tokenizer");
    refuse("pre_tokenizer", json_pack("{s:s}", "add_prefix_space", "yes"), ERROR_CORRUPT, "add_prefix_space");
    refuse("decoder", json_pack("{s:s}", "type", "WordPiece"), ERROR_UNSUPPORTED, "WordPiece");
    refuse("post_processor", json_pack("{s:s}", "type", "TemplateProcessing"), ERROR_UNSUPPORTED,
           "TemplateProcessing");
    refuse("model", json_pack("{s:s}", "type", "Unigram"), ERROR_UNSUPPORTED, "Unigram");
    refuse("model", json_pack("{s:b}", "byte_fallback", 1), ERROR_UNSUPPORTED, "byte_fallback");
    refuse("model", json_pack("{s:b}", "ignore_merges", 1), ERROR_UNSUPPORTED, "ignore_merges");
    refuse("model", json_pack("{s:f}", "dropout", 0.1), ERROR_UNSUPPORTED, "dropout");
    refuse("model", json_pack("{s:s}", "end_of_word_suffix", "</w>"), ERROR_UNSUPPORTED,
           "end_of_word_suffix");
    refuse("model", json_pack("{s:n}", "merges"), ERROR_CORRUPT, "merges");
    refuse("model", json_pack("{s:[s]}", "merges", "a b c"), ERROR_CORRUPT, "merge 0");
    refuse("model", json_pack("{s:[[s,s]]}", "merges", "a", "qqq"), ERROR_CORRUPT, "aqqq");
    refuse("model", json_pack("{s:{s:i}}", "vocab", "fresh", -1), ERROR_CORRUPT, "fresh");
    refuse("model", json_pack("{s:{s:i}}", "vocab", "fresh", 5), ERROR_CORRUPT, "two tokens");
    refuse("added_tokens", added_token("<|endoftext|>", 7), ERROR_CORRUPT, "endoftext");
    refuse("added_tokens", added_token("", 8192), ERROR_CORRUPT, "content");
    refuse("model", json_null(), ERROR_CORRUPT, "model");

    struct tokenizer *tokenizer = NULL;
    struct error error = {0};
    char path[64];
    temporary_file(path, "{\"model\":", 9);
    assert_int_equal(tokenizer_load(path, &tokenizer, &error), ERROR_CORRUPT);
    unlink(path);
    assert_int_not_equal(tokenizer_load(path, &tokenizer, &error), 0);
    assert_null(tokenizer);
    tokenizer_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_vectors),      cmocka_unit_test(test_unicode_vectors),
        cmocka_unit_test(test_lookup),       cmocka_unit_test(test_continued),
        cmocka_unit_test(test_cuts),         cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_invalid_utf8), cmocka_unit_test(test_streams),
        cmocka_unit_test(test_long_words),   cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, NULL, NULL);
}
