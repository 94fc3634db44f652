"""Networks.

Public: `network.Network`, `NETWORKS`; `unet.UNet`; `improved_unet.ImprovedUNet`; `variance_head.VarianceHead`.
`network` and the files of NETWORKS import no jax.
"""
