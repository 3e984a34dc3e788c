/* serve.c: `adderd-bench serve`: the daemon as its clients feel it. Starts a real one on a free port with a
 * folder of its own, times the start to /readyz, reads its resident memory, sets a training job going, and
 * then measures GET /v1/models over many keep-alive connections, each asking again as soon as it was
 * answered. Single-threaded; the daemon is a child process. */
#include "tools/bench/bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CONNECTIONS = 64, ANSWER_BYTES = 1 << 16 };

static int connect_to(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1;
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

/* Has the whole answer come (headers and Content-Length bytes)? */
static bool answer_whole(const char *answer, size_t length)
{
    const char *end = memmem(answer, length, "\r\n\r\n", 4);
    const char *header = end ? strcasestr(answer, "content-length:") : NULL;
    return header && header < end && length >= (size_t)(end - answer) + 4 + strtoul(header + 15, NULL, 10);
}

/* One request on a connection of its own. Returns the status, 0 when there was no answer; the body goes to
 * answer. */
static int ask(int port, const char *method, const char *path, const char *type, const char *body,
               size_t length, char answer[ANSWER_BYTES])
{
    int fd = connect_to(port);
    if (fd < 0)
        return 0;
    char head[512];
    int n = snprintf(head, sizeof head,
                     "%s %s HTTP/1.1\r\nHost: bench\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n",
                     method, path, type, length);
    size_t got = 0;
    if (write(fd, head, (size_t)n) == n && (!length || write(fd, body, length) == (ssize_t)length)) {
        ssize_t more;
        while (got < ANSWER_BYTES - 1 && (more = read(fd, answer + got, ANSWER_BYTES - 1 - got)) > 0) {
            got += (size_t)more;
            answer[got] = '\0';
            if (answer_whole(answer, got))
                break;
        }
    }
    answer[got] = '\0';
    close(fd);
    return got > 12 ? atoi(answer + 9) : 0;
}

/* The value of a string member of a flat answer, good enough for ids we made ourselves. */
static bool read_member(const char *answer, const char *key, char *value, size_t size)
{
    char pattern[64];
    snprintf(pattern, sizeof pattern, "\"%s\"", key);
    const char *at = strstr(answer, pattern);
    at = at ? strchr(at + strlen(pattern), '"') : NULL;
    const char *end = at ? strchr(at + 1, '"') : NULL;
    if (!end || (size_t)(end - at) > size)
        return false;
    snprintf(value, size, "%.*s", (int)(end - at - 1), at + 1);
    return true;
}

static double resident_mib(pid_t pid)
{
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "r");
    double mib = 0;
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, "VmRSS:", 6))
            mib = atof(line + 6) / 1024;
    if (file)
        fclose(file);
    return mib;
}

static pid_t start_daemon(const char *adderd, const char *models, const char *folder, int *ret_port)
{
    char data[300], port_file[300], log[300];
    snprintf(data, sizeof data, "%s/data", folder);
    snprintf(port_file, sizeof port_file, "%s/port", folder);
    snprintf(log, sizeof log, "%s/log", folder);
    pid_t pid = fork();
    if (pid == 0) {
        int fd = open(log, O_WRONLY | O_CREAT, 0600);
        if (fd >= 0) {
            dup2(fd, 1);
            dup2(fd, 2);
        }
        execl(adderd, adderd, "serve", "--listen", "127.0.0.1:0", "--port-file", port_file, "--data-dir",
              data, "--models-dir", models, "--device", "cpu", (char *)NULL);
        _exit(127);
    }
    *ret_port = 0;
    static char answer[ANSWER_BYTES];
    for (int i = 0; pid > 0 && i < 20000; i++) {
        FILE *file = *ret_port ? NULL : fopen(port_file, "r");
        if (file && fscanf(file, "%*[^:]:%d", ret_port) != 1)
            *ret_port = 0;
        if (file)
            fclose(file);
        if (*ret_port && ask(*ret_port, "GET", "/readyz", "text/plain", NULL, 0, answer) == 200)
            return pid;
        usleep(1000);
    }
    return pid;
}

/* Upload stories and start a job that outlasts the measurement. */
static bool start_job(int port)
{
    static char answer[ANSWER_BYTES], body[65536];
    static const char head[] = "--bench\r\nContent-Disposition: form-data; "
                               "name=\"purpose\"\r\n\r\nfine-tune\r\n--bench\r\nContent-Disposition: "
                               "form-data; name=\"file\"; filename=\"bench.jsonl\"\r\n\r\n";
    size_t length = (size_t)snprintf(body, sizeof body, "%s", head);
    for (int i = 0; i < 64; i++)
        length += (size_t)snprintf(
            body + length, sizeof body - length,
            "{\"text\": \"Once upon a time there was a small fox, number %d, who wanted to see the sea. He "
            "walked "
            "over the hill and through the wood, and every bird he met told him another way to go.\"}\n",
            i);
    length += (size_t)snprintf(body + length, sizeof body - length, "\r\n--bench--\r\n");
    char file[100], id[100], path[256];
    if (ask(port, "POST", "/v1/files", "multipart/form-data; boundary=bench", body, length, answer) != 200 ||
        !read_member(answer, "id", file, sizeof file))
        return false;
    length = (size_t)snprintf(body, sizeof body,
                              "{\"model\":\"hatchling\",\"training_file\":\"%s\",\"hyperparameters\":{\"n_"
                              "epochs\":50,\"max_steps\":100000,"
                              "\"max_seq_len\":256}}",
                              file);
    if (ask(port, "POST", "/v1/fine_tuning/jobs", "application/json", body, length, answer) != 200 ||
        !read_member(answer, "id", id, sizeof id))
        return false;
    snprintf(path, sizeof path, "/v1/fine_tuning/jobs/%s", id);
    for (int i = 0; i < 1000; i++) {
        char status[32];
        if (ask(port, "GET", path, "text/plain", NULL, 0, answer) == 200 &&
            read_member(answer, "status", status, sizeof status) && !strcmp(status, "running"))
            return true;
        usleep(10000);
    }
    return false;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct connection {
    double asked;
    size_t got;
    char answer[16384];
};

/* Every connection asks, waits for the whole answer and asks again, for `seconds`. Returns how many answers
 * came; their times go to latencies [capacity], sorted. */
static size_t load(int port, double seconds, double *latencies, size_t capacity)
{
    static const char request[] = "GET /v1/models HTTP/1.1\r\nHost: bench\r\n\r\n";
    static struct connection connections[CONNECTIONS];
    struct pollfd fds[CONNECTIONS];
    size_t count = 0;
    double end = bench_now() + seconds;
    for (int i = 0; i < CONNECTIONS; i++) {
        fds[i] = (struct pollfd){.fd = connect_to(port), .events = POLLIN};
        connections[i].got = 0;
        connections[i].asked = bench_now();
        if (fds[i].fd >= 0 && write(fds[i].fd, request, sizeof request - 1) < 0)
            fds[i].events = 0;
    }
    while (bench_now() < end && count < capacity) {
        if (poll(fds, CONNECTIONS, 1000) < 0 && errno != EINTR)
            break;
        for (int i = 0; i < CONNECTIONS; i++) {
            struct connection *c = &connections[i];
            if (!fds[i].revents)
                continue;
            ssize_t n = read(fds[i].fd, c->answer + c->got, sizeof c->answer - 1 - c->got);
            if (n <= 0) {
                close(fds[i].fd);
                fds[i].fd = -1;
                continue;
            }
            c->got += (size_t)n;
            c->answer[c->got] = '\0';
            if (!answer_whole(c->answer, c->got))
                continue;
            double now = bench_now();
            if (count < capacity)
                latencies[count++] = now - c->asked;
            c->got = 0;
            c->asked = now;
            if (write(fds[i].fd, request, sizeof request - 1) < 0)
                fds[i].events = 0;
        }
    }
    for (int i = 0; i < CONNECTIONS; i++)
        if (fds[i].fd >= 0)
            close(fds[i].fd);
    qsort(latencies, count, sizeof *latencies, compare_doubles);
    return count;
}

int bench_serve(const struct bench_options *options, struct bench_report *report)
{
    char folder[] = "/tmp/adderd-bench-XXXXXX", command[128];
    size_t capacity = 4000000;
    double *latencies = malloc(capacity * sizeof *latencies);
    if (!latencies || !mkdtemp(folder)) {
        free(latencies);
        return 1;
    }
    int port, failed = 1;
    double began = bench_now();
    pid_t pid = start_daemon(options->adderd, options->models, folder, &port);
    double ready = bench_now() - began;
    if (port) {
        bench_row(report, "start to /readyz", ready, "s", NULL);
        bench_row(report, "resident, daemon, idle", resident_mib(pid), "MiB", NULL);
        bool training = start_job(port);
        size_t count = load(port, 8, latencies, capacity);
        if (training && count > 100) {
            char note[96];
            snprintf(note, sizeof note, "%d connections, %zu answers, a job training", CONNECTIONS, count);
            bench_row(report, "GET /v1/models p50", 1e3 * latencies[count / 2], "ms", note);
            bench_row(report, "GET /v1/models p99", 1e3 * latencies[count - count / 100 - 1], "ms", note);
            bench_row(report, "resident, daemon, under load", resident_mib(pid), "MiB", NULL);
            failed = 0;
        }
    }
    if (pid > 0) {
        kill(pid, SIGTERM);
        waitpid(pid, NULL, 0);
    }
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (system(command))
        fprintf(stderr, "left behind: %s\n", folder);
    free(latencies);
    return failed;
}
