/* prompts.c: see prompts.h. */
#include "engine/evaluation/prompts.h"

#include "base/random_mt.h"
#include "engine/evaluation/python_text.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PREFIX_BYTES = 8 << 20, MAX_EXAMPLE_IDS = 2 << 20 }; /* far beyond any use */

struct prompts {
    const struct task *task;
    const struct tokenizer *tokenizer;
    struct prompt_options options;
    struct task_documents tested, others; /* others: the examples', where they are another split's */
    const struct task_documents *pool;
    bool exclude;
    const char *missing_pool; /* a split's name */
    char *description;
    struct random_mt random;
    int64_t count, next;
    int64_t *drawn;   /* [shots+1] indices into the pool */
    int64_t *rest;    /* [pool] */
    uint64_t *prints; /* [pool], where the document under test is left out */
    struct documents_pause pause;
};

void example_free(struct example *example)
{
    free(example->requests);
    free(example->ids);
    *example = (struct example){0};
}

static int no_memory(struct error *error)
{
    return error_set(error, ERROR_NO_MEMORY, "no memory for prompts");
}

/* ---- opening ---- */

static int render_description(struct prompts *prompts, int subtask, struct error *error)
{
    const struct task *task = prompts->task;
    struct buffer text = {0};
    json_t *fields =
        subtask < 0 ? json_object() : json_pack("{s:s}", task->subtask_field, task->subtasks[subtask].name);
    int status = fields ? 0 : no_memory(error);
    if (!status && task->description && (status = template_text(task->description, fields, &text, error)))
        error_prefix(error, "description: ");
    json_decref(fields);
    if (!status && !(prompts->description = buffer_take(&text, NULL)))
        status = no_memory(error);
    buffer_free(&text);
    return status;
}

static int open_pool(struct prompts *prompts, int subtask, const struct task_source *source,
                     struct error *error)
{
    const struct task *task = prompts->task;
    int split, shots = prompts->options.shots;
    if (!task->n_pools)
        return error_set(error, ERROR_INVALID, "%s has no few-shot examples", task->name);
    int status =
        task_load(task, subtask, task->pools, task->n_pools, source, &prompts->others, &split, error);
    if (status)
        return status;
    prompts->pool = &prompts->others;
    prompts->missing_pool = split == task->pools[0] ? NULL : task->splits[task->pools[0]].name;
    prompts->exclude = task->exclude_document < 0 ? split == task->documents : task->exclude_document > 0;
    const int64_t count = prompts->pool->documents.count;
    const int64_t wanted = shots + (prompts->exclude && !task->first_n);
    if (count < wanted)
        return error_set(error, ERROR_INVALID,
                         "%d shots draw %" PRId64 " documents where %.200s has %" PRId64, shots, wanted,
                         prompts->pool->file, count);
    prompts->drawn = malloc((size_t)(shots + 1) * sizeof *prompts->drawn);
    prompts->rest = malloc((size_t)count * sizeof *prompts->rest);
    return prompts->drawn && prompts->rest ? 0 : no_memory(error);
}

int prompts_open(const struct task *task, int subtask, const struct prompt_options *options,
                 const struct task_source *source, const struct tokenizer *tokenizer,
                 struct prompts **ret_prompts, struct error *error)
{
    int split;
    struct prompts *prompts = calloc(1, sizeof *prompts);
    if (!prompts)
        return no_memory(error);
    *prompts =
        (struct prompts){.task = task, .tokenizer = tokenizer, .options = *options, .pause = source->pause};
    random_mt_seed(&prompts->random, options->seed);
    int status = task_load(task, subtask, &task->documents, 1, source, &prompts->tested, &split, error);
    if (!status)
        status = render_description(prompts, subtask, error);
    if (!status && options->shots > 0)
        status = open_pool(prompts, subtask, source, error);
    if (status) {
        prompts_free(prompts);
        return status;
    }
    prompts->count = prompts->tested.documents.count;
    if (options->limit > 0 && options->limit < prompts->count)
        prompts->count = options->limit;
    *ret_prompts = prompts;
    return 0;
}

void prompts_free(struct prompts *prompts)
{
    if (!prompts)
        return;
    task_documents_free(&prompts->tested);
    task_documents_free(&prompts->others);
    free(prompts->description);
    free(prompts->drawn);
    free(prompts->rest);
    free(prompts->prints);
    free(prompts);
}

int64_t prompts_count(const struct prompts *prompts)
{
    return prompts->count;
}

const char *prompts_pool_file(const struct prompts *prompts)
{
    return prompts->pool ? prompts->pool->file : NULL;
}

const char *prompts_missing_pool(const struct prompts *prompts)
{
    return prompts->missing_pool;
}

/* What the task makes of document `index`. */
static int render(const struct prompts *prompts, const struct task_documents *from, int64_t index,
                  struct task_text *ret_text, struct error *error)
{
    json_t *document;
    int status = task_document(from, index, &document, error);
    if (status)
        return status;
    status = task_render(prompts->task, document, ret_text, error);
    json_decref(document);
    return status ? task_at_document(from, index, error) : 0;
}

static int check_documents(const struct prompts *prompts, const struct task_documents *from, int64_t count,
                           struct error *error)
{
    for (int64_t i = 0; i < count; i++) {
        struct task_text text;
        int status = render(prompts, from, i, &text, error);
        if (status)
            return status;
        task_text_free(&text);
        documents_take_pause(&prompts->pause);
    }
    return 0;
}

int prompts_check(const struct prompts *prompts, struct error *error)
{
    int status = check_documents(prompts, &prompts->tested, prompts->count, error);
    if (!status && prompts->pool)
        status = check_documents(prompts, prompts->pool, prompts->pool->documents.count, error);
    return status;
}

/* ---- examples ---- */

/* Equal documents have equal prints. */
static int print_document(const struct task_documents *from, int64_t index, uint64_t *ret_print,
                          struct error *error)
{
    json_t *document;
    int status = task_document(from, index, &document, error);
    if (status)
        return status;
    char *text = json_dumps(document, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(document);
    if (!text)
        return no_memory(error);
    uint64_t print = UINT64_C(14695981039346656037); /* FNV-1a */
    for (const char *at = text; *at; at++)
        print = (print ^ (unsigned char)*at) * UINT64_C(1099511628211);
    free(text);
    *ret_print = print;
    return 0;
}

/* Of all that may be drawn; made when the first are asked for. */
static int print_pool(struct prompts *prompts, struct error *error)
{
    const int64_t count = prompts->pool->documents.count;
    uint64_t *prints = prompts->prints ? NULL : malloc((size_t)count * sizeof *prints);
    int status = 0;
    if (prompts->prints)
        return 0;
    if (!prints)
        return no_memory(error);
    for (int64_t i = 0; !status && i < count; i++) {
        status = print_document(prompts->pool, i, &prints[i], error);
        documents_take_pause(&prompts->pause);
    }
    if (status)
        free(prints);
    else
        prompts->prints = prints;
    return status;
}

/* Keep those of `count` indices whose document is not equal to that under test; returns how many. */
static int64_t without_document(const struct prompts *prompts, uint64_t document, int64_t *indices,
                                int64_t count)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++)
        if (prompts->prints[indices[i]] != document)
            indices[kept++] = indices[i];
    return kept;
}

/* The first `most` of the pool without the document, in `rest`. */
static int64_t rest_of_pool(struct prompts *prompts, uint64_t document, int64_t most)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < prompts->pool->documents.count && kept < most; i++)
        if (!prompts->exclude || prompts->prints[i] != document)
            prompts->rest[kept++] = i;
    return kept;
}

/* Fill `drawn` with the examples of the document under test. */
static int draw(struct prompts *prompts, int64_t index, struct error *error)
{
    const int64_t shots = prompts->options.shots, count = prompts->pool->documents.count;
    int64_t n_rest, *drawn = prompts->drawn;
    uint64_t document = 0;
    int status = 0;
    if (prompts->exclude && !(status = print_pool(prompts, error)))
        status = print_document(&prompts->tested, index, &document, error);
    if (status)
        return status;
    if (prompts->task->first_n) {
        n_rest = rest_of_pool(prompts, document, shots);
        if (n_rest < shots) {
            error_set(error, ERROR_INVALID, "the pool has %" PRId64 " examples beside it", n_rest);
            return task_at_document(&prompts->tested, index, error);
        }
        memcpy(drawn, prompts->rest, (size_t)shots * sizeof *drawn);
        return 0;
    }
    status = random_mt_sample(&prompts->random, count, shots + prompts->exclude, drawn);
    if (status || !prompts->exclude)
        return status ? no_memory(error) : 0;
    if (without_document(prompts, document, drawn, shots + 1) >= shots)
        return 0;
    n_rest = rest_of_pool(prompts, document, count);
    if (n_rest < shots) {
        error_set(error, ERROR_INVALID, "the pool has %" PRId64 " examples that differ from it", n_rest);
        return task_at_document(&prompts->tested, index, error);
    }
    if (random_mt_sample(&prompts->random, n_rest, shots, drawn))
        return no_memory(error);
    for (int64_t i = 0; i < shots; i++)
        drawn[i] = prompts->rest[drawn[i]];
    return 0;
}

static int append_example(const struct prompts *prompts, int64_t index, struct buffer *prefix,
                          struct error *error)
{
    const struct task *task = prompts->task;
    struct task_text text;
    int status = render(prompts, prompts->pool, index, &text, error);
    if (status)
        return status;
    const char *chosen = text.choices[text.gold];
    buffer_append_string(prefix, task->kind == TASK_CONTEXTS ? chosen : text.context);
    buffer_append_string(prefix, task->target_delimiter);
    buffer_append_string(prefix, task->kind == TASK_CONTEXTS ? text.continuation : chosen);
    buffer_append_string(prefix, task->fewshot_delimiter);
    task_text_free(&text);
    return 0;
}

/* ---- ids ---- */

struct pair {
    struct buffer context, continuation;
};

/* White space at the context's end goes to the continuation. */
static int move_space(struct pair *pair, struct error *error)
{
    size_t space = python_trailing_space(pair->context.data ? pair->context.data : "", pair->context.length);
    if (!space)
        return 0;
    struct buffer moved = {0};
    buffer_append(&moved, pair->context.data + pair->context.length - space, space);
    if (pair->continuation.length)
        buffer_append(&moved, pair->continuation.data, pair->continuation.length);
    buffer_free(&pair->continuation);
    pair->continuation = moved;
    pair->context.length -= space;
    pair->context.data[pair->context.length] = '\0';
    return moved.failed ? no_memory(error) : 0;
}

/* The text from byte `from` on. */
static int encode(const struct prompts *prompts, const struct buffer *text, size_t from,
                  struct token_list *ids, struct error *error)
{
    if (text->failed)
        return no_memory(error);
    if (text->length == from)
        return 0;
    return from ? tokenizer_encode_continued(prompts->tokenizer, text->data + from, text->length - from, ids,
                                             error)
                : tokenizer_encode(prompts->tokenizer, text->data, text->length, ids, error);
}

/* Nothing to go on from: the prefix token is, or the continuation's own first where that is it. */
static int split_without_context(const struct prompts *prompts, const struct pair *pair,
                                 struct token_list *ids, int32_t *ret_n_context, struct error *error)
{
    struct token_list continuation = {0};
    int32_t prefix = prompts->options.prefix_id;
    if (prefix < 0)
        return error_set(error, ERROR_INVALID,
                         "the context is empty, and the model has no token to begin with");
    int status = encode(prompts, &pair->continuation, 0, &continuation, error);
    if (!status && (!continuation.count || continuation.ids[0] != prefix) && token_list_push(ids, prefix))
        status = no_memory(error);
    for (size_t i = 0; !status && i < continuation.count; i++)
        if (token_list_push(ids, continuation.ids[i]))
            status = no_memory(error);
    token_list_free(&continuation);
    *ret_n_context = 1;
    return status;
}

/* The last context: choices share it. */
struct known {
    struct buffer text;
    struct token_list ids;
    size_t cut, n_head; /* the last place where whatever begins with it may be cut; ids before that */
};

static int know(const struct prompts *prompts, const struct buffer *context, struct known *known,
                struct error *error)
{
    if (known->ids.count && known->text.length == context->length &&
        !memcmp(known->text.data, context->data, context->length))
        return 0;
    known->ids.count = 0;
    buffer_clear(&known->text);
    if (context->length)
        buffer_append(&known->text, context->data, context->length);
    if (known->text.failed)
        return no_memory(error);
    known->cut = context->length ? tokenizer_cut(prompts->tokenizer, context->data, context->length) : 0;
    int status =
        known->cut ? tokenizer_encode(prompts->tokenizer, context->data, known->cut, &known->ids, error) : 0;
    known->n_head = known->ids.count;
    return status ? status : encode(prompts, &known->text, known->cut, &known->ids, error);
}

/* Append a pair's ids. What follows the context may change the context's last ids, but none before the cut. */
static int split(const struct prompts *prompts, struct pair *pair, struct known *known,
                 struct token_list *ids, int32_t *ret_n_context, struct error *error)
{
    struct token_list tail = {0};
    struct buffer text = {0};
    if (!pair->context.length)
        return split_without_context(prompts, pair, ids, ret_n_context, error);
    int status = move_space(pair, error);
    if (!status)
        status = know(prompts, &pair->context, known, error);
    if (pair->context.length)
        buffer_append(&text, pair->context.data, pair->context.length);
    if (pair->continuation.length)
        buffer_append(&text, pair->continuation.data, pair->continuation.length);
    if (!status)
        status = encode(prompts, &text, known->cut, &tail, error);
    for (size_t i = 0; !status && i < known->ids.count; i++)
        if (token_list_push(ids, known->ids.ids[i]))
            status = no_memory(error);
    for (size_t i = known->ids.count - known->n_head; !status && i < tail.count; i++)
        if (token_list_push(ids, tail.ids[i]))
            status = no_memory(error);
    *ret_n_context = (int32_t)known->ids.count;
    buffer_free(&text);
    token_list_free(&tail);
    return status;
}

/* ---- an example ---- */

struct making {
    struct pair pair;
    struct known known;
    struct token_list ids;
};

static void fill_pair(const struct prompts *prompts, const struct buffer *prefix,
                      const struct task_text *text, int i, struct pair *pair)
{
    const struct task *task = prompts->task;
    buffer_clear(&pair->context);
    buffer_clear(&pair->continuation);
    buffer_append(&pair->context, prefix->data ? prefix->data : "", prefix->length);
    buffer_append_string(&pair->context, task->kind == TASK_CONTEXTS ? text->choices[i] : text->context);
    if (task->kind != TASK_TARGET)
        buffer_append_string(&pair->continuation, task->target_delimiter);
    buffer_append_string(&pair->continuation,
                         task->kind == TASK_CONTEXTS ? text->continuation : text->choices[i]);
}

/* One request's ids go to the end of making->ids; request->n_ids says how many they are. */
static int make_request(const struct prompts *prompts, struct making *making, struct prompt_request *request,
                        struct error *error)
{
    const int32_t longest = prompts->options.max_length;
    size_t begin = making->ids.count;
    if (making->pair.context.failed || making->pair.continuation.failed)
        return no_memory(error);
    int status = split(prompts, &making->pair, &making->known, &making->ids, &request->n_context, error);
    if (status)
        return status;
    size_t count = making->ids.count - begin;
    if (making->ids.count > MAX_EXAMPLE_IDS)
        return error_set(error, ERROR_INVALID, "prompts of more than %d tokens", MAX_EXAMPLE_IDS);
    request->n_ids = (int32_t)count;
    if (longest && request->n_ids > longest - 1) {
        int32_t dropped = request->n_ids - (longest - 1);
        if (dropped >= request->n_context)
            return error_set(error, ERROR_INVALID, "a continuation of %" PRId32 " tokens leaves no context",
                             request->n_ids - request->n_context);
        memmove(making->ids.ids + begin, making->ids.ids + begin + dropped,
                (size_t)(longest - 1) * sizeof *making->ids.ids);
        making->ids.count -= (size_t)dropped;
        request->n_ids -= dropped;
        request->n_context -= dropped;
    }
    if (!request->n_context)
        return error_set(error, ERROR_INVALID, "the context has no tokens");
    return 0;
}

static int make_example(const struct prompts *prompts, const struct buffer *prefix,
                        const struct task_text *text, struct example *example, struct error *error)
{
    struct making making = {0};
    int status = 0;
    example->n_requests = text->n_choices;
    example->gold = text->gold;
    example->requests = calloc((size_t)text->n_choices, sizeof *example->requests);
    if (!example->requests)
        status = no_memory(error);
    for (int i = 0; !status && i < text->n_choices; i++) {
        struct prompt_request *request = &example->requests[i];
        request->characters = python_length(text->choices[i], strlen(text->choices[i]));
        fill_pair(prompts, prefix, text, i, &making.pair);
        status = make_request(prompts, &making, request, error);
        documents_take_pause(&prompts->pause);
    }
    if (!status) {
        int32_t *at = example->ids = making.ids.ids;
        making.ids = (struct token_list){0};
        for (int i = 0; i < example->n_requests; at += example->requests[i++].n_ids)
            example->requests[i].ids = at;
    }
    buffer_free(&making.pair.context);
    buffer_free(&making.pair.continuation);
    buffer_free(&making.known.text);
    token_list_free(&making.known.ids);
    token_list_free(&making.ids);
    return status;
}

int prompts_next(struct prompts *prompts, struct example *ret_example, struct error *error)
{
    if (prompts->next >= prompts->count)
        return error_set(error, ERROR_INTERNAL, "there are %" PRId64 " documents", prompts->count);
    const int64_t index = prompts->next;
    struct example example = {.document = index, .line = prompts->tested.documents.items[index].line};
    struct buffer prefix = {0};
    struct task_text text = {0};
    int status = prompts->options.shots > 0 ? draw(prompts, index, error) : 0;
    if (!status && ret_example) {
        buffer_append_string(&prefix, prompts->description);
        for (int32_t i = 0; !status && i < prompts->options.shots; i++) {
            status = append_example(prompts, prompts->drawn[i], &prefix, error);
            if (!status && prefix.length > MAX_PREFIX_BYTES)
                status = error_set(error, ERROR_INVALID, "examples of more than %d bytes", MAX_PREFIX_BYTES);
        }
        if (!status)
            status = render(prompts, &prompts->tested, index, &text, error);
        if (!status && (status = make_example(prompts, &prefix, &text, &example, error)))
            task_at_document(&prompts->tested, index, error);
    }
    buffer_free(&prefix);
    task_text_free(&text);
    if (status) {
        example_free(&example);
        return status;
    }
    prompts->next++;
    if (ret_example)
        *ret_example = example;
    return 0;
}
