"""Compressed networks in several processes."""

import sys

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import SparseProductLinear, compress  # noqa: E402

SENT = {"uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool"}


def network(method):
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 8, 4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16))
    return compress(nn.Sequential(*layers), method, density=0.5)[0]


@pytest.mark.parametrize("method", ["dsf", "magnitude", "monarch", "lowrank", "blocksvd"])
def test_every_buffer_is_of_a_dtype_that_processes_can_send(method):
    dtypes = {str(buffer.dtype).removeprefix("torch.") for buffer in network(method).buffers()}
    assert dtypes <= SENT


def test_column_numbers_of_two_bytes_take_two_bytes():
    layer = SparseProductLinear(60, 40, random_state=0)
    for factor in layer.factors:
        assert factor.indices.nbytes == 2 * factor.values.numel()


def step(rank, folder, world_size):
    """Train for a step in one of several processes, which start with other values and supports."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
    layer = nn.Sequential(SparseProductLinear(12, 18, random_state=rank), nn.ReLU())
    parallel = nn.parallel.DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = images().chunk(world_size)[rank]
    parallel(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(parallel.eval()(x), layer.train()(x))
    torch.save(layer.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def images():
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo needs a file store of POSIX")
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_train_as_one(world_size, tmp_path):
    if world_size == 1:  # here, as other processes take seconds to start
        step(0, tmp_path, 1)
    else:
        torch.multiprocessing.spawn(step, args=(tmp_path, world_size), nprocs=world_size)
    layer = nn.Sequential(SparseProductLinear(12, 18, random_state=0), nn.ReLU())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(images()).square().mean().backward()
    optimizer.step()
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, dict(layer.state_dict()))
