"""One lock for all that imports torch: its parts import each other, which two threads at once do not survive."""

import threading

__all__ = ["importing"]

importing = threading.RLock()
