"""``save_adapter`` and ``load_adapter_``: an adapter of a live model as a folder, and back, bit for bit.

Three forms: a folder of PEFT, which its users load; LoRA factors that are exactly the same change, for those who serve
LoRA alone; and a folder of weft's own for what PEFT cannot say. ``weft.json`` beside them has the versions and the
fingerprint of the base, so that an adapter is not put on another model without a word.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft import __version__
from weft.adapt.attach import check_name
from weft.adapt.peft_folder import CannotSayError, read_peft, write_peft
from weft.adapt.switch import remove_
from weft.adapt.weft_folder import read_weft, weft_files, write_weft
from weft.adapt.weights import AdaptedWeight, Stored, adapted_weights, base_of, plain_tensors, put_on
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.fingerprint import Fingerprint, another_base, differing, fingerprint_of, recorded_base
from weft.checkpoint.live_names import names_of_model
from weft.checkpoint.lora_folder import CONFIG_FILE, WEFT_CONFIG, WEFT_WEIGHTS, open_adapter
from weft.checkpoint.memory import from_mapping
from weft.engine.adapter_writer import AdapterWriter
from weft.errors import CheckpointError, OutputError, RecipeError, did_you_mean
from weft.function.classes import unwrapped
from weft.function.stack import gathered, is_sharded

FORMS = ("auto", "peft", "lora", "weft")


@dataclass
class SavedAdapter:
    """What ``save_adapter`` wrote.

    Attributes:
        folder: where.
        form: "peft", "lora" or "weft".
        why: the reason where it is not the one that PEFT loads; empty otherwise.
        tensors: number of them in the file.
        nbytes: their bytes.
        notes: what else there is to know.
    """

    folder: Path
    form: str
    why: str
    tensors: int
    nbytes: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        size = f"{self.tensors} tensors, {self.nbytes:,} bytes"
        why = f" ({self.why})" if self.why else ""
        return "\n".join([f"{self.folder}: {size}, in the form {self.form}{why}", *self.notes])


@dataclass
class LoadedAdapter:
    """What ``load_adapter_`` put on a model.

    Attributes:
        name: of the adapter in the model.
        form: "peft" or "weft".
        weights: full names of the weights that it changes.
        loaded: keys of the file that were used: all of them, or nothing is loaded.
        base: what is known of the base: "the same", "not checked …", or why.
        parameters: how many numbers the adapter has.
        notes: what else there is to know.
    """

    name: str
    form: str
    weights: list[str]
    loaded: list[str]
    base: str
    parameters: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        first = f"{self.name}: {len(self.loaded)} tensors on {len(self.weights)} weights; base: {self.base}"
        return "\n".join([first, *self.notes])


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    form: str = "auto",
    base: str = "",
    force: bool = False,
) -> SavedAdapter:
    """Write one adapter of a model as a folder; the folder appears complete or not at all.

    Args:
        model: that has it; nothing of it is changed. If it is sharded, every process must call this, and the first one
            writes.
        folder: to make.
        name: of the adapter.
        form: "peft": what PEFT loads and goes on training; "lora": factors that are exactly this change, for methods that
            have them, at the scale 1; "weft": weft's own, which holds everything; "auto": peft if it can say the adapter.
        base: what to call the base in the folder; by default what the model says of itself, without its path.
        force: replace a folder that weft made.

    Raises:
        RecipeError: there is no such adapter, or the form cannot say it; the message says why.
        OutputError: the folder exists or cannot be written.

    >>> import tempfile, weft
    >>> model, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp() + "/mine"
    >>> _ = weft.adapt_(model, weft.adapt.LoRA(rank=1), where="*")
    >>> report = save_adapter(model, folder)
    >>> report.form, report.tensors
    ('peft', 2)
    >>> again = nn.Sequential(nn.Linear(4, 4))
    >>> _ = again.load_state_dict(weft.plain_state_dict(model))
    >>> load_adapter_(again, folder).base
    'the same'
    """
    if form not in FORMS:
        raise RecipeError(f"An adapter has no form {form!r}.{did_you_mean(form, FORMS)}")
    weights = adapted_weights(model, name)
    base = base or _called(model)
    why, config, tensors = "", None, None
    if form in ("auto", "peft", "lora"):
        try:
            config, tensors = write_peft(model, weights, convert=form == "lora", base=base)
        except CannotSayError as error:
            why = str(error)
            if form != "auto":
                instead = 'form="lora" writes its exact factors where there are any, ' if form == "peft" else ""
                raise RecipeError(
                    f'The adapter {name!r} has no form {form!r}: {why}. {instead}form="weft" holds every adapter, and '
                    "weft.save writes the baked model."
                ) from None
    made = form if form != "auto" else "peft" if config is not None else "weft"
    own = made == "weft"
    if own:
        config, tensors = write_weft(weights)
    assert config is not None
    assert tensors is not None
    files = {"weights_file": WEFT_WEIGHTS, "config_file": f"{WEFT_CONFIG}.json"} if own else {}
    opened = from_mapping({n: _whole(n, t) for n, t in tensors.items()})
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        warnings.warn(
            f"the adapter {name!r} holds NaN or infinity ({_some(bad)}): its training diverged. It is saved as it is, and "
            "will not load; go back to an earlier checkpoint, and train with a lower learning rate.",
            stacklevel=2,
        )
    report = _side_file(model, weights, made, base)
    target = Path(os.path.abspath(Path(folder).expanduser()))
    if not _is_sharded(model) or torch.distributed.get_rank() == 0:
        with AdapterWriter(target, force=force, **files) as writer:
            for key, tensor in opened.items():
                writer.add(key, tensor.bits(), tensor.dtype, tensor.shape)
            writer.publish(config, report)
    strength = {f.strength for w in weights for f in w.functions}
    notes = [f"NaN or infinity in {_some(bad)}"] if bad else []
    notes += [f"its strength of {s:g} is not saved: a folder holds it as trained" for s in strength if s != 1]
    return SavedAdapter(target, made, why, len(opened), opened.nbytes, notes)


def load_adapter_(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    train: bool = False,
    dtype: str = "stored",
    check_base: bool = True,
) -> LoadedAdapter:
    """Put an adapter from a folder on a model, in place, and freeze the model; all of it, or nothing.

    Reads folders of PEFT (LoRA, rsLoRA and MiSS with modules_to_save and trainable tokens; safetensors or ``.bin``) and
    weft's own. PEFT's DoRA and biases of factors are no functions here; ``weft bake`` merges them.

    Args:
        model: the base that it was trained on.
        folder: that ``save_adapter`` or PEFT's ``save_pretrained`` wrote.
        name: to give it in the model.
        train: whether its parameters train.
        dtype: "stored": of the parameters as they are in the file; "float32": at least that, for training.
        check_base: compare the base with the fingerprint in ``weft.json``.

    Raises:
        CheckpointError: the file is damaged or not complete, holds NaN or infinity, a tensor has no place in the model
            or another shape, or the model is another one than the adapter was trained on. The model is then as before.
        RecipeError: the model has an adapter of this name.
    """
    check_name(model, name)
    if dtype not in ("stored", "float32"):
        raise RecipeError(f"dtype is 'stored' or 'float32', got {dtype!r}.")
    path = Path(folder)
    if not (path / CONFIG_FILE).is_file() and not weft_files(path):
        raise CheckpointError(
            f"{path}: holds no {CONFIG_FILE} and no {WEFT_CONFIG}.json, so it is no adapter's folder.{_inner(path)} Give the "
            "folder that save_adapter or PEFT's save_pretrained wrote."
        )
    with open_adapter(path) as adapter:
        own = weft_files(path)
        stored, notes = (_renamed(model, read_weft(adapter), path.name), []) if own else read_peft(model, adapter)
        keys = list(adapter)
        known = _base_known(model, path, adapter, stored, check_base)
    _places_there(model, stored, path.name)
    _refuse_not_finite(stored, path.name)
    put_on(model, stored, name)
    mine = {id(f): f for w in adapted_weights(model, name) for f in w.functions}
    parameters = {id(p): p for f in mine.values() for p in f.parameters()}
    for parameter in parameters.values():
        if not parameter.is_floating_point() or not parameter.requires_grad:
            continue
        if dtype == "float32":
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(train)
    count = sum(p.numel() for p in parameters.values())
    return LoadedAdapter(name, "weft" if own else "peft", list(stored), keys, known, count, notes)


def restore_adapter_(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default", check_base: bool = True
) -> None:
    """Set the values of an adapter that a model has to those of a folder, in place; an optimizer keeps its parameters.

    Args:
        model: with the adapter as it was when it was saved.
        folder: that ``save_adapter`` wrote.
        name: of the adapter in the model.
        check_base: compare the base with the fingerprint in ``weft.json``.

    Raises:
        RecipeError: the model has no adapter of this name.
        CheckpointError: the folder's adapter is on other weights, of another method or shape, or holds NaN or infinity.

    >>> import tempfile, weft
    >>> model, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp() + "/mine"
    >>> _ = weft.adapt_(model, weft.adapt.LoRA(rank=1), where="*")
    >>> _ = save_adapter(model, folder)
    >>> factor = model[0].parametrizations.weight[0].B
    >>> _ = nn.init.ones_(factor)
    >>> restore_adapter_(model, folder)
    >>> factor.sum().item()
    0.0
    """
    mine = {w.names[0]: w.functions for w in adapted_weights(model, name)}
    own = weft_files(Path(folder))
    with open_adapter(Path(folder)) as adapter:
        stored = _renamed(model, read_weft(adapter), Path(folder).name) if own else read_peft(model, adapter)[0]
        _base_known(model, Path(folder), adapter, stored, check_base)
        spare = f"{name} (being restored)"
    _places_there(model, stored, Path(folder).name)
    _refuse_not_finite(stored, Path(folder).name)
    put_on(model, stored, spare)
    try:
        theirs = {w.names[0]: w.functions for w in adapted_weights(model, spare)}
        if mine.keys() != theirs.keys():
            other = sorted(mine.keys() ^ theirs.keys())
            raise CheckpointError(
                f"{folder}: is on other weights than the adapter {name!r}: {other[0]} and {len(other) - 1} more are on one "
                "side only. Attach the adapter as it was when it was saved."
            )
        pairs = [(full, f, g) for full in mine for f, g in zip(mine[full], theirs[full], strict=True)]
        for full, function, saved in pairs:
            ours, values = function.state_dict(), saved.state_dict()
            if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in values.items()}:
                raise CheckpointError(
                    f"{folder}: on {full} it has {_shapes(values)}, and the adapter {name!r} has {_shapes(ours)}. Attach the "
                    "adapter as it was when it was saved."
                )
        for _, function, saved in pairs:
            function.load_state_dict(saved.state_dict())
    finally:
        remove_(model, spare)


def _refuse_not_finite(stored: Mapping[str, list[Stored]], where: str) -> None:
    bad = [
        f"{full}, {name}"
        for full, several in stored.items()
        for one in several
        for name, t in one.tensors.items()
        if t.is_floating_point() and not bool(t.isfinite().all())
    ]
    if bad:
        raise CheckpointError(
            f"{where}: holds NaN or infinity ({_some(bad)}), and so would everything that the model computes. Its training "
            "diverged, or the file is damaged; take an earlier checkpoint."
        )


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _shapes(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{n} {list(t.shape)}" for n, t in state.items())


def _inner(path: Path) -> str:
    """PEFT keeps adapters that are not called default in folders of their names."""
    inner = sorted(p.parent.name for n in (CONFIG_FILE, f"{WEFT_CONFIG}.json") for p in path.glob(f"*/{n}"))
    return f" Its subfolder {inner[0]!r} is one." if inner else ""


def _renamed(model: nn.Module, stored: dict[str, list[Stored]], where: str) -> dict[str, list[Stored]]:
    """With the model's names for the weights of an adapter that was made when transformers had others."""
    held = plain_tensors(model)
    lost = [n for n in stored if n not in held]
    names = names_of_model(unwrapped(model), held) if lost else None
    if names is None:
        return stored
    new = names.places(lost, held, where)

    def called(several: list[Stored]) -> list[Stored]:
        return [
            dataclasses.replace(s, shared={n: (new.get(w, w), i, t) for n, (w, i, t) in s.shared.items()})
            for s in several
        ]

    return {new.get(full, full): called(several) for full, several in stored.items()}


def _places_there(model: nn.Module, stored: Mapping[str, list[Stored]], where: str) -> None:
    held = plain_tensors(model)
    missing = [n for n in stored if n not in held]
    if missing:
        raise CheckpointError(
            f"{where}: the model has no {missing[0]!r}, which the adapter changes ({len(missing)} of {len(stored)} are not "
            f"found).{did_you_mean(missing[0], held)} The adapter was trained on another model."
        )


def _whole(name: str, tensor: Tensor) -> Tensor:
    if not tensor.numel() or tensor.is_meta:
        raise OutputError(
            f"{name} is empty here {list(tensor.shape)}: the model is sharded or has no values yet. Gather it first, or save "
            "from the process that holds it."
        )
    return tensor.detach().cpu().contiguous()


def _is_sharded(model: nn.Module) -> bool:
    return any(map(is_sharded, unwrapped(model).parameters()))


def _side_file(model: nn.Module, weights: list[AdaptedWeight], form: str, base: str) -> dict[str, Any]:
    prints = {w.names[0]: fingerprint_of(gathered(base_of(w.stack))) for w in weights}
    return {
        "format": 1,
        "form": form,
        "weft": __version__,
        "torch": torch.__version__.partition("+")[0],
        "model": type(unwrapped(model)).__name__,
        "base": {"name": base, "tensors": {n: list(p) for n, p in prints.items()}},
    }


def _called(model: nn.Module) -> str:
    """What a model says it is, without a path of this machine."""
    said = str(getattr(getattr(unwrapped(model), "config", None), "_name_or_path", "") or "")
    local = os.path.isabs(said) or said.startswith((".", "~")) or os.sep != "/" or os.path.exists(said)
    return os.path.basename(said.rstrip("/\\")) if local else said


def _base_known(model: nn.Module, path: Path, adapter: Checkpoint, stored: Mapping[str, Any], check: bool) -> str:
    """Whether the model is the base; what is known of it."""
    said = recorded_base(path)
    if not said:
        name = str(adapter.config.get("base_model_name_or_path") or "")
        mine = _called(model)
        if name and mine and os.path.basename(name.rstrip("/")) != os.path.basename(mine):
            return f"not checked: the adapter names {name!r}, the model calls itself {mine!r}"
        return "not checked: the folder has no fingerprint of it"
    if not check:
        return "not checked, as asked"
    held = plain_tensors(model)
    place = {n: n for n in said if n in held}
    names = names_of_model(unwrapped(model), held) if len(place) < len(said) else None
    if names is not None:
        place = names.places(said, held) | place
    found: dict[str, Fingerprint] = {n: fingerprint_of(base_of(held[p])) for n, p in place.items()}
    other = differing(said, found)
    if other:
        raise CheckpointError(another_base(path.name, other, len(found)))
    return "the same" if found else "not checked: the model has other names"
