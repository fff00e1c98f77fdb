"""The line at the foot of every page: the versions that are installed, and the commit only where there is one."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
import torch
from conftest import HTML, ROOT

sys.path.insert(0, str(ROOT / "book/_ext"))
from house import colophon

sys.path.remove(str(ROOT / "book/_ext"))

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
TORCH = importlib.metadata.version("torch")  # PyPI's build with CUDA calls itself 2.13.0 here and +cu130 inside
IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main")


def git(folder, *words: str) -> str:
    done = subprocess.run(["git", *IDENTITY, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit."""
    root = tmp_path / "checkout"
    (root / "inside").mkdir(parents=True)
    (root / "page.md").write_text("# Page\n")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "one")
    return root.resolve()


def test_the_commit_is_named_and_whether_the_files_still_are_as_in_it(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert colophon.commit(checkout) == head[:12]
    (checkout / "new.md").write_text("not tracked\n")
    assert colophon.commit(checkout) == head[:12]
    (checkout / "page.md").write_text("# Changed\n")
    assert colophon.commit(checkout) == f"{head[:12]}+changes"


def test_without_a_checkout_of_its_own_no_commit_is_claimed(checkout, tmp_path, monkeypatch):
    assert colophon.commit(checkout / "inside") is None  # an archive unpacked inside another repository
    assert colophon.commit(tmp_path / "nowhere") is None
    (tmp_path / "alone").mkdir()
    assert colophon.commit(tmp_path / "alone") is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert colophon.commit(checkout) is None
    assert colophon.line(checkout) == f"Built with torch {TORCH}, mixprec_lab {VERSION}."


def test_the_line_names_what_is_installed(checkout):
    assert torch.__version__.partition("+")[0] == TORCH.partition("+")[0]
    head = git(checkout, "rev-parse", "HEAD")[:12]
    expected = f"Built with torch {TORCH}, mixprec_lab {VERSION}, from commit {head}."
    assert colophon.line(checkout) == expected


def test_every_page_ends_with_it():
    pages = sorted((HTML / "book").glob("*.html"))
    lines = set()
    for path in pages:
        found = re.findall(r'<div class="extra_footer">\s*(.*?)\s*</div>', path.read_text(encoding="utf-8"), re.DOTALL)
        assert len(found) == 1, path.name
        lines.add(found[0])
    assert len(pages) > 10 and len(lines) == 1
    versions = re.escape(f"Built with torch {TORCH}, mixprec_lab {VERSION}")
    assert re.fullmatch(versions + r"(, from commit [0-9a-f]{12}(\+changes)?)?\.", *lines)
