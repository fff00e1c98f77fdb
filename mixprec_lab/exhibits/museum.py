"""The museum's list of rooms: filter by theme and difficulty, go to a room, tick what is solved."""

from typing import Any

import traitlets as t

from mixprec_lab.checks.broken_code import LEVELS, ROOMS, THEMES, Room
from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of

ALL = "all"


class Museum(Exhibit):
    """The rooms of the page ``broken_code``; ``theme`` and ``level`` ("1" to "3") filter them, "all" shows every one.

    ``solved`` are the names of the rooms that are ticked.  The page adds the ticks that this browser remembers, and
    keeps new ones there.  Raises TraitError for unknown themes, levels and rooms.
    """

    _esm = es_module("museum")
    _kind = "museum"

    rooms = t.List(help="every room: name, title, theme, level, anchor").tag(sync=True)
    themes = t.List(help="theme and title, in order").tag(sync=True)
    levels = t.List(help="level and title, in order").tag(sync=True)
    theme = t.Unicode(ALL).tag(sync=True)
    level = t.Unicode(ALL).tag(sync=True)
    solved = t.List(t.Unicode()).tag(sync=True)

    def __init__(self, *, name: str | None = None, **state: Any) -> None:
        super().__init__(table_of(["fp16"]), name, **state)
        self.rooms = [_for_the_page(room) for room in ROOMS]
        self.themes = [list(theme) for theme in THEMES.items()]
        self.levels = [[str(level), title] for level, title in LEVELS.items()]

    _check_theme = t.validate("theme")(choice("theme", lambda self: (ALL, *THEMES)))
    _check_level = t.validate("level")(choice("level", lambda self: (ALL, *map(str, LEVELS))))

    @t.validate("solved")
    def _check_solved(self, proposal: Any) -> list[str]:
        if unknown := set(proposal.value) - {room.name for room in ROOMS}:
            raise t.TraitError(f"expected solved to hold names of rooms, got {', '.join(sorted(unknown))}")
        return proposal.value

    def shown(self) -> list[Room]:
        """The rooms that pass the filters."""
        return [r for r in ROOMS if self.theme in (ALL, r.theme) and self.level in (ALL, str(r.difficulty))]

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        shown = self.shown()
        done = sum(room.name in self.solved for room in shown)
        texts = {"verdict": f"{len(shown)} of {len(ROOMS)} rooms; {done} of them solved."}
        for room in shown:
            texts |= {room.name: room.title, f"{room.name}-level": LEVELS[room.difficulty]}
            texts[f"{room.name}-theme"] = THEMES[room.theme]
        return texts


def _for_the_page(room: Room) -> dict[str, str]:
    return {
        "name": room.name,
        "title": room.title,
        "theme": room.theme,
        "level": str(room.difficulty),
        "anchor": room.anchor,
    }
