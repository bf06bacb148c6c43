import math

import pytest
import torch
from torch.nn import functional

from weft.errors import RecipeError
from weft.init import constrained_word2vec
from weft.init.constrained_word2vec import _pairs, _rows

OLD, NEW, WIDTH = 12, 5, 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, OLD, WIDTH, generator=seeded(), dtype=torch.float64).unbind())


SOURCE = torch.tensor([3, -1, 0, -1, 11, 5, -1, -1, 7, -1])  # ids of a new vocabulary, old and new mixed
TEXT = [torch.randint(len(SOURCE), (60,), generator=seeded(i)).tolist() for i in range(4)]


@pytest.mark.parametrize("tied", [False, True])
def test_no_steps_are_the_mean(tied: bool) -> None:
    table, output = tables()
    mixes = constrained_word2vec(table, None if tied else output, SOURCE, TEXT, steps=0)
    assert len(mixes) == (1 if tied else 2)
    for mix in mixes:
        torch.testing.assert_close(mix, torch.full((NEW, OLD), 1 / OLD, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_one_step_is_adam_on_the_whole_loss(tied: bool, weight: float) -> None:
    """Brute force: all rows through the softmax, the loss pair by pair as it is written, the same draws."""
    table, output = tables()
    rank, window, count, negatives, rate = 3, 2, 16, 3, 0.05
    options = {"rank": rank, "window": window, "batch_size": count, "negatives": negatives, "learning_rate": rate}
    found = constrained_word2vec(
        table, None if tied else output, SOURCE, TEXT, steps=2, negative_weight=weight, generator=seeded(), **options
    )
    generator = seeded()
    frozen = [table] if tied else [table, output]
    right = [torch.randn(rank, OLD, generator=generator, dtype=torch.float64) / math.sqrt(rank) for _ in frozen]
    left = [torch.zeros(NEW, rank, dtype=torch.float64) for _ in frozen]
    parameters = [p.requires_grad_() for p in left + right]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    flat = torch.tensor(TEXT).flatten()
    sequence = torch.arange(4).repeat_interleave(60)
    noise = torch.tensor([sum(s.count(i) for s in TEXT) ** 0.75 for i in range(len(SOURCE))], dtype=torch.float64)
    for _ in range(2):
        centre, context = _pairs(flat, sequence, window, count, generator)
        drawn = torch.multinomial(noise, len(centre) * negatives, replacement=True, generator=generator)
        whole = []
        for old, a1, a2 in zip(frozen, left, right):
            rows, made = torch.empty(len(SOURCE), WIDTH, dtype=torch.float64), (a1 @ a2).softmax(dim=1) @ old
            rows = torch.stack([made[int((SOURCE[:i] < 0).sum())] if s < 0 else old[s] for i, s in enumerate(SOURCE)])
            whole.append(rows)
        total = torch.zeros((), dtype=torch.float64)
        for i, (c, o) in enumerate(zip(centre, context)):
            total = total - functional.logsigmoid(whole[0][c] @ whole[-1][o])
            for n in drawn[i * negatives : (i + 1) * negatives]:
                total = total - weight / negatives * functional.logsigmoid(-(whole[0][c] @ whole[-1][n]))
        optimizer.zero_grad()
        (total / len(centre)).backward()
        optimizer.step()
    for mix, a1, a2 in zip(found, left, right, strict=True):
        torch.testing.assert_close(mix, (a1 @ a2).softmax(dim=1).detach(), rtol=1e-9, atol=1e-12)
        assert (mix - 1 / OLD).abs().max() > 1e-3  # it moved


def test_rows_of_a_batch_have_the_gradient_of_all_rows() -> None:
    table, _ = tables()
    place = torch.full((len(SOURCE),), -1)
    place[SOURCE < 0] = torch.arange(NEW)
    left = torch.randn(NEW, 4, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    right = torch.randn(4, OLD, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([1, 4, 1, 6, 0, 9])
    weight = torch.randn(6, WIDTH, generator=seeded(3), dtype=torch.float64)
    (_rows(tokens, SOURCE, place, table, left, right) * weight).sum().backward()
    sampled = left.grad.clone(), right.grad.clone()
    left.grad = right.grad = None
    made = (left @ right).softmax(dim=1) @ table
    whole = torch.stack([table[s] if s >= 0 else made[place[i]] for i, s in enumerate(SOURCE)])
    (whole[tokens] * weight).sum().backward()
    torch.testing.assert_close(sampled, (left.grad, right.grad))


def test_learns_what_a_new_token_stands_for() -> None:
    """A new token in all places of an old one: word2vec's rows for the old one are its best, so its coefficient grows."""
    size = 8
    # each token is followed by itself; the products that the loss asks for, log(1 / 2 / 0.11) = 1.5, are in reach
    table = 1.5 * torch.eye(size)
    source = torch.tensor([*range(size), -1])
    text = [[i, i, i, i] for i in range(size)] + [[2, size, 2, size], [size, 2, size, 2]]
    first, second = constrained_word2vec(
        table, table, source, text, steps=200, window=1, learning_rate=0.02, batch_size=128, generator=seeded()
    )
    assert first.argmax() == 2
    assert second.argmax() == 2
    assert first[0, 2] > 3 / size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_coefficients_are_convex_in_every_precision(dtype: torch.dtype) -> None:
    table, output = tables()
    wide = torch.promote_types(dtype, torch.float32)
    for mix in constrained_word2vec(table.to(dtype), output.to(dtype), SOURCE, TEXT, steps=20, generator=seeded()):
        assert mix.dtype == wide
        assert (mix >= 0).all()
        torch.testing.assert_close(mix.sum(dim=1), torch.ones(NEW, dtype=wide))


def test_more_pairs_and_negatives_than_tokens() -> None:
    table, _ = tables()
    (mix,) = constrained_word2vec(table, None, SOURCE, [[1, 3]], steps=2, batch_size=500, negatives=50)
    assert mix.shape == (NEW, OLD)


def test_tokens_that_the_text_lacks_stay_at_the_mean() -> None:
    table, output = tables()
    for mix in constrained_word2vec(table, output, SOURCE, [[1, 0, 2, 1]], steps=50, generator=seeded()):
        torch.testing.assert_close(mix[1:], torch.full((NEW - 1, OLD), 1 / OLD, dtype=torch.float64))
        assert (mix[0] - 1 / OLD).abs().max() > 1e-3


def test_subsampling_thins_frequent_tokens() -> None:
    from weft.init.constrained_word2vec import _flat

    text = [[0] * 8000 + [1] * 2000]
    ids, sequence = _flat(text, torch.zeros(2, dtype=torch.long), 0.2, seeded())
    # kept with probability sqrt(0.2 / 0.8) = 1 / 2 and 1: 4000 and 2000; 8000 coins scatter by 45
    assert (ids == 0).sum().item() == pytest.approx(4000, abs=4 * 45)
    assert (ids == 1).sum() == 2000
    assert len(sequence) == len(ids)


def test_pairs_are_within_the_window_and_within_a_sequence() -> None:
    ids = torch.arange(30)
    centre, context = _pairs(ids, torch.arange(3).repeat_interleave(10), 4, 20_000, seeded())
    assert (centre // 10 == context // 10).all()
    distance = torch.bincount((centre - context).abs())
    assert distance[0] == 0
    assert len(distance) == 5
    # pairs k apart: 10 - k of each 10 places in each direction
    expected = torch.tensor([9, 8, 7, 6]) / 30
    assert (distance[1:] / len(centre) - expected).abs().max() < 0.02


def test_refuses() -> None:
    table, output = tables()
    with pytest.raises(RecipeError, match="1 ids without a token"):
        constrained_word2vec(table, output, SOURCE, [[1, 10]])
    with pytest.raises(RecipeError, match="the first is -1"):
        constrained_word2vec(table, output, SOURCE, [[1, -1]])
    with pytest.raises(RecipeError, match="the first is 1"):
        constrained_word2vec(table, output, torch.tensor([0, -2, -1]), [[2, 1]])
    for text in ([], [[]], [[1], [2], [3]]):
        with pytest.raises(RecipeError, match="nothing to learn from"):
            constrained_word2vec(table, output, SOURCE, text)
    with pytest.raises(RecipeError, match="of one shape"):
        constrained_word2vec(table, output[:, :4], SOURCE, TEXT)
