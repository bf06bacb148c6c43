"""A pair of processes that train one small model together, to compare with training it alone.

The processes start with the first request, serve all later ones, and end with the process that asked.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.contract.models import Block, Net, Other, Scaled, attach
from weft.function.attach import parametrize_
from weft.function.export import plain_state_dict
from weft.function.protocol import FunctionMethod
from weft.function.stack import gathered

HOW = ("ddp", "fsdp2 whole", "fsdp2 by block", "fsdp2 by layer")
_SIZE = 2
_SECONDS = 120  # a request takes a second; a busy machine needs some to start two processes
_KEY = "WEFT_PAIR_KEY"


def train(method: FunctionMethod, how: str = "", rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Three steps of gradient descent in float64, each process on its share of each batch.

    Returns:
        The model's state, and under ``plain.`` its state dict for export.
    """
    net = Net(torch.float64)
    parametrize_(net, Other(Scaled), where="blocks.1.up")  # so that one is on top of another
    attach(method, net)
    model: nn.Module = net
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    elif how:
        _shard(net, how)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    data = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.train()
    for batch in data:
        optimizer.zero_grad()
        model(batch[rank::size]).square().mean().backward()
        optimizer.step()
    state = {n: gathered(t).detach() for n, t in net.state_dict().items()}
    return {**state, **{f"plain.{n}": t for n, t in plain_state_dict(net).items()}}


def train_in_pair(method: FunctionMethod, how: str) -> list[dict[str, Tensor]]:
    """What each of the two processes has after :func:`train`.

    Raises:
        AssertionError: one of them failed, or did not answer.
    """
    global _pair
    if _pair is None:
        _pair = _Pair()
    try:
        return _pair.ask(method, how)
    except Exception:  # the two may be out of step now
        _pair.close()
        _pair = None
        raise


def _shard(net: Net, how: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (_SIZE,))
    kinds = {"fsdp2 whole": (), "fsdp2 by block": (Block,), "fsdp2 by layer": (Block, nn.Linear)}[how]
    for layer in [m for m in net.blocks.modules() if isinstance(m, kinds)][::-1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


@dataclass
class _Pair:
    """The asking side."""

    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        key = secrets.token_hex(16)
        address = str(Path(self.folder.name) / "socket")
        environment = {**os.environ, _KEY: key, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with Listener(address, authkey=key.encode()) as listener:
            for rank in range(_SIZE):
                command = [sys.executable, "-m", __name__, address, str(rank), self.folder.name]
                self.processes.append(subprocess.Popen(command, env=environment))
            listener._listener._socket.settimeout(_SECONDS)  # type: ignore[attr-defined]
            arrived = [listener.accept() for _ in range(_SIZE)]
        self.connections = [c for _, c in sorted((c.recv(), c) for c in arrived)]
        atexit.register(self.close)

    def ask(self, method: FunctionMethod, how: str) -> list[dict[str, Tensor]]:
        plugin = sys.modules[method.config.__module__].__file__ if "plugin" in method.config.__module__ else None
        for connection in self.connections:
            connection.send((plugin, pickle.dumps(method), how))
        answers = []
        for connection in self.connections:
            assert connection.poll(_SECONDS), f"{how}: no answer in {_SECONDS} seconds"
            answer = pickle.loads(connection.recv_bytes())
            assert not isinstance(answer, str), f"{how}: {answer}"
            answers.append(answer)
        return answers

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError):
            self.folder.cleanup()


_pair: _Pair | None = None


def _serve(address: str, rank: int, folder: str) -> None:
    """The answering side: one of the two processes."""
    import torch.distributed as dist

    from weft.registry import load_plugin

    torch.set_num_threads(1)
    connection: Any = Client(address, authkey=os.environ[_KEY].encode())
    connection.send(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=_SIZE, timeout=timedelta(seconds=_SECONDS)
    )
    while True:
        try:
            plugin, method, how = connection.recv()
        except EOFError:
            return
        try:
            if plugin:
                load_plugin(plugin)
            answer: Any = train(pickle.loads(method), how, rank, _SIZE)
        except Exception:  # the asking side tells it, and ends this process
            answer = traceback.format_exc(limit=-3)
        connection.send_bytes(pickle.dumps(answer))  # by value: torch would send tensors as handles to shared memory


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
