"""Mixture of shards: counts, gathering, who gets which gradient, one pool for all layers, LoRA as its simplest case."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.adapt import LoRA, MixtureOfShards, draw_shards, gather_shards, remove_, unused_shards
from weft.errors import RecipeError

LAYERS = 4


class Block(nn.ModuleDict):
    """Two layers beside a shortcut."""

    def __init__(self, dtype: torch.dtype):
        super().__init__({"up": nn.Linear(8, 12, dtype=dtype), "down": nn.Linear(12, 8, dtype=dtype)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self["down"](torch.tanh(self["up"](x)))


class Model(nn.Module):
    """Blocks of two kinds of layers, and a head."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dtype) for _ in range(LAYERS))
        self.head = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def functions_of(model: Model, kind: str = "up") -> list[nn.Module]:
    return [block[kind].parametrizations.weight[0] for block in model.blocks]


def moved(config: MixtureOfShards, where: str = "blocks.*") -> Model:
    model = Model()
    weft.adapt_(model, config, where=where)
    for pool in {id(f.pool): f.pool for kind in ("up", "down") for f in functions_of(model, kind)}.values():
        nn.init.normal_(pool.B)
    return model


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize(("budget", "rank", "private"), [(2, 5, 1), (3, 3, 3), (1, 4, 0), (2, 2, 0)])
def test_as_many_numbers_as_lora(budget: int, rank: int, private: int, shards: int) -> None:
    config = MixtureOfShards(budget_rank=budget, rank=rank, shards=shards, private_rank=private)
    model, other = moved(config), Model()
    lora = weft.adapt_(other, LoRA(rank=budget), where="blocks.*")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora.trainable
    change = functions_of(model)[0].change(model.blocks[0]["up"].weight)
    assert torch.linalg.matrix_rank(change) == rank


def test_the_simplest_case_is_lora() -> None:
    layer, other = nn.Linear(8, 6).double(), nn.Linear(8, 6).double()
    other.load_state_dict(layer.state_dict())
    weft.adapt_(layer, MixtureOfShards(budget_rank=3, rank=3, shards=1, private_rank=3, alpha=5.0), where="*")
    weft.adapt_(other, LoRA(rank=3, alpha=5.0), where="*")
    pool, lora = layer.parametrizations.weight[0].pool, other.parametrizations.weight[0]
    assert (pool.A.shape, pool.B.shape) == (lora.A.shape, lora.B.mT.shape)
    nn.init.normal_(pool.B)
    with torch.no_grad():
        lora.A.copy_(pool.A)
        lora.B.copy_(pool.B.mT)
    x = torch.randn(5, 8, dtype=torch.float64)
    for model in (layer, other):
        model(x).square().sum().backward()
    torch.testing.assert_close(layer(x), other(x))
    torch.testing.assert_close(pool.A.grad, lora.A.grad)
    torch.testing.assert_close(pool.B.grad, lora.B.grad.mT)


def test_the_start_is_loras() -> None:
    layer = nn.Linear(100, 40)
    before = layer.weight.detach().clone()
    weft.adapt_(layer, MixtureOfShards(budget_rank=20, rank=8, shards=4), where="*")
    pool = layer.parametrizations.weight[0].pool
    assert torch.equal(layer.weight, before)
    assert not pool.B.any()
    assert 0.09 < pool.A.abs().max() <= 0.1  # uniform within 1 / sqrt(100), not 1 / sqrt(25)
    assert layer.parametrizations.weight[0].scale == 16 / 8


def test_expanded_to_loras_the_model_is_the_same() -> None:
    model = moved(MixtureOfShards(rank=5, alpha=3.0))
    twin = copy.deepcopy(model)
    remove_(twin, "default")
    weft.adapt_(twin, LoRA(rank=5, alpha=5.0), where="blocks.*")
    for kind in ("up", "down"):
        for ours, theirs in zip(functions_of(model, kind), functions_of(twin, kind)):
            for value, factor in zip((theirs.A, theirs.B), ours.to_lora()):
                value.data = factor.detach()
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(twin(x), model(x))


def test_gathering_is_this_loop() -> None:
    shards, rank, e, p = 3, 5, 2, 1
    index = draw_shards(LAYERS, e, rank, shards, p, torch.Generator().manual_seed(0))
    pool = torch.randn(e * LAYERS * shards, 7)
    gathered = gather_shards(pool, index, rank)
    for i in range(LAYERS):
        for j in range(rank):
            vector = torch.cat([pool[index[i, j * shards + c]] for c in range(shards)])
            assert torch.equal(gathered[i, j], vector)


@pytest.mark.parametrize(("e", "rank", "shards", "p"), [(2, 5, 3, 1), (2, 2, 2, 2), (3, 4, 1, 0), (4, 2, 2, 1)])
def test_who_draws_what(e: int, rank: int, shards: int, p: int) -> None:
    index = draw_shards(LAYERS, e, rank, shards, p, torch.Generator().manual_seed(3))
    assert index.dtype == torch.int64
    assert torch.equal(index, draw_shards(LAYERS, e, rank, shards, p, torch.Generator().manual_seed(3)))
    shared = (e - p) * LAYERS * shards
    for i, own in enumerate(index):
        assert len(own.unique()) == rank * shards
        cut = (rank - p) * shards
        assert (own[:cut] < shared).all()
        assert own[cut:].tolist() == [shared + i * p * shards + c for c in range(p * shards)]
    if p < e and rank > p:
        assert len({tuple(own[: (rank - p) * shards].tolist()) for own in index}) == LAYERS


def test_shared_rows_are_drawn_alike_often() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2 * 8 * 2)
    for _ in range(1000):
        counts += draw_shards(8, 2, 4, 2, 0, generator).flatten().bincount(minlength=32)
    # each of 32 rows is in one of four draws: 8000 draws, deviation sqrt(8000 · 3 / 16) = 39; five of these
    assert (counts - 2000).abs().max() < 195


def test_private_rows_learn_from_one_layer_and_shared_rows_from_several() -> None:
    config = MixtureOfShards(budget_rank=2, rank=4, shards=2, private_rank=1)
    model = moved(config)
    functions = functions_of(model)
    users: dict[int, set[int]] = {}
    for i, function in enumerate(functions):
        pool = function.pool
        pool.zero_grad()
        model.blocks[i]["up"](torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
        for row in pool.A.grad.abs().sum(1).nonzero().flatten().tolist():
            users.setdefault(row, set()).add(i)
    shared = (2 - 1) * LAYERS * 2
    for i in range(LAYERS):
        assert [users[shared + 2 * i + c] for c in range(2)] == [{i}, {i}]
    assert max(len(users.get(row, ())) for row in range(shared)) > 1


def test_gradients_of_a_row_are_summed_over_its_uses() -> None:
    model = moved(MixtureOfShards(rank=4))
    x = torch.randn(3, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    functions = functions_of(model)
    expected = torch.zeros_like(functions[0].pool.A)
    twin = copy.deepcopy(model)
    remove_(twin, "default")
    weft.adapt_(twin, LoRA(rank=4, alpha=4.0), where="blocks.*")
    for kind in ("up", "down"):
        for ours, theirs in zip(functions_of(model, kind), functions_of(twin, kind)):
            for value, factor in zip((theirs.A, theirs.B), ours.to_lora()):
                value.data = factor.detach()
    twin(x).square().sum().backward()
    for ours, theirs in zip(functions, functions_of(twin)):
        expected.index_add_(0, ours.index_A, theirs.A.grad.reshape(-1, expected.shape[1]))
    torch.testing.assert_close(functions[0].pool.A.grad, expected)


def test_one_pool_for_each_name_and_shape() -> None:
    model = Model()
    model.blocks[3]["up"] = nn.Linear(8, 12).double()
    model.blocks[3]["up2"] = nn.Linear(8, 12).double()
    model.blocks[2]["up"] = nn.Linear(6, 12).double()
    weft.adapt_(model, MixtureOfShards(budget_rank=4, rank=4), where="*")
    pools = {n: fs[0].pool for n, fs in weft.functions(model).items()}
    assert len({id(p) for p in pools.values()}) == 5
    assert pools["blocks.0.up.weight"] is pools["blocks.1.up.weight"] is pools["blocks.3.up.weight"]
    assert pools["blocks.0.down.weight"] is pools["blocks.3.down.weight"]
    assert len(pools["blocks.0.up.weight"].A) == 3 * 4 * 2


def test_the_pool_is_one_parameter() -> None:
    model = moved(MixtureOfShards(rank=5))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [
        f"blocks.0.{kind}.parametrizations.weight.0.pool.{side}" for kind in ("up", "down") for side in "AB"
    ]
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).float().bfloat16()):
        pools = [f.pool for f in functions_of(each)]
        assert all(p is pools[0] for p in pools)
        assert all(f.index_A.dtype == torch.int64 for f in functions_of(each))
    fresh = Model()
    weft.adapt_(fresh, MixtureOfShards(rank=5, seed=9), where="blocks.*")
    assert not torch.equal(functions_of(fresh)[0].index_A, functions_of(model)[0].index_A)
    state = model.state_dict()
    names = [n for n in state if n.endswith("up.parametrizations.weight.0.pool.A")]
    assert len(names) == LAYERS
    for assign in (False, True):
        fresh.load_state_dict(state, assign=assign)
        assert all(f.pool is functions_of(fresh)[0].pool for f in functions_of(fresh))
        x = torch.randn(2, 8, dtype=torch.float64)
        assert torch.equal(fresh(x), model(x))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    assert len(optimizer.param_groups[0]["params"]) == 4
    before = functions_of(model)[0].pool.A.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    step = (functions_of(model)[0].pool.A.detach() - (1 - 1e-5) * before).abs().max()
    assert step <= 1e-3 * (1 + 1e-6)  # the first step of Adam, once
    assert remove_(model, "default")[0] == "blocks.0.up.weight"
    assert not [n for n in model.state_dict() if "pool" in n]


def test_indices_leave_the_global_generator_alone() -> None:
    def draw(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        layer = nn.Linear(8, 8)
        weft.adapt_(layer, MixtureOfShards(budget_rank=4, rank=4, shards=4, seed=seed), where="*")
        return layer.parametrizations.weight[0].index_A, layer.parametrizations.weight[0].pool.A

    (first, start), (second, same) = draw(0), draw(1)
    assert not torch.equal(first, second)
    assert torch.equal(start, same)


def test_the_two_factors_choose_independently() -> None:
    model = moved(MixtureOfShards(rank=4, shards=2))
    assert all(not torch.equal(f.index_A, f.index_B) for f in functions_of(model))


def test_each_matrix_of_a_stack_is_a_layer() -> None:
    from weft.contract.models import Experts

    experts = Experts()  # (3, 16, 8)
    nn.init.normal_(experts.weight)
    before = experts.weight.detach().clone()
    report = weft.adapt_(experts, MixtureOfShards(rank=4, alpha=4.0), where="*")
    assert report.trainable == 3 * 2 * (16 + 8)
    function = experts.parametrizations.weight[0]
    nn.init.normal_(function.pool.B)
    A, B = function.to_lora()
    assert (A.shape, B.shape, function.index_A.shape) == ((3, 4, 8), (3, 16, 4), (3, 8))
    torch.testing.assert_close(experts.weight, before + B @ A)
    for i in range(3):
        expected = gather_shards(function.pool.A, function.index_A[i], 4)
        assert torch.equal(A[i], expected)


def test_unused_rows_are_counted() -> None:
    model = Model()
    weft.adapt_(model, MixtureOfShards(budget_rank=4, rank=2, private_rank=0), where="*.up")
    functions = functions_of(model)
    unused = [4 * LAYERS * 2 - len({int(v) for f in functions for v in getattr(f, n)}) for n in ("index_A", "index_B")]
    assert unused_shards(model) == {"blocks.0.up.weight": pytest.approx(sum(unused) / (2 * 4 * LAYERS * 2))}
    assert 0.5 < unused_shards(model)["blocks.0.up.weight"] < 0.75  # (7/8)^4 = 0.59 expected
    assert unused_shards(Model()) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtureOfShards(budget_rank=2, rank=6, private_rank=1), r"= 5 different vectors .* = 4 that the 4 layers"),
        (MixtureOfShards(budget_rank=2, rank=3, private_rank=2), r"Choose rank <= 2"),
        (MixtureOfShards(budget_rank=2, rank=4, private_rank=3), "more than either"),
        (MixtureOfShards(budget_rank=4, rank=2, private_rank=3), "more than either"),
        (MixtureOfShards(budget_rank=4, rank=9, private_rank=1), "more than a matrix of"),
        (MixtureOfShards(budget_rank=2, rank=3, shards=3), "must divide both sizes"),
        (MixtureOfShards(budget_rank=0), "between 1"),
    ],
)
def test_what_does_not_fit_is_refused(config: MixtureOfShards, message: str) -> None:
    model = Model()
    with pytest.raises(RecipeError, match=message):
        weft.adapt_(model, config, where="blocks.*")
    assert weft.functions(model) == {}
    convolution = nn.Conv2d(4, 4, 2)
    with pytest.raises(RecipeError, match="built whole"):
        weft.adapt_(convolution, MixtureOfShards(rank=2, dropout=0.1), where="*")


@pytest.fixture
def mesh() -> Iterator[object]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    dist.destroy_process_group()


def test_sharding_blocks_apart_raises_and_together_works(mesh: object) -> None:
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(2, 8, dtype=torch.float64)
    expected = moved(MixtureOfShards(rank=4))
    apart, together = copy.deepcopy(expected), copy.deepcopy(expected)

    def shard_apart() -> None:
        for block in apart.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(apart, mesh=mesh)
        apart(x)

    with pytest.raises((RuntimeError, TypeError)):  # torch's own, of a parameter that is sharded already
        shard_apart()
    fully_shard([*together.blocks], mesh=mesh)
    fully_shard(together, mesh=mesh)
    torch.testing.assert_close(together(x), expected(x))
    for model in (together, expected):
        model(x).square().sum().backward()
    ours, theirs = (functions_of(m)[0].pool.A.grad for m in (together, expected))
    torch.testing.assert_close(ours.full_tensor(), theirs)
