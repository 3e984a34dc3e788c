/* fuzz_main.c: a fuzz target without libFuzzer: every file of the folders named, and MUTATIONS drawn changes of
 * each (the same ones every time). */
#include "fuzz.h"

#include <dirent.h>
#include <string.h>

enum { MUTATIONS = 100, LARGEST = 1 << 20 };

static uint64_t draw(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Du >> 11;
}

/* Change a few places of the `size` bytes; returns the new size, at most size. */
static size_t mutate(uint8_t *data, size_t size, uint64_t *seed)
{
    static const char tokens[] = "\"{}[]:,\\0e-\xFF\xC3\0\n ";
    for (uint64_t n = 1 + draw(seed) % 4; n > 0 && size > 0; n--) {
        size_t at = draw(seed) % size, other = draw(seed) % size, room = size - (at > other ? at : other);
        switch (draw(seed) % 5) {
        case 0:
            data[at] = (uint8_t)draw(seed);
            break;
        case 1:
            data[at] = (uint8_t)tokens[draw(seed) % (sizeof tokens - 1)];
            break;
        case 2: /* copy a stretch over another */
            memmove(data + at, data + other, draw(seed) % room);
            break;
        case 3: /* cut a stretch out */
            memmove(data + at, data + at + 1, size - at - 1);
            size--;
            break;
        default:
            if (draw(seed) % 4 == 0)
                size = at;
            break;
        }
    }
    return size;
}

static void run_file(const char *path)
{
    static uint8_t seed_bytes[LARGEST];
    FILE *file = fopen(path, "re");
    FUZZ_CHECK(file);
    size_t size = fread(seed_bytes, 1, sizeof seed_bytes, file);
    fclose(file);
    uint64_t seed = 0x9E3779B97F4A7C15u;
    for (int i = 0; i <= MUTATIONS; i++) {
        /* A block of exactly that size, so that sanitizers see a read past its end. */
        uint8_t *data = malloc(size ? size : 1);
        FUZZ_CHECK(data);
        memcpy(data, seed_bytes, size);
        LLVMFuzzerTestOneInput(data, i ? mutate(data, size, &seed) : size);
        free(data);
    }
}

int main(int argc, char **argv)
{
    int n_files = 0;
    for (int i = 1; i < argc; i++) {
        struct dirent **entries;
        int n = scandir(argv[i], &entries, NULL, alphasort);
        FUZZ_CHECK(n >= 0);
        for (int j = 0; j < n; j++) {
            char path[1024];
            snprintf(path, sizeof path, "%s/%s", argv[i], entries[j]->d_name);
            if (entries[j]->d_name[0] != '.') {
                run_file(path);
                n_files++;
            }
            free(entries[j]);
        }
        free(entries);
    }
    printf("%d seeds, %d runs each\n", n_files, MUTATIONS + 1);
    return n_files > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
