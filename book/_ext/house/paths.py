"""Where things are."""

from pathlib import Path

EXTENSION = Path(__file__).resolve().parents[1]
ROOT = EXTENSION.parents[1]
STATIC = EXTENSION / "static"
TEMPLATES = EXTENSION / "templates"
FETCHED = ROOT / ".assets"
