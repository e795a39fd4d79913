"""Fresh copies of the checkout, and one that looks as if the tiny study had run."""

from pathlib import Path

import pytest
from checkouts import PARTS, ROOT, Checkout, copy_checkout


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(copy_checkout(ROOT, tmp_path / "checkout", PARTS))


@pytest.fixture(scope="session")
def _finished(tmp_path_factory) -> Path:
    folder = copy_checkout(ROOT, tmp_path_factory.mktemp("finished") / "checkout", PARTS)
    Checkout(folder).finish()
    return folder


@pytest.fixture
def finished(_finished, tmp_path) -> Checkout:
    """The tiny study as if it had run."""
    return Checkout(copy_checkout(_finished, tmp_path / "checkout", [path.name for path in _finished.iterdir()]))
