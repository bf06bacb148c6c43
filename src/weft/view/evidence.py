"""Pages of evidence about quantised models: what one model lost where, and how several candidates compare.

The numbers come from :mod:`weft.quantize.report` and :mod:`weft.quantize.compare`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weft.errors import MissingDependencyError
from weft.view.static import Mark, card, document, facts, paragraphs, plot, table
from weft.view.tables import Column, number, plural, quantity

REPORT_FILE, COMPARISON_FILE = "report.html", "comparison.html"  # beside the JSON files of the same name
_WORST = 10  # layers that are shown on top
_SCORES = {
    "perplexity": "perplexity", "nll": "nats per token", "kl": "KL to the original", "top1_agreement": "top-1 agreement",
    "cosine_distance": "1 − cos to the original", "output_error": "output error", "accuracy": "accuracy",
}  # fmt: skip


def report_page(report: Mapping[str, Any]) -> str:
    """A report of :func:`weft.quantize.report.write_report` as a page.

    Args:
        report: its JSON value.
    """
    rows = report["layers"]
    worst = report["measure"]
    parts = [facts(summary_facts(report)), paragraphs(remarks(report))]
    if report["scores"]:
        parts.append(card("Scores", [table(_score_columns(report["scores"]), list(_scores(report["scores"])))]))
    blocks = [b["block"] for b in report["blocks"]]
    place = {name: i for i, name in enumerate(blocks)}
    top = {row["layer"] for row in rows[:_WORST]}
    marks = [
        Mark(place[row["block"]], row[worst], f"{row['layer']}: {number(row[worst])}", strong=row["layer"] in top)
        for row in rows if row.get(worst) is not None
    ]  # fmt: skip
    every = max(1, len(blocks) // 16)
    ticks = [(float(i), _last(name)) for i, name in enumerate(blocks) if i % every == 0]
    about = {
        "output_error": "Share of a layer's output that changed on the calibration data, tr(Δ G Δᵀ) / tr(W G Wᵀ); the ten worst in another colour.",
        "error": "‖Ŵ − W‖ / ‖W‖ of each layer; the ten worst in another colour.",
    }  # fmt: skip
    title = "output error" if worst == "output_error" else "error of weights"
    parts.append(card("Errors by block", [plot(marks, "block", title, log_y=True, ticks=ticks)], about[worst]))
    columns = _layer_columns(rows)
    parts.append(card(f"The worst {min(_WORST, len(rows))} layers", [table(columns, rows[:_WORST])]))
    if rows[_WORST:]:
        parts.append(card("All other layers", [table(columns, rows[_WORST:], tall=True)]))
    return document(f"Quantised: {report['model']}", parts)


def summary_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Totals by label."""
    known = report["summary"]
    made = {"layers": f"{known['layers']:,}", "size": quantity(known["bytes"], "B")}
    if known.get("bytes_before"):
        made["size before"] = quantity(known["bytes_before"], "B")
        made["smaller by"] = f"{known['bytes_before'] / max(known['bytes'], 1):.3g}×"
    if known.get("bits_per_weight") is not None:
        made["bits per weight"] = f"{known['bits_per_weight']:.3f}"
    made["bits per weight, whole model"] = f"{known['bits_per_parameter']:.3f}"
    if known.get("seconds") is not None:
        made["time"] = f"{known['seconds']:.1f} s"
    if known.get("peak_memory") is not None:
        made["peak memory"] = quantity(known["peak_memory"], "B")
    return made


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What is to be known about single layers."""
    notes = report["notes"]
    lines = []
    if notes["few_rows"]:
        lines.append(
            f"{plural(len(notes['few_rows']), 'layer')} saw too few rows of the data and got what the method does without: "
            f"{_some(notes['few_rows'])}."
        )
    if notes["failed"]:
        first = notes["failed"][0]
        lines.append(
            f"{plural(len(notes['failed']), 'layer')} stayed as they were: {_some([f['layer'] for f in notes['failed']])}. "
            f"{first['layer']}: {first['reason']}"
        )
    if notes["dense"]:
        lines.append(
            f"{plural(len(notes['dense']), 'layer')} kept the model's type in the files: {_some(notes['dense'])}."
        )
    return lines


def comparison_page(found: Mapping[str, Any]) -> str:
    """A comparison of :func:`weft.quantize.compare.compare_methods` as a page.

    Args:
        found: its JSON value.
    """
    rows = found["rows"]
    marks = [
        Mark(row["bytes"] / 1e6, row["loss"], row["candidate"], row["candidate"], row["candidate"] == found["best"], row["pareto"])
        for row in rows if not row["failed"]
    ]  # fmt: skip
    about = f"{_SCORES.get(found['score'], found['score'])} of {found['held_out']:,} held-out tokens; lower and further left is better."
    positive = all(mark.y > 0 for mark in marks)  # losses span orders of magnitude
    original = found["original"]
    known = {"original": quantity(original["bytes"], "B"), "best": found["best"] or "none"}
    known |= {f"{_SCORES[k]} of the original": number(v) for k, v in original["scores"].items() if k in _SCORES}
    parts = [
        facts(known),
        paragraphs([found["verdict"]]),
        card("Size and loss", [plot(marks, "MB", _SCORES.get(found["score"], found["score"]), log_y=positive)], about),
        card("Candidates", [table(comparison_columns(found), rows)]),
    ]
    if found["frontier"]:
        least = [
            Mark(bits, error, f"{number(bits)} bits: {number(error)}", front=True) for bits, error in found["frontier"]
        ]
        text = "The least sum of errors of layers that a mix of the candidates reaches; what mixed candidates are taken from."
        parts.append(card("Bits and errors", [plot(least, "bits per weight", "sum of errors", log_y=True)], text))
    layers = found["layers"]
    if layers:
        names = list(next(iter(layers.values())))
        columns = [Column("layer", lambda row: row["layer"], right=False)]
        columns += [_number_column(name, ("error", name)) for name in names]
        lines = [{"layer": name, **{("error", k): v for k, v in one.items()}} for name, one in layers.items()]
        text = "tr(Δ G Δᵀ) / tr(W G Wᵀ) with the inputs that the original model gives."
        parts.append(card("Output error by layer", [table(columns, lines, tall=True)], text))
    return document(f"Quantising {found['model']}", parts)


def comparison_columns(found: Mapping[str, Any]) -> list[Column]:
    """Columns of the table of candidates, for text and pages."""
    keys = [k for k in _SCORES if any(k in (row.get("scores") or {}) for row in found["rows"])]

    def mark(row: Mapping[str, Any]) -> str:
        return "best" if row["candidate"] == found["best"] else "·" if row["pareto"] else ""

    return [
        Column("candidate", lambda r: r["candidate"], right=False),
        Column("size", lambda r: "–" if r["bytes"] is None else quantity(r["bytes"], "B")),
        Column("bits", lambda r: "–" if r["bits_per_weight"] is None else f"{r['bits_per_weight']:.2f}", optional=1),
        *[_score_column(k, 0 if k == found["score"] else i + 2) for i, k in enumerate(keys)],
        Column("seconds", lambda r: number(r["seconds"])),
        Column("", mark, right=False),
        *([Column("why not", lambda r: r["failed"], right=False)] if any(r["failed"] for r in found["rows"]) else []),
    ]


def comparison_png(found: Mapping[str, Any], path: str) -> None:
    """The plot of a comparison as a picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "A picture needs matplotlib: pip install 'weft[science]', or ask for .html."
        ) from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    good = [row for row in found["rows"] if not row["failed"]]
    axes.scatter([r["bytes"] / 1e6 for r in good], [r["loss"] for r in good])
    front = sorted((r["bytes"] / 1e6, r["loss"]) for r in good if r["pareto"])
    axes.plot([x for x, _ in front], [y for _, y in front])
    for row in good:  # a dollar sign would begin mathematics
        text = row["candidate"].replace("$", r"\$")
        axes.annotate(text, (row["bytes"] / 1e6, row["loss"]), textcoords="offset points", xytext=(5, 4))
    axes.set_xlabel("MB")
    axes.set_ylabel(_SCORES.get(found["score"], found["score"]))
    FigureCanvasAgg(figure).print_png(path)


def _layer_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    numbers = [
        ("output_error", "output error"),
        ("error", "error"),
        ("outlier", "outlier"),
        ("loss", "loss"),
        ("seconds", "seconds"),
    ]
    made = [
        Column("layer", lambda r: r["layer"], right=False),
        Column("form", lambda r: r.get("form", "–"), right=False),
        Column("bits", lambda r: number(r.get("bits"))),
    ]
    made += [_number_column(title, key) for key, title in numbers if any(r.get(key) is not None for r in rows)]
    return [*made, Column("notes", lambda r: r["note"], right=False)]


def _score_column(key: str, optional: int) -> Column:
    return Column(_SCORES[key], lambda row: number(row["scores"].get(key)), optional=optional)


def _number_column(title: str, key: Any) -> Column:
    """A number of each row, which is a mapping or a sequence; a dash where there is none."""
    return Column(title, lambda row: number(row.get(key) if isinstance(row, Mapping) else row[key]))


def _scores(scores: Mapping[str, Mapping[str, float]]) -> list[list[Any]]:
    keys = [k for k in _SCORES if any(k in one for one in scores.values())]
    return [[_SCORES[k], *(one.get(k) for one in scores.values())] for k in keys]


def _score_columns(scores: Mapping[str, Any]) -> list[Column]:
    first = Column("", lambda row: row[0], right=False)
    return [first, *(_number_column(name, i) for i, name in enumerate(scores, 1))]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
