"""Pretrained weights and tokenizers in."""

import os

# transformers gives us tokenizers; it would complain at every start that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
