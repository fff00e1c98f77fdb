"""Ask the advisory database of the package index about every package of requirements.lock: ``make audit``.

Exit status: 0 every package was looked up and none has a known vulnerability; 1 some have, and they are listed; 2 the
database could not be asked, or does not know one of the packages, so that nothing can be said.  pip-audit does the
asking, and by itself ends with 0 in that last case.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pinned_program import program

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
PIP_AUDIT = "2.10.1"


def first_entry(lock: str) -> str:
    """The first package of a lock with its hashes: enough to see whether the database answers at all."""
    lines = [line for line in lock.splitlines(keepends=True) if not line.lstrip().startswith("#")]
    end = next(i for i, line in enumerate(lines) if not line.rstrip().endswith("\\"))
    return "".join(lines[: end + 1])


def ask(pip_audit: Path, lock: str) -> list[dict]:
    """pip-audit's answer for every package of ``lock``; exits with 2 and its last words if there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "requirements.lock"
        path.write_text(lock, encoding="utf-8")
        quiet = ["--format", "json", "--progress-spinner", "off", "--timeout", "20"]
        command = [str(pip_audit), "--require-hashes", "--disable-pip", *quiet, "--requirement", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        print(f"The advisory database could not be asked: {last}", file=sys.stderr)
        sys.exit(2)


def report(answers: list[dict]) -> int:
    """Print what was found; the exit status."""
    unknown = [a for a in answers if "skip_reason" in a]
    found = [(a, v) for a in answers for v in a.get("vulns", [])]
    for a, v in found:
        fixed = f"fixed in {', '.join(v['fix_versions'])}" if v.get("fix_versions") else "no fixed version"
        print(f"{a['name']} {a['version']}: {v['id']}, {fixed}")
    if unknown:
        names = ", ".join(a["name"] for a in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"{len(unknown)} of {len(answers)} packages could not be looked up ({names}): nothing is known of them. "
              f"The reason: {unknown[0]['skip_reason']}", file=sys.stderr)  # fmt: skip
    if not found and not unknown:
        print(f"{len(answers)} packages looked up, no known vulnerability.")
    return 1 if found else 2 if unknown or not answers else 0


def main() -> int:
    """Ask about one package first: a database that does not know it is not asked two hundred times."""
    pip_audit, lock = program("pip-audit", PIP_AUDIT), LOCK.read_text(encoding="utf-8")
    (first,) = ask(pip_audit, first_entry(lock))
    if "skip_reason" in first:
        return report([first])
    return report(ask(pip_audit, lock))


if __name__ == "__main__":
    sys.exit(main())
