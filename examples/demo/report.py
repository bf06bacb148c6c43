"""From the scores of all seeds to means with 95% intervals, a table, and what may be concluded."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch
from data import PACKAGES, TEAMS
from scipy import stats

import weft

Numbers = dict[str, Any]


def interval(values: list[float]) -> Numbers:
    """Mean, and half the width of Student's 95% interval (None for one value)."""
    half = None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "half": half, "seeds": values}


def summarise(runs: list[Numbers]) -> Numbers:
    """Everything measured, ready for JSON."""

    def row(name: str) -> Numbers:
        own = [run["scores"][name] for run in runs]
        best = [run["scores"][run["best_team"]]["accuracy"] for run in runs]
        alone = [own_task_alone(run) for run in runs]
        team = list(TEAMS).index(name) if name in TEAMS else None
        at_home = [s["own"][team] if team is not None else float(np.mean(s["own"])) for s in own]
        return {
            "accuracy": interval([s["accuracy"] for s in own]),
            "over_best_specialist": interval([s["accuracy"] - b for s, b in zip(own, best)]),
            "by_team": np.mean([s["by_team"] for s in own], axis=0).tolist(),
            "own_three": interval(at_home),
            "own_three_over_specialists": interval([a - b for a, b in zip(at_home, alone)]),
        }

    return {
        "task": f"Which of {len(PACKAGES)} packages of the standard library is a function from?",
        "teams": TEAMS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "weft": weft.__version__,
        "seeds": [run["seed"] for run in runs],
        "test_texts": runs[0]["test_texts"],
        "models": {name: row(name) for name in runs[0]["scores"]},
        "chosen_on_validation": [run["chosen"] for run in runs],
    }


def own_task_alone(run: Numbers) -> float:
    """Mean accuracy of the specialists, each on its own three packages."""
    return float(np.mean([run["scores"][team]["own"][number] for number, team in enumerate(TEAMS)]))


def table(summary: Numbers) -> str:
    """One line for each model, in percent."""
    lines = [f"{'':18}{'nine packages':>15}{'over best specialist':>23}{'own three':>14}"]
    for name, row in summary["models"].items():
        gain = percent(row["over_best_specialist"], sign=True)
        lines.append(f"{name:18}{percent(row['accuracy']):>15}{gain:>23}{percent(row['own_three']):>14}")
    return "\n".join(lines)


def percent(number: Numbers, sign: bool = False) -> str:
    """Mean and interval in percent, as in 50.0 ± 2.0."""
    mean = f"{100 * number['mean']:+.1f}" if sign else f"{100 * number['mean']:.1f}"
    return mean if number["half"] is None else f"{mean} ± {100 * number['half']:.1f}"


def difference(summary: Numbers, a: str, b: str) -> Numbers:
    """Accuracy of one model minus another's, seed by seed."""
    first, second = (summary["models"][name]["accuracy"]["seeds"] for name in (a, b))
    return interval([x - y for x, y in zip(first, second)])


def verdict(number: Numbers) -> str:
    """Whether a difference is more than chance: zero lies outside the interval."""
    if number["half"] is None or abs(number["mean"]) <= number["half"]:
        return "no clear difference"
    return "better" if number["mean"] > 0 else "worse"


def conclusions(summary: Numbers) -> str:
    """Where merging wins, where it does not, and by how much."""
    rows = summary["models"]
    average = rows["average"]
    count = len(summary["seeds"])
    others = [name for name in rows if name not in ("start", "average", "ensemble", "joint training", *TEAMS)]
    against = {name: difference(summary, name, "average") for name in others}
    lines = [
        f"Points of accuracy, 95% intervals over {count} seed{'s' if count > 1 else ''} (a new split and new batches each), "
        f"{summary['test_texts']} test texts a seed.",
        f"Wins      the plain average against the best specialist: {percent(average['over_best_specialist'], True)}",
        "          (a specialist cannot name six of the nine packages; no team's data left the team)",
    ]
    for label, number in (
        ("against asking all three models (three times the cost)", difference(summary, "average", "ensemble")),
        ("against one model trained on everybody's data", difference(summary, "average", "joint training")),
        ("against each specialist at its own three packages", average["own_three_over_specialists"]),
    ):
        lines.append(f"Average   {label}: {percent(number, True)}, {verdict(number)}")
    for name, number in against.items():
        lines.append(f"Methods   {name} against the average: {percent(number, True)}, {verdict(number)}")
    return "\n".join(lines)
