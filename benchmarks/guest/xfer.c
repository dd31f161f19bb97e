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
 *   xfer up|down ADDRESS PORT BYTES STREAMS SEED
 *             STREAMS parallel connections; prints a line for each:
 *             direction, stream, bytes, sender's digest, receiver's digest, seconds.
 *   xfer udp ADDRESS PORT COUNT SIZE
 *             Datagrams in lockstep; prints: udp, COUNT, answered, wrong.
 *
 * On the wire Header: three big-endian 64-bit words (1 = up, 2 = down; bytes; seed). Then up: the
 *             client sends the bytes and FIN, the server answers with its digest; down: the server
 *             sends the bytes and its digest. Then FIN.
 * Limits      Every socket operation gives up after STALL_S seconds: nothing waits for ever.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "sha256.h"

enum { STALL_S = 20, CHUNK = 1 << 16, DATAGRAM_MAX = 65507, UP = 1, DOWN = 2 };

static void die(const char *what)
{
    fprintf(stderr, "xfer: %s: %s\n", what, errno ? strerror(errno) : "peer misbehaved");
    exit(1);
}

/* ---- sockets ---- */

static void set_timeouts(int fd)
{
    struct timeval stall = {.tv_sec = STALL_S};

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof(stall));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &stall, sizeof(stall));
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

static void recv_stream(int fd, uint64_t bytes, uint8_t digest[32])
{
    static uint8_t chunk[CHUNK];
    struct sha256 sha;

    sha256_start(&sha);
    for (uint64_t done = 0; done < bytes;) {
        ssize_t n = recv(fd, chunk, bytes - done < CHUNK ? bytes - done : CHUNK, 0);

        errno = n ? errno : 0;
        if (n <= 0)
            die("recv");
        sha256_add(&sha, chunk, n);
        done += n;
    }
    sha256_end(&sha, digest);
}

static void serve_connection(int fd)
{
    uint64_t header[3];
    uint8_t digest[32];

    set_timeouts(fd);
    recv_all(fd, header, sizeof(header));
    if (be64toh(header[0]) == UP) {
        recv_stream(fd, be64toh(header[1]), digest);
        expect_end(fd);
    } else {
        send_stream(fd, be64toh(header[1]), be64toh(header[2]), digest);
    }
    send_all(fd, digest, sizeof(digest));
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

static double now_s(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void transfer(int direction, char *argv[], int stream)
{
    uint64_t bytes = strtoull(argv[2], NULL, 0);
    uint64_t seed = strtoull(argv[4], NULL, 0) + ((uint64_t)stream << 40);
    uint64_t header[3] = {htobe64(direction), htobe64(bytes), htobe64(seed)};
    uint8_t digest[2][32]; /* sender's, receiver's */
    double start_s = now_s();
    int fd = connected(argv[0], argv[1], SOCK_STREAM);

    send_all(fd, header, sizeof(header));
    if (direction == UP) {
        send_stream(fd, bytes, seed, digest[0]);
        shutdown(fd, SHUT_WR);
        recv_all(fd, digest[1], 32);
    } else {
        recv_stream(fd, bytes, digest[1]);
        recv_all(fd, digest[0], 32);
    }
    expect_end(fd);
    printf("%s %d %llu", direction == UP ? "up" : "down", stream, (unsigned long long)bytes);
    print_digest(digest[0]);
    print_digest(digest[1]);
    printf(" %.3f\n", now_s() - start_s);
}

static int transfers(int direction, char *argv[])
{
    int streams = atoi(argv[3]), failures = 0, status;

    for (int stream = 0; stream < streams; stream++)
        if (!fork()) {
            transfer(direction, argv, stream);
            exit(0);
        }
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
    if (argc == 7 && !strcmp(argv[1], "up"))
        return transfers(UP, argv + 2);
    if (argc == 7 && !strcmp(argv[1], "down"))
        return transfers(DOWN, argv + 2);
    if (argc == 6 && !strcmp(argv[1], "udp"))
        return ask_datagrams(argv + 2);
    fputs("usage: see the top of xfer.c\n", stderr);
    return 2;
}
