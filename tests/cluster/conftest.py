"""What the tests of ``fastproto cluster`` share as fixtures."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the test the time to draw."""
    from fastproto.cluster import command

    monkeypatch.setattr(command.picture, "draw", lambda file, *arguments: None)
