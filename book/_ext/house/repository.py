"""One setting turns on every link that needs to know where the sources live.

The setting is ``repository: url`` in _config.yml, or the environment variable REPOSITORY_URL.  While it is empty, no
page offers a repository, edit, Colab or Binder button.
"""

import os

from sphinx.application import Sphinx
from sphinx.config import Config

LAUNCH = {
    "notebook_interface": "jupyterlab",
    "binderhub_url": "https://mybinder.org",
    "colab_url": "https://colab.research.google.com",
}


def switch(app: Sphinx, config: Config) -> None:
    """Set or clear the theme's repository options."""
    options = config.html_theme_options
    url = os.environ.get("REPOSITORY_URL") or options.get("repository_url") or ""
    if url:
        options.update(
            repository_url=url, use_repository_button=True, use_edit_page_button=True, launch_buttons=dict(LAUNCH)
        )
    else:
        for name in ("repository_url", "repository_branch", "launch_buttons"):
            options.pop(name, None)


def connect(app: Sphinx) -> None:
    """Before the theme reads its options."""
    app.connect("config-inited", switch, priority=400)
