"""The published names and layouts of improved-diffusion's UNet, whose paths are ours; pure tables for `torch_names`."""

# Layers that are matrix products here, and how many axes of length 1 their kernels end with in PyTorch.
POINTWISE = {"qkv": 1, "proj_out": 1, "skip_connection": 2}
# In the order of the published state_dict.
_MODULES = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")
_PARTS = ("in_layers", "emb_layers", "out_layers", "skip_connection", "norm", "qkv", "proj_out", "op", "conv")
# The modules of a variance head in Extended-Analytic-DPM's state_dict of this network.
HEAD_MODULES = {"norm_out2": "out2.0", "conv_out2": "out2.2"}


def place(name: str) -> list[int]:
    """What sorts tensors' names in the order of the published state_dict."""
    module, *parts, leaf = name.split(".")
    numbers = [int(part) if part.isdigit() else _PARTS.index(part) for part in parts]
    return [_MODULES.index(module), *numbers, leaf == "bias"]
