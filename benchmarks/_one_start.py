"""Start an encoder in a separate process: ``python benchmarks/_one_start.py …``.

Prints JSON: seconds to load the network (including imports of this library, but not of torch and
transformers), of the first forward pass with one sentence, and of later passes per batch size.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, BertModel

WARM = 1.5  #: seconds of warm-up before timing
TIMED = 9  #: number of timed forward passes


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
    """Return the median time of a forward pass, after a warm-up."""
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
