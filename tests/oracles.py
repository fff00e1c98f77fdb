"""Independent readings of the formats for the tests: ml_dtypes and numpy for codes, gfloat and a table for rounding."""

import warnings

import gfloat
import gfloat.formats as gff
import ml_dtypes
import numpy as np

#: name -> (numpy scalar type, unsigned type of its codes)
NUMPY_TYPES = {
    "fp16": (np.float16, np.uint16),
    "bf16": (ml_dtypes.bfloat16, np.uint16),
    "fp8_e4m3": (ml_dtypes.float8_e4m3fn, np.uint8),
    "fp8_e5m2": (ml_dtypes.float8_e5m2, np.uint8),
    "fp8_e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, np.uint8),
    "fp8_e5m2fnuz": (ml_dtypes.float8_e5m2fnuz, np.uint8),
    "fp6_e3m2": (ml_dtypes.float6_e3m2fn, np.uint8),
    "fp6_e2m3": (ml_dtypes.float6_e2m3fn, np.uint8),
    "fp4_e2m1": (ml_dtypes.float4_e2m1fn, np.uint8),
    "e8m0": (ml_dtypes.float8_e8m0fnu, np.uint8),
}

_GFLOAT_MODES = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}
GFLOAT_FORMATS = {
    "fp32": gff.format_info_binary32,
    "fp16": gff.format_info_binary16,
    "bf16": gff.format_info_bfloat16,
    "fp8_e4m3": gff.format_info_ocp_e4m3,
    "fp8_e5m2": gff.format_info_ocp_e5m2,
    "fp6_e3m2": gff.format_info_ocp_e3m2,
    "fp6_e2m3": gff.format_info_ocp_e2m3,
    "fp4_e2m1": gff.format_info_ocp_e2m1,
}
DETERMINISTIC_MODES = tuple(_GFLOAT_MODES)


def code_values(name: str) -> np.ndarray:
    """The value of every code of a format of at most 16 bits, in float64, from ml_dtypes or numpy."""
    scalar, code = NUMPY_TYPES[name]
    bits = 4 if name.startswith("fp4") else 6 if name.startswith("fp6") else np.dtype(code).itemsize * 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy reports the conversion of NaN codes
        return np.arange(2**bits).astype(code).view(scalar).astype(np.float64)


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Element by element: equal with equal sign (so that -0 is not 0), or both NaN."""
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


def gfloat_round(x: np.ndarray, name: str, mode: str, saturate: bool) -> np.ndarray:
    """``x`` (float64) rounded by gfloat."""
    with np.errstate(all="ignore"):
        return gfloat.round_ndarray(GFLOAT_FORMATS[name], x, _GFLOAT_MODES[mode], saturate)


def table_round(x: np.ndarray, name: str, mode: str, saturate: bool) -> np.ndarray:
    """Finite ``x`` (float64) rounded by looking both neighbours up in the sorted table of the format's values.

    The table is extended by one value beyond the largest, so that overflow is decided by the same comparison.
    Zero results are positive: compare values only.
    """
    codes = code_values(name)
    positive = np.unique(np.abs(codes[np.isfinite(codes)]))
    beyond = 2 * positive[-1] if name == "e8m0" else 2 * positive[-1] - positive[-2]
    table = np.append(positive, beyond)
    magnitude = np.minimum(np.abs(x), beyond)
    below = np.searchsorted(table, magnitude, side="right") - 1
    above = np.minimum(below + (table[below] < magnitude), len(table) - 1)
    low, high = table[below], table[above]
    toward_low, toward_high = magnitude - low, high - magnitude
    tie = toward_low == toward_high
    # Codes of one sign are consecutive, so index parity is code parity.  E8M0 has no fraction to be even: 1.5 has the
    # neighbours 1 and 2, and 2 is the even multiple of the gap (torch and gfloat do the same).
    even = high if name == "e8m0" else np.where(below % 2 == 0, low, high)
    nearest = np.where(toward_low < toward_high, low, high)
    outward = {"up": x > 0, "down": x < 0}.get(mode, np.zeros(x.shape, bool))
    rounded = {
        "nearest_even": np.where(tie, even, nearest),
        "nearest_away": np.where(tie, high, nearest),
    }.get(mode, np.where(outward, high, low))
    overflow = rounded >= beyond
    inward = ~outward & (mode in ("toward_zero", "up", "down"))
    largest, native = positive[-1], (np.inf if np.isinf(codes).any() else np.nan)
    if saturate or not np.isnan(codes).any():
        native = largest
    return np.copysign(np.where(overflow, np.where(inward, largest, native), rounded), x)
