"""Programs compiled for devices that are not there, and what is said of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import fake_devices
import jax
import pytest

from configs import llama2_7b, llama2_13b, llama2_70b, llama3_8b, pythia_6_9b, qwen2_5_7b, tiny
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.cost import multiply_adds
from early_exit.runs import assemble
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.settings.sections import MeshSettings
from early_exit.training import ahead, plan

ROOT = Path(__file__).parents[2]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
# Programs of a small model on eight devices; its tuning step with exits alone and jointly.
SCRIPT = """
import json
from configs import tiny
from early_exit.runs import assemble
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.decoding import mode
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.settings.sections import MeshSettings
from early_exit.training import ahead

found = {}
for train in ("exits", "all"):
    config = read(override(tiny.get_config(), {
        "model.scan": True, "exits.head": "norm", "exits.points": (2, 4), "exits.classes": 0,
        "tune.train": train, "tune.loss": "cross_entropy",
    }))
    mesh = sharding.make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    model = assemble.abstract_model(config)
    estimate = ahead.tuning(config, model, mesh, None)
    reduced = [
        each for each in estimate.program.collectives
        if each.kind in ("all-reduce", "reduce-scatter") and {"data", "fsdp"} & {*each.axes}
    ]
    found[train] = {
        "ratio": estimate.flops_ratio,
        "open_loops": estimate.program.open_loops,
        "reduced": sum(each.bytes for each in reduced),
        "arguments": estimate.arguments,
        "trained": tree.size_in_bytes(assemble.abstract_trained(config, model)),
    }

# More devices than there are key/value heads.
config = read(override(tiny.get_config(), {"exits.points": (3,), "exits.head": "norm"}))
model = ahead.model_of(config, 4)
mesh = sharding.make_mesh(MeshSettings(data=1, tensor=8))
assert model.config.kv_heads % 8
found["cache"] = 4 * 4 * model.config.kv_heads * 256 * model.config.head_dim
for how in (mode.LOSSY, mode.named("verified", ("exits", "lookup"))):
    program = ahead.decoding(config, model, mesh, None, 4, 100, how).program
    found[how.name] = max(each.shape.bytes for each in program.collectives)
print(json.dumps(found))
"""


def command(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


# Passes over text on eight chips, the positions of each in two chunks: how often they bring an
# output matrix together of its parts along `fsdp`.
GATHERED = """
import functools, json
import jax, jax.numpy as jnp
from configs import tiny
from early_exit import sharding
from early_exit.cost import chips
from early_exit.distillation import hidden_states
from early_exit.evaluation import tradeoff
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.settings.sections import MeshSettings
from early_exit.training import ahead, plan

config = read(override(tiny.get_config(), {
    "exits.points": (3,), "exits.classes": 0, "exits.head": "norm", "data.batch_size": 16,
}))
model = ahead.model_of(config, 4)
devices, chip = ahead.topology("v5e:2x4")
mesh = sharding.make_mesh(MeshSettings(data=1, fsdp=4, tensor=2), devices)
params, batch = ahead._params(config, model, mesh), plan.token_batch(config, model, mesh)
tokens = {"tokens": batch["tokens"]}
kept = jax.jit(sharding.under(mesh, functools.partial(hidden_states._kept, model=model, top_k=4)))
programs = {
    "calibrate": ahead.calibrating(config, model, mesh, chip),
    "choices": chips.estimate(
        tradeoff.full_choices.trace(params, tokens, model=model), params, mesh, chip
    ),
    "teacher": chips.estimate(kept.trace(params, batch), params, mesh, chip),
}
table = model.config.vocab_size // 2, model.config.width
print(json.dumps({
    name: sum(
        each.times for each in estimate.program.collectives
        if each.kind == "all-gather" and each.shape.dims == table
    )
    for name, estimate in programs.items()
}))
"""


@pytest.fixture(scope="module")
def found():
    return fake_devices.found(SCRIPT)


@pytest.mark.parametrize("mode", ["lossy", "verified: exits + lookup"])
def test_heads_that_are_not_split_leave_caches_where_they_are(found, mode):
    """Of eight devices and two key/value heads, each has both; nothing as large is exchanged."""
    assert found[mode] < found["cache"] / 4


def test_a_frozen_backbone_has_no_gradient_to_exchange(found):
    frozen, joint = found["exits"], found["all"]
    for each in (frozen, joint):
        # A vocabulary of one chunk: its logits are not computed again for the backward pass.
        assert 0.75 < each["ratio"] < 1.01 and each["open_loops"] == 0
    # What is added up over rows: a chip's part of the gradients of what is trained, and scalars.
    assert frozen["trained"] / 2 <= frozen["reduced"] < 1.1 * frozen["trained"]
    assert joint["reduced"] >= joint["trained"] / 2 > 2 * frozen["trained"]


@pytest.mark.parametrize(
    ("what", "work"),
    [
        ("tune", "compiled ÷ traced"),
        ("calibrate", "work of a batch"),
        ("decode", "a step at full depth"),
    ],
)
def test_the_command_prints_what_a_program_costs(launch, what, work):
    flags = ["--config=configs/tiny.py", "--config.model.scan", "--config.exits.head=norm"]
    done = launch("compile", *flags, f"--what={what}", "--blocks=3", "--positions=64")
    assert done.returncode == 0, done.stderr
    assert (
        f"{what} on this host: 1 chips (data 1, fsdp 1, tensor 1, expert 1), 3 blocks"
        in done.stdout
    )
    for part in ("memory of a chip", "made on the way", "traced, a chip", work):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--topology=v3:2x2", "unknown chip in topology 'v3:2x2'; known are v5e, v5p, v6e"),
        ("--config.mesh.tensor=3", "does not use exactly"),
        ("--config=configs/digits_resnet.py", "only language models are compiled ahead"),
        ("--config.model.dtpye=float32", "no such setting"),
    ],
)
def test_bad_input_is_a_sentence(launch, flag, message):
    done = launch("compile", "--config=configs/tiny.py", flag)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_shorter_model_has_its_exits_where_the_longer_one_has_them():
    config = read(llama2_70b.get_config())
    model = ahead.model_of(config, blocks=16)
    assert model.config.depth == 16 and model.exits.points == (2, 4, 6, 8, 10, 12, 14, 15)
    assert ahead.model_of(config) == assemble.abstract_model(config)


@pytest.mark.parametrize(
    ("module", "billions"),
    [
        (llama2_7b, 6.738),
        (llama2_13b, 13.016),
        (llama2_70b, 68.977),
        (llama3_8b, 8.030),
        (qwen2_5_7b, 7.616),
        (pythia_6_9b, 6.857),
    ],
)
def test_the_large_models_are_as_large_as_published(module, billions):
    config = read(module.get_config())
    model = assemble.for_tuning(config, assemble.abstract_model(config))
    _, params = base.abstract(model.config.build)
    assert tree.count(params) / 1e9 == pytest.approx(billions, abs=0.001)
    assert len(model.exits.points) == 8
    assert config.data.batch_size * config.data.sequence_length * config.tune.steps == 1_310_720_000


def test_traced_work_of_a_step_is_what_its_parts_need():
    """Blocks once; of each head three passes; of its output matrix a fourth, computed again."""
    config = read(override(tiny.get_config(), {"exits.classes": 0, "tune.loss": "cross_entropy"}))
    mesh = sharding.make_mesh(MeshSettings())
    model = assemble.abstract_model(config)
    args = plan.state(config, model, mesh), plan.frozen(config, model, mesh)
    step = plan.step(config, model, mesh).trace(*args, plan.token_batch(config, model, mesh))
    rows, length = config.data.batch_size, config.data.sequence_length
    row = {"tokens": jax.ShapeDtypeStruct((1, length), "int32")}
    of = multiply_adds.backbone(model.config, inputs=row)
    total = of.before(model.exits.points[-1]).multiply_adds
    table = length * model.config.width * model.config.vocab_size
    for point in model.exits.points:
        head = multiply_adds.head(model.config, model.exits, of, point, "float32")[0].multiply_adds
        total += 3 * (head - table) + 4 * table
    # Beside them, the weighted sum of the losses.
    assert multiply_adds.traced_multiply_adds(step.jaxpr) == pytest.approx(rows * total, rel=1e-6)


for_tpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed (extra `tpu-compile`)")


@pytest.mark.tpu_compile
@for_tpu
def test_an_output_matrix_is_brought_together_once_and_not_in_each_turn():
    """That of the exit, and the final one."""
    found = fake_devices.found(GATHERED, devices=1)
    assert found == {"calibrate": 2, "choices": 1, "teacher": 1}


@pytest.mark.tpu_compile
@for_tpu
@pytest.mark.parametrize("what", ["tune", "calibrate", "decode"])
def test_programs_for_a_tpu(what):
    settings = ["--config.model.scan", "--config.mesh.tensor=2", "--config.exits.points=(3,)"]
    done = command(
        *["-m", "launch.compile", "--config=configs/tiny.py", *settings, "--topology=v5e:2x2"],
        *[f"--what={what}", "--positions=100", "--blocks=4"],
        JAX_PLATFORMS="cpu",
    )
    assert done.returncode == 0, done.stderr
    for part in ("15.750", "bounded by", "tokens a second", "million tokens a day"):
        assert part in done.stdout
    gone = command("-m", "launch.compile", "--config=configs/tiny.py", "--topology=v5e:3x5")
    assert gone.returncode == 1 and "topology 'v5e:3x5' is no slice of chips" in gone.stderr
