"""Every number that bounds the master, with its reason. Times are seconds."""

from __future__ import annotations

from dataclasses import dataclass

from sharded_milter.protocol.stages import Stage


@dataclass(frozen=True)
class Limits:
    """The operator's limits; the defaults are those of the command line."""

    # Postfix waits 30 s for the answer to a command (milter_command_timeout).
    command_deadline: float = 20.0
    # Postfix waits 300 s for the answer to the content (milter_content_timeout), Sendmail 5 min
    # in all from end of message to the verdict (T=E:5m), whatever progress is reported.
    eom_deadline: float = 240.0
    # How long a job may wait for a worker. Part of the deadline, which leaves the other half for
    # the work itself.
    queue_wait: float = 120.0
    # Jobs that may wait. Each is a message in memory whose MTA waits too; a hundred times the
    # workers of a large machine is more than queue_wait lets any of them reach.
    max_queue: int = 10_000
    # A job whose worker died goes to another one so often; two deaths are the message's fault.
    retries: int = 1
    # Shards that heavy jobs leave to light ones, so that RCPT is answered during large scans.
    reserve: int = 0
    # Whether a client's repeat of a message waits for the scan of the first that still runs.
    join_retries: bool = False
    # Importing a milter may load a model of gigabytes.
    worker_start_timeout: float = 60.0
    # A worker is replaced after so many answers, so many seconds, or above so many bytes of
    # resident memory; 0 is never. Python milters that leak need one of them.
    max_messages: int = 0
    worker_lifetime: float = 0.0
    worker_max_rss: int = 0
    # A worker that has ended badly is started again after this long, doubled each time.
    respawn_first: float = 0.1
    respawn_longest: float = 30.0
    # libmilter's default. An idle SMTP client is an idle milter connection, so this must not be
    # shorter than the MTA's own timeouts.
    idle_timeout: float = 7210.0
    # What sessions get to reach their end on TERM.
    graceful_timeout: float = 30.0
    # Sendmail gives up 10 s after the last sign of life (T=R:10s).
    progress_interval: float = 5.0
    # Bytes of commands that wait behind a running job before reading pauses; two body chunks.
    max_waiting: int = 131_072
    # MTA connections at a time; more are told to come back. Each is a descriptor: with workers, and
    # memory for large messages, so many fit into a limit of 20,000.
    max_connections: int = 16_000
    # Bytes that are held for MTAs: messages until their scans end, pieces of packets, answers that
    # are not read, and 10 KB for each connection that has any; above it new messages get a 452.
    max_inflight_bytes: int = 1024 * 1024 * 1024
    # The packets that an MTA may send if it offers them: 64K, 256K or 1M. None of today's does.
    max_data_size: str = "64K"
    # The largest message that is kept; Postfix's message_size_limit is 10,240,000 by default.
    max_message_size: int = 100 * 1024 * 1024

    def deadline(self, stage: Stage | None) -> float:
        """How long the answer at a stage may take."""
        return self.eom_deadline if stage is Stage.EOM else self.command_deadline
