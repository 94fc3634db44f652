"""The papers' tables as plans: what is trained and evaluated, what it costs, which values are printed."""

import itertools
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ToyNetwork, load_file
from PIL import Image

from s2dm_jax.config.build import build_objective
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.validate import check_config

PATH = Path(__file__).parents[2] / "scripts" / "reproduce.py"
reproduce = load_file(PATH)
PRESETS = reproduce.PRESETS

EXPECTED = {f"s2-table{i}" for i in range(1, 6)} | {f"s2-figure{i}" for i in range(3, 17)}
EXPECTED |= {f"sa-table{i}" for i in range(1, 5)} | {f"sa-figure{i}" for i in range(1, 5)}

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
        width = 2 if table.kind == "training" else len(table.columns)
        for row in table.rows:
            assert len(row.paper) in (0, width), (name, row.label)
    # What is guessed in a figure is said; the captions of S²-DMs' 7 to 16 name models, sampler and steps.
    guessed = {name for name, table in reproduce.TABLES.items() if "figure" in name and table.note}
    assert guessed >= {f"s2-figure{i}" for i in (3, 4, 5, 6, 12, 16)} | {f"sa-figure{i}" for i in range(1, 5)}


def test_figures_are_the_papers():
    s2, sa, scores = (reproduce.TABLES[name] for name in ("s2-table1", "sa-table2", "sa-table3"))
    by_label = {row.label: dict(zip(table.columns, row.paper, strict=True)) for table in (s2, sa) for row in table.rows}
    assert by_label["S²-DMs(DDIMs)"][10] == 15.63
    assert by_label["S²-DMs(PNDMs)"][1000] == 3.26
    assert by_label["CIFAR10 CS, SA+SN"][10] == 17.23
    assert by_label["CelebA DDIM, SA+SN"][1000] == 2.66
    assert scores.rows[7].paper[0] == 8.42
    costs = {row.label: row.paper for row in reproduce.TABLES["s2-table3"].rows}
    assert costs["celeba64, S²-DMs"] == (0.0056, 15.56)


def test_entries_that_are_worse_with_l_sa_are_documented():
    page = (PATH.parents[1] / "docs" / "objectives.md").read_text()
    documented = re.findall(r"\d+: [\d.]+ > [\d.]+", page.partition("| row | steps: FID")[2].partition("\n\n")[0])
    by_lambda, by_covariance = (reproduce.TABLES[f"sa-table{i}"].rows for i in (4, 2))
    pairs = [(by_lambda[0], row) for row in by_lambda[1:]] + list(
        zip(by_covariance[::2], by_covariance[1::2], strict=True)
    )
    worse = [
        f"{steps}: {ours:.2f} > {base:.2f}"
        for plain, row in pairs
        for steps, base, ours in zip((10, 50, 100, 200, 1000), plain.paper, row.paper, strict=True)
        if ours > base
    ]
    assert worse == documented


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


CONFIGS = {
    name: load_file(PATH.parents[1] / "configs" / f"{name}.py")
    for name in ("digits", "cifar10", "cifar10_improved", "celeba64", "celebahq256")
}


def planned_config(row, flags):
    """The checked config of a row's command."""
    config = CONFIGS[row.model.dataset].get_config(row.variance_head or "ddpm")
    for key, value in flags.items():
        name = key.removeprefix("config.")
        if name in FIELDS:
            group, field = name.split(".")
            config[group][field] = PARSE[FIELDS[name].type](value)
        else:
            assert key in ("config", "workdir")
    check_config(config)
    return config


@pytest.mark.parametrize("scale", ["full", "digits"])
def test_every_command_of_both_presets_is_one_that_the_program_takes(tmp_path, scale):
    workdirs, results = {}, {}
    for name, preset in itertools.product(reproduce.TABLES, PRESETS):
        args = reproduce.parse([name, f"--scale={scale}", f"--preset={preset}", f"--out={tmp_path}"])
        table = reproduce.scaled(reproduce.TABLES[name], args)
        trained = set()
        for row in table.rows:
            flags = fields(reproduce.train_command(table, row, args))
            trained.add(flags["workdir"])
            # The base of a variance head is trained by an earlier row.
            assert not row.variance_head or flags["config.variance_head.base_workdir"] in trained
            config = planned_config(row, flags)
            loss = build_objective(config)
            if not row.variance_head:
                trains = flags["config"], preset, loss, config.train.ema_start, config.train.steps
                assert workdirs.setdefault(flags["workdir"], trains) == trains
                released = preset == "released"
                assert loss.antithetic == released
                assert loss.reduction == ("mean" if released and row.model.skip else "sum")
                assert loss.skip_noise == ("independent" if released else "shared")
                # Of the two papers' models on the digits, some differ in nothing else.
                by_first_step = released and name.startswith("sa")
                assert config.train.ema_start == ("first_step" if by_first_step else "initial")
            path = reproduce.result_path(table, row, args)
            assert results.setdefault(path, (name, preset, row.label)) == (name, preset, row.label)
        if table.kind == "compare":
            images = [fields(command) for command in reproduce.image_commands(table, args)]
            assert {image["workdir"] for image in images} <= trained


def test_the_default_preset_does_what_made_the_printed_numbers(tmp_path):
    given = {}
    for name in ("sa-table1", "sa-table2", "s2-table1", "s2-table5"):
        args = reproduce.parse([name, f"--out={tmp_path}"])
        table = reproduce.scaled(reproduce.TABLES[name], args)
        given |= {(name, row.label): fields(reproduce.train_command(table, row, args)) for row in table.rows}
    assert {flags["config.eval.inception_resize"] for flags in given.values()} == {"pytorch_fid"}
    for label, expected in {
        "CIFAR10 LS, B+A": {"noise_stat_images": "50000"},
        "CelebA DDPM, SA+A": {"noise_stat_images": "10000"},
        "CelebA DDIM, B+A": {"noise_stat_images": "10000", "mean": "ddim"},
        "CelebA DDIM, SA": {"raw_eps": "True", "clip_x0": "True"},
        "CelebA DDPM, B": {"variance": "small", "clip_x0": "True"},
    }.items():
        flags = given["sa-table2", label]
        assert {f"config.eval.{name}": value for name, value in expected.items()}.items() <= flags.items()
    assert given["sa-table2", "CelebA DDPM, B+SN"]["config.variance_head.dropout"] == "True"
    # DDIM's code takes 500 steps for the column 400.
    assert given["s2-table5", "cifar10, S²-DMs, skip 2"]["config.eval.nfe"] == "10,20,50,100,200,500,1000"
    assert [given["sa-table1", f"DDIM, {label}"]["config.loss.lam"] for label in ("B", "SA", "SA, λ 1")] == [
        "0.0",
        "0.1",
        "1.0",
    ]


def test_runs_of_before_the_presets_are_those_of_the_preset_paper(monkeypatch):
    monkeypatch.setattr("sys.executable", "python")
    for table, label, workdir, result in (
        (
            "sa-table2",
            "CelebA DDIM, SA+A",
            "celeba64_linear_skip0_K2_lam1_flip1_seed0_steps1525200",
            "CelebA_DDIM__SA_A_3e6171ad",
        ),
        (
            "s2-table5",
            "cifar10, S²-DMs, skip 50",
            "cifar10_linear_skip50_K1_lam0_flip1_seed0_steps600000",
            "cifar10__S²_DMs__skip_50_e85914fc",
        ),
    ):
        args = reproduce.parse([table, "--preset=paper"])
        rows = {row.label: row for row in reproduce.scaled(reproduce.TABLES[table], args).rows}
        assert reproduce.workdir_of(rows[label].model, args).name == workdir
        path = reproduce.result_path(reproduce.TABLES[table], rows[label], args)
        assert path == Path("runs/papers/results") / table / f"{result}.json"


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "run_command", None)
    monkeypatch.setattr("run_once.run_command", None)
    reproduce.main(["s2-table1", "--dry-run", f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().out
    # 3 forwards · 2 · 6.222 G · 128 · (600,000 + 200,000 more + 600,000) at 790 TFLOP/s.
    hours = 3 * 2 * 6.222e9 * 128 * 1.4e6 / 790e12 / 3600
    assert f"at least {hours:.1f} hours of training" in said
    assert "printed: 15.63, 9.88" in said
    assert "\npreset released: the authors' code" in said
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


@pytest.fixture
def in_process(monkeypatch, command_line):
    """Runs the program, with further flags, and the figure of the gap in this process, and a network of one level."""
    gap, further = load_file(PATH.parent / "estimation_gap.py"), []

    def run(command, output=None):
        if "s2dm_jax.main" not in command:
            gap.main([*command[2:], "--start=3", "--images=4", "--batch-size=4"])
            return 0
        flags = [*command[3:], *further]
        if "--mode=sample" not in command:
            flags += ["--config.train.batch_size=4"]
            if not any("variance_head" in flag for flag in command):
                flags += ["--config.model.ch_mult=(1,)", "--config.model.attn_resolutions=()"]
        command_line(*flags)
        return 0

    monkeypatch.setattr(reproduce, "run_command", run)
    monkeypatch.setattr("run_once.run_command", run)
    yield further
    # A compiled program takes hundreds of the 65,530 memory mappings that Linux grants a process.
    jax.clear_caches()


def test_a_row_is_trained_and_measured_under_its_preset(in_process, monkeypatch, tmp_path):
    (tmp_path / "mean.py").write_text("def features(images):\n    return images.astype(float).mean((1, 2))\n")
    in_process.append(f"--config.eval.feature_extractor={tmp_path / 'mean.py'}:features")
    for module in ("training.setup", "workdir.load"):
        monkeypatch.setattr(f"s2dm_jax.{module}.build_network", lambda config: ToyNetwork())
    table = reproduce.TABLES["s2-table3"]
    monkeypatch.setitem(reproduce.TABLES, "s2-table3", table._replace(rows=table.rows[2:3]))
    reproduce.main(["s2-table3", "--scale=digits", "--steps=2", "--images=4", f"--out={tmp_path}"])
    (run,) = (tmp_path / "runs").iterdir()
    loss = json.loads((run / "config.json").read_text())["loss"]
    assert (loss["preset"], loss["skip"]) == ("released", 10)
    line = (tmp_path / "s2-table3.md").read_text().splitlines()[4]
    label, source, seconds, gigabytes = (cell.strip() for cell in line.strip("|").split("|"))
    assert (label, source) == ("cifar10, S²-DMs", "measured, released")
    assert 0 < float(seconds) < 60
    assert 0.1 < float(gigabytes) < 100


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_table_runs_on_the_digits_in_both_presets(in_process, tmp_path, name):
    for preset in PRESETS:
        reproduce.main([name, "--scale=digits", "--steps=2", "--images=10", f"--preset={preset}", f"--out={tmp_path}"])
    kind = reproduce.TABLES[name].kind
    if kind in ("gap", "illustration"):
        assert {path.suffix for path in tmp_path.glob(f"{name}*")} == {".png", *[".json"] * (kind == "gap")}
        return
    text = (tmp_path / f"{name}.md").read_text()
    for row in reproduce.TABLES[name].rows:
        for preset in PRESETS:
            assert f"| {row.label} " in text
            assert f" measured, {preset} " in text


def test_the_papers_figures_stand_beside_ours_and_nothing_is_done_twice(launched, tmp_path, capsys):
    command = ["s2-table2", f"--out={tmp_path}"]
    reproduce.main(command)
    assert len(launched) == 5
    assert "\n5 of 5, about " in capsys.readouterr().out
    text = (tmp_path / "s2-table2.md").read_text()
    lines = [line.replace(" ", "") for line in text.splitlines()]
    printed = "|S²-DMs(PNDMs)|printed|11.4|7.58|4.94|3.91|3.38|3.01|2.94|"
    ours = "|S²-DMs(PNDMs)|measured,{}|1.90|2.90|5.90|10.90|20.90|50.90|100.90|"
    assert lines[lines.index(printed) + 1] == ours.format("released")
    assert "measured, paper" not in text
    reproduce.main(command)
    assert len(launched) == 5
    assert " of 5" not in capsys.readouterr().out
    # The other preset trains its own models, and the table then has both, by whichever it is written.
    reproduce.main([*command, "--preset=paper"])
    assert len(launched) == 10
    assert len({fields(command)["workdir"] for command in launched}) == 6
    both = (tmp_path / "s2-table2.md").read_text()
    lines = [line.replace(" ", "") for line in both.splitlines()]
    at = lines.index(printed)
    assert lines[at + 1 : at + 3] == [ours.format("released"), ours.format("paper")]
    reproduce.main(command)
    assert (tmp_path / "s2-table2.md").read_text() == both
    assert len(launched) == 10


@pytest.mark.parametrize(("preset", "shared"), [("released", False), ("paper", True)])
def test_the_papers_share_a_training_where_its_ema_starts_alike(launched, tmp_path, preset, shared):
    flags = [f"--preset={preset}", f"--out={tmp_path}"]
    reproduce.main(["s2-table2", *flags])
    for workdir in {fields(command)["workdir"] for command in launched}:
        (Path(workdir) / "mark").touch()
    args = reproduce.parse(["sa-table2", *flags])
    table = reproduce.scaled(reproduce.TABLES["sa-table2"], args)
    row = next(row for row in table.rows if row.label == "CelebA DDPM, B")
    reproduce.run_row(table, row, args)
    assert (reproduce.workdir_of(row.model, args) / "mark").exists() == shared


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


def test_errors_of_one_sign_add_up_and_others_cancel(tmp_path):
    reproduce.main(["sa-figure1", f"--out={tmp_path / 'papers'}"])
    assert Image.open(tmp_path / "papers" / "sa-figure1.png").width > 500
    illustration = sys.modules["papers.illustration"]
    actual = illustration.trajectory(np.zeros(50))
    assert actual[-1] == pytest.approx(1.0)
    together, apart = (illustration.trajectory(0.1 * signs) - actual for signs in illustration.CASES.values())
    # The total gap of SA-DPM's Theorem 1, by its recursion.
    beta = np.linspace(1e-4, 0.02, 50) * 20
    a, gap = np.cumprod(1 - beta), 0.0
    for t in range(49, -1, -1):
        a_before = a[t - 1] if t else 1.0
        gap = (
            beta[t] / np.sqrt((1 - beta[t]) * (1 - a[t])) * 0.1
            + np.sqrt(1 - beta[t]) * (1 - a_before) / (1 - a[t]) * gap
        )
        assert together[50 - t] == pytest.approx(-gap)
    assert np.abs(together).mean() > 5 * np.abs(apart).mean()


def test_a_figure_makes_its_pictures(launched, tmp_path):
    reproduce.main(["s2-figure4", "--scale=digits", f"--out={tmp_path}"])
    pictures = [fields(command) for command in launched if "--mode=sample" in command]
    # DDIM through four models, PNDM, with nine evaluations more, through the first of them.
    assert [each["config.sample.nfe"] for each in pictures] == ["10", "20", "19", "29"]
    assert [each.get("config.sample.compare", "").count(",") for each in pictures] == [2, 2, 0, 0]
    assert pictures[2]["config.sample.sampler"] == "f_pndm"
    assert pictures[2]["workdir"] == pictures[0]["workdir"]


def test_mistakes_are_told(capsys):
    for argv, sentence in (
        (["s2-table9"], "s2-table9 is not a table or figure; choose one of s2-table1,"),
        (["s2-figure2"], "s2-figure2 cannot be reproduced: it is a drawing"),
        (["s2-table1", "--preset=theirs"], "--preset"),
        (["s2-table1", "--images=1"], "--images=1 is out of range"),
        (["s2-table1", "--steps=5"], "works with --scale=digits only"),
    ):
        with pytest.raises(SystemExit) as error:
            reproduce.main(argv)
        assert error.value.code == 2
        assert sentence in capsys.readouterr().err
    reproduce.main([])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(listed) == sorted([*EXPECTED, "s2-figure1", "s2-figure2"])
