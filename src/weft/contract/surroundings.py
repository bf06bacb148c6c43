"""What every weight function promises to PyTorch around it: casts, compilation, distribution, checkpointing, functional calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.contract.comparing import (
    EXACT,
    gradients_of,
    near,
    same_gradients,
    same_state,
    state_of,
    trial_input,
    trial_net,
)
from weft.contract.models import Block, Net, attach, fill, shake
from weft.contract.outcome import adder
from weft.contract.pair import HOW, train, train_in_pair
from weft.errors import RecipeError
from weft.function.protocol import FunctionMethod

CHECKS: dict[str, Callable[[FunctionMethod], None]] = {}
# Ways of distributed training that a method cannot offer, with the reason; the others are checked.
EXPECTED_WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "mixture_of_shards": (
        ("fsdp2 by block", "fsdp2 by layer"),
        "FSDP2 shards a parameter in one unit, and the pool belongs to layers of several; it raises",
    ),
}


_check = adder(CHECKS)


@_check("bfloat16")
def _bfloat16(method: FunctionMethod) -> None:
    exact = trial_net(method, torch.float32)
    for cast in (False, True):  # attached to a bfloat16 model, and cast after attaching
        net = exact if cast else Net().bfloat16().eval()
        if not cast:
            attach(method, net, seed=5)
            net.load_state_dict(exact.state_dict())
        net = copy.deepcopy(net).bfloat16()
        # 8 bits of mantissa, in weights, inputs and products of three layers
        near(net(trial_input(torch.bfloat16)).float(), exact(trial_input(torch.float32)), "values", 2**-4)
        net.train()
        gradients = gradients_of(net, trial_input(torch.bfloat16))
        assert all(g.isfinite().all() for g in gradients.values()), "gradients with NaN or infinity"


@_check("autocast")
def _autocast(method: FunctionMethod) -> None:
    net, x = trial_net(method, torch.float32), trial_input(torch.float32)
    exact, weight = net(x), net.blocks[0].up.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        assert torch.equal(net.blocks[0].up.weight, weight), "the weight is computed in lower precision"
        net.train()
        net(x).float().square().sum().backward()
    assert y.dtype == torch.bfloat16, f"autocast gave {y.dtype}"
    near(y.float(), exact, "values", 2**-5)


@_check("compiles whole")
def _compile(method: FunctionMethod) -> None:
    net, twin = trial_net(method), trial_net(method)
    for model in (net, twin):
        del model.blocks[1]
    torch._dynamo.reset()
    near(torch.compile(net, backend="eager", fullgraph=True)(trial_input()), twin(trial_input()), "in evaluation")
    torch._dynamo.reset()
    compiled = torch.compile(net.train(), backend="aot_eager", fullgraph=True)
    expected = gradients_of(twin.train(), trial_input())
    compiled(trial_input()).square().sum().backward()
    ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
    same_gradients(ours, expected, "in training")
    same_state(net, twin, "buffers after a step", EXACT)


@_check("equal blocks compile once")
def _regional(method: FunctionMethod) -> None:
    blocks = nn.Sequential(*[Block() for _ in range(12)]).eval()
    fill(blocks, 0)
    attach(method, blocks)
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    expected = x = trial_input(torch.float32)
    for block in blocks:
        x = torch.compile(block, backend=count, fullgraph=True)(x).detach()
        expected = block(expected).detach()
    assert graphs <= 3, f"12 equal blocks made {graphs} graphs"
    near(x, expected, "values", 1e-6)


@_check("functional_call")
def _functional(method: FunctionMethod) -> None:
    net, moved = trial_net(method), trial_net(method)
    shake(moved, seed=7)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in moved.named_parameters()}
    y = functional_call(net, parameters, (trial_input(),))
    near(y, moved(trial_input()), "values")
    y.square().sum().backward()
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert all(parameters[n].grad is not None for n in trained), "a parameter gets no gradient"
    before, y = state_of(net), net(trial_input())
    try:
        functional_call(net, {"blocks.0.up.weight": torch.zeros(32, 16, dtype=torch.float64)}, (trial_input(),))
    except RecipeError as error:
        assert "parametrizations.weight.original" in str(error), f"the message has no remedy: {error}"
    else:
        raise AssertionError("a value for a computed weight was accepted")
    assert all(torch.equal(t, before[n]) for n, t in state_of(net).items()), "the refused call changed the model"
    assert torch.equal(net(trial_input()), y), "the refused call changed the model"


@_check("setting the weight is refused")
def _setting(method: FunctionMethod) -> None:
    net = trial_net(method)
    layer, before = net.blocks[0].up, net(trial_input())
    value = torch.zeros(32, 16, dtype=torch.float64)
    identity = nn.Identity()
    for attempt in (
        lambda: setattr(layer, "weight", value),
        lambda: setattr(layer, "weight", nn.Parameter(value)),
        lambda: nn.utils.parametrize.register_parametrization(layer, "weight", identity),
        lambda: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
        lambda: nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False),
    ):
        try:
            attempt()
        except (RecipeError, AttributeError, RuntimeError):
            assert torch.equal(net(trial_input()), before), "a refused change changed the model"
        else:
            raise AssertionError("a computed weight was set from outside")


@_check("distributed training")
def _distributed(method: FunctionMethod) -> None:
    alone = train(method)
    for how in [h for h in HOW if h not in EXPECTED_WAYS.get(method.name, ((), ""))[0]]:
        for rank, state in enumerate(train_in_pair(method, how)):
            assert state.keys() == alone.keys(), f"{how}: other names"
            for name, value in state.items():
                near(value, alone[name], f"{how}, process {rank}: {name}", 1e-9)


@_check("checkpointing")
def _checkpointing(method: FunctionMethod) -> None:
    plain = trial_net(method).train()
    expected = gradients_of(plain, trial_input())
    for reentrant in (False, True):
        for whole in (False, True):
            net = trial_net(method).train()
            x = trial_input().requires_grad_()
            net.zero_grad()
            if whole:
                y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)
            else:
                net.checkpointing = reentrant
                y = net(x)
            y.square().sum().backward()
            ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
            what = f"reentrant: {reentrant}, the whole model: {whole}"
            same_gradients(ours, expected, what)
            same_state(net, plain, f"buffers, {what}")


@_check("two forward passes before one backward")
def _twice(method: FunctionMethod) -> None:
    net = trial_net(method).train()
    (net(trial_input()).square().sum() + net(-trial_input()).square().sum()).backward()


@_check("meta device")
def _meta(method: FunctionMethod) -> None:
    net = trial_net(method, torch.float32)
    with torch.device("meta"):
        built = Net()
    attach(method, built, moved=False, seed=5)
    assert all(t.is_meta for t in built.state_dict().values()), "something was made elsewhere"
    built.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(built.eval()(trial_input(torch.float32)), net(trial_input(torch.float32))), (
        "it computes something else"
    )


@_check("gradients of single samples")
def _vmap(method: FunctionMethod) -> None:
    net, x = trial_net(method), trial_input(rows=3)
    parameters = {n: p.detach() for n, p in net.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        total: Tensor = functional_call(net, values, (row.unsqueeze(0),)).square().sum()
        return total

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        alone = torch.func.grad(loss)(parameters, row)
        for name, value in alone.items():
            near(together[name][i], value, name)
