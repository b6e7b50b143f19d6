"""Run `backbones ARGUMENTS` in a process that ends when the one that started it does, however that one ended.

A training that nobody waits for would write into a folder where another is started anew.
"""

import os
import sys
import threading
import time

from backbones.cli import main


def _end_with(parent: int) -> None:
    while os.getppid() == parent:  # orphans get another parent
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    sys.exit(main())
