"""Tiny diffusers pipelines, and the folders into which they saved themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """`oracle(kind)`: a tiny diffusers pipeline, and the folder into which it saved itself."""
    from tests import oracles

    oracles.quiet()

    @cache
    def make(kind: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(kind)
        pipe = oracles.pipeline(kind, folder)
        pipe.save_pretrained(folder / "model")
        return pipe, folder / "model"

    return make
