import math

import pytest
import torch

from weft.errors import RecipeError, ShapeError
from weft.init import TransformOnce, TransformOnceLayer, dct, idct, spectral_variance_preserving_, transform_once


@pytest.mark.parametrize("keep_high", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_layer_against_loops(residual: bool, keep_high: bool) -> None:
    layer = TransformOnceLayer(3, modes=(2, 4), residual=residual, keep_high=keep_high).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    w, (s, t) = layer.channel_mixing, layer.frequency_mixing
    expected = x.clone() if keep_high else torch.zeros_like(x)
    for b in range(2):
        z = torch.stack(
            [torch.stack([torch.sin(w[:, :, i, j].T @ x[b, :, i, j]) for j in range(4)], -1) for i in range(2)], -2
        )
        for c in range(3):
            mixed = s[c] @ z[c] @ t[c].T
            expected[b, c, :2, :4] = mixed + (x[b, c, :2, :4] if residual else 0)
    torch.testing.assert_close(layer(x), expected)


def as_in_the_paper(model: TransformOnce, x: torch.Tensor) -> torch.Tensor:
    """Lift in signal space, transform all channels, carry zeros through all layers."""
    grid, axes = x.shape[2:], tuple(range(2, x.dim()))
    place = torch.meshgrid(*((torch.arange(n, dtype=x.dtype) + 0.5) / n for n in grid), indexing="ij")
    field = torch.cat([x, *(p.expand(len(x), 1, *grid) for p in place)], 1).movedim(1, -1)
    lift = model.lift.weight
    z = dct((field @ lift[:, :-1].T + lift[:, -1]).movedim(-1, 1), axes)
    z = model.layers(z)
    return idct(model.out(torch.sin(model.head(z.movedim(1, -1)))).movedim(-1, 1), axes)


@pytest.mark.parametrize(("size", "modes"), [((20,), (6,)), ((8, 11), (3, 5))])
def test_model_is_that_of_the_paper_without_its_detours(size: tuple[int, ...], modes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = TransformOnce(2, 3, size, modes, width=5, layers=3).double()
    torch.nn.init.normal_(model.out.weight)
    x = torch.randn(4, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(model(x), as_in_the_paper(model, x))
    axes = tuple(range(2, x.dim()))
    low = dct(model(x), axes)[(..., *(slice(m) for m in modes))]
    model.inverse = False
    torch.testing.assert_close(model(x), low)
    # so a loss on coefficients is the loss on fields, by Parseval, up to what lies above the modes
    y, model.inverse = torch.randn(4, 3, *size, dtype=torch.float64), True
    target = dct(y, axes)
    above = target.square().sum() - target[(..., *(slice(m) for m in modes))].square().sum()
    below = (low - target[(..., *(slice(m) for m in modes))]).square().sum()
    torch.testing.assert_close((model(x) - y).square().sum(), below + above)


def test_starts_near_zero_and_all_of_it_learns() -> None:
    torch.manual_seed(0)
    model = TransformOnce(1, 1, 64, 8, width=16, layers=3)
    x = torch.randn(4, 1, 64)
    y = model(x)
    assert 0 < y.abs().max() < 1e-5
    (y - 1).square().mean().backward()
    gradients = {n: p.grad.abs().max().item() for n, p in model.named_parameters()}
    assert min(gradients.values()) > 0
    # the head's last map, which is all that is small, has a gradient of ordinary size at once
    assert gradients["out.weight"] > 1e-3


def latent_variance(model: TransformOnce, x: torch.Tensor) -> list[float]:
    """Mean square of the coefficients in front of the first layer, and behind each."""
    found: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, i, o: found.extend([i[0], o])) for layer in model.layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return [v.square().mean().item() for v in (found[0], *found[1::2])]


def test_the_first_layer_alone_makes_up_for_what_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(transform_once._ACTIVATIONS, "sin", lambda z: z)
    model = TransformOnce(1, 1, 256, 32, width=128, layers=3, residual=False)
    x = torch.randn(64, 1, 256)
    start, first, second, third = latent_variance(model, x)
    # N / m = 8 times the mean square on m of N coefficients: the variance of the whole field
    assert first / start == pytest.approx(8, rel=0.2)
    assert second / first == pytest.approx(1, rel=0.2)
    assert third / second == pytest.approx(1, rel=0.2)
    for layer in model.layers[1:]:
        spectral_variance_preserving_(layer.channel_mixing, 256)
    values = latent_variance(model, x)
    assert values[3] / values[1] == pytest.approx(64, rel=0.3)
    plain = TransformOnce(1, 1, 256, 32, width=128, layers=1, residual=False, variance_preserving=False)
    values = latent_variance(plain, x)
    assert values[1] / values[0] == pytest.approx(1, rel=0.2)


def test_another_grid_gives_the_same_fields() -> None:
    torch.manual_seed(0)
    model = TransformOnce(1, 1, 64, 6, width=8, layers=2, activation="gelu").double()
    torch.nn.init.normal_(model.out.weight)
    coarse, fine = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (64, 192))
    first, second = (model(torch.cos(2 * math.pi * t).reshape(1, 1, -1)) for t in (coarse, fine))
    # coordinates are not band-limited, so their coefficients differ by O(1 / N²)
    assert (second[..., 1::3] - first).abs().max() < 0.01 * first.abs().max()


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(RecipeError, match="between 1 and all"):
        TransformOnce(1, 1, 8, 9)
    with pytest.raises(RecipeError, match="between 1 and all"):
        TransformOnce(1, 1, (8, 8), 4)
    with pytest.raises(RecipeError, match="sin, gelu"):
        TransformOnceLayer(2, 4, activation="relu")
    with pytest.raises(ShapeError, match="keep fewer modes"):
        TransformOnce(1, 1, 16, 8)(torch.ones(1, 1, 6))
    with pytest.raises(ShapeError, match=r"\(batch, 2, …\)"):
        TransformOnceLayer(2, 4)(torch.ones(1, 3, 6))
