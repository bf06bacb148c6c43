"""``weft.parametrize_``, ``weft.functions`` and ``weft.bake_``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from weft.errors import RecipeError
from weft.function.classes import Carrier, put_on, take_off, unwrapped
from weft.function.export import bake_on_save
from weft.function.layout import Layout
from weft.function.places import Place, places_of
from weft.function.protocol import FunctionConfig, WeightFunction
from weft.function.stack import PackedStack, Stack, is_sharded
from weft.function.updates import stop_updating, update_before_forward
from weft.function.where import Selector, matches, most_specific, nearest_names, output_heads, texts
from weft.method import configure


@dataclass
class Attached:
    """What ``parametrize_`` did.

    Attributes:
        touched: full names of the tensors that are computed now, with the configuration that each got.
        tied: touched names that share a tensor with an earlier one, and its name.
        ignored: names that were chosen and that ``ignore``, or a configuration of None, took back.
        untouched: tensors of the same name in layers that nothing chose.
        unmatched: patterns that chose no layer.
    """

    touched: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{len(self.touched)} attached ({len(self.tied)} tied), {len(self.ignored)} ignored"
        unmatched = f"; no layer matched {', '.join(map(repr, self.unmatched))}" if self.unmatched else ""
        return f"{counts}, {len(self.untouched)} left{unmatched}"


def parametrize_(
    model: nn.Module,
    config: FunctionConfig | Mapping[Any, FunctionConfig | None],
    where: Selector = "*",
    *,
    name: str = "weight",
    ignore: Selector = (),
    data: Iterable[Any] | None = None,
) -> Attached:
    """Let functions compute weights of a model, in place; on a computed weight they go on top.

    Attach before wrapping the model in DistributedDataParallel or fully_shard, and before making the optimizer. Give
    the model whose forward pass makes a step: it is where functions that change once a step are updated.

    Args:
        model: any module.
        config: the function's configuration, or selectors with one each (None: leave alone); the most specific
            selector that matches a layer wins.
        where: which layers, see :mod:`weft.function.where`; narrows a mapping, too.
        name: the tensor in each layer: "weight", or for example "gate_up_proj" of fused experts. Tensors of floats
            with at least two axes are taken; :mod:`weft.function.layout` says how a function sees them.
        ignore: layers to leave alone.
        data: batches as the model takes them, for functions that start from data: a tensor, a tuple of positional or a
            mapping of named arguments each. They are run through the model in evaluation.

    Returns:
        What was touched and what was not. Layers that share a tensor share its function.

    Raises:
        RecipeError: nothing matched (the message has the nearest names), a function does not fit a weight, tied layers
            were given different functions, or the model is wrapped already. The model is then unchanged.

    >>> import weft
    >>> from weft.normalize import WeightStandardization
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))
    >>> print(weft.parametrize_(model, WeightStandardization(), where=nn.Conv2d))
    1 attached (0 tied), 0 ignored, 1 left
    >>> bool(model[0].weight.mean() < 1e-6)
    True
    """
    _refuse_wrapped(model)
    model = unwrapped(model)  # what torch.compile has wrapped compiles again when it changes
    cases = {s: _checked(c) for s, c in (config if isinstance(config, Mapping) else {"*": config}).items()}
    places = list(places_of(model, packed=True))
    vectors = any(getattr(c, "takes_vectors", False) for c in cases.values())
    layers = [p for p in places if p.name == name and p.is_weight(vectors)]
    report, chosen = Attached(), {}
    heads = output_heads(model)
    for place in layers:
        path = place.path
        case = most_specific(cases, path, place.module, heads) if matches(where, path, place.module, heads) else None
        vector = not place.is_weight() and not getattr(cases.get(case), "takes_vectors", False)
        if case is None or vector:
            report.untouched.append(place.full)
        elif cases[case] is None or matches(ignore, path, place.module, heads):
            report.ignored.append(place.full)
        else:
            chosen[place.full] = cases[case]
    patterns = [t for s in (where, list(cases), ignore) for t in texts(s)]
    report.unmatched = [t for t in patterns if not any(matches(t, p.path, p.module, heads) for p in layers)]
    if not chosen:
        asked = where if where != "*" else list(cases)
        hint = _vectors(places, where, list(cases), name) or nearest_names(asked, [(p.path, p.module) for p in layers])
        raise RecipeError(
            f"No layer with a tensor {name!r} was chosen by {asked!r}: {len(layers)} layers have one, "
            f"{len(report.ignored)} of these are ignored.{hint}"
        )
    _attach(model, places, chosen, report, data)
    return report


def _vectors(places: list[Place], where: Selector, cases: list[Any], name: str) -> str:
    """A hint where layers were chosen whose tensor is no matrix."""
    found = [
        p.full for p in places
        if p.name == name and not p.is_weight() and matches(where, p.path, p.module) and matches(cases, p.path, p.module)
    ]  # fmt: skip
    if not found:
        return ""
    layers = f"{len(found)} chosen layer{'s have' if len(found) > 1 else ' has'} a vector there"
    return (
        f" {layers}, such as {found[0]}, and this function takes matrices: train it whole "
        "(weft.adapt.Whole, or modules_to_save)."
    )


def functions(model: nn.Module) -> dict[str, list[WeightFunction]]:
    """The functions that compute each tensor of a model, innermost first.

    >>> functions(nn.Linear(2, 2))
    {}
    """
    return {p.full: list(p.held) for p in places_of(model) if isinstance(p.held, Stack)}


def holders(model: nn.Module, names: Iterable[str]) -> dict[str, dict[str, nn.Module]]:
    """For each tensor: all its full names, itself first, with the layer that has it; ties have several.

    >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    >>> model[1].weight = model[0].weight
    >>> holders(model, ["1.weight"])
    {'1.weight': {'1.weight': Linear(in_features=2, out_features=3, bias=True), '0.weight': Embedding(3, 2)}}
    """
    groups: dict[int, list[Place]] = {}
    named: dict[str, int] = {}
    for place in places_of(model, packed=True):
        groups.setdefault(id(place.held), []).append(place)
        named[place.full] = id(place.held)
    return {
        name: {p.full: p.module for p in sorted(groups[named[name]], key=lambda p: p.full != name)} for name in names
    }


def bake_(model: nn.Module, where: Selector = "*", *, ignore: Selector = ()) -> list[str]:
    """Replace computed weights by their values, in place; the functions and their parameters go.

    Values are those of evaluation. The new weights are new parameters, which train if the stored ones did before a
    function was attached.

    Args:
        model: a model with functions attached. Ties to tensors outside of it are not seen, and end.
        where, ignore: which layers, see :mod:`weft.function.where`.

    Returns:
        Full names of the tensors that are plain now. Tied ones are baked together and stay tied.

    Raises:
        RecipeError: the model is sharded.

    >>> import weft
    >>> from weft.normalize import WeightStandardization
    >>> layer = nn.Linear(3, 2)
    >>> _ = weft.parametrize_(layer, WeightStandardization())
    >>> before = layer.weight.detach().clone()
    >>> weft.bake_(layer), bool(torch.equal(layer.weight, before)), type(layer).__name__
    (['weight'], True, 'Linear')
    """
    heads = output_heads(model)
    groups: dict[int, list[Place]] = {}
    for place in places_of(model):
        if isinstance(place.held, Stack):
            groups.setdefault(id(place.held), []).append(place)
    names = []
    for key in list(groups):
        tied = groups.pop(key)  # so that each stored tensor is freed as soon as it is baked
        paths = [(p.path, p.module) for p in tied]
        wanted = any(matches(where, path, m, heads) and not matches(ignore, path, m, heads) for path, m in paths)
        if not wanted:
            continue
        if isinstance(tied[0].held, PackedStack):
            raise RecipeError(
                f"{tied[0].full} is packed, and its functions cannot be baked into few bits; bake them into the dense "
                "weight and quantise that, or merge them for evaluation with weft.adapt.merge_."
            )
        if any(map(is_sharded, tied[0].held.parameters())):
            raise RecipeError(
                f"{tied[0].full} is sharded and cannot be baked in place. Write weft.plain_state_dict(model), which "
                "gathers it, or load the gathered state into an unsharded model and bake that."
            )
        weight = _baked(tied[0].held)
        for place in tied:
            if isinstance(place.module, Carrier) and place.name in place.module.weft_names:
                take_off(place.module, place.name, weight)
            names.append(place.full)
    stop_updating(model)
    order = {p.full: i for i, p in enumerate(places_of(model))}
    return sorted(names, key=order.__getitem__)


def _attach(
    model: nn.Module, places: list[Place], chosen: dict[str, Any], report: Attached, data: Iterable[Any] | None
) -> None:
    groups: dict[int, list[Place]] = {}
    for place in places:
        groups.setdefault(id(place.held), []).append(place)
    wanted: list[tuple[list[Place], Place, Layout]] = []
    dense = [p for p in places if isinstance(p.held, Stack) and not isinstance(p.held, PackedStack)]
    sources = {id(p.held.original): p.full for p in dense}
    for tied in groups.values():
        first = next((p for p in tied if p.full in chosen), None)
        if first is None:
            continue
        config = chosen[first.full]
        for other in tied:
            if other.full in report.ignored or chosen.get(other.full, config) != config:
                raise RecipeError(
                    f"{first.full} and {other.full} share one tensor, so they share one function: choose both with one "
                    "configuration, or ignore both, or untie them."
                )
        if isinstance(first.held, nn.parameter.UninitializedTensorMixin):
            raise RecipeError(f"{first.full} has no shape yet; run the model once before attaching functions.")
        if isinstance(first.held, Stack) and first.held.merged is not None:
            raise RecipeError(f"{first.full} has merged adapters; call weft.adapt.unmerge_(model) first.")
        if id(first.held) in sources:
            raise RecipeError(
                f"{first.full} is what {sources[id(first.held)]} is computed from: the two were tied when a function was "
                "attached to a part of the model that holds one of them. Attach to the whole model, or untie them first."
            )
        if any(isinstance(p.module, nn.Embedding | nn.EmbeddingBag) and p.module.sparse for p in tied):
            raise RecipeError(
                f"{first.full} has sparse gradients, which do not pass through functions; set `sparse = False`."
            )
        wanted.append((tied, first, first.layout))
    builders = _planned(model, [(f, layout, chosen[f.full]) for _, f, layout in wanted], data)
    built: list[tuple[list[Place], Any, WeightFunction, Layout]] = []
    tried: set[Any] = set()
    for tied, first, layout in wanted:  # build everything before anything is changed
        builder = builders.get(first.full)
        if builder is None:
            report.untouched += [p.full for p in tied]
            continue
        function = _built(first, builder, layout, tried)
        if _stores_otherwise(function):
            _refuse_shared_memory(first, places)
        built.append((tied, chosen[first.full], function, layout))
    if not built:
        raise RecipeError("No chosen weight gets a function: the configuration's plan left all of them out.")
    for tied, config, function, layout in built:
        stack = _put(tied[0].held, function, layout)
        stack.training = function.training
        for place in tied:
            fresh = isinstance(place.held, PackedStack) and not isinstance(place.module, Carrier)
            if fresh or (
                not isinstance(place.held, Stack) and place.name in (*place.module._parameters, *place.module._buffers)
            ):
                put_on(place.module, place.name, stack)
            report.touched[place.full] = config
        first = next(p for p in tied if p.full in chosen)
        report.tied.update({p.full: first.full for p in tied if p is not first})
    report.untouched = [n for n in report.untouched if n not in report.touched]
    if any(function.has_update for _, _, function, _ in built):
        update_before_forward(model)
    bake_on_save()


def _planned(
    model: nn.Module, wanted: list[tuple[Place, Layout, Any]], data: Iterable[Any] | None
) -> dict[str, FunctionConfig]:
    """What builds the function of each weight, by full name."""
    builders: dict[str, FunctionConfig] = {}
    together: dict[Any, dict[str, Tensor]] = {}
    for place, layout, config in wanted:
        if hasattr(config, "plan"):
            with torch.no_grad():
                weight = place.held.weight() if isinstance(place.held, Stack) else layout.seen(place.held.detach())
            together.setdefault(config, {})[place.full] = weight
        else:
            builders[place.full] = config
    for config, weights in together.items():
        builders.update(config.plan(model, weights, data))
    return builders


def _built(place: Place, config: Any, layout: Layout, tried: set[Any]) -> WeightFunction:
    """The function for a weight, tried on one weight of each kind: on a large model, on all would take seconds."""
    with torch.no_grad():
        weight = place.held.weight() if isinstance(place.held, Stack) else layout.seen(place.held.detach())
        if weight.numel() == 0:
            raise RecipeError(f"{place.full}: a weight of shape {list(weight.shape)} has no elements; leave it out.")
        try:
            with torch.device(weight.device):  # the default device may be another, or none
                function: WeightFunction = config.build(weight, batched=layout.batched)
        except RecipeError as error:
            raise RecipeError(f"{place.full}: {error}") from None
        function = function.to(weight.device).train(place.module.training)
        if isinstance(place.held, PackedStack) and _stores_otherwise(function):
            raise RecipeError(
                f"{place.full} is packed, and {type(function).__name__} changes what is stored; unpack the layer first."
            )
        if isinstance(place.held, Stack) and _stores_otherwise(function):
            fixed = next((type(f).__name__ for f in place.held if not _stores_otherwise(f)), "")
            if fixed:
                raise RecipeError(
                    f"{place.full}: {type(function).__name__} changes what is stored, and {fixed} beneath it cannot be "
                    "inverted; attach them in the other order."
                )
        kind = (id(config), type(function), weight.shape, weight.dtype, layout)
        made = weight if kind in tried else function(function.right_inverse(weight))
        tried.add(kind)
    if made.shape != weight.shape or made.dtype != weight.dtype:
        raise RecipeError(
            f"{place.full}: {type(function).__name__} turned a weight of shape {list(weight.shape)}, {weight.dtype} "
            f"into {list(made.shape)}, {made.dtype}; a weight function keeps both."
        )
    return function


@torch.no_grad()
def _put(held: Tensor | Stack, function: WeightFunction, layout: Layout) -> Stack:
    """The stack that computes a weight from now on."""
    stack = held if isinstance(held, Stack) else Stack(held, layout)
    if _stores_otherwise(function):
        value = function.right_inverse(stack.weight())
        for beneath in reversed(list(stack)):
            value = beneath.right_inverse(value)
        stack.original.copy_(layout.stored(value))
    stack.append(function)
    if function.freezes and not isinstance(stack, PackedStack):
        stack.original.requires_grad_(False)
        stack.original.grad = None  # an optimizer made before would still take a step with it
    return stack


def _refuse_shared_memory(place: Place, places: list[Place]) -> None:
    """A tensor that gets other values may not lie in the memory of one that is not tied to it."""
    here = place.memory()
    for other in places:
        if other.held is not place.held and other.is_weight() and other.memory() == here:
            raise RecipeError(
                f"{place.full} and {other.full} are two parameters in one memory, as `nn.Parameter(other)` makes, and "
                "what is stored would be changed twice. Assign one of them to the other, or copy it."
            )


def _stores_otherwise(function: WeightFunction) -> bool:
    return type(function).right_inverse is not WeightFunction.right_inverse


def _baked(stack: Stack) -> Tensor:
    # room for the result first: after the scratch of one layer it would keep the allocator from giving that back
    value = torch.empty_like(stack.original, memory_format=torch.contiguous_format, requires_grad=False)
    value.copy_(stack.value())
    return nn.Parameter(value, requires_grad=stack.trained) if isinstance(stack.original, nn.Parameter) else value


def _checked(config: Any) -> Any:
    """A configuration with its values checked; None stays."""
    if config is None:
        return None
    if isinstance(config, type) or not (hasattr(config, "build") or hasattr(config, "plan")):
        raise RecipeError(
            f"A function's configuration is needed, such as weft.adapt.LoRA(rank=8), got {config!r}; "
            "`weft methods` lists them."
        )
    if not dataclasses.is_dataclass(config) or not all("minimum" in f.metadata for f in dataclasses.fields(config)):
        return config
    return configure(type(config), {f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def _refuse_wrapped(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel) or any(map(is_sharded, module._parameters.values())):
            raise RecipeError(
                f"{path or 'The model'} is wrapped for distributed training already, which would not see new "
                "parameters; attach functions first, then wrap."
            )
        if is_parametrized(module) and not isinstance(module, Carrier):
            raise RecipeError(
                f"{path or 'The model'} has parametrizations of torch; bake them with "
                "torch.nn.utils.parametrize.remove_parametrizations first."
            )
