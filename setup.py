"""The C extension; everything else is declared in pyproject.toml.

A setup.py because the list of sources is a glob, which pyproject.toml can't say.
"""

import os
from glob import glob

from setuptools import Extension, setup

COMPILE = [
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O2",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    # CPython's own tables are written so: slots left out, `self` unused, METH_KEYWORDS functions cast.
    "-Wno-missing-field-initializers",
    "-Wno-unused-parameter",
    "-Wno-cast-function-type",
]
LINK: list[str] = []

if os.environ.get("DMABUF_SANITIZE") == "1":
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
    COMPILE += [*sanitize, "-O1"]
    LINK += sanitize

setup(
    ext_modules=[
        Extension(
            "dmabuf._native",
            sources=sorted(glob("native/**/*.c", recursive=True)),
            depends=[*sorted(glob("native/**/*.h", recursive=True)), "setup.py"],
            include_dirs=["native"],
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
        )
    ]
)
