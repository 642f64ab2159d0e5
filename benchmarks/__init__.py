"""Benchmarks of speed, memory and start-up, in `results/<what>_<hardware>_<date>.md` with the commit measured."""
