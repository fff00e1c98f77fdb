"""Records of measurements: a whole one is kept, a broken or impossible one is refused, and nothing good is lost."""

import copy
import json

import pytest

from mixprec_lab.speed import BrokenRecord, load_all, validate
from mixprec_lab.speed.records import load, partial_name, save


def record(**changes):
    spread = {"low": 1e-3, "median": 1.1e-3, "high": 1.2e-3}
    row = {"name": "bf16 1024", "dtype": "bf16", "shape": [1024] * 3, "seconds": spread, "teraflops": 600.0}
    provenance = {
        "date": "2026-11-26T08:30:00+00:00", "command": "python tools/measure.py", "commit": "d883bbd", "torch": "2.13",
        "python": "3.11.7", "platform": "Linux", "cpu": "Xeon", "threads": 2, "seconds": 200.5, "load": [0.1, 0.2, 0.3],
        "driver": "580.1", "transformer_engine": None, "quick": False,
    }  # fmt: skip
    sections = {
        "matmul": {"status": "ok", "seconds": 10.0, "rows": [row]},
        "copy": {"status": "ok", "seconds": 1.0, "rows": [{"name": "copy", "seconds": spread,
                                                           "gigabytes_per_second": 4000.0}]},
        "fp8": {"status": "skipped", "reason": "no FP8 hardware"},
    }  # fmt: skip
    whole = {"kind": "measured", "schema": 1, "device": "NVIDIA H200", "device_type": "cuda", "provenance": provenance,
             "sections": sections}  # fmt: skip
    return copy.deepcopy(whole) | changes


def changed(path: str, value):
    found = record()
    *parents, last = path.split("/")
    place = found
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return found


ROW = "sections/matmul/rows/0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("kind", "published", "kind 'measured'"), ("schema", 2, "schema 1"), ("device", "", "device in words"),
        ("device_type", KeyError, "device_type"), ("provenance", KeyError, "provenance"),
        *((f"provenance/{key}", KeyError, f"provenance with {key}") for key in record()["provenance"]),
        ("provenance/date", "yesterday", "ISO date"), ("provenance/date", "2026-11-26", "time zone"),
        ("provenance/seconds", 0, "number of seconds"), ("provenance/threads", 0, "one thread"),
        ("provenance/commit", "", "provenance with commit"), ("provenance/quick", "no", "provenance with quick"),
        ("sections", {}, "at least one section"), ("sections/matmul", [], "a status of matmul"),
        ("sections/matmul/status", "fine", "a status of matmul"), ("sections/fp8/reason", "", "why fp8 skipped"),
        ("sections/matmul/rows", [], "rows of matmul"), ("sections/matmul/seconds", -1, "seconds of matmul"),
        (f"{ROW}/name", KeyError, "a name in matmul, row 0"), (f"{ROW}/seconds", KeyError, "seconds or a ratio"),
        (f"{ROW}/seconds/median", 0.0, "positive finite seconds"),
        (f"{ROW}/seconds/median", float("nan"), "positive finite seconds"),
        (f"{ROW}/seconds/low", KeyError, "positive finite seconds"), (f"{ROW}/seconds/low", 2e-3, "ordered quartiles"),
        (f"{ROW}/seconds/high", 1e-3, "ordered quartiles"), (f"{ROW}/teraflops", -5.0, "positive finite teraflops"),
        (f"{ROW}/teraflops", 989 * 1.06, "at most 989 TFLOP/s in matmul, row 0"),
        ("sections/copy/rows/0/gigabytes_per_second", 5100.0, "at most 4800 GB/s"),
        (f"{ROW}/peak_bytes", 0, "positive finite peak_bytes"),
    ],
)  # fmt: skip
def test_what_is_missing_or_impossible_is_named(path, value, message):
    with pytest.raises(BrokenRecord, match=message):
        validate(changed(path, value))


def test_a_whole_record_passes_and_boost_clocks_are_tolerated():
    whole = record()
    assert validate(whole) is whole
    validate(changed(f"{ROW}/teraflops", 989 * 1.04))
    validate(changed(f"{ROW}/dtype", "int8"))  # a rate that the data sheet here does not hold
    validate(changed("device", "NVIDIA Abacus 9000") | {"device_type": "cuda"})


def test_a_record_survives_the_file(tmp_path):
    path = save(record(), tmp_path / "new" / "h200.json")
    assert path == tmp_path / "new" / "h200.json" and load(path) == record()
    assert load_all(path.parent) == {"h200": record()}
    assert [p.name for p in path.parent.iterdir()] == ["h200.json"]  # nothing temporary left


def test_a_broken_record_is_not_written_and_the_old_one_stays(tmp_path):
    path = save(record(), tmp_path / "h200.json")
    before = path.read_bytes()
    with pytest.raises(BrokenRecord):
        save(changed(f"{ROW}/teraflops", 2000.0), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_record_with_a_failed_section_goes_beside_the_whole_one(tmp_path):
    path = save(record(), tmp_path / "h200.json")
    before = path.read_bytes()
    failed = changed("sections/matmul", {"status": "failed", "reason": "OutOfMemoryError: 2 GiB"})
    assert save(failed, path) == tmp_path / "h200.partial.json" == partial_name(path)
    assert path.read_bytes() == before and set(load_all(tmp_path)) == {"h200"}


def test_a_quick_record_does_not_replace_a_full_one(tmp_path):
    path = save(record(), tmp_path / "h200.json")
    with pytest.raises(FileExistsError, match="full record"):
        save(changed("provenance/quick", True), path)
    assert load(path) == record()
    quick = save(changed("provenance/quick", True), tmp_path / "quick.json")
    assert load(save(changed("provenance/quick", True), quick))["provenance"]["quick"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = save(record(), tmp_path / "h200.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        save(record(device="NVIDIA H200 NVL", device_type="cuda"), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"kind": "measured"})])
def test_a_broken_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "torn.json"
    path.write_text(text, "utf-8")
    with pytest.raises(BrokenRecord, match=r"torn\.json: "):
        load(path)


def test_published_tables_are_no_records(tmp_path):
    (tmp_path / "table.json").write_text(json.dumps({"kind": "published", "rows": {}}), "utf-8")
    save(record(), tmp_path / "h200.json")
    assert list(load_all(tmp_path)) == ["h200"]


def test_every_record_of_the_book_is_valid():
    from pathlib import Path

    folder = Path(__file__).parents[1] / "book" / "data"
    kinds = [json.loads(p.read_text("utf-8"))["kind"] for p in folder.glob("*.json")]
    assert len(load_all(folder)) == kinds.count("measured")
