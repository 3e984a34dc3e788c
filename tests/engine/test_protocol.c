/* test_protocol.c: frames survive the trip, whatever their pieces; what is no frame is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/protocol.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const enum frame_type all_types[] = {
    FRAME_CONFIGURE,     FRAME_LOAD,           FRAME_UNLOAD,
    FRAME_COMPLETE,      FRAME_CANCEL,         FRAME_TOKENIZE,
    FRAME_DETOKENIZE,    FRAME_TOKENIZER_INFO, FRAME_JOB_VALIDATE,
    FRAME_JOB_START,     FRAME_JOB_STOP,       FRAME_SHUTDOWN,
    FRAME_HELLO,         FRAME_STATUS,         FRAME_LOADED,
    FRAME_CHUNK,         FRAME_DONE,           FRAME_FAILED,
    FRAME_TOKENS,        FRAME_TEXT,           FRAME_INFO,
    FRAME_JOB_VALIDATED, FRAME_JOB_INVALID,    FRAME_JOB_MESSAGE,
    FRAME_JOB_METRICS,   FRAME_JOB_CHECKPOINT, FRAME_JOB_CHECKPOINT_DROPPED,
    FRAME_JOB_ENDED,
};
enum { N_TYPES = sizeof all_types / sizeof *all_types };

static void test_every_type_makes_the_trip(void **state)
{
    (void)state;
    struct buffer stream = {0};
    for (size_t i = 0; i < N_TYPES; i++) {
        assert_string_not_equal(frame_type_name(all_types[i]), "unknown");
        json_t *payload = json_pack("{s:i, s:s}", "n", (int)i, "text", "caf\xC3\xA9");
        assert_int_equal(frame_encode(all_types[i], UINT64_MAX - i, payload, &stream), 0);
    }
    for (size_t i = 0; i < N_TYPES; i++) {
        struct frame frame;
        assert_int_equal(frame_decode(&stream, &frame, NULL), 1);
        assert_int_equal(frame.type, all_types[i]);
        assert_true(frame.id == UINT64_MAX - i);
        assert_int_equal(json_integer_value(json_object_get(frame.payload, "n")), i);
        assert_string_equal(json_string_value(json_object_get(frame.payload, "text")), "caf\xC3\xA9");
        json_decref(frame.payload);
    }
    assert_int_equal(stream.length, 0);
    buffer_free(&stream);
}

static void test_header_is_as_documented(void **state)
{
    (void)state;
    struct buffer stream = {0};
    assert_int_equal(frame_encode(FRAME_HELLO, 0x0102030405060708u, json_object(), &stream), 0);
    static const unsigned char expected[] = {2, 0, 0, 0, 64, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, '{', '}'};
    assert_int_equal(stream.length, sizeof expected);
    assert_memory_equal(stream.data, expected, sizeof expected);
    buffer_free(&stream);
}

static void test_pieces_of_a_frame_wait_for_the_rest(void **state)
{
    (void)state;
    struct buffer whole = {0}, arrived = {0};
    struct frame frame;
    assert_int_equal(frame_encode(FRAME_DONE, 7, json_pack("{s:i}", "prompt_tokens", 3), &whole), 0);
    for (size_t i = 0; i < whole.length; i++) {
        assert_int_equal(frame_decode(&arrived, &frame, NULL), 0);
        buffer_append(&arrived, whole.data + i, 1);
    }
    assert_int_equal(frame_decode(&arrived, &frame, NULL), 1);
    assert_int_equal(frame.id, 7);
    json_decref(frame.payload);
    buffer_free(&whole);
    buffer_free(&arrived);
}

static void test_a_nul_in_a_string_survives(void **state)
{
    (void)state;
    struct buffer stream = {0};
    struct frame frame;
    json_t *payload = json_object();
    json_object_set_new(payload, "text", frame_text("a\0b", 3));
    assert_int_equal(frame_encode(FRAME_TEXT, 1, payload, &stream), 0);
    assert_int_equal(frame_decode(&stream, &frame, NULL), 1);
    const json_t *text = json_object_get(frame.payload, "text");
    assert_int_equal(json_string_length(text), 3);
    assert_memory_equal(json_string_value(text), "a\0b", 3);
    json_decref(frame.payload);
    buffer_free(&stream);
}

/* A frame with header fields and payload of our choice. */
static void put_frame(struct buffer *stream, uint32_t length, uint16_t type, uint16_t zero,
                      const char *payload)
{
    unsigned char header[PROTOCOL_HEADER_BYTES] = {
        (unsigned char)length,         (unsigned char)(length >> 8), (unsigned char)(length >> 16),
        (unsigned char)(length >> 24), (unsigned char)type,          (unsigned char)(type >> 8),
        (unsigned char)zero,           (unsigned char)(zero >> 8),   1,
    };
    buffer_clear(stream);
    buffer_append(stream, header, sizeof header);
    buffer_append_string(stream, payload);
}

static void test_what_is_no_frame_is_corrupt(void **state)
{
    (void)state;
    static const struct {
        uint32_t length;
        uint16_t type, zero;
        const char *payload;
    } cases[] = {
        {2, FRAME_DONE, 1, "{}"},                      /* the zero is not */
        {2, 0, 0, "{}"},                               /* no such type */
        {2, FRAME_EVALUATION_START + 1, 0, "{}"},      /* nor this */
        {2, 999, 0, "{}"},                             /* nor this */
        {PROTOCOL_MAX_PAYLOAD + 1, FRAME_DONE, 0, ""}, /* too long, known before it arrives */
        {2, FRAME_DONE, 0, "[]"},                      /* no object */
        {0, FRAME_DONE, 0, ""},                        /* nothing */
        {3, FRAME_DONE, 0, "{}x"},                     /* more than one value */
        {1, FRAME_DONE, 0, "{"},                       /* half a value */
        {9, FRAME_DONE, 0, "{\"a\":\"\xFF\"}"},        /* not UTF-8 */
    };
    struct buffer stream = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct frame frame = {.id = 77};
        struct error error = {0};
        put_frame(&stream, cases[i].length, cases[i].type, cases[i].zero, cases[i].payload);
        assert_int_equal(frame_decode(&stream, &frame, &error), ERROR_CORRUPT);
        assert_int_equal(error.code, ERROR_CORRUPT);
        assert_true(strlen(error.message) > 10);
        assert_int_equal(frame.id, 77);
    }
    put_frame(&stream, 2, FRAME_DONE, 0, "{}");
    struct frame frame;
    assert_int_equal(frame_decode(&stream, &frame, NULL), 1);
    json_decref(frame.payload);
    buffer_free(&stream);
}

static void test_what_cannot_be_sent_leaves_the_stream_alone(void **state)
{
    (void)state;
    struct buffer stream = {0};
    assert_int_equal(frame_encode(FRAME_DONE, 1, json_object(), &stream), 0);
    size_t length = stream.length;
    assert_int_equal(frame_encode(FRAME_DONE, 1, NULL, &stream), ERROR_INVALID);
    assert_int_equal(frame_encode(FRAME_DONE, 1, json_array(), &stream), ERROR_INVALID);
    assert_int_equal(frame_encode((enum frame_type)40, 1, json_object(), &stream), ERROR_INVALID);
    /* A string that jansson was made to take and cannot write. */
    json_t *payload = json_object();
    json_object_set_new(payload, "text", json_string_nocheck("\xFF"));
    assert_int_equal(frame_encode(FRAME_TEXT, 1, payload, &stream), ERROR_INVALID);
    assert_int_equal(stream.length, length);
    buffer_free(&stream);
}

static void expect_text(const char *bytes, size_t length, const char *expected)
{
    json_t *text = frame_text(bytes, length);
    assert_non_null(text);
    assert_string_equal(json_string_value(text), expected);
    json_decref(text);
}

static void test_text_is_made_whole(void **state)
{
    (void)state;
#define HOLE "\xEF\xBF\xBD"
    expect_text("plain", 5, "plain");
    expect_text("\xF0\x9F\x90\x8D", 4, "\xF0\x9F\x90\x8D");
    expect_text("a\xFFz", 3, "a" HOLE "z");
    expect_text("\xC3", 1, HOLE);
    expect_text("\xC3(", 2, HOLE "(");
    expect_text("\xED\xA0\x80", 3, HOLE HOLE HOLE); /* a surrogate */
    expect_text("\xC0\x80", 2, HOLE HOLE);          /* overlong */
    expect_text("\xF4\x90\x80\x80", 4, HOLE HOLE HOLE HOLE);
}

static void test_numbers_that_json_lacks_are_null(void **state)
{
    (void)state;
    json_t *numbers = json_pack("[o, o, o, o]", frame_number(NAN), frame_number(INFINITY),
                                frame_number(-INFINITY), frame_number(0.5));
    for (size_t i = 0; i < 3; i++)
        assert_true(json_is_null(json_array_get(numbers, i)));
    assert_true(json_real_value(json_array_get(numbers, 3)) == 0.5);
    json_decref(numbers);
}

static void test_errors_have_all_three_members(void **state)
{
    (void)state;
    struct error error;
    error_set_param(&error, ERROR_INVALID, "prompt", "token 3 is wrong");
    json_t *payload = frame_error_payload(&error);
    assert_string_equal(json_string_value(json_object_get(payload, "code")), "invalid");
    assert_string_equal(json_string_value(json_object_get(payload, "message")), "token 3 is wrong");
    assert_string_equal(json_string_value(json_object_get(payload, "param")), "prompt");
    json_decref(payload);
    error_set(&error, ERROR_IO, "cut in a character: \xE2\x82");
    payload = frame_error_payload(&error);
    assert_non_null(payload);
    assert_true(json_is_null(json_object_get(payload, "param")));
    json_decref(payload);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_type_makes_the_trip),
        cmocka_unit_test(test_header_is_as_documented),
        cmocka_unit_test(test_pieces_of_a_frame_wait_for_the_rest),
        cmocka_unit_test(test_a_nul_in_a_string_survives),
        cmocka_unit_test(test_what_is_no_frame_is_corrupt),
        cmocka_unit_test(test_what_cannot_be_sent_leaves_the_stream_alone),
        cmocka_unit_test(test_text_is_made_whole),
        cmocka_unit_test(test_numbers_that_json_lacks_are_null),
        cmocka_unit_test(test_errors_have_all_three_members),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
