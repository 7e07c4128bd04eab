"""Every decoder that reads bytes from outside reads or refuses them, within bounds."""

from __future__ import annotations

import json
import subprocess
import sys


def test_every_decoder_reads_or_refuses_what_it_is_given() -> None:
    """For longer: ``python -m tests.fuzz 600``."""
    command = [sys.executable, "-m", "tests.fuzz", "--count", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert not figures["wrong"], "\n".join(f"{what}\n    {data}" for what, data in figures["wrong"].items())
    assert figures["refused"] > figures["inputs"] / 2
