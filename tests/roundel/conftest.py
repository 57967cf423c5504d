"""What the tests of `roundel train` train: a text, and models in a file."""

from pathlib import Path

import pytest

from . import training


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.text_in(tmp_path_factory.mktemp("text"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return training.models_in(tmp_path)
