"""The connections of the roll call stay open for the whole run, so that the end of one process is known to all at once.

JAX tells the others that one is gone only after its heartbeats' time, or at once where it was process 0, and aborts
them with a stack trace. Here the kernel tells, which closes the connections of whatever ends, however it ends. Between
each process and process 0 each side says one last word: BYE at an orderly end, or else the line why it leaves. A
connection that ends without a word is a death; process 0 passes on what it hears.

A host that is cut off closes nothing: TCP asks after it (KEEPALIVE), and so do JAX's heartbeats.
"""

import ctypes
import selectors
import signal
import socket
import threading
from collections.abc import Callable

from diffusion.training.rollcall import Peers, hear, tell, who

BYE = "bye"
GRACE_SECONDS = 1.0
# Also keeps routers from forgetting a connection on which nothing is said for days.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, times


class Lifeline:
    """Watches `peers` (of process 0 all others, of the others process 0) from a thread until all said their last word.

    When one has died, or tells why it leaves, `end(line)` is called once, in another thread. After a death that is at
    once; what is told waits GRACE_SECONDS, as this process may fail by itself and know better why.
    """

    def __init__(self, rank: int, count: int, peers: Peers, end: Callable[[str], None]):
        self.rank = rank
        self._count = count
        self._peers = peers
        self._end = end
        self._alone = threading.Event()
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def say_bye(self) -> None:
        """Tells the others that this process ends in order."""
        self._say(BYE)

    def say_why(self, reason: str) -> None:
        """Tells the others why this process leaves, and lets them leave first.

        JAX's service is in process 0 and aborts the others when it is gone: that one waits for them, 3 GRACE_SECONDS
        at most.
        """
        self._say(f"process {self.rank} of {self._count} ({who()}) has left: {reason}")
        if self.rank == 0:
            self._alone.wait(3 * GRACE_SECONDS)

    def _say(self, word: str, besides: int | None = None) -> None:
        for rank, (connection, _) in self._peers.items():
            if rank != besides:
                tell(connection, " ".join(word.split()))

    def _watch(self) -> None:
        ending = False
        with selectors.DefaultSelector() as selector:
            for rank, (connection, _) in self._peers.items():
                keep_alive(connection)
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    connection, name = self._peers[key.data]
                    word = last_word(connection)
                    if word == BYE or ending:
                        continue
                    ending = True
                    line = word or f"process {key.data} of {self._count} ({name}) has ended without a word"
                    self._say(line, besides=key.data)
                    later = threading.Timer(GRACE_SECONDS if word else 0.0, self._end, [line])
                    later.daemon = True
                    later.start()
        self._alone.set()


def delay_aborts() -> None:
    """Has an abort end this process six seconds later, so that the lifeline can say what was its cause.

    When process 0 is gone JAX aborts from a thread of its own, sooner than any thread of Python wakes up. The signal's
    handler, in that thread, becomes C's `sleep`: it is given the signal's number, 6, and then the abort goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def last_word(connection: socket.socket) -> str:
    """Returns the line that waits in a connection, "" where the other side ended without one."""
    try:
        return hear(connection)
    except OSError:
        return ""


def keep_alive(connection: socket.socket) -> None:
    """Has the kernel ask whether the other host is still there; where it does not answer the connection ends."""
    connection.settimeout(5.0)  # of a word that was begun; the wait for it has none
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not all systems have all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
