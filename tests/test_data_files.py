"""Every file of numbers in book/data: it says where it comes from, and holds nothing that cannot be.

A measured file is read by the validators of the library; here its rates are also derived again from shapes and times,
and a published table is checked whole.  Each file is then broken, one place at a time, and must be refused.
"""

import copy
import datetime
import json
import math
import re

import pytest
from conftest import ROOT

from mixprec_lab.regimes.records import validate_record
from mixprec_lab.speed import BrokenRecord, validate

FILES = sorted((ROOT / "book" / "data").glob("*.json"))
PER_CORE = {"teraflops": 10, "gigabytes_per_second": 1000}  #: no CPU of 2026 is near it
PICOJOULES, TERAFLOPS = (0.01, 1e5), (1, 1e5)


def refuse(condition: bool, message: str) -> None:
    if condition:
        raise BrokenRecord(message)


def check(document: dict) -> None:
    """Raise BrokenRecord if the file with this content must not be in the book."""
    kinds = {"measured": check_measured, "regimes": check_regimes, "published": check_published}
    refuse(not isinstance(document, dict) or document.get("kind") not in kinds, f"expected a kind among {list(kinds)}")
    kinds[document["kind"]](document)


def check_provenance(told: dict) -> None:
    date = datetime.datetime.fromisoformat(told["date"])
    refuse(date > datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1), f"a date to come: {date}")
    refuse(told["quick"], "a quick record is a test of the path, not a measurement")
    refuse(re.fullmatch(r"[0-9a-f]{40}(\+changes)?", told["commit"]) is None, f"no commit: {told['commit']}")
    refuse("python" not in told["command"], f"no command: {told['command']}")


def check_measured(document: dict) -> None:
    validate(document)
    check_provenance(document["provenance"])
    for name, section in document["sections"].items():
        for row in section.get("rows", []):
            check_row(name, row, document)


def check_row(section: str, row: dict, document: dict) -> None:
    seconds = row.get("seconds", {}).get("median")
    if "teraflops" in row:
        m, k, n = row["shape"]
        products = 3 if section == "linear" else 1  # forward, and two of the same size backward
        found = products * 2 * m * k * n / seconds / 1e12
        refuse(not math.isclose(found, row["teraflops"], rel_tol=1e-9), f"{row['name']}: {found} TFLOP/s by its time")
    if section == "copy":
        size = int(re.search(r"copy of (\d+) FP32", row["name"])[1])
        found = 2 * 4 * size / seconds / 1e9
        refuse(not math.isclose(found, row["gigabytes_per_second"], rel_tol=1e-9), f"{found} GB/s by its time")
    if document["device_type"] == "cpu":
        cores = int(re.search(r"(\d+) of \d+ cores", document["device"])[1])
        for key, most in PER_CORE.items():
            refuse(row.get(key, 0) > most * cores, f"{row['name']}: {row.get(key)} {key} on {cores} cores")


def check_regimes(document: dict) -> None:
    validate_record(document)
    check_provenance(document["provenance"])
    tasks = document["tasks"]
    for run in document["runs"]:
        parameters, sizes = tasks[run["task"]]["parameters"], run["bytes"]
        refuse(not 1 <= sizes["weights"] / parameters <= 8, f"{run['regime']}: {sizes['weights']} bytes of weights")
        refuse(sum(sizes.values()) > 64 * parameters, f"{run['regime']}: more than 64 bytes a parameter")


def check_published(document: dict) -> None:
    for key in ("what", "source", "retrieved"):
        refuse(not (isinstance(document.get(key), str) and document[key]), f"a published table without {key}")
    refuse(re.fullmatch(r"20\d\d(-\d\d){0,2}", document["retrieved"]) is None, f"no date: {document['retrieved']}")
    energy, rates = "picojoules" in document["what"], "TFLOP/s" in document["what"]
    refuse(energy == rates, f"no unit in: {document['what']}")
    low, high = PICOJOULES if energy else TERAFLOPS
    rows = document.get("rows")
    refuse(not (isinstance(rows, dict) and rows), "a published table without rows")
    for name, row in rows.items():
        values = row if isinstance(row, list) else [row]
        refuse(rates and len(values) != len(document["columns"]), f"{name}: {len(values)} values")
        for x in values:
            number = isinstance(x, int | float) and not isinstance(x, bool)
            refuse(not (x is None and rates) and not (number and low <= x <= high), f"{name}: {x}")
        known = [x for x in values if x is not None]
        refuse(not known or known != sorted(known), f"{name}: a narrower format is slower: {known}")


def read(path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_says_where_it_comes_from_and_is_possible(path):
    check(read(path))


def test_there_is_a_record_of_this_projects_own_machine_and_nothing_but_json():
    assert any(read(path)["kind"] == "measured" for path in FILES)
    others = [path.name for path in (ROOT / "book" / "data").iterdir() if path.suffix != ".json"]
    assert others == []


def leaves(value, path=()):
    """``(path, number)`` of every number in a document."""
    if isinstance(value, dict | list):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inside, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def with_change(document: dict, path: tuple, value: object) -> dict:
    """A copy with one place changed, or without it."""
    changed = copy.deepcopy(document)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


#: Numbers that a change of sign makes impossible, by the last name on the way to them.
QUANTITIES = {"low", "median", "high", "teraflops", "gigabytes_per_second", "peak_bytes", "threads"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_without_its_provenance_is_refused(path):
    document = read(path)
    places = [(key,) for key in ("kind", "what", "source", "retrieved", "rows", "provenance") if key in document]
    places += [("provenance", key) for key in document.get("provenance", ()) if key != "load_after"]
    assert len(places) >= 5
    for place in places:
        with pytest.raises(BrokenRecord):
            check(with_change(document, place, KeyError))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_quantity_that_is_negative_or_infinite_is_refused(path):
    document = read(path)
    found = [(p, x) for p, x in leaves(document) if p[-1] in QUANTITIES or p[0] == "rows" or "bytes" in p]
    assert found
    for place, x in found[:: max(1, len(found) // 60)]:
        for wrong in (-abs(x) or -1, math.inf, math.nan):
            with pytest.raises(BrokenRecord):
                check(with_change(document, place, wrong))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_rate_or_a_loss_of_a_million_times_as_much_is_refused(path):
    document = read(path)
    wanted = {"measured": ("teraflops", "gigabytes_per_second"), "regimes": ("held_out", "training")}
    names = wanted.get(document["kind"], ("rows",))
    part = {"measured": "sections", "regimes": "runs", "published": "rows"}[document["kind"]]
    found = [(p, x) for p, x in leaves(document) if p[0] == part and set(p) & set(names) and x > 0]
    assert found
    for place, x in found[:: max(1, len(found) // 60)]:
        with pytest.raises(BrokenRecord):
            check(with_change(document, place, max(x, 0.1) * 1e6))


@pytest.mark.parametrize("key, wrong", [("date", "2999-01-01T00:00:00+00:00"), ("quick", True), ("commit", "main"),
                                        ("command", "by hand")])  # fmt: skip
def test_provenance_that_cannot_be_believed_is_refused(key, wrong):
    document = next(read(path) for path in FILES if read(path)["kind"] == "measured")
    with pytest.raises(BrokenRecord):
        check(with_change(document, ("provenance", key), wrong))
