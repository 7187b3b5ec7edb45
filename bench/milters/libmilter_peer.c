/* libmilter in C: has the message in hand at its end, then adds one header.
 *
 * libmilter_peer SOCKET MS. One thread for each connection.
 */

#include <libmilter/mfapi.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double burn;

struct message { char *bytes; size_t size, room; };

static double cpu(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static void keep(SMFICTX *ctx, const void *bytes, size_t size)
{
    struct message *m = smfi_getpriv(ctx);
    if (m->size + size > m->room)
        m->bytes = realloc(m->bytes, m->room = 2 * (m->size + size));
    memcpy(m->bytes + m->size, bytes, size);
    m->size += size;
}

static sfsistat on_connect(SMFICTX *ctx, char *host, _SOCK_ADDR *address)
{
    smfi_setpriv(ctx, calloc(1, sizeof(struct message)));
    return SMFIS_NOREPLY;
}

static sfsistat on_mail(SMFICTX *ctx, char **arguments)
{
    ((struct message *)smfi_getpriv(ctx))->size = 0;
    return SMFIS_NOREPLY;
}

static sfsistat on_rcpt(SMFICTX *ctx, char **arguments) { return SMFIS_NOREPLY; }
static sfsistat on_helo(SMFICTX *ctx, char *name) { return SMFIS_NOREPLY; }

static sfsistat on_header(SMFICTX *ctx, char *name, char *value)
{
    keep(ctx, name, strlen(name) + 1);
    keep(ctx, value, strlen(value) + 1);
    return SMFIS_NOREPLY;
}

static sfsistat on_body(SMFICTX *ctx, unsigned char *chunk, size_t size)
{
    keep(ctx, chunk, size);
    return SMFIS_NOREPLY;
}

static sfsistat on_eom(SMFICTX *ctx)
{
    double until = cpu() + burn;
    while (burn > 0 && cpu() < until)
        ;
    smfi_addheader(ctx, "X-Bench", "1");
    return SMFIS_ACCEPT;
}

static sfsistat on_close(SMFICTX *ctx)
{
    struct message *m = smfi_getpriv(ctx);
    if (m)
        free(m->bytes);
    free(m);
    smfi_setpriv(ctx, NULL);
    return SMFIS_CONTINUE;
}

/* Nothing is answered before the end of the message; to return anything but NOREPLY after that
 * is logged, at the price of a message. */
static sfsistat on_negotiate(SMFICTX *ctx, unsigned long actions, unsigned long steps,
    unsigned long f2, unsigned long f3, unsigned long *our_actions, unsigned long *our_steps,
    unsigned long *of2, unsigned long *of3)
{
    *our_actions = SMFIF_ADDHDRS;
    *our_steps = steps & (SMFIP_NR_CONN | SMFIP_NR_HELO | SMFIP_NR_MAIL | SMFIP_NR_RCPT
        | SMFIP_NR_HDR | SMFIP_NR_BODY | SMFIP_NODATA | SMFIP_NOEOH | SMFIP_NOUNKNOWN);
    *of2 = *of3 = 0;
    return SMFIS_CONTINUE;
}

int main(int argc, char **argv)
{
    struct smfiDesc milter = {
        .xxfi_name = "bench", .xxfi_version = SMFI_VERSION, .xxfi_flags = SMFIF_ADDHDRS,
        .xxfi_connect = on_connect, .xxfi_helo = on_helo, .xxfi_envfrom = on_mail,
        .xxfi_envrcpt = on_rcpt, .xxfi_header = on_header, .xxfi_body = on_body,
        .xxfi_eom = on_eom, .xxfi_close = on_close, .xxfi_negotiate = on_negotiate,
    };
    if (argc != 3)
        return 64;
    burn = atof(argv[2]) / 1000;
    smfi_setconn(argv[1]);
    smfi_register(milter);
    return smfi_main();
}
