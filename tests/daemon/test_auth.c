/* test_auth.c: tokens, their checks, renewal beside a running daemon, and the keys command. */
#include "daemon/auth.h"
#include "fixture.h"

#include "base/file.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct key_row make_key(const char *id, const char *token, int64_t revoked_at)
{
    struct key_row key = {.name = "test", .created_at = 1, .revoked_at = revoked_at};
    unsigned char hash[32];
    snprintf(key.id, sizeof key.id, "%s", id);
    crypto_generichash(hash, sizeof hash, (const unsigned char *)token, strlen(token), NULL, 0);
    sodium_bin2hex(key.hash, sizeof key.hash, hash, sizeof hash);
    return key;
}

static int check(const struct auth *auth, const char *header, char ret_id[ID_BYTES])
{
    struct problem problem = {0};
    int code = auth_check(auth, header, ret_id, &problem);
    assert_int_equal(problem.status, code ? 401 : 0);
    if (code) {
        assert_string_equal(problem.type, "authentication_error");
        assert_true(problem.message[0]);
    }
    return code;
}

static void test_no_keys(void **state)
{
    (void)state;
    struct auth *auth = NULL;
    char id[ID_BYTES] = "x";
    struct key_row revoked = make_key("key-0", "adder-old", 5);
    assert_int_equal(auth_create(&revoked, 1, &auth, NULL), 0);
    assert_false(auth_required(auth));
    assert_int_equal(check(auth, NULL, id), 0);
    assert_string_equal(id, "");
    assert_int_equal(check(auth, "Bearer whatever", id), 0);
    auth_free(auth);
    auth_free(NULL);
}

static void test_check(void **state)
{
    (void)state;
    struct auth *auth = NULL;
    char id[ID_BYTES];
    struct key_row keys[] = {make_key("key-1", "adder-one", 0), make_key("key-2", "adder-two", 7),
                             make_key("key-3", "adder-three", 0)};
    assert_int_equal(auth_create(keys, 3, &auth, NULL), 0);
    assert_true(auth_required(auth));
    assert_int_equal(check(auth, "Bearer adder-one", id), 0);
    assert_string_equal(id, "key-1");
    assert_int_equal(check(auth, "bearer   adder-three", id), 0);
    assert_string_equal(id, "key-3");
    const char *bad[] = {NULL,
                         "",
                         "Bearer",
                         "Bearer ",
                         "Bearer adder-two",
                         "Bearer adder-on",
                         "Bearer adder-one ",
                         "Bearer adder-one,adder-three",
                         "Basic adder-one",
                         "adder-one"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(check(auth, bad[i], id), -1);

    /* Uses are noted once a minute. */
    assert_true(auth_note_use(auth, "key-1", 1000));
    assert_false(auth_note_use(auth, "key-1", 1059));
    assert_true(auth_note_use(auth, "key-3", 1059));
    assert_true(auth_note_use(auth, "key-1", 1060));
    assert_false(auth_note_use(auth, "key-2", 1060));
    assert_int_equal(auth_reload(auth, keys, 3, NULL), 0);
    assert_false(auth_note_use(auth, "key-1", 1061));
    auth_free(auth);
}

static void test_reload(void **state)
{
    (void)state;
    struct auth *auth = NULL;
    struct error error = {0};
    char id[ID_BYTES];
    assert_int_equal(auth_create(NULL, 0, &auth, NULL), 0);
    assert_false(auth_required(auth));
    struct key_row keys[] = {make_key("key-1", "adder-one", 0), make_key("key-2", "adder-two", 0)};
    assert_int_equal(auth_reload(auth, keys, 1, NULL), 0);
    assert_true(auth_required(auth));
    assert_int_equal(check(auth, "Bearer adder-two", id), -1);
    assert_int_equal(auth_reload(auth, keys, 2, NULL), 0);
    assert_int_equal(check(auth, "Bearer adder-two", id), 0);
    keys[1].revoked_at = 9;
    assert_int_equal(auth_reload(auth, keys, 2, NULL), 0);
    assert_int_equal(check(auth, "Bearer adder-two", id), -1);
    assert_int_equal(check(auth, "Bearer adder-one", id), 0);
    /* A damaged row leaves the old keys in force. */
    struct key_row damaged = keys[0];
    damaged.hash[5] = 'z';
    assert_int_equal(auth_reload(auth, &damaged, 1, &error), ERROR_CORRUPT);
    assert_int_equal(check(auth, "Bearer adder-one", id), 0);
    /* Without any key left, nobody gets in. */
    keys[0].revoked_at = 9;
    assert_int_equal(auth_reload(auth, keys, 2, NULL), 0);
    assert_true(auth_required(auth));
    assert_int_equal(check(auth, "Bearer adder-one", id), -1);
    assert_int_equal(check(auth, NULL, id), -1);
    auth_free(auth);
}

/* Run `adderd keys LINE`; what it printed on stdout. */
static int keys_command(const char *line, char ret_printed[4096])
{
    char words[512], *argv[16];
    int argc = 0;
    snprintf(words, sizeof words, "%s", line);
    for (char *save = NULL, *word = strtok_r(words, " ", &save); word; word = strtok_r(NULL, " ", &save))
        argv[argc++] = word;
    FILE *out = tmpfile(), *err = tmpfile();
    assert_true(out && err);
    fflush(NULL);
    int saved_out = dup(STDOUT_FILENO), saved_err = dup(STDERR_FILENO);
    dup2(fileno(out), STDOUT_FILENO);
    dup2(fileno(err), STDERR_FILENO);
    int status = auth_keys_command(argc, argv);
    fflush(NULL);
    dup2(saved_out, STDOUT_FILENO);
    dup2(saved_err, STDERR_FILENO);
    close(saved_out);
    close(saved_err);
    rewind(out);
    ret_printed[fread(ret_printed, 1, 4095, out)] = '\0';
    fclose(out);
    fclose(err);
    return status;
}

static void reload(void *arg, int code, const struct key_row *items, size_t count)
{
    assert_int_equal(code, 0);
    assert_int_equal(auth_reload(arg, items, count, NULL), 0);
}

static void test_keys_command_beside_a_daemon(void **state)
{
    struct fixture *fixture = *state;
    char line[512], printed[4096], header[256], id[ID_BYTES];
    struct auth *auth = NULL;
    assert_int_equal(auth_create(NULL, 0, &auth, NULL), 0);

    snprintf(line, sizeof line, "create laptop --data-dir %s", fixture->folder);
    assert_int_equal(keys_command(line, printed), 0);
    assert_int_equal(strlen(printed), 6 + 43 + 1); /* the token, and nothing else, on stdout */
    assert_int_equal(strncmp(printed, "adder-", 6), 0);
    assert_int_equal(strspn(printed + 6, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"),
                     43);
    printed[49] = '\0';
    snprintf(header, sizeof header, "Bearer %s", printed);

    store_key_list(fixture->store, reload, auth);
    fixture_run(fixture);
    assert_true(auth_required(auth));
    assert_int_equal(check(auth, header, id), 0);
    assert_int_equal(strncmp(id, "key-", 4), 0);

    assert_int_equal(keys_command(line, printed), 1); /* the name is taken */
    assert_string_equal(printed, "");
    snprintf(line, sizeof line, "--data-dir=%s list", fixture->folder);
    assert_int_equal(keys_command(line, printed), 0);
    assert_non_null(strstr(printed, "laptop"));
    assert_non_null(strstr(printed, id));
    assert_null(strstr(printed, header + strlen("Bearer adder-")));
    snprintf(line, sizeof line, "revoke %s --data-dir %s", id, fixture->folder);
    assert_int_equal(keys_command(line, printed), 0);
    assert_int_equal(keys_command(line, printed), 1);
    store_key_list(fixture->store, reload, auth);
    fixture_run(fixture);
    assert_int_equal(check(auth, header, id), -1);
    auth_free(auth);
}

static void test_keys_command_makes_and_refuses(void **state)
{
    (void)state;
    char folder[64], line[512], printed[4096];
    make_folder(folder);
    snprintf(line, sizeof line, "create first --data-dir %s/new/data", folder);
    assert_int_equal(keys_command(line, printed), 0); /* before the daemon's first start */
    const char *bad[] = {"",       "create", "destroy x",   "create a b",
                         "revoke", "list x", "list --frob", "list --data-dir"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(keys_command(bad[i], printed), 2);
    assert_int_equal(keys_command("--help", printed), 0);
    assert_non_null(strstr(printed, "ADDER_DATA_DIR"));
    assert_int_equal(keys_command("list --data-dir /proc/nowhere", printed), 1);
    assert_int_equal(file_remove_tree(folder, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_keys),
        cmocka_unit_test(test_check),
        cmocka_unit_test(test_reload),
        cmocka_unit_test_setup_teardown(test_keys_command_beside_a_daemon, fixture_setup, fixture_teardown),
        cmocka_unit_test(test_keys_command_makes_and_refuses),
    };
    return sodium_init() < 0 ? 1 : cmocka_run_group_tests(tests, NULL, NULL);
}
