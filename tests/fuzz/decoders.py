"""Every decoder that reads bytes from outside, with good inputs to start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from potluck.asking import words_of
from potluck.compose.adapter import Adapter, Factors, load_adapter, save_adapter
from potluck.compose.decoding.gates import Deferral, Gates, load_deferral, save_deferral
from potluck.compose.experts.parts import Expert, load_expert, save_expert
from potluck.compose.library.cards import read_card
from potluck.compose.library.packed import load_packed, save_packed
from potluck.compose.library.packing import Packing, pack
from potluck.compose.library.specification import Specification, read_specification
from potluck.compose.library.yardstick import Yardstick, read_yardstick
from potluck.compose.routing.evidence import profile_bytes, read_profile
from potluck.contribution import Contribution, Task
from potluck.corpus.tokenizer import folder_vocabulary, vocabulary_of
from potluck.edit.facts import read_edits
from potluck.edit.forgetting.questions import read_questions
from potluck.edit.forgetting.record import read_record, signed_record, write_record
from potluck.edit.together.edit_hashes import read_decisions
from potluck.edit.together.exchange import read_contexts
from potluck.engine.nats.frames import read_frame, signed
from potluck.engine.nats.identity import Invite, load_invite, new_seed, public_key, save_invite, sign
from potluck.errors import PotluckError
from potluck.models.check import checked_folder
from potluck.models.folder import stored_tensors
from potluck.models.shapes import context_length
from potluck.recipe import parse_recipe
from potluck.recipe.load import load_recipe, recipe_toml
from potluck.recipe.part import load_part
from potluck.recipe.schema import ModelFolder
from potluck.records.checkpoint import load_checkpoint, save_checkpoint
from potluck.records.events import read_events
from potluck.tensors import load_tensors
from potluck.untrusted import loads, loads_toml
from potluck.updates import codec

RECIPE = {"participants": [{"name": "ann", "source": {"path": "/x"}}], "model": {"layers": 1, "width": 32, "heads": 2,
          "feedforward": 64, "context": 64}}  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """One decoder.

    Attributes:
        form: As of `mutations.mutated`.
        seed: A good input.
        decode: Reads an input; a scratch folder of its own is what it may write to.
        refuses: What it may raise.
    """

    form: str
    seed: bytes
    decode: Callable[[bytes], object]
    refuses: type[Exception] = PotluckError


def decoders(scratch: Path) -> dict[str, Decoder]:
    """All of them, by name; each takes its seed."""
    found = {**_plain(), **_wire(), **_files(scratch), **_models(scratch), **_library(scratch), **_edits(scratch)}
    for decoder in found.values():
        decoder.decode(decoder.seed)
    return found


def _in_file(path: Path, decode: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Decoding what lies in a file, read from bytes."""

    def of_bytes(data: bytes) -> object:
        path.write_bytes(data)
        return decode(path)

    return of_bytes


def _in_folder(form: str, path: Path, load: Callable[[Path], object]) -> Decoder:
    """A file of a folder whose others stay whole."""
    whole = path.read_bytes()

    def decode(data: bytes) -> object:
        path.write_bytes(data)
        try:
            return load(path.parent)
        finally:
            path.write_bytes(whole)

    return Decoder(form, whole, decode)


def _plain() -> dict[str, Decoder]:
    tensors = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.uint8)}, metadata={"a": "b"})
    value = {"a": [1, -2.5, None, {"b": "é"}], "c": {"d": [True]}}
    return {
        "json": Decoder("json", json.dumps(value).encode(), loads, ValueError),
        "toml": Decoder("bytes", recipe_toml(parse_recipe(RECIPE)).encode(), _toml, ValueError),
        "tensors": Decoder("tensors", tensors, load_tensors, ValueError),
    }


def _toml(data: bytes) -> object:
    return loads_toml(data.decode())


def _wire() -> dict[str, Decoder]:
    update = Contribution(kind="train", revision=3, header={"loss": 1.5, "steps": 2}, tensors={"p": torch.ones(5)})
    message = codec.encode(update)
    key = new_seed()
    facts = {"run": "0123456789ab", "task": "t", "from": "ann", "status": "ok", "message": codec.pack(update).fields}
    words = {"words": torch.tensor(list(b'["a","b"]'), dtype=torch.uint8), "counts": torch.tensor([2, 3])}
    counted = codec.encode(Contribution(kind="words", revision=0, header={}, tensors=words))
    task = codec.encode(Task(kind="train", revision=1, parameters={"first_step": 0, "steps": 2}))

    def frame(data: bytes) -> object:
        head = len(data).to_bytes(8, "little") + data
        return read_frame(sign(key, head) + head, public_key(key))

    return {
        "contribution": Decoder("message", message, lambda data: codec.decode(data, 1 << 20)),
        "task": Decoder("message", task, lambda data: codec.decode(data, 1 << 20)),
        "payload": Decoder(
            "tensors", b"".join(codec.payload_parts(update.tensors)),
            lambda data: codec.unpack(codec.pack(update).fields, data),
        ),
        "frame": Decoder("json", json.dumps(facts).encode(), frame),
        "frame as bytes": Decoder("bytes", signed(key, facts), lambda data: read_frame(data, public_key(key))),
        "words": Decoder("message", counted, lambda data: words_of(codec.decode(data, 1 << 20), 1000)),  # type: ignore[arg-type]
        "list of words": Decoder("json", b'["a", "b", "c"]', _words),
        "contexts": Decoder("json", b'["The", "A b"]', lambda data: read_contexts(data.decode(errors="replace"))),
    }  # fmt: skip


def _words(data: bytes) -> object:
    tensors = {"words": torch.tensor(list(data), dtype=torch.uint8), "counts": torch.tensor([1, 10**11, 3])}
    return words_of(Contribution(kind="words", revision=0, tensors=tensors))


def _files(scratch: Path) -> dict[str, Decoder]:
    key = new_seed()
    invite = Invite(
        run="0123456789ab", recipe="tiny", participant="ann", urls=("tls://127.0.0.1:4222",), certificate="",
        fingerprint="", coordinator=public_key(key), seed=key,
    )  # fmt: skip
    save_invite(invite, scratch / "invite.toml")
    (scratch / "part.toml").write_text('device = "cpu"\n[source]\npath = "/x"\n[policy]\nmax_parameters = 1000\n')
    recipe = recipe_toml(parse_recipe(RECIPE)).encode()
    folder = scratch / "checkpoints"
    newest = folder / "round-000003"
    parts = {"state": codec.payload_parts({"theta": torch.ones(3)})}
    save_checkpoint(folder, 3, {"run": "x", "figures": [1, 2.5]}, parts)
    events = b'{"event": "begin", "schema": 1}\n{"event": "round", "round": 1, "figures": {"loss": 1.5}}\n'
    return {
        "invite": Decoder("bytes", (scratch / "invite.toml").read_bytes(), _in_file(scratch / "i.toml", load_invite)),
        "recipe": Decoder("bytes", recipe, _in_file(scratch / "r.toml", load_recipe)),
        "recipe as JSON": Decoder("json", json.dumps(RECIPE).encode(), _recipe),
        "part": Decoder(
            "bytes", (scratch / "part.toml").read_bytes(),
            _in_file(scratch / "p.toml", lambda path: load_part(path, {}, {}, ())),
        ),
        "checkpoint's facts": _in_folder("json", newest / "state.json", lambda _: load_checkpoint(folder)),
        "checkpoint's tensors": _in_folder(
            "tensors", newest / "state.safetensors", lambda _: load_checkpoint(folder)
        ),
        "events": Decoder("lines", events, _in_file(scratch / "e.jsonl", lambda path: list(read_events(path)))),
    }  # fmt: skip


def _recipe(data: bytes) -> object:
    try:
        raw = loads(data)
    except ValueError:
        return None  # a frame refuses it
    return parse_recipe(raw) if isinstance(raw, dict) else None


def _models(scratch: Path) -> dict[str, Decoder]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from potluck.corpus.tokenizer import build_vocabulary

    folder = scratch / "model"
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=16, **small)).save_pretrained(folder)
    recipe = ModelFolder(path=str(folder))
    tokenizer = scratch / "tokenizer"
    tokenizer.mkdir()
    text = _tokenizer_text(build_vocabulary(parse_recipe(RECIPE)).tokenizer.to_str())
    (tokenizer / "tokenizer.json").write_bytes(text)
    config = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "model_max_length": 10**30}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    return {
        "tokenizer": Decoder("json", text, lambda data: vocabulary_of(data.decode(errors="replace"), 3)),
        "tokenizer in a folder": _in_folder("json", tokenizer / "tokenizer.json", folder_vocabulary),
        "tokenizer's settings": _in_folder("json", tokenizer / "tokenizer_config.json", folder_vocabulary),
        "model's settings": _in_folder(
            "json", folder / "config.json", lambda place: (context_length(recipe), checked_folder(place))
        ),
        "model's tensors": _in_folder("tensors", folder / "model.safetensors", stored_tensors),
    }


def _tokenizer_text(whole: str) -> bytes:
    """A small tokenizer with every kind of part."""
    table: dict[str, Any] = json.loads(whole)
    table["model"]["vocab"] = {"a": 0, "b": 1, "ab": 2}
    table["model"]["merges"] = [["a", "b"]]
    table["added_tokens"] = [{**table["added_tokens"][0], "id": 3, "content": "</s>"}]
    table["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
    }
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|a+"}, "behavior": "Isolated", "invert": False}
    table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, table["pre_tokenizer"]]}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [end, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [3], "tokens": ["</s>"]}},
    }
    return json.dumps(table).encode()


def _library(scratch: Path) -> dict[str, Decoder]:
    torch.manual_seed(0)
    place = "model.layers.0.self_attn.q_proj"
    adapter = Adapter({place: Factors(torch.randn(2, 8), torch.randn(8, 2))}, base="b", about={"base_hash": "a" * 64})
    folder = scratch / "adapter"
    save_adapter(adapter, folder)
    yardstick = Yardstick("l", "a" * 64, torch.zeros(6), torch.eye(4, 6), 1.0, 8)
    specification = Specification(torch.ones(3, 4), torch.full((3,), 1 / 3), yardstick.content_hash)
    names = ("adapter_config.json", "adapter_model.safetensors", "specification.safetensors")
    card = {
        "name": "ann", "base_hash": "a" * 64, "rank": 2, "parameters": 32, "added": "2026-12-01T00:00:00Z",
        "files": {name: {"sha256": "b" * 64, "bytes": 10} for name in names},
    }  # fmt: skip
    save_packed(pack({"ann": adapter}, Packing(pool=8)), scratch / "packed.safetensors")
    gates = Deferral(Gates(torch.ones(1, 4), torch.zeros(1)), 0.5, "a" * 64, ("ann",), {"loss": 1.0})
    save_deferral(gates, scratch / "deferral")
    expert = Expert("ann", "full", 0, "a" * 64, "b" * 64, {"w": torch.ones(2)}, torch.ones(4), torch.ones(1, 2), {})
    save_expert(expert, scratch / "expert")

    def deferral(place: Path) -> object:
        return load_deferral(place, "a" * 64)

    return {
        "adapter's settings": _in_folder("json", folder / "adapter_config.json", load_adapter),
        "adapter's tensors": _in_folder("tensors", folder / "adapter_model.safetensors", load_adapter),
        "adapter's facts": _in_folder("json", folder / "potluck.json", load_adapter),
        "card": Decoder("json", json.dumps(card).encode(), lambda data: read_card(data, "card")),
        "yardstick": Decoder("tensors", yardstick.to_bytes(), lambda data: read_yardstick(data, "y")),
        "specification": Decoder(
            "tensors", specification.to_bytes(), lambda data: read_specification(data, "s", yardstick)
        ),
        "profile": Decoder("tensors", profile_bytes(torch.zeros(20)), lambda data: read_profile(data, "p", 20)),
        "packed adapters": Decoder(
            "tensors", (scratch / "packed.safetensors").read_bytes(),
            _in_file(scratch / "pa.safetensors", load_packed),
        ),
        "deferral's facts": _in_folder("json", scratch / "deferral" / "deferral.json", deferral),
        "deferral's tensors": _in_folder("tensors", scratch / "deferral" / "deferral.safetensors", deferral),
        "expert's facts": _in_folder("json", scratch / "expert" / "expert.json", load_expert),
        "expert's tensors": _in_folder("tensors", scratch / "expert" / "expert.safetensors", load_expert),
    }  # fmt: skip


def _edits(scratch: Path) -> dict[str, Decoder]:
    edit = {"prompt": "The town of Ann is", "subject": "Ann", "target": "Bob"}
    question = {"question": "Where?", "answer": "There."}
    write_record(signed_record({"a": 1}, "a" * 64, "b" * 64, "c" * 64, {"x": 1.5}, new_seed()), scratch / "record.json")
    edits = json.dumps([edit, edit | {"subject": "town"}]).encode()
    decisions = b'{"keep": [["ann", 0]], "drop": [["bob", 1]]}'
    return {
        "edits": Decoder("json", edits, _in_file(scratch / "ed.json", read_edits)),
        "questions": Decoder("lines", json.dumps(question).encode(), _in_file(scratch / "q.jsonl", read_questions)),
        "decisions": Decoder("json", decisions, _in_file(scratch / "d.json", read_decisions)),
        "record": Decoder("json", (scratch / "record.json").read_bytes(), _in_file(scratch / "re.json", read_record)),
    }
