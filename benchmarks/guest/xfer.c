/*
 * xfer.c - the traffic that the system tests send, on both ends of the path.
 *
 * Theory      One static program plays every part, in the guest and behind the back-end. Bytes come
 *             from a counter-based generator (splitmix64), so every stream differs from every other
 *             and a byte that arrives twice, late or in a neighbour's stream changes the digest.
 *             Sender and receiver compute SHA-256 on their own; the client prints both digests and
 *             the test compares them.
 *
 *   xfer serve PORT
 *             TCP transfers and UDP echo on [::]:PORT (IPv4 too); prints "ready".
 *   xfer up|down ADDRESS PORT BYTES STREAMS SEED [HOP_MS]
 *             STREAMS parallel connections, each a process; with HOP_MS each is moved to the next
 *             CPU every so many milliseconds. Prints a line for each:
 *             direction, stream, bytes, sender's digest, receiver's digest, seconds, longest stall
 *             in seconds, when that began (the client's CLOCK_MONOTONIC), how often it was moved.
 *   xfer udp ADDRESS PORT COUNT SIZE
 *             Datagrams in lockstep; prints: udp, COUNT, answered, wrong.
 *
 * Stalls      A stall is a time in which no byte reached the receiver's program: sends only fill
 *             buffers, and would hide one. The receiver looks from its connection's first moment to
 *             the last byte, and connect() counts too. So a program that does not get a CPU stalls
 *             as well: compare with the same load undisturbed. A lost answer to an `up` that is
 *             whole does not show.
 *
 * On the wire Header: three big-endian 64-bit words (1 = up, 2 = down; bytes; seed). Then up: the
 *             client sends the bytes and FIN, the server answers with its digest and two such words
 *             (microseconds: its longest stall; from its accept() to when that began); down: the
 *             server sends the bytes and its digest. Then FIN.
 * Limits      Every socket operation gives up after PATIENCE_S seconds: nothing waits for ever.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "sha256.h"

enum { PATIENCE_S = 20, CHUNK = 1 << 16, DATAGRAM_MAX = 65507, UP = 1, DOWN = 2 };

static void die(const char *what)
{
    fprintf(stderr, "xfer: %s: %s\n", what, errno ? strerror(errno) : "peer misbehaved");
    exit(1);
}

static double now_s(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* ---- stalls ---- */

struct stall {
    double moved_s; /* the last time something moved */
    double longest_s, began_s;
};

static void note(struct stall *stall, double began_s, double length_s)
{
    if (length_s > stall->longest_s) {
        stall->longest_s = length_s;
        stall->began_s = began_s;
    }
}

static void moved(struct stall *stall)
{
    double now = now_s();

    note(stall, stall->moved_s, now - stall->moved_s);
    stall->moved_s = now;
}

/* ---- sockets ---- */

static void set_timeouts(int fd)
{
    struct timeval patience = {.tv_sec = PATIENCE_S};

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
}

static int connected(const char *address, const char *port, int type)
{
    int flags = AI_NUMERICHOST | AI_NUMERICSERV, fd;
    struct addrinfo hints = {.ai_socktype = type, .ai_flags = flags}, *found;

    errno = EINVAL;
    if (getaddrinfo(address, port, &hints, &found))
        die("address");
    fd = socket(found->ai_family, type, 0);
    if (fd < 0)
        die("socket");
    set_timeouts(fd);
    if (connect(fd, found->ai_addr, found->ai_addrlen))
        die("connect");
    freeaddrinfo(found);
    return fd;
}

static int bound(const char *port, int type)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
    int fd = socket(AF_INET6, type, 0), on = 1, off = 0;

    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof(on));
    if (bind(fd, (struct sockaddr *)&any, sizeof(any)))
        die("bind");
    return fd;
}

static void send_all(int fd, const void *data, size_t size)
{
    for (const char *p = data; size;) {
        ssize_t n = send(fd, p, size, MSG_NOSIGNAL);

        if (n <= 0)
            die("send");
        p += n;
        size -= n;
    }
}

static void recv_all(int fd, void *data, size_t size)
{
    errno = 0;
    if (recv(fd, data, size, MSG_WAITALL) != (ssize_t)size)
        die("recv");
}

static void expect_end(int fd)
{
    char byte;

    errno = 0;
    if (recv(fd, &byte, 1, 0) != 0)
        die("end of stream");
}

/* ---- transfers ---- */

static void generate(uint64_t *words, uint64_t seed, uint64_t first, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t z = seed + (first + i + 1) * 0x9e3779b97f4a7c15u;

        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        words[i] = z ^ z >> 31;
    }
}

static void send_stream(int fd, uint64_t bytes, uint64_t seed, uint8_t digest[32])
{
    static uint64_t words[CHUNK / 8];
    struct sha256 sha;

    sha256_start(&sha);
    for (uint64_t done = 0; done < bytes;) {
        size_t size = bytes - done < CHUNK ? bytes - done : CHUNK;

        generate(words, seed, done / 8, CHUNK / 8);
        send_all(fd, words, size);
        sha256_add(&sha, (uint8_t *)words, size);
        done += size;
    }
    sha256_end(&sha, digest);
}

static void recv_stream(int fd, uint64_t bytes, uint8_t digest[32], struct stall *stall)
{
    static uint8_t chunk[CHUNK];
    struct sha256 sha;

    sha256_start(&sha);
    for (uint64_t done = 0; done < bytes;) {
        ssize_t n = recv(fd, chunk, bytes - done < CHUNK ? bytes - done : CHUNK, 0);

        errno = n ? errno : 0;
        if (n <= 0)
            die("recv");
        moved(stall);
        sha256_add(&sha, chunk, n);
        done += n;
    }
    sha256_end(&sha, digest);
}

static void serve_connection(int fd)
{
    uint64_t header[3], words[2];
    uint8_t digest[32];
    double start_s = now_s();
    struct stall stall = {.moved_s = start_s};

    set_timeouts(fd);
    recv_all(fd, header, sizeof(header));
    if (be64toh(header[0]) == DOWN) {
        send_stream(fd, be64toh(header[1]), be64toh(header[2]), digest);
        send_all(fd, digest, sizeof(digest));
        return;
    }
    recv_stream(fd, be64toh(header[1]), digest, &stall);
    expect_end(fd);
    moved(&stall);
    send_all(fd, digest, sizeof(digest));
    words[0] = htobe64((uint64_t)(stall.longest_s * 1e6));
    words[1] = htobe64((uint64_t)((stall.began_s - start_s) * 1e6));
    send_all(fd, words, sizeof(words));
}

/* The control message that came in (IPV6_PKTINFO) goes out again: the answer leaves from the
 * address that was asked. */
static void echo_datagrams(int fd)
{
    static char data[DATAGRAM_MAX], control[256];
    struct sockaddr_in6 peer;

    for (;;) {
        struct iovec part = {data, sizeof(data)};
        struct msghdr message = {&peer, sizeof(peer), &part, 1, control, sizeof(control), 0};
        ssize_t n = recvmsg(fd, &message, 0);

        if (n < 0)
            continue;
        part.iov_len = n;
        sendmsg(fd, &message, 0);
    }
}

static void serve(const char *port)
{
    int listener = bound(port, SOCK_STREAM), datagrams = bound(port, SOCK_DGRAM);

    if (listen(listener, 128))
        die("listen");
    signal(SIGCHLD, SIG_IGN);
    if (!fork()) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        echo_datagrams(datagrams);
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

static void print_digest(const uint8_t digest[32])
{
    putchar(' ');
    for (int i = 0; i < 32; i++)
        printf("%02x", digest[i]);
}

static void recv_stall(int fd, double connected_s, struct stall *stall)
{
    uint64_t words[2];

    recv_all(fd, words, sizeof(words));
    note(stall, connected_s + be64toh(words[1]) / 1e6, be64toh(words[0]) / 1e6);
}

static void transfer(int direction, char *argv[], int stream, const int *hops)
{
    uint64_t bytes = strtoull(argv[2], NULL, 0);
    uint64_t seed = strtoull(argv[4], NULL, 0) + ((uint64_t)stream << 40);
    uint64_t header[3] = {htobe64(direction), htobe64(bytes), htobe64(seed)};
    uint8_t digest[2][32]; /* sender's, receiver's */
    double start_s = now_s();
    struct stall stall = {.moved_s = start_s};
    int fd = connected(argv[0], argv[1], SOCK_STREAM);

    moved(&stall);
    send_all(fd, header, sizeof(header));
    if (direction == UP) {
        send_stream(fd, bytes, seed, digest[0]);
        shutdown(fd, SHUT_WR);
        recv_all(fd, digest[1], 32);
        recv_stall(fd, stall.moved_s, &stall);
    } else {
        recv_stream(fd, bytes, digest[1], &stall);
        recv_all(fd, digest[0], 32);
        moved(&stall);
    }
    expect_end(fd);
    printf("%s %d %llu", direction == UP ? "up" : "down", stream, (unsigned long long)bytes);
    print_digest(digest[0]);
    print_digest(digest[1]);
    printf(" %.3f %.3f %.3f %d\n", now_s() - start_s, stall.longest_s, stall.began_s, *hops);
}

/* ---- CPUs ---- */

/* The next CPU of a set, round and round. */
static int cpu_after(int cpu, const cpu_set_t *set)
{
    do
        cpu = (cpu + 1) % CPU_SETSIZE;
    while (!CPU_ISSET(cpu, set));
    return cpu;
}

/* Move every stream to the next CPU each hop_ms, and reap those that end; how many failed.
 * Neighbours start on different CPUs. It is done from here, not by the streams themselves, so that
 * one that waits in the kernel moves as well. */
static int hop_until_all_end(pid_t *pids, int *hops, int streams, int hop_ms)
{
    double hop_s = hop_ms / 1e3, next_s = now_s() + hop_s;
    int cpus[streams], failures = 0, left = streams, status;
    cpu_set_t all, one;
    sigset_t ended;
    pid_t pid;

    sched_getaffinity(0, sizeof(all), &all);
    for (int i = 0; i < streams; i++)
        cpus[i] = cpu_after(i ? cpus[i - 1] : -1, &all);
    sigemptyset(&ended);
    sigaddset(&ended, SIGCHLD); /* blocked by transfers() */
    while (left) {
        double wait_s = next_s > now_s() ? next_s - now_s() : 0;
        struct timespec wait = {(time_t)wait_s, (long)((wait_s - (time_t)wait_s) * 1e9)};

        sigtimedwait(&ended, NULL, &wait);
        for (; (pid = waitpid(-1, &status, WNOHANG)) > 0; left--) {
            failures += status != 0;
            for (int i = 0; i < streams; i++)
                if (pids[i] == pid)
                    pids[i] = 0;
        }
        if (now_s() < next_s)
            continue;
        for (int i = 0; i < streams; i++) {
            CPU_ZERO(&one);
            CPU_SET(cpus[i] = cpu_after(cpus[i], &all), &one);
            hops[i] += pids[i] && !sched_setaffinity(pids[i], sizeof(one), &one);
        }
        next_s = now_s() > next_s + hop_s ? now_s() + hop_s : next_s + hop_s;
    }
    return failures;
}

static int transfers(int direction, char *argv[], int hop_ms)
{
    int streams = atoi(argv[3]), failures = 0, status;
    int *hops = mmap(NULL, streams * sizeof(*hops), PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t pids[streams];
    sigset_t ended;

    if (hops == MAP_FAILED)
        die("mmap");
    sigemptyset(&ended);
    sigaddset(&ended, SIGCHLD);
    sigprocmask(SIG_BLOCK, &ended, NULL);
    for (int stream = 0; stream < streams; stream++)
        if (!(pids[stream] = fork())) {
            transfer(direction, argv, stream, hops + stream);
            exit(0);
        }
    if (hop_ms)
        return hop_until_all_end(pids, hops, streams, hop_ms) != 0;
    while (wait(&status) > 0)
        failures += status != 0;
    return failures != 0;
}

static int ask_datagrams(char *argv[])
{
    static uint64_t sent[DATAGRAM_MAX / 8 + 1], got[DATAGRAM_MAX / 8 + 1];
    int fd = connected(argv[0], argv[1], SOCK_DGRAM), count = atoi(argv[2]), size = atoi(argv[3]);
    int answered = 0, wrong = 0, lost = 0;
    struct timeval wait = {.tv_sec = 1};

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
    for (int i = 0; i < count && lost < 5; i++) {
        generate(sent, i, 0, size / 8 + 1);
        if (send(fd, sent, size, 0) != size)
            die("send");
        ssize_t n = recv(fd, got, sizeof(got), 0);

        lost += n < 0;
        answered += n >= 0;
        wrong += n >= 0 && (n != size || memcmp(sent, got, size));
    }
    printf("udp %d %d %d\n", count, answered, wrong);
    return answered != count || wrong;
}

int main(int argc, char *argv[])
{
    if (argc == 3 && !strcmp(argv[1], "serve"))
        serve(argv[2]);
    if ((argc == 7 || argc == 8) && !strcmp(argv[1], "up"))
        return transfers(UP, argv + 2, argc == 8 ? atoi(argv[7]) : 0);
    if ((argc == 7 || argc == 8) && !strcmp(argv[1], "down"))
        return transfers(DOWN, argv + 2, argc == 8 ? atoi(argv[7]) : 0);
    if (argc == 6 && !strcmp(argv[1], "udp"))
        return ask_datagrams(argv + 2);
    fputs("usage: see the top of xfer.c\n", stderr);
    return 2;
}
