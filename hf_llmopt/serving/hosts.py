"""Which names a server goes by. A web page can make a name of its own mean this machine (DNS rebinding)."""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address
from typing import Any

from ..errors import InvalidOption
from .errors import APIError

HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")  # of the header, and its port


def known_hosts(names: Collection[str]) -> frozenset[str]:
    """Names as they are compared.

    Args:
        names: As a user gave them; `"*"` for all.

    Raises:
        InvalidOption: One is no name of a machine.
    """
    for name in names:
        if name != "*" and not re.fullmatch(r"[\w.-]+", name) and _address(name) is None:
            raise InvalidOption(f"{name!r} is no name of a machine: it stands alone, as llm.example, or * for all.")
    return frozenset(name.lower().rstrip(".") for name in names)


def check_host(scope: Any, names: Collection[str]) -> None:
    """Refuse a request to a name that is not this server's.

    Addresses are nobody's names, and `localhost` is always this machine's. Other names need permission, where some was
    given, and where the connection comes from this machine: a browser on it trusts whatever name a page has.

    Args:
        scope: Of ASGI.
        names: What `known_hosts` gave.

    Raises:
        APIError: It is to another name.
    """
    header = dict(scope["headers"]).get(b"host")
    server = scope.get("server")
    if header is None or "*" in names or not (names or (server is not None and loopback(server[0]))):
        return
    found = HOST.fullmatch(header.decode("latin-1"))
    name = "" if found is None else found[1].strip("[]").lower().rstrip(".")
    if name in names or name == "localhost" or name.endswith(".localhost") or _address(name) is not None:
        return
    raise APIError(
        421,
        f"This server does not go by the name {name[:255]!r}. Start it with --allowed-host NAME if it should.",
        "host_not_allowed",
    )


def _address(text: str) -> Any:
    try:
        return ip_address(text)
    except ValueError:
        return None


def loopback(text: str) -> bool:
    """Whether an address is this machine's for itself."""
    address = _address(text)
    return address is not None and bool(address.is_loopback)
