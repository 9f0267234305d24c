/* The floor under consuming paced streams: epoll_wait, one recv an event, perhaps one send an event, and nothing else.

   floor HOST PORT STREAMS SETTLE_S WINDOW_S SEND BODY

   Opens STREAMS connections to a streaming provider (pacer.py), posts BODY on each, and for WINDOW_S seconds reads what
   comes, an event a read if the provider sends so, finding none of its bounds: it counts "data: " in the bytes. With SEND 1
   it also writes every read to one loopback connection that a child process drains, as a relay would. Prints one line of JSON:
   the CPU time of this process (user and system) an event, and how often each call was made an event. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 16];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double wall(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double cpu(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int dial(const char *host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || inet_pton(AF_INET, host, &address.sin_addr) != 1) fail("socket");
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

/* A connection to a child that reads all that comes and drops it. */
static int sink(pid_t *child) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1)) fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    if ((*child = fork()) == 0) {
        int fd = accept(listener, NULL, NULL);
        while (read(fd, buffer, sizeof buffer) > 0) {}
        _exit(0);
    }
    int fd = dial("127.0.0.1", ntohs(address.sin_port));
    close(listener);
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 8) return 2;
    int streams = atoi(argv[3]), sending = atoi(argv[6]), out = -1;
    double settle_s = atof(argv[4]), window_s = atof(argv[5]);
    pid_t child = 0;
    struct epoll_event ready[1024];
    int poll = epoll_create1(EPOLL_CLOEXEC);
    if (sending) out = sink(&child);
    for (int i = 0; i < streams; i++) {
        char request[4096];
        int fd = dial(argv[1], atoi(argv[2]));
        int length = snprintf(request, sizeof request,
                              "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n\r\n%s",
                              strlen(argv[7]), argv[7]);
        if (send(fd, request, length, 0) != length) fail("send");
        fcntl(fd, F_SETFL, O_NONBLOCK);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
    }
    double begin = wall() + settle_s, end = begin + window_s, began = 0, used = 0;
    long events = 0, waits = 0, reads = 0;
    int counting = 0;
    for (;;) {
        int n = epoll_wait(poll, ready, 1024, 100);
        double now = wall();
        if (!counting && now >= begin) {
            counting = 1, began = now, events = waits = reads = 0;
            used = cpu();
        } else if (now >= end) {
            break;
        }
        waits++;
        for (int i = 0; i < n; i++) {
            ssize_t got = recv(ready[i].data.fd, buffer, sizeof buffer, 0);
            if (got <= 0) fail("recv");
            reads++;
            for (char *at = buffer; (at = memmem(at, buffer + got - at, "data: ", 6)); at += 6) events++;
            if (sending && send(out, buffer, got, 0) != got) fail("send to the sink");
        }
    }
    used = cpu() - used;
    printf("{\"cpu_us\": %.3f, \"waits\": %.3f, \"reads\": %.3f, \"events\": %ld, \"wall\": %.3f}\n",
           1e6 * used / events, (double)waits / events, (double)reads / events, events, wall() - began);
    if (child) {
        kill(child, SIGTERM);
        waitpid(child, NULL, 0);
    }
    return 0;
}
