"""The sweep: its plan, which runs are made, by which process, what is left after failures, the report's statistics."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import load_file
from sweeps.jobs import Job, Task, task_of
from sweeps.plan import Request, parse_objectives, parse_seeds, parse_vary, plan_runs, split_fields

from s2dm_jax import main
from s2dm_jax.common.errors import UserError
from s2dm_jax.config.io import to_json
from s2dm_jax.workdir.paths import checkpoint_steps

ROOT = Path(__file__).parents[2]
sweep = load_file(ROOT / "scripts" / "sweep.py")
DIGITS = ["--config=configs/digits.py", "--config.eval.nfe=5"]
# Distances at NFE 5 by objective and seed; the differences are -1, 0 and -3.
DISTANCES = {"ddpm": (10.0, 12.0, 17.0), "s2_10": (9.0, 12.0, 14.0)}


@pytest.fixture(autouse=True)
def _checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def launched(monkeypatch):
    """Replaces each run by its config and the distance in DISTANCES; gives the names of the folders."""
    names = []

    def run(command, log, **_):
        config = main.training_config(command[2:])
        workdir = Path(next(flag for flag in command if flag.startswith("--workdir=")).partition("=")[2])
        names.append(workdir.name)
        if config.train.lr == 1:
            log.write_text("step 2\nerror: the loss of step 3 is not finite; lower config.train.lr\n")
            return 2
        if config.eval.inception_weights == "nowhere":
            log.write_text("trained 7 steps; no distance to real images is measured: no weights\n")
            return 0
        distance = DISTANCES["s2_10" if config.loss.skip else "ddpm"][config.train.seed] + config.eval.eta
        distances = [(None, 3.0), *((nfe, distance) for nfe in config.eval.nfe), (None, 300.0)]
        rows = [{"name": "ddim" if nfe else "end", "nfe": nfe, "frechet_distance": value} for nfe, value in distances]
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(config))
        provenance = {"metric": "Fréchet distance", "num_images": 500, "notes": []}
        results = {"step": config.train.steps, "eval": config.eval.to_dict(), "rows": rows, "provenance": provenance}
        (workdir / "results.json").write_text(json.dumps(results))
        return 0

    monkeypatch.setattr("run_once.run_command", run)
    return names


def status_of(*argv):
    try:
        sweep.main(list(argv))
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_plan_is_a_grid_whose_runs_share_a_training_where_only_the_evaluation_differs(tmp_path):
    vary = parse_vary(["train.lr=1e-3,3e-4", "eval.eta=0,1", "config.model.ch_mult=1,2;1,2,2"])
    request = Request("configs/digits.py", parse_objectives("ddpm,s2sa"), parse_seeds("0,3-4"), vary, [])
    runs = plan_runs(request, tmp_path)
    assert len(runs) == 3 * 2 * 2 * 2 * 2
    assert len({run.folder for run in runs}) == len(runs) / 2
    assert [run.seed for run in runs] == [0] * 16 + [3] * 16 + [4] * 16
    last = runs[-1]
    assert last.name == "s2_10+sa_2_lr=0.0003_ch_mult=1-2-2_seed4_eta=1.0"
    assert last.folder == "s2_10+sa_2_lr=0.0003_ch_mult=1-2-2_seed4"
    assert last.values == {"train.lr": "0.0003", "eval.eta": "1.0", "model.ch_mult": "1,2,2"}
    config = main.training_config(["main", *last.flags, f"--workdir={tmp_path}"])
    assert (config.loss.skip, config.loss.K, config.train.seed, config.model.ch_mult) == (10, 2, 4, (1, 2, 2))
    # The training itself evaluates its last step alone.
    train, evaluate = sweep.job_of(
        last._replace(evaluation={**last.evaluation, "checkpoint_step": 7}), tmp_path
    ).commands
    assert train[3:] == [*last.flags, f"--workdir={tmp_path / 'runs' / last.folder}"]
    assert {"--mode=evaluate", "--config.eval.checkpoint_step=7", "--config.eval.nfe=10,20,50"} < set(evaluate)
    assert {"--config.eval.eta=1.0", "--config.eval.variance=none"} < set(evaluate)
    assert not list(tmp_path.iterdir())


def test_fields_are_told_from_the_sweeps_own_arguments():
    argv = [
        "--config",
        "a.py",
        "--config.train.lr",
        "1e-3",
        "--seeds=1",
        "--config.train.steps=5",
        "--noconfig.model.remat",
    ]
    fields = ["--config.train.lr=1e-3", "--config.train.steps=5", "--noconfig.model.remat"]
    assert split_fields(argv) == (fields, ["--config", "a.py", "--seeds=1"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--objectives=ddpm,s3"], "--config=configs/digits.py:s3: objective 's3' is not valid; choose one of"),
        (["--objectives=s2,s2_10"], "--objectives=s2,s2_10 has s2_10 twice; give each once"),
        (["--seeds=0,1,0"], "--seeds=0,1,0 has 0 twice"),
        (["--seeds=two"], "--seeds=two is not a list of seeds: it must be integers from 0, such as 0,1,2 or 0-4"),
        (["--vary=train.rl=1,2"], "--vary=train.rl=1,2: config.train.rl is not a field of a config; did you mean"),
        (["--vary=train.lr=1"], "--vary=train.lr=1 needs at least two values"),
        (["--vary=train.lr=0.1,x"], "config.train.lr='x' has the wrong type"),
        (["--vary=train.lr=0.1,1e-1"], "--vary has train.lr=0.1 twice"),
        (["--vary=train.seed=1,2"], "--vary=train.seed=1,2: give seeds with --seeds"),
        (["--vary=train.lr=1,2", "--config.train.lr=3"], "--config.train.lr=3 sets the field that --vary=train.lr="),
        (["--config.train.seed=3"], "--config.train.seed=3 is not allowed here; use --seeds, as in --seeds=3"),
        (["--config.train.steps=0"], "config.train.steps=0 is out of range"),
        (["--config.eval.metrics=fidd"], "config.eval.metrics='fidd' names 'fidd'"),
        (["--task=2"], "--num-tasks is missing"),
        (["--task=3", "--num_tasks=3"], "--task=3 is out of range: with --num-tasks=3 it must be from 0 to 2"),
        (["--wat=1"], "unrecognized arguments: --wat=1"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(launched, tmp_path, capsys, arguments, sentence):
    assert status_of(*DIGITS, *arguments, f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1
    assert not launched
    assert not (tmp_path / "out").exists()


def test_the_report_has_standard_errors_and_differences_paired_by_seed(launched, tmp_path, capsys):
    argv = [*DIGITS, "--objectives=ddpm,s2", "--seeds=0-2", f"--out={tmp_path}"]
    assert status_of(*argv, "--dry_run") == 0
    listed = capsys.readouterr().out
    assert listed.count("(to do)\n  python -m s2dm_jax.main --config=configs/digits.py:") == 6
    assert not launched

    assert status_of(*argv) == 0
    assert launched == [f"{objective}_seed{seed}" for seed in range(3) for objective in ("ddpm", "s2_10")]
    report = (tmp_path / "report.md").read_text()
    # √(26/2)/√3 and √(14/6)/√3: of 10, 12, 17 and of -1, 0, -3.
    assert re.search(r"\| ddpm +\| ddim +\| 3 +\| 13\.00 ± 2\.08 \|", report)
    assert re.search(r"\| s2_10, ddim less ddpm \| -1\.33 ± 0\.88 \|", report)
    assert report in capsys.readouterr().out
    plain = json.loads((tmp_path / "report.json").read_text())
    assert plain["differences"][0]["standard_error"] == pytest.approx((14 / 6) ** 0.5 / 3**0.5)
    lines = (tmp_path / "report.csv").read_text().splitlines()
    assert lines[0] == "run,objective,seed,step,sampler,nfe,metric,value"
    assert lines[2] == "ddpm_seed0,ddpm,0,1400,ddim,5,frechet_distance,10.0"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

    # Finished runs are not made again, also without the first command; only the results that another one asks for are.
    assert status_of(f"--out={tmp_path}") == status_of(*argv, "--report") == 0
    assert len(launched) == 6
    assert status_of(*argv, "--config.eval.nfe=5,10", "--seeds=0,1") == 0
    assert launched[6:] == ["ddpm_seed0", "s2_10_seed0", "ddpm_seed1", "s2_10_seed1"]
    assert "also holds 2 other runs of an earlier command" in capsys.readouterr().out
    assert status_of(*argv, "--config.eval.inception_weights=nowhere") == 1
    assert (
        "ddpm_seed0 failed: trained 7 steps; no distance to real images is measured: no weights"
        in capsys.readouterr().err
    )
    assert status_of(*argv, "--config.train.lr=0.1") == 2
    assert "ddpm_seed0 belongs to a run with config.train.lr=0.002, not 0.1" in capsys.readouterr().err


def test_a_run_that_fails_is_recorded_and_the_others_are_made(launched, tmp_path, capsys):
    argv = [*DIGITS, "--objectives=ddpm,s2_10", "--vary=train.lr=1e-3,1", "--vary=eval.eta=0,1", f"--out={tmp_path}"]
    assert status_of(*argv) == 1
    assert len(launched) == 8
    output = capsys.readouterr()
    reason = "the loss of step 3 is not finite; lower config.train.lr"
    assert f"ddpm_lr=1.0_seed0_eta=0.0 failed: {reason} (see {tmp_path}/logs/ddpm_lr=1.0" in output.err
    report = (tmp_path / "report.md").read_text()
    assert f"- s2_10_lr=1.0_seed0_eta=1.0: {reason}" in report
    assert re.search(r"\| ddpm +\| 0\.001 +\| 1\.0 +\| ddim +\| 1 +\| 11\.00 \|", report)
    assert re.search(r"\| s2_10, train.lr=0.001, eval.eta=1.0, ddim less ddpm \| -1\.00 \|", report)
    # The same command retries it.
    assert status_of(*argv) == 1
    assert launched[8:] == ["ddpm_lr=1.0_seed0"] * 2 + ["s2_10_lr=1.0_seed0"] * 2


def test_the_last_of_the_tasks_makes_the_report(launched, tmp_path, capsys, monkeypatch):
    argv = [*DIGITS, "--objectives=ddpm,s2_10", "--seeds=0-2", f"--out={tmp_path}"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert status_of(*argv) == 0
    assert launched == ["s2_10_seed0", "s2_10_seed2"]
    source = "SLURM_ARRAY_TASK_ID=1 of SLURM_ARRAY_TASK_COUNT=4"
    output = capsys.readouterr().out
    assert output.startswith(f"task 1 of 4 ({source}): 2 of 6 runs\n")
    assert "4 of 6 runs are left to other processes" in output
    for number in (0, 2, 3):
        assert not (tmp_path / "report.md").exists()
        assert status_of(f"--out={tmp_path}", f"--task={number}", "--num-tasks=4") == 0
    assert len(launched) == 6
    assert (tmp_path / "report.md").exists()


def test_the_task_of_a_slurm_array():
    def task(number, count, first=0, step=1):
        names = ("ID", "COUNT", "MIN", "STEP")
        values = (number, count, first, step)
        return task_of(None, None, {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(names, values, strict=True)})[:2]

    assert task_of(None, None, {}) is None
    assert task_of(2, 3, {"SLURM_ARRAY_TASK_ID": "7"})[:2] == (2, 3)
    assert (task(0, 4), task(3, 4), task(9, 9, 1), task(6, 3, 2, 2)) == ((0, 4), (3, 4), (8, 9), (2, 3))
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID=7 is not one of 3 consecutive indices from 1"):
        task(7, 3, 1)
    jobs = [Job(f"{i}", f"lock{i // 2}", Path(), Path(), []) for i in range(10)]
    shares = [Task(number, 3, "").share(jobs) for number in range(3)]
    assert [[job.name for job in share] for share in shares] == [["0", "1", "6", "7"], ["2", "3", "8", "9"], ["4", "5"]]


def test_processes_of_srun_are_refused(launched, tmp_path, capsys, monkeypatch):
    for name, value in {"NTASKS": "2", "STEP_NODELIST": "a", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert status_of(*DIGITS, f"--out={tmp_path}") == 2
    assert "SLURM_NTASKS=2: srun has started 2 processes of this sweep" in capsys.readouterr().err
    assert not launched


# A process of a sweep with COUNT jobs; each leaves a line for every start, and a result after a moment.
PROCESS = """
import json, sys
from pathlib import Path
from sweeps.jobs import Job, run_jobs

COMMAND = "import sys, time; from pathlib import Path; folder = Path(sys.argv[1]); folder.mkdir(exist_ok=True);"
COMMAND += "print('started', file=(folder / 'starts').open('a')); time.sleep(float(sys.argv[2]));"
COMMAND += "(folder / 'results.json').write_text('{\\"rows\\": [{\\"frechet_distance\\": 1}]}')"
out, jobs = Path(sys.argv[1]), []
for number in range(int(sys.argv[2])):
    workdir = out / f"run{number}"
    command = [sys.executable, "-c", COMMAND, str(workdir), sys.argv[3]]
    jobs.append(Job(f"job{number}", f"job{number}", workdir, out / f"{number}.json", [command]))
stored = lambda job: json.loads(job.result_path.read_text()) if job.result_path.exists() else None
print("left", run_jobs(jobs, out, stored).left)
"""


def start_process(out, count, seconds):
    arguments = [sys.executable, "-c", PROCESS, str(out), str(count), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_processes_at_the_same_time_run_each_job_once(tmp_path):
    processes = [start_process(tmp_path, 4, 0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [(tmp_path / f"run{number}" / "starts").read_text() for number in range(4)] == ["started\n"] * 4
    assert any("is running in another process and is skipped" in output for output in outputs)


def test_a_run_whose_sweep_was_killed_is_left_alone_until_it_ends(tmp_path):
    process = start_process(tmp_path, 1, 2)
    while not (tmp_path / "run0" / "starts").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert start_process(tmp_path, 1, 0).communicate(timeout=60)[0].endswith("left ['job0']\n")
    while not (tmp_path / "run0" / "results.json").exists():
        time.sleep(0.02)
    process.communicate()
    assert start_process(tmp_path, 1, 0).communicate(timeout=60)[0].endswith("left []\n")
    assert (tmp_path / "run0" / "starts").read_text() == "started\n" * 2


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_killed_ends_as_one_that_is_not(tmp_path):
    small = ["--config.model.ch=32", "--config.model.ch_mult=1", "--config.model.num_res_blocks=1"]
    small += ["--config.model.attn_resolutions=", "--config.train.batch_size=8", "--config.train.steps=1000"]
    small += ["--config.train.checkpoint_every=100", "--config.eval.nfe=2", "--config.eval.num_images=16"]
    command = [sys.executable, "scripts/sweep.py", "--config=configs/digits.py", "--objectives=ddpm,s2_10", *small]
    results = []
    for name, kills in (("whole", ()), ("killed", (signal.SIGTERM, signal.SIGKILL))):
        workdir = tmp_path / name / "runs" / "ddpm_seed0"
        for number in kills:
            process = subprocess.Popen([*command, f"--out={tmp_path / name}"], start_new_session=True)
            before = max([0, *checkpoint_steps(workdir)])
            while max([0, *checkpoint_steps(workdir)]) == before:
                assert process.poll() is None
                time.sleep(0.1)
            os.killpg(process.pid, number)
            assert process.wait() == (128 + number if number == signal.SIGTERM else -number)
        subprocess.run([*command, f"--out={tmp_path / name}"], check=True)
        results.append(json.loads((tmp_path / name / "report.json").read_text())["values"])
    assert results[0] == results[1]
