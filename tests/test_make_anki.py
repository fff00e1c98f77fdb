"""The deck for Anki: another reader of the file finds every question, and a later deck updates the same notes."""

import json
import re
import sqlite3
import zipfile
from html.parser import HTMLParser

import make_anki
import pytest

from mixprec_lab.interview import LEVELS, load_bank, themes

BANK = load_bank()
MODEL_ID, AMP_DECK_ID, FIRST_GUID = 1850660831, 1532920623, 'KH~Oxpu%8L'


def read(path, scratch) -> dict:
    """What Anki finds in the file: notes by guid, cards, decks and models."""
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ["collection.anki2", "media"]
        archive.extract("collection.anki2", scratch)
    connection = sqlite3.connect(scratch / "collection.anki2")
    try:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        models, known_decks = map(json.loads, connection.execute("select models, decks from col").fetchone())
        rows = connection.execute("select id, guid, mid, mod, tags, flds from notes").fetchall()
        cards = connection.execute("select nid, did, queue, type from cards").fetchall()
    finally:
        connection.close()
    names = {int(id): deck["name"] for id, deck in known_decks.items()}
    deck_of = {nid: names[did] for nid, did, _, _ in cards}
    (kind,) = [m for m in models.values() if str(m["id"]) == str(rows[0][2])]
    fields = [f["name"] for f in sorted(kind["flds"], key=lambda f: f["ord"])]
    notes = {}
    for id, guid, mid, mod, tags, values in rows:
        about = {"model": mid, "mod": mod, "tags": set(tags.split()), "deck": deck_of[id]}
        notes[guid] = about | dict(zip(fields, values.split("\x1f"), strict=True))
    return {"notes": notes, "cards": cards, "decks": known_decks, "model": kind, "rows": rows}


@pytest.fixture(scope="module")
def deck(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anki")
    assert make_anki.write(folder / "deck.apkg", now=1.75e9) == len(BANK)
    return read(folder / "deck.apkg", folder)


class Words(HTMLParser):
    """The text of a field; what is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text, self.links = [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)
        self.links += [value for key, value in attributes if key == "href"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def bank_text(text: str) -> str:
    return re.sub(r"[`\s]", "", text)


def card_text(field: str) -> str:
    r"""The field as it was in the bank: \(2^{-24}\) is 2^-24 again."""
    text = re.sub(r"\\\((?:\{\})?([^{}]*)\^\{([^{}]*[/+][^{}]*)\}\\\)", r"\1^(\2)", Words(field).text)
    return re.sub(r"\s", "", re.sub(r"\\\((?:\{\})?([^{}]*)\^\{([^{}]*)\}\\\)", r"\1^\2", text))


TEXTS = {"Question": "question", "Short": "short", "Full": "full", "Mistake": "mistake",
         "FollowUp": "follow_up", "FollowUpAnswer": "follow_up_answer"}  # fmt: skip


def test_every_question_is_one_new_card_in_the_deck_of_its_theme(deck):
    assert len(deck["notes"]) == len(deck["cards"]) == len(BANK)
    assert {(queue, kind) for _, _, queue, kind in deck["cards"]} == {(0, 0)}
    counted = {}
    for note in deck["notes"].values():
        counted[note["deck"]] = counted.get(note["deck"], 0) + 1
    assert counted == {f"Mixed-precision training::{title}": sum(q.theme == theme for q in BANK)
                       for theme, title in themes().items()}  # fmt: skip


def test_every_text_of_the_bank_is_on_its_card_and_nothing_else_is(deck):
    asked = {bank_text(q.question): q for q in BANK}
    assert len(asked) == len(BANK)
    for note in deck["notes"].values():
        q = asked[card_text(note["Question"])]
        assert {key: card_text(note[key]) for key in TEXTS} == {k: bank_text(getattr(q, v)) for k, v in TEXTS.items()}
        assert Words(note["Stub"]).text == (q.code.stub if q.code else "")
        assert Words(note["Solution"]).text == (q.code.solution if q.code else "")
        assert [line != "" for line in note["Sources"].split("<br>")] == ([True] * len(q.sources) or [False])
        assert Words(note["Proof"]).text == q.proof.replace("#", ": ").replace("-", " ")
        assert note["tags"] == {"mixprec", f"theme::{q.theme}", f"level::{q.level}"} | ({"coding"} if q.code else set())


def test_no_raw_markup_is_left_outside_of_code(deck):
    for note in deck["notes"].values():
        for key in TEXTS:
            text = re.sub(r"<code>.*?</code>|\\\(.*?\\\)", "", note[key], flags=re.DOTALL)
            assert not re.search(r"[`^$]|\*\*|\]\(|^#|\{", text, re.MULTILINE), (key, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2^-24 < x", r"<p>\(2^{-24}\) &lt; x</p>"),
        ("`a^2` & 2^n, 2^p bits", r"<p><code>a^2</code> &amp; \(2^{n}\), \(2^{p}\) bits</p>"),
        ("d^(1/4)", r"<p>\(d^{1/4}\)</p>"),
        ("(a / b)^2", r"<p>(a / b)\({}^{2}\)</p>"),
        ("255.9^2\n\n2^8.8.", r"<p>\(255.9^{2}\)</p><p>\(2^{8.8}\).</p>"),
    ],
)
def test_powers_become_mathematics_and_signs_stay_signs(text, expected):
    assert make_anki.field(text) == expected


def test_ids_are_those_of_the_first_release(deck):
    # These numbers are in the collections of readers: a change would double their cards.
    assert deck["model"]["id"] in (make_anki.stable_id("model"), str(make_anki.stable_id("model")))
    assert make_anki.stable_id("model") == MODEL_ID and make_anki.stable_id("deck:amp") == AMP_DECK_ID
    guids = {card_text(note["Question"]): guid for guid, note in deck["notes"].items()}
    (first,) = [q for q in BANK if q.id == "why-loss-scaling"]
    assert guids[bank_text(first.question)] == FIRST_GUID
    ids = [make_anki.stable_id(f"deck:{theme}") for theme in themes()]
    assert len({*ids, MODEL_ID}) == len(ids) + 1 and all(2**30 <= id < 2**31 for id in ids)


def test_a_later_deck_is_newer_and_has_the_same_notes(deck, tmp_path):
    make_anki.write(tmp_path / "later.apkg", site="https://example.org/lab/", now=1.76e9)
    later = read(tmp_path / "later.apkg", tmp_path)
    assert later["notes"].keys() == deck["notes"].keys() and later["decks"].keys() == deck["decks"].keys()
    assert later["model"]["id"] == deck["model"]["id"] and later["model"]["flds"] == deck["model"]["flds"]
    for guid, note in later["notes"].items():
        before = deck["notes"][guid]
        assert note["mod"] > before["mod"] and note["deck"] == before["deck"]
        (link,) = Words(note["Proof"]).links
        page, anchor = link.removeprefix("https://example.org/lab/book/").split("#")
        assert before["Proof"] == f"{page.removesuffix('.html')}: {anchor.replace('-', ' ')}"


def test_a_changed_text_keeps_its_id():
    from dataclasses import replace

    kind, library = make_anki.model(), make_anki.parse_file(make_anki.REFERENCES)
    old, new = (make_anki.note(q, kind, library, "") for q in (BANK[0], replace(BANK[0], question="Other words?")))
    assert old.guid == new.guid and old.fields != new.fields
    assert make_anki.note(BANK[1], kind, library, "").guid != old.guid


def test_the_template_shows_every_field_and_hides_empty_parts(deck):
    (template,) = deck["model"]["tmpls"]
    shown = set(re.findall(r"\{\{(\w+)\}\}", template["qfmt"] + template["afmt"])) - {"FrontSide"}
    assert shown == set(make_anki.FIELDS)
    assert set(re.findall(r"\{\{#(\w+)\}\}", template["afmt"])) == shown - {"Question", "Stub"}
    assert set(re.findall(r"\{\{(\w+)\}\}", template["qfmt"])) == {"Question", "Stub"}
    assert set(LEVELS) == {tag.split("::")[1] for n in deck["notes"].values() for tag in n["tags"] if "level" in tag}


def test_the_command_says_what_it_wrote_and_refuses_what_is_no_address(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(make_anki, "ROOT", tmp_path)
    monkeypatch.setattr(make_anki, "APKG", tmp_path / "_build" / "mixprec.apkg")
    assert make_anki.main([]) == 0
    assert capsys.readouterr().out.startswith(f"{len(BANK)} cards in _build/mixprec.apkg")
    written = make_anki.APKG.read_bytes()
    with pytest.raises(SystemExit):
        make_anki.main(["--site", "example.org"])
    assert "expected --site to be an address" in capsys.readouterr().err and make_anki.APKG.read_bytes() == written
