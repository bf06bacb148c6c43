"""Virgo's variances against Kaiming's and Xavier's in deep graph convolutional networks on two graphs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import networkx
import numpy as np
import torch
from studies._harness import compare, report, save
from torch import Tensor, nn
from torch.nn import functional

from weft.init import normalized_adjacency, virgo_

WIDTH, STEPS = 32, 100
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
INITIALIZERS = ("Kaiming", "Xavier", "Virgo", "Virgo, forward")
CASES = [(graph, depth) for graph in ("karate club", "digits") for depth in (4, 8)]
Graph = tuple[Tensor, Tensor, Tensor, list[Tensor]]  # Â, features, labels, nodes to train on, validate and test


def karate(seed: int) -> Graph:
    """34 members of a club and the half each joined after the split; one-hot features, 2 known members a half."""
    graph = networkx.karate_club_graph()
    labels = torch.tensor([int(graph.nodes[n]["club"] != "Mr. Hi") for n in graph])
    adjacency = torch.tensor(networkx.to_numpy_array(graph, weight=None), dtype=torch.float32)
    order = torch.tensor(np.random.default_rng(seed).permutation(len(labels)))
    known = torch.cat([order[labels[order] == c][:2] for c in (0, 1)])
    rest = order[~torch.isin(order, known)]
    return normalized_adjacency(adjacency), torch.eye(len(labels)), labels, [known, rest[:10], rest[10:]]


def digits(seed: int) -> Graph:
    """600 handwritten digits, each beside those that look most like it; pixels as features, 100 known labels."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    data = load_digits()
    chosen = np.random.default_rng(seed).permutation(len(data.target))[:600]
    pixels = data.data[chosen] / 16
    near = kneighbors_graph(pixels, 8).toarray()
    adjacency = torch.tensor(np.maximum(near, near.T), dtype=torch.float32)
    nodes = [torch.arange(0, 100), torch.arange(100, 300), torch.arange(300, 600)]
    features = torch.tensor(pixels, dtype=torch.float32)
    return normalized_adjacency(adjacency), features, torch.tensor(data.target[chosen]), nodes


class GCN(nn.Module):
    """Graph convolutions with ReLU between them, without shortcuts."""

    def __init__(self, inputs: int, classes: int, depth: int):
        super().__init__()
        widths = [inputs, *[WIDTH] * (depth - 1), classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.zeros_(layer.bias)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        """(nodes, inputs) -> (nodes, classes)."""
        for index, layer in enumerate(self.layers):
            x = torch.sparse.mm(adjacency, layer(functional.relu(x) if index else x))
        return x


def start(model: GCN, name: str, adjacency: Tensor, features: Tensor) -> None:
    if name.startswith("Virgo"):
        mode = name.partition(", ")[2] or "harmonic"
        virgo_(list(model.layers), adjacency, features, mode=mode)
        return
    for layer in model.layers:
        if name == "Kaiming":
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(layer.weight)


def measure(setting: tuple[str, float, str, int], seed: int) -> tuple[float, float]:
    name, rate, graph, depth = setting
    adjacency, features, labels, (known, validation, test) = {"karate club": karate, "digits": digits}[graph](seed)
    torch.manual_seed(seed)
    model = GCN(features.shape[1], int(labels.max()) + 1, depth)
    start(model, name, adjacency, features)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(adjacency, features)[known], labels[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (model(adjacency, features).argmax(-1) == labels).float()
    return 100 * right[validation].mean().item(), 100 * right[test].mean().item()


def run(seeds: int = 10) -> dict[str, Any]:
    """The study."""
    totals = {name: np.zeros(seeds) for name in INITIALIZERS}
    rates: dict[str, dict[str, float]] = {name: {} for name in INITIALIZERS}
    cases = {}
    for graph, depth in CASES:
        candidates = {name: [(name, rate, graph, depth) for rate in RATES] for name in INITIALIZERS}
        values, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=True)
        label = f"{graph}, {depth} layers"
        cases[label] = {name: round(float(np.mean(v)), 2) for name, v in values.items()}
        for name in INITIALIZERS:
            totals[name] += np.array(values[name]) / len(CASES)
            rates[name][label] = chosen[name][1]
    result = report(
        paper="virgo",
        claim="In deep graph networks, Virgo's variances give better node classification than Kaiming's.",
        scale=f"karate club and 600 digits as a graph of 8 neighbours, GCNs of 4 and 8 layers of width {WIDTH}, {STEPS} steps",
        metric="test accuracy in %, mean of four cases",
        higher_is_better=True,
        baseline="Kaiming",
        method="Virgo",
        values={name: total.tolist() for name, total in totals.items()},
        chosen={name: {"rate": r} for name, r in rates.items()},
    )
    return {**result, "cases": cases}


if __name__ == "__main__":
    save(run())
