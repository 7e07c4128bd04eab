"""Whether an adapter belongs to a base: the one check that every verb makes before it uses one."""

from __future__ import annotations

from pathlib import Path

from potluck.compose.adapter import Adapter
from potluck.compose.base import Base
from potluck.compose.lora import check_fits
from potluck.errors import ModelError


def check_adapter(base: Base, adapter: Adapter, place: str) -> list[str]:
    """Refuse an adapter that is not for this base, and say what is doubtful of one that may be.

    Weights are compared by their hash where the adapter carries one, as those trained here do. Else the base's name in
    its configuration is all there is, and one base has many names: another name is a warning.

    Args:
        place: What the adapter is called in messages.

    Returns:
        Warnings: it names another base, or adds nothing.

    Raises:
        ModelError: It was trained on other weights, or has linear maps that the base has not, or of another shape.
    """
    check_fits(base.model, adapter, place)
    found = without_effect(adapter, place)
    known = adapter.about.get("base_hash")
    if known is None:
        if adapter.base and not _one_name(adapter.base, base.place):
            found.append(
                f"{place}: says that it was trained on {adapter.base}, and this base is {base.place}; it carries no"
                " hash of its base's weights, so nobody can tell whether they are the same"
            )
    elif known != base.content_hash:
        hint = "name the base it was trained on; its configuration says " + (adapter.base or "nothing of it")
        raise ModelError(f"{place}: was trained on another base than {base.place}, with other weights", hint)
    return found


def without_effect(adapter: Adapter, place: str) -> list[str]:
    """A warning if an adapter adds nothing to any base."""
    return [] if adds_something(adapter) else [f"{place}: all its products are zero: it has no effect on any base"]


def adds_something(adapter: Adapter) -> bool:
    """Whether any rank of any map has an entry that is not zero on both sides."""
    return any(bool((f.up.norm(dim=0) * f.down.norm(dim=1)).any()) for f in adapter.modules.values())


def _one_name(said: str, place: str) -> bool:
    """Whether two names may be of one base.

    They are of one folder, or a run and its model; or have the same last part, as ``org/name`` and ``here/name``, also
    where ``hub`` keeps it, ``models--org--name/snapshots/…``.
    """
    one, other = Path(said), Path(place)
    if one.exists() and other.exists():
        return one.resolve() in (other.resolve(), (other / "model").resolve())
    name = one.name.casefold()
    return any(part == name or part.endswith(f"--{name}") for part in map(str.casefold, other.resolve().parts[-3:]))
