"""Networks.

Public: `network.Network`, `NETWORKS`; `unet.UNet`; `variance_head.VarianceHead`. `network` and the files of NETWORKS
import no jax.
"""
