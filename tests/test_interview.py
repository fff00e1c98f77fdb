"""The question bank: bad files are refused, every link and source exists, every number is recomputed."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from docutils.nodes import make_id
from interview_numbers import NUMBERS

from mixprec_lab import interview
from mixprec_lab.interview import LEVELS, BankError, Question, get_question, load_bank, select, themes
from mixprec_lab.interview.bank import read_bank, read_theme

ROOT = Path(__file__).resolve().parent.parent
BANK = load_bank()
TEXTS = ("question", "short", "full", "mistake", "follow_up", "follow_up_answer")
CHECKED = [q for q in BANK if q.check]
GOOD = {
    "id": "a-question",
    "level": "screen",
    "question": "Why?",
    "short": "Because.",
    "full": "One line\nand another.\n\nA second paragraph.",
    "mistake": "None.",
    "follow_up": "And then?",
    "follow_up_answer": "Then.",
    "proof": "formats#predict-first",
}
CODE = {"name": "f", "check": "own_blocks", "stub": "def f(): ...", "solution": "def f(): return 1"}


def theme(*questions, **changes) -> str:
    return json.dumps({"theme": "t", "title": "T", "questions": list(questions), **changes})


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


def test_a_good_file_is_read_and_paragraphs_are_kept():
    rich = GOOD | {"id": "b", "sources": ["x"], "check": "c", "code": CODE}
    title, (first, second) = read_theme(theme(GOOD, rich), "t")
    assert title == "T"
    assert first == Question(theme="t", **{**GOOD, "full": "One line and another.\n\nA second paragraph."})
    assert (second.sources, second.check, second.code.solution) == (("x",), "c", "def f(): return 1")


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_and_an_empty_and_an_ill_typed_value_are_refused_by_name(key):
    place = "t.yaml, question 1" if key == "id" else "t.yaml, a-question"
    with pytest.raises(BankError, match=f"{place}: missing {key}"):
        read_theme(theme(without(key)), "t")
    for bad in ("", "  ", 3, None, ["x"]):
        with pytest.raises(BankError, match=rf"expected {key} to be"):
            read_theme(theme(GOOD | {key: bad}), "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (theme(GOOD | {"levle": "screen"}), "t.yaml, a-question: unknown levle; needed are id, level, question"),
        (theme(GOOD | {"level": "junior"}), "expected level to be one of screen, onsite, specialist, got 'junior'"),
        (theme(GOOD, GOOD), "t.yaml: expected every id once, got a-question again; first in t.yaml"),
        (theme(GOOD | {"id": "A question"}), "expected id to look like 'losing-ratio', got 'A question'"),
        (theme(GOOD | {"id": "a-question!"}), "expected id to look like 'losing-ratio', got 'a-question!'"),
        (theme(GOOD | {"proof": "formats#a b"}), "expected proof to look like 'loss_scaling#choosing-s'"),
        (theme(GOOD | {"proof": "formats"}), "expected proof to look like 'loss_scaling#choosing-s', got 'formats'"),
        (theme(GOOD | {"sources": "micikevicius2018"}), "expected sources to be a list of bibliography keys"),
        (theme(GOOD | {"sources": [1]}), "expected sources to be a list of bibliography keys"),
        (theme(GOOD | {"sources": ["a", "a"]}), "expected every source once, got a, a"),
        (theme(GOOD | {"check": 3}), "expected check to be a text, got 3"),
        (theme(GOOD | {"code": CODE | {"extra": "x"}}), "t.yaml, a-question, code: unknown extra"),
        (theme(GOOD | {"code": {"name": "f"}}), "t.yaml, a-question, code: missing check, stub, solution"),
        (theme(GOOD | {"code": CODE | {"stub": ""}}), "expected code.stub to be a text"),
        (theme("a question"), "t.yaml, question 1: expected a mapping with the keys id, level"),
        (theme(), "t.yaml: expected questions to be a list of mappings, got []"),
        (theme(GOOD, theme="u"), "expected theme to be the name of the file, 't', got 'u'"),
        (theme(GOOD, title=""), "t.yaml: expected title to be a text"),
        (theme(GOOD, level="screen"), "t.yaml: unknown level; needed are theme, title, questions"),
        ("[1, 2]", "t.yaml: expected a mapping with the keys theme, title, questions"),
        ("theme: [", "t.yaml: expected YAML, got"),
        ("theme: t\ntitle: T\ntheme: t\nquestions: []", "the key 'theme' stands twice"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_reason(text, message):
    with pytest.raises(BankError, match=re.escape(message)):
        read_theme(text, "t")


def test_an_id_in_two_files_is_refused_with_both_names():
    one, other = theme(GOOD), theme(GOOD, theme="u")
    with pytest.raises(BankError, match="u.yaml: expected every id once, got a-question again; first in t.yaml"):
        read_bank({"t": one, "u": other})
    assert list(read_bank({"t": one, "u": theme(GOOD | {"id": "b"}, theme="u")})) == ["t", "u"]


def test_yaml_cannot_run_code():
    with pytest.raises(BankError, match="could not determine a constructor"):
        read_theme("theme: !!python/object/apply:os.getcwd []", "t")


def test_the_bank_is_large_and_covers_every_theme_at_more_than_one_level():
    assert len(BANK) >= 150
    assert len({q.id for q in BANK}) == len(BANK)
    assert len({q.question for q in BANK}) == len(BANK)
    levels = Counter(q.level for q in BANK)
    assert set(levels) == set(LEVELS) and min(levels.values()) >= 40
    for name in themes():
        assert len({q.level for q in select(theme=name)}) >= 2 and len(select(theme=name)) >= 10


def test_the_filters_are_what_they_say():
    assert select() == BANK and sum(len(select(theme=t)) for t in themes()) == len(BANK)
    both = select(theme="fp8", level="screen")
    assert both and all((q.theme, q.level) == ("fp8", "screen") for q in both)
    assert set(both) == set(select(theme="fp8")) & set(select(level="screen"))
    assert get_question(BANK[7].id) is BANK[7]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select(theme="fp9"), "expected a theme, got 'fp9'; the names are amp, bf16_vs_fp16"),
        (lambda: select(level="hard"), "expected a level, got 'hard'; the names are screen, onsite, specialist"),
        (lambda: get_question("nothing"), "expected the id of a question, got 'nothing'"),
    ],
)
def test_an_unknown_name_is_refused(call, message):
    with pytest.raises(KeyError, match=message):
        call()


def anchors(page: str) -> set[str]:
    """The ids that the book gives to headings, labelled places and exercises of a page."""
    cells = json.loads((ROOT / "book" / f"{page}.ipynb").read_text("utf-8"))["cells"]
    found: set[str] = set()
    for cell in cells:
        if cell["cell_type"] != "markdown":
            continue
        for line in "".join(cell["source"]).splitlines():
            if heading := re.match(r"#+ (.*)", line):
                found.add(make_id(re.sub(r"[`*]", "", heading[1])))
            elif label := re.match(r"\((.*)\)=$|:label: (.*)$", line):
                found.add(label[1] or label[2])
    return found


@pytest.fixture(scope="module")
def places() -> set[str]:
    pages = {q.proof.split("#")[0] for q in BANK}
    return {f"{page}#{anchor}" for page in pages for anchor in anchors(page)}


def test_every_proof_is_a_place_in_the_book(places):
    assert [f"{q.id}: {q.proof}" for q in BANK if q.proof not in places] == []


def test_every_source_stands_in_the_bibliography():
    keys = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text("utf-8"), re.M))
    assert [f"{q.id}: {key}" for q in BANK for key in q.sources if key not in keys] == []


def test_a_short_answer_is_short_and_no_text_stands_twice():
    for q in BANK:
        assert len(q.short.split()) <= 60, q.id
        assert len(q.full) > len(q.mistake) or q.code, q.id
    for key in ("short", "full", "mistake", "follow_up", "follow_up_answer"):
        texts = Counter(getattr(q, key) for q in BANK)
        assert [t for t, n in texts.items() if n > 1 and len(t.split()) > 3] == []


def test_texts_have_no_notation_that_a_card_cannot_show():
    for q in BANK:
        for key in TEXTS:
            assert not re.search(r"\{\w+\}`|\$|\*\*|\]\(", getattr(q, key)), f"{q.id}: {key}"


def test_every_check_has_a_function_and_every_function_a_question():
    assert sorted(q.check for q in CHECKED) == sorted(NUMBERS)
    assert len(CHECKED) >= 40


def contains(text: str, number: str) -> bool:
    """Whether ``number`` stands in ``text`` and is not a part of a longer number."""
    return re.search(rf"(?<![\d.]){re.escape(number)}(?!\d|\.\d)", text) is not None


@pytest.mark.parametrize("q", CHECKED, ids=lambda q: q.id)
def test_the_numbers_of_an_answer_are_what_the_library_computes(q):
    text = " ".join(getattr(q, key) for key in TEXTS)
    expected = NUMBERS[q.check]()
    assert expected and [number for number in expected if not contains(text, number)] == []


def test_a_wrong_number_would_be_found():
    assert contains("ends at 448, or 2.44e-4.", "448") and contains("2^-24 = 5.96e-8.", "5.96e-8")
    assert not contains("1448 4480 448.5 3.448", "448")


def test_import_and_reading_do_not_load_torch():
    code = "import sys, mixprec_lab.interview as i; i.load_bank(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_public_names_exist():
    assert [name for name in interview.__all__ if not hasattr(interview, name)] == []
