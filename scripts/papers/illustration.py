"""SA-DPM's Figure 1: sampling in one dimension with errors of one size that add up over the timesteps, or cancel."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Few timesteps, so that each can be seen: betas of the linear schedule for T = 50.
_T = 50
_BETA = np.linspace(1e-4, 0.02, _T) * 1000 / _T
_X_0, _X_T, _ERROR = 1.0, -1.5, 0.15
CASES = {
    "(a) errors of one sign": np.ones(_T),
    "(b) errors that cancel their neighbours'": (-1.0) ** np.arange(_T),
}


def trajectory(errors: np.ndarray) -> np.ndarray:
    """x_T … x_0 [T + 1] by the posterior's mean (SA-DPM, eq. 2), where the network is wrong by `errors` [T]."""
    alpha_bar = np.cumprod(1 - _BETA)
    before = np.append(1.0, alpha_bar[:-1])
    gamma_1 = np.sqrt(before) * _BETA / (1 - alpha_bar)
    gamma_2 = np.sqrt(1 - _BETA) * (1 - before) / (1 - alpha_bar)
    x = [_X_T]
    for t in reversed(range(_T)):
        # With the noise that is really in x_t the prediction is x_0; an error of the network moves it.
        predicted = _X_0 - np.sqrt((1 - alpha_bar[t]) / alpha_bar[t]) * errors[t]
        x.append(gamma_1[t] * predicted + gamma_2[t] * x[-1])
    return np.array(x)


def plot_illustration() -> "Figure":
    """Plots the actual and the predicted trajectory of both cases, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    steps, actual = np.arange(_T, -1, -1), trajectory(np.zeros(_T))
    for axes, (title, signs) in zip(figure.subplots(1, 2, sharey=True), CASES.items(), strict=True):
        predicted = trajectory(_ERROR * signs)
        axes.plot(steps, actual, color="black", label="actual")
        axes.plot(steps, predicted, color="tab:red", label="predicted")
        axes.fill_between(steps, actual, predicted, color="tab:red", alpha=0.2, label="cumulative error")
        axes.set(title=title, xlabel="timestep", xlim=(_T, 0))
        axes.legend()
    return figure
