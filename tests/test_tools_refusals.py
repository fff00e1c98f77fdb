"""The tools under bad input."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import wheelhouse

sys.path.remove(str(ROOT / "tools"))


def test_a_wheelhouse_that_is_no_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("WHEELHOUSE", raising=False)
    (path := tmp_path / "file").write_text("kept", "utf-8")
    with pytest.raises(SystemExit, match="expected a folder that can be made or filled, got .*: name another one"):
        wheelhouse.main([str(path)])
    assert path.read_text("utf-8") == "kept"
