/* dump_prompts: the requests of a task as JSON lines {"doc", "gold", "requests": [[n_context, [id...]]...]}, to be compared with those
 * of another program.
 *     dump_prompts DEFINITION SUBTASK|- DATA_FOLDER TOKENIZER SHOTS LIMIT */
#include "base/file.h"
#include "engine/evaluation/prompts.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int find_in_folder(void *arg, const char *name, char **ret_path, struct error *error)
{
    const char *folder = arg;
    char *path = NULL;
    if (asprintf(&path, "%s/%s", folder, name) < 0)
        return error_set(error, ERROR_NO_MEMORY, "no memory for a path");
    if (access(path, R_OK)) {
        free(path);
        path = NULL;
    }
    *ret_path = path;
    return 0;
}

static void print_example(const struct example *example)
{
    printf("{\"doc\": %" PRId64 ", \"gold\": %d, \"requests\": [", example->document, example->gold);
    for (int i = 0; i < example->n_requests; i++) {
        const struct prompt_request *request = &example->requests[i];
        printf("%s[%" PRId32 ", [", i ? ", " : "", request->n_context);
        for (int32_t j = 0; j < request->n_ids; j++)
            printf("%s%" PRId32, j ? "," : "", request->ids[j]);
        printf("]]");
    }
    printf("]}\n");
}

int main(int argc, char **argv)
{
    if (argc != 7)
        return 2;
    struct error error = {0};
    struct task *task = NULL;
    struct tokenizer *tokenizer = NULL;
    struct prompts *prompts = NULL;
    char *text = NULL;
    size_t length;
    int subtask = -1;
    struct task_source source = {.arg = argv[3], .find = find_in_folder};
    int status = file_read(argv[1], 1 << 20, &text, &length, &error);
    if (!status)
        status = task_parse(text, length, &task, &error);
    for (int i = 0; !status && i < task->n_subtasks; i++)
        if (!strcmp(task->subtasks[i].name, argv[2]))
            subtask = i;
    if (!status)
        status = tokenizer_load(argv[4], &tokenizer, &error);
    struct prompt_options options = {
        .shots = atoi(argv[5]), .seed = 1234, .limit = atoll(argv[6]), .prefix_id = 0};
    if (!status)
        status = prompts_open(task, subtask, &options, &source, tokenizer, &prompts, &error);
    for (int64_t i = 0; !status && i < prompts_count(prompts); i++) {
        struct example example;
        status = prompts_next(prompts, &example, &error);
        if (status)
            break;
        print_example(&example);
        example_free(&example);
    }
    if (status)
        fprintf(stderr, "%s\n", error.message);
    prompts_free(prompts);
    tokenizer_free(tokenizer);
    task_free(task);
    free(text);
    return status ? 1 : 0;
}
