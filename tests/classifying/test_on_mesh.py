"""A classifier on a mesh answers what it answers on one device, whatever leaves where."""

import pathlib

import fake_devices
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import json
import jax, numpy as np
from flax import nnx
from early_exit import policy as policies
from early_exit import sharding
from early_exit.backbones import base
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.resnet import ResNetConfig
from early_exit.classifying.classify import Classifier
from early_exit.evaluation import exits
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.settings.sections import MeshSettings

assert jax.device_count() == 8
rng = np.random.default_rng(3)
count, classes = 21, 4
encoder = EncoderConfig(vocab_size=40, width=16, depth=2, heads=4, mlp_width=32, context_length=8,
                        num_classes=classes, pooling="mean", pooler="none")
resnet = ResNetConfig((1, 1), (4, 8), classes, stem="cifar", stem_width=4, channels=1)
networks = {
    "encoder": (encoder, {"tokens": rng.integers(0, 40, (count, 8)).astype(np.int32)}),
    "resnet": (resnet, {"images": rng.normal(size=(count, 8, 8, 1)).astype(np.float32)}),
}
found = {}
for kind, (config, inputs) in networks.items():
    model = MultiExit(config, ExitConfig((1,), head="linear"))
    _, backbone = base.split(config.build(nnx.Rngs(0)))
    backbone = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, backbone)
    heads = model.init_exits(jax.random.key(1), backbone, "random", None)
    params = {"backbone": backbone, "exits": jax.tree.map(lambda x: x + 0.3, heads)}
    labels = {"labels": np.zeros(count, np.int32), "valid": np.arange(count) < 19}
    for name, axes in {
        "one": None,
        "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
        "1x1x8": {"data": 1, "tensor": 8},
    }.items():
        mesh = axes and sharding.make_mesh(MeshSettings(**axes))
        where = mesh and sharding.shardings(params, mesh)
        placed = sharding.place(params, where) if mesh else jax.device_put(params, jax.devices()[0])
        records = exits.record(model, placed, [inputs | labels])
        middle = float(np.median(records.scores["max_prob"][0]))
        if mesh is None:
            policy = policies.make([middle], "max_prob")
        classify = Classifier(model, placed, policy, largest=8)
        answers = {
            "early": classify(inputs),
            "budget": classify(inputs, budget=1.5),
            "alone": classify({key: x[:1] for key, x in inputs.items()}),
            "full": Classifier(model, placed, None, largest=8)(inputs),
        }
        *_, last = classify.anytime({key: x[:8] for key, x in inputs.items()})
        found[f"{kind}/{name}"] = {
            "records": records.scores["max_prob"].tolist(),
            "anytime": last.probabilities.tolist(),
        } | {
            f"{how} {field}": getattr(answer, field).tolist()
            for how, answer in answers.items()
            for field in ("labels", "exits", "probabilities")
        }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return fake_devices.found(SCRIPT)


@pytest.mark.parametrize("kind", ["encoder", "resnet"])
def test_a_mesh_answers_what_one_device_answers(found, kind):
    one = found[f"{kind}/one"]
    assert {*one["early exits"]} == {0, 1}
    for mesh in ("2x2x2", "1x1x8"):
        for name, values in one.items():
            np.testing.assert_allclose(
                found[f"{kind}/{mesh}"][name], values, atol=1e-5, err_msg=f"{mesh} {name}"
            )
