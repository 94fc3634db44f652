"""Checks of a UNet's resolution levels; imports no jax."""

from s2dm_jax.models.network import NORM_GROUPS


def check_levels(resolution: int, ch: int, ch_mult: tuple[int, ...], attn_resolutions: tuple[int, ...]) -> None:
    """Raises a ValueError that begins with a field's name unless the fields of a UNet fit together.

    Args:
      resolution: height and width of the images in pixels.
      ch: channels of the first resolution level.
      ch_mult: channels of each resolution level as multiples of `ch`; the resolution halves between levels.
      attn_resolutions: resolutions whose blocks are followed by self-attention.
    """
    halvings = len(ch_mult) - 1
    if ch % NORM_GROUPS:
        raise ValueError(f"ch={ch} must be a multiple of {NORM_GROUPS}, the groups of the norms")
    if resolution % 2**halvings:
        raise ValueError(
            f"ch_mult={ch_mult} halves images of {resolution} pixels {halvings} times, which does not divide evenly; "
            "give fewer resolution levels"
        )
    resolutions = [resolution >> i for i in range(len(ch_mult))]
    for attn in attn_resolutions:
        if attn not in resolutions:
            raise ValueError(
                f"attn_resolutions={attn_resolutions} names {attn}, which never occurs; this model's resolutions are "
                f"{', '.join(map(str, resolutions))}"
            )
