"""Tables and figures of S²-DMs (Wang & Li, arXiv 2401.01520v1); columns are sampling steps, as there."""

from papers.types import DDIM, PNDM, Model, Table, TableRow

_S2_STEPS = (10, 20, 50, 100, 200, 500, 1000)


def _s2(dataset, skip=0, longer=False):
    steps = {"cifar10": (600_000, 800_000), "celeba64": (400_000, 600_000)}[dataset][longer]
    return Model(dataset, steps, skip)


def _s2_table(dataset, values):
    plain, longer, skip = _s2(dataset), _s2(dataset, longer=True), _s2(dataset, 10)
    rows = [("DDIMs¹", plain, DDIM), ("DDIMs²", longer, DDIM), ("S²-DMs(DDIMs)", skip, DDIM)]
    rows += [("PNDMs", plain, PNDM), ("S²-DMs(PNDMs)", skip, PNDM)]
    return tuple(
        TableRow(name, model, *sampler, reported) for (name, model, sampler), reported in zip(rows, values, strict=True)
    )


_S2_ABLATION = {
    "cifar10": {
        50: (8.01, 6.44, 6.86, 7.31, 7.65, 7.92, 8.19),
        10: (15.63, 9.88, 6.75, 5.61, 4.87, 4.30, 4.21),
        2: (17.92, 11.00, 7.34, 5.85, 5.06, 4.37, 4.26),
    },
    "celeba64": {
        50: (6.41, 3.99, 3.99, 4.73, 5.57, 6.34, 6.62),
        10: (11.97, 8.12, 5.29, 4.18, 3.65, 3.25, 3.13),
        2: (12.43, 8.73, 6.00, 4.80, 4.13, 3.77, 3.71),
    },
}

_S2_ABLATION_ROWS = tuple(
    TableRow(f"{dataset}, S²-DMs, skip {skip}", _s2(dataset, skip), *DDIM, values)
    for dataset, rows in _S2_ABLATION.items()
    for skip, values in rows.items()
)


def _s2_images(*cases):
    """Rows without reported values, from (dataset, skip, sampler)."""

    def label(skip, sampler):
        if skip:
            return f"S²-DMs, skip {skip}"
        return "PNDMs" if sampler == PNDM else "DDIMs"

    return tuple(
        TableRow(f"{dataset}, {label(skip, sampler)}", _s2(dataset, skip), *sampler) for dataset, skip, sampler in cases
    )


def _s2_compared(dataset):
    """The models of Figures 4 and 5."""
    cases = ((0, DDIM), (0, PNDM), (2, DDIM), (10, DDIM), (50, DDIM))
    return _s2_images(*((dataset, skip, sampler) for skip, sampler in cases))


_S2_SAMPLES = tuple(
    (dataset, skip, sampler)
    for dataset in ("cifar10", "celeba64")
    for skip, sampler in ((2, DDIM), (10, DDIM), (50, DDIM), (10, PNDM))
)

_FID_NOTE = (
    "The paper does not name its FID code, and DDIM's has none; the work that it cites for FID (Jolicoeur-Martineau "
    "et al. 2020) has pytorch-fid's, which the preset released uses. DDIM's code samples complete batches only, "
    "49,984 images for 50,000."
)

_PNDM_NOTE = (
    "The paper states neither which PNDM it uses nor how it counts steps. Here: F-PNDM with the corrected ᾱ, whose "
    "S steps cost S + 9 NFE; PNDM's published code cannot run 1,000 steps. " + _FID_NOTE
)

_ABLATION_NOTE = (
    "The column 400 is most likely 500 steps, which DDIM's code takes when 400 are requested: for skip 10 it repeats "
    "the column 500 of Tables 1 and 2. The preset released takes 500, paper 400. " + _FID_NOTE
)

_COMPARED_NOTE = (
    "The caption names no models: DDIM, PNDM and S²-DMs with growing skip are taken from the text. The noise is "
    "sampled here, so the paper's images cannot be matched one by one."
)

# Figures without numbers behind them, and why there is no command for them.
NOT_REPRODUCED = {
    "s2-figure1": "it is a drawing of the trajectories of DDPMs, DDIMs and S²-DMs, without data",
    "s2-figure2": "it is a drawing of states called asymmetric, symmetric and coordinated, without data",
}

TABLES = {
    "s2-table1": Table(
        "S²-DMs, Table 1: FID on CIFAR-10",
        "fid",
        _S2_STEPS,
        _s2_table(
            "cifar10",
            (
                (18.32, 11.67, 8.07, 6.33, 5.38, 4.59, 4.54),
                (18.18, 11.59, 7.94, 6.24, 5.25, 4.58, 4.46),
                (15.63, 9.88, 6.75, 5.61, 4.87, 4.30, 4.21),
                (13.67, 7.61, 4.87, 3.99, 3.67, 3.56, 3.42),
                (12.01, 6.54, 4.36, 3.77, 3.55, 3.43, 3.26),
            ),
        ),
        _PNDM_NOTE,
    ),
    "s2-table2": Table(
        "S²-DMs, Table 2: FID on CelebA 64",
        "fid",
        _S2_STEPS,
        _s2_table(
            "celeba64",
            (
                (13.15, 9.29, 6.40, 5.24, 4.58, 4.18, 4.07),
                (13.12, 9.25, 6.34, 4.63, 4.18, 4.15, 4.06),
                (11.97, 8.12, 5.29, 4.18, 3.65, 3.25, 3.13),
                (12.59, 8.72, 6.00, 4.89, 4.30, 4.12, 3.43),
                (11.40, 7.58, 4.94, 3.91, 3.38, 3.01, 2.94),
            ),
        ),
        _PNDM_NOTE,
    ),
    "s2-table3": Table(
        "S²-DMs, Table 3: seconds and memory per training step",
        "training",
        (),
        tuple(
            TableRow(f"{dataset}, {name}", _s2(dataset, skip), *DDIM, values)
            for dataset, name, skip, values in (
                ("cifar10", "DDIMs", 0, (0.0025, 4.83)),
                ("celeba64", "DDIMs", 0, (0.0048, 15.55)),
                ("cifar10", "S²-DMs", 10, (0.0031, 4.83)),
                ("celeba64", "S²-DMs", 10, (0.0056, 15.56)),
            )
        ),
        "The paper's seconds would require three times the peak rate of its two A100; its section 4 implies 0.144 s "
        "(CIFAR-10) and 0.432 s (CelebA). Its memory is that of one of two GPUs, with half of the batch of 128; "
        "the measured one is the peak of the device that used most, or of the process on a CPU, from metrics.jsonl.",
    ),
    "s2-table4": Table(
        "S²-DMs, Table 4: seconds for 50,000 samples",
        "sampling",
        (10, 20),
        (
            TableRow("cifar10, S²-DMs", _s2("cifar10", 10), *DDIM, (675, 1305)),
            TableRow("celeba64, S²-DMs", _s2("celeba64", 10), *DDIM, (1483, 2904)),
        ),
        "The measured seconds include compilation and feature extraction, on a device other than the paper's two A100, "
        "in batches of eval.batch_size, not of 10,000 and 2,000.",
    ),
    "s2-table5": Table(
        "S²-DMs, Table 5: FID with skips of 50, 10 and 2",
        "fid",
        (10, 20, 50, 100, 200, 400, 1000),
        _S2_ABLATION_ROWS,
        _ABLATION_NOTE,
    ),
    "s2-figure3": Table(
        "S²-DMs, Figure 3: Table 5 as curves",
        "curves",
        (10, 20, 50, 100, 200, 400, 1000),
        _S2_ABLATION_ROWS,
        _ABLATION_NOTE,
    ),
    "s2-figure4": Table(
        "S²-DMs, Figure 4: the same noise through several models, CIFAR-10",
        "compare",
        (10, 20, 50, 100),
        _s2_compared("cifar10"),
        _COMPARED_NOTE,
    ),
    "s2-figure5": Table(
        "S²-DMs, Figure 5: the same noise through several models, CelebA 64",
        "compare",
        (10, 20, 50, 100),
        _s2_compared("celeba64"),
        _COMPARED_NOTE,
    ),
    "s2-figure6": Table(
        "S²-DMs, Figure 6: interpolation between two noise images",
        "interpolation",
        (10,),
        _s2_images(*(("celeba64", skip, DDIM) for skip in (2, 10, 50))),
        "The caption states only the 10 steps. CelebA and the skips are taken from the text, the 11 images on a great "
        "circle from DDIM's code.",
    ),
    "s2-figure7": Table(
        "S²-DMs, Figure 7: 5 steps, CIFAR-10",
        "compare",
        (5,),
        _s2_images(("cifar10", 0, DDIM), ("cifar10", 50, DDIM)),
    ),
    "s2-figure8": Table(
        "S²-DMs, Figure 8: 5 steps, CelebA 64",
        "compare",
        (5,),
        _s2_images(("celeba64", 0, DDIM), ("celeba64", 50, DDIM)),
    ),
    **{
        f"s2-figure{number}": Table(
            f"S²-DMs, Figure {number}: samples in 10 steps",
            "grid",
            (10,),
            _s2_images(case),
            _PNDM_NOTE if case[2] == PNDM else "",
        )
        for number, case in enumerate(_S2_SAMPLES, 9)
    },
}
