"""What a trained model is worth: validation loss, and the text that it writes."""
