/* handlers_tokenizer.c: /tokenizer_info, /tokenize and /detokenize, at the root, where evaluation harnesses look
 * for them. Loop thread only. */
#include "daemon/handlers.h"

#include "daemon/reply.h"

#include <stdlib.h>

static struct worker_call *call_of(struct http_request *request)
{
    return request->context;
}

static void on_client_gone(struct http_request *request)
{
    reply_forget(request);
    worker_call_cancel(call_of(request));
}

static void on_frame(void *arg, enum frame_type type, const json_t *payload)
{
    struct http_request *request = arg;
    struct problem problem;
    json_t *tokens = json_object_get(payload, "tokens");
    switch (type) {
    case FRAME_TOKENS:
        reply_json(request, 200,
                   json_pack("{s:O, s:I}", "tokens", tokens, "count", (json_int_t)json_array_size(tokens)));
        break;
    case FRAME_TEXT:
        reply_json(request, 200, json_pack("{s:O}", "prompt", json_object_get(payload, "text")));
        break;
    case FRAME_INFO:
        reply_json(request, 200,
                   json_pack("{s:O, s:O, s:O, s:O}", "eos_token", json_object_get(payload, "eos_token"),
                             "bos_token", json_object_get(payload, "bos_token"), "pad_token",
                             json_object_get(payload, "pad_token"), "chat_template",
                             json_object_get(payload, "chat_template")));
        break;
    case FRAME_FAILED:
        worker_calls_problem(payload, &problem);
        reply_problem(request, &problem);
        break;
    default:
        reply_refuse(request, 500, "internal_error", NULL,
                     "The worker answered with a frame of another kind.");
        break;
    }
}

/* Send payload, with the model and the request's id, as a frame of this type. payload is stolen. */
static void call(struct server *server, struct http_request *request, enum frame_type type, json_t *payload,
                 const char *model)
{
    struct problem problem;
    json_t *base = NULL, *adapter = NULL;
    if (completions_resolve(server, model, "", &base, &adapter, &problem)) {
        json_decref(payload);
        reply_problem(request, &problem);
        return;
    }
    json_decref(adapter); /* has its base's tokenizer */
    json_object_set_new(payload, "model", base);
    json_object_set_new(payload, "request_id", json_string(request->id));
    request->context = worker_calls_begin(server->calls, type, payload, on_frame, request, &problem);
    if (request->context)
        request->on_gone = on_client_gone;
    else
        reply_problem(request, &problem);
}

void handle_tokenizer_info(struct server *server, struct http_request *request)
{
    const char *model = http_argument(request, "model");
    call(server, request, FRAME_TOKENIZER_INFO, json_object(), model ? model : "");
}

void handle_tokenize(struct server *server, struct http_request *request)
{
    struct tokenize_request tokenize;
    struct problem problem;
    json_t *body = NULL;
    if (body_decode(request->body, request->length, &body, &problem) ||
        tokenize_request_decode(body, &tokenize, &problem))
        reply_problem(request, &problem);
    else
        call(server, request, FRAME_TOKENIZE,
             json_pack("{s:s#, s:b}", "text", tokenize.text, tokenize.length, "add_special_tokens",
                       tokenize.add_special_tokens),
             tokenize.model);
    json_decref(body);
}

void handle_detokenize(struct server *server, struct http_request *request)
{
    struct detokenize_request detokenize;
    struct problem problem;
    json_t *body = NULL;
    if (body_decode(request->body, request->length, &body, &problem) ||
        detokenize_request_decode(body, &detokenize, &problem))
        reply_problem(request, &problem);
    else
        call(server, request, FRAME_DETOKENIZE, json_pack("{s:O}", "tokens", detokenize.tokens),
             detokenize.model);
    json_decref(body);
}
