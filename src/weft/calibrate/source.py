"""Where the walker's blocks get their weights: from a model in memory, or block by block from a checkpoint.

A model of transformers is built on the meta device; parts of it get real weights when asked and give them up again. In
memory its names are not those on disk (experts are fused, prefixes differ), so weights are loaded and saved through
transformers' own conversions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from weft.calibrate.experts import Slice
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.fingerprint import fingerprint_of
from weft.checkpoint.live_names import LiveNames, conversions, on_meta, quiet
from weft.checkpoint.open import open_checkpoint
from weft.errors import CheckpointError, MissingDependencyError, RecipeError, did_you_mean
from weft.function.layout import layout_of

_ROW_BITS = 17  # of a mark: no block has a matrix of more rows


class InMemory:
    """A model that is all there; parts are neither loaded nor dropped.

    Attributes:
        model: the model.
        stacks: for each list of blocks, in the order in which they run, the blocks' full names.
    """

    def __init__(self, model: nn.Module, blocks: str | Sequence[str] = ()):
        self.model = model
        self.stacks = find_blocks(model, blocks)

    def weights_identity(self) -> str:
        """Changes with the weights; decides whether a walk may resume."""
        state = self.model.state_dict()
        return xxhash.xxh3_128_hexdigest(repr([(n, fingerprint_of(t)) for n, t in state.items()]).encode())

    def load(self, names: Iterable[str]) -> None:
        """Give the named modules their weights."""

    def load_rest(self) -> None:
        """Give everything outside of blocks its weights."""

    def drop(self, names: Iterable[str]) -> None:
        """Take the weights of the named modules away again."""

    def drop_rest(self) -> None:
        """Take the weights of everything outside of blocks away again."""

    def stored(self, name: str) -> dict[str, Tensor]:
        """The present weights of a module under the names of a checkpoint."""
        module = self.model.get_submodule(name)
        return {f"{name}.{n}": t.detach() for n, t in module.state_dict().items()}

    def stored_rest(self) -> dict[str, Tensor]:
        """The present weights of what lies outside of blocks, under the names of a checkpoint."""
        inside = self._block_prefixes()
        return {n: t.detach() for n, t in self.model.state_dict().items() if not n.startswith(inside)}

    def stored_names(self, name: str, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, int]]]:
        """Under which names a checkpoint holds the matrix of each layer, and which of its rows; see the subclass."""
        return {n: {f"{n}.weight": (0, _rows(m))} for n, m in layers.items()}

    def rest_layers(self) -> dict[str, nn.Module]:
        """Embeddings and linear layers outside of blocks, by full name; of tied ones the first."""
        inside = self._block_prefixes()
        found: dict[str, nn.Module] = {}
        seen: set[int] = set()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not f"{name}.".startswith(inside):
                if id(module.weight) not in seen:
                    found[name] = module
                seen.add(id(module.weight))
        return found

    def _block_prefixes(self) -> tuple[str, ...]:
        return tuple(f"{n}." for names in self.stacks for n in names)


class FromCheckpoint(InMemory):
    """A transformers model whose parts are read from a checkpoint when they are needed.

    Args:
        checkpoint: an open checkpoint with a ``config.json``.
        model_class: the class to build; that of the configuration's ``architectures`` if None.
        blocks: paths of the lists of blocks; found if empty.

    Raises:
        CheckpointError: there is no configuration, or transformers does not know the architecture.
    """

    def __init__(self, checkpoint: Checkpoint, model_class: Any = None, blocks: str | Sequence[str] = ()):
        self.checkpoint = checkpoint
        super().__init__(_on_meta(checkpoint, model_class), blocks)
        self._in_blocks = self._block_prefixes()
        self._mapping = conversions(self.model)
        self._keys = self._sorted_keys()

    def weights_identity(self) -> str:
        return self.checkpoint.fingerprint

    def load(self, names: Iterable[str]) -> None:
        for name in names:
            self._load(f"{name}.", [k for k, target in self._keys.items() if target.startswith(f"{name}.")])

    def load_rest(self) -> None:
        self._load("", [k for k, target in self._keys.items() if not target.startswith(self._in_blocks)])
        self.model.tie_weights()

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            for module in self.model.get_submodule(name).modules():
                _to_meta(module)

    def drop_rest(self) -> None:
        for path, module in self.model.named_modules():
            if not f"{path}.".startswith(self._in_blocks):
                _to_meta(module)

    def stored(self, name: str) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        state = super().stored(name)
        with quiet():
            reverted: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        base = f"{self.model.base_model_prefix}."
        names = {}
        for key, tensor in reverted.items():  # as the file has it, with or without the base model's prefix
            known = next((k for k in (key, key.removeprefix(base), base + key) if k in self.checkpoint), None)
            if known is None:
                raise CheckpointError(
                    f"{self.checkpoint.name}: {key} would be written, and no tensor of that name was read. The conversion "
                    f"of {type(self.model).__name__} is not known well enough to write it."
                )
            names[known] = tensor
        return names

    def stored_rest(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        inside = tuple(self._in_blocks)
        names = {key: target for key, target in self._keys.items() if not target.startswith(inside)}
        return {
            key: state[target].detach()
            for key, target in names.items()
            if _is_plain(state[target], self.checkpoint[key])
        }

    def stored_names(self, name: str, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, int]]]:
        """Under which names a checkpoint holds the matrix of each layer of a block, and which of its rows.

        An expert's gate and input matrices are one layer here and two tensors in most checkpoints. Layers that a checkpoint
        holds fused with others are left out. Every element is given its layer's number and its row's, and the conversion to
        the checkpoint's form shows where they end up.

        Returns:
            For each layer the tensors that make it up, each with its first row and the one behind its last.
        """
        from transformers.core_model_loading import revert_weight_conversion

        if not name:  # what lies outside of blocks is renamed at most
            known = {target: key for key, target in self._keys.items()}
            return {n: {known[f"{n}.weight"]: (0, _rows(m))} for n, m in layers.items() if f"{n}.weight" in known}
        module = self.model.get_submodule(name)
        marks = {f"{name}.{n}": _mark(-1).expand(t.shape) for n, t in module.state_dict().items()}
        order = list(layers)
        slices: dict[str, list[tuple[int, Slice]]] = {}
        for number, layer in enumerate(layers.values()):
            path = _path_of(layer, name, module)
            if isinstance(layer, Slice):
                slices.setdefault(path, []).append((number, layer))
            else:
                rows = _numbered(number, _rows(layer))
                seen = layout_of(layer, "weight", marks[path]).seen(marks[path])
                turned = rows.reshape(-1, *[1] * (seen.dim() - 1)).expand(seen.shape)
                marks[path] = layout_of(layer, "weight", turned).stored(turned)
        for path, experts in slices.items():
            holder: Any = experts[0][1].experts
            fused = torch.full((len(marks[path]), _rows(experts[0][1]), 1), -1, dtype=torch.int32)
            for number, layer in experts:
                fused[layer.index, :, 0] = _numbered(number, _rows(layer))
            marks[path] = (fused.mT if holder.is_transposed else fused).expand(marks[path].shape)
        with quiet():
            reverted: dict[str, Tensor] = revert_weight_conversion(self.model, marks)
        base = f"{self.model.base_model_prefix}."
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for key, mark in reverted.items():
            place = next((k for k in (key, key.removeprefix(base), base + key) if k in self.checkpoint), None)
            if place is None or mark.dim() < 2:
                continue
            for turned in (mark, mark.mT):
                flat = turned if turned.dim() == 2 else turned.flatten(1)
                rows = flat[:, 0]
                first, last = int(rows[0]), int(rows[-1])
                whole = first >= 0 and first >> _ROW_BITS == last >> _ROW_BITS and last - first == len(rows) - 1
                if whole and torch.equal(flat.amin(1), rows) and torch.equal(flat.amax(1), rows):
                    start = first & ((1 << _ROW_BITS) - 1)
                    found.setdefault(order[first >> _ROW_BITS], {})[place] = (start, start + len(rows))
                    break
        sizes = {n: _rows(m) for n, m in layers.items()}
        return {n: t for n, t in found.items() if sum(stop - start for start, stop in t.values()) == sizes[n]}

    def _sorted_keys(self) -> dict[str, str]:
        """The name in memory for each tensor on disk; those that the model has no place for are left out."""
        names = LiveNames(self.model)
        live = {key: names.of(key) for key in self.checkpoint}
        found = {key: name[0] for key, name in live.items() if name is not None}
        missing = _missing(self.model, set(found.values()))
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.name}: no tensor for {missing[0]}{f' and {len(missing) - 1} others' * (len(missing) > 1)} of "
                f"{type(self.model).__name__}.{did_you_mean(missing[0], list(self.checkpoint)[:500])} The file is "
                "incomplete, or of another architecture than its config.json says."
            )
        return found

    def _load(self, prefix: str, keys: Sequence[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        self._rebuild_buffers(prefix)
        state = {k: self.checkpoint[k].torch() for k in keys}
        plan = self.model._get_dtype_plan(self.model.dtype) if hasattr(self.model, "_get_dtype_plan") else {}
        options = LoadStateDictConfig(weight_mapping=self._mapping, dtype=self.model.dtype, dtype_plan=plan)
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, options)
        wrong = [f"{name} is {list(a)} in the file and {list(b)} by config.json" for name, a, b in info.mismatched_keys]
        problems = [*info.error_msgs, *info.conversion_errors.values(), *wrong]
        if problems:
            raise CheckpointError(
                f"{self.checkpoint.name}: the weights of {prefix.rstrip('.') or 'the model'} do not fit: {problems[0]}."
            )

    def _rebuild_buffers(self, prefix: str) -> None:
        """Buffers that no file holds (rotary frequencies, embedding scales): as a new model makes them."""
        for path, module in self.model.named_modules():
            inside = f"{path}.".startswith(prefix) if prefix else not f"{path}.".startswith(self._in_blocks)
            names = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
            if inside and names:
                for name in names:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
                self.model._init_weights(module)


def open_source(
    model: nn.Module | Checkpoint | str | Path, blocks: str | Sequence[str] = (), model_class: Any = None
) -> InMemory:
    """A source for what a user names: a model in memory, or a checkpoint of transformers.

    >>> open_source(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), "0").stacks
    [['0.0']]
    """
    if isinstance(model, nn.Module):
        return InMemory(model, blocks)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    return FromCheckpoint(checkpoint, model_class, blocks)


@contextlib.contextmanager
def whole_model(checkpoint: Checkpoint, copies: float = 1.0, beside: float = 0.0) -> Iterator[Any]:
    """A transformers model with all its weights, for the length of a ``with``.

    Args:
        checkpoint: an open checkpoint with a ``config.json``.
        copies: how often the weights will be in memory (with gradients: twice).
        beside: bytes for each parameter that are needed beside them.

    Raises:
        CheckpointError: this machine has not the memory.
    """
    needed, there = int(checkpoint.nbytes * copies + checkpoint.parameters * beside), physical_memory()
    if needed > 0.8 * there:
        raise CheckpointError(
            f"{checkpoint.name}: this needs the whole model in memory, {needed / 1e9:,.1f} GB with what is kept beside it, "
            f"and the machine has {there / 1e9:,.1f} GB. Use statistics that a walk gathers block by block (gram, scales, …), "
            "or a larger machine."
        )
    source = FromCheckpoint(checkpoint)
    names = [n for stack in source.stacks for n in stack]
    source.load_rest()
    source.load(names)
    try:
        yield source.model
    finally:
        source.drop(names)
        source.drop_rest()


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def find_blocks(model: nn.Module, blocks: str | Sequence[str] = ()) -> list[list[str]]:
    """The lists of blocks of a model.

    Args:
        model: any module.
        blocks: paths of lists (``nn.ModuleList``, ``nn.Sequential``) in the order in which they run; if empty, the lists
            whose items transformers can checkpoint.

    Raises:
        RecipeError: there are none.
    """
    paths = [blocks] if isinstance(blocks, str) and blocks else list(blocks)
    lists = {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)}
    if not paths:
        paths = [p for p, m in lists.items() if all(_is_block(b) for b in m)]
    for path in paths:
        if path not in lists:
            raise RecipeError(f"The model has no list of blocks {path!r}.{did_you_mean(path, lists)}")
    if not paths:
        raise RecipeError(
            f"{type(model).__name__} has no list of blocks that transformers would checkpoint; name it: "
            f'blocks="path.of.list".{did_you_mean("layers", lists)}'
        )
    return [[f"{path}.{name}" if path else name for name, _ in lists[path].named_children()] for path in paths]


def _is_block(module: nn.Module) -> bool:
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def _on_meta(checkpoint: Checkpoint, model_class: Any) -> Any:
    if checkpoint.name.endswith(".gguf"):
        raise CheckpointError(
            f"{checkpoint.name}: is a GGUF file, without a config.json that transformers reads. Convert it first: "
            f"weft convert {checkpoint.name} -o model/"
        )
    if not checkpoint.config or checkpoint.folder is None:
        raise CheckpointError(
            f"{checkpoint.name}: has no config.json, so its architecture is not known. Give the model's folder, or a model "
            "in memory."
        )
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "Building a model from its config.json needs transformers: pip install 'weft[hf]'."
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        kind = checkpoint.config.get("model_type")
        raise CheckpointError(
            f"{checkpoint.name}: transformers {transformers.__version__} cannot read its config.json, model_type {kind!r} "
            f"({str(error).splitlines()[0]})"
        ) from None
    try:
        return on_meta(config, model_class)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from None


def _missing(model: nn.Module, found: set[str]) -> list[str]:
    """Parameters that no file gives, tied ones apart."""
    tied: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(value), []).append(name)
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    linked = set(keys) | set(keys.values())
    return [
        names[0]
        for names in tied.values()
        if not any(n in found for n in names)
        and not (linked & set(names) and any(keys.get(n, n) in found for n in names))
    ]


def _rows(layer: Any) -> int:
    """Rows of a layer's matrix (out, in)."""
    return int(layout_of(layer, "weight", layer.weight).seen(layer.weight).shape[0])


def _is_plain(tensor: Tensor, stored: LazyTensor) -> bool:
    """Whether loading changed a tensor's name at most."""
    return tuple(tensor.shape) == stored.shape and not tensor.is_meta


def _mark(value: int) -> Tensor:
    return torch.full((), value, dtype=torch.int32)


def _numbered(number: int, rows: int) -> Tensor:
    """(rows,) int32, which say their layer and themselves; expanded over columns they take no memory."""
    return torch.arange(rows, dtype=torch.int32) + (number << _ROW_BITS)


def _path_of(layer: Any, name: str, block: nn.Module) -> str:
    """The name of the parameter that holds a layer's weight."""
    holder, part = (layer.experts, layer.part) if isinstance(layer, Slice) else (layer, "weight")
    path = next(p for p, m in block.named_modules() if m is holder)
    return ".".join(p for p in (name, path, part) if p)


def _to_meta(module: nn.Module) -> None:
    for name, value in module._parameters.items():
        if value is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            module._buffers[name] = torch.empty_like(buffer, device="meta")
    module.__dict__.pop("_is_hf_initialized", None)
