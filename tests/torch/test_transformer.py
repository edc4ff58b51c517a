"""A trained sentence transformer: embeddings before and after."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from matfact.compare._weights import DEMO_PACKAGE  # noqa: E402
from matfact.torch import compress  # noqa: E402

SENTENCES = [
    "The bakery opens at seven in the morning.",
    "Fresh bread is sold from seven o'clock.",
    "Nobody expected the river to rise so quickly.",
    "A flood surprised the whole valley last night.",
    "She tuned the old violin before the concert.",
    "The orchestra rehearsed the second movement twice.",
    "Please restart the server after the update.",
    "The new release fixes a bug in the parser.",
    "My grandmother grows tomatoes on her balcony.",
    "Winter came early, and the garden froze.",
    "Interest rates were raised by a quarter of a percent.",
    "The central bank worries about inflation.",
    "He missed the last train and walked home in the rain.",
    "Tickets for the night bus can be bought from the driver.",
    "Penguins keep their eggs warm on their feet.",
    "Astronomers found water on a distant planet.",
]


@pytest.fixture(scope="module")
def network():
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{DEMO_PACKAGE} is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batches = [
        dict(tokenizer(SENTENCES[i : i + 8], return_tensors="pt", padding=True)) for i in (0, 8)
    ]
    return model, batches


def similarity(model, other, batches):
    """Return the mean cosine similarity of the embeddings of two networks."""

    def embed(network):
        pooled = []
        for batch in batches:
            hidden = network(**batch).last_hidden_state
            weights = batch["attention_mask"][..., None]
            pooled.append((hidden * weights).sum(1) / weights.sum(1))
        return torch.cat(pooled)

    with torch.no_grad():
        return float(torch.cosine_similarity(embed(model), embed(other)).mean())


def test_embeddings_of_a_calibrated_encoder_are_nearer(network):
    model, batches = network
    layers = r"encoder\.layer\.[01]\."
    plain, _ = compress(model, "magnitude", density=0.4, layers=layers)
    small, report = compress(model, "magnitude", density=0.4, layers=layers, calibration=batches)
    assert [row.status for row in report] == ["compressed"] * 12
    near, far = (similarity(model, other, batches) for other in (small, plain))
    assert near > 0.95
    assert near > far


@pytest.mark.slow
def test_double_sparse_factors_of_the_whole_encoder_beat_pruning(network):
    model, batches = network
    found = {
        method: compress(model, method, density=0.5, layers="encoder", calibration=batches[:1])
        for method in ("dsf", "wanda")
    }
    cosines = {name: similarity(model, small, batches[1:]) for name, (small, _) in found.items()}
    assert cosines["dsf"] > cosines["wanda"]
