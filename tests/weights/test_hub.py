"""Diffusers folders from a server on this machine that stands for the Hugging Face Hub."""

import contextlib
import http.server
import json
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ROOT, TINY, load_file

from s2dm_jax.common.errors import UserError
from s2dm_jax.diffusion.betas import ScheduleSpec
from s2dm_jax.weights import hub
from s2dm_jax.weights.read import read_weights

COMMIT = "c0ffee" + "0" * 34


def test_only_what_a_network_needs_is_downloaded():
    weights = "diffusion_pytorch_model"
    google = ["README.md", "config.json", f"{weights}.bin", f"{weights}.safetensors", "scheduler_config.json"]
    assert hub._needed_files(google) == ["config.json", "scheduler_config.json", f"{weights}.safetensors"]
    pipeline = ["unet/config.json", f"unet/{weights}.fp16.safetensors", f"unet/{weights}.bin", "vae/config.json"]
    assert hub._needed_files(pipeline) == ["unet/config.json", f"unet/{weights}.bin"]
    assert hub._needed_files(["config.json", "model.safetensors", f"{weights}-00001-of-00002.safetensors"]) == []


@pytest.mark.parametrize("name", ["hf://ddpm", "hf://a/b/c", "hf://a/b@", "hf:/a/b", "hf://a b/c"])
def test_other_names_are_one_sentence(name, tmp_path):
    convert = load_file(ROOT / "scripts" / "convert.py")
    with pytest.raises(UserError, match=r"give hf://OWNER/NAME or hf|is a URL \(hf:\)"):
        convert.parse([name, str(tmp_path / "out")])


def test_without_the_client_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hf://a/b needs huggingface_hub; .* pip install 's2dm_jax\[hub\]'"):
        hub.fetch_from_hub("hf://a/b")


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        _, *parts = self.path.partition("?")[0].split("/")
        files = {p.relative_to(self.server.folder).as_posix(): p for p in self.server.folder.rglob("*") if p.is_file()}
        errors = {"none": "RepoNotFound", "gated": "GatedRepo"}
        if parts[:2] == ["api", "models"] and parts[3] in errors:
            return self.send(401 if parts[3] == "none" else 403, b"", {"X-Error-Code": errors[parts[3]]})
        if parts[:2] == ["api", "models"] and parts[4:] in ([], ["revision", "main"], ["revision", COMMIT]):
            about = {"id": "us/ddpm", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        if parts[:2] == ["api", "models"] and parts[4:5] == ["revision"]:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        name = "/".join(parts[4:])
        if parts[:4] == ["us", "ddpm", "resolve", COMMIT] and name in files:
            content = files[name].read_bytes()
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            headers = {"ETag": f'"{len(content)}-{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
            return self.send(206 if start else 200, content[start:], headers)
        return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = answer

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            half = self.server.cut and len(content) > 10_000
            self.wfile.write(content[: len(content) // 2] if half else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub with the model us/ddpm of an empty folder."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "model").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.folder, running.cut = tmp_path / "model", False
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(running.shutdown)
            yield running


def write_model(folder, tmp_path):
    """A diffusers folder of a tiny network; returns its weights."""
    from s2dm_jax.weights.read import Weights
    from s2dm_jax.weights.write import infer_config, write_weights

    params = TINY.init(3)
    weights = Weights(TINY, params, params, None, ScheduleSpec("linear", 1000), 0, "", "")
    source = {"file": "a", "format": "", "sha256": "", "steps_there": 0, "first_step": 0}
    folder.rmdir()
    write_weights(str(folder), "diffusers", weights, infer_config(weights, data="digits"), source=source)
    return params


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_model_of_the_hub_is_converted_as_a_local_folder(server, tmp_path, capsys, revision):
    params = write_model(server.folder, tmp_path)
    convert = load_file(ROOT / "scripts" / "convert.py")
    convert.run([f"hf://us/ddpm{revision}", str(tmp_path / "out.safetensors")])
    assert f"read     hf://us/ddpm@{COMMIT}: a diffusers folder; its checksums agree" in capsys.readouterr().out
    found = read_weights(str(tmp_path / "out.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, found.ema_params, params)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("us/none", "hf://us/none: the Hub has no model of this name, or it is private; check the name, or log in"),
        ("us/gated", "hf://us/gated is gated: accept its conditions on its page, and log in"),
        ("us/ddpm@v9", "hf://us/ddpm@v9: the model has no such revision; give a branch, tag or commit after the @"),
        ("us/ddpm", "hf://us/ddpm holds no diffusers network: a diffusion_pytorch_model.safetensors"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(server, name, sentence):
    with pytest.raises(UserError) as error:
        hub.fetch_from_hub(f"hf://{name}")
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_a_cut_download_is_one_sentence_and_the_next_is_whole(server, tmp_path):
    write_model(server.folder, tmp_path)
    server.cut = True
    with pytest.raises(UserError, match=r"^hf://us/ddpm cannot be fetched \([^\n]+\); check the network and run the s"):
        hub.fetch_from_hub("hf://us/ddpm")
    server.cut = False
    folder, origin = hub.fetch_from_hub("hf://us/ddpm")
    assert origin == f"hf://us/ddpm@{COMMIT}"
    (weights,) = Path(folder).rglob("*.safetensors")
    assert weights.read_bytes() == next(server.folder.rglob("*.safetensors")).read_bytes()
