"""What a trained model is worth: losses on text, what its layers do, tasks of lm-evaluation-harness, BLEU."""
