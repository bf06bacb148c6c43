"""Every command, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

import weft
from weft.cli.app import app
from weft.cli.show import _TEMPLATES
from weft.errors import WeftError
from weft.recipe.read import read_recipe


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def models(tmp_path: Path, llama_folder: Callable[..., Path]) -> list[Path]:
    return [llama_folder(tmp_path / f"m{i}", seed=i) for i in range(3)]


def commands() -> list[str]:
    return sorted(c.name or c.callback.__name__.rstrip("_") for c in app.registered_commands if c.callback)


@pytest.mark.parametrize("name", commands())
def test_help_has_an_example(name: str) -> None:
    text = run(name, "--help").stdout
    assert "Example: weft " in " ".join(text.split())


def test_exit_codes_reach_the_shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from weft.cli import app as cli
    from weft.cli import doctor

    def interrupted() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["weft", "doctor", "--json"])
    for examine, code in ((interrupted, 130), (lambda: {"ok": False}, 1)):
        monkeypatch.setattr(doctor, "examine", examine)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "examine", lambda: {"ok": True})
    cli.main()


def test_arguments_in_messages_are_options(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from weft.cli import app as cli

    def message(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["weft", *map(str, arguments)])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().err

    run("merge", *models, "-o", tmp_path / "out")
    assert "replace it with --force." in message("merge", *models, "-o", tmp_path / "out")
    save_file({"other": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    assert "--missing skip or" in message("merge", models[0], tmp_path / "other.safetensors", "-o", tmp_path / "new")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['weft', '--help']\n"
        "from weft.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'numba', 'pydantic', 'yaml', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]"), out[-200:]


def test_version() -> None:
    assert run("--version").stdout.strip() == f"weft {weft.__version__}"


def test_merge_and_read_back(models: list[Path], tmp_path: Path) -> None:
    run("merge", *models, "--weights", "1,2,1", "-o", tmp_path / "out", "-q")
    with (
        weft.open(tmp_path / "out") as made,
        weft.open(models[0]) as a,
        weft.open(models[1]) as b,
        weft.open(models[2]) as c,
    ):
        for name, tensor in made.items():
            expected = (a[name].numpy() + 2 * b[name].numpy() + c[name].numpy()) / 4
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_method_options_in_every_form(models: list[Path], tmp_path: Path) -> None:
    common = ["--base", models[0], "--method", "ties"]
    run("merge", models[1], models[2], *common, "--density", "0.5", "--normalize", "false", "-o", tmp_path / "a")
    run("merge", models[1], "--density=0.5", models[2], *common, "--no-normalize", "-o", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_dry_run_writes_nothing(models: list[Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = run("merge", *models, "-o", tmp_path / "out", "--dry-run", "--json")
    facts = json.loads(done.stdout)
    assert facts["tensors"] == 21
    assert facts["memory_bytes"] > 0
    assert facts["seconds"] > 0
    assert sorted(tmp_path.iterdir()) == before
    assert "Nothing was written" in run("merge", *models, "-o", tmp_path / "out", "--dry-run").stdout


def test_the_memory_estimate_is_within_a_fifth(tmp_path: Path, llama_folder: Callable[..., Path]) -> None:
    models = [llama_folder(tmp_path / f"m{i}", seed=i, layers=6, hidden=512, vocabulary=4000) for i in range(3)]
    for method in ("linear", "mergekit/ties"):
        arguments = [*map(str, models[1:]), "--method", method, "--threads", "2", "--density", "0.5"]
        arguments = arguments[:-2] if method == "linear" else [*arguments, "--base", str(models[0])]
        estimate = json.loads(run("merge", *arguments, "-o", tmp_path / "x", "--dry-run", "--json").stdout)[
            "memory_bytes"
        ]
        code = (
            "import sys; sys.argv = ['weft', *sys.argv[1:]]\nfrom weft.cli.app import main\nmain()\n"
            "print('PEAK', next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
        )
        out = tmp_path / method.replace("/", "-")
        command = [sys.executable, "-c", code, "merge", *arguments, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(done.stdout.split("PEAK")[1]) * 1024
        assert 0.8 < estimate / peak < 1.2, (method, estimate, peak)


def test_convert(models: list[Path], tmp_path: Path) -> None:
    import torch

    state = {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "h": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "a.bin")
    run("convert", tmp_path / "a.bin", "-o", tmp_path / "a.safetensors")
    with weft.open(tmp_path / "a.safetensors") as made:
        for name, value in state.items():
            assert torch.equal(made[name].torch(), value)
    run("convert", models[0], "-o", tmp_path / "half", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_inspect_and_diff(models: list[Path], tmp_path: Path) -> None:
    facts = json.loads(run("inspect", models[0], "--json").stdout)
    assert facts["parameters"] == sum(t["parameters"] for t in facts["tensors"])
    run("inspect", models[0], "--plot", tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert "model.norm.weight" in run("diff", models[0], models[1]).stdout


def test_extract_is_what_peft_reads(models: list[Path], tmp_path: Path) -> None:
    run("extract", models[1], "--base", models[0], "--lora-rank", "8", "-o", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    # hidden size 8: rank 8 holds every change of the square matrices in full
    with weft.open(f"{models[0]}+{tmp_path / 'adapter'}") as rebuilt, weft.open(models[1]) as tuned:
        name = "model.layers.0.self_attn.q_proj.weight"
        np.testing.assert_allclose(rebuilt[name].numpy(), tuned[name].numpy(), atol=1e-5)


def test_bake(models: list[Path], tmp_path: Path) -> None:
    for number in (1, 2):
        run("extract", models[number], "--base", models[0], "--lora-rank", "8", "-o", tmp_path / f"a{number}")
    a1, a2, out = tmp_path / "a1", tmp_path / "a2", tmp_path / "out"
    shown = run("bake", models[0], "--adapter", a1, "-a", f"{a2}=-0.5", "-o", out, "-q").stdout
    assert "probe: 21 changed weights" in shown
    assert "names its architecture" in shown
    assert f"wrote {out}" in shown
    with weft.open(out) as made:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
            old, one, two = (weft.open(m)[name].numpy() for m in models)
            goal = old + (one - old) - 0.5 * (two - old)
            if name == "model.norm.weight":  # whole, so the second goes half of the way back from the first
                goal = one - 0.5 * (two - one)
            np.testing.assert_allclose(made[name].numpy(), goal, atol=1e-5)
    facts = json.loads(
        run("bake", models[0], "-a", a1, "-o", tmp_path / "b", "--dtype", "bfloat16", "--json", "-q").stdout
    )
    assert facts["probe"]["kind"] == "products"
    assert 1e-4 < facts["probe"]["change"] < 0.02
    assert facts["base"] == {"a1": "not checked: the adapter has no fingerprint of its base"}
    assert "probe: not run" in run("bake", models[0], "-a", a1, "-o", tmp_path / "c", "--no-probe", "-q").stdout
    with pytest.raises(WeftError, match="nothing was published") as caught:
        run("bake", models[0], "-a", a1, "-o", tmp_path / "d", "--dtype", "bfloat16", "--max-change", "1e-6", "-q")
    assert caught.value.exit_code == 6
    with pytest.raises(WeftError, match="'half' is not a number"):
        run("bake", models[0], "-a", f"{a1}=half", "-o", tmp_path / "d")
    with pytest.raises(WeftError, match="exists already"):
        run("bake", models[0], "-a", a1, "-o", out)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("kind", sorted(_TEMPLATES))
def test_templates_are_recipes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(run("init", kind).stdout)
    recipe, _ = read_recipe(path)
    assert recipe.steps


def test_schema_describes_recipes() -> None:
    schema = json.loads(run("schema").stdout)
    assert "ties" in schema["$defs"]["Step"]["properties"]["method"]["enum"]
    known = schema["$defs"]["Step"]["allOf"]
    ties = next(c for c in known if c["if"]["properties"]["method"]["const"] == "ties")
    assert {"density", "weight", "weights"} <= set(ties["then"]["properties"]["parameters"]["properties"])
    assert set(yaml.safe_load(run("init", "merge").stdout)) <= set(schema["properties"])


def test_methods_papers_doctor() -> None:
    assert "--density" in run("methods", "ties").stdout
    assert "combine" in run("methods").stdout
    assert "pcb-merging" in run("papers", "fine-tunes", "interfere").stdout
    found: dict[str, Any] = json.loads(run("doctor", "--json").stdout)
    assert found["ok"], found["problems"]


def test_plugins(tmp_path: Path, models: list[Path], weft_command: Callable[..., Any]) -> None:
    contributing = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    plugin = tmp_path / "median.py"
    plugin.write_text(contributing.split("```python\n")[1].split("```")[0])
    tested = weft_command("test-method", "median", "--plugin", plugin)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    merged = weft_command("merge", *models, "--method", "median", "--plugin", plugin, "-o", tmp_path / "out", "-q")
    assert merged.returncode == 0, merged.stderr
    with weft.open(tmp_path / "out") as made:
        stack = []
        for model in models:
            with weft.open(model) as opened:
                stack.append(opened["lm_head.weight"].numpy())
        np.testing.assert_array_equal(made["lm_head.weight"].numpy(), np.median(stack, axis=0))


def test_adapters_merge_into_an_adapter(models: list[Path], tmp_path: Path) -> None:
    for i in (1, 2):
        run("extract", models[i], "--base", models[0], "--lora-rank", "8", "-o", tmp_path / f"a{i}")
    both = [tmp_path / "a1", tmp_path / "a2"]
    run("merge", *both, "--weights", "1,3", "-o", tmp_path / "mean")
    run(
        "merge",
        *both,
        "--method",
        "task_arithmetic",
        "--weights",
        "1,-0.5",
        "--base",
        models[0],
        "-o",
        tmp_path / "sum",
    )
    name = "model.layers.1.mlp.down_proj.weight"
    with weft.open(models[0]) as base, weft.open(models[1]) as a, weft.open(models[2]) as b:
        start, da, db = base[name].numpy(), a[name].numpy() - base[name].numpy(), b[name].numpy() - base[name].numpy()
    for folder, expected in (("mean", start + 0.25 * da + 0.75 * db), ("sum", start + da - 0.5 * db)):
        with weft.open(f"{models[0]}+{tmp_path / folder}") as made:
            np.testing.assert_allclose(made[name].numpy(), expected, atol=2e-5)
    with pytest.raises(WeftError, match="base\\+adapter"):
        run("merge", *both, "--method", "ties", "-o", tmp_path / "x")
    with pytest.raises(WeftError, match="is an adapter"):
        run("merge", models[0], both[0], "-o", tmp_path / "x")
