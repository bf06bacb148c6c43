"""What every adapter promises beside what every function does: it can be switched, scaled, merged, saved, taken away."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapt.attach import adapt_
from weft.adapt.folder import load_adapter_, save_adapter
from weft.adapt.switch import adapters, merge_, remove_, switch_, switched, train_only_, unmerge_
from weft.contract.comparing import EXACT, near, trial_input
from weft.contract.models import Net, batches, configuration, fill, shake, stack_of
from weft.contract.outcome import adder
from weft.errors import CheckpointError, OutputError, RecipeError
from weft.function.adapter import Adapter
from weft.function.attach import functions
from weft.function.export import plain_state_dict
from weft.function.protocol import FunctionMethod

CHECKS: dict[str, Callable[[FunctionMethod], None]] = {}


_check = adder(CHECKS)


def _adapted(method: FunctionMethod, *names: str, dtype: torch.dtype = torch.float64) -> Net:
    """A model with an adapter under each name, some steps on, in evaluation."""
    net = Net(dtype).eval()
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        adapt_(net, configuration(method, net), where="*", name=name, data=batches(net))
        moved = nn.ModuleList([f for f in _functions(net) if f.adapter == name])
        shake(moved, seed=seed)
    return net


def _functions(model: nn.Module) -> list[Adapter]:
    return list({id(f): f for fs in functions(model).values() for f in fs if isinstance(f, Adapter)}.values())


def _differ(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-6)


def _refused(work: Callable[[], Any], needed: str, what: str, kind: type[Exception] = RecipeError) -> None:
    try:
        work()
    except kind as error:
        assert needed in str(error), f"{what}: the message does not mention {needed}: {error}"
    else:
        raise AssertionError(f"{what} was let through")


@_check("switched off, the model is as before")
def _off(method: FunctionMethod) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        net, plain = _adapted(method, "a", dtype=dtype), Net(dtype).eval()
        on = net(trial_input(dtype))
        assert _differ(on.double(), plain(trial_input(dtype)).double()), "the adapter changes nothing"
        with switched(net):
            assert torch.equal(net(trial_input(dtype)), plain(trial_input(dtype))), "switched off, outputs are others"
            assert torch.equal(net.blocks[0].up.weight, plain.blocks[0].up.weight), "switched off, weights are others"
        assert torch.equal(net(trial_input(dtype)), on), "switched on again, outputs are others"


@_check("strength goes straight from the old weight to the new")
def _strength(method: FunctionMethod) -> None:
    net, plain = _adapted(method, "a"), Net(torch.float64).eval()
    layer, old = net.blocks[0].up, plain.blocks[0].up.weight
    new = layer.weight
    for strength in (0.0, 0.25, 2.0, -1.0):
        switch_(net, {"a": strength})
        near(layer.weight, old + strength * (new - old), f"the weight at {strength}")
        near(
            layer(trial_input()),
            nn.functional.linear(trial_input(), layer.weight, layer.bias),
            f"the product at {strength}",
        )
    switch_(net, {"a": 1.0})
    assert torch.equal(layer.weight, new)


@_check("two on one weight")
def _two(method: FunctionMethod) -> None:
    first = _adapted(method, "a")(trial_input())
    net = _adapted(method, "a", "b")
    both = net(trial_input())
    switch_(net, "a")
    assert torch.equal(net(trial_input()), first), "the first alone is not what it was without the second"
    switch_(net, ["b"])
    assert _differ(net(trial_input()), first), "the second does nothing"
    switch_(net, ("a", "b"))
    assert torch.equal(net(trial_input()), both), "both together are not what they were"
    assert list(adapters(net)) == ["a", "b"]
    _refused(lambda: switch_(net, "c"), "a, b", "an unknown name")
    _refused(
        lambda: adapt_(net, configuration(method, net), where="*", name="a", data=batches(net)), "'a'", "a taken name"
    )


@_check("merged and unmerged")
def _merged(method: FunctionMethod) -> None:
    for dtype, tolerance in ((torch.float64, EXACT), (torch.bfloat16, 2**-4)):
        net = _adapted(method, "a", "b", dtype=dtype)
        y, state = net(trial_input(dtype)), {n: t.clone() for n, t in net.state_dict().items()}
        exported = plain_state_dict(net)
        merged = merge_(net)
        assert merged == [n for n in exported if n.endswith("weight")], f"merged are {merged}"
        near(net(trial_input(dtype)).double(), y.double(), "merged", tolerance)
        assert torch.equal(net.blocks[0].up.weight, exported["blocks.0.up.weight"]), "it is not what an export holds"
        assert net.state_dict().keys() == state.keys(), "merging adds to the state dict"
        twin = copy.deepcopy(net)
        assert torch.equal(twin(trial_input(dtype)), net(trial_input(dtype))), "a copy computes something else"
        _refused(partial(switch_, net, "a"), "unmerge_", "switching merged adapters")
        _refused(partial(remove_, net, "a"), "unmerge_", "removing merged adapters")
        _refused(partial(net.train(), trial_input(dtype)), "unmerge_", "training merged adapters")
        net.eval()
        unmerge_(net)
        assert torch.equal(net(trial_input(dtype)), y), "unmerging is not exact"
        assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items()), "merging changed the state"
        assert twin.blocks[0].up.parametrizations.weight.merged is not None, "unmerging reaches a copy"


@_check("taken away without a trace")
def _removed(method: FunctionMethod) -> None:
    net, plain = _adapted(method, "a", "b"), Net(torch.float64).eval()
    originals = [s.original for s in map(stack_of, (net.blocks[0].up, net.head))]
    second = _adapted(method, "a", "b")
    switch_(second, "a")
    remove_(net, "b")
    assert torch.equal(net(trial_input()), second(trial_input())), "what is left is not the first adapter"
    assert remove_(net, "a") == ["blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.up.weight",
                                 "blocks.1.down.weight", "head.weight"]  # fmt: skip
    assert torch.equal(net(trial_input()), plain(trial_input())), "the model is not as before"
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()], "classes stay changed"
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()], "names or their order"
    ours = (net.blocks[0].up.weight, net.head.weight)
    assert all(a is b for a, b in zip(ours, originals)), "the parameters are others"


@_check("training, acting and merging are independent")
def _independent(method: FunctionMethod) -> None:
    net = _adapted(method, "a", "b").train()
    by_name = {name: [f for f in _functions(net) if f.adapter == name] for name in "ab"}
    count = train_only_(net, "a")
    trained = {id(p) for f in by_name["a"] for p in f.parameters()}
    assert count == sum(p.numel() for p in net.parameters() if p.requires_grad), "the count is wrong"
    for names in (["a"], ["a", "b"], []):
        switch_(net, names)
        assert {id(p) for p in net.parameters() if p.requires_grad} == trained, "switching changes what trains"
    switch_(net, ["a", "b"])
    net(trial_input()).square().sum().backward()
    assert all(p.grad is not None for f in by_name["a"] for p in f.parameters()), "the adapter gets no gradient"
    assert all(p.grad is None for f in by_name["b"] for p in f.parameters()), "a frozen adapter gets a gradient"
    merge_(net.eval())
    assert {id(p) for p in net.parameters() if p.requires_grad} == trained, "merging changes what trains"


@_check("the model is frozen and never written to")
def _frozen(method: FunctionMethod) -> None:
    net, plain = Net(torch.float32), dict(Net(torch.float32).named_parameters())
    torch.manual_seed(0)
    report = adapt_(net, configuration(method, net), where="*.up", data=batches(net))
    ours = {id(p) for f in _functions(net) for p in f.parameters()}
    assert {id(p) for p in net.parameters() if p.requires_grad} == ours, "something else trains"
    assert report.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad), "the report is wrong"
    assert f"{report.trainable:,}" in str(report)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        net(trial_input(torch.float32)).square().sum().backward()
        optimizer.step()
    for name, value in net.named_parameters():
        if id(value) not in ours:
            before = plain[name.replace("parametrizations.weight.original", "weight")]
            assert torch.equal(value, before), f"{name} changed"


@_check("rows looked up equal rows of the table")
def _lookup(method: FunctionMethod) -> None:
    for padding in (None, 3):
        table = nn.Embedding(16, 8, padding_idx=padding).double()
        fill(table, 1)
        try:
            adapt_(table, configuration(method, table), where="*", data=batches(table))
        except RecipeError:
            return  # not for embeddings
        shake(nn.ModuleList(_functions(table)))
        tokens = torch.tensor([[3, 0, 3], [5, 15, 1]])
        parameters = [p for p in table.parameters() if p.requires_grad]
        upstream = torch.randn(2, 3, 8, dtype=torch.float64)
        for strength in (1.0, 0.5):
            switch_(table, {"default": strength})
            y = table(tokens)
            dense = nn.functional.embedding(tokens, table.weight, padding_idx=padding)
            near(y, dense, "values")
            for ours, theirs in zip(
                torch.autograd.grad(y, parameters, upstream), torch.autograd.grad(dense, parameters, upstream)
            ):
                near(ours, theirs, f"gradients with padding {padding}")


@_check("two thin matrices make the same change")
def _thin(method: FunctionMethod) -> None:
    net, plain = _adapted(method, "a"), Net(torch.float64)
    for layer, before in ((net.blocks[0].up, plain.blocks[0].up), (net.head, plain.head)):
        factors = next(iter(stack_of(layer))).to_lora()
        if factors is not None:
            A, B = factors
            assert A.shape[0] == B.shape[1], f"A {list(A.shape)} and B {list(B.shape)}"
            near(B @ A, layer.weight - before.weight, "B A", 1e-9)


@_check("saved and loaded")
def _saved(method: FunctionMethod) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        net = _adapted(method, "a", "b", dtype=dtype)
        both = net(trial_input(dtype))
        switch_(net, "b")
        second, state = net(trial_input(dtype)), {n: t.clone() for n, t in net.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            for name in "ab":
                save_adapter(net, f"{folder}/{name}", name)
                _refused(
                    partial(save_adapter, net, f"{folder}/{name}", name), "exists", "an existing folder", OutputError
                )
            fresh = Net(dtype).eval()
            assert load_adapter_(fresh, f"{folder}/b").base == "the same", "the base is not known again"
            assert not any(p.requires_grad for p in fresh.parameters()), "what is loaded trains, unasked"
            assert torch.equal(fresh(trial_input(dtype)), second), "outputs are not bit-equal"
            fresh = Net(dtype).eval()
            for name in "ab":
                load_adapter_(fresh, f"{folder}/{name}", name=name, train=True)
            assert torch.equal(fresh(trial_input(dtype)), both), "with two adapters, outputs are not bit-equal"
            again = fresh.state_dict()
            assert again.keys() == state.keys(), "the state dict has other names"
            assert all(torch.equal(t, again[n]) and t.dtype == again[n].dtype for n, t in state.items()), "or values"
            trains = [n for n, p in fresh.named_parameters() if p.requires_grad]
            assert trains == [n for n, p in net.named_parameters() if p.requires_grad], f"others train: {trains}"
            other = Net(dtype)
            fill(other, 5)
            before = other(trial_input(dtype))
            _refused(partial(load_adapter_, other, f"{folder}/a"), "another base", "another base", CheckpointError)
            assert torch.equal(other(trial_input(dtype)), before), "a refusal changes the model"
            load_adapter_(other, f"{folder}/a", check_base=False)
