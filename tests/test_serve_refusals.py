"""The book's server under requests that are none: each gets one answer, with the headers, and no traceback."""

import socket
import threading

import pytest
from conftest import serve


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    folder.joinpath("index.html").write_text("<html>book</html>", "utf-8")
    meta = b'<meta http-equiv="Content-Security-Policy" content="%s">'
    folder.joinpath("two_lines.html").write_bytes(meta % b"a\r\nX-Own: 1")
    folder.joinpath("no_text.html").write_bytes(meta % b"a\xff")
    with serve.bind(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def answer(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"NONSENSE HERE", b"400"), (b"GET / HTTP/9.9", b"505"), (b"GET /" + b"a" * 70_000 + b" HTTP/1.0", b"414"),
     (b"\x16\x03\x01 \x02 \x00", b"400"), (b"BREW / HTTP/1.0", b"501")],
    ids=["no request", "no version", "too long", "a TLS greeting", "no method"],
)  # fmt: skip
def test_a_line_that_is_no_request_is_answered(port, request_line, status, capfd):
    found = answer(port, request_line + b"\r\n\r\n")
    assert status in found.splitlines()[0] or b"Error code: " + status in found
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("page", [b"two_lines.html", b"no_text.html"])
def test_a_page_cannot_write_headers_through_its_policy(port, page, capfd):
    head = answer(port, b"GET /" + page + b" HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[0]
    assert head.startswith(b"HTTP/1.0 200") and b"X-Own" not in head
    assert serve.NO_POLICY.encode() in head and "Traceback" not in capfd.readouterr().err
