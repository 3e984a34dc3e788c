/* support.h: where test data lies, and temporary files; for the tests of engine/text. */
#ifndef TESTS_ENGINE_TEXT_SUPPORT_H
#define TESTS_ENGINE_TEXT_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/text/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static inline const char *source_path(const char *relative)
{
    static char path[1024];
    const char *root = getenv("ADDERD_SOURCE");
    snprintf(path, sizeof path, "%s/%s", root ? root : ".", relative);
    return path;
}

/* Write bytes to a new file; its name goes to path (at least 64 bytes). Remove it with unlink. */
static inline void temporary_file(char *path, const void *data, size_t length)
{
    const char *folder = getenv("TMPDIR");
    snprintf(path, 64, "%.40s/adderd-text-XXXXXX", folder ? folder : "/tmp");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, data, length), (ssize_t)length);
    close(fd);
}

static inline struct tokenizer *load_tokenizer(const char *relative)
{
    struct tokenizer *tokenizer = NULL;
    struct error error = {0};
    if (tokenizer_load(source_path(relative), &tokenizer, &error))
        fail_msg("%s", error.message);
    return tokenizer;
}

/* xorshift64*: the same draws on every machine. */
static inline uint64_t draw(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Du >> 11;
}

#define HATCHLING "models/hatchling/tokenizer.json"
#define NEOX      "tests/vectors/tokenizers/gpt-neox-20b.json"

#endif
