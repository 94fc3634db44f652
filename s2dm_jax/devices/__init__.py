"""Devices and processes: sharding, several hosts, peak rates and compiler options."""
