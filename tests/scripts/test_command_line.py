"""What the commands share: help with examples, errors in one sentence, what must be installed, configs."""

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import load_file, save_run

from s2dm_jax.common.cli import run_command
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.config.defaults import FIELDS, default_config
from s2dm_jax.config.io import config_path

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = (
    "benchmarks/benchmark",
    "benchmarks/gpu",
    "benchmarks/gpu_table",
    "compare_covariance",
    "compare_objectives",
    "compare_spacings",
    "convert",
    "estimation_gap",
    "evidence",
    "dev/stress_resume",
    "report",
    "reproduce",
    "sweep",
    "dev/run_docs",
    "dev/store_evidence",
    "dev/store_notebooks",
    "dev/xla_cpu_devices",
    "sweep_ema",
)


class _Parsed(Exception):
    """Carries a command's parser out of it."""


def parser_of(name, monkeypatch):
    def stop(parser, *_):
        raise _Parsed(parser)

    monkeypatch.syspath_prepend(str((SCRIPTS / name).parent))
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py"])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(_Parsed) as parsed:
        load_file(SCRIPTS / f"{name}.py").main()
    return parsed.value.args[0]


def undescribed(parser):
    """The arguments of a parser, and of its sub-commands, whose help is empty."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            described = {choice.dest for choice in action._choices_actions if choice.help}
            yield from action.choices.keys() - described
            for sub in action.choices.values():
                yield from undescribed(sub)
        elif not (action.help or "").strip() or action.help == argparse.SUPPRESS:
            yield action.dest


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_each_argument_and_gives_an_example(name, monkeypatch):
    parser = parser_of(name, monkeypatch)
    assert list(undescribed(parser)) == []
    assert f"  python scripts/{name}.py " in parser.format_help()


def test_an_argument_without_help_is_found():
    parser = argparse.ArgumentParser()
    parser.add_argument("--described", help="a number")
    parser.add_argument("--silent")
    sub = parser.add_subparsers().add_parser("command")
    sub.add_argument("--hidden", help=argparse.SUPPRESS)
    assert list(undescribed(parser)) == ["silent", "command", "hidden"]


@pytest.mark.parametrize("module", ["s2dm_jax.main", "s2dm_jax"])
def test_help_of_the_main_command_lists_flags_and_fields(module):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert not re.search(r"\| +(jax|orbax|flax)\b", done.stderr)
    assert "python -m s2dm_jax.main --mode=sample --workdir=runs/digits --config.sample.nfe=20" in done.stdout
    assert "\n  --workdir: Folder of the run" in done.stdout
    text = " ".join(done.stdout.split())
    assert "--config.train.lr: Adam's learning rate (default: 0.0002; from 1e-12 to 10.0)" in text
    assert "--config.train.grad_clip: largest global norm of the gradient; 0: no clipping (default: 1.0; at" in text
    assert "(default: 'stop'; one of stop, skip) --config.train.grad_accum_steps" in text
    for name, field in FIELDS.items():
        assert f"--config.{name}: {field.doc} (default: " in text


def test_every_command_is_among_these():
    """Every file that is run as a program, but the workers that programs start."""
    programs = {
        path.relative_to(SCRIPTS).with_suffix("").as_posix()
        for path in SCRIPTS.rglob("*.py")
        if any(
            isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            for node in ast.parse(path.read_text()).body
        )
    }
    workers = {"benchmarks/train", "benchmarks/torch_worker", "benchmarks/gpu_stages/worker"}
    assert programs - workers == set(COMMANDS)


@pytest.mark.parametrize("name", ["compare_covariance", "compare_objectives", "convert", "estimation_gap"])
def test_a_flag_that_is_not_known_is_one_sentence(name, capsys):
    with pytest.raises(SystemExit) as stop:
        load_file(SCRIPTS / f"{name}.py").main(["runs/a", *["runs/b"] * (name == "convert"), "--wat=1"])
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: unrecognized arguments: --wat=1 (see --help)\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=configs/nothing.py"], "--config=configs/nothing.py: no such file"),
        (["--batch=0"], "config.train.batch_size=0 is out of range"),
        (["--batch=6", "--devices=4"], "--devices=4 does not divide the batch size 6; give --batch"),
        (["--config=configs/cifar10.py:sn"], "--config=configs/cifar10.py:sn trains a variance head"),
    ],
)
def test_compiling_for_another_device_tells_mistakes_first(arguments, sentence, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["scripts/benchmarks/benchmark.py", "compiled", *arguments])
    with pytest.raises(SystemExit) as stop:
        load_file(SCRIPTS / "benchmarks" / "benchmark.py").main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data", "--archive=none.tar"], "--archive=none.tar does not exist"),
        (["losses", "--only=skip 10,K = 5"], "--only has 'K = 5', which is not one of plain, skip 10,"),
    ],
)
def test_benchmarks_report_user_errors_first(arguments, sentence, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["scripts/benchmarks/benchmark.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        load_file(SCRIPTS / "benchmarks" / "benchmark.py").main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


@pytest.fixture
def workdir(tmp_path):
    config = default_config()
    config.diffusion.update(T=20, beta_start=1e-4, beta_end=0.02)
    config.model.update(ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    config.sample.nfe, config.eval.nfe = 3, (10,)
    save_run(tmp_path / "run", config, seed=0, ema_factor=1.0)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("report", ["run", "--out=page.html"], "page"),
        ("estimation_gap", ["run", "--out=gap.png"], "figure"),
        ("reproduce", ["s2-figure3", "--scale=digits", "--out=papers"], "figure"),
    ],
)
def test_without_matplotlib_nothing_is_begun(workdir, monkeypatch, capsys, name, arguments, wanted):
    monkeypatch.chdir(workdir.parent)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("subprocess.run", None)
    with pytest.raises(SystemExit) as stop:
        load_file(SCRIPTS / f"{name}.py").main(arguments)
    assert stop.value.code == 2
    sentence = f"error: the {wanted} needs matplotlib; install it with pip install 's2dm_jax[plot]'\n"
    assert capsys.readouterr().err == sentence
    assert [path.name for path in workdir.parent.iterdir()] == ["run"]


def test_only_a_mistake_of_the_users_is_told_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise UserError("--x=1 is out of range")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: --x=1 is out of range\n")
    with pytest.raises(ValueError, match="a defect"), report_user_errors():
        raise ValueError("a defect")


def test_the_output_of_a_command_goes_to_stderr(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    program = "import sys; print('step 1'); print('warned', file=sys.stderr); sys.exit(3)"
    assert run_command([sys.executable, "-c", program]) == 3
    said = capfd.readouterr()
    assert said.out == ""
    assert sorted(said.err.splitlines()) == ["step 1", "warned"]


def test_a_config_is_a_file_or_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, colon, objective = config_path("./configs/digits.py:sa").partition(":")
    assert (colon, objective) == (":", "sa")
    assert load_file(Path(found)).get_config("sa").loss.K == 2
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").touch()
    assert config_path("configs/digits.py:sa") == "configs/digits.py:sa"
    with pytest.raises(UserError, match=r"the configs that come with s2dm_jax are configs/afhqv2_64\.py, configs/"):
        config_path("configs/digit.py")
    with pytest.raises(UserError, match="no such file"):
        config_path("other/digits.py")


def test_the_command_line_takes_a_packaged_config_in_both_spellings(tmp_path, monkeypatch, command_line, capsys):
    monkeypatch.chdir(tmp_path)
    for spelling in (["--config=configs/digits.py:sq"], ["--config", "configs/digits.py:sq"]):
        with pytest.raises(SystemExit):
            command_line(*spelling, "--workdir=run")
        sentence = "error: --config=configs/digits.py:sq: objective 'sq' is not valid; choose one of ddpm, s2"
        assert capsys.readouterr().err.startswith(sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["report", "estimation_gap", "convert"])
def test_a_command_that_cannot_write_does_not_begin(workdir, monkeypatch, capsys, name):
    out = f"/proc/self/task/made{'.png' if name == 'estimation_gap' else '.html'}"
    with pytest.raises(SystemExit) as stop:
        load_file(SCRIPTS / f"{name}.py").main([str(workdir), out if name == "convert" else f"--out={out}"])
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "/proc/self/task cannot be written to (" in output.err
