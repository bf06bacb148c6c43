"""The same tensors through mergekit's own methods: linear, TIES and everything that works on task vectors.

Where mergekit draws random numbers it is given weft's, so that both drop the same elements.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from weft.engine.merging import MergeMethod, merge_tensors
from weft.kernels.random import Stream
from weft.registry import methods

pytest.importorskip("mergekit")

Peer = Callable[..., torch.Tensor]
SHAPES = [(64, 48), (301,), (1, 7), (5, 1, 9)]
WEIGHTS = [0.5, 2.0, 0.75]
NAMES = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "sce",
    "ram",
    "ramplus_tl",
]
# Both sides add up the same terms in float32, in another order and with other intermediate results. Sixteen half units
# of rounding in the sum of the magnitudes is more than three models can collect, and far less than one wrong element.
ROUNDINGS = 16


@pytest.fixture(scope="module")
def peer() -> Peer:
    """``peer("ties", tensors, base, density=0.5)`` as mergekit computes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its dependencies, at import
        from mergekit.merge_methods.api import merge_tensors as merge

    def call(
        method: str, tensors: list[torch.Tensor], base: torch.Tensor | None = None, **parameters: Any
    ) -> torch.Tensor:
        if base is None:
            return merge(tensors, method, parameters=parameters)
        return merge([base, *tensors], method, parameters=parameters, base_index=0)

    return call


def inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and three models, whose changes are exact and of distinct magnitudes: mergekit breaks ties by chance."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    base = torch.from_numpy(np.float32(np.round(rng.standard_normal(shape) * 64) / 64))
    changes = [(rng.permutation(size) + 1) * rng.choice([-1, 1], size) * 2.0**-12 for _ in WEIGHTS]
    return base, [base + torch.from_numpy(c.astype(np.float32)).reshape(shape) for c in changes]


def compare(
    row: MergeMethod, theirs: torch.Tensor, tensors: list[torch.Tensor], base: torch.Tensor | None, **values: Any
) -> None:
    """Hold weft's result against ``theirs``, within the rounding of the largest sum that can occur."""
    ours = merge_tensors(row, tensors, row.configure(values), base=base)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    magnitude = sum(w * t.abs().max().item() for w, t in zip(WEIGHTS, tensors))
    if base is not None:  # a change is enlarged at most sixfold here
        magnitude = base.abs().max().item() + 6 * sum(
            w * (t - base).abs().max().item() for w, t in zip(WEIGHTS, tensors)
        )
    assert (ours - theirs).abs().max().item() <= ROUNDINGS * 2.0**-24 * magnitude


def share_random_numbers(monkeypatch: pytest.MonkeyPatch, row: MergeMethod) -> None:
    """Let ``torch.bernoulli`` draw, for one model after another, what ``row`` draws."""
    stream, lanes = Stream(0, row.name, "tensor"), iter(range(len(WEIGHTS)))

    def bernoulli(probability: torch.Tensor) -> torch.Tensor:
        drawn = stream.uniform(0, probability.numel(), next(lanes))
        return (torch.from_numpy(drawn).reshape(probability.shape) < probability).to(probability.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(peer: Peer, shape: tuple[int, ...], normalize: bool) -> None:
    _, tensors = inputs(shape)
    theirs = peer("linear", tensors, weight=WEIGHTS, normalize=normalize)
    compare(methods()["linear"], theirs, tensors, None, weights=WEIGHTS, normalize=normalize)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(peer: Peer, shape: tuple[int, ...], normalize: bool) -> None:
    base, tensors = inputs(shape)
    weights = [0.5, 2.0, -0.75]
    theirs = peer("task_arithmetic", tensors, base, weight=weights, normalize=normalize, **{"lambda": 1.5})
    values = {"weights": weights, "normalize": normalize, "lambda": 1.5}
    compare(methods()["task_arithmetic"], theirs, tensors, base, **values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(peer: Peer, shape: tuple[int, ...], density: float, normalize: bool) -> None:
    base, tensors = inputs(shape)
    theirs = peer("ties", tensors, base, weight=WEIGHTS, density=density, normalize=normalize)
    values = {"weights": WEIGHTS, "density": density, "normalize": normalize}
    compare(methods()["mergekit/ties"], theirs, tensors, base, **values)


def test_ties_rescaled(peer: Peer) -> None:
    base, tensors = inputs((64, 33))
    theirs = peer("ties", tensors, base, weight=WEIGHTS, density=0.3, rescale=True)
    compare(methods()["mergekit/ties"], theirs, tensors, base, weights=WEIGHTS, density=0.3, rescale=True)


def test_ties_with_a_density_for_each_model(peer: Peer) -> None:
    base, tensors = inputs((64, 48))
    theirs = peer("ties", tensors, base, weight=WEIGHTS, density=[0.2, 0.5, 0.9])
    compare(methods()["mergekit/ties"], theirs, tensors, base, weights=WEIGHTS, density=[0.2, 0.5, 0.9])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_dare(
    peer: Peer, name: str, shape: tuple[int, ...], rescale: bool, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tensors = inputs(shape)
    row = methods()[f"mergekit/{name}"]
    share_random_numbers(monkeypatch, row)
    theirs = peer(name, tensors, base, weight=WEIGHTS, density=density, rescale=rescale)
    compare(row, theirs, tensors, base, weights=WEIGHTS, density=density, rescale=rescale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("density", "gamma"), [(0.4, 0.1), (0.9, 0.3), (0.5, 0.0), (1.0, 0.1)])
def test_breadcrumbs(
    peer: Peer, name: str, shape: tuple[int, ...], rescale: bool, density: float, gamma: float
) -> None:
    base, tensors = inputs(shape)
    theirs = peer(name, tensors, base, weight=WEIGHTS, density=density, gamma=gamma, rescale=rescale)
    values = {"weights": WEIGHTS, "density": density, "gamma": gamma, "rescale": rescale}
    compare(methods()[f"mergekit/{name}"], theirs, tensors, base, **values)
    compare(methods()[name], theirs, tensors, base, **values)


@pytest.mark.parametrize("shape", [(64, 48), (301,), (1, 7)])
@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_della(
    peer: Peer, name: str, shape: tuple[int, ...], rescale: bool, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tensors = inputs(shape)
    row = methods()[f"mergekit/{name}"]
    share_random_numbers(monkeypatch, row)
    theirs = peer(name, tensors, base, weight=WEIGHTS, density=density, rescale=rescale)
    compare(row, theirs, tensors, base, weights=WEIGHTS, density=density, rescale=rescale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("select_topk", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("change", [1.0, 1e-3])  # the second is below mergekit's floor
def test_sce(peer: Peer, shape: tuple[int, ...], select_topk: float, change: float) -> None:
    base, tensors = inputs(shape)
    tensors = [change * (base + (i + 1) * (t - base)) for i, t in enumerate(tensors)]
    base = change * base
    theirs = peer("sce", tensors, base, select_topk=select_topk)
    compare(methods()["mergekit/sce"], theirs, tensors, base, select_topk=select_topk)
    if change == 1:
        compare(methods()["sce"], theirs, tensors, base, select_topk=select_topk)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_ram(peer: Peer, shape: tuple[int, ...], epsilon: float) -> None:
    base, tensors = inputs(shape)
    compare(methods()["ram"], peer("ram", tensors, base, epsilon=epsilon), tensors, base, epsilon=epsilon)
    values = {"epsilon": epsilon, "r": 0.5, "alpha": 0.7}
    compare(methods()["ramplus_tl"], peer("ramplus_tl", tensors, base, **values), tensors, base, **values)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_s_unsaid_parameters_mean_the_same(peer: Peer, name: str) -> None:
    from mergekit.merge_methods import get

    row = methods().get(f"mergekit/{name}", methods()[name])
    ours = {p.per_model or key: p for key, p in row.parameters.items()}
    theirs = {spec.name: spec for spec in get(name).spec.parameters}
    for key in ours.keys() & theirs.keys():
        assert theirs[key].required or ours[key].default == theirs[key].default, key
    # int8_mask saves memory in mergekit; task arithmetic drops nothing, so that density and rescale do nothing there
    unused = {"int8_mask", "density", "rescale"} if name == "task_arithmetic" else {"int8_mask"}
    assert theirs.keys() - ours.keys() <= unused
