"""What the verbs of real machines do: host a run, join one, look at one, look for what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from potluck.asking import Asks, local_recipe, refusals
from potluck.commands import close_run
from potluck.corpus.sources import check_there
from potluck.engine.nats.addresses import server_url
from potluck.engine.nats.blobs import Blobs, JetStreamBlobs
from potluck.engine.nats.claim import Claim, session_of
from potluck.engine.nats.connection import Access, Connection, access_of
from potluck.engine.nats.host_keys import Place, Premises, open_premises
from potluck.engine.nats.identity import Invite, own_invite, public_key, read_or_make_seed
from potluck.engine.nats.jetstream import make_streams, mend_streams
from potluck.engine.nats.post import Post
from potluck.engine.nats.server import Server
from potluck.engine.nats.site import Site
from potluck.engine.nats.subjects import COORDINATOR, Names
from potluck.errors import EngineError, InviteError, PolicyError, Refused, StorageError
from potluck.files import private_folder
from potluck.hosting import gather, start_engine
from potluck.joined import Joined
from potluck.joining import attend, understand
from potluck.participant import EDITING
from potluck.preflight import forecast
from potluck.recipe import Recipe, load_recipe
from potluck.recipe.engine import Nats
from potluck.recipe.load import without_sources
from potluck.recipe.part import Part, load_part
from potluck.recipe.sources import key_of
from potluck.records.folder import HOST, Variant, by_local, check_goes_on, create_run, locked, run_folder
from potluck.records.journal import Journal
from potluck.records.live import view
from potluck.run import Run, history, newest_checkpoint
from potluck.sent import Sent
from potluck.stopping import Stopping, resumable
from potluck.terminal import agreed, warn
from potluck.updates import codec

Result = dict[str, Any]
CONNECT_SECONDS = 30.0
END_SECONDS = 10.0
FAILED_LOOKS = 8  # at streams, a second or more each, before a server of ours gets a new store
_AGAIN = "the same command goes on with it"
_LEAVING = (
    "leaving once the task under way is answered; the run goes on without this participant. "
    "Once more leaves at once: that task is then not answered"
)
_BACK = "the same command comes back, with its optimizer and its place in the text"


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """How a run is hosted.

    Attributes:
        own_keys: Public keys that participants have made themselves, by name.
        rotate: Roles that get a new key, or ``certificate``.
    """

    place: Place
    own_keys: Mapping[str, str]
    rotate: Sequence[str] = ()


def host(recipe_path: Path, settings: Sequence[str], hosting: Hosting, console: Console) -> Result:
    """Coordinate a run whose participants are on machines of their own; started again, go on with it."""
    recipe = _hosted_recipe(recipe_path, settings, console)
    folder = run_folder(recipe)
    with locked(folder):
        _same_or_new(folder, recipe)
        private_folder(folder / HOST)
        journal = Journal(folder / "host" / "host.log", lambda text: console.print(text))
        premises = open_premises(
            folder / "host", recipe.name, recipe.participant_names, hosting.place, hosting.own_keys, hosting.rotate
        )
        try:
            with resumable(_AGAIN) as stopping:
                _hosted(recipe, folder, premises, journal, console, stopping)
        finally:
            journal.close()
        return close_run(folder, console)


def _hosted(
    recipe: Recipe, folder: Path, premises: Premises, journal: Journal, console: Console, stopping: Stopping
) -> None:
    """Everything between the first key and the last goodbye."""
    storage = _storage(recipe)
    with ExitStack() as left:
        server = left.enter_context(_server(premises, storage, journal))
        connection = left.enter_context(_connected(premises.access(), journal))
        assert isinstance(recipe.engine, Nats)
        streams = _Streams(connection, premises, storage, recipe.engine.replicas, server)
        streams.make()
        claim = Claim(connection, premises.names, COORDINATOR, session_of(folder / "host"), recipe.engine.silence)
        claim.make(stopping, journal)
        blobs = _blobs(recipe, connection, premises.names, journal)
        folder_in = folder / "host" / "incoming"
        post = Post(connection, premises.names, premises.seed, premises.keys, blobs, codec, folder_in)
        if not by_local(folder):
            _tell_how_to_join(premises, recipe, console)
        refusals = _Refusals(journal)
        engine = left.enter_context(closing(start_engine(recipe, post, refusals.add, claim, streams.mend)))
        hosted = gather(recipe, engine, post, folder, journal, stopping)
        checkpoint = newest_checkpoint(folder)
        past = history(folder, checkpoint)
        variant = Variant("together", recipe.participant_names)
        with view(console, recipe.name, "", past) as listener:
            run = Run(
                hosted,
                hosted.initial,
                hosted.fragments,
                variant,
                folder,
                recipe,
                (listener, engine.presence.take_event),
                checkpoint,
            )
            del checkpoint, past
            refusals.log_in(run)
            run.finish(stopping)
            engine.end("the run is finished", END_SECONDS)


class _Streams:
    """The run's streams on the server: made, looked after, and mended.

    Args:
        server: Ours; ``None`` if it is somebody else's, whose store we cannot renew.
    """

    def __init__(self, connection: Connection, premises: Premises, storage: int, replicas: int, server: Server | None):
        self._arguments = (connection, premises.names, premises.participants, storage, replicas)
        self._connection, self._server, self._failed = connection, server, 0

    def make(self) -> None:
        """Make what is not there.

        Raises:
            StorageError: There is too little room for them.
            EngineError: A server that is not ours does not make them.
        """
        try:
            make_streams(*self._arguments)
        except EngineError as error:
            if self._server is None or isinstance(error, Refused):
                raise
            self._server.start_anew(str(error))
            make_streams(*self._arguments)

    def mend(self) -> list[str]:
        """Make anew what was lost, and say what that was; a server of ours that cannot for long gets a new store.

        Raises:
            StorageError, EngineError: As ``make`` does; or the server is away.
        """
        try:
            lost = mend_streams(*self._arguments)
        except EngineError as error:
            if self._server is not None and self._server.running() is not None:
                self._connection.ping()  # one that does not answer at all may be busy or suspended
                self._failed += 1
                if self._failed == FAILED_LOOKS:
                    self._failed = 0
                    self._server.start_anew(str(error))
            raise
        self._failed = 0
        return lost


class _Refusals:
    """What did not come to count: said at once, and written into the run's log as soon as there is one."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._run: Run | None = None
        self._waiting: list[tuple[str, str, int]] = []

    def add(self, who: str, why: str, count: int) -> None:
        self._journal(f"refused: {who}: {why}" + (f" ({count} of this kind)" if count > 1 else ""), participant=who)
        self._waiting.append((who, why[:500], count))
        if self._run is not None:
            self.log_in(self._run)

    def log_in(self, run: Run) -> None:
        self._run = run
        for who, why, count in self._waiting:
            run.log.write("refused", participant=who, reason=why, count=count)
        self._waiting.clear()


def join(url: str | None, invite_path: Path, part: Part, options: Joining, console: Console) -> Result:
    """Take part in a run until it is over."""
    invite = _invite(url, invite_path, options.key)
    check_there(part.source)
    folder = options.folder or Path("joined") / f"{invite.recipe}-{invite.run}" / invite.participant
    if not folder.exists():
        private_folder(folder)
    with locked(folder), closing(Sent(folder / "sent.jsonl", part.limits)) as sent:
        if why := sent.over("the next"):
            raise PolicyError(why, "raise limits of your part, or --limit, to take part again")
        journal = Journal(folder / "join.log", lambda text: console.print(text))
        access = access_of(invite)
        with (
            _connected(access, journal) as connection,
            resumable(_BACK, _LEAVING, "the task under way is not answered") as stopping,
        ):
            names, keys = Names(invite.run), {COORDINATOR: invite.coordinator}
            blobs: Blobs = JetStreamBlobs(connection, names, journal)
            post = Post(connection, names, invite.seed, keys, blobs, codec, folder / "incoming")
            asks, recipe, _ = understand(post, stopping)
            assert isinstance(recipe.engine, Nats)
            _agree(asks, part, invite, options, sent, console)
            post = replace(post, blobs=_blobs(recipe, connection, names, journal))
            site = Site(post, invite.participant, recipe.engine, journal, session_of(folder), stopping, sent)
            mine = local_recipe(recipe, invite.participant, part, str(folder / "shards"))
            own = None if part.predicts_with is None else Path(part.predicts_with)
            secret = None if part.edit_secret is None else Path(part.edit_secret)
            joined = Joined(
                site, invite.participant, mine, part.policy, folder, journal, sent, stopping, own, part.edits, secret
            )
            try:
                return attend(joined)
            finally:
                journal.close()


@dataclass(frozen=True, kw_only=True)
class Joining:
    """How a participant joins.

    Attributes:
        folder: Where its state is kept; ``joined/RECIPE-RUN/NAME`` if left out.
        key: Its own key file, if the invite holds none.
        ask: Ask a person before joining.
    """

    folder: Path | None = None
    key: Path | None = None
    ask: bool = False


def own_part(
    path: Path | None,
    data: Path | None,
    model: Path | None,
    device: str | None,
    allow: Sequence[str],
    max_local_steps: int | None,
    max_bytes: int | None,
    limits: Mapping[str, Any],
) -> Part:
    """A participant's part from its file and the command line.

    Raises:
        RecipeError: It is wrong, or names no text.
    """
    changes: dict[str, Any] = {}
    if data is not None:
        changes["source"] = {key_of(data): str(data.absolute())}
    if model is not None:
        changes["model"] = str(model.absolute())
    if device is not None:
        changes["device"] = device
    bounds = {"max_local_steps": max_local_steps, "max_bytes": max_bytes}
    policy = {key: value for key, value in bounds.items() if value is not None}
    return load_part(path, changes, policy, allow, limits)


def make_own_key(path: Path) -> Result:
    """Make a key that never leaves this machine.

    Raises:
        StorageError: The file is there already, or cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path}: there is something here already", "name a new file")
    return {"key": str(path), "public": public_key(read_or_make_seed(path))}


def _agree(asks: Asks, part: Part, invite: Invite, options: Joining, sent: Sent, console: Console) -> None:
    """Show what the run will ask beside what the policy allows; go on if they agree, and a person does.

    Raises:
        PolicyError: They do not.
    """
    from potluck.show import show_asks

    show_asks(asks, part, invite, sent, console)
    found = refusals(asks, part.policy)
    if found:
        raise PolicyError(
            f"{asks.recipe} asks for more than this participant's policy allows: {'; '.join(found)}",
            "change the policy of your part (--allow, --max-local-steps, --max-bytes), or do not take part",
        )
    if options.ask and not agreed(console, "join?"):
        raise PolicyError("not joined")


def _hosted_recipe(path: Path, settings: Sequence[str], console: Console) -> Recipe:
    """The recipe with the nats engine and without anybody's source: those are named where participants join."""
    recipe = load_recipe(path, [*settings, "engine={kind='nats'}"])
    recipe = without_sources(recipe)
    warn(forecast(recipe).warnings, console)
    return recipe


def _same_or_new(folder: Path, recipe: Recipe) -> None:
    """Make the run folder, or be sure that the run in it is of this recipe.

    Raises:
        RunFolderError: It is another's, or the run is done.
    """
    if not (folder / "run.json").exists():
        create_run(folder, recipe, Variant("together", recipe.participant_names))
        return
    check_goes_on(folder, recipe)


def _storage(recipe: Recipe) -> int:
    """Bytes that the server keeps at most: an upload of everybody, twice, and a few states."""
    assert isinstance(recipe.engine, Nats)
    if recipe.engine.storage is not None:
        return recipe.engine.storage
    expected = forecast(recipe)
    largest = max(4 * expected.parameters, expected.peak_update_bytes)
    return 5 * largest * (len(recipe.participant_names) + 2) + (1 << 28)


def _blobs(recipe: Recipe, connection: Connection, names: Names, journal: Callable[[str], None]) -> Blobs:
    assert isinstance(recipe.engine, Nats)
    if recipe.engine.blobs == "jetstream":
        return JetStreamBlobs(connection, names, journal)
    from potluck.engine.nats.objects import ObjectBlobs

    return ObjectBlobs(recipe.engine.blobs, names, journal)


@contextmanager
def _server(premises: Premises, storage: int, journal: Journal) -> Iterator[Server | None]:
    """A server of our own while the run is on, or somebody else's."""
    if premises.place.url:
        from potluck.engine.nats.server import users_config

        path = premises.folder / "users.conf"
        path.write_text(users_config(premises.users))
        journal(f"the users that {premises.place.url} must know: {path}")
        yield None
        return
    server = Server(premises.server_settings(storage), journal)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def _connected(access: Access, journal: Callable[[str], None]) -> Iterator[Connection]:
    connection = Connection(access, journal)
    connection.open(CONNECT_SECONDS)
    try:
        yield connection
    finally:
        connection.close()


def _tell_how_to_join(premises: Premises, recipe: Recipe, console: Console) -> None:
    kinds = [*(["words"] if recipe.tokenizer.kind == "bpe" else []), *(EDITING if recipe.editing else [])]
    allow = "".join(f" --allow {kind}" for kind in kinds)
    console.print(f"server: {' '.join(premises.place.urls)}   run: {premises.names.run}")
    console.print("send each participant its invite (a secret), and this line:")
    for path in premises.invites.values():
        line = f"  potluck join {premises.place.urls[0]} --invite {path} --data FOLDER{allow}"
        console.print(line)


def _invite(url: str | None, path: Path, key: Path | None) -> Invite:
    """An invite with the address and the key of the command line."""
    invite = own_invite(path, key)
    if url is not None:
        try:
            invite = replace(invite, urls=(server_url(url, "tls" if invite.secure else "nats"),))
        except ValueError as error:
            raise InviteError(str(error)) from None
    return invite
