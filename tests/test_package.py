"""The package as a whole: an import that costs what torch costs."""

import subprocess
import sys


def test_import_loads_neither_pyplot_nor_widgets():
    code = (
        "import sys, mixprec_lab, mixprec_lab.formats, mixprec_lab.rounding, mixprec_lab.plots, mixprec_lab.checks, "
        "mixprec_lab.models, mixprec_lab.device; "
        "print([m for m in ('matplotlib', 'anywidget', 'ipywidgets', 'sklearn', 'transformer_engine', 'torch._dynamo') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
