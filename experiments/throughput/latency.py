"""How long do clients wait? Time to the first token and between tokens, at three loads.

    python -m experiments.throughput.latency --workdir=runs/demo --check
    python -m experiments.throughput.latency --workdir=runs/demo --peer --check

Starts `launch.serve`, and asks it as clients do, by OpenAI's own client. First as many clients as
it has rows ask one request after the other: what is answered a second is its capacity. Then
requests come by chance (a Poisson process), so many a second as some share of that capacity. At 1.2
of it, the queue grows as long as requests come. With --peer, `transformers serve` gets the same
(the extra `parity`, and transformers[serving]): the same weights and questions, at the same shares
of its own capacity.
"""

import asyncio
import contextlib
import dataclasses
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import openai
from absl import flags

from early_exit.runs import assemble
from early_exit.runs.metrics import table
from experiments import bars
from experiments.recurrent_exits import questions

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a calibrated run.", required=True)
PEER = flags.DEFINE_bool("peer", False, "Ask transformers' server, too.")
ROWS = flags.DEFINE_integer("rows", 8, "Most answers that the server decodes together.")
REQUESTS = flags.DEFINE_integer("requests", 48, "Of each load.", lower_bound=2)
NEW = flags.DEFINE_integer("new_tokens", 32, "Tokens of an answer.", lower_bound=2)
LOADS = flags.DEFINE_list("loads", ["0.5", "0.8", "1.2"], "Shares of the capacity.")

OURS, PEERS = "launch.serve", "transformers serve"
PERCENTILES = (50, 95, 99)
START = 900  # seconds that a server may take to answer first


@dataclasses.dataclass(frozen=True)
class Answer:
    """One streamed answer, and when its pieces came, in seconds since it was asked for."""

    text: str
    came: tuple[float, ...]


def main(argv):
    del argv
    count, new_tokens = (4, 4) if bars.QUICK.value else (REQUESTS.value, NEW.value)
    loads = [float(load) for load in LOADS.value]
    kinds = [questions.questions(kind, -(-count // 2), held_out=True) for kind in questions.KINDS]
    texts = [text for pair in zip(*kinds, strict=True) for text in pair][:count]
    ours = ["launch.serve", f"--workdir={WORKDIR.value}", "--mode=verified", "--name=model"]
    ours += [f"--rows={ROWS.value}", "--positions=512", f"--waiting={count}"]
    found = {OURS: _asked(ours, "model", texts, new_tokens, loads)}
    if PEER.value:
        tuned = assemble.load_tuned(Path(WORKDIR.value))
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            assemble.export(tuned, folder)
            theirs = ["transformers.cli.transformers", "serve", str(folder), "--device=cpu"]
            theirs += ["--dtype=float32", "--continuous-batching"]
            found[PEERS] = _asked(theirs, str(folder), texts, new_tokens, loads)
    _print(found)
    checks = [
        bars.Bar(f"{name}: answers that are not what one alone gets", float(of.wrong), 0)
        for name, of in found.items()
    ]
    if PEER.value:
        more = found[OURS].capacity / found[PEERS].capacity
        checks.append(bars.Bar(f"requests a second ÷ {PEERS}", more, 1, True))
    bars.conclude({name: of.figures() for name, of in found.items()}, checks)


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one server: requests a second at most, answers by load, answers that were wrong."""

    capacity: float
    answers: dict[float, list[Answer]]
    wrong: int

    def rows(self) -> Iterator[tuple]:
        """(load, answers a second, percentiles of the first token's seconds and of the gaps')."""
        for load, answers in self.answers.items():
            first = np.percentile([answer.came[0] for answer in answers], PERCENTILES)
            gaps = np.concatenate([np.diff(answer.came) for answer in answers])
            between = np.percentile(gaps, PERCENTILES) if gaps.size else [np.nan] * len(PERCENTILES)
            yield load, load * self.capacity, *map(float, (*first, *between))

    def figures(self) -> dict:
        return {"capacity": self.capacity, "loads": list(self.rows()), "wrong": self.wrong}


def _print(found: dict[str, Found]) -> None:
    header = ["server", "load", "requests/s"]
    header += [f"{what}, p{p}" for what in ("first, s", "between, s") for p in PERCENTILES]
    rows = [(name, *row) for name, of in found.items() for row in of.rows()]
    print(table(rows, header=header))


def _asked(
    words: Sequence[str], model: str, texts: Sequence[str], new_tokens: int, loads: Sequence[float]
) -> Found:
    """Starts a server, asks it, and has it leave."""
    with _serving(words) as address:
        client = openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=START
        )
        return asyncio.run(_all_loads(client, model, texts, new_tokens, loads))


async def _all_loads(client, model, texts, new_tokens, loads) -> Found:
    async def one(text: str) -> Answer:
        began, came, pieces = time.perf_counter(), [], []
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=new_tokens,
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                came.append(time.perf_counter() - began)
                pieces.append(chunk.choices[0].delta.content)
        return Answer("".join(pieces), tuple(came))

    alone = {text: (await one(text)).text for text in texts}  # and all that is compiled is
    waiting = list(texts)

    async def go_on() -> list[Answer]:
        found = []
        while waiting:
            found.append(await one(waiting.pop()))
        return found

    await asyncio.gather(*(one(text) for text in texts[: ROWS.value]))
    began = time.perf_counter()
    await asyncio.gather(*(go_on() for _ in range(ROWS.value)))
    capacity = len(texts) / (time.perf_counter() - began)
    rng, answers, wrong = np.random.default_rng(0), {}, 0
    for load in loads:
        asked = []
        for text in texts:
            asked.append(asyncio.create_task(one(text)))
            await asyncio.sleep(float(rng.exponential(1 / (load * capacity))))
        answers[load] = list(await asyncio.gather(*asked))
        wrong += sum(a.text != alone[text] for a, text in zip(answers[load], texts, strict=True))
    return Found(capacity, answers, wrong)


@contextlib.contextmanager
def _serving(words: Sequence[str]) -> Iterator[str]:
    """The address of a server that runs as a process of its own meanwhile.

    Raises:
      RuntimeError: it ended before it answered, or did not answer.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryFile("w+") as told:
        server = subprocess.Popen(
            [sys.executable, "-m", *words, f"--port={port}"], stdout=told, stderr=told
        )
        try:
            until = time.monotonic() + START
            while not _healthy(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > until:
                    told.seek(0)
                    raise RuntimeError(f"{words[0]} does not answer: {told.read()[-2000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    bars.run(main)
