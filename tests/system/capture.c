/*
 * capture.c - every frame of a device, both ways, for guests without Python (see talk.py).
 *
 *   capture DEVICE FILE
 *             Prints "ready"; on SIGTERM writes what its packet socket has gathered and prints how
 *             many frames did not fit it. A record: type (0 to us, 4 from us), length (32 bits,
 *             little-endian), virtio-net header of 10 bytes, frame.
 * Limits      256 MiB of buffer, which no test fills. x86: byte order as it comes.
 */
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <arpa/inet.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static void check(int failed, const char *what)
{
    if (failed) {
        perror(what);
        exit(1);
    }
}

int main(int argc, char *argv[])
{
    static char frame[1 << 17];
    struct sockaddr_ll place = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    struct tpacket_stats lost;
    socklen_t size = sizeof(lost);
    int bytes = 256 << 20, on = 1, fd, number;
    sigset_t term;
    FILE *file;

    check(argc != 3, "usage: capture DEVICE FILE");
    place.sll_ifindex = if_nametoindex(argv[1]);
    check(!(file = fopen(argv[2], "w")), argv[2]);
    check((fd = socket(AF_PACKET, SOCK_RAW, 0)) < 0, "socket");
    check(setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes)), "SO_RCVBUFFORCE");
    check(setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof(on)), "PACKET_VNET_HDR");
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    check(bind(fd, (struct sockaddr *)&place, sizeof(place)), argv[1]);
    puts("ready");
    fflush(stdout);
    sigwait(&term, &number);
    for (;;) {
        struct sockaddr_ll from;
        socklen_t length = sizeof(from);
        ssize_t n = recvfrom(fd, frame, sizeof(frame), MSG_DONTWAIT, (struct sockaddr *)&from,
                             &length);
        uint32_t written = n;

        if (n < 0)
            break;
        fputc(from.sll_pkttype, file);
        fwrite(&written, sizeof(written), 1, file);
        fwrite(frame, 1, n, file);
    }
    check(fclose(file), argv[2]);
    check(getsockopt(fd, SOL_PACKET, PACKET_STATISTICS, &lost, &size), "PACKET_STATISTICS");
    printf("lost %u\n", lost.tp_drops);
    return 0;
}
