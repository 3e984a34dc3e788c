/* error.c: see error.h. Pure; any thread. */
#include "base/error.h"

#include <stdio.h>
#include <string.h>

static const struct {
    int code;
    const char *name;
} code_names[] = {
    {ERROR_INVALID, "invalid"},     {ERROR_NOT_FOUND, "not_found"},
    {ERROR_CORRUPT, "corrupt"},     {ERROR_IO, "io"},
    {ERROR_NO_MEMORY, "no_memory"}, {ERROR_UNSUPPORTED, "unsupported"},
    {ERROR_DIVERGED, "diverged"},   {ERROR_DEVICE, "device"},
    {ERROR_BUSY, "busy"},           {ERROR_CANCELLED, "cancelled"},
    {ERROR_INTERNAL, "internal"},
};

static int set(struct error *error, int code, const char *param, const char *format, va_list args)
{
    if (error) {
        /* The arguments may point into *error itself: format before anything is overwritten. */
        char message[sizeof error->message];
        vsnprintf(message, sizeof message, format, args);
        memcpy(error->message, message, sizeof message);
        snprintf(error->param, sizeof error->param, "%s", param);
        error->code = code;
    }
    return code;
}

int error_set(struct error *error, int code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    set(error, code, "", format, args);
    va_end(args);
    return code;
}

int error_set_param(struct error *error, int code, const char *param, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    set(error, code, param, format, args);
    va_end(args);
    return code;
}

int error_prefix(struct error *error, const char *format, ...)
{
    if (!error)
        return ERROR_INTERNAL;
    char message[2 * sizeof error->message];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(message, sizeof error->message, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof error->message)
        n = (int)sizeof error->message - 1;
    memcpy(message + n, error->message, sizeof error->message);
    message[sizeof error->message - 1] = '\0';
    memcpy(error->message, message, sizeof error->message);
    return error->code ? error->code : ERROR_INTERNAL;
}

const char *error_code_name(int code)
{
    for (size_t i = 0; i < sizeof code_names / sizeof *code_names; i++)
        if (code_names[i].code == code)
            return code_names[i].name;
    return code ? "internal" : "none";
}

int error_code_from_name(const char *name)
{
    for (size_t i = 0; i < sizeof code_names / sizeof *code_names; i++)
        if (!strcmp(code_names[i].name, name))
            return code_names[i].code;
    return ERROR_INTERNAL;
}
