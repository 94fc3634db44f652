"""Stage 4: short trainings with each objective, equal in time, and how far their samples are from real images.

Every part needs --images. `evidence_weights.npz` in the folder of results has what was trained; a later run trains on
from it, first those that were trained least.
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_stages import evidence_plan
from gpu_stages.evidence_images import synthetic_archive
from gpu_stages.evidence_plan import OBJECTIVES
from gpu_stages.parts import UNTUNED, Part, Settings, Skip

# A share may end up smaller than planned, because something took longer than expected.
_LEAST_FRACTION = 0.5


def _images_of(settings: Settings) -> Path:
    if settings.images:
        return settings.images
    if settings.tiny:
        return synthetic_archive(settings.scratch)
    raise Skip("it needs the images of CIFAR-10: give their archive as --images")


def prepare(settings: Settings) -> dict[str, Any]:
    """Reads the images while the programs are compiled, trains the classifier, measures floor, ceiling and samplers."""
    images, size = _images_of(settings), evidence_plan.size_of(settings)
    from gpu_stages import evidence_run
    from s2dm_jax.models.network import num_params

    run = evidence_run.open_run(settings, images, (*size.objectives, *size.nfe))
    batch_seconds = evidence_run.measure_batches(run)
    state = evidence_plan.read_state(settings.scratch)
    evidence_plan.write_state(settings.scratch, state._replace(batch_seconds=batch_seconds))
    compiled = run.compiler.seconds()
    anchors = run.anchors._asdict()
    timing = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in run.seconds.items())
    slowest = max(compiled.values())
    summary = (
        f"{timing} (slowest program {slowest:.1f} s); classifier right on {anchors['accuracy']:.1%} of the held-out "
        f"images; Fréchet distance of real images {anchors['floor']:.2f}, of noise {anchors['ceiling']:.2f}"
    )
    left = {name: trained.record["seconds"] for name, trained in run.left.objectives.items()}
    if left:
        summary += "; trained before: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in left.items())
    return {
        "images": run.images,
        "parameters": num_params(run.compiler.network),
        "fields": dict(size.fields),
        "seconds": run.seconds,
        "compile_seconds": {str(name): seconds for name, seconds in compiled.items()},
        "batch_seconds": batch_seconds,
        "eval_batch": size.eval_batch,
        "anchors": anchors,
        "trained_before": left,
        "note": run.note,
        "summary": summary + (f"; {run.note}" if run.note else ""),
    }


def objective(name: str, settings: Settings) -> dict[str, Any]:
    """Trains one objective for its share of the time that is left and measures it."""
    images, size = _images_of(settings), evidence_plan.size_of(settings)
    if name not in size.objectives:
        raise Skip("the rehearsal has two objectives")
    if settings.deadline - time.time() < size.least + size.margin:
        raise Skip("no time left")
    from gpu_stages import evidence_run
    from gpu_stages.evidence_train import config_of
    from s2dm_jax.config.build import build_objective

    run = evidence_run.open_run(settings, images, (name, *size.nfe))
    run.compiler.get(name)
    seconds = _share(name, settings, run)
    record = evidence_run.train_objective(settings, run, images, name, seconds)
    state = evidence_plan.read_state(settings.scratch)
    if state.level is None:
        evidence_plan.write_state(settings.scratch, state._replace(level=record["seconds"]))
    evidence_run.measure(settings, run, [(name, 0, nfe) for nfe in size.nfe])

    session, compared = record["sessions"][-1], _compared(run)
    return {
        "objective": name,
        "formula": build_objective(config_of(size, name, images)).formula,
        **record,
        **compared,
        "summary": f"{session['seconds']:.1f} s, {record['step']:,} steps ({session['steps_per_second']:.1f}/s), "
        f"L_simple {record['losses'][-1][2]:.2f}. {compared['summary']}",
    }


def distances(settings: Settings) -> dict[str, Any]:
    """Measures what is still missing, last of all the plain network with its output rescaled."""
    images, size = _images_of(settings), evidence_plan.size_of(settings)
    if not evidence_plan.has_state(settings.scratch):
        raise Skip("nothing is trained")
    from gpu_stages import evidence_run

    run = evidence_run.open_run(settings, images, size.nfe)
    records = {name: trained.record for name, trained in run.left.objectives.items()}
    if not records:
        raise Skip("nothing is trained")
    late = evidence_run.measure(settings, run, evidence_plan.missing_distances(records, size.nfe))
    return {"not_measured": late, **_compared(run)}


def _compared(run: Any) -> dict[str, Any]:
    """The objectives so far, for a part's result."""
    records = {name: trained.record for name, trained in run.left.objectives.items()}
    anchors, notes = run.anchors._asdict(), evidence_plan.notes_of(records)
    shown = ("step", "images", "seconds", "rows")
    return {
        "anchors": anchors,
        "notes": notes,
        "comparison": {name: {key: record[key] for key in shown} for name, record in records.items()},
        "summary": "; ".join([evidence_plan.comparison_line(records, anchors, run.size.nfe), *notes]),
    }


def _share(name: str, settings: Settings, run: Any) -> float:
    """Seconds to train an objective, of those that are left for it and the objectives after it.

    Raises:
      Skip: if the time is better spent on others, or there is too little.
    """
    size, state = run.size, evidence_plan.read_state(settings.scratch)
    waiting = size.objectives[size.objectives.index(name) :]
    records = {each: trained.record for each, trained in run.left.objectives.items()}
    trained = {each: records[each]["seconds"] if each in records else 0.0 for each in waiting}
    shares = _shares(trained, records, settings, run, state)
    if name not in shares:
        others = f", which goes to {', '.join(shares)}" if shares else ""
        raise Skip(f"trained for {trained[name]:.0f} s so far; no time left for more{others}")
    share = shares[name] if state.level is None else min(shares[name], state.level - trained[name])
    if share < _LEAST_FRACTION * size.least:
        raise Skip(f"trained for {trained[name]:.0f} s so far, like the others")
    return share


def _shares(
    trained: Mapping[str, float], records: Mapping[str, Any], settings: Settings, run: Any, state: evidence_plan.State
) -> dict[str, float]:
    """The shares of the objectives that are still to come, by the seconds that each was trained."""
    size = run.size
    measuring = evidence_plan.measuring_seconds(size, state.batch_seconds)
    costs = {each: measuring + (0.0 if run.compiler.is_compiled(each) else size.compiling) for each in trained}
    new: dict[str, Any] = {each: {"rows": []} for each in trained}
    rescaled = [skip for _, skip, _ in evidence_plan.missing_distances({**records, **new}, size.nfe) if skip]
    plan = functools.partial(evidence_plan.equal_shares, trained, costs, least=size.least, most=size.most)
    seconds = settings.deadline - time.time() - size.margin
    shares = plan(seconds - measuring * len(rescaled) / len(size.nfe))
    # Two objectives matter more than rescaling, and so does that later ones are trained for as long as the first.
    if state.level is not None or len(shares) < min(2, len(trained)):
        shares = plan(seconds)
    return shares


PARTS = {
    "prepare": Part(prepare, 150, UNTUNED),
    **{name: Part(functools.partial(objective, name), 400, UNTUNED) for name in OBJECTIVES},
    "distances": Part(distances, 200, UNTUNED),
}
