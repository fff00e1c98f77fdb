"""The tools around the book: what they keep, what they refuse, and that a stale page is impossible."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import nbformat
import pytest
from conftest import ROOT


def load(path):
    """Import a tool by its path: tools/ is not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


strip_notebooks = load(ROOT / "tools/strip_notebooks.py")
fetch_assets = load(ROOT / "tools/fetch_assets.py")
build_book = load(ROOT / "tools/build_book.py")
install = load(ROOT / "tools/install.py")
serve = load(ROOT / "tools/serve.py")


@pytest.fixture
def notebook():
    """A notebook with everything in it that must go, and everything that must stay."""
    v4 = nbformat.v4
    picture = v4.new_output("display_data", {"image/png": "iVBORw0K", "text/plain": "<Figure>"})
    view = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "W()"}
    widget = v4.new_output("execute_result", view, execution_count=41)
    drawing = v4.new_code_cell("plot()", outputs=[picture, widget], execution_count=40)
    kept = {"tags": ["setup"], "mystnb": {"image": {"alt": "A line"}}}
    drawing.metadata = nbformat.from_dict({**kept, "execution": {"x": "1"}})
    made = v4.new_notebook(cells=[v4.new_markdown_cell("# T"), drawing, v4.new_code_cell("")])
    language = {"name": "python", "version": "3.11.2"}
    made.metadata = nbformat.from_dict({"widgets": {"state": {}}, "language_info": language})
    return made


def test_strip_keeps_text_tags_ids_and_descriptions(notebook):
    identity = [cell.id for cell in notebook.cells]
    stripped = strip_notebooks.strip(notebook)
    cell = stripped.cells[1]
    assert [output.data for output in cell.outputs] == [{"text/plain": "<Figure>"}, {"text/plain": "W()"}]
    assert cell.metadata == {"tags": ["setup"], "mystnb": {"image": {"alt": "A line"}}}
    assert [cell.id for cell in stripped.cells] == identity


def test_strip_removes_what_changes_from_run_to_run(notebook):
    stripped = strip_notebooks.strip(notebook)
    assert set(stripped.metadata) == {"kernelspec", "language_info"}
    assert stripped.metadata.language_info == {"name": "python"}
    assert stripped.cells[1].execution_count == stripped.cells[1].outputs[1].execution_count == 1


def test_strip_joins_what_the_kernel_cut():
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in (
        ("stdout", "a"), ("stdout", "b\n"), ("stderr", "c"), ("stdout", "d"), ("stdout", "e"))]  # fmt: skip
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print()", outputs=outputs)])
    kept = strip_notebooks.strip(book).cells[0].outputs
    assert [(o.name, o.text) for o in kept] == [("stdout", "ab\n"), ("stderr", "c"), ("stdout", "de")]


def test_strip_twice_is_strip_once(notebook, tmp_path, capsys):
    path = tmp_path / "n.ipynb"
    nbformat.write(notebook, path)
    assert strip_notebooks.main(["--check", str(path)]) == 1
    assert strip_notebooks.main([str(path)]) == 0
    once = path.read_text()
    assert strip_notebooks.main(["--check", str(path)]) == 0
    assert strip_notebooks.main([str(path)]) == 0
    assert path.read_text() == once
    assert "not stripped" in capsys.readouterr().out


def test_asset_with_the_wrong_hash_is_not_installed(tmp_path, monkeypatch):
    def fake(name, version, folder):
        (folder / "a.tgz").write_bytes(b"not what was pinned")
        return folder / "a.tgz"

    monkeypatch.setattr(fetch_assets, "download", fake)
    with pytest.raises(SystemExit, match="expected integrity sha512-AAAA, got sha512-"):
        fetch_assets.fetch("mathjax", "3.2.2", "sha512-AAAA", tmp_path)
    assert not (tmp_path / "mathjax").exists()


def test_asset_without_a_network_is_one_sentence(tmp_path):
    nowhere = {"npm_config_registry": "http://127.0.0.1:9/", "npm_config_cache": str(tmp_path / "cache")}
    environment = os.environ | nowhere
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tools'); import fetch_assets as f;"
        f"f.fetch('mathjax', '3.2.2', 'sha512-x', pathlib.Path({str(tmp_path / 'out')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "needs the network" in done.stderr


def test_old_python_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(SystemExit, match=r"^Python 3\.11 or newer is needed, and .* is Python 3\.10"):
        install.refuse_old_python()


def test_python_without_ensurepip_is_refused_in_one_sentence(tmp_path):
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SystemExit, match="apt-get install python3-venv"):
        install.refuse_missing_ensurepip(str(broken))


def test_environment_made_elsewhere_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "STAMP", tmp_path / ".venv" / ".installed.json")
    assert install.installed_state() == {}
    (tmp_path / ".venv").mkdir()
    install.STAMP.write_text("{}")
    assert install.installed_state() == {}  # a stamp, but no interpreter beside it


def test_server_stays_inside_its_folder_and_on_this_machine(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    with serve.bind(tmp_path / "site", first_port=18431) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{address}/index.html") as answer:
            assert answer.read() == b"inside"
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(f"{address}/..%2fsecret")
        refused.value.close()
        server.shutdown()


def test_server_takes_the_next_port_when_one_is_taken(tmp_path):
    with serve.bind(tmp_path, first_port=18531) as first, serve.bind(tmp_path, first_port=18531) as second:
        assert first.server_port < second.server_port


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """A copy of the files the build hashes, small enough to change."""
    for name in ("mixprec_lab", "book"):
        (tmp_path / name).mkdir()
    (tmp_path / "mixprec_lab" / "m.py").write_text("x = 1\n")
    (tmp_path / "requirements.txt").write_text("torch\n")
    monkeypatch.setattr(build_book, "ROOT", tmp_path)
    monkeypatch.setattr(build_book, "SOURCES", ("requirements.txt", "book", "mixprec_lab"))
    return tmp_path


@pytest.mark.parametrize("name", ["mixprec_lab/m.py", "requirements.txt", "book/new.ipynb"])
def test_any_changed_source_makes_the_book_out_of_date(small_tree, name):
    before = build_book.source_hash()
    (small_tree / name).write_text("y = 2\n")
    assert build_book.source_hash() != before


def test_compiled_files_do_not_make_the_book_out_of_date(small_tree):
    before = build_book.source_hash()
    (small_tree / "mixprec_lab" / "__pycache__").mkdir()
    (small_tree / "mixprec_lab" / "__pycache__" / "m.pyc").write_bytes(b"x")
    assert build_book.source_hash() == before


@pytest.fixture
def icons():
    sys.path.insert(0, str(ROOT / "book/_ext"))
    yield importlib.import_module("house.icons")
    sys.path.remove(str(ROOT / "book/_ext"))


def test_icons_are_found_by_old_and_new_names(icons):
    glyphs = icons.IconSet(icons.SCRIPT.read_text(encoding="utf-8"))
    assert glyphs.get("solid", "search") == glyphs.get("solid", "magnifying-glass")
    assert icons.used_icons(['<i class="fas fa-download"></i>', "'<b class=\\\"fa-brands fa-github fa-lg\\\">'"]) == {
        ("solid", "fa-download"),
        ("brands", "fa-github"),
    }


def test_unknown_icon_stops_the_build(icons):
    glyphs = icons.IconSet(icons.SCRIPT.read_text(encoding="utf-8"))
    with pytest.raises(icons.ExtensionError, match="no-such-icon"):
        glyphs.get("solid", "no-such-icon")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_lists_every_target():
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("install", "lint", "test", "book", "serve", "lab", "notebooks", "clean"):
        assert f"make {target} " in listed
