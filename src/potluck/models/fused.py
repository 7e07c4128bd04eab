"""Frozen causal language models of several participants, fused token by token by a small head that learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, cross_entropy, linear, log_softmax, normalize, pad
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.generic import ModelOutput

DECAYS = (0.98, 0.9, 0.5)  # a track record of some 50, 10 and 2 tokens
_TRUST = 0.5  # of each track record at first: where training takes it
_RECORD_TOKENS = 256  # 0.98 to this power is below a hundredth
_MOST_PARTS = 64
_MOST_RATIO = 60.0  # of two models' probabilities of a token, as a logarithm
_MOST_OPEN = 1 - 2**-16  # something is always left to the primary, so that no token's probability is lost


class AdaFusion(nn.Module):
    """Features of several frozen models, brought to one width and fused by attention (AdaFusion, arXiv 2508.05084).

    ::

        v_m = P_m h_m                                                    compress and align
        a   = softmax_m(prompt . v_m / |v_m| + beta . e_m + b_m)       attention of a learnt prompt
        z   = sum_m a_m v_m                                              fuse

    a is what is reported: how much of each prediction is whose. Prompt, beta and b start at zero: at first all weigh
    the same.

    Args:
        widths: Width d_m of each model's features.
        common: The common width c.
        evidence: Number of further figures e_m that are known of each model; the paper has none.
    """

    def __init__(self, widths: Sequence[int], common: int, evidence: int = 0) -> None:
        super().__init__()
        self.projections = nn.ParameterList(nn.Parameter(torch.empty(common, width)) for width in widths)
        self.prompt = nn.Parameter(torch.empty(common))
        self.bias = nn.Parameter(torch.empty(len(widths)))
        self.trust = nn.Parameter(torch.empty(evidence))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The start: projections that keep distances, and uniform attention."""
        for projection in self.projections:
            nn.init.orthogonal_(projection)
        for parameter in (self.prompt, self.bias, self.trust):
            nn.init.zeros_(parameter)

    def forward(self, features: Sequence[Tensor], evidence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            features: h_m of each model, ``(…, d_m)``.
            evidence: e, ``(…, M, E)``.

        Returns:
            z ``(…, c)`` and a ``(…, M)``.
        """
        projected = [linear(h, projection) for h, projection in zip(features, self.projections, strict=True)]
        values = torch.stack(projected, dim=-2)
        scores = normalize(values, dim=-1) @ self.prompt + self.bias
        if evidence is not None:
            scores = scores + evidence @ self.trust
        attention = torch.softmax(scores, dim=-1)
        return (attention.unsqueeze(-2) @ values).squeeze(-2), attention


class FusedConfig(PreTrainedConfig):
    """The parts and how they are fused.

    Attributes:
        parts: Configuration of each frozen model, in the order of ``names``.
        names: Whose model each is.
        primary: Place of the model that the fusion begins as.
        width: The common width c.
    """

    model_type = "potluck_fused"
    parts: list[dict[str, Any]] | None = None
    names: list[str] | None = None
    primary: int = 0
    width: int = 32
    vocab_size: int = 0
    max_position_embeddings: int = 0
    num_hidden_layers: int = 0


class FusionHead(nn.Module):
    """All that learns.

    ::

        p = (1 - lambda) p_primary + lambda sum_m a_m p_m              lambda = tanh 10 |opening|
        logits = log p + W_primary (U z)                               W_primary: the primary's output head

    lambda and U start at zero: at first the fusion is the primary model, bit for bit. The trust in track records
    starts where training takes it.
    """

    def __init__(self, widths: Sequence[int], config: FusedConfig) -> None:
        super().__init__()
        self.attention = AdaFusion(widths, config.width, evidence=len(DECAYS))
        self.opening = nn.Parameter(torch.zeros(1))
        self.residual = nn.Parameter(torch.zeros(widths[config.primary], config.width))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The start."""
        self.attention.reset()
        nn.init.constant_(self.attention.trust, _TRUST)
        nn.init.zeros_(self.opening)
        nn.init.zeros_(self.residual)

    @property
    def opened(self) -> Tensor:
        """lambda; its derivative at the start is that from the right, which is not zero."""
        return _MOST_OPEN * torch.tanh(10 * torch.where(self.opening < 0, -self.opening, self.opening))


@dataclass
class FusedOutput(ModelOutput):
    """Of a fused model.

    Attributes:
        weights: What each part weighs in each prediction, ``(batch, length, M)``, adding up to 1: the attribution.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    weights: Tensor | None = None


class FusedForCausalLM(PreTrainedModel, GenerationMixin):
    """Several frozen causal language models with one vocabulary, and a `FusionHead`, the only part that learns.

    There is no key-value cache: each generated token reads the whole text anew, for what the parts made of it is
    what the fusion goes by.
    """

    config_class = FusedConfig
    config: FusedConfig
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config: FusedConfig) -> None:
        super().__init__(config)
        tables, names = config.parts or [], config.names or []
        named = len(tables) == len(names) == len(set(names))
        if not (named and 2 <= len(tables) <= _MOST_PARTS and 0 <= config.primary < len(tables)):
            raise ValueError(
                f"a fused model has 2 to {_MOST_PARTS} parts, each with a name of its own, and one is the primary"
            )
        for place, table in enumerate(tables):
            self.add_module(f"part{place}", _empty_part(table))
        widths = [int(part.config.hidden_size) for part in self.parts]
        self.fusion = FusionHead(widths, config)
        cast(Any, self).post_init()
        self.freeze()

    @property
    def parts(self) -> list[PreTrainedModel]:
        """The frozen models, in the order of ``config.names``."""
        return [cast(PreTrainedModel, getattr(self, f"part{place}")) for place in range(len(self.config.parts or []))]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`; the parts come frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def freeze(self) -> None:
        """Let the head alone learn."""
        self.requires_grad_(False)
        self.fusion.requires_grad_(True)

    def train(self, mode: bool = True) -> FusedForCausalLM:
        """Set the head's mode: what is frozen has no dropout either."""
        super().train(mode)
        for part in self.parts:
            part.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The primary's."""
        return self.parts[self.config.primary].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The primary's."""
        return cast(nn.Module, self.parts[self.config.primary].get_output_embeddings())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> FusedOutput:
        """Predictions of each next token, ``(batch, length, V)``, and what each part weighed in them."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        features, parts_logits = self._ask_parts(input_ids, {k: v for k, v in given.items() if v is not None})
        log_probs = [log_softmax(logits.float(), dim=-1) for logits in parts_logits]
        record = track_record(log_probs, input_ids, attention_mask)
        fused, attention = self.fusion.attention(features, record)
        primary = self.config.primary
        alone = torch.eye(len(log_probs), device=attention.device)[primary]
        weights = alone + self.fusion.opened * (attention - alone)
        ratios = [(each - log_probs[primary]).clamp(max=_MOST_RATIO).exp() for each in log_probs]
        mixture = sum(w.unsqueeze(-1) * ratio for w, ratio in zip(weights.unbind(-1), ratios, strict=True))
        head = cast(Tensor, self.get_output_embeddings().weight)
        residual = linear(linear(fused, self.fusion.residual), head)
        logits = parts_logits[primary].float() + torch.log(cast(Tensor, mixture)) + residual
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return FusedOutput(loss=loss, logits=logits, weights=weights)

    def prepare_inputs_for_generation(self, input_ids: Any, *_: Any, attention_mask: Any = None, **__: Any) -> Any:
        """The whole text each time."""
        return cast(Any, super()).prepare_inputs_for_generation(input_ids, attention_mask=attention_mask)

    @torch.no_grad()
    def _ask_parts(self, input_ids: Tensor, given: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Last hidden states, ``(batch, length, d_m)``, and logits of each part."""
        outputs = [part(input_ids, output_hidden_states=True, use_cache=False, **given) for part in self.parts]
        return [output.hidden_states[-1] for output in outputs], [output.logits for output in outputs]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FusionHead):
            module.reset()


def track_record(log_probs: Sequence[Tensor], tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """How well each model has predicted the text so far: at each place, decaying means of its log-probabilities.

    ``e_t = (1 - g) sum_k g^k log p_m(x_{t-k} | x_{<t-k})`` for each decay g, over the tokens known at place t; scaled
    and summed it is what a Bayesian mixture of the models goes by, with forgetting.

    Args:
        log_probs: Of each model, ``(batch, length, V)``.
        tokens: int64 ``(batch, length)``.
        mask: 0 where a token is padding.

    Returns:
        Shape ``(batch, length, M, decays)``.
    """
    batch, length = tokens.shape
    known = torch.stack([each[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1) for each in log_probs], dim=1)
    if mask is not None:
        known = known * (mask[:, None, 1:] * mask[:, None, :-1])
    window = min(length, _RECORD_TOKENS)
    decays = torch.tensor(DECAYS, device=tokens.device)[:, None]
    kernel = (1 - decays) * decays ** torch.arange(window - 1, -1, -1, device=tokens.device)
    means = conv1d(pad(known.flatten(0, 1).unsqueeze(1), (window, 0)), kernel.unsqueeze(1))
    return means.view(batch, len(log_probs), len(DECAYS), length).permute(0, 3, 1, 2)


def _empty_part(table: Mapping[str, Any]) -> PreTrainedModel:
    settings = {key: value for key, value in table.items() if key not in ("dtype", "torch_dtype")}
    config = AutoConfig.for_model(**settings)
    part = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    return cast(PreTrainedModel, part)
