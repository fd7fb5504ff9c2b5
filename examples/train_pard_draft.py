"""Distil a PARD draft of SmolLM2: a few of its layers, trained on what it says itself to guess several tokens at once.

python examples/train_pard_draft.py [MODEL] [DIRECTORY]

It needs torch and transformers (`pip install 'pace[torch,transformers]'`), and an hour on two cores; --minutes 1 shows
that it works. SmolLM2 answers questions about passages of Python's documentation (`pydoc_data`) and about everyday
things; some answers are kept back, to measure on. Then:

    pace generate smollm2 "…" --chat --speculative '{"method": "pard", "model": "DIRECTORY"}'

The objective is PARD's (An et al., 2025). Behind a place of a text come up to K - 1 mask tokens, each of which sees the
text up to that place and the masks before it, and has to say the token that many places on:

    text    t₁ t₂ t₃ t₄ t₅ t₆ t₇        behind t₃     m₁ m₂ m₃
    learns  t₂ t₃ t₄ t₅ t₆ t₇           learn         t₅ t₆ t₇

Masks of one place do not see those of another, so that one forward pass learns at many places. A later mask is
harder and counts less. What is learned is the distribution that the target has there, which says more than the token.
"""

import argparse
import random
import time
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pace import LLM, SamplingParams
from pace.models import open_checkpoint
from pace.models.hub import resolve

LAYERS = (0, 1, 28, 29)  # of the target, that the draft begins with
MASK = 15  # <jupyter_script>, which no chat has
MASKS, PLACES, LENGTH = 8, 24, 192  # mask tokens behind a place, places of a text, and tokens of a text
WEIGHTS = 0.85 ** torch.arange(1 + MASKS)  # of the next token, of that after it, and so on
BATCH, RATE, WARM_UP = 4, 6e-4, 50
HELD_OUT = 16  # prompts
EVERYDAY = (
    "how to bake bread", "the moon", "a day at the sea", "riding a bicycle", "the history of Rome", "bees", "snow",
    "learning a language", "how rain forms", "a good night's sleep", "trains", "the heart", "chess", "volcanoes",
    "growing tomatoes", "a letter to a friend", "music", "the Second World War", "saving money", "a robot who dreams",
    "photosynthesis", "football", "cats and dogs", "the internet", "a job interview", "electricity", "Paris", "tea",
    "dinosaurs", "how to swim", "a small village", "clouds", "the brain", "painting", "a birthday party", "gravity",
)  # fmt: skip
ASKED = ("Explain {} in simple words.", "Write a short story about {}.", "Give me three facts about {}.",
         "Write a short poem about {}.", "What should everybody know about {}?", "Why is {} important?")  # fmt: skip


def questions() -> list[str]:
    """In a random order that is always the same."""
    passages = [text.strip() for topic in topics.values() for text in topic.split("\n\n") if 200 < len(text) < 700]
    found = [asked.format(thing) for thing in EVERYDAY for asked in ASKED]
    found += [f"Summarise this passage:\n\n{' '.join(text.split())}" for text in passages[:400]]
    found += [f"Explain this passage to a beginner:\n\n{' '.join(text.split())}" for text in passages[400:800]]
    random.Random(0).shuffle(found)
    return found


class Example(NamedTuple):
    text: torch.Tensor  # (LENGTH,)
    hidden: torch.Tensor  # (LENGTH, hidden): of the target, a row for what comes after each token


def prompts_of(llm: LLM) -> list[list[int]]:
    return [llm.tokenizer.chat([{"role": "user", "content": text}]) for text in questions()]


def written(llm: LLM, prompts: list[list[int]], seconds: float) -> list[Example]:
    """Prompts with their answers, some of them the likeliest; as many as there is time for."""
    examples, began = [], time.perf_counter()
    for first in range(0, len(prompts), 64):
        if examples and time.perf_counter() - began > seconds:
            break
        part = prompts[first : first + 64]
        params = [
            SamplingParams(temperature=(0, 0.7, 1.0)[i % 3], seed=first + i, max_tokens=160) for i in range(len(part))
        ]
        for prompt, answer in zip(part, llm.generate(part, params), strict=True):
            text = [*prompt, *answer.outputs[0].token_ids][-LENGTH:]
            if len(text) == LENGTH:
                examples.append(Example(torch.tensor(text), hidden_states(llm, text)))
        print(f"{len(examples)} texts in {time.perf_counter() - began:.0f} s", flush=True)
    return examples


def hidden_states(llm: LLM, text: list[int]) -> torch.Tensor:
    """What the target's head makes logits of, (tokens, hidden)."""
    sequence = llm.cache.allocate()
    hidden = llm.model.forward(np.array(text, np.int32), llm.cache.append([sequence], [len(text)]), llm.cache)
    llm.cache.free(sequence)
    return torch.from_numpy(hidden.astype(np.float32)).bfloat16()


def draft_of(path) -> LlamaForCausalLM:
    """Some of the target's layers, and its embedding, which is not trained."""
    with open_checkpoint(path) as checkpoint:
        known = {key: checkpoint.config[key] for key in LlamaConfig().to_dict() if key in checkpoint.config}
        config = LlamaConfig(
            **known | {"num_hidden_layers": len(LAYERS), "pard_token": MASK, "torch_dtype": "bfloat16"}
        )
        draft = LlamaForCausalLM(config).float()
        weights = {}
        for name in draft.state_dict():
            source = name
            if name.startswith("model.layers."):
                _, _, layer, rest = name.split(".", 3)
                source = f"model.layers.{LAYERS[int(layer)]}.{rest}"
            if name != "lm_head.weight":
                weights[name] = torch.from_numpy(np.array(checkpoint.read(source), np.float32))
    draft.load_state_dict(weights, strict=False)
    draft.tie_weights()
    draft.get_input_embeddings().weight.requires_grad_(False)
    return draft


def masked(text: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and who sees whom, of a text (length,) with MASKS mask tokens behind each of its places."""
    length, count = len(text), len(places) * MASKS
    behind, which = places.repeat_interleave(MASKS), torch.arange(count) // MASKS
    step = torch.arange(count) % MASKS
    tokens = torch.cat([text, torch.full((count,), MASK)])
    positions = torch.cat([torch.arange(length), behind + 1 + step])
    sees = torch.zeros(length + count, length + count, dtype=torch.bool)
    sees[:length, :length] = torch.ones(length, length).tril().bool()
    sees[length:, :length] = torch.arange(length) <= behind[:, None]
    sees[length:, length:] = (which[:, None] == which) & (step[:, None] >= step)
    return tokens, positions, sees


def loss_of(
    draft: LlamaForCausalLM, example: Example, table: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """And where its likeliest token is the target's, (1 + MASKS,): the next one, that after it, and so on.

    table: the embedding of the tokens that there are, which is the head of both.
    """
    places = torch.randperm(LENGTH - MASKS - 1, generator=generator)[:PLACES]  # where all masks have something to learn
    tokens, positions, sees = masked(example.text, places)
    bias = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    hidden = draft.model(tokens[None], position_ids=positions[None], attention_mask=bias[None, None])[0][0]
    ahead = (places[:, None] + 1 + torch.arange(MASKS)).reshape(-1)
    with torch.no_grad():
        target = example.hidden.float() @ table.T
        target = torch.cat([target, target[ahead]])
    logits = hidden @ table.T
    losses = functional.cross_entropy(logits, target.softmax(-1), reduction="none")
    right = (logits.argmax(-1) == target.argmax(-1)).float()
    loss, share = (
        torch.cat([each[:LENGTH].mean()[None], each[LENGTH:].reshape(PLACES, MASKS).mean(0)])
        for each in (losses, right)
    )
    return (loss * WEIGHTS).sum() / WEIGHTS.sum(), share


def train(draft: LlamaForCausalLM, examples: list[Example], seconds: float) -> None:
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    used = torch.cat([example.text for example in examples]).unique()  # other tokens would be as good as never right
    table = draft.get_input_embeddings().weight[used].detach()
    began, step, shown, rights = time.perf_counter(), 0, 0.0, []
    while (spent := time.perf_counter() - began) < seconds:
        rate = RATE * min(1, (step + 1) / WARM_UP) * max(0.05, 1 - spent / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for i in torch.randint(len(examples), (BATCH,), generator=generator).tolist():
            loss, right = loss_of(draft, examples[i], table, generator)
            (loss / BATCH).backward()
            rights.append(right)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if spent - shown > 15 or step == 1:
            shares = " ".join(f"{share:.0%}" for share in torch.stack(rights).mean(0))
            print(f"{spent:5.0f} s, step {step}: loss {loss.item():.2f}; right {shares}", flush=True)
            shown, rights = spent, []


def measure(model: str, directory: str, prompts: list[list[int]]) -> None:
    """What the drafts are worth on prompts that were not trained on."""
    for temperature in (0, 0.7):
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=128)
        for count in (4, 8):
            speculative = {"method": "pard", "model": directory, "num_tokens": count, "adaptive": False}
            llm = LLM(model, kv_cache_bytes=256 << 20, speculative=speculative)
            llm.generate(prompts, params)
            stats = llm.stats().speculation
            print(
                f"held-out prompts, temperature {temperature}, {count} drafts: {stats.acceptance_rate:.0%} right, "
                f"{stats.mean_accepted_length:.2f} tokens a step",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("directory", nargs="?", default="pard-draft")
    parser.add_argument("--minutes", type=float, default=55, help="of writing and training; a third is for writing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    seconds = 60 * arguments.minutes
    llm = LLM(arguments.model, kv_cache_bytes=1 << 30)
    prompts = prompts_of(llm)
    examples = written(llm, prompts[HELD_OUT:], seconds / 3)
    del llm
    draft = draft_of(resolve(arguments.model))
    train(draft, examples, seconds * 2 / 3)
    draft.to(torch.bfloat16).save_pretrained(arguments.directory)
    print(f"the draft is in {arguments.directory}")
    measure(arguments.model, arguments.directory, prompts[:HELD_OUT])


if __name__ == "__main__":
    main()
