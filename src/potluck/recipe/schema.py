"""The typed recipe: everything that decides the numbers of one run.

Every key has a unit, a default and a sentence; ``docs/reference/recipe.md`` is made from them.
Unknown keys are refused. A recipe is frozen: what a run did is what its recipe says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from potluck.recipe.adaptive import adaptive_faults
from potluck.recipe.editing import Editing, editing_faults
from potluck.recipe.engine import HOUR, Engine, InProcess, Nats, engine_faults
from potluck.recipe.local import Local
from potluck.recipe.outer import Outer, OuterSgd, complete
from potluck.recipe.schedules import schedule_fault
from potluck.recipe.sources import Data, Participant
from potluck.recipe.table import Table, setting
from potluck.recipe.updates import Eager, Overlap, Streaming, Updates, chain_faults, streaming_faults

# --- tokenizer -------------------------------------------------------------------------------


class Bytes(Table):
    """Every byte is a token: nothing is learnt, nothing is shared."""

    kind: Literal["bytes"] = setting("bytes", "Every byte of UTF-8 text is one token.")


class Bpe(Table):
    """Byte-level BPE trained on the participants' training text, which the trainer reads in full."""

    kind: Literal["bpe"] = setting("bpe", "Byte-level BPE, trained on all participants' text.")
    vocab_size: int = setting(2048, "Size of the vocabulary.", unit="tokens", ge=257, le=1_000_000)


class TokenizerFolder(Table):
    """A tokenizer that already exists."""

    kind: Literal["folder"] = setting("folder", "A Hugging Face tokenizer folder.")
    path: str = setting(..., "Folder with `tokenizer.json`, relative to the recipe.")


Tokenizer = Annotated[Bytes | Bpe | TokenizerFolder, Field(discriminator="kind")]

# --- model -----------------------------------------------------------------------------------

PresetName = Literal["tiny", "small", "35m", "125m"]


class Preset(Table):
    """A shape with a name."""

    preset: PresetName = setting("tiny", "Named shape: about 1M, 6M, 35M or 125M parameters.")


class Shape(Table):
    """A Llama-type decoder (Qwen3-type with `qk_norm`), initialised at random from the seed."""

    layers: int = setting(..., "Decoder layers.", unit="layers", ge=1, le=1000)
    width: int = setting(..., "Size of the residual stream.", unit="features", ge=8, le=1 << 20)
    heads: int = setting(..., "Attention heads; must divide `width`.", unit="heads", ge=1)
    kv_heads: int | None = setting(
        None, "Key and value heads; must divide `heads`; all of them if left out.", unit="heads"
    )
    feedforward: int = setting(..., "Inner size of the gated (SwiGLU) MLP.", unit="features", ge=8, le=1 << 22)
    context: int = setting(2048, "Longest sequence the model is declared for.", unit="tokens", ge=8, le=1 << 24)
    qk_norm: bool = setting(False, "RMS-normalise queries and keys (Qwen3 in place of Llama).")
    tied: bool = setting(True, "Share the embedding matrix with the output head.")

    @model_validator(mode="after")
    def _divisible(self) -> Shape:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must split into {self.heads} heads of even size")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        return self


class ModelFolder(Table):
    """Any causal language model saved by `save_pretrained`."""

    path: str = setting(..., "Model folder, relative to the recipe.")


def _model_kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", ())
    return next((key for key in ("preset", "path") if key in keys), "shape")


Model = Annotated[
    Annotated[Preset, Tag("preset")] | Annotated[Shape, Tag("shape")] | Annotated[ModelFolder, Tag("path")],
    Discriminator(_model_kind),
]

# --- rounds and outer step ---------------------------------------------------------------------


class Rounds(Table):
    """How often, who, and how much."""

    count: int = setting(10, "Rounds of the run; 0 only edits a model (`[editing]`).", unit="rounds", ge=0)
    local_steps: int | None = setting(
        None, "Local steps per round (H); 20 if `local_tokens` is left out too.", unit="local steps", ge=1
    )
    local_tokens: int | None = setting(
        None, "Tokens per participant and round, in place of `local_steps`.", unit="tokens", ge=1
    )
    participants_per_round: int | None = setting(
        None, "How many are asked each round; everyone if left out.", unit="participants", ge=1
    )
    fraction: float | None = setting(
        None, "How many are asked each round, as a share of all.", unit="fraction", gt=0, le=1
    )
    sampling: Literal["without-replacement", "uniform"] = setting(
        "without-replacement",
        "Who is asked: nobody twice until all have served, or drawn afresh each round.",
    )
    weights: Literal["tokens", "examples", "data", "uniform"] = setting(
        "tokens",
        "What a contribution weighs in the mean: tokens or sequences of its local steps, alike where all take as many; "
        "tokens of training text that the participant holds, as it said when it first joined (`data`); or 1.",
    )
    min_contributors: int | None = setting(
        None, "Fewer contributions fail the round; half of those asked if left out.", unit="participants", ge=1
    )
    on_failure: Literal["continue", "stop"] = setting("continue", "What the run does when a participant fails.")
    deadline: float | None = setting(
        None,
        "A round ends then, with whoever has contributed; left out: it waits for all, over nats for an hour.",
        unit="seconds",
        gt=0,
    )
    grace: float | None = setting(
        None, "Once `min_contributors` have contributed, the others have so much longer.", unit="seconds", ge=0
    )
    late: Literal["drop", "keep"] = setting(
        "drop", "What comes after its round has ended is dropped, or kept for the round that is then under way."
    )
    max_update_norm: float | None = setting(None, "A contribution is rejected if its update has a larger norm.", gt=0)
    evaluate_every: int = setting(
        1, "Rounds between two evaluations on held-out text; the last is always evaluated.", unit="rounds", ge=1
    )
    streaming: Overlap | None = setting(
        None, "Local steps go on while an exchange travels; left out: everybody waits (DiLoCo)."
    )


# --- where and how -----------------------------------------------------------------------------


class Compute(Table):
    """What the local steps run on. It does not change the algorithm."""

    device: str = setting("auto", "`auto`, `cpu`, `cuda` or `cuda:N`.", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "Autocast of forward passes; `auto` is bf16 on a GPU and fp32 elsewhere."
    )
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch.", unit="threads", ge=0)
    compile: bool = setting(False, "Run the model through `torch.compile`.")
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, more time.")


class Records(Table):
    """What the run leaves behind."""

    folder: str = setting("runs/{name}", "Run folder, relative to where potluck is started.")
    checkpoint_every: int | None = setting(
        None,
        "Rounds between two checkpoints; left out: 1, and of large ones so many that a round writes 500 MB on average.",
        unit="rounds",
        ge=1,
    )
    keep_last: int = setting(2, "Checkpoints kept, the newest.", unit="checkpoints", ge=1)
    keep_best: bool = setting(True, "Also keep the weights of the one with the lowest held-out loss.")


class Recipe(Table):
    """One run."""

    version: Literal[1] = setting(1, "Version of the recipe format.")
    name: str = setting("run", "Name of the run: letters, digits, `.`, `_`, `-`.")
    seed: int = setting(0, "Seed of weights, batches, sampling and splits.", ge=0, lt=2**32)
    data: Data = setting(Data(), "Text: sources, split, held-out share.")
    participants: tuple[Participant, ...] = setting((), "Who takes part, each with its own source.")
    tokenizer: Tokenizer = setting(Bytes(), "How text becomes tokens.")
    model: Model = setting(Preset(), "The network everyone trains.")
    local: Local = setting(Local(), "Local steps.")
    rounds: Rounds = setting(Rounds(), "Rounds.")
    outer: Outer = setting(OuterSgd(), "The outer optimizer.")
    updates: Updates = setting(Updates(), "How updates travel: compression and download.")
    compute: Compute = setting(Compute(), "Device and precision.")
    editing: Editing | None = setting(None, "Facts that are changed together; left out: none are.")
    engine: Engine = setting(InProcess(), "What runs the participants.")
    records: Records = setting(Records(), "Run folder and checkpoints.")

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_model(cls, values: Any) -> Any:
        """A model folder brings its own tokenizer unless the recipe names another."""
        if isinstance(values, dict) and "tokenizer" not in values:
            path = values["model"].get("path") if isinstance(values.get("model"), dict) else None
            if path is not None:
                return {**values, "tokenizer": {"kind": "folder", "path": path}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        contradiction = next(_contradictions(self), None)
        if contradiction:
            raise ValueError(contradiction)
        return self

    @property
    def participant_names(self) -> tuple[str, ...]:
        """Names in the order in which contributions are summed."""
        if self.data.split is not None:
            digits = len(str(self.data.split.participants - 1))
            return tuple(f"p{i:0{digits}}" for i in range(self.data.split.participants))
        return tuple(p.name for p in self.participants)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one local step."""
        return self.local.batch_size * self.local.accumulation * self.local.sequence_length

    @property
    def local_steps(self) -> int:
        """Local steps per round, H."""
        if self.rounds.local_tokens is not None:
            return self.rounds.local_tokens // self.tokens_per_step
        return self.rounds.local_steps or 20

    @property
    def total_local_steps(self) -> int:
        """Local steps of the run: the horizon of the learning-rate schedule."""
        return self.rounds.count * self.local_steps

    @property
    def training_kind(self) -> str:
        """The kind of a training task: ``train`` from the shared state; ``stream``, ``eager`` go on from one's own."""
        match self.rounds.streaming:
            case Streaming():
                return "stream"
            case Eager():
                return "eager"
            case None:
                return "train"

    @property
    def outer_rule(self) -> Outer:
        """The outer optimizer, with what the recipe leaves out taken from its local steps."""
        return complete(self.outer, self.local.optimizer, self.fragments * self.local_steps)

    @property
    def fragments(self) -> int:
        """Parts of the model that are exchanged in turn, P; 1 is the whole at once."""
        return self.rounds.streaming.fragments if isinstance(self.rounds.streaming, Streaming) else 1

    @property
    def overlap(self) -> int:
        """Local steps that a participant takes while an exchange travels, tau."""
        match self.rounds.streaming:
            case Streaming(overlap=steps):
                return steps
            case Eager():
                return self.local_steps
            case None:
                return 0

    def steps_of_round(self, number: int) -> tuple[int, int]:
        """Local steps of round ``number`` (from 1): before its update is sent, and while that travels.

        Each update holds ``local_steps`` steps; what overlaps one exchange belongs to the next, so the last has none.
        """
        head = self.local_steps - (self.overlap if number > 1 else 0)
        return head, (self.overlap if number < self.rounds.count else 0)

    @property
    def asked_per_round(self) -> int:
        """How many participants are asked each round."""
        everyone = len(self.participant_names)
        if self.rounds.fraction is not None:
            return max(1, round(self.rounds.fraction * everyone))
        return self.rounds.participants_per_round or everyone

    @property
    def deadline(self) -> float | None:
        """Seconds after which a round or an evaluation ends; ``None`` waits for all, as does one process by the clock.

        On the wall clock of one process nobody is waited for: participants take turns.
        """
        if isinstance(self.engine, Nats):
            return self.rounds.deadline or HOUR
        return self.rounds.deadline if any(p.profile is not None for p in self.participants) else None

    @property
    def keeps_late(self) -> bool:
        """Whether an answer may come after its round, and count in the next."""
        return self.rounds.late == "keep" and self.deadline is not None

    @property
    def patience(self) -> float | None:
        """Seconds for which the answer to a task of training is of use: if late ones are kept, to the next round's end.

        In between everybody may be asked to evaluate.
        """
        return self.deadline if self.deadline is None or not self.keeps_late else 3 * self.deadline

    @property
    def min_contributors(self) -> int:
        """Contributions without which a round fails."""
        return self.rounds.min_contributors or -(-self.asked_per_round // 2)


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """Sentences that say which keys contradict each other."""
    names = recipe.participant_names
    for name in (recipe.name, *names):
        if not NAME.fullmatch(name):
            yield f"name {name!r}: use 1 to 64 letters, digits, '.', '_' or '-'"
    if recipe.participants and recipe.data.split is not None:
        yield "participants and data.split: name the participants or split one source, not both"
    if not names:
        yield "participants: nobody takes part; add [[participants]] or [data.split]"
    if len(set(names)) < len(names):
        yield f"participants: {next(n for n in names if names.count(n) > 1)!r} is named twice"
    if (recipe.data.split is None) != (recipe.data.source is None):
        yield "data.source and data.split go together: one source, split among participants"
    if recipe.rounds.local_steps is not None and recipe.rounds.local_tokens is not None:
        yield "rounds.local_steps and rounds.local_tokens: give one of them"
    if recipe.rounds.local_tokens is not None and recipe.rounds.local_tokens % recipe.tokens_per_step:
        yield (
            f"rounds.local_tokens {recipe.rounds.local_tokens} is not a multiple of the "
            f"{recipe.tokens_per_step} tokens of one local step (batch_size x accumulation x sequence_length)"
        )
    if recipe.rounds.participants_per_round is not None and recipe.rounds.fraction is not None:
        yield "rounds.participants_per_round and rounds.fraction: give one of them"
    if recipe.asked_per_round > len(names):
        yield f"rounds.participants_per_round {recipe.asked_per_round}: there are only {len(names)} participants"
    if recipe.min_contributors > recipe.asked_per_round:
        yield f"rounds.min_contributors {recipe.min_contributors}: only {recipe.asked_per_round} are asked each round"
    if recipe.rounds.late == "keep" and recipe.rounds.streaming is not None:
        yield "rounds.late and rounds.streaming: what is late is kept only where a round has the whole model"
    if recipe.rounds.count and (fault := schedule_fault(recipe.local.schedule, recipe.total_local_steps)):
        yield fault
    yield from chain_faults(recipe.updates.links)
    yield from streaming_faults(recipe)
    yield from adaptive_faults(recipe)
    yield from engine_faults(recipe)
    yield from editing_faults(recipe)
    profiled = [p.name for p in recipe.participants if p.profile is not None]
    if profiled and len(profiled) < len(names):
        yield "participants.profile: give every participant a profile or none, one clock serves all"
