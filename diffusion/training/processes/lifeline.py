"""Open connections between the processes of a run, by which the end of one is known to all at once.

JAX reports a dead process only after its heartbeat timeout, or at once if it was process 0, and then aborts the others
with a stack trace. Here the kernel reports it: it closes the connections of a process that ends, however it ends.

- Each process keeps its connection to process 0 from the roll call, and process 0 those to all others.
- Before an orderly end a process sends END; before it leaves with an error it sends one line with the reason.
- A connection that closes without either is a death. Process 0 forwards what it receives to the others.
- A host that is cut off closes nothing: TCP keep-alive (KEEPALIVE) and JAX's heartbeats cover that.
"""

import contextlib
import ctypes
import selectors
import signal
import socket
import threading
from collections.abc import Callable

from diffusion.training.processes.rollcall import Peers, receive_line, send_line, who

END = "end"
GRACE_SECONDS = 1.0
# Also keeps routers from dropping a connection that is idle for days.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, times


class Lifeline:
    """Watches the connections to other processes from a thread, until each has sent its last line.

    Args:
      rank, count: of this process.
      peers: from the roll call: all others for process 0, process 0 for the others.
      end: called once, in another thread, with a line that names the process that died or left and why. After a death
        it is called at once; after an announced error GRACE_SECONDS later, as this process may fail by itself with a
        more precise error.
    """

    def __init__(self, rank: int, count: int, peers: Peers, end: Callable[[str], None]):
        self.rank = rank
        self._count = count
        self._peers = peers
        self._end = end
        self._alone = threading.Event()
        # Prepared in this thread, in which the connections are open for certain.
        self._selector = selectors.DefaultSelector()
        for peer, (connection, _) in peers.items():
            keep_alive(connection)
            self._selector.register(connection, selectors.EVENT_READ, peer)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def announce_end(self) -> None:
        """Reports to the others that this process ends in order; a second call does no harm."""
        self._send(END)

    def announce_reason(self, reason: str) -> None:
        """Reports to the others why this process leaves. In process 0 it then waits until the others have left.

        JAX's service runs in process 0 and aborts the others when it disappears. The wait ends after 3 GRACE_SECONDS.
        """
        self._send(f"process {self.rank} of {self._count} ({who()}) has left: {reason}")
        if self.rank == 0:
            self._alone.wait(3 * GRACE_SECONDS)

    def _send(self, line: str, besides: int | None = None) -> None:
        for rank, (connection, _) in self._peers.items():
            if rank != besides:
                send_line(connection, " ".join(line.split()))

    def _watch(self) -> None:
        ending = False
        with self._selector as selector:
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    connection, name = self._peers[key.data]
                    last = last_line(connection)
                    if last == END or ending:
                        continue
                    ending = True
                    line = last or f"process {key.data} of {self._count} ({name}) has ended unexpectedly"
                    self._send(line, besides=key.data)
                    later = threading.Timer(GRACE_SECONDS if last else 0.0, self._end, [line])
                    later.daemon = True
                    later.start()
        self._alone.set()


def delay_aborts() -> None:
    """Makes an abort end this process six seconds later, so that the lifeline can report its cause first.

    When process 0 is gone JAX aborts from a thread of its own, sooner than any Python thread wakes up. The handler of
    SIGABRT becomes C's `sleep`, which is called in that thread with the signal's number, 6; then the abort proceeds.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def last_line(connection: socket.socket) -> str:
    """Returns the line waiting in a connection; "" where the other side closed it without one."""
    try:
        return receive_line(connection)
    except OSError:
        return ""


def keep_alive(connection: socket.socket) -> None:
    """Makes the kernel probe the other host; if it does not answer the connection closes."""
    connection.settimeout(5.0)  # to receive the rest of a line; waiting for one to begin has no limit
    # Where the other side has closed already, some systems refuse the options: reading it reports that.
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not every system has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
