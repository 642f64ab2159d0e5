"""Small changes to a loaded model: LoRA, read, merged, trained and saved."""
