"""What loading takes beside the weights themselves, on eight devices of one host: one tensor."""

import pathlib

import fake_devices
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STATUS = pathlib.Path("/proc/self/status")
# A network of which the embedding is half; then memory is looked at while it is loaded from what
# was saved of it, exported whole, and loaded again from that.
SCRIPT = """
import json, pathlib, sys, threading, time
import jax, numpy as np
import early_exit as ee
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained.export import export_backbone
from early_exit.runs import assemble
from early_exit.settings.sections import MeshSettings
from transformers import AutoTokenizer

folder = pathlib.Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained("tests/fixtures/tiny_chat")

def made(name, vocab, width, depth):
    config = DecoderConfig(vocab_size=vocab, width=width, depth=depth, heads=8, kv_heads=4,
                           head_dim=width // 8, mlp_width=3 * width, context_length=64)
    rng = np.random.default_rng(0)
    _, shapes = base.described(config)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    export_backbone(folder / name, config, params, tokenizer)
    return sum(x.nbytes for x in jax.tree.leaves(params))

def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

def peak(function):
    before, most, ended = anonymous(), [], threading.Event()
    def watch():
        while not ended.is_set():
            most.append(anonymous())
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        ended.set()
        watcher.join()
    return result, max(most) - before

axes = {"data": 1, "fsdp": 4, "tensor": 2}
mesh = sharding.make_mesh(MeshSettings(**axes))
made("warm", 1024, 64, 2)
size = made("large", 24_576, 512, 4)
for name in ("warm", "large"):
    exits = ee.ExitConfig((1,), head="norm", output="shared")
    heads = ee.attach(ee.load(folder / name, mesh=axes), exits)
    ee.save(heads, folder / f"{name}_heads", exits_only=True)
    del heads
found = {}
for name in ("warm", "large"):
    tuned, found["load"] = peak(lambda: assemble.load_tuned(folder / f"{name}_heads", None, mesh))
    str(tuned.identity)
    _, found["export"] = peak(lambda: assemble.export(tuned, folder / f"{name}_whole"))
    embedding = tuned.params["backbone"]["embed"]["embedding"] if 0 else max(
        jax.tree.leaves(tuned.params), key=lambda x: x.nbytes)
    found["largest"] = embedding.nbytes
    found["part"] = max(shard.data.nbytes for shard in embedding.addressable_shards)
    del tuned, embedding
    tuned, found["whole"] = peak(lambda: assemble.load_tuned(folder / f"{name}_whole", None, mesh))
    del tuned
print(json.dumps(found | {"size": size}))
"""


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_loading_takes_one_copy_and_one_tensor(tmp_path):
    found = fake_devices.found(SCRIPT, tmp_path)
    assert found["part"] == found["largest"] / 8
    most = found["size"] + 1.3 * found["largest"]
    assert max(found["load"], found["whole"]) <= most, found
    assert found["export"] <= 1.3 * found["largest"], found  # beside the weights that are there
