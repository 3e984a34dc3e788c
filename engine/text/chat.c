/* chat.c: messages into text by one of three forms. See dataset.h for the forms, chat.h for the parts. Pure;
 * any thread. */
#include "engine/text/chat.h"

#include "engine/text/unicode.h"

#include <stdlib.h>
#include <string.h>

enum role { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT };

/* One turn is opening + lead + content + turn_end, and closing before the next one. Of an assistant's turn
 * lead, content and turn_end are the reply; the rest is context. */
struct chat_form {
    const char *name;
    const char *opening[3];                /* by enum role */
    const char *lead;                      /* between the opening and a content that is not empty */
    const char *turn_end;                  /* closes every turn; of a reply it is learnt */
    const char *closing;                   /* between turns */
    const char *stop;                      /* ends a reply when generating */
    const char *preamble, *preamble_input; /* opens a chat without a system message; with an input section */
    const char *input;                     /* between an instruction and its input */
};

static const struct chat_form forms[] = {
    {
        .name = "plain",
        .opening = {"system:", "user:", "assistant:"},
        .lead = " ",
        .turn_end = "",
        .closing = "\n",
        .stop = "\nuser:",
        .preamble = "",
        .preamble_input = "",
        .input = "\n\n",
    },
    {
        .name = "chatml",
        .opening = {"<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"},
        .lead = "",
        .turn_end = "<|im_end|>",
        .closing = "\n",
        .stop = "<|im_end|>",
        .preamble = "",
        .preamble_input = "",
        .input = "\n\n",
    },
    {
        .name = "alpaca",
        .opening = {"", "### Instruction:\n", "### Response:\n"},
        .lead = "",
        .turn_end = "",
        .closing = "\n\n",
        .stop = "\n\n### Instruction:",
        .preamble = "Below is an instruction that describes a task. Write a response that appropriately "
                    "completes the request.\n\n",
        .preamble_input =
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n",
        .input = "\n\n### Input:\n",
    },
};

static const struct chat_form *form_find(const char *chat_template)
{
    if (!chat_template || !chat_template[0])
        return &forms[0];
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        if (!strcmp(forms[i].name, chat_template))
            return &forms[i];
    return NULL;
}

int chat_check_template(const char *chat_template, struct error *error)
{
    if (form_find(chat_template))
        return 0;
    return error_set_param(error, ERROR_INVALID, "chat_template",
                           "chat template \"%.60s\" is unknown (plain, chatml and alpaca are known)",
                           chat_template);
}

const char *chat_reply_lead(const char *chat_template)
{
    const struct chat_form *form = form_find(chat_template);
    return form ? form->lead : "";
}

const char *chat_reply_stop(const char *chat_template)
{
    const struct chat_form *form = form_find(chat_template);
    return form ? form->stop : "";
}

static int role_find(const char *name)
{
    if (!strcmp(name, "system") || !strcmp(name, "developer"))
        return ROLE_SYSTEM;
    if (!strcmp(name, "user"))
        return ROLE_USER;
    return strcmp(name, "assistant") ? -1 : ROLE_ASSISTANT;
}

/* The content without white space at its ends, so that a boundary falls where the GPT-2 split cuts. */
static const char *trim(const char *text, size_t *ret_length)
{
    size_t length = strlen(text), lead = unicode_leading_space(text, length);
    *ret_length = length - lead - unicode_trailing_space(text + lead, length - lead);
    return text + lead;
}

/* Append lead and content, and nothing of the two when the content is empty. */
static void append_content(struct buffer *out, const char *lead, const char *content)
{
    size_t length;
    content = trim(content, &length);
    if (length == 0)
        return;
    buffer_append_string(out, lead);
    buffer_append(out, content, length);
}

/* Hand over what has gathered and start anew. */
static int emit(struct buffer *part, bool reply, chat_sink *sink, void *sink_arg, struct error *error)
{
    if (part->failed)
        return error_set(error, ERROR_NO_MEMORY, "out of memory");
    int status = part->length ? sink(sink_arg, reply, part->data, part->length, error) : 0;
    buffer_clear(part);
    return status;
}

int chat_parts(const char *chat_template, const struct chat_turn *turns, size_t n_turns, bool for_reply,
               chat_sink *sink, void *sink_arg, struct error *error)
{
    const struct chat_form *form = form_find(chat_template);
    if (!form)
        return chat_check_template(chat_template, error);
    if (n_turns == 0)
        return error_set_param(error, ERROR_INVALID, "messages", "there are no messages");

    struct buffer part = {0};
    int status = 0;
    for (size_t i = 0; i < n_turns; i++) {
        int role = role_find(turns[i].role);
        if (role < 0) {
            status = error_set_param(
                error, ERROR_INVALID, "messages",
                "message %zu has role \"%.40s\" (system, developer, user and assistant are known)", i + 1,
                turns[i].role);
            goto done;
        }
        bool has_input = turns[i].input && turns[i].input[0];
        if (i == 0 && role != ROLE_SYSTEM)
            buffer_append_string(&part, has_input ? form->preamble_input : form->preamble);
        if (i > 0)
            buffer_append_string(&part, form->closing);
        buffer_append_string(&part, form->opening[role]);
        size_t length;
        trim(turns[i].content, &length);
        bool reply = role == ROLE_ASSISTANT && (length > 0 || form->turn_end[0]);
        if (reply && (status = emit(&part, false, sink, sink_arg, error)))
            goto done;
        append_content(&part, form->lead, turns[i].content);
        if (has_input)
            append_content(&part, form->input, turns[i].input);
        buffer_append_string(&part, form->turn_end);
        if (reply && (status = emit(&part, true, sink, sink_arg, error)))
            goto done;
    }
    if (for_reply) {
        buffer_append_string(&part, form->closing);
        buffer_append_string(&part, form->opening[ROLE_ASSISTANT]);
    }
    status = emit(&part, false, sink, sink_arg, error);
done:
    buffer_free(&part);
    return status;
}

static int append_part(void *arg, bool reply, const char *text, size_t length, struct error *error)
{
    (void)reply;
    struct buffer *prompt = arg;
    buffer_append(prompt, text, length);
    return prompt->failed ? error_set(error, ERROR_NO_MEMORY, "out of memory") : 0;
}

int chat_render(const char *chat_template, const struct chat_message *messages, size_t n_messages,
                struct buffer *prompt, struct error *error)
{
    size_t length = prompt->length;
    struct chat_turn *turns = calloc(n_messages ? n_messages : 1, sizeof *turns);
    if (!turns)
        return error_set(error, ERROR_NO_MEMORY, "out of memory");
    for (size_t i = 0; i < n_messages; i++)
        turns[i] = (struct chat_turn){messages[i].role, messages[i].content, NULL};
    int status = chat_parts(chat_template, turns, n_messages, true, append_part, prompt, error);
    free(turns);
    if (status && prompt->data) {
        prompt->length = length;
        prompt->data[length] = '\0';
    }
    return status;
}
