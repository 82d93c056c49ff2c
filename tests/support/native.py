"""Put something else in the place of a function of the extension, wherever the package has imported it."""

import sys
from typing import Any

import pytest

from dmabuf import _native


def patch_native(patch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Replace ``name`` of ``dmabuf._native`` by ``value``, there and in every loaded module of the package that has it as a global."""
    real = getattr(_native, name)
    patch.setattr(_native, name, value)
    for module in [found for key, found in sys.modules.items() if key.startswith("dmabuf.") and found is not _native]:
        for key in [key for key, found in vars(module).items() if found is real]:
            patch.setattr(module, key, value)
