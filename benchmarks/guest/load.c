/*
 * load.c - every load of the benchmarks, both ends of the path.
 *
 * Theory      One static program, so that every guest runs the same load, one without Python too, and
 *             so that the load generator is not what is measured. The client asks over TCP; whoever
 *             receives counts, and the client prints one line of JSON.
 *
 *   load serve PORT
 *             Streams and datagrams on PORT, echo on PORT + 1 .. PORT + ECHO_SERVERS, a process
 *             each, echo of one request a connection on PORT + 9; prints "ready".
 *   load tcp up|down ADDRESS PORT SECONDS STREAMS          {"bytes", "seconds", "longest_gap_ms",
 *             "stalls"}: the longest time in which one of them brought nothing, and how often
 *             that was STALLED_MS.
 *   load slow up ADDRESS PORT SECONDS STREAMS              the same
 *             The receiver takes SLOW_BYTES every SLOW_MS, of its streams in turn.
 *   load udp up|down ADDRESS PORT SECONDS SIZE TRAIN       {"datagrams", "seconds", "sent"}
 *             Datagrams as fast as they go, TRAIN of them to a message (UDP_SEGMENT).
 *   load rr both ADDRESS PORT SECONDS CONNECTIONS          {"transactions", "seconds", "p50_us", ...}
 *             64 bytes there and back, one at a time, over so many open connections in turn; says
 *             {"open"} when each has been answered once, and {"begin"}. With many connections also
 *             {"open_first_per_s", "open_last_per_s"}: how fast the first and the last tenth opened.
 *   load crr both ADDRESS PORT SECONDS 1                   the same, a connection for each
 *   Anything that goes wrong: {"error"} and status 1.
 *
 * On the wire Four big-endian 64-bit words: kind, milliseconds, size (of streams: how many there are),
 *             train. Streams follow; the side that received sends what it counted (count,
 *             microseconds, for streams the longest gap in microseconds and how many were stalls).
 *             For datagrams the server first tells its port, and control is the TCP connection.
 * Limits      No operation waits longer than STALL_S. With crr the server closes first: that side
 *             keeps the port for a minute, and the client has few.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { STALL_S = 20, CHUNK = 128 << 10, BATCH = 32, MESSAGE_MAX = 1 << 16, QUIET_MS = 200 };
enum { SLOW_BYTES = 64 << 10, SLOW_MS = 2, STALLED_MS = 200 };
enum { TCP_UP = 1, TCP_DOWN, TCP_SLOW, UDP_UP, UDP_DOWN };

static char chunk[CHUNK];

static void die(const char *what)
{
    printf("{\"error\": \"%s: %s\"}\n", what, errno ? strerror(errno) : "peer misbehaved");
    exit(1);
}

static uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

/* ---- sockets ---- */

static void patience(int fd, int milliseconds)
{
    struct timeval limit = {milliseconds / 1000, milliseconds % 1000 * 1000};

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
}

static int connected(const char *address, int port, int type)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, type, 0), on = 1;

    if (fd < 0)
        die("socket");
    patience(fd, STALL_S * 1000);
    inet_pton(AF_INET, address, &to.sin_addr);
    if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
        die("connect");
    if (type == SOCK_STREAM)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    return fd;
}

static int bound(int port, int type)
{
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, type, 0), on = 1;

    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    for (int tries = STALL_S * 20; bind(fd, (struct sockaddr *)&any, sizeof(any)); tries--) {
        if (errno != EADDRINUSE || !tries)
            die("bind");
        usleep(50000); /* the server before this one is about to end */
    }
    if (type == SOCK_STREAM && listen(fd, 4096))
        die("listen");
    return fd;
}

static void send_words(int fd, const uint64_t *words, int count)
{
    uint64_t wire[4];

    for (int i = 0; i < count; i++)
        wire[i] = htobe64(words[i]);
    if (send(fd, wire, 8 * count, MSG_NOSIGNAL) != 8 * count)
        die("send");
}

static void recv_words(int fd, uint64_t *words, int count)
{
    errno = 0;
    if (recv(fd, words, 8 * count, MSG_WAITALL) != 8 * count)
        die("receive");
    for (int i = 0; i < count; i++)
        words[i] = be64toh(words[i]);
}

/* ---- streams ---- */

/* A send that waits for ever is the receiver's to report. */
static void send_stream(int fd, uint64_t milliseconds)
{
    uint64_t end_us = now_us() + milliseconds * 1000;

    patience(fd, milliseconds);
    while (now_us() < end_us)
        if (send(fd, chunk, CHUNK, MSG_NOSIGNAL) <= 0 && errno != EAGAIN)
            die("send");
    shutdown(fd, SHUT_WR);
    patience(fd, STALL_S * 1000);
}

/* Something has come, or the time is over, which ends a gap, too; now. */
static uint64_t note_gap(uint64_t *last_us, uint64_t counted[4])
{
    uint64_t now = now_us(), gap_us = now - *last_us;

    counted[2] = gap_us > counted[2] ? gap_us : counted[2];
    counted[3] += gap_us >= STALLED_MS * 1000;
    *last_us = now;
    return now;
}

/* What comes in that time: a stream that stalls counts with what it moved. */
static void recv_stream(int fd, uint64_t milliseconds, uint64_t counted[4])
{
    uint64_t start_us = now_us(), end_us = start_us + milliseconds * 1000, last_us = start_us;
    ssize_t n;

    patience(fd, milliseconds);
    do {
        n = recv(fd, chunk, CHUNK, 0);
        if (n < 0 && errno != EAGAIN)
            die("receive");
        counted[0] += n > 0 ? n : 0;
    } while (note_gap(&last_us, counted) < end_us && n > 0);
    counted[1] = n < 0 ? milliseconds * 1000 : last_us - start_us;
    patience(fd, STALL_S * 1000);
}

/* The same for a receiver that is slow. */
static void recv_slowly(int fd, uint64_t milliseconds, int streams, uint64_t counted[4])
{
    uint64_t start_us = now_us(), end_us = start_us + milliseconds * 1000, last_us = start_us, now;
    ssize_t n;

    do {
        n = recv(fd, chunk, SLOW_BYTES, MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN)
            die("receive");
        now = now_us();
        if (n >= 0 || now >= end_us) {
            counted[0] += n > 0 ? n : 0;
            note_gap(&last_us, counted);
        }
        usleep(SLOW_MS * 1000 * streams);
    } while (n && now < end_us);
    counted[1] = now - start_us;
}

static void stream(char *argv[], int kind, int result)
{
    uint64_t words[4] = {kind, atof(argv[2]) * 1000, atoi(argv[3]), 0}, counted[4] = {0};
    struct linger reset = {1, 0}; /* what is still on its way must not load the next run */
    int fd = connected(argv[0], atoi(argv[1]), SOCK_STREAM);

    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    send_words(fd, words, 4);
    if (kind == TCP_DOWN) {
        recv_stream(fd, words[1], counted);
    } else {
        send_stream(fd, words[1]);
        recv_words(fd, counted, 4);
    }
    if (write(result, counted, sizeof(counted)) != sizeof(counted))
        exit(1);
}

static void run_streams(char *argv[], int kind)
{
    uint64_t bytes = 0, longest_us = 0, gap_us = 0, stalls = 0, counted[4];
    int streams = atoi(argv[3]), result[2], failed = 0, status;

    if (pipe(result))
        die("pipe");
    for (int i = 0; i < streams; i++)
        if (!fork()) {
            stream(argv, kind, result[1]);
            exit(0);
        }
    close(result[1]);
    while (read(result[0], counted, sizeof(counted)) == sizeof(counted)) {
        bytes += counted[0];
        longest_us = counted[1] > longest_us ? counted[1] : longest_us;
        gap_us = counted[2] > gap_us ? counted[2] : gap_us;
        stalls += counted[3];
    }
    while (wait(&status) > 0)
        failed |= status;
    if (failed)
        exit(1); /* the child has said why */
    printf("{\"bytes\": %llu, \"seconds\": %.6f", (unsigned long long)bytes, longest_us / 1e6);
    printf(", \"longest_gap_ms\": %.1f, \"stalls\": %llu}\n", gap_us / 1e3,
           (unsigned long long)stalls);
}

/* ---- datagrams ---- */

static uint64_t send_datagrams(int fd, uint64_t milliseconds, int size, int train)
{
    struct iovec part = {chunk, (size_t)size * train};
    char control[CMSG_SPACE(sizeof(uint16_t))] = {0};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    struct mmsghdr messages[BATCH];
    uint64_t sent = 0, end_us = now_us() + milliseconds * 1000;

    if (train > 1) {
        header.msg_control = control;
        header.msg_controllen = sizeof(control);
        struct cmsghdr *word = CMSG_FIRSTHDR(&header);
        word->cmsg_level = SOL_UDP;
        word->cmsg_type = UDP_SEGMENT;
        word->cmsg_len = CMSG_LEN(sizeof(uint16_t));
        *(uint16_t *)CMSG_DATA(word) = size;
    }
    for (int i = 0; i < BATCH; i++)
        messages[i].msg_hdr = header;
    while (now_us() < end_us) {
        int n = sendmmsg(fd, messages, BATCH, 0);

        if (n > 0)
            sent += (uint64_t)n * train;
        else if (errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED)
            die("sendmmsg");
    }
    return sent;
}

/* Until `control` has ended and nothing came for QUIET_MS. counted: datagrams, and microseconds from
 * the first to the last, but no less than they were sent for. words: the request. */
static void recv_datagrams(int fd, int control, const uint64_t words[4], uint64_t counted[2])
{
    static char room[BATCH][MESSAGE_MAX];
    struct iovec parts[BATCH];
    struct mmsghdr messages[BATCH] = {0};
    uint64_t bytes = 0, first_us = 0, last_us = 0, end_us = now_us() + STALL_S * 1000000ull;
    int buffer = 8 << 20, on = 1;
    char byte;

    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof(buffer));
    setsockopt(fd, SOL_UDP, UDP_GRO, &on, sizeof(on));
    patience(fd, QUIET_MS);
    for (int i = 0; i < BATCH; i++) {
        parts[i] = (struct iovec){room[i], MESSAGE_MAX};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
    }
    while (now_us() < end_us) {
        int n = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL);

        if (n <= 0 && recv(control, &byte, 1, MSG_DONTWAIT) == 0)
            break;
        for (int i = 0; i < n; i++)
            bytes += messages[i].msg_len;
        if (n > 0) {
            last_us = now_us();
            first_us = first_us ? first_us : last_us;
        }
    }
    counted[0] = bytes / words[2];
    counted[1] = last_us - first_us > words[1] * 1000 ? last_us - first_us : words[1] * 1000;
}

static void print_datagrams(const uint64_t counted[2], uint64_t sent)
{
    printf("{\"datagrams\": %llu, \"seconds\": %.6f, \"sent\": %llu}\n",
           (unsigned long long)counted[0], counted[1] / 1e6, (unsigned long long)sent);
}

static void run_datagrams(char *argv[], int up)
{
    uint64_t words[4] = {up ? UDP_UP : UDP_DOWN, atof(argv[2]) * 1000, atoi(argv[3]), atoi(argv[4])};
    uint64_t port, counted[2], sent = 0;
    int control = connected(argv[0], atoi(argv[1]), SOCK_STREAM), fd;

    send_words(control, words, 4);
    recv_words(control, &port, 1);
    fd = connected(argv[0], port, SOCK_DGRAM);
    if (up) {
        sent = send_datagrams(fd, words[1], words[2], words[3]);
        shutdown(control, SHUT_WR);
        recv_words(control, counted, 2);
    } else {
        send(fd, chunk, 1, 0); /* opens the way back */
        recv_datagrams(fd, control, words, counted);
    }
    print_datagrams(counted, sent);
}

static void serve_datagrams(int control, const uint64_t words[4])
{
    struct sockaddr_in name;
    socklen_t size = sizeof(name);
    int fd = bound(0, SOCK_DGRAM);
    uint64_t port, counted[2];
    char byte;

    getsockname(fd, (struct sockaddr *)&name, &size);
    port = ntohs(name.sin_port);
    send_words(control, &port, 1);
    if (words[0] == UDP_UP) {
        recv_datagrams(fd, control, words, counted);
        send_words(control, counted, 2);
        return;
    }
    patience(fd, STALL_S * 1000);
    if (recvfrom(fd, &byte, 1, 0, (struct sockaddr *)&name, &size) < 0)
        die("no datagram");
    connect(fd, (struct sockaddr *)&name, size);
    send_datagrams(fd, words[1], words[2], words[3]);
}

#include "load_rr.h"

/* ---- the server ---- */

static void serve_connection(int fd)
{
    uint64_t words[4], counted[4] = {0};

    patience(fd, STALL_S * 1000);
    recv_words(fd, words, 4);
    if (words[0] == TCP_UP || words[0] == TCP_SLOW) {
        if (words[0] == TCP_UP)
            recv_stream(fd, words[1], counted);
        else
            recv_slowly(fd, words[1], words[2], counted);
        send_words(fd, counted, 4);
        while (recv(fd, chunk, CHUNK, 0) > 0)
            ; /* closing now would reset the connection under the answer */
    } else if (words[0] == TCP_DOWN) {
        send_stream(fd, words[1]);
    } else {
        serve_datagrams(fd, words);
    }
}

static void serve(int port)
{
    int listener = bound(port, SOCK_STREAM);

    signal(SIGCHLD, SIG_IGN);
    for (int i = 1; i <= ONCE_PORT; i++) {
        int echo = bound(port + i, SOCK_STREAM);

        if (!fork()) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            serve_echo(echo, i == ONCE_PORT);
        }
        close(echo);
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);

        if (fd >= 0 && !fork()) {
            serve_connection(fd);
            exit(0);
        }
        close(fd);
    }
}

int main(int argc, char *argv[])
{
    struct rlimit files;

    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (argc == 3 && !strcmp(argv[1], "serve"))
        serve(atoi(argv[2]));
    if (argc == 7 && !strcmp(argv[1], "tcp"))
        run_streams(argv + 3, strcmp(argv[2], "up") ? TCP_DOWN : TCP_UP);
    else if (argc == 7 && !strcmp(argv[1], "slow"))
        run_streams(argv + 3, TCP_SLOW);
    else if (argc == 8 && !strcmp(argv[1], "udp"))
        run_datagrams(argv + 3, !strcmp(argv[2], "up"));
    else if (argc == 7 && !strcmp(argv[1], "rr"))
        run_transactions(argv + 3);
    else if (argc == 7 && !strcmp(argv[1], "crr"))
        run_connections(argv + 3);
    else {
        fputs("usage: see the top of load.c\n", stderr);
        return 2;
    }
    return 0;
}
