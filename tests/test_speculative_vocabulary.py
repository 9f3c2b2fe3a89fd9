"""Draft models with another tokenizer: the tokens of plain decoding, and guesses as good as with the same one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from architectures import build
from test_speculative_drafts import drafted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_llmopt import SpeculativeConfig, demo
from hf_llmopt.errors import InvalidOption
from hf_llmopt.speculative import Reading, Translation
from hf_llmopt.speculative.vocabulary import LONGEST

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
PROMPTS = ("import os\nimport sys\n", "def main(args):\n    for", "class Stack:\n")
pytestmark = pytest.mark.usefixtures("cheap_guesses")


def fast(model, trainer, pre_tokenizer, decoder, texts: Iterable[str], **special) -> PreTrainedTokenizerFast:
    """A tokenizer that is trained on some texts."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Modules of the standard library."""
    return [path.read_text("utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]


@pytest.fixture(scope="module")
def tokenizers(texts) -> dict[str, PreTrainedTokenizerFast]:
    """Three kinds: pieces of bytes, pieces of characters with a sign for the blank, and words."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "bytes": fast(
            models.BPE(),
            trainers.BpeTrainer(
                vocab_size=420,
                special_tokens=["<s>", "</s>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
            texts,
            eos_token="</s>",
            pad_token="<s>",
        ),
        "characters": fast(
            models.BPE(unk_token="<unk>", byte_fallback=True),
            trainers.BpeTrainer(vocab_size=640, special_tokens=["<unk>", "</end>", *bytes_], show_progress=False),
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            ),
            texts,
            eos_token="</end>",
            unk_token="<unk>",
            pad_token="<unk>",
        ),
        "words": fast(
            models.WordLevel(unk_token="<unk>"),
            trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False),
            pre_tokenizers.Whitespace(),
            decoders.WordPiece("##"),
            texts,
            unk_token="<unk>",
        ),
    }


@pytest.fixture(scope="module")
def permuted():
    """The embedded draft model, and its tokenizer, with the same tokens in another order."""
    draft, tokenizer = demo.load(draft=True)
    order = torch.cat([torch.arange(2), 2 + torch.randperm(len(tokenizer) - 2)])
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["vocab"] = {text: int(order[token]) for text, token in described["model"]["vocab"].items()}
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token=tokenizer.eos_token
    )
    model = copy.deepcopy(draft)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getattr(model, name)().weight.data[order] = getattr(draft, name)().weight.data
    return model, own


def run(model, inputs, llmopt, count=24, **kwargs):
    torch.manual_seed(7)
    output = model.generate(**inputs, llmopt=llmopt, max_new_tokens=count, pad_token_id=0, **kwargs)
    return output.tolist(), float(torch.rand(()))


def test_a_permuted_vocabulary_guesses_as_well(permuted):
    """Both vocabularies have the same size: what is noticed is that the tokenizers differ."""
    model, tokenizer = demo.load()
    other, draft_tokenizer = permuted
    inputs = tokenizer(demo.PROMPTS[4], return_tensors="pt")
    expected = [run(model, inputs, None, 40, **arguments) for arguments in (GREEDY, SAMPLED)]
    right = []
    for options in (
        {"draft_model": demo.load(draft=True)[0]},
        {"draft_model": other, "tokenizer": tokenizer, "draft_tokenizer": draft_tokenizer},
        {"draft_model": other},
    ):
        config, accepted = {"speculative": {"num_tokens": 4, **options}}, 0
        for arguments, tokens in zip((GREEDY, SAMPLED), expected, strict=True):
            assert run(model, inputs, config, 40, **arguments) == tokens
            accepted += drafted(model).accepted_tokens
        right.append(accepted)
    same, translated, blind = right
    assert same > 20
    assert translated > 0.9 * same
    assert blind < 0.3 * same


@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kinds", [("bytes", "characters"), ("characters", "bytes"), ("bytes", "words")], ids="-".join)
def test_any_tokenizer_gives_the_tokens_of_plain_decoding(tokenizers, kinds, rows, arguments):
    own, theirs = (tokenizers[kind] for kind in kinds)
    model = build("llama", vocab_size=len(own))
    draft = build("llama", vocab_size=len(theirs) + 3, seed=5)  # logits may be padded
    before = copy.deepcopy(draft.state_dict()), draft.generation_config.to_dict(), repr(draft)
    inputs = own(list(PROMPTS[:rows]), return_tensors="pt", padding=True)
    expected = run(model, inputs, None, **arguments)
    assistant = {"assistant_model": draft, "tokenizer": own, "assistant_tokenizer": theirs}
    config = {"speculative": {"num_tokens": 3}}
    assert run(model, inputs, config, **arguments, **assistant) == expected
    drafted(model)
    assert model.llmopt.engine.config.speculative.draft_tokenizer is theirs
    assert (draft.generation_config.to_dict(), repr(draft)) == before[1:], "the assistant is as it was"
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in draft.state_dict().items())


def test_padded_logits_and_one_tokenizer(tokenizers):
    """The sizes of a family's models differ, their tokenizers do not: each guess is one of a model for itself."""
    own = tokenizers["bytes"]
    model = build("llama", vocab_size=len(own))
    draft = copy.deepcopy(model)
    draft.resize_token_embeddings(len(own) + 12)
    draft.lm_head.weight.data[len(own) :] = 9.0
    inputs = own(PROMPTS[1], return_tensors="pt")
    expected = run(model, inputs, None, **SAMPLED)
    options = {"draft_model": draft, "tokenizer": own, "draft_tokenizer": own, "num_tokens": 1}
    assert run(model, inputs, {"speculative": options}, **SAMPLED) == expected
    drafted(model)
    with pytest.raises(InvalidOption, match=r"knows 432 tokens, the model 420: .*Give both tokenizers"):
        run(model, inputs, {"speculative": {"draft_model": draft}})


@pytest.mark.parametrize("kind", ["bytes", "characters", "words"])
def test_a_growing_text_is_what_it_is_as_a_whole_and_each_step_reads_little(tokenizers, texts, kind):
    """Also where other signs stand between, some of them cut in two by the tokens."""
    own, theirs = demo.load(draft=True)[1], tokenizers[kind]
    translation = Translation(own, theirs, (len(own), len(theirs)))
    tokens = own.encode(texts[0][:1500] + "año größer 漢字 = 1  # 🙂\n" + texts[1][:1500], verbose=False)
    reading, found, sizes = Reading(translation), [], []
    encode = translation.encode
    translation.encode = lambda tokens, start: sizes.append(len(tokens) - start) or encode(tokens, start)
    for end in range(5, len(tokens) + 1, 3):
        kept, following = reading.extend(tokens[:end])
        found[kept:] = following
    assert found == encode(tokens[:end], 0)
    assert max(sizes) <= LONGEST + 3
    assert len(found) > 300


def test_what_two_vocabularies_share(tokenizers):
    own, theirs = tokenizers["bytes"], tokenizers["characters"]
    translation = Translation(own, theirs, (len(own), len(theirs)))
    logits = torch.randn(len(theirs))
    found = translation.logits(logits)
    assert found.shape == (len(own),)
    alike = 0
    for text in (" self", "self", " the", "ing", "(", "a", "=", " s", "in", "er"):
        cut = [
            (each.encode("x", add_special_tokens=False), each.encode("x" + text, add_special_tokens=False))
            for each in (own, theirs)
        ]
        if all(before == after[:-1] for before, after in cut):
            token, their = (after[-1] for _, after in cut)
            alike += len(text)
            assert found[token] == logits[their], text
            assert translation.token(token) == their
    assert alike > 8
    assert found[own.convert_tokens_to_ids("Ċ")] == logits[theirs.encode("x\n")[-1]], "signs differ"
    assert found[own.eos_token_id] == logits[theirs.eos_token_id], "whatever the end is called"
    alone = set(range(len(own))) - set(translation._token)
    assert alone
    assert all(found[token] == -float("inf") for token in alone)
    assert translation.encode([own.pad_token_id], 0) == [0], "a text that means nothing to the draft model"


def test_tokenizers_that_do_not_fit_are_refused(tokenizers):
    own, theirs = tokenizers["bytes"], tokenizers["characters"]
    model, draft = build("llama", vocab_size=len(own)), build("llama", vocab_size=len(theirs))
    inputs = own(PROMPTS[0], return_tensors="pt")

    def asked(**options):
        run(model, inputs, {"speculative": {"draft_model": draft, **options}})

    with pytest.raises(InvalidOption, match=r"tokenizer has 640 tokens and its model 420: it belongs to another"):
        asked(tokenizer=theirs, draft_tokenizer=own)
    signs = fast(
        models.WordLevel(unk_token="?"),
        trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False),
        pre_tokenizers.Whitespace(),
        decoders.WordPiece("##"),
        ["".join(chr(0x4E00 + i) + " " for i in range(400))],
        unk_token="?",
    )
    with pytest.raises(InvalidOption, match=r"tokens in common, of \d+ and \d+: nothing could be guessed"):
        asked(tokenizer=own, draft_tokenizer=signs)
    with pytest.raises(InvalidOption, match="come together, and with draft_model="):
        asked(tokenizer=own)
    with pytest.raises(InvalidOption, match="come together, and with draft_model="):
        SpeculativeConfig(tokenizer=own, draft_tokenizer=theirs)
    with pytest.raises(InvalidOption, match="draft_tokenizer is a tokenizer or its name, got int"):
        SpeculativeConfig(draft_model=draft, tokenizer=own, draft_tokenizer=3)


def test_tokenizers_by_name(tokenizers, tmp_path):
    own, theirs = tokenizers["bytes"], tokenizers["characters"]
    model, draft = build("llama", vocab_size=len(own)), build("llama", vocab_size=len(theirs))
    for name, each in (("own", own), ("theirs", theirs)):
        each.save_pretrained(tmp_path / name)
    inputs = own(PROMPTS[2], return_tensors="pt")
    names = {"tokenizer": str(tmp_path / "own"), "draft_tokenizer": str(tmp_path / "theirs")}
    config = {"speculative": {"draft_model": draft, "num_tokens": 3, **names}}
    assert run(model, inputs, config, **GREEDY) == run(model, inputs, None, **GREEDY)
    drafted(model)
