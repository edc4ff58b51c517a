"""One start of an encoder in a process of its own: ``python benchmarks/_one_start.py …``.

Prints JSON: seconds until the network is loaded (imports of this library included, those of torch
and transformers not), of the first forward pass, with one sentence, and of later ones for each
batch size.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, BertModel

WARM = 1.5  #: seconds for which products run before they are timed
TIMED = 9  #: forward passes timed


def main(form: str, config: str, folder: str, threads: str, tokens: str, batches: str) -> None:
    assert BertModel  # imported lazily, by whoever loads the first
    torch.set_num_threads(int(threads))
    inputs = [
        torch.arange(1000, 1000 + n * int(tokens)).reshape(n, -1) for n in [1, *json.loads(batches)]
    ]
    start = time.perf_counter()
    model = loaded(form, config, folder).eval()
    ready = time.perf_counter()
    times: dict[str, Any] = {"load": ready - start}
    with torch.inference_mode():
        model(inputs[0])
        times["first"] = time.perf_counter() - ready
        times["later"] = {len(x): later(model, x) for x in inputs[1:]}
    print(json.dumps(times))


def loaded(form: str, config: str, folder: str) -> Any:
    if form == "transformers":
        return AutoModel.from_pretrained(folder)
    from matfact.torch import load_network

    return load_network(lambda: AutoModel.from_config(AutoConfig.from_pretrained(config)), folder)


def later(model: Any, x: torch.Tensor) -> float:
    """Return the median time of a forward pass, after a while of them."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM:
        model(x)
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main(*sys.argv[1:])
