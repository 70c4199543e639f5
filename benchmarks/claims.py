"""Work that several processes share."""

import contextlib
import fcntl
import zlib


@contextlib.contextmanager
def claimed(lock, key):
    """Whether no other process has claimed a piece of work; it is ours until the block ends.

    Args:
        lock: path of a file that is only there to be locked.
        key: string, which piece it is.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        is_free = True
        byte = zlib.crc32(key.encode())  # of the lock file, one for each piece
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except BlockingIOError:
            is_free = False
        yield is_free
