/* completion.h: the answer to a completion, collected from a worker's chunks or streamed. Pure.
 *
 * One struct completion per request. Feed it the CHUNK payloads (see the worker protocol) as they come. */
#ifndef API_COMPLETION_H
#define API_COMPLETION_H

#include "api/requests.h"

struct completion;

/* id: "cmpl-..." or "chatcmpl-...". model: as the client named it. The request's flags are copied. */
struct completion *completion_create(const struct completion_request *request, const char *id,
                                     const char *model, int64_t created);
void completion_free(struct completion *completion);
/* Not streamed: take in a chunk. Streamed: also append its SSE event(s) ("data: {...}\n\n") to *ret_events
 * when that is not NULL (perhaps an empty string; free() it). Token scores are printed once, by one
 * formatter, so that equal floats are equal text; of two tokens that share a text the larger score stays in
 * top_logprobs. Returns 0 or -1 (a chunk that breaks the protocol, or no memory). */
int completion_add(struct completion *completion, const json_t *chunk, char **ret_events);
/* Not streamed: the whole body. Streamed: the closing events (usage when asked for, then [DONE]). free() it.
 * NULL: no memory, or a choice that the worker never finished. */
char *completion_finish(struct completion *completion, int64_t prompt_tokens, int64_t completion_tokens);
/* An error in mid-stream as an SSE event. free() it. */
char *completion_error_event(const struct problem *problem);

#endif
