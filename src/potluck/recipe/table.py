"""What every table of a recipe has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Table(BaseModel):
    """A frozen table that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def setting(default: Any, sentence: str, *, unit: str = "", **bounds: Any) -> Any:
    """A recipe key: default (``...`` if it must be given), one sentence, unit and bounds."""
    return Field(default, description=sentence, json_schema_extra={"unit": unit}, **bounds)
