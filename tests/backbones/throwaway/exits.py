"""A plugin that would end the program."""

import sys

BACKBONES_API = 1

sys.exit("throwaway plugin wants out")
