"""A drafter of your own: what followed the last two tokens when they stood in the text before (Saxena 2023)."""

import torch

import hf_llmopt
from hf_llmopt import demo
from hf_llmopt.speculative import Draft
from hf_llmopt.speculative.drafter import place


class Lookup:
    """The contract is `hf_llmopt.speculative.Drafter`: three methods."""

    def propose(self, texts, limits, odds):
        """A draft for each text, at most as long as its limit; none is a guess too."""
        return [self._guess(text.tokens, limit) for text, limit in zip(texts, limits, strict=True)]

    def _guess(self, tokens, limit):
        for end in range(len(tokens) - 1, 1, -1):
            if tokens[end - 2 : end] == tokens[-2:]:
                guesses = tokens[end : end + limit]
                # Guesses with the same grounds are about equally often right: here those at the same place.
                return Draft(guesses, [place(index) for index in range(len(guesses))])
        return Draft([], [])

    def learn(self, text, start, draft, chosen):
        """What the model chose; a drafter that improves reads it."""

    def forget(self, text):
        """The request has ended; nothing was kept of it."""


hf_llmopt.register("drafter", "lookup", lambda model: Lookup())

if __name__ == "__main__":
    model, tokenizer = demo.load()
    code = "".join(
        f"def read_{name}(path):\n    with open(path) as file:\n        return file.read()\n\n\n" for name in "ab"
    )
    prompt = tokenizer(code + "def read_c(path):\n", return_tensors="pt")
    plain = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    ours = model.generate(**prompt, max_new_tokens=32, do_sample=False, llmopt={"speculative": "lookup"})
    stats = model.llmopt.stats
    assert stats.served_by == "llmopt"
    assert torch.equal(ours, plain), "whoever guesses, the tokens are the model's own"
    assert stats.accepted_tokens > 0
    print(f"{stats.accepted_tokens} of {stats.drafted_tokens} guesses right, {stats.steps} passes for 32 tokens")
