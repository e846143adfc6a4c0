"""The commands as a user types them, on the tiny model: what they print, write and refuse."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
import safetensors.numpy

from early_exit.report import tokens
from early_exit.runs.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY = "--config=configs/tiny.py"


def succeeded(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done):
    """What an error says; it is a sentence and not a stack."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def run(launch, tmp_path_factory):
    """A tuned and calibrated run on its own copy of the model, and what was printed."""
    model = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(ROOT / "tests/fixtures/tiny_chat", model)
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "model.source": model,
        "exits.gate": True,
        "evaluate.epsilons": "(0.6,)",
        "evaluate.prompts": 1,
        "evaluate.new_tokens": 8,
        "evaluate.sample_tokens": 8,
    }
    flags = [TINY, *(f"--config.{key}={value}" for key, value in settings.items())]
    tuned = succeeded(launch("tune", *flags, f"--workdir={folder}"))
    calibrated = succeeded(launch("calibrate", f"--workdir={folder}", "--epsilon=0.6"))
    return types.SimpleNamespace(
        folder=folder, model=model, flags=flags, tuned=tuned, calibrated=calibrated
    )


def test_tune_prints_the_exits_and_the_folder(run):
    header, _, *rows, path = run.tuned.splitlines()
    assert path == f"tuned exits in {run.folder}"
    names = header.split()
    last = [line for line in read_metrics(run.folder) if line["step"] == 12]
    validation = {name: value for line in last for name, value in line.items()}
    assert [row.split()[0] for row in rows] == ["2", "4", "6"]
    for row in rows:
        point, *printed = row.split()
        logged = [validation[f"validation/{name}/exit_{point}"] for name in names[1:]]
        assert [float(value) for value in printed] == pytest.approx(logged, abs=5e-4)


def test_calibrate_prints_what_it_saves(run):
    policy = json.loads((run.folder / "policy.json").read_text())
    *rows, path = run.calibrated.splitlines()[2:]
    assert path == f"policy in {run.folder / 'policy.json'}"
    assert [row.split()[-1] for row in rows[:2]] == [f"{t:.3f}" for t in policy["thresholds"]]
    assert rows[2].startswith(f"{policy['provenance']['coverage']:.1%} leave early")
    assert policy["provenance"]["epsilon"] == 0.6 and (run.folder / "records.npz").exists()


def test_evaluate_and_report(run, launch):
    printed = succeeded(launch("evaluate", f"--workdir={run.folder}"))
    assert max(map(len, printed.splitlines())) <= 100
    assert re.search(r"^full model +– +[\d.]+ +1\.000 +[\d.]+ +1\.000 +6\.000$", printed, re.M)
    assert re.search(r"^epsilon 0\.6 +verified: exits \+ lookup +[\d.]+ ", printed, re.M)
    results = json.loads((run.folder / "evaluation.json").read_text())
    own, rows = "epsilon 0.6", results["decoding"]["rows"]
    assert [(row["policy"], row["mode"]) for row in rows] == [
        (None, None),
        *((own, mode) for mode in ("lossy", "deferred", "verified: exits")),
        (None, "verified: lookup"),
        (own, "verified: exits + lookup"),
    ]
    full, lossy, _, *verified = rows
    assert results["decoding"]["chosen"] == own and lossy["epsilon"] == 0.6
    assert lossy["blocks_per_token"] < 6
    assert all(row["agreement"] == 1 for row in (full, *verified))
    policy = json.loads((run.folder / "policy.json").read_text())
    assert results["policy"] == {k: v for k, v in policy.items() if k != "enabled"}
    assert [len(sample["pieces"]) for sample in results["samples"]] == [8, 8]

    page = succeeded(launch("report", f"--workdir={run.folder}")).strip()
    assert page == str(run.folder / "report.html")
    html = pathlib.Path(page).read_text()
    assert str(run.model) in html and html.count("<svg") == 3


def answer(done):
    """(the text, {place: tokens that came from it}) of what `generate` printed."""
    text, _, summary = succeeded(done).rpartition("\n\n")
    left = re.search(r"proposed after (.*)", summary)[1]
    pairs = [pair.split(": ") for pair in left.split(", ")]
    return text, {place: int(count) for place, count in pairs}


def test_generate_chats_and_samples_by_the_seed(run, launch):
    flags = ["--prompt=Hello!", "--max_new_tokens=24", "--temperature=1", "--top_k=50", "--seed=3"]
    first, second = (
        answer(launch("generate", f"--workdir={run.folder}", *flags)) for _ in range(2)
    )
    assert first == second
    text, left = first
    assert sum(left.values()) == 24 and left["block 2"] + left["block 4"] > 0
    assert len(set(text)) > 5


def test_generate_at_full_depth(run, launch):
    """`--full` and a policy that is switched off both leave the exits alone."""
    raw = [f"--workdir={run.folder}", "--prompt=def f(self):", "--raw", "--max_new_tokens=24"]
    coloured, left = answer(launch("generate", *raw, "--full", "--colour=always"))
    assert left == {"block 2": 0, "block 4": 0, "block 6": 24} and "\x1b[" in coloured
    path = run.folder / "policy.json"
    policy = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(policy) | {"enabled": False}))
        assert answer(launch("generate", *raw)) == (re.sub(r"\x1b\[[0-9;]*m", "", coloured), left)
    finally:
        path.write_text(policy)


def test_generate_answers_a_file_losslessly(run, launch, tmp_path):
    """With lookup: what the exits and the text propose, the full model decides."""
    prompts = [
        "def f(self):",
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}\N{LINE SEPARATOR}1 2 1 2 1 2",
    ]
    given, answers = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    lines = [json.dumps({"prompt": text, "id": 7}, ensure_ascii=False) for text in prompts]
    given.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    raw = [f"--workdir={run.folder}", "--raw", "--max_new_tokens=24"]
    flags = [f"--input={given}", f"--output={answers}", "--mode=verified"]
    printed = succeeded(launch("generate", *raw, *flags))
    assert printed.splitlines()[-1] == str(answers)
    assert [path.name for path in answers.parent.iterdir()] == ["answers.jsonl"]
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert len(row["tokens"]) == len(row["depths"]) == len(row["log_probs"]) == 24
        facts = row["statistics"]
        assert facts["new_tokens"] == sum(facts["exits"].values()) == 24
        proposed = facts["exits"] | {"lookup": facts["exits"].get("lookup", 0)}
        for depth, place in [(2, "block 2"), (4, "block 4"), (6, "block 6"), (0, "lookup")]:
            assert row["depths"].count(depth) == proposed[place]
        assert sum(facts["drafts_accepted"]) == 24 - proposed["block 6"]
        assert facts["tokens_per_second"] > 0 and facts["blocks_per_token"] >= 6
    full, _ = answer(launch("generate", *raw, f"--prompt={prompts[0]}", "--full"))
    assert tokens.printable(rows[0]["text"]) == full


def test_generate_names_the_tokens_that_the_policy_rejects(run, launch, tmp_path):
    """Of those that all the model decided, the ones it gave less than the threshold."""
    folder, answers = tmp_path / "run", tmp_path / "answers.jsonl"
    shutil.copytree(run.folder, folder)
    policy = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(policy | {"reject": 0.5}))
    prompts, flagged = tmp_path / "prompts.txt", {}
    prompts.write_text("Hello!")
    raw = [f"--workdir={folder}", "--max_new_tokens=24"]
    for mode in ("lossy", "verified"):
        flags = [f"--input={prompts}", f"--output={answers}", f"--mode={mode}"]
        succeeded(launch("generate", *raw, *flags))
        row = json.loads(answers.read_text())
        unsure = [i for i, log_prob in enumerate(row["log_probs"]) if math.exp(log_prob) < 0.5]
        flagged[mode] = row["statistics"]["flagged"]
        early = {i for i in unsure if row["depths"][i] < 6}
        if mode == "lossy":  # else how many exits draft hangs on what steps cost here
            assert early and len(early) < len(unsure)
        assert flagged[mode] == [i for i in unsure if mode == "verified" or i not in early]
    printed = succeeded(launch("generate", *raw, "--prompt=Hello!")).splitlines()[-1]
    assert printed.startswith("less probable than 0.50: ")
    assert len(json.loads(f"[{printed.split(': ', 1)[1]}]")) == len(flagged["lossy"])


def test_generate_answers_the_lines_of_a_text_file(run, launch, tmp_path):
    """In turns, with fewer rows than prompts; lines are prompts, and what looks like JSON too."""
    given, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    given.write_text('Hello!\r\n \n{"prompt": 1}\nHello!')
    flags = [f"--input={given}", f"--output={answers}", "--batch=2", "--max_new_tokens=9"]
    printed = succeeded(launch("generate", f"--workdir={run.folder}", *flags))
    assert re.search(r"^mode +answers .*\n.*\nlossy +3 +9\.000 ", printed)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Hello!", '{"prompt": 1}', "Hello!"]
    assert rows[0]["tokens"] == rows[2]["tokens"] != rows[1]["tokens"]


@pytest.mark.parametrize(("drafters", "exits"), [("exits", ["2", "4"]), ("lookup", [])])
def test_generate_says_what_steps_cost(run, launch, drafters, exits):
    flags = ["--costs=2", "--mode=verified", f"--drafters={drafters}", "--pending=4"]
    printed = succeeded(launch("generate", f"--workdir={run.folder}", *flags))
    assert printed.startswith(f"verified: {drafters}, 2 rows together, on ")
    assert re.findall(r"^a pass of (\d) position", printed, re.M) == ["1", "4"]
    assert re.search(r"^a pass of 1 position +[\d.]+ +1\.000$", printed, re.M)
    assert re.findall(r"^saved by leaving after block (\d), asking", printed, re.M) == exits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --prompt, --input and --costs"),
        (["--prompt=a", "--input={file}", "--output={out}"], "give one of --prompt, --input"),
        (["--input={file}"], "--input and --output go together"),
        (["--prompt=a", "--output={out}"], "--input and --output go together"),
        (["--input={file}.txt", "--output={out}"], "there is no .*prompts.jsonl.txt"),
        (["--prompt=a", "--mode=quick"], "value should be one of <lossy|deferred|verified>"),
        (["--prompt=a", "--pending=1"], "pending must be 2 to 32 positions, not 1"),
    ],
)
def test_generate_refuses_what_it_cannot_answer(launch, tmp_path, flags, message):
    places = {"file": tmp_path / "prompts.jsonl", "out": tmp_path / "answers.jsonl"}
    places["file"].write_text('{"prompt": "a"}\n')
    flags = [flag.format(**places) for flag in flags]
    said = refused(launch("generate", f"--workdir={tmp_path}", *flags))
    assert re.search(message.replace("|", r"\|"), said), said
    assert not places["out"].exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "prompts.jsonl holds no prompt; write one on each line"),
        ('{"prompt": "a"}\n\n["prompt"]\n', "prompts.jsonl:3 is no JSON object; a row is one"),
        ('{"prompt": "a"}\n{"text": "b"}\n', 'prompts.jsonl:2 has no "prompt" string'),
        ("def f(self):\n", "prompts.jsonl:1 is not JSON"),
        ('{"prompt": ["a"]}\n', 'prompts.jsonl:1 has no "prompt" string'),
    ],
)
def test_a_file_of_something_else_is_refused(launch, tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    flags = [f"--workdir={tmp_path}", f"--input={path}", f"--output={tmp_path / 'out'}"]
    assert message in refused(launch("generate", *flags))


def test_another_amount_of_calibration_text_is_recorded_anew(run, launch, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    before = json.loads((folder / "policy.json").read_text())["provenance"]
    changed = ["--config.calibrate.batches=1", "--config.calibrate.confidence=gate"]
    succeeded(launch("calibrate", *run.flags, *changed, f"--workdir={folder}"))
    policy = json.loads((folder / "policy.json").read_text())
    assert policy["confidence"] == "gate"
    after = policy["provenance"]
    assert (before["num_batches"], after["num_batches"]) == (4, 1)
    assert after["positions"] < before["positions"]


def test_a_policy_of_other_heads_is_refused(run, launch):
    path = run.folder / "policy.json"
    policy = path.read_text()
    fields = json.loads(policy)
    fields["provenance"]["heads"] = "0" * 64
    try:
        path.write_text(json.dumps(fields))
        message = refused(launch("generate", f"--workdir={run.folder}", "--prompt=Hello!"))
    finally:
        path.write_text(policy)
    assert "was fitted to other heads than those of step 12" in message
    assert "run launch.calibrate again" in message


def test_heads_of_another_backbone_are_refused(run, launch):
    weights = run.model / "model.safetensors"
    original = weights.read_bytes()
    tensors = safetensors.numpy.load(original)
    tensors["model.layers.5.mlp.down_proj.weight"][0, 0] += 1
    try:
        safetensors.numpy.save_file(tensors, weights)
        message = refused(launch("generate", f"--workdir={run.folder}", "--prompt=Hello!"))
    finally:
        weights.write_bytes(original)
    assert "were tuned on a backbone with fingerprint" in message
    assert "name the backbone they were tuned on" in message


def test_a_folder_keeps_its_settings(run, launch):
    done = launch("tune", *run.flags, "--config.tune.steps=13", f"--workdir={run.folder}")
    assert "holds a run with other settings (tune.steps: 12 → 13)" in refused(done)
    assert json.loads((run.folder / "config.json").read_text())["tune"]["steps"] == 12


def test_generate_before_tune_says_what_to_do(launch, tmp_path):
    done = launch("generate", f"--workdir={tmp_path}", "--prompt=Hello!")
    assert f"no run in {tmp_path}" in refused(done) and "start with launch.tune" in done.stderr


@pytest.fixture(scope="module")
def exported(run, launch, tmp_path_factory):
    """What the run was exported to: with its backbone, and the exits only."""
    folder = tmp_path_factory.mktemp("exported")
    printed = succeeded(launch("export", f"--workdir={run.folder}", f"--to={folder / 'whole'}"))
    flags = [f"--workdir={run.folder}", f"--to={folder / 'exits'}", "--exits_only"]
    succeeded(launch("export", *flags))
    return types.SimpleNamespace(
        whole=folder / "whole", exits=folder / "exits", printed=printed, folder=folder
    )


def test_an_export_is_whole_and_says_what_it_wrote(exported):
    names = {path.name for path in exported.whole.iterdir()}
    heads = {"exits.json", "exits.safetensors", "policy.json"}
    backbone = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert heads | backbone <= names
    assert {path.name for path in exported.exits.iterdir()} == heads
    *rows, last = exported.printed.splitlines()
    assert {row.split()[0] for row in rows[2:]} == names
    assert last == f"exported to {exported.whole}"
    assert {path.name for path in exported.folder.iterdir()} == {"whole", "exits"}


def test_an_export_answers_like_its_run(run, exported, launch):
    raw = ["--prompt=def f(self):", "--raw", "--max_new_tokens=24"]
    first, whole, exits = (
        re.sub(r"[\d.]+ tokens/s", "", succeeded(launch("generate", f"--workdir={folder}", *raw)))
        for folder in (run.folder, exported.whole, exported.exits)
    )
    assert first == whole == exits


def test_an_export_is_moved_without_its_run(run, exported, launch, tmp_path):
    """It needs nothing of the folders it came from; heads alone need the backbone."""
    shutil.copytree(exported.whole, tmp_path / "whole")
    away = run.model.with_name("away")
    run.model.rename(away)
    try:
        succeeded(launch("generate", f"--workdir={tmp_path / 'whole'}", "--prompt=Hello!"))
        message = refused(launch("generate", f"--workdir={exported.exits}", "--prompt=Hello!"))
    finally:
        away.rename(run.model)
    assert f"'{run.model}' does not exist" in message


def test_an_export_is_calibrated_like_a_run(exported, launch, tmp_path):
    folder = shutil.copytree(exported.whole, tmp_path / "copy")
    (folder / "policy.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    succeeded(launch("calibrate", f"--workdir={folder}", "--epsilon=0.6"))
    assert (folder / "policy.json").exists()
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    succeeded(launch("generate", f"--workdir={folder}", "--prompt=Hello!"))


def test_no_folder_is_written_over(run, exported, launch):
    again = launch("export", f"--workdir={run.folder}", f"--to={exported.whole}")
    assert "exists already; name a new folder" in refused(again)
    config = (exported.whole / "config.json").read_text()
    tuned = launch("tune", *run.flags, f"--workdir={exported.whole}")
    assert f"{exported.whole} holds an exported model; use another --workdir" in refused(tuned)
    assert (exported.whole / "config.json").read_text() == config


def test_help():
    """As a user types it: the other tests start commands a faster way."""
    command = [sys.executable, "-m", "launch.generate", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert shown.startswith("Answers prompts with dynamic depth")
    assert "python -m launch.generate --workdir=" in shown and "--max_new_tokens" in shown


@pytest.mark.parametrize(
    "flags, message",
    [
        ([TINY, "--stepz=3"], "Unknown command line flag 'stepz'"),
        ([TINY, "stray"], "unexpected argument 'stray'"),
        (
            [TINY, "--config.tune.stepz=1"],
            r"no such setting in the config: 'stepz'\nDid you mean \"steps\".*\n.*tune\.stepz=1",
        ),
        ([TINY + ":heads=mlp"], "unknown config argument 'heads'; known, with defaults: head=mlp"),
        ([TINY, "--config.exits.points=2:4"], r"exits.points=\('2:4',\) is not a tuple of ints"),
    ],
)
def test_mistyped_commands_change_nothing(launch, tmp_path, flags, message):
    done = launch("tune", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert re.search(message, done.stderr + done.stdout)
    assert not (tmp_path / "run/checkpoints").exists()


def test_sweep_skips_what_is_finished_and_names_what_failed(run, launch, tmp_path):
    config = tmp_path / "varied.py"
    config.write_text(
        "from configs.tiny import get_config\n"
        "def sweep(add):\n"
        "    for points in (2, 4), (9,), (1, 3):\n"
        "        add(**{'exits.points': points})\n"
    )
    finished, failed, new = (tmp_path / "sweep" / f"points={p}" for p in ("2-4", "9", "1-3"))
    shutil.copytree(run.folder, finished)
    done = launch("sweep", f"--config={config}", *run.flags[1:], f"--workdir={tmp_path / 'sweep'}")
    assert f"1 of 3 runs did not finish; their logs:\n  {failed / 'log.txt'}" in refused(done)
    assert "exit points [9] lie outside" in (failed / "log.txt").read_text()
    assert "3 runs, 1 of them finished before" in done.stdout
    assert not (finished / "log.txt").exists()
    assert json.loads((new / "config.json").read_text())["exits"]["points"] == [1, 3]

    text = (tmp_path / "sweep" / "results.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["exits.points"], row["exit"]) for row in rows] == [
        *(([2, 4], point) for point in (2, 4, 6)),
        *(([1, 3], point) for point in (1, 3, 6)),
    ]
    logged = [x for x in read_metrics(new) if "validation/exit/exit_3" in x][-1]
    assert logged["step"] == 12 and logged["validation/loss/exit_3"] == rows[4]["loss"]
    assert f"{rows[4]['loss']:.3f}" in done.stdout


def test_a_promise_about_answers_is_kept_in_its_mode_alone(run, launch, tmp_path):
    folder, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    shutil.copytree(run.folder, folder)
    prompts.write_text("".join(f"Question {i}?\n" for i in [*range(24), 3, 3]))
    flags = [f"--workdir={folder}", f"--prompts={prompts}", "--mode=deferred", "--method=ucb"]
    flags += ["--loss=changed", "--max_new_tokens=5"]
    said = refused(launch("calibrate", *flags, "--alpha=0.01"))
    assert "alpha=0.01 cannot be promised: 24 independent prompts to test on" in said
    printed = succeeded(launch("calibrate", *flags, "--alpha=0.8"))
    assert "24 independent prompts to test on: alpha ≥" in printed
    assert re.search(r"\d+ of \d+ policies tested, 24 answers decoded", printed)
    assert "mean loss 'changed' of answers in deferred mode" in printed
    stated = json.loads((folder / "policy.json").read_text())["provenance"]
    assert stated["promise"]["mode"] == "deferred" and stated["units"] == 24
    asked = [f"--workdir={folder}", "--prompt=Hello", "--max_new_tokens=5"]
    warning = "the policy's promise is about answers of at most 5 tokens in deferred mode"
    assert warning in launch("generate", *asked, "--mode=lossy").stderr
    for mode in ("deferred", "verified"):
        assert "promise" not in launch("generate", *asked, f"--mode={mode}").stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method=epsilon"], "epsilon promises nothing about new answers; choose one of"),
        (["--method=ucb", "--mode=verified"], "needs no promise: its answers are the full model"),
        (["--method=clopper_pearson"], "counts answers that have changed; give the loss changed"),
    ],
)
def test_what_promises_nothing_of_answers_is_refused(run, launch, tmp_path, flags, said):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One?\nTwo?\n")
    where = [f"--workdir={run.folder}", f"--prompts={prompts}"]
    assert said in refused(launch("calibrate", *where, *flags))
