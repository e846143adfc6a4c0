"""What is built and installed: `early_exit` alone, whole, with its commands, from wherever."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from early_exit import command

ROOT = pathlib.Path(__file__).parents[1]
BUILT = ("early_exit", "launch", "configs", "setup.py", "pyproject.toml", "LICENSE", "README.md")


def python(*arguments, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def build(tree, kind, out):
    """The file that setuptools builds of a source tree."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir()
    python("-c", code, cwd=tree)
    (path,) = out.iterdir()
    return path


def names(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", "77")  # of the extra `test`
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for name in BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    wheel = build(tree, "wheel", folder / "wheel")
    with tarfile.open(build(tree, "sdist", folder / "sdist")) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    assert names(build(unpacked, "wheel", folder / "again")) == names(wheel)
    return wheel


@pytest.mark.studies
def test_a_wheel_holds_early_exit_alone_and_all_of_it(wheel):
    found = names(wheel)
    assert {name.partition("/")[0] for name in found} == {"early_exit"}
    wanted = {"early_exit/py.typed", "early_exit/library/model.py"}
    for folder, inside in (("early_exit", ""), ("launch", "commands/"), ("configs", "commands/")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                parts = path.relative_to(ROOT / ("early_exit" if not inside else "."))
                wanted.add(f"early_exit/{inside}{parts.as_posix()}")
    assert found == wanted


@pytest.mark.studies
def test_installed_it_tunes_from_anywhere(wheel, tmp_path):
    site = tmp_path / "site"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site)
    python(*pip, wheel, cwd=tmp_path)
    assert (site / "bin/early-exit").exists()
    run = {"cwd": tmp_path, "PYTHONPATH": str(site), "EARLY_EXIT_CACHE": str(tmp_path / "cache")}
    listed = python("-m", "early_exit.command", **run)
    assert "early-exit COMMAND" in listed and "  calibrate" in listed
    flags = {
        "model.source": ROOT / "tests/fixtures/tiny_chat",
        "exits.classes": 0,
        "data.sequence_length": 16,
        "data.batch_size": 2,
        "tune.steps": 2,
        "tune.warmup_steps": 0,
        "tune.validation_batches": 1,
    }
    flags = [f"--config.{name}={value}" for name, value in flags.items()]
    tune = ("tune", "--config=configs/tiny.py:head=norm", "--workdir=run", *flags)
    assert "tuned exits in run" in python("-m", "early_exit.command", *tune, **run)
    answered = python("-m", "early_exit.command", "inspect", "run", **run)
    assert "run" in answered


def test_every_command_is_listed_with_what_it_does():
    found = command.commands()
    here = {path.stem for path in (ROOT / "launch").glob("*.py")}
    texts = {name: (ROOT / "launch" / f"{name}.py").read_text() for name in here}
    runnable = {name for name, text in texts.items() if 'if __name__ == "__main__"' in text}
    assert found.keys() == runnable
    assert all(told.endswith((".", "!")) for told in found.values())


def test_a_command_that_there_is_not():
    with pytest.raises(SystemExit, match="there is no command 'tuen'; there are cache, calibrate"):
        command.main(["tuen"])


def test_configs_that_come_along_are_found_and_own_ones_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = "--config=configs/tiny.py:head=norm"
    assert command._found(given) == f"--config={ROOT / 'configs/tiny.py:head=norm'}"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.py").touch()
    assert command._found(given) == given
    for other in ("--config=mine.py", "--config=configs/none.py", "--workdir=configs/tiny.py"):
        assert command._found(other) == other


def test_an_extra_that_lacks_is_named():
    from early_exit.storage import extras

    with (
        pytest.raises(RuntimeError, match=r"needs nobody_has_this, .*'early_exit\[report\]'"),
        extras.needed("report"),
    ):
        import nobody_has_this  # noqa: F401
