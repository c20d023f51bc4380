"""Who is there: every process of a run answers process 0, before JAX is asked to connect them.

JAX waits for missing processes too, but ends the program without saying which; here they are named. The call is held at
the coordinator's own address and port, where JAX's service starts afterwards: the connections stay (`lifeline`), the
listening socket does not.
"""

import contextlib
import os
import socket
import time

from diffusion.training.errors import RunError

Peers = dict[int, tuple[socket.socket, str]]  # of each rank: the connection to it, who it is


def roll_call(address: str, rank: int, count: int, seconds: float) -> Peers:
    """Returns, when all `count` processes have called this, process 0's connections to the others, theirs to process 0.

    Raises:
      RunError: some did not come within `seconds` (names them), or do not agree on `count`.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    if rank == 0:
        return call(int(port), count, deadline, seconds)
    return answer((host, int(port)), rank, count, deadline, seconds)


def who() -> str:
    """Returns this process's name for people."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def call(port: int, count: int, deadline: float, seconds: float) -> Peers:
    """Process 0's part: collects the others, then tells each that all are there, or who is not."""
    there: Peers = {}
    with contextlib.ExitStack() as connections:
        try:
            # Its option SO_REUSEADDR, which the connections inherit, lets JAX listen here beside them.
            server = socket.create_server(("", port), backlog=count)
        except OSError as error:
            raise RunError(f"process 0 cannot listen on port {port}: {error}. Is another run there?") from error
        with server:
            while len(there) < count - 1 and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                with contextlib.suppress(OSError, ValueError):  # whoever else knocks is not one of us
                    connection = connections.enter_context(server.accept()[0])
                    connection.settimeout(5.0)
                    said = hear(connection).split(maxsplit=3)
                    if said[:1] == ["diffusion"] and 0 < int(said[1]) < count == int(said[2]):
                        there[int(said[1])] = connection, said[3].strip()
                    elif said[:1] == ["diffusion"]:
                        stranger = f"process {said[1]} of {said[2]} ({said[3].strip()})"
                        tell(connection, f"{stranger} is not of this run of {count}")
        missing = [str(rank) for rank in range(1, count) if rank not in there]
        here = "; ".join([f"0: {who()}", *(f"{rank}: {there[rank][1]}" for rank in sorted(there))])
        line = f"process {', '.join(missing)} of {count} did not come within {seconds:.0f} s (there are {here})"
        for connection, _ in there.values():
            tell(connection, line if missing else f"go {who()}")
        if missing:
            raise RunError(line)
        connections.pop_all()
    return there


def tell(connection: socket.socket, line: str) -> None:
    """Sends a line; one who has left meanwhile is not waited for."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{line}\n".encode())


def hear(connection: socket.socket) -> str:
    """Returns the next line without what follows it, "" where the other side ended without one."""
    return connection.makefile("rb", buffering=0).readline(10000).decode(errors="replace").strip()


def answer(address: tuple[str, int], rank: int, count: int, deadline: float, seconds: float) -> Peers:
    """The others' part: goes to process 0, which may not be there yet, and waits for its word."""
    while True:
        try:
            connection = socket.create_connection(address, timeout=5.0)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                where = f"{address[0]}:{address[1]}"
                raise RunError(f"process 0 was not at {where} within {seconds:.0f} s: {error}") from error
            time.sleep(0.2)
    with contextlib.ExitStack() as connections:
        connections.enter_context(connection)
        connection.sendall(f"diffusion {rank} {count} {who()}\n".encode())
        # Process 0 speaks when its own time is over, which began later if it started later.
        connection.settimeout(seconds + 10.0)
        try:
            word = hear(connection)
        except OSError as error:
            raise RunError(f"process 0 does not answer process {rank}: {error}") from error
        go, _, name = word.partition(" ")
        if go != "go":
            raise RunError(word or "process 0 left while it waited for the others")
        connections.pop_all()
    return {0: (connection, name)}
