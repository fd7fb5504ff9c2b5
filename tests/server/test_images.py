"""Images over HTTP: the answers of an LLM that is given the same, refusals, and an event loop that stays free."""

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pace import LLM, SamplingParams
from tests.engine.eyes import IMAGE
from tests.engine.fakes import give_eyes

from .test_api import refused

CHAT = "/v1/chat/completions"


def url_of(image, form="PNG", kind="png"):
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(seed, size=(40, 30)):
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(values)


def part(url, detail="high"):
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def asking(*contents):
    return [{"role": "user", "content": list(contents)}]


TEXT = {"type": "text", "text": "What is it?"}
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(seeing_model, tmp_path_factory):
    """The same model in this process."""
    path = tmp_path_factory.mktemp("llama")
    for file in seeing_model.iterdir():
        text = file.read_bytes()
        (path / file.name).write_bytes(text.replace(b'"seeing"', b'"llama"') if file.name == "config.json" else text)
    return give_eyes(LLM(path, kv_cache_bytes=8 << 20))


def test_the_model_says_that_it_sees(seeing, server):
    assert seeing.client.get("/v1/models").json()["data"][0]["modalities"] == ["text", "image"]
    assert server.client.get("/v1/models").json()["data"][0]["modalities"] == ["text"]


def test_as_an_llm_answers(seeing, llm):
    """With one image and two, between texts, streamed and not, several texts of one prompt, and over many turns."""
    one, other = part(url_of(picture(0))), part(url_of(picture(1), "JPEG", "jpeg"))
    turns = [
        *asking(one, TEXT),
        {"role": "assistant", "content": "A dot."},
        *asking({"type": "text", "text": "Now?"}, other, one),
    ]
    for messages in (asking(one, TEXT), asking(TEXT, other), asking(one, TEXT, other), turns):
        for n in (1, 3):
            told = seeing.post(CHAT, messages=messages, n=n, seed=1, **GREEDY | {"temperature": 1.0}).json()
            params = SamplingParams(n=n, seed=1, max_tokens=8, ignore_eos=True, temperature=1.0)
            (known,) = llm.chat(messages, params, add_generation_prompt=True)
            assert [choice["message"]["content"] for choice in told["choices"]] == [each.text for each in known.outputs]
            assert told["usage"]["prompt_tokens"] == len(known.prompt_token_ids)
    body = {"messages": turns, "stream": True, **GREEDY}
    with seeing.client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        assert sum(line.startswith("data: {") for line in response.iter_lines()) > 2


def test_images_that_differ_and_are_the_same(seeing):
    def answer(url):
        told = seeing.post(CHAT, messages=asking(part(url), TEXT), logprobs=True, **GREEDY).json()
        return [token["logprob"] for token in told["choices"][0]["logprobs"]["content"]]

    assert answer(url_of(picture(2))) == answer(url_of(picture(2), "BMP", "bmp")) != answer(url_of(picture(3)))


def test_a_chat_is_tokenized_with_its_images(seeing):
    found = seeing.post("/tokenize", messages=asking(part(url_of(picture(0))), TEXT)).json()
    told = seeing.post(CHAT, messages=asking(part(url_of(picture(0))), TEXT), **GREEDY).json()
    assert found["tokens"].count(IMAGE.token_id) == 7
    assert found["count"] == told["usage"]["prompt_tokens"]


def test_eyes_that_fail(seeing):
    """In the engine, for this request; the next is answered."""
    white = part(url_of(Image.new("RGB", (9, 9), (255, 255, 255))))
    refused(seeing.post(CHAT, messages=asking(white, TEXT), **GREEDY), 500, "RuntimeError: it is too bright")
    assert seeing.post(CHAT, messages=asking(part(url_of(picture(0)))), **GREEDY).status_code == 200


CUT = url_of(picture(0))[:-200] + "AAA="
REFUSED = {
    "from the net": (asking(part("https://example.org/a.png")), "'https://example.org/a.png'; nothing is fetched: put"),
    "a file": (asking(part("file:///etc/passwd")), "nothing is fetched"),
    "no base64": (asking(part("data:image/png;base64,?")), "data: URL is not base64"),
    "no image": (asking(part("data:image/png;base64,AAAA")), "an image can't be read (cannot identify image file)"),
    "cut off": (asking(part(CUT)), "an image can't be read"),
    "too large": (asking(part(url_of(Image.new("L", (9000, 8000))))), "9000 × 8000; the most are 67108864 pixels"),
    "too many": (asking(*[part(url_of(picture(0)))] * 4), "the messages have 4 images; max_images is 3"),
    "no URL": (asking({"type": "image_url", "image_url": {}}), "image_url.url: Field required"),
    "a detail": (asking(part(CUT, "best")), "image_url.detail: Input should be 'auto', 'low' or 'high'"),
    "a placeholder": (asking(part(url_of(picture(0))), {"type": "text", "text": "[image]"}), "1 images and 2 place"),
    "its token": (asking({"type": "text", "text": "<pad>"}), "0 images, and 1 tokens '<pad>'"),
    "by the system": (
        [{"role": "system", "content": [part(url_of(picture(0)))]}, *asking(TEXT)],
        "a message of role system has an image; only a user's may",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(seeing, case):
    messages, words = REFUSED[case]
    refused(seeing.post(CHAT, messages=messages, **GREEDY), 400, words)


def test_what_a_prompt_with_images_cannot_be(seeing):
    messages = asking(part(url_of(picture(0))), TEXT)
    problem = "a prompt with images can't be truncated"
    refused(
        seeing.post(CHAT, messages=messages, truncate_prompt_tokens=5), 400, problem, param="truncate_prompt_tokens"
    )
    long = asking(part(url_of(picture(0))), {"type": "text", "text": "a" * 600})
    refused(seeing.post(CHAT, messages=long), 400, "the model's context is 512")


def test_images_count_in_the_queue(seeing):
    """By their tokens, not by the bytes that they come in: 60 may wait."""
    large, small = part(url_of(picture(0, (300, 300)))), part(url_of(picture(0)))
    assert len(large["image_url"]["url"]) > 4 * 60
    text = {"type": "text", "text": "a" * 4 * 45}
    with ThreadPoolExecutor(1) as pool, seeing.busy():
        refused(seeing.post(CHAT, messages=asking(small, small, text), **GREEDY), 429, "max_waiting_tokens is 60")
        waits = pool.submit(seeing.post, CHAT, messages=asking(large, text), **GREEDY)
        while "pace_requests_waiting 2.0" not in seeing.client.get("/metrics").text:
            assert not waits.done(), waits.result().text
            time.sleep(0.01)
    assert waits.result().status_code == 200


def test_others_are_answered_while_an_image_is_read(seeing):
    """Reading these takes a second or more; nobody who asks meanwhile waits that long."""
    large = part(url_of(Image.new("RGB", (8000, 8000), (1, 2, 3))))
    began, waits = time.monotonic(), []
    with ThreadPoolExecutor(1) as pool:
        asks = pool.submit(seeing.post, CHAT, messages=asking(large, large, large, TEXT), **GREEDY)
        while not asks.done():
            asked = time.monotonic()
            assert seeing.client.get("/health").status_code == 200
            waits.append(time.monotonic() - asked)
            time.sleep(0.02)
    assert asks.result().status_code == 200
    assert len(waits) > 3
    assert np.median(waits) < (time.monotonic() - began) / 4
