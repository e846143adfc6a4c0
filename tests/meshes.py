"""Commands on meshes of eight devices: for scripts of tests, each in a process of its own.

The one idea: each mesh has its own copy of one tuned run, so that what commands write of them can
be compared. On the mesh `one`, commands see one device.
"""

import importlib
import pathlib
import shutil
from collections.abc import Iterator

import in_process

MESHES = {
    "one": None,
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "1x1x8": {"data": 1, "fsdp": 1, "tensor": 8},
}
SHARED = tuple(name for name, axes in MESHES.items() if axes)


class Commands:
    """Commands of a process with eight devices."""

    def __init__(self):
        import jax

        for late in ("numpy.fft", "scipy.optimize", "transformers"):  # by commands, that is
            importlib.import_module(late)
        from early_exit.runs import assemble
        from launch import on_mesh

        assert jax.device_count() == 8
        self.loaded = []  # what commands loaded, since it was cleared
        self._on_mesh, self._mesh_of = on_mesh, on_mesh.mesh_of
        load = assemble.load_tuned

        def kept(*args):
            self.loaded.append(load(*args))
            return self.loaded[-1]

        assemble.load_tuned = kept

    def run(self, command: str, *flags) -> str:
        """What it prints; it must succeed."""
        done = in_process.run(command, *flags)
        assert done.returncode == 0, (command, flags, done.stderr)
        return done.stdout

    def tune(self, config: str, folder: pathlib.Path, settings: dict[str, object]) -> None:
        given = [f"--config.{name}={value}" for name, value in settings.items()]
        self.run("tune", f"--config={config}", *given, f"--workdir={folder}")

    def each(self, run: pathlib.Path) -> Iterator[tuple[str, pathlib.Path, list[str]]]:
        """Each mesh: its name, its copy of the run beside it, and the flags that say so."""
        for name, axes in MESHES.items():
            self._on_mesh.mesh_of = self._mesh_of if axes else (lambda config: None)
            self.loaded.clear()
            flags = [f"--mesh.{axis}={size}" for axis, size in (axes or {}).items()]
            yield name, shutil.copytree(run, run.parent / name), flags
            assert all((tuned.mesh is not None) == bool(axes) for tuned in self.loaded)
