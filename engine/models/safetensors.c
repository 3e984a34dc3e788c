/* safetensors.c: see safetensors.h. Blocking file work on the calling thread; a mapped file is immutable and
 * may be read by any thread.
 *
 * A reader must survive any bytes: lengths are compared before they are added, JSON is bounded by the file,
 * and the tensors of a file must tile its data area exactly, as the format's own reader demands, so that a
 * truncated download is caught here and never as garbage weights. */
#include "engine/models/safetensors.h"

#include "base/buffer.h"
#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HEADER_LIMIT = 100 << 20, INDEX_LIMIT = 64 << 20 };

struct mapping {
    char *path;
    void *data;
    size_t size;
    json_t *header; /* owns the tensors' names */
};

struct safetensors {
    struct mapping *mappings;
    int64_t n_mappings;
    struct tensor_view *tensors; /* sorted by name */
    int64_t n_tensors;
};

static const struct {
    const char *dtype;
    enum kernel_type type;
} dtypes[] = {{"F32", TYPE_F32}, {"BF16", TYPE_BF16}, {"F16", TYPE_F16}, {"I32", TYPE_I32}};

static const char *dtype_of(enum kernel_type type)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (dtypes[i].type == type)
            return dtypes[i].dtype;
    return NULL;
}

/* ---- one file ---- */

/* One tensor's entry in the header. data_size: bytes after the header. */
static int parse_tensor(const char *path, const char *name, const json_t *entry, const char *data,
                        int64_t data_size, struct tensor_view *ret_view, struct error *error)
{
    const char *dtype = json_string_value(json_object_get(entry, "dtype"));
    const json_t *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    if (!dtype || !json_is_array(shape) || !json_is_array(offsets) || json_array_size(offsets) != 2)
        return error_set(error, ERROR_CORRUPT,
                         "%s: tensor %s: its header entry lacks dtype, shape or data_offsets", path, name);

    struct tensor_view view = {.name = name, .count = 1};
    size_t known = 0;
    while (known < sizeof dtypes / sizeof *dtypes && strcmp(dtypes[known].dtype, dtype))
        known++;
    if (known == sizeof dtypes / sizeof *dtypes)
        return error_set(error, ERROR_UNSUPPORTED,
                         "%s: tensor %s has type %.16s; F32, BF16, F16 and I32 are supported", path, name,
                         dtype);
    view.type = dtypes[known].type;

    if (json_array_size(shape) > TENSOR_MAX_DIMS)
        return error_set(error, ERROR_UNSUPPORTED,
                         "%s: tensor %s has %zu dimensions; at most %d are supported", path, name,
                         json_array_size(shape), TENSOR_MAX_DIMS);
    view.n_dims = (int)json_array_size(shape);
    for (int i = 0; i < view.n_dims; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return error_set(error, ERROR_CORRUPT,
                             "%s: tensor %s: dimension %d of its shape is not a whole number", path, name, i);
        view.shape[i] = json_integer_value(dim);
        if (__builtin_mul_overflow(view.count, view.shape[i], &view.count))
            return error_set(error, ERROR_CORRUPT, "%s: tensor %s: its shape overflows", path, name);
    }

    const json_t *begin_json = json_array_get(offsets, 0), *end_json = json_array_get(offsets, 1);
    int64_t begin = json_integer_value(begin_json), end = json_integer_value(end_json), bytes;
    if (!json_is_integer(begin_json) || !json_is_integer(end_json) || begin < 0 || end < begin ||
        end > data_size)
        return error_set(error, ERROR_CORRUPT,
                         "%s: tensor %s lies at bytes %" PRId64 "..%" PRId64 " of %" PRId64
                         " bytes of data: the file is truncated or corrupt",
                         path, name, begin, end, data_size);
    if (__builtin_mul_overflow(view.count, (int64_t)kernel_type_size(view.type), &bytes) ||
        bytes != end - begin)
        return error_set(error, ERROR_CORRUPT,
                         "%s: tensor %s: %" PRId64 " elements of type %s do not fill its %" PRId64 " bytes",
                         path, name, view.count, dtype, end - begin);
    view.data = data + begin;
    *ret_view = view;
    return 0;
}

static int compare_data(const void *a, const void *b)
{
    const struct tensor_view *x = a, *y = b;
    if (x->data != y->data)
        return (const char *)x->data < (const char *)y->data ? -1 : 1;
    return (x->count > y->count) - (x->count < y->count); /* empty ones first where they share a place */
}

/* Tensors must follow one another without gap or overlap and end with the file. */
static int check_tiling(const char *path, struct tensor_view *tensors, int64_t count, const char *data,
                        int64_t data_size, struct error *error)
{
    qsort(tensors, (size_t)count, sizeof *tensors, compare_data);
    const char *next = data;
    for (int64_t i = 0; i < count; i++) {
        if ((const char *)tensors[i].data != next)
            return error_set(error, ERROR_CORRUPT, "%s: tensor %s %s", path, tensors[i].name,
                             (const char *)tensors[i].data < next ? "overlaps the one before it"
                                                                  : "follows a gap that no tensor owns");
        next += tensors[i].count * (int64_t)kernel_type_size(tensors[i].type);
    }
    if (next != data + data_size)
        return error_set(error, ERROR_CORRUPT, "%s has %" PRId64 " bytes after its last tensor", path,
                         (int64_t)(data + data_size - next));
    return 0;
}

static int map_file(const char *path, struct mapping *mapping, struct error *error)
{
    int code = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_set(error, errno == ENOENT ? ERROR_NOT_FOUND : ERROR_IO, "cannot open %s: %s", path,
                         strerror(errno));
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        code = error_set(error, ERROR_IO, "%s is not a regular file", path);
        goto done;
    }
    if (st.st_size < 10) {
        code = error_set(error, ERROR_CORRUPT, "%s has %lld bytes: too short for a safetensors file", path,
                         (long long)st.st_size);
        goto done;
    }
    void *data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) {
        code = error_set(error, ERROR_IO, "cannot map %s: %s", path, strerror(errno));
        goto done;
    }
    mapping->data = data;
    mapping->size = (size_t)st.st_size;
done:
    close(fd);
    return code;
}

/* Map one file and append its tensors to file->tensors. */
static int add_file(struct safetensors *file, const char *path, struct error *error)
{
    struct mapping *mappings =
        realloc(file->mappings, ((size_t)file->n_mappings + 1) * sizeof *file->mappings);
    if (!mappings)
        return error_set(error, ERROR_NO_MEMORY, "no memory to open %s", path);
    file->mappings = mappings;
    struct mapping *mapping = &mappings[file->n_mappings++];
    memset(mapping, 0, sizeof *mapping);
    mapping->path = strdup(path);
    if (!mapping->path)
        return error_set(error, ERROR_NO_MEMORY, "no memory to open %s", path);
    int code = map_file(path, mapping, error);
    if (code)
        return code;

    const unsigned char *bytes = mapping->data;
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | bytes[i];
    if (length > mapping->size - 8 || length > HEADER_LIMIT)
        return error_set(error, ERROR_CORRUPT,
                         "%s: its header claims %" PRIu64
                         " bytes, more than %s: truncated or not safetensors",
                         path, length, length > HEADER_LIMIT ? "any header may have" : "the file holds");
    const char *data = (const char *)bytes + 8 + length;
    int64_t data_size = (int64_t)(mapping->size - 8 - length);

    json_error_t json_error;
    mapping->header =
        json_loadb((const char *)bytes + 8, (size_t)length, JSON_REJECT_DUPLICATES, &json_error);
    if (!json_is_object(mapping->header))
        return error_set(error, ERROR_CORRUPT, "%s: its header is not a JSON object: %s", path,
                         mapping->header ? "another value" : json_error.text);

    size_t entries = json_object_size(mapping->header);
    struct tensor_view *tensors =
        realloc(file->tensors, ((size_t)file->n_tensors + entries + 1) * sizeof *file->tensors);
    if (!tensors)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the tensors of %s", path);
    file->tensors = tensors;
    struct tensor_view *first = tensors + file->n_tensors;
    int64_t count = 0;
    const char *name;
    json_t *entry;
    json_object_foreach(mapping->header, name, entry)
    {
        if (!strcmp(name, "__metadata__"))
            continue;
        code = parse_tensor(path, name, entry, data, data_size, &first[count], error);
        if (code)
            return code;
        count++;
    }
    code = check_tiling(path, first, count, data, data_size, error);
    if (code)
        return code;
    file->n_tensors += count;
    return 0;
}

/* ---- shards ---- */

static int compare_names(const void *a, const void *b)
{
    const struct tensor_view *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Every tensor that the index places in a shard must be there. */
static int check_index(const struct safetensors *file, const char *path, const json_t *map,
                       struct error *error)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)map, name, value)
    {
        const struct tensor_view *view = safetensors_find(file, name);
        const char *shard = json_string_value(value);
        bool there = false;
        for (int64_t i = 0; view && i < file->n_mappings && !there; i++) {
            const struct mapping *mapping = &file->mappings[i];
            const char *slash = strrchr(mapping->path, '/');
            there = !strcmp(slash ? slash + 1 : mapping->path, shard) &&
                    json_object_get(mapping->header, name) != NULL;
        }
        if (!there)
            return error_set(error, ERROR_CORRUPT, "%s: tensor %s is not in %s", path, name, shard);
    }
    return 0;
}

static int open_index(struct safetensors *file, const char *path, json_t **ret_map, struct error *error)
{
    char *text = NULL;
    size_t length;
    const char **shards = NULL;
    json_t *index = NULL;
    int code = file_read(path, INDEX_LIMIT, &text, &length, error);
    if (code)
        return code;
    json_error_t json_error;
    index = json_loadb(text, length, JSON_REJECT_DUPLICATES, &json_error);
    json_t *map = json_object_get(index, "weight_map");
    if (!json_is_object(map) || !json_object_size(map)) {
        code = error_set(error, ERROR_CORRUPT, "%s: no weight_map: %s", path,
                         index ? "missing, empty or not an object" : json_error.text);
        goto done;
    }
    size_t n = 0;
    shards = calloc(json_object_size(map), sizeof *shards);
    if (!shards) {
        code = error_set(error, ERROR_NO_MEMORY, "no memory to open %s", path);
        goto done;
    }
    const char *name;
    json_t *value;
    json_object_foreach(map, name, value)
    {
        const char *shard = json_string_value(value);
        /* A shard lies beside its index: a path would let a model folder read anything. */
        if (!shard || !*shard || strchr(shard, '/') || strlen(shard) > NAME_MAX) {
            code = error_set(error, ERROR_CORRUPT, "%s: tensor %s: its shard is not a file name", path, name);
            goto done;
        }
        shards[n++] = shard;
    }
    qsort(shards, n, sizeof *shards, compare_strings);
    const char *slash = strrchr(path, '/');
    int folder_length = slash ? (int)(slash - path + 1) : 0;
    for (size_t i = 0; i < n && !code; i++) {
        if (i && !strcmp(shards[i], shards[i - 1]))
            continue;
        char shard_path[PATH_MAX];
        if (snprintf(shard_path, sizeof shard_path, "%.*s%s", folder_length, path, shards[i]) >=
            (int)sizeof shard_path)
            code = error_set(error, ERROR_INVALID, "path too long: %s", path);
        else
            code = add_file(file, shard_path, error);
    }
    if (!code)
        *ret_map = json_incref(map);
done:
    free(shards);
    json_decref(index);
    free(text);
    return code;
}

/* ---- opening ---- */

static bool ends_with(const char *string, const char *end)
{
    size_t n = strlen(string), m = strlen(end);
    return n >= m && !strcmp(string + n - m, end);
}

/* What to open when path names a folder: the index when there is one. */
static int resolve(const char *path, char resolved[PATH_MAX], struct error *error)
{
    static const char *const names[] = {"/model.safetensors.index.json", "/model.safetensors"};
    struct stat st;
    if (stat(path, &st))
        return error_set(error, errno == ENOENT ? ERROR_NOT_FOUND : ERROR_IO, "cannot open %s: %s", path,
                         strerror(errno));
    for (size_t i = 0; i < (S_ISDIR(st.st_mode) ? sizeof names / sizeof *names : 1); i++) {
        if (snprintf(resolved, PATH_MAX, "%s%s", path, S_ISDIR(st.st_mode) ? names[i] : "") >= PATH_MAX)
            return error_set(error, ERROR_INVALID, "path too long: %s", path);
        if (!access(resolved, F_OK))
            return 0;
    }
    return error_set(error, ERROR_NOT_FOUND,
                     "%s holds neither model.safetensors nor model.safetensors.index.json", path);
}

int safetensors_open(const char *path, struct safetensors **ret_file, struct error *error)
{
    char resolved[PATH_MAX];
    json_t *map = NULL;
    struct safetensors *file = NULL;
    int code = resolve(path, resolved, error);
    if (code)
        return code;
    file = calloc(1, sizeof *file);
    if (!file)
        return error_set(error, ERROR_NO_MEMORY, "no memory to open %s", path);
    code = ends_with(resolved, ".json") ? open_index(file, resolved, &map, error)
                                        : add_file(file, resolved, error);
    if (code)
        goto done;
    if (file->n_tensors)
        qsort(file->tensors, (size_t)file->n_tensors, sizeof *file->tensors, compare_names);
    for (int64_t i = 1; i < file->n_tensors; i++)
        if (!strcmp(file->tensors[i - 1].name, file->tensors[i].name)) {
            code = error_set(error, ERROR_CORRUPT, "%s: tensor %s is in two shards", resolved,
                             file->tensors[i].name);
            goto done;
        }
    if (map)
        code = check_index(file, resolved, map, error);
    if (code)
        goto done;
    *ret_file = file;
    file = NULL;
done:
    json_decref(map);
    safetensors_close(file);
    return code;
}

void safetensors_close(struct safetensors *file)
{
    if (!file)
        return;
    for (int64_t i = 0; i < file->n_mappings; i++) {
        if (file->mappings[i].data)
            munmap(file->mappings[i].data, file->mappings[i].size);
        json_decref(file->mappings[i].header);
        free(file->mappings[i].path);
    }
    free(file->mappings);
    free(file->tensors);
    free(file);
}

int64_t safetensors_count(const struct safetensors *file)
{
    return file->n_tensors;
}

const struct tensor_view *safetensors_at(const struct safetensors *file, int64_t index)
{
    return &file->tensors[index];
}

const struct tensor_view *safetensors_find(const struct safetensors *file, const char *name)
{
    struct tensor_view key = {.name = name};
    if (!file->n_tensors)
        return NULL;
    return bsearch(&key, file->tensors, (size_t)file->n_tensors, sizeof *file->tensors, compare_names);
}

/* ---- writing ---- */

static int write_all(int fd, const void *data, size_t length)
{
    const char *next = data;
    while (length) {
        ssize_t n = write(fd, next, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno;
        next += n;
        length -= (size_t)n;
    }
    return 0;
}

static int64_t view_bytes(const struct tensor_view *tensor)
{
    return tensor->count * (int64_t)kernel_type_size(tensor->type);
}

/* The header's bytes, padded with spaces to a multiple of 8 so that the data is aligned. `order` says in
 * which order the data follows. */
static int build_header(const struct tensor_view *tensors, const int64_t *order, int64_t count,
                        const char *const *metadata, struct buffer *header, struct error *error)
{
    int code = 0, failed = 0;
    char *text = NULL;
    json_t *root = json_object();
    if (metadata) {
        json_t *pairs = json_object();
        for (; metadata[0] && metadata[1]; metadata += 2)
            failed |= json_object_set_new(pairs, metadata[0], json_string(metadata[1]));
        failed |= json_object_set_new(root, "__metadata__", pairs);
    }
    int64_t offset = 0;
    for (int64_t i = 0; i < count && !failed; i++) {
        const struct tensor_view *tensor = &tensors[order[i]];
        if (!dtype_of(tensor->type) || tensor->n_dims > TENSOR_MAX_DIMS ||
            json_object_get(root, tensor->name)) {
            code = error_set(error, ERROR_INTERNAL, "tensor %s cannot be written", tensor->name);
            goto done;
        }
        json_t *shape = json_array();
        for (int d = 0; d < tensor->n_dims; d++)
            failed |= json_array_append_new(shape, json_integer(tensor->shape[d]));
        int64_t end = offset + view_bytes(tensor);
        failed |=
            json_object_set_new(root, tensor->name,
                                json_pack("{s:s, s:o, s:[I,I]}", "dtype", dtype_of(tensor->type), "shape",
                                          shape, "data_offsets", (json_int_t)offset, (json_int_t)end));
        offset = end;
    }
    text = failed ? NULL : json_dumps(root, JSON_COMPACT);
    if (!text) {
        code = error_set(error, ERROR_NO_MEMORY, "no memory for a safetensors header");
        goto done;
    }
    size_t length = (strlen(text) + 7) / 8 * 8;
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++)
        prefix[i] = (unsigned char)((uint64_t)length >> 8 * i);
    buffer_append(header, prefix, sizeof prefix);
    buffer_append_string(header, text);
    buffer_append(header, "       ", length - strlen(text));
    if (header->failed)
        code = error_set(error, ERROR_NO_MEMORY, "no memory for a safetensors header");
done:
    free(text);
    json_decref(root);
    return code;
}

int safetensors_write(const char *path, const struct tensor_view *tensors, int64_t count,
                      const char *const *metadata, struct error *error)
{
    char temporary[PATH_MAX];
    struct buffer header = {0};
    int fd = -1, code = 0, failed = 0;
    if (snprintf(temporary, sizeof temporary, "%s.tmp-%d", path, (int)getpid()) >= (int)sizeof temporary)
        return error_set(error, ERROR_INVALID, "path too long: %s", path);
    int64_t *order = malloc((size_t)(count ? count : 1) * sizeof *order);
    if (!order)
        return error_set(error, ERROR_NO_MEMORY, "no memory to write %s", path);
    /* Wider elements first: readers that view the data in place need each tensor aligned to its type. */
    int64_t n = 0;
    for (int wide = 1; wide >= 0; wide--)
        for (int64_t i = 0; i < count; i++)
            if ((kernel_type_size(tensors[i].type) >= 4) == wide)
                order[n++] = i;
    code = build_header(tensors, order, count, metadata, &header, error);
    if (code)
        goto done;
    fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
    if (fd < 0) {
        code = error_set(error, ERROR_IO, "cannot create %s: %s", temporary, strerror(errno));
        goto done;
    }
    failed = write_all(fd, header.data, header.length);
    for (int64_t i = 0; i < count && !failed; i++)
        failed = write_all(fd, tensors[order[i]].data, (size_t)view_bytes(&tensors[order[i]]));
    if (!failed && fsync(fd))
        failed = errno;
    if (close(fd) && !failed)
        failed = errno;
    if (failed)
        code = error_set(error, ERROR_IO, "cannot write %s: %s", temporary, strerror(failed));
    else
        code = file_rename_durable(temporary, path, error);
    if (code)
        unlink(temporary);
done:
    buffer_free(&header);
    free(order);
    return code;
}
