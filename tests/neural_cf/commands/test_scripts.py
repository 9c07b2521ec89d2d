"""The three data set scripts, sourced and executed, against a local server and a small archive.

From zsh too, where it is installed.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers_paths import ROOT

SCRIPTS = ["download_dataset.sh", "verify_dataset.sh", "extract_dataset.sh"]
USERS, ITEMS, RATED, NEGATIVES = 30, 25, 21, 999
SHELLS = [program for program in ("bash", "zsh") if shutil.which(program)]
WAYS = {
    "source": ("bash", "source {script} {args}"),
    "bash": ("bash", "bash {script} {args}"),
    "direct": ("bash", "{script} {args}"),
    "zsh": ("zsh", "source {script} {args}"),
    "zsh-function": ("zsh", "f() {{ source {script} {args} }}; f"),
}

pytestmark = pytest.mark.skipif(
    "bash" not in SHELLS or not shutil.which("curl"), reason="the scripts need bash and curl"
)


@pytest.fixture(params=[way for way, (program, _) in WAYS.items() if program in SHELLS])
def way(request) -> str:
    return request.param


# --- the archive ---


def rating_rows() -> list[tuple[int, int, float, int]]:
    """Ratings of ``USERS`` users, all timestamps distinct; the last user has too few and must go."""
    draw = random.Random(5)
    stamps = iter(draw.sample(range(10**9, 10**9 + 10**5), USERS * ITEMS))
    rows = []
    for user in range(1, USERS + 1):
        for item in draw.sample(range(1, ITEMS + 1), RATED if user < USERS else 19):
            rows.append((user, item * 10, 3.5, next(stamps)))
    return rows


def make_archive(name: str = "ml-20m", rows: list | None = None, extra: int = 300_000) -> bytes:
    """A MovieLens archive with members that lead out of its directory, and ``extra`` random bytes."""
    rows = rating_rows() if rows is None else rows
    if name == "ml-20m":
        member, lines = "ratings.csv", ["userId,movieId,rating,timestamp"]
        lines += [",".join(map(str, row)) for row in rows]
    else:
        member, lines = "ratings.dat", [f"{u}::{i}::{int(r)}::{t}" for u, i, r, t in rows]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/README.txt", "not wanted")
        archive.writestr(f"{name}/tags.csv", random.Random(6).randbytes(extra))
        archive.writestr("../escaped.csv", "outside")
        archive.writestr(f"{name}/{member}", "\n".join(lines) + "\n")
        archive.writestr(f"{name}/../{member}", "outside too")
    return buffer.getvalue()


ARCHIVE = make_archive()


# --- the server ---


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path and logs every request's path and Range header.

    Attributes:
        ranges: whether Range is honoured; without, the whole file is sent.
        cut: the sizes after which the connection of the first responses breaks.
        answers: status codes for the first requests, in place of the file.
        content_range: whether a 416 says how long the file is.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/ml-20m.zip": ARCHIVE}
        self.ranges, self.content_range = True, True
        self.cut: list[int] = []
        self.answers: list[int] = []
        self.log: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.log.append((self.path, wanted))
        if server.answers:
            return self.reply(server.answers.pop(0), b"not the archive")
        if self.path not in server.files:
            return self.reply(404, b"not the archive")
        content, start = server.files[self.path], 0
        if wanted and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(content):
                size = {"Content-Range": f"bytes */{len(content)}"} if server.content_range else {}
                return self.reply(416, b"not the archive", **size)
            span = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            return self.reply(206, content[start:], **span)
        return self.reply(200, content)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if status < 300 and self.server.cut:
            body = body[: self.server.cut.pop(0)]
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# --- the shell ---


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The caller's directory, empty; beside it ``bin``, first in PATH, where ``sleep`` only logs."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "sleep", f'#!/bin/sh\necho "$1" >> "{tmp_path}/slept"\n')
    work = tmp_path / "a directory"
    work.mkdir()
    return work


# what of the environment would change how the shells, curl or the scripts behave
CONFIGURATION = {"MOVIELENS_URL", "MOVIELENS_MD5", "BASH_ENV", "SHELLOPTS", "BASHOPTS", "CDPATH"}
CONFIGURATION |= {"CURL_HOME", "XDG_CONFIG_HOME"}


def environment(work: Path, **changes: str) -> dict[str, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in CONFIGURATION and not name.lower().endswith("_proxy")
    }
    env["PATH"] = f"{work.parent / 'bin'}:{env['PATH']}"
    return env | {"HOME": str(work.parent), "PYTHON": sys.executable} | changes


def shell(work: Path, command: str, program: str = "bash", **env: str) -> subprocess.CompletedProcess:
    options = ["--norc", "--noprofile"] if program == "bash" else ["-f"]
    return subprocess.run(
        [shutil.which(program), *options, "-c", command],
        cwd=work, env=environment(work, **env), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def run(
    work: Path, script: str, args: str = "", way: str = "source", **env: str
) -> subprocess.CompletedProcess:
    program, command = WAYS[way]
    return shell(work, command.format(script=f"'{ROOT / script}'", args=args), program, **env)


def files(work: Path) -> set[str]:
    return {path.name for path in work.iterdir()}


def assert_one_line_error(done: subprocess.CompletedProcess, script: str, *words: str) -> None:
    assert done.returncode not in (0, 126, 127)
    assert done.stdout == ""
    assert re.fullmatch(rf"{re.escape(script)}: error: [^\n]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


# --- download ---


def test_download(work, server, way):
    done = run(work, "download_dataset.sh", way=way, MOVIELENS_URL=server.url)
    assert (done.returncode, done.stdout) == (0, "ml-20m.zip: downloaded\n"), done.stderr
    assert (work / "ml-20m.zip").read_bytes() == ARCHIVE
    assert files(work) == {"ml-20m.zip"}
    assert server.log == [("/ml-20m.zip", None)]


def test_download_of_the_other_data_set(work, server, way):
    server.files = {"/ml-1m.zip": b"the other archive"}
    done = run(work, "download_dataset.sh", "ml-1m", way=way, MOVIELENS_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert files(work) == {"ml-1m.zip"}
    assert (work / "ml-1m.zip").read_bytes() == b"the other archive"


def test_a_zip_that_is_there_is_left_alone(work, server, way):
    (work / "ml-20m.zip").write_bytes(b"mine")
    done = run(work, "download_dataset.sh", way=way, MOVIELENS_URL=server.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ml-20m.zip: already here\n", "")
    assert (work / "ml-20m.zip").read_bytes() == b"mine"
    assert server.log == []


def test_a_download_that_is_cut_off_goes_on_at_once(work, server, way):
    half = len(ARCHIVE) // 2
    server.cut = [half, 1000]
    done = run(work, "download_dataset.sh", way=way, MOVIELENS_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert [wanted for _, wanted in server.log] == [None, f"bytes={half}-", f"bytes={half + 1000}-"]
    assert (work / "ml-20m.zip").read_bytes() == ARCHIVE
    assert files(work) == {"ml-20m.zip"}
    assert (work.parent / "slept").read_text() == "1\n2\n"


def test_a_download_that_was_given_up_goes_on_in_the_next_run(work, server):
    (work / "ml-20m.zip.part").write_bytes(ARCHIVE[:12345])
    done = run(work, "download_dataset.sh", MOVIELENS_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert server.log == [("/ml-20m.zip", "bytes=12345-")]
    assert (work / "ml-20m.zip").read_bytes() == ARCHIVE
    assert files(work) == {"ml-20m.zip"}


def test_what_has_arrived_is_kept_when_the_download_is_given_up(work, server):
    server.cut = [1000] * 5
    done = run(work, "download_dataset.sh", MOVIELENS_URL=server.url)
    assert done.returncode == 1
    assert files(work) == {"ml-20m.zip.part"}
    assert (work / "ml-20m.zip.part").read_bytes() == ARCHIVE[:5000]
    assert len(server.log) == 5


@pytest.mark.parametrize("size", [12345, len(ARCHIVE), len(ARCHIVE) + 1])
def test_a_server_that_cannot_resume(work, server, size):
    server.ranges = False
    (work / "ml-20m.zip.part").write_bytes((ARCHIVE + b"more")[:size])
    done = run(work, "download_dataset.sh", MOVIELENS_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert (work / "ml-20m.zip").read_bytes() == ARCHIVE
    assert files(work) == {"ml-20m.zip"}


@pytest.fixture(params=[0, 22])
def curl_at_416(request, work) -> None:
    """Some curls take a 416 to a resumed download for an error, some for the end of the file."""
    stub = f'#!/bin/sh\nreply=$("{shutil.which("curl")}" "$@")\nrc=$?; printf %s "$reply"\n'
    executable(
        work.parent / "bin" / "curl", stub + f"case $reply in *416) exit {request.param} ;; esac; exit $rc\n"
    )


@pytest.mark.usefixtures("curl_at_416")
def test_a_part_that_is_whole_is_not_fetched_again(work, server):
    (work / "ml-20m.zip.part").write_bytes(ARCHIVE)
    done = run(work, "download_dataset.sh", MOVIELENS_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert server.log == [("/ml-20m.zip", f"bytes={len(ARCHIVE)}-")]
    assert (work / "ml-20m.zip").read_bytes() == ARCHIVE
    assert files(work) == {"ml-20m.zip"}


@pytest.mark.parametrize(("content_range", "surplus"), [(True, b"x"), (False, b"x"), (False, b"")])
@pytest.mark.usefixtures("curl_at_416")
def test_a_part_that_is_not_known_to_be_whole_is_fetched_again(work, server, content_range, surplus):
    server.content_range = content_range
    (work / "ml-20m.zip.part").write_bytes(ARCHIVE + surplus)
    done = run(work, "download_dataset.sh", MOVIELENS_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert [wanted is None for _, wanted in server.log] == [False, True]
    assert (work / "ml-20m.zip").read_bytes() == ARCHIVE
    assert files(work) == {"ml-20m.zip"}


@pytest.mark.usefixtures("curl_at_416")
def test_a_server_that_refuses_even_the_whole_file(work, server):
    server.answers = [416] * 100
    (work / "ml-20m.zip.part").write_bytes(ARCHIVE)
    done = run(work, "download_dataset.sh", MOVIELENS_URL=server.url)
    assert done.returncode == 1
    assert "download_dataset.sh: error: " in done.stderr
    assert files(work) == set()


def test_a_missing_file_is_an_error_at_once(work, server, way):
    server.files = {}
    done = run(work, "download_dataset.sh", way=way, MOVIELENS_URL=server.url)
    assert done.returncode == 1
    assert f"download_dataset.sh: error: {server.url}/ml-20m.zip could not be downloaded\n" in done.stderr
    assert files(work) == set()
    assert len(server.log) == 1


def test_an_error_leaves_the_part_as_it_was(work, server):
    server.files = {}
    (work / "ml-20m.zip.part").write_bytes(ARCHIVE[:1000])
    assert run(work, "download_dataset.sh", MOVIELENS_URL=server.url).returncode == 1
    assert files(work) == {"ml-20m.zip.part"}
    assert (work / "ml-20m.zip.part").read_bytes() == ARCHIVE[:1000]


def test_a_busy_server_is_asked_again(work, server):
    server.answers = [503, 429, 408, 500]
    done = run(work, "download_dataset.sh", MOVIELENS_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert (work / "ml-20m.zip").read_bytes() == ARCHIVE
    assert len(server.log) == 5


def test_a_server_that_stays_busy_is_given_up(work, server):
    server.answers = [503] * 100
    assert run(work, "download_dataset.sh", MOVIELENS_URL=server.url).returncode == 1
    assert files(work) == set()
    assert len(server.log) == 5


def test_no_server(work, server):
    server.shutdown()
    server.server_close()
    assert run(work, "download_dataset.sh", MOVIELENS_URL=server.url).returncode == 1
    assert files(work) == set()


def test_only_https_unless_told(work):
    """With a stand-in for curl: no test may ask the real server."""
    executable(work.parent / "bin" / "curl", '#!/bin/sh\nprintf "%s\\n" "$@" > args; exit 1\n')
    assert run(work, "download_dataset.sh").returncode == 1
    args = (work / "args").read_text().splitlines()
    assert args[-1] == "https://files.grouplens.org/datasets/movielens/ml-20m.zip"
    assert args[args.index("--proto") + 1] == "=https"
    assert run(work, "download_dataset.sh", MOVIELENS_URL="https://mirror").returncode == 1
    args = (work / "args").read_text().splitlines()
    assert args[-1] == "https://mirror/ml-20m.zip"
    assert args[args.index("--proto") + 1] == "=https"


def test_no_other_protocol_than_http(work):
    (work.parent / "ml-20m.zip").write_bytes(ARCHIVE)
    assert run(work, "download_dataset.sh", MOVIELENS_URL=f"file://{work.parent}").returncode == 1
    assert files(work) == set()


def test_without_curl(work):
    done = run(work, "download_dataset.sh", PATH=str(work.parent / "bin"))
    assert_one_line_error(done, "download_dataset.sh", "curl")


# --- verify ---

MD5 = hashlib.md5(ARCHIVE).hexdigest()


def test_verify(work, way):
    (work / "ml-20m.zip").write_bytes(ARCHIVE)
    done = run(work, "verify_dataset.sh", way=way, MOVIELENS_MD5=MD5)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ml-20m.zip: OK\n", "")


def test_verify_finds_one_bit(work, way):
    damaged = bytearray(ARCHIVE)
    damaged[len(damaged) // 2] ^= 1
    (work / "ml-20m.zip").write_bytes(damaged)
    done = run(work, "verify_dataset.sh", way=way, MOVIELENS_MD5=MD5)
    assert_one_line_error(done, "verify_dataset.sh", "ml-20m.zip", MD5, hashlib.md5(damaged).hexdigest())


@pytest.mark.parametrize(
    ("args", "name", "md5"),
    [
        ("", "ml-20m", "cd245b17a1ae2cc31bb14903e1204af3"),
        ("ml-20m", "ml-20m", "cd245b17a1ae2cc31bb14903e1204af3"),
        ("ml-1m", "ml-1m", "c4d9eecfca2ab87c1945afe126590906"),
    ],
)
def test_verify_expects_the_published_sum(work, args, name, md5):
    (work / f"{name}.zip").write_bytes(ARCHIVE)
    done = run(work, "verify_dataset.sh", args)
    assert_one_line_error(done, "verify_dataset.sh", f"{name}.zip has MD5 {MD5}, not {md5}:")


def test_verify_on_macos(work):
    (work / "ml-20m.zip").write_bytes(ARCHIVE)
    stub = f'#!{sys.executable}\nimport hashlib, sys\nassert sys.argv[1:] == ["-q"]\n'
    stub += "print(hashlib.md5(sys.stdin.buffer.read()).hexdigest())\n"
    executable(work.parent / "bin" / "md5", stub)
    path = str(work.parent / "bin")
    assert run(work, "verify_dataset.sh", PATH=path, MOVIELENS_MD5=MD5).stdout == "ml-20m.zip: OK\n"
    assert_one_line_error(run(work, "verify_dataset.sh", PATH=path), "verify_dataset.sh", MD5)


@pytest.mark.parametrize("name", ["ml-20m", "ml-1m"])
@pytest.mark.parametrize("script", ["verify_dataset.sh", "extract_dataset.sh"])
def test_a_missing_zip(work, way, script, name):
    done = run(work, script, name, way=way)
    assert_one_line_error(done, script, f"{name}.zip", f"download_dataset.sh {name}")
    assert files(work) == set()


# --- extract ---


def expected_split(rows: list) -> tuple[list[list[int]], list[list[int]], list[set[int]]]:
    """Training and test rows (user, item), and every user's possible negatives, from the ratings."""
    kept = [row for row in rows if sum(other[0] == row[0] for other in rows) >= 20]
    users = {user: n for n, user in enumerate(dict.fromkeys(row[0] for row in kept))}
    items = {item: n for n, item in enumerate(dict.fromkeys(row[1] for row in kept))}
    last = {user: max((row for row in kept if row[0] == user), key=lambda row: row[3]) for user in users}
    train = [[users[row[0]], items[row[1]]] for row in kept if row is not last[row[0]]]
    test = [[users[user], items[row[1]]] for user, row in last.items()]
    seen = [{item for other, item in train if other == user} for user in range(len(users))]
    return train, test, [set(range(len(items))) - items_seen for items_seen in seen]


def read_table(path: Path) -> list[list[int]]:
    return [[int(field) for field in line.split("\t")] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["ml-20m", "ml-1m"])
def test_extract(work, way, name):
    rows = rating_rows()
    archive = make_archive(name, rows)
    (work / f"{name}.zip").write_bytes(archive)
    done = run(work, "extract_dataset.sh", name, way=way)
    assert done.returncode == 0, done.stderr
    assert files(work) == {f"{name}.zip", name}
    assert files(work.parent) == {"bin", work.name}
    assert (work / f"{name}.zip").read_bytes() == archive
    assert files(work / name) >= {"train-ratings.csv", "test-ratings.csv", "test-negative.csv"}
    train, test, unseen = expected_split(rows)
    assert len(unseen) == USERS - 1
    assert sorted(row[:2] for row in read_table(work / name / "train-ratings.csv")) == sorted(train)
    assert sorted(row[:2] for row in read_table(work / name / "test-ratings.csv")) == test
    negatives = read_table(work / name / "test-negative.csv")
    assert [len(row) for row in negatives] == [NEGATIVES] * len(unseen)
    assert all(set(row) <= items for row, items in zip(negatives, unseen, strict=True))


@pytest.mark.parametrize(
    ("name", "member", "text"),
    [
        ("ml-20m", "movies.csv", 'movieId,title,genres\n{item},"Amélie, or so (2001)",Comedy\n'),
        ("ml-1m", "movies.dat", "{item}::Amélie, or so (2001)::Comedy\n"),
    ],
)
def test_extract_keeps_titles(work, way, name, member, text):
    item = rating_rows()[0][1]
    (work / f"{name}.zip").write_bytes(make_archive(name, extra=10))
    with zipfile.ZipFile(work / f"{name}.zip", "a") as archive:
        archive.writestr(
            f"{name}/{member}", text.format(item=item).encode("latin-1" if name == "ml-1m" else "utf-8")
        )
    done = run(work, "extract_dataset.sh", name, way=way)
    assert done.returncode == 0, done.stderr
    assert files(work) == {f"{name}.zip", name}
    assert (work / name / "titles.csv").read_text() == f'movieId,title\n{item},"Amélie, or so (2001)"\n'


def test_extract_finds_convert_beside_itself(work, way):
    """A relative path from below the scripts, past a CDPATH that would lead elsewhere."""
    (work / "ml-20m.zip").write_bytes(ARCHIVE)
    beside = work.parent / "scripts"
    beside.mkdir()
    shutil.copy(ROOT / "extract_dataset.sh", beside)
    (beside / "convert.py").write_text(
        "import os, shutil, sys\n"
        "assert os.path.dirname(sys.argv[0]) == '../scripts'\n"
        "assert os.path.samefile(os.path.join(os.path.dirname(sys.argv[1]), os.pardir), os.curdir)\n"
        "assert sys.argv[2:] == ['ml-20m', '--negatives', '999']\n"
        "shutil.copy(sys.argv[1], 'ml-20m')\n"
    )
    program, command = WAYS[way]
    command = command.format(script="../scripts/extract_dataset.sh", args="")
    done = shell(work, command, program, CDPATH="/usr")
    assert done.returncode == 0, done.stderr
    lines = (work / "ml-20m").read_text().splitlines()
    assert lines[0] == "userId,movieId,rating,timestamp"
    assert len(lines) == 1 + len(rating_rows())


def without_member() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml-20m/movies.csv", "no ratings")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"no archive", b"", ARCHIVE[: len(ARCHIVE) // 2], without_member()])
def test_extract_from_a_damaged_archive(work, way, content):
    (work / "ml-20m.zip").write_bytes(content)
    done = run(work, "extract_dataset.sh", way=way)
    assert_one_line_error(done, "extract_dataset.sh", "ml-20m.zip", "ml-20m/ratings.csv")
    assert files(work) == {"ml-20m.zip"}


def test_extract_finds_a_member_that_fails_its_checksum(work):
    damaged = bytearray(ARCHIVE)
    with zipfile.ZipFile(io.BytesIO(ARCHIVE)) as archive:
        damaged[archive.getinfo("ml-20m/ratings.csv").header_offset + 1000] ^= 1
    (work / "ml-20m.zip").write_bytes(damaged)
    assert_one_line_error(run(work, "extract_dataset.sh"), "extract_dataset.sh", "ml-20m.zip")
    assert files(work) == {"ml-20m.zip"}


def test_extract_finds_no_room_for_what_a_member_claims(work):
    """Before anything of it is unpacked."""
    claimed = bytearray(make_archive(extra=10))
    with zipfile.ZipFile(io.BytesIO(claimed)) as archive:
        size = archive.getinfo("ml-20m/ratings.csv").file_size.to_bytes(4, "little")
    # In the archive's list of members: 46 bytes, then the name; the size stands at the 24th.
    at = claimed.index(b"ml-20m/ratings.csv", claimed.index(b"PK\x01\x02")) - 46
    assert claimed[at + 24 : at + 28] == size
    claimed[at + 24 : at + 28] = b"\xfe\xff\xff\xff"
    (work / "ml-20m.zip").write_bytes(claimed)
    (work / "sitecustomize.py").write_text(
        "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 31)\n"
    )
    done = run(work, "extract_dataset.sh", PYTHONPATH=str(work))
    assert_one_line_error(done, "extract_dataset.sh", "ml-20m.zip", str((1 << 32) - 2), str(1 << 31))
    assert not [name for name in files(work) if name.startswith("ml-20m.") and name != "ml-20m.zip"]


def test_extract_passes_on_what_convert_finds(work, way):
    (work / "ml-20m.zip").write_bytes(make_archive(rows=[("one", 1, 2.0, 3)], extra=10))
    done = run(work, "extract_dataset.sh", way=way)
    assert done.returncode == 2
    assert "convert.py: error: " in done.stderr
    assert not [name for name in files(work) if name.startswith("ml-20m.") and name != "ml-20m.zip"]


def test_extract_without_python(work):
    (work / "ml-20m.zip").write_bytes(ARCHIVE)
    done = run(work, "extract_dataset.sh", PYTHON="no-such-python")
    assert done.returncode == 127
    assert files(work) == {"ml-20m.zip"}


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("program", SHELLS)
def test_extract_interrupted(work, program, sig):
    """As from the terminal, to all processes, while convert runs: the caller's trap runs, and it lives on."""
    (work / "ml-20m.zip").write_bytes(ARCHIVE)
    stub = work.parent / "python"
    executable(
        stub,
        f'#!/bin/sh\ncase $1 in -c) exec "{sys.executable}" "$@" ;; esac\n'
        'echo "$2" > "../started.new"; mv ../started.new ../started; exec /bin/sleep 120\n',
    )
    name = sig.name.removeprefix("SIG")
    command = (
        f"trap 'echo caught' {name}; tmp='{work.parent}/mine'; mkdir \"$tmp\"\n"
        f"source '{ROOT}/extract_dataset.sh'\nrc=$?; echo alive $rc; trap"
    )
    process = subprocess.Popen(
        [shutil.which(program), "-c", command],
        cwd=work, env=environment(work, PYTHON=str(stub)), text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        # a shell cannot trap what was ignored when it started, as in a background job
        preexec_fn=lambda: signal.signal(sig, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(work.parent / "started", process)
        unpacked = work / (work.parent / "started").read_text().strip()
        assert unpacked.read_text().startswith("userId,movieId,rating,timestamp\n")
        os.killpg(process.pid, sig)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "caught\n" in output
    assert "alive 130\n" in output
    assert "echo caught" in output
    assert files(work) == {"ml-20m.zip"}
    assert (work.parent / "mine").is_dir()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, "the shell ended early"
        time.sleep(0.02)


# --- what sourcing leaves behind ---

# Of the caller's variables, those which the shell itself changes from one line to the next.
VOLATILE = (
    "_|RANDOM|SRANDOM|SECONDS|LINENO|EPOCH.*|TTYIDLE|BASH_(ARGC|ARGV|LINENO|SOURCE|COMMAND)|FUNCNAME"
    "|PIPESTATUS|pipestatus|status|result|[?!#]"
)

# The caller has a name for everything that the scripts might overwrite or remove.
CALLER = """
fail() { :; }
trap 'echo a trap' INT
trap 'echo another' USR1
name=1 zip=2 part=3 base=4 rc=5 tmp=6 python=7 here=8 ratings=9 expected=10 actual=11 reply=12 pause=13
protocols=14 size=15 published=16 unpack=17 result=0
set -- 'my own' parameters
"""

BASH_STATE = f"""
state() {{
    echo "[$-] [$PWD] [$OLDPWD] [$*] [$IFS]"
    set -o; shopt; trap; declare -f; alias
    compgen -v | grep -vxE '{VOLATILE}'
    declare -p | grep -vE '^declare -[^ ]+ ({VOLATILE})(=|$)'
}}
"""

ZSH_STATE = f"""
state() {{
    echo "[$-] [$PWD] [$OLDPWD] [$*] [$IFS]"
    set -o; trap; functions; alias
    typeset | grep -vE '^([a-z0-9 ]+ )?({VOLATILE})(=|$)'
}}
"""


def assert_shell_unchanged(
    work: Path, server: Server, program: str, script: str, outcome: str, options: str = ""
) -> None:
    if outcome == "failure":
        server.files = {}
    elif script != "download_dataset.sh":
        (work / "ml-20m.zip").write_bytes(ARCHIVE)
    name = "ml-9m" if outcome == "unknown" else "ml-20m"
    # `set -e` is off in a condition, also for what is sourced there: a success is no condition, to have it on
    condition = "" if outcome == "success" else "|| result=$?"
    state = BASH_STATE if program == "bash" else ZSH_STATE
    command = (
        f'cd .\n{CALLER}{state}{options}\nstate "$@" > ../before\n'
        f"source '{ROOT / script}' {name} > ../output 2>&1 {condition}\n"
        'state "$@" > ../after\necho "$result"'
    )
    stub = work.parent / "python"
    executable(stub, f'#!/bin/sh\ncase $1 in -c) exec "{sys.executable}" "$@" ;; *) mkdir "$3" ;; esac\n')
    env = {"MOVIELENS_URL": server.url, "MOVIELENS_MD5": MD5, "PYTHON": str(stub)}
    done = shell(work, command, program, **env)
    assert done.stdout == ("0\n" if outcome == "success" else "1\n"), (work.parent / "output").read_text()
    before = (work.parent / "before").read_text().splitlines()
    assert {"name=1", 'declare -- name="1"'} & set(before)
    assert (work.parent / "after").read_text().splitlines() == before


@pytest.mark.parametrize("outcome", ["success", "failure", "unknown"])
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("program", SHELLS)
def test_sourcing_leaves_the_shell_as_it_was(work, server, program, script, outcome):
    assert_shell_unchanged(work, server, program, script, outcome)


@pytest.mark.parametrize(
    "options",
    [
        "set -euo pipefail -o noclobber -o noglob",
        "set -ET; trap 'touch ../trapped' ERR EXIT RETURN; shopt -s extglob",
    ],
)
@pytest.mark.parametrize("outcome", ["success", "failure"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_sourcing_into_a_shell_with_other_options(work, server, script, outcome, options):
    assert_shell_unchanged(work, server, "bash", script, outcome, options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_name(work, server, way, script):
    done = run(work, script, "ml-9m", way=way, MOVIELENS_URL=server.url)
    assert_one_line_error(done, script, "'ml-9m'", "ml-20m", "ml-1m")
    assert files(work) == set()
    assert server.log == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_caller_with_parameters_of_its_own(work, script):
    command = f"set -- 'my own'; source '{ROOT / script}'; echo \"$? $1\""
    done = shell(work, command)
    assert done.stdout == "1 my own\n"
    assert done.stderr.startswith(f"{script}: error: unknown data set 'my own'")
    assert files(work) == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_aliases_of_an_interactive_shell_do_no_harm(work, server, script):
    if script != "download_dataset.sh":
        (work / "ml-20m.zip").write_bytes(ARCHIVE)
    command = f"shopt -s expand_aliases\nalias rm='rm -i' mv='mv -i' cp='cp -i'\nsource '{ROOT / script}'"
    done = shell(work, command, MOVIELENS_URL=server.url, MOVIELENS_MD5=MD5)
    assert done.returncode == 0, done.stderr
    assert files(work) == {"ml-20m.zip"} | ({"ml-20m"} if script == "extract_dataset.sh" else set())


def test_the_three_in_a_row(work, server):
    commands = " && ".join(f"source '{ROOT / script}'" for script in SCRIPTS)
    done = shell(work, commands, MOVIELENS_URL=server.url, MOVIELENS_MD5=MD5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ml-20m.zip: downloaded\nml-20m.zip: OK\n")
    assert files(work) == {"ml-20m.zip", "ml-20m"}
