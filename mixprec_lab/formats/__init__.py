"""A floating-point format is three numbers and a rule for its special codes.

``exponent_bits`` sets the range, ``mantissa_bits`` sets the precision, ``bias`` slides the range along the axis, and
``specials`` says which codes are spent on infinity and NaN.  Everything else in this module is derived from those
four: the largest and smallest values, the gap between neighbours, the number of codes, and both directions of the
map between codes and values.  One descriptor therefore serves FP32 and FP4 alike, and any format you define yourself::

    e3m4 = FloatFormat("e3m4", exponent_bits=3, mantissa_bits=4)

Sources: IEEE 754-2019 (binary16, binary32); OFP8 specification 1.0 (E4M3, E5M2); OCP MX specification 1.0 (FP6, FP4,
E8M0); Noune et al., arXiv:2206.02915 (the FNUZ variants).
"""

from mixprec_lab.formats.codes import Bits, all_values, bits_of, bits_of_code, decode, encode, neighbours
from mixprec_lab.formats.descriptor import FORMATS, CodeCounts, FloatFormat, FormatLike, get_format
from mixprec_lab.formats.reports import (
    FormatComparison,
    PrecisionAnalyzer,
    RangeShares,
    analyze_gradient_distribution,
    classify,
    compare_precision_formats,
    text_table,
)

__all__ = [
    "FORMATS",
    "Bits",
    "CodeCounts",
    "FloatFormat",
    "FormatComparison",
    "FormatLike",
    "PrecisionAnalyzer",
    "RangeShares",
    "all_values",
    "analyze_gradient_distribution",
    "bits_of",
    "bits_of_code",
    "classify",
    "compare_precision_formats",
    "decode",
    "encode",
    "get_format",
    "neighbours",
    "text_table",
]
