"""Interactive figures that work in the page without a kernel and in JupyterLab with one.

Importing ``mixprec_lab`` does not load them (they need anywidget); importing an exhibit from here does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixprec_lab.exhibits._knobs import TrainingKnobs
    from mixprec_lab.exhibits.autocast_microscope import AutocastMicroscope
    from mixprec_lab.exhibits.bit_explorer import BitExplorer
    from mixprec_lab.exhibits.clinic import Clinic
    from mixprec_lab.exhibits.drill import Drill
    from mixprec_lab.exhibits.loss_scale_lab import LossScaleLab
    from mixprec_lab.exhibits.lost_update_map import LostUpdateMap
    from mixprec_lab.exhibits.memory_calculator import MemoryCalculator
    from mixprec_lab.exhibits.museum import Museum
    from mixprec_lab.exhibits.number_line import NumberLine
    from mixprec_lab.exhibits.one_tensor import OneTensorEveryScheme
    from mixprec_lab.exhibits.precision_chooser import PrecisionChooser
    from mixprec_lab.exhibits.regimes import RegimeComparison
    from mixprec_lab.exhibits.same_tensor import SameTensorTwoFormats
    from mixprec_lab.exhibits.scale_history import ScaleHistory
    from mixprec_lab.exhibits.scaler_simulator import ScalerSimulator
    from mixprec_lab.exhibits.stalling_sum import StallingSum
    from mixprec_lab.exhibits.sum_over_ranks import SumOverRanks
    from mixprec_lab.exhibits.will_it_be_faster import WillItBeFaster
    from mixprec_lab.exhibits.windows import Windows

_HOMES = {
    "AutocastMicroscope": "autocast_microscope",
    "BitExplorer": "bit_explorer",
    "Clinic": "clinic",
    "Drill": "drill",
    "LossScaleLab": "loss_scale_lab",
    "LostUpdateMap": "lost_update_map",
    "MemoryCalculator": "memory_calculator",
    "Museum": "museum",
    "NumberLine": "number_line",
    "OneTensorEveryScheme": "one_tensor",
    "PrecisionChooser": "precision_chooser",
    "SameTensorTwoFormats": "same_tensor",
    "RegimeComparison": "regimes",
    "ScaleHistory": "scale_history",
    "ScalerSimulator": "scaler_simulator",
    "StallingSum": "stalling_sum",
    "SumOverRanks": "sum_over_ranks",
    "TrainingKnobs": "_knobs",
    "WillItBeFaster": "will_it_be_faster",
    "Windows": "windows",
}

__all__ = [
    "AutocastMicroscope",
    "BitExplorer",
    "Clinic",
    "Drill",
    "LossScaleLab",
    "LostUpdateMap",
    "MemoryCalculator",
    "Museum",
    "NumberLine",
    "OneTensorEveryScheme",
    "PrecisionChooser",
    "RegimeComparison",
    "SameTensorTwoFormats",
    "ScaleHistory",
    "ScalerSimulator",
    "StallingSum",
    "SumOverRanks",
    "TrainingKnobs",
    "WillItBeFaster",
    "Windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
