"""The run's streams, bucket and consumers on the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from potluck.contribution import ParticipantId
from potluck.engine.nats.connection import Connection
from potluck.engine.nats.signs import MAX_BYTES as SIGN_BYTES
from potluck.engine.nats.subjects import CHUNK_BYTES, COORDINATOR, Names, streams_of, token
from potluck.errors import EngineError, StorageError

MAX_WAITING_REPLIES = 16
PATIENCE_SECONDS = 2.0  # with a server that may be on its way back
ACK_SECONDS = 10  # a task whose participant does not say that it works comes again


def make_streams(
    connection: Connection, names: Names, participants: Sequence[ParticipantId], storage: int, replicas: int = 1
) -> None:
    """The run's streams, bucket and consumers; what is there stays.

    Each participant has a stream of uploads, its share of the room for them, and few replies may wait of one.

    Args:
        storage: Bytes that the server may keep in all.
        replicas: Servers of a cluster that hold each stream.

    Raises:
        StorageError: The server has less room than that.
        EngineError: The server does not make them.
    """
    common = {"storage": "file", "discard": "new", "num_replicas": replicas}  # refuse what does not fit, lose nothing
    queue_like = {**common, "retention": "workqueue", "max_msg_size": 1 << 20, "max_bytes": max(storage // 20, 1 << 24)}
    chunky = {**common, "retention": "limits", "allow_direct": True, "max_msgs_per_subject": 1}
    few = {"max_msgs_per_subject": MAX_WAITING_REPLIES, "discard_new_per_subject": True}
    _ensure_stream(connection, {**queue_like, "name": names.tasks, "subjects": [names.task("*")]})
    _ensure_stream(connection, {**queue_like, **few, "name": names.replies, "subjects": [names.reply("*")]})
    half = storage * 2 // 5
    states = {"name": names.states, "subjects": [names.state(">"), names.about]}
    _ensure_stream(connection, {**chunky, **states, "max_bytes": half})
    share = half // len(participants)
    bounds = {"max_bytes": share, "max_msgs": 2 * share // CHUNK_BYTES + 64}
    for name in participants:
        uploads = {"name": names.uploads(name), "subjects": [names.upload(name, ">")]}
        _ensure_stream(connection, {**chunky, **uploads, **bounds})
    bucket = {"name": f"KV_{names.members}", "subjects": [f"$KV.{names.members}.>"], "max_bytes": 1 << 24}
    _ensure_stream(connection, {**chunky, **bucket, "max_msg_size": SIGN_BYTES, "allow_rollup_hdrs": True})
    consumer = {"ack_policy": "explicit", "ack_wait": ACK_SECONDS * 10**9, "max_deliver": -1}
    _ensure_consumers(
        connection,
        names.tasks,
        [{**consumer, "durable_name": token(n), "filter_subject": names.task(n)} for n in participants],
    )
    _ensure_consumers(connection, names.replies, [{**consumer, "durable_name": COORDINATOR}])


def mend_streams(
    connection: Connection, names: Names, participants: Sequence[ParticipantId], storage: int, replicas: int = 1
) -> list[str]:
    """Make anew what the server has lost of `make_streams`, and say what that was.

    Raises:
        StorageError, EngineError: As `make_streams` does.
    """
    there = connection.api("STREAM.NAMES", patience=PATIENCE_SECONDS).get("streams") or []
    lost = [name for name in streams_of(names, participants) if name not in there]
    if not lost:
        consumers = {names.tasks: [token(name) for name in participants], names.replies: [COORDINATOR]}
        for stream, expected in consumers.items():
            known = connection.api(f"CONSUMER.NAMES.{stream}", patience=PATIENCE_SECONDS).get("consumers") or []
            lost += [f"{stream}/{name}" for name in expected if name not in known]
    if lost:
        make_streams(connection, names, participants, storage, replicas)
    return lost


def _ensure_stream(connection: Connection, config: dict[str, Any]) -> None:
    """Make a stream, or give one that is there this configuration.

    Raises:
        EngineError: The server does neither.
    """
    try:
        connection.api(f"STREAM.CREATE.{config['name']}", config)
    except StorageError:
        raise
    except EngineError as error:
        if "already in use" not in str(error):
            raise
        connection.api(f"STREAM.UPDATE.{config['name']}", config)


def _ensure_consumers(connection: Connection, stream: str, consumers: Sequence[dict[str, Any]]) -> None:
    """Make durable pull consumers of a stream; those that are there stay as they are."""
    for config in consumers:
        name = config["durable_name"]
        body = {"stream_name": stream, "config": config}
        subject = f"CONSUMER.CREATE.{stream}.{name}"
        connection.api(f"{subject}.{config['filter_subject']}" if "filter_subject" in config else subject, body)
