/* test_dataset.c: forms, masks, bad lines, chat forms against training, batches and their order. */
#include "support.h"

#include "engine/text/dataset.h"
#include "engine/text/unicode.h"

static struct tokenizer *tokenizer;

static int set_up(void **state)
{
    (void)state;
    tokenizer = load_tokenizer(HATCHLING);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tokenizer_free(tokenizer);
    return 0;
}

static const struct dataset_options defaults = {.max_seq_len = 512};

static int load_bytes(const char *text, size_t length, const struct dataset_options *options,
                      struct dataset **ret_dataset, struct error *error)
{
    char path[64];
    temporary_file(path, text, length);
    int status = dataset_load(path, tokenizer, options, ret_dataset, error);
    unlink(path);
    return status;
}

static struct dataset *load(const char *text, const struct dataset_options *options)
{
    struct dataset *dataset = NULL;
    struct error error = {0};
    if (load_bytes(text, strlen(text), options, &dataset, &error))
        fail_msg("%s", error.message);
    return dataset;
}

/* The text of the tokens of one example that bear loss, or of those that do not. */
static void expect_text(const struct dataset *dataset, int64_t example, bool loss, const char *expected)
{
    struct buffer text = {0};
    struct token_stream stream = {0};
    buffer_append(&text, "", 0);
    for (int64_t i = dataset->starts[example]; i < dataset->starts[example + 1]; i++)
        if (dataset->loss[i] == loss)
            token_stream_push(&stream, tokenizer, dataset->ids[i], false, &text);
    assert_string_equal(text.data, expected);
    buffer_free(&text);
}

static void test_forms(void **state)
{
    (void)state;
    struct dataset *dataset = load("{\"prompt\":\"One two\",\"completion\":\" three four\"}\n", &defaults);
    assert_int_equal(dataset->form, DATASET_PROMPT);
    assert_int_equal(dataset->n_examples, 1);
    expect_text(dataset, 0, false, "One two");
    expect_text(dataset, 0, true, " three four<|endoftext|>");
    dataset_free(dataset);

    dataset = load("{\"text\":\"Once upon a time\"}", &defaults);
    assert_int_equal(dataset->form, DATASET_TEXT);
    assert_int_equal(dataset->n_loss_tokens, dataset->n_tokens - 1); /* the first is not predicted */
    expect_text(dataset, 0, false, "Once");
    expect_text(dataset, 0, true, " upon a time<|endoftext|>");
    dataset_free(dataset);

    struct dataset_options without = defaults;
    without.eos_id = -1;
    dataset = load("{\"text\":\"Once upon a time\"}", &without);
    expect_text(dataset, 0, true, " upon a time");
    dataset_free(dataset);

    dataset = load("{\"instruction\":\" Add. \",\"input\":\"1 2\",\"output\":\"3\\n\",\"category\":7}\n"
                   "{\"instruction\":\"Sing\",\"input\":null,\"output\":\"la\"}\n"
                   "{\"instruction\":\"Sing\",\"output\":\"\"}\n",
                   &defaults);
    assert_int_equal(dataset->form, DATASET_INSTRUCTION);
    assert_int_equal(dataset->n_examples, 3);
    expect_text(dataset, 0, false, "user: Add.\n\n1 2\nassistant:");
    expect_text(dataset, 0, true, " 3<|endoftext|>");
    expect_text(dataset, 1, false, "user: Sing\nassistant:");
    expect_text(dataset, 2, true, "<|endoftext|>");
    dataset_free(dataset);

    struct dataset_options alpaca = defaults;
    alpaca.chat_template = "alpaca";
    dataset = load("{\"instruction\":\"Add.\",\"input\":\"1 2\",\"output\":\"3\"}\n"
                   "{\"instruction\":\"Sing\",\"input\":\"\",\"output\":\"la\"}\n",
                   &alpaca);
    expect_text(dataset, 0, false,
                "Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n");
    expect_text(dataset, 0, true, "3<|endoftext|>");
    expect_text(
        dataset, 1, false,
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nSing\n\n### Response:\n");
    dataset_free(dataset);
}

#define CHAT                                                                                                 \
    "{\"messages\":[{\"role\":\"system\",\"content\":\"Be kind.\"},{\"role\":\"user\",\"content\":\"Hi!\"}," \
    "{\"role\":\"assistant\",\"content\":\"Hello.\"},{\"role\":\"user\",\"content\":\"Bye\"},"               \
    "{\"role\":\"assistant\",\"content\":\"So long\"}]}\n"

static void test_messages(void **state)
{
    (void)state;
    struct dataset *dataset = load(CHAT, &defaults);
    assert_int_equal(dataset->form, DATASET_MESSAGES);
    expect_text(dataset, 0, false, "system: Be kind.\nuser: Hi!\nassistant:\nuser: Bye\nassistant:");
    expect_text(dataset, 0, true, " Hello. So long<|endoftext|>");
    dataset_free(dataset);

    struct dataset_options options = defaults;
    options.chat_template = "chatml";
    dataset = load(CHAT, &options);
    expect_text(dataset, 0, false,
                "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
                "<|im_start|>assistant\n\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n");
    expect_text(dataset, 0, true, "Hello.<|im_end|>So long<|im_end|><|endoftext|>");
    dataset_free(dataset);

    options.chat_template = "alpaca";
    dataset = load(CHAT, &options);
    expect_text(dataset, 0, false,
                "Be kind.\n\n### Instruction:\nHi!\n\n### Response:\n\n\n### Instruction:\nBye\n\n"
                "### Response:\n");
    expect_text(dataset, 0, true, "Hello.So long<|endoftext|>");
    dataset_free(dataset);
}

static void test_render(void **state)
{
    (void)state;
    const struct chat_message chat[] = {{"developer", "Be kind. "}, {"user", "\u00a0 Hi!\n"}};
    struct buffer prompt = {0};
    struct error error = {0};
    assert_int_equal(chat_render(NULL, chat, 2, &prompt, &error), 0);
    assert_string_equal(prompt.data, "system: Be kind.\nuser: Hi!\nassistant:");
    buffer_clear(&prompt);
    assert_int_equal(chat_render("chatml", chat + 1, 1, &prompt, &error), 0);
    assert_string_equal(prompt.data, "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n");

    const struct chat_message wrong[] = {{"user", "Hi"}, {"tool", "x"}};
    size_t before = prompt.length;
    assert_int_equal(chat_render("", wrong, 2, &prompt, &error), ERROR_INVALID);
    assert_non_null(strstr(error.message, "tool"));
    assert_int_equal(chat_render("llama", chat, 2, &prompt, &error), ERROR_INVALID);
    assert_non_null(strstr(error.message, "llama"));
    assert_int_equal(chat_render(NULL, NULL, 0, &prompt, &error), ERROR_INVALID);
    assert_int_equal(prompt.length, before);
    assert_string_equal(chat_reply_lead(NULL), " ");
    assert_string_equal(chat_reply_lead("alpaca"), "");
    assert_string_equal(chat_reply_stop("chatml"), "<|im_end|>");
    buffer_free(&prompt);
}

static void append_json_string(struct buffer *out, const char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == '"' || *text == '\\')
            buffer_printf(out, "\\u%04x", (unsigned)*text);
        else
            buffer_append(out, text, 1);
}

/* For random chats and every assistant's turn: the ids of the rendered prompt are a prefix of the ids that
 * training saw, and what follows bears loss. */
static void test_prompt_is_what_training_saw(void **state)
{
    (void)state;
    static const char *const pool[] = {
        "Hi",   " there",        "\n",      "  ", "!", "é", "42", "'s", "\u3000", "##", "user:",
        "\n\n", "<|endoftext|>", "e\u0301", "x",  ""};
    static const char *const templates[] = {NULL, "plain", "chatml", "alpaca"};
    static const char *const roles[] = {"system", "user", "assistant"};
    uint64_t seed = 5;
    for (int round = 0; round < 800; round++) {
        struct dataset_options options = defaults;
        options.chat_template = templates[round % 4];
        char contents[8][64];
        struct chat_message chat[8];
        size_t n = 1 + draw(&seed) % 8;
        struct buffer line = {0};
        buffer_append_string(&line, "{\"messages\":[");
        for (size_t i = 0; i < n; i++) {
            contents[i][0] = '\0';
            for (size_t words = draw(&seed) % 5; words > 0; words--)
                strcat(contents[i], pool[draw(&seed) % (sizeof pool / sizeof *pool)]);
            const char *role = i + 1 == n ? "assistant" : roles[draw(&seed) % 3];
            chat[i] = (struct chat_message){role, contents[i]};
            buffer_printf(&line, "%s{\"role\":\"%s\",\"content\":\"", i ? "," : "", role);
            append_json_string(&line, contents[i]);
            buffer_append_string(&line, "\"}");
        }
        buffer_append_string(&line, "]}");
        struct dataset *dataset = load(line.data, &options);
        for (size_t i = 1; i < n; i++) {
            if (strcmp(chat[i].role, "assistant") != 0)
                continue;
            struct buffer prompt = {0};
            struct token_list ids = {0};
            assert_int_equal(chat_render(options.chat_template, chat, i, &prompt, NULL), 0);
            assert_int_equal(tokenizer_encode(tokenizer, prompt.data, prompt.length, &ids, NULL), 0);
            if ((int64_t)ids.count >= dataset->n_tokens ||
                memcmp(ids.ids, dataset->ids, ids.count * sizeof *ids.ids) != 0)
                fail_msg("training saw other tokens than the prompt \"%s\" of %s", prompt.data, line.data);
            if (unicode_leading_space(contents[i], strlen(contents[i])) < strlen(contents[i]))
                assert_int_equal(dataset->loss[ids.count], 1);
            assert_int_equal(dataset->loss[ids.count - 1] && strcmp(chat[i - 1].role, "assistant"), 0);
            token_list_free(&ids);
            buffer_free(&prompt);
        }
        dataset_free(dataset);
        buffer_free(&line);
    }
}

static void test_tolerated(void **state)
{
    (void)state;
    struct dataset *dataset =
        load("\xEF\xBB\xBF{\"text\":\"one two\"}\r\n\r\n  \t\n{\"text\":\"three four\"}", &defaults);
    assert_int_equal(dataset->n_examples, 2);
    assert_int_equal(dataset->starts[0], 0);
    assert_int_equal(dataset->starts[2], dataset->n_tokens);
    dataset_free(dataset);
}

static void expect_bad(const char *text, size_t length, const struct dataset_options *options, int64_t line,
                       const char *reason)
{
    struct dataset *dataset = NULL;
    struct error error = {0};
    assert_int_equal(load_bytes(text, length, options, &dataset, &error), ERROR_INVALID);
    assert_non_null(dataset);
    assert_int_equal(dataset->n_line_errors, 1);
    if (dataset->line_errors[0].line != line || !strstr(dataset->line_errors[0].reason, reason))
        fail_msg("line %lld, \"%s\" where \"%s\" was expected", (long long)dataset->line_errors[0].line,
                 dataset->line_errors[0].reason, reason);
    assert_non_null(strstr(error.message, reason));
    dataset_free(dataset);
}

static void test_bad_lines(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"{\"text\":\"x\"", "not valid JSON"},
        {"[1]", "a list, not an object"},
        {"\"text\"", "not valid JSON"},
        {"{\"text\":\"a b\",\"text\":\"c\"}", "duplicate"},
        {"{\"text\":\"\xFF\"}", "not valid JSON"},
        {"{\"text\":\"a\\u0000b\"}", "not valid JSON"},
        {"{\"label\":1}", "none of the keys"},
        {"{\"text\":5}", "a number, not a string"},
        {"{\"text\":null}", "null, not a string"},
        {"{\"text\":\"\"}", "nothing to learn"},
        {"{\"prompt\":\"x\"}", "\"completion\" is missing"},
        {"{\"completion\":\"x\"}", "\"prompt\" is missing"},
        {"{\"prompt\":\"x\",\"completion\":[\"y\"]}", "a list, not a string"},
        {"{\"prompt\":\"x\",\"completion\":\"y\",\"text\":\"z\"}", "two forms"},
        {"{\"instruction\":\"x\",\"output\":true}", "true or false, not a string"},
        {"{\"instruction\":\"x\",\"input\":{},\"output\":\"y\"}", "an object, not a string"},
        {"{\"messages\":{}}", "not a list"},
        {"{\"messages\":[]}", "empty"},
        {"{\"messages\":[7]}", "message 1 is a number"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}", "not the assistant's"},
        {"{\"messages\":[{\"role\":\"user\"}]}", "message 1: \"content\" is missing"},
        {"{\"messages\":[{\"role\":\"u\",\"content\":\"x\"},{\"role\":\"assistant\",\"content\":\"x\"}]}",
         "role \"u\""},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"weight\":0}]}", "weight"},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"x y\"}],\"tools\":[]}", "tools"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_bad(cases[i][0], strlen(cases[i][0]), &defaults, 1, cases[i][1]);
    static const char nul[] = "{\"text\":\"a b\"}\n\n{\"text\":\"a\0b\"}\n";
    expect_bad(nul, sizeof nul - 1, &defaults, 3, "NUL");
    static const char mixed[] = "{\"text\":\"a b\"}\n{\"prompt\":\"a\",\"completion\":\"b\"}\n";
    expect_bad(mixed, sizeof mixed - 1, &defaults, 2, "line 1 has text");

    struct dataset *dataset = NULL;
    struct error error = {0};
    assert_int_equal(load_bytes("\n \n", 3, &defaults, &dataset, &error), ERROR_INVALID);
    assert_non_null(strstr(error.message, "no examples"));
    dataset_free(dataset);
    dataset = NULL;
    assert_int_equal(dataset_load("/nowhere/at/all", tokenizer, &defaults, &dataset, &error),
                     ERROR_NOT_FOUND);
    assert_int_equal(dataset_load("/", tokenizer, &defaults, &dataset, &error), ERROR_IO);
    assert_null(dataset);

    struct buffer many = {0};
    for (int i = 0; i < 50; i++)
        buffer_append_string(&many, i % 2 ? "{\"text\":\"fine here\"}\n" : "nonsense\n");
    assert_int_equal(load_bytes(many.data, many.length, &defaults, &dataset, &error), ERROR_INVALID);
    assert_int_equal(dataset->n_line_errors, 25);
    for (int i = 0; i < DATASET_LISTED_ERRORS; i++)
        assert_int_equal(dataset->line_errors[i].line, 2 * i + 1);
    assert_int_equal(dataset->n_examples, 25);
    assert_non_null(strstr(error.message, "25 bad lines"));
    dataset_free(dataset);
    buffer_free(&many);

    /* A quoted key that is cut inside a character must not make the reason invalid UTF-8. */
    char key[400] = "{\"messages\":[{\"x";
    for (int i = 0; i < 80; i++)
        strcat(key, "é");
    strcat(key, "\":1}]}");
    assert_int_equal(load_bytes(key, strlen(key), &defaults, &dataset, &error), ERROR_INVALID);
    const char *reason = dataset->line_errors[0].reason;
    assert_int_equal(utf8_valid_prefix(reason, strlen(reason)), strlen(reason));
    dataset_free(dataset);

    struct dataset_options options = {.max_seq_len = 1};
    assert_int_equal(load_bytes("{}", 2, &options, &dataset, &error), ERROR_INVALID);
    assert_string_equal(error.param, "max_seq_len");
    dataset_free(dataset);
    options = (struct dataset_options){.max_seq_len = 9, .chat_template = "vicuna"};
    assert_int_equal(load_bytes("{}", 2, &options, &dataset, &error), ERROR_INVALID);
    assert_string_equal(error.param, "chat_template");
    dataset_free(dataset);
}

static void test_lengths(void **state)
{
    (void)state;
    static const char words[] =
        "{\"text\":\"a b\"}\n{\"text\":\"a b c d e f g h of j\"}\n"; /* 11 with the end */
    struct dataset_options options = {.max_seq_len = 4};
    expect_bad(words, sizeof words - 1, &options, 2, "is 11 tokens long, max_seq_len is 4");
    options.max_seq_len = 10;
    expect_bad(words, sizeof words - 1, &options, 2, "is 11 tokens long, max_seq_len is 10");
    options.max_seq_len = 11;
    dataset_free(load(words, &options));

    options = (struct dataset_options){.max_seq_len = 4, .truncate = true};
    struct dataset *dataset = load(words, &options);
    assert_int_equal(dataset->n_examples, 2);
    assert_int_equal(dataset->n_truncated, 1);
    expect_text(dataset, 1, true, " b c d");
    dataset_free(dataset);

    options = (struct dataset_options){.max_seq_len = 4, .split_text = true};
    dataset = load(words, &options);
    assert_int_equal(dataset->n_examples, 1 + 4);
    expect_text(dataset, 1, true, " b c d");
    expect_text(dataset, 2, false, " d");
    expect_text(dataset, 2, true, " e f g");
    expect_text(dataset, 3, true, " h of j");
    expect_text(dataset, 4, false, " j");
    expect_text(dataset, 4, true, "<|endoftext|>");
    dataset_free(dataset);

    /* Splitting is for text alone; a prompt that fills all the room leaves nothing to learn. */
    static const char pairs[] = "{\"prompt\":\"a b c d e f\",\"completion\":\" g h\"}\n"
                                "{\"prompt\":\"a b\",\"completion\":\" g h\"}\n";
    expect_bad(pairs, sizeof pairs - 1, &(struct dataset_options){.max_seq_len = 5, .split_text = true}, 1,
               "max_seq_len is 5");
    options = (struct dataset_options){.max_seq_len = 5, .truncate = true};
    dataset = load(pairs, &options);
    assert_int_equal(dataset->n_examples, 1);
    assert_int_equal(dataset->n_truncated, 1);
    assert_int_equal(dataset->n_dropped, 1);
    dataset_free(dataset);
    struct error error = {0};
    options.max_seq_len = 2;
    assert_int_equal(load_bytes(pairs, sizeof pairs - 1, &options, &dataset, &error), ERROR_INVALID);
    assert_string_equal(error.param, "max_seq_len");
    dataset_free(dataset);
}

/* ---- batches ---- */

enum { EXAMPLES = 200, MAX_LEN = 40 };

/* Example i: the number i as a first word, then as many words as the draw says. */
static struct dataset *load_numbered(void)
{
    struct buffer text = {0};
    uint64_t seed = 9;
    for (int i = 0; i < EXAMPLES; i++) {
        buffer_printf(&text, "{\"prompt\":\"%d\",\"completion\":\"", i);
        for (uint64_t words = 1 + draw(&seed) % 30; words > 0; words--)
            buffer_append_string(&text, " word");
        buffer_append_string(&text, "\"}\n");
    }
    struct dataset_options options = {.max_seq_len = MAX_LEN};
    struct dataset *dataset = load(text.data, &options);
    buffer_free(&text);
    return dataset;
}

/* Which example a sequence of the batch is; checks its ids and targets on the way. */
static int64_t identify(const struct dataset *dataset, const struct batch *batch, int32_t seq)
{
    int64_t start = batch->seq_starts[seq], length = batch->seq_starts[seq + 1] - start;
    for (int64_t i = 0; i < dataset->n_examples; i++) {
        int64_t from = dataset->starts[i];
        if (dataset->starts[i + 1] - from != length ||
            memcmp(dataset->ids + from, batch->ids + start, (size_t)length * sizeof *batch->ids) != 0)
            continue;
        for (int64_t t = 0; t < length; t++) {
            bool counts = t + 1 < length && dataset->loss[from + t + 1];
            assert_int_equal(batch->targets[start + t], counts ? dataset->ids[from + t + 1] : -100);
        }
        return i;
    }
    fail_msg("a sequence that is no example");
    return -1;
}

/* Walk one epoch; fills order with the examples in the order they came. */
static void walk(struct dataset *dataset, uint64_t seed, bool shuffle, int32_t rows, bool packing,
                 struct data_cursor cursor, int64_t *order, int64_t *ret_count)
{
    int64_t tokens, count = 0, batches = 0, n_targets = 0, epoch = cursor.epoch;
    bool from_start = cursor.position == 0;
    int32_t seqs;
    struct error error = {0};
    assert_int_equal(dataset_batch_limits(dataset, rows, packing, MAX_LEN, &tokens, &seqs, &error), 0);
    struct batch *batch = NULL;
    assert_int_equal(batch_create(tokens, seqs, &batch), 0);
    while (cursor.epoch == epoch) {
        if (dataset_next_batch(dataset, seed, shuffle, rows, packing, MAX_LEN, &cursor, batch, &error))
            fail_msg("%s", error.message);
        assert_true(batch->n_tokens <= tokens && batch->n_seqs <= seqs && batch->n_targets > 0);
        assert_true(batch->n_tokens <= (int64_t)rows * MAX_LEN);
        assert_int_equal(batch->seq_starts[batch->n_seqs], batch->n_tokens);
        if (!packing && cursor.epoch == epoch)
            assert_int_equal(batch->n_seqs, rows);
        for (int32_t s = 0; s < batch->n_seqs; s++)
            order[count++] = identify(dataset, batch, s);
        batches++;
        n_targets += batch->n_targets;
    }
    assert_int_equal(cursor.position, 0);
    if (from_start) {
        assert_int_equal(count, EXAMPLES);
        assert_int_equal(n_targets, dataset->n_loss_tokens);
        assert_int_equal(batches,
                         dataset_batches_per_epoch(dataset, seed, shuffle, epoch, rows, packing, MAX_LEN));
    }
    *ret_count = count;
    batch_free(batch);
}

static void test_epochs(void **state)
{
    (void)state;
    struct dataset *dataset = load_numbered();
    int64_t order[EXAMPLES], again[EXAMPLES], other[EXAMPLES], count;
    for (int mode = 0; mode < 4; mode++) {
        bool packing = mode & 1;
        int32_t rows = mode & 2 ? 7 : 1;
        walk(dataset, 42, true, rows, packing, (struct data_cursor){0}, order, &count);
        bool seen[EXAMPLES] = {false};
        for (int i = 0; i < EXAMPLES; i++) {
            assert_false(seen[order[i]]);
            seen[order[i]] = true;
        }
        walk(dataset, 42, true, rows, packing, (struct data_cursor){1, 0}, other, &count);
        assert_memory_not_equal(order, other, sizeof order);
        walk(dataset, 43, true, rows, packing, (struct data_cursor){0}, other, &count);
        assert_memory_not_equal(order, other, sizeof order);
        walk(dataset, 42, true, rows, packing, (struct data_cursor){0}, again, &count);
        assert_memory_equal(order, again, sizeof order);
        walk(dataset, 42, false, rows, packing, (struct data_cursor){5, 0}, again, &count);
        for (int i = 0; i < EXAMPLES; i++)
            assert_int_equal(again[i], i);
    }
    /* The same on every machine; computed apart, from the definition. */
    walk(dataset, 42, true, 1, false, (struct data_cursor){0}, order, &count);
    static const int64_t first[] = {96, 143, 109, 179, 133, 196, 57, 148};
    for (size_t i = 0; i < sizeof first / sizeof *first; i++)
        assert_int_equal(order[i], first[i]);
    dataset_free(dataset);
}

/* From every cursor a run can stop at, a fresh process goes on with the same examples in the same batches. */
static void test_resume(void **state)
{
    (void)state;
    struct dataset *dataset = load_numbered();
    for (int packing = 0; packing < 2; packing++) {
        int64_t whole[EXAMPLES], rest[EXAMPLES], count, tokens;
        int32_t seqs;
        walk(dataset, 1, true, 3, packing, (struct data_cursor){2, 0}, whole, &count);
        assert_int_equal(dataset_batch_limits(dataset, 3, packing, MAX_LEN, &tokens, &seqs, NULL), 0);
        struct batch *batch = NULL;
        assert_int_equal(batch_create(tokens, seqs, &batch), 0);
        struct data_cursor cursor = {2, 0};
        for (;;) {
            assert_int_equal(dataset_next_batch(dataset, 1, true, 3, packing, MAX_LEN, &cursor, batch, NULL),
                             0);
            if (cursor.epoch != 2)
                break;
            struct dataset *fresh = load_numbered();
            int64_t used = cursor.position;
            walk(fresh, 1, true, 3, packing, cursor, rest, &count);
            assert_int_equal(count, EXAMPLES - used);
            assert_memory_equal(rest, whole + used, (size_t)count * sizeof *rest);
            dataset_free(fresh);
            for (int skip = 0; skip < 5 && cursor.epoch == 2; skip++)
                assert_int_equal(
                    dataset_next_batch(dataset, 1, true, 3, packing, MAX_LEN, &cursor, batch, NULL), 0);
            if (cursor.epoch != 2)
                break;
        }
        batch_free(batch);
    }
    dataset_free(dataset);
}

static void test_bins_are_next_fit(void **state)
{
    (void)state;
    struct dataset *dataset = load_numbered();
    struct batch *batch = NULL;
    assert_int_equal(batch_create(MAX_LEN, MAX_LEN, &batch), 0);
    struct data_cursor cursor = {0};
    int64_t position = 0;
    while (cursor.epoch == 0) {
        assert_int_equal(dataset_next_batch(dataset, 0, false, 1, true, MAX_LEN, &cursor, batch, NULL), 0);
        position += batch->n_seqs;
        if (position < dataset->n_examples)
            assert_true(batch->n_tokens + dataset->starts[position + 1] - dataset->starts[position] >
                        MAX_LEN);
    }
    batch_free(batch);
    dataset_free(dataset);
}

static void test_batch_errors(void **state)
{
    (void)state;
    struct dataset *dataset = load_numbered();
    struct batch *batch = NULL;
    struct error error = {0};
    assert_int_equal(batch_create(0, 1, &batch), ERROR_INVALID);
    assert_int_equal(batch_create(3, 1, &batch), 0);
    struct data_cursor cursor = {0, 5};
    assert_int_equal(dataset_next_batch(dataset, 0, false, 4, false, MAX_LEN, &cursor, batch, &error),
                     ERROR_INVALID);
    assert_int_equal(cursor.position, 5);
    cursor.position = EXAMPLES;
    assert_int_equal(dataset_next_batch(dataset, 0, false, 1, false, MAX_LEN, &cursor, batch, &error),
                     ERROR_INVALID);
    assert_non_null(strstr(error.message, "outside the data"));
    int64_t tokens;
    int32_t seqs;
    assert_int_equal(dataset_batch_limits(dataset, 1000, true, MAX_LEN, &tokens, &seqs, &error), 0);
    assert_int_equal(tokens, dataset->n_tokens);
    assert_int_equal(seqs, EXAMPLES);
    batch_free(batch);
    batch_free(NULL);
    dataset_free(dataset);
    dataset_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forms),        cmocka_unit_test(test_messages),
        cmocka_unit_test(test_render),       cmocka_unit_test(test_prompt_is_what_training_saw),
        cmocka_unit_test(test_tolerated),    cmocka_unit_test(test_bad_lines),
        cmocka_unit_test(test_lengths),      cmocka_unit_test(test_epochs),
        cmocka_unit_test(test_resume),       cmocka_unit_test(test_bins_are_next_fit),
        cmocka_unit_test(test_batch_errors),
    };
    return cmocka_run_group_tests_name("dataset", tests, set_up, tear_down);
}
