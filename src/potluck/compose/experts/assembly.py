"""From experts to one model, and back to a model in which one of them never was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potluck.compose.base import Base
from potluck.compose.experts.parts import Expert, check_fits
from potluck.compose.experts.training import fresh_mixture
from potluck.compose.training import Lesson, only_training, train_part
from potluck.errors import ModelError, RecipeError
from potluck.models.mixture import MixedFeedForward, MixtureConfig, MixtureForCausalLM


def assembled(
    base: Base, experts: Sequence[Expert], experts_per_token: int = 4, bias: float = 0.0
) -> MixtureForCausalLM:
    """The mixture of these experts: their weights side by side, their columns of evidence side by side.

    Args:
        experts_per_token: As many experts at most, beside the anchor.
        bias: Added to every expert's logit, not above 0: the further below, the surer the evidence must be.

    Raises:
        ModelError: An expert was trained beside another base or against another public text, or two have one name.
        RecipeError: The bias is above 0.
    """
    check_together(base, experts)
    if not bias <= 0:
        raise RecipeError(f"a bias of {bias:g} is above 0", "a negative one leaves more to the base")
    evidence = {expert.name: expert.evidence for expert in experts}
    shapes = [expert.shape for expert in experts]
    model = fresh_mixture(base, shapes, evidence, experts_per_token=experts_per_token, seed=0)
    with torch.no_grad():
        model.router.bias.fill_(bias)
        for number, layer in enumerate(model.layers):
            prefix = f"layers.{number}."
            for expert, place in zip(experts, layer.experts, strict=True):
                mine = {n.removeprefix(prefix): w for n, w in expert.weights.items() if n.startswith(prefix)}
                place.load_state_dict(mine)
    return model.requires_grad_(False)


def check_together(base: Base, experts: Sequence[Expert]) -> None:
    """Hold experts to one frozen half: the base, bit for bit, and the public text.

    Raises:
        ModelError: saying who differs.
    """
    if not experts:
        raise ModelError("there is no expert to assemble")
    names = [expert.name for expert in experts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ModelError(f"two experts are named {twice}", "train one of them into a folder of another name")
    for expert in experts:
        check_fits(base, expert)
        if expert.public_hash != experts[0].public_hash:
            hint = "all experts must be trained with the same --public text"
            raise ModelError(f"expert {expert.name}: trained with another public text than {names[0]}", hint)


def router_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The rows by their place, of a mixture or of a FlexOlmo."""
    ends = ("router.evidence", "router.bias", ".mlp.gate.weight")
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}


def tune_router(model: PreTrainedModel, public: np.ndarray, lesson: Lesson) -> None:
    """Let the router alone learn, on public text (FlexOlmo's router tuning).

    Raises:
        CorpusError: The text is shorter than one sequence.
    """
    with only_training(model, list(router_parameters(model).values())):
        train_part(model, [public], lesson, kind="router")


def without(model: MixtureForCausalLM, name: str) -> MixtureForCausalLM:
    """The mixture as if this expert had never been in it: nothing that is left depends on who else was there.

    That holds for a router of evidence; one that was tuned has learned beside the expert, and has to be tuned anew.

    Raises:
        ModelError: There is no such expert, or no other.
    """
    gone = place_of(model.config.names, name)
    kept = [expert for expert in model.config.experts or [] if expert["name"] != name]
    config = MixtureConfig(**{**model.config.to_dict(), "experts": kept})
    config._attn_implementation = model.config._attn_implementation
    left = MixtureForCausalLM(config)
    left.generation_config = model.generation_config
    left.load_state_dict(_without(model, gone))
    left.train(False)
    return left.requires_grad_(False)


def place_of(names: Sequence[str], name: str) -> int:
    """Which of several experts this is, if there is another.

    Raises:
        ModelError: There is no such expert, or no other.
    """
    if name not in names:
        raise ModelError(f"there is no expert {name}", f"there are {', '.join(names)}")
    if len(names) == 1:
        raise ModelError(f"{name} is the only expert", "what is left without it is the base: use that")
    return names.index(name)


def routing_shares(model: MixtureForCausalLM, tokens: np.ndarray, sequence_length: int = 128) -> dict[str, float]:
    """How much of a text each expert answered for: its mean gate, the base's too; together 1.

    Args:
        tokens: Token ids, ``(T,)``, read in stretches of ``sequence_length``.
    """
    length = min(sequence_length, len(tokens))
    rows = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)
    with torch.inference_mode():
        gates = model.router(rows.to(model.device))
    shares = gates.double().mean((0, 1)).tolist()
    return dict(zip(["base", *model.config.names], shares, strict=True))


def _without(model: MixtureForCausalLM, gone: int) -> dict[str, Tensor]:
    places = [f"{path}.experts." for path, module in model.named_modules() if isinstance(module, MixedFeedForward)]
    left = {}
    for name, tensor in model.state_dict().items():
        place = next((place for place in places if name.startswith(place)), None)
        if name.startswith("router."):
            left[name] = torch.cat([tensor[..., :gone], tensor[..., gone + 1 :]], dim=-1)
        elif place is None:
            left[name] = tensor
        else:
            number, _, inner = name.removeprefix(place).partition(".")
            if int(number) != gone:
                left[f"{place}{int(number) - (int(number) > gone)}.{inner}"] = tensor
    return left
