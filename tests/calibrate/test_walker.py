"""A walk computes what the model computes, whatever the architecture, and loses nothing on the way."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from architectures import MODELS, build

from weft.calibrate import Walk
from weft.calibrate.check import check_architecture, small
from weft.errors import CheckpointError, OutputError, RecipeError


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def walked(model: object, batches: list, **options: object) -> tuple[list[torch.Tensor], list[str]]:
    with Walk(model, batches, check=False, **options) as walk:
        names = [block.name for block in walk]
        return [out[0] for out in walk.outputs()], names


@torch.no_grad()
def plain(model: nn.Module, batches: list) -> list[torch.Tensor]:
    return [model(**batch)[0] for batch in batches]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_outputs_are_those_of_the_plain_forward_pass(name: str, tmp_path: Path) -> None:
    model, batches = build(name)
    expected = plain(model, batches)
    cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    outputs, names = walked(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert len(names) == len(set(names)) >= 3
    assert getattr(model.config, "use_cache", None) == cache
    assert all(torch.equal(a, b) for a, b in zip(plain(model, batches), expected)), "the walk changed the model"
    model.save_pretrained(tmp_path)
    outputs, again = walked(tmp_path, batches)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert again == names


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_bfloat16_from_disk(name: str, tmp_path: Path) -> None:
    model, batches = build(name, torch.bfloat16)
    model.save_pretrained(tmp_path)
    reread = type(model).from_pretrained(tmp_path).eval()
    reread.config._experts_implementation = "eager"
    assert all(torch.equal(a, b) for a, b in zip(walked(tmp_path, batches)[0], plain(reread, batches), strict=True))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_architecture_passes_its_own_check(name: str) -> None:
    model_class, config = MODELS[name]()
    check_architecture(model_class, config)


def test_shrinking_keeps_what_makes_an_architecture() -> None:
    import transformers

    config = small(transformers.Gemma3TextConfig())
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers
    config = small(transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=8))
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 1)
    assert config.vocab_size == 128


def test_a_block_that_returns_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    class Odd(modeling_llama.LlamaModel):
        def forward(self, *args, **kwargs):  # adds the first block's input to the last block's output
            out = super().forward(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state + self.layers[1](out.last_hidden_state, **self.kept(out))
            return out

        def kept(self, out):
            position = torch.arange(out.last_hidden_state.shape[1]).unsqueeze(0)
            return {"position_embeddings": self.rotary_emb(out.last_hidden_state, position)}

    model_class, config = MODELS["llama"]()
    odd = type("OddForCausalLM", (model_class,), {})
    monkeypatch.setattr(
        odd, "__init__", lambda self, c: (model_class.__init__(self, c), setattr(self, "model", Odd(c)))[0]
    )
    with pytest.raises(CheckpointError, match="OddForCausalLM"):
        check_architecture(odd, config)


def test_a_change_of_a_block_reaches_those_behind_it(tmp_path: Path) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path)
    seen = []
    with Walk(tmp_path, batches) as walk:
        for block in walk:
            if block.number == 1:
                block.module.mlp.down_proj.weight.data.mul_(2)
                stored = block.stored()
                assert torch.equal(
                    stored["model.layers.1.mlp.down_proj.weight"], 2 * model.model.layers[1].mlp.down_proj.weight
                )
            if block.number == 2:
                handle = block.module.register_forward_hook(lambda m, a, o: seen.append(a[0]))
                block.run()
                handle.remove()
        outputs = [o[0] for o in walk.outputs()]
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain(model, batches)))
    assert len(seen) == len(batches)


def test_experts_are_linear_layers_over_the_fused_memory(tmp_path: Path) -> None:
    model, batches = build("mixtral")
    model.save_pretrained(tmp_path)
    counted: list[int] = []
    with Walk(tmp_path, batches) as walk:
        for block in walk:
            linears = block.linears()
            experts = [n for n in linears if ".experts." in n]
            assert len(experts) == 8
            assert linears[f"{block.name}.mlp.experts.0.down_proj"].weight.shape == (32, 48)
            if block.number == 0:
                handles = [linears[n].register_forward_hook(lambda m, a, o: counted.append(len(a[0]))) for n in experts]
                block.run()
                for handle in handles:
                    handle.remove()
                linears[f"{block.name}.mlp.experts.3.gate_up_proj"].weight.data.zero_()
                stored = block.stored()
                changed = {n for n in stored if not torch.equal(stored[n], walk.source.checkpoint[n].torch())}
        outputs = [o[0] for o in walk.outputs()]
    # two experts a token, two matrices each
    assert sum(counted) == 2 * 2 * sum(b["input_ids"].numel() for b in batches)
    assert len(changed) == 2
    assert all(".experts.3." in n for n in changed)
    model.model.layers[0].mlp.experts.gate_up_proj.data[3].zero_()
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain(model, batches)))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_a_stopped_walk_goes_on_with_the_same_outputs(name: str, stop: int, tmp_path: Path) -> None:
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    expected = plain(model, batches)
    options = {"folder": tmp_path / "work", "memory": 0}

    class Stopped(Exception):
        pass

    def broken() -> None:
        with Walk(tmp_path / "model", batches, **options) as walk:
            for block in walk:
                if block.number == stop:
                    raise Stopped

    blocks = {"llama": 3, "t5": 6}[name]
    if stop < blocks:
        with pytest.raises(Stopped):
            broken()
    with Walk(tmp_path / "model", batches, **options) as walk:
        assert [b.number for b in walk] == list(range(stop if stop < blocks else 0, blocks))
        assert all(torch.equal(a[0], b) for a, b in zip(walk.outputs(), expected, strict=True))
    with Walk(tmp_path / "model", batches, **options) as walk:  # finished: only the tail runs
        assert list(walk) == []
        assert all(torch.equal(a[0], b) for a, b in zip(walk.outputs(), expected, strict=True))


def test_another_walk_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path / "model")
    for data, refused in ((batches, False), (batches[:2], True)):
        with pytest.MonkeyPatch.context():
            if refused:
                with (
                    pytest.raises(OutputError, match="other data"),
                    Walk(tmp_path / "model", data, folder=tmp_path / "w"),
                ):
                    pass
            else:
                with Walk(tmp_path / "model", data, folder=tmp_path / "w") as walk:
                    list(walk)


def test_weights_are_there_only_while_a_block_is_visited(tmp_path: Path) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path)
    with Walk(tmp_path, batches) as walk:
        for block in walk:
            real = {n for n, p in walk.model.named_parameters() if not p.is_meta}
            assert real == {n for n, _ in walk.model.named_parameters() if n.startswith(f"{block.name}.")}
        list(walk.outputs())
        assert all(p.is_meta for p in walk.model.parameters())


def test_hidden_states_beyond_the_budget_lie_in_files() -> None:
    model, batches = build("gpt2")
    expected = plain(model, batches)
    with Walk(model, batches, memory=0) as walk:
        for _ in walk:
            assert walk._current.nbytes_in_memory == 0
        assert all(torch.equal(a[0], b) for a, b in zip(walk.outputs(), expected))


class Net(nn.Module):
    """A list of blocks that transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def test_any_module_with_a_list_of_blocks() -> None:
    torch.manual_seed(0)
    net, batches = Net().eval(), [torch.randn(2, 1, 5, 5), (torch.randn(3, 1, 5, 5),)]
    with Walk(net, batches, blocks="stages") as walk:
        assert [block.name for block in walk] == ["stages.0", "stages.1", "stages.2"]
        outputs = list(walk.outputs())
    assert torch.equal(outputs[0], net(batches[0]))
    assert torch.equal(outputs[1], net(*batches[1]))


def test_what_cannot_be_walked_is_said() -> None:
    net = Net()
    with pytest.raises(RecipeError, match="no calibration batches"):
        Walk(net, [], blocks="stages")
    with pytest.raises(RecipeError, match="Did you mean stages"):
        Walk(net, [torch.zeros(1)], blocks="stage")
    with pytest.raises(RecipeError, match="no list of blocks"):
        Walk(net, [torch.zeros(1)])
    with (
        Walk(net, [torch.randn(1, 1, 5, 5)], blocks="stages") as walk,
        pytest.raises(RecipeError, match="not finished"),
    ):
        next(walk.outputs())


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, batches = build("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        Walk(tmp_path, batches)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Walk(tmp_path, batches)


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with Walk(tmp_path, batches) as walk:
        list(walk)
    assert not (tmp_path / "ran").exists()


class InPlace(nn.Module):
    """Adds to what it is given, in place, as many convolutional blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.add_(1))


def stack(block: type = InPlace) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[block() for _ in range(3)]), nn.Linear(4, 2)).eval()


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_blocks_that_work_in_place_run_as_often_as_one_likes(memory: int) -> None:
    net, x = stack(), torch.randn(5, 4)
    with torch.no_grad():
        expected = net(x)
    with Walk(net, [x], blocks="1", memory=memory) as walk:
        for block in walk:
            block.run()
            block.run()
        for _ in range(2):
            assert torch.equal(next(walk.outputs()), expected)


def test_a_block_that_was_run_to_its_end_is_not_run_again() -> None:
    net, x = stack(), torch.randn(5, 4)
    with torch.no_grad():
        expected = net(x)
    with Walk(net, [x], blocks="1") as walk:
        for block in walk:
            block.run(keep=True)
            with pytest.raises(RecipeError, match="inputs are gone"):
                block.run()
        assert torch.equal(next(walk.outputs()), expected)


def test_what_identifies_a_walk(tmp_path: Path) -> None:
    batches = [{"x": torch.arange(12.0).reshape(3, 4), "scale": torch.tensor(1.0)}]

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x * scale

    torch.manual_seed(0)
    net = Scaled()

    def go(data: list) -> None:
        with Walk(net, data, blocks="blocks", folder=tmp_path / "w") as walk:
            list(walk)

    go(batches)
    go(batches)
    with pytest.raises(OutputError, match="other data"):
        go([{"x": batches[0]["x"].reshape(3, 1, 4), "scale": batches[0]["scale"]}])
    with torch.no_grad():
        net.blocks[1].weight[0, 0] += 1
    with pytest.raises(OutputError, match="another model"):
        go(batches)
    for damaged in ("{", "[]", '{"identity": 1}'):
        (tmp_path / "w" / "walk.json").write_text(damaged)
        with pytest.raises(OutputError, match="no record of a walk"):
            go(batches)


def test_a_walk_leaves_a_model_as_it_was() -> None:
    net = stack()
    net.train()
    net[2].eval()
    calls = []

    def patched(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return nn.Linear.forward(net[1][1].linear, x.add_(1))

    net[1][1].forward = patched
    with Walk(net, [torch.randn(2, 4)], blocks="1") as walk:
        for _ in walk:
            assert not any(m.training for m in net.modules())
        list(walk.outputs())
    assert net[1][1].forward is patched
    assert calls
    assert [m.training for m in net] == [True, True, False]


def test_files_are_closed_behind_a_walk(tmp_path: Path) -> None:
    import os

    model, batches = build("gpt2")
    model.save_pretrained(tmp_path)

    def opened() -> list[str]:
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        return [os.readlink(p) for p in links if os.path.lexists(p)]

    with Walk(tmp_path, batches) as walk:
        list(walk)
    assert not [p for p in opened() if p.startswith(str(tmp_path))]


class Twice(nn.Module):
    """A block with a layer that runs twice, and one that comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.last, self.seen = nn.Linear(3, 3), nn.Linear(3, 3), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.twice(x) + self.twice(2 * x))
        self.seen += 1
        return y


def test_a_block_stops_when_its_layers_have_their_inputs() -> None:
    batches = [torch.randn(2, 3) for _ in range(4)]
    for names, passes in ((["last"], 1), (["twice"], 4), (["twice", "last"], 4)):
        net = nn.Sequential(nn.Sequential(Twice(), Twice()))
        counted: list[str] = []
        with Walk(net, batches, blocks="0") as walk:
            for block in walk:
                module, before = block.module, block.module.seen
                layers = [module.get_submodule(n) for n in names]
                handles = [
                    layer.register_forward_pre_hook(lambda *_, n=n, counted=counted: counted.append(n))
                    for n, layer in zip(names, layers)
                ]
                block.run(until=layers)
                for handle in handles:
                    handle.remove()
                assert module.seen - before == passes  # the first pass tells how often each layer runs
            last = [net(x) for x in batches]
            assert all(torch.equal(a, b) for a, b in zip(walk.outputs(), last))
        assert all(counted.count(n) == 2 * 4 * (2 if n == "twice" else 1) for n in names)


def test_the_first_block_runs_once_to_tell_what_blocks_return() -> None:
    batches = [torch.randn(2, 3) for _ in range(4)]
    net = nn.Sequential(nn.Sequential(Twice(), Twice()))
    with Walk(net, batches, blocks="0") as walk:
        next(iter(walk))
        assert net[0][0].seen == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.calibrate.walker.has_bfloat16", lambda: True)
    model, batches = build("llama", dtype)
    exact = [x.float() for x in plain(model.float(), batches)]
    with Walk(model.to(dtype), batches, autocast=True) as walk:
        assert walk.autocast == (dtype != torch.bfloat16)
        list(walk)
        found = [out[0].float() for out in walk.outputs()]
    for a, b in zip(found, exact):
        assert 0 < float((a - b).norm() / b.norm()) < 0.02
    monkeypatch.setattr("weft.calibrate.walker.has_bfloat16", lambda: False)
    assert not Walk(model, batches, autocast=True).autocast
