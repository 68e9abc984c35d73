"""What a trained model writes: a search over next tokens, texts that go on, translations."""
