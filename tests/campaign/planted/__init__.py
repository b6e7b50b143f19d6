"""Backbones and plugins that break one promise each, for `test_planted_faults.py`."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A planted fault: what it is, who has it, which check is meant for it, and what the message must say."""

    what: str
    subject: Any
    check: str
    says: str


#: Of backbones: the subject is a class, or a function that builds one.
FAULTS: list[Fault] = []
#: Of plugins: the subject is the source of the plugin's module.
PLUGIN_FAULTS: list[Fault] = []


def planted(what, check, says):
    """Adds the class or function below to `FAULTS`."""

    def add(subject):
        FAULTS.append(Fault(what, subject, check, says))
        return subject

    return add
