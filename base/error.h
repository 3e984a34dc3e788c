/* error.h: how a function says what went wrong.
 *
 * A function that can fail returns 0 or one of the negative codes below, and takes a trailing `struct error
 * *` when a person may read the reason. The pointer may be NULL. Outputs are set last: on failure they are
 * untouched. No thread-local state, no logging here: the caller decides what becomes of the message. */
#ifndef BASE_ERROR_H
#define BASE_ERROR_H

#include <stdarg.h>

enum {
    ERROR_INVALID = -1,     /* the input is wrong: saying it again will not help (HTTP 400) */
    ERROR_NOT_FOUND = -2,   /* what was named does not exist (404) */
    ERROR_CORRUPT = -3,     /* a file is not what it says it is */
    ERROR_IO = -4,          /* the operating system refused: disk full, permission, broken pipe */
    ERROR_NO_MEMORY = -5,   /* host or device memory */
    ERROR_UNSUPPORTED = -6, /* well formed, but not something this build or device can do */
    ERROR_DIVERGED = -7,    /* a loss or gradient became NaN or infinite */
    ERROR_DEVICE = -8,      /* the device is lost; the process that owns it must end */
    ERROR_BUSY = -9,        /* full for now: try again (429, 503) */
    ERROR_CANCELLED = -10,  /* stopped on request */
    ERROR_INTERNAL = -11,   /* a bug */
};

struct error {
    int code;          /* one of the above; 0 when nothing was set */
    char param[64];    /* the field or file at fault, "" when none */
    char message[512]; /* one sentence for a person, no trailing newline */
};

/* Fill *error (when not NULL) and return code, so that `return error_set(error, ERROR_INVALID, "...")` reads
 * well. */
int error_set(struct error *error, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same, naming the field at fault. */
int error_set_param(struct error *error, int code, const char *param, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Prefix the message already in *error ("layer 3: " ...). Returns error->code, or ERROR_INTERNAL if none is
 * set. */
int error_prefix(struct error *error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A short name for a code: "invalid", "not_found" ... Never NULL. */
const char *error_code_name(int code);
/* The inverse; ERROR_INTERNAL for an unknown name. */
int error_code_from_name(const char *name);

#endif
