"""An adapter's folder, PEFT's or weft's: what its tensors are for, and whether they are all there."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.computed import (
    BlockAffine,
    Factors,
    LowRankUpdate,
    RowBlocks,
    Scratch,
    as_factors,
    as_float32,
)
from weft.checkpoint.folder import from_safetensors, read_json
from weft.checkpoint.lora_config import LoraConfig, parse_lora_config
from weft.errors import CheckpointError, ShapeError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
WEFT_CONFIG = "weft_adapter"  # .json: a folder of weft's own, see weft.adapt.weft_folder
WEFT_FORMAT = 1
WEFT_TYPE = "WEFT"  # stands where PEFT's folders have their peft_type
WEFT_WEIGHTS = "adapter.safetensors"
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|miss_block)"
    r"(?:\.(?!weight$|bias$)(?P<name>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")


@dataclass
class Part:
    """The low-rank change of one module, as stored.

    Attributes:
        module: path in the model.
        scale: what B A is multiplied by.
        down, up: A (r, in) and B (out, r); for convolutions (r, in, …) and (out, r, 1, …).
        embedding: ``down`` is (r, rows) and ``up`` (columns, r) of an embedding table.
        magnitude: of DoRA, (out,).
        bias: a change of the layer's bias, to be scaled as well.
        transposed: whether the weight is stored (in, out), where the folder says so.
        tied: whether tensors tied to the weight change with it.
        layer: class of the layer that has it, where the folder says so.
    """

    module: str
    scale: float
    down: LazyTensor
    up: LazyTensor
    embedding: bool = False
    magnitude: LazyTensor | None = None
    bias: LazyTensor | None = None
    transposed: bool | None = None
    tied: bool = False
    layer: str = "Linear"

    @property
    def stored(self) -> list[LazyTensor]:
        """All tensors in the adapter's file."""
        return [t for t in (self.down, self.up, self.magnitude, self.bias) if t is not None]

    def flipped(self, shape: tuple[int, ...], config: LoraConfig) -> bool:
        """Whether a weight of ``shape`` is stored (in, out), so that ΔW is Aᵀ Bᵀ.

        Raises:
            ShapeError: the factors fit the weight in neither way.
        """
        outputs, inputs = self.up.shape[0], self.down.shape[1:]
        if self.transposed is not None and math.prod(inputs) * outputs == math.prod(shape):
            return self.transposed
        straight, flipped = (outputs, *inputs) == shape, (*inputs, outputs) == shape
        if not (straight or flipped) or (self.embedding and not flipped):
            raise ShapeError(
                f"{self.module}: the adapter's factors A {list(self.down.shape)} and B {list(self.up.shape)} do not fit "
                f"the base's weight {list(shape)}. The adapter was trained on another model, or the vocabulary differs."
            )
        return flipped and (self.embedding or not straight or config.fan_in_fan_out)

    def load(self, flipped: bool) -> Factors:
        """The factors of the weight as stored, in float32."""
        down, up = as_float32(self.down), as_float32(self.up)
        down, up = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
        magnitude = None if self.magnitude is None else as_float32(self.magnitude).reshape(-1)
        if flipped:
            return as_factors(down.T, up.T, magnitude, by_column=magnitude is not None, scale=self.scale)
        return as_factors(up, down, magnitude, scale=self.scale)

    def source(self, base: LazyTensor, config: LoraConfig, scratch: Scratch, weight: float) -> RowBlocks:
        """The changed weight; ``weight`` scales the change."""
        flipped = self.flipped(base.shape, config)
        part = dataclasses.replace(self, scale=self.scale * weight)
        return LowRankUpdate(base, lambda: part.load(flipped), scratch, self.stored)


@dataclass
class MissPart:
    """The change of one linear layer by MiSS, as stored.

    Attributes:
        module: path in the model.
        block: (r, out), or (r, mini_r) of which ``out`` is a multiple; of Bat (out / r, r, r).
        bat: whether it is Bat's.
    """

    module: str
    block: LazyTensor
    bat: bool
    bias: LazyTensor | None = None
    tied: bool = False
    scale: float = 1.0

    @property
    def stored(self) -> list[LazyTensor]:
        """All tensors in the adapter's file."""
        return [self.block]

    def source(self, base: LazyTensor, config: LoraConfig, scratch: Scratch, weight: float) -> RowBlocks:
        """The changed weight; ``weight`` scales the change."""
        shape = self.block.shape
        fits = len(base.shape) == 2
        if fits and self.bat:
            rank = shape[-1]
            fits = base.shape[0] == shape[0] * rank and base.shape[1] % rank == 0
        elif fits:
            fits = base.shape[0] % shape[1] == 0 and (config.miss == "mini" or base.shape[0] == shape[1])
        if not fits:
            raise ShapeError(
                f"{self.module}: the adapter's block {list(shape)} does not fit the base's weight {list(base.shape)}. The "
                "adapter was trained on another model."
            )
        if self.bat:
            return BlockAffine(base, lambda: as_float32(self.block) * np.float32(weight), scratch, self.block)

        def load() -> Factors:
            block = as_float32(self.block)
            rank, columns = len(block), base.shape[1]
            up = np.tile(block.T, (base.shape[0] // block.shape[1], 1))
            down = np.tile(np.eye(rank, dtype=np.float32), (1, -(-columns // rank)))[:, :columns]
            return as_factors(up, down, scale=weight)

        return LowRankUpdate(base, load, scratch, self.stored)


@dataclass
class Adapter:
    """An adapter's file sorted by what its tensors are for; names are the model's.

    Attributes:
        config: how to compute.
        parts: by module, low-rank changes.
        whole: tensors that replace one of the base or are new (saved modules, biases).
        originals: copies of base weights that the adapter was trained on; tied tensors follow them.
        rows: replaced rows of an embedding, by its module.
    """

    config: LoraConfig
    parts: dict[str, Part | MissPart] = field(default_factory=dict)
    whole: dict[str, LazyTensor] = field(default_factory=dict)
    originals: dict[str, LazyTensor] = field(default_factory=dict)
    rows: dict[str, LazyTensor] = field(default_factory=dict)


def open_adapter(folder: str | Path) -> Checkpoint:
    """Open a PEFT folder by itself: its stored tensors, and its configuration as ``config``.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is not LoRA.
    """
    folder = Path(folder)
    name = folder.resolve().name
    own = folder / f"{WEFT_CONFIG}.json"
    if own.is_file():
        config: dict[str, Any] = {"peft_type": WEFT_TYPE, WEFT_CONFIG: read_json(own)}
    else:
        config = read_json(folder / CONFIG_FILE)
        parse_lora_config(config, str(folder))
    if own.is_file():
        if not (folder / WEFT_WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder}: has {own.name} but no {WEFT_WEIGHTS}. The download or the save is incomplete."
            )
        checkpoint = from_safetensors([folder / WEFT_WEIGHTS], name)
    elif (folder / WEIGHTS_FILE).is_file():
        checkpoint = from_safetensors([folder / WEIGHTS_FILE], name)
    elif (folder / "adapter_model.bin").is_file():
        from weft.checkpoint.torch_files import from_torch_files

        checkpoint = from_torch_files([folder / "adapter_model.bin"], name)
    else:
        raise CheckpointError(
            f"{folder}: has {CONFIG_FILE} but no {WEIGHTS_FILE}. The download or the save is incomplete."
        )
    checkpoint.folder, checkpoint.config = folder, config
    checkpoint.fingerprint += "|" + xxhash.xxh3_64_hexdigest(json.dumps(config, sort_keys=True).encode())
    return checkpoint


def read_adapter(adapter: Checkpoint) -> Adapter:
    """Sort an adapter's tensors by what they are for.

    Raises:
        CheckpointError: a factor lacks its partner, is empty, or has another rank than the configuration says; or a
            folder of weft's own holds a change that no two factors make.
    """
    where = adapter.name
    if adapter.config.get("peft_type") == WEFT_TYPE:
        from weft.adapt.as_lora import as_lora

        return as_lora(adapter)
    result = Adapter(parse_lora_config(adapter.config, where))
    found: dict[str, dict[str, LazyTensor]] = {}
    names: set[str] = set()
    others: dict[str, LazyTensor] = {}
    for key, tensor in adapter.items():
        path = key.removeprefix(PREFIX)
        match = _PART.fullmatch(path)
        if match:
            part = match["part"] + (".bias" if match["leaf"] == "bias" else "")
            names.add(match["name"] or "default")
            found.setdefault(match["module"], {})[part] = tensor
        elif rows := _ROWS.fullmatch(path):
            result.rows[rows["module"]] = tensor
        elif path.endswith(".base_layer.weight"):
            result.originals[path.replace(".base_layer", "")] = tensor
        else:
            others[path] = tensor
    if len(names) > 1:
        raise CheckpointError(
            f"{where}: holds several adapters in one file ({', '.join(sorted(names))}). Save each by itself."
        )
    called = "|".join(map(re.escape, {"default", *names}))
    for path, tensor in others.items():
        saved = re.sub(rf"\.modules_to_save(\.({called}))?(?=\.)", "", path)
        result.whole[saved.replace(".base_layer", "")] = tensor
    for module, tensors in found.items():
        result.parts[module] = _part(module, tensors, result.config, where)
    if not (result.parts or result.whole or result.rows):
        raise CheckpointError(f"{where}: the adapter's file holds no tensors. The save is incomplete.")
    return result


def _part(module: str, tensors: Mapping[str, LazyTensor], config: LoraConfig, where: str) -> Part | MissPart:
    if config.miss:
        return _miss_part(module, tensors, config, where)
    embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
    down_name, up_name = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    down, up, rank = tensors.get(down_name), tensors.get(up_name), config.rank_of(module)
    if down is None or up is None:
        raise CheckpointError(
            f"{where}: {module} has {', '.join(sorted(tensors))} but not both {down_name} and {up_name}. "
            "The save is incomplete."
        )
    if len(down.shape) < 2 or len(up.shape) < 2 or 0 in down.shape or 0 in up.shape:
        raise CheckpointError(
            f"{where}: {module} has factors of shape {list(down.shape)} and {list(up.shape)}. They were saved before a "
            "distributed run gathered its weights; save the adapter again."
        )
    if down.shape[0] != rank or up.shape[1] != rank:
        grouped = " Grouped convolutions are not supported." if len(down.shape) > 2 else ""
        raise CheckpointError(
            f"{where}: {module} has factors {list(down.shape)} and {list(up.shape)}, but the configuration says rank {rank}, "
            f"which decides the scale. Weights and configuration are from different saves.{grouped}"
        )
    magnitude = tensors.get("lora_magnitude_vector")
    if config.dora != (magnitude is not None) or (magnitude is not None and magnitude.size != up.shape[0]):
        raise CheckpointError(
            f"{where}: {module} has {'no' if magnitude is None else 'a'} magnitude that fits, and use_dora is {config.dora}. "
            "Weights and configuration are from different saves."
        )
    return Part(module, config.scale_of(module), down, up, embedding, magnitude, tensors.get("lora_B.bias"))


def _miss_part(module: str, tensors: Mapping[str, LazyTensor], config: LoraConfig, where: str) -> MissPart:
    block, bat = tensors.get("miss_block"), config.miss == "bat"
    if block is None or len(tensors) > 1 or 0 in block.shape:
        raise CheckpointError(
            f"{where}: {module} has {', '.join(sorted(tensors))}, where MiSS has a miss_block with values."
        )
    rank = config.rank
    if len(block.shape) != (3 if bat else 2) or (block.shape[1:] != (rank, rank) if bat else block.shape[0] != rank):
        raise CheckpointError(
            f"{where}: {module} has a block of {list(block.shape)}, but the configuration says {config.miss} of rank {rank}. "
            "Weights and configuration are from different saves."
        )
    return MissPart(module, block, bat)
