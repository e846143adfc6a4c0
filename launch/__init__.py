"""Commands: one module each, `python -m launch.<command> --help`."""

import os

# transformers is used for tokenizers and would complain that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
