"""Measurements as files: what a record must hold to be believed, checked when it is written and when it is read."""

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixprec_lab.speed.devices import identify
from mixprec_lab.speed.provenance import write_whole

SCHEMA = 1
#: Rates above the data sheet by more than this are a timing bug; boost clocks explain a little.
TOLERATED = 1.05
_PROVENANCE = {
    "date": str, "command": str, "commit": str, "torch": str, "python": str, "platform": str, "cpu": str,
    "threads": int, "seconds": (int, float), "load": list, "driver": (str, type(None)),
    "transformer_engine": (str, type(None)), "quick": bool,
}  # fmt: skip
_STATUSES = ("ok", "failed", "skipped")


class BrokenRecord(ValueError):
    """A record that is incomplete, or that claims what cannot be."""


def need(condition: bool, expected: str, got: object, again: str = "make measure") -> None:
    """BrokenRecord unless ``condition``; ``again`` is the command that makes a new record."""
    if not condition:
        raise BrokenRecord(f"expected {expected}, got {got!r:.120}: measure again with {again}")


def positive(x: object) -> bool:
    """Whether ``x`` is a finite number above 0."""
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf


def validate(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """``record`` itself if it is complete and possible; BrokenRecord, naming the place, if not.

    Complete: device, provenance and at least one section, and a reason for every section without rows.  Possible:
    times, rates and bandwidths are finite and positive, a median lies between its quartiles, an ISO date with a time
    zone, and no rate above 1.05 times the data sheet of a GPU that ``identify`` knows.
    """
    check_origin(record, "measured", SCHEMA)
    sections = record.get("sections")
    need(isinstance(sections, Mapping) and len(sections) > 0, "at least one section", sections)
    for name, section in sections.items():
        _section(name, section, record["device"])
    return record


def check_origin(record: object, kind: str, schema: int, again: str = "make measure") -> None:
    """BrokenRecord unless ``record`` is one of ``kind`` that names its device and its provenance."""
    need(isinstance(record, Mapping), "a JSON object", record, again)
    need(record.get("kind") == kind, f"kind {kind!r}", record.get("kind"), again)
    need(record.get("schema") == schema, f"schema {schema}", record.get("schema"), again)
    for key in ("device", "device_type"):
        need(isinstance(record.get(key), str) and record[key] != "", f"{key} in words", record.get(key), again)
    check_provenance(record.get("provenance"), again)


def check_provenance(found: object, again: str = "make measure") -> None:
    """BrokenRecord unless ``found`` says of a measurement all that ``provenance`` asks, and the seconds it took."""
    need(isinstance(found, Mapping), "provenance", found, again)
    for key, kind in _PROVENANCE.items():
        need(key in found and isinstance(found[key], kind), f"provenance with {key}", found.get(key), again)
        need(found[key] != "", f"provenance with {key}", "", again)
    try:
        date = datetime.datetime.fromisoformat(found["date"])
    except ValueError:
        date = None
    need(date is not None and date.tzinfo is not None, "an ISO date with a time zone", found["date"], again)
    need(positive(found["seconds"]), "a positive number of seconds", found["seconds"], again)
    need(found["threads"] >= 1, "at least one thread", found["threads"], again)


def _section(name: str, section: object, device: str) -> None:
    need(isinstance(section, Mapping) and section.get("status") in _STATUSES, f"a status of {name}", section)
    if section["status"] != "ok":
        reason = section.get("reason")
        need(isinstance(reason, str) and reason != "", f"a reason why {name} {section['status']}", reason)
        return
    need(positive(section.get("seconds")), f"seconds of {name}", section.get("seconds"))
    rows = section.get("rows")
    need(isinstance(rows, list) and len(rows) > 0, f"rows of {name}", rows)
    for i, row in enumerate(rows):
        _row(f"{name}, row {i}", row, device)


def _row(where: str, row: object, device: str) -> None:
    need(isinstance(row, Mapping) and isinstance(row.get("name"), str), f"a name in {where}", row)
    spreads = {key: row[key] for key in ("seconds", "ratio") if key in row}
    need(bool(spreads), f"seconds or a ratio in {where}", row)
    for key, spread in spreads.items():
        keys = ("low", "median", "high")
        need(isinstance(spread, Mapping) and all(positive(spread.get(k)) for k in keys),
             f"a positive finite {key} with low, median and high in {where}", spread)  # fmt: skip
        need(spread["low"] <= spread["median"] <= spread["high"], f"ordered quartiles of {key} in {where}", spread)
    for key in ("teraflops", "gigabytes_per_second", "peak_bytes"):
        if row.get(key) is not None:
            need(positive(row[key]), f"a positive finite {key} in {where}", row[key])
    known = identify(device)
    if known is None:
        return
    if row.get("teraflops") is not None and row.get("dtype") in known.peak:
        most = known.rate(row["dtype"]) / 1e12
        need(row["teraflops"] <= TOLERATED * most, f"at most {most:g} TFLOP/s in {where}", row["teraflops"])
    if row.get("gigabytes_per_second") is not None:
        most = known.bandwidth / 1e9
        need(row["gigabytes_per_second"] <= TOLERATED * most, f"at most {most:g} GB/s in {where}",
             row["gigabytes_per_second"])  # fmt: skip


def failures(record: Mapping[str, Any]) -> dict[str, str]:
    """The reasons of the sections that failed, by section."""
    return {name: s["reason"] for name, s in record["sections"].items() if s["status"] == "failed"}


def partial_name(path: Path) -> Path:
    """Where a record with failed sections goes, so that it replaces nothing: ``x.json`` -> ``x.partial.json``."""
    return path.with_suffix(".partial.json")


def save(record: Mapping[str, Any], path: Path) -> Path:
    """Write a valid record and return where: at ``path``, or beside it (``partial_name``) if a section failed.

    The file appears whole or not at all.  A quick record (small sizes) never replaces a full one: FileExistsError.
    Raises BrokenRecord before anything is written.
    """
    validate(record)
    target = partial_name(path) if failures(record) else path
    if record["provenance"]["quick"] and target.exists() and not load(target)["provenance"]["quick"]:
        raise FileExistsError(f"expected another output than {target}, which holds a full record: pass --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, record, indent=1)
    return target


def load(path: Path) -> Mapping[str, Any]:
    """The record in ``path``, checked by ``validate``; BrokenRecord, with the file's name, if it is not one."""
    try:
        return validate(json.loads(path.read_text("utf-8")))
    except (json.JSONDecodeError, BrokenRecord) as error:
        raise BrokenRecord(f"{path.name}: {error}") from error


def load_all(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The measured records in ``folder`` by file name without ending; partial ones and published tables left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".partial.json"):
            continue
        if json.loads(path.read_text("utf-8")).get("kind") == "measured":
            found[path.stem] = load(path)
    return found
