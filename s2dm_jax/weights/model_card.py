"""Model cards: training data and settings, measured results and origin of a network."""

import datetime
import json
from pathlib import Path

import jax

from s2dm_jax.common.files import read_json
from s2dm_jax.common.hashing import sha256_of_arrays
from s2dm_jax.common.version import __version__
from s2dm_jax.config.build import schedule_ends, schedule_fields
from s2dm_jax.config.ema import parse_choice
from s2dm_jax.models.network import num_params
from s2dm_jax.workdir import exported
from s2dm_jax.workdir.load import Run
from s2dm_jax.workdir.paths import CARD
from s2dm_jax.workdir.results import results_table

NOT_STATED = "not stated"

_PREDICTS = {
    "epsilon": "the noise ε in x_t",
    "v": "v = √alpha_bar·ε − √(1−alpha_bar)·x_0",
    "x0": "the clean image x_0",
}


def card_of_run(run: Run, path: str) -> dict:
    """The card of a run's folder or of an exported sampler, with its results; ValueError for a foreign one."""
    folder = Path(path)
    if folder.is_file():
        return parse_card(json.dumps(exported.read_header(path).get("card")))
    card = _card_in(folder)
    metrics = read_json(folder / "results.json", ("step", "rows"), "the model card has no results")
    sha256 = _sha256_of(run)
    if metrics and (metrics["step"] != run.step or _other_weights(metrics, sha256)):
        metrics = None
    made = make_card(run, license=card.get("license", ""), source=card.get("source"), metrics=metrics)
    if card and not metrics and card["weights"]["sha256"] == made["weights"]["sha256"]:
        made["metrics"] = card["metrics"]
    return parse_card(json.dumps(made))


def _other_weights(metrics: dict, sha256: str) -> bool:
    """Whether results were measured with other weights, as the EMA before its correction is."""
    return sha256 not in metrics.get("provenance", {}).get("weights", sha256)


def _sha256_of(run: Run) -> str:
    return sha256_of_arrays(jax.tree.leaves(run.ema_params))


def _card_in(folder: Path) -> dict:
    if not (folder / CARD).is_file():
        return {}
    try:
        return parse_card((folder / CARD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{error}; restore {CARD}, or remove it to have a new one made, without its record of the weights' origin"
        ) from error


def parse_card(text: str) -> dict:
    """A card from its JSON text; ValueError for one that `make_card` did not make."""
    try:
        card = json.loads(text)
        card_to_markdown(card)
        if type(card["step"]) is not int or not isinstance(card["config"], dict):
            raise ValueError("its step or config is missing")
        return card
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its model card is damaged or was not written by s2dm_jax") from error


def make_card(run: Run, *, license: str = "", source: dict | None = None, metrics: dict | None = None) -> dict:
    """The card of a network as plain data for JSON; data and training are stated only of weights trained here.

    Args:
      source: for weights that were not trained here from the start: "file", "format", "sha256", "steps_there", and
        "first_step", the step at which training here begins.
      metrics: results of an evaluation of these weights (`evaluate.evaluate`).
    """
    steps = run.step - (source["first_step"] if source else 0)
    trained = steps > 0
    config = run.config
    return {
        "step": run.step,
        "network": {
            "name": type(run.network).__name__,
            "parameters": num_params(run.network),
            "image_shape": list(run.network.image_shape),
            "fields": vars(run.network),
        },
        "predicts": _PREDICTS[config.model.prediction],
        "weights": {
            "kind": parse_choice(run.ema).words if trained else NOT_STATED,
            "sha256": _sha256_of(run),
            "note": run.ema_note or None,
        },
        "schedule": schedule_fields(config),
        "data": config.data.name if trained else NOT_STATED,
        "training": {**config.train.to_dict(), "steps": steps} if trained else NOT_STATED,
        "objective": config.loss.to_dict() if trained else NOT_STATED,
        "source": source,
        "metrics": metrics,
        "license": license or NOT_STATED,
        "made_with": {"s2dm_jax": __version__, "jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
        "config": json.loads(config.to_json()),
    }


def card_to_markdown(card: dict, front_matter: dict[str, str] | None = None) -> str:
    """The card as Markdown, below the `front_matter` that model hubs read."""
    lines = ["---", *(f"{name}: {value}" for name, value in front_matter.items()), "---", ""] if front_matter else []
    network, schedule = card["network"], card["schedule"]
    facts = {
        "Network": f"{network['name']}, {network['parameters']:,} parameters; {_sentence(network['fields'])}",
        "Images": f"{'×'.join(map(str, network['image_shape']))}, in [−1, 1]",
        "Predicts": f"{card['predicts']}; t counts 0 … T−1",
        "Noise schedule": f"{schedule['schedule']}, T = {schedule['T']:,}{schedule_ends(schedule)}",
        "Weights": _sentence(card["weights"]),
        "Data": card["data"],
        "Objective": _sentence(card["objective"]),
        "Training": _sentence(card["training"]),
        "Origin": _sentence(card["source"]) if card["source"] else "trained with s2dm_jax from the start",
        "License": card["license"],
        "Created with": f"{_sentence(card['made_with'])}; {card['date']}",
    }
    if "sampler" in card:
        facts["Embedded sampler"] = _sentence(card["sampler"])
    lines += ["# Diffusion model", "", *_list(facts), "", "## Results", ""]
    if card["metrics"]:
        provenance = {name: _sentence(value) for name, value in card["metrics"]["provenance"].items()}
        lines += [results_table(card["metrics"]), "", *_list(provenance), ""]
    else:
        lines += ["No evaluation results for these weights.", ""]
    return "\n".join(lines)


def card_paths(path: Path) -> tuple[Path, Path]:
    """The two files of the card of the file `path`."""
    return path.with_name(f"{path.name}.md"), path.with_name(f"{path.name}.json")


def write_card(card: dict, markdown: Path, numbers: Path, *, front_matter: dict[str, str] | None = None) -> None:
    """Writes a card as Markdown and as JSON."""
    markdown.write_text(card_to_markdown(card, front_matter), encoding="utf-8")
    numbers.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def _list(facts: dict[str, str]) -> list[str]:
    return [f"- **{name}**: {value}" for name, value in facts.items()]


def _sentence(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {_sentence(inner)}" for name, inner in value.items() if inner is not None)
