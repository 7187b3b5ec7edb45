"""Many MTAs at once, and whatever troubles the milter meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from bench.chaos.mta import Account, Manner, Mta

# An attack that lasts longer hangs, in seconds: a thousand messages take ten on a quiet machine.
LONGEST = 180.0


async def attack(
    target: str,
    account: Account,
    *,
    seed: str,
    mtas: int,
    messages: int,
    manner: Manner | None = None,
    troubles: Sequence[Coroutine[Any, Any, None]] = (),
    longest: float = LONGEST,
) -> None:
    """Has so many MTAs send so many messages in all to a path or to HOST:PORT.

    The same seed plays the same messages, not the same timing. `troubles` run until the last
    message has its answer. Everything that went wrong is in the account.
    """
    shares = [messages // mtas + (number < messages % mtas) for number in range(mtas)]
    everyone = [
        Mta(target, f"{seed}-{number}", share, account, manner or Manner())
        for number, share in enumerate(shares)
    ]
    meanwhile = [asyncio.create_task(trouble) for trouble in troubles]
    try:
        async with asyncio.timeout(longest):
            await asyncio.gather(*(mta.run() for mta in everyone))
    except TimeoutError:
        account.complain("missing", f"the messages were not all answered within {longest:g} s")
    finally:
        for task in meanwhile:
            task.cancel()
        for ended in await asyncio.gather(*meanwhile, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
