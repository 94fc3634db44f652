"""Published files are downloaded whole or not at all: what servers do wrong, and what a user has got by hand."""

import hashlib
import socket

import pytest
from small_archives import cut, mirror, no_ranges, write_checksums

from s2dm_jax.common.errors import UserError
from s2dm_jax.data import fetch
from s2dm_jax.data.fetch import RemoteFile, fetch_files, mirrored

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PAGE = "<!DOCTYPE html><html><body>Please log in</body></html>"
QUOTA = "<html><title>Google Drive - Quota exceeded</title>Too many users have viewed or downloaded this file</html>"
SCAN = (
    '<html>Google Drive can\'t scan this file for viruses<form id="download-form" action="/really" method="get">'
    '<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="a&amp;b">'
    '<input type="hidden" name="confirm" value="t"></form></html>'
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_WAITS", (0.0,) * 3)
    monkeypatch.delenv("S2DM_JAX_MIRROR", raising=False)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "data.bin").write_bytes(CONTENT)
    with mirror(tmp_path / "mirror") as running:
        yield running


def fetched(server, tmp_path, **changes):
    """Downloads data.bin, and returns what is in the folder afterwards."""
    file = RemoteFile("data.bin", f"{server.url}/data.bin", len(CONTENT), SHA256)._replace(**changes)
    fetch_files("the set", [file], tmp_path / "downloads", tmp_path / "manual")
    return {path.name: path.read_bytes() for path in (tmp_path / "downloads").iterdir()}


def starts(server):
    return [start for _, start in server.requests]


@pytest.mark.parametrize(
    ("faults", "requested"),
    [
        ([], [0]),
        # Half of what is left comes each time.
        ([cut, cut], [0, 524_288, 786_432]),
        ([500, 503, 429], [0, 0, 0, 0]),
        ([cut, no_ranges], [0, 524_288]),
        ([cut, 503, 503, 503], [0] + [524_288] * 4),
    ],
)
def test_a_download_is_resumed_or_begun_anew(server, tmp_path, faults, requested):
    server.faults["data.bin"] = list(faults)
    assert fetched(server, tmp_path) == {"data.bin": CONTENT}
    assert starts(server) == requested
    # What is complete is not asked for again.
    assert fetched(server, tmp_path) == {"data.bin": CONTENT}
    assert starts(server) == requested


def test_what_another_process_left_is_resumed_unless_it_is_of_another_file(server, tmp_path):
    part = tmp_path / "downloads" / ".data.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:1000])
    assert fetched(server, tmp_path) == {"data.bin": CONTENT}
    (part.parent / "data.bin").write_bytes(CONTENT[:-1] + b"?")
    part.write_bytes(b"?" * 1000)
    assert fetched(server, tmp_path) == {"data.bin": CONTENT}
    assert starts(server) == [1000, 1000, 0]


@pytest.mark.parametrize(
    ("faults", "changes", "reason"),
    [
        ([404], {}, "the server answers 404 Not Found"),
        ([502] * 4, {}, "the server answers 502 Bad Gateway"),
        ([PAGE], {}, "the answer is a web page, such as the login page of a network"),
        ([QUOTA], {}, "Google Drive's download quota for this file is used up for today"),
        ([], {"size": len(CONTENT) + 1}, "the server's file ends after 1,048,576 bytes"),
        ([], {"size": len(CONTENT) - 1}, "it has more than 1,048,575 bytes"),
        ([], {"sha256": 64 * "0"}, f"its SHA-256 is {SHA256[:16]}…, not 0000000000000000…"),
        ([no_ranges, *[no_ranges] * 4], {"size": len(CONTENT) + 1}, "it ends after 1,048,576 of 1,048,577 bytes"),
    ],
)
def test_what_cannot_be_downloaded_is_one_sentence(server, tmp_path, faults, changes, reason):
    server.faults["data.bin"] = list(faults)
    with pytest.raises(UserError) as error:
        fetched(server, tmp_path, **changes)
    assert str(error.value) == (
        f"data.bin of the set cannot be downloaded ({reason}); download {server.url}/data.bin with a browser, put it "
        f"at {tmp_path}/manual/data.bin, and run the same command again"
    )
    assert not (tmp_path / "downloads" / "data.bin").exists()
    assert fetched(server, tmp_path) == {"data.bin": CONTENT}


def test_google_drives_question_about_viruses_is_answered(server, tmp_path):
    server.faults["data.bin"] = [SCAN]
    (server.folder / "really").write_bytes(CONTENT)
    assert fetched(server, tmp_path) == {"data.bin": CONTENT}
    assert server.requests == [("/data.bin", 0), ("/really?id=a%26b&confirm=t", 0)]


def test_no_network_and_no_answer_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_WAITS", (0.0,))
    monkeypatch.setattr(fetch, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/data.bin"
        file = RemoteFile("data.bin", url, 10, SHA256)
        with pytest.raises(UserError, match=r"\(no answer for 0\.1 s\); download http.* with a browser, put it at"):
            fetch_files("the set", [file], tmp_path / "downloads", tmp_path / "manual")
    for address, reason in ((url, "Connection refused"), ("http://s2dm-jax.invalid/data.bin", "[^)]+")):
        with pytest.raises(
            UserError, match=rf"^data\.bin of the set cannot be downloaded \(no connection: {reason}\);"
        ):
            fetch_files("the set", [file._replace(url=address)], tmp_path / "downloads", tmp_path / "manual")


def test_what_was_got_by_hand_is_checked_and_used_in_place(server, tmp_path):
    own = tmp_path / "manual" / "data.bin"
    own.parent.mkdir()
    for content, fault in ((PAGE.encode(), "it is a web page"), (CONTENT[:9], "it has 9 bytes, not 1,048,576")):
        own.write_bytes(content)
        with pytest.raises(UserError, match=rf"manual/data\.bin is not the published data\.bin of the set \({fault}\)"):
            fetched(server, tmp_path)
    own.write_bytes(CONTENT)
    assert fetched(server, tmp_path) == {"data.bin": CONTENT}
    assert (tmp_path / "downloads" / "data.bin").is_symlink()
    assert server.requests == []
    # Once it has gone, it is downloaded.
    own.unlink()
    assert fetched(server, tmp_path) == {"data.bin": CONTENT}


def test_a_mirror_has_the_published_files_or_says_that_it_has_others(server, monkeypatch, capsys):
    published = [RemoteFile("data.bin", "https://published/x?id=1", 3, 64 * "0")]
    assert mirrored(published) == published
    monkeypatch.setenv("S2DM_JAX_MIRROR", f"{server.url}/")
    assert mirrored(published) == [published[0]._replace(url=f"{server.url}/data.bin")]
    assert capsys.readouterr().err == ""
    write_checksums(server.folder)
    assert mirrored(published) == [RemoteFile("data.bin", f"{server.url}/data.bin", len(CONTENT), SHA256)]
    assert (
        capsys.readouterr().err
        == f"note: {server.url} has its own version of data.bin, different from the published one\n"
    )
    monkeypatch.setenv("S2DM_JAX_MIRROR", "/some/folder")
    with pytest.raises(UserError, match="S2DM_JAX_MIRROR=/some/folder is not a URL"):
        mirrored(published)
