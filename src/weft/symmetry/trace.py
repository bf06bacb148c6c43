"""Trace a model by ``torch.export`` and let every operation's rule say what it does to axes; nothing is computed."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.symmetry import rules_index, rules_layers, rules_shape  # noqa: F401 (enter their rules)
from weft.symmetry.axes import Axes
from weft.symmetry.export import export, tensor_names
from weft.symmetry.factors import Axis, Misaligned
from weft.symmetry.roles import Doubles, Roles
from weft.symmetry.rules import KEEPS_INDEXES, RULES, Call, Value, is_pointwise, is_value, pointwise
from weft.symmetry.rules_index import POINTING

# arguments that a norm keeps its running statistics in, and buffers that routers of experts keep theirs in
STATISTICS = {"running_mean", "running_var"}
LEARNED_BUFFERS = {"e_score_correction_bias", "expert_bias"}
# what a rule raises where it meets arguments that it was not made for; all axes are frozen then
NO_RULE = (Misaligned, IndexError, KeyError, TypeError, ValueError, AttributeError, StopIteration)


@dataclass
class Traced:
    """Axes of a model's tensors after all operations have had their say."""

    space: Axes
    tensors: dict[str, list[Axis]]  # first name of each tensor
    aliases: dict[str, str]  # further name -> first name
    records: list[tuple[list[list[Axis]], list[list[Axis]]]] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    doubles: Doubles = field(default_factory=dict)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Traced:
    """Export a model in evaluation and interpret the graph.

    Raises:
        RecipeError: the model cannot be exported, with torch's reason, or has no parameters.
    """
    names, aliases = tensor_names(model)
    if not names:
        raise RecipeError(
            "The model has no parameters, so there is nothing to permute. Give the model that holds them."
        )
    return _Interpreter(export(model, args, kwargs), names, aliases).run()


class _Interpreter:
    def __init__(self, program: Any, names: dict[str, tuple[int, ...]], aliases: dict[str, str]):
        self.program = program
        space = Axes()
        tensors = {name: [space.axis(n) for n in shape] for name, shape in names.items()}
        self.done = Traced(space, tensors, aliases)
        self.roles = Roles(space)

    def run(self) -> Traced:
        signature = self.program.graph_signature
        owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        values = []
        used = set()
        live = _live(self.program.graph)
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            name = owners.get(node.name)
            if name is None:
                constant = signature.inputs_to_lifted_tensor_constants.get(node.name)
                values.append(self._input(node, f"constant {constant}" if constant else "an input of the model"))
                continue
            first = self.done.aliases.get(name, name)
            if first not in self.done.tensors:  # not in a state dict
                values.append(self._input(node, f"constant {name}"))
                continue
            users = [u for u in node.users if u in live]
            if users:
                used.add(first)
            axes = self.done.tensors[first]
            learned = first.rpartition(".")[2] in LEARNED_BUFFERS or all(_is_statistic(node, u) for u in users)
            if node.name in signature.inputs_to_buffers and not learned:
                for axis in axes:
                    self.done.space.freeze(axis, f"constant {first}")
            values.append(Value(axes, constant=True))
        for name, axes in self.done.tensors.items():
            if name not in used:
                for axis in axes:
                    self.done.space.freeze(axis, "not used in the traced call")
        outputs = list(_flat(self._graph(self.program.graph_module, values)))
        for value in _chosen(self.program, outputs):
            for axis in [*value.axes, value.indexes or []]:
                self.done.space.freeze(axis, "an output of the model")
        self.done.doubles = self.roles.settle(self.done.tensors.values(), self.done.records)
        return self.done

    def _input(self, node: Any, reason: str) -> Any:
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor):
            return tensor
        return Value([self.done.space.axis(n, reason) for n in tensor.shape], constant="constant" in reason)

    def _graph(self, module: Any, inputs: list[Any]) -> Any:
        """Interpret one graph: what its output node holds."""
        known: dict[Any, Any] = {}
        rest = iter(inputs)
        live = _live(module.graph)
        for node in module.graph.nodes:
            if node not in live and node.op != "placeholder":
                continue
            if node.op == "placeholder":
                known[node] = next(rest)
            elif node.op == "get_attr":
                known[node] = self._attribute(operator.attrgetter(node.target)(module), node.target)
            elif node.op == "output":
                return _look(node.args[0], known)
            else:
                known[node] = self._call(node, _look(node.args, known), _look(node.kwargs, known))
        return None

    def _attribute(self, item: Any, name: str) -> Any:
        if isinstance(item, Tensor):
            return Value([self.done.space.axis(n, f"constant {name}") for n in item.shape], constant=True)
        return item

    def _call(self, node: Any, args: Any, kwargs: Any) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        graphs = [i for i, a in enumerate(args) if isinstance(a, torch.fx.GraphModule)]
        if len(graphs) == 1 and "wrap" in str(node.target):
            return self._graph(args[graphs[0]], list(args[graphs[0] + 1 :]))
        outputs = node.meta.get("val")
        tensors = [t for t in (outputs if isinstance(outputs, list | tuple) else [outputs]) if isinstance(t, Tensor)]
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            arguments = {str(i): a for i, a in enumerate([*args, *kwargs.values()])}
        else:
            arguments = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
            arguments.update(zip([a.name for a in schema.arguments], args))
            arguments.update(kwargs)
        for tensor in tensors:
            if not all(isinstance(n, int) for n in tensor.shape):
                raise RecipeError(
                    f"The model makes a tensor whose shape depends on values ({node.target}{_where(node)}), so its axes "
                    "cannot be traced. Trace the part of the model without it, or choose an implementation without "
                    "masks of booleans."
                )
        packet = getattr(node.target, "overloadpacket", node.target)
        name = getattr(packet, "__name__", str(packet))
        call = Call(self.done.space, self.roles, name, arguments, [tuple(t.shape) for t in tensors], why=_where(node))
        result = self._apply(call, node.target)
        inputs = [v.axes for v in call.values()]
        self.done.records.append((inputs, [*(v.axes for v in _flat(result)), *call.inner]))
        if not tensors:
            return None
        return result if isinstance(outputs, list | tuple) else next(_flat(result))

    def _apply(self, call: Call, target: Any) -> list[Value]:
        if not call.shapes:
            return []
        for value in call.values():
            if value.indexes is not None and call.name not in KEEPS_INDEXES and call.name not in POINTING:
                call.freeze(value.indexes, f"positions in it are used by {call.name}{call.why}")
        rule = RULES.get(call.name) or (pointwise if is_pointwise(target) else None)
        if call["out"] is not None:  # written over, as in place but under a name that does not say so
            rule = None
        try:
            if rule is None:
                raise Misaligned("no rule")
            found = rule(call)
            result = found if isinstance(found, list) else [found]
            if [v.shape for v in result] != call.shapes:
                raise ValueError("another shape")
            return result
        except NO_RULE as error:
            misfit = rule is not None and isinstance(error, Misaligned)
            return self._freeze(call, target, "factors do not match in" if misfit else "unknown operation")

    def _freeze(self, call: Call, target: Any, what: str) -> list[Value]:
        name = str(target).removesuffix(".default")
        reason = f"{what} {name}{call.why}"
        values = call.values()
        if what.startswith("unknown") and any(call.space.leaves(a) for v in values for a in v.axes):
            self.done.unknown[name] = self.done.unknown.get(name, 0) + 1
        for value in values:
            for axis in [*value.axes, value.indexes or []]:
                call.space.freeze(axis, reason)
        return [Value([call.space.axis(n, reason) for n in shape]) for shape in call.shapes]


def _chosen(program: Any, outputs: list[Value]) -> list[Value]:
    """The outputs that stand for the function: logits, in a transformers model that has them, otherwise all."""
    spec = program.call_spec.out_spec
    keys = spec.context if isinstance(spec.context, list) else []
    if "logits" not in keys or any(child.num_leaves != 1 for child in spec.children()) or len(keys) != len(outputs):
        return outputs
    return [outputs[keys.index("logits")]]


def _live(graph: Any) -> set[Any]:
    """Nodes that outputs depend on, or that write into tensors; the rest is computed for its shape alone."""
    live: set[Any] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        writes = schema is not None and schema.is_mutable
        if node.op == "output" or writes or any(user in live for user in node.users):
            live.add(node)
    return live


def _is_statistic(node: Any, user: Any) -> bool:
    schema = getattr(user.target, "_schema", None)
    if schema is None:
        return False
    given = dict(zip([a.name for a in schema.arguments], user.args)) | user.kwargs
    return all(name in STATISTICS for name, value in given.items() if value is node)


def _where(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f" ({path})" if path else ""


def _look(item: Any, known: dict[Any, Any]) -> Any:
    return torch.fx.map_arg(item, lambda node: known[node])


def _flat(item: Any) -> Iterator[Value]:
    if is_value(item):
        yield item
    elif isinstance(item, list | tuple):
        for part in item:
            yield from _flat(part)
