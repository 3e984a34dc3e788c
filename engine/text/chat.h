/* chat.h: the chat forms of dataset.h, cut where training needs them cut. */
#ifndef ENGINE_TEXT_CHAT_H
#define ENGINE_TEXT_CHAT_H

#include "engine/text/dataset.h"

/* The parts of a rendered chat, in order; whoever renders concatenates or tokenizes them one by one. reply:
 * the part is what an assistant says and bears loss. Returns 0, or an error that ends the rendering. */
typedef int chat_sink(void *arg, bool reply, const char *text, size_t length, struct error *error);

/* A message that may carry Alpaca's extra input (NULL or "" = none). */
struct chat_turn {
    const char *role, *content, *input;
};

/* NULL or "" = plain. ERROR_INVALID when there is no such template. */
int chat_check_template(const char *chat_template, struct error *error);
/* for_reply: end where the assistant is to speak. Context between two replies comes as one part. */
int chat_parts(const char *chat_template, const struct chat_turn *turns, size_t n_turns, bool for_reply,
               chat_sink *sink, void *sink_arg, struct error *error);

#endif
