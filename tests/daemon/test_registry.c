/* test_registry.c: models folders, rows, order, and ids that exist twice. */
#include "daemon/registry.h"
#include "fixture.h"

#include "base/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utime.h>

static void make_base(const char *folder, const char *name, time_t created)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    assert_int_equal(file_make_dirs(path, NULL), 0);
    snprintf(path, sizeof path, "%s/%s/config.json", folder, name);
    assert_int_equal(file_write_whole(path, "{}", 2, NULL), 0);
    struct utimbuf times = {created, created};
    assert_int_equal(utime(path, &times), 0);
}

static int folder_setup(void **state)
{
    char *folder = malloc(64);
    assert_non_null(folder);
    make_folder(folder);
    *state = folder;
    return 0;
}

static int folder_teardown(void **state)
{
    assert_int_equal(file_remove_tree(*state, NULL), 0);
    free(*state);
    return 0;
}

static void test_folders_and_rows(void **state)
{
    const char *folder = *state;
    char first[128], second[128], path[256];
    snprintf(first, sizeof first, "%s/first", folder);
    snprintf(second, sizeof second, "%s/second/", folder);
    make_base(first, "zebra", 100);
    make_base(first, "hatchling", 300);
    make_base(second, "ant", 200);
    make_base(first, ".hidden", 1);
    snprintf(path, sizeof path, "%s/no-model", first);
    assert_int_equal(file_make_dirs(path, NULL), 0);
    snprintf(path, sizeof path, "%s/loose-file", first);
    assert_int_equal(file_write_whole(path, "x", 1, NULL), 0);

    struct adapter_row rows[] = {make_model("ft:hatchling:me:b:1", "ftjob-1", -1),
                                 make_model("ft:hatchling:me:b:1:ckpt-step-10", "ftjob-1", 10),
                                 make_model("ft:hatchling:me:a:2", "ftjob-2", -1)};
    rows[2].full = true;
    const char *folders[] = {first, second};
    struct registry *registry = NULL;
    struct error error = {0};
    if (registry_create(folders, 2, NULL, rows, 3, &registry, &error))
        fail_msg("%s", error.message);
    const char *order[] = {"zebra", "ant", "hatchling", "ft:hatchling:me:b:1", "ft:hatchling:me:a:2"};
    assert_int_equal(registry_count(registry), 5);
    for (size_t i = 0; i < 5; i++)
        assert_string_equal(registry_at(registry, i)->resource.id, order[i]);
    assert_null(registry_at(registry, 5));
    assert_null(registry_default(registry)); /* three bases, none chosen */

    const struct model_entry *entry = registry_find(registry, "ant");
    assert_non_null(entry);
    assert_true(entry->is_base);
    assert_int_equal(entry->resource.created, 200);
    assert_string_equal(entry->resource.root, "ant");
    assert_string_equal(entry->resource.parent, "");
    assert_string_equal(entry->base, "ant");
    assert_int_equal(entry->step, -1);
    snprintf(path, sizeof path, "%s/second/ant", folder);
    assert_string_equal(entry->path, path);
    entry = registry_find(registry, "ft:hatchling:me:b:1:ckpt-step-10");
    assert_non_null(entry);
    assert_true(entry->is_checkpoint && !entry->is_base && !entry->full);
    assert_int_equal(entry->step, 10);
    assert_string_equal(entry->base, "hatchling");
    assert_string_equal(entry->job, "ftjob-1");
    assert_true(registry_find(registry, "ft:hatchling:me:a:2")->full);
    assert_null(registry_find(registry, "no-model"));
    assert_null(registry_find(registry, ".hidden"));
    assert_null(registry_find(registry, ""));

    registry_remove(registry, "ft:hatchling:me:b:1:ckpt-step-10");
    registry_remove(registry, "ft:hatchling:me:b:1");
    registry_remove(registry, "ft:hatchling:me:b:1");
    assert_null(registry_find(registry, "ft:hatchling:me:b:1:ckpt-step-10"));
    assert_int_equal(registry_count(registry), 4);
    assert_string_equal(registry_at(registry, 3)->resource.id, "ft:hatchling:me:a:2");
    registry_free(registry);
    registry_free(NULL);
}

static void test_many(void **state)
{
    (void)state;
    enum { N = 3000 };
    struct registry *registry = NULL;
    assert_int_equal(registry_create(NULL, 0, NULL, NULL, 0, &registry, NULL), 0);
    char id[MODEL_ID_BYTES];
    for (int i = 0; i < N; i++) {
        snprintf(id, sizeof id, "ft:m:%d", i);
        struct adapter_row row = make_model(id, "ftjob-1", i % 3 ? -1 : i);
        assert_int_equal(registry_add(registry, &row, NULL), 0);
        assert_int_equal(registry_add(registry, &row, NULL), 0); /* the same again */
    }
    assert_int_equal(registry_count(registry), N - N / 3);
    for (int i = 0; i < N; i += 2) {
        snprintf(id, sizeof id, "ft:m:%d", i);
        registry_remove(registry, id);
    }
    for (int i = 0; i < N; i++) {
        snprintf(id, sizeof id, "ft:m:%d", i);
        assert_int_equal(registry_find(registry, id) != NULL, i % 2);
    }
    int before = -1, number;
    for (size_t i = 0; i < registry_count(registry); i++) {
        assert_int_equal(sscanf(registry_at(registry, i)->resource.id, "ft:m:%d", &number), 1);
        assert_true(number > before && number % 2 && number % 3);
        before = number;
    }
    registry_free(registry);
}

static void test_default_model(void **state)
{
    const char *folder = *state;
    const char *folders[] = {folder};
    struct registry *registry = NULL;
    struct error error = {0};
    make_base(folder, "one", 1);
    assert_int_equal(registry_create(folders, 1, NULL, NULL, 0, &registry, &error), 0);
    assert_string_equal(registry_default(registry)->resource.id, "one");
    registry_free(registry);
    make_base(folder, "two", 2);
    assert_int_equal(registry_create(folders, 1, "two", NULL, 0, &registry, &error), 0);
    assert_string_equal(registry_default(registry)->resource.id, "two");
    registry_free(registry);
    registry = NULL;
    assert_int_equal(registry_create(folders, 1, "three", NULL, 0, &registry, &error), ERROR_NOT_FOUND);
    assert_non_null(strstr(error.message, "'three'"));
    assert_null(registry);
}

static void test_twice(void **state)
{
    const char *folder = *state;
    char first[128], second[128], path[256];
    snprintf(first, sizeof first, "%s/first", folder);
    snprintf(second, sizeof second, "%s/second", folder);
    make_base(first, "hatchling", 1);
    make_base(second, "hatchling", 2);
    const char *folders[] = {first, second};
    struct registry *registry = NULL;
    struct error error = {0};
    assert_int_equal(registry_create(folders, 2, NULL, NULL, 0, &registry, &error), ERROR_INVALID);
    snprintf(path, sizeof path, "%s/hatchling", first);
    assert_non_null(strstr(error.message, path));
    snprintf(path, sizeof path, "%s/hatchling", second);
    assert_non_null(strstr(error.message, path));

    assert_int_equal(registry_create(folders, 1, NULL, NULL, 0, &registry, &error), 0);
    struct adapter_row row = make_model("hatchling", "ftjob-1", -1);
    assert_int_equal(registry_add(registry, &row, &error), ERROR_INVALID);
    assert_true(registry_find(registry, "hatchling")->is_base);
    assert_int_equal(registry_count(registry), 1);
    registry_free(registry);

    const char *missing[] = {"/nowhere/models"};
    assert_int_equal(registry_create(missing, 1, NULL, NULL, 0, &registry, &error), ERROR_NOT_FOUND);
    assert_non_null(strstr(error.message, "/nowhere/models"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_folders_and_rows, folder_setup, folder_teardown),
        cmocka_unit_test(test_many),
        cmocka_unit_test_setup_teardown(test_default_model, folder_setup, folder_teardown),
        cmocka_unit_test_setup_teardown(test_twice, folder_setup, folder_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
