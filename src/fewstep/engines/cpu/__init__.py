"""The engine for CPUs: the same arithmetic, exact up to rounding, in fewer operations."""
