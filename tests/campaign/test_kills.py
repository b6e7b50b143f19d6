"""Trainings that are killed at any moment are readable, and go on to the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # many trainings, forked from one process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="trainings are forked")
def test_killed_trainings_go_on_to_the_same_numbers(tmp_path):
    count = os.environ.get("KILLS", "12")
    script = Path(__file__).with_name("kills.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), count]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == int(count)
    assert "failed" not in counts, done.stderr
    assert {"segmentation", "classification", "detection", "multitask", "SIGKILL", "SIGTERM"} <= counts.keys()
