"""The limits of the master, each with its reason. Times are in seconds, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from sharded_milter.protocol.stages import Stage


@dataclass(frozen=True)
class Limits:
    """The operator's limits, with the defaults of the command line."""

    # Postfix waits 30 s for the answer to a command (milter_command_timeout).
    command_deadline: float = 20.0
    # Postfix waits 300 s for the answer at end of message (milter_content_timeout). Sendmail waits
    # 300 s from end of message to the verdict (T=E:5m), also if PROGRESS is sent.
    eom_deadline: float = 240.0
    # How long a job may wait for a worker. This is a part of the deadline: half of eom_deadline, so
    # that the other half is left for the scan.
    queue_wait: float = 120.0
    # The most jobs in the queue. Each is a message in memory whose MTA waits. A hundred times the
    # workers of a large machine is more than they can answer within queue_wait.
    max_queue: int = 10_000
    # How often a job is retried after its worker died. The second death is blamed on the message.
    retries: int = 1
    # Shards that run no heavy jobs, so that light ones, such as RCPT, are answered during scans.
    reserve: int = 0
    # If a client repeats a message whose scan still runs, use the result of that scan.
    join_retries: bool = False
    # How long a worker may take to start. A milter may load gigabytes of models.
    worker_start_timeout: float = 60.0
    # A worker is replaced after this number of answers, after this time, or above this size of
    # resident memory; 0 means never. Milters that leak memory need one of them.
    max_messages: int = 0
    worker_lifetime: float = 0.0
    worker_max_rss: int = 0
    # The delay before a failed worker is started again; it doubles with each failure.
    respawn_first: float = 0.1
    respawn_longest: float = 30.0
    # libmilter's default. An idle SMTP client is an idle milter connection, so this must not be
    # shorter than the MTA's own timeouts.
    idle_timeout: float = 7210.0
    # How long sessions may go on after TERM.
    graceful_timeout: float = 30.0
    # The interval of PROGRESS. Sendmail gives up 10 s after the last one (T=R:10s).
    progress_interval: float = 5.0
    # Bytes of commands that may wait behind a question before reading pauses: two body chunks.
    max_waiting: int = 131_072
    # The most MTA connections at a time; more are refused with 451. Each needs a descriptor. With
    # workers, and memory for large messages, this number fits into a limit of 20,000.
    max_connections: int = 16_000
    # Bytes in flight: messages until their scans end, incomplete packets, unread answers, and 10 KB
    # for each connection that has any of these. Above this limit new messages get 452.
    max_inflight_bytes: int = 1024 * 1024 * 1024
    # The largest packets to accept if the MTA offers them: 64K, 256K or 1M. Postfix and Sendmail
    # do not offer more than 64K.
    max_data_size: str = "64K"
    # The largest message. Postfix's message_size_limit is 10,240,000 by default.
    max_message_size: int = 100 * 1024 * 1024

    def deadline(self, stage: Stage | None) -> float:
        """Return the deadline of a job at a stage, in seconds; None is the end of a session."""
        return self.eom_deadline if stage is Stage.EOM else self.command_deadline
