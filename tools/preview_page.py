"""Build one page of the book alone, into _build/preview/NAME: for looking at it while it is written.

Its notebook runs if it, the library or the pins changed.  Links to other pages lead nowhere here, so warnings are
printed and are no errors; `make book` is the judge.
"""

import re
import subprocess
import sys

import build_book

ALWAYS = ("glossary", "references")  # terms and citations lead there


def pages() -> list[str]:
    """The names that can be built: every notebook and every Markdown page of the book."""
    return sorted(p.stem for p in (build_book.ROOT / "book").iterdir() if p.suffix in {".ipynb", ".md"})


def main(arguments: list[str]) -> int:
    """Build the page that ``arguments`` name; 0 when it is there."""
    if len(arguments) != 1 or arguments[0] not in pages():
        print(f"Expected one of PAGE={', '.join(pages())}; got {arguments or 'none'}.", file=sys.stderr)
        return 2
    name = arguments[0]
    folder = build_book.BUILD / "preview" / name
    folder.mkdir(parents=True, exist_ok=True)
    toc = folder / "_toc.yml"
    others = "".join(f"  - file: book/{other}\n" for other in ALWAYS if other != name)
    toc.write_text(f"format: jb-book\nroot: book/{name}\nchapters:\n{others}", encoding="utf-8")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", ".", "--toc", str(toc), "--path-output", str(folder), "-n"]
    log = folder / "book.log"
    with log.open("w") as file:
        environment = build_book.build_environment()
        done = subprocess.run(command, cwd=build_book.ROOT, env=environment, stdout=file, stderr=file, check=False)
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    for line in dict.fromkeys(text.splitlines()):
        if re.search(r"(WARNING|ERROR|SEVERE):", line) and "unknown document" not in line:
            print(line, file=sys.stderr)
    page = folder / "_build" / "html" / "book" / f"{name}.html"
    if done.returncode or not page.is_file():
        print(text[-3000:], f"The page was not built (full output: {log}).", sep="\n", file=sys.stderr)
        return done.returncode or 1
    print(f"Open {page.relative_to(build_book.ROOT)} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
