"""The pages one looks things up in: glossary, bibliography, open questions, and the paths of the first page."""

import doctest
import json
import re
from itertools import pairwise

from conftest import ROOT

BOOK = ROOT / "book"


def read(name: str) -> str:
    return (BOOK / name).read_text("utf-8")


def glossary() -> list[tuple[list[str], list[str]]]:
    """``(terms, lines of the definition)`` of every entry."""
    body = re.search(r"`{4}\{glossary\}\n(.*?)\n`{4}", read("glossary.md"), re.S)[1]
    entries = []
    for block in re.split(r"\n\n(?=\S)", body.strip("\n")):
        lines = block.split("\n")
        definition = [line.strip() for line in lines if line.startswith(" ")]
        entries.append((lines[: len(lines) - len(definition)], definition))
    return entries


def test_every_entry_of_the_glossary_begins_with_its_chinese_name_and_goes_on():
    for terms, lines in glossary():
        chinese = re.fullmatch(r'<span lang="zh">([^<>]+)</span> \\', lines[0])
        assert chinese, f"{terms[0]}: put its Chinese name first, as the other entries do"
        assert re.search(r"[\u4e00-\u9fff]", chinese[1]), terms[0]
        assert len(lines) > 1, terms[0]


def test_the_glossary_is_in_order_and_names_nothing_twice():
    first = [terms[0].lower() for terms, _ in glossary()]
    assert [(a, b) for a, b in pairwise(first) if a >= b] == []
    every = [term.lower() for terms, _ in glossary() for term in terms]
    assert len(every) == len(set(every)) >= 100


def test_no_chinese_name_stands_for_two_terms():
    names = [lines[0] for _, lines in glossary()]
    assert len(names) == len(set(names))


def test_the_experiments_of_the_open_questions_print_what_the_page_says():
    text = read("open_questions.md")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert len(sections) >= 10 and [s.splitlines()[0] for s in sections if s.count("```pycon") != 1] == []
    blocks = "\n".join(re.findall(r"```pycon\n(.*?)```", text, re.S))
    test = doctest.DocTestParser().get_doctest(blocks, {}, "open_questions.md", None, None)
    said: list[str] = []
    found = doctest.DocTestRunner().run(test, out=said.append)
    assert found.attempted >= 25 and found.failed == 0, "".join(said)


def test_every_open_question_says_what_is_known_what_is_not_and_what_to_try():
    for section in re.split(r"^## ", read("open_questions.md"), flags=re.M)[1:]:
        assert re.findall(r"^\*\*(.*?)\.\*\*$", section, re.M) == ["Known", "Not known", "Try it"], section[:40]
        known = section.partition("**Not known.**")[0]
        assert re.search(r"\{cite:p\}`", known), section[:40]


def minutes(page: str) -> int:
    """The time that a chapter names in its first lines."""
    cells = json.loads(read(f"{page}.ipynb"))["cells"]
    number, unit = re.search(r"\*\*(\d+|Ninety) (minutes)", "".join(cells[0]["source"])).groups()
    return 90 if number == "Ninety" else int(number)


def test_a_reading_path_takes_the_time_that_its_pages_take():
    paths = re.findall(r"^(.*): (\d+) minutes\n: (.*)\n  (?:.*\n  )*Afterwards you can ", read("index.md"), re.M)
    assert [name for name, _, _ in paths] == [
        "One evening", "My loss is NaN now", "Moving to FP8", "Training on many GPUs", "An interview in a week",
    ]  # fmt: skip
    for name, total, steps in paths:
        named = {page: int(number) for page, number in re.findall(r"\{doc\}`(\w+)` \((\d+)\)", steps)}
        assert named == {page: minutes(page) for page in named}, name
        assert int(total) == sum(named.values()), name


def bibliography() -> dict[str, str]:
    """Key -> fields of every entry."""
    return dict(re.findall(r"^@\w+\{(\w+),\n(.*?)\n\}$", read("references.bib"), re.M | re.S))


def cited(page: str) -> list[str]:
    text = read(page)
    if page.endswith(".ipynb"):
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return [key.strip() for keys in re.findall(r"\{cite:?\w*\}`([^`]+)`", text) for key in keys.split(",")]


def test_every_entry_of_the_bibliography_stands_once_among_its_subjects():
    assert len(bibliography()) == read("references.bib").count("\n@") + 1
    assert sorted(cited("references.md")) == sorted(bibliography())


def test_every_citation_has_an_entry():
    pages = [path.name for path in BOOK.iterdir() if path.suffix in {".md", ".ipynb"}]
    assert {key for page in pages for key in cited(page)} - set(bibliography()) == set()


def test_every_entry_leads_to_its_source():
    for key, fields in bibliography().items():
        assert re.search(r"^  title = \{", fields, re.M), key
        links = re.findall(r"^  (url|doi) = \{(.*)\},?$", fields, re.M)
        assert len(links) == 1, key
        pattern = r"10\.\d{4,9}/[^\s{}\\]+" if links[0][0] == "doi" else r"https://[\w.-]+\.\w+/[^\s{}\\]*"
        assert re.fullmatch(pattern, links[0][1]), key
        if eprint := re.search(r"eprint = \{(.*?)\}", fields):
            assert links[0][1] == f"https://arxiv.org/abs/{eprint[1]}", key


def test_the_search_of_the_site_finds_a_chinese_name(open_page):
    page = open_page("search.html?q=主权重").page
    page.wait_for_selector("#search-results li a", timeout=20_000)
    found = page.eval_on_selector_all("#search-results li a", "els => els.map(e => e.getAttribute('href'))")
    assert any("glossary.html" in link for link in found), found
