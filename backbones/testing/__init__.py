"""The conformance kit: what every backbone promises, as plain check functions.

A check takes `build`, a function that returns a fresh backbone for the options it is given, and raises
`CheckFailed` where the promise is broken. `check_backbone` runs them all; `parametrize_backbones` makes them
tests of pytest; `check_plugin` looks at all that one distribution has installed.
"""

from .common import CheckFailed
from .running import (
    CHECKS,
    SLOW_CHECKS,
    CheckResult,
    check_backbone,
    check_plugin,
    parametrize_backbones,
    smallest_of_each_family,
)

__all__ = [
    "CHECKS",
    "SLOW_CHECKS",
    "CheckFailed",
    "CheckResult",
    "check_backbone",
    "check_plugin",
    "parametrize_backbones",
    "smallest_of_each_family",
]
