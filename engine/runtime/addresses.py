"""From a host's name to the addresses that may be connected to (engine.webhooks.is_public).

Whoever connects must connect to what is returned here, not to the name: between two look-ups a name may be made to
point elsewhere (DNS rebinding).

The system's resolver can not be interrupted: who has given up waiting leaves a thread behind until the resolver gives
up too. So the threads are a bounded number of its own, no task that needs another thread waits for them, and one name
takes one of them however many ask for it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

from engine.webhooks import is_public

ADDRESSES_COUNT_MAX = 16  # a name with more of them is looked at no further


class UnresolvedHost(Exception):
    """The name has no address, or nobody could be asked."""


class PrivateAddress(Exception):
    """The name has an address that is not public; others that it may have do not help."""


class HostNames:
    """Looks up at most `lookups_count_max` names at a time; others wait for their turn."""

    def __init__(self, private_allowed: bool, lookups_count_max: int) -> None:
        self._private_allowed = private_allowed
        self._threads = ThreadPoolExecutor(lookups_count_max, "look-up")
        self._under_way: dict[str, asyncio.Future[list[str]]] = {}

    def close(self) -> None:
        """What is under way comes to its end by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def resolve(self, host: str) -> Sequence[str]:
        """The host's addresses, in the order in which to try them; at least one. Raises UnresolvedHost,
        PrivateAddress. Who does not want to wait for a resolver gives up by himself."""
        under_way = self._under_way.get(host)
        if under_way is None:
            under_way = asyncio.get_running_loop().run_in_executor(self._threads, look_up, host)
            self._under_way[host] = under_way
            under_way.add_done_callback(lambda done: self._done(host, done))
        addresses = (await asyncio.shield(under_way))[:ADDRESSES_COUNT_MAX]
        if not addresses:
            raise UnresolvedHost(f"{host} has no address")
        if not self._private_allowed and not all(is_public(ip_address(address)) for address in addresses):
            raise PrivateAddress(f"{host} has an address that is not public")
        return addresses

    def _done(self, host: str, done: asyncio.Future[list[str]]) -> None:
        del self._under_way[host]
        if not done.cancelled():
            done.exception()  # Nobody may be waiting for it any more.


def look_up(host: str) -> list[str]:
    """What the system says, without repetitions. Raises UnresolvedHost."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnresolvedHost(f"{host}: {error}") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
