/* tokenizer_load.c: tokenizer.json into struct tokenizer. Any thread; the tokenizer is immutable afterwards.
 *
 * Taken: model BPE over the byte-level alphabet; normalizer none or NFC; pre-tokenizer and decoder ByteLevel;
 * post-processor none or ByteLevel (which moves offsets alone); each of them also alone in a Sequence.
 * Whatever else would change a single id is refused by name. "truncation" and "padding" are left-overs of the
 * run that saved the file and, as transformers does, not applied. */
#include "engine/text/tokenizer_parts.h"

#include "base/file.h"
#include "engine/text/unicode.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { TOKENIZER_MAX_BYTES = 64 << 20 };

/* The GPT-2 split. PCRE2's \s has U+180E, which is no White_Space since Unicode 6.3; so it is spelled out. */
#define SPACE "\\x{09}-\\x{0D}\\x{85}\\p{Z}"
static const char split_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE
                                    "\\p{L}\\p{N}]+|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+";

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "out of memory");
}

/* Walk a stage (normalizer ...) that is null, one object of the kind we know, or a Sequence of such. Counts
 * the objects and returns the last. */
static int stage_read(const json_t *stage, const char *name, const char *list_key, const char *kind,
                      int *count, const json_t **ret_object, struct error *error)
{
    if (!stage || json_is_null(stage))
        return 0;
    const char *type = json_string_value(json_object_get(stage, "type"));
    if (!type)
        return error_set_param(error, ERROR_CORRUPT, name, "%s has no type", name);
    if (!strcmp(type, kind)) {
        ++*count;
        *ret_object = stage;
        return 0;
    }
    if (strcmp(type, "Sequence") != 0)
        return error_set_param(error, ERROR_UNSUPPORTED, name, "%s \"%.60s\" is not supported, only \"%s\"",
                               name, type, kind);
    const json_t *list = json_object_get(stage, list_key);
    if (!json_is_array(list))
        return error_set_param(error, ERROR_CORRUPT, name, "%s: Sequence has no list \"%s\"", name, list_key);
    for (size_t i = 0; i < json_array_size(list); i++) {
        int status = stage_read(json_array_get(list, i), name, list_key, kind, count, ret_object, error);
        if (status)
            return status;
    }
    return 0;
}

static int read_bool(const json_t *object, const char *key, bool *ret_value, struct error *error)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_boolean(value))
        return error_set_param(error, ERROR_CORRUPT, key, "\"%s\" is not true or false", key);
    *ret_value = json_is_true(value);
    return 0;
}

static int load_stages(struct tokenizer *tokenizer, const json_t *root, struct error *error)
{
    const json_t *object = NULL;
    int n_nfc = 0, n_split = 0, n_post = 0, n_decode = 0, status;

    if ((status = stage_read(json_object_get(root, "normalizer"), "normalizer", "normalizers", "NFC", &n_nfc,
                             &object, error)))
        return status;
    tokenizer->nfc = n_nfc > 0;
    if ((status = stage_read(json_object_get(root, "post_processor"), "post_processor", "processors",
                             "ByteLevel", &n_post, &object, error)))
        return status;
    if ((status = stage_read(json_object_get(root, "decoder"), "decoder", "decoders", "ByteLevel", &n_decode,
                             &object, error)))
        return status;
    if ((status = stage_read(json_object_get(root, "pre_tokenizer"), "pre_tokenizer", "pretokenizers",
                             "ByteLevel", &n_split, &object, error)))
        return status;
    if (n_split != 1 || n_decode != 1)
        return error_set_param(error, ERROR_UNSUPPORTED, n_split != 1 ? "pre_tokenizer" : "decoder",
                               "the %s is not ByteLevel exactly once",
                               n_split != 1 ? "pre_tokenizer" : "decoder");

    bool use_regex = true;
    if ((status = read_bool(object, "add_prefix_space", &tokenizer->add_prefix_space, error)))
        return status;
    if (json_object_get(object, "use_regex") && (status = read_bool(object, "use_regex", &use_regex, error)))
        return status;
    if (!use_regex)
        return 0;
    int code;
    PCRE2_SIZE offset;
    tokenizer->split = pcre2_compile((PCRE2_SPTR)split_pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
                                     &code, &offset, NULL);
    if (!tokenizer->split)
        return error_set(error, ERROR_INTERNAL, "the split pattern does not compile (PCRE2 error %d)", code);
    /* Without JIT (a process that may not map executable memory) matching is slower and the same. */
    pcre2_jit_compile(tokenizer->split, PCRE2_JIT_COMPLETE);
    return 0;
}

/* Settings of the model that would change ids and are not implemented. */
static int check_model(const json_t *model, struct error *error)
{
    const json_t *type = json_object_get(model, "type"); /* absent in GPT-2's own file */
    if (type && (!json_is_string(type) || strcmp(json_string_value(type), "BPE") != 0))
        return error_set_param(error, ERROR_UNSUPPORTED, "model",
                               "model type \"%.60s\" is not supported, only \"BPE\"",
                               json_is_string(type) ? json_string_value(type) : "?");
    static const char *const refused[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                          "byte_fallback", "ignore_merges"};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        const json_t *value = json_object_get(model, refused[i]);
        bool off = !value || json_is_null(value) || json_is_false(value) ||
                   (json_is_string(value) && json_string_length(value) == 0) ||
                   (json_is_number(value) && !(json_number_value(value) > 0));
        if (!off)
            return error_set_param(error, ERROR_UNSUPPORTED, refused[i],
                                   "the model's \"%s\" is not supported", refused[i]);
    }
    return 0;
}

static int load_vocabulary(struct tokenizer *tokenizer, json_t *vocab, struct error *error)
{
    const char *spelling;
    json_t *id;
    if (!json_is_object(vocab))
        return error_set_param(error, ERROR_CORRUPT, "vocab", "the model has no vocabulary");
    json_object_foreach(vocab, spelling, id)
    {
        json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
        if (value < 0 || value > VOCABULARY_MAX_ID)
            return error_set_param(error, ERROR_CORRUPT, "vocab", "the id of token \"%.60s\" is out of range",
                                   spelling);
        int status =
            vocabulary_add(&tokenizer->vocabulary, spelling, strlen(spelling), (int32_t)value, error);
        if (status)
            return status;
    }

    /* The symbols that words start from. 0xC0, 0xC1 and 0xF5.. do not occur in UTF-8. */
    memset(tokenizer->bpe.byte_ids, 0xFF, sizeof tokenizer->bpe.byte_ids);
    for (int32_t c = 0; c <= 0x143; c++) {
        int byte = alphabet_byte(c);
        if (byte < 0)
            continue;
        char text[2] = {(char)c, 0};
        size_t length = 1;
        if (c >= 0x80) {
            text[0] = (char)(0xC0 | c >> 6);
            text[1] = (char)(0x80 | (c & 0x3F));
            length = 2;
        }
        int32_t found = vocabulary_find(&tokenizer->vocabulary, text, length);
        if (found < 0 && byte != 0xC0 && byte != 0xC1 && byte < 0xF5)
            return error_set_param(error, ERROR_UNSUPPORTED, "vocab",
                                   "the vocabulary has no token for byte 0x%02X: not a byte-level model",
                                   (unsigned)byte);
        tokenizer->bpe.byte_ids[byte] = found;
    }
    return 0;
}

/* One merge in either spelling: "a b" or ["a","b"]. */
static int split_merge(const json_t *merge, const char **ret_left, size_t *ret_left_length,
                       const char **ret_right, size_t *ret_right_length)
{
    const json_t *left = json_array_get(merge, 0), *right = json_array_get(merge, 1);
    if (json_is_string(merge)) {
        const char *text = json_string_value(merge), *space = strchr(text, ' ');
        if (!space || strchr(space + 1, ' '))
            return ERROR_CORRUPT;
        *ret_left = text;
        *ret_left_length = (size_t)(space - text);
        *ret_right = space + 1;
        *ret_right_length = strlen(space + 1);
        return 0;
    }
    if (json_array_size(merge) != 2 || !json_is_string(left) || !json_is_string(right))
        return ERROR_CORRUPT;
    *ret_left = json_string_value(left);
    *ret_left_length = json_string_length(left);
    *ret_right = json_string_value(right);
    *ret_right_length = json_string_length(right);
    return 0;
}

static int load_merges(struct tokenizer *tokenizer, const json_t *merges, struct error *error)
{
    const struct vocabulary *vocabulary = &tokenizer->vocabulary;
    struct buffer joined = {0};
    int status = 0;
    int32_t rank = 0;
    if (!json_is_array(merges) || json_array_size(merges) > VOCABULARY_MAX_ID)
        return error_set_param(error, ERROR_CORRUPT, "merges", "the model has no list of merges");
    if (bpe_reserve(&tokenizer->bpe, json_array_size(merges)))
        return no_memory(error);
    for (size_t i = 0; i < json_array_size(merges); i++) {
        const json_t *merge = json_array_get(merges, i);
        const char *left, *right;
        size_t left_length, right_length;
        if (json_is_string(merge) && !strncmp(json_string_value(merge), "#version", 8))
            continue; /* the first line of an old merges.txt */
        if (split_merge(merge, &left, &left_length, &right, &right_length)) {
            status = error_set_param(error, ERROR_CORRUPT, "merges", "merge %zu is not a pair of tokens", i);
            goto done;
        }
        buffer_clear(&joined);
        buffer_append(&joined, left, left_length);
        buffer_append(&joined, right, right_length);
        if (joined.failed) {
            status = no_memory(error);
            goto done;
        }
        int32_t left_id = vocabulary_find(vocabulary, left, left_length);
        int32_t right_id = vocabulary_find(vocabulary, right, right_length);
        int32_t id = vocabulary_find(vocabulary, joined.data, joined.length);
        if (left_id < 0 || right_id < 0 || id < 0) {
            status =
                error_set_param(error, ERROR_CORRUPT, "merges",
                                "merge %zu (\"%.60s\") is of tokens outside the vocabulary", i, joined.data);
            goto done;
        }
        bpe_add_merge(&tokenizer->bpe, left_id, right_id, rank++, id);
    }
done:
    buffer_free(&joined);
    return status;
}

static int load_added_token(struct tokenizer *tokenizer, const json_t *object, struct error *error)
{
    struct vocabulary *vocabulary = &tokenizer->vocabulary;
    const char *content = json_string_value(json_object_get(object, "content"));
    const json_t *number = json_object_get(object, "id");
    json_int_t id = json_is_integer(number) ? json_integer_value(number) : -1;
    if (!content || !content[0] || id < 0 || id > VOCABULARY_MAX_ID)
        return error_set_param(error, ERROR_CORRUPT, "added_tokens", "an added token lacks content or id");
    struct added_token token = {.id = (int32_t)id};
    bool special = false, normalized = false;
    int status;
    if ((status = read_bool(object, "single_word", &token.single_word, error)) ||
        (status = read_bool(object, "lstrip", &token.lstrip, error)) ||
        (status = read_bool(object, "rstrip", &token.rstrip, error)) ||
        (status = read_bool(object, "special", &special, error)) ||
        (status = read_bool(object, "normalized", &normalized, error)))
        return status;

    size_t length = strlen(content);
    int32_t known = vocabulary_find(vocabulary, content, length);
    if (known >= 0 && known != token.id)
        return error_set_param(error, ERROR_CORRUPT, "added_tokens",
                               "added token \"%.60s\" has id %d, in the vocabulary %d", content,
                               (int)token.id, (int)known);
    if (known < 0 && (status = vocabulary_add(vocabulary, content, length, token.id, error)))
        return status;
    vocabulary->entries[token.id].special |= special;

    tokenizer->uncuttable |= token.rstrip || (token.single_word && content[0] == ' ');
    for (size_t i = 1; i < length; i++)
        tokenizer->uncuttable |= content[i] == ' ' && content[i - 1] != ' ';
    struct buffer pattern = {0};
    if (normalized && tokenizer->nfc)
        status = unicode_nfc(content, length, &pattern);
    else
        buffer_append(&pattern, content, length);
    if (!status && !pattern.failed)
        status = added_tokens_add(normalized ? &tokenizer->normalized : &tokenizer->raw, pattern.data,
                                  pattern.length, &token);
    bool failed = status || pattern.failed;
    buffer_free(&pattern);
    return failed ? no_memory(error) : 0;
}

static int load_added_tokens(struct tokenizer *tokenizer, const json_t *list, struct error *error)
{
    if (!list || json_is_null(list))
        return 0;
    if (!json_is_array(list))
        return error_set_param(error, ERROR_CORRUPT, "added_tokens", "\"added_tokens\" is not a list");
    for (size_t i = 0; i < json_array_size(list); i++) {
        int status = load_added_token(tokenizer, json_array_get(list, i), error);
        if (status)
            return status;
    }
    return 0;
}

static int load(struct tokenizer *tokenizer, const char *path, struct error *error)
{
    char *data = NULL;
    size_t length = 0;
    json_error_t why;
    int status = file_read(path, TOKENIZER_MAX_BYTES, &data, &length, error);
    if (status)
        return status;
    json_t *root = json_loadb(data, length, 0, &why);
    free(data);
    if (!root)
        return error_set(error, ERROR_CORRUPT, "%s: not valid JSON: %s (line %d)", path, why.text, why.line);

    const json_t *model = json_object_get(root, "model");
    if (!json_is_object(model))
        status = error_set(error, ERROR_CORRUPT, "there is no model in it");
    if (!status)
        status = load_stages(tokenizer, root, error);
    if (!status)
        status = check_model(model, error);
    if (!status)
        status = load_vocabulary(tokenizer, json_object_get(model, "vocab"), error);
    if (!status)
        status = load_merges(tokenizer, json_object_get(model, "merges"), error);
    if (!status)
        status = load_added_tokens(tokenizer, json_object_get(root, "added_tokens"), error);
    json_decref(root);
    if (status)
        error_prefix(error, "%s: ", path);
    return status;
}

int tokenizer_load(const char *path, struct tokenizer **ret_tokenizer, struct error *error)
{
    struct stat info;
    char *inside = NULL;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
        if (asprintf(&inside, "%s/tokenizer.json", path) < 0)
            return no_memory(error);
        path = inside;
    }
    struct tokenizer *tokenizer = calloc(1, sizeof *tokenizer);
    int status = tokenizer ? load(tokenizer, path, error) : no_memory(error);
    free(inside);
    if (status) {
        tokenizer_free(tokenizer);
        return status;
    }
    *ret_tokenizer = tokenizer;
    return 0;
}
