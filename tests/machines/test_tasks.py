"""What a hostile coordinator can sign: each task is answered with its reason, and the participant goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from potluck.contribution import Packed, Task
from potluck.corpus.tokenizer import build_vocabulary
from potluck.engine.nats.frames import ReplyFacts, facts_of, read_frame, signed
from potluck.engine.nats.identity import Invite, fingerprint, save_invite
from potluck.engine.nats.subjects import COORDINATOR
from potluck.errors import EngineError
from potluck.hosting import packed_text
from potluck.joining import understand
from potluck.local.network import place
from potluck.models.build import build_model
from potluck.recipe import parse_recipe
from potluck.updates import codec
from tests.machines.world import World

if TYPE_CHECKING:
    from tests.conftest import Potluck, Process, Tables

Facts = dict[str, Any]


class Hostile:
    """A coordinator by hand, and a participant that joined it as a process."""

    def __init__(self, potluck: Potluck, tables: Tables, folder: Path) -> None:
        ada = next(p for p in tables["participants"] if p["name"] == "ada")
        self.potluck, self.source, self.folder = potluck, ada["source"], folder
        self.tables = {**tables, "participants": [{"name": "ada"}], "engine": {"kind": "nats", "heartbeat": 0.5}}
        self.tables["data"] = {key: value for key, value in tables["data"].items() if key != "shards"}
        self.world = World(folder / "world", ("ada",), listens=False)
        world = self.world
        where: Facts = {"run": world.names.run, "recipe": "tiny", "participant": "ada", "seed": world.seeds["ada"]}
        trust = {"certificate": world.certificate, "fingerprint": fingerprint(world.certificate)}
        urls = (f"tls://127.0.0.1:{world.port}",)
        save_invite(Invite(**where, **trust, urls=urls, coordinator=world.keys[COORDINATOR]), folder / "ada.toml")

    def about(self, **facts: Any) -> None:
        """Say what the run is about, the vocabulary included unless ``facts`` say otherwise."""
        vocabulary = build_vocabulary(parse_recipe(self.tables))
        payload = vocabulary.tokenizer.to_str().encode()
        said = {"run": self.world.names.run, "recipe": self.tables, "end_of_text": vocabulary.end_of_text}
        said = {**said, "message": {"payload": packed_text(payload)}, **facts}
        said = {key: value for key, value in said.items() if value is not None}
        frame = signed(self.world.seeds[COORDINATOR], said, payload if "message" in said else b"")
        self.world.connection.store(self.world.names.about, frame)

    def join(self, *words: object) -> Process:
        data = ("--data", self.source["path"], "--folder", self.folder / "at-ada")
        return self.potluck.start("join", "--invite", self.folder / "ada.toml", *data, "--json", *words)

    count = 0

    def until(self, presence: str, process: Process) -> None:
        end = time.monotonic() + 60
        while self.world.members.presence("ada") != presence:
            self.world.members.look()
            assert time.monotonic() < end and not process.ends_within(0), process.err.read_text()
            time.sleep(0.05)

    def put(self, frame: bytes) -> None:
        """Store something in the participant's queue, whatever it holds."""
        self.world.connection.store(self.world.names.task("ada"), frame)

    def frame(self, message: Any, payload: bytes = b"", **facts: Any) -> bytes:
        said = {"run": self.world.names.run, "to": "ada", "task": f"t{self.count}", "seconds": 20.0, "message": message}
        return signed(self.world.seeds[COORDINATOR], {**said, **facts}, payload)

    def ask(self, task: Task | Facts, payload: bytes | None = None) -> Facts:
        """Sign and store a task, or what stands for its message; what is answered to it."""
        self.count += 1
        if isinstance(task, dict):
            self.put(self.frame(task))
        else:
            like = None
            if payload is not None:
                like = Packed(fields={"payload": packed_text(payload)}, parts=[memoryview(payload)])
            packed = codec.pack(task, like)
            self.put(self.frame(packed.fields, b"".join(bytes(part) for part in packed.parts)))
        delivery = self.world.connection.take(self.world.names.next(self.world.names.replies, COORDINATOR), 30.0)
        assert delivery is not None, "no answer"
        delivery.done()
        said = facts_of(ReplyFacts, read_frame(delivery.data, self.world.keys["ada"]))
        assert said.task == f"t{self.count}"
        return said.model_dump()


@pytest.fixture
def hostile(potluck: Potluck, tables: Tables, tmp_path: Path) -> Iterator[Hostile]:
    found = Hostile(potluck, tables, tmp_path)
    yield found
    potluck.end()
    found.world.close()


def test_every_malformed_task_is_answered_and_an_honest_one_is_done_after_it(hostile: Hostile) -> None:
    hostile.about()
    process = hostile.join("--max-local-steps", 50)
    hostile.until("ready", process)
    recipe = parse_recipe(hostile.tables)
    vocabulary = build_vocabulary(recipe)
    model = build_model(recipe.model, vocabulary.size, vocabulary.end_of_text, recipe.seed)
    size = place(model, recipe.compute).flat.vector.numel()
    theta, few = torch.zeros(size), torch.zeros(3)

    def train(kind: str = "train", revision: int = 0, tensors: Any = None, **parameters: Any) -> Task:
        given = {"parameters": theta} if tensors is None else tensors
        return Task(kind=kind, revision=revision, parameters={"first_step": 0, "steps": 1, **parameters}, tensors=given)

    fields = codec.pack(train()).fields
    bare = {key: value for key, value in fields.items() if key != "payload"}
    cases: list[tuple[Task | Facts, str]] = [
        ({}, "not a task"),
        ({"kind": ["train"]}, "not a task: kind"),
        ({**fields, "header": {"steps": [[]]}}, "not a task: header"),
        ({**fields, "header": {"first_step": 0}}, "not a task: steps"),
        ({**fields, "revision": -1}, "not a task: revision"),
        ({**fields, "payload": {"bytes": 1 << 44, "sha256": "a" * 64}}, "not allowed here: a message of"),
        ({**bare, "revision": 1}, "not a message"),
        (bare, "not a message"),
        (train(first_step="x"), "not a task: first_step"),
        (train(first_step=-5), "not a task: first_step"),
        (train(steps="9"), "not a task: steps"),
        (train(steps=True), "not a task: steps"),
        (train(steps=51), "51 + 0 local steps, at most 50"),
        (train(overlap=50), "1 + 50 local steps, at most 50"),
        (train(first_step=1 << 60), "beyond the run"),
        (train(revision=1 << 60), "beyond the run"),
        (train(surprise=1), "not a task: surprise"),
        (train("stream"), "takes no tasks of kind"),
        (train("eager"), "takes no tasks of kind"),
        (train(tensors={"parameters": torch.zeros(5)}), "does not fit the model"),
        (train(tensors={"parameters": torch.zeros(size, dtype=torch.int64)}), "does not fit the model"),
        (train(tensors={"fragment-99": few}), "is no fragment"),
        (train(tensors={"1.bitmap": few.byte(), "1.values": few}), "is no fragment"),
        (Task(kind="evaluate", revision=0, parameters={"x": 1}), "not a task: x"),
        (Task(kind="words", revision=0), "not allowed here: a task of kind 'words'"),
        (Task(kind="edit", revision=0), "not allowed here: a task of kind 'edit'"),
        (Task(kind="predict", revision=0), "not allowed here: a task of kind 'predict'"),
        (Task(kind="../../x", revision=0), "not allowed here"),
    ]
    assert hostile.ask(train())["status"] == "ok"
    for task, reason in cases:
        said = hostile.ask(task)
        assert said["status"] == "failed" and reason in said["reason"], (task, said)
    header = json.dumps({"parameters": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}})
    said = hostile.ask(train(), payload=len(header).to_bytes(8, "little") + header.encode())
    assert said["status"] == "failed" and "not a message" in said["reason"], said

    unread: tuple[Facts, ...] = (
        {"seconds": "soon"}, {"seconds": -1.0}, {"to": "bob"}, {"run": "ba9876543210"}, {"task": "a" * 2000},
        {"message": [1]}, {"message": "x"}, {"task": None},
    )  # fmt: skip
    for facts in unread:  # refused before they are anybody's task: nothing is answered
        hostile.put(hostile.frame(**{"message": fields, **facts}))
    for raw in (b"", b"[" * 100_000, hostile.frame(fields)[:-9] + b"[[[[[[[[["):
        hostile.put(raw)
    said = hostile.ask(train())
    assert said["status"] == "ok", said
    assert not process.ends_within(0) and "Traceback" not in process.err.read_text()


def test_before_there_is_a_vocabulary_the_policy_is_asked_all_the_same(hostile: Hostile) -> None:
    """Neither do words leave without permission, nor is anything else answered with them."""
    hostile.about(end_of_text=None, message=None)
    process = hostile.join()
    hostile.until("reading", process)
    said = hostile.ask(Task(kind="words", revision=0))
    assert said["status"] == "failed" and "not allowed here: a task of kind 'words'" in said["reason"]
    said = hostile.ask(Task(kind="train", revision=0, parameters={"first_step": 0, "steps": 1}))
    assert said["status"] == "failed" and "no vocabulary yet" in said["reason"]
    assert not process.ends_within(0)


def test_what_a_run_is_about_is_read_with_care(hostile: Hostile) -> None:
    post = hostile.world.post("ada")
    for facts, reason in (
        ({"recipe": None}, "recipe"),
        ({"recipe": []}, "recipe"),
        ({"end_of_text": None}, "which token ends a text"),
        ({"end_of_text": "2"}, "end_of_text"),
        ({"end_of_text": 10**400}, "401 digits"),
        ({"stops": ["x"]}, "stops"),
        ({"parameters": "many"}, "parameters"),
        ({"run": "ba9876543210"}, "another run"),
        ({"message": {"payload": 5}}, "not as it should be"),
    ):
        hostile.about(**facts)
        with pytest.raises(EngineError) as caught:
            understand(post, lambda: False)
        assert reason in str(caught.value)
    hostile.about(stops=[3])
    asks, _, vocabulary = understand(post, lambda: False)
    assert asks.kinds == ("train", "evaluate") and vocabulary is not None and 3 in vocabulary.stops
