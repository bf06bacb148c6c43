"""``weft.adapt_``: freeze a model and attach an adapter under a name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from weft.adapt.switch import adapters
from weft.adapt.token_rows import TokenRows
from weft.adapt.whole import Whole
from weft.errors import RecipeError, WeftError
from weft.function.adapter import Adapter
from weft.function.attach import Attached, functions, parametrize_
from weft.function.classes import unwrapped
from weft.function.protocol import FunctionConfig
from weft.function.where import ALL_LINEAR, Selector, matches

Part = tuple[Any, Selector, str, Selector]  # configuration, where, tensor, ignore


@dataclass
class Adapted(Attached):
    """What ``adapt_`` did.

    Attributes:
        name: of the adapter.
        trainable: numbers that train now.
        total: numbers of the model and its adapters.
    """

    name: str = ""
    trainable: int = 0
    total: int = 0

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def adapt_(
    model: nn.Module,
    config: FunctionConfig | Mapping[Any, FunctionConfig | None],
    where: Selector | None = None,
    *,
    name: str = "default",
    tensor: str = "weight",
    ignore: Selector = (),
    modules_to_save: Selector = (),
    token_rows: Sequence[int] = (),
    data: Iterable[Any] | None = None,
) -> Adapted:
    """Freeze a model and attach an adapter, in place; only what it adds trains.

    A second adapter goes on top of the first; which of them act, train, or are merged is changed by nothing but
    ``weft.adapt.switch_``, ``train_only_``, ``merge_`` and their inverses. Attach before wrapping the model for
    distributed training and before making the optimizer.

    Args:
        model: any module.
        config: an adapter's configuration, such as ``weft.adapt.LoRA(rank=16)``, or selectors with one each.
        where: which layers, see :mod:`weft.function.where`; if None, all linear ones, or those that a mapping chooses.
        name: of this adapter.
        tensor: the tensor of each layer, as in ``parametrize_``.
        ignore: layers to leave alone.
        modules_to_save: modules to train whole beside it, such as a new head; all their parameters, and the
            configuration leaves them out.
        token_rows: token ids whose rows of the input embedding train.
        data: batches, for adapters that start from data.

    Returns:
        What was touched and left, and the count of trainable numbers; printed, the line that PEFT's users know.

    Raises:
        RecipeError: as ``parametrize_``, the name is taken, or the configuration is not an adapter's.

    >>> import torch, weft
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> print(weft.adapt_(model, weft.adapt.LoRA(rank=2), where="0", modules_to_save="2"))
    trainable params: 132 || all params: 472 || trainable%: 27.9661
    """
    check_name(model, name)
    rows = _token_ids(token_rows)
    whole = _parts(unwrapped(model), modules_to_save)
    hidden = {path for paths in whole.values() for path in paths}  # a whole copy would hide what is beneath
    chosen: Selector = where if where is not None else "*" if isinstance(config, Mapping) else ALL_LINEAR

    def parts() -> Iterator[Part]:
        yield config, chosen, tensor, [ignore, lambda path, module: path in hidden]
        for part, paths in whole.items():
            yield Whole(), paths, part, ()
        if rows:
            yield TokenRows(rows=rows), [_input_embedding(unwrapped(model))], "weight", ()

    return attach_parts(model, parts(), name, data)


def check_name(model: nn.Module, name: str) -> None:
    """Raise ``RecipeError`` unless a new adapter can have this name."""
    if not name or not isinstance(name, str):
        raise RecipeError(f"An adapter needs a name, a text that is not empty; got {name!r}.")
    if name in adapters(model):
        raise RecipeError(f"The model has an adapter {name!r} already; choose another name, or weft.adapt.remove_ it.")


def attach_parts(model: nn.Module, parts: Iterable[Part], name: str, data: Iterable[Any] | None = None) -> Adapted:
    """Attach (configuration, where, tensor, ignore) one after the other as one adapter, and freeze the rest.

    Raises:
        RecipeError: as :func:`adapt_`; the model is then as before.
    """
    bare = unwrapped(model)
    before = {n: len(fs) for n, fs in functions(bare).items()}
    report = Adapted(name=name)
    try:
        for config, where, tensor, ignore in parts:
            _add(report, parametrize_(model, config, where, name=tensor, ignore=ignore, data=data))
        added = {n: fs[before.get(n, 0) :] for n, fs in functions(bare).items()}
        other = next((f for fs in added.values() for f in fs if not isinstance(f, Adapter)), None)
        if other is not None:
            raise RecipeError(
                f"{type(other).__name__.strip('_')} is not an adapter: its weight trains itself. Attach it with "
                "weft.parametrize_."
            )
    except WeftError:
        _take_back(bare, before)
        raise
    kept = {id(p) for fs in functions(bare).values() for f in fs for p in f.parameters()}
    for parameter in bare.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    for path, chosen in report.touched.items():
        owner, _, leaf = path.rpartition(".")
        stack = bare.get_submodule(owner).parametrizations[leaf]
        stack.trained = False  # frozen it was, so frozen it is when the adapter goes
        for function in added.get(path, ()):
            function.adapter = name
            if function.config is None:
                function.config = chosen
    report.trainable = sum(p.numel() for p in bare.parameters() if p.requires_grad)
    report.total = sum(p.numel() for p in bare.parameters())
    return report


def _add(report: Adapted, more: Attached) -> None:
    report.touched |= more.touched
    report.tied |= more.tied
    report.ignored += more.ignored
    report.unmatched += more.unmatched
    report.untouched = [n for n in (report.untouched or more.untouched) if n not in report.touched]


def _take_back(model: nn.Module, before: Mapping[str, int]) -> None:
    from weft.adapt.switch import take_out

    take_out(model, [f for full, fs in functions(model).items() for f in fs[before.get(full, 0) :]])


def _parts(model: nn.Module, selector: Selector) -> dict[str, list[str]]:
    """Paths of the modules that have parameters, inside those that the selector chooses, by the parameter's name."""
    chosen = [path for path, module in model.named_modules() if path and selector and matches(selector, path, module)]
    if selector and not chosen:
        from weft.errors import did_you_mean

        known = {path.rpartition(".")[2] for path, _ in model.named_modules()} - {""}
        raise RecipeError(f"modules_to_save={selector!r} chooses no module.{did_you_mean(str(selector), known)}")
    parts: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if any(path == c or path.startswith(f"{c}.") for c in chosen) and ".parametrizations" not in path:
            for part, value in module.named_parameters(recurse=False):
                if value.is_floating_point():
                    parts.setdefault(part, []).append(path)
            for part in getattr(type(module), "weft_names", ()):
                parts.setdefault(part, []).append(path)
    return parts


def _token_ids(rows: Any) -> tuple[int, ...]:
    """A sequence or a tensor of token ids; their values are checked by the configuration."""
    if isinstance(rows, Tensor):
        rows = rows.tolist()
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise RecipeError(f"token_rows is a list of token ids, such as [32000, 32001]; got {rows!r}.")
    return tuple(rows)


def _input_embedding(model: nn.Module) -> str:
    """The path of the input embedding."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    tables = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Embedding)]
    if embedding is None and len(tables) == 1:
        embedding = tables[0][1]
    path = next((p for p, m in tables if m is embedding), "")
    if not path:
        raise RecipeError(
            f"token_rows needs to know the input embedding, and this {type(model).__name__} has {len(tables)} tables. Give "
            'a configuration by name instead: {"path.of.embedding": weft.adapt.TokenRows(rows=…), …}.'
        )
    return path
