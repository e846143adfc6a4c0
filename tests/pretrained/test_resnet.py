"""Residual networks of both layouts, against what torch said when the fixtures were made."""

import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.resnet import ResNetConfig
from early_exit.pretrained import resnet, table, torchvision
from early_exit.pretrained.load import load

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FAMILY_OF = {
    "resnet_basic": resnet,
    "resnet_bottleneck": resnet,
    "resnet_torchvision": torchvision,
}


@pytest.fixture(scope="module", params=FAMILY_OF)
def case(request):
    """(name, the loaded network, what torch says)."""
    with np.load(FIXTURES / request.param / "expected.npz", allow_pickle=False) as file:
        return request.param, load(str(FIXTURES / request.param)), dict(file)


def backbone(pretrained, params):
    return base.merge(base.abstract(pretrained.config.build)[0], params)


def test_features_logits_and_every_hidden_state(case):
    _, pretrained, expected = case
    depth = pretrained.config.depth

    @jax.jit
    def forward(params, images):
        model = backbone(pretrained, params)
        hidden, context = model.stem({"images": images})
        states = [hidden]
        for block in range(depth):
            states.append(model.run_blocks(states[-1], block, block + 1, context))
        found = {f"hidden_{i}": state for i, state in enumerate(states)}
        found |= {"features": model.features(states[-1])}
        if pretrained.config.num_classes:
            found["logits"] = model.readout(states[-1])
        return found

    found = forward(pretrained.params, expected["images"]) | {"images": expected["images"]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4, err_msg=name)
    assert all(np.abs(expected[f"hidden_{i}"]).mean() > 0.1 for i in range(depth + 1))


def test_composed_segments_are_the_full_forward_pass(case):
    """In programs of their own, so that the compiler cannot see that they compose."""
    _, pretrained, expected = case
    depth = pretrained.config.depth

    @functools.partial(jax.jit, static_argnames=("start", "stop"))
    def run(params, hidden, start, stop):
        model = backbone(pretrained, params)
        if start is None:
            hidden, _ = model.stem({"images": hidden})
        return model.run_blocks(hidden, start or 0, stop, None)

    full = run(pretrained.params, expected["images"], None, depth)
    for split in range(1, depth):
        first = run(pretrained.params, expected["images"], None, split)
        second = run(pretrained.params, first, split, depth)
        np.testing.assert_allclose(second, full, rtol=0, atol=1e-5, err_msg=split)


def test_the_table_holds_every_tensor_and_gives_it_back(case):
    name, pretrained, _ = case
    stored = safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")
    stored = {k: v for k, v in stored.items() if not k.endswith("num_batches_tracked")}
    family = FAMILY_OF[name]
    entries = table.prefixed(family.entries(pretrained.config), family.PREFIXES, stored)
    flat = tree.flatten(pretrained.params)
    assert {entry.name for entry in entries} == stored.keys()
    for entry in entries:
        found = entry.layout.join([np.asarray(flat[path]) for path in entry.paths])
        np.testing.assert_array_equal(found, stored[entry.name], err_msg=entry.name)


@pytest.mark.parametrize("layers", [18, 34, 50, 101, 152])
@pytest.mark.parametrize("family", [resnet, torchvision])
def test_config_and_to_hf_are_inverse(family, layers):
    config = ResNetConfig.imagenet(layers, num_classes=layers % 20)
    as_file = json.loads(json.dumps(family.to_hf(config)))
    assert as_file["model_type"] in family.MODEL_TYPES
    assert family.config(as_file) == config


def test_absent_entries_are_transformers_defaults():
    """Which are those of a ResNet-50, and of two labels where there is a classifier."""
    named = {"architectures": ["ResNetForImageClassification"]}
    assert resnet.config({}) == ResNetConfig.imagenet(50, num_classes=0)
    assert resnet.config(named) == ResNetConfig.imagenet(50, num_classes=2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_act": "gelu"}, r"does not do: hidden_act = 'gelu' \(only 'relu'"),
        ({"architectures": ["ResNetBackbone"]}, "does not do: architectures = .*ResNetBackbone"),
        (
            {"hidden_act": "gelu", "architectures": ["ResNetBackbone"]},
            "does not do: hidden_act = .*; architectures = ",
        ),
        ({"layer_type": "preactivation"}, "unknown block 'preactivation'; choose one of basic"),
        ({"depths": [3, 4]}, r"depths=\(3, 4\) and widths=.* must name the same stages"),
    ],
)
def test_what_the_backbone_cannot_do_is_named(entries, message):
    with pytest.raises(ValueError, match=message):
        resnet.config(entries)


def test_the_cifar_stem_does_not_exist_in_transformers():
    with pytest.raises(ValueError, match="no 'cifar' stem; export with torchvision's names"):
        resnet.to_hf(ResNetConfig.cifar(20))


def test_timms_config_names_a_network_by_its_architecture(tmp_path):
    timm = {"architecture": "resnet50", "num_classes": 11, "num_features": 2048}
    assert torchvision.config(timm) == ResNetConfig.imagenet(50, num_classes=11)
    assert torchvision.config({"model_type": "resnet34"}) == ResNetConfig.imagenet(34)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    # As many numbers as a ResNet-18 has, but hardly a tensor of it.
    tensors = {f"layer1.{i}.conv1.weight": np.zeros((64, 64, 3, 3), np.float16) for i in range(2)}
    tensors |= {f"fc.bias{i}": np.zeros(500_000, np.float16) for i in range(6)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(str(tmp_path))
    missing = re.findall(r"missing: (\S+)", str(error.value))
    # Of ResNet-18 with a classifier, 102 parameters of which two are there.
    assert len(missing) == 100 and {"conv1.weight", "layer4.0.downsample.1.bias"} < set(missing)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            {"architecture": "resnet18", "model_args": {"in_chans": 1}},
            'resnet18 was built with model_args .*"model_type": "torchvision_resnet" instead',
        ),
        (
            {"model_type": "torchvision_resnet", "depths": [1], "width": 8},
            "lacks widths, lacks num_classes, has the unknown width; it may have depths, widths",
        ),
    ],
)
def test_descriptions_that_are_not_understood(described, message):
    with pytest.raises(ValueError, match=message):
        torchvision.config(described)


def test_tensors_of_another_depth_are_all_listed(tmp_path):
    folder = FIXTURES / "resnet_torchvision"
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depths": [2, 2, 1]}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError) as error:
        load(str(tmp_path))
    lines = str(error.value).split("\n")[1:]
    # Two convolutions, and two norms of four tensors.
    assert len(lines) == 10 and all(line.startswith("  unexpected: layer3.1.") for line in lines)


def test_pickled_weights_are_refused_with_the_mend(tmp_path):
    pickled = tmp_path / "resnet18-f37072fd.pth"
    pickled.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"f37072fd.pth is neither .*save_file\(torch.load\(path"):
        load(str(pickled))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    with pytest.raises(FileNotFoundError, match="pickled .bin and .pth files are not read"):
        load(str(tmp_path))
