"""Every study runs to its end with --quick, on small models: prints its bars, writes its figures.

Whether bars are kept says nothing here: these are other models, on a machine that does other work.
"""

import gzip
import json
import math
import pathlib
import struct

import numpy as np
import pytest
import stand_ins
from forks import Launcher

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.studies

# Studies, and their flags beside --quick; {…} are folders and files made here.
STUDIES = {
    "decoding_speed.depth": "",
    "decoding_speed.lengths": "--plot={out}/lengths.svg",
    "decoding_speed.modes": "--workdir={run} --plot={out}/modes.svg",
    "decoding_speed.lossless": "--workdir={run}",
    "decoding_speed.schedules": "--seeds=1",
    "recurrent_exits.run": "--workdir={recurrent} --batch=1 --batch=2",
    "recurrent_exits.curve": "--run={recurrent} --plot={out}/curve.svg",
    "recurrent_exits.text": "--run={recurrent} --run={recurrent} --on=stdlib",
    "recurrent_exits.write_questions": "--kind=maths --count=20 --output={out}/questions.jsonl",
    "calibration.guarantees": "--records={records} --plot={out}/guarantees.svg",
    "calibration.budgets": "--records={records} --plot={out}/budgets.svg",
    "calibration.rejection": "--records={records} --plot={out}/rejection.svg",
    "calibration.temperatures": "--records={records}",
    "papers.valade": "--records={records}",
    "papers.calm": "--records={records} --workdir={run} --plot={out}/calm.svg",
    "papers.eero": "--runs={out}/papers",
    "papers.calm_t5": "--runs={out}/calm_t5",
    "throughput.run": "--workdir={run}",
    "throughput.soak": "--source={run} --rows=2",
    "throughput.latency": "--workdir={run} --rows=2 --loads=0.8",
    "decoded_promises.run": "--workdir={run} --records={out}/answers.npz",
    "token_difficulty.run": "--workdir={run} --answers={out}/said.json --source=stdlib",
    "tokenizing.run": "--model={decoder}",
    "tuning_step.run": "",
    "joint_tuning.run": "",
    "exit_quality.run": "--runs={out}/quality --made={made}",
    "news_minilm.run": "--runs={out}/news --plot={out}/news.svg",
    "fashion_mnist_resnet.run": "--runs={out}/fashion --data=idx:{images} --layers=32",
}
# Compiles for a pod by a library that is not here (extra `tpu-compile`): `test_pod_plan`.
ELSEWHERE = {"pod_plan.run"}
# What those print that hold themselves to no bars.
WITHOUT_BARS = {
    "calibration.temperatures": "calibration error before",
    "recurrent_exits.write_questions": "20 questions in",
}


def write_images(folder: pathlib.Path) -> None:
    """MNIST's format: noise of ten classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 600), ("t10k", 300)):
        arrays = {
            f"{prefix}-images-idx3-ubyte": rng.integers(0, 256, (count, 12, 12), np.uint8),
            f"{prefix}-labels-idx1-ubyte": (np.arange(count) % 10).astype(np.uint8),
        }
        for name, array in arrays.items():
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def launcher(folder):
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }
    for entry in ("configs", "tests", "experiments", "launch", "early_exit"):
        (folder / entry).symlink_to(ROOT / entry)
    launcher = Launcher(folder, environment, cwd=folder)
    yield launcher
    launcher.close()


def succeeded(done):
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def given(folder, launcher):
    """{name: path} of what studies need: a calibrated run, records of it, its own answers."""
    names = ("run", "recurrent", "made", "images", "decoder", "talkative")
    paths = {name: folder / name for name in names} | {"records": folder / "records.npz"}
    stand_ins.deep_chat(paths["decoder"])
    stand_ins.deep_chat(paths["talkative"], blocks=6)
    stand_ins.make_talkative(paths["talkative"])
    write_images(paths["images"])
    run = f"--workdir={paths['run']}"
    succeeded(launcher("tune", "--config=configs/tiny.py", run))
    succeeded(launcher("calibrate", run, "--epsilon=0.6"))
    recurrent = f"--workdir={paths['recurrent']}"
    taps = "--config.exits.recurrent_taps=(2,6)"
    succeeded(launcher("tune", "--config=configs/tiny.py", taps, recurrent))
    succeeded(launcher("calibrate", recurrent, "--epsilon=0.6"))
    flags = [run, f"--out={paths['records']}", "--texts=96", "--length=16"]
    succeeded(launcher.module("experiments.calibration.record", *flags))
    sizes = {"per_shard": 12, "batch": 4, "max_question_tokens": 40, "max_new_tokens": 40}
    talkative = ["--config=configs/tiny.py", f"--config.model.source={paths['talkative']}"]
    few = ["--shortest=2", "--temperature=0.8", *(f"--{k}={size}" for k, size in sizes.items())]
    succeeded(launcher("distill", *talkative, *few, f"--made={paths['made']}", "--tokens=3_000"))
    return paths


def test_every_study_is_run():
    modules = {
        f"{path.parent.name}.{path.stem}"
        for path in (ROOT / "experiments").glob("*/*.py")
        if "bars.run(main)" in path.read_text() or "app.run(main)" in path.read_text()
    }
    assert modules == STUDIES.keys() | ELSEWHERE | {"calibration.record"}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_runs_to_its_end(study, given, launcher, tmp_path):
    out = tmp_path / "figures.json"
    flags = STUDIES[study].format(out=tmp_path, **given).split()
    if study not in WITHOUT_BARS:
        flags += ["--quick", f"--out={out}"]
    printed = succeeded(
        launcher.module("small_study", given["decoder"], f"experiments.{study}", *flags)
    )
    plots = [pathlib.Path(flag.split("=")[1]) for flag in flags if flag.startswith("--plot=")]
    assert all(path.read_text().startswith(("<svg", "<?xml")) for path in plots)
    if study in WITHOUT_BARS:
        assert WITHOUT_BARS[study] in printed
        return
    found = json.loads(out.read_text())
    assert found["figures"] and found["bars"]
    for bar in found["bars"]:
        assert bar["name"] in printed and not math.isnan(bar["figure"]), bar


def test_answers_that_were_decoded_before_a_stop_are_not_decoded_again(given, launcher, tmp_path):
    records, out = tmp_path / "answers.npz", tmp_path / "figures.json"
    command = ["small_study", given["decoder"], "experiments.decoded_promises.run", "--quick"]
    command += [f"--workdir={given['run']}", f"--records={records}", f"--out={out}"]

    def decoded():
        printed = succeeded(launcher.module(*command, "--candidates=3"))
        return printed.count(", policy "), json.loads(out.read_text())["figures"]

    policies, figures = decoded()
    assert policies == 2 * (3 + 3) and decoded() == (0, figures)
    kept = dict(np.load(records))
    lost = [name for name in kept if name.startswith(("deferred/4/", "deferred/5/"))]
    assert lost
    np.savez(records, **{name: array for name, array in kept.items() if name not in lost})
    assert decoded() == (2, figures)
    done = launcher.module(*command, "--candidates=4")
    assert done.returncode and "holds answers to other flags; name another file" in done.stderr


@pytest.mark.tpu_compile
def test_pod_plan(launcher, tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "figures.json"
    succeeded(launcher.module("experiments.pod_plan.run", "--quick", f"--out={out}"))
    assert all(bar["kept"] for bar in json.loads(out.read_text())["bars"])
