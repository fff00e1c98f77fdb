"""Data in, Axes out: the one figure style of the book and one fixed colour per format.

The colours keep their lightness apart as well as their hue, so they survive colour blindness and grey printing; every
figure also names its formats in words.  ``pyplot`` is imported when a figure is drawn, not before.
"""

#: light theme, dark theme; each has a contrast of 3:1 or more against its page.
FORMAT_COLOURS: dict[str, tuple[str, str]] = {
    "fp32": ("#4d4d4d", "#c9c9c9"),
    "tf32": ("#7a5195", "#c3a0e0"),
    "fp16": ("#0063b2", "#5fb0f5"),
    "bf16": ("#c24e00", "#ff9d52"),
    "fp8_e4m3": ("#00795c", "#3fcfa6"),
    "fp8_e5m2": ("#b3245e", "#ff8fb8"),
    "fp8_e4m3fnuz": ("#4a8f7b", "#8fd9c4"),
    "fp8_e5m2fnuz": ("#c46a8f", "#ffb9d2"),
    "fp6_e3m2": ("#8a6d00", "#d9b93b"),
    "fp6_e2m3": ("#a88932", "#ead88a"),
    "fp4_e2m1": ("#9e2a2b", "#ff9191"),
    "e8m0": ("#3d6b7d", "#8cc4d9"),
}
