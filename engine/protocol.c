/* protocol.c: frames to bytes and back; see protocol.h. Pure: no I/O, any thread. */
#include "engine/protocol.h"

#include <math.h>
#include <string.h>

static const struct {
    enum frame_type type;
    const char *name;
} type_names[] = {
    {FRAME_CONFIGURE, "configure"},
    {FRAME_LOAD, "load"},
    {FRAME_UNLOAD, "unload"},
    {FRAME_COMPLETE, "complete"},
    {FRAME_CANCEL, "cancel"},
    {FRAME_TOKENIZE, "tokenize"},
    {FRAME_DETOKENIZE, "detokenize"},
    {FRAME_TOKENIZER_INFO, "tokenizer_info"},
    {FRAME_JOB_VALIDATE, "job_validate"},
    {FRAME_JOB_START, "job_start"},
    {FRAME_JOB_STOP, "job_stop"},
    {FRAME_SHUTDOWN, "shutdown"},
    {FRAME_JOB_PLAN, "job_plan"},
    {FRAME_EVALUATION_VALIDATE, "evaluation_validate"},
    {FRAME_EVALUATION_START, "evaluation_start"},
    {FRAME_HELLO, "hello"},
    {FRAME_STATUS, "status"},
    {FRAME_LOADED, "loaded"},
    {FRAME_CHUNK, "chunk"},
    {FRAME_DONE, "done"},
    {FRAME_FAILED, "failed"},
    {FRAME_TOKENS, "tokens"},
    {FRAME_TEXT, "text"},
    {FRAME_INFO, "info"},
    {FRAME_JOB_VALIDATED, "job_validated"},
    {FRAME_JOB_INVALID, "job_invalid"},
    {FRAME_JOB_MESSAGE, "job_message"},
    {FRAME_JOB_METRICS, "job_metrics"},
    {FRAME_JOB_CHECKPOINT, "job_checkpoint"},
    {FRAME_JOB_CHECKPOINT_DROPPED, "job_checkpoint_dropped"},
    {FRAME_JOB_ENDED, "job_ended"},
    {FRAME_FAULT, "fault"},
    {FRAME_JOB_PLANNED, "job_planned"},
    {FRAME_EVALUATION_RESULTS, "evaluation_results"},
};

static const char *find_name(unsigned type)
{
    for (size_t i = 0; i < sizeof type_names / sizeof *type_names; i++)
        if ((unsigned)type_names[i].type == type)
            return type_names[i].name;
    return NULL;
}

const char *frame_type_name(enum frame_type type)
{
    const char *name = find_name((unsigned)type);
    return name ? name : "unknown";
}

static void put_little(unsigned char *at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        at[i] = (unsigned char)(value >> (8 * i));
}

static uint64_t get_little(const unsigned char *at, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

static int append_piece(const char *piece, size_t length, void *arg)
{
    struct buffer *out = arg;
    buffer_append(out, piece, length);
    return out->failed ? -1 : 0;
}

int frame_encode(enum frame_type type, uint64_t id, json_t *payload, struct buffer *out)
{
    if (!json_is_object(payload) || !find_name((unsigned)type)) {
        json_decref(payload);
        return ERROR_INVALID;
    }
    size_t start = out->length;
    unsigned char header[PROTOCOL_HEADER_BYTES] = {0};
    buffer_append(out, header, sizeof header);
    int failed = json_dump_callback(payload, append_piece, out, JSON_COMPACT);
    json_decref(payload);
    if (out->failed)
        return ERROR_NO_MEMORY;
    size_t length = out->length - start - sizeof header;
    if (failed || length > PROTOCOL_MAX_PAYLOAD) {
        out->length = start;
        out->data[start] = '\0';
        return ERROR_INVALID;
    }
    put_little(header, length, 4);
    put_little(header + 4, (uint64_t)type, 2);
    put_little(header + 8, id, 8);
    memcpy(out->data + start, header, sizeof header);
    return 0;
}

int frame_decode(struct buffer *in, struct frame *ret_frame, struct error *error)
{
    if (in->length < PROTOCOL_HEADER_BYTES)
        return 0;
    const unsigned char *header = (const unsigned char *)in->data;
    size_t length = (size_t)get_little(header, 4);
    unsigned type = (unsigned)get_little(header + 4, 2);
    unsigned zero = (unsigned)get_little(header + 6, 2);
    uint64_t id = get_little(header + 8, 8);
    if (zero || !find_name(type))
        return error_set(error, ERROR_CORRUPT, "the stream holds no frame of this protocol (type %u, %u)",
                         type, zero);
    if (length > PROTOCOL_MAX_PAYLOAD)
        return error_set(error, ERROR_CORRUPT, "a frame of %zu bytes is over the limit of %d", length,
                         PROTOCOL_MAX_PAYLOAD);
    if (in->length - PROTOCOL_HEADER_BYTES < length)
        return 0;
    json_error_t reason;
    json_t *payload = json_loadb(in->data + PROTOCOL_HEADER_BYTES, length, JSON_ALLOW_NUL, &reason);
    if (!payload)
        return error_set(error, ERROR_CORRUPT, "the payload of a \"%s\" frame is not JSON: %s",
                         find_name(type), reason.text);
    if (!json_is_object(payload)) {
        json_decref(payload);
        return error_set(error, ERROR_CORRUPT, "the payload of a \"%s\" frame is not an object",
                         find_name(type));
    }
    buffer_consume(in, PROTOCOL_HEADER_BYTES + length);
    *ret_frame = (struct frame){.type = (enum frame_type)type, .id = id, .payload = payload};
    return 1;
}

/* The length of the well-formed UTF-8 character at text (Unicode 15, table 3-7), 0 when there is none. */
static size_t utf8_length(const unsigned char *text, size_t n)
{
    if (text[0] < 0x80)
        return 1;
    size_t need = text[0] >= 0xC2 && text[0] <= 0xDF   ? 2
                  : text[0] >= 0xE0 && text[0] <= 0xEF ? 3
                  : text[0] >= 0xF0 && text[0] <= 0xF4 ? 4
                                                       : 0;
    if (!need || need > n)
        return 0;
    unsigned char low = text[0] == 0xE0 ? 0xA0 : text[0] == 0xF0 ? 0x90 : 0x80;
    unsigned char high = text[0] == 0xED ? 0x9F : text[0] == 0xF4 ? 0x8F : 0xBF;
    if (text[1] < low || text[1] > high)
        return 0;
    for (size_t i = 2; i < need; i++)
        if (text[i] < 0x80 || text[i] > 0xBF)
            return 0;
    return need;
}

json_t *frame_text(const char *text, size_t length)
{
    json_t *json = json_stringn(text, length);
    if (json)
        return json;
    struct buffer whole = {0};
    for (size_t i = 0; i < length;) {
        size_t n = utf8_length((const unsigned char *)text + i, length - i);
        if (n)
            buffer_append(&whole, text + i, n);
        else
            buffer_append_string(&whole, "\xEF\xBF\xBD");
        i += n ? n : 1;
    }
    json = whole.failed ? NULL : json_stringn(whole.data, whole.length);
    buffer_free(&whole);
    return json;
}

json_t *frame_number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

json_t *frame_error_payload(const struct error *error)
{
    json_t *param = error->param[0] ? frame_text(error->param, strlen(error->param)) : json_null();
    return json_pack("{s:s, s:o, s:o}", "code", error_code_name(error->code), "message",
                     frame_text(error->message, strlen(error->message)), "param", param);
}
