"""Participants on machines of their own, joined by a NATS server with JetStream.

::

    coordinator                     server                          participant
    send     -> task.NAME       ->  work queue, one consumer each  ->  next
             -> state.HASH.i    ->  chunks of large tensors        ->  fetched, verified
    receive  <- reply.NAME      <-  work queue                     <-  answer, signed
             <- upload.NAME.HASH.i                                 <-
    members  <- $KV.NAME        <-  one value each                 <-  sign of life

Everybody dials out to one port of the server. Tasks and replies are delivered at least once and count once, by the
task's name. ``docs/reference/wire-format.md`` has subjects and frames, ``docs/explanation/threat-model.md`` who may
do what.
"""

from importlib.util import find_spec

from potluck.errors import MissingExtra

for library in ("nats", "nkeys", "cryptography"):
    if find_spec(library) is None:
        raise MissingExtra(f"real machines need the library {library}", "pip install 'potluck[nats]'")
