"""The part of a recipe that says where text comes from and who holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from potluck.recipe.table import Table, setting


class Folder(Table):
    """Text files below a folder, or one file, one document each."""

    path: str = setting(..., "Folder, or one text file, relative to the recipe.")
    glob: str = setting("**/*", "Which files below it.")
    order: Literal["path", "shuffled"] = setting("path", "Order of the documents: by path, or by a hash of the path.")


class Package(Table):
    """The Python source of an installed package, found without importing it."""

    package: str = setting(..., "Name of the package; `stdlib` is Python's standard library.")
    glob: str = setting("**/*.py", "Which files below it.")
    order: Literal["path", "shuffled"] = setting("path", "Order of the documents: by path, or by a hash of the path.")


class JsonLines(Table):
    """One JSON object a line, one document each."""

    jsonl: str = setting(..., "File, relative to the recipe.")
    field: str = setting("text", "Field that holds the text.")
    group_field: str | None = setting(None, "Field that names the document's group.")


class SeparatedFile(Table):
    """One text file that holds many documents."""

    file: str = setting(..., "File, relative to the recipe.")
    separator: str = setting("<<<FILE ", "A line that starts with this begins a document; its rest is the name.")


class HubDataset(Table):
    """A dataset of the `datasets` library: a `save_to_disk` folder, or a hub id."""

    dataset: str = setting(..., "Folder relative to the recipe (if it exists), else a hub id.")
    subset: str | None = setting(None, "Configuration of a hub dataset.")
    split: str = setting("train", "Split of the dataset.")
    field: str = setting("text", "Column that holds the text.")
    group_field: str | None = setting(None, "Column that names the document's group.")


class World(Table):
    """Sentences about the people of a synthetic world: facts that a model can be asked for, to be edited."""

    world: int = setting(..., "How many people; each has five facts.", unit="people", ge=1, le=336)
    first: int = setting(0, "Leave out so many people before them.", unit="people", ge=0)
    tellings: int = setting(20, "How often each phrasing of each fact is told.", unit="times", ge=1, le=1000)
    world_seed: int = setting(0, "Decides names and facts.", ge=0)


def key_of(data: Path) -> Literal["path", "jsonl"]:
    """The key of a source that ``--data`` names."""
    return "jsonl" if data.suffix == ".jsonl" and not data.is_dir() else "path"


_SOURCE_KEYS = ("path", "package", "jsonl", "file", "dataset", "world")


def _source_kind(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", ())
    present = [key for key in _SOURCE_KEYS if key in keys]
    return present[0] if len(present) == 1 else None


Source = Annotated[
    Annotated[Folder, Tag("path")]
    | Annotated[Package, Tag("package")]
    | Annotated[JsonLines, Tag("jsonl")]
    | Annotated[SeparatedFile, Tag("file")]
    | Annotated[HubDataset, Tag("dataset")]
    | Annotated[World, Tag("world")],
    Discriminator(
        _source_kind,
        custom_error_type="source",
        custom_error_message="a source has exactly one of: " + ", ".join(_SOURCE_KEYS),
    ),
]


class Split(Table):
    """How one source is divided among participants p0, p1, ..."""

    participants: int = setting(..., "How many participants share the source.", unit="participants", ge=1, le=10_000)
    how: Literal["iid", "contiguous", "groups", "dirichlet"] = setting(
        "iid",
        "`iid`: each document at random; `contiguous`: equal stretches in source order; `groups`: "
        "whole groups, balanced by bytes; `dirichlet`: each group spread by Dirichlet(alpha).",
    )
    alpha: float | None = setting(
        None, "Dirichlet concentration: small is unequal, large is even; only with `dirichlet`.", gt=0
    )

    @model_validator(mode="after")
    def _alpha_with_dirichlet(self) -> Split:
        if (self.how == "dirichlet") != (self.alpha is not None):
            raise ValueError('alpha goes with how = "dirichlet", and only with it')
        return self


class Data(Table):
    """Text for all participants."""

    source: Source | None = setting(None, "One source, to be split; leave out with named participants.")
    split: Split | None = setting(None, "How `source` is divided.")
    validation_fraction: float = setting(
        0.1, "Share of the documents held out, chosen by their hash; 0 evaluates nothing.", unit="fraction", ge=0, lt=1
    )
    train_bytes: int | None = setting(
        None, "At most so much training text per participant; all of it if left out.", unit="bytes", ge=1
    )
    validation_bytes: int = setting(
        32_768,
        "At most so much held-out text per participant: as a token has a byte at least, it bounds evaluations.",
        unit="bytes",
        ge=1,
    )
    shards: str = setting(
        "runs/shards", "Folder of the token shards, relative to where potluck is started; shared by runs."
    )


class Profile(Table):
    """A simulated device; with profiles the engine keeps a virtual clock."""

    steps_per_second: float = setting(..., "Speed of local steps.", unit="local steps per second", gt=0)
    uplink: float = setting(100.0, "Bandwidth from the participant.", unit="Mbit/s", gt=0)
    downlink: float = setting(100.0, "Bandwidth to the participant.", unit="Mbit/s", gt=0)
    latency: float = setting(50.0, "One-way delay of a message.", unit="ms", ge=0)
    availability: float = setting(
        1.0, "Probability that it takes a task; drawn from the seed.", unit="probability", gt=0, le=1
    )


class Participant(Table):
    """One party with its own text."""

    name: str = setting(..., "Name: letters, digits, `.`, `_`, `-`.")
    source: Source | None = setting(None, "Its text; over `nats` left out: it is named where the participant joins.")
    edits: str | None = setting(
        None, "Its edits, a JSON file relative to the recipe; over `nats` it names them in its part, where they stay."
    )
    profile: Profile | None = setting(None, "A simulated device, for the `inprocess` engine.")
