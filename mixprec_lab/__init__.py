"""Mixed-precision training, taken apart: formats, rounding and the tools built on them."""

__version__ = "0.1.0"
