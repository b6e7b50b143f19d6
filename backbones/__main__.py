"""`python -m backbones` is `backbones`; torchrun starts it by this name."""

import sys

from backbones.cli import main

if __name__ == "__main__":
    sys.exit(main())
