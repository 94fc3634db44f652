"""Stage 2 of the GPU command: the arithmetic of its figures, and workers that fail."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from gpu_stages import fast, rates, torch_side
from gpu_stages.figures import figures, in_words, measured_matmul_rate
from gpu_stages.parts import Settings
from gpu_stages.programs import TrainProgram, compile_train, interleave, published_config
from workers import Worker, WorkerFailed, torch_settings

from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.training import step

ROOT = Path(__file__).resolve().parents[2]
READY = """
import sys
print("a line of a library")
print('{"parameters": 7, "first_step": 2.5, "version": "2"}', flush=True)
"""
STEPS = 'for line in sys.stdin:\n    print(\'{"seconds": %s, "peak_bytes": 9}\' % (int(line) / 10), flush=True)\n'


def program(run=lambda: 1.0, flops=2 * 10**12):
    return TrainProgram(run, 50, 128, flops, 7, 1.5, 30.0, 4 * 10**9, None, None, "bfloat16")


@pytest.fixture
def settings(tmp_path):
    return Settings("cpu", True, tmp_path, tmp_path, tmp_path, None, time.time() + 60)


@pytest.fixture
def worker(tmp_path):
    """Function that starts a program of this text as a worker."""
    started = []

    def start(text):
        path = tmp_path / f"worker{len(started)}.py"
        path.write_text(text)
        with open(path.with_suffix(".txt"), "w") as errors:
            started.append(Worker(sys.executable, str(path), {"device": "gpu"}, errors=errors))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def test_figures_are_those_of_the_median_round():
    found = figures(program(), [0.5, 1.0, 2.0], 400e12, compile_s=3.0)
    assert found["ms"] == {"median": 20.0, "low": 10.0, "high": 40.0}
    assert found["images_per_s"] == 6400
    assert found["tflops"] == 100
    assert found["share_of_matmul_rate"] == 0.25
    assert (found["steps_per_round"], found["rounds"], found["batch"]) == (50, 3, 128)
    assert (found["trace_s"], found["compile_s"]) == (1.5, 3.0)
    assert in_words(found) == "20 ms (10 to 40), 6,400 images/s, 100 TFLOP/s, 25 % of the matrix rate, 4.0 GB"
    without = figures(program(), [1.0], None, memory_bytes=None)
    assert in_words(without) == "20 ms (20 to 20), 6,400 images/s, 100 TFLOP/s"


def test_rates_count_what_is_computed_and_moved(monkeypatch):
    assert rates.matmul_rate(64, 1) > 0
    assert rates.copy_rate(2**12, 2) > 0
    monkeypatch.setattr(rates, "_shortest", lambda run: 2.0)
    assert rates.matmul_rate(16, 3) == 2 * 16**3 * 3 / 2
    # Each byte is read and written.
    assert rates.copy_rate(2**12, 5) == 2 * 2**12 * 5 / 2


def test_the_rate_is_that_of_this_run(settings):
    assert measured_matmul_rate(settings) is None
    record = '{"stage": "fast", "parts": {"rates": {"result": {"matmul_flops_per_s": 5.0}}}}'
    (settings.out / "fast.json").write_text(record)
    assert measured_matmul_rate(settings) == 5.0


def test_two_timesteps_per_image_are_twice_the_flops(monkeypatch):
    # What is counted is the network's, not the program's, which takes seconds to compile.
    monkeypatch.setattr(
        step, "make_train_chunk", lambda *_: lambda state, images, rows, key: (state, {"loss": rows.sum(1)})
    )
    plain, skip, double = (
        compile_train(published_config(name, tiny=True), 2)
        for name in ("configs/cifar10.py:ddpm", "configs/cifar10.py:s2_10", "configs/cifar10.py:sa_2")
    )
    assert double.flops == 2 * plain.flops == 2 * skip.flops > 0
    assert plain.run() > 0
    assert (plain.steps, plain.images, plain.dtype) == (2, 4, "float32")


def test_objectives_are_relative_to_plain_training(settings, monkeypatch):
    seconds = {"ddpm": 1.0, "s2_10": 1.01, "sa_2": 2.02}
    monkeypatch.setattr(fast, "_program", lambda tiny, name: program(lambda: seconds[name.partition(":")[2]]))
    found = fast.PARTS["objectives"].run(settings)
    assert found["programs"]["L_skip"]["ratio_to_plain"]["median"] == 1.01
    assert found["programs"]["K = 2"]["ratio_to_plain"] == {"median": 2.02, "low": 2.02, "high": 2.02}
    assert "; K = 2 2.020× (2.020 to 2.020), 4.0 GB" in found["summary"]


def test_a_step_that_computes_something_else_is_wrong(settings, monkeypatch):
    run = lambda: 1.0  # noqa: E731
    monkeypatch.setattr(fast.torch_side, "torch_workers", lambda *_: contextlib.nullcontext({}))
    monkeypatch.setattr(fast, "_cold_start", lambda *_: (None, {}))
    monkeypatch.setattr(fast, "_program", lambda tiny, name: program(run))
    settings = settings._replace(tiny=False)
    run.losses = [1.01 * loss for loss in fast._CIFAR10_LOSSES]
    assert fast.PARTS["cifar10"].run(settings)["passed"]
    run.losses[1] = float("nan")
    found = fast.PARTS["cifar10"].run(settings)
    assert not found["passed"]
    assert "; the loss of step 1 is nan, not " in found["summary"]


def test_a_program_without_its_memory_is_timed_all_the_same(settings, monkeypatch):
    monkeypatch.setattr(
        step, "make_train_chunk", lambda *_: lambda state, images, rows, key: (state, {"loss": rows.sum(1)})
    )
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    compiled = compile_train(published_config("configs/cifar10.py:ddpm", tiny=True), 2)
    monkeypatch.setattr(fast, "_program", lambda tiny, name: compiled)
    found = fast.PARTS["objectives"].run(settings)
    assert found["programs"]["K = 2"]["memory_bytes"] is None
    assert "GB" not in found["summary"]


def test_what_there_is_no_time_to_compile_is_a_note(settings, monkeypatch):
    def compiled(tiny, name, remat=False):
        time.sleep(0.2)
        return program(lambda: 1.0 + remat)

    monkeypatch.setattr(fast, "_program", compiled)
    monkeypatch.setattr(fast, "_ROUNDS_SECONDS", 10.0)
    cases = {"plain": ("a",), "remat": ("a", True)}
    found = fast._compare(settings, "step", cases, time.time() + 11)
    assert found["programs"]["remat"]["ratio_to_plain"]["median"] == 2.0
    found = fast._compare(settings, "step", cases, time.time() + 10.4)
    assert list(found["programs"]) == ["plain"]
    assert found["summary"].endswith("4.0 GB; remat: there was no time to compile it")


def test_rounds_end_at_the_deadline_but_not_before_the_third():
    assert len(interleave({"a": lambda: 1.0}, 5)["a"]) == 5
    assert len(interleave({"a": lambda: 1.0}, 5, deadline=0.0)["a"]) == 3


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("import torch_that_is_not_there", "ModuleNotFoundError: No module named 'torch_that_is_not_there'"),
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "PyTorch is not installed"),
        ("import sys; sys.exit(3)", "it ended with status 3"),
        ("import time; time.sleep(20)", "no answer within 1 s"),
        (READY.replace("7", "8") + STEPS, "it has 8 parameters, s2dm_jax 7"),
    ],
)
def test_a_worker_that_does_not_get_ready_is_a_note(worker, text, note):
    good = READY + STEPS
    # Each gets ready while the others do, so that a hanging one does not cost the others their time.
    workers = {"good": worker(good), "bad": worker(text)}
    workers["good"].ready(30)
    if "sleep" not in text:
        while workers["bad"].is_preparing:
            time.sleep(0.01)
    began = time.monotonic()
    assert torch_side.wait_until_ready(workers, 7, time.time()) == {"bad": note}
    assert list(workers) == ["good"]
    # A process that hangs is not waited for.
    assert time.monotonic() - began < 9


def test_a_worker_that_fails_in_a_round_leaves_the_others(worker, monkeypatch):
    monkeypatch.setattr(torch_side, "_MOST_SECONDS", 1.0)
    workers = {
        "good": worker(READY + STEPS),
        "dies": worker(READY + "sys.stdin.readline()\nraise MemoryError('out of memory')\n"),
        "hangs": worker(READY + "import time\ntime.sleep(60)\n"),
    }
    assert torch_side.wait_until_ready(workers, 7, time.time() + 30) == {}
    seconds, notes = torch_side.interleave_with_torch(lambda: 2.0, workers, 5, 2, time.time() + 60)
    assert seconds == {"s2dm_jax": [2.0, 2.0], "good": [0.5, 0.5]}
    assert notes == {"dies": "MemoryError: out of memory", "hangs": "no answer within 1 s"}
    assert list(workers) == ["good"]
    assert workers["good"].peak_bytes == 9


def test_workers_that_hang_leave_time_for_our_rounds(worker, monkeypatch):
    monkeypatch.setattr(torch_side, "_LEAST_SECONDS", 0.2)
    workers = {name: worker("import time\ntime.sleep(60)\n") for name in ("first", "second")}
    began = time.time()
    seconds, notes = torch_side.interleave_with_torch(lambda: 2.0, workers, 5, 2, began + 0.5)
    assert time.time() - began < 5
    assert (seconds, list(notes)) == ({"s2dm_jax": [2.0, 2.0]}, ["first", "second"])


def test_the_cold_start_has_an_empty_cache_and_leaves_its_entries(settings, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "old").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))

    class Compiling:
        peak_bytes = 3

        def __init__(self, python, script, job, environment, errors):
            self.folder = Path(environment["JAX_COMPILATION_CACHE_DIR"])
            assert self.folder == cache
            assert not self.folder.exists() or not list(self.folder.iterdir())

        def ready(self, timeout):
            assert 135 < timeout <= 140
            self.folder.mkdir(exist_ok=True)
            (self.folder / "new").touch()
            return {"compile": 30.0}

        def run(self, steps, timeout):
            if fails:
                raise WorkerFailed(self, "out of memory")

        def stop(self):
            pass

    monkeypatch.setattr(fast, "Worker", Compiling)
    fails, name = False, "configs/cifar10.py:ddpm"
    assert fast._cold_start(settings, name, time.time() + 200) == (
        {"compile": 30.0, "peak_bytes": 3},
        {},
    )
    assert sorted(path.name for path in cache.iterdir()) == ["new", "old"]
    fails = True
    assert fast._cold_start(settings, name, time.time() + 200) == (
        None,
        {"cold start": "out of memory"},
    )
    assert sorted(path.name for path in cache.iterdir()) == ["new", "old"]
    assert fast._cold_start(settings, "", time.time() + 60) == (None, {"cold start": "there was no time for it"})


def test_stages_are_read_without_jax():
    code = "import sys; from gpu_stages import fast; assert fast.PARTS and 'jax' not in sys.modules"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts' / 'benchmarks'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_both_sides_train_the_same_thing():
    found = torch_settings(
        published_config("configs/cifar10.py:s2_10+sa_2", tiny=False), "gpu", channels_last=True, compile=True
    )
    assert found["dtype"] == "bfloat16"
    assert (found["resolution"], found["channels"], found["ch_mult"], found["batch"]) == (32, 3, (1, 2, 2, 2), 128)
    assert (found["skip"], found["tau"], found["K"], found["lam"]) == (10, 0.99, 2, 1.0)
    torch = pytest.importorskip("torch")
    import torch_worker

    schedule = linear_schedule()
    ours = objectives.skip_ratio(schedule, objectives.paper(skip=10))
    theirs = torch_worker.skip_ratio(torch.tensor(schedule.alpha_bar), 10)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-9)
    assert not torch_worker.skip_ratio(torch.tensor(schedule.alpha_bar), 0).any()
