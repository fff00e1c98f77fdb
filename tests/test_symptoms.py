"""The symptom index: each message that a CPU can produce comes as it is quoted, and every link leads somewhere."""

import json
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import HTML, ROOT
from myst_parser.mdit_to_docutils.base import default_slugify
from symptom_calls import CALLS, NEEDS_NO_CUDA

PAGE = ROOT / "book" / "symptoms.md"
#: Messages that stand in the installed PyTorch as they are quoted, though only a GPU makes it say them.
INSTALLED = {
    "amp/autocast_mode.py": "Current CUDA Device does not support bfloat16. Please switch dtype to float16.",
    "_inductor/compile_fx.py": (
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled."
    ),
}
GROUP = """
import sys, tempfile, torch
sys.path.insert(0, sys.argv[1])
import symptom_calls
with tempfile.TemporaryDirectory() as folder:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    for name in sys.argv[2:]:
        try:
            getattr(symptom_calls, name)()
        except Exception as error:
            print(name, " ".join(str(error).split()))
    torch.distributed.destroy_process_group()
"""


class Entry(NamedTuple):
    """One symptom: its heading, what is seen, what the page says about it."""

    heading: str
    term: str
    text: str

    @property
    def message(self) -> str | None:
        """The quoted message; None where the term is a behaviour in words."""
        quoted = re.fullmatch(r"(`+) ?(.*?) ?\1", self.term)
        return quoted[2] if quoted and "`" * len(quoted[1]) not in quoted[2] else None

    @property
    def links(self) -> list[tuple[str, str]]:
        """``(page, anchor)`` of every link into the book."""
        return re.findall(r"\]\((\w+\.(?:ipynb|md))#([^)]+)\)", self.text)

    @property
    def sourced(self) -> bool:
        return bool(re.search(r"\]\(https://|\{cite:p\}|Seen on", self.text))


def entries() -> list[Entry]:
    found, heading = [], ""
    for block in PAGE.read_text("utf-8").split("\n\n"):
        lines = block.strip().splitlines()
        if lines[0].startswith("## "):
            heading = lines[0][3:]
        elif len(lines) > 1 and lines[1].startswith(": "):
            found.append(Entry(heading, lines[0], " ".join(line.strip(": ") for line in lines[1:])))
    return found


ENTRIES = entries()
PRODUCED = [entry.message for entry in ENTRIES if entry.message and not entry.sourced]


def says(quoted: str, text: str) -> bool:
    """Whether ``text`` holds the parts of ``quoted`` in their order; "..." stands for anything."""
    parts = [re.escape(part.strip()) for part in re.split(r"(?<!args)\.\.\.", " ".join(quoted.split()))]
    return re.search(".*".join(parts), " ".join(text.split())) is not None


def said(call, *arguments) -> str:
    """The text of the error or the warning that ``call`` ends in."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # some come once in a process, and another test may have had them
    try:
        with warnings.catch_warnings(action="error"), pytest.raises(Exception) as caught:
            call(*arguments)
    finally:
        torch.set_warn_always(always)
    return f"{caught.value}"


def headings(page: str) -> set[str]:
    """The anchors that links of the book can name: slugs of the headings, and labels."""
    path = ROOT / "book" / page
    if path.suffix == ".md":
        texts = [path.read_text("utf-8")]
    else:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    found = set()
    for line in "\n".join(texts).splitlines():
        if heading := re.match(r"#+ (.*)", line):
            found.add(default_slugify(heading[1].replace("`", "")))
        elif label := re.match(r"\((.*)\)=$", line):
            found.add(label[1])
    return found


def test_the_index_is_long_and_nothing_stands_twice():
    assert len(ENTRIES) >= 60
    assert [term for term, n in Counter(entry.term for entry in ENTRIES).items() if n > 1] == []
    assert min(Counter(entry.heading for entry in ENTRIES).values()) >= 5


def test_every_definition_of_the_page_was_read():
    assert len(ENTRIES) == len(re.findall(r"^: ", PAGE.read_text("utf-8"), re.M))


def test_an_entry_has_a_cause_and_a_cure_and_ends_with_its_one_link():
    for entry in ENTRIES:
        assert len(entry.links) == 1 and re.search(r"\]\(\w+\.(ipynb|md)#[^)]+\)$", entry.text), entry.term
        words = re.sub(r"\[[^]]*\]\([^)]*\)", "", entry.text).split()
        assert 5 <= len(words) <= 60, entry.term


def test_every_link_leads_to_a_heading():
    pages = {page for entry in ENTRIES for page, _ in entry.links}
    anchors = {page: headings(page) for page in pages}
    assert [(e.term, link) for e in ENTRIES for link in e.links if link[1] not in anchors[link[0]]] == []


def test_a_message_without_a_source_has_a_call_and_a_call_has_a_message():
    assert sorted(PRODUCED) == sorted(CALLS)


def skip_where_it_cannot_come(message: str) -> None:
    if message in NEEDS_NO_CUDA and torch.cuda.is_available():
        pytest.skip("this machine has CUDA, so the message does not come")
    if "transformer_engine" in message:
        try:
            import transformer_engine  # noqa: F401
        except ModuleNotFoundError:
            return
        pytest.skip("Transformer Engine is installed, so the message does not come")


@pytest.mark.parametrize("message", [m for m in PRODUCED if not CALLS.get(m, print).__name__.startswith("in_group")])
def test_the_message_comes_as_it_is_quoted(message, tmp_path, monkeypatch):
    skip_where_it_cannot_come(message)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off for good
    call = CALLS[message]
    text = said(call, tmp_path / "file") if call.__name__ == "with_a_file" else said(call)
    assert says(message, text), text


def test_messages_of_a_process_group_come_as_they_are_quoted():
    calls = {call.__name__: message for message, call in CALLS.items() if call.__name__.startswith("in_group")}
    command = [sys.executable, "-c", GROUP, str(ROOT / "tests"), *calls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    texts = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert sorted(texts) == sorted(calls)
    assert [(name, texts[name]) for name, message in calls.items() if not says(message, texts[name])] == []


@pytest.mark.parametrize(("file", "message"), INSTALLED.items())
def test_a_gpu_message_stands_in_the_installed_pytorch(file, message):
    source = (Path(torch.__path__[0]) / file).read_text("utf-8")
    assert message in source and message in {entry.message for entry in ENTRIES}


def test_the_comparison_can_fail():
    assert says("a ... b", "x a 1\n2 b y") and not says("a ... b", "b a") and not says("a.", "ab")


@pytest.mark.parametrize("phrase", [
    "Attempting to unscale FP16 gradients",
    "No inf checks were recorded",
    "Promotion for Float8 Types is not supported",
])  # fmt: skip
def test_the_search_of_the_site_finds_the_page(open_page, phrase):
    page = open_page(f"search.html?q={phrase.replace(' ', '+')}").page
    page.wait_for_selector("#search-results li a", timeout=20_000)
    found = page.eval_on_selector_all("#search-results li a", "els => els.map(e => e.getAttribute('href'))")
    assert any("symptoms.html" in link for link in found), found


def test_every_link_of_the_built_page_has_its_target():
    html = (HTML / "book" / "symptoms.html").read_text("utf-8")
    links = re.findall(r'href="(\w+\.html)#([^"]+)"', html)
    assert len(links) >= len(ENTRIES)
    pages = {page: (HTML / "book" / page).read_text("utf-8") for page, _ in links}
    assert [(page, anchor) for page, anchor in links if f'id="{anchor}"' not in pages[page]] == []
