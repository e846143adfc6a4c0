"""What a run refuses before it loads anything, or at least before its first step."""

import pathlib

import pytest

from configs import digits_resnet, news_minilm, tiny
from conftest import SHORT_RUN
from early_exit.backbones.encoder import EncoderConfig
from early_exit.data import feed, sources
from early_exit.distillation import hidden_states
from early_exit.runs import assemble
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.training import loop

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SHORT = read(override(tiny.get_config(), SHORT_RUN | {"tune.steps": 2, "tune.warmup_steps": 1}))


@pytest.fixture
def no_weights(monkeypatch):
    def load_backbone(*args):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(assemble, "load_backbone", load_backbone)


@pytest.mark.parametrize(
    ("name", "positions", "exits"),
    [
        ("tiny_gpt2", 48, (1,)),  # learned
        ("tiny_llama", 64, (1,)),  # rotary
        ("tiny_neox", 64, (1,)),  # in part
    ],
)
def test_rows_longer_than_the_context(no_weights, tmp_path, name, positions, exits):
    config = changed(SHORT, {"model.source": str(FIXTURES / name), "exits.points": exits})
    config = changed(config, {"exits.head": "norm", "data.sequence_length": positions + 1})
    said = f"data.sequence_length={positions + 1} is beyond the {positions} positions .* set it to"
    with pytest.raises(ValueError, match=said):
        loop.Run(config, tmp_path / "run")
    with pytest.raises(ValueError, match=said):
        hidden_states.fill(config, tmp_path / "cache", batches=1, top_k=4)
    assert not list(tmp_path.iterdir())
    # Just as many are what it was made for.
    with pytest.raises(AssertionError, match="weights were loaded"):
        loop.Run(changed(config, {"data.sequence_length": positions}), tmp_path / "run")


def test_rows_longer_than_an_encoders_context():
    config = read(news_minilm.get_config())
    network = EncoderConfig(
        vocab_size=9, width=8, depth=2, heads=2, mlp_width=8, context_length=127, num_classes=5
    )
    with pytest.raises(ValueError, match="is beyond the 127 positions"):
        feed.make(config, network, tokenizer=None)


def test_images_have_no_length():
    config = changed(read(digits_resnet.get_config("width=4")), {"data.sequence_length": 10**6})
    feed.check_length(config.data, assemble.abstract_model(config).config)


def texts(folder, split):
    """Files of text, none of which falls into the split."""
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.txt").write_text(f"number {i}\n" * 40)
    for name, _ in sources.documents(str(folder), split):
        (folder / pathlib.Path(name).name).unlink()
    return folder


@pytest.mark.parametrize("split", ["validation", "calibration"])
def test_a_split_that_is_needed_later_is_missed_before_the_first_step(tmp_path, monkeypatch, split):
    source = texts(tmp_path / "texts", split)
    config = changed(SHORT, {"data.source": str(source)})
    stepped = []
    monkeypatch.setattr(loop.Run, "place_batch", lambda *args: stepped.append(args))
    with pytest.raises(ValueError, match=f"the {split} split of .* is empty"):
        loop.tune(config, tmp_path / "run")
    assert not stepped and not (tmp_path / "run/checkpoints").exists()
