"""SmolLM2-135M-Instruct as a folder, for `make test-real`; `make test` does not come here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("POTLUCK_SMOLLM2", "")
collect_ignore_glob = [] if FOLDER else ["test_*.py"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return Path(FOLDER)
