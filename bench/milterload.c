/* milterload: drives a milter as an MTA would, and prints how fast it answered.
 *
 * Every packet is made before the clock starts and every message is the same, so that this program
 * takes little of the CPU that it shares with what it measures. It is one file, because whoever
 * reads a figure of it must be able to read all that has made the figure. USAGE says what it does.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char USAGE[] =
    "usage: milterload [OPTIONS] ADDRESS\n"
    "\n"
    "ADDRESS is /PATH or 127.0.0.1:PORT.\n"
    "\n"
    "  -c COUNT    connections at the same time (1)\n"
    "  -n COUNT    begin so many messages (1000, or no limit with -s)\n"
    "  -s SECONDS  begin no message after so long; those under way are waited for\n"
    "  -m COUNT    messages of a connection, then it is closed and another opened (no limit)\n"
    "  -b BYTES    body of a message (10000)\n"
    "  -f COUNT    header fields (20)\n"
    "  -r COUNT    recipients (1)\n"
    "  -k BYTES    of the body in a packet (65535)\n"
    "  -e FILE     send this message, with CRLF or LF, instead of a made-up one\n"
    "  -w          write every packet by itself, with Nagle's algorithm on, as Sendmail does;\n"
    "              without, what needs no answer goes together with the next that does, as in\n"
    "              Postfix\n"
    "  -N          offer the milter no protocol options: every command is sent and answered\n"
    "  -t SECONDS  give up when nothing has been answered for so long (60)\n"
    "\n"
    "A message is timed from MAIL to the final answer, the first of a connection that was opened\n"
    "within the run from connecting. One line is printed: messages answered, seconds to the last\n"
    "answer, messages a second, latencies in ms, this program's seconds of CPU, messages that were\n"
    "lost, and how many there were of each verdict. Exit status: 0 when every message was\n"
    "answered, 1 when not, 64 for wrong usage, 69 when the milter cannot be reached or talked to.\n";

enum { EXIT_UNANSWERED = 1, EXIT_USAGE = 64, EXIT_UNAVAILABLE = 69 };

/* The protocol options of version 6: stages that are not sent, and answers not waited for. */
enum {
    NO_CONNECT = 0x1, NO_HELO = 0x2, NO_MAIL = 0x4, NO_RCPT = 0x8, NO_BODY = 0x10,
    NO_HEADERS = 0x20, NO_EOH = 0x40, NR_HEADER = 0x80, NO_DATA = 0x200, NR_CONNECT = 0x1000,
    NR_HELO = 0x2000, NR_MAIL = 0x4000, NR_RCPT = 0x8000, NR_DATA = 0x10000, NR_EOH = 0x40000,
    NR_BODY = 0x80000, EVERY_OPTION = 0x1fffff,
};
enum { VERSION = 6, EVERY_ACTION = 0x1ff };

/* The final answers; what may come before the last of a message: changes, and signs of life. */
static const char FINAL[] = "acdrsty", BEFORE_FINAL[] = "+-2behilmqp";

enum {
    FRAME = 5,             /* the length of a packet, in four bytes, and its letter */
    NEGOTIATED = 12,       /* bytes of a negotiation: version, actions, protocol */
    MAX_PAYLOAD = 65535,   /* of a packet with a piece of a body */
    MAX_FIELDS = 10000,
    MAX_RECIPIENTS = 100000,
    MAX_CONNECTIONS = 60000,
    LINE = 76,             /* letters of a line of a made-up body */
    RECEIVE = 65536,
    EVENTS = 256,          /* of one turn of the loop */
    TURN_MS = 200,         /* how often at least the clock is looked at */
    DEFAULT_MESSAGES = 1000,
};

struct bytes { char *at; size_t size, room; };

struct field { char *name, *value; };

/* A packet of the script, and whether the milter answers it. */
struct step { char letter; bool answered; size_t begin, end; };

enum phase { NEGOTIATING, TALKING, ENDED };

struct connection {
    int fd;
    enum phase phase;
    uint32_t interest;          /* what epoll was asked for */
    int step;                   /* that is written, or whose answer is waited for */
    size_t written, until;      /* of the script: what is to be written before the next answer */
    bool waiting;
    long messages;              /* answered on this connection */
    int refused;                /* recipients */
    double began;
    char frame[FRAME];
    size_t framed;
    char payload[NEGOTIATED];   /* the first bytes of an answer's payload */
    uint32_t taken, left;       /* of the payload: bytes that were read, and that are to come */
};

static struct {
    const char *address, *file;
    long connections, messages, per_connection, fields, recipients, piece, body;
    double seconds, silence;
    bool separate, bare;
} option = {
    .connections = 1, .fields = 20, .recipients = 1, .piece = MAX_PAYLOAD, .body = 10000,
    .silence = 60,
};

static struct field *fields;
static long field_count;
static struct bytes body;

static struct bytes script;
static struct step *steps;
static int step_count, first_of_message;
static bool scripted;
static uint32_t protocol;

static int poller;
static double started, last_answer;
static long begun, answered, lost, room_for_latencies;
static double *latencies;
static long accepts, continues, rejects, tempfails, discards;

static void fail(int status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("milterload: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(status);
}

static void *enlarged(void *memory, size_t size)
{
    memory = realloc(memory, size);
    if (memory == NULL)
        fail(EXIT_UNAVAILABLE, "no memory");
    return memory;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static double cpu(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec
           + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

static void append(struct bytes *to, const void *from, size_t size)
{
    if (to->size + size > to->room)
        to->at = enlarged(to->at, to->room = 2 * (to->size + size));
    if (size) /* else `from` may be no address at all */
        memcpy(to->at + to->size, from, size);
    to->size += size;
}

/* Text with its NUL, as the protocol has it. */
static void append_text(struct bytes *to, const char *text)
{
    append(to, text, strlen(text) + 1);
}

__attribute__((format(printf, 2, 3)))
static void append_format(struct bytes *to, const char *format, ...)
{
    char *text;
    va_list arguments;
    va_start(arguments, format);
    if (vasprintf(&text, format, arguments) < 0)
        fail(EXIT_UNAVAILABLE, "no memory");
    va_end(arguments);
    append_text(to, text);
    free(text);
}


/* The message: header fields and a body, made up or read from a file. */

static void add_field(char *name, char *value)
{
    fields = enlarged(fields, (field_count + 1) * sizeof *fields);
    fields[field_count++] = (struct field){name, value};
}

static void make_message(void)
{
    static const char *const names[] = {"From", "To", "Subject"};
    static const long named = sizeof names / sizeof *names;
    for (long i = 0; i < option.fields; i++) {
        struct bytes name = {0}, value = {0};
        if (i < named)
            append_text(&name, names[i]);
        else
            append_format(&name, "X-Field-%ld", i);
        append_format(&value, "value %ld of a made-up header, as long as most are; id=%08lx", i,
                      i * 2654435761 & 0xffffffff);
        add_field(name.at, value.at);
    }
    for (long i = 0; i < option.body; i++) {
        long column = i % (LINE + 2);
        char letter = column == LINE ? '\r' : column == LINE + 1 ? '\n' : 'a' + i * 7 % 26;
        append(&body, &letter, 1);
    }
}

static struct bytes read_with_crlf(const char *path)
{
    struct bytes content = {0};
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        fail(EXIT_USAGE, "%s: %s", path, strerror(errno));
    int letter, before = 0;
    while ((letter = getc(file)) != EOF) {
        if (letter == '\n' && before != '\r')
            append(&content, "\r", 1);
        append(&content, &(char){letter}, 1);
        before = letter;
    }
    fclose(file);
    return content;
}

/* The end of a field: the first CRLF that no continuation line follows. */
static char *end_of_field(char *at, char *end)
{
    while ((at = memmem(at, end - at, "\r\n", 2)) != NULL) {
        if (at + 2 >= end || (at[2] != ' ' && at[2] != '\t'))
            return at;
        at += 2;
    }
    return end;
}

static void read_message(void)
{
    struct bytes content = read_with_crlf(option.file);
    char *at = content.at, *end = content.at + content.size;
    while (at < end && *at != '\r' && field_count < MAX_FIELDS) {
        char *until = end_of_field(at, end), *colon = memchr(at, ':', until - at);
        if (colon == NULL)
            break;
        char *value = colon + 1 + (colon + 1 < until && colon[1] == ' ');
        add_field(strndup(at, colon - at), strndup(value, until - value));
        at = until + 2 < end ? until + 2 : end;
    }
    if (at + 1 < end && memcmp(at, "\r\n", 2) == 0)
        at += 2;
    append(&body, at, end - at);
}


/* The script: all packets of a connection with one message, as negotiated. */

static void packet(struct bytes *to, char letter, const void *payload, size_t size)
{
    uint32_t length = htonl(size + 1);
    append(to, &length, sizeof length);
    append(to, &letter, 1);
    append(to, payload, size);
}

static void step(char letter, struct bytes *payload, bool is_answered)
{
    size_t begin = script.size;
    packet(&script, letter, payload->at ? payload->at : "", payload->size);
    payload->size = 0;
    steps = enlarged(steps, (step_count + 1) * sizeof *steps);
    steps[step_count++] = (struct step){letter, is_answered, begin, script.size};
}

static void write_connect(struct bytes *payload)
{
    const uint16_t port = htons(40000);
    append(payload, "C", 1);
    append_text(payload, "j");
    append_text(payload, "mx.example.test");
    append_text(payload, "v");
    append_text(payload, "Postfix 3.9.0");
    step('D', payload, false);
    append_text(payload, "client.example.test");
    append(payload, "4", 1);
    append(payload, &port, sizeof port);
    append_text(payload, "192.0.2.1");
    step('C', payload, !(protocol & NR_CONNECT));
}

static void write_envelope(struct bytes *payload)
{
    if (!(protocol & NO_MAIL)) {
        append(payload, "M", 1);
        append_text(payload, "{mail_addr}");
        append_text(payload, "sender@example.org");
        step('D', payload, false);
        append_text(payload, "<sender@example.org>");
        append_format(payload, "SIZE=%zu", body.size);
        step('M', payload, !(protocol & NR_MAIL));
    }
    for (long i = 0; i < option.recipients && !(protocol & NO_RCPT); i++) {
        append(payload, "R", 1);
        append_text(payload, "{rcpt_addr}");
        append_format(payload, "b%ld@example.com", i);
        step('D', payload, false);
        append_format(payload, "<b%ld@example.com>", i);
        step('R', payload, !(protocol & NR_RCPT));
    }
}

static void write_queue_id(struct bytes *payload, const char *stage)
{
    append(payload, stage, 1);
    append_text(payload, "i");
    append_text(payload, "4F3A2B0001");
    step('D', payload, false);
}

static void write_content(struct bytes *payload)
{
    if (!(protocol & NO_DATA)) {
        write_queue_id(payload, "T");
        step('T', payload, !(protocol & NR_DATA));
    }
    for (long i = 0; i < field_count && !(protocol & NO_HEADERS); i++) {
        append_text(payload, fields[i].name);
        append_text(payload, fields[i].value);
        step('L', payload, !(protocol & NR_HEADER));
    }
    if (!(protocol & NO_EOH)) {
        write_queue_id(payload, "N");
        step('N', payload, !(protocol & NR_EOH));
    }
    for (size_t at = 0; at < body.size && !(protocol & NO_BODY); at += option.piece) {
        size_t rest = body.size - at;
        append(payload, body.at + at, rest < (size_t)option.piece ? rest : (size_t)option.piece);
        step('B', payload, !(protocol & NR_BODY));
    }
    write_queue_id(payload, "E");
    step('E', payload, true);
}

static void write_script(void)
{
    struct bytes payload = {0};
    if (!(protocol & NO_CONNECT))
        write_connect(&payload);
    if (!(protocol & NO_HELO)) {
        append_text(&payload, "client.example.test");
        step('H', &payload, !(protocol & NR_HELO));
    }
    first_of_message = step_count;
    write_envelope(&payload);
    write_content(&payload);
    free(payload.at);
}


/* Connections: they write the script from answer to answer. */

static int dial(void)
{
    int fd;
    if (*option.address == '/') {
        struct sockaddr_un name = {.sun_family = AF_UNIX};
        if (strlen(option.address) >= sizeof name.sun_path)
            fail(EXIT_USAGE, "%s: too long for a socket", option.address);
        strcpy(name.sun_path, option.address);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, (struct sockaddr *)&name, sizeof name) == 0)
            return fd;
    } else {
        struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
        name.sin_port = htons(atoi(strchr(option.address, ':') + 1));
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, (struct sockaddr *)&name, sizeof name) == 0) {
            int at_once = !option.separate;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &at_once, sizeof at_once);
            return fd;
        }
    }
    fail(EXIT_UNAVAILABLE, "%s: %s", option.address, strerror(errno));
    return -1;
}

static void watch(struct connection *c, uint32_t interest)
{
    struct epoll_event event = {.events = interest, .data.ptr = c};
    if (interest != c->interest)
        epoll_ctl(poller, c->interest ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &event);
    c->interest = interest;
}

static bool may_begin(void)
{
    return begun < option.messages && (!option.seconds || now() - started < option.seconds);
}

/* Connects and makes the offer; whoever reads the answer goes on. */
static void open_connection(struct connection *c)
{
    const uint32_t offer[] = {htonl(VERSION), htonl(EVERY_ACTION),
                              htonl(option.bare ? 0 : EVERY_OPTION)};
    struct bytes said = {0};
    *c = (struct connection){.fd = dial(), .phase = NEGOTIATING};
    packet(&said, 'O', offer, sizeof offer);
    if (write(c->fd, said.at, said.size) != (ssize_t)said.size)
        fail(EXIT_UNAVAILABLE, "%s: the milter takes no offer", option.address);
    free(said.at);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    watch(c, EPOLLIN);
}

static void negotiated(struct connection *c)
{
    uint32_t wanted;
    memcpy(&wanted, c->payload + 8, sizeof wanted);
    wanted = ntohl(wanted) & EVERY_OPTION;
    if (!scripted) {
        scripted = true;
        protocol = wanted;
        write_script();
    } else if (protocol != wanted) {
        fail(EXIT_UNAVAILABLE, "the milter negotiates 0x%x after 0x%x", wanted, protocol);
    }
    c->phase = TALKING;
}

static void close_connection(struct connection *c)
{
    const char quit[] = {0, 0, 0, 1, 'Q'};
    if (write(c->fd, quit, sizeof quit) < 0) {
        /* the milter has left before */
    }
    close(c->fd);
    c->fd = -1;
    c->phase = ENDED;
}

static void close_and_go_on(struct connection *c)
{
    close_connection(c);
    if (may_begin()) {
        double began = now();
        begun++;
        open_connection(c);
        c->began = began;
    }
}

static void lose(struct connection *c)
{
    lost++;
    close_and_go_on(c);
}

/* Chooses what is written next: up to the next packet that is answered, or one packet. */
static void choose(struct connection *c)
{
    c->written = steps[c->step].begin;
    while (!option.separate && !steps[c->step].answered)
        c->step++;
    c->until = steps[c->step].end;
}

static void proceed(struct connection *c)
{
    for (;;) {
        while (c->written < c->until) {
            ssize_t size = write(c->fd, script.at + c->written, c->until - c->written);
            if (size < 0 && errno == EAGAIN) {
                watch(c, EPOLLIN | EPOLLOUT);
                return;
            }
            if (size < 0) {
                lose(c);
                return;
            }
            c->written += size;
        }
        if (steps[c->step].answered)
            break;
        c->step++;
        choose(c);
    }
    c->waiting = true;
    watch(c, EPOLLIN);
}

static void go_to(struct connection *c, int next)
{
    c->step = next;
    choose(c);
    proceed(c);
}

static void count_verdict(char letter, const struct connection *c)
{
    if (letter == 'y') /* in the milter's own words, which begin with an SMTP code */
        letter = c->payload[0] == '4' ? 't' : 'r';
    accepts += letter == 'a';
    continues += letter == 'c';
    discards += letter == 'd';
    rejects += letter == 'r';
    tempfails += letter == 't';
}

static void finish(struct connection *c, char letter)
{
    last_answer = now();
    if (answered == room_for_latencies) {
        room_for_latencies = 2 * room_for_latencies + DEFAULT_MESSAGES;
        latencies = enlarged(latencies, room_for_latencies * sizeof *latencies);
    }
    latencies[answered++] = last_answer - c->began;
    count_verdict(letter, c);
    c->messages++;
    bool is_over = c->step < first_of_message
                   || (option.per_connection && c->messages >= option.per_connection);
    if (is_over || !may_begin()) {
        close_and_go_on(c);
        return;
    }
    begun++;
    c->refused = 0;
    c->began = last_answer;
    go_to(c, first_of_message);
}

static void take_final(struct connection *c, char letter)
{
    char asked = steps[c->step].letter;
    if (!c->waiting)
        fail(EXIT_UNAVAILABLE, "the milter answers '%c' where nothing was asked", letter);
    c->waiting = false;
    bool refuses = letter == 'r' || letter == 't' || letter == 'y';
    bool goes_on = letter == 'c' || letter == 's'
                   || (asked == 'R' && refuses && ++c->refused < option.recipients);
    if (asked == 'E' || !goes_on) {
        finish(c, letter);
        return;
    }
    int next = c->step + 1;
    while (letter == 's' && steps[next].letter == asked)
        next++;
    go_to(c, next);
}

/* A whole packet has arrived; false when the connection is not the same any more. */
static bool take(struct connection *c)
{
    char letter = c->frame[FRAME - 1];
    int fd = c->fd;
    c->framed = 0;
    if (c->phase == NEGOTIATING) {
        if (letter != 'O' || c->taken < NEGOTIATED)
            fail(EXIT_UNAVAILABLE, "the milter answers the offer with '%c'", letter);
        negotiated(c);
        if (begun) /* within the run; at the start all wait for each other */
            go_to(c, 0);
    } else if (memchr(FINAL, letter, strlen(FINAL))) {
        take_final(c, letter);
    } else if (!memchr(BEFORE_FINAL, letter, strlen(BEFORE_FINAL))) {
        fail(EXIT_UNAVAILABLE, "the milter answers '%c'", letter);
    }
    return c->fd == fd && c->phase != ENDED;
}

/* Cuts what was read into packets. */
static void receive(struct connection *c, const char *at, const char *end)
{
    while (at < end) {
        if (c->framed < FRAME) {
            c->frame[c->framed++] = *at++;
            if (c->framed < FRAME)
                continue;
            uint32_t length;
            memcpy(&length, c->frame, sizeof length);
            c->left = ntohl(length) - 1;
            c->taken = 0;
        }
        uint32_t size = c->left < end - at ? c->left : end - at;
        if (c->taken < NEGOTIATED) {
            uint32_t room = NEGOTIATED - c->taken;
            memcpy(c->payload + c->taken, at, size < room ? size : room);
        }
        c->taken += size;
        c->left -= size;
        at += size;
        if (c->left == 0 && !take(c))
            return;
    }
}

static void read_answers(struct connection *c)
{
    static char buffer[RECEIVE];
    ssize_t size = read(c->fd, buffer, sizeof buffer);
    if (size > 0)
        receive(c, buffer, buffer + size);
    else if (size == 0 || errno != EAGAIN)
        lose(c);
}


/* The run. */

static bool any_goes_on(const struct connection *connections)
{
    for (long i = 0; i < option.connections; i++)
        if (connections[i].phase != ENDED)
            return true;
    return false;
}

static void turn(void)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(poller, events, EVENTS, TURN_MS);
    for (int i = 0; i < count; i++) {
        struct connection *c = events[i].data.ptr;
        int fd = c->fd;
        if (events[i].events & EPOLLOUT)
            proceed(c);
        if (c->fd == fd && c->phase != ENDED && events[i].events & ~EPOLLOUT)
            read_answers(c);
    }
}

static bool any_negotiates(const struct connection *connections)
{
    for (long i = 0; i < option.connections; i++)
        if (connections[i].phase == NEGOTIATING)
            return true;
    return false;
}

static void open_all(struct connection *connections)
{
    double until = now() + option.silence;
    for (long i = 0; i < option.connections; i++)
        open_connection(&connections[i]);
    while (any_negotiates(connections)) {
        if (now() > until || lost)
            fail(EXIT_UNAVAILABLE, "%s: the milter does not negotiate", option.address);
        turn();
    }
}

static void run(struct connection *connections)
{
    started = last_answer = now();
    for (long i = 0; i < option.connections; i++) {
        if (!may_begin()) {
            close_connection(&connections[i]);
            continue;
        }
        begun++;
        connections[i].began = now();
        go_to(&connections[i], 0);
    }
    while (any_goes_on(connections) && now() - last_answer < option.silence)
        turn();
}

static int by_size(const void *one, const void *other)
{
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static double percentile(double share)
{
    long at = share * answered;
    return answered ? 1000 * latencies[at < answered ? at : answered - 1] : 0;
}

static int report(double seconds_of_cpu)
{
    double seconds = last_answer - started;
    qsort(latencies, answered, sizeof *latencies, by_size);
    printf("messages=%ld seconds=%.6f rate=%.3f p50_ms=%.4f p99_ms=%.4f max_ms=%.4f cpu=%.6f"
           " lost=%ld accept=%ld continue=%ld reject=%ld tempfail=%ld discard=%ld\n",
           answered, seconds, seconds > 0 ? answered / seconds : 0, percentile(0.5),
           percentile(0.99), percentile(1), seconds_of_cpu, begun - answered, accepts, continues,
           rejects, tempfails, discards);
    return answered == begun ? 0 : EXIT_UNANSWERED;
}


/* The command line. */

static long number(char letter, const char *text, long least, long most)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || *end || end == text || value < least || value > most)
        fail(EXIT_USAGE, "-%c %s: it must be a number from %ld to %ld", letter, text, least, most);
    return value;
}

static double duration(char letter, const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (*end || end == text || !(value > 0))
        fail(EXIT_USAGE, "-%c %s: it must be a number of seconds above 0", letter, text);
    return value;
}

static void parse(int count, char **words)
{
    const long many = 1000000000;
    int letter;
    while ((letter = getopt(count, words, "c:n:s:m:b:f:r:k:e:wNt:")) != -1)
        switch (letter) {
        case 'c': option.connections = number('c', optarg, 1, MAX_CONNECTIONS); break;
        case 'n': option.messages = number('n', optarg, 1, many); break;
        case 's': option.seconds = duration('s', optarg); break;
        case 'm': option.per_connection = number('m', optarg, 1, many); break;
        case 'b': option.body = number('b', optarg, 0, many); break;
        case 'f': option.fields = number('f', optarg, 0, MAX_FIELDS); break;
        case 'r': option.recipients = number('r', optarg, 1, MAX_RECIPIENTS); break;
        case 'k': option.piece = number('k', optarg, 1, MAX_PAYLOAD); break;
        case 'e': option.file = optarg; break;
        case 'w': option.separate = true; break;
        case 'N': option.bare = true; break;
        case 't': option.silence = duration('t', optarg); break;
        default: fputs(USAGE, stderr); exit(EXIT_USAGE);
        }
    if (optind != count - 1) {
        fputs(USAGE, stderr);
        exit(EXIT_USAGE);
    }
    option.address = words[optind];
    if (*option.address != '/' && strncmp(option.address, "127.0.0.1:", 10))
        fail(EXIT_USAGE, "%s: it must be /PATH or 127.0.0.1:PORT", option.address);
    if (!option.messages)
        option.messages = option.seconds ? many : DEFAULT_MESSAGES;
}

/* As many descriptors as connections need, where the system lets us have them. */
static void allow_descriptors(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int main(int count, char **words)
{
    parse(count, words);
    signal(SIGPIPE, SIG_IGN);
    allow_descriptors();
    if (option.file)
        read_message();
    else
        make_message();
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct connection *connections = calloc(option.connections, sizeof *connections);
    if (poller < 0 || connections == NULL)
        fail(EXIT_UNAVAILABLE, "%s", strerror(errno));
    open_all(connections);
    double before = cpu();
    run(connections);
    return report(cpu() - before);
}
