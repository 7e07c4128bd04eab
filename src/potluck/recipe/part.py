"""A participant's own part: its text, its machine, what it lets a coordinator ask. It stays with the participant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from potluck.errors import RecipeError
from potluck.files import page
from potluck.recipe.load import absolute_paths, explain
from potluck.recipe.sources import Source
from potluck.recipe.table import Table, setting
from potluck.untrusted import load_toml

Kind = Literal["train", "stream", "eager", "evaluate", "words", "predict", "claims", "moments", "edit"]


class Policy(Table):
    """What a coordinator may ask of this participant; anything beyond is refused, and the answer says so."""

    kinds: tuple[Kind, ...] = setting(
        ("train", "stream", "eager", "evaluate"),
        "Kinds of tasks. `words` gives away how often each word stands in the text; a trained tokenizer needs it. "
        "`predict` lets others ask the model `predicts_with`; whoever asks enough can learn what it knows. "
        "`claims`, `moments` and `edit` are for a run that edits facts (`[editing]`): keyed hashes of the edits, "
        "sums over the text's keys, and sums over the edits' keys and residuals.",
    )
    max_local_steps: int = setting(10_000, "Local steps in one task, at most.", unit="local steps", ge=1)
    max_bytes: int = setting(16 << 30, "Tensors of one message, either way, at most.", unit="bytes", ge=1)
    stores: tuple[str, ...] = setting(
        (), "Object stores, or folders in them, that may hold large messages, by URL; the message server may always."
    )
    max_parameters: int = setting(
        4_000_000_000, "Size of the models that are trained side by side, in all, at most.", unit="parameters", ge=1
    )
    max_disk: int = setting(
        200 << 30, "States that are kept on disk so that the run may go back to its last checkpoint, at most.",
        unit="bytes", ge=1,
    )  # fmt: skip


class Limits(Table):
    """How much of a run this participant takes part in, all sessions together; then it says goodbye and leaves."""

    rounds: int | None = setting(None, "Rounds that it trains in.", unit="rounds", ge=1)
    hours: float | None = setting(
        None, "How long it is there; the task under way is finished first.", unit="hours", gt=0
    )
    bytes: int | None = setting(None, "Bytes of all its answers; one that goes beyond stays here.", unit="bytes", ge=1)


class Part(Table):
    """One participant's own part of a run."""

    source: Source = setting(..., "Its text.")
    model: str | None = setting(
        None,
        "Its own copy of the model folder, if the recipe goes on from one: its shape counts, and what is frozen in it.",
    )
    predicts_with: str | None = setting(
        None, "Its own model folder, with the run's tokenizer: what answers tasks of kind `predict`."
    )
    edits: str | None = setting(None, "Its edits, a JSON file, for a run with `[editing]`; they stay here.")
    edit_secret: str | None = setting(
        None, "File with the secret that the participants share and the coordinator does not have."
    )
    device: str = setting("auto", "`auto`, `cpu`, `cuda` or `cuda:N`.", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch.", unit="threads", ge=0)
    policy: Policy = setting(Policy(), "What the coordinator may ask.")
    limits: Limits = setting(Limits(), "How much in all; left out: until the run is over.")

    @model_validator(mode="after")
    def _predicts(self) -> Part:
        if (self.predicts_with is None) == ("predict" in self.policy.kinds):
            raise ValueError("to answer `predict`, set predicts_with and allow it in policy.kinds: one needs the other")
        return self

    @model_validator(mode="after")
    def _edits(self) -> Part:
        if self.edits is not None and self.edit_secret is None:
            raise ValueError("to edit, set edit_secret as well: participants hash what they edit with one secret")
        return self


def load_part(
    path: Path | None,
    changes: Mapping[str, Any],
    policy: Mapping[str, Any],
    allow: Sequence[str],
    limits: Mapping[str, Any] = MappingProxyType({}),
) -> Part:
    """Read a participant's part, and put what the command line says over it.

    Args:
        path: TOML file; its paths are relative to it. ``None`` begins with nothing.
        changes, policy, limits: Keys of the part, of its policy and of its limits, as in the file.
        allow: Kinds of tasks beside those that the policy allows already.

    Raises:
        RecipeError: The file cannot be read, or what it says is wrong.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = load_toml(path)
        except FileNotFoundError:
            raise RecipeError(f"{path}: there is no such file") from None
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: cannot be read ({error})") from None
        raw = absolute_paths(raw, path.parent)
        if isinstance(raw.get("model"), str):  # in a recipe it is a table
            raw["model"] = str((path.parent / Path(raw["model"]).expanduser()).absolute())
    written = raw.get("policy", {})
    if isinstance(written, dict):  # else the model says what is wrong
        written = {**written, **policy}
        if allow:
            written["kinds"] = [*written.get("kinds", Policy().kinds), *allow]
    bounds = raw.get("limits", {})
    if isinstance(bounds, dict):
        bounds = {**bounds, **limits}
    whole = {**raw, **changes, "policy": written, "limits": bounds}
    if "source" not in whole:
        where = "--data or --part" if path is None else f"{path}: source"
        raise RecipeError(f"{where}: must be given: nothing names your text", "--data FOLDER takes every file in it")
    try:
        return Part.model_validate(whole)
    except ValidationError as error:
        faults = "; ".join(explain(fault, Part) for fault in error.errors(include_url=False))
        where = str(path or "what this participant brings")
        raise RecipeError(f"{where}: {faults}", f"{page('reference/recipe.md')} lists every key of a part") from None
