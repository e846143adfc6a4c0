import pytest
from forks import Launcher


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Runs `python -m launch.<command> <flags>` to its end."""
    folder = tmp_path_factory.mktemp("launch")
    launcher = Launcher(folder, {"JAX_PLATFORMS": "cpu", "EARLY_EXIT_CACHE": str(folder / "cache")})
    yield launcher
    launcher.close()
