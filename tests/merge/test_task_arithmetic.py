"""Task arithmetic: learning, forgetting, and the same bits whatever the chunking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_vector_oracles import SHAPES, add_up, close, models

import weft.engine.chunks as chunks
from weft.engine.merging import merge_tensors
from weft.errors import RecipeError
from weft.merge.task_arithmetic import METHODS, TaskArithmetic, task_arithmetic

WEIGHTS = [0.5, 2.0, -0.75]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_equation(shape: tuple[int, ...], normalize: bool) -> None:
    deltas = models(3, shape)
    merged = task_arithmetic(deltas, weights=WEIGHTS, normalize=normalize, lambda_=1.5)
    magnitude = add_up([np.abs(d) for d in deltas], np.abs(WEIGHTS), False, 1.5)
    # a rounding for each weight, product and sum
    close(merged, add_up(deltas, WEIGHTS, normalize, 1.5), 3 * 3, magnitude / (sum(WEIGHTS) if normalize else 1))


def test_adding_and_taking_away_is_nothing() -> None:
    base, fine_tune = models(2, (8, 9))
    for weights in ([1.0, -1.0], [0.3, -0.3]):
        config = TaskArithmetic(weights=weights)
        np.testing.assert_array_equal(merge_tensors(METHODS[0], [fine_tune] * 2, config, base=base), base)


def test_weight_one_gives_the_fine_tune_and_minus_one_its_mirror_image() -> None:
    base, fine_tune = [np.float32(np.round(m * 64)) for m in models(2, (63,))]
    row = METHODS[0]
    np.testing.assert_array_equal(merge_tensors(row, [fine_tune], TaskArithmetic(), base=base), fine_tune)
    forgotten = merge_tensors(row, [fine_tune], TaskArithmetic(weights=-1.0), base=base)
    np.testing.assert_array_equal(forgotten, 2 * base - fine_tune)


def test_equal_models_normalised_are_one_model() -> None:
    (delta,) = models(1, (21,))
    np.testing.assert_array_equal(task_arithmetic([delta] * 4, normalize=True), delta)


def test_weights_that_sum_to_zero_are_not_divided() -> None:
    deltas = models(2, (5,))
    np.testing.assert_array_equal(
        task_arithmetic(deltas, weights=[1, -1], normalize=True), task_arithmetic(deltas, weights=[1, -1])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    base, *fine_tunes = [torch.from_numpy(m).to(dtype) for m in models(3, (11, 13))]
    merged = merge_tensors(METHODS[0], fine_tunes, TaskArithmetic(weights=0.5), base=base)
    exact = base.float() + (0.5 * (fine_tunes[0].float() - base.float()) + 0.5 * (fine_tunes[1].float() - base.float()))
    assert torch.equal(merged, exact.to(dtype))


@pytest.mark.parametrize("chunk", [4, 64])
def test_same_bits_at_any_chunking(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = models(3, (1031,))
    whole = task_arithmetic(deltas, weights=WEIGHTS)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    np.testing.assert_array_equal(task_arithmetic(deltas, weights=WEIGHTS), whole)


def test_needs_a_base() -> None:
    with pytest.raises(RecipeError, match="base"):
        merge_tensors(METHODS[0], models(2, (3,)), TaskArithmetic())
