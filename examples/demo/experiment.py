"""One seed: fine-tune three specialists, merge them in every way, score everything on held-out functions."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from data import PACKAGES, TEAMS, split
from model import State, Tuner
from safetensors.torch import load_file
from torch import Tensor

import weft

MEMBERS = [torch.tensor([PACKAGES.index(p) for p in packages]) for packages in TEAMS.values()]
FROZEN_TENSORS = ["*embeddings*", "*layer.[0-3].*"]

# name: method and the settings to choose from
MERGES: dict[str, tuple[str, dict[str, tuple[float, ...]]]] = {
    "average": ("linear", {}),
    "model stock": ("model_stock", {}),
    "task arithmetic": ("task_arithmetic", {"lambda": (0.3, 0.5, 1.0)}),
    "TIES": ("ties", {"density": (0.2, 0.5), "lambda": (1.0,)}),
    "PCB": ("pcb", {"density": (0.05, 0.2), "lambda": (1.0,)}),
    "DARE-TIES": ("dare_ties", {"density": (0.2, 0.5), "lambda": (0.7,)}),
}
QUICK_MERGES = ("average", "PCB", "DARE-TIES")  # one for each way to ask: options, recipe, mergekit file


def recipe(name: str, settings: dict[str, float]) -> dict[str, Any]:
    """What to merge and how: DARE-TIES as a mergekit file, the others as weft's recipe."""
    method = MERGES[name][0]
    if method == "dare_ties":
        models = [{"model": team, "parameters": {"weight": 1.0, "density": settings["density"]}} for team in TEAMS]
        parameters = {"normalize": True, "lambda": settings["lambda"]}
        return {
            "merge_method": method, "base_model": "start", "models": models, "parameters": parameters, "dtype": "float32",
        }  # fmt: skip
    base = {} if method == "linear" else {"base": "start"}
    step = {"method": method, "models": list(TEAMS), **base, "parameters": settings, "exclude": FROZEN_TENSORS}
    return {"steps": [step]}


def settings_of(name: str, quick: bool) -> list[dict[str, float]]:
    """All settings of a method to choose from."""
    grid = {key: values[-1:] if quick else values for key, values in MERGES[name][1].items()}
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def scores(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Share of texts put in the right one of all packages, in all and by team; and of the team's own three."""
    right = logits.argmax(1) == labels
    teams = [torch.isin(labels, members) for members in MEMBERS]
    own = [
        (logits[team][:, members].argmax(1) == torch.searchsorted(members, labels[team])).double().mean().item()
        for team, members in zip(teams, MEMBERS)
    ]
    return {
        "accuracy": right.double().mean().item(),
        "by_team": [(right & team).double().mean().item() for team in teams],
        "own": own,
    }


def merge_in_memory(models: dict[str, State], name: str, settings: dict[str, float]) -> State:
    """What the command line makes, without the frozen tensors."""
    with tempfile.TemporaryDirectory() as folder:
        weft.run(recipe(name, settings), f"{folder}/merged.safetensors", models=models, threads=1)
        return load_file(f"{folder}/merged.safetensors")


def run_seed(seed: int, out: Path, steps: int, quick: bool) -> dict[str, Any]:
    """Scores of every model; seed 0 also leaves its fine-tunes as folders in ``out``."""
    torch.set_num_threads(1)  # seeds run side by side
    stored = torch.load(out / "features.pt", mmap=True)
    labels = stored.pop("labels")
    tuner = Tuner(out / "start", stored, labels)
    train, validation, test = (torch.from_numpy(part) for part in split(labels.numpy(), seed))

    models = {"start": tuner.start}
    for number, (team, members) in enumerate(zip(TEAMS, MEMBERS)):
        rows = train[torch.isin(labels[train], members)]
        models[team] = tuner.tune(rows, members, steps, seed=1000 * seed + number)
        if seed == 0:
            tuner.save(models[team], out / team, out / "start")
    everything = tuner.tune(train, torch.arange(len(PACKAGES)), len(TEAMS) * steps, seed=1000 * seed + len(TEAMS))
    print(f"  seed {seed}: fine-tuned {len(TEAMS)} specialists", flush=True)

    answers = {name: tuner.logits(state, test) for name, state in models.items()}
    answers["ensemble"] = torch.cat([answers[team][:, members] for team, members in zip(TEAMS, MEMBERS)], dim=1)
    answers["joint training"] = tuner.logits(everything, test)

    def on_validation(state: State) -> float:
        return scores(tuner.logits(state, validation), labels[validation])["accuracy"]

    best_team = max(TEAMS, key=lambda team: on_validation(models[team]))
    chosen: dict[str, Any] = {}
    for name in MERGES if not quick else QUICK_MERGES:
        choices = [(settings, merge_in_memory(models, name, settings)) for settings in settings_of(name, quick)]
        if len(choices) > 1:
            choices.sort(key=lambda choice: -on_validation(choice[1]))
        chosen[name], merged = choices[0]
        answers[name] = tuner.logits(merged, test)
    found = {name: scores(answers[name], labels[test]) for name in (*models, *chosen, "ensemble", "joint training")}
    print(f"  seed {seed}: merged and scored", flush=True)
    return {"seed": seed, "scores": found, "chosen": chosen, "best_team": best_team, "test_texts": len(test)}
