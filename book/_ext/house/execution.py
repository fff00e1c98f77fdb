"""Key the notebook cache by everything a notebook's result depends on besides its own cells.

jupyter-cache compares a notebook's code cells only, so a change in the library would leave old outputs on the page.
Here the cache lives in a folder named by a hash of the library, the measured data, the pins and the device setting.
"""

import hashlib
import os
import shutil
from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment

from .paths import ROOT

KEPT_CACHES = 3
LIBRARY_FILES = {".py", ".js", ".css", ".yaml"}


def inputs() -> list[Path]:
    """The files whose contents decide what the notebooks print."""
    library = [p for p in (ROOT / "mixprec_lab").rglob("*") if p.suffix in LIBRARY_FILES]
    data = [p for p in (ROOT / "book/data").rglob("*") if p.is_file()]
    return sorted(library) + sorted(data) + [ROOT / "requirements.txt"]


def cache_key() -> str:
    """Sixteen hex digits over the names and contents of ``inputs()`` and the device setting."""
    digest = hashlib.sha256(os.environ.get("MIXPREC_DEVICE", "").encode())
    for path in inputs():
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def choose_cache(app: Sphinx, config: Config) -> None:
    """Point MyST-NB at the cache of this key and drop all but the newest few others."""
    folder = Path(app.outdir).parent / "execution_cache"
    chosen = folder / cache_key()
    chosen.mkdir(parents=True, exist_ok=True)
    os.utime(chosen)
    for old in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)[KEPT_CACHES:]:
        shutil.rmtree(old)
    config.nb_execution_cache_path = str(chosen)


def reread_notebooks(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """When the key is not the one of the last build, every notebook has to be read, and so run, again."""
    key = Path(app.config.nb_execution_cache_path).name
    if getattr(env, "house_cache_key", None) == key:
        return []
    env.house_cache_key = key
    return [name for name in env.found_docs if env.doc2path(name).endswith(".ipynb")]


def run_ahead(app: Sphinx, env: BuildEnvironment, names: list[str]) -> None:
    """Run what is not in the cache yet, as many notebooks at a time as there are cores.

    MyST-NB then finds them there.  One that fails is not cached: MyST-NB runs it again and reports it.
    """
    notebooks = [str(env.doc2path(name)) for name in names if env.doc2path(name).endswith(".ipynb")]
    if len(notebooks) < 2:
        return
    cache = get_cache(app.config.nb_execution_cache_path)
    for path in notebooks:
        cache.add_nb_to_project(path)
    executor = load_executor("local-parallel", cache)
    executor.run_and_cache(filter_uris=notebooks, timeout=app.config.nb_execution_timeout)


def connect(app: Sphinx) -> None:
    """Choose the cache before MyST-NB looks for it, and fill it before a page is read."""
    app.connect("config-inited", choose_cache)
    app.connect("env-get-outdated", reread_notebooks)
    app.connect("env-before-read-docs", run_ahead)
