"""Models on the Hugging Face Hub: headers and weights are read in place, with range requests.

A snapshot that is complete in the local cache is used instead. Only small files (configuration, index, tokenizer,
adapters) are downloaded, into the same cache that other Hugging Face libraries use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.folder import SAFETENSORS_INDEX, TORCH_INDEX, collect, open_path, read_json, shard_names
from weft.checkpoint.header import header_length, parse_header
from weft.checkpoint.remote import LastBlock, RemoteFile, explained
from weft.errors import CheckpointError, MissingDependencyError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,255})?", re.ASCII)
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md")
_MAX_COMPANION_BYTES = 64_000_000
_CONNECTIONS = 8  # requests at a time while headers are read
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``org/name`` or ``org/name@revision``.

    >>> is_hub_id("org/model"), is_hub_id("org/model@main"), is_hub_id("./model"), is_hub_id("a/b/c")
    (True, True, False, False)
    """
    return bool(_ID.fullmatch(text)) and "--" not in text.partition("@")[0] and ".." not in text


def open_hub(text: str) -> Checkpoint:
    """Open ``org/name`` or ``org/name@revision`` (a branch, tag or commit).

    The revision is resolved to a commit once, so that all reads see the same files. Set ``HF_TOKEN`` or log in for
    private and gated repositories; ``HF_ENDPOINT`` names another server.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        CheckpointError: the repository cannot be reached, found or read, or has no weights; the message says which.
    """
    library = _library()
    repository, _, revision = text.partition("@")
    try:
        info = library.HfApi(endpoint=_endpoint()).model_info(repository, revision=revision or None, timeout=30)
    except Exception as error:
        cached = _cached(library, repository, revision)
        if cached is not None:
            return _labelled(cached, text, cached.folder.name if cached.folder else "")
        raise explained(error, text) from None
    return _open_commit(_Repository(library, repository, info.sha, {s.rfilename for s in info.siblings or ()}), text)


class _Repository:
    """One commit of a repository."""

    def __init__(self, library: Any, name: str, commit: str, files: set[str]):
        self.library = library
        self.name = name
        self.commit = commit
        self.files = files

    def download(self, names: Iterable[str]) -> Path:
        """Fetch small files into the cache; the snapshot's folder."""
        path = Path()
        for name in names:
            try:
                path = Path(self.library.hf_hub_download(self.name, name, revision=self.commit, endpoint=_endpoint()))
            except Exception as error:
                raise explained(error, f"{self.name}/{name}") from None
        return path.parent

    def cached(self, names: Iterable[str]) -> Path | None:
        """The snapshot's folder if it holds all of ``names``."""
        found = [self.library.try_to_load_from_cache(self.name, n, revision=self.commit) for n in names]
        return Path(found[0]).parent if found and all(isinstance(f, str) for f in found) else None


class HubCheckpoint(Checkpoint):
    """A checkpoint on the Hub; its companion files are downloaded when :attr:`folder` is first asked for."""

    repository: _Repository | None = None
    _folder: Path | None = None

    @property
    def folder(self) -> Path | None:
        """Where companion files lie: the repository's snapshot in the local cache."""
        if self._folder is None and self.repository is not None:
            names = [n for n in sorted(self.repository.files) if any(fnmatch(n, p) for p in _COMPANIONS)]
            names = [n for n in names if "/" not in n and not n.endswith(".index.json")]
            self._folder = self.repository.download(names) if names else None
        return self._folder

    @folder.setter
    def folder(self, value: Path | None) -> None:
        self._folder = value


def _open_commit(repository: _Repository, text: str) -> Checkpoint:
    files = repository.files
    weights = sorted(n for n in files if n.endswith(".safetensors") and "/" not in n)
    if "adapter_config.json" in files and files & set(_ADAPTER) and "model.safetensors" not in files:
        names = ["adapter_config.json", next(n for n in _ADAPTER if n in files)]
        return _labelled(open_path(repository.download(names)), text, repository.commit)
    weight_map = None
    if "model.safetensors" in files:
        weights = ["model.safetensors"]
    elif SAFETENSORS_INDEX in files:
        index = repository.download([SAFETENSORS_INDEX]) / SAFETENSORS_INDEX
        weight_map, weights = shard_names(read_json(index), f"{text}/{SAFETENSORS_INDEX}")
    elif not weights:
        return _download_torch(repository, text)
    snapshot = repository.cached([*weights, *({"config.json"} & files)])
    if snapshot is not None:
        return _labelled(open_path(snapshot), text, repository.commit)
    return _remote(repository, weights, weight_map, text)


def _remote(
    repository: _Repository, weights: list[str], weight_map: Mapping[str, str] | None, text: str
) -> HubCheckpoint:
    library, last = repository.library, LastBlock()
    headers = library.utils.build_hf_headers(library_name="weft")

    def open_file(name: str) -> tuple[RemoteFile, Any]:
        if name not in repository.files:
            raise CheckpointError(f"{text}: the index names {name}, which the repository does not have.")
        url = library.hf_hub_url(repository.name, name, revision=repository.commit, endpoint=_endpoint())
        file = RemoteFile(url, name, headers, last)
        length = header_length(file.head[:8], file.size, f"{text}/{name}")
        header = file.head[8 : 8 + length] + file.fetch(len(file.head), 8 + length)
        return file, parse_header(header, file.size, f"{text}/{name}")

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        opened = list(pool.map(open_file, weights))
    config = repository.download(["config.json"]) / "config.json" if "config.json" in repository.files else None
    checkpoint = HubCheckpoint(
        name=text,
        tensors=collect(opened, weight_map, text),
        config=read_json(config) if config else {},
        metadata={key: value for _, header in opened for key, value in header.metadata.items()},
        fingerprint=f"{repository.name}@{repository.commit}",
    )
    checkpoint.repository = repository
    return checkpoint


def _download_torch(repository: _Repository, text: str) -> Checkpoint:
    """Torch's files cannot be read in place: they are downloaded whole."""
    names = sorted(n for n in repository.files if fnmatch(n, "pytorch_model*.bin") and "/" not in n)
    if not names:
        raise CheckpointError(
            f"{text}: the repository holds no weights that weft reads (.safetensors, pytorch_model*.bin, a LoRA adapter)."
        )
    others = sorted({"config.json", TORCH_INDEX} & repository.files)
    return _labelled(open_path(repository.download([*others, *names])), text, repository.commit)


def _cached(library: Any, repository: str, revision: str) -> Checkpoint | None:
    """The repository as far as the cache knows it, for when the Hub cannot be asked."""
    for name in ("config.json", "adapter_config.json", "model.safetensors", SAFETENSORS_INDEX, TORCH_INDEX):
        found = library.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            try:
                return open_path(Path(found).parent)
            except CheckpointError:  # configuration without weights, or some of the shards
                return None
    return None


def _labelled(checkpoint: Checkpoint, text: str, commit: str) -> Checkpoint:
    checkpoint.name, checkpoint.fingerprint = text, f"{text.partition('@')[0]}@{commit}"
    return checkpoint


def _library() -> Any:
    try:
        import huggingface_hub
        from huggingface_hub.utils import http_stream_backoff  # noqa: F401  (since 1.0)
    except ImportError:
        raise MissingDependencyError(
            'Reading from the Hugging Face Hub needs huggingface_hub 1.0 or newer: pip install "weft[hf]". '
            "If a local folder was meant, check its path."
        ) from None
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None
