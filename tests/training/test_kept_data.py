"""What a run keeps of the data it began with, and what it holds later data against."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits_resnet, tiny
from conftest import SHORT_RUN
from early_exit.data import sources
from early_exit.runs import assemble, checkpoint, layout
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.training import loop


def save(run, workdir, **metadata):
    """A checkpoint of a run's first step."""
    layout.save_config(run.config, workdir)
    with checkpoint.Saver(workdir / layout.CHECKPOINTS) as saver:
        saver.save(1, run.state(), {}, run.metadata | metadata)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}, and so on\n" for i in range(20_000)))
    return path


@pytest.fixture
def text(book):
    return read(override(tiny.get_config(), SHORT_RUN | {"data.source": str(book)}))


def test_a_run_keeps_what_text_it_was_tuned_on(book, text, tmp_path):
    run = loop.Run(text, tmp_path / "run")
    kept = {"train": sources.data_hash(sources.documents(str(book), "train"))}
    assert run.metadata["data"] == kept
    save(run, tmp_path / "run")
    tuned = assemble.load_tuned(tmp_path / "run")
    assert tuned.data == kept == loop.Run(text, tmp_path / "run").metadata["data"]
    assemble.export(tuned, tmp_path / "heads", exits_only=True)
    assert assemble.load_tuned(tmp_path / "heads").data == kept


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f"new\n{text}",
        lambda text: text.replace("line 777,", "line 778,"),
        lambda text: text[: len(text) // 2],
    ],
)
def test_a_run_does_not_go_on_with_other_text(book, text, tmp_path, change):
    save(loop.Run(text, tmp_path / "run"), tmp_path / "run")
    book.write_text(change(book.read_text()))
    with pytest.raises(ValueError, match="book.txt is not what the run in .* began with; put it"):
        loop.Run(text, tmp_path / "run")


def test_a_run_that_kept_nothing_goes_on_and_tells(text, tmp_path, caplog):
    run = loop.Run(text, tmp_path / "run")
    kept = run.metadata.pop("data")
    save(run, tmp_path / "run")
    assert loop.Run(text, tmp_path / "run").metadata["data"] == kept
    tuned = assemble.load_tuned(tmp_path / "run")
    assert tuned.data is None and tuned.feed is tuned.feed
    assert caplog.text.count("run does not say what text it was tuned on") == 2  # by each command


@pytest.fixture
def images(tmp_path):
    """A config of pictures of ants and bats, and their folder."""
    pictures, rng = tmp_path / "pictures", np.random.default_rng(0)
    for i in range(60):
        file = pictures / ["ant", "bat"][i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file)
    config = digits_resnet.get_config("width=4")
    config.data.source, config.data.batch_size = f"images:{pictures}", 4
    config.model.new.num_classes = 2
    return read(config), pictures


def behind(config, workdir):
    """The config of a run that tunes new exits behind the network of another."""
    frozen = {"tune.train": "exits", "model.source": str(workdir), "model.new": {}}
    return changed(config, frozen)


def test_classes_are_those_that_a_run_began_with(images, tmp_path):
    config, pictures = images
    run = loop.Run(config, tmp_path / "run")
    kept = {"classes": ["ant", "bat"], "image_size": [8, 8]}
    assert run.metadata["data"] == kept
    save(run, tmp_path / "run")
    frozen = behind(config, tmp_path / "run")
    assert loop.Run(frozen, tmp_path / "frozen").metadata["data"] == kept
    (pictures / "ant").rename(pictures / "cow")
    for settings, workdir in ((config, "run"), (frozen, "frozen")):
        with pytest.raises(ValueError, match="'cow' new, and 'ant' missing"):
            loop.Run(settings, tmp_path / workdir)
    # Trained as a whole, the network may learn other classes.
    joint = changed(frozen, {"tune.train": "all"})
    assert loop.Run(joint, tmp_path / "joint").metadata["data"]["classes"] == ["bat", "cow"]


def test_heads_behind_a_network_have_its_order_of_classes(images, tmp_path):
    config, _ = images
    run = loop.Run(config, tmp_path / "run")
    save(run, tmp_path / "run", data={"classes": ["bat", "ant"], "image_size": [8, 8]})
    run = loop.Run(behind(config, tmp_path / "run"), tmp_path / "frozen")
    assert run.metadata["data"]["classes"] == ["bat", "ant"]
    rows = run.feed.examples("train")
    names = {jax.device_get(row["image"]).tobytes(): row["label"] for row in rows}
    own = loop.Run(config, tmp_path / "new").feed.examples("train")
    assert names == {row["image"].tobytes(): 1 - row["label"] for row in own}
