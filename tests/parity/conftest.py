"""Tiny models as diffusers saves them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests import oracles


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder(kind)`: a model of random weights."""
    oracles.quiet()

    @cache
    def make(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        oracles.pipeline(kind, path).save_pretrained(path / "model")
        return path / "model"

    return make
