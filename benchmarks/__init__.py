"""Measurements: speed, memory and start-up, written to `results/<what>_<hardware>_<date>.md`; no tests."""
