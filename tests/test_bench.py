"""The results that are published: they load by the schema, and the README shows what they say."""

from __future__ import annotations

import pytest
import report


def test_results_load_and_stand_in_the_readme() -> None:
    rows = report.load()
    assert rows
    assert report.markdown(rows) in report.README.read_text()


def test_rows_of_another_schema_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    file = tmp_path / "cpu" / "op.json"
    file.write_text('{"schema": 2, "rows": []}')
    with pytest.raises(ValueError, match="schema expected 1, got 2"):
        report.load()
    file.write_text('{"schema": 1, "rows": [{"work": "x"}]}')
    with pytest.raises(ValueError, match="keys differ from the schema"):
        report.load()
