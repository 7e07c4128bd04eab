"""Folders of models merged into one: against plain arithmetic on whole models, cut anyhow, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from potluck.compose.merging import streaming
from potluck.compose.merging.geometry import DeltaGuided, Linear, ModelStock, MultiSlerp, Slerp
from potluck.compose.merging.models import MODEL_METHODS, merge_models
from potluck.compose.merging.rules import Rule, Sce, TaskArithmetic, Ties, merged
from potluck.compose.merging.shards import created, opened
from potluck.compose.merging.streaming import Stack, merge_one
from potluck.errors import ModelError, PotluckError, RecipeError, StorageError
from potluck.models.folder import stored_tensors

State = dict[str, Tensor]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models trained from it, as folders; not to be changed."""
    root = tmp_path_factory.mktemp("family")
    shape: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape))
    for name in ("base", "a", "b", "c"):
        base.save_pretrained(root / name)
        for parameter in base.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    return root


@pytest.fixture
def folders(family: Path, tmp_path: Path) -> dict[str, Path]:
    """A copy that a test may spoil."""
    shutil.copytree(family, tmp_path / "of")
    return {name: tmp_path / "of" / name for name in ("base", "a", "b", "c")}


def state(folder: Path) -> State:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def spoil(folder: Path, change: Callable[[State], object]) -> None:
    tensors = state(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def plainly(rule: Rule, weights: list[float], models: list[State], base: State | None) -> State:
    """The rule on whole tensors."""
    found = {}
    for name, first in models[0].items():
        origin = torch.zeros_like(first) if base is None else base[name]
        deltas = torch.stack([model[name].float() - origin.float() for model in models])
        rows = deltas if deltas.ndim == 3 else deltas[:, None]
        found[name] = merged(rule, name, torch.tensor(weights), rows).view(first.shape) + origin.float()
    return found


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_METHODS)
@pytest.mark.parametrize("cut", [20, 1 << 18], ids=["rows", "whole"])
def test_every_method_streams(
    name: str, cut: int, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_BLOCK", cut)
    method = MODEL_METHODS[name]()
    base = None if name in ("linear", "slerp", "multislerp") else family / "base"
    models = [family / one for one in ("ab" if name == "slerp" else "abc")]
    weights = None if name == "model_stock" else [0.2, 0.3, 0.5][: len(models)]
    told = merge_models(models, tmp_path / "out", method, weights, base, max_shard_bytes=5000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    given = weights or [1 / 3] * 3
    expected = plainly(method, given, [state(folder) for folder in models], base and state(base))
    opened_again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(opened_again[key], tensor, rtol=1e-5, atol=1e-6)
    assert told == json.loads((tmp_path / "out/potluck.json").read_text())
    assert (told["method"], told["parameters"]) == (name, sum(t.numel() for t in expected.values()))


def test_threads_and_blocks_leave_the_same_bytes(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, cut in ((1, 1 << 18), (3, 50)):
        monkeypatch.setattr(streaming, "_BLOCK", cut)
        torch.set_num_threads(threads)
        merge_models(
            [family / "a", family / "b"], tmp_path / f"{threads}", MODEL_METHODS["della"](), base=family / "base"
        )
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "3/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_and_kept(
    dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    for folder in folders.values():
        AutoModelForCausalLM.from_pretrained(folder).to(dtype).save_pretrained(folder)
    models = [folders["a"], folders["b"]]
    merge_models(models, tmp_path / "out", TaskArithmetic(), base=folders["base"])
    expected = plainly(TaskArithmetic(), [0.5, 0.5], [state(m) for m in models], state(folders["base"]))
    for name, tensor in state(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name].to(dtype))


def test_the_base_decides_the_type_and_many_files_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    one = AutoModelForCausalLM.from_pretrained(folders["a"])
    one.to(torch.bfloat16).save_pretrained(folders["a"], max_shard_size="5KB")
    (folders["a"] / "model.safetensors").unlink()
    merge_models([folders["a"]], tmp_path / "out", TaskArithmetic(), base=folders["base"])
    assert {tensor.dtype for tensor in state(tmp_path / "out").values()} == {torch.float32}
    torch.testing.assert_close(state(tmp_path / "out"), {k: t.float() for k, t in one.state_dict().items()})


def test_a_tied_head_is_not_merged(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        config = json.loads((folders[name] / "config.json").read_text())
        (folders[name] / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    spoil(folders["a"], lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"b: lm_head.weight and model.embed_tokens.weight are tied.* two values"):
        merge_models([folders["a"], folders["b"]], tmp_path / "out", Linear())
    spoil(folders["b"], lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    merge_models([folders["a"], folders["b"]], tmp_path / "out", Linear())
    assert "lm_head.weight" not in state(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, state(tmp_path / "out")[EMBEDDING])


def test_what_is_no_weight_is_copied_if_equal(tmp_path: Path) -> None:
    paths = [tmp_path / "a/model.safetensors", tmp_path / "b/model.safetensors"]
    for out, last in (("same", 5), ("other", 6)):
        for path, end in zip(paths, (5, last), strict=True):
            path.parent.mkdir(exist_ok=True)
            save_file({"ids": torch.arange(end - 5, end), "empty": torch.zeros(0, 3)}, path)
        (tmp_path / out).mkdir()
        one, two = (stored_tensors(path.parent) for path in paths)
        with opened(one) as a, opened(two) as b, created(tmp_path / out, a, 1 << 20) as merged:
            for name, place in merged.items():
                stack = Stack(name, {tmp_path / "a": a[name], tmp_path / "b": b[name]}, None, place)
                if last == 6 and name == "ids":
                    with pytest.raises(ModelError, match="b: ids is no weight"):
                        merge_one(stack, Linear(), torch.ones(2))
                else:
                    merge_one(stack, Linear(), torch.ones(2))
    assert torch.equal(state(tmp_path / "same")["ids"], torch.arange(5))


def test_configuration_and_tokenizer_travel_but_no_code(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "chat_template.jinja", "modeling.py", "pytorch_model.bin"):
        (folders["base"] / name).write_text("{}")
    merge_models([folders["a"]], tmp_path / "out", TaskArithmetic(), base=folders["base"])
    expected = {"vocab.json", "merges.txt", "chat_template.jinja", "config.json", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*expected, "model.safetensors", "potluck.json"}


# --- geometry ------------------------------------------------------------------------------------


def vectors(*each: list[float]) -> Tensor:
    return torch.tensor(each, dtype=torch.float32)[:, None]


def test_slerp_stays_on_the_circle() -> None:
    half = merged(Slerp(), "w", torch.tensor([1.0, 1.0]), vectors([1, 0], [0, 1]))
    torch.testing.assert_close(half, torch.tensor([[0.5**0.5, 0.5**0.5]]))
    third = merged(Slerp(), "w", torch.tensor([2.0, 1.0]), vectors([1, 0], [0, 1]))
    torch.testing.assert_close(third, torch.tensor([[0.75**0.5, 0.5]]))
    near = merged(Slerp(), "w", torch.tensor([1.0, 1.0]), vectors([1, 0], [1, 0.01]))
    assert torch.equal(near, torch.tensor([[1, 0.005]]))  # the straight line


def test_multislerp_is_the_karcher_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(5, 1, 8, generator=draw) + 0.5
    weights = torch.rand(5, generator=draw)
    mean = merged(MultiSlerp(), "w", weights, points)[0].double()
    units, direction = points[:, 0].double(), mean / mean.norm()
    units = units / units.norm(dim=1, keepdim=True)
    cosines = units @ direction
    logs = (cosines.acos() / (1 - cosines**2).sqrt())[:, None] * (units - cosines[:, None] * direction)
    assert (weights.double() @ logs).abs().max() < 1e-6
    norms = points.double().flatten(1).norm(dim=1)
    assert mean.norm().item() == pytest.approx((weights.double() @ norms / weights.sum()).item(), rel=1e-6)
    two = points[:2] / points[:2].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(merged(MultiSlerp(), "w", weights[:2], two), merged(Slerp(), "w", weights[:2], two))


def test_model_stock_trusts_agreement() -> None:
    agreeing = vectors([1, 0], [1, 0], [1, 0])
    torch.testing.assert_close(merged(ModelStock(), "w", torch.ones(3), agreeing), torch.tensor([[1.0, 0.0]]))
    assert not merged(ModelStock(), "w", torch.ones(2), vectors([1, 0], [0, 1])).any()
    sixty = vectors([1, 0], [0.5, 0.75**0.5])  # t = 2 cos / (1 + cos) = 2/3
    torch.testing.assert_close(merged(ModelStock(), "w", torch.ones(2), sixty), sixty.mean(0) * 2 / 3)


def test_delta_guided_follows_who_moved() -> None:
    moved, weights = vectors([4, 0], [0, 1]), torch.ones(2)
    assert torch.equal(merged(DeltaGuided(0), "w", weights, moved), torch.tensor([[2, 0.5]]))
    torch.testing.assert_close(merged(DeltaGuided(1), "w", weights, moved), torch.tensor([[3.2, 0.2]]))
    still = merged(DeltaGuided(2), "w", weights, torch.zeros(2, 1, 3))
    assert torch.equal(still, torch.zeros(1, 3))


# --- what is refused -----------------------------------------------------------------------------


def other_config(folders: Mapping[str, Path]) -> None:
    config = json.loads((folders["b"] / "config.json").read_text())
    (folders["b"] / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))


def cut_off(folders: Mapping[str, Path]) -> None:
    path = folders["b"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def outside(folders: Mapping[str, Path]) -> None:
    (folders["b"] / "model.safetensors").unlink()
    index = {"weight_map": {EMBEDDING: "../a/model.safetensors"}}
    (folders["b"] / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizers(folders: Mapping[str, Path]) -> None:
    for name, words in (("base", ["x", "y"]), ("b", ["y", "x"])):
        vocabulary = {word: i for i, word in enumerate(words)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "x"}
        (folders[name] / "tokenizer.json").write_text(
            json.dumps({"version": "1.0", "added_tokens": [], "model": model})
        )


def put(value: Any, name: str = "b", key: str = EMBEDDING) -> Callable[[Mapping[str, Path]], None]:
    return lambda folders: spoil(folders[name], lambda tensors: tensors.update({key: value(tensors[key])}))


def too_large(folders: Mapping[str, Path]) -> None:
    put(lambda tensor: tensor.half(), "base")(folders)
    put(lambda tensor: tensor + 1e6)(folders)


def with_nan(tensor: Tensor) -> Tensor:
    tensor[3, 1] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_config, "b: hidden_act is 'gelu', that of .*base 'silu'"),
        (tokenizers, "b: its tokenizer has other tokens"),
        (cut_off, "b/model.safetensors: not a safetensors file, or cut off"),
        (outside, "b/model.safetensors.index.json: names a file outside"),
        (
            lambda folders: spoil(folders["b"], lambda t: t.pop("model.norm.weight")),
            "b: the tensor model.norm.weight is missing",
        ),
        (put(lambda tensor: torch.zeros(41, 16)), r"b: model.embed_tokens.weight is stored as \[41, 16\]"),
        (put(lambda tensor: tensor.double()), "b: model.embed_tokens.weight is stored as F64"),
        (put(lambda tensor: tensor.long()), "b: model.embed_tokens.weight is stored as I64"),
        (put(with_nan), "b: model.embed_tokens.weight holds NaN"),
        (put(with_nan, "base"), "base: model.embed_tokens.weight holds NaN"),
        (too_large, "model.embed_tokens.weight: what it was merged to does not fit F16"),
    ],
)
def test_models_that_do_not_fit_are_named(
    change: Callable[[Mapping[str, Path]], None], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    change(folders)
    with pytest.raises(ModelError, match=said):
        merge_models([folders["a"], folders["b"]], tmp_path / "out", Sce(), base=folders["base"])
    assert [path.name for path in tmp_path.iterdir()] == ["of"]


@pytest.mark.parametrize(
    ("method", "names", "weights", "with_base"),
    [
        (Linear(), "ab", [1.0], False),
        (Linear(), "ab", [1.0, -1.0], False),
        (Linear(), "ab", [1.0, float("nan")], False),
        (Linear(), "aa", None, False),
        (Linear(), "", None, False),
        (Linear(), "ab", None, True),
        (Ties(), "ab", None, False),
        (Slerp(), "abc", None, False),
        (ModelStock(), "ab", [1.0, 2.0], True),
        (ModelStock(), "a", None, True),
    ],
)
def test_requests_that_make_no_sense(
    method: Rule, names: str, weights: list[float] | None, with_base: bool, family: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError):
        merge_models(
            [family / n for n in names], tmp_path / "out", method, weights, family / "base" if with_base else None
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [lambda: MultiSlerp(-1), lambda: DeltaGuided(-1)])
def test_settings_that_mean_nothing(wrong: Callable[[], object]) -> None:
    with pytest.raises(RecipeError):
        wrong()


def test_opposite_vectors_of_one_tensor_leave_their_mean() -> None:
    assert torch.equal(merged(MultiSlerp(), "w", torch.ones(2), vectors([1, 0], [-3, 0])), torch.tensor([[-1.0, 0]]))


@pytest.mark.parametrize("name", [name for name in MODEL_METHODS if name != "linear"])
@pytest.mark.parametrize("case", ["nobody", "one", "alike"])
def test_a_tensor_that_nobody_changed_stays_the_bases(name: str, case: str) -> None:
    """Frozen embeddings: zero task vectors, of all or of one; and equal ones."""
    x, zero = [3.0, -1, 0.5, 2], [0.0] * 4
    given = {"nobody": vectors(zero, zero), "one": vectors(x, zero), "alike": vectors(x, x)}[case]
    found = merged(MODEL_METHODS[name](), "w", torch.full((2,), 0.5), given)
    assert torch.isfinite(found).all() and (case != "nobody" or not found.any())
    kept = found != 0  # of those that trim or drop
    assert case != "alike" or name.startswith(("dare", "della")) or torch.allclose(found[kept], given[0][kept])


@pytest.mark.parametrize("method", ["multislerp", "ties", "model_stock", "delta_guided"])
def test_models_with_a_frozen_tensor_are_merged(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    frozen = state(folders["base"])[EMBEDDING]
    for name in "ab":
        spoil(folders[name], lambda tensors: tensors.update({EMBEDDING: frozen.clone()}))
    merge_models([folders["a"], folders["b"]], tmp_path / "out", MODEL_METHODS[method](), base=folders["base"])
    assert torch.equal(state(tmp_path / "out")[EMBEDDING], frozen)


def test_nothing_is_overwritten(family: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="something here already"):
        merge_models([family / "a"], tmp_path / "out", Linear())


def test_a_file_that_shrinks_is_an_error(folders: dict[str, Path]) -> None:
    with opened(stored_tensors(folders["a"])) as tensors:
        os.truncate(folders["a"] / "model.safetensors", 1000)
        with pytest.raises(ModelError, match="has become shorter"):
            tensors["model.norm.weight"].read(0, torch.empty(1, 16))


def test_headers_are_not_believed(tmp_path: Path) -> None:
    wrong: list[Any] = [
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"w": {"dtype": "E8", "shape": [1], "data_offsets": [0, 1]}},
        {"w": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}},
        {"w": 3},
        [],
    ]
    for text in [*(json.dumps(header).encode() for header in wrong), b"[" * 100_000]:
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(PotluckError, match="not a safetensors file"):
            stored_tensors(tmp_path)


# --- beside mergekit (`make peers`) --------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "method", "parameters", "with_base"),
    [
        (Linear(), "linear", {"weight": [0.2, 0.3, 0.5]}, False),
        (ModelStock(), "model_stock", {}, True),
        (MultiSlerp(), "karcher", {"max_iter": 100, "tol": 1e-9}, False),
    ],
    ids=lambda value: str(value),
)
def test_as_mergekit(rule: Rule, method: str, parameters: dict[str, Any], with_base: bool) -> None:
    api = pytest.importorskip("mergekit.merge_methods.api")
    draw = torch.Generator().manual_seed(0)
    shared, own = torch.randn(32, 48, generator=draw), torch.randn(3, 32, 48, generator=draw)
    weights = torch.tensor(parameters.get("weight", [1.0] * 3))
    models = list(shared + own)
    ours = merged(rule, "w", weights, torch.stack(models))
    given, index = ([torch.zeros(32, 48), *models], 0) if with_base else (models, None)
    theirs = api.merge_tensors(given, method, parameters=parameters, base_index=index)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_as_mergekit(t: float) -> None:
    api = pytest.importorskip("mergekit.merge_methods.api")
    one, other = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    theirs = api.merge_tensors([one, other], "slerp", parameters={"t": t}, base_index=0)
    ours = merged(Slerp(), "w", torch.tensor([1 - t, t]), torch.stack([one, other]))
    assert (ours - theirs).abs().max() <= 1e-5
