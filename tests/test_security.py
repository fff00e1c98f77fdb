"""Nothing of the book runs what it was not given: no code from text, no unsafe loading, no file outside the site."""

import ast
import json
import re
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import HTML, ROOT, WATCH_POLICY, serve, served

from mixprec_lab.interview import bank

PYTHON = [p for folder in ("mixprec_lab", "tools", "benchmarks", "book/_ext") for p in (ROOT / folder).rglob("*.py")]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
SCRIPTS = [
    p for folder in ("mixprec_lab", "book/_ext") for p in (ROOT / folder).rglob("*") if p.suffix in (".js", ".mjs")
]

# Python: text that becomes code, files that become objects, shells, and modules that reach the network.
RUNS_TEXT = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "import_module",
    "run_path",
    "run_module",
    "run_cell",
    "exec_module",
}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NETWORK = {"requests", "httpx", "aiohttp", "socket", "ftplib", "telnetlib", "smtplib", "http", "urllib.request"}
REMOTE = {"torch.hub.load", "hf_hub_download", "snapshot_download", "from_pretrained", "load_dataset", "urlopen"}
ALLOWED = {
    "mixprec_lab/interview/coding.py: exec": "runs a reader's answer in the reader's own process, as a cell does",
    "mixprec_lab/interview/coding.py: compile": "the same, so that an error names the task",
    "mixprec_lab/interview/bank.py: yaml.load": "with a subclass of SafeLoader that refuses doubled keys, see below",
    "mixprec_lab/exhibits/__init__.py: import_module": "one of our own modules, by a table of names",
    "mixprec_lab/scaling_out/_worker.py: import_module": "the module of the function that the caller handed over",
    "mixprec_lab/scaling_out/_worker.py: run_path": "the script that the caller named",
    "mixprec_lab/checks/broken_code/weights.py: nn.Embedding.from_pretrained": "from a tensor at hand, not from a hub",
    "tools/serve.py: import http": "serves the book on this machine",
    "tools/serve.py: import http.server": "the same",
}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain; what hangs on a call or an index keeps its last names."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed([*names, node.id] if isinstance(node, ast.Name) else names))


def of_call(node: ast.Call) -> str | None:
    """What is wrong with a call, as its name; None if nothing."""
    name, last = dotted(node.func), dotted(node.func).rpartition(".")[2]
    given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
    plain = isinstance(node.func, ast.Name) or name.split(".")[0] in ("builtins", "importlib", "runpy")
    if last in RUNS_TEXT and plain or name in SHELLS or name in REMOTE or last in REMOTE - {"torch.hub.load"}:
        return last if last in RUNS_TEXT else name
    if name == "torch.load" and given.get("weights_only") is not True:
        return name
    if (
        name in ("yaml.load", "yaml.load_all")
        or name.startswith("yaml.")
        and "unsafe" in name
        or name == "yaml.full_load"
    ):
        return name
    for option, harmless in (("shell", False), ("allow_pickle", False), ("trust_remote_code", False)):
        if given.get(option, harmless) is not harmless:
            return f"{name}({option}=...)"
    return None


def of_import(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The imported modules that unpickle or reach the network."""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    banned = UNPICKLERS | NETWORK
    return [f"import {m}" for m in modules if not getattr(node, "level", 0) and {m, m.split(".")[0]} & banned]


def unsafe(source: str) -> list[str]:
    """What Python code contains of the above."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += filter(None, [of_call(node)])
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += of_import(node)
    return found


def cells(path: Path) -> list[str]:
    """The code cells of a notebook."""
    return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("eval(text)", "eval"),
        ("builtins.exec(text)", "exec"),
        ("importlib.import_module(name)", "import_module"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("torch.load(path, weights_only=flag)", "torch.load"),
        ("yaml.load(text, yaml.SafeLoader)", "yaml.load"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("subprocess.run(line, shell=True)", "subprocess.run(shell=...)"),
        ("numpy.load(path, allow_pickle=True)", "numpy.load(allow_pickle=...)"),
        ("AutoModel.from_pretrained(name)", "AutoModel.from_pretrained"),
        ("torch.hub.load(repository, name)", "torch.hub.load"),
        ("os.system(line)", "os.system"),
        ("import pickle", "import pickle"),
        ("from urllib.request import urlretrieve", "import urllib.request"),
        ("import http.client as client", "import http.client"),
    ],
)
def test_the_search_finds(line, found):
    assert unsafe(line) == [found]


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "torch.compile(model)", "re.compile(p)", "torch.load(p, weights_only=True)", "yaml.safe_load(t)",
     "yaml.dump(x)", "subprocess.run(words, shell=False)", "from urllib.parse import quote", "from . import socket"],
)  # fmt: skip
def test_the_search_lets_pass(line):
    assert unsafe(line) == []


def test_python_code_runs_no_text_and_loads_nothing_unsafe_but_what_is_listed_with_its_reason():
    found = {f"{path.relative_to(ROOT)}: {what}" for path in PYTHON for what in unsafe(path.read_text("utf-8"))}
    assert found == set(ALLOWED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_plain_python_that_runs_no_text_and_loads_nothing_unsafe(path):
    for number, source in enumerate(cells(path)):  # a magic or a shell line is no Python: ast.parse refuses it
        python = re.sub(r"\A%%writefile \w+\.py\n", "", source)
        assert unsafe(python) == [], f"code cell {number}"


def test_question_bank_is_read_by_a_safe_loader():
    assert issubclass(bank._Loader, yaml.SafeLoader)
    with pytest.raises(bank.BankError, match="could not determine a constructor"):
        bank.read_theme("theme: !!python/object/apply:os.getcwd []", "theme")


# JavaScript: text that becomes code or markup, and every way out of the page.
STRINGS = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL)
TOKENS = re.compile(
    r"\b(?:eval|Function|importScripts|fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|Worker|SharedWorker|"
    r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|srcdoc|setHTMLUnsafe|DOMParser)\b"
    r"|\bdocument\s*\.\s*write|\bimport\s*\(|\b(?:setTimeout|setInterval)\s*\(\s*[\"'`]|javascript:"
)
ALLOWED_JS = {
    "book/_ext/static/widget-host.js: import(": "a widget's module, which travels in the page as text",
    "book/_ext/house/still.mjs: import(": "the same module, in the build",
}


def js_tokens(source: str) -> list[str]:
    """What JavaScript contains of the above; comments and quoted strings do not count."""
    bare = STRINGS.sub(lambda m: '""' if m[0][0] in "\"'" else " ", source)
    return ["".join(found.split()) for found in TOKENS.findall(bare)]


@pytest.mark.parametrize(
    "line",
    ["eval(t)", "new Function(t)", "window.fetch(u)", "node.innerHTML = t", "document . write(t)", "import (u)",
     'setTimeout("f()")', "x.insertAdjacentHTML(a, b)", "`${eval(t)}`"],
)  # fmt: skip
def test_the_search_in_javascript_finds(line):
    assert len(js_tokens(line)) == 1


def test_the_search_in_javascript_skips_words_and_lets_pass():
    assert (
        js_tokens("""// eval(x)\n/* fetch(y) */ const a = "innerHTML", f = 'eval(1)'; import { h } from "./ui.js";""")
        == []
    )
    assert js_tokens("setTimeout(done); export function write(node, text) { refunction(x); }") == []


def test_javascript_makes_no_code_and_no_markup_of_text_and_asks_nobody():
    assert SCRIPTS
    found = {f"{path.relative_to(ROOT)}: {what}" for path in SCRIPTS for what in js_tokens(path.read_text("utf-8"))}
    assert found == set(ALLOWED_JS)


# The policy in the page.
PAGE = '<html><head><meta charset="utf-8">{}</head><body>{}</body></html>'


def secured(head: str = "", body: str = "") -> str:
    from house.policy import secured as of

    return of(PAGE.format(head, body))


def sources(page: str, directive: str) -> list[str]:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    return next(d for d in policy.split("; ") if d.split()[0] == directive).split()[1:]


def test_the_policy_names_the_hash_of_each_inline_script_and_nothing_wider():
    page = secured('<script>a()</script><script src="x.js"></script>', "<script type='application/json'>{}</script>")
    # printf 'a()' | openssl dgst -sha256 -binary | base64
    assert sources(page, "script-src") == ["'self'", "'sha256-qVpDBgj7bpq5hMAcGp3AOc79J3Y1Z4HvySTwKrWDoy4='"]
    assert sources(page, "default-src") == ["'self'"] and "blob:" not in page


def test_only_a_page_with_a_widget_may_import_a_blob():
    widget = '<script type="application/vnd.jupyter.widget-view+json">{}</script>'
    assert sources(secured("", widget), "script-src") == ["'self'", "blob:"]


@pytest.mark.parametrize("body", ['<a onclick="a()">', '<a href="javascript:a()">', "<img src=x onerror=a()>"])
def test_a_page_with_an_inline_handler_is_not_built(body):
    from sphinx.errors import ExtensionError

    with pytest.raises(ExtensionError, match="expected no inline handler, got <"):
        secured("", body)


def test_a_page_without_a_charset_is_not_built():
    from house.policy import secured as of
    from sphinx.errors import ExtensionError

    with pytest.raises(ExtensionError, match="expected a <meta charset>"):
        of("<html></html>")


def test_every_page_of_the_book_has_a_policy_and_none_names_another_origin():
    pages = list(HTML.rglob("*.html"))
    assert pages, "there is no built book: run 'make book' (or 'make test') first"
    for path in pages:
        policy = re.search(r'content="(default-src [^"]*)"', path.read_text("utf-8")[: serve.HEAD])[1]
        words = {word for directive in policy.split("; ") for word in directive.split()[1:]}
        assert {w for w in words if not w.startswith("'")} <= {"blob:", "data:"}, path
        assert not words & {"'unsafe-eval'", "'wasm-unsafe-eval'", "'strict-dynamic'", "*"}, path
        assert "script-src" not in policy or "'unsafe-inline'" not in sources(path.read_text("utf-8"), "script-src"), (
            path
        )


def test_a_script_that_gets_into_a_page_does_not_run(browser, tmp_path):
    tmp_path.joinpath("index.html").write_text(secured("<script>window.ours = true</script>", "<main></main>"), "utf-8")
    context = browser.new_context()
    with served(tmp_path) as address:
        page = context.new_page()
        page.add_init_script(WATCH_POLICY)
        page.goto(f"{address}/index.html")
        page.evaluate("""() => {
          const main = document.querySelector("main"), script = document.createElement("script");
          main.innerHTML = "<img src=x onerror='window.theirs = true'><a href='javascript:window.theirs = true'>x</a>";
          script.textContent = "window.theirs = true";
          main.append(script);
          main.querySelector("a").click();
        }""")
        page.wait_for_timeout(200)
        assert page.evaluate("[window.ours, window.theirs]") == [True, None]
        blob = page.evaluate("() => URL.createObjectURL(new Blob(['1'], { type: 'text/javascript' }))")
        for url in ("data:text/javascript,1", "https://example.org/x.js", blob):
            assert page.evaluate("url => import(url).then(() => 'ran', () => 'refused')", url) == "refused"
        refused = page.evaluate("window.refusedByPolicy")
        assert {r.strip() for r in refused} == {
            "script-src-attr: inline",
            *(f"script-src-elem: {source}" for source in ("inline", "data", "https://example.org/x.js", "blob")),
        }
    context.close()


# The server of `make serve`.
@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A site with a page, a folder with and one without a page, and links that lead out of it and stay inside."""
    tmp_path = tmp_path_factory.mktemp("served")
    site = tmp_path / "site"
    for folder in ("book", "bare"):
        (site / folder).mkdir(parents=True)
    (site / "index.html").write_text('<meta http-equiv="Content-Security-Policy" content="img-src a">top')
    (site / "book" / "index.html").write_text("book")
    (site / "bare" / "a.txt").write_text("text")
    (site / "bare" / "a.pdf").write_text("%PDF-")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "site-2").mkdir()
    (tmp_path / "site-2" / "secret").write_text("secret")
    for name, target in {
        "out": tmp_path / "secret",
        "up": tmp_path,
        "in": site / "bare" / "a.txt",
        "loop": "loop",
    }.items():
        (site / name).symlink_to(target)
    return site


@pytest.fixture(scope="module")
def address(tree):
    """Where the site is served."""
    with served(tree) as at:
        yield at


def ask(address: str, path: str, method: str = "GET"):
    """The answer to a request for exactly ``path``, which nobody has put in order, with its body."""
    connection = HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.putrequest(method, path, skip_accept_encoding=True)
    connection.endheaders()
    answer = connection.getresponse()
    answer.text = answer.read().decode()
    connection.close()
    return answer


OUTSIDE = [
    "/../secret", "/%2e%2e/secret", "/..%2fsecret", "/%2e%2e%2fsecret", "/book/../../secret",
    "/book/%2e%2e/..%2f../secret",
    "/....//secret", "/..%5csecret", "/..\\secret", "/%252e%252e/secret", "/.%00./secret", "//secret", "///../secret",
    "/../site-2/secret", "/..%2fsite-2%2fsecret", "/out", "/up/secret", "/up/site/../secret", "/loop", "/%00", "/in%00",
    "/bare", "/bare/", "/nothing", "/index.html/", "/index.html/../../secret", "/" + "a" * 5000, "/" + "a/" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("path", [*OUTSIDE, "{secret}", "/{secret}"], ids=lambda p: p[:24])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_path_that_leads_out_of_the_book_or_to_no_file_is_not_found(tree, address, path, method):
    answer = ask(address, path.format(secret=tree.parent / "secret"), method)
    assert answer.status == 404
    assert "secret" not in answer.text and "a.txt" not in answer.text and str(tree) not in answer.text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/", "top"),
        ("/index.html?x=../secret#a", "top"),
        ("/book/", "book"),
        ("/in", "text"),
        ("/a/../bare/a.txt", "text"),
    ],
)
def test_files_of_the_book_are_served(address, path, text):
    answer = ask(address, path)
    assert answer.status == 200 and answer.text.endswith(text)


def test_a_folder_is_answered_with_a_slash_on_this_server(address):
    for path in ("/book", "//book"):
        answer = ask(address, path)
        assert answer.status == 301 and answer.headers["Location"] == "/book/"


def test_every_answer_carries_the_headers(address):
    for path, policy in (("/", "img-src a"), ("/bare/a.txt", serve.NO_POLICY), ("/nothing", serve.NO_POLICY)):
        headers = ask(address, path).headers
        assert headers["Content-Security-Policy"] == f"{policy}; frame-ancestors 'none'"
        assert {name: headers[name] for name in serve.HEADERS} == serve.HEADERS
        assert "Python" not in headers["Server"]
    assert ask(address, "/bare/a.pdf").headers["Content-Security-Policy"] == "frame-ancestors 'none'"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_the_server_only_hands_out(address, method):
    assert ask(address, "/index.html", method).status == 501


def test_the_server_listens_to_this_machine_only(tmp_path):
    with serve.bind(tmp_path, first_port=0) as server:
        assert server.server_address[0] == "127.0.0.1"
