"""`python -m hf_llmopt` is the command `hf-llmopt`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
