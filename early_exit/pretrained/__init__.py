"""Pretrained weights and tokenizers in."""
