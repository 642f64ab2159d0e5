"""What a trained model is worth: readers of its pictures and measures over them."""
