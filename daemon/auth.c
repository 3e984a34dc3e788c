/* auth.c: see auth.h. The loop's thread; auth_keys_command is a process of its own. */
#include "daemon/auth.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#define TOKEN_PREFIX "adder-"
enum {
    TOKEN_RANDOM_BYTES = 32,
    HASH_BYTES = 32,
    USE_NOTED_SECONDS = 60,
    TOKEN_BYTES = sizeof TOKEN_PREFIX - 1 +
                  sodium_base64_ENCODED_LEN(TOKEN_RANDOM_BYTES, sodium_base64_VARIANT_URLSAFE_NO_PADDING),
};

struct live_key {
    char id[ID_BYTES];
    unsigned char hash[HASH_BYTES];
    int64_t noted_at;
};

struct auth {
    bool required;
    struct live_key *keys;
    size_t count;
};

static void hash_token(const char *token, unsigned char ret_hash[HASH_BYTES])
{
    crypto_generichash(ret_hash, HASH_BYTES, (const unsigned char *)token, strlen(token), NULL, 0);
}

/* ---- checking ---- */

int auth_reload(struct auth *auth, const struct key_row *keys, size_t count, struct error *error)
{
    struct live_key *live = calloc(count + 1, sizeof *live);
    if (!live)
        return error_set(error, ERROR_NO_MEMORY, "no memory for %zu keys", count);
    size_t n = 0;
    for (size_t i = 0; i < count; i++) {
        if (keys[i].revoked_at)
            continue;
        size_t length = 0;
        if (sodium_hex2bin(live[n].hash, HASH_BYTES, keys[i].hash, strlen(keys[i].hash), NULL, &length,
                           NULL) ||
            length != HASH_BYTES) {
            free(live);
            return error_set(error, ERROR_CORRUPT, "the hash of key '%s' is no hash", keys[i].id);
        }
        snprintf(live[n].id, sizeof live[n].id, "%s", keys[i].id);
        live[n].noted_at = keys[i].last_used_at;
        for (size_t j = 0; j < auth->count; j++)
            if (!strcmp(auth->keys[j].id, live[n].id) && auth->keys[j].noted_at > live[n].noted_at)
                live[n].noted_at = auth->keys[j].noted_at;
        n++;
    }
    free(auth->keys);
    auth->keys = live;
    auth->count = n;
    auth->required = auth->required || n > 0;
    return 0;
}

int auth_create(const struct key_row *keys, size_t count, struct auth **ret_auth, struct error *error)
{
    if (sodium_init() < 0)
        return error_set(error, ERROR_INTERNAL, "libsodium does not start");
    struct auth *auth = calloc(1, sizeof *auth);
    if (!auth)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the keys");
    int code = auth_reload(auth, keys, count, error);
    if (code) {
        auth_free(auth);
        return code;
    }
    *ret_auth = auth;
    return 0;
}

void auth_free(struct auth *auth)
{
    if (!auth)
        return;
    free(auth->keys);
    free(auth);
}

bool auth_required(const struct auth *auth)
{
    return auth->required;
}

int auth_check(const struct auth *auth, const char *header, char ret_key_id[ID_BYTES],
               struct problem *problem)
{
    if (!auth->required) {
        ret_key_id[0] = '\0';
        return 0;
    }
    static const char scheme[] = "Bearer ";
    if (!header || strncasecmp(header, scheme, sizeof scheme - 1))
        return problem_set(problem, 401, "missing_api_key", NULL,
                           "This server needs an API key: send it as 'Authorization: Bearer KEY'.");
    const char *token = header + sizeof scheme - 1;
    token += strspn(token, " ");

    unsigned char hash[HASH_BYTES];
    hash_token(token, hash);
    /* Every key is compared, each in constant time. */
    const struct live_key *found = NULL;
    for (size_t i = 0; i < auth->count; i++)
        if (!sodium_memcmp(hash, auth->keys[i].hash, HASH_BYTES))
            found = &auth->keys[i];
    if (!found)
        return problem_set(problem, 401, "invalid_api_key", NULL,
                           "The API key is wrong or has been revoked.");
    memcpy(ret_key_id, found->id, ID_BYTES);
    return 0;
}

bool auth_note_use(struct auth *auth, const char *key_id, int64_t now)
{
    for (size_t i = 0; i < auth->count; i++) {
        struct live_key *key = &auth->keys[i];
        if (strcmp(key->id, key_id))
            continue;
        if (now - key->noted_at < USE_NOTED_SECONDS)
            return false;
        key->noted_at = now;
        return true;
    }
    return false;
}

/* ---- adderd keys ---- */

static const char keys_help[] =
    "Usage: adderd keys create NAME | list | revoke ID-OR-NAME  [--data-dir DIR]\n"
    "\n"
    "API keys of a data folder. A running daemon takes notice within seconds. The first\n"
    "key makes every request need one; without keys adderd serves this machine only.\n"
    "\n"
    "  create NAME        make a key and print its token: the only time that it is shown\n"
    "  list               all keys, revoked ones too\n"
    "  revoke ID-OR-NAME  end a key\n"
    "  --data-dir DIR     the daemon's folder (ADDER_DATA_DIR) [adder-data]\n";

static int keys_create(struct store *store, const char *name, struct error *error)
{
    struct key_row key = {.created_at = time(NULL)};
    if (!name[0] || strlen(name) >= sizeof key.name)
        return error_set(error, ERROR_INVALID, "a key's name has between 1 and %zu characters",
                         sizeof key.name - 1);
    unsigned char random[TOKEN_RANDOM_BYTES], hash[HASH_BYTES];
    char token[TOKEN_BYTES] = TOKEN_PREFIX;
    randombytes_buf(random, sizeof random);
    sodium_bin2base64(token + sizeof TOKEN_PREFIX - 1, sizeof token - (sizeof TOKEN_PREFIX - 1), random,
                      sizeof random, sodium_base64_VARIANT_URLSAFE_NO_PADDING);
    hash_token(token, hash);
    store_new_id("key-", key.id);
    snprintf(key.name, sizeof key.name, "%s", name);
    sodium_bin2hex(key.hash, sizeof key.hash, hash, sizeof hash);
    int code = store_key_insert(store, &key, error);
    if (!code) {
        fprintf(stderr, "Key %s (%s). Keep the token, it is not shown again:\n", key.id, key.name);
        printf("%s\n", token);
    }
    sodium_memzero(random, sizeof random);
    sodium_memzero(token, sizeof token);
    return code;
}

static const char *when(int64_t seconds, char ret_text[32])
{
    time_t time = (time_t)seconds;
    struct tm tm;
    if (!seconds || !gmtime_r(&time, &tm))
        return "-";
    strftime(ret_text, 32, "%Y-%m-%dT%H:%M:%SZ", &tm);
    return ret_text;
}

static int keys_list(struct store *store, struct error *error)
{
    struct key_row *keys = NULL;
    size_t count = 0;
    int code = store_load_keys(store, &keys, &count, error);
    if (code)
        return code;
    printf("%-28s  %-20s  %-20s  %-20s  %s\n", "ID", "CREATED", "LAST USED", "REVOKED", "NAME");
    for (size_t i = 0; i < count; i++) {
        char created[32], used[32], revoked[32];
        printf("%-28s  %-20s  %-20s  %-20s  %s\n", keys[i].id, when(keys[i].created_at, created),
               when(keys[i].last_used_at, used), when(keys[i].revoked_at, revoked), keys[i].name);
    }
    free(keys);
    return 0;
}

static int keys_run(const char *data_dir, const char *verb, const char *name, struct error *error)
{
    struct store *store = NULL;
    int code = store_open(data_dir, NULL, &store, error);
    if (code)
        return code;
    if (!strcmp(verb, "create"))
        code = keys_create(store, name, error);
    else if (!strcmp(verb, "list"))
        code = keys_list(store, error);
    else if (!(code = store_key_revoke(store, name, time(NULL), error)))
        fprintf(stderr, "Revoked %s.\n", name);
    store_close(store);
    return code;
}

int auth_keys_command(int argc, char **argv)
{
    const char *variable = getenv("ADDER_DATA_DIR");
    const char *data_dir = variable && variable[0] ? variable : "adder-data";
    const char *words[2] = {NULL, NULL};
    int n_words = 0;
    for (int i = 0; i < argc; i++) {
        static const char flag[] = "--data-dir";
        size_t length = sizeof flag - 1;
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            fputs(keys_help, stdout);
            return 0;
        } else if (!strcmp(argv[i], flag) && i + 1 < argc) {
            data_dir = argv[++i];
        } else if (!strncmp(argv[i], flag, length) && argv[i][length] == '=') {
            data_dir = argv[i] + length + 1;
        } else if (argv[i][0] != '-' && n_words < 2) {
            words[n_words++] = argv[i];
        } else {
            fprintf(stderr, "adderd keys: unexpected '%s'\n%s", argv[i], keys_help);
            return 2;
        }
    }
    bool lists = n_words == 1 && !strcmp(words[0], "list");
    bool names = n_words == 2 && (!strcmp(words[0], "create") || !strcmp(words[0], "revoke"));
    if (!lists && !names) {
        fputs(keys_help, stderr);
        return 2;
    }
    if (sodium_init() < 0) {
        fprintf(stderr, "adderd keys: libsodium does not start\n");
        return 1;
    }
    struct error error = {0};
    if (keys_run(data_dir, words[0], words[1], &error)) {
        fprintf(stderr, "adderd keys: %s\n", error.message);
        return 1;
    }
    return 0;
}
