"""A trained run as a `Model` to sample from."""

import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path, why_not_writable
from s2dm_jax.config.build import build_schedule
from s2dm_jax.config.ema import parse_choice
from s2dm_jax.data.datasets import load_dataset, saturation_at_hand
from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.inference import noise_statistics
from s2dm_jax.inference.noise_statistics import statistics_folder
from s2dm_jax.inference.sampler import CompiledSampler, configure_sampler, sample_batches, sampler_options
from s2dm_jax.inference.saturation import Ends, Fault, Report, ends_of, fault_of, sampling_in_words, warn
from s2dm_jax.models.network import Network
from s2dm_jax.models.variance_head import Head
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS, sampler_name
from s2dm_jax.samplers.timesteps import split_timestep_spec, unvisited_note
from s2dm_jax.workdir.folder import check_same_images
from s2dm_jax.workdir.load import load_run


class Model(NamedTuple):
    """A trained run to sample from: `model = s2dm_jax.load("runs/digits"); images = model.sample(64)`.

    Attributes:
      config: the run's config.
      network, schedule: the network and the forward process.
      ema_params: the EMA of the weights, corrected for its start if that matters (`workdir.ema.sampling_ema`).
      step: number of training steps.
      ms_eps: float [T], Analytic-DPM's statistic, or None if it has not been estimated.
      variance_head: of SN- or NPR-DPM, or None.
      ema_note: a sentence if the EMA differs from the checkpoint's, else "".
      saturation: share of the values of real images that are 0 or 255, or None if it is not recorded.
      ema: which weights `ema_params`, or the variance head's, are, as in `config.sample.ema`; "" is the run's EMA.
    """

    config: ConfigDict
    network: Network
    schedule: NoiseSchedule
    ema_params: dict
    step: int
    ms_eps: np.ndarray | None = None
    variance_head: Head | None = None
    ema_note: str = ""
    saturation: float | None = None
    ema: str = ""

    @property
    def weights(self) -> str:
        """The weights sampled from, in words: "EMA" or "EMA sigma_rel=0.1"."""
        return parse_choice(self.ema).words

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.network.image_shape

    def sampler(self, sampler: str = "ddim", **options: Any) -> tuple[CompiledSampler, np.ndarray]:
        """`configure_sampler` for this model: a compiled function that gives uint8 images [B, H, W, C], and the
        timesteps int32 [S] to call it with.
        """
        return configure_sampler(
            self.network, self.schedule, sampler, ms_eps=self.ms_eps, head=self.variance_head, **options
        )

    def sample(
        self,
        n: int,
        sampler: str = "ddim",
        *,
        nfe: int = 0,
        seed: int = 0,
        batch_size: int = 500,
        report: Report = warn,
        **options: Any,
    ) -> np.ndarray:
        """Images 0 … n−1 of a seed, uint8 [n, H, W, C].

        Args:
          n: number of images.
          sampler: one of `specs.SAMPLERS`.
          nfe: network evaluations; by default 10, unless steps or timesteps are given.
          seed: of the noise.
          batch_size: images per batch.
          report: is called if the images are nonsense (`saturation.fault_of`); by default it warns.
          **options: as for `configure_sampler`: steps, timestep_spacing, timesteps, eta, skip_scale, and the sampler's
            own options.

        Raises:
          ValueError: for an unknown sampler, and for values that are not allowed or contradict one another.
        """
        sample_fn, timesteps = self.sampler(sampler, nfe=nfe, **options)
        counts: list[np.ndarray] = []
        where = sample_fn, self.ema_params, timesteps
        batches = sample_batches(*where, seed=seed, num_images=n, batch_size=batch_size, counts=counts)
        images = np.concatenate(list(batches))
        if fault := self.fault_of(ends_of(counts, self.image_shape), sampler, nfe=nfe, **options):
            report(fault)
        return images

    def batches(self, sample: ConfigDict, progress: bool = True, report: Report = warn) -> Iterator[np.ndarray]:
        """The images that a config's group `sample` describes, batch by batch: uint8 [B, H, W, C].

        After the last batch `report` is called if the images are nonsense.
        """
        counts: list[np.ndarray] = []
        options = sampler_options(sample)
        sample_fn, timesteps = self.sampler(**options)
        yield from sample_batches(
            sample_fn,
            self.ema_params,
            timesteps,
            seed=sample.seed,
            num_images=sample.num_images,
            batch_size=sample.batch_size,
            progress=progress,
            counts=counts,
        )
        if fault := self.fault_of(ends_of(counts, self.image_shape), **options):
            report(fault)

    def fault_of(self, ends: Ends, sampler: str = "ddim", **options: Any) -> Fault | None:
        """`saturation.fault_of` the images that `sampler` with these options made."""
        diffusion, dtype = self.config.diffusion, self.network.dtype
        words = sampling_in_words(self.schedule.log_snr, diffusion.schedule, dtype, sampler, **options)
        return fault_of(ends, self.real_saturation, *words)

    def unvisited_note(self, sampler: str = "ddim", **options: Any) -> str:
        """One sentence if `sampler` with these options leaves the last timesteps out (`min_log_snr`), else ""."""
        spec, others = split_timestep_spec(options)
        own = {name: value for name, value in others.items() if name in ("eta", *OPTIONS) and value is not None}
        return unvisited_note(self.schedule.T, sampler_name(sampler), spec, self.schedule.log_snr, **own)

    def real_saturation(self) -> float | None:
        """The share of the values of real images that are 0 or 255: recorded or counted; None if no images are
        available.
        """
        return saturation_at_hand(self.config) if self.saturation is None else self.saturation

    def with_noise_statistics(
        self, workdir: str | os.PathLike, sampler: str, count: int, batch_size: int, out: str | os.PathLike = ""
    ) -> "Model":
        """The model with Analytic-DPM's statistic if `sampler` requires it, over `count` training images per
        timestep: the one cached in `workdir` or `out`, or estimated now, and cached in `out` if `workdir` cannot be
        written to.
        """
        if SAMPLERS[sampler].requires != "ms_eps":
            return self
        folder, statistic = statistics_folder(workdir), None
        if out and (reason := why_not_writable(folder)):
            statistic = noise_statistics.load_cached(self.schedule, self.ema_params, folder, count)
            print(
                f"{folder} cannot be written to ({reason}); the statistic is cached in {out} instead", file=sys.stderr
            )
            folder = statistics_folder(out)
        statistic = statistic or noise_statistics.load_cached(self.schedule, self.ema_params, folder, count)
        if statistic is None:
            print(f"estimating the mean square of ε at {self.schedule.T:,} timesteps, {count:,} images …")
            data = load_dataset(self.config)
            check_same_images(workdir, data.digest, data.labels_digest, record=False)
            images = data.train
            if len(images) < 2:
                raise UserError(
                    f"sampler={sampler!r} needs a statistic over at least 2 training images, and {workdir} has "
                    f"{len(images)}; choose another sampler, such as ddim"
                )
            statistic = noise_statistics.estimate_noise_statistics(
                self.network, self.schedule, self.ema_params, images, folder, num_images=count, batch_size=batch_size
            )
        worst = np.max(statistic.standard_error)
        print(f"ms_eps   {statistic.num_images:,} images per timestep, standard error at most {worst:.1e}")
        return self._replace(ms_eps=statistic.ms_eps)


def load(
    workdir: str | os.PathLike, step: int | None = None, *, network: Network | None = None, ema: str = ""
) -> Model:
    """The newest checkpoint of the run in `workdir` that verifies, or that of one step, to sample from.

    Args:
      workdir: folder of a run, or the file of an exported sampler, whose weights any sampler can use.
      step: of the checkpoint; None for the newest.
      network: what was trained, if that is not the network that the run's config names.
      ema: the weights to sample from, as in `config.sample.ema`: "" for the run's EMA, "weights", "0.999",
        "sigma_rel=0.1".

    Raises:
      errors.UserError: if the folder holds no run, no such checkpoint that is complete, or no such EMA.
    """
    workdir = user_path(workdir, "workdir")
    run = load_run(workdir, step, network=network, ema=ema)
    schedule = build_schedule(run.config)
    statistic = noise_statistics.load_cached(schedule, run.ema_params, statistics_folder(workdir))
    ms_eps = statistic and statistic.ms_eps
    notes = run.ema_note, run.saturation, run.ema
    return Model(run.config, run.network, schedule, run.ema_params, run.step, ms_eps, run.variance_head, *notes)
