"""What people do with a network of transformers works after compression too."""

import importlib.util
import os

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may be downloaded

from torch import nn  # noqa: E402

from matfact.compare._weights import DEMO_PACKAGE  # noqa: E402
from matfact.torch import compress  # noqa: E402
from matfact.torch.layers.conv import FactorizedConv  # noqa: E402
from matfact.torch.layers.linear import FactorizedLinear  # noqa: E402
from tests.transformers.networks import (  # noqa: E402
    NAMES,
    WRITERS,
    compressed,
    inputs,
    logits,
)


def few(*names, but=()):
    """Return the given networks for every run, and the others for the slow one."""
    later = [name for name in NAMES if name not in (*names, *but)]
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in later)]


def with_dense_weights(model):
    """Return a copy whose factorized layers are dense ones with the same weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (FactorizedLinear, FactorizedConv)):
            parent, _, own = name.rpartition(".")
            if not isinstance(model.get_submodule(parent), nn.ModuleList) or "kernels" not in name:
                setattr(model.get_submodule(parent), own, module.to_dense())
    return model


def prompt(name):
    tokens = inputs(name)["input_ids"][:2, :6]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("name", WRITERS)
def test_texts_are_those_of_the_equal_dense_network(name):
    small, dense = compressed(name), with_dense_weights(compressed(name))
    ways = [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"num_beams": 3},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    ]
    texts = []
    for settings in ways:
        settings |= {"max_new_tokens": 5, "min_new_tokens": 5}
        pair = [model.generate(**prompt(name), **settings) for model in (small, dense)]
        assert torch.equal(*pair)
        texts.append(pair[0])
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[3])


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        mask_token="w63", unk_token="w3",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "task"), [
    ("llama", "text-generation"), ("gpt2", "text-generation"), ("bert", "fill-mask"),
])  # fmt: skip
def test_pipelines(name, task):
    text = "w5 w9 w63" if task == "fill-mask" else "w5 w9"
    answers = []
    for model in (compressed(name), with_dense_weights(compressed(name))):
        run = transformers.pipeline(task, model=model, tokenizer=tokenizer(), device="cpu")
        settings = {"max_new_tokens": 4, "do_sample": False} if task != "fill-mask" else {}
        answers.append(run(text, **settings))
    texts = [[each.get("generated_text", each.get("token_str")) for each in a] for a in answers]
    assert texts[0] == texts[1]


def test_pipeline_of_images():
    model = compressed("vit")
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    run = transformers.pipeline("image-classification", model=model, image_processor=processor)
    from PIL import Image

    image = Image.effect_mandelbrot((20, 20), (-2, -1, 1, 1), 30).convert("RGB")
    assert len(run(image, top_k=2)) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    batch = inputs(name)
    exact = logits(compressed(name), batch)
    half = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}
    outputs = logits(compressed(name).to(dtype), half)
    assert outputs.dtype == dtype
    error = (outputs.float() - exact).norm() / exact.norm()
    assert 0 < error < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", few("qwen3"))
def test_compiled_networks_answer_the_same(name):
    model, batch = compressed(name), inputs(name)
    expected = logits(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, batch), expected, rtol=1e-3, atol=1e-4)


class Rows(torch.utils.data.Dataset):
    def __init__(self, name):
        batch = inputs(name, seed=5)
        self.rows = [{k: v[i] for k, v in batch.items()} for i in range(6)]
        for i, row in enumerate(self.rows):
            tokens = row.get("decoder_input_ids", row.get("input_ids"))
            row["labels"] = torch.tensor(i % 2) if tokens is None else tokens.clone()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


# Not ViT, of which transformers 5 saves weights by older names than its Trainer looks for: those of
# the dense network are lost on resuming too.
@pytest.mark.parametrize("name", few("llama", "bert", but=["vit"]))
def test_training_goes_on_where_it_stopped(name, tmp_path):
    pytest.importorskip("accelerate")

    def trainer(folder, **settings):
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=2, max_steps=4, save_steps=2,
            learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **settings,
        )  # fmt: skip
        return transformers.Trainer(compressed(name), arguments, train_dataset=Rows(name))

    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 4
    states = whole.model.state_dict(), again.model.state_dict()
    start = compressed(name).state_dict()
    assert any(not torch.equal(start[key], states[0][key]) for key in start if "factors" in key)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_sentences_are_encoded():
    library = pytest.importorskip("sentence_transformers")
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{DEMO_PACKAGE} is not installed")
    folder = f"{next(iter(spec.submodule_search_locations))}/model"
    modules = (
        library.sentence_transformer.modules
        if hasattr(library, "sentence_transformer")
        else library.models
    )
    inner = modules.Transformer(folder)
    encoder = library.SentenceTransformer(
        modules=[inner, modules.Pooling(inner.get_embedding_dimension()), modules.Normalize()],
        device="cpu",
    )
    texts = ["Fresh bread is sold from seven.", "The river rose quickly."]
    before = encoder.encode(texts)
    small, _ = compress(encoder, "magnitude", density=0.5, layers="encoder.layer")
    after = small.encode(texts)
    assert after.shape == before.shape
    cosines = (before * after).sum(1)
    assert ((cosines > 0.6) & (cosines < 0.999)).all()


def test_evaluation_harness():
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    asked = [("w5 w9", " w7 w8"), ("w11", " w12"), ("w20 w21 w22", " w6")]
    found = []
    for model in (compressed("llama"), with_dense_weights(compressed("llama"))):
        language_model = harness.HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=2)
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
        found.append(language_model.loglikelihood(requests, disable_tqdm=True))
    for (score, is_greedy), (expected, was_greedy) in zip(*found, strict=True):
        assert score == pytest.approx(expected, abs=1e-3)
        assert score < 0
        assert is_greedy == was_greedy


def exported(model, folder, args=(), **batch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(
        model, args, folder / "model.onnx", kwargs=batch or None, dynamo=True, verbose=False
    )
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    size = sum(file.stat().st_size for file in folder.iterdir())
    values = [*args, *batch.values()]
    given = {i.name: x.numpy() for i, x in zip(session.get_inputs(), values, strict=True)}
    return torch.from_numpy(session.run(None, given)[0]), size


class Logits(nn.Module):
    """A network that returns a tensor, as graphs do."""

    def __init__(self, model, settings):
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, **batch):
        return self.model(**batch, **self.settings).logits


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "double_binary"])
def test_exported_graphs_of_codes_and_signs(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256)).eval()
    settings = {"density": 0.1, "value_bits": 4} if method == "magnitude" else {}
    small = compress(model, method, **settings).model
    x = torch.randn(4, 256)
    outputs, size = exported(small, tmp_path, (x,))
    torch.testing.assert_close(outputs, small(x), rtol=1e-4, atol=1e-4)
    if method == "magnitude":  # of so few signs, the exporter multiplies out the table
        assert size < 0.3 * model[0].weight.nbytes


@pytest.mark.parametrize("name", few("vit"))
def test_exported_graphs_answer_the_same(name, tmp_path):
    model, batch = compressed(name), inputs(name)
    expected = logits(model, batch)
    settings = {"use_cache": False} if name in WRITERS else {}
    outputs, _ = exported(Logits(model, settings), tmp_path, **batch)
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-3)
