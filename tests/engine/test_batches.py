"""Batches through a model, and which layers are fed the very same tensors."""

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from weft.engine.batches import counted, evaluating, fed_alike, feed, layer_inputs, rows_of


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({n: nn.Linear(3, 3) for n in ("q", "k", "equal", "moved", "twice", "idle")})

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers
        y = layers["q"](x) + layers["k"](input=x) + layers["equal"](x.clone())
        y = y + layers["twice"](x) + layers["twice"](y)
        for _ in range(50):  # dead tensors, whose ids come again
            layers["idle"].weight @ x.mT
        return y + layers["moved"](x.add_(1))


def test_alike_is_the_same_tensor_unchanged_in_every_call() -> None:
    model = Layers()
    found = fed_alike(model, {n: [m] for n, m in model.layers.items()}, torch.ones(2, 3))
    assert found == {"q": "q", "k": "q", "equal": "equal", "moved": "moved", "twice": "twice"}


def test_tied_layers_count_as_one() -> None:
    model, seen = Layers(), []
    with (
        torch.no_grad(),
        layer_inputs({"both": [model.layers["q"], model.layers["equal"]]}, lambda n, x: seen.append(n)),
    ):
        model(torch.ones(2, 3))
    assert seen == ["both", "both"]


def test_everything_comes_back_after_an_error() -> None:
    model = Layers().train()
    model.layers["q"].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model), layer_inputs({"q": [model.layers["q"]]}, lambda n, x: None):
        feed(model, torch.ones(2, 4))
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not model.layers["q"]._forward_pre_hooks


def test_batches_of_each_kind() -> None:
    layer = nn.Bilinear(2, 2, 1)
    x, y = torch.ones(1, 2), torch.zeros(1, 2)
    for batch in ((x, y), [x, y], {"input1": x, "input2": y}, UserDict(input1=x, input2=y)):
        assert torch.equal(feed(layer, batch), layer(x, y))
    assert torch.equal(feed(nn.Identity(), x), x)


def test_masks_count_where_their_shape_fits() -> None:
    attention, labels = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[-100, 1, 1], [2, -100, 3]])
    batch = {"attention_mask": attention, "labels": labels}
    x = torch.arange(6.0).reshape(2, 3, 1)
    assert rows_of(x, counted(batch)).flatten().tolist() == [1, 3]
    assert rows_of(x, counted(batch, labels=False)).flatten().tolist() == [0, 1, 3]
    assert rows_of(x[:, 0], counted(batch)).shape == (2, 1)  # pooled: no mask has its shape
    assert counted((attention, labels)) == []
    assert counted({"attention_mask": torch.ones(2, 1, 3, 3), "labels": torch.ones(2, 3)}) == []
