"""A node's identity on disk: `DATA_DIR/identity`, mode 0700, files 0600, each replaced as a whole.

key.pem, nats.seed   this node's private keys, made before it joins
credentials.json     what the cluster gave it last: the truth
node.pem, ca.pem     certificate and trusted CAs out of it, for nats-server and libtorrent
cluster.json         the cluster's own keys; on servers

The private keys stay the same from the first try to join until the node is removed, so a
certificate that was replaced half-way never meets another key.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TypeVar

import msgspec

from ollama_distributed.adapters.durable import replace_file
from ollama_distributed.base.codec import encode_pretty
from ollama_distributed.base.errors import DiskFull, Invalid
from ollama_distributed.cluster.identity import ca, nkeys
from ollama_distributed.cluster.identity.wire import ClusterKeys, Credentials

PRIVATE_DIR = 0o700

T = TypeVar("T")


class NodeKeys(msgspec.Struct, frozen=True):
    """Private keys of one node."""

    tls: bytes
    """PEM."""
    nats: nkeys.NatsKey

    def __repr__(self) -> str:
        return "NodeKeys(…)"


class IdentityFiles:
    """Blocking, small; call from a worker thread where a loop runs."""

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / "identity"
        self.key = self.folder / "key.pem"
        self.certificate = self.folder / "node.pem"
        self.authorities = self.folder / "ca.pem"
        self._seed = self.folder / "nats.seed"
        self._credentials = self.folder / "credentials.json"
        self._cluster = self.folder / "cluster.json"

    def node_keys(self) -> NodeKeys:
        """This node's private keys; made and kept where there are none.

        Raises:
            Invalid: they are there and damaged.
            DiskFull: they cannot be written.
        """
        tls, seed = _read(self.key), _read(self._seed)
        if tls is None:
            tls = ca.make_key()
            _write(self.key, tls)
        if seed is None:
            seed = nkeys.make_key("user", secrets.token_bytes(32)).seed.encode()
            _write(self._seed, seed)
        return NodeKeys(tls, nkeys.read_seed(seed.decode("ascii", "replace")))

    def credentials(self) -> Credentials | None:
        """What the cluster gave this node last; None before it joined."""
        return _decode(self._credentials, Credentials)

    def cluster_keys(self) -> ClusterKeys | None:
        """The cluster's own keys; None on a node that is no server."""
        return _decode(self._cluster, ClusterKeys)

    def save(self, credentials: Credentials) -> None:
        """Keep what the cluster gave. A crash in between leaves the old or the new credentials,
        and `restore` makes the derived files agree with them."""
        if credentials.keys is not None:
            self.save_cluster_keys(credentials.keys)
        public = msgspec.structs.replace(credentials, keys=None)
        _write(self._credentials, encode_pretty(public))
        self._derive(public)

    def save_cluster_keys(self, keys: ClusterKeys) -> None:
        _write(self._cluster, encode_pretty(keys))

    def restore(self) -> Credentials | None:
        """The credentials, with the files that others read made from them again."""
        credentials = self.credentials()
        if credentials is not None:
            self._derive(credentials)
        return credentials

    def forget(self) -> None:
        """This node left or was removed: its keys are worth nothing, the next join makes new ones.

        The credentials go last: until then the node knows that it has to do this.
        """
        for path in (
            self._cluster,
            self.key,
            self._seed,
            self.certificate,
            self.authorities,
            self._credentials,
        ):
            path.unlink(missing_ok=True)

    def _derive(self, credentials: Credentials) -> None:
        """What is right already stays as it is: a node on a full disk still starts."""
        # The certificate last: the API waits for it, and then needs the others too.
        for path, text in (
            (self.authorities, "".join(credentials.authorities)),
            (self.certificate, credentials.certificate),
        ):
            if _read(path) != text.encode():
                _write(path, text.encode())


def _decode(path: Path, form: type[T]) -> T | None:
    data = _read(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=form)
    except msgspec.MsgspecError as failure:
        # The decoder's own text may quote the file, and the file holds secrets.
        raise Invalid(f"{path} is damaged; restore it, or remove this node and join again") from failure


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as failure:
        raise Invalid(f"{path} cannot be read: {failure.strerror}") from failure


def _write(path: Path, data: bytes) -> None:
    """Replace `path`, readable by its owner only from its first byte on; durable on return."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_DIR)
        replace_file(path, data)
    except OSError as failure:
        raise DiskFull(f"{path} cannot be written: {failure.strerror}") from failure
