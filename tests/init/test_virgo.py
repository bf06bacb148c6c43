import warnings

import networkx
import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.init import graph_variances, normalized_adjacency, virgo_


def directed(n: int = 30, seed: int = 0) -> Tensor:
    """A weighted directed graph, not normalised symmetrically: Â and its transpose differ a lot."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, n, generator=generator, dtype=torch.float64).pow(4)
    return (weights * (weights > 0.3) + torch.eye(n)) * torch.rand(n, 1, generator=generator, dtype=torch.float64).pow(
        2
    )


def brute_force(matrix: np.ndarray, signal: np.ndarray, widths: tuple[int, ...], classes: int) -> tuple[list, list]:
    """The card's equations, with powers of a scipy.sparse matrix."""
    sparse, n, layers = scipy.sparse.csr_array(matrix), len(matrix), len(widths)
    c = [np.square(scipy.sparse.linalg.matrix_power(sparse, p) @ signal).sum() for p in range(1, layers + 1)]
    d = [np.square(scipy.sparse.linalg.matrix_power(sparse.T, p) @ np.ones(n)).sum() for p in range(1, layers + 1)]
    forward = [2 / widths[0]] + [2 / widths[i] * c[i - 1] / c[i] for i in range(1, layers)]
    backward = [n / ((classes - 1) * d[0])]
    for j in range(2, layers + 1):
        backward.insert(0, 2 / widths[layers + 1 - j] * d[j - 2] / d[j - 1])
    return forward, backward


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])
@pytest.mark.parametrize("estimate", ["mean", "channels"])
def test_variances_are_those_of_the_equations(layout: torch.layout, estimate: str) -> None:
    matrix, widths = directed(), (5, 16, 8, 12)
    features = torch.rand(30, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signal = features.mean(1) if estimate == "mean" else features
    forward, backward = brute_force(matrix.numpy(), signal.numpy(), widths, 4)
    given = matrix if layout == torch.strided else matrix.to_sparse_coo()
    found = {
        mode: graph_variances(given, features, widths, 4, mode, estimate)
        for mode in ("forward", "backward", "harmonic", "arithmetic")
    }
    np.testing.assert_allclose(found["forward"], forward, rtol=1e-12)
    np.testing.assert_allclose(found["backward"], backward, rtol=1e-12)
    np.testing.assert_allclose(found["arithmetic"], np.add(forward, backward) / 2, rtol=1e-12)
    np.testing.assert_allclose(
        found["harmonic"], 2 * np.multiply(forward, backward) / np.add(forward, backward), rtol=1e-12
    )
    assert not np.allclose(backward, graph_variances(matrix.T, features, widths, 4, "backward"), rtol=0.1)


def test_on_a_regular_graph_it_is_kaiming() -> None:
    ring = torch.tensor(networkx.to_numpy_array(networkx.circulant_graph(12, [1, 3])))
    matrix, widths = normalized_adjacency(ring), (5, 7, 11)
    forward = graph_variances(matrix, torch.full((12, 5), 0.3), widths, 4, "forward")
    backward = graph_variances(matrix, None, widths, 4, "backward")
    np.testing.assert_allclose(forward, [2 / 5, 2 / 7, 2 / 11], rtol=1e-12)  # inputs
    np.testing.assert_allclose(backward, [2 / 7, 2 / 11, 1 / 3], rtol=1e-12)  # outputs, and the loss's own layer


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_energy_doubles_in_each_layer_of_a_linear_network(direction: str) -> None:
    """ReLU halves it again. Exact in expectation over weights, on a graph whose Â is far from symmetric."""
    matrix, widths, generator = directed(), (6, 20, 20, 20), torch.Generator().manual_seed(2)
    features = torch.rand(30, 1, generator=generator, dtype=torch.float64).expand(30, 6)  # equal channels
    variances = graph_variances(matrix, features, widths, 20, direction)
    energies = torch.zeros(400, 4)
    for draw in range(400):
        weights = [
            torch.randn(m, 20, generator=generator, dtype=torch.float64) * v**0.5 for m, v in zip(widths, variances)
        ]
        if direction == "forward":
            x = features
            for layer, weight in enumerate(weights):
                x = matrix @ x @ weight
                energies[draw, layer] = x.square().sum()
        else:  # the loss has one gradient for all nodes; what reaches the inputs of layers 4, 3, 2
            x = torch.randn(1, 20, generator=generator, dtype=torch.float64).expand(30, 20)
            for layer, weight in enumerate(reversed(weights)):
                x = matrix.T @ x @ weight.T
                energies[draw, layer] = x.square().sum()
    mean, error = energies.mean(0), energies.std(0) / 20
    for i in range(3 if direction == "forward" else 2):
        ratio = mean[i + 1] / mean[i]
        assert abs(ratio - 2) < 4 * 2 * (error[i + 1] / mean[i + 1] + error[i] / mean[i])
        assert error[i + 1] / mean[i + 1] < 0.06  # so that a factor of 1.5 would show


def spread(variances: list[float], matrix: Tensor, features: Tensor, widths: tuple[int, ...]) -> float:
    """Largest over smallest variance of the layers' outputs at initialisation, mean over draws of its logarithm."""
    generator, logs = torch.Generator().manual_seed(3), []
    for _ in range(20):
        x, found = features, []
        for m, v in zip(widths, variances):
            law = torch.empty(m, 64, dtype=torch.float64).uniform_(-1, 1, generator=generator) * (3 * v) ** 0.5
            x = torch.relu(matrix @ x @ law)
            found.append(x.var().log())
        logs.append(float(max(found) - min(found)))
    return sum(logs) / len(logs)


def test_variances_of_layers_are_flatter_than_kaimings_and_xaviers() -> None:
    graph = networkx.barabasi_albert_graph(400, 3, seed=0)  # degrees have a heavy tail
    matrix = normalized_adjacency(torch.tensor(networkx.to_numpy_array(graph)))
    generator, widths = torch.Generator().manual_seed(0), (64,) * 6
    features = torch.rand(400, 64, generator=generator, dtype=torch.float64)
    features[20:] = 0  # the signal starts at a few nodes, so that it thins out on its way
    virgo = spread(graph_variances(matrix, features, widths, 64, "forward"), matrix, features, widths)
    kaiming = spread([2 / 64] * 6, matrix, features, widths)
    xavier = spread([2 / 128] * 6, matrix, features, widths)
    assert virgo < 0.9 * kaiming < 0.9 * xavier


def test_adjacency_is_that_of_graph_convolutions() -> None:
    graph = networkx.karate_club_graph()
    plain = networkx.to_numpy_array(graph, weight=None) + np.eye(34)
    scale = np.diag(plain.sum(1) ** -0.5)
    adjacency = torch.tensor(networkx.to_numpy_array(graph, weight=None))
    found = normalized_adjacency(adjacency.to_sparse_coo())
    np.testing.assert_allclose(found.to_dense(), scale @ plain @ scale, rtol=1e-12)
    with_loops = normalized_adjacency(adjacency + torch.eye(34), self_loops=False)
    torch.testing.assert_close(with_loops.to_dense(), found.to_dense())
    torch.testing.assert_close(normalized_adjacency(adjacency.bool()).to_dense(), found.to_dense().float())
    alone = normalized_adjacency(torch.zeros(2, 2), self_loops=False)
    torch.testing.assert_close(alone.to_dense(), torch.zeros(2, 2))  # no neighbours: nothing, and no NaN


def test_a_node_that_only_sends_keeps_its_share() -> None:
    found = normalized_adjacency(torch.tensor([[0.0, 4.0, 1.0], [0, 0, 0], [0, 0, 0]]), self_loops=False).to_dense()
    torch.testing.assert_close(found[0], torch.tensor([0.0, 4 / 20**0.5, 1 / 5**0.5]))


def test_standardised_features_are_followed_by_channel() -> None:
    matrix = normalized_adjacency(directed())
    features = torch.randn(30, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    features = (features - features.mean(0)) / features.std(0)
    with pytest.warns(UserWarning, match="estimate='channels'"):
        found = graph_variances(matrix, features, (50, 8, 8), 3, "forward")
    assert found == graph_variances(matrix, features, (50, 8, 8), 3, "forward", "channels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = graph_variances(matrix, torch.eye(30), (30, 8, 8), 3)  # one-hot: a mean of 1/30 that is no noise
        graph_variances(matrix, features[:, :1], (1, 8, 8), 3, "forward")  # one channel is its own mean
    assert one == pytest.approx(graph_variances(matrix, None, (30, 8, 8), 3))
    assert one == pytest.approx(graph_variances(matrix, torch.eye(30).to_sparse_coo(), (30, 8, 8), 3))


def test_cap_bounds_what_the_graph_does() -> None:
    matrix = normalized_adjacency(torch.tensor(networkx.to_numpy_array(networkx.star_graph(200))))
    features = torch.zeros(201, 4)
    features[1] = 1  # one leaf speaks; its energy falls by far more than 1.2 in a layer
    free = graph_variances(matrix, features, (4, 8, 8), 2, "forward")
    assert free[1] > 2 * 1.2 / 8
    assert graph_variances(matrix, features, (4, 8, 8), 2, "forward", cap=1.2)[:2] == pytest.approx([0.5, 2 * 1.2 / 8])


def test_layers_are_filled_from_the_uniform_law() -> None:
    matrix = normalized_adjacency(directed())
    layers = [[nn.Linear(5, 300), nn.Linear(5, 300)], nn.Linear(300, 200, bias=False), nn.Linear(200, 4)]
    biases = layers[2].bias.clone()
    variances = virgo_(layers, matrix, torch.rand(30, 5), generator=torch.Generator().manual_seed(5))
    assert variances == pytest.approx(graph_variances(matrix, torch.rand(30, 5) * 0 + 1, (5, 300, 200), 4), rel=0.5)
    assert torch.equal(layers[2].bias, biases)
    for layer, variance in zip([layers[0][0], layers[0][1], layers[1]], [variances[0], variances[0], variances[1]]):
        assert layer.weight.abs().max().item() <= (3 * variance) ** 0.5
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.1)  # 4 deviations for 1500 draws
    assert not torch.equal(layers[0][0].weight, layers[0][1].weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adjacency": torch.ones(3, 4)}, "must be square"),
        ({"adjacency": torch.zeros(0, 0)}, "must be square"),
        ({"adjacency": torch.full((3, 3), torch.nan)}, "NaN"),
        ({"adjacency": torch.diag(torch.ones(2), 1)}, "no message arrives"),
        ({"adjacency": torch.full((3, 3), 1e200, dtype=torch.float64)}, "overflows"),
        ({"features": torch.ones(3, 3)}, "first width"),
        ({"features": torch.full((3, 2), torch.inf)}, "NaN or infinity"),
        ({"features": torch.zeros(3, 2)}, "All features are 0"),
        ({"widths": ()}, "at least one layer"),
        ({"classes": 1}, "between 2"),
        ({"classes": None}, "classes must be given"),
        ({"mode": "forwards"}, "Did you mean forward"),
        ({"cap": 0.5}, "between 1"),
    ],
)
def test_bad_input(change: dict, words: str) -> None:
    given = {"adjacency": torch.eye(3), "features": torch.ones(3, 2), "widths": (2, 8, 8, 8), "classes": 2, **change}
    with pytest.raises(RecipeError, match=words):
        graph_variances(**given)


def test_layers_that_do_not_fit() -> None:
    eye = torch.eye(3)
    with pytest.raises(RecipeError, match=r"Layer 2 .* 8 channels"):
        virgo_([nn.Linear(2, 8), nn.Linear(4, 8)], eye, None)
    with pytest.raises(RecipeError, match="of one shape"):
        virgo_([[nn.Linear(2, 8), nn.Linear(3, 8)]], eye, None)
    with pytest.raises(RecipeError, match="One output"):
        virgo_([nn.Linear(2, 1)], eye, None)
    with pytest.raises(RecipeError, match="at least one layer"):
        virgo_([], eye, None)
    with pytest.raises(RecipeError, match="must be at least 0"):
        normalized_adjacency(-torch.eye(2))
    assert virgo_([nn.Linear(2, 8), nn.Linear(8, 1)], eye, None, classes=2)[-1] == pytest.approx(2 / (8 / 2 + 1))
