"""The command line under numbers that no machine has: an answer or one line, at once."""

import pytest

from mixprec_lab.command_line import main
from mixprec_lab.memory import MODELS
from mixprec_lab.memory.shapes import ModelShape

VAST = "1" + "0" * 400


@pytest.mark.parametrize(
    "words",
    [["memory", VAST], ["memory", "1" + "0" * 5000], ["memory", "gpt2", "--sequence", VAST, "--batch", "1"],
     ["memory", "7B", "--layers", VAST, "--hidden", "8", "--heads", "2", "--sequence", "8", "--batch", "1"]],
    ids=["parameters", "digits", "sequence", "layers"],
)  # fmt: skip
def test_a_number_beyond_floats_is_one_line_and_status_2(words, capsys):
    assert main(words) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("mixprec memory: ") and found.err.count("\n") == 1


def test_a_shape_of_a_million_million_layers_is_counted_at_once():
    own = {"name": "own", "hidden": 8, "heads": 2, "vocabulary": 0, "inner": 32}
    one, two, many = (ModelShape(layers=n, **own) for n in (1, 2, 10**12))
    assert many.parameters == one.parameters + (10**12 - 1) * (two.parameters - one.parameters)


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_two_kinds_add_up_one_by_one(name):
    shape = MODELS[name]
    layers = [shape._layer(i) for i in range(shape.layers)]
    assert shape._all_layers() == (sum(m for m, _ in layers), sum(o for _, o in layers))
