"""Devices and processes: sharding, several hosts, compiler options, peak rates."""
