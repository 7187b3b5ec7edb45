// go-milter: has the message in hand at its end, then adds one header.
//
// go_peer SOCKET MS. One goroutine for each connection.
package main

import (
	"log"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/emersion/go-milter"
)

var burn time.Duration

type peer struct {
	milter.NoOpMilter
	fields []string
	body   []byte
}

// A nil response is none: the MTA was told not to wait.

func (p *peer) Connect(string, string, uint16, net.IP, *milter.Modifier) (milter.Response, error) {
	return nil, nil
}

func (p *peer) Helo(string, *milter.Modifier) (milter.Response, error) { return nil, nil }

func (p *peer) MailFrom(string, *milter.Modifier) (milter.Response, error) {
	p.fields, p.body = nil, nil
	return nil, nil
}

func (p *peer) RcptTo(string, *milter.Modifier) (milter.Response, error) { return nil, nil }

func (p *peer) Header(name, value string, _ *milter.Modifier) (milter.Response, error) {
	p.fields = append(p.fields, name, value)
	return nil, nil
}

func (p *peer) BodyChunk(chunk []byte, _ *milter.Modifier) (milter.Response, error) {
	p.body = append(p.body, chunk...)
	return nil, nil
}

func (p *peer) Body(m *milter.Modifier) (milter.Response, error) {
	if burn > 0 {
		runtime.LockOSThread()
		for until := cpu() + burn; cpu() < until; {
		}
		runtime.UnlockOSThread()
	}
	return milter.RespAccept, m.AddHeader("X-Bench", "1")
}

func cpu() time.Duration {
	const thread = 1 // RUSAGE_THREAD
	var used syscall.Rusage
	syscall.Getrusage(thread, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

func main() {
	ms, err := strconv.ParseFloat(os.Args[2], 64)
	if err != nil {
		log.Fatal(err)
	}
	burn = time.Duration(ms * float64(time.Millisecond))
	network, address := "unix", strings.TrimPrefix(os.Args[1], "unix:")
	if port, host, tcp := strings.Cut(strings.TrimPrefix(os.Args[1], "inet:"), "@"); tcp {
		network, address = "tcp", host+":"+port
	}
	listener, err := net.Listen(network, address)
	if err != nil {
		log.Fatal(err)
	}
	server := milter.Server{
		NewMilter: func() milter.Milter { return &peer{} },
		Actions:   milter.OptAddHeader,
		Protocol: milter.OptNoConnReply | milter.OptNoHeloReply | milter.OptNoMailReply |
			milter.OptNoRcptReply | milter.OptNoHeaderReply | milter.OptNoBodyReply |
			milter.OptNoData | milter.OptNoEOH | milter.OptNoUnknown,
	}
	log.Fatal(server.Serve(listener))
}
