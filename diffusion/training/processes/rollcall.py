"""The roll call: every process connects to process 0 before JAX connects them all, so that missing ones are named.

JAX waits for missing processes too, but ends the program without naming them. The call uses the coordinator's own
address and port, where JAX's service starts afterwards: the connections stay open (`lifeline`), the listening socket
does not.
"""

import contextlib
import os
import socket
import time

from diffusion.training.errors import RunError

Peers = dict[int, tuple[socket.socket, str]]  # rank -> the connection to that process, its host and pid
GREETING = "diffusion"


def roll_call(address: str, rank: int, count: int, seconds: float) -> Peers:
    """Returns open connections once all processes have called this.

    Args:
      address: HOST:PORT of process 0.
      rank, count: the number of this process, and how many there are.
      seconds: how long to wait for the others.

    Returns:
      For process 0 the connections to all others, for the others that to process 0.

    Raises:
      RunError: some did not connect in time (the line names them), or do not agree on `count`.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    if rank == 0:
        return collect(int(port), count, deadline, seconds)
    return answer((host, int(port)), rank, count, deadline, seconds)


def who() -> str:
    """Returns this process's pid and host, for messages."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def collect(port: int, count: int, deadline: float, seconds: float) -> Peers:
    """Process 0's part: accepts the others, then sends each that all are there, or which are missing."""
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
                with contextlib.suppress(OSError, ValueError):  # a stranger, or one that left: wait for the next
                    connection = connections.enter_context(server.accept()[0])
                    connection.settimeout(5.0)
                    words = receive_line(connection).split(maxsplit=3)
                    if words[:1] == [GREETING] and 0 < int(words[1]) < count == int(words[2]):
                        there[int(words[1])] = connection, words[3].strip()
                    elif words[:1] == [GREETING]:
                        stranger = f"process {words[1]} of {words[2]} ({words[3].strip()})"
                        send_line(connection, f"{stranger} is not of this run of {count}")
        missing = [str(rank) for rank in range(1, count) if rank not in there]
        here = "; ".join([f"0: {who()}", *(f"{rank}: {there[rank][1]}" for rank in sorted(there))])
        line = f"process {', '.join(missing)} of {count} did not connect within {seconds:.0f} s (connected: {here})"
        for connection, _ in there.values():
            send_line(connection, line if missing else f"go {who()}")
        if missing:
            raise RunError(line)
        connections.pop_all()
    return there


def answer(address: tuple[str, int], rank: int, count: int, deadline: float, seconds: float) -> Peers:
    """The others' part: connects to process 0, which may not have started yet, and waits for its answer."""
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
        connection.sendall(f"{GREETING} {rank} {count} {who()}\n".encode())
        # Process 0 answers at its own deadline, which is later if it started later.
        connection.settimeout(seconds + 10.0)
        try:
            line = receive_line(connection)
        except OSError as error:
            raise RunError(f"process 0 does not answer process {rank}: {error}") from error
        go, _, name = line.partition(" ")
        if go != "go":
            raise RunError(line or "process 0 left while it waited for the others")
        connections.pop_all()
    return {0: (connection, name)}


def send_line(connection: socket.socket, line: str) -> None:
    """Sends a line; does nothing where the other side has closed the connection."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{line}\n".encode())


def receive_line(connection: socket.socket) -> str:
    """Returns the next line and leaves what follows it; "" where the other side closed without one."""
    return connection.makefile("rb", buffering=0).readline(10000).decode(errors="replace").strip()
