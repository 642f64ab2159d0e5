"""Distillation: smaller students, and students of fewer steps, made from a trained model."""
