/* fuzz_safetensors.c: any bytes as a .safetensors file: an error or tensors that lie inside the file.
 * Build with clang -fsanitize=fuzzer,address,undefined together with engine/models/safetensors.c, the files of
 * base/ and kernels/common.c. One thread; the input goes through a file in memory, since the reader maps files. */
#include "engine/models/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1;
    char path[64];
    struct safetensors *file = NULL;
    struct error error;
    volatile uint8_t sink = 0;
    if (fd < 0)
        fd = memfd_create("fuzz", 0);
    if (fd < 0 || ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size)
        abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (safetensors_open(path, &file, &error))
        return 0;
    for (int64_t i = 0; i < safetensors_count(file); i++) {
        const struct tensor_view *view = safetensors_at(file, i);
        size_t bytes = (size_t)view->count * kernel_type_size(view->type);
        for (size_t b = 0; b < bytes; b++)
            sink = (uint8_t)(sink + ((const uint8_t *)view->data)[b]);
        if (safetensors_find(file, view->name) != view)
            abort();
    }
    safetensors_close(file);
    return 0;
}
