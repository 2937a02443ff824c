"""A port for the processes of a launcher to meet at, which nobody else on the host is given meanwhile."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[str]:
    """Yield the number of a free port; the system gives it to no one who asks for any free one, or connects out.

    The socket is bound and does not listen: the first process of a launcher can listen there, for torch's store sets
    SO_REUSEADDR too.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield str(holder.getsockname()[1])
