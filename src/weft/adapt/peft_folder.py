"""An adapter as PEFT's files say it, and PEFT's files as functions on a live model.

PEFT says LoRA and rsLoRA of linear layers, embeddings and convolutions, MiSS of linear layers, whole copies of modules
(``modules_to_save``) and rows of embeddings (``trainable_token_indices``). Where PEFT computes something else than the
function (dilated convolutions, tied layers, attention that reads a weight without calling its layer), it cannot say it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapt.bone import Bone
from weft.adapt.lora import LoRA
from weft.adapt.token_rows import TokenRows
from weft.adapt.weights import AdaptedWeight, Stored, base_of, plain_tensors
from weft.adapt.whole import Whole
from weft.checkpoint.adapter_names import find_places
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.live_names import names_of_model
from weft.checkpoint.lora_folder import PREFIX, MissPart, Part, read_adapter
from weft.engine.adapter_writer import NO_TARGET, task_type
from weft.errors import CheckpointError, RecipeError
from weft.function.adapter import PeftForm
from weft.function.classes import unwrapped
from weft.function.layout import is_conv1d, is_packed
from weft.function.stack import Stack, gathered

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CannotSayError(RecipeError):
    """PEFT's files cannot say an adapter; the message is why."""


@dataclass
class _Said:
    """What has been said so far."""

    type: str = ""
    forms: dict[str, PeftForm] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    transposed: bool = False


def write_peft(model: nn.Module, weights: Sequence[AdaptedWeight], *, convert: bool, base: str) -> tuple[Any, Any]:
    """``adapter_config.json`` and the tensors of an adapter.

    Args:
        model: that has it.
        weights: that it changes.
        convert: factors by ``to_lora`` instead of the function's own.
        base: what the base is called.

    Raises:
        CannotSayError: and why.
    """
    said = _Said()
    whole: dict[str, dict[str, Tensor]] = {}
    for weight in weights:
        if len(weight.functions) > 1:
            raise CannotSayError(f"{weight.names[0]} has {len(weight.functions)} functions, one on the other")
        config = weight.functions[0].config
        if isinstance(config, Whole):
            _alone(weight)
            value: Tensor = weight.functions[0].value
            whole.setdefault(weight.path, {})[weight.tensor] = weight.stack.layout.stored(value)
        elif isinstance(config, TokenRows):
            _rows(weight, config, said)
        else:
            _factors(weight, convert, said)
    modules = dict(unwrapped(model).named_modules())
    for path, values in whole.items():
        others = {n for n, _ in modules[path].named_parameters() if not n.startswith("parametrizations.")}
        others |= {n for n, b in modules[path].named_buffers() if b is not None and "parametrizations." not in n}
        rest = sorted(others - values.keys())
        if rest:
            raise CannotSayError(f"PEFT saves modules whole, and {path}.{rest[0]} is not trained")
        if not path:
            raise CannotSayError("the model itself is one layer, which has no name in PEFT")
        said.saved.append(path)
        said.tensors |= {f"{PREFIX}{path}.{n}": v for n, v in values.items()}
    for kind, paths in (("saves", said.saved), ("trains rows of", list(said.rows))):
        for path in paths:  # PEFT takes every module whose path ends so
            alike = [m for m in modules if m.endswith(path) and m not in paths and ".parametrizations" not in m]
            if alike:
                raise CannotSayError(
                    f"PEFT {kind} every module whose name ends in {path!r}, and {alike[0]!r} is another"
                )
    return _config(model, said, modules, base), {n: gathered(t.detach()) for n, t in said.tensors.items()}


def _alone(weight: AdaptedWeight) -> None:
    if len(weight.names) > 1:
        raise CannotSayError(f"{weight.names[0]} and {weight.names[1]} are one tensor, which PEFT would take apart")


def _rows(weight: AdaptedWeight, config: TokenRows, said: _Said) -> None:
    if weight.layer is not nn.Embedding or weight.tensor != "weight" or not weight.path:
        raise CannotSayError(f"{weight.names[0]} is no embedding's table, and PEFT trains rows of these")
    said.rows[weight.path] = list(config.rows)
    values: Tensor = weight.functions[0].values
    said.tensors[f"{PREFIX}{weight.path}.token_adapter.trainable_tokens_delta"] = values


def _factors(weight: AdaptedWeight, convert: bool, said: _Said) -> None:
    """Say one low-rank change."""
    full, path, function = weight.names[0], weight.path, weight.functions[0]
    form: PeftForm | None
    if convert:
        factors = function.to_lora()
        if factors is None or factors[0].dim() != 2:
            raise CannotSayError(
                f"the change that {_kind(function)} makes of {full} depends on the weight"
                if factors is None
                else f"{full} is a stack of matrices"
            )
        rank = len(factors[0])
        said_of = {"r": rank, "lora_alpha": float(rank), "use_rslora": False, "lora_dropout": 0.0}
        form = PeftForm("LORA", said_of, {"lora_A.weight": factors[0], "lora_B.weight": factors[1]})
    else:
        form = function.peft()
    if form is None:
        raise CannotSayError(f"PEFT has no {_kind(function)} of {full}")
    if said.type not in ("", form.type):
        raise CannotSayError(f"a folder of PEFT holds one type, and this adapter is {said.type} and {form.type}")
    said.type = form.type
    _alone(weight)
    if weight.tensor != "weight":
        raise CannotSayError(f"PEFT adapts what a layer calls its weight, and {full} is another tensor")
    if not path:
        raise CannotSayError("the model itself is one layer, which has no name in PEFT")
    said.forms[path] = form
    said.tensors |= _placed(weight, form)
    said.transposed |= _stores_transposed(weight)


def _stores_transposed(weight: AdaptedWeight) -> bool:
    """Whether PEFT meets a layer that stores (in, out) there; a packed one stands for such a layer or not."""
    return bool(is_conv1d(weight.layer) or (is_packed(weight.module) and weight.module.transposed))


def _placed(weight: AdaptedWeight, form: PeftForm) -> dict[str, Tensor]:
    """A form's tensors by PEFT's names, in PEFT's shapes for the kind of layer."""
    layer, module, start = weight.layer, weight.module, PREFIX + weight.path
    turned = _stores_transposed(weight)
    plain = layer is nn.Linear or is_packed(module)
    if (plain and not turned) or (form.type == "LORA" and turned):
        return {f"{start}.{n}": t for n, t in form.tensors.items()}
    factors = [form.tensors[n] for n in ("lora_A.weight", "lora_B.weight") if form.type == "LORA"]
    if factors and isinstance(module, nn.Embedding) and _looks_up_plainly(module, layer):
        return {f"{start}.lora_embedding_A": factors[1].mT, f"{start}.lora_embedding_B": factors[0].mT}
    if factors and isinstance(module, _CONVOLUTIONS) and layer in _CONVOLUTIONS and _convolves_plainly(module):
        rank, space = len(factors[0]), module.kernel_size
        down, up = factors[0].reshape(rank, -1, *space), factors[1].reshape(-1, rank, *(1 for _ in space))
        return {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    raise CannotSayError(
        f"PEFT's {form.type} of a layer such as {weight.path} ({layer.__name__}) computes something else"
    )


def _looks_up_plainly(table: nn.Embedding, layer: Any) -> bool:
    changed = table.max_norm is not None or table.scale_grad_by_freq or table.sparse
    return layer.forward is nn.Embedding.forward and not changed


def _convolves_plainly(layer: Any) -> bool:
    """Without what PEFT's convolution beside it does not have."""
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def _kind(function: Any) -> str:
    start = getattr(function.config, "start", "")
    kind = type(function.config).__name__
    return f"{kind}(start={start!r})" if start not in ("", "zero", "gaussian") else kind


def _config(model: nn.Module, said: _Said, modules: Mapping[str, nn.Module], base: str) -> dict[str, Any]:
    """``adapter_config.json``."""
    targets = list(said.forms)
    for path in targets:
        if any(re.match(rf"(^|.*\.){s}($|\..*)", path) for s in said.saved):
            raise CannotSayError(f"PEFT does not adapt {path!r}, which it takes for a module that it saves whole")
    if said.rows.keys() & set(targets):
        raise CannotSayError(
            f"PEFT trains rows of {next(iter(said.rows.keys() & set(targets)))!r} or adapts it, not both"
        )
    alike = [m for m in modules for t in targets if m.endswith(f".{t}") and m not in targets]
    alike = [m for m in alike if ".parametrizations" not in m]
    target: Any = targets or NO_TARGET
    if alike:  # a list names every module that ends so; a regular expression, whole names only
        target = "|".join(map(re.escape, targets))
    of_base = getattr(model, "config", None)
    architectures = [str(a) for a in getattr(of_base, "architectures", None) or [type(model).__name__]]
    config: dict[str, Any] = {
        "peft_type": said.type or "LORA",
        "task_type": task_type(architectures, said.saved),
        "base_model_name_or_path": base,
        "target_modules": target,
        "modules_to_save": said.saved or None,
        "bias": "none",
        "inference_mode": True,
    }
    if said.type == "MISS":
        first = next(iter(said.forms.values())).config
        if said.rows:
            raise CannotSayError("PEFT trains rows of embeddings beside LoRA only")
        if any(f.config != first for f in said.forms.values()):
            raise CannotSayError("PEFT has one configuration for all MiSS layers, and these differ")
        return config | dict(first)
    config |= {"trainable_token_indices": said.rows or None, "fan_in_fan_out": said.transposed, "use_dora": False}
    return config | {"init_lora_weights": True, **_numbers(said)}


def _numbers(said: _Said) -> dict[str, Any]:
    """Ranks, alphas, and what PEFT has once for all layers."""
    forms = {path: form.config for path, form in said.forms.items()}
    if not forms:
        return {"r": 1, "lora_alpha": 1, "use_rslora": False, "lora_dropout": 0.0}
    for key in ("use_rslora", "lora_dropout"):
        if len({f[key] for f in forms.values()}) > 1:
            raise CannotSayError(f"PEFT has one {key} for all layers, and these differ")
    first = next(iter(forms.values()))
    rank, alpha = (Counter(f[key] for f in forms.values()).most_common(1)[0][0] for key in ("r", "lora_alpha"))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(p)}": f["r"] for p, f in forms.items() if f["r"] != rank},
        "alpha_pattern": {f"^{re.escape(p)}": f["lora_alpha"] for p, f in forms.items() if f["lora_alpha"] != alpha},
        "use_rslora": first["use_rslora"],
        "lora_dropout": first["lora_dropout"],
    }


def read_peft(model: nn.Module, adapter: Checkpoint) -> tuple[dict[str, list[Stored]], list[str]]:
    """Functions by weight, and notes, from an opened folder of PEFT.

    Raises:
        CheckpointError: a tensor has no place in the model, or does what no function does.
    """
    parsed = read_adapter(adapter)
    where, config = adapter.name, parsed.config
    if config.dora:
        raise CheckpointError(
            f"{where}: uses DoRA, which divides by norms of the changed weight and is no function here. Merge it into its "
            "base: `weft bake base --adapter …` reads it exactly."
        )
    held = plain_tensors(model)
    saved = [str(m) for m in adapter.config.get("modules_to_save") or ()]
    place = find_places(parsed, held, [], where, live=lambda: names_of_model(unwrapped(model), held))
    dropout = adapter.config.get("lora_dropout") or 0.0
    stored: dict[str, list[Stored]] = {}
    notes: list[str] = []
    several = _tied(held)
    modules = dict(unwrapped(model).named_modules())
    for name, tensor in parsed.originals.items():
        if not _equal(base_of(held[place[name]]), tensor.torch()):
            raise CheckpointError(
                f"{where}: holds a copy of {place[name]} that differs from the model's. The adapter was trained on another "
                "model, or on a resized vocabulary: load that base first."
            )
        notes.append(f"the copy of {place[name]} is the model's own")
    for name, tensor in parsed.whole.items():
        full, value = place[name], tensor.torch()
        if not isinstance(held[full], nn.Parameter | Stack):
            if not _equal(held[full], value):
                raise CheckpointError(
                    f"{where}: saved {full}, which is a buffer and not trained, with other values than the model's. Set it in "
                    "the model first, or bake the adapter with `weft bake`."
                )
            notes.append(f"the buffer {full} is the model's own")
            continue
        _refuse_tied(full, several, config.tied, where)
        if value.shape != base_of(held[full]).shape:
            raise CheckpointError(
                f"{where}: {full} is {list(value.shape)} in the adapter and {list(base_of(held[full]).shape)} in the "
                "model. Give the model the adapter's classes or vocabulary first (num_labels, resize_token_embeddings)."
            )
        stored[full] = [Stored(Whole(), {"value": _seen(held, full, modules, value)})]
    for module, tensor in parsed.rows.items():
        full = place[module]
        rows = _row_numbers(config.token_rows, module, where)
        table = base_of(held[full])
        if tensor.shape != (len(rows), table.shape[-1]) or max(rows) >= len(table):
            raise CheckpointError(
                f"{where}: replaces {len(rows)} rows of {full} {list(table.shape)} by {list(tensor.shape)}. Resize the "
                "embedding as it was when the adapter was trained."
            )
        index = torch.tensor(rows)
        at = torch.full((len(table), 1), -1, dtype=torch.long).index_copy_(0, index, torch.arange(len(rows))[:, None])
        stored[full] = [Stored(TokenRows(rows=tuple(rows)), {"rows": index, "place": at, "values": tensor.torch()})]
    for module, part in parsed.parts.items():
        full = place[module]
        _refuse_tied(full, several, config.tied, where)
        if several[full][0] != full and several[full][0] in stored:
            notes.append(f"{full} is {several[full][0]}, whose change it shares")
            continue
        if isinstance(part, MissPart):
            stored.setdefault(full, []).append(_miss(part, config.miss, adapter.config.get("miss_dropout") or 0.0))
            continue
        if part.bias is not None:
            raise CheckpointError(
                f"{where}: changes the bias of {module} by a factor (lora_bias), which no function does. Bake it with "
                "`weft bake`."
            )
        layer = modules[full.rpartition(".")[0]]
        linear = isinstance(layer, nn.Linear) or is_conv1d(type(layer)) or is_packed(layer)
        lora = LoRA(
            rank=config.rank_of(module), alpha=config.alpha_of(module), rslora=config.rslora,
            dropout=dropout if linear else 0.0,
        )  # fmt: skip
        stored.setdefault(full, []).append(Stored(lora, _matrices(part)))
    _refuse_missing(adapter, stored, modules, saved, where)
    return stored, notes


def _miss(part: MissPart, form: str, dropout: float) -> Stored:
    """MiSS's function."""
    block = part.block.torch()
    if part.bat:
        return Stored(Bone(rank=block.shape[-1], form="block_affine"), {"B": block})
    mini = block.shape[1] if form == "mini" else None
    return Stored(Bone(rank=len(block), mini_rank=mini, dropout=dropout), {"D": block.mT.contiguous()})


def _matrices(part: Part) -> dict[str, Tensor]:
    """A and B as a function has them."""
    down, up = part.down.torch(), part.up.torch()
    if part.embedding:
        return {"A": up.mT.contiguous(), "B": down.mT.contiguous()}
    return {"A": down.reshape(len(down), -1), "B": up.reshape(len(up), -1)}


def _tied(held: Mapping[str, Any]) -> dict[str, list[str]]:
    """By name, all names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, value in held.items():
        groups.setdefault(id(value), []).append(name)
    return {n: names for names in groups.values() for n in names}


def _refuse_tied(full: str, several: Mapping[str, list[str]], tied: bool, where: str) -> None:
    others = [n for n in several[full] if n != full]
    if others and not tied:
        raise CheckpointError(
            f"{where}: changes {full} and not {others[0]}, which is the same tensor in this model: PEFT takes them apart. "
            "Untie them first (load with tie_word_embeddings=False), or bake the adapter with `weft bake`."
        )


def _seen(held: Mapping[str, Any], full: str, modules: Mapping[str, nn.Module], value: Tensor) -> Tensor:
    """A stored tensor as functions see it."""
    if isinstance(held[full], Stack):
        return held[full].layout.seen(value).contiguous()
    from weft.function.layout import layout_of

    owner, _, leaf = full.rpartition(".")
    return layout_of(modules[owner], leaf, held[full]).seen(value).contiguous() if value.dim() > 1 else value


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.detach().cpu().to(second.dtype), second)


def _row_numbers(said: Any, module: str, where: str) -> list[int]:
    numbers = said
    if isinstance(said, Mapping):
        numbers = next((v for k, v in said.items() if f".{module}".endswith(f".{k}")), None)
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError(f"{where}: replaces rows of {module}, but trainable_token_indices names none.")
    return numbers


def _refuse_missing(
    adapter: Checkpoint, stored: Mapping[str, Any], modules: Mapping[str, nn.Module], saved: Sequence[str], where: str
) -> None:
    """What the configuration chooses must be in the file; PEFT would leave it as it is without a word."""
    raw = adapter.config
    target = raw.get("target_modules")
    if raw.get("exclude_modules") or raw.get("layers_to_transform") is not None or target in ("all-linear", NO_TARGET):
        return
    found = {full.rpartition(".")[0] for full in stored}
    texts = [str(t) for t in target] if isinstance(target, list) else []

    def chosen(path: str) -> bool:
        if isinstance(target, str):
            return re.fullmatch(target, path) is not None
        return path in texts or any(path.endswith(f".{t}") for t in texts)

    if isinstance(target, str):
        try:
            re.compile(target)
        except (re.error, RecursionError):
            raise CheckpointError(f"{where}: target_modules is {target[:80]!r}, which is no name pattern.") from None
    adaptable = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)
    missing = [
        p for p, m in modules.items()
        if chosen(p) and p not in found and (isinstance(m, adaptable) or is_conv1d(type(m)) or is_packed(m))
        and not any(re.match(rf"(^|.*\.){re.escape(s)}($|\..*)", p) for s in saved)
    ]  # fmt: skip
    if missing and found:
        raise CheckpointError(
            f"{where}: its configuration chooses {missing[0]!r}, and its file has no tensors for it ({len(missing)} are "
            f"missing, {len(found)} are there). The save is incomplete, or is of a model with fewer layers."
        )
