"""From what a person names to models and a rule: folders, adapters, URLs, and the settings of each rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from potluck.compose.adapter import CONFIG_FILE, load_adapter
from potluck.compose.base import Base
from potluck.compose.decoding.decode import Rule
from potluck.compose.decoding.deferral import Defer
from potluck.compose.decoding.endpoint import AtEndpoint
from potluck.compose.decoding.gates import load_deferral
from potluck.compose.decoding.models import Here, NextToken
from potluck.compose.decoding.rules import Contrastive, Glimpse, Proxy, Speculative, WhenUnsure
from potluck.compose.fit import check_adapter
from potluck.compose.lora import copied_with
from potluck.corpus.tokenizer import Vocabulary
from potluck.errors import ModelError, RecipeError

_SETTINGS = {
    "deferral": ("deferral", "threshold"),
    "entropy": ("threshold",),
    "speculative": ("draft",),
    "contrastive": ("strength", "plausibility"),
    "proxy": ("strength",),
    "glimpse": ("threshold", "delimiter"),
}
RULES = tuple(_SETTINGS)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A rule by its name, and its settings; ``None`` leaves one to the rule.

    Attributes:
        deferral: The folder of a learnt deferral.
        threshold: Of ``deferral`` a probability, of ``entropy`` and ``glimpse`` nats.
        draft: Tokens that ``speculative`` drafts at a time.
        strength, plausibility: λ and α of ``contrastive``; the strength of ``proxy``.
        delimiter: What ends a step of ``glimpse``.
    """

    rule: str
    deferral: Path | None = None
    threshold: float | None = None
    draft: int | None = None
    strength: float | None = None
    plausibility: float | None = None
    delimiter: str | None = None


def opened(
    place: str,
    base: Base,
    load: Callable[[Path], Base],
    key_from: str = "",
    warn: Callable[[str], None] = lambda doubt: None,
) -> NextToken:
    """An assistant of a base, named by its place.

    Args:
        place: A model folder, an adapter on the base in PEFT's format, or the URL of an OpenAI-compatible endpoint.
        load: Loads a model folder.
        key_from: Environment variable with the API key of endpoints.
        warn: Told what is doubtful of an adapter (`check_adapter`).

    Raises:
        ModelError: It cannot be loaded, is an adapter on another base, or does not share the base's tokenizer.
        RecipeError, EngineError: The endpoint cannot be used.
    """
    if "://" in place:
        return AtEndpoint(place, base.vocabulary, key_from)
    if not (Path(place) / CONFIG_FILE).exists():
        other = load(Path(place))
        if not same_tokens(other.vocabulary, base.vocabulary):
            hint = "models that decode together need the same tokenizer"
            raise ModelError(f"{place}: has another tokenizer than {base.place}", hint)
        return Here(place, other.model, base.vocabulary.size)
    adapter = load_adapter(Path(place))
    for doubt in check_adapter(base, adapter, place):
        warn(doubt)
    return Here(place, copied_with(base.model, adapter), base.vocabulary.size)


def same_tokens(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether each id names the same token in both: all that models share which decode together."""
    return one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def rule_of(choice: Choice, base: Base, assistants: Sequence[NextToken]) -> Rule:
    """The rule that was chosen.

    Raises:
        RecipeError: There is no such rule, or a setting has no effect on it or no sense.
        ModelError: The deferral is not for this base and these assistants.
    """
    given = {name: value for name, value in vars(choice).items() if name != "rule" and value is not None}
    if choice.rule not in _SETTINGS:
        raise RecipeError(f"there is no rule {choice.rule!r}", f"the rules are {', '.join(RULES)}")
    idle = [name for name in given if name not in _SETTINGS[choice.rule]]
    if idle:
        raise RecipeError(f"--{idle[0]} has no effect on the rule {choice.rule}", f"leave out --{idle[0]}")
    match choice.rule:
        case "deferral":
            return _deferral(choice, base, assistants)
        case "entropy":
            return WhenUnsure(**given)
        case "speculative":
            return Speculative(**given)
        case "contrastive":
            return Contrastive(**given)
        case "proxy":
            return Proxy(**given)
        case _:
            return Glimpse(_ends(base, given.pop("delimiter", "\n")), **given)


def _deferral(choice: Choice, base: Base, assistants: Sequence[NextToken]) -> Defer:
    if choice.deferral is None:
        raise RecipeError("the rule deferral needs what was learnt", "name its folder: --deferral FOLDER")
    if choice.threshold is not None and choice.threshold > 1:
        raise RecipeError(f"--threshold {choice.threshold:g}: of the rule deferral it is a probability")
    learnt = load_deferral(choice.deferral, base.content_hash)
    names = tuple(assistant.name for assistant in assistants)
    swapped = names != learnt.assistants and sorted(names) == sorted(learnt.assistants)
    if swapped or len(names) != len(learnt.assistants):
        raise ModelError(f"{choice.deferral}: was learnt with these assistants: {', '.join(learnt.assistants)}")
    width = base.model.config.hidden_size
    if learnt.gates.rows.shape[1] not in (width, 2 * width):
        raise ModelError(f"{choice.deferral}: its rows do not fit a base of width {width}")
    return Defer(learnt.gates, learnt.threshold if choice.threshold is None else choice.threshold)


def _ends(base: Base, delimiter: str) -> Callable[[Sequence[int]], bool]:
    """Whether tokens are a whole step: they hold the delimiter, or end the text."""
    vocabulary = base.vocabulary

    def ends(step: Sequence[int]) -> bool:
        said = vocabulary.tokenizer.decode(list(step), skip_special_tokens=False)
        return step[-1] in vocabulary.stops or delimiter in said

    if not delimiter:
        raise RecipeError("--delimiter is empty: no step would begin")
    return ends
