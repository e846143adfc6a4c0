import pytest
from forks import Launcher

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "COLUMNS": "100",
    # What one command has compiled, the next ones need not.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Runs `python -m launch.<command> <flags>` to its end."""
    folder = tmp_path_factory.mktemp("launch")
    launcher = Launcher(folder, ENVIRONMENT | {"EARLY_EXIT_CACHE": str(folder / "cache")})
    yield launcher
    launcher.close()
