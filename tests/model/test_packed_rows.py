"""Packed rows, for every way to define where their sequences begin, with and without images."""

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening

from grpo_fast.errors import UserError
from grpo_fast.model import images, policy
from grpo_fast.model.policy import FusedPolicy
from support.architectures import IMAGE, MULTIMODAL, TEXT, VISION
from support.tiny import VOCAB, tiny_model

LENGTHS = (5, 3, 6)
OFFSETS = torch.tensor([0, 5, 8, 14])
GENERATOR = torch.Generator().manual_seed(5)
SEQUENCES = [torch.randint(2, VOCAB, (length,), generator=GENERATOR) for length in LENGTHS]
ROW = torch.cat(SEQUENCES)[None]
ONES = torch.ones_like(ROW)
RESTARTS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(LENGTHS))[None]
COLLATED = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
    [{"input_ids": sequence.tolist()} for sequence in SEQUENCES]
)
FLASH = {"cu_seq_lens_q": OFFSETS.int(), "cu_seq_lens_k": OFFSETS.int(), "max_length_q": 6, "max_length_k": 6}
DEFINITIONS = {
    "offsets": {"cu_seqlens": OFFSETS},
    "offsets and a mask of ones": {"cu_seqlens": OFFSETS, "attention_mask": ONES},
    "offsets and positions that continue": {"cu_seqlens": OFFSETS, "position_ids": torch.arange(14)[None]},
    "positions": {"position_ids": RESTARTS},
    "positions under a mask of ones": {"position_ids": RESTARTS, "attention_mask": ONES},
    "positions under a mask of true": {"position_ids": RESTARTS, "attention_mask": ONES.bool()},
    "numbers in the mask": {"attention_mask": NUMBERS},
    "numbers in a mask of floats": {"attention_mask": NUMBERS.float()},
    "numbers in the mask and positions": {"attention_mask": NUMBERS, "position_ids": RESTARTS},
    "flash attention's offsets": FLASH,
    "flash attention's offsets and positions": {**FLASH, "position_ids": RESTARTS},
    "a number for each token": {"seq_idx": NUMBERS.int() - 1},
    "all that transformers' collator makes": {
        name: value for name, value in COLLATED.items() if name not in ("input_ids", "labels")
    },
}


def plain(model, sequence, **inputs):
    """``[n - 1]`` from the model's own logits."""
    logits = model(input_ids=sequence[None], use_cache=False, **inputs).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, sequence[1:, None]).squeeze(1)


def gradients(model, logprobs):
    model.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_packed_row_equals_its_sequences(name):
    """Log-probabilities and every gradient, in float64, are those of plain logits of each sequence."""
    model = tiny_model()
    expected = torch.cat([plain(model, sequence) for sequence in SEQUENCES])
    expected_grads = gradients(model, expected)
    got = FusedPolicy(model)(ROW, **DEFINITIONS[name])
    starts = OFFSETS[1:-1] - 1
    assert not got[0, starts].any()
    got = got[0, [place for place in range(13) if place not in starts]]
    # Rotary embeddings are float32, so other positions with the same distances differ by more than float64 rounding.
    tolerance = 1e-6 if "continue" in name else 1e-10
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for key, grad in gradients(model, got).items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=100 * tolerance, atol=tolerance)


TWO = ROW.view(2, 7)
REFUSED = {
    "rows with restarts": (
        {"input_ids": TWO, "position_ids": RESTARTS.view(2, 7), "attention_mask": torch.ones_like(TWO)},
        r"packed input \(position_ids\) is one row \[1, T\], got 2 rows",
    ),
    "rows with numbers in the mask": (
        {"input_ids": TWO, "attention_mask": NUMBERS.view(2, 7)},
        r"packed input \(attention_mask\) is one row \[1, T\], got 2 rows",
    ),
    "rows with a number for each token": (
        {"input_ids": TWO, "seq_idx": NUMBERS.view(2, 7)},
        r"packed input \(seq_idx\) is one row \[1, T\], got 2 rows",
    ),
    "numbers and padding": (
        {"attention_mask": NUMBERS * (torch.arange(14) < 12)},
        r"packed input \(attention_mask\) has no padding",
    ),
    "restarts and padding": (
        {"position_ids": RESTARTS, "attention_mask": (torch.arange(14) < 12).long()[None]},
        r"packed input \(position_ids\) has no padding",
    ),
    "offsets and other restarts": (
        {"cu_seqlens": torch.tensor([0, 5, 14]), "position_ids": RESTARTS},
        r"cu_seqlens and position_ids do not agree on where sequences begin: \[\[0, 5, 14\], \[0, 5, 8, 14\]\]",
    ),
    "queries and keys": (
        {**FLASH, "cu_seq_lens_k": torch.tensor([0, 5, 14])},
        "cu_seq_lens_q and cu_seq_lens_k do not agree",
    ),
    "numbers and other offsets": ({"cu_seqlens": torch.tensor([0, 14]), "seq_idx": NUMBERS}, "do not agree"),
    "scattered numbers": (
        {"seq_idx": NUMBERS % 2},
        "seq_idx gives tokens that are not adjacent the same number",
    ),
    "numbers of another shape": ({"seq_idx": NUMBERS[0]}, r"seq_idx must be \[1, 14\], got \[14\]"),
    "wrong offsets": ({"cu_seq_lens_q": OFFSETS[:-1]}, r"cu_seq_lens_q must rise from 0 to 14.*got \[0, 5, 8\]"),
    "a shorter longest": ({**FLASH, "max_length_k": 5}, "max_length_k=5 is shorter than the longest sequence"),
    "a longest alone": ({"max_length_q": 6}, "max_length_q needs the sequences' offsets"),
    "axes": ({"position_ids": RESTARTS.expand(3, 1, -1)}, r"LlamaModel takes position_ids \[B, T\], got \[3, 1, 14\]"),
    "other axes": ({"position_ids": RESTARTS.expand(2, 1, -1)}, r"position_ids must be \[1, 14\].*got \[2, 1, 14\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_packed_rows_are_refused_in_one_line(name):
    arguments, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        FusedPolicy(tiny_model())(**{"input_ids": ROW, **arguments})
    assert "\n" not in str(error.value)


def test_padded_rows_are_not_mistaken_for_packed_ones():
    """Positions that restart after padding or skip some, and masks with one number per row, pack nothing."""
    model = tiny_model()
    ids = torch.randint(2, VOCAB, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 6:] = 0
    expected = FusedPolicy(model)(ids, mask)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    for inputs in ({"position_ids": positions}, {"seq_idx": torch.tensor([[0], [1]]).expand(2, 8)}):
        torch.testing.assert_close(FusedPolicy(model)(ids, mask, **inputs), expected)
    torch.testing.assert_close(FusedPolicy(model)(ids, mask * torch.tensor([[1], [2]])), expected)
    later = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9]])
    got = FusedPolicy(model)(ids[:1], torch.ones_like(later), position_ids=later)
    torch.testing.assert_close(got[0], plain(model, ids[0], position_ids=later, attention_mask=torch.ones_like(later)))


def image_model(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(CONFIGS[name]).eval()
    return model.to(dtype)


CONFIGS = {
    **MULTIMODAL,
    "Llava": transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(
            **VISION, num_hidden_layers=2, num_attention_heads=2, image_size=28, projection_dim=16
        ),
        image_token_index=IMAGE, image_seq_length=4, vision_feature_layer=-1,
    ),
}  # fmt: skip


def image_sequence(name, length, seed):
    """A sequence with one image of four tokens, and its other inputs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 250, (length,), generator=generator)
    ids[2], ids[3:7] = 256, IMAGE
    if name == "Qwen2.5-VL":
        pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=generator, dtype=torch.float64)
        kinds = (ids == IMAGE).int()[None]
        return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}
    inputs = {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator, dtype=torch.float64)}
    return ids, inputs | ({"token_type_ids": (ids == IMAGE).long()[None]} if name == "Gemma 3" else {})


def packed_images(name):
    """Three sequences, of which the last has no image; their row, and the row's inputs."""
    parts = [image_sequence(name, 12, 1), image_sequence(name, 10, 2)]
    text = torch.randint(2, 250, (6,))
    inputs = {
        key: torch.cat([part[key] for _, part in parts], dim=1 if "token_type_ids" in key else 0) for key in parts[0][1]
    }
    for key in inputs:
        if "token_type_ids" in key:
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, 6))
    parts.append((text, {}))
    return parts, torch.cat([ids for ids, _ in parts])[None], inputs


@pytest.mark.parametrize("given", ["offsets", "positions", "positions with the text's"])
@pytest.mark.parametrize("name", ["Llava", "Qwen2.5-VL"])
def test_packed_images_equal_their_sequences(name, given):
    """For models that attend images like text; including the vision tower's gradients."""
    model = image_model(name)
    parts, row, inputs = packed_images(name)
    scored = [plain(model, ids, **part) for ids, part in parts]
    expected, starts = torch.cat(scored), [12, 22]
    expected_grads = gradients(model, expected)
    if given == "offsets":
        inputs["cu_seqlens"] = torch.tensor([0, 12, 22, 28])
    else:
        positions = torch.cat([torch.arange(len(ids)) for ids, _ in parts])[None]
        if name == "Qwen2.5-VL":
            axes = [model.model.get_rope_index(ids[None], **part)[0] for ids, part in parts[:2]]
            axes.append(torch.arange(6).expand(3, 1, 6))
            whole = torch.cat(axes, 2)
            positions = whole if given == "positions" else torch.cat([positions[None], whole])
        inputs["position_ids"] = positions
    got = FusedPolicy(model)(row, **inputs)[0]
    got = got[[place for place in range(27) if place + 1 not in starts]]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    found = gradients(model, got)
    assert found.keys() == expected_grads.keys()
    assert any("vision" in key or "visual" in key for key in found)
    for key, grad in expected_grads.items():
        assert (found[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-8, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_images_with_attention_in_both_directions_are_refused(dtype):
    """Gemma 3's, also in 16 bits, where the difference is small. Separate rows are supported."""
    model = image_model("Gemma 3", dtype)
    _, row, inputs = packed_images("Gemma 3")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    policy = FusedPolicy(model)
    # A packed row of text is supported, and is compared first.
    policy(row[:, -6:], cu_seqlens=torch.tensor([0, 2, 6]))
    for _ in range(2):
        message = (
            "packed input with pixel_values, token_type_ids is not possible with Gemma3.*pad instead: .*looks ahead"
        )
        with pytest.raises(UserError, match=message) as error:
            policy(row, cu_seqlens=torch.tensor([0, 12, 22, 28]), **inputs)
        assert "\n" not in str(error.value)


def test_check_of_packed_images_detects_wrong_positions(monkeypatch):
    model = image_model("Qwen2.5-VL", torch.float32)
    _, row, inputs = packed_images("Qwen2.5-VL")
    inputs["pixel_values"] = inputs["pixel_values"].float()
    right = images.image_positions
    monkeypatch.setattr(policy, "image_positions", lambda *arguments: 2 * right(*arguments))
    with pytest.raises(
        UserError, match=r"packed input with image_grid_thw, .* differ by .* from those of separate rows"
    ):
        FusedPolicy(model)(row, cu_seqlens=torch.tensor([0, 12, 22, 28]), **inputs)


def test_image_placeholders_outside_the_vocabulary():
    """Gemma 3's config may put them there; without images they are refused like any id outside."""
    config = transformers.Gemma3Config(**{**MULTIMODAL["Gemma 3"].to_dict(), "image_token_index": 300})
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    ids, inputs = image_sequence("Gemma 3", 12, 1)
    ids[ids == IMAGE] = 300
    inputs["pixel_values"] = inputs["pixel_values"].float()
    got = FusedPolicy(model)(ids[None], logits_to_keep=4, **inputs)
    logits = model(input_ids=ids[None], **inputs).logits[0, -5:-1]
    torch.testing.assert_close(got[0], logits.log_softmax(-1).gather(1, ids[-4:, None]).squeeze(1))
    with pytest.raises(UserError, match="input_ids holds 300; allowed are token ids from 0 to 258"):
        FusedPolicy(model)(ids[None], logits_to_keep=4)
