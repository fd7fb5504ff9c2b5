import functools
import inspect
import itertools
import json
import pydoc_data.topics
import threading

import gguf
import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from pace import SamplingParams
from pace.engine.request import Request
from pace.engine.sampler import Sampler
from pace.engine.sequence import Sequence
from pace.engine.stopping import TextStream
from pace.engine.tokenizer import Detokenizer, Tokenizer
from pace.errors import ModelError
from pace.ops import OperatorConfig

TEXTS = [
    *list(pydoc_data.topics.topics.values())[::4],
    inspect.getsource(functools),
    "",
    " ",
    "  leading, trailing  and   inner  spaces ",
    "tabs\t\tand\r\nline ends\n\n\n    indented",
    "I'll, DON'T, we'Ve",
    "naïve café, ñandú, Übergröße, ﬁne",
    "你好，世界。こんにちは 한국어 मानक हिन्दी ไทย العربية עברית",
    "👋🏽 👩‍👩‍👧‍👦 🎉🎉 🇫🇷",
    "a\u0301 \ufffd \u200d \U0010ffff \x00\x7f",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2? 🤔"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And <|im_end|> 3 + 3?"},
]


@pytest.fixture(scope="module")
def smol(smollm2):
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="module")
def peer(smollm2):
    """transformers' conversion of the same file. It does not split digits one by one."""
    return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_there_and_back(smol, text):
    assert smol.decode(smol.encode(text)) == text


# SmolLM2 has no token for some bytes: they occur in unassigned and control characters only.
@given(text=st.text(st.characters(exclude_categories=["Cc", "Cn", "Cs"], include_characters="\n\t")))
def test_there_and_back_of_drawn_text(smol, text):
    assert smol.decode(smol.encode(text), skip_special_tokens=False) == text


def test_as_transformers_except_for_digits(smol, peer):
    for text in TEXTS:
        words = "".join(character for character in text if not character.isnumeric())
        assert smol.encode(words) == peer.encode(words)


def test_other_threads_go_on_while_a_text_is_encoded(smol):
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = len(ticks)
        smol.encode("Some words of a long text. " * 50_000)
        assert len(ticks) > before + 10
    finally:
        done.set()
        thread.join()


def test_digits_one_by_one(smol):
    assert [smol.piece(i) for i in smol.encode("in 2024: 12345")] == [
        *(b"in", b" ", b"2", b"0", b"2", b"4", b":"),
        *(b" ", b"1", b"2", b"3", b"4", b"5"),
    ]


def test_special_tokens(smol):
    assert smol.vocab_size == 49152
    assert (smol.bos_token_id, smol.eos_token_ids) == (1, {2})
    assert smol.special_tokens["eos_token"] == "<|im_end|>"
    assert smol.special_ids == set(range(17))
    ids = smol.encode("<|im_start|>user")
    assert ids[0] == 1
    assert smol.decode(ids) == "user"
    assert smol.decode(ids, skip_special_tokens=False) == "<|im_start|>user"
    assert smol.decode([49152, 10**9]) == ""


def test_chat(smol, peer):
    expected = peer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert smol.chat_text(CHAT) == expected
    assert smol.chat_text(CHAT).endswith("<|im_start|>assistant\n")
    assert not smol.chat_text(CHAT, add_generation_prompt=False).endswith("assistant\n")
    assert smol.chat(CHAT) == smol.encode(expected, add_special_tokens=False)


def pushed(tokenizer, ids, **options):
    detokenizer = Detokenizer(tokenizer, **options)
    return [detokenizer.push(i) for i in ids], detokenizer.flush()


SMOL_IDS = st.lists(st.one_of(st.integers(0, 49200), st.integers(0, 16), st.integers(17, 300)), max_size=40)


@given(ids=SMOL_IDS, skip=st.booleans())
def test_pushed_one_by_one_is_decoded_at_once(smol, ids, skip):
    texts, rest = pushed(smol, ids, skip_special_tokens=skip)
    assert "".join(texts) + rest == smol.decode(ids, skip) == smol._backend.decode(ids, skip_special_tokens=skip)


@given(text=st.text(alphabet=st.sampled_from("aé你🎉👩‍👧 \n9")))
def test_no_half_characters(smol, text):
    texts, rest = pushed(smol, smol.encode(text))
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)
    assert rest == ""


def test_a_character_comes_when_it_is_whole(smol):
    ids = smol.encode("🦜")
    assert len(ids) > 1
    texts, rest = pushed(smol, ids)
    assert texts == [""] * (len(ids) - 1) + ["🦜"]
    assert rest == ""
    assert pushed(smol, ids[:-1]) == ([""] * (len(ids) - 1), "\ufffd")


# A SentencePiece model: specials, all bytes, pieces with scores.
PIECES = ["▁", "a", "b", "c", "é", "ab", "bc", "abc", "▁a", "▁ab", "▁abc", "ca", "cab", "▁▁", "aa", "aaa"]
SCORES = [float(-x) for x in (20, 21, 22, 23, 24, 3, 2, 8, 1, 5, 4, 7, 6, 9, 10, 11)]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
TYPES = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]


def sentencepiece(path, space_first=True, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * 259 + SCORES)
    writer.add_token_types(TYPES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(space_first)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return sentencepiece(tmp_path_factory.mktemp("spm") / "spm.gguf")


def best_scores_first(text):
    """SentencePiece's BPE as its paper has it: join the pair whose piece scores best, the leftmost first."""
    scores = dict(zip(PIECES, SCORES, strict=True))
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    bytes_of = [[part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [TOKENS.index(token) for tokens in bytes_of for token in tokens]


@given(text=st.text(alphabet="abcé 你🎉"))
def test_sentencepiece(spm, text):
    ids = spm.encode(text)
    assert ids[:1] == [spm.bos_token_id]
    assert ids[1:] == best_scores_first(text)
    assert spm.decode(ids) == text
    texts, rest = pushed(spm, ids)
    assert "".join(texts) == text
    assert rest == ""


@given(ids=st.lists(st.integers(0, len(TOKENS) + 3), max_size=20), skip=st.booleans())
def test_sentencepiece_pushed_one_by_one(spm, ids, skip):
    texts, rest = pushed(spm, ids, skip_special_tokens=skip)
    assert "".join(texts) + rest == spm.decode(ids, skip)


def test_the_first_space(spm, tmp_path):
    ids = [TOKENS.index("▁ab"), TOKENS.index("▁ab")]
    assert spm.decode(ids) == "ab ab"
    assert "".join(pushed(spm, ids, follows_text=True)[0]) == " ab ab"
    assert sentencepiece(tmp_path / "bare.gguf", space_first=False).decode(ids) == " ab ab"


def test_the_text_of_a_logprob_keeps_its_space(spm):
    """A token in the midst of a text is not at its beginning."""
    params = SamplingParams(temperature=0, logprobs=1).with_defaults({})
    stream = TextStream(Detokenizer(spm), (), include_stop=False)
    sequence = Sequence(0, [3], params, 2, frozenset(), stream, {})
    Request(id="0", prompt=None, prompt_token_ids=[3], params=params, sequences=[sequence])
    logits = np.zeros((1, len(TOKENS)), np.float32)
    logits[0, TOKENS.index("▁ab")] = 9
    Sampler(spm, OperatorConfig()).sample(logits, [sequence])
    assert sequence.logprobs[0][TOKENS.index("▁ab")].decoded_token == " ab"


@pytest.fixture
def directory(smol, tmp_path):
    """The tokenizer of SmolLM2 as transformers saves it."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=smol._backend,
        **smol.special_tokens,
        chat_template=smol.chat_templates["default"],
    )
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    return tmp_path


def test_directory(smol, directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.bos_token_id == 1
    assert tokenizer.chat(CHAT) == smol.chat(CHAT)
    assert all(tokenizer.encode(text) == smol.encode(text) for text in TEXTS)


def test_templates_by_name(directory):
    (directory / "chat_template.jinja").unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    sources = {"default": "{{ bos_token }}{{ messages[0].content }}", "tool_use": "{{ tools | tojson }}{{ mood }}"}
    config["chat_template"] = [{"name": name, "template": source} for name, source in sources.items()]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.chat_text(CHAT) == "<|im_start|>Be brief."
    assert tokenizer.chat_text(CHAT, tools=[{"name": "<f>"}], mood="!") == '[{"name": "<f>"}]!'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages.append(1) }}", "refuses these messages: access to attribute 'append' .* is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: access to attribute '__class__' .* is unsafe"),
        ("{% if %}", "is not valid Jinja"),
    ],
)
def test_templates_that_fail(smol, template, message):
    tokenizer = Tokenizer(smol._backend, chat_templates={"default": template})
    with pytest.raises(ValueError, match=message):
        tokenizer.chat(CHAT)


def test_template_of_a_training_run(smol):
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert Tokenizer(smol._backend, chat_templates={"default": template}).chat_text(CHAT) == "Be brief."


def test_no_chat_template(smol):
    with pytest.raises(ModelError, match="the model has no chat template"):
        Tokenizer(smol._backend).chat(CHAT)


def test_vocabulary_and_merges_in_files(tmp_path):
    tokens = ["<|endoftext|>", *"abc", "Ġ", "Ġa", "bc"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\nb c\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert [tokenizer.piece(i) for i in tokenizer.encode("abc a")] == [b"a", b"bc", b" a"]


def test_refusals(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"has no tokenizer\.json, and nothing that can be converted"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer .*: download it again"):
        Tokenizer.load(tmp_path)


def test_unknown_split_in_gguf(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("odd")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="splits text by 'odd', which is unknown: gpt-2, smollm"):
        Tokenizer.load(tmp_path / "odd.gguf")


# Patterns as they stand in the tokenizer.json of models, in full; what a file of this `pre` does beside them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {
    "llama-bpe": (WORDS % "{1,3}", None),
    "dbrx": (WORDS % "{1,3}", None),
    "qwen2": (WORDS % "", normalizers.NFC()),
    "deepseek-r1-qwen": (WORDS % "", normalizers.NFC()),
    "gpt-4o": (O200K, None),
}
CONTROLS = ["<|endoftext|>", "<|im_end|>", "<|end|>"]
NASTY = [
    *TEXTS,
    "1234567 ١٢٣ ½ 3.14159 x2y33",
    "e\u0301 A\u030a \u2126",
    "O'CLOCK's they'LL  's",
    "XMLHttpRequest camelCase ALLCAPS ǅabc http://a/b//\n/x",
    "a\n \n\n  b\r\n\r\n\u3000\xa0c",
    "<|im_end|>\n<|endoftext|><think> <|end|>",
]


def byte_level(path, peer, pre, controls=CONTROLS, **metadata):
    """A GGUF file of a trained tokenizer, with control tokens at its end and one that is plain text."""
    state = json.loads(peer.to_str())
    tokens = [token for token, _ in sorted(state["model"]["vocab"].items(), key=lambda item: item[1])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *controls, "<think>"])
    writer.add_token_types([1] * len(tokens) + [3] * len(controls) + [4])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_eos_token_id(len(tokens))
    for key, value in metadata.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def trained(pattern, normalizer=None):
    peer = Backend(models.BPE())
    if normalizer is not None:
        peer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    peer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    peer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(alphabet), show_progress=False)
    peer.train_from_iterator(NASTY[-20:], trainer)
    return peer


@pytest.mark.parametrize("pre", PUBLISHED)
def test_cut_as_published(tmp_path, pre):
    pattern, normalizer = PUBLISHED[pre]
    peer = trained(pattern, normalizer)
    ours = Tokenizer.load(byte_level(tmp_path / "vocab.gguf", peer, pre))
    peer.add_special_tokens(CONTROLS)
    peer.add_tokens(["<think>"])
    for text in NASTY:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == peer.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == peer.decode(ids, skip_special_tokens=False)
    assert {ours.piece(i).decode() for i in ours.special_ids} == set(CONTROLS)


@pytest.mark.parametrize("pre", ["default", None])
def test_cut_where_the_file_says_nothing_better(tmp_path, pre):
    """Punctuation, then words, then numbers apart, and those in threes from the left, as llama.cpp does."""
    ours = Tokenizer.load(byte_level(tmp_path / "vocab.gguf", trained(WORDS % ""), pre))
    words = [word for word, _ in ours._backend.pre_tokenizer.pre_tokenize_str("Hi, it's 12345!a  b")]
    assert words == ["Hi", ",", "Ġit", "'", "s", "Ġ", "123", "45", "!", "a", "Ġ", "Ġb"]


def test_ends_of_turns(tmp_path):
    """Files name one end; of GPT-OSS, where a turn goes on after <|end|>, too."""
    peer = trained(WORDS % "")
    ours = Tokenizer.load(byte_level(tmp_path / "vocab.gguf", peer, "qwen2"))
    assert {ours.piece(i) for i in ours.eos_token_ids} == {b"<|endoftext|>", b"<|im_end|>", b"<|end|>"}
    ours = Tokenizer.load(byte_level(tmp_path / "oss.gguf", peer, "gpt-4o", ["<|endoftext|>", "<|return|>", "<|end|>"]))
    assert {ours.piece(i) for i in ours.eos_token_ids} == {b"<|endoftext|>", b"<|return|>"}


def test_begin_and_templates_of_gguf(tmp_path):
    templates = [{"name": "tool_use", "template": "{{ tools | length }}"}, {"name": "default", "template": "plain"}]
    path = byte_level(
        tmp_path / "vocab.gguf",
        trained(WORDS % ""),
        "deepseek-r1-qwen",
        add_bos_token_id=7,
        add_add_bos_token=True,
        add_chat_template=templates,
    )
    ours = Tokenizer.load(path)
    assert ours.encode("a")[0] == 7
    assert ours.chat_text(CHAT) == "plain"
    assert ours.chat_text(CHAT, tools=[{"name": "f"}]) == "1"


def test_spaces_after_phi3s_tokens(tmp_path):
    """They are swallowed, but for those after <s> and the like."""
    ids = {
        name: sentencepiece(tmp_path / f"{name}.gguf", architecture=name).encode("</s>  ab<s> ab")
        for name in ("llama", "phi3")
    }
    a, ab, s, end = (TOKENS.index(token) for token in ("▁", "▁ab", "<s>", "</s>"))
    assert ids["phi3"] == [s, end, ab, s, a, ab]
    assert ids["llama"] == [s, end, TOKENS.index("▁▁"), ab, s, a, ab]
