"""What is set right before any work: the output's encoding, JAX's settings, XLA's flags, caches without a home."""

import os
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ROOT, save_run, small_config

from s2dm_jax.common.compilation_cache import set_compilation_cache
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import cache_dir, data_cache_dir, user_path
from s2dm_jax.common.jax_environment import check_platforms, check_xla_flags, xla_flags
from s2dm_jax.common.process import set_up_process
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.data.tfds_builder import manual_folder
from s2dm_jax.devices.hardware import check_devices
from s2dm_jax.inference.sample import sample

# Each of them has changed or stopped a run.
SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEBUG_NANS": "True",
    "JAX_DISABLE_JIT": "1",
    "JAX_CHECK_TRACER_LEAKS": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
}


def run(*command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, timeout=300)


@pytest.mark.slow
def test_the_same_images_whatever_the_environment_says(tmp_path):
    config = small_config(**{"sample.output": "npz", "sample.num_images": 2})
    save_run(tmp_path / "run", config, seed=0, ema_factor=1)
    expected = sample(config, str(tmp_path / "run"))
    command = ["-m", "s2dm_jax.main", "--mode=sample", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path}"]
    done = run(*command, PYTHONIOENCODING="ascii", **SETTINGS)
    assert done.returncode == 0, done.stderr
    # A network that was never trained draws nonsense, which another line says.
    notes = [line for line in done.stderr.decode().splitlines() if not line.startswith("warning: ")]
    assert [note.split(" is ignored")[0] for note in notes] == [f"note: {k}={v}" for k, v in SETTINGS.items()]
    with np.load(expected) as one, np.load(tmp_path / expected.name) as other:
        np.testing.assert_array_equal(one["images"], other["images"])


def test_a_warning_is_one_line_without_source():
    code = (
        "from s2dm_jax.common.process import set_up_process; set_up_process(); import warnings; warnings.warn('a\\nb')"
    )
    assert run("-c", code).stderr == b"warning: a b\n"


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stdout_or_stderr_goes_nowhere(closed, tmp_path):
    code = "import sys; from s2dm_jax.common.report import report_user_errors\nwith report_user_errors():\n"
    code += f"  file = open({str(tmp_path / 'file')!r}, 'w'); print('a'); print('b', file=sys.stderr)"
    done = subprocess.run(
        ["sh", "-c", f'exec {closed}>&-; exec "$0" -c "$1"', sys.executable, code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, *((b"", b"b\n") if closed == "1" else (b"a\n", b"")))
    assert (tmp_path / "file").read_bytes() == b""


def test_settings_that_change_nothing_are_not_mentioned(monkeypatch, capsys):
    neutral = {"JAX_ENABLE_X64": "False", "JAX_NUMPY_RANK_PROMOTION": "allow", "JAX_THREEFRY_PARTITIONABLE": "1"}
    for name, value in neutral.items():
        monkeypatch.setenv(name, value)
    set_up_process()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_no_character_ends_the_work(encoding):
    code = "from s2dm_jax.common.errors import UserError\n"
    code += "from s2dm_jax.common.report import report_user_errors\n"
    code += "with report_user_errors():\n    print('τ ≤ 1', flush=True)\n    raise UserError('8 × 8 – τ')\n"
    done = run("-c", code, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (2, b"? ? 1\n")
    assert done.stderr == "error: 8 × 8 – τ\n".encode(encoding, errors="replace")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_a_lack_of_memory_is_one_sentence(error, capsys):
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise error
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch("error: not enough memory .(O|o)ut of memory.*; use a smaller batch_size, .*\n", said)
    with pytest.raises(RuntimeError, match="other"), report_user_errors():
        raise RuntimeError("other")


def test_flags_that_xla_would_abort_on_are_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_no_such_flag=1")
    with pytest.raises(UserError, match=r"^XLA_FLAGS=.* does not have: --xla_no_such_flag=1; correct"):
        check_xla_flags()
    monkeypatch.setattr("s2dm_jax.common.jax_environment._refusal", lambda _: pytest.fail("not needed"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_gpu_deterministic_ops=true")
    check_xla_flags()


def test_values_that_xla_would_abort_on_are_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("s2dm_jax.common.jax_environment._refusal", asked.append)
    fine = ["--xla_gpu_autotune_level=4", "--xla_force_host_platform_device_count=2", "--xla_cpu_enable_fast_math=1"]
    (tmp_path / "flags").write_text("\n".join(fine))
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    check_xla_flags()
    assert (asked, xla_flags()) == ([], fine)
    # Each is left to jaxlib to decide.
    for flag in ("backend_optimization_level", "backend_optimization_level=true", "cpu_enable_fast_math=7"):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_{flag}")
        check_xla_flags()
    assert len(asked) == 3
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=maybe")
    with pytest.raises(UserError, match=r"^XLA_FLAGS=--xla\S+ has a wrong value: .* maybe for flag xla_cpu"):
        check_xla_flags()
    monkeypatch.setenv("XLA_FLAGS", "xla_cpu_enable_fast_math=1")
    with pytest.raises(UserError, match="does not start with --, so it names a file of flags, which cannot be read"):
        check_xla_flags()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_NUM_CPU_DEVICES", "abc"),
        ("JAX_NUM_CPU_DEVICES", "0"),
        ("JAX_LOG_COMPILES", "maybe"),
        ("JAX_TRACER_ERROR_NUM_TRACEBACK_FRAMES", "many"),
    ],
)
def test_values_that_jax_would_end_on_are_named(name, value):
    code = "from s2dm_jax.common.jax_environment import check_jax_environment\n"
    code += "from s2dm_jax.common.report import report_user_errors\n"
    code += "with report_user_errors():\n    check_jax_environment()"
    done = run("-c", code, **{name: value})
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {name}={value} is (not|no) .*; correct or unset it\n", done.stderr.decode())


def test_a_platform_is_tried_before_a_long_preparation(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("s2dm_jax.common.jax_environment._refusal", lambda _: "AssertionError")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=cuda names .*its plugin is not installed"):
        check_platforms()
    for value in ("cpu", "", "tpu,cpu"):
        monkeypatch.setenv("JAX_PLATFORMS", value)
        check_platforms()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "its plugin is not installed"),
        (RuntimeError("no libtpu (set JAX_PLATFORMS='' to …)"), "no libtpu"),
    ],
)
def test_a_platform_that_is_not_here_is_named(monkeypatch, error, reason):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=rf"^JAX_PLATFORMS=cuda names a platform that cannot be used here \({reason}\)"):
        check_devices()
    # No mistake of the user's.
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("JAX_DEFAULT_DEVICE", "")
    with pytest.raises(type(error)):
        check_devices()


def test_without_a_home_there_is_no_cache_of_programs_and_data_needs_a_folder(monkeypatch, capsys):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("JAX_COMPILATION_CACHE_DIR", "S2DM_JAX_CACHE", "S2DM_JAX_DATA", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    set_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert "~/.cache/s2dm_jax (HOME is not set); JAX_COMPILATION_CACHE_DIR=DIR" in capsys.readouterr().err
    for function, name in ((cache_dir, "S2DM_JAX_CACHE"), (data_cache_dir, "S2DM_JAX_DATA"), (manual_folder, "TFDS_")):
        with pytest.raises(UserError, match=f"HOME is not set; set HOME, or {name}"):
            function()


def test_a_cache_of_programs_that_is_read_only_is_only_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/programs")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    set_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "programs")
    assert capsys.readouterr().err == ""
    Path(tmp_path / "programs").symlink_to("/proc/self/task")
    set_compilation_cache()
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "1e9"
    assert "are not cached in" in capsys.readouterr().err


def test_damaged_programs_are_removed_and_what_cannot_be_cached_is_one_note(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warnings, "showwarning", lambda *_: None)
    set_compilation_cache()
    whole = zlib.compress(b"program")
    for name, content in {"jit_f-1": whole, "jit_f-2": whole[:-1], "jit_f-3": b"", "jit_g-1": b""}.items():
        (tmp_path / name).write_bytes(content)
    message = "Error {} persistent compilation cache entry for 'jit_f': OSError: {}"
    warnings.showwarning(message.format("reading", "cut"), UserWarning, "compiler.py", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit_f-1", "jit_g-1"]
    for _ in range(2):
        warnings.showwarning(message.format("writing", "No space"), UserWarning, "compiler.py", 1)
    assert capsys.readouterr().err == (
        f"note: 2 compiled programs in {tmp_path} are truncated or corrupt and will be compiled again\n"
        f"note: writing compiled programs in {tmp_path} failed (OSError: No space)\n"
    )


def test_a_path_that_is_not_utf_8_is_refused():
    with pytest.raises(UserError, match=r"is not UTF-8, or the locale is not: .* set PYTHONUTF8=1"):
        user_path(os.fsdecode(b"runs/\xfc"), "--workdir")
    assert user_path("runs/ü", "--workdir") == Path("runs/ü")
