"""From a host's name to the addresses that may be connected to (engine.webhooks.is_public).

Whoever connects must connect to what is returned here, not to the name: between two look-ups a name may be made to
point elsewhere (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from engine.webhooks import is_public

ADDRESSES_COUNT_MAX = 16  # a name with more of them is looked at no further


class UnresolvedHost(Exception):
    """The name has no address, or nobody could be asked."""


class PrivateAddress(Exception):
    """The name has an address that is not public; others that it may have do not help."""


async def resolve(host: str, port: int, private_allowed: bool) -> Sequence[str]:
    """The host's addresses, in the order in which to try them; at least one. Raises UnresolvedHost, PrivateAddress."""
    addresses = (await look_up(host, port))[:ADDRESSES_COUNT_MAX]
    if not addresses:
        raise UnresolvedHost(f"{host} has no address")
    if not private_allowed and not all(is_public(ip_address(address)) for address in addresses):
        raise PrivateAddress(f"{host} has an address that is not public")
    return addresses


async def look_up(host: str, port: int) -> list[str]:
    """What the system says, without repetitions. Raises UnresolvedHost."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnresolvedHost(f"{host}: {error}") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
