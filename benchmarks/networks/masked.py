"""Networks that predict masked parts of images and text, trained here in a minute or two.

`MaskedAutoencoder` draws a new mask in every forward pass, even in eval mode;
`SharedEncoder` applies one block many times, like ALBERT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Characters of a text; all others count as spaces.
ALPHABET = " abcdefghijklmnopqrstuvwxyz.,;:!?'-"
MASK = len(ALPHABET)


class Block(nn.Module):
    """Self-attention and two linear layers, each behind a normalization."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the next state; `bias` is added to the logits of each head's attention."""
        h = self.norm1(x)
        parts = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for layer in (self.query, self.key, self.value))  # fmt: skip
        attended = functional.scaled_dot_product_attention(*parts, attn_mask=bias)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.norm2(x))))


class MaskedAutoencoder(nn.Module):
    """Sees a quarter of an image's patches and returns all (He et al. 2022).

    Parameters
    ----------
    image_size, patch : int
        Pixels along a side of the image, and of a patch.
    width : int
        Of the encoder's blocks; the decoder's is half of it.
    depth : int
        Blocks of the encoder.
    """

    def __init__(self, image_size: int, patch: int, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.patch, n_patches, narrow = patch, (image_size // patch) ** 2, width // 2
        self.n_visible = n_patches // 4
        self.embed = nn.Linear(patch**2, width)
        self.encoder = nn.Sequential(*(Block(width, 4) for _ in range(depth)), nn.LayerNorm(width))
        self.to_decoder = nn.Linear(width, narrow)
        self.decoder = nn.Sequential(Block(narrow, 4), Block(narrow, 4), nn.LayerNorm(narrow))
        self.predict = nn.Linear(narrow, patch**2)
        self.hidden = nn.Parameter(0.02 * torch.randn(narrow))
        self.places = nn.Parameter(0.02 * torch.randn(n_patches, width))
        self.decoder_places = nn.Parameter(0.02 * torch.randn(n_patches, narrow))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted patches and which of them were hidden."""
        patches = self.patches(images)
        visible = torch.rand(patches.shape[:2]).argsort(1)[:, : self.n_visible, None]

        def chosen(values: Tensor) -> Tensor:
            return values.gather(1, visible.expand(-1, -1, values.shape[-1]))

        x = self.embed(chosen(patches)) + chosen(self.places.expand(len(images), -1, -1))
        x = self.to_decoder(self.encoder(x))
        whole = self.hidden.expand(*patches.shape[:2], -1)
        whole = whole.scatter(1, visible.expand_as(x), x) + self.decoder_places
        is_hidden = torch.ones(patches.shape[:2], dtype=torch.bool).scatter(1, visible[..., 0], 0)
        return self.predict(self.decoder(whole)), is_hidden

    def patches(self, images: Tensor) -> Tensor:
        """Return the patches of each image, one a row."""
        return functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)


class SharedEncoder(nn.Module):
    """One block, applied again and again, between small embeddings and a head (Lan et al. 2020).

    Each of its four heads prefers characters at a distance of its own (as of Press et al. 2022):
    otherwise it takes far more steps to find out that neighbours matter.

    Parameters
    ----------
    length : int
        Characters of a window.
    width : int
        Of the block; embeddings have a quarter of it.
    depth : int
        How often the block is applied.
    """

    def __init__(self, length: int, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.depth = depth
        self.characters = nn.Embedding(len(ALPHABET) + 1, width // 4)
        self.widen = nn.Linear(width // 4, width)
        self.block = Block(width, 4)
        self.norm = nn.LayerNorm(width)
        self.transform, self.predict = nn.Linear(width, width), nn.Linear(width, len(ALPHABET))
        places = torch.arange(length)
        distances = places - places[:, None] - torch.tensor([-2, -1, 1, 2])[:, None, None]
        self.register_buffer("bias", -distances.abs().float(), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        """Return logits of each place's character."""
        x = self.widen(self.characters(characters))
        for _ in range(self.depth):
            x = self.block(x, self.bias)
        return self.predict(functional.gelu(self.transform(self.norm(x))))


def encoded(text: str) -> Tensor:
    """Return the indices of a text's characters."""
    positions = {character: i for i, character in enumerate(ALPHABET)}
    text = " ".join(text.lower().replace("’", "'").split())
    return torch.tensor([positions.get(character, 0) for character in text])


def hidden(windows: Tensor, generator: torch.Generator, share: float = 0.2) -> Tensor:
    """Return windows with some characters masked."""
    return windows.where(torch.rand(windows.shape, generator=generator) >= share, MASK)


def image_loss(model: Any, images: Tensor) -> Tensor:
    """Return the mean squared error of the patches that were hidden."""
    predicted, is_hidden = model(images)
    return functional.mse_loss(predicted[is_hidden], model.patches(images)[is_hidden])


def text_loss(generator: torch.Generator) -> Callable[[Any, Tensor], Tensor]:
    """Return the loss of windows: the cross-entropy of the characters that are masked."""

    def loss(model: Any, windows: Tensor) -> Tensor:
        masked = hidden(windows, generator)
        is_hidden = masked == MASK
        return functional.cross_entropy(model(masked)[is_hidden], windows[is_hidden])

    return loss


def train(
    model: nn.Module,
    items: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
) -> None:
    """Minimize `loss` of batches drawn at random, by Adam with one cycle of learning rates."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, items[torch.randint(len(items), (batch_size,))]).backward()
        optimizer.step()
        schedule.step()
