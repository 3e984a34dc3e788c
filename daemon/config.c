/* config.c: see config.h. Before the loop runs.
 *
 * One table says everything of every flag: adding a setting is a line there and a member of struct config. */
#include "daemon/config.h"

#include "base/buffer.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct setting;
/* Reads value into its place. where: "--max-seqs" or "ADDER_MAX_SEQS", for messages. */
typedef int (*setter)(struct config *config, const struct setting *setting, const char *where,
                      const char *value, struct error *error);
static int set_listen(struct config *, const struct setting *, const char *, const char *, struct error *);
static int set_text(struct config *, const struct setting *, const char *, const char *, struct error *);
static int set_folders(struct config *, const struct setting *, const char *, const char *, struct error *);
static int set_devices(struct config *, const struct setting *, const char *, const char *, struct error *);
static int set_organization(struct config *, const struct setting *, const char *, const char *,
                            struct error *);
static int set_count(struct config *, const struct setting *, const char *, const char *, struct error *);
static int set_bytes(struct config *, const struct setting *, const char *, const char *, struct error *);
static int set_seconds(struct config *, const struct setting *, const char *, const char *, struct error *);
static int set_log_level(struct config *, const struct setting *, const char *, const char *, struct error *);
static int set_log_format(struct config *, const struct setting *, const char *, const char *,
                          struct error *);

static const struct setting {
    const char *flag, *variable, *argument;
    const char *standard; /* the default, read like any value; NULL = none */
    setter set;
    size_t offset;       /* in struct config */
    int64_t least, most; /* of numbers: as given, bytes, or milliseconds */
    const char *shown;   /* the default as --help shows it, where standard does not say it */
    const char *help;
} settings[] = {
    {"listen", "ADDER_LISTEN", "HOST:PORT", "127.0.0.1:8080", set_listen, 0, 0, 0, NULL,
     "address to serve on; IPv6 in brackets; port 0 takes a free one. Without API keys "
     "only this machine's own addresses are allowed"},
    {"port-file", "ADDER_PORT_FILE", "FILE", NULL, set_text, offsetof(struct config, port_file), 0, 0, "none",
     "write \"HOST:PORT\" there once it listens"},
    {"data-dir", "ADDER_DATA_DIR", "DIR", "adder-data", set_text, offsetof(struct config, data_dir), 0, 0,
     NULL, "database, files and adapters; one daemon at a time"},
    {"models-dir", "ADDER_MODELS_DIR", "DIR", "models", set_folders, 0, 0, 0, NULL,
     "each folder in it is a model, its id the folder's name; may be given again "
     "(in the variable: separated by colons)"},
    {"tasks-dir", "ADDER_TASKS_DIR", "DIR", "tasks", set_text, offsetof(struct config, tasks_dir), 0, 0, NULL,
     "definitions of evaluation tasks, NAME.json each"},
    {"eval-data-dir", "ADDER_EVAL_DATA_DIR", "DIR", NULL, set_text, offsetof(struct config, eval_data_dir), 0,
     0, "none", "documents of evaluation tasks; uploaded files of the same names come first"},
    {"device", "ADDER_DEVICE", "DEVICE", "auto", set_devices, 0, 0, 0, NULL,
     "cpu, cuda:N, or auto (every GPU, else the CPU); a worker each; may be given again "
     "or separated by commas"},
    {"default-model", "ADDER_DEFAULT_MODEL", "ID", NULL, set_text, offsetof(struct config, default_model), 0,
     0, "the only one", "answers where a request names no model"},
    {"organization", "ADDER_ORGANIZATION", "NAME", "local", set_organization,
     offsetof(struct config, organization), 0, 0, NULL, "second part of the names of fine-tuned models"},
    {"threads", "ADDER_THREADS", "N", "0", set_count, offsetof(struct config, threads), 0, 1024,
     "0, all processors", "CPU threads that a worker may use"},
    {"max-body-bytes", "ADDER_MAX_BODY_BYTES", "BYTES", "32M", set_bytes,
     offsetof(struct config, max_body_bytes), 1024, (int64_t)1 << 30, NULL,
     "largest JSON body; K, M, G may follow a number of bytes"},
    {"max-upload-bytes", "ADDER_MAX_UPLOAD_BYTES", "BYTES", "1G", set_bytes,
     offsetof(struct config, max_upload_bytes), 1024, (int64_t)1 << 40, NULL, "largest file upload"},
    {"max-seqs", "ADDER_MAX_SEQS", "N", "64", set_count, offsetof(struct config, max_seqs), 1, 65536, NULL,
     "sequences that a worker decodes together"},
    {"max-waiting", "ADDER_MAX_WAITING", "N", "1024", set_count, offsetof(struct config, max_waiting), 0,
     1 << 20, NULL, "completions that may wait for a worker; more are answered with 429"},
    {"max-connections", "ADDER_MAX_CONNECTIONS", "N", "1024", set_count,
     offsetof(struct config, max_connections), 1, 65536, NULL, "open connections"},
    {"heartbeat-timeout", "ADDER_HEARTBEAT_TIMEOUT", "SECONDS", "30", set_seconds,
     offsetof(struct config, heartbeat_timeout_ms), 100, 3600 * 1000, NULL,
     "a worker that is silent for so long is restarted"},
    {"shutdown-timeout", "ADDER_SHUTDOWN_TIMEOUT", "SECONDS", "30", set_seconds,
     offsetof(struct config, shutdown_timeout_ms), 100, 3600 * 1000, NULL,
     "time to end requests and checkpoint jobs after SIGTERM"},
    {"log-level", "ADDER_LOG_LEVEL", "LEVEL", "info", set_log_level, 0, 0, 0, NULL,
     "debug, info, warn or error"},
    {"log-format", "ADDER_LOG_FORMAT", "FORMAT", NULL, set_log_format, 0, 0, 0, "text; journal under systemd",
     "text, json or journal"},
};
enum { N_SETTINGS = sizeof settings / sizeof *settings, HELP_CODE = 'h', FIRST_CODE = 256 };

static void *place(struct config *config, const struct setting *setting)
{
    return (char *)config + setting->offset;
}

/* ---- values ---- */

static int set_listen(struct config *config, const struct setting *setting, const char *where,
                      const char *value, struct error *error)
{
    (void)setting;
    const char *host = value, *colon = strrchr(value, ':');
    size_t length = colon ? (size_t)(colon - value) : 0;
    if (value[0] == '[' && length >= 2 && value[length - 1] == ']') {
        host = value + 1;
        length -= 2;
    } else if (colon && memchr(value, ':', length)) {
        return error_set_param(error, ERROR_INVALID, where, "%s: write the IPv6 address of '%s' in brackets",
                               where, value);
    }
    if (!length || length >= sizeof config->listen_host)
        return error_set_param(error, ERROR_INVALID, where, "%s: '%s' is not HOST:PORT", where, value);
    int64_t port = 0;
    size_t digits = strspn(colon + 1, "0123456789");
    if (digits >= 1 && digits <= 5 && !colon[1 + digits])
        port = strtol(colon + 1, NULL, 10);
    else
        port = -1;
    if (port < 0 || port > 65535)
        return error_set_param(error, ERROR_INVALID, where, "%s: '%s' is not a port between 0 and 65535",
                               where, colon + 1);
    memcpy(config->listen_host, host, length);
    config->listen_host[length] = '\0';
    config->listen_port = (uint16_t)port;
    return 0;
}

static int set_text(struct config *config, const struct setting *setting, const char *where,
                    const char *value, struct error *error)
{
    if (!value[0])
        return error_set_param(error, ERROR_INVALID, where, "%s: must not be empty", where);
    *(const char **)place(config, setting) = value;
    return 0;
}

static int set_organization(struct config *config, const struct setting *setting, const char *where,
                            const char *value, struct error *error)
{
    for (const char *c = value; *c; c++)
        if (!isalnum((unsigned char)*c) && *c != '-' && *c != '_')
            return error_set_param(error, ERROR_INVALID, where,
                                   "%s: '%s' has other characters than letters, digits, '-' and '_'", where,
                                   value);
    if (strlen(value) > 64)
        return error_set_param(error, ERROR_INVALID, where, "%s: has more than 64 characters", where);
    return set_text(config, setting, where, value, error);
}

/* Append copies of value's parts to list. */
static int append_parts(const char **list, int *count, int limit, char separator, const char *where,
                        const char *value, struct error *error)
{
    for (const char *part = value;;) {
        const char *end = separator ? strchrnul(part, separator) : part + strlen(part);
        if (end == part)
            return error_set_param(error, ERROR_INVALID, where, "%s: '%s' has an empty part", where, value);
        if (*count == limit)
            return error_set_param(error, ERROR_INVALID, where, "%s: at most %d may be given", where, limit);
        char *copy = strndup(part, (size_t)(end - part));
        if (!copy)
            return error_set(error, ERROR_NO_MEMORY, "no memory for the settings");
        list[(*count)++] = copy;
        if (!*end)
            return 0;
        part = end + 1;
    }
}

static int set_folders(struct config *config, const struct setting *setting, const char *where,
                       const char *value, struct error *error)
{
    /* A folder named on the command line may have a colon in its name. */
    char separator = strcmp(where, setting->variable) ? '\0' : ':';
    return append_parts(config->models_dirs, &config->n_models_dirs, CONFIG_MAX_FOLDERS, separator, where,
                        value, error);
}

static bool is_device(const char *device)
{
    if (!strcmp(device, "cpu") || !strcmp(device, "auto"))
        return true;
    if (strncmp(device, "cuda:", 5))
        return false;
    size_t digits = strspn(device + 5, "0123456789");
    return digits >= 1 && digits <= 3 && !device[5 + digits];
}

static int set_devices(struct config *config, const struct setting *setting, const char *where,
                       const char *value, struct error *error)
{
    (void)setting;
    int known = config->n_devices;
    int code =
        append_parts(config->devices, &config->n_devices, CONFIG_MAX_DEVICES, ',', where, value, error);
    for (int i = known; !code && i < config->n_devices; i++) {
        if (!is_device(config->devices[i]))
            return error_set_param(error, ERROR_INVALID, where, "%s: '%s' is none of cpu, cuda:N and auto",
                                   where, config->devices[i]);
        for (int j = 0; j < i; j++)
            if (!strcmp(config->devices[i], config->devices[j]))
                return error_set_param(error, ERROR_INVALID, where, "%s: %s is named twice", where,
                                       config->devices[i]);
    }
    return code;
}

/* A whole number without sign. *ret_end: what follows it. Returns false when there is none or it is too big.
 */
static bool parse_whole(const char *value, int64_t *ret_number, const char **ret_end)
{
    if (!isdigit((unsigned char)value[0]))
        return false;
    char *end;
    errno = 0;
    long long number = strtoll(value, &end, 10);
    if (errno)
        return false;
    *ret_number = number;
    *ret_end = end;
    return true;
}

static int set_count(struct config *config, const struct setting *setting, const char *where,
                     const char *value, struct error *error)
{
    int64_t number;
    const char *end;
    if (!parse_whole(value, &number, &end) || *end || number < setting->least || number > setting->most)
        return error_set_param(error, ERROR_INVALID, where,
                               "%s: '%s' is not a whole number between %" PRId64 " and %" PRId64, where,
                               value, setting->least, setting->most);
    *(int32_t *)place(config, setting) = (int32_t)number;
    return 0;
}

static int set_bytes(struct config *config, const struct setting *setting, const char *where,
                     const char *value, struct error *error)
{
    int64_t number;
    const char *end;
    bool good = parse_whole(value, &number, &end);
    if (good && *end) {
        const char *suffixes = "KMG", *suffix = strchr(suffixes, toupper((unsigned char)*end));
        int shift = suffix ? 10 * (int)(suffix - suffixes + 1) : 0;
        good = suffix && !end[1] && number <= setting->most >> shift;
        if (good)
            number <<= shift;
    }
    if (!good || number < setting->least || number > setting->most)
        return error_set_param(error, ERROR_INVALID, where,
                               "%s: '%s' is not a number of bytes between %" PRId64 " and %" PRId64
                               " (K, M or G may follow)",
                               where, value, setting->least, setting->most);
    *(int64_t *)place(config, setting) = number;
    return 0;
}

static int set_seconds(struct config *config, const struct setting *setting, const char *where,
                       const char *value, struct error *error)
{
    char *end = NULL;
    double seconds = isdigit((unsigned char)value[0]) ? strtod(value, &end) : -1;
    if (!end || *end ||
        !(seconds * 1000 >= (double)setting->least && seconds * 1000 <= (double)setting->most))
        return error_set_param(error, ERROR_INVALID, where,
                               "%s: '%s' is not a number of seconds between %g and %g", where, value,
                               (double)setting->least / 1000, (double)setting->most / 1000);
    *(int32_t *)place(config, setting) = (int32_t)lround(seconds * 1000);
    return 0;
}

static int find_word(const char *const *words, int count, const char *value)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(words[i], value))
            return i;
    return -1;
}

static int set_log_level(struct config *config, const struct setting *setting, const char *where,
                         const char *value, struct error *error)
{
    (void)setting;
    static const char *const words[] = {
        [LOG_DEBUG] = "debug", [LOG_INFO] = "info", [LOG_WARN] = "warn", [LOG_ERROR] = "error"};
    int level = find_word(words, 4, value);
    if (level < 0)
        return error_set_param(error, ERROR_INVALID, where, "%s: '%s' is none of debug, info, warn and error",
                               where, value);
    config->log_level = (enum log_level)level;
    return 0;
}

static int set_log_format(struct config *config, const struct setting *setting, const char *where,
                          const char *value, struct error *error)
{
    (void)setting;
    static const char *const words[] = {[LOG_TEXT] = "text", [LOG_JSON] = "json", [LOG_JOURNAL] = "journal"};
    int format = find_word(words, 3, value);
    if (format < 0)
        return error_set_param(error, ERROR_INVALID, where, "%s: '%s' is none of text, json and journal",
                               where, value);
    config->log_format = (enum log_format)format;
    return 0;
}

/* ---- help ---- */

/* Words of text, wrapped, behind an indent. */
static void write_wrapped(struct buffer *out, const char *text, int indent, int width)
{
    int column = width;
    while (*text) {
        int length = (int)strcspn(text, " ");
        if (column + 1 + length > width) {
            buffer_printf(out, "\n%*s", indent, "");
            column = indent;
        } else {
            buffer_append_string(out, " ");
            column++;
        }
        buffer_append(out, text, (size_t)length);
        column += length;
        text += length;
        text += strspn(text, " ");
    }
}

const char *config_help(void)
{
    static char *help; /* made once, kept for the process */
    if (help)
        return help;
    struct buffer out = {0};
    buffer_append_string(
        &out, "Usage: adderd serve [FLAG...]\n"
              "\n"
              "Fine-tunes Mamba models and serves them over HTTP. A flag wins over its variable.\n");
    for (int i = 0; i < N_SETTINGS; i++) {
        const struct setting *setting = &settings[i];
        const char *shown = setting->shown ? setting->shown : setting->standard;
        buffer_printf(&out, "\n  --%s %s   (%s) [%s]", setting->flag, setting->argument, setting->variable,
                      shown);
        write_wrapped(&out, setting->help, 6, 88);
    }
    buffer_append_string(&out, "\n\n  -h, --help\n      this text\n");
    help = buffer_take(&out, NULL);
    return help ? help : "no memory for the help\n";
}

/* ---- flags and variables ---- */

static int parse_flags(int argc, char **argv, struct config *config, bool *ret_given, struct error *error)
{
    struct option options[N_SETTINGS + 2] = {0};
    for (int i = 0; i < N_SETTINGS; i++)
        options[i] = (struct option){settings[i].flag, required_argument, NULL, FIRST_CODE + i};
    options[N_SETTINGS] = (struct option){"help", no_argument, NULL, HELP_CODE};

    optind = 0; /* glibc: start over */
    opterr = 0;
    int c, at = 1;
    while ((c = getopt_long(argc, argv, "+:h", options, NULL)) != -1) {
        if (c == HELP_CODE) {
            fputs(config_help(), stdout);
            return 1;
        }
        if (c == ':')
            return error_set_param(error, ERROR_INVALID, argv[at], "%s needs a value", argv[at]);
        if (c < FIRST_CODE)
            return error_set_param(error, ERROR_INVALID, argv[at],
                                   "unknown flag %s (see adderd serve --help)", argv[at]);
        const struct setting *setting = &settings[c - FIRST_CODE];
        char where[64];
        snprintf(where, sizeof where, "--%s", setting->flag);
        int code = setting->set(config, setting, where, optarg, error);
        if (code)
            return code;
        ret_given[c - FIRST_CODE] = true;
        at = optind;
    }
    if (optind < argc)
        return error_set_param(error, ERROR_INVALID, argv[optind],
                               "unexpected '%s' (see adderd serve --help)", argv[optind]);
    return 0;
}

int config_parse(int argc, char **argv, struct config *ret_config, struct error *error)
{
    struct config config = {.log_format = getenv("JOURNAL_STREAM") ? LOG_JOURNAL : LOG_TEXT};
    bool given[N_SETTINGS] = {false};
    /* getopt wants a program's name first, and reorders nothing but this copy. */
    char program[] = "serve";
    char **args = calloc((size_t)argc + 2, sizeof *args);
    if (!args)
        return error_set(error, ERROR_NO_MEMORY, "no memory for the settings");
    args[0] = program;
    for (int i = 0; i < argc; i++)
        args[i + 1] = argv[i];
    int code = parse_flags(argc + 1, args, &config, given, error);
    free(args);
    for (int i = 0; !code && i < N_SETTINGS; i++) {
        const struct setting *setting = &settings[i];
        const char *value = getenv(setting->variable);
        if (given[i])
            continue;
        if (value && value[0])
            code = setting->set(&config, setting, setting->variable, value, error);
        else if (setting->standard)
            code = setting->set(&config, setting, setting->variable, setting->standard, error);
    }
    if (code) {
        config_free(&config);
        return code;
    }
    *ret_config = config;
    return 0;
}

void config_free(struct config *config)
{
    for (int i = 0; i < config->n_models_dirs; i++)
        free((void *)(uintptr_t)config->models_dirs[i]);
    for (int i = 0; i < config->n_devices; i++)
        free((void *)(uintptr_t)config->devices[i]);
    config->n_models_dirs = config->n_devices = 0;
}

bool config_is_loopback(const char *host)
{
    struct in_addr v4;
    struct in6_addr v6;
    if (!strcmp(host, "localhost"))
        return true;
    if (inet_pton(AF_INET, host, &v4) == 1)
        return ntohl(v4.s_addr) >> 24 == 127;
    if (inet_pton(AF_INET6, host, &v6) == 1)
        return IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
    return false;
}
