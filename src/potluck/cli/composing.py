"""The verbs that build from parts: merge, library, expert."""

from __future__ import annotations

import typer

verbs = typer.Typer()
