"""Every test of the project has a domain of its own run, the debug layer, and a look at what it left behind."""

import os

import pytest

# The debug layer is on in every test and in the processes that it starts; conftests of directories import dmabuf before `pytest_configure`.
os.environ["DMABUF_DEBUG"] = "1"

pytest_plugins = ["tests.plugin"]


@pytest.fixture(autouse=True)
def _leaves_nothing(leaves_nothing: None) -> None:
    """Check every test."""
