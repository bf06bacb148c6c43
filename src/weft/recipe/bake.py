"""``weft bake``: a base and adapters become one plain model, which is published after a probe."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.checkpoint.adapter import with_adapter
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.fingerprint import check_base as check_fingerprint
from weft.checkpoint.open import open_checkpoint, open_path
from weft.engine.run import Options, execute
from weft.errors import RecipeError, VerificationError
from weft.recipe.opened import Opened
from weft.recipe.probe import CannotRunError, probe_outputs, probe_products, read_texts
from weft.recipe.run import make_plan

Source = str | os.PathLike[str] | Checkpoint


@dataclass
class Baked:
    """What ``bake`` did.

    Attributes:
        output: the model.
        tensors: written in this run.
        resumed: kept from an interrupted one.
        bytes: of the model's tensors.
        seconds: that it took, the probe included.
        base: what is known of each adapter's base, by adapter.
        probe: what :mod:`weft.recipe.probe` found; empty if it was not asked for.
        notes: what else there is to know.
    """

    output: str
    tensors: int
    resumed: int
    bytes: int
    seconds: float
    base: dict[str, str] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def bake(
    base: Source,
    adapters: Sequence[tuple[Source, float]],
    output: str | os.PathLike[str],
    *,
    dtype: str = "",
    shard_size: str = "5GB",
    check_base: bool = True,
    probe: bool = True,
    data: str = "",
    seed: int = 0,
    max_change: float = math.inf,
    options: Options | None = None,
) -> Baked:
    """Write a base with adapters as one plain model: added in float32, one after the other, and rounded once.

    Memory stays in the options' budget whatever the model's size; an interrupted run goes on with the same call.

    Args:
        base: the model that the adapters were trained on.
        adapters: folders of PEFT or of weft, with the number that each one's change is multiplied by.
        output: a folder to make, or one file if it ends in ``.safetensors``.
        dtype: of the output; by default as the base.
        shard_size: of the largest file.
        check_base: compare the base with the fingerprint in an adapter's ``weft.json``.
        probe: compare the result with the base and its live adapters before it gets its name.
        data: texts for the probe, a JSON-lines file; by default random tokens.
        seed: of the probe.
        max_change: the largest change that the probe may find, as a share of the largest output.
        options: threads, memory, progress.

    Raises:
        CheckpointError: an adapter is damaged or was trained on another base.
        VerificationError: the probe found more than ``max_change``, or NaN; nothing is published.

    >>> import numpy as np, tempfile, weft
    >>> from weft.checkpoint.memory import from_mapping
    >>> A, B = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
    >>> adapter = from_mapping({"fc.lora_A.weight": A, "fc.lora_B.weight": B}, "adapter")
    >>> adapter.config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    >>> folder = tempfile.mkdtemp()
    >>> done = bake(weft.open({"fc.weight": np.zeros((2, 3), np.float32)}), [(adapter, 0.5)], f"{folder}/out")
    >>> done.probe["kind"], done.probe["change"] < 1e-6
    ('products', True)
    """
    if not adapters:
        raise RecipeError("Baking needs at least one adapter; `weft convert` copies a model.")
    for _, weight in adapters:
        if not math.isfinite(weight):
            raise RecipeError(f"An adapter's weight must be a finite number, got {weight!r}.")
    if data:
        read_texts(data)  # what is wrong with it is better known now
    options = options or Options()
    with ExitStack() as held:

        def enter(model: Source) -> Checkpoint:
            return model if isinstance(model, Checkpoint) else held.enter_context(open_checkpoint(model))

        start = enter(base)
        chosen = [(enter(adapter), float(weight)) for adapter, weight in adapters]
        known = {}
        whole = start
        for adapter, weight in chosen:
            whole = with_adapter(whole, adapter, weight)
            known[adapter.name if adapter.name not in known else whole.name] = (
                check_fingerprint(adapter, start) if check_base else "not checked, as asked"
            )
        found: dict[str, Any] = {}

        def verify(files: Path) -> Mapping[str, Any]:
            found.update(_probe(start, chosen, files, options.memory, seed, data))
            worst = found["change"]
            if not worst <= max_change:  # NaN is not
                where = f" (most in {found['worst']})" if found.get("worst") else ""
                if math.isnan(worst):
                    raise VerificationError(
                        f"{output}: the baked model gives NaN or infinity{where}; nothing was published. The base "
                        "or an adapter holds such values (weft inspect shows where), or the sum is too large for the dtype."
                    )
                raise VerificationError(
                    f"{output}: the baked model changes outputs by {worst:.3g} where at most {max_change:g} of the largest is "
                    f"allowed{where}; "
                    "nothing was published. Bake in a wider dtype, or raise max_change."
                )
            return {"adapters": _named(chosen), "probe": found}

        options.verify = verify if probe else lambda files: {"adapters": _named(chosen)}
        step = {"method": "passthrough", "models": [whole.name], "exclude": ["*"]}
        made = {"shard_size": shard_size, **({"dtype": dtype} if dtype else {})}
        # NaN of the base's own is let through; the probe looks at what is made
        recipe = {"steps": [step], "output": made, "allow_non_finite": True}
        opened = Opened(given={whole.name: whole})
        plan = make_plan(recipe, opened, output, options=options)
        plan.identity["paths"] += [
            str(c.folder.resolve()) for c in (start, *(a for a, _ in chosen)) if c.folder is not None
        ]
        if start.config.get("tie_word_embeddings") and whole.config.get("tie_word_embeddings") is False:
            plan.notes.append(
                "embedding and output layer were one tensor and are two now: an adapter changes one of them"
            )
        result = execute(plan, output, options)
        if probe and not found:
            result.notes.append("this very run was published before it was interrupted; its probe is in weft.json")
    return Baked(
        str(output), result.tensors, result.resumed, result.nbytes, round(result.seconds, 2), known, found, result.notes
    )


def _named(adapters: Sequence[tuple[Checkpoint, float]]) -> list[dict[str, Any]]:
    return [{"name": adapter.name, "weight": weight} for adapter, weight in adapters]


def _probe(
    base: Checkpoint, adapters: Sequence[tuple[Checkpoint, float]], files: Path, memory: int, seed: int, data: str
) -> dict[str, Any]:
    try:
        return probe_outputs(base, adapters, files, memory=memory, seed=seed, data=data)
    except CannotRunError as error:
        single = [p for p in files.iterdir() if p.suffix == ".safetensors"]
        with open_path(files if (files / "config.json").is_file() or len(single) != 1 else single[0]) as made:
            return probe_products(base, adapters, made, seed=seed) | {"why_not_outputs": str(error)}


def probe_text(probe: Mapping[str, Any]) -> str:
    """A line or two on what the probe found.

    >>> probe_text({"kind": "products", "change": 1e-3, "worst": "a", "tensors": 2, "by_value": 0, "on": "vectors"})
    'probe: 2 changed weights times vectors: off by at most 0.001 of the largest product (a)'
    """
    if not probe:
        return "probe: not run"
    if probe["kind"] == "outputs":
        return (
            f"probe: outputs on {probe['positions']} positions ({probe['on']}) are off by at most {probe['change']:.3g} of the "
            f"largest, the top choice is the same at {probe['top1']:.2%}"
        )
    by_value = f", {probe['by_value']} of them value by value" if probe["by_value"] else ""
    why = f"\n  outputs were not compared: {probe['why_not_outputs']}" if probe.get("why_not_outputs") else ""
    return (
        f"probe: {probe['tensors']} changed weights times {probe['on']}{by_value}: off by at most {probe['change']:.3g} of "
        f"the largest product ({probe['worst']}){why}"
    )
