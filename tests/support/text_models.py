"""Tokenizers whose tokens straddle characters and tags, and a small model that writes with one of them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from grpo_fast.rollout import TransformersRollout
from support.tiny import VOCAB, tiny_model

# Pieces of tags and of the characters é (two bytes) and 😀 (four).
TAGS = ("<", "</", "/", "think", "answer", "an", "swer", ">", ">x", "swer>\n", "<think>", "<thin", "k>", "</think>")
PIECES = [piece.encode() for piece in [*TAGS, " ", "a", "b ", "\n", "1", "2", "3", "4", "5", "é", "xé"]]
PIECES += [b"\xc3", b"\xa9", b"\xa9>", b"\xf0\x9f", b"\x98", b"\x80", b"a\xf0\x9f\x98", b"\x80\n"]
PIECES += [b"6", b"7", b"8", b"9", b"0"]
STOPS = ("</answer>", "é>", "\n", "\U0001f600")


def tokenizer(pieces: list[bytes], byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    """Tokens: pad, </s> and the pieces; bytes are written as GPT-2 does, or as SentencePiece's ``<0xC3>``."""
    if byte_fallback:
        names = [f"<0x{p[0]:02X}>" if len(p) == 1 and p[0] > 127 else p.decode().replace(" ", "▁") for p in pieces]
        decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        known = dict(zip(range(256), _letters(), strict=True))
        names, decoder = ["".join(known[byte] for byte in piece) for piece in pieces], decoders.ByteLevel()
    vocabulary = {name: index for index, name in enumerate(["<pad>", "</s>", *names])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>", ignore_merges=True))
    core.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def _letters() -> list[str]:
    """GPT-2's letter for each byte."""
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shown = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    assert encode.pre_tokenize_str(" é")[0][0] == "".join(letters[byte] for byte in " é".encode())
    return [letters[byte] for byte in range(256)]


def rollout(config_class=LlamaConfig, max_tokens: int = 100_000, **overrides) -> TransformersRollout:
    """A model with random weights that writes such pieces."""
    assert len(PIECES) + 2 <= VOCAB
    pieces = PIECES + [b"(%d)" % index for index in range(VOCAB - 2 - len(PIECES))]
    model = tiny_model(torch.float32, config_class, tie_word_embeddings=False, **overrides)
    return TransformersRollout(model, tokenizer(pieces), max_tokens)
