/* fuzz.h: what every fuzz target shares. A target is one file that defines LLVMFuzzerTestOneInput. With clang
 * and -Db_sanitize=address it becomes a libFuzzer program; otherwise fuzz_main.c runs it over a folder of
 * seeds and some mutations of each, which is the smoke run of `meson test`. */
#ifndef TESTS_FUZZ_FUZZ_H
#define TESTS_FUZZ_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A promise of the code under test; not assert(), which release builds drop. */
#define FUZZ_CHECK(condition)                                                                                \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition);                          \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

/* A file in memory that holds the bytes; close the descriptor to remove it. */
static inline int fuzz_file(const uint8_t *data, size_t size, char path[32])
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    FUZZ_CHECK(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    snprintf(path, 32, "/proc/self/fd/%d", fd);
    return fd;
}

/* A path below the repository. */
static inline const char *fuzz_source(const char *relative)
{
    static char path[1024];
    const char *root = getenv("ADDERD_SOURCE");
    snprintf(path, sizeof path, "%s/%s", root ? root : ".", relative);
    return path;
}

#endif
