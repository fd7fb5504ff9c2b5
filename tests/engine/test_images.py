"""Images in prompts: whole through the model, encoded when they are needed, the same bits whatever becomes of them."""

import asyncio
import base64
import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pace import LLM, SamplingParams
from pace.cache import CACHES
from pace.cli.chat import Chat
from pace.engine import images
from pace.engine.async_engine import AsyncEngine
from pace.engine.images import Pixels, read
from pace.engine.pooling import PoolingParams
from pace.ops import OperatorConfig

from .eyes import IMAGE
from .fakes import VOCABULARY, byte_tokens, give_eyes, greedy, write_model
from .test_scheduling import CASES, LIMITS, arrivals_of, by_themselves, life, make_engine, run, seen

SOFT = [IMAGE.token_id] * IMAGE.tokens_per_image


def pixels(seed):
    return Pixels(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8))


def prompt(*parts):
    """Of numbers of random tokens, and of images by their seeds, as strings."""
    generator, ids, found = np.random.default_rng(0), [], []
    for part in parts:
        if isinstance(part, str):
            ids += SOFT
            found.append(pixels(int(part)))
        else:
            ids += generator.integers(3, VOCABULARY, part).tolist()
    return {"prompt": ids, "images": found}


def asked():
    """Images first, last, one behind the other, across the blocks of a cache; many prompts begin alike."""
    prompts = [prompt("1"), prompt(3, "1"), prompt(5, "1", 4), prompt(5, "2", 4), prompt(12, "1", "2", "1", 20)]
    prompts += [prompt(12, "1", "2", "2", 20), prompt(13, "3", 2), prompt(30, "3", 40), prompt(30, "4", 40), prompt(40)]
    prompts += [prompt(2, "1", 30, "5", 20, "1"), prompt(12, "1", "2", "1", 25), prompt(9, "1", 20), prompt(10, "1", 1)]
    kinds = [{"temperature": 0}, {"temperature": 1.0, "n": 3}, {"temperature": 0.7, "prompt_logprobs": 1}]
    kinds += [{"temperature": 1.0, "repetition_penalty": 1.2}]
    return [
        (each, SamplingParams(**kinds[(i + j) % 4], seed=i, max_tokens=8, logprobs=1, ignore_eos=True))
        for i, each in enumerate(prompts)
        for j in (0, 1)
    ]


ASKED = asked()


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("seeing")
    write_model(path)
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{% if part.type == 'image' %}[image]{% else %}{{ part.text }}"
        "{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    )
    return give_eyes(LLM(path, dtype="bfloat16", kv_cache_bytes=16 << 20))


@pytest.fixture(scope="module")
def alone(llm):
    return by_themselves(llm, ASKED)


@pytest.mark.parametrize(("cache", "prefix_caching"), CASES)
@settings(max_examples=8, deadline=None)
@given(
    arrivals=arrivals_of(ASKED),
    chunk=st.sampled_from([1, 2, 7, 16, 37, 512]),
    **LIMITS,
)
def test_as_if_alone(llm, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve):
    life(llm, ASKED, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve)


@pytest.mark.parametrize("which", range(0, len(ASKED), 2))
def test_what_the_model_is_given(llm, alone, which):
    """By one pass over all of the prompt, with rows and spans as they should be: the first token is the same."""
    given, params = ASKED[which]
    ids, shape = given["prompt"], llm.model.cache_shape
    cache = CACHES["DYNAMIC"](shape, 512 * shape.bytes_per_token, OperatorConfig())
    placement = cache.append([cache.allocate()], [len(ids)])
    at = np.flatnonzero(np.array(ids) == IMAGE.token_id).astype(np.int32)
    spans = np.zeros((len(ids), 2), np.int32)
    for i, row in enumerate(at):
        first = at[i // 7 * 7]
        spans[row] = first, first + 7
    rows = [llm.model.encode_images(IMAGE.normalised(each.values)[None])[0] for each in given["images"]]
    hidden = llm.model.forward(
        np.array(ids, np.int32),
        replace(placement, spans=spans),
        cache,
        (at, np.concatenate(rows)) if rows else None,
    )
    row = llm.model.logits(hidden[-1:])[0].astype(np.float64)
    if params.temperature == 0:
        texts, _, _ = alone[which]
        token, logprobs = texts[0][0][0], texts[0][1][0]
        assert token == row.argmax()
        # One model's float32 logits: what differs is the sum of the softmax alone.
        assert logprobs[token].logprob == pytest.approx(-np.log(np.exp(row - row.max()).sum()), abs=1e-5)


def answer(engine, given, **changes):
    request = engine.intake.request(given, greedy(**({"max_tokens": 3, "ignore_eos": True} | changes)))
    run(engine, [request])
    return request.output()


def test_another_image_is_another_prompt(llm):
    engine = make_engine(llm, "PAGED", 1 << 10)
    one, other = (answer(engine, prompt(30, which, 40), logprobs=0) for which in "34")
    assert one.prompt_token_ids == other.prompt_token_ids
    assert one.outputs[0].logprobs != other.outputs[0].logprobs
    assert other.usage.cached_tokens == 16  # the block before the image


def test_an_image_that_the_cache_has_is_not_encoded(llm):
    engine = make_engine(llm, "PAGED", 1 << 10)
    llm.model.encoded = 0
    first = answer(engine, prompt(30, "3", 40))
    assert (llm.model.encoded, first.usage.cached_tokens) == (1, 0)
    engine._images._kept.clear()
    again = answer(engine, prompt(30, "3", 50))
    assert (llm.model.encoded, again.usage.cached_tokens) == (1, 64)
    assert first.outputs[0].token_ids == answer(engine, prompt(30, "3", 40)).outputs[0].token_ids
    assert llm.model.encoded == 1


def test_an_image_is_taken_from_the_cache_whole_or_not_at_all(llm):
    engine = make_engine(llm, "PAGED", 1 << 10)
    answer(engine, prompt(12, "1", 40))
    assert answer(engine, prompt(12, "1")).usage.cached_tokens == 12  # a block has a part of the image
    assert engine.cache.stats().used_bytes == 0


def test_the_latest_images_are_kept(llm):
    engine = make_engine(llm, "DYNAMIC", 1 << 10)
    llm.model.encoded = 0
    for which in "1231":
        answer(engine, prompt(5, which, 5))
    assert llm.model.encoded == 3
    engine._images._kept_bytes = 2 * 7 * 72 * 2  # two images' rows in bfloat16
    for which in "4531":
        answer(engine, prompt(5, which, 5))
    assert llm.model.encoded == 7


def test_texts_of_one_prompt_see_with_one_pair_of_eyes(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 10)
    engine._images._kept_bytes = 0
    llm.model.encoded = 0
    answer(engine, prompt(5, "1", 9), n=4, temperature=1.0, seed=0)
    assert llm.model.encoded == 1


def test_nobody_waits_for_more_than_one_image(llm):
    """A text is written on between the images of another's prompt."""
    engine = make_engine(llm, "SLAB_POOL", 1 << 10)
    writes = engine.intake.request(prompt(5), greedy(max_tokens=30, ignore_eos=True))
    engine.add(writes)
    engine.step()
    engine.add(engine.intake.request(prompt(5, "1", 2, "2", 2, "3", 2, "4", 2), greedy(max_tokens=1)))
    llm.model.encoded = 0
    for images_so_far in (1, 2, 3, 4, 4):
        before = writes.num_output_tokens
        engine.step()
        assert (llm.model.encoded, writes.num_output_tokens) == (images_so_far, before + 1)


def test_an_image_larger_than_a_batch_goes_through_whole(llm, monkeypatch):
    sizes = []
    forward = llm.model.forward
    monkeypatch.setattr(
        llm.model, "forward", lambda tokens, *rest, **seen: sizes.append(len(tokens)) or forward(tokens, *rest, **seen)
    )
    engine = make_engine(llm, "SLAB_POOL", 1 << 10, max_batch_tokens=4)
    answer(engine, prompt(6, "1", 3, "2"), max_tokens=1)
    assert sizes == [4, 2, 7, 3, 7]


@pytest.mark.parametrize("cache", ["SLAB_POOL", "PAGED"])
def test_preempted_with_images(llm, alone, cache):
    engine = make_engine(llm, cache, 256, reserve_tokens=0)
    engine._images._kept_bytes = 0
    requests = [engine.intake.request(*each) for each in ASKED]
    run(engine, requests)
    assert engine.stats().preemptions > 0
    assert [seen(request) for request in requests] == alone


def test_eyes_that_fail_end_one_request(llm, alone, monkeypatch, caplog):
    engine = make_engine(llm, "SLAB_POOL", 1 << 10)
    encode = llm.model.encode_images
    bad = IMAGE.normalised(pixels(9).values)

    def encode_images(values):
        if (values[0] == bad).all():
            raise MemoryError("no room for an image")
        return encode(values)

    monkeypatch.setattr(llm.model, "encode_images", encode_images)
    others = [engine.intake.request(*each) for each in ASKED]
    fails = engine.intake.request(prompt(4, "9", 5), greedy())
    run(engine, [*others[:3], fails, *others[3:]])
    (text,) = fails.output().outputs
    assert (text.finish_reason, text.stop_reason) == ("error", "MemoryError: no room for an image")
    assert [seen(request) for request in others] == alone
    assert engine.stats().cache.used_bytes == 0


def test_an_interrupted_encoding_is_as_if_it_had_not_begun(llm, alone, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 10)
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "encode_images", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        request = engine.intake.request(*ASKED[4])
        engine.add(request)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    while engine.busy:
        engine.step()
    assert seen(request) == alone[4]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_of_images(llm, pooling):
    found = []
    for limits in ({}, {"max_batch_tokens": 5}):
        engine = make_engine(llm, "PAGED", 1 << 10, **limits)
        for _ in range(2):
            request = engine.intake.embedding(prompt(20, "1", 9, "2"), PoolingParams(pooling=pooling))
            run(engine, [request])
            found.append(request.embedding)
    other = engine.intake.embedding(prompt(20, "1", 9, "3"), PoolingParams(pooling=pooling))
    run(engine, [other])
    assert all((each == found[0]).all() for each in found)
    assert (other.embedding != found[0]).any()


# --- from what users give ---


def picture(mode="RGB", size=(40, 30), seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], len(Image.new(mode, (1, 1)).getbands())))
    return Image.fromarray(values.astype(np.uint8).squeeze(), mode if mode in ("RGB", "L", "RGBA", "CMYK") else None)


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_a_chat_with_images(llm, tmp_path):
    """However an image is given, and as a prompt with it."""
    image = picture()
    (tmp_path / "image.png").write_bytes(saved(image))
    url = "data:image/png;base64," + base64.b64encode(saved(image)).decode()
    ways = [
        {"type": "image", "image": image},
        {"type": "image", "image": saved(image)},
        {"type": "image", "image": tmp_path / "image.png"},
        {"type": "image", "image": str(tmp_path / "image.png")},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    found = []
    for way in ways:
        text = {"type": "text", "text": "What is it?"}
        found.append(llm.chat([{"role": "user", "content": [way, text]}], greedy(logprobs=1))[0])
    written = "user: \n" + "<pad>" * 7 + "\nWhat is it?"
    assert found[0].prompt_token_ids == llm.tokenizer.encode(written, add_special_tokens=False)
    assert all(each.outputs[0].logprobs == found[0].outputs[0].logprobs for each in found)
    assert found[0].usage.prompt_tokens == len("user: \n\nWhat is it?") + 7
    other = [{"role": "user", "content": [{"type": "image", "image": picture(seed=1)}, text]}]
    both = llm.chat([other, [{"role": "user", "content": "No image"}]], greedy(logprobs=1))
    assert both[0].outputs[0].logprobs != found[0].outputs[0].logprobs
    assert len(both[1].prompt_token_ids) == len("user: No image")


def test_a_prompt_with_images(llm):
    text = llm.generate({"prompt": "a[image]b[image]", "images": [picture(), picture(seed=1)]}, greedy(logprobs=0))[0]
    ids = [*byte_tokens("a\n"), *SOFT, *byte_tokens("\nb\n"), *SOFT, *byte_tokens("\n")]
    assert (text.prompt, text.prompt_token_ids) == ("a[image]b[image]", ids)
    same = llm.generate([{"prompt": ids, "images": [picture(), picture(seed=1)]}], greedy(logprobs=0))[0]
    assert (same.prompt, same.outputs[0].logprobs) == (None, text.outputs[0].logprobs)
    assert llm.embed({"prompt": "a[image]b[image]", "images": [picture(), picture(seed=1)]})[0].embedding is not None


def test_async_with_images(llm):
    given = {"prompt": "a[image]b", "images": [picture()]}
    expected = llm.generate(given, greedy())[0].outputs[0].text

    async def life():
        async with AsyncEngine(make_engine(llm, "SLAB_POOL", 1 << 10)) as served:
            texts = []
            for _ in range(2):
                async for output in served.generate(given, greedy()):
                    text = output.outputs[0].text
                texts.append(text)
            chat = served.engine.intake.chat([{"role": "user", "content": [{"type": "image", "image": picture()}]}])
            (output,) = [output async for output in served.generate(chat, greedy(max_tokens=1))]
            return texts, output.usage.prompt_tokens

    assert asyncio.run(life()) == ([expected] * 2, len("user: \n\n") + 7)


def test_pace_chat_about_an_image(llm, directory, tmp_path, capsys):
    """It goes with the next message; what can't be taken is said, and the chat goes on."""
    (tmp_path / "image.png").write_bytes(saved(picture()))
    chat = Chat(llm, greedy(max_tokens=3, ignore_eos=True), stats=False)
    chat._command("/image", "no-image.png")
    assert "No such file" in capsys.readouterr().err
    chat._command("/image", f" {tmp_path / 'image.png'} ")
    chat._turn("What?")
    chat._turn("And now?")
    first, answer, second, _ = chat.messages
    assert [part["type"] for part in first["content"]] == ["image", "text"]
    assert second["content"] == "And now?"
    expected = llm.chat([first], greedy(max_tokens=3, ignore_eos=True))[0].outputs[0].text
    assert (answer["content"], chat.images) == (expected, [])
    plain = LLM(directory, kv_cache_bytes=4 << 20)
    plain.tokenizer.chat_templates["default"] = "{{ messages[0].content }}"
    Chat(plain, greedy())._command("/image", str(tmp_path / "image.png"))
    assert "the model takes text, and no images" in capsys.readouterr().err


ONE = [pixels(0)]
WRONG = {
    "more placeholders": ({"prompt": "[image][image]", "images": ONE}, r"1 images and 2 placeholders '\[image\]'"),
    "no image": ("a [image]", "0 images and 1 placeholders"),
    "no placeholder": ({"prompt": "a", "images": ONE}, "1 images and 0 placeholders"),
    "tokens without an image": ([5, *SOFT], "0 images, and 7 tokens '<pad>'"),
    "text that is tokens": ("<pad>", "0 images, and 1 tokens '<pad>'"),
    "too few tokens": ({"prompt": [5, *SOFT[1:]], "images": ONE}, "1 images, and 6 tokens '<pad>'"),
    "tokens apart": ({"prompt": [*SOFT[1:], 5, 0], "images": ONE}, "an image has 7 of them, one after"),
    "an unknown field": ({"prompt": "a", "image": []}, r"a prompt has \['image', 'prompt'\]; it must be"),
    "not a list": ({"prompt": "a", "images": ONE[0]}, "it must be"),
    "not an image": ({"prompt": "[image]", "images": [3]}, "an image is a int; it must be a path, bytes or a PIL"),
}


@pytest.mark.parametrize("case", WRONG)
def test_prompts_that_cannot_be(llm, case):
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        llm.generate(given)


URLS = {
    "from the net": ("http://x/y.png", "'http://x/y.png'; nothing is fetched"),
    "a file's URL": ("file:///etc/passwd", "nothing is fetched"),
    "no base64": ("data:image/png,abc", "must begin as data:image/png;base64,"),
    "another kind": ("data:text/html;base64,AAAA", "must begin as data:image"),
    "broken base64": ("data:image/png;base64,a", "data: URL is not base64"),
    "no URL": (None, "nothing is fetched"),
}


@pytest.mark.parametrize("case", URLS)
def test_urls_that_cannot_be(llm, case):
    url, message = URLS[case]
    with pytest.raises(ValueError, match=message):
        llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


def test_a_part_without_an_image(llm):
    with pytest.raises(ValueError, match="a part of type image needs image"):
        llm.chat([{"role": "user", "content": [{"type": "image"}]}])


def test_a_placeholder_that_a_user_writes_is_no_image(llm):
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "What does [image] mean?"}]
    with pytest.raises(ValueError, match="1 images and 2 placeholders"):
        llm.chat([{"role": "user", "content": parts}])


def test_a_model_without_eyes(directory):
    llm = LLM(directory, kv_cache_bytes=4 << 20)
    with pytest.raises(ValueError, match="the model takes text, and no images"):
        llm.generate({"prompt": "a", "images": [picture()]})
    with pytest.raises(ValueError, match="the model takes text, and no images"):
        llm.chat([{"role": "user", "content": [{"type": "image", "image": picture()}]}])


def test_kinds_of_images():
    """As Pillow converts them to RGB, but those of 16 bits, whose upper 8 count."""
    image = picture()
    expected = IMAGE.resized(image)
    for source in (image, saved(image), saved(image, "BMP"), saved(image, "TIFF"), saved(image, "WEBP", lossless=True)):
        assert (read(source, IMAGE).values == expected).all()
    for mode in ("L", "RGBA", "CMYK"):
        other = picture(mode)
        assert (read(saved(other, "TIFF"), IMAGE).values == IMAGE.resized(other.convert("RGB"))).all()
    palette = image.quantize(16)
    assert (read(saved(palette), IMAGE).values == IMAGE.resized(palette.convert("RGB"))).all()
    values = np.random.default_rng(0).integers(0, 65536, (30, 40)).astype(np.uint16)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    assert (read(saved(Image.fromarray(values)), IMAGE).values == IMAGE.resized(grey)).all()


def test_the_first_frame_as_it_is_stored():
    image = picture().quantize(16)
    moving = saved(image, "GIF", save_all=True, append_images=[picture(seed=1).quantize(16)])
    assert Image.open(io.BytesIO(moving)).n_frames == 2
    assert (read(moving, IMAGE).values == read(saved(image, "GIF"), IMAGE).values).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90°
    assert (
        read(saved(picture(), "JPEG", exif=turned), IMAGE).values == read(saved(picture(), "JPEG"), IMAGE).values
    ).all()


BROKEN = {
    "no image": (b"no image", "can't be read .cannot identify image file.: give a whole file, of BMP, GIF, JPEG"),
    "cut off": (saved(picture())[:500], "can't be read"),
    "cut off in its head": (saved(picture())[:20], "can't be read"),
    "nothing": (b"", "can't be read"),
    "no file": ("no/such/file.png", "No such file or directory: 'no/such/file.png'"),
    "empty": (Image.new("RGB", (0, 5)), "an image is 0 × 5: there is nothing to see"),
    "too large": (saved(Image.new("L", (9000, 8000))), "an image is 9000 × 8000; the most are 67108864 pixels"),
    "a bomb": (saved(Image.new("1", (20000, 10000))), "can't be read .Image size .200000000 pixels. exceeds limit"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_images_that_cannot_be(case):
    source, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        read(source, IMAGE)


def test_a_limit_of_pixels():
    assert read(picture(), IMAGE, max_pixels=1200).values.shape == (6, 5, 3)
    with pytest.raises(ValueError, match="40 × 30; the most are 1199 pixels"):
        read(picture(), IMAGE, max_pixels=1199)


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"images need Pillow: pip install 'pace\[images\]'"):
        read(b"", IMAGE)


def test_keys_of_two_images_differ():
    one, other = (images.PlacedImage(3, 10, pixels(seed)).keys for seed in (0, 1))
    assert len(set(one + other)) == 14
    assert all(1 << 30 <= key < 1 << 31 for key in one + other)
