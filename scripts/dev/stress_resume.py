"""Kills a training run with SIGKILL at random moments, resumes it each time, and compares its final state.

examples (20 kills take about ten minutes on 2 cores):
  python scripts/dev/stress_resume.py
  python scripts/dev/stress_resume.py --kills=3 --seed=1
  python scripts/dev/stress_resume.py --flags --config.loss.K=2 --config.loss.lam=1

It trains a small network on the digits for 400 steps. It passes if the final state has the digests of an
uninterrupted run, no resume starts before the newest checkpoint that was complete at the kill, and
metrics.jsonl has each logged step once.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from s2dm_jax.common.signals import end_on_signal, removed_on_signal
from s2dm_jax.workdir.folder import checkpoint_folder, checkpoint_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS, LOG_EVERY, CHECKPOINT_EVERY = 400, 10, 20
CONFIG = f"""
from s2dm_jax.config.defaults import default_config


def get_config(_=""):
    c = default_config()
    c.model.ch, c.model.ch_mult, c.model.num_res_blocks, c.model.attn_resolutions = 32, (1,), 1, ()
    c.data.random_flip = True
    c.train.steps, c.train.log_every, c.train.checkpoint_every = {STEPS}, {LOG_EVERY}, {CHECKPOINT_EVERY}
    c.train.sample_every, c.train.batch_size = 100, 8
    c.sample.nfe, c.sample.num_images = 2, 4
    c.eval.nfe, c.eval.num_images = (2,), 8
    return c
"""


def start(workdir: Path, flags: list[str]) -> subprocess.Popen:
    """Starts the training, or resumes it."""
    config = workdir.parent / "config.py"
    config.write_text(CONFIG, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "s2dm_jax.main", f"--config={config}", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Waits for the end of a training that must succeed; returns its output."""
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"the run failed with status {process.returncode}:\n{output}")
    return output


def state_digests(workdir: Path) -> dict:
    """The digest of every leaf of the final state."""
    newest = checkpoint_folder(workdir) / str(STEPS)
    return json.loads((newest / "about" / "metadata").read_text(encoding="utf-8"))["digests"]


def main() -> None:
    """Entry point: exit status 1 and the reason if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="further flags for the runs; must come last"
    )
    arguments = parser.parse_args()
    with (
        end_on_signal("run the same command again"),
        tempfile.TemporaryDirectory() as folder,
        removed_on_signal(Path(folder)),
    ):
        stress(Path(folder), arguments)


def stress(folder: Path, arguments: argparse.Namespace) -> None:
    """Kills and resumes a training in `folder`, and compares it with one that was not killed."""
    rng = random.Random(arguments.seed)
    reference, killed = folder / "reference", folder / "killed"
    print("two uninterrupted runs as the reference …", flush=True)
    finish(start(reference, arguments.flags))
    # The second one finds compiled programs in the cache, as a resumed run does.
    began = time.monotonic()
    finish(start(folder / "warm", arguments.flags))
    seconds = time.monotonic() - began
    print(f"an uninterrupted run takes {seconds:.1f} s", flush=True)

    kills, ended = 0, 0
    while kills < arguments.kills:
        before = checkpoint_steps(killed)
        process = start(killed, arguments.flags)
        try:
            output = process.communicate(timeout=rng.uniform(0.02, 1.0) * seconds)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            output = process.communicate()[0]
            kills += 1
        resumed = re.search(r"from step ([\d,]+) of", output)
        if before and resumed and int(resumed[1].replace(",", "")) < before[-1]:
            sys.exit(f"checkpoint {before[-1]} exists, but the run resumed from {resumed[1]}:\n{output}")
        if "damaged" in output or "Traceback" in output or "error:" in output:
            sys.exit(f"resuming after a kill failed:\n{output}")
        if process.returncode == 0:
            # It finished before the kill: the remaining kills hit a new run.
            check(reference, killed)
            ended += 1
            killed = killed.with_name(f"killed_{ended}")
        else:
            print(f"kill {kills} of {arguments.kills}: checkpoints {checkpoint_steps(killed)}", flush=True)
    finish(start(killed, arguments.flags))
    check(reference, killed)
    print(f"{kills} kills: the final state is bit-identical, every resume was from the newest checkpoint")


def check(reference: Path, killed: Path) -> None:
    """Compares a finished run with the uninterrupted one."""
    if state_digests(reference) != state_digests(killed):
        sys.exit("the final state differs from that of the uninterrupted run")
    lines = (killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    if steps != list(range(LOG_EVERY, STEPS + 1, LOG_EVERY)):
        sys.exit(f"metrics.jsonl does not have each logged step once: {steps}")


if __name__ == "__main__":
    main()
