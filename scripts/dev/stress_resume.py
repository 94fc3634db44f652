"""Kills a training run with SIGKILL at random moments, starts it again each time, and compares its end.

    python scripts/dev/stress_resume.py                      # 20 kills of 400 steps of a small network on the
    digits python scripts/dev/stress_resume.py --kills=3 --seed=1

Passes if the state at the end has, bit for bit, the digests of a run that nobody touched, no start came back
to a step before the last checkpoint that was whole at the kill, and metrics.jsonl holds each step once.
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
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"the run failed with status {process.returncode}:\n{output}")
    return output


def checkpoints(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def state_digests(workdir: Path) -> dict:
    newest = workdir / "checkpoints" / str(STEPS)
    return json.loads((newest / "about" / "metadata").read_text(encoding="utf-8"))["digests"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many times (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of the runs, such as --config.…=…")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        print("two runs without a break, to compare with …", flush=True)
        finish(start(whole, arguments.flags))
        # The second time compiled programs are at hand, as they are after a kill.
        began = time.monotonic()
        finish(start(Path(folder) / "warm", arguments.flags))
        seconds = time.monotonic() - began
        print(f"a run without a break takes {seconds:.1f} s", flush=True)

        kills, ended = 0, 0
        while kills < arguments.kills:
            before = checkpoints(killed)
            process = start(killed, arguments.flags)
            try:
                output = process.communicate(timeout=rng.uniform(0.02, 1.0) * seconds)[0]
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                output = process.communicate()[0]
                kills += 1
            resumed = re.search(r"from step ([\d,]+) of", output)
            if before and resumed and int(resumed[1].replace(",", "")) < before[-1]:
                sys.exit(
                    f"checkpoint {before[-1]} was there, but the run went on from {resumed[1]}:\n{output}"
                )
            if "damaged" in output or "Traceback" in output or "error:" in output:
                sys.exit(f"a start after a kill did not go well:\n{output}")
            if process.returncode == 0:
                # It came to its end before the kill: the rest hits a new run.
                check(whole, killed)
                ended += 1
                killed = killed.with_name(f"killed_{ended}")
            else:
                print(f"kill {kills} of {arguments.kills}: checkpoints {checkpoints(killed)}", flush=True)
        finish(start(killed, arguments.flags))
        check(whole, killed)
        print(
            f"{kills} of {arguments.kills} kills: the same state to the bit, nothing lost beyond a checkpoint"
        )


def check(whole: Path, killed: Path) -> None:
    if state_digests(whole) != state_digests(killed):
        sys.exit("the state differs from that of the run without a break")
    steps = [
        json.loads(line)["step"]
        for line in (killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    if steps != list(range(LOG_EVERY, STEPS + 1, LOG_EVERY)):
        sys.exit(f"metrics.jsonl does not hold each step once: {steps}")


if __name__ == "__main__":
    main()
