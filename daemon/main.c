/* main.c: `adderd serve | worker | keys | version`. */
#include "base/log.h"
#include "daemon/auth.h"
#include "daemon/config.h"
#include "daemon/server.h"
#include "engine/worker.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const level_names[] = {"debug", "info", "warn", "error"};
static const char *const format_names[] = {"text", "json", "journal"};

static void print_help(FILE *out)
{
    fputs("adderd: fine-tunes and serves Mamba models over HTTP\n\n"
          "  adderd serve [FLAGS]              serve; adderd serve --help lists the flags\n"
          "  adderd keys create NAME           make an API key and print it, once\n"
          "  adderd keys list | revoke ID      --data-dir DIR as with serve\n"
          "  adderd version\n\n"
          "  adderd worker                     owns one device; started by serve\n",
          out);
}

static int serve(int argc, char **argv)
{
    struct config config = {0};
    struct error error = {0};
    int code = config_parse(argc, argv, &config, &error);
    if (code) {
        if (code < 0)
            fprintf(stderr, "adderd serve: %s\n", error.message);
        config_free(&config);
        return code < 0 ? 2 : 0;
    }
    log_configure(config.log_level, config.log_format, "daemon");
    /* Workers log as we do. */
    setenv("ADDER_LOG_LEVEL", level_names[config.log_level], 1);
    setenv("ADDER_LOG_FORMAT", format_names[config.log_format], 1);
    int status = server_run(&config);
    config_free(&config);
    return status;
}

/* The index of a variable's value among names; 0-based, fallback when it is none of them. */
static int choose(const char *variable, const char *const *names, int count, int fallback)
{
    const char *value = getenv(variable);
    for (int i = 0; value && i < count; i++)
        if (!strcmp(value, names[i]))
            return i;
    return fallback;
}

static int number(const char *text, int *ret_number)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || !*text || *end || value < 0 || value > 65535)
        return -1;
    *ret_number = (int)value;
    return 0;
}

static int work(int argc, char **argv)
{
    static const struct option flags[] = {{"device", required_argument, NULL, 'd'},
                                          {"fd", required_argument, NULL, 'f'},
                                          {"threads", required_argument, NULL, 't'},
                                          {0}};
    struct worker_options options = {.fd = 3, .device = "cpu"};
    char who[48];
    int failed = 0;
    for (int flag; (flag = getopt_long(argc, argv, "", flags, NULL)) != -1;) {
        if (flag == 'd')
            options.device = optarg;
        else if (flag == 'f')
            failed |= number(optarg, &options.fd);
        else if (flag == 't')
            failed |= number(optarg, &options.threads);
        else
            failed = -1;
    }
    if (failed || optind != argc) {
        fputs("usage: adderd worker --device cpu|cuda:N [--fd N] [--threads N]\n"
              "It is started by `adderd serve`, which it speaks to over --fd.\n",
              stderr);
        return 2;
    }
    snprintf(who, sizeof who, "worker %s", options.device);
    log_configure((enum log_level)choose("ADDER_LOG_LEVEL", level_names, 4, LOG_INFO),
                  (enum log_format)choose("ADDER_LOG_FORMAT", format_names, 3, LOG_TEXT), who);
    return worker_run(&options);
}

int main(int argc, char **argv)
{
    const char *command = argc > 1 ? argv[1] : "";
    if (!strcmp(command, "serve"))
        return serve(argc - 2, argv + 2);
    if (!strcmp(command, "worker"))
        return work(argc - 1, argv + 1);
    if (!strcmp(command, "keys"))
        return auth_keys_command(argc - 2, argv + 2);
    if (!strcmp(command, "version") || !strcmp(command, "--version")) {
        puts("adderd " ADDERD_VERSION);
        return 0;
    }
    if (!strcmp(command, "help") || !strcmp(command, "--help")) {
        print_help(stdout);
        return 0;
    }
    print_help(stderr);
    return 2;
}
