"""Sockets that hold the server's port from the start, so that a port in use is reported before anything is loaded."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from softmeet.errors import InvalidInputError

# Connections that wait until the server accepts them.
_BACKLOG = 2048


@contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Enter a context with sockets that listen at a port of every address of a host; at its end they are closed.

    Clients may connect at once; they wait until somebody accepts their connections.

    Args:
        host: a name or address of this machine.
        port: the port; 0 for a free one.

    Raises:
        InvalidInputError: if the port is in use, or the host is not this machine's.
    """
    name, found = host.strip("[]"), list[socket.socket]()
    with ExitStack() as opened:
        try:
            addresses = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for left, (family, *_, address) in zip(reversed(range(len(addresses))), addresses, strict=True):
                where = (address[0], port_of(found) if found else port, *address[2:])
                try:
                    made = socket.create_server(where, family=family, backlog=_BACKLOG)
                except OSError as error:
                    # localhost may have an address of IPv6 on a machine that has none.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or not (found or left):
                        raise
                else:
                    found.append(opened.enter_context(made))
        except OSError as error:
            url, reason = url_of(host, port), str(error.strerror).partition(" (")[0]
            raise InvalidInputError(
                f"{url} is in use: end the program that listens there, or choose another --port (0 takes a free one)"
                if error.errno == errno.EADDRINUSE
                else f"cannot listen on {url} ({reason}): expected --host as an address of this machine, such as "
                "127.0.0.1, and a --port that you may take"
            ) from None
        yield found


def port_of(sockets: list[socket.socket]) -> int:
    """Return the port at which sockets listen."""
    return int(sockets[0].getsockname()[1])


def url_to_open(host: str, port: int) -> str:
    """Return the base URL by which a client reaches a server: for all addresses (0.0.0.0), by this machine's name."""
    return url_of(socket.gethostname() if host.strip("[]") in ("0.0.0.0", "::") else host, port)  # noqa: S104


def url_of(host: str, port: int) -> str:
    """Return the base URL of a server."""
    host = host.strip("[]")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
