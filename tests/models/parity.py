"""What every family is held against: transformers on the same random weights, layer by layer."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pace.cache import CACHES
from pace.models import architecture_of, load_model, max_positions, open_checkpoint
from pace.models.config import Config
from pace.models.weights import Survey
from pace.ops import OperatorConfig

# Sums of a few hundred float32 terms in another order differ by a few 2^-24 of the terms' size; a layer adds one such
# error to the residual, and attention may amplify those before it. Relative to the largest value of the tensor:
# measured at most 3.1e-6 over all of Llama's shapes.
TOLERANCE = 3e-5
# Our bfloat16 rounds where transformers' does or less often, so its error is the yardstick of ours.
BF16_ERRORS = 1.5
VOCABULARY = 97

# Sizes that are no multiple of the panels' 16 or of the pairs' 2.
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 72,
    "intermediate_size": 131,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 300,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def longrope(pairs, original=64, **more):
    """Factors that differ from pair to pair."""
    short, long = (np.linspace(1, last, pairs).round(3).tolist() for last in (1.5, 9))
    given = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    return given | {"original_max_position_embeddings": original} | more


@dataclass(frozen=True)
class Family:
    """A model of transformers: its classes, the configuration that every case changes, where its layers are."""

    config: type
    model: type
    base: dict = field(default_factory=dict)
    layers: Callable = lambda peer: peer.model.layers
    depth: str = "num_hidden_layers"
    rotary: Callable = lambda peer: peer.model  # what holds `rotary_emb`, where it is computed once

    def make(self, changes=(), dtype=torch.float32):
        """A random model, its biases and norms too, whose weights are exact in bfloat16."""
        return self.random(self.config(**(BASE | self.base | dict(changes))), dtype)

    def random(self, config, dtype=torch.float32):
        torch.manual_seed(0)
        config._attn_implementation = "eager"
        peer = self.model(config).eval()
        with torch.no_grad():
            for parameter in peer.parameters():
                if parameter.ndim == 1:
                    parameter += 0.15 * torch.randn_like(parameter)
        return self.with_rope(peer.to(torch.bfloat16).to(dtype))

    def with_rope(self, peer):
        """With its table of frequencies in float32 again, as from_pretrained keeps it in every dtype."""
        holder = self.rotary(peer)
        if hasattr(holder, "rotary_emb"):
            holder.rotary_emb = type(holder.rotary_emb)(getattr(holder.rotary_emb, "config", peer.config))
        return peer


def save(path, model, old_rope=False):
    model.save_pretrained(path)
    if old_rope:  # as transformers 4 wrote it
        config = json.loads((path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        (path / "config.json").write_text(json.dumps(config))


def load(path, dtype="auto", operators=None):
    with open_checkpoint(path) as checkpoint:
        return load_model(checkpoint, dtype, operators)


def new_cache(model, kind="SLAB_POOL"):
    room = 1100 * model.cache_shape.bytes_per_token if kind in ("SLAB_POOL", "PAGED") else 64 << 20
    return CACHES[kind](model.cache_shape, room, OperatorConfig(), 32)


def placed(placement, text_length):
    """Of a text whose prompt is so long."""
    return replace(placement, text_lengths=np.maximum(placement.positions + 1, text_length).astype(np.int32))


def run(model, tokens, pieces=(), cache="SLAB_POOL"):
    """Final hidden states of one sequence, in one piece or in pieces that begin at `pieces`."""
    cache = new_cache(model, cache)
    sequence = cache.allocate()
    parts = np.split(np.asarray(tokens, np.int32), pieces)
    return np.concatenate(
        [model.forward(part, placed(cache.append([sequence], [len(part)]), len(tokens)), cache) for part in parts]
    )


class Recorded:
    """A layer that keeps what comes into it, or out of it."""

    def __init__(self, layer, kept, last):
        self.layer, self.kept, self.last = layer, kept, last

    def __call__(self, residual, delta, *rest):
        self.keep(residual, delta)
        residual, delta = self.layer(residual, delta, *rest)
        if self.last:
            self.keep(residual, delta)
        return residual, delta

    def keep(self, residual, delta):
        self.kept.append(residual.astype(np.float32) + (0 if delta is None else delta.astype(np.float32)))


def residuals(model, tokens):
    """The residual stream before each layer and after the last."""
    kept, layers = [], model.layers
    model.layers = [Recorded(layer, kept, layer is layers[-1]) for layer in layers]
    run(model, tokens)
    model.layers = layers
    return kept


@torch.no_grad()
def peer_residuals(family, peer, tokens):
    states, layers = [], family.layers(peer)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, named: states.append(inputs[0] if inputs else named["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    hooks.append(
        layers[-1].register_forward_hook(
            lambda _, __, output: states.append(output if isinstance(output, torch.Tensor) else output[0])
        )
    )
    peer(torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [state.reshape(len(tokens), -1).float().numpy() for state in states]


@torch.no_grad()
def peer_logits(peer, tokens):
    return peer(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def peer_greedy(peer, tokens, count):
    ids = torch.tensor([tokens])
    made = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **NO_END)
    return made[0, len(tokens) :].tolist()


NO_END = {"eos_token_id": None, "pad_token_id": 0}


def greedy(model, tokens, count, cache="SLAB_POOL", anew=False):
    """anew: all of a text is computed again once it is longer than the model was trained on."""
    cache = new_cache(model, cache)
    sequence, text, new = cache.allocate(), list(tokens), list(tokens)
    for _ in range(count):
        if anew and len(text) - 1 == model.stretched_beyond:
            sequence, new = cache.allocate(), text
        placement = placed(cache.append([sequence], [len(new)]), len(text))
        hidden = model.forward(np.array(new, np.int32), placement, cache)
        new = [int(model.logits(hidden[-1:]).argmax())]
        text += new
    return text[len(tokens) :]


def drawn(count, vocabulary=VOCABULARY, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def assert_near(actual, expected, tolerance=TOLERANCE, what=""):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max(), what


def errors(logits, exact):
    """Root mean square and largest difference."""
    difference = np.abs(logits - exact)
    return np.array([np.sqrt(np.mean(difference**2)), difference.max()])


# --- what must hold of a family ---


def assert_same_layers(family, model, peer, tokens):
    ours, theirs = residuals(model, tokens), peer_residuals(family, peer, tokens)
    for layer, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert_near(mine, expected, what=f"what comes into layer {layer}")


class Described:
    """A checkpoint of which nothing but names and shapes is there: those of transformers' model of a config.json."""

    path = "described"

    def __init__(self, family, config):
        self.config = {"model_type": family.config.model_type, **config}
        with torch.device("meta"):
            peer = family.model(family.config(**copy.deepcopy(config)))  # which changes it
        tied = "lm_head.weight" if peer.config.tie_word_embeddings else None
        self.shapes = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items() if name != tied}

    def names(self):
        return list(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return np.dtype(np.float16)


def described(family, config, layers=2):
    """The model of a real config.json, but for its depth: surveyed, so that its weights take no memory."""
    checkpoint = Described(family, {**config, family.depth: layers})
    with Survey(checkpoint, np.dtype(np.float32), OperatorConfig()) as survey:
        model = architecture_of(checkpoint)(Config(checkpoint.config), survey)
    assert model.max_positions == max_positions(checkpoint)
    return model


def check_float32(
    family, changes, path, prompt=150, pieces=(7, 70, 71, 72, 140), first=20, count=64, anew=False, **saved
):
    """What comes into every layer, the logits, a greedy text; and the prompt in pieces gives the same bits."""
    peer = family.make(changes)
    save(path, peer, **saved)
    model = load(path)
    tokens = drawn(prompt)
    assert_same_layers(family, model, peer, tokens)
    hidden = run(model, tokens)
    assert_near(model.logits(hidden), peer_logits(peer, tokens))
    assert np.array_equal(run(model, tokens, list(pieces)), hidden)
    assert greedy(model, tokens[:first], count, anew=anew) == peer_greedy(peer, tokens[:first], count)


def check_bfloat16(family, changes, path, record_property, prompt=250):
    """As near to float32 as transformers' bfloat16 is."""
    peer = family.make(changes, torch.bfloat16)
    save(path, peer)
    model = load(path)
    tokens = drawn(prompt)
    exact = peer_logits(family.make(changes), tokens)
    ours = errors(model.logits(run(model, tokens)), exact)
    theirs = errors(peer_logits(peer, tokens), exact)
    record_property("ours / theirs", (ours / theirs).tolist())
    assert (ours <= BF16_ERRORS * theirs).all(), ours / theirs


def check_caches(family, changes, path, prompt=150):
    """Prompt in pieces, then decoding: the same bits from all, on kernels; and the twins are near."""
    save(path, family.make(changes, torch.bfloat16))
    model = load(path)
    tokens, pieces = drawn(prompt), [5, 37, 38, prompt - 1]
    expected = run(model, tokens)
    for cache in CACHES:
        assert np.array_equal(run(model, tokens, pieces, cache), expected), cache
    twin = load(path, "float32", OperatorConfig.all("REFERENCE"))
    native = load(path, "float32")
    assert_near(twin.logits(run(twin, tokens[:60])), native.logits(run(native, tokens[:60])))
