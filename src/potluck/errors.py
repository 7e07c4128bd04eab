"""Every error a person can meet, and the exit code of each class.

::

    PotluckError            1   anything below, and nothing else
    ├── RecipeError         3   the recipe is wrong or contradicts itself
    ├── CorpusError         4   text is missing, empty or too small
    ├── ModelError          5   a model, its weights or its tokenizer cannot be used
    ├── TrainingError       6   training cannot go on
    │   ├── NotFinite           loss or gradients stayed NaN or infinite
    │   └── TooFewContributors  a round had fewer contributions than it needs
    ├── CheckpointError     7   a saved run is damaged or belongs to something else
    ├── StorageError        8   the disk is full or cannot be written
    ├── RunFolderError      9   the run folder is in use, taken or not a run
    ├── MissingExtra       10   an optional library is not installed
    ├── EngineError        11   the message server cannot be reached, or does not do what it should
    │   ├── Refused             the server does not let this key do that
    │   ├── AlreadyServed       another process takes part under this name
    │   ├── Outrun              something else was stored first
    │   ├── Missing             a part of a blob is not, or not yet, there
    │   └── Damaged             what came is not what was announced
    ├── InviteError        12   an invite or a key cannot be used
    ├── PolicyError        13   a participant does not allow what it is asked
    ├── EditError          14   edits, or what is to be forgotten, are wrong or contradict each other
    └── Interrupted       130   stopped by Ctrl-C or SIGTERM, resumable

Exit code 0 is success and 2 a mistake on the command line; an unforeseen exception leaves with 1
and its traceback. ``docs/reference/exit-codes.md`` says how to mend each.
"""

from __future__ import annotations


class PotluckError(Exception):
    """An error for a person: what is wrong and where, and in ``hint`` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(PotluckError):
    """The recipe is wrong or contradicts itself."""

    exit_code = 3


class CorpusError(PotluckError):
    """Text is missing, empty or too small."""

    exit_code = 4


class ModelError(PotluckError):
    """A model, its weights or its tokenizer cannot be used."""

    exit_code = 5


class TrainingError(PotluckError):
    """Training cannot go on."""

    exit_code = 6


class NotFinite(TrainingError):
    """Loss or gradients stayed NaN or infinite for longer than the recipe allows."""


class TooFewContributors(TrainingError):
    """A round had fewer contributions than the recipe asks for."""


class CheckpointError(PotluckError):
    """A saved run is damaged or belongs to something else."""

    exit_code = 7


class StorageError(PotluckError):
    """The disk is full or cannot be written."""

    exit_code = 8


class RunFolderError(PotluckError):
    """The run folder is in use, already taken or not a run."""

    exit_code = 9


class MissingExtra(PotluckError):
    """An optional library is not installed."""

    exit_code = 10


class EngineError(PotluckError):
    """The message server cannot be reached, or does not do what it should."""

    exit_code = 11


class Refused(EngineError):
    """The message server does not let this key do that."""


class AlreadyServed(EngineError):
    """Another process takes part under this participant's name."""


class Outrun(EngineError):
    """Something else was stored under a subject since it was last read."""


class Missing(EngineError):
    """A part of a blob is not, or not yet, on the server."""


class Damaged(EngineError):
    """What came is not what was announced; trying again does not mend it."""


class InviteError(PotluckError):
    """An invite or a key cannot be used."""

    exit_code = 12


class PolicyError(PotluckError):
    """A participant does not allow what it is asked."""

    exit_code = 13


class EditError(PotluckError):
    """Edits, or what is to be forgotten, are wrong or contradict each other; the model is as it was."""

    exit_code = 14


class Interrupted(PotluckError):
    """The run was stopped from outside; what it had reached is saved."""

    exit_code = 130
