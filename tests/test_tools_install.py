"""Installing: from a wheelhouse without a network, by the hashes of the lock, and what is refused in one sentence."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pip
import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import audit
import fetch_assets
import install
import lock
import newest
import wheelhouse

sys.path.remove(str(ROOT / "tools"))

NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_FIND_LINKS": "", "PIP_RETRIES": "1",
           "PIP_CONFIG_FILE": os.devnull}  # fmt: skip


def make_wheel(folder, name="tiny", body="VALUE = 42\n"):
    """A wheel with one module in it, by hand."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    files = {
        f"{name}.py": body,
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = [hashlib.sha256(body.encode()).digest() for body in files.values()]
    digests = [base64.urlsafe_b64encode(digest).decode().rstrip("=") for digest in hashes]
    record = [f"{k},sha256={d},{len(v)}" for (k, v), d in zip(files.items(), digests, strict=True)]
    record += [f"{name}-1.0.dist-info/RECORD,,"]
    with zipfile.ZipFile(path, "w") as archive:
        for k, v in (files | {f"{name}-1.0.dist-info/RECORD": "\n".join(record) + "\n"}).items():
            archive.writestr(k, v)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout that wants one tiny package, with install.py pointed at it and no package index in reach."""
    root = tmp_path / "checkout"
    (root / "_build").mkdir(parents=True)
    (root / "requirements.txt").write_text("tiny==1.0\n")
    (root / "pyproject.toml").write_text("[project]\nname='x'\n")
    for name, path in {"ROOT": root, "VENV": root / ".venv", "STAMP": root / ".venv" / "stamp",
                       "LOG": root / "_build" / "install.log"}.items():  # fmt: skip
        monkeypatch.setattr(install, name, path)
    for name in ("WHEELHOUSE", "LOCKED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    return root


@pytest.fixture
def house(project, tmp_path):
    """A wheelhouse with that package in it, complete with its manifest."""
    folder = tmp_path / "house"
    folder.mkdir()
    make_wheel(folder)
    wheelhouse.write_manifest(folder)
    return folder


def rewrite(house, **changes):
    path = house / install.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def borrow_pip(folder):
    """An environment with the pip of this one: making one with a pip of its own takes ten times as long."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "pip.pth").write_text(str(Path(pip.__file__).parents[1]) + "\n")


def test_a_wheelhouse_installs_without_an_index(project, house, monkeypatch, capsys):
    monkeypatch.setenv("WHEELHOUSE", str(house))
    borrow_pip(project / ".venv")
    install.make_environment(sys.executable, install.wanted_state(), install.wanted_state(), install.wheelhouse())
    code = "import tiny; print(tiny.VALUE)"
    done = subprocess.run([project / ".venv/bin/python", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"
    assert install.satisfies(install.installed_state(), install.wanted_state())
    (project / "requirements.txt").write_text("tiny==1.0\nhuge==2.0\n")
    with pytest.raises(SystemExit, match=r"the wheelhouse has no huge==2\.0"):
        install.make_environment(sys.executable, install.wanted_state(), install.wanted_state(), house)
    assert install.installed_state() == {}  # the stamp went first: what is half done does not pass for whole


def test_without_a_wheelhouse_the_missing_index_is_one_sentence(project, house):
    """The sibling of the test above: the index really is out of reach."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(house), "tiny==1.0"]
    with pytest.raises(SystemExit, match="needs the network"):
        install.run_logged(command, "Installing the packages", install.pip_environment(None))


@pytest.mark.parametrize(("changes", "message"), [
    ({"python": "3.99"}, r"for python 3\.99, and this is 3\."), ({"platform": "vax"}, "for platform vax, and this is"),
    ({"requirements": "0"}, "other pins"), ({"files": {"gone.whl": "0" * 64}}, "got no such file"),
])  # fmt: skip
def test_a_wheelhouse_for_another_machine_is_refused(house, monkeypatch, changes, message):
    monkeypatch.setenv("WHEELHOUSE", str(house))
    assert install.wheelhouse() == house
    rewrite(house, **changes)
    with pytest.raises(SystemExit, match=message):
        install.wheelhouse()


def test_a_wheel_that_lost_a_byte_on_its_way_is_refused(house, monkeypatch):
    monkeypatch.setenv("WHEELHOUSE", str(house))
    wheel = next(house.glob("*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"tiny-1\.0-py3-none-any\.whl: expected sha256 .* copy the wheelhouse again"):
        install.wheelhouse()


def test_a_folder_that_is_no_wheelhouse_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WHEELHOUSE", str(tmp_path))
    with pytest.raises(SystemExit, match="made by 'make wheelhouse'"):
        install.wheelhouse()


def test_the_users_own_sources_of_packages_stay_out_of_a_wheelhouse_install(project, house):
    environment = install.pip_environment(house)
    assert [k for k in environment if k.startswith("PIP_")] == ["PIP_CONFIG_FILE", "PIP_USER", "PIP_REQUIRE_VIRTUALENV"]
    assert install.pip_environment(None)["PIP_INDEX_URL"] == NOWHERE["PIP_INDEX_URL"]


def test_browser_files_come_from_the_wheelhouse_and_are_checked(tmp_path, monkeypatch):
    house, out = tmp_path / "house", tmp_path / "out"
    house.mkdir()
    monkeypatch.setenv("WHEELHOUSE", str(house))
    with pytest.raises(SystemExit, match=r"expected scope-thing-1\.0\.tgz in WHEELHOUSE"):
        fetch_assets.fetch("@scope/thing", "1.0", "sha512-AAAA", out)
    (house / "scope-thing-1.0.tgz").write_bytes(b"not what was pinned")
    with pytest.raises(SystemExit, match="expected integrity sha512-AAAA"):
        fetch_assets.fetch("@scope/thing", "1.0", "sha512-AAAA", out)
    assert not (out / "@scope").exists()


def locked_install(project, house, digest):
    (project / "requirements.lock").write_text(f"tiny==1.0 \\\n    --hash=sha256:{digest}\n")
    arguments, editable = install.pip_arguments(house)
    assert editable[-2:] == ["-e", "."] and "--no-deps" in editable
    command = [sys.executable, "-m", "pip", "install", "--target", "there", *arguments]
    return subprocess.run(command, cwd=project, env=install.pip_environment(house), capture_output=True, text=True)


def test_a_locked_install_takes_the_file_with_the_hash_and_no_other(project, house, monkeypatch):
    monkeypatch.setenv("LOCKED", "1")
    digest = hashlib.sha256(next(house.glob("*.whl")).read_bytes()).hexdigest()
    refused = locked_install(project, house, digest[::-1])
    assert refused.returncode and "DO NOT MATCH THE HASHES" in refused.stderr and not (project / "there").exists()
    assert locked_install(project, house, digest).returncode == 0
    assert (project / "there" / "tiny.py").read_text() == "VALUE = 42\n"


def test_a_locked_environment_serves_an_unlocked_wish_and_not_the_reverse(project, monkeypatch):
    (project / "requirements.lock").write_text("tiny==1.0\n")
    plain = install.wanted_state()
    monkeypatch.setenv("LOCKED", "1")
    locked = install.wanted_state()
    assert install.satisfies(locked, plain) and not install.satisfies(plain, locked)
    (project / "requirements.lock").write_text("tiny==1.1\n")
    assert not install.satisfies(locked, install.wanted_state())
    monkeypatch.setenv("LOCKED", "yes")
    with pytest.raises(SystemExit, match="expected LOCKED=1"):
        install.wanted_state()


#: The weekly run on the newest releases opens the pins of requirements.txt before it installs.
pinned = pytest.mark.skipif(os.environ.get("NEWEST") == "1", reason="the pins are open: NEWEST=1")


def entries(text):
    """``(name, version, hashes)`` of every entry of a lock; a package may have one for each of several Pythons."""
    found = re.findall(r"^([a-z0-9-]+)==(\S+)[^\n]*((?:\\\n +--hash=\S+ ?)+)", text, re.MULTILINE)
    return [(name, version, re.findall(r"--hash=(\S+)", hashes)) for name, version, hashes in found]


@pinned
def test_the_lock_is_up_to_date_and_every_package_has_its_hashes():
    text = lock.LOCK.read_text("utf-8")
    assert f"# Pins: sha256 {lock.pins_hash()}\n" in text, "requirements.txt or the dependencies changed: run make lock"
    found = entries(text)
    assert len(found) == sum(line[:1].isalpha() for line in text.splitlines())
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for *_, hashes in found for digest in hashes)
    locked = [(name, version) for name, version, _ in found]
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)
    assert {(name.replace("_", "-"), version) for name, version in pins} <= set(locked)
    assert "setuptools" in dict(locked)  # the project itself is built without an isolated environment


def test_any_change_of_the_pins_makes_the_lock_stale_and_a_comment_does_not(tmp_path):
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"))
    assert lock.pins_hash(tmp_path) == lock.pins_hash()
    with (tmp_path / "requirements.txt").open("a") as file:
        file.write("# a remark\n")
    assert lock.pins_hash(tmp_path) == lock.pins_hash()
    with (tmp_path / "requirements.txt").open("a") as file:
        file.write("tiny==1.0\n")
    assert lock.pins_hash(tmp_path) != lock.pins_hash()


@pinned
def test_the_newest_releases_are_let_in_and_nothing_else_changes():
    pins, project = ((ROOT / name).read_text("utf-8") for name in ("requirements.txt", "pyproject.toml"))
    before, after = pins.splitlines(), newest.newest(pins, project).splitlines()
    opened = {re.match(r"[\w.-]+", line)[0] for line in after if line not in before}
    gone = {line.partition("==")[0] for line in before if line not in after}
    assert opened == set(newest.NEWEST) and gone == opened | set(newest.LEFT_TO_JUPYTER_BOOK)
    assert "jupyter-book>=1.0.4,<2" in after
    with pytest.raises(ValueError, match="got none of torch"):
        newest.newest(pins.replace("torch==", "torch>="), project)


@pytest.fixture
def auditor(tmp_path, monkeypatch):
    """``auditor(answer)``: a stand-in for pip-audit that prints ``answer`` and counts its calls."""
    program, calls = tmp_path / "pip-audit", tmp_path / "calls"

    def pretend(answer: str, status: int = 0):
        (tmp_path / "answer").write_text(answer)
        lines = ["#!/bin/sh", f"echo x >> {calls}", f"cat {tmp_path}/answer", "echo 'no route' >&2", f"exit {status}"]
        program.write_text("\n".join(lines) + "\n")
        program.chmod(0o755)
        return calls

    monkeypatch.setattr(audit, "program", lambda name, version: program)
    return pretend


def answer(**package):
    return json.dumps({"dependencies": [{"name": "tiny", "version": "1.0", **package}], "fixes": []})


@pytest.mark.parametrize(("said", "status", "words", "asked"), [
    (answer(vulns=[]), 0, "1 packages looked up, no known vulnerability", 2),
    (answer(vulns=[{"id": "PYSEC-1", "fix_versions": ["1.1"]}]), 1, "tiny 1.0: PYSEC-1, fixed in 1.1", 2),
    (answer(skip_reason="not found"), 2, "1 of 1 packages could not be looked up (tiny)", 1),
])  # fmt: skip
def test_audit_tells_safe_from_vulnerable_from_unknown(auditor, capsys, said, status, words, asked):
    calls = auditor(said)
    assert audit.main() == status
    assert words in "".join(capsys.readouterr()) and calls.read_text().count("x") == asked


def test_audit_without_an_answer_is_no_all_clear(auditor, capsys):
    auditor("", status=1)
    with pytest.raises(SystemExit) as stop:
        audit.main()
    assert stop.value.code == 2 and capsys.readouterr().err == "The advisory database could not be asked: no route\n"


def test_audit_asks_first_about_one_package_with_all_its_hashes():
    first = audit.first_entry(lock.LOCK.read_text("utf-8"))
    assert entries(first) == entries(lock.LOCK.read_text("utf-8"))[:1]


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_yaml_and_call_targets_that_exist(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow[True]  # YAML reads the key "on" so
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        runs = [step.get("run", "") for step in job["steps"]]
        assert set(re.findall(r"\bmake ([a-z]+)", "\n".join(runs))) <= targets


def test_the_newest_releases_are_tried_every_week_and_so_is_the_audit():
    text = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in WORKFLOWS}
    for name, command in (("newest", "tools/newest.py"), ("audit", "make audit")):
        minute, hour, day, month, weekday = text[name][True]["schedule"][0]["cron"].split()
        assert (day, month) == ("*", "*") and minute.isdigit() and hour.isdigit() and weekday in "0123456"
        assert any(command in step.get("run", "") for job in text[name]["jobs"].values() for step in job["steps"])
    assert text["newest"]["env"] == {"NEWEST": "1"}


def test_make_audit_and_make_lock_are_listed():
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"wheelhouse", "lock", "audit"} <= set(re.findall(r"make (\w+)", listed.stdout))
