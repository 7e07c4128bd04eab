"""EasyEdit's WISE on a model folder: ``easyedit_wise CHECKOUT MODEL EDITS LAYER MARGIN``.

CHECKOUT is a clone of github.com/zjunlp/EasyEdit (tried: 14cea82). Its package cannot be imported as a whole without
some forty others, so that the modules of WISE are loaded by themselves. Settings are its ``hparams/WISE/llama-7b.yaml``
but for the layer and the margins, which are absolute and meant for 7 billion parameters: MARGIN scales all three.

Prints seconds and the harmonic mean of reliability, rephrase and locality as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoTokenizer

from potluck.compose.base import load_base
from potluck.edit.evaluation import answers_before, score_edits
from potluck.edit.facts import read_edits


def wise_of(checkout: Path) -> ModuleType:
    """Its module of WISE, with empty packages around it."""
    for name in ("easyeditor", "easyeditor.models", "easyeditor.models.wise", "easyeditor.util"):
        package = ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    pictures = ModuleType("easyeditor.util.vl_utils")
    for name in (
        "build_target_labels", "count_media_items", "get_batch_file_type", "normalize_multimodal_batch",
        "prepend_qwen_vl_image_tokens_if_missing",
    ):  # fmt: skip
        setattr(pictures, name, None)
    sys.modules[pictures.__name__] = pictures
    return importlib.import_module("easyeditor.models.wise.wise_main")


def main(checkout: str, model: str, edits: str, layer: int, margin: float) -> None:
    wise = wise_of(Path(checkout))
    base, asked = load_base(Path(model)), read_edits(Path(edits))
    before = answers_before(base, asked)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = SimpleNamespace(
        mask_ratio=0.2, edit_lr=1.0, n_iter=70, norm_constraint=1.0, alpha=5.0 * margin, beta=20.0 * margin,
        gamma=10.0 * margin, act_ratio=0.88, save_freq=500, merge_freq=1000, merge_alg="ties", densities=0.53,
        weights=1.0, retrieve=True, replay=False, objective_optimization="only_label", sequential_edit=True,
        inner_params=[f"model.layers[{layer}].mlp.down_proj.weight"], device="cpu", model_name="llama", batch_size=1,
    )  # fmt: skip
    base.model.config.batch_size = 1
    began = time.perf_counter()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        for edit, other in zip(asked, [*asked[1:], asked[0]], strict=True):
            request = {"prompt": edit.prompt, "target_new": edit.target, "loc_prompt": other.neighbours[0]}
            wise.apply_wise_to_model(base.model, tokenizer, [request], settings)
    seconds = time.perf_counter() - began
    scores = score_edits(replace(base, model=base.model.eval()), asked, before, batch_size=1)
    print(json.dumps({"seconds": seconds, "score": 100 * scores.score, "reliability": 100 * scores.reliability}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
