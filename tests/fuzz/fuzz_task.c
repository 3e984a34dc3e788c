/* fuzz_task.c: the input is a task's definition, a line of three dashes, and the file that its documents are in. What can be read
 * must give prompts whose parts fit; what cannot must say why. */
#include "fuzz.h"

#include "engine/evaluation/forest.h"
#include "engine/evaluation/prompts.h"

#include <string.h>

enum { DOCUMENTS_MOST = 16, ROWS_MOST = 512 };

/* Every file that a definition names is the one there is. */
static int find_any(void *arg, const char *name, char **ret_path, struct error *error)
{
    (void)name;
    *ret_path = strdup(arg);
    return *ret_path ? 0 : error_set(error, ERROR_NO_MEMORY, "no memory for a path");
}

static void check_example(const struct example *example)
{
    struct forest_row rows[ROWS_MOST];
    struct forest forest;
    FUZZ_CHECK(example->n_requests >= 1 && example->n_requests <= TASK_MAX_CHOICES);
    FUZZ_CHECK(example->gold >= 0 && example->gold < example->n_requests);
    for (int i = 0; i < example->n_requests; i++) {
        const struct prompt_request *request = &example->requests[i];
        FUZZ_CHECK(request->n_context >= 1 && request->n_context <= request->n_ids &&
                   request->characters >= 0);
        rows[i] = (struct forest_row){request->ids, request->n_ids, request->n_context};
    }
    FUZZ_CHECK(forest_create(rows, example->n_requests, true, &forest, NULL) == 0);
    FUZZ_CHECK(forest.n_tokens <= forest.n_row_tokens);
    forest_free(&forest);
}

static void run_task(const struct task *task, int subtask, int shots, char *path,
                     const struct tokenizer *tokenizer)
{
    const struct prompt_options options = {
        .shots = shots, .seed = 1234, .limit = DOCUMENTS_MOST, .prefix_id = 0};
    const struct task_source source = {.arg = path, .find = find_any};
    struct prompts *prompts;
    struct error error = {0};
    if (prompts_open(task, subtask, &options, &source, tokenizer, &prompts, &error)) {
        FUZZ_CHECK(error.message[0]);
        return;
    }
    for (int64_t i = 0; i < prompts_count(prompts); i++) {
        struct example example;
        if (prompts_next(prompts, &example, &error)) {
            FUZZ_CHECK(error.message[0]);
            break;
        }
        check_example(&example);
        example_free(&example);
    }
    prompts_free(prompts);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct tokenizer *tokenizer;
    static const char separator[] = "\n---\n";
    if (!tokenizer)
        FUZZ_CHECK(tokenizer_load(fuzz_source("models/hatchling"), &tokenizer, NULL) == 0);
    const uint8_t *found = size ? memmem(data, size, separator, sizeof separator - 1) : NULL;
    const size_t length = found ? (size_t)(found - data) : size;
    const uint8_t *documents = found ? found + sizeof separator - 1 : data + size;
    struct task *task;
    struct error error = {0};
    char path[32];
    if (task_parse(size ? (const char *)data : "", length, &task, &error)) {
        FUZZ_CHECK(error.code == ERROR_INVALID && error.message[0]);
        return 0;
    }
    int fd = fuzz_file(documents, (size_t)(data + size - documents), path);
    for (int shots = 0; shots < 3; shots += 2)
        run_task(task, task->n_subtasks - 1, shots, path, tokenizer);
    close(fd);
    task_free(task);
    return 0;
}
