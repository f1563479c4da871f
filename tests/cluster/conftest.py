"""What the tests of ``fastproto cluster`` share as fixtures."""

from __future__ import annotations

import pytest

from fastproto.cluster import command


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the test the time to draw."""
    monkeypatch.setattr(command.picture, "draw", lambda file, *arguments: None)
