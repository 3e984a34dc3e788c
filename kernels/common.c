/* common.c: what every backend and every caller shares: types, status texts, the layout of chunk states, and
 * the random numbers. Pure functions; any thread. */
#include "kernels/kernels.h"

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

/* Philox4x32-10. Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; the
 * counter fills the two low words of the block, the high words are zero. */
float philox_uniform(uint64_t seed, uint64_t counter)
{
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0;
        uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        uint32_t n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (float)(c0 >> 8) * 0x1p-24f;
}
