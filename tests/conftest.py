"""Strictness for all tests, how programs are compiled, and one tiny model that most share.

The one idea: most tests need a program that is soon there, so XLA is told not to optimise. Those
that read what XLA made of a program (its copies, its memory) are marked `production`, and have a
pytest of their own, `pytest -m production`, in which XLA does what it does for users.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax
import numpy as np
import profiles
import pytest
import selection
from flax import nnx

from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

# Programs that run for milliseconds need not be good, only soon there.
SOON = " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
SOON += " --xla_cpu_parallel_codegen_split_count=1"  # the other cores have tests of their own
PRODUCTION = "production"
BUILD = Path(__file__).parents[1] / "build"
CACHED = 1 << 31  # bytes of compiled programs that are kept

# Broadcasting by accident is how a bug that is right only at batch 1 hides.
jax.config.update("jax_numpy_rank_promotion", "raise")

profiles.register_profiles()


def pytest_configure(config):
    """Before any program is compiled, and before any test module reads the environment."""
    os.environ.setdefault("XLA_FLAGS", "")
    if config.option.markexpr == PRODUCTION:
        return
    # Processes that tests start have it from here.
    os.environ["XLA_FLAGS"] += SOON
    keep_compiled_programs()


def keep_compiled_programs() -> None:
    """Programs that took long to compile are there in the next run, and for the other workers.

    A folder for each kind of processor: what is compiled for one may not run on another. That its
    size is limited makes JAX lock it, so that nobody reads what somebody is still writing.
    Processes that tests start do not share it, for some are killed.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(f"{platform.node()} {platform.processor()} {features}".encode())
    jax.config.update("jax_compilation_cache_dir", str(BUILD / f"xla-{kind.hexdigest()[:12]}"))
    jax.config.update("jax_compilation_cache_max_size", CACHED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_modifyitems(config, items):
    profiles.keep_to_profile(items)
    selection.mark_quick(items)
    if config.option.markexpr != PRODUCTION:
        elsewhere = pytest.mark.skip(reason="reads what XLA optimised: pytest -m production")
        for item in items:
            if item.get_closest_marker(PRODUCTION):
                item.add_marker(elsewhere)


TINY = DecoderConfig(
    vocab_size=61,
    width=24,
    depth=6,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=40,
    context_length=512,
)

# Of `configs/tiny.py`: a run that is over in seconds.
SHORT_RUN = {
    "exits.head": "embedding",
    "exits.points": (3,),
    "exits.classes": 0,
    "data.sequence_length": 16,
    "data.batch_size": 2,
}


def build(config=TINY, seed=0, **exits):
    """(model, params) with random weights large enough that predictions differ by position."""
    model = MultiExit(config, ExitConfig(**{"points": (2, 4), "head": "mlp"} | exits))
    _, backbone = base.split(config.build(nnx.Rngs(seed)))
    backbone = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, backbone)
    params = {"backbone": backbone}
    if model.exits.classes:
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(config.vocab_size)[: model.exits.classes]
        params["token_ids"] = jax.numpy.asarray(chosen, dtype="int32")
    params["exits"] = model.init_exits(
        jax.random.key(seed + 1), backbone, "random", params.get("token_ids")
    )
    params["exits"] = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params["exits"])
    return model, params


MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def forget_programs():
    """Every compiled program holds memory maps; Linux gives a process 65,530, then XLA crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny():
    """The default tiny model: six blocks, mlp heads after 2 and 4."""
    return build()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip sees as its only index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EARLY_EXIT_CACHE", str(tmp_path / "cache"))
    return folder
