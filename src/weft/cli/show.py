"""Plans, results, methods and recipe templates as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from weft.engine.plan import Plan
from weft.engine.run import Options
from weft.errors import RecipeError, did_you_mean


def plan_facts(plan: Plan, options: Options) -> dict[str, Any]:
    """What a dry run tells, as data."""
    return {
        "tensors": len(plan.outputs),
        "parameters": sum(o.source.inputs.size if hasattr(o.source, "inputs") else o.source.size for o in plan.outputs),
        "bytes": plan.output_bytes,
        "input_bytes": sum(o.input_bytes for o in plan.outputs),
        "shards": len(plan.shards),
        "memory_bytes": plan.memory(options.threads, options.memory),
        "seconds": round(plan.seconds(options.threads), 1),
        "threads": options.threads,
        "rules": dict(Counter(o.rule for o in plan.outputs)),
        "dtypes": dict(Counter(o.dtype.name for o in plan.outputs)),
        "files": sorted([*plan.shards, *plan.files, *plan.copies]),
        "dropped": [f"{r.model}: {r.tensor} ({r.rule})" for r in plan.ledger if not r.output],
        "notes": plan.notes,
    }


def plan_text(facts: dict[str, Any]) -> str:
    """What a dry run prints."""
    rules = ", ".join(f"{count} {rule}" for rule, count in facts["rules"].items())
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    lines = [
        f"tensors   {facts['tensors']} ({rules})",
        f"dtypes    {dtypes}",
        f"output    {size(facts['bytes'])} in {facts['shards']} file(s), {facts['parameters']:,} parameters",
        f"reads     {size(facts['input_bytes'])}",
        f"memory    about {size(facts['memory_bytes'])} with {facts['threads']} thread(s)",
        f"time      about {duration(facts['seconds'])} from a warm page cache",
        f"files     {', '.join(facts['files'])}",
    ]
    lines += [f"dropped   {row}" for row in facts["dropped"]]
    lines += [f"note      {note}" for note in facts["notes"]]
    return "\n".join([*lines, "Nothing was written (dry run)."])


def result_text(facts: dict[str, Any]) -> str:
    """The last line of a run."""
    resumed = f", {facts['resumed']} kept from the interrupted run" if facts["resumed"] else ""
    return f"wrote {facts['output']}: {facts['tensors']} tensors, {size(facts['bytes'])} in {facts['seconds']:.1f} s{resumed}"


def method_text(row: dict[str, Any]) -> str:
    """One method and its parameters."""
    lines = [f"{row['name']}  ({row['family']}, goal: {row['goal']})", f"  {row['summary']}"]
    if row.get("paper"):
        lines.append(f"  paper: weft papers {row['paper']}")
    if row.get("origin"):
        lines.append(f"  from: {row['origin']}")
    if row.get("differs"):
        lines.append(f"  differs: {row['differs']}")
    if row.get("base"):
        lines.append(f"  base model: {row['base']}")
    lines += [f"  run: {row[key]}" for key in ("shell", "call") if row.get(key)]
    lines.append("  parameters:" if row["parameters"] else "  no parameters")
    for p in row["parameters"]:
        default = "required" if p.get("required") else f"default {p.get('default')}"
        bounds = ""
        if "minimum" in p or "maximum" in p:
            bounds = f", from {p.get('minimum', '-inf')} to {p.get('maximum', 'inf')}"
        if "choices" in p:
            bounds = f", one of {', '.join(p['choices'])}"
        each = f"; per model as {p['per_model']!r}" if "per_model" in p else ""
        lines.append(f"    --{p['key'].replace('_', '-'):18} {p.get('help', '')} ({default}{bounds}{each})")
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Bytes for a person.

    >>> size(1_500_000)
    '1.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for a person.

    >>> duration(5), duration(150)
    ('5 s', '2.5 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


_TEMPLATES = {
    "merge": """\
# weft run recipe.yaml -o merged/        (--dry-run checks it from headers alone)
steps:
  - method: ties                 # weft methods combine
    base: path/to/base           # folder, file, base+adapter, or org/name@revision
    models:
      - model: path/to/first
        parameters: {weight: 0.5}
      - model: path/to/second
        parameters: {weight: 0.5}
    parameters:
      density: 0.3               # a number, [first layer, ..., last layer], or filters:
      # density: [{filter: mlp, value: 0.2}, {value: 0.5}]
output:
  dtype: bfloat16                # leave out to keep the inputs' types
  shard_size: 5GB
seed: 0
""",
    "slices": """\
# Stack layers of one or more models.
steps:
  - method: passthrough
    slices:
      - sources: [{model: path/to/first, layers: [0, 16]}]
      - sources: [{model: path/to/second, layers: [8, 24]}]
""",
    "chain": """\
# A later step uses an earlier one as @name; nothing is written in between.
steps:
  - name: blend
    method: ties
    base: path/to/base
    models: [path/to/first, path/to/second]
  - method: linear
    models:
      - {model: "@blend", parameters: {weight: 0.7}}
      - {model: path/to/third, parameters: {weight: 0.3}}
""",
    "soup": """\
# Greedy soup: keeps a model when the score of the average improves.
steps:
  - method: greedy_soup
    models: [path/to/run0, path/to/run1, path/to/run2]
    score: "python evaluate.py {}"   # {} is the candidate's folder; the last line printed is the score
""",
    "mergekit": """\
# A mergekit file runs as it is: weft run mergekit.yml -o merged/
merge_method: ties
base_model: path/to/base
models:
  - model: path/to/first
    parameters: {weight: 0.5, density: 0.5}
  - model: path/to/second
    parameters: {weight: 0.5, density: 0.5}
parameters: {normalize: true}
dtype: bfloat16
""",
}


def template(kind: str) -> str:
    """A recipe to start from."""
    if kind not in _TEMPLATES:
        raise RecipeError(f"There is no template {kind!r}.{did_you_mean(kind, _TEMPLATES)}")
    return _TEMPLATES[kind]
