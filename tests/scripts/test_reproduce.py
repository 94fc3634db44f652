"""The papers' tables as plans: what is trained and evaluated, what it costs, which values are printed."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import load_file
from PIL import Image

from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.validate import check_config

PATH = Path(__file__).parents[2] / "scripts" / "reproduce.py"
reproduce = load_file(PATH)

EXPECTED = {f"s2-table{i}" for i in range(1, 6)} | {f"s2-figure{i}" for i in range(3, 17)}
EXPECTED |= {f"sa-table{i}" for i in range(1, 5)} | {f"sa-figure{i}" for i in range(2, 5)}

# A flag's text as the type of its field.
PARSE = {
    int: int,
    float: float,
    str: str,
    bool: "True".__eq__,
    tuple: lambda text: tuple(map(int, text.split(","))),
}


def fields(command):
    return dict(flag.removeprefix("--").split("=", 1) for flag in command if flag.startswith("--"))


def test_every_table_and_figure_is_there_and_whole():
    assert reproduce.TABLES.keys() == EXPECTED
    for name, table in reproduce.TABLES.items():
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels), name
        for row in table.rows:
            assert len(row.paper) in (0, max(1, len(table.columns))), (name, row.label)


def test_figures_are_the_papers():
    s2, sa, scores = (reproduce.TABLES[name] for name in ("s2-table1", "sa-table2", "sa-table3"))
    by_label = {row.label: dict(zip(table.columns, row.paper, strict=True)) for table in (s2, sa) for row in table.rows}
    assert by_label["S²-DMs(DDIMs)"][10] == 15.63
    assert by_label["S²-DMs(PNDMs)"][1000] == 3.26
    assert by_label["CIFAR10 CS, SA+SN"][10] == 17.23
    assert by_label["CelebA DDIM, SA+SN"][1000] == 2.66
    assert scores.rows[7].paper[0] == 8.42


def test_commands_train_and_sample_what_the_table_says(tmp_path):
    args = reproduce.parse(["sa-table2", f"--out={tmp_path}"])
    table = reproduce.TABLES["sa-table2"]
    rows = {row.label: row for row in table.rows}
    plain = fields(reproduce.train_command(table, rows["CIFAR10 CS, SA"], args))
    assert plain["config"] == "configs/cifar10_improved.py:ddpm"
    assert (plain["config.loss.K"], plain["config.loss.lam"]) == ("2", "1.0")
    assert plain["config.diffusion.schedule"] == "cosine"
    assert (plain["config.eval.samplers"], plain["config.eval.variance"]) == ("ddpm", "small")
    analytic = fields(reproduce.train_command(table, rows["CIFAR10 LS, B+A"], args))
    assert (analytic["config.eval.clip_pixel"], analytic["config.eval.timestep_spacing"]) == (
        "2.0",
        "linspace",
    )
    npr = fields(reproduce.train_command(table, rows["CIFAR10 LS, SA+NPR"], args))
    assert (npr["config"], npr["config.train.steps"]) == ("configs/cifar10_improved.py:npr", "500000")
    base = fields(reproduce.train_command(table, rows["CIFAR10 LS, SA"], args))
    assert npr["config.variance_head.base_workdir"] == base["workdir"] != npr["workdir"]
    args = reproduce.parse(["sa-table2", "--network=unet", f"--out={tmp_path}"])
    unet = reproduce.scaled(table, args)
    plain = fields(reproduce.train_command(unet, unet.rows[1], args))
    assert (plain["config"], plain["config.train.steps"]) == ("configs/cifar10.py:ddpm", "468000")
    pndm = reproduce.TABLES["s2-table1"].rows[3]
    assert fields(reproduce.train_command(reproduce.TABLES["s2-table1"], pndm, args))["config.eval.nfe"] == (
        "19,29,59,109,209,509,1009"
    )


def test_every_command_on_the_digits_is_one_that_the_program_takes(tmp_path):
    digits = load_file(PATH.parents[1] / "configs" / "digits.py")
    for name in reproduce.TABLES:
        args = reproduce.parse([name, "--scale=digits", f"--out={tmp_path}"])
        table = reproduce.scaled(reproduce.TABLES[name], args)
        trained = set()
        for row in table.rows:
            flags = fields(reproduce.train_command(table, row, args))
            trained.add(flags["workdir"])
            # The base of a variance head is trained by an earlier row.
            assert not row.variance_head or flags["config.variance_head.base_workdir"] in trained
            config = digits.get_config(row.variance_head or "ddpm")
            for key, value in flags.items():
                name = key.removeprefix("config.")
                if name in FIELDS:
                    group, field = name.split(".")
                    config[group][field] = PARSE[FIELDS[name].type](value)
                else:
                    assert key in ("config", "workdir")
            check_config(config)


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "run_command", None)
    monkeypatch.setattr("run_once.run_command", None)
    reproduce.main(["s2-table1", "--dry-run", f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().out
    # 3 forwards · 2 · 6.222 G · 128 · (600,000 + 200,000 more + 600,000) at 790 TFLOP/s.
    hours = 3 * 2 * 6.222e9 * 128 * 1.4e6 / 790e12 / 3600
    assert f"at least {hours:.1f} hours of training" in said
    assert "paper: 15.63, 9.88" in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Replaces the program by one whose distances are evaluations / 10; lists the commands."""
    commands = []

    def run(command, output=None):
        commands.append(command)
        given = fields(command)
        workdir = Path(given["workdir"])
        workdir.mkdir(parents=True, exist_ok=True)
        if "config.eval.nfe" in given:
            rows = [{"nfe": int(nfe), "frechet_distance": int(nfe) / 10} for nfe in given["config.eval.nfe"].split(",")]
            provenance = {"metric": "a distance", "num_images": 100}
            (workdir / "results.json").write_text(json.dumps({"rows": rows, "provenance": provenance}))
        return 0

    monkeypatch.setattr(reproduce, "run_command", run)
    monkeypatch.setattr("run_once.run_command", run)
    return commands


def test_the_papers_figures_stand_beside_ours_and_nothing_is_done_twice(launched, tmp_path, capsys):
    command = ["s2-table2", f"--out={tmp_path}"]
    reproduce.main(command)
    assert len(launched) == 5
    assert "\n5 of 5, about " in capsys.readouterr().out
    text = (tmp_path / "s2-table2.md").read_text()
    lines = [line.replace(" ", "") for line in text.splitlines()]
    assert "|S²-DMs(PNDMs)|paper|11.4|7.58|4.94|3.91|3.38|3.01|2.94|" in lines
    assert "|S²-DMs(PNDMs)|ours|1.90|2.90|5.90|10.90|20.90|50.90|100.90|" in lines
    reproduce.main(command)
    assert len(launched) == 5
    assert " of 5" not in capsys.readouterr().out


def test_a_head_costs_its_training(tmp_path, capsys):
    reproduce.main(["sa-table2", "--dry-run", f"--out={tmp_path}"])
    # Three forwards for the bases, of two levels for SA; one for each of the four heads of a block.
    cifar, celeba = 2 * 8.383e9 * 128, 2 * 24.05e9 * 128
    bases = 3 * (2 * 500_000 * 3 * cifar + 1_525_200 * 3 * celeba)
    heads = 500_000 * (2 * 4 * cifar + 4 * celeba)
    assert f"at least {(bases + heads) / 790e12 / 3600:.1f} hours of training" in capsys.readouterr().out


def test_curves_are_drawn_from_the_measured_distances(launched, tmp_path):
    command = ["s2-figure3", "--scale=digits", f"--out={tmp_path}"]
    reproduce.main(command)
    args = reproduce.parse(command)
    table = reproduce.scaled(reproduce.TABLES["s2-figure3"], args)
    results = {row.label: reproduce.run_row(table, row, args) for row in table.rows}
    figure = reproduce.plot_curves(table, results, args)
    curves = {curve.get_label(): curve for curve in figure.axes[0].lines}
    assert curves.keys() == results.keys()
    for row in table.rows:
        # The distances are NFE / 10, and each of these samplers has a known NFE for each number of steps.
        expected = [nfe / 10 for nfe in reproduce.nfe_by_steps(table, row).values()]
        curve = curves[row.label]
        assert curve.get_xdata().tolist() == list(table.columns)
        assert curve.get_ydata()[np.isfinite(curve.get_ydata())].tolist() == expected
    figure.savefig(tmp_path / "expected.png")
    drawn, again = (Image.open(tmp_path / name) for name in ("s2-figure3.png", "expected.png"))
    np.testing.assert_array_equal(drawn, again)


def test_a_figure_makes_its_pictures(launched, tmp_path):
    reproduce.main(["s2-figure4", "--scale=digits", f"--out={tmp_path}"])
    pictures = [fields(command) for command in launched if "--mode=sample" in command]
    assert [each["config.sample.nfe"] for each in pictures] == ["10", "20"]
    assert pictures[0]["config.sample.compare"].count(",") == 2


def test_mistakes_are_told(capsys):
    for argv, sentence in (
        (["s2-table9"], "s2-table9 is no table or figure; choose one of s2-table1,"),
        (["s2-table1", "--images=1"], "--images=1 is out of range"),
        (["s2-table1", "--steps=5"], "works with --scale=digits only"),
    ):
        with pytest.raises(SystemExit) as error:
            reproduce.main(argv)
        assert error.value.code == 2
        assert sentence in capsys.readouterr().err
    reproduce.main([])
    assert len(capsys.readouterr().out.splitlines()) == len(EXPECTED)
