"""A page with live widgets and nothing else: the state as MyST-NB embeds it, and the host script of the book."""

import json
from collections.abc import Sequence
from pathlib import Path

import anywidget
from ipywidgets.embed import embed_data

HOST = Path(__file__).parents[1] / "book" / "_ext" / "static" / "widget-host.js"

_PAGE = """<!doctype html>
<html lang="en" data-theme="{theme}"><head><meta charset="utf-8"><title>Exhibits</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ margin: 16px auto; padding: 0 12px; max-width: 800px; font-family: system-ui, sans-serif;
background: #fff }} html[data-theme="dark"] body {{ background: #14181e; color: #e6ebf0 }}</style></head>
<body><main><h1>Exhibits</h1>{views}</main>
<script type="application/vnd.jupyter.widget-state+json">{state}</script><script>{host}</script></body></html>
"""


def page_of(widgets: Sequence[anywidget.AnyWidget], theme: str = "light") -> str:
    """The HTML of a page that shows ``widgets``, one below the other."""
    data = embed_data(views=list(widgets), drop_defaults=False)
    views = "".join(
        f'<div class="cell_output"><script type="application/vnd.jupyter.widget-view+json">{json.dumps(spec)}'
        "</script></div>"
        for spec in data["view_specs"]
    )
    state = json.dumps(data["manager_state"]).replace("</", "<\\/")
    return _PAGE.format(theme=theme, views=views, state=state, host=HOST.read_text(encoding="utf-8"))
