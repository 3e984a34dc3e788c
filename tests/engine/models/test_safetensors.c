/* test_safetensors.c: what is written is read back; every way in which a file can lie is refused by name. */
#include "tests/engine/models/support.h"

#include "base/file.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

/* Header text and data bytes as a file, with the header's true length or a false one. */
static void write_raw(const char *path, const char *header, int64_t claimed, size_t data_bytes)
{
    size_t length = strlen(header);
    unsigned char *bytes = calloc(1, 8 + length + data_bytes);
    assert_non_null(bytes);
    uint64_t claim = claimed < 0 ? (uint64_t)length : (uint64_t)claimed;
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)(claim >> 8 * i);
    memcpy(bytes + 8, header, length);
    assert_int_equal(file_write_whole(path, bytes, 8 + length + data_bytes, NULL), 0);
    free(bytes);
}

static void join(char path[PATH_MAX], const char *folder, const char *name)
{
    snprintf(path, PATH_MAX, "%s/%s", folder, name);
}

/* Without the sync of a durable write: there are hundreds of these. */
static void write_bytes(const char *path, const char *bytes, size_t length)
{
    FILE *out = fopen(path, "wb");
    assert_non_null(out);
    assert_int_equal(fwrite(bytes, 1, length, out), length);
    assert_int_equal(fclose(out), 0);
}

static const float floats[] = {1, -2, 3.5f, 4, 5, -6};
static const uint16_t halves[] = {0x3c00, 0xc000, 0x0001};
static const int32_t ints[] = {7};

static void write_sample(const char *path)
{
    static const char *const metadata[] = {"format", "pt", NULL};
    const struct tensor_view views[] = {
        {"b.half", TYPE_F16, 1, {3}, 3, halves},       {"a.float", TYPE_F32, 2, {2, 3}, 6, floats},
        {"brain", TYPE_BF16, 3, {3, 1, 1}, 3, halves}, {"empty", TYPE_F32, 2, {0, 4}, 0, floats},
        {"scalar", TYPE_I32, 0, {0}, 1, ints},
    };
    struct error error = {0};
    check_ok(safetensors_write(path, views, 5, metadata, &error), &error);
}

static void test_round_trip(void **state)
{
    (void)state;
    char *folder = make_folder(), path[PATH_MAX];
    struct error error = {0};
    struct safetensors *file = NULL;
    join(path, folder, "model.safetensors");
    write_sample(path);
    const char *const ways[] = {path, folder};
    for (int way = 0; way < 2; way++) {
        check_ok(safetensors_open(ways[way], &file, &error), &error);
        assert_int_equal(safetensors_count(file), 5);
        const struct tensor_view *view = safetensors_find(file, "a.float");
        assert_non_null(view);
        assert_true(view->type == TYPE_F32 && view->n_dims == 2 && view->shape[0] == 2 &&
                    view->shape[1] == 3);
        assert_memory_equal(view->data, floats, sizeof floats);
        assert_int_equal((uintptr_t)view->data % 4, 0); /* though a half came first */
        view = safetensors_find(file, "b.half");
        assert_memory_equal(view->data, halves, sizeof halves);
        assert_int_equal(safetensors_find(file, "scalar")->count, 1);
        assert_int_equal(safetensors_find(file, "empty")->count, 0);
        assert_null(safetensors_find(file, "absent"));
        for (int64_t i = 1; i < 5; i++)
            assert_true(strcmp(safetensors_at(file, i - 1)->name, safetensors_at(file, i)->name) < 0);
        safetensors_close(file);
    }
    remove_folder(folder);
}

static void test_lies(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        int64_t claimed;
        size_t data;
        int code;
        const char *message;
    } cases[] = {
        {"{}", 1000, 0, ERROR_CORRUPT, "header claims 1000 bytes"},
        {"{}", INT64_MAX, 0, ERROR_CORRUPT, "header claims"},
        {"{ ", -1, 0, ERROR_CORRUPT, "not a JSON object"},
        {"[1]", -1, 0, ERROR_CORRUPT, "not a JSON object"},
        {"{\"w\":3}", -1, 0, ERROR_CORRUPT, "tensor w"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[1]}}", -1, 4, ERROR_CORRUPT,
         "tensor w: its header entry lacks"},
        {"{\"w\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]}}", -1, 8, ERROR_UNSUPPORTED,
         "tensor w has type F64"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1],\"data_offsets\":[0,4]}}", -1, 4, ERROR_UNSUPPORTED,
         "tensor w has 5 dimensions"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", -1, 4, ERROR_CORRUPT,
         "tensor w: dimension 0"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", -1, 4, ERROR_CORRUPT,
         "tensor w: dimension 0"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]}}", -1, 4,
         ERROR_CORRUPT, "tensor w: its shape overflows"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[4611686018427387905],\"data_offsets\":[0,4]}}", -1, 4,
         ERROR_CORRUPT, "tensor w"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", -1, 4, ERROR_CORRUPT,
         "tensor w: 2 elements"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 7, ERROR_CORRUPT,
         "truncated"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", -1, 4, ERROR_CORRUPT,
         "tensor w lies"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", -1, 4, ERROR_CORRUPT,
         "tensor w lies"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"w\":{\"dtype\":\"F32\",\"shape\":"
         "[1],"
         "\"data_offsets\":[4,8]}}",
         -1, 8, ERROR_CORRUPT, "w"},
        {"{\"v\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"w\":{\"dtype\":\"F32\",\"shape\":"
         "[2],"
         "\"data_offsets\":[4,12]}}",
         -1, 12, ERROR_CORRUPT, "tensor w overlaps"},
        {"{\"v\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"w\":{\"dtype\":\"F32\",\"shape\":"
         "[1],"
         "\"data_offsets\":[8,12]}}",
         -1, 12, ERROR_CORRUPT, "tensor w follows a gap"},
        {"{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", -1, 9, ERROR_CORRUPT,
         "5 bytes after its last tensor"},
    };
    char *folder = make_folder(), path[PATH_MAX];
    join(path, folder, "lies.safetensors");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error error = {0};
        struct safetensors *file = NULL;
        write_raw(path, cases[i].header, cases[i].claimed, cases[i].data);
        check_error(safetensors_open(path, &file, &error), cases[i].code, &error, cases[i].message);
        assert_non_null(strstr(error.message, "lies.safetensors"));
        assert_null(file);
    }
    remove_folder(folder);
}

static void test_truncation(void **state)
{
    (void)state;
    char *folder = make_folder(), path[PATH_MAX], cut[PATH_MAX], *bytes;
    size_t length;
    struct error error = {0};
    struct safetensors *file = NULL;
    join(path, folder, "whole.safetensors");
    join(cut, folder, "cut.safetensors");
    write_sample(path);
    check_ok(file_read(path, 1 << 20, &bytes, &length, &error), &error);
    for (size_t n = 0; n < length; n++) {
        write_bytes(cut, bytes, n);
        check_error(safetensors_open(cut, &file, &error), ERROR_CORRUPT, &error, "cut.safetensors");
    }
    free(bytes);
    check_error(safetensors_open("/nowhere/at/all", &file, &error), ERROR_NOT_FOUND, &error,
                "/nowhere/at/all");
    char *empty = make_folder();
    check_error(safetensors_open(empty, &file, &error), ERROR_NOT_FOUND, &error, "neither");
    remove_folder(empty);
    remove_folder(folder);
}

static void write_shard(const char *folder, const char *shard, const char *name)
{
    const struct tensor_view view = {name, TYPE_F32, 1, {6}, 6, floats};
    char path[PATH_MAX];
    struct error error = {0};
    join(path, folder, shard);
    check_ok(safetensors_write(path, &view, 1, NULL, &error), &error);
}

static void test_shards(void **state)
{
    (void)state;
    static const struct {
        const char *index;
        int code;
        const char *message;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}", 0, ""},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"c\":\"two.safetensors\"}}", ERROR_CORRUPT, "tensor c"},
        {"{\"weight_map\":{\"a\":\"two.safetensors\",\"b\":\"one.safetensors\"}}", ERROR_CORRUPT, "tensor a"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"three.safetensors\"}}", ERROR_NOT_FOUND,
         "three.safetensors"},
        {"{\"weight_map\":{\"a\":\"../one.safetensors\"}}", ERROR_CORRUPT, "tensor a"},
        {"{\"weight_map\":{\"a\":7}}", ERROR_CORRUPT, "tensor a"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"again.safetensors\"}}", ERROR_CORRUPT,
         "two shards"},
        {"{\"weight_map\":{}}", ERROR_CORRUPT, "no weight_map"},
        {"nonsense", ERROR_CORRUPT, "no weight_map"},
    };
    char *folder = make_folder();
    write_shard(folder, "one.safetensors", "a");
    write_shard(folder, "two.safetensors", "b");
    write_shard(folder, "again.safetensors", "a");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error error = {0};
        struct safetensors *file = NULL;
        write_text(folder, "model.safetensors.index.json", cases[i].index);
        int code = safetensors_open(folder, &file, &error);
        if (cases[i].code) {
            check_error(code, cases[i].code, &error, cases[i].message);
            continue;
        }
        check_ok(code, &error);
        assert_int_equal(safetensors_count(file), 2);
        assert_memory_equal(safetensors_find(file, "b")->data, floats, sizeof floats);
        safetensors_close(file);
    }
    remove_folder(folder);
}

/* Bytes changed at random must never do worse than an error (the sanitizers watch). */
static void test_noise(void **state)
{
    (void)state;
    char *folder = make_folder(), path[PATH_MAX], noisy[PATH_MAX], *bytes;
    size_t length;
    uint64_t seed = 1;
    join(path, folder, "whole.safetensors");
    join(noisy, folder, "noisy.safetensors");
    write_sample(path);
    assert_int_equal(file_read(path, 1 << 20, &bytes, &length, NULL), 0);
    char *copy = malloc(length);
    assert_non_null(copy);
    for (int i = 0; i < 500; i++) {
        memcpy(copy, bytes, length);
        for (uint32_t n = 1 + draw(&seed, 3); n; n--)
            copy[draw(&seed, (uint32_t)length)] = (char)draw(&seed, 256);
        write_bytes(noisy, copy, length);
        struct safetensors *file = NULL;
        if (!safetensors_open(noisy, &file, NULL)) {
            volatile char sink = 0;
            for (int64_t t = 0; t < safetensors_count(file); t++) {
                const struct tensor_view *view = safetensors_at(file, t);
                for (int64_t b = 0; b < view->count * (int64_t)kernel_type_size(view->type); b++)
                    sink = (char)(sink + ((const char *)view->data)[b]);
            }
            safetensors_close(file);
        }
    }
    free(copy);
    free(bytes);
    remove_folder(folder);
}

static void test_write_fails_whole(void **state)
{
    (void)state;
    const struct tensor_view twice[] = {{"w", TYPE_F32, 1, {1}, 1, floats},
                                        {"w", TYPE_F32, 1, {1}, 1, floats}};
    struct error error = {0};
    char *folder = make_folder(), path[PATH_MAX];
    check_error(safetensors_write("/nowhere/x.safetensors", twice, 1, NULL, &error), ERROR_IO, &error,
                "/nowhere");
    join(path, folder, "model.safetensors");
    check_error(safetensors_write(path, twice, 2, NULL, &error), ERROR_INTERNAL, &error, "tensor w");
    struct safetensors *file = NULL;
    check_error(safetensors_open(path, &file, &error), ERROR_NOT_FOUND, &error, "model.safetensors");
    remove_folder(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_lies),
        cmocka_unit_test(test_truncation), cmocka_unit_test(test_shards),
        cmocka_unit_test(test_noise),      cmocka_unit_test(test_write_fails_whole),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
