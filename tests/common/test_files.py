"""Files are complete or absent whatever fails, and text is UTF-8 whatever the locale."""

import ast
import os
from pathlib import Path

import pytest
from helpers import ROOT

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import (
    atomic_outputs,
    atomic_path,
    cache_dir,
    data_cache_dir,
    read_json,
    user_path,
    write_atomic,
)


def fail(*_):
    raise OSError(28, "No space left")


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a.npz"
    path.write_text("old", encoding="utf-8")
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("point", ["block", "fsync", "replace"])
def test_a_failure_at_any_point_leaves_the_old_file_alone(tmp_path, monkeypatch, point):
    path = tmp_path / "config.json"
    write_atomic(path, "old")
    if point != "block":
        monkeypatch.setattr(os, point, fail)
    with pytest.raises(OSError, match="No space left"), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half", encoding="utf-8")
        if point == "block":
            fail()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_are_on_the_disk_before_the_name_points_to_them(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_atomic(tmp_path / "a", "x")
    with atomic_path(tmp_path / "b", fsync=False) as temporary:
        temporary.touch()
    assert calls == ["fsync", "replace", "replace"]


def test_what_may_not_be_read_is_made_again_where_it_can_be(tmp_path, monkeypatch, capsys):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert read_json(tmp_path / "point.json", ("values",), "it is measured again") is None
    assert "point.json cannot be read (Permission denied); it is measured again" in capsys.readouterr().err


def test_outputs_appear_together_the_first_last(tmp_path, monkeypatch):
    folder, card = tmp_path / "new" / "folder", tmp_path / "new" / "folder.md"
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (names.append(new), replace(old, new)))
    with atomic_outputs(folder, card) as (temporary_folder, temporary_card):
        temporary_folder.mkdir()
        (temporary_folder / "weights").write_bytes(b"w")
        temporary_card.write_text("card", encoding="utf-8")
    assert names == [card, folder]
    assert (folder / "weights").read_bytes() == b"w"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["folder", "folder.md"]


def test_outputs_that_fail_leave_nothing_and_existing_ones_are_refused(tmp_path):
    with (  # noqa: PT012
        pytest.raises(UserError, match=r"a cannot be written \(No space left\); give another path"),
        atomic_outputs(tmp_path / "a", tmp_path / "b") as (folder, file),
    ):
        folder.mkdir()
        (folder / "half").touch()
        file.touch()
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / "b").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="b already exists"), atomic_outputs(tmp_path / "a", tmp_path / "b"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("folder", ["s2dm_jax", "scripts"])
def test_text_files_are_read_and_written_as_utf8(folder):
    without = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_text = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text")
            if is_text and "encoding" not in {keyword.arg for keyword in node.keywords}:
                without.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not without


def test_a_users_path_is_one_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert str(user_path("~/run", "--workdir")) == str(tmp_path / "home" / "run")
    assert str(user_path("a/../b", "--workdir")) == str(tmp_path / "b")
    # Others are shown as they were written.
    for written in ("runs/a", "/runs/a", "run_10:30:00", "a~b", "."):
        assert str(user_path(written, "--workdir")) == written


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://b", "file:///tmp/x", "https://x.org/a.zip", "gs:/bucket"])
def test_a_url_is_no_path(url):
    with pytest.raises(UserError, match=rf"--workdir={url} is a URL"):
        user_path(url, "--workdir")


@pytest.mark.parametrize(("function", "name"), [(cache_dir, "S2DM_JAX_CACHE"), (data_cache_dir, "S2DM_JAX_DATA")])
def test_a_url_is_no_cache(monkeypatch, function, name):
    monkeypatch.setenv(name, "gs://bucket/cache")
    with pytest.raises(UserError, match=f"{name}=gs:/bucket/cache is a URL"):
        function()


def test_a_name_that_no_file_can_have_is_no_path():
    with pytest.raises(UserError, match=r"--workdir=runs/a{55}… is too long for a path"):
        user_path(f"runs/{'a' * 256}", "--workdir")


def test_the_home_of_nobody_is_no_path():
    with pytest.raises(UserError, match="unknown user"):
        user_path("~no-such-user/run", "--workdir")
