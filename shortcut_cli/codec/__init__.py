"""The streaming codecs behind the audio tokenizer, and their training."""
