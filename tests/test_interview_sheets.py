"""Questions on a page: every one is there, as HTML that parses; the exercises of the chapter are tasks of the bank."""

import random
import re
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import ROOT

from mixprec_lab import plots
from mixprec_lab.interview import LEVELS, answer_sheet, counts, get_question, listing, load_bank, themes, workload
from mixprec_lab.interview.sheets import as_html

BANK = load_bank()


class Reader(HTMLParser):
    """The text, the links and the ids of a piece of HTML; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text, self.links, self.ids = [], "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        found = dict(attributes)
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def plain(text: str) -> str:
    return re.sub(r"\^(?=-?\d|[a-z]\b)", "", text.replace("`", "")).replace("\n\n", "")


def test_powers_are_raised_code_is_code_and_signs_stay_signs():
    assert as_html("`a_b^2` < 2^-24 & 2^n") == (
        "<p><code>a_b^2</code> &lt; 2<sup>-24</sup> &amp; 2<sup>n</sup></p>"
    )
    assert as_html("one\n\ntwo 2^8.8, x^") == "<p>one</p><p>two 2<sup>8.8</sup>, x^</p>"


def test_the_listing_holds_every_question_once_with_its_short_answer_and_proof():
    page = Reader(listing().html)
    assert page.ids == [f"q-{q.id}" for name in themes() for q in BANK if q.theme == name]
    assert len(page.links) == len(BANK) and set(page.links) == {q.proof.replace("#", ".html#") for q in BANK}
    assert [q.id for q in BANK if plain(q.short) not in page.text or plain(q.question) not in page.text] == []
    assert listing(BANK[:3]).html.count("<dt") == 3 and repr(listing(BANK[:3])).startswith("3 questions")


def test_a_sheet_shows_all_of_an_answer():
    q = get_question("why-loss-scaling")
    page = Reader(answer_sheet(q.id).html)
    for key in ("question", "short", "full", "mistake", "follow_up", "follow_up_answer"):
        assert plain(getattr(q, key)) in page.text
    assert page.links == ["loss_scaling.html#what-underflow-is"]
    assert repr(answer_sheet(q.id)) == "1 answered: why-loss-scaling"
    with pytest.raises(KeyError, match="expected the id of a question"):
        answer_sheet("nothing")


def test_the_counts_add_up():
    *rows, sums = counts()
    assert [row[0] for row in rows] == list(themes().values())
    assert sums == ["all", *(str(sum(q.level == level for q in BANK)) for level in LEVELS), str(len(BANK))]
    assert all(int(row[-1]) == sum(map(int, row[1:-1])) for row in rows)


def test_a_learner_who_knows_everything_answers_each_card_at_its_published_interval():
    # ease stays 2.5 under a 4: days 1, 2 (+1), 8 (+6), 23 (+15), 61 (+38)
    days = workload(1, 1, 70, 1.0, random.Random(0))
    assert [n + 1 for n, answers in enumerate(days) if answers] == [1, 2, 8, 23, 61] and sum(days) == 5
    assert workload(7, 3, 2, 1.0, random.Random(0)) == [3, 6] and workload(0, 3, 2, 1.0, random.Random(0)) == [0, 0]


def test_who_knows_less_answers_more_and_the_seed_decides():
    known, half = (sum(workload(50, 10, 30, share, random.Random(1))) for share in (1.0, 0.5))
    assert half > 2 * known
    assert workload(50, 10, 30, 0.5, random.Random(1)) == workload(50, 10, 30, 0.5, random.Random(1))


def test_the_figure_draws_the_answers():
    import matplotlib as mpl

    mpl.use("Agg")
    ax = plots.answers_per_day({10: [1, 2, 3], 20: [4, 5, 6]})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2, 3], [4, 5, 6]]
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3] and "day" in ax.get_xlabel()
    ax.figure.clear()


def without_imports(source: str) -> str:
    """The code from its first definition on, with names spelt out as the page, which imports torch only, does."""
    body = source[re.search(r"^(def|class) ", source, re.M).start() :]
    return re.sub(r"(?<!torch\.)\bnn\.", "torch.nn.", body).strip()


def test_the_exercises_of_the_page_are_tasks_of_the_bank():
    cells = nbformat.read(ROOT / "book" / "interview.ipynb", as_version=4).cells
    tasks = {q.code.name: q.code for q in BANK if q.code}
    for tag, part, least in (("exercise", "stub", 5), ("solution", "solution", 5)):
        found = [cell.source for cell in cells if tag in cell.metadata.get("tags", [])]
        assert len(found) == least
        for source in found:
            code, call = source.rsplit("\n\n\n", 1)
            name = re.search(r"^(?:def|class) (\w+)", code, re.M)[1]
            assert code == without_imports(getattr(tasks[name], part)), name
            assert call == f"coding.{tasks[name].check}({name})"
