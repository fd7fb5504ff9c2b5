"""Gemma 3 with images against transformers: small random models, and what makes pixels of images."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.processing_utils import ProcessorMixin

from pace.cache import CACHES
from pace.errors import ModelError
from pace.models import images_of, open_checkpoint
from pace.models.config import Config
from pace.models.gemma3 import Gemma3
from pace.models.siglip import DEFAULTS
from pace.ops import OperatorConfig

from . import parity
from .parity import assert_near, drawn, errors, greedy, load, run
from .test_gemma3 import BASE, GemmaFamily, rewrite
from .test_llama import make as make_llama

BEGIN, TOKEN, END = 94, 95, 96
PER_IMAGE = 9
# Heads of 18, patches of 5 × 5 and 6 to a side, of which 2 × 2 become a token; the image has a row too many.
VISION = {
    "hidden_size": 54,
    "intermediate_size": 77,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 31,
    "patch_size": 5,
    "vision_use_head": False,
}
TOKENS = {
    "mm_tokens_per_image": PER_IMAGE,
    "image_token_index": TOKEN,
    "boi_token_index": BEGIN,
    "eoi_token_index": END,
}


class SeeingFamily(GemmaFamily):
    def make(self, changes=(), dtype=torch.float32):
        changes = dict(changes)
        text = parity.BASE | BASE | changes.pop("text", {})
        vision = VISION | changes.pop("vision", {})
        return self.random(Gemma3Config(text_config=text, vision_config=vision, **(TOKENS | changes)), dtype)

    def with_rope(self, peer):
        """And with a projection, which transformers makes of zeros."""
        projection = peer.model.multi_modal_projector.mm_input_projection_weight
        if not projection.any():
            drawn = torch.randn(projection.shape, generator=torch.Generator().manual_seed(1)) * 0.15
            projection.data.copy_(drawn.to(torch.bfloat16))
        return super().with_rope(peer)


SEEING = SeeingFamily(
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    layers=lambda peer: peer.model.language_model.layers,
    rotary=lambda peer: peer.model.language_model,
)
CASES = {
    "plain": {},
    "untied_all_local": {
        "tie_word_embeddings": False,
        "text": {"tie_word_embeddings": False, "layer_types": ["sliding_attention"] * 3, "sliding_window": PER_IMAGE},
        "vision": {"num_attention_heads": 1, "vision_use_head": True},
    },
    "an_image_is_a_token": {"mm_tokens_per_image": 1, "vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-3}},
}
named = pytest.mark.parametrize("case", CASES)


class Prompt:
    """Text with images, and those."""

    def __init__(self, *parts, per_image=PER_IMAGE, seed=0):
        """parts: numbers of tokens of text; None where an image stands."""
        self.tokens, self.spans = [], []
        for part in parts:
            text = drawn(part, BEGIN, seed + len(self.tokens)) if part is not None else [BEGIN]
            self._add(text, (0, 0))
            if part is None:
                self._add([TOKEN] * per_image, (len(self.tokens), len(self.tokens) + per_image))
                self._add([END], (0, 0))
        generator = np.random.default_rng(seed)
        self.pixels = generator.uniform(-1, 1, (parts.count(None), 3, 31, 31)).astype(np.float32)

    def _add(self, tokens, span):
        self.tokens += tokens
        self.spans += [span] * len(tokens)


# Images in the beginning, at the end, side by side, alone.
PROMPTS = [Prompt(40, None, 50), Prompt(None, 30, None, 1, None, 25), Prompt(20, None, None, seed=3), Prompt(None)]


def prompts(case):
    per_image = CASES[case].get("mm_tokens_per_image", PER_IMAGE)
    return [Prompt(40, None, 50, per_image=per_image)] if per_image != PER_IMAGE else PROMPTS


def shown(model, prompt):
    """The model, whose sequences begin with this prompt."""
    rows = np.concatenate(model.encode_images(prompt.pixels))
    spans, forward = np.array(prompt.spans, np.int32), model.forward
    seen_at = np.flatnonzero(spans[:, 1])

    def forward_with_images(tokens, placement, cache):
        inside = placement.positions < len(spans)
        own = np.zeros((len(tokens), 2), np.int32)
        own[inside] = spans[placement.positions[inside]]
        here = np.flatnonzero(own[:, 1]).astype(np.int32)
        values = rows[np.searchsorted(seen_at, placement.positions[here])]
        return forward(tokens, replace(placement, spans=own), cache, seen=(here, values) if len(here) else None)

    model.forward = forward_with_images
    return model


class ShownPeer:
    """transformers' model with the images of a prompt."""

    def __init__(self, peer, prompt):
        self.peer, self.model = peer, peer.model
        self.pixels = torch.from_numpy(prompt.pixels)

    def __call__(self, ids, **options):
        return self.peer(ids, pixel_values=self.pixels, token_type_ids=(ids == TOKEN).long(), **options)

    def generate(self, ids, **options):
        return self.peer.generate(ids, pixel_values=self.pixels, token_type_ids=(ids == TOKEN).long(), **options)


@torch.no_grad()
def peer_rows(peer, pixels):
    return peer.get_image_features(torch.from_numpy(pixels)).pooler_output.float().numpy()


@named
def test_rows_of_images(case, tmp_path, rung):
    peer = SEEING.make(CASES[case])
    parity.save(tmp_path, peer)
    model = load(tmp_path)
    pixels = PROMPTS[1].pixels
    rows = model.encode_images(pixels)
    assert rows.dtype == model.dtype
    assert_near(rows, peer_rows(peer, pixels))
    for image, expected in zip(pixels, rows, strict=True):
        assert np.array_equal(model.encode_images(image[None])[0], expected)
    assert model.encode_images(pixels[:0]).shape == (0, *rows.shape[1:])


@named
def test_float32(case, tmp_path, rung):
    """What comes into every layer, the logits, a greedy text."""
    peer = SEEING.make(CASES[case])
    parity.save(tmp_path, peer)
    for prompt in prompts(case):
        model, seeing = shown(load(tmp_path), prompt), ShownPeer(peer, prompt)
        parity.assert_same_layers(SEEING, model, seeing, prompt.tokens)
        hidden = run(model, prompt.tokens)
        assert_near(model.logits(hidden), parity.peer_logits(seeing, prompt.tokens))
        assert greedy(model, prompt.tokens, 16) == parity.peer_greedy(seeing, prompt.tokens, 16)


@named
def test_bfloat16(case, tmp_path, record_property):
    peer = SEEING.make(CASES[case], torch.bfloat16)
    parity.save(tmp_path, peer)
    prompt = prompts(case)[0]
    exact = parity.peer_logits(ShownPeer(SEEING.make(CASES[case]), prompt), prompt.tokens)
    model = shown(load(tmp_path), prompt)
    ours = errors(model.logits(run(model, prompt.tokens)), exact)
    theirs = errors(parity.peer_logits(ShownPeer(peer, prompt), prompt.tokens), exact)
    record_property("ours / theirs", (ours / theirs).tolist())
    assert (ours <= parity.BF16_ERRORS * theirs).all(), ours / theirs


def test_pieces_and_caches(tmp_path):
    """The same bits in pieces that do not cut an image, from every cache."""
    parity.save(tmp_path, SEEING.make(dtype=torch.bfloat16))
    prompt = PROMPTS[1]
    model = shown(load(tmp_path), prompt)
    expected = run(model, prompt.tokens)
    after_first, before_last = 2 + PER_IMAGE, len(prompt.tokens) - 26 - PER_IMAGE
    for cache in CACHES:
        for pieces in ([1, after_first, after_first + 13], [after_first - 1, before_last, len(prompt.tokens) - 1]):
            assert np.array_equal(run(model, prompt.tokens, pieces, cache), expected), (cache, pieces)


def test_twins(tmp_path):
    parity.save(tmp_path, SEEING.make())
    twin, native = load(tmp_path, operators=OperatorConfig.all("REFERENCE")), load(tmp_path)
    assert_near(twin.encode_images(PROMPTS[0].pixels), native.encode_images(PROMPTS[0].pixels))


# --- checkpoints ---

LAYOUTS = {
    "language_model.model, vision_tower.vision_model": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "language_model.model, vision_tower": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "model.language_model, model.vision_tower.vision_model": (
        ("model.vision_tower.", "model.vision_tower.vision_model."),
    ),
    "model.language_model, model.vision_tower": (),
}


@pytest.mark.parametrize("case", ["plain", "untied_all_local"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_checkpoints(layout, case, tmp_path):
    peer = SEEING.make(CASES[case])
    parity.save(tmp_path, peer)
    prompt = PROMPTS[0]
    model = shown(load(tmp_path), prompt)
    expected = model.logits(run(model, prompt.tokens))
    tensors = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    if case == "plain":
        del tensors["lm_head.weight"]
    renamed = {}
    for name, tensor in tensors.items():
        before, after = next((pair for pair in LAYOUTS[layout] if name.startswith(pair[0])), ("", ""))
        renamed[after + name.removeprefix(before)] = tensor
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
    model = shown(load(tmp_path), prompt)
    assert np.array_equal(model.logits(run(model, prompt.tokens)), expected)


def test_what_a_config_leaves_out():
    peer = SiglipVisionConfig().to_dict()
    assert {key: peer[key] for key in DEFAULTS} == DEFAULTS
    text = Gemma3.usual(Config({"text_config": {"hidden_size": 2560, "model_type": "gemma3_text"}}))
    assert text.integer("vocab_size") == Gemma3TextConfig().vocab_size
    assert text.flag("tie_word_embeddings", False)
    processor = Gemma3.processor(Config({"vision_config": {"image_size": 896}}))
    assert (processor.tokens_per_image, processor.token_id) == (256, Gemma3Config().image_token_index)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            {"mm_tokens_per_image": 8},
            r"mm_tokens_per_image in config\.json is 8; it must be a square that divides 6 × 6",
        ),
        ({"mm_tokens_per_image": 16}, r"mm_tokens_per_image in config\.json is 16; it must be a square"),
        ({"image_token_index": 97}, r"image_token_index in config\.json is 97; it must be below vocab_size 97"),
        (
            {"text_config": {"sliding_window": 8}},
            r"sliding_window in config\.json is 8; it must hold the 9 of an image",
        ),
        ({"vision_config": {"num_attention_heads": 5}}, r"hidden_size .* is 54; it must be a multiple of 5"),
    ],
)
def test_refusals(edit, match, tmp_path):
    parity.save(tmp_path, SEEING.make())

    def edited(config):
        for key, value in edit.items():
            config[key] = config[key] | value if isinstance(value, dict) else value

    rewrite(tmp_path, edited)
    with pytest.raises(ModelError, match=match):
        load(tmp_path)


def test_pixels_of_another_shape(tmp_path):
    parity.save(tmp_path, SEEING.make())
    model = load(tmp_path)
    for pixels in (np.zeros((1, 3, 30, 31), np.float32), np.zeros((3, 31, 31), np.float32), np.zeros((1, 3, 31, 31))):
        with pytest.raises(ValueError, match=r"pixels is float.* \(.*\); it must be float32 \(images, 3, 31, 31\)"):
            model.encode_images(pixels)


def test_a_model_without_eyes(tmp_path):
    parity.save(tmp_path, make_llama())
    with open_checkpoint(tmp_path) as checkpoint:
        assert images_of(checkpoint) is None
    with pytest.raises(ValueError, match="Llama takes no images"):
        load(tmp_path).encode_images(PROMPTS[0].pixels)


# --- the processor ---


@pytest.fixture
def processor(tmp_path):
    parity.save(tmp_path, SEEING.make())
    rewrite(tmp_path, lambda config: config["vision_config"].update(image_size=224))
    with open_checkpoint(tmp_path) as checkpoint:
        return images_of(checkpoint)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "CMYK", "1"])
@pytest.mark.parametrize("size", [(224, 224), (500, 317), (31, 57), (1, 1)])
def test_pixels_are_those_of_transformers(processor, mode, size):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(values).convert(mode)
    theirs = Gemma3ImageProcessorPil(size={"height": 224, "width": 224})(image, return_tensors="np")["pixel_values"][0]
    ours = processor.pixels(image)
    assert ours.flags.c_contiguous
    assert np.array_equal(ours, theirs)


def test_what_stands_for_an_image(processor, monkeypatch):
    monkeypatch.setattr(ProcessorMixin, "__init__", lambda *_, **__: None)

    class Tokens:
        boi_token, eoi_token, image_token = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
        boi_token_id = BEGIN

    theirs = Gemma3Processor(None, Tokens, image_seq_length=PER_IMAGE)
    assert (processor.placeholder, processor.expansion) == (theirs.image_token, theirs.full_image_sequence)
    assert processor.expansion.count(processor.token) == processor.tokens_per_image == PER_IMAGE
    assert processor.token_id == TOKEN
