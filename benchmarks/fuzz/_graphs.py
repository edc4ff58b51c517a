"""Object graphs in torch files: shared containers, and tensors that share bytes."""

from __future__ import annotations

import collections
import io
import random
from typing import Any

from benchmarks.fuzz._damage import Files, damaged_zip, flipped


def damaged_graph(rng: random.Random, files: Files) -> Files:
    """Return a torch file with a random graph, sometimes with damaged bytes."""
    import torch

    out = io.BytesIO()
    is_zip = rng.random() < 0.7
    torch.save(_graph(rng, torch), out, _use_new_zipfile_serialization=is_zip)
    content = out.getvalue()
    if rng.random() < 0.3:
        content = (damaged_zip if is_zip else flipped)(rng, content)
    return {"m.pt": content}


def _graph(rng: random.Random, torch: Any) -> Any:
    nodes: list[Any] = [_tensor(rng, torch) for _ in range(rng.randint(1, 4))]
    nodes += [rng.choice((None, 1, "text", 1.5, b"bytes", bytearray(9), {1, 2}))]
    for _ in range(rng.choice((1, 3, 10, 60))):
        recent = nodes[-1] if rng.random() < 0.7 else rng.choice(nodes)
        nodes.append(_container(rng, recent, rng.choice(nodes)))
    top = nodes[-1]
    if isinstance(top, dict) and rng.random() < 0.2:
        top["itself"] = top
    return top


def _container(rng: random.Random, first: Any, second: Any) -> Any:
    kind = rng.randrange(8)
    if kind == 0:
        return [first, second]
    if kind == 1:
        return (first, second)
    if kind == 2:
        return collections.OrderedDict(a=first, b=second)
    keys = rng.choice((("weight", "bias"), (0, 1), ("a", "b"), ("x" * 999, "y"), ((1, 2), "z")))
    return dict(zip(keys, (first, second), strict=True))


def _tensor(rng: random.Random, torch: Any) -> Any:
    dtypes = ("float32", "float16", "bfloat16", "float64", "int8", "bool", "complex64")
    base = torch.ones(rng.choice((1, 6, 24, 400)), dtype=getattr(torch, rng.choice(dtypes)))
    side = rng.choice((1, 2, 30, 3000, 20_000, 1 << 31))
    kind = rng.randrange(8)
    if kind == 0:
        return base[:1].expand(side, side)
    if kind == 1:
        return base.as_strided((side, len(base)), (0, 1))
    if kind == 2:
        return base.as_strided((len(base) // 2 + 1, len(base) // 2), (1, 1))
    if kind == 3:
        places = torch.zeros((2, 1), dtype=torch.int64)
        return torch.sparse_coo_tensor(places, base[:1], (side, side))
    if kind == 4:
        return torch.empty(len(base), side, device="meta")
    if kind == 5 and base.is_floating_point():
        return torch.nn.Parameter(base.reshape(-1, 1))
    return base.reshape(2, -1) if len(base) > 1 else base
