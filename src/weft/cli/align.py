"""``weft align``: the units of one transformers folder in the order of another, as a folder that loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.memory import from_mapping
from weft.checkpoint.open import open_checkpoint
from weft.engine.run import Options
from weft.errors import RecipeError
from weft.recipe.run import run

_TABLES = ("inv_freq", "masked_bias", "position_ids")  # old files hold these; no unit has a place in them


def align_command(
    model: str,
    to: str,
    output: str,
    *,
    restarts: int = 1,
    max_sweeps: int = 100,
    seed: int = 0,
    force: bool = False,
    progress: Any = None,
) -> dict[str, Any]:
    """Match a folder's units to another's and write the model in that order; bits are moved, never computed.

    Args:
        model: folder or Hub id of a transformers model.
        to: another of the same architecture and sizes.
        output: folder to make.
        restarts, max_sweeps, seed: see ``weft.merge.match_weights``.
        force: replace an output that weft made.
        progress: as ``weft.run`` takes it.

    Returns:
        Facts for a report.

    Raises:
        RecipeError: no local config.json, different models, or tensors that the architecture does not have.
        ShapeError: names or shapes of another form than the architecture's. OutputError: see ``weft.run``.
    """
    from weft.merge import match_weights
    from weft.merge.weight_matching.diagnostics import distance
    from weft.symmetry import find_symmetry

    with open_checkpoint(model) as own, open_checkpoint(to) as reference:
        symmetries = []
        for opened, given in ((own, model), (reference, to)):
            if opened.folder is None or not opened.config:
                raise RecipeError(
                    f"{given}: no config.json. Which units may be permuted is found from a transformers folder; for other "
                    "models use weft.merge.align in Python."
                )
            symmetries.append(find_symmetry(opened.folder))
        symmetry = symmetries[0]
        if symmetry != symmetries[1]:
            raise RecipeError(
                f"{own.name} and {reference.name} differ in architecture or sizes by their config.json, so their units do "
                "not correspond. Models to be aligned have one architecture and one width."
            )
        known = {*symmetry.shapes, *symmetry.aliases}
        strange = [n for n, t in own.items() if n not in known and t.dtype.floating and not n.endswith(_TABLES)]
        if strange:
            raise RecipeError(
                f"{own.name} holds {len(strange)} tensors that its architecture does not have, such as {strange[0]}: they "
                "would stay in the old order. Likely cause: an extra head, or names of another form. Load the model and "
                "use weft.merge.align in Python."
            )
        found = match_weights(reference, own, symmetry, restarts=restarts, max_sweeps=max_sweeps, seed=seed)
        moved = symmetry.apply(own, found.permutations)
        key = f"{own.name} in the order of {reference.name}"  # so that the record of the output says it
        aligned = _as_checkpoint(key, own, moved)
        names = [n for n in dict.fromkeys(m.tensor for g in symmetry.groups for m in g.members) if n in own]
        before, after = (distance({n: reference[n] for n in names}, {n: s[n] for n in names}) for s in (own, moved))
        step = {"method": "passthrough", "models": [key], "exclude": ["*"]}
        written = run(
            {"steps": [step], "allow_non_finite": True}, output, models={key: aligned},
            options=Options(force=force, progress=progress) if progress is not None else Options(force=force),
        )  # fmt: skip
        return {
            "output": output,
            "tensors": written.tensors,
            "groups": len(symmetry.groups),
            "units": sum(int(p.size) for p in found.permutations.values()),
            "units_moved": sum(int((p != i).sum()) for p, i in _beside(found.permutations, symmetry.identity())),
            "sweeps": found.sweeps,
            "converged": found.converged,
            "distance_before": before,
            "distance_after": after,
            "unmatched": list(found.unmatched),
            "unknown_operations": dict(symmetry.unknown),
            "seconds": round(found.seconds, 2),
        }


def align_text(facts: Mapping[str, Any]) -> str:
    """The report in words."""
    share = 100 * (1 - facts["distance_after"] / facts["distance_before"]) if facts["distance_before"] else 0.0
    lines = [
        f"{facts['units_moved']:,} of {facts['units']:,} units in {facts['groups']} groups moved; "
        f"the distance fell from {facts['distance_before']:.4g} to {facts['distance_after']:.4g} ({share:.1f}%).",
        f"Wrote {facts['tensors']} tensors to {facts['output']}: the same function, ready to be merged.",
    ]
    if not facts["converged"]:
        lines.append("The descent was stopped before it converged.")
    if facts["unmatched"]:
        lines.append(f"In their old order, for nothing is known of them: {', '.join(facts['unmatched'])}.")
    return "\n".join(lines)


def _as_checkpoint(name: str, own: Checkpoint, moved: Mapping[str, Any]) -> Checkpoint:
    """The model with moved tensors in the place of its own; aliases stay aliases."""
    import xxhash

    new = from_mapping({n: t for n, t in moved.items() if t is not own[n]})
    hashed = xxhash.xxh3_128(own.fingerprint.encode())
    for tensor in new.values():
        hashed.update(tensor.bits().tobytes())
    tensors = {n: new.get(n, t) for n, t in own.items()}
    return replace(own, name=name, tensors=tensors, fingerprint=hashed.hexdigest())


def _beside(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [(a[name], b[name]) for name in a]
