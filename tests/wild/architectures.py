"""Tiny third-party networks with random weights, and the inputs of each."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

SAMPLES, TOKENS, WIDTH, VOCABULARY = 6, 10, 32, 64

#: Settings that most configurations know, by whichever name; they ignore those of others.
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "d_model": WIDTH, "num_hidden_layers": 1,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    # Far larger than for training, so that each layer counts in the outputs.
    "initializer_range": 0.2, "init_std": 0.2,
}  # fmt: skip


class Architecture(NamedTuple):
    """How a network is built, a batch for it drawn, and what its users ask of a compression."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    options: dict[str, Any] = {}  # noqa: RUF012


def of_transformers(name: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return what builds the network `name` + `head` from its configuration.

    A setting of ``...`` leaves one out that is common to others.
    """

    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        for needed in (f"{name}Config", name + head):
            if not hasattr(transformers, needed):
                pytest.skip(f"this version of transformers has no {needed}")
        given = {key: value for key, value in (COMMON | settings).items() if value is not ...}
        config = getattr(transformers, f"{name}Config")(**given)
        return getattr(transformers, name + head)(config)

    return build


def tokens(rng: torch.Generator, names: tuple[str, str] = ("input_ids", "attention_mask")) -> Any:
    """Return tokens of a few kinds, as texts have, and a mask of the padding behind them."""
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (SAMPLES, 1), generator=rng)
    mask = (torch.arange(TOKENS) < lengths).long()
    ids = torch.randint(3, 19, (SAMPLES, TOKENS), generator=rng)
    return dict(zip(names, (ids * mask, mask), strict=True))


def two_texts(rng: torch.Generator) -> Any:
    """Return tokens for the encoder and for the decoder, padded to other lengths."""
    decoded = tokens(rng, ("decoder_input_ids", "decoder_attention_mask"))
    return tokens(rng) | {name: tensor[:, :-2] for name, tensor in decoded.items()}


def correlated(rng: torch.Generator, *shape: int, rank: int = 5) -> torch.Tensor:
    """Return inputs that lie near few directions, as measured ones do."""
    size = torch.Size(shape[1:]).numel()
    basis = torch.randn(rank, size, generator=torch.Generator().manual_seed(0))
    x = torch.randn(shape[0], rank, generator=rng) @ basis / rank**0.5
    return (x + 0.1 * torch.randn(x.shape, generator=rng)).reshape(shape)


def images(rng: torch.Generator, size: int = 16, rank: int = 5) -> Any:
    return {"pixel_values": correlated(rng, SAMPLES, 3, size, size, rank=rank)}


def spectrograms(rng: torch.Generator) -> Any:
    """Return what is heard, and tokens for the decoder."""
    ids = torch.randint(3, 19, (SAMPLES, TOKENS), generator=rng)
    return {"input_features": correlated(rng, SAMPLES, 8, 24), "decoder_input_ids": ids}


def waves(rng: torch.Generator) -> Any:
    mask = torch.ones(SAMPLES, 160, dtype=torch.long)
    mask[0, 100:] = 0
    return {"input_values": correlated(rng, SAMPLES, 160) * mask, "attention_mask": mask}


def rows(rng: torch.Generator) -> torch.Tensor:
    return correlated(rng, SAMPLES, TOKENS, WIDTH)


def padded_rows(rng: torch.Generator) -> Any:
    x = correlated(rng, SAMPLES * TOKENS, WIDTH).reshape(SAMPLES, TOKENS, WIDTH)
    return {"x": x, "attention_mask": tokens(rng)["attention_mask"]}


class Encoder(nn.Module):
    """The encoder of torch, which in eval mode packs padded tokens into nested tensors."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, attention_mask):
        return self.encoder(x, src_key_padding_mask=attention_mask == 0)


class Recurrent(nn.Module):
    """A classifier of the last state of an LSTM and of a GRU."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.lstm = nn.LSTM(16, WIDTH, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, input_ids):
        return self.head(self.gru(self.lstm(self.embedding(input_ids))[0])[1][-1])


class Attention(nn.Module):
    """torch's attention, between layers of its own."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.after = nn.Linear(WIDTH, 12)

    def forward(self, x, attention_mask):
        x = self.before(x)
        mixed, _ = self.attention(x, x, x, attention_mask == 0, need_weights=False)
        return self.after(self.norm(x + mixed))


class Translator(nn.Module):
    """torch's encoder and decoder, called with two tensors."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 48, batch_first=True)
        self.head = nn.Linear(WIDTH, 12)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))


class Perceptron(nn.Module):
    """Two inputs, of which a wrapper knows nothing."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)
        self.after = nn.Linear(48, 12)

    def forward(self, x, y):
        return self.after(nn.functional.gelu(self.left(x) + self.right(y)))


class AlwaysDropping(nn.Module):
    """Dropout in eval mode too, as it is used to draw from a posterior."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.dropout(nn.functional.gelu(self.up(x)), 0.3))


def _pair(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(rng), rows(rng)


_causal = functools.partial(of_transformers, head="ForCausalLM")
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_ENCODER_DECODER = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
_EXPERTS = {
    **_GROUPED, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip
_BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1],
    "layer_type": "basic", "out_features": ["stage2"],
}  # fmt: skip
_VISION = {"image_size": 16, "patch_size": 4}

ARCHITECTURES = {
    "llama": Architecture(_causal("Llama", **_GROUPED, num_hidden_layers=2), tokens),
    "qwen2": Architecture(_causal("Qwen2", **_GROUPED), tokens),
    "qwen3": Architecture(_causal("Qwen3", **_GROUPED, tie_word_embeddings=True), tokens),
    "gemma": Architecture(
        _causal("Gemma2", **_GROUPED, num_hidden_layers=2, query_pre_attn_scalar=8), tokens
    ),
    "phi": Architecture(_causal("Phi"), tokens),
    "mistral": Architecture(_causal("Mistral", **_GROUPED, sliding_window=4), tokens),
    "gpt2": Architecture(
        of_transformers("GPT2", "LMHeadModel", num_hidden_layers=2), tokens
    ),
    "gpt_neox": Architecture(_causal("GPTNeoX"), tokens),
    "opt": Architecture(_causal("OPT", ffn_dim=48, word_embed_proj_dim=16), tokens),
    "falcon": Architecture(
        _causal("Falcon", tie_word_embeddings=False), tokens
    ),
    "mixtral": Architecture(_causal("Mixtral", **_EXPERTS), tokens),
    "qwen2_moe": Architecture(_causal("Qwen2Moe", **_EXPERTS), tokens),
    "mamba": Architecture(
        _causal("Mamba", state_size=4, time_step_rank=4), tokens
    ),
    "rwkv": Architecture(_causal("Rwkv", attention_hidden_size=WIDTH, num_hidden_layers=2), tokens),
    "bert": Architecture(of_transformers("Bert", "ForMaskedLM", num_hidden_layers=2), tokens),
    "albert": Architecture(
        of_transformers("Albert", "Model", embedding_size=16, num_hidden_layers=3), tokens
    ),
    "deberta": Architecture(
        of_transformers(
            "DebertaV2", "Model", relative_attention=True, pos_att_type=["c2p", "p2c"],
            position_buckets=8, type_vocab_size=0,
        ),
        tokens,
    ),
    "squeezebert": Architecture(
        of_transformers(
            "SqueezeBert", "Model", embedding_size=WIDTH, q_groups=2,
            k_groups=2, v_groups=2, post_attention_groups=1, intermediate_groups=2,
            output_groups=2,
        ),
        tokens,
    ),
    "reformer": Architecture(
        of_transformers(
            "Reformer", "Model", attn_layers=["lsh", "local"], attention_head_size=8,
            feed_forward_size=48, lsh_attn_chunk_length=5, local_attn_chunk_length=5,
            num_buckets=4, num_hashes=2, axial_pos_embds=False,
        ),
        tokens,
    ),
    "t5": Architecture(
        of_transformers(
            "T5", "ForConditionalGeneration", d_kv=8, d_ff=48, num_layers=1
        ),
        two_texts,
    ),
    "bart": Architecture(
        of_transformers("Bart", "ForConditionalGeneration", **_ENCODER_DECODER), two_texts
    ),
    "marian": Architecture(of_transformers("Marian", "MTModel", **_ENCODER_DECODER), two_texts),
    "vit": Architecture(of_transformers("ViT", "ForImageClassification", **_VISION), images),
    "vit_mae": Architecture(
        of_transformers(
            "ViTMAE", "ForPreTraining", **_VISION, decoder_hidden_size=24,
            decoder_num_attention_heads=4, decoder_num_hidden_layers=1,
            decoder_intermediate_size=32,
        ),
        images,
    ),
    "convnext": Architecture(
        of_transformers(
            "ConvNext", "ForImageClassification", hidden_sizes=[8, 16], depths=[1, 1],
            num_stages=2, num_hidden_layers=..., layer_scale_init_value=0.5, patch_size=2,
        ),
        images,
    ),
    "swin": Architecture(
        of_transformers(
            "Swin", "ForImageClassification", image_size=16, patch_size=2, embed_dim=16,
            depths=[1, 1], num_attention_heads=[2, 4], window_size=4,
        ),
        images,
    ),
    "resnet": Architecture(
        of_transformers(
            "ResNet", "ForImageClassification", embedding_size=8, hidden_sizes=[16, 24],
            depths=[1, 1], layer_type="basic",
        ),
        images,
    ),
    "bit": Architecture(
        of_transformers(
            "Bit", "ForImageClassification", embedding_size=8, hidden_sizes=[8, 16],
            depths=[1, 1], num_groups=2, layer_type="bottleneck", num_hidden_layers=...,
        ),
        images,
    ),
    "detr": Architecture(
        of_transformers(
            "Detr", "Model", encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
            decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4,
            num_queries=4, use_timm_backbone=False, use_pretrained_backbone=False,
            backbone=None, backbone_config=_BACKBONE,
        ),
        functools.partial(images, size=32),
    ),
    "mobilenet_v2": Architecture(
        of_transformers(
            "MobileNetV2", "ForImageClassification", depth_multiplier=0.1,
            depth_divisible_by=4, min_depth=4, finegrained_output=False, output_stride=8,
        ),
        # Of more kinds, as dozens of layers with random weights tell few kinds ever less apart.
        functools.partial(images, size=32, rank=16),
        {"overrides": {"conv_3x3": None}},  # kernels of nine entries, hundreds of them
    ),
    "whisper": Architecture(
        of_transformers(
            "Whisper", "ForConditionalGeneration", **_ENCODER_DECODER, num_mel_bins=8,
            max_source_positions=12, max_target_positions=16,
        ),
        spectrograms,
    ),
    "wav2vec2": Architecture(
        of_transformers(
            "Wav2Vec2", "Model", conv_dim=[16, 16], conv_kernel=[8, 4], conv_stride=[4, 2],
            num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
            layerdrop=0.0,
        ),
        waves,
    ),
    "torch_encoder": Architecture(Encoder, padded_rows),
    "torch_recurrent": Architecture(
        Recurrent, lambda rng: {"input_ids": tokens(rng)["input_ids"]}
    ),
    "torch_attention": Architecture(Attention, padded_rows),
    "torch_transformer": Architecture(Translator, _pair),
    "data_parallel": Architecture(lambda: nn.DataParallel(Perceptron()), _pair),
    "always_dropping": Architecture(AlwaysDropping, rows),
}  # fmt: skip
