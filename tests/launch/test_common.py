"""What every command does with flags: settings that are not there, numbers out of range, --help."""

import pathlib

import pytest

from early_exit.settings.listing import listing

TINY = "--config=configs/tiny.py"


@pytest.fixture
def config(tmp_path):
    """Writes a config file with this body of `get_config`."""

    def write(body, top=""):
        path = tmp_path / "own.py"
        path.write_text(f"from configs import tiny\n{top}\ndef get_config(arg=None):\n    {body}\n")
        return path

    return write


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [].missing", "AttributeError: 'list' object has no attribute 'missing'"),
        ("return {}['model']", "KeyError: 'model'"),
        ("return tiny.get_config().tune.stepz", 'Did you mean "steps" instead of "stepz"'),
        ("return ()[3]", "IndexError: tuple index out of range"),
        ("return 1 / 0", "ZeroDivisionError"),
        ("config = tiny.get_config()\n    return 3 + config.tune.loss", "TypeError"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--config.tune.steps=3"]])
def test_a_config_file_s_own_errors_are_shown_as_they_are(
    launch, config, tmp_path, body, said, flags
):
    path = config(body)
    done = launch("tune", f"--config={path}", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and said in done.stderr
    assert f'File "{path}"' in done.stderr and "no such setting" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.tune.stepz=1", "'stepz'\nDid you mean \"steps\""),
        ("--config.tuen.steps=1", "'tuen'\nDid you mean \"tune\""),
        ("--config.model.source.name=x", "string indices must be integers"),
        ("--config.tune.steps.more=1", "does not exist"),
        ("--noconfig.exits.gates", "'gates'\nDid you mean \"gate\""),
    ],
)
def test_settings_that_the_config_lacks(launch, tmp_path, flag, said):
    done = launch("tune", TINY, flag, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("no such setting in the config: ") and said in done.stderr
    assert f"(given: {flag})" in done.stderr


@pytest.mark.parametrize("flags", [[], ["--config.tune.steps=3"]])
def test_a_config_file_that_is_not_there(launch, tmp_path, flags):
    done = launch("tune", "--config=configs/none.py", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "Failed loading config file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("body", ["return [3]", "return 'tiny'"])
def test_a_config_is_a_config(launch, config, tmp_path, body):
    done = launch("tune", f"--config={config(body)}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "a config is a ConfigDict" in done.stderr
    assert "Traceback" not in done.stderr


def test_everything_wrong_with_settings_is_told_at_once_and_nothing_is_left(launch, tmp_path):
    wrong = {"tune.clip_norm": "0", "tune.checkpoint_every": "0", "seed": "-1", "data.std": "(0,)"}
    flags = [f"--config.{name}={value}" for name, value in wrong.items()]
    done = launch("tune", TINY, *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "4 settings make no run" in done.stderr
    assert all(f"{name}=" in done.stderr for name in wrong)
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("generate", "--seed=18446744073709551616"),
        ("generate", "--seed=-1"),
        ("generate", "--temperature=nan"),
        ("generate", "--top_p=inf"),
        ("generate", "--max_new_tokens=99999999999999999999"),
        ("distill", "--seed=4294967296"),
        ("calibrate", "--epsilon=nan"),
        ("calibrate", "--budget=nan"),
        ("calibrate", "--design=nan"),
        ("classify", "--budget=-inf"),
        ("compile", "--rows=0"),
        ("cache", "--top_k=-3"),
        ("sweep", "--parallel=0"),
    ],
)
def test_numbers_out_of_range(launch, command, flag):
    done = launch(command, flag)
    name = flag.partition("=")[0].lstrip("-")
    assert done.returncode == 1 and "Flags parsing error" in done.stderr
    assert f"--{name}=" in done.stderr and "Traceback" not in done.stderr


def test_help_names_the_list_of_all_settings(launch):
    root = pathlib.Path(__file__).parents[2] / "launch"
    configured = [p.stem for p in root.glob("*.py") if "configured=True" in p.read_text()]
    assert configured
    for command in ("tune", *configured):
        shown = launch(command, "--help").stdout
        assert "launch.inspect --settings" in " ".join(shown.split()), command


def test_all_settings_are_listed(launch):
    done = launch("inspect", "--settings")
    assert done.returncode == 0 and listing(100) in done.stdout
    stray = launch("inspect", "--settings", "runs/a")
    assert stray.returncode == 1 and "unexpected argument 'runs/a'" in stray.stdout + stray.stderr
