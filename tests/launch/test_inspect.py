"""What `launch.inspect` says of sources, runs and exports, and that it reads no weights for it."""

import pathlib
import re

import in_process
import pytest

from configs import digits_resnet, news_minilm
from configs import tiny as tiny_config
from conftest import build
from early_exit import tree
from early_exit.backbones import identity
from early_exit.exits import artefact
from early_exit.pretrained.export import write_backbone
from early_exit.runs import assemble, checkpoint, layout
from early_exit.settings.read import as_dict, read
from early_exit.storage import files

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(files, "read_tensor", refuse)


@pytest.fixture
def inspected():
    """(facts, rows of both tables by their first column, the whole text) of what is printed."""

    def run(name):
        done = in_process.run("inspect", name)
        assert not done.returncode, done.stderr
        text = done.stdout
        facts = dict(
            re.split(r"  +", line, maxsplit=1) for line in text.split("\n\n")[0].split("\n")
        )
        rows = {}
        for line in text.split("\n"):
            match = re.fullmatch(r"(\w.*?)((?:  +\d[\d.e-]*)+)", line)
            if match:
                rows[match[1]] = [float(number) for number in match[2].split()]
        return facts, rows, text

    return run


def test_a_source_of_weights(inspected):
    facts, rows, text = inspected(FIXTURES / "tiny_chat")
    assert facts == {
        "source": str(FIXTURES / "tiny_chat"),
        "family": "llama",
        "depth": "6 blocks",
        "width": "32",
        "parameters": "76,192",
        "dtype": "float32, 0.3 MB (stored as F16)",
        "context": "512 positions",
        "vocabulary": "320 tokens",
    }
    attention, mlp = 32 * 32 * 2 + 2 * 32 * 16, 3 * 32 * 64
    block = attention + mlp + 64
    assert rows["blocks 1–6, each"][1] == 1
    assert rows["readout"][3] == pytest.approx(4 * (320 * 32 + 32) / 1e6, abs=1e-3)
    assert rows["readout"][4] == pytest.approx((320 * 32 + 32) / block, abs=1e-3)
    assert rows["full model"][2] == rows["full model"][5] == 1
    assert "after any of the blocks 1–5" in text and "exits" not in facts
    assert rows["layer"][1] == pytest.approx((block + 32 + 320 * 32) / block, abs=1e-3)


def test_a_run_before_its_first_checkpoint(inspected, tmp_path):
    config = tiny_config.get_config()
    config.model.source = str(FIXTURES / "tiny_chat")
    layout.save_config(read(config), tmp_path)
    facts, rows, _ = inspected(tmp_path)
    assert facts["source"] == str(FIXTURES / "tiny_chat")
    assert facts["state"] == "a run without a checkpoint yet"
    assert facts["exits"] == "after blocks 2, 4"
    assert facts["heads"] == "mlp, own output matrix, 128 classes"
    first, second = (rows[f"head after block {point}"] for point in (2, 4))
    blocks = rows["blocks 1–6, each"]
    leaving = rows["all, leaving after 4"]
    assert first == second
    # Four blocks, and the heads of both exits passed.
    assert leaving[5] == pytest.approx(4 * blocks[5] + 2 * first[5], abs=4e-3)


def test_a_run_of_a_network_made_anew(inspected, tmp_path):
    config = read(digits_resnet.get_config("width=4"))
    layout.save_config(config, tmp_path)
    facts, rows, _ = inspected(tmp_path)
    assert facts["source"] == "made anew" and facts["family"] == "resnet_cifar"
    network = assemble.abstract_model(config).config
    assert facts["classes"] == "10" and facts["depth"] == f"{network.depth} blocks"
    assert facts["dtype"].endswith(" MB") and facts["exits"] == "after blocks 1, 2"
    assert rows["all, leaving after 1"][2] < 1


def test_a_run_whose_network_is_changed(inspected, tmp_path):
    """What the source leaves open is shown as the run has it."""
    source = str(FIXTURES / "tiny_bert")
    config = news_minilm.get_config("data=unused,num_classes=4,points=1")
    config.model.source = source
    layout.save_config(read(config), tmp_path / "changed")
    facts, rows, _ = inspected(tmp_path / "changed")
    assert facts["source"] == f"{source}, changed" and facts["classes"] == "4"
    assert "readout" in rows and "head after block 1" in rows
    unchanged, _, _ = inspected(source)
    assert unchanged["classes"] == "3"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_run_behind_a_run(inspected, tmp_path, monkeypatch, depth):
    """And behind one behind one: the network is that of the first."""
    monkeypatch.setattr(checkpoint, "latest_step", lambda folder: 3 if folder.exists() else None)
    config, first = digits_resnet.get_config("width=4"), tmp_path / "run0"
    for i in range(depth + 1):
        folder = tmp_path / f"run{i}"
        (folder / layout.CHECKPOINTS).mkdir(parents=True)
        (folder / "config.json").write_text(config.to_json())
        config = digits_resnet.get_config(f"train=exits,points=1,source={folder}")
    facts, _, _ = inspected(folder)
    assert facts["source"] == f"the run in {tmp_path / f'run{depth - 1}'}"
    assert facts["state"] == "a run at step 3" and facts["exits"] == "after blocks 1"
    network = assemble.abstract_model(layout.load_config(first)).config
    assert (facts["family"], facts["width"]) == ("resnet_cifar", str(network.width))


@pytest.mark.parametrize("beside", [True, False])
def test_an_export(inspected, tmp_path, beside):
    model, params = build(head="norm", output="shared", classes=9)
    source, folder = tmp_path / "source", tmp_path / "out"
    for path in (source, folder) if beside else (source,):
        path.mkdir()
        write_backbone(path, model.config, params["backbone"])
    folder.mkdir(exist_ok=True)
    config = tiny_config.get_config("classes=9")
    config.model.source = str(source)
    known = identity.of(model.config, params["backbone"])
    artefact.write(folder, model, params, known, as_dict(read(config)), step=7)
    facts, rows, _ = inspected(folder)
    assert facts["source"] == str(folder if beside else source)
    with_or_without = "with" if beside else "without"
    assert facts["state"] == f"exported from step 7, {with_or_without} its backbone"
    assert facts["heads"] == "norm, shared output matrix, 9 classes"
    assert facts["parameters"] == f"{tree.count(params['backbone']):,}"
    share = 4 * (24 + 10 * 24) / tree.size_in_bytes(params["backbone"])
    assert rows["head after block 2"][5] == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "classes"), [("resnet_basic", "7"), ("resnet_bottleneck", "none")]
)
def test_a_classifier(inspected, name, classes):
    facts, rows, text = inspected(FIXTURES / name)
    assert facts["family"] == "resnet" and facts["classes"].startswith(classes)
    assert rows["stem"][0] > 0 and ("readout" in rows) == (classes != "none")
    assert ("no output matrix yet" in text) == (classes == "none")
    assert ("grid" in text) == (classes != "none")


def test_every_family_is_inspected(inspected):
    for config in FIXTURES.glob("*/config.json"):
        facts, rows, _ = inspected(config.parent)
        assert rows["full model"][2] == 1 and int(facts["depth"].split()[0]) > 1


def test_what_is_no_model(tmp_path):
    done = in_process.run("inspect", tmp_path)
    assert done.returncode == 1 and "has no config.json" in done.stderr
    done = in_process.run("inspect")
    assert done.returncode == 1 and "name one thing" in done.stdout + done.stderr
