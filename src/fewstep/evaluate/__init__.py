"""Evaluation of trained models: generated images, metrics over them, and reports."""
