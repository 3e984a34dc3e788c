/* dataset.c: a JSONL file into tokenized examples with loss masks. See dataset.h. Any thread; the file is
 * read line by line, so that what is in memory is one line and the ids. */
#include "engine/text/dataset.h"

#include "engine/text/chat.h"
#include "engine/text/unicode.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { YIELD_BYTES = 1 << 18 }; /* some 20 ms of tokenizing */

struct loader {
    struct dataset *dataset;
    const struct tokenizer *tokenizer;
    const struct dataset_options *options;
    int64_t line, form_line;
    int64_t id_capacity, example_capacity;
    struct token_list ids; /* of the line at hand */
    struct buffer loss;    /* a byte for each of them */
};

static const struct {
    const char *required[2]; /* NULL = fewer */
    const char *name;
} forms[] = {
    [DATASET_PROMPT] = {{"prompt", "completion"}, "prompt/completion"},
    [DATASET_MESSAGES] = {{"messages"}, "messages"},
    [DATASET_INSTRUCTION] = {{"instruction", "output"}, "instruction/output"},
    [DATASET_TEXT] = {{"text"}, "text"},
};
enum { N_FORMS = sizeof forms / sizeof *forms };

/* In the functions below ERROR_INVALID is a bad line, any other error ends the loading. */

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "out of memory while reading the data");
}

static const char *kind_of(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "true or false";
    default:
        return "null";
    }
}

static int find_form(const json_t *object, enum dataset_form *ret_form, struct error *error)
{
    int found = DATASET_UNKNOWN;
    for (int form = DATASET_PROMPT; form < N_FORMS; form++) {
        bool here = false;
        for (int i = 0; i < 2; i++)
            here |= forms[form].required[i] && json_object_get(object, forms[form].required[i]);
        if (here && found)
            return error_set(error, ERROR_INVALID, "has keys of two forms, %s and %s", forms[found].name,
                             forms[form].name);
        if (here)
            found = form;
    }
    if (!found)
        return error_set(error, ERROR_INVALID,
                         "has none of the keys of a training example: prompt and completion, messages, "
                         "instruction and output, or text");
    *ret_form = (enum dataset_form)found;
    return 0;
}

/* The string under a key; jansson refuses strings with a NUL in them. */
static int get_string(const json_t *object, const char *key, const char **ret_text, struct error *error)
{
    const json_t *value = json_object_get(object, key);
    if (!value)
        return error_set(error, ERROR_INVALID, "\"%s\" is missing", key);
    if (!json_is_string(value))
        return error_set(error, ERROR_INVALID, "\"%s\" is %s, not a string", key, kind_of(value));
    *ret_text = json_string_value(value);
    return 0;
}

/* ---- one example's tokens ---- */

/* A chat_sink: parts are tokenized apart. */
static int add_part(void *arg, bool reply, const char *text, size_t length, struct error *error)
{
    struct loader *loader = arg;
    size_t before = loader->ids.count;
    int status = before ? tokenizer_encode_continued(loader->tokenizer, text, length, &loader->ids, error)
                        : tokenizer_encode(loader->tokenizer, text, length, &loader->ids, error);
    if (status)
        return status;
    for (size_t i = before; i < loader->ids.count; i++)
        buffer_append(&loader->loss, reply ? "\1" : "\0", 1);
    return loader->loss.failed ? no_memory(error) : 0;
}

static int read_prompt(struct loader *loader, const json_t *object, struct error *error)
{
    const char *prompt, *completion;
    int status = get_string(object, "prompt", &prompt, error);
    if (!status)
        status = get_string(object, "completion", &completion, error);
    if (!status)
        status = add_part(loader, false, prompt, strlen(prompt), error);
    return status ? status : add_part(loader, true, completion, strlen(completion), error);
}

static int read_text(struct loader *loader, const json_t *object, struct error *error)
{
    const char *text;
    int status = get_string(object, "text", &text, error);
    return status ? status : add_part(loader, true, text, strlen(text), error);
}

static int read_instruction(struct loader *loader, const json_t *object, struct error *error)
{
    const char *instruction, *output, *input = NULL;
    const json_t *value = json_object_get(object, "input");
    int status = get_string(object, "instruction", &instruction, error);
    if (!status && value && !json_is_null(value))
        status = get_string(object, "input", &input, error);
    if (!status)
        status = get_string(object, "output", &output, error);
    if (status)
        return status;
    struct chat_turn turns[] = {{"user", instruction, input}, {"assistant", output, NULL}};
    return chat_parts(loader->options->chat_template, turns, 2, false, add_part, loader, error);
}

static int read_message(json_t *message, size_t number, struct chat_turn *ret_turn, struct error *error)
{
    const char *key;
    json_t *value;
    if (!json_is_object(message))
        return error_set(error, ERROR_INVALID, "message %zu is %s, not an object", number, kind_of(message));
    json_object_foreach(message, key, value)
        /* Tool calls, weights, names: leaving them out would teach something else than the file says. */
        if (strcmp(key, "role") != 0 && strcmp(key, "content") != 0) return error_set(
            error, ERROR_INVALID, "message %zu has a key that is not supported: \"%.60s\"", number, key);
    int status = get_string(message, "role", &ret_turn->role, error);
    if (!status)
        status = get_string(message, "content", &ret_turn->content, error);
    if (status == ERROR_INVALID)
        error_prefix(error, "message %zu: ", number);
    return status;
}

static int read_messages(struct loader *loader, const json_t *object, struct error *error)
{
    const json_t *messages = json_object_get(object, "messages");
    if (!json_is_array(messages))
        return error_set(error, ERROR_INVALID, "\"messages\" is %s, not a list", kind_of(messages));
    if (json_object_get(object, "tools") || json_object_get(object, "functions"))
        return error_set(error, ERROR_INVALID, "tools and functions are not supported");
    size_t count = json_array_size(messages);
    if (count == 0)
        return error_set(error, ERROR_INVALID, "\"messages\" is empty");

    struct chat_turn *turns = calloc(count, sizeof *turns);
    if (!turns)
        return no_memory(error);
    int status = 0;
    for (size_t i = 0; i < count && !status; i++)
        status = read_message(json_array_get(messages, i), i + 1, &turns[i], error);
    if (!status && strcmp(turns[count - 1].role, "assistant") != 0)
        status = error_set(error, ERROR_INVALID, "the last message is not the assistant's");
    if (!status)
        status = chat_parts(loader->options->chat_template, turns, count, false, add_part, loader, error);
    free(turns);
    return status;
}

/* ---- examples into the data set ---- */

static int reserve(struct loader *loader, int64_t n_ids)
{
    struct dataset *dataset = loader->dataset;
    if (dataset->n_tokens + n_ids > loader->id_capacity) {
        int64_t capacity = 2 * (dataset->n_tokens + n_ids) + 4096;
        int32_t *ids = realloc(dataset->ids, (size_t)capacity * sizeof *ids);
        if (!ids)
            return ERROR_NO_MEMORY;
        dataset->ids = ids;
        uint8_t *loss = realloc(dataset->loss, (size_t)capacity);
        if (!loss)
            return ERROR_NO_MEMORY;
        dataset->loss = loss;
        loader->id_capacity = capacity;
    }
    if (dataset->n_examples + 2 > loader->example_capacity) {
        int64_t capacity = 2 * loader->example_capacity + 256;
        int64_t *starts = realloc(dataset->starts, (size_t)capacity * sizeof *starts);
        if (!starts)
            return ERROR_NO_MEMORY;
        dataset->starts = starts;
        loader->example_capacity = capacity;
    }
    return 0;
}

/* Tokens begin .. begin + count of the line at hand become an example. *ret_targets: how many bear loss; with
 * none it is not kept. */
static int keep(struct loader *loader, size_t begin, size_t count, int64_t *ret_targets, struct error *error)
{
    struct dataset *dataset = loader->dataset;
    int64_t targets = 0;
    for (size_t i = begin + 1; i < begin + count; i++)
        targets += loader->loss.data[i];
    *ret_targets = targets;
    if (targets == 0)
        return 0;
    if (reserve(loader, (int64_t)count))
        return no_memory(error);
    memcpy(dataset->ids + dataset->n_tokens, loader->ids.ids + begin, count * sizeof *dataset->ids);
    memcpy(dataset->loss + dataset->n_tokens, loader->loss.data + begin, count);
    dataset->loss[dataset->n_tokens] = 0; /* nothing stands before it to predict it from */
    dataset->starts[0] = 0;
    dataset->n_tokens += (int64_t)count;
    dataset->n_loss_tokens += targets;
    dataset->starts[++dataset->n_examples] = dataset->n_tokens;
    return 0;
}

static int keep_line(struct loader *loader, struct error *error)
{
    const struct dataset_options *options = loader->options;
    size_t count = loader->ids.count, limit = (size_t)options->max_seq_len;
    int64_t targets = 0;
    int status;

    if (count <= limit) {
        status = keep(loader, 0, count, &targets, error);
        if (!status && targets == 0)
            status = error_set(error, ERROR_INVALID, "there is nothing to learn in it: no token bears loss");
        return status;
    }
    if (loader->dataset->form == DATASET_TEXT && options->split_text) {
        for (size_t begin = 0; begin + 1 < count; begin += limit - 1) {
            size_t piece = count - begin < limit ? count - begin : limit;
            if ((status = keep(loader, begin, piece, &targets, error)))
                return status;
        }
        return 0;
    }
    if (!options->truncate)
        return error_set(error, ERROR_INVALID, "is %zu tokens long, max_seq_len is %zu", count, limit);
    status = keep(loader, 0, limit, &targets, error);
    if (!status) {
        loader->dataset->n_truncated++;
        loader->dataset->n_dropped += targets == 0;
    }
    return status;
}

static int read_line(struct loader *loader, const char *text, size_t length, struct error *error)
{
    struct dataset *dataset = loader->dataset;
    enum dataset_form form = DATASET_UNKNOWN;
    json_error_t why;
    if (memchr(text, '\0', length))
        return error_set(error, ERROR_INVALID, "contains a NUL byte");
    json_t *object = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why);
    if (!object)
        return error_set(error, ERROR_INVALID, "is not valid JSON: %s (column %d)", why.text, why.column);

    int status = 0;
    if (!json_is_object(object))
        status = error_set(error, ERROR_INVALID, "is %s, not an object", kind_of(object));
    if (!status)
        status = find_form(object, &form, error);
    if (!status && dataset->form != DATASET_UNKNOWN && form != dataset->form)
        status = error_set(error, ERROR_INVALID, "has the form %s, line %lld has %s", forms[form].name,
                           (long long)loader->form_line, forms[dataset->form].name);
    if (status)
        goto done;
    if (dataset->form == DATASET_UNKNOWN) {
        dataset->form = form;
        loader->form_line = loader->line;
    }

    loader->ids.count = 0;
    buffer_clear(&loader->loss);
    switch (form) {
    case DATASET_PROMPT:
        status = read_prompt(loader, object, error);
        break;
    case DATASET_MESSAGES:
        status = read_messages(loader, object, error);
        break;
    case DATASET_INSTRUCTION:
        status = read_instruction(loader, object, error);
        break;
    default:
        status = read_text(loader, object, error);
        break;
    }
    if (!status && loader->options->eos_id >= 0) {
        if (token_list_push(&loader->ids, loader->options->eos_id))
            status = no_memory(error);
        buffer_append(&loader->loss, "\1", 1);
        if (loader->loss.failed)
            status = no_memory(error);
    }
    if (!status)
        status = keep_line(loader, error);
done:
    json_decref(object);
    return status;
}

/* ---- the file ---- */

/* Reasons travel as JSON: quoted bytes must be whole UTF-8, also where a quotation was cut. */
static void list_error(struct dataset *dataset, int64_t line, const char *reason)
{
    if (dataset->n_line_errors++ >= DATASET_LISTED_ERRORS)
        return;
    struct dataset_line_error *listed = &dataset->line_errors[dataset->n_line_errors - 1];
    listed->line = line;
    snprintf(listed->reason, sizeof listed->reason, "%s", reason);
    size_t length = strlen(listed->reason), at;
    while ((at = utf8_valid_prefix(listed->reason, length)) < length)
        listed->reason[at] = '?';
}

static bool is_blank(const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++)
        if (text[i] != ' ' && text[i] != '\t')
            return false;
    return true;
}

static int read_lines(struct loader *loader, FILE *file, const char *path, struct error *error)
{
    char *text = NULL;
    size_t capacity = 0, unyielded = 0;
    ssize_t got;
    int status = 0;
    errno = 0;
    while ((got = getline(&text, &capacity, file)) >= 0) {
        const char *line = text;
        size_t length = (size_t)got;
        unyielded += length;
        if (loader->options->yield && unyielded >= YIELD_BYTES) {
            loader->options->yield(loader->options->yield_arg);
            unyielded = 0;
        }
        if (loader->line++ == 0 && length >= 3 && !memcmp(line, "\xEF\xBB\xBF", 3)) {
            line += 3;
            length -= 3;
        }
        if (length > 0 && line[length - 1] == '\n')
            length--;
        if (length > 0 && line[length - 1] == '\r')
            length--;
        if (is_blank(line, length))
            continue;
        struct error why = {0};
        status = read_line(loader, line, length, &why);
        if (status == ERROR_INVALID) {
            list_error(loader->dataset, loader->line, why.message);
            status = 0;
        } else if (status) {
            error_set(error, status, "line %lld: %s", (long long)loader->line, why.message);
            break;
        }
        errno = 0;
    }
    if (!status && !feof(file))
        status = errno == ENOMEM ? no_memory(error)
                                 : error_set(error, ERROR_IO, "cannot read %s: %s", path, strerror(errno));
    free(text);
    return status;
}

/* What is wrong with the whole: bad lines, or nothing to learn from. */
static int check(const struct dataset *dataset, struct error *error)
{
    if (dataset->n_line_errors == 1)
        return error_set(error, ERROR_INVALID, "line %lld %s", (long long)dataset->line_errors[0].line,
                         dataset->line_errors[0].reason);
    if (dataset->n_line_errors > 1)
        return error_set(error, ERROR_INVALID, "%lld bad lines, the first: line %lld %s",
                         (long long)dataset->n_line_errors, (long long)dataset->line_errors[0].line,
                         dataset->line_errors[0].reason);
    if (dataset->n_dropped > 0 && dataset->n_examples == 0)
        return error_set_param(error, ERROR_INVALID, "max_seq_len",
                               "cut to max_seq_len, no example has a token left that bears loss");
    if (dataset->n_examples == 0)
        return error_set(error, ERROR_INVALID, "the file holds no examples");
    return 0;
}

static int check_options(const struct dataset_options *options, struct error *error)
{
    if (options->max_seq_len < 2)
        return error_set_param(error, ERROR_INVALID, "max_seq_len",
                               "max_seq_len is %lld, at least 2 is needed", (long long)options->max_seq_len);
    return chat_check_template(options->chat_template, error);
}

int dataset_load(const char *path, const struct tokenizer *tokenizer, const struct dataset_options *options,
                 struct dataset **ret_dataset, struct error *error)
{
    struct dataset *dataset = calloc(1, sizeof *dataset);
    struct loader loader = {.dataset = dataset, .tokenizer = tokenizer, .options = options};
    FILE *file = NULL;
    int status = dataset ? check_options(options, error) : no_memory(error);
    if (status)
        goto done;
    file = fopen(path, "re");
    if (!file) {
        status = error_set(error, errno == ENOENT ? ERROR_NOT_FOUND : ERROR_IO, "cannot open %s: %s", path,
                           strerror(errno));
        goto done;
    }
    status = read_lines(&loader, file, path, error);
    if (!status)
        status = check(dataset, error);
done:
    if (file)
        fclose(file);
    token_list_free(&loader.ids);
    buffer_free(&loader.loss);
    if (status && status != ERROR_INVALID)
        dataset_free(dataset);
    else
        *ret_dataset = dataset;
    return status;
}
