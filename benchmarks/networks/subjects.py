"""Networks for calibration experiments, with calibration inputs and fresh inputs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.networks import data, encoder, masked, smollm2, training

#: Novels, split between calibration and test.
NOVELS = ("emma", "northangerabbey")
#: Regular expressions of the layers to compress in pretrained networks.
ENCODER_LAYERS, BLOCKS = r"encoder\.layer\.\d", r"model\.layers\.[0-4]\."
WINDOW, CHARACTERS = 128, 64


class Seen(NamedTuple):
    """Results of a network for a batch, one row per input (a token or a masked patch).

    Attributes
    ----------
    state : Tensor
        Rows of its output.
    logits : Tensor or None
        Logits of its predictions.
    targets : Tensor or None
        What each row of `logits` should predict, if known.
    """

    state: Tensor
    logits: Tensor | None = None
    targets: Tensor | None = None


class Subject(NamedTuple):
    """A network and its inputs.

    Attributes
    ----------
    model : torch.nn.Module
        The dense network, in eval mode.
    layers : str, callable or None
        Layers to compress.
    pool : sequence
        Pool of calibration samples: a tensor or a list of sentences.
    batch : callable
        Converts samples to a batch for the network.
    fresh : list
        Batches of other samples of the same kind.
    seen : callable
        Returns the results of a network for a batch.
    """

    model: nn.Module
    layers: str | Callable[[str, nn.Module], bool] | None
    pool: Any
    batch: Callable[[Any], Any]
    fresh: list[Any]
    seen: Callable[[Any, Any], Seen]

    def calibration(self, count: int, size: int, seed: int) -> list[Any]:
        """Return batches of `size` of `count` samples, drawn from the pool."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)[:count].tolist()
        drawn = self.pool[order] if isinstance(self.pool, Tensor) else [self.pool[i] for i in order]
        return [self.batch(drawn[i : i + size]) for i in range(0, count, size)]


def classifier(name: str, dataset: str, n_fresh: int, **changes: Any) -> Subject:
    """Return an image classifier; its fresh images are the first test images."""
    model = training.trained(name, dataset, **changes)
    train_x, _, test_x, test_y = data.load(dataset)
    fresh = training.batches(test_x[:n_fresh], test_y[:n_fresh], 200)

    def seen(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Seen:
        logits = network(batch[0])
        return Seen(logits, logits, batch[1])

    layers = _is_pointwise if name == "mobile" else _has_many_columns
    return Subject(model, layers, train_x, _same, fresh, seen)


def _is_pointwise(name: str, layer: nn.Module) -> bool:
    """Whether a layer is linear or a 1×1 convolution; depthwise ones are too small."""
    return getattr(layer, "kernel_size", (1, 1)) == (1, 1)


def _has_many_columns(name: str, layer: nn.Module) -> bool:
    """Whether a layer is not the first, which has one channel."""
    return getattr(layer, "in_channels", 0) != 1


def _same(batch: Any) -> Any:
    return batch


def autoencoder(dataset: str, n_fresh: int, *, patch: int, width: int, steps: int) -> Subject:
    """Return a masked autoencoder of images, measured on the hidden patches."""
    train_x, _, test_x, _ = data.load(dataset)
    recipe = {"data": dataset, "patch": patch, "width": width, "steps": steps}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = masked.MaskedAutoencoder(train_x.shape[-1], patch, width)
        fit = functools.partial(masked.train, items=train_x, loss=masked.image_loss, steps=steps)
        training.kept(model, f"autoencoder-{width}-{dataset}", recipe, fit)

    def seen(network: nn.Module, images: Tensor) -> Seen:
        predicted, is_hidden = network(images)
        return Seen(predicted[is_hidden])

    return Subject(model, None, train_x, _same, list(test_x[:n_fresh].split(200)), seen)


def shared_encoder(
    text: str, n_fresh: int, *, width: int, depth: int, steps: int, learning_rate: float = 4e-3
) -> Subject:
    """Return an encoder with one repeated block, measured on masked characters."""
    windows = masked.encoded(_text(text))
    windows = windows[: len(windows) // CHARACTERS * CHARACTERS].reshape(-1, CHARACTERS)
    windows = windows[torch.randperm(len(windows), generator=_generator(0))]
    pool, test = windows[n_fresh:], windows[:n_fresh]
    options = {"steps": steps, "learning_rate": learning_rate}
    recipe = {"text": text, "width": width, "depth": depth, "fresh": n_fresh, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = masked.SharedEncoder(CHARACTERS, width, depth)
        loss = masked.text_loss(_generator(1))
        fit = functools.partial(masked.train, items=pool, loss=loss, **options)
        training.kept(model, f"shared-{width}-{depth}-{text}", recipe, fit)

    def seen(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Seen:
        is_hidden = batch[0] == masked.MASK
        logits = network(batch[0])[is_hidden]
        return Seen(logits, logits, batch[1][is_hidden])

    inputs, test_inputs = (masked.hidden(x, _generator(2)) for x in (pool, test))
    return Subject(model, None, inputs, _same, training.batches(test_inputs, test, 64), seen)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _text(name: str) -> str:
    """Return the text: both novels, or the included excerpt."""
    if name == "excerpts":
        return (encoder.EXCERPTS / "northanger-abbey.txt").read_text(encoding="utf-8-sig")
    folder = Path(os.environ.get("MATFACT_DATA", ".")) / "text"
    return "\n".join((folder / f"{n}.txt").read_text(encoding="utf-8-sig") for n in NOVELS)


def sentence_encoder(n_fresh: int, text: str = "novels") -> Subject:
    """Return the encoder of the extra ``demo``, measured on sentence embeddings."""
    model, _ = encoder.network()
    folder, names = Path(os.environ.get("MATFACT_DATA", ".")) / "text", NOVELS
    if text == "excerpts":
        folder, names = encoder.EXCERPTS, ("northanger-abbey",)
    items = encoder.sentences(folder, *names)
    order = torch.randperm(len(items), generator=_generator(0)).tolist()
    items = [items[i] for i in order]

    def batch(sentences: list[str]) -> dict[str, Tensor]:
        (tokens,) = encoder.tokenized(sentences, len(sentences))
        return tokens

    def seen(network: nn.Module, tokens: dict[str, Tensor]) -> Seen:
        return Seen(encoder.embeddings(network, [tokens]))

    fresh = encoder.tokenized(items[:n_fresh], 64)
    return Subject(model, ENCODER_LAYERS, items[n_fresh:], batch, fresh, seen)


def first_blocks(n_fresh: int) -> Subject:
    """Return the language model with five blocks to compress, measured on its predictions."""
    model, tokenizer = smollm2.network()
    ids = tokenizer(_text("novels"), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    windows = windows[torch.randperm(len(windows), generator=_generator(0))]

    def batch(tokens: Tensor) -> dict[str, Any]:
        return {"input_ids": tokens, "use_cache": False}

    def seen(network: Any, tokens: dict[str, Any]) -> Seen:
        found = network(**tokens, output_hidden_states=True)
        logits = found.logits[:, :-1].flatten(0, 1)
        targets = tokens["input_ids"][:, 1:].flatten()
        return Seen(found.hidden_states[5].flatten(0, 1), logits, targets)

    fresh = [batch(tokens) for tokens in windows[:n_fresh].split(4)]
    return Subject(model, BLOCKS, windows[n_fresh:], batch, fresh, seen)


class Kind(NamedTuple):
    """Constructor of a network, and its measure."""

    make: Callable[..., Subject]
    headline: str
    sweeps: int
    full: dict[str, Any]
    quick: dict[str, Any] | None = None


_FASHION: dict[str, Any] = {"dataset": "fashion-mnist", "n_fresh": 5000}
_DIGITS: dict[str, Any] = {"dataset": "digits", "n_fresh": 200}
KINDS = {
    "mobile network": Kind(
        functools.partial(classifier, "mobile"), "divergence", 100,
        {**_FASHION, "n_images": 30_000, "epochs": 1}, {**_DIGITS, "width": 8, "epochs": 4},
    ),
    "masked autoencoder": Kind(
        autoencoder, "output error", 100,
        {**_FASHION, "patch": 4, "width": 96, "steps": 2000},
        {**_DIGITS, "patch": 2, "width": 16, "steps": 40},
    ),
    "shared encoder": Kind(
        shared_encoder, "divergence", 100,
        {"text": "novels", "n_fresh": 1000, "width": 96, "depth": 6, "steps": 800},
        {"text": "excerpts", "n_fresh": 40, "width": 16, "depth": 3, "steps": 40},
    ),
    "ResNet-20": Kind(
        functools.partial(classifier, "resnet20"), "divergence", 100,
        {**_FASHION, "n_images": 30_000, "epochs": 2},
    ),
    "sentence encoder": Kind(sentence_encoder, "1 − cosine", 25, {"n_fresh": 512}),
    "language model": Kind(first_blocks, "divergence", 25, {"n_fresh": 32}),
}  # fmt: skip


@functools.lru_cache(maxsize=1)  # one network at a time
def subject(name: str, quick: bool) -> Subject:
    """Return a network and its inputs."""
    kind = KINDS[name]
    options = kind.quick if quick else kind.full
    assert options is not None
    return kind.make(**options)
