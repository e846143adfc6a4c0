"""Every command on every kind of run: pairs of features are where commands fail.

All models are as small as they can be and share their shapes, and all commands run in this process:
what one has compiled, the others need not.
"""

import functools
import json
import pathlib
import re
import shutil

import in_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins
import tokenizers
import transformers
from PIL import Image

from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.backbones.encoder import EncoderConfig
from early_exit.pretrained.export import write_backbone
from early_exit.training import bad_batch

ROOT = pathlib.Path(__file__).parents[2]
CHAT = ROOT / "tests/fixtures/tiny_chat"
WORDS = [f"word{i}" for i in range(40)]
CONTROL = re.compile(r"\x1b\[[0-9;]*m")

TUNE = {
    "tune.steps": 2,
    "tune.warmup_steps": 1,
    "tune.checkpoint_every": 2,
    "tune.validate_every": 2,
    "tune.validation_batches": 1,
}
DECODER = {
    **TUNE,
    "data.sequence_length": 16,
    "data.batch_size": 2,
    "calibrate.epsilon": 0.5,
    "calibrate.batches": 8,
    "evaluate.epsilons": "(0.9,)",
    "evaluate.prompts": 1,
    "evaluate.prompt_tokens": 6,
    "evaluate.new_tokens": 4,
    "evaluate.rounds": 1,
    "evaluate.sample_tokens": 3,
    "evaluate.questions": "('word1 word2?',)",  # one alone
}
CLASSIFIER = {
    **TUNE,
    "data.batch_size": 8,
    "calibrate.batches": 4,
    "evaluate.batches": 1,
    "evaluate.epsilons": "(0.5,)",
    "evaluate.rounds": 1,
    "evaluate.singles": 2,
    "evaluate.rows": 4,
    "evaluate.sizes": "(2,)",
    "evaluate.examples": 1,
}
# What makes the kinds of runs, beside the settings that all share.
DECODERS = {
    "frozen": {},
    "joint": {"tune.train": "all", "tune.weights": "(0.1, 0.1)"},
    "layerskip": {
        "tune.train": "all",
        "tune.curriculum": "rotational",
        "tune.curriculum_period": 2,
        "tune.layer_dropout": 0.1,
        "model.scan": True,
    },
    "cached": {"tune.hidden_states": "{root}/states"},
    "cached rotational": {
        "tune.hidden_states": "{root}/states",
        "tune.curriculum": "rotational",
        "tune.curriculum_period": 2,
    },
    "recurrent": {"exits.recurrent_taps": "(1, 3)"},
    "recurrent alone": {"exits.recurrent_taps": "(2, 3)", "exits.points": "()"},
    "cached recurrent": {
        "tune.hidden_states": "{root}/states",
        "exits.recurrent_taps": "(1, 2)",
        "exits.recurrent_blocks": 0,
    },
    "behind a run": {"model.source": "{root}/joint"},
    "no chat template": {"model.source": "{root}/plain"},
}
CLASSIFIERS = {
    "resnet": ["--config=configs/digits_resnet.py:width=4"],
    "resnet behind a run": [
        "--config=configs/digits_resnet.py:train=exits,source={root}/resnet",
    ],
    "encoder": [
        "--config=configs/news_minilm.py:data=rows:{root}/rows.jsonl,num_classes=3,points=1:2",
        "--config.model.source={root}/bert",
        "--config.data.sequence_length=16",
    ],
    "encoder behind a run": [
        "--config=configs/news_minilm.py:data=rows:{root}/rows.jsonl,num_classes=3,points=1:2,"
        "train=exits,source={root}/encoder",
        "--config.data.sequence_length=16",
    ],
}
METHODS = {
    "ltt": ["--method=ltt", "--alpha=0.9"],
    "ucb": ["--method=ucb", "--alpha=0.9", "--among=leavers"],
    "clopper_pearson": ["--method=clopper_pearson", "--alpha=0.9", "--unit=position"],
    "search": ["--method=search", "--budget=2"],
    "joint": ["--method=joint", "--budget=2", "--abstain=0.2"],
    "temperature": ["--temperature", "--epsilon=0.5"],
    "abstain": ["--abstain=0.2", "--epsilon=0.5"],
    "never": ["--method=ltt", "--alpha=0.001", "--allow_never"],
}


def ok(command, *flags) -> str:
    """What a command prints that has to succeed."""
    done = in_process.run(command, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(command, *flags) -> str:
    """The sentence with which a command refuses."""
    done = in_process.run(command, *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


def settings(root, *maps) -> list[str]:
    return [
        f"--config.{name}={str(value).format(root=root)}"
        for of in maps
        for name, value in of.items()
    ]


def drawn(config):
    return base.init(config, jax.random.key(0), jnp.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sources, data, and room for the runs."""
    root = tmp_path_factory.mktemp("matrix")
    decoder = DecoderConfig(
        vocab_size=320, width=8, depth=3, heads=2, kv_heads=1, head_dim=4, mlp_width=8,
        context_length=64,
    )  # fmt: skip
    for name, template in (("chat", True), ("plain", False)):
        (root / name).mkdir()
        write_backbone(root / name, decoder, drawn(decoder))
        for part in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if template or part != "chat_template.jinja":
                shutil.copy(CHAT / part, root / name)
    encoder = EncoderConfig(
        vocab_size=42, width=8, depth=3, heads=2, mlp_width=8, context_length=32, num_classes=0
    )
    (root / "bert").mkdir()
    write_backbone(root / "bert", encoder, drawn(encoder))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(
        root / "bert"
    )
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(WORDS, 12)), "label": ["art", "law", "sea"][i % 3]}
        for i in range(90)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def decoder(root):
    """A kind of run → its folder, tuned and calibrated."""
    base_flags = [
        "--config=configs/tiny.py:head=norm,classes=0,points=1:2",
        f"--config.model.source={root / 'chat'}",
        f"--config.data.source={root / 'rows.jsonl'}",
        *settings(root, DECODER),
    ]

    @functools.cache
    def made(kind):
        if "cached" in kind:
            ok("cache", *base_flags, f"--hidden_states={root / 'states'}", "--top_k=4")
        if kind == "behind a run":
            made("joint")
        folder = root / kind
        ok("tune", *base_flags, *settings(root, DECODERS[kind]), f"--workdir={folder}")
        ok("calibrate", f"--workdir={folder}")
        return folder

    return made


@pytest.fixture(scope="module")
def classifier(root):
    """A kind of run → its folder, tuned and calibrated."""

    @functools.cache
    def made(kind):
        if kind.endswith(" behind a run"):
            made(kind.removesuffix(" behind a run"))
        folder = root / kind
        flags = [flag.format(root=root) for flag in CLASSIFIERS[kind]]
        ok("tune", *flags, *settings(root, CLASSIFIER), f"--workdir={folder}")
        ok("calibrate", f"--workdir={folder}")
        return folder

    return made


def generate(folder, *flags):
    return ok("generate", f"--workdir={folder}", "--prompt=word1 word2 word1 word2", "--raw",
              "--max_new_tokens=5", *flags)  # fmt: skip


def text_of(printed):
    """What was answered, its colours taken off."""
    return CONTROL.sub("", printed).rsplit("\n\n", 1)[0]


@pytest.mark.long
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_of_every_kind(decoder, kind, tmp_path):
    """As the run, as its export, and as the export of that."""
    folder, answers = decoder(kind), set()
    where = "what blocks 2, 3 put out" if kind == "recurrent alone" else "after blocks 1, 2"
    assert where in ok("inspect", folder)
    ok("export", f"--workdir={folder}", f"--to={tmp_path / 'out'}")
    ok("export", f"--workdir={tmp_path / 'out'}", f"--to={tmp_path / 'again'}")
    for place in (folder, tmp_path / "out", tmp_path / "again"):
        answers.add(text_of(generate(place, "--colour=always")))
        assert where in ok("inspect", place)
    assert len(answers) == 1
    for place in (folder, tmp_path / "out"):
        printed = ok("evaluate", f"--workdir={place}")
        assert max(map(len, printed.splitlines())) <= 100
        assert ("left out" in printed) == (kind == "no chat template")
        html = pathlib.Path(ok("report", f"--workdir={place}").strip()).read_text()
        # Without exits there are no curves of their losses.
        plots = 3 if place == folder and kind != "recurrent alone" else 2
        assert html.count("<svg") == plots


@pytest.mark.long
def test_a_network_whose_encoder_reads_prompts(tmp_path):
    """Every command on it: the run, its export, and behind a run; what has no sense says so."""
    config = stand_ins.answering(tmp_path / "root", 300)
    source = [f"--config.model.source={config.model.source}"]
    data = [f"--config.data.source={config.data.source}"]
    lengths = ["--config.data.sequence_length=12", "--config.data.prompt_length=16"]
    flags = ["--config=configs/tiny.py:classes=0,points=1:2", *lengths, *data]
    sizes = settings(tmp_path, TUNE, {"calibrate.batches": 8, "evaluate.rounds": 1})
    run, joint = f"--workdir={tmp_path / 'run'}", f"--workdir={tmp_path / 'joint'}"
    ok("tune", *flags, *source, *sizes, run)
    ok("tune", *flags, *source, *sizes, "--config.tune.train=all",
       "--config.tune.weights=(0.1, 0.1)", joint)  # fmt: skip
    ok("tune", *flags, f"--config.model.source={tmp_path / 'joint'}", *sizes,
       f"--workdir={tmp_path / 'behind'}")  # fmt: skip
    for place in ("run", "joint", "behind"):
        ok("calibrate", f"--workdir={tmp_path / place}")
    ok("export", run, f"--to={tmp_path / 'out'}")
    ok("export", f"--workdir={tmp_path / 'out'}", f"--to={tmp_path / 'again'}")
    said = [text_of(generate(tmp_path / place)) for place in ("run", "out", "again")]
    assert len(set(said)) == 1 and said[0]
    for mode in ("lossy", "deferred", "verified"):
        full = text_of(generate(tmp_path / "behind", "--full"))
        found = text_of(generate(tmp_path / "behind", f"--mode={mode}", "--colour=always"))
        assert found == full or mode != "verified"
    given, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    given.write_text("word4 word5\nword6\nword7 word8 word9\n")
    ok("generate", run, f"--input={given}", f"--output={out}", "--batch=2", "--max_new_tokens=5")
    assert len(out.read_text().splitlines()) == 3
    promised = ["--method=ltt", "--alpha=0.9", "--mode=lossy", f"--prompts={given}"]
    promised.append("--max_new_tokens=5")
    ok("calibrate", run, *promised)
    stated = json.loads((tmp_path / "run/policy.json").read_text())["provenance"]
    assert stated["unit"] == "prompt" and stated["units"] == 3
    for place in ("run", "out"):
        printed = ok("evaluate", f"--workdir={tmp_path / place}")
        assert max(map(len, printed.splitlines())) <= 100
        html = pathlib.Path(ok("report", f"--workdir={tmp_path / place}").strip()).read_text()
        assert "<svg" in html
    assert "after blocks 1, 2" in ok("inspect", tmp_path / "run")
    assert "an encoder reads" in refused(
        "cache", *flags, *source, *sizes, f"--hidden_states={tmp_path / 'states'}"
    )
    assert "an encoder reads" in refused("distill", *flags, *source, f"--made={tmp_path / 'made'}")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_calibration(decoder, method, tmp_path):
    """Its policy decodes; what it promises, and to whom, is said and kept."""
    folder = shutil.copytree(decoder("frozen"), tmp_path / "run")
    printed = ok("calibrate", f"--workdir={folder}", *METHODS[method])
    policy = json.loads((folder / "policy.json").read_text())
    promised = method in ("ltt", "ucb", "clopper_pearson", "never")
    assert ("not of decoded answers" in printed) == promised
    assert (policy["provenance"]["promise"] is not None) == promised
    generate(folder, "--colour=never")


def test_what_was_calibrated_is_what_is_measured_and_shown(decoder, tmp_path):
    """Not a fresh policy of some ε, be it as fast as it may; calibrated anew, the page says so."""
    folder = shutil.copytree(decoder("frozen"), tmp_path / "run")
    ok("calibrate", f"--workdir={folder}", *METHODS["ltt"])
    ok("evaluate", f"--workdir={folder}")
    found = json.loads((folder / "evaluation.json").read_text())
    policy = json.loads((folder / "policy.json").read_text())
    assert found["policy"]["thresholds"] == policy["thresholds"]
    assert [row["mode"] for row in found["decoding"]["rows"] if row["policy"] == "ltt 0.9"] == [
        "lossy",
        "deferred",
        "verified: exits",
        "verified: exits + lookup",
    ]
    html = pathlib.Path(ok("report", f"--workdir={folder}").strip()).read_text()
    assert "ltt 0.9, lossy decoding ran" in html.replace("\n", " ")
    ok("calibrate", f"--workdir={folder}", "--epsilon=0.5")
    html = pathlib.Path(ok("report", f"--workdir={folder}").strip()).read_text()
    assert "policy.json now holds another policy, epsilon 0.5" in html


@pytest.mark.long
def test_every_mode_answers_a_prompt_and_a_file(decoder, tmp_path):
    """In colour or not, onto a file that is there already; lossless modes say what all say."""
    folder, given, out = decoder("frozen"), tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    given.write_text("word1 word2 word1 word2\nword3\n")
    full = text_of(generate(folder, "--full", "--colour=always"))
    modes = {
        "lossy": ["--mode=lossy"],
        "deferred": ["--mode=deferred"],
        "verified: exits": ["--mode=verified", "--drafters=exits"],
        "verified: lookup": ["--mode=verified", "--drafters=lookup"],
        "verified: exits + lookup": ["--mode=verified"],
    }
    for mode, flags in modes.items():
        plain, coloured = (generate(folder, *flags, f"--colour={c}") for c in ("never", "always"))
        assert text_of(plain) == text_of(coloured) and f" tokens, {mode}, " in plain
        assert ("looked up" in coloured) == ("lookup" in mode)
        printed = ok("generate", f"--workdir={folder}", *flags, "--raw", "--batch=1",
                     "--max_new_tokens=5", f"--input={given}", f"--output={out}")  # fmt: skip
        assert f"\n{mode} " in printed and "modelled" in printed
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == 2
        if "verified" in mode:
            assert text_of(plain) == full


def test_a_run_without_a_policy(decoder, tmp_path):
    folder = shutil.copytree(decoder("frozen"), tmp_path / "run")
    (folder / "policy.json").unlink()
    assert "write one with `launch.calibrate`" in refused(
        "generate", f"--workdir={folder}", "--prompt=a"
    )
    assert text_of(generate(folder, "--mode=verified", "--drafters=lookup")) == text_of(
        generate(folder, "--full")
    )
    for epsilons, chosen in (([0.5, 0.9], "epsilon 0.9"), ([], None)):
        config = json.loads((folder / "config.json").read_text())
        config["evaluate"]["epsilons"] = epsilons
        (folder / "config.json").write_text(json.dumps(config))
        ok("evaluate", f"--workdir={folder}")
        found = json.loads((folder / "evaluation.json").read_text())
        assert found["decoding"]["chosen"] == chosen
        ok("report", f"--workdir={folder}")
    ok("export", f"--workdir={folder}", f"--to={tmp_path / 'out'}", "--exits_only")
    assert "without its backbone" in ok("inspect", tmp_path / "out")
    generate(tmp_path / "out", "--full")


def test_a_policy_that_is_switched_off_is_not_measured(decoder, tmp_path):
    folder = shutil.copytree(decoder("frozen"), tmp_path / "run")
    policy = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(policy | {"enabled": False}))
    ok("evaluate", f"--workdir={folder}")
    assert json.loads((folder / "evaluation.json").read_text())["decoding"]["chosen"] == (
        "epsilon 0.9"
    )
    ok("report", f"--workdir={folder}")


@pytest.mark.long
def test_what_was_recorded_is_read_back(decoder, tmp_path):
    """By other methods and other commands, until other data are asked for."""
    folder = shutil.copytree(decoder("recurrent"), tmp_path / "run")
    files = [folder / "records.npz", folder / "chains.npz"]

    def written():
        return [path.stat().st_mtime_ns for path in files]

    before = written()
    for more in (["calibrate", "--method=ltt", "--alpha=0.9"], ["evaluate"]):
        ok(more[0], f"--workdir={folder}", *more[1:])
        assert written() == before
    found = json.loads((folder / "evaluation.json").read_text())["decoding"]["rows"]
    assert {(row["policy"], row["mode"]) for row in found} >= {
        ("epsilon 0.9", "lossy"),
        ("epsilon 0.9", "deferred"),
    }
    config = json.loads((folder / "config.json").read_text())
    config["calibrate"]["batches"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    ok("calibrate", f"--workdir={folder}")
    assert all(now > then for now, then in zip(written(), before, strict=True))


def test_a_promise_that_the_data_cannot_give_is_refused(decoder, tmp_path):
    """Before the model runs; the policy that was there stays."""
    folder = shutil.copytree(decoder("frozen"), tmp_path / "run")
    (folder / "records.npz").unlink()
    before = (folder / "policy.json").read_bytes()
    said = refused("calibrate", f"--workdir={folder}", "--method=ltt", "--alpha=0.01")
    assert re.search(
        r"alpha=0.01 cannot be promised: \d+ independent texts to test on: alpha ≥", said
    )
    assert not (folder / "records.npz").exists()
    assert (folder / "policy.json").read_bytes() == before


@pytest.mark.long
def test_a_run_without_exits(root, tmp_path):
    flags = [
        "--config=configs/tiny.py:head=norm,classes=0,points=",
        f"--config.model.source={root / 'chat'}",
        f"--config.data.source={root / 'rows.jsonl'}",
        *settings(root, DECODER, {"tune.train": "all"}),
    ]
    ok("tune", *flags, f"--workdir={tmp_path}")
    for command in ("calibrate", "evaluate"):
        assert "has no exits (exits.points=())" in refused(command, f"--workdir={tmp_path}")
    assert "exits" not in ok("inspect", tmp_path).split("\n\n")[0]
    generate(tmp_path, "--full")


def test_a_run_that_was_killed_before_its_first_checkpoint(decoder, tmp_path):
    folder = shutil.copytree(decoder("frozen"), tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    assert "a run without a checkpoint yet" in ok("inspect", folder)
    for command in ("calibrate", "evaluate"):
        assert "no checkpoint in" in refused(command, f"--workdir={folder}")


def test_a_bad_batch_is_run_again(decoder, tmp_path):
    folder = shutil.copytree(decoder("frozen"), tmp_path / "run")
    said = refused("replay", f"--workdir={folder}")
    assert "bad_batch" in said
    tokens = np.ones((2, 16), np.int32)
    batch = {"tokens": tokens, "documents": tokens, "positions": tokens * np.arange(16)}
    bad_batch.save(folder, 3, {name: x.astype(np.int32) for name, x in batch.items()})
    assert "the batch of step 3" in ok("replay", f"--workdir={folder}")


@pytest.mark.long
def test_commands_on_the_other_kind_of_model(decoder, classifier):
    language, images = decoder("frozen"), classifier("resnet")
    assert "holds a classifier; use launch.classify" in refused(
        "generate", f"--workdir={images}", "--prompt=a"
    )
    assert "holds a language model; use launch.generate" in refused(
        "classify", f"--workdir={language}", "--split=test"
    )
    assert "--baseline is for classifiers" in refused(
        "evaluate", f"--workdir={language}", f"--baseline={images}"
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_of_every_kind(classifier, root, kind, tmp_path):
    """As the run and, where transformers has such a network, as its export."""
    folder, places = classifier(kind), [classifier(kind)]
    done = in_process.run("export", f"--workdir={folder}", f"--to={tmp_path / 'out'}")
    if done.returncode:  # an encoder that is pooled in another way than BERT is
        assert kind.startswith("encoder") and "transformers" in done.stderr
    else:
        ok("export", f"--workdir={tmp_path / 'out'}", f"--to={tmp_path / 'again'}")
        places += [tmp_path / "out", tmp_path / "again"]
    if kind.startswith("resnet"):
        given = tmp_path / "image.png"
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(given)
    else:
        given = tmp_path / "texts.txt"
        given.write_text("word1 word2\nword3\n")
    answers = set()
    for place in places:
        assert "after blocks 1, 2" in ok("inspect", place)
        answers.add(ok("classify", f"--workdir={place}", f"--input={given}").split("\n\n")[0])
    assert len(answers) == 1
    out = tmp_path / "answers.jsonl"
    out.write_text("old")
    flags = [f"--workdir={folder}", f"--input={given}", f"--output={out}", "--batch=2"]
    ok("classify", *flags, "--budget=1.5")
    assert "old" not in out.read_text()
    ok("classify", *flags, "--full")
    printed = ok("evaluate", f"--workdir={folder}")
    assert max(map(len, printed.splitlines())) <= 100
    html = pathlib.Path(ok("report", f"--workdir={folder}").strip()).read_text()
    assert html.count("<svg") == 4
    (folder / "policy.json").rename(tmp_path / "policy.json")
    try:
        ok("evaluate", f"--workdir={folder}")
        ok("report", f"--workdir={folder}")
    finally:
        (tmp_path / "policy.json").rename(folder / "policy.json")


@pytest.mark.long
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("clopper_pearson", "never")])
def test_every_method_of_calibration_on_a_classifier(classifier, method, tmp_path):
    folder = shutil.copytree(classifier("resnet"), tmp_path / "run")
    printed = ok("calibrate", f"--workdir={folder}", *METHODS[method])
    assert ("about new examples like" in printed) == (method in ("ltt", "ucb"))
    given = tmp_path / "image.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(given)
    ok("classify", f"--workdir={folder}", f"--input={given}")
