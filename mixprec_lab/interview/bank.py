"""The question bank: one YAML file a theme, checked when it is read, returned as frozen values.

A file is a mapping of ``theme`` (the name of the file), ``title`` and ``questions``; a question has the keys of
``Question`` but ``theme``.  In texts a line break is a space and an empty line starts a paragraph.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from types import MappingProxyType

import yaml

LEVELS: Mapping[str, str] = MappingProxyType({
    "screen": "a first call: one or two minutes an answer",
    "onsite": "a technical round: derive it, write it, defend it",
    "specialist": "a team that trains large models: the details",
})  # fmt: skip
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_PROOF = re.compile(r"[a-z0-9_]+#[a-z0-9]+(-[a-z0-9]+)*")


class BankError(ValueError):
    """A file of questions that is not as it has to be; the message names the file, the question and the key."""


@dataclass(frozen=True)
class Code:
    """The task of a coding question: ``stub`` and ``solution`` define ``name``, and ``check`` judges it."""

    name: str
    check: str  #: a function of ``mixprec_lab.interview.coding`` or ``mixprec_lab.checks``
    stub: str
    solution: str


@dataclass(frozen=True)
class Question:
    """One question with all that a card or a page shows.  Paragraphs of a text are separated by an empty line."""

    id: str
    theme: str
    level: str  #: a key of ``LEVELS``
    question: str
    short: str  #: the answer in one to three sentences
    full: str
    mistake: str  #: what most people get wrong
    follow_up: str  #: the question that would catch you out
    follow_up_answer: str
    proof: str  #: a place in the book that proves it: "page#anchor"
    sources: tuple[str, ...] = ()  #: keys of book/references.bib
    check: str | None = None  #: the name of the test function that computes the numbers of the answer
    code: Code | None = None


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key that stands twice in one mapping; PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for n, key in enumerate(keys):
            if key in keys[:n]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.value[n][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def _mapping(x: object, required: Iterable[str], optional: Iterable[str], where: str) -> dict:
    required, optional = list(required), list(optional)
    if not isinstance(x, dict):
        raise BankError(f"{where}: expected a mapping with the keys {', '.join(required)}, got {x!r:.60}")
    for kind, keys in (("unknown", [k for k in x if k not in required + optional]),
                       ("missing", [k for k in required if k not in x])):  # fmt: skip
        if keys:
            raise BankError(
                f"{where}: {kind} {', '.join(map(str, keys))}; needed are {', '.join(required)}"
                + (f", allowed are {', '.join(optional)}" if optional else "")
            )
    return x


def _text(x: object, key: str, where: str) -> str:
    if not isinstance(x, str) or not x.strip():
        raise BankError(f"{where}: expected {key} to be a text, got {x!r:.60}; quote it, or write it after '|'")
    return x


def _matching(x: object, key: str, pattern: re.Pattern, example: str, where: str) -> str:
    if not pattern.fullmatch(_text(x, key, where)):
        raise BankError(f"{where}: expected {key} to look like {example!r}, got {x!r}")
    return x


def _code(x: object, where: str) -> Code:
    parts = _mapping(x, (f.name for f in fields(Code)), (), f"{where}, code")
    return Code(**{key: _text(value, f"code.{key}", where) for key, value in parts.items()})


def _sources(x: object, where: str) -> tuple[str, ...]:
    if not isinstance(x, list) or not all(isinstance(key, str) for key in x):
        raise BankError(f"{where}: expected sources to be a list of bibliography keys, got {x!r:.60}")
    if len(set(x)) < len(x):
        raise BankError(f"{where}: expected every source once, got {', '.join(x)}")
    return tuple(x)


def _question(x: object, theme: str, where: str) -> Question:
    own = [f for f in fields(Question) if f.name != "theme"]
    required = [f.name for f in own if f.default is MISSING]
    parts = dict(_mapping(x, required, (f.name for f in own if f.default is not MISSING), where))
    special = {
        "id": lambda v: _matching(v, "id", _ID, "losing-ratio", where),
        "proof": lambda v: _matching(v, "proof", _PROOF, "loss_scaling#choosing-s", where),
        "check": lambda v: _text(v, "check", where),
        "sources": lambda v: _sources(v, where),
        "code": lambda v: _code(v, where),
    }
    values = {
        key: special[key](value) if key in special else _paragraphs(_text(value, key, where))
        for key, value in parts.items()
    }
    if values["level"] not in LEVELS:
        raise BankError(f"{where}: expected level to be one of {', '.join(LEVELS)}, got {values['level']!r}")
    return Question(theme=theme, **values)


def read_theme(text: str, name: str) -> tuple[str, tuple[Question, ...]]:
    """The title and the questions of one YAML file, whose name without ending is ``name``.

    Raises BankError, naming the place, for text that is no YAML, for unknown, missing or doubled keys, for an empty or
    ill-typed value, for a level that is not in ``LEVELS`` and for an id that stands twice.
    """
    where = f"{name}.yaml"
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise BankError(f"{where}: expected YAML, got {error}") from error
    top = _mapping(content, ("theme", "title", "questions"), (), where)
    if top["theme"] != name:
        raise BankError(f"{where}: expected theme to be the name of the file, {name!r}, got {top['theme']!r}")
    if not isinstance(top["questions"], list) or not top["questions"]:
        raise BankError(f"{where}: expected questions to be a list of mappings, got {top['questions']!r:.60}")
    found = []
    for n, x in enumerate(top["questions"], 1):
        label = x["id"] if isinstance(x, dict) and isinstance(x.get("id"), str) else f"question {n}"
        found.append(_question(x, name, f"{where}, {label}"))
    _unique(found)
    return _text(top["title"], "title", where), tuple(found)


def _unique(questions: Iterable[Question]) -> None:
    seen: dict[str, str] = {}
    for q in questions:
        if q.id in seen:
            raise BankError(f"{q.theme}.yaml: expected every id once, got {q.id} again; first in {seen[q.id]}.yaml")
        seen[q.id] = q.theme


def read_bank(texts: Mapping[str, str]) -> Mapping[str, tuple[str, tuple[Question, ...]]]:
    """Title and questions of every theme, by name, from the text of each file; BankError as ``read_theme``.

    An id must not stand in two files either.
    """
    bank = {name: read_theme(text, name) for name, text in texts.items()}
    _unique(q for _, questions in bank.values() for q in questions)
    return MappingProxyType(bank)


@functools.cache
def _bank() -> Mapping[str, tuple[str, tuple[Question, ...]]]:
    folder = files("mixprec_lab.interview").joinpath("questions")
    paths = sorted((p for p in folder.iterdir() if p.name.endswith(".yaml")), key=lambda p: p.name)
    if not paths:
        raise BankError(f"expected files of questions in {folder}, got none; install the package with its data")
    return read_bank({p.name.removesuffix(".yaml"): p.read_text("utf-8") for p in paths})


def themes() -> Mapping[str, str]:
    """The title of every theme, by name, in alphabetical order of names."""
    return MappingProxyType({name: title for name, (title, _) in _bank().items()})


def load_bank() -> tuple[Question, ...]:
    """Every question, theme by theme, in the order of the files.  Read once; BankError if one is broken."""
    return tuple(q for _, questions in _bank().values() for q in questions)


def select(theme: str | None = None, level: str | None = None) -> tuple[Question, ...]:
    """The questions of a theme, of a level, or of both; all of them without either.

    Raises KeyError, with the names, for a theme or level that does not exist.
    """
    for kind, value, names in (("theme", theme, themes()), ("level", level, LEVELS)):
        if value is not None and value not in names:
            raise KeyError(f"expected a {kind}, got {value!r}; the names are {', '.join(names)}")
    return tuple(q for q in load_bank() if theme in (None, q.theme) and level in (None, q.level))


def get_question(id: str) -> Question:
    """The question of that id; KeyError for an unknown one."""
    for q in load_bank():
        if q.id == id:
            return q
    raise KeyError(f"expected the id of a question, got {id!r}; load_bank() has them all, select() those of a theme")
