"""``weft adapt``: attach an adapter to a model's folder, count and forecast, and write it as a folder to train from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.engine.progress import Progress
from weft.errors import RecipeError, did_you_mean

_KEYS = ("adapt", "modules_to_save", "token_rows", "ignore")
_ENTRY = ("where", "method", "parameters")


@dataclass
class AdaptPlan:
    """What to attach where.

    Attributes:
        cases: selectors with a method's id and its parameters each, in order.
        modules_to_save, token_rows, ignore: as in ``weft.adapt_``.
    """

    cases: list[tuple[str, str, dict[str, Any]]]
    modules_to_save: list[str] = field(default_factory=list)
    token_rows: list[int] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)

    def configurations(self) -> dict[str, Any]:
        """Checked configurations by selector.

        Raises:
            RecipeError: a method is no adapter, or a parameter is wrong.
        """
        from weft.function.protocol import FunctionMethod
        from weft.registry import method, methods

        made = {}
        for where, name, values in self.cases:
            row = method(name)
            if not isinstance(row, FunctionMethod) or not row.adapter:
                known = [n for n, r in methods().items() if isinstance(r, FunctionMethod) and r.adapter]
                raise RecipeError(f"{name} is not an adapter.{did_you_mean(name, known)}")
            made[where] = row.configure(values)
        return made


def read_plan(file: str) -> AdaptPlan:
    """A recipe of adapters: YAML or JSON with the keys ``adapt``, ``modules_to_save``, ``token_rows`` and ``ignore``.

    Raises:
        RecipeError: a key or its value is wrong; the message names it.
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file}: cannot be read as YAML ({error}).") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("adapt"), list) or not raw["adapt"]:
        raise RecipeError(f"{file}: needs a list `adapt` with entries of where, method and parameters.")
    for key in raw:
        if key not in _KEYS:
            raise RecipeError(f"{file}: there is no key {key!r}.{did_you_mean(str(key), _KEYS)}")
    cases = []
    for number, entry in enumerate(raw["adapt"], 1):
        if not isinstance(entry, dict) or "method" not in entry:
            raise RecipeError(f"{file}: entry {number} of adapt needs a method.")
        for key in entry:
            if key not in _ENTRY:
                raise RecipeError(f"{file}: entry {number} has no key {key!r}.{did_you_mean(str(key), _ENTRY)}")
        parameters = entry.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise RecipeError(f"{file}: parameters of entry {number} must map names to values.")
        cases.append((str(entry.get("where", "all-linear")), str(entry["method"]), parameters))
    return AdaptPlan(cases, *(_list(file, raw, key) for key in _KEYS[1:]))


def adapt_command(
    model: str,
    plan: AdaptPlan,
    output: str | None,
    *,
    data: str,
    name: str,
    samples: int,
    batch: int,
    length: int,
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Attach, count and forecast; with an output, from the real weights, and save.

    Returns:
        Facts for :func:`adapt_text`.

    Raises:
        CheckpointError: the model is no folder of transformers.
        RecipeError: nothing matched, a configuration is wrong, or data is needed.
    """
    from weft.adapt.attach import adapt_
    from weft.adapt.folder import save_adapter
    from weft.calibrate.data import SELF, DataOptions, own_batches, read_batches
    from weft.calibrate.source import FromCheckpoint
    from weft.checkpoint.open import open_checkpoint

    configurations = plan.configurations()
    with open_checkpoint(model) as checkpoint:
        source = FromCheckpoint(checkpoint)
        net = source.model
        batches = None
        if output is not None or data:
            _load(source, progress)
        if data:
            folder = checkpoint.folder or Path(model)
            options = DataOptions(samples=samples, length=length, batch_size=batch)
            if data == SELF:
                batches = own_batches(net, options=options, progress=progress)
            else:
                batches = read_batches(data, folder, options)
        report = adapt_(
            net, configurations, where="*", name=name, ignore=plan.ignore, modules_to_save=plan.modules_to_save,
            token_rows=plan.token_rows, data=None if batches is None else _counted(batches, progress),
        )  # fmt: skip
        facts: dict[str, Any] = {
            "line": str(report),
            "trainable": report.trainable,
            "total": report.total,
            "touched": len(report.touched),
            "untouched": len(report.untouched),
            "unmatched": report.unmatched,
            "configurations": {w: {"method": m, **asdict(configurations[w])} for w, m, _ in plan.cases},
            "memory": forecast(net, batch, length),
        }
        if output is not None:
            saved = save_adapter(net, output, name, base=_base_name(model, checkpoint.name), force=force)
            facts |= {
                "output": output,
                "form": saved.form,
                "why": saved.why,
                "tensors": saved.tensors,
                "bytes": saved.nbytes,
            }
    return facts


def forecast(model: Any, batch: int, length: int) -> dict[str, int]:
    """Bytes that training takes with AdamW, counted on a model of the same shapes without values.

    Args:
        model: of transformers, with its adapter.
        batch, length: rows and tokens of a step.

    Returns:
        ``weights`` of the frozen model, ``trained``: parameters that train with their gradients and two moments,
        ``kept``: what the backward pass needs of the forward pass, and ``kept_with_checkpointing``: the same if each
        block is run again in the backward pass. The last two are missing where the model's code needs values to run.
    """
    import copy
    from unittest import mock

    import torch
    from torch.nn import functional

    from weft.calibrate.source import find_blocks

    class Attention(torch.autograd.Function):
        """Keeps what fused attention keeps; without a device torch would take the variant that keeps all scores."""

        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
            return out

    shape = copy.deepcopy(model).to("meta").train()
    shape.config.use_cache = True  # without, some models look into their position ids, which have no values here
    frozen = {id(p): p for p in [*shape.parameters(), *shape.buffers()] if not p.requires_grad}
    trained = [p for p in shape.parameters() if p.requires_grad]
    facts = {
        "weights": sum(p.nbytes for p in frozen.values()),
        "trained": sum(p.numel() * (2 * p.element_size() + 8) for p in trained),
    }
    own = {p.untyped_storage()._cdata for p in [*shape.parameters(), *shape.buffers()]}
    kept: dict[int, Any] = {}  # storages by identity, held so that no two get the same

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, storage)
        return tensor

    spans: dict[str, list[int]] = {}
    for name in [n for names in find_blocks(shape) for n in names]:
        module = shape.get_submodule(name)
        module.register_forward_pre_hook(lambda m, a, n=name: spans.update({n: [len(kept)]}))
        module.register_forward_hook(lambda m, a, o, n=name: spans[n].append(len(kept)))
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            mock.patch.object(
                functional, "scaled_dot_product_attention", lambda q, k, v, *a, **o: Attention.apply(q, k, v)
            ),
        ):
            shape(**_inputs(shape, batch, length))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        # Any architecture's code runs here, on tensors without values: one that reads a value (experts that pick rows, say)
        # raises RuntimeError, one that wants other inputs or sizes than these raises one of the others. This is a forecast,
        # so its line is left out.
        return facts
    sizes = [s.nbytes() for s in kept.values()]
    blocks = [sum(sizes[first:last]) for first, last in spans.values()]
    width = getattr(shape.config.get_text_config(), "hidden_size", 0)
    entering = len(blocks) * batch * length * width * shape.dtype.itemsize
    return {
        **facts,
        "kept": sum(sizes),
        "kept_with_checkpointing": sum(sizes) - sum(blocks) + max(blocks, default=0) + entering,
    }


def adapt_text(facts: Mapping[str, Any]) -> str:
    """The facts for a person."""
    lines = [facts["line"], f"{facts['touched']} weights adapted, {facts['untouched']} left as they are"]
    if facts["unmatched"]:
        lines.append(f"no layer matched {', '.join(facts['unmatched'])}")
    memory = facts["memory"]
    lines.append(
        f"training takes {_gigabytes(memory['weights'])} of frozen weights and {_gigabytes(memory['trained'])} for what "
        "trains (with gradients and AdamW's moments)"
    )
    if "kept" in memory:
        lines.append(
            f"and {_gigabytes(memory['kept'])} for the backward pass, or {_gigabytes(memory['kept_with_checkpointing'])} with "
            "gradient checkpointing"
        )
    if "output" in facts:
        why = f" ({facts['why']})" if facts["why"] else ""
        lines.append(
            f"{facts['output']}: {facts['tensors']} tensors, {facts['bytes']:,} bytes, in the form {facts['form']}{why}"
        )
    return "\n".join(lines)


def _load(source: Any, progress: Progress) -> None:
    names = [n for stack in source.stacks for n in stack]
    progress.start("loading", len(names), len(names), "blocks")
    for name in names:
        source.load([name])
        progress.advance(name, 1)
    source.load_rest()


def _counted(batches: list[Any], progress: Progress) -> Iterator[Any]:
    progress.start("looking at the data", len(batches), len(batches), "batches")
    for number, batch in enumerate(batches, 1):
        yield batch
        progress.advance(f"batch {number}", 1)


def _inputs(model: Any, batch: int, length: int) -> dict[str, Any]:
    import torch

    config = model.config
    if model.main_input_name == "pixel_values":
        shape = (batch, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {"pixel_values": torch.empty(shape, device="meta", dtype=model.dtype)}
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}


def _base_name(model: str, name: str) -> str:
    """What to call the base: a Hub id as it is, a folder by its own name."""
    return name if Path(model).exists() else model


def _list(file: str, raw: Mapping[str, Any], key: str) -> list[Any]:
    value = raw.get(key) or []
    value = [value] if isinstance(value, str | int) else value
    kind = int if key == "token_rows" else str
    if not isinstance(value, list) or not all(type(v) is kind for v in value):
        raise RecipeError(f"{file}: {key} must be a list of {'token ids' if kind is int else 'names'}.")
    return value


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
