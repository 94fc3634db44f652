"""Weights & Biases: what is logged through a stub of the package, its failures, and the package itself offline."""

import contextlib
import importlib.util
import json
import signal
import sys
import types

import numpy as np
import pytest
from helpers import ToyNetwork, small_config

from s2dm_jax import main
from s2dm_jax.common.errors import UserError
from s2dm_jax.training import loop, telemetry

IMAGE = np.zeros((8, 16, 1), np.uint8)
ROWS = [
    {"name": "real (floor)", "nfe": None, "frechet_distance": 2.5},
    {"name": "ddim", "nfe": 10, "frechet_distance": 7.5},
]


class Stub(types.ModuleType):
    """Records the calls of wandb and of its only run."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.fails, self.logged_in, self.url = [], (), True, "https://wandb.ai/me/p/runs/1"
        self.Settings, self.Image = dict, lambda pixels: ("image", pixels.shape)
        self.summary = types.SimpleNamespace(update=lambda values: self._called("summary", values))
        for name in ("setup", "finish", "teardown"):
            setattr(self, name, lambda name=name, **options: self._called(name, options))

    def _called(self, name, value):
        self.calls.append((name, value))
        if name in self.fails:
            raise RuntimeError(f"no {name}\nand more")

    def login(self, prompt, verify):
        return self.logged_in

    def init(self, **options):
        sys.excepthook = sys.exit = None
        self._called("init", options)
        return self

    def log(self, values, step):
        self._called("log", (step, values))

    def of(self, name):
        return [value for called, value in self.calls if called == name]


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", stub := Stub())
    return stub


def test_a_resumed_run_continues_its_run_of_wandb_with_every_line_image_and_result(tmp_path, stub, monkeypatch, capsys):
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"rows": ROWS})
    monkeypatch.setattr(loop, "show_results", lambda *_: None)
    hooks, workdir = (sys.excepthook, sys.exit), tmp_path / "run"
    changes = {"train.log_every": 10, "train.sample_every": 20, "train.wandb": "online", "train.wandb_project": "p"}
    loop.train(small_config(**changes | {"train.steps": 20}), workdir, network=ToyNetwork())
    resumed = telemetry.MetricWriter(workdir, 20, small_config(**changes | {"train.steps": 30}))
    resumed.scalars(30, {"loss": 1.0})
    resumed.results({"rows": ROWS[:1], "bits_per_dim": {"variances": {"small": {"bits_per_dim": 3.5}}}})
    resumed.close()
    first, second = stub.of("init")
    assert first["id"] == second["id"] == (workdir / "wandb_run_id").read_text().strip()
    for options, steps in ((first, 20), (second, 30)):
        assert (options["resume"], options["mode"], options["project"]) == ("allow", "online", "p")
        assert (options["name"], options["dir"]) == ("run", str(workdir))
        assert options["config"]["train"]["steps"] == steps
        assert options["settings"].items() >= {"silent": True, "console": "off"}.items()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = stub.of("log")
    assert [{"step": step, **values} for step, values in logged if "samples" not in values] == lines
    assert [step for step, _ in logged] == [10, 20, 20, 30]
    assert [values["samples"][0] for _, values in logged if "samples" in values] == ["image"]
    floor, sampler = {"eval/real (floor)/frechet_distance": 2.5}, {"eval/ddim/nfe_10/frechet_distance": 7.5}
    assert stub.of("summary") == [floor | sampler, floor | {"eval/bits_per_dim/small": 3.5}]
    assert stub.of("finish") == [{"exit_code": 0}] * 2
    assert stub.calls[-1][0] == "finish"
    assert (sys.excepthook, sys.exit) == hooks
    assert capsys.readouterr().out.count(f"wandb    {stub.url}\n") == 2


@pytest.mark.parametrize("call", ["log", "finish"])
def test_a_failing_service_is_reported_once_and_costs_no_metric(tmp_path, stub, capsys, call):
    stub.fails = (call, "teardown")
    writer = telemetry.MetricWriter(tmp_path, 0, small_config(**{"train.wandb": "offline"}))
    for step in (1, 2):
        writer.scalars(step, {"loss": 1.0})
    writer.image(2, "samples", IMAGE)
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"Weights & Biases accepts no more data from this run (no {call}); training" in printed
    assert len(stub.of("log")) == (1 if call == "log" else 3)
    assert len(stub.of("teardown")) == 1


def test_a_run_that_ends_in_an_error_is_a_failed_one(tmp_path, stub):
    writer = telemetry.MetricWriter(tmp_path, 0, small_config(**{"train.wandb": "offline"}))
    # In the order of a training: the error passes through the stack that closes the writer.
    with contextlib.suppress(UserError), contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        raise UserError("the loss is not finite")
    assert stub.of("finish") == [{"exit_code": 1}]


def test_nothing_is_sent_unless_requested_and_by_the_main_process_alone(tmp_path, stub, monkeypatch):
    telemetry.MetricWriter(tmp_path, 0, small_config()).close()
    monkeypatch.setattr(telemetry, "is_main_process", lambda: False)
    other = telemetry.MetricWriter(tmp_path, 0, small_config(**{"train.wandb": "online"}))
    other.scalars(1, {"loss": 1.0})
    other.results({"rows": ROWS})
    other.close()
    assert stub.calls == []
    assert not (tmp_path / "wandb_run_id").exists()


def test_what_is_missing_is_reported_before_the_workdir_is_made(tmp_path, stub, monkeypatch):
    command = ["main", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", "--config.train.wandb=online"]
    stub.logged_in = False
    with pytest.raises(
        UserError, match=r"^config\.train\.wandb='online' needs a login; run wandb login, set WANDB_API"
    ):
        main.run(command)
    # The second: a folder wandb/ in the current one.
    for module in (None, types.ModuleType("wandb")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(UserError, match=r"needs wandb; install it with pip install 's2dm_jax\[wandb\]'$"):
            main.run(command)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_wandb_refuses_is_one_sentence(tmp_path, stub):
    stub.fails = ("init",)
    with pytest.raises(UserError, match=r"='online' cannot start run \w+ of .*'s2dm_jax' \(no init\); fix that, or"):
        telemetry.MetricWriter(tmp_path, 0, small_config(**{"train.wandb": "online"}))


@pytest.mark.skipif(not getattr(importlib.util.find_spec("wandb"), "origin", None), reason="wandb is not installed")
def test_wandb_itself_offline_continues_a_run_prints_nothing_and_leaves_signals_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    workdir = tmp_path / "run"
    workdir.mkdir()
    state = [*map(signal.getsignal, signal.valid_signals()), sys.excepthook, sys.exit]
    for steps in ((10, 20), (20, 30)):
        writer = telemetry.MetricWriter(workdir, steps[0], small_config(**{"train.wandb": "offline"}))
        for step in steps:
            writer.scalars(step, {"a_metric": 1.0})
        writer.image(step, "samples", IMAGE)
        writer.results({"rows": ROWS})
        writer.close()
    run_id = (workdir / "wandb_run_id").read_text().strip()
    files = sorted((workdir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2
    for file in files:
        assert all(name in file.read_bytes() for name in (b"a_metric", b"eval/ddim/nfe_10", b"wandb_project"))
        assert len(list(file.parent.glob("files/media/images/samples_*.png"))) == 1
    assert [*map(signal.getsignal, signal.valid_signals()), sys.excepthook, sys.exit] == state
    assert capfd.readouterr() == ("", "")
