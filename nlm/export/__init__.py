"""Models out of nlm and into it: Hugging Face folders, Megatron's layout, a plain state dict."""
