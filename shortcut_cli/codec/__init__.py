"""The streaming codecs under the audio tokenizer."""
