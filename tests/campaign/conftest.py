"""Fixtures of the campaigns."""

import pytest


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run in; nothing is handed down from one command to the next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BACKBONES_RUN", raising=False)
    return tmp_path
