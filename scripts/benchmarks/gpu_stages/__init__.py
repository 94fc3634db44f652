"""The stages of `gpu.py`; each module has a table PARTS."""
