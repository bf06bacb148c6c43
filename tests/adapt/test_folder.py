"""Folders of adapters: what is in them, what is refused, and that sharing survives; PEFT's side is in tests/interop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft import registry
from weft.adapt import (
    Bone,
    LoRA,
    SVFit,
    TokenRows,
    Whole,
    adapters,
    load_adapter_,
    restore_adapter_,
    save_adapter,
    switch_,
)
from weft.checkpoint.adapter import with_adapter
from weft.contract.models import Net, Tied, fill, shake
from weft.errors import CheckpointError, OutputError, RecipeError
from weft.function.adapter import Adapter
from weft.function.protocol import FunctionMethod, WeightFunction
from weft.method import parameter


@dataclasses.dataclass(frozen=True)
class Pooled:
    """Factors out of one pool for all weights, each with an order of its own; what the folder must keep together."""

    rank: int = parameter(2, "of each change", minimum=1)

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        raise RecipeError("planned together")

    def plan(self, model: nn.Module, weights: Mapping[str, Tensor], data: Iterable[Any] | None) -> Mapping[str, Any]:
        group = _Group(self)
        return dict.fromkeys(weights, group)


class _Group:
    def __init__(self, config: Pooled):
        self.config, self.pool = config, None

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        if self.pool is None:
            self.pool = nn.ParameterDict({"numbers": torch.randn(64, dtype=weight.dtype, device=weight.device)})
        return _Pooled(self.config, self.pool, weight)


class _Pooled(Adapter):
    def __init__(self, config: Pooled, pool: nn.ParameterDict, weight: Tensor):
        super().__init__(0.1)
        self.pool = pool
        self.register_buffer("A", torch.randint(64, (config.rank, weight.shape[1]), device=weight.device))
        self.register_buffer("B", torch.randint(64, (weight.shape[0], config.rank), device=weight.device))

    def change(self, stored: Tensor) -> Tensor:
        numbers = self.pool["numbers"]
        return (numbers[self.B] - 1) @ numbers[self.A]

    def to_lora(self) -> tuple[Tensor, Tensor]:
        numbers = self.pool["numbers"]
        return numbers[self.A], self.scale * (numbers[self.B] - 1)


@pytest.fixture
def pooled() -> Iterator[None]:
    registry.add(FunctionMethod("pooled", "adapt", Pooled, "A pool.", "adapt", origin="here", adapter=True))
    yield
    del registry._plugins["pooled"]


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def adapted(config: Any, **options: Any) -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    weft.adapt_(net, config, **{"where": "*", **options})
    shake(nn.ModuleList([f for fs in weft.functions(net).values() for f in fs]))
    return net


@pytest.mark.usefixtures("pooled")
def test_pools_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    net = adapted({"*.up": Pooled(rank=3), "*.down": Pooled(rank=2), "head": LoRA(rank=2)})
    report = save_adapter(net, tmp_path / "a")
    assert report.form == "weft"
    assert "PEFT has no Pooled" in report.why
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert sum(t.shape == (64,) for t in stored.values()) == 2  # one for each configuration
    again = Net().eval()
    load_adapter_(again, tmp_path / "a", train=True)
    assert torch.equal(again(X), net(X))
    ups = [block.up.parametrizations.weight[0].pool["numbers"] for block in again.blocks]
    assert ups[0] is ups[1]
    assert ups[0] is not again.blocks[0].down.parametrizations.weight[0].pool["numbers"]
    assert adapters(again)["default"].parameters == adapters(net)["default"].parameters
    again(X).sum().backward()
    assert ups[0].grad is not None


@pytest.mark.usefixtures("pooled")
@pytest.mark.parametrize(
    "config", [Pooled(), LoRA(rank=2, start="pissa"), {"*.up": Pooled(), "head": LoRA(start="pissa")}]
)
def test_files_readers_see_what_the_live_model_computes(config: Any, tmp_path: Path) -> None:
    net = adapted(config)
    assert save_adapter(net, tmp_path / "a").form == "weft"
    weft.save(Net(), tmp_path / "base")
    expected = weft.plain_state_dict(net)
    with weft.open(f"{tmp_path / 'base'}+{tmp_path / 'a'}") as ours:
        assert set(ours) == set(expected)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor.torch(), expected[name])
    before = Net().state_dict()
    with weft.open(tmp_path / "base") as base, weft.open(tmp_path / "a") as adapter:
        half = with_adapter(base, adapter, 0.5)
        name = "blocks.0.up.weight"
        torch.testing.assert_close(half[name].torch(), (before[name] + expected[name]) / 2)


def test_rows_copies_and_tied_tables_by_their_files(tmp_path: Path) -> None:
    for number, config in enumerate((LoRA(rank=2), TokenRows(rows=(3, 5)), Whole())):
        model = Tied().eval()
        weft.adapt_(model, config, where="embedding")
        shake(nn.ModuleList(weft.functions(model)["embedding.weight"]))
        # PEFT says rows of tied tables, and would take the others apart
        assert save_adapter(model, tmp_path / str(number)).form == ("peft" if number == 1 else "weft")
        base = weft.open(Tied().state_dict())
        assert base.aliases
        ours = with_adapter(base, weft.open(tmp_path / str(number)))
        for name, expected in weft.plain_state_dict(model).items():
            torch.testing.assert_close(ours[name].torch(), expected)
        assert ours.aliases == base.aliases
        again = Tied().eval()
        load_adapter_(again, tmp_path / str(number))
        tokens = torch.tensor([3, 1, 5])
        assert torch.equal(again(tokens), model(tokens))


class Standalone(Adapter):
    """Of no method."""

    def change(self, stored: Tensor) -> Tensor:
        return torch.ones_like(stored)


class NoRow:
    """A configuration without a row."""

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        return Standalone()


def test_what_nobody_could_read_back_is_not_written(tmp_path: Path) -> None:
    net = Net()
    weft.adapt_(net, NoRow(), where="head")
    with pytest.raises(RecipeError, match="NoRow belongs to no method"):
        save_adapter(net, tmp_path / "a")
    with pytest.raises(RecipeError, match="depends on the weight"):
        save_adapter(net, tmp_path / "a", form="lora")
    with pytest.raises(RecipeError, match=r"no form 'loar'\. Did you mean lora"):
        save_adapter(net, tmp_path / "a", form="loar")
    with pytest.raises(RecipeError, match="no adapter 'x'"):
        save_adapter(net, tmp_path / "a", "x")
    assert not list(tmp_path.iterdir())


def test_folders_hold_no_time_and_no_path_and_are_replaced_on_demand_only(tmp_path: Path) -> None:
    net = adapted(LoRA(rank=2))
    net.config = type("Config", (), {"_name_or_path": str(tmp_path / "some" / "base")})()
    for form in ("peft", "weft"):
        save_adapter(net, tmp_path / "a", form=form)
        first = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
        assert str(tmp_path) not in str(first)
        assert json.loads(first["weft.json"])["base"]["name"] == "base"
        with pytest.raises(OutputError, match="exists already"):
            save_adapter(net, tmp_path / "a")
        save_adapter(net, tmp_path / "a", form=form, force=True)
        assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == first
        for path in (tmp_path / "a").iterdir():
            path.unlink()
        (tmp_path / "a" / "mine.txt").write_text("")
        with pytest.raises(OutputError, match="not made by weft"):
            save_adapter(net, tmp_path / "a", force=True)
        (tmp_path / "a" / "mine.txt").unlink()
        (tmp_path / "a").rmdir()
    assert not list(tmp_path.iterdir())


def test_changes_that_need_the_base_are_refused_as_files(tmp_path: Path) -> None:
    net = adapted({"*.up": Bone(rank=4, form="block_affine"), "head": LoRA(rank=2)})
    assert save_adapter(net, tmp_path / "a").form == "weft"
    with pytest.raises(CheckpointError, match=r"what Bone makes of blocks\.0\.up\.weight depends on"):
        with_adapter(weft.open(Net().state_dict()), weft.open(tmp_path / "a"))


def test_a_rank_that_data_decides_is_saved_as_a_number(tmp_path: Path) -> None:
    net = adapted(SVFit(energy=0.5))
    save_adapter(net, tmp_path / "a")
    said = json.loads((tmp_path / "a" / "weft_adapter.json").read_text())["weights"]
    ranks = {n: w["functions"][0]["parameters"]["rank"] for n, w in said.items()}
    assert ranks == {n: f[0].delta.numel() for n, f in weft.functions(net).items()}
    other = Net()
    fill(other, 9)
    load_adapter_(other, tmp_path / "a", check_base=False)


def test_a_strength_is_not_part_of_a_folder(tmp_path: Path) -> None:
    net = adapted(LoRA(rank=2))
    y = net(X)
    switch_(net, {"default": 0.25})
    assert "strength of 0.25 is not saved" in str(save_adapter(net, tmp_path / "a"))
    again = Net().eval()
    load_adapter_(again, tmp_path / "a")
    assert torch.equal(again(X), y)


def test_sharded_or_unloaded_values_are_not_written(tmp_path: Path) -> None:
    net = Net().to("meta")
    weft.adapt_(net, LoRA(rank=2), where="*")
    with pytest.raises(OutputError, match="no values yet"):
        save_adapter(net, tmp_path / "a")
    assert not list(tmp_path.iterdir())


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]
DAMAGE: dict[str, tuple[Change, str]] = {
    "format": (lambda c, t: c.update(format=2), "of format 2, and this weft reads 1"),
    "no weights": (lambda c, t: c.update(weights={}), "names no weights"),
    "list": (lambda c, t: c.update(weights=[1]), "names no weights"),
    "shape": (lambda c, t: c["weights"]["head.weight"].update(shape="8"), "no functions or no shape"),
    "method": (lambda c, t: c["weights"]["head.weight"]["functions"][0].update(method="lroa"), "Did you mean lora"),
    "merge": (lambda c, t: c["weights"]["head.weight"]["functions"][0].update(method="ties"), "ties is no adapter"),
    "parameter": (lambda c, t: c["weights"]["head.weight"]["functions"][0]["parameters"].update(rnak=2), "Did you mean rank"),
    "rank": (lambda c, t: c["weights"]["head.weight"]["functions"][0]["parameters"].update(rank=3), r"A.* is \[2, 16\]"),
    "huge rank": (lambda c, t: c["weights"]["head.weight"]["functions"][0]["parameters"].update(rank=10**8), "rank 1"),
    "shared": (lambda c, t: c["weights"]["head.weight"]["functions"][0].update(shared={"A": 1}), "not said as weft"),
    "shared place": (
        lambda c, t: (c["weights"]["head.weight"]["functions"][0].update(shared={"A": ["x.weight", 0, "A"]}), t.pop("head.weight:0:A")),
        "shares A with x.weight",
    ),
    "lacks": (lambda c, t: t.pop("head.weight:0:B"), "lacks B"),
    "named wrongly": (lambda c, t: t.update({"head.weight:0:C": t.pop("head.weight:0:B")}), "lacks B .* holds C"),
    "too many": (lambda c, t: t.update({"head.wieght:0:A": torch.ones(1)}), "Did you mean head.weight"),
    "key": (lambda c, t: t.update({"head.weight": torch.ones(1)}), "not one that weft writes"),
    "empty": (lambda c, t: t.update({"head.weight:0:A": torch.ones(0, 16)}), "empty"),
    "place": (
        lambda c, t: (
            c["weights"].update({"haed.weight": c["weights"].pop("head.weight")}),
            [t.update({f"haed.weight:0:{n}": t.pop(f"head.weight:0:{n}")}) for n in ("A", "B", "A_start", "B_start")],
        ),
        "Did you mean head.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused_and_the_model_is_as_before(case: str, tmp_path: Path) -> None:
    change, reason = DAMAGE[case]
    save_adapter(adapted(LoRA(rank=2, start="pissa"), where=["head", "*.up"]), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "weft_adapter.json").read_text())
    tensors = load_file(tmp_path / "a" / "adapter.safetensors")
    change(config, tensors)
    (tmp_path / "a" / "weft_adapter.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "a" / "adapter.safetensors")
    net = Net().eval()
    before = net(X)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_adapter_(net, tmp_path / "a")
    assert "Traceback" not in str(caught.value)
    assert torch.equal(net(X), before)
    assert not adapters(net)
    if case not in ("place",):  # read as a file, the same folder is refused as well
        with weft.open(tmp_path / "a") as adapter, pytest.raises(CheckpointError):
            with_adapter(weft.open(Net().state_dict()), adapter)


def test_a_sharded_model_is_saved_whole(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed import fsdp

    net = adapted(LoRA(rank=2))
    y = net(X)
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fsdp.fully_shard(net, mesh=distributed.init_device_mesh("cpu", (1,)))
        for form in ("peft", "weft", "lora"):
            save_adapter(net, tmp_path / form, form=form)
    finally:
        distributed.destroy_process_group()
    for form in ("peft", "weft"):
        again = Net().eval()
        assert load_adapter_(again, tmp_path / form).base == "the same"
        assert torch.equal(again(X), y)


@pytest.mark.usefixtures("pooled")
def test_weft_folders_merge_into_one_adapter(tmp_path: Path) -> None:
    from weft.edit.merge_adapters import merge_adapters

    nets = [adapted(Pooled()), adapted(LoRA(rank=2))]
    for number, net in enumerate(nets):
        save_adapter(net, tmp_path / str(number))
    report = merge_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "sum", weights=[0.5, 2.0])
    merged, before = Net().eval(), Net().state_dict()
    load_adapter_(merged, tmp_path / "sum")
    assert set(report.ranks) == {n.removesuffix(".weight") for n in weft.functions(merged)}
    first, second, third = (weft.plain_state_dict(m) for m in (*nets, merged))
    for name, old in before.items():
        torch.testing.assert_close(third[name], old + 0.5 * (first[name] - old) + 2 * (second[name] - old))
    tied = Tied()
    weft.adapt_(tied, LoRA(rank=2), where="embedding")
    save_adapter(tied, tmp_path / "tied")
    with pytest.raises(CheckpointError, match="tied tensors"):
        merge_adapters([tmp_path / "tied"], tmp_path / "no")


def test_folders_that_are_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="no adapter's folder"):
            load_adapter_(Net(), folder)
    save_adapter(adapted(LoRA(rank=2, start="pissa")), tmp_path / "a")
    with pytest.raises(CheckpointError, match="subfolder 'a' is one"):
        load_adapter_(Net(), tmp_path)
    (tmp_path / "a" / "adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="save is incomplete"):
        load_adapter_(Net(), tmp_path / "a")


def test_the_fingerprint_sees_a_fine_tune_in_any_precision(tmp_path: Path) -> None:
    from weft.checkpoint.fingerprint import fingerprint, fingerprint_of, same

    big = torch.randn(700, 300, generator=torch.Generator().manual_seed(0))
    tuned = big * (1 + 1e-2 * torch.randn(big.shape, generator=torch.Generator().manual_seed(1)))
    for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        live = fingerprint_of(big.to(kind))
        assert live == fingerprint(weft.open({"w": big.to(kind)})["w"])
        assert same(live, fingerprint_of(big))
        assert not same(live, fingerprint_of(tuned.to(kind)))
        assert not same(live, fingerprint_of(big.to(kind).reshape(300, 700)))


def test_an_adapter_on_a_parametrized_weight_is_known_by_what_lies_beneath_it(tmp_path: Path) -> None:
    from weft.normalize import WeightStandardization

    net = Net().eval()
    weft.parametrize_(net, WeightStandardization(), where="head")
    weft.adapt_(net, LoRA(rank=2), where="head")
    save_adapter(net, tmp_path / "a")
    plain = Net().eval()
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter_(plain, tmp_path / "a")
    plain.load_state_dict(weft.plain_state_dict(net))
    assert load_adapter_(plain, tmp_path / "a").base == "the same"
    other = Net()
    fill(other, 3)
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter_(other, tmp_path / "a")


@pytest.mark.parametrize("form", ["peft", "weft"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_told_when_saved_and_refused_when_loaded(value: float, form: str, tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    diverged = model()
    weft.adapt_(diverged, LoRA(rank=1), where="*")
    diverged[1].parametrizations.weight[0].B.data[0] = value
    with pytest.warns(UserWarning, match=r"'default' holds NaN or infinity \(.*1.*B.*\)"):
        report = save_adapter(diverged, tmp_path / "a", form=form)
    assert "NaN or infinity" in str(report)
    fresh = model()
    with pytest.raises(CheckpointError, match=r"a: holds NaN or infinity \(1.weight, B\)"):
        load_adapter_(fresh, tmp_path / "a")
    assert not weft.functions(fresh)
    weft.adapt_(fresh, LoRA(rank=1), where="*")
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match="holds NaN"):
        restore_adapter_(fresh, tmp_path / "a")
    assert all(torch.equal(before[n], t) for n, t in fresh.state_dict().items())


def test_what_stands_in_the_way_is_said_in_python(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    weft.adapt_(model, LoRA(rank=1), where="*")
    save_adapter(model, tmp_path / "a")
    with pytest.raises(OutputError, match="replace it with force=True"):
        save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a", force=True)
