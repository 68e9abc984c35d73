"""What a trained model is worth: losses on text, what its layers do, and tasks of lm-evaluation-harness."""
