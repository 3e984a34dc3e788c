/* common.c: what every backend and every caller shares: types, status texts, the layout of chunk states, and
 * the random numbers. Pure functions; any thread. */
#include "kernels/kernels.h"

#include "kernels/philox.h"

size_t kernel_type_size(enum kernel_type type)
{
    switch (type) {
    case TYPE_BF16:
    case TYPE_F16:
        return 2;
    case TYPE_F32:
    case TYPE_I32:
        break;
    }
    return 4;
}

const char *kernel_type_name(enum kernel_type type)
{
    switch (type) {
    case TYPE_F32:
        return "float32";
    case TYPE_BF16:
        return "bfloat16";
    case TYPE_F16:
        return "float16";
    case TYPE_I32:
        return "int32";
    }
    return "unknown";
}

const char *kernel_status_text(int status)
{
    switch (status) {
    case KERNEL_OK:
        return "ok";
    case KERNEL_INVALID:
        return "invalid arguments";
    case KERNEL_UNSUPPORTED:
        return "type, size or alignment not supported by this device";
    case KERNEL_NO_MEMORY:
        return "out of memory";
    case KERNEL_DEVICE_LOST:
        return "the device is lost";
    }
    return "unknown status";
}

int64_t scan_chunk_count(const int32_t *seq_starts, int32_t n_seqs)
{
    int64_t count = 0;
    for (int32_t s = 0; s < n_seqs; s++)
        count += ((int64_t)seq_starts[s + 1] - seq_starts[s] + SCAN_CHUNK - 1) / SCAN_CHUNK;
    return count;
}

float philox_uniform(uint64_t seed, uint64_t counter)
{
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t block[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0};
    uint32_t words[4];
    philox_block(key, block, words);
    return (float)(words[0] >> 8) * 0x1p-24f;
}
