"""Serves a tuned model: OpenAI's interface, and a page to type into.

    python -m launch.serve --workdir=runs/smollm2
    python -m launch.serve --workdir=runs/smollm2 --mode=verified --mode=lossy --rows=16 --port=8080

Requests are decoded together; each says by itself how it samples, where it stops, and which mode it
wants of those that are served, by default the first. Needs the extra `serve`.
"""

import logging
import os
import sys

import jax
from absl import flags

from early_exit.backbones.cached_attention import CACHE_CHUNK
from early_exit.decoding import measure
from early_exit.decoding import mode as modes
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.session import Session
from early_exit.library.model import Model, of_run
from early_exit.runs import assemble, layout, progress
from launch import common, on_mesh, usage

MODES = flags.DEFINE_multi_enum(
    "mode", ["verified"], list(modes.NAMES), "How to decode. Give it once for each that is served."
)
ROWS = flags.DEFINE_integer("rows", 8, "Most answers of a mode decoded together.", lower_bound=1)
POSITIONS = flags.DEFINE_integer(
    "positions", 2048, "Of a prompt and its answer, at most.", lower_bound=2
)
WAITING = flags.DEFINE_integer("waiting", 64, "Most requests that wait; then 429.", lower_bound=1)
NEW = flags.DEFINE_integer("max_new_tokens", 512, "Of answers that name no limit.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 600.0, "Most that one request may take.", lower_bound=0.0)
PREFIXES = flags.DEFINE_integer(
    "prefix_mb", 256, "Memory for prompts, so that those that begin alike are read once; 0: none."
)
WARM = flags.DEFINE_bool(
    "warm", True, "Compile everything before listening; else each part when it is first needed."
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Where to listen; 0.0.0.0 is everywhere.")
PORT = flags.DEFINE_integer("port", 8000, "Where to listen.", lower_bound=0, upper_bound=65535)
NAME = flags.DEFINE_string("name", None, "What clients call the model; the run's name by default.")
KEY = flags.DEFINE_string(
    "api_key_env", None, "Variable of the environment with the key that clients must send."
)

usage.group("what one request may take", POSITIONS, NEW, SECONDS)
usage.group("where and for whom", HOST, PORT, NAME, KEY)
flags.adopt_module_key_flags(on_mesh)  # what --help lists


def main(argv):
    on_mesh.begin(argv)
    if jax.process_count() > 1:
        raise ValueError("launch.serve listens in one process; start it on one host alone")
    try:
        import uvicorn

        from early_exit.serving import app
        from early_exit.serving.answers import Limits
        from early_exit.serving.worker import Worker
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'early_exit[serve]'") from None
    key = None
    if KEY.value is not None and not (key := os.environ.get(KEY.value)):
        raise ValueError(f"the environment has no {KEY.value} with the key in it")
    common.tell_devices()
    tuned = on_mesh.load_tuned()
    if tuned.model.config.classifies:
        raise ValueError(f"{tuned.workdir} holds a classifier; use launch.classify")
    calibrated = (tuned.workdir / layout.POLICY).exists()
    model = of_run(tuned, assemble.load_policy(tuned) if calibrated else None)
    sessions = {name: session(model, name) for name in dict.fromkeys(MODES.value)}
    for name, made in sessions.items() if WARM.value else ():
        with progress.waiting(f"compiling {name} (--nowarm listens at once)"):
            made.warm()
    worker = Worker(sessions, most_waiting=WAITING.value)
    options = app.Options(
        name=NAME.value or tuned.workdir.resolve().name,
        key=key,
        limits=Limits(NEW.value, SECONDS.value),
    )
    print(f"serving {options.name} on http://{HOST.value}:{PORT.value}", file=sys.stderr)
    logging.getLogger("uvicorn.access").disabled = True
    uvicorn.run(
        app.create(model, worker, options),
        host=HOST.value,
        port=PORT.value,
        log_level="warning",
        timeout_graceful_shutdown=30,
    )


def session(model: Model, name: str) -> Session:
    """What decodes a mode, by measured costs."""
    mode = modes.served(modes.named(name), model.static)
    policy = model.policy if mode.asks_policy else None
    decoder = Decoder(model.static, model.params, policy, model.stop_ids, mode)
    positions = min(POSITIONS.value, model.static.config.context_length)
    slots = -(-(positions + mode.capacity - 1) // CACHE_CHUNK) * CACHE_CHUNK
    decoder = measure.measured(decoder, slots) if mode.verified else decoder
    return Session(decoder, ROWS.value, slots=slots, prefix_bytes=PREFIXES.value << 20)


if __name__ == "__main__":
    common.run(main)
