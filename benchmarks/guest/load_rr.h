/*
 * load_rr.h - requests and responses, both ends; part of load.c.
 *
 * Theory      One request is in flight at any time, over one connection or a hundred thousand, so that
 *             the cases can be compared. A process may not open that many descriptors: more than
 *             ALONE_MAX belong to eight processes, which pass the turn around, and so do the server's.
 * Opening     All processes open theirs at once, one connection each at a time, and ask once over
 *             each: every conversation is known to be answered before the time begins.
 * Closing     The server closes first: that side keeps the port for a minute, and the client has few.
 */
enum { ECHO_SERVERS = 8, ONCE_PORT = ECHO_SERVERS + 1, REQUEST = 64, SAMPLES_MAX = 8 << 20 };
enum { ALONE_MAX = 1000, OPENING_MIN = 10000, TURN = 64, SETTLE_MS = 1000, LEAVE = 1 };

/* What the processes of a load share. Who has the turn writes the samples. */
struct shared {
    uint64_t opened, ready, begin_us, end_us, ended_us, done;
    uint64_t marks_us[4]; /* opening began, a tenth was open, all but a tenth were, all were */
    uint32_t took_us[SAMPLES_MAX];
};

static struct shared *shared;

static void share(double seconds)
{
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        die("mmap");
    shared->end_us = seconds * 1e6; /* from begin_us */
}

static void begin(void)
{
    puts("{\"begin\": true}");
    fflush(stdout);
    shared->begin_us = now_us();
    shared->end_us += shared->begin_us;
}

static void ask(int fd)
{
    char data[REQUEST];

    errno = 0;
    if (send(fd, chunk, REQUEST, MSG_NOSIGNAL) != REQUEST)
        die("send");
    if (recv(fd, data, REQUEST, MSG_WAITALL) != REQUEST)
        die("receive");
}

static void sample(uint64_t start_us)
{
    shared->took_us[shared->done++] = now_us() - start_us;
}

static int over(uint64_t start_us)
{
    return start_us >= shared->end_us || shared->done == SAMPLES_MAX;
}

static int by_size(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static void print_transactions(int connections)
{
    uint64_t done = shared->done, now = shared->ended_us, *marks_us = shared->marks_us;

    qsort(shared->took_us, done, sizeof(*shared->took_us), by_size);
    if (connections >= OPENING_MIN)
        printf("{\"open_first_per_s\": %.0f, \"open_last_per_s\": %.0f, ",
               connections / 10 * 1e6 / (marks_us[1] - marks_us[0]),
               connections / 10 * 1e6 / (marks_us[3] - marks_us[2]));
    printf("%s\"transactions\": %llu, \"seconds\": %.6f, \"p50_us\": %u, \"p99_us\": %u, "
           "\"max_us\": %u}\n",
           connections >= OPENING_MIN ? "" : "{", (unsigned long long)done,
           (now - shared->begin_us) / 1e6, shared->took_us[done / 2],
           shared->took_us[done * 99 / 100], shared->took_us[done - 1]);
    fflush(stdout); /* before thousands of connections are closed */
}

static void run_connections(char *argv[])
{
    uint64_t start_us;
    char byte;

    share(atof(argv[2]));
    begin();
    while (!over(start_us = now_us())) {
        int fd = connected(argv[0], atoi(argv[1]) + ONCE_PORT, SOCK_STREAM);

        ask(fd);
        if (recv(fd, &byte, 1, 0))
            die("more than a response");
        close(fd);
        sample(start_us);
    }
    shared->ended_us = now_us();
    print_transactions(0);
}

static void count_open(int connections)
{
    uint64_t open = __atomic_add_fetch(&shared->opened, 1, __ATOMIC_RELAXED), tenth = connections / 10;

    if (open == tenth)
        shared->marks_us[1] = now_us();
    if (open == connections - tenth)
        shared->marks_us[2] = now_us();
    if (open == (uint64_t)connections)
        shared->marks_us[3] = now_us();
}

/* One process: opens `count` connections, asks when a byte comes from `turn` and passes it to `next`
 * until the time is over, and closes when LEAVE comes. */
static void converse(char *argv[], int count, int turn, int next)
{
    int *fds = calloc(count, sizeof(int)), at = 0, i;
    uint64_t start_us;
    char word;

    for (i = 0; i < count; i++) {
        fds[i] = connected(argv[0], atoi(argv[1]) + 1 + i % ECHO_SERVERS, SOCK_STREAM);
        ask(fds[i]);
        count_open(atoi(argv[3]));
    }
    __atomic_add_fetch(&shared->ready, 1, __ATOMIC_RELEASE);
    while (read(turn, &word, 1) == 1 && word != LEAVE) {
        for (i = 0; i < TURN && !over(start_us = now_us()); i++) {
            ask(fds[at++ % count]);
            sample(start_us);
        }
        if (i < TURN)
            __atomic_store_n(&shared->ended_us, now_us(), __ATOMIC_RELEASE);
        else if (write(next, &word, 1) != 1)
            die("turn");
    }
    for (i = 0; i < count; i++) {
        if (send(fds[i], &word, 1, MSG_NOSIGNAL) != 1 || recv(fds[i], &word, 1, 0))
            die("close");
        close(fds[i]);
    }
}

/* Until `word` has become `least`; a process that ended before had a reason, and has said it. */
static void await(const uint64_t *word, uint64_t least)
{
    while (__atomic_load_n(word, __ATOMIC_ACQUIRE) < least) {
        if (waitpid(-1, NULL, WNOHANG))
            exit(1); /* the others end with this one */
        usleep(10000);
    }
}

static void run_transactions(char *argv[])
{
    int connections = atoi(argv[3]), processes = connections > ALONE_MAX ? ECHO_SERVERS : 1, status;
    int (*turns)[2] = calloc(processes, sizeof(*turns));

    share(atof(argv[2]));
    shared->marks_us[0] = now_us();
    for (int i = 0; i < processes; i++)
        if (pipe(turns[i]))
            die("pipe");
    for (int i = 0; i < processes; i++)
        if (!fork()) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            converse(argv, connections / processes + (i < connections % processes), turns[i][0],
                     turns[(i + 1) % processes][1]);
            exit(0);
        }
    await(&shared->ready, processes);
    puts("{\"open\": true}");
    fflush(stdout);
    if (connections > 1)
        usleep(SETTLE_MS * 1000); /* what opening left to be done is not timed */
    begin();
    if (write(turns[0][1], "", 1) != 1)
        die("turn");
    await(&shared->ended_us, 1);
    print_transactions(connections);
    for (int i = 0; i < processes; i++)
        if (write(turns[i][1], &(char){LEAVE}, 1) != 1)
            die("leave");
    while (wait(&status) > 0)
        if (status)
            exit(1);
}

/* One process for many connections; a request fits every buffer, so nothing here waits. What is no
 * request ends the connection. */
static void serve_echo(int listener, int once)
{
    struct epoll_event events[64], event = {.events = EPOLLIN, .data.fd = listener};
    int epoll = epoll_create1(0), on = 1;
    char data[REQUEST];

    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(epoll, events, 64, -1);

        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;

            if (fd == listener) {
                int made = accept(fd, NULL, NULL);

                if (made < 0)
                    continue;
                setsockopt(made, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
                event.data.fd = made;
                epoll_ctl(epoll, EPOLL_CTL_ADD, made, &event);
                continue;
            }
            ssize_t n = recv(fd, data, REQUEST, 0);

            if (n < REQUEST || send(fd, data, n, MSG_NOSIGNAL) < 0 || once)
                close(fd);
        }
    }
}
