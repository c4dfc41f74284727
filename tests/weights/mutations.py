"""Broken model files, made of whole ones: the same for the same number, however often."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import model_files as made

NUMBERS = [
    *(0, 1, 2, 3, 5, 7, 8, 9, 31, 33, 127, 255, 256, 65535, 65536, 10**6),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
]
TEXTS = [
    *("", " ", "a", "\0", "</s>", "<unk>", "<0xZZ>", "▁", "../../etc/passwd", "/etc/passwd"),
    *("default", "llama", "gpt2", "linear", "llama3", "x" * 5000, "é" * 70000, "\u202e\x1b[2J"),
]
VALUES: list[Any] = [
    *(None, True, False, -1, -(2**31), 1.5, -0.0, 1e308, 5e-324, *NUMBERS, *TEXTS),
    *([], {}, [[]], [None], [0], [1, 2, 3], ["a"], ["a", 1], {"a": {}}, {"content": "a"}),
    *([{}] * 3, [0] * 5000, {str(i): i for i in range(300)}),
]

# GGUF


@dataclass(frozen=True)
class Field:
    """One number of a GGUF header."""

    at: int
    form: str
    role: str


def text(value: str | bytes) -> bytes:
    """A text of a GGUF file."""
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def texts(values: list[str | bytes]) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(text, values))


def floats(values: list[float]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}f", 9, 6, len(values), *values)


def ints(values: list[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}i", 9, 5, len(values), *values)


SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Gguf:
    """A GGUF file taken apart: its keys and tensor entries as bytes, and every number's place."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 8
        self.fields: list[Field] = [Field(4, "I", "version")]
        num_tensors, num_keys = self.number("Q", "tensors"), self.number("Q", "keys")
        self.keys = [self.piece(self.key) for _ in range(num_keys)]
        self.tensors = [self.piece(self.tensor) for _ in range(num_tensors)]
        self.start = -(-self.at // 32) * 32

    def number(self, form: str, role: str) -> int:
        self.fields.append(Field(self.at, form, role))
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def piece(self, read: Callable[[], str]) -> tuple[str, bytes]:
        start = self.at
        return read(), self.data[start : self.at]

    def text(self) -> str:
        size = self.number("Q", "length")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def key(self) -> str:
        name, kind = self.text(), self.number("I", "type")
        if kind == 9:
            inner, count = self.number("I", "type"), self.number("Q", "count")
            for _ in range(count):
                self.text() if inner == 8 else self.number(SIZES[inner], "item")
        elif kind == 8:
            self.text()
        else:
            self.number(SIZES[kind], "value")
        return name

    def tensor(self) -> str:
        name = self.text()
        for _ in range(self.number("I", "dimensions")):
            self.number("Q", "dimension")
        self.number("I", "type")
        self.number("Q", "offset")
        return name

    def joined(self, keys: list[tuple[str, bytes]], tensors: list[tuple[str, bytes]]) -> bytes:
        """A file of these keys and tensor entries, with this file's data."""
        head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
        head += b"".join(piece for _, piece in [*keys, *tensors])
        return head + bytes(-len(head) % 32) + self.data[self.start :]


def hostile_value(rng: random.Random) -> bytes:
    """A type and a value of it, for any key."""
    nested = struct.pack("<IIQ", 9, 9, 1) * rng.choice([1, 50, 3000])
    many = struct.pack("<IIQ", 9, 9, 10**5) + struct.pack("<IQ", 4, 0) * 10**5
    return rng.choice(
        [
            struct.pack("<II", 4, rng.choice(NUMBERS) & 0xFFFFFFFF),
            struct.pack("<Ii", 5, -1),
            struct.pack("<IQ", 10, rng.choice(NUMBERS)),
            struct.pack("<If", 6, rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e38])),
            struct.pack("<I?", 7, True),
            struct.pack("<I", 8) + text(rng.choice(TEXTS)),
            struct.pack("<I", 8) + text(b"\xff\xfe"),
            texts([rng.choice(TEXTS) for _ in range(rng.choice([0, 1, 300]))]),
            texts([b"\xc3"]),
            floats([rng.choice([0.0, float("nan"), -1e38])] * rng.choice([0, 1, 260, 5000])),
            ints([rng.choice([-1, 0, 1, 3, 4, 6, 7])] * rng.choice([0, 1, 260, 5000])),
            struct.pack("<IIQ", 9, rng.choice([0, 8, 9, 13, 99]), rng.choice(NUMBERS)),
            struct.pack("<I", rng.choice([13, 99, 2**32 - 1])),
            nested,
            many,
        ]
    )


def broken_gguf(rng: random.Random, base: Gguf) -> bytes:
    """One to three of the changes below."""
    data = base.data
    way = rng.randrange(8)
    if way <= 2:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 3])):
            # Most numbers are lengths of tokens: each role has the same chance.
            role = rng.choice(sorted({field.role for field in base.fields}))
            field = rng.choice([field for field in base.fields if field.role == role])
            value = rng.choice([*NUMBERS, len(data), len(data) - field.at, rng.getrandbits(16)])
            size = struct.calcsize(field.form)
            changed[field.at : field.at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        return bytes(changed)
    if way == 3:
        return bytes_broken(rng, data, base.start)
    keys, tensors = list(base.keys), list(base.tensors)
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(keys))
        name = keys[place][0]
        pick = rng.randrange(9)
        if pick <= 3:
            keys[place] = name, text(name) + hostile_value(rng)
        elif pick == 4:
            new = rng.choice(
                [
                    *("split.count", "general.alignment", "llama.expert_count", "general.license"),
                    *("general.name", "llama.rope.scaling.type", "llama.rope.scaling.factor"),
                    *("llama.attention.sliding_window", "tokenizer.chat_template"),
                    *("tokenizer.ggml.scores", "tokenizer.ggml.eom_token_id", "x" * 70000),
                    *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.unknown_token_id"),
                ]
            )
            keys.append((new, text(new) + hostile_value(rng)))
        elif pick == 5:
            keys.append(keys[place])
        elif pick == 6:
            del keys[place]
        elif pick == 7:
            tensors.append(rng.choice(tensors))
        else:
            entry = text(rng.choice(["rope_freqs.weight", "token_embd.weight", "\x1b[2Jx"]))
            shape = [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]
            entry += struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            entry += struct.pack("<IQ", rng.randrange(40), rng.choice([0, 32, 2**62]))
            tensors[rng.randrange(len(tensors))] = ("", entry)
    return base.joined(keys, tensors)


def bytes_broken(rng: random.Random, data: bytes, header: int) -> bytes:
    """Truncated, flipped, spliced or repeated somewhere."""
    at, size = rng.randrange(header), rng.choice([1, 2, 8, 64, 1000])
    way = rng.randrange(5)
    if way == 0:
        return data[: rng.choice([at, rng.randrange(len(data)), 0])]
    if way == 1:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 2, 8, 32])):
            changed[rng.randrange(header)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if way == 2:
        return data[:at] + rng.randbytes(size) + data[at + size :]
    if way == 3:
        other = rng.randrange(header)
        return data[:at] + data[other : other + size] + data[at:]
    return data[:at] + data[at + size :]


def sentencepiece(base: Gguf) -> Gguf:
    """The same model with a vocabulary of pieces and scores."""
    keys = [entry for entry in base.keys if not entry[0].startswith("tokenizer.")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    given = {
        "model": struct.pack("<I", 8) + text("llama"),
        "tokens": texts(list(tokens)),
        "scores": floats([-float(index) for index in range(260)]),
        "token_type": ints([2, 3, 3] + [6] * 256 + [1]),
        "bos_token_id": struct.pack("<II", 4, 1),
        "eos_token_id": struct.pack("<II", 4, 2),
        "unknown_token_id": struct.pack("<II", 4, 0),
    }
    keys += [(f"tokenizer.ggml.{k}", text(f"tokenizer.ggml.{k}") + v) for k, v in given.items()]
    return Gguf(base.joined(keys, base.tensors))


# JSON


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within a value, with each of its keys."""
    left = [value]
    while left:
        each = left.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each))
        for key in keys:
            yield each, key
            if isinstance(each[key], dict | list):
                left.append(each[key])


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def place_in(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A place near the root more often than one in a long list."""
    found: list[tuple[Any, Any]] = []
    for each in places(value):
        found.append(each)
        if len(found) > 400:
            break
    return rng.choice(found[: rng.choice([12, 60, 400])])


def broken_json(rng: random.Random, value: Any, extra: list[Any] | None = None) -> bytes:
    """A JSON text that differs from ``value`` in some places."""
    value = copied(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        container, key = place_in(rng, value)
        way = rng.randrange(8)
        if way <= 4:
            container[key] = copied(rng.choice([*VALUES, *(extra or [])]))
        elif way == 5:
            del container[key]
        elif way == 6:
            other, name = place_in(rng, value)
            container[key] = copied(other[name])
        else:
            container[key] = [copied(container[key])]
        if not value:
            break
    data = json.dumps(value).encode()
    return raw_broken(rng, data) if rng.random() < 0.25 else data


def raw_broken(rng: random.Random, data: bytes) -> bytes:
    """What no JSON writer would write."""
    at = rng.randrange(len(data)) if data else 0
    comma = data.find(b",", at) + 1
    deep = rng.choice([130, 1000, 2000, 10**5])
    inserted = rng.choice(
        [b"NaN,", b"[" * deep + b"]" * deep + b",", b'{"a":' * deep + b"1" + b"}" * deep + b","]
    )
    way = rng.randrange(6)
    if way == 0:
        return data[:comma] + inserted + data[comma:]
    if way == 1:
        return data[:1] + b'"model":{},"added_tokens":[],"hidden_size":1e999,' + data[1:]
    if way == 2:
        return data.replace(b'"', b'"\\ud800', rng.choice([1, 2, 5]))
    if way == 3:
        return b"[" + b"[]," * rng.choice([10, 10**5, 5 * 10**5]) + b"0]"
    return bytes_broken(rng, data, len(data)) if data else b"\xef\xbb\xbf{}"


# safetensors


def broken_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A header that lies about the tensors, itself or both."""
    (length,) = struct.unpack_from("<Q", data)
    body = data[8 + length :]
    way = rng.randrange(6)
    if way == 0:
        return bytes_broken(rng, data, 8 + length)
    header = json.loads(data[8 : 8 + length])
    if way == 1:
        size = rng.choice([*NUMBERS, len(data), len(data) - 8, length - 1, length + 1])
        return struct.pack("<Q", size % 2**64) + data[8:]
    if way == 2:
        many = rng.choice([10, 1000, 40_000, 150_000])
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
        header |= {f"{i}": empty for i in range(many)}
        head = json.dumps(header).encode()
    elif way == 3:
        names = [name for name in header if name != "__metadata__"]
        entry = header[rng.choice(names)]
        field = rng.choice(["dtype", "shape", "data_offsets"])
        start, end = entry["data_offsets"]
        entry[field] = rng.choice(
            {
                "dtype": ["F64", "I8", "F8_E4M3", "Q4", "", None, 7, "F16", "BOOL"],
                "shape": [[], [0], [-1], [2**63, 2], [2**32, 2**32], [1] * 5000, "x", [1.5]],
                "data_offsets": [
                    *([end, start], [start, end + 4], [start + 4, end], [0, 2**63], [-4, 0]),
                    *([start], [0, end], [2**64, 2**64 + 4], "x", [start, len(body) + 4]),
                ],
            }[field]
        )
        head = json.dumps(header).encode()
    elif way == 4:
        name = rng.choice(list(header))
        new = rng.choice(["", "x" * 5000, "\x1b[2J", "model.norm.weight", "__metadata__", "a\0b"])
        head = (
            json.dumps(header).encode().replace(json.dumps(name).encode(), json.dumps(new).encode())
        )
    else:
        head = broken_json(rng, header)
    return struct.pack("<Q", len(head)) + head + body


# tokenizer.json


def stage(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def split(pattern: str) -> dict[str, Any]:
    return stage("Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)


def replace(old: str, new: str) -> dict[str, Any]:
    return stage("Replace", pattern={"String": old}, content=new)


def added(content: str, index: int, **changes: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": content, **flags, **changes}


def bpe(**changes: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], **changes}


TEMPLATE = {
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
}
STAGES: dict[str, list[Any]] = {
    "normalizer": [
        stage("Sequence", normalizers=[replace("a", "aa")] * 40),
        stage("Sequence", normalizers=[replace("a", "a" * 100)] * 4),
        replace("", "x" * 1000),
        stage("Precompiled", precompiled_charsmap="AAAA"),
        stage("Precompiled", precompiled_charsmap="BAAAAP////8="),
        stage("Prepend", prepend="x" * 70000),
        stage("Replace", pattern={"Regex": "(a+)+b"}, content="a"),
    ],
    "pre_tokenizer": [
        *(split("(a+)+b"), split("(a|a)*b"), split("("), split("(" * 10**4 + ")" * 10**4)),
        *(split("((((a{1000}){1000}){1000}){1000})"), split("(?:(?:ab{1,99}c){1,99}d){1,99}")),
        stage("Sequence", pretokenizers=[split("a")] * 200),
        stage("Metaspace", replacement="ab"),
    ],
    "post_processor": [
        stage("TemplateProcessing", **TEMPLATE, special_tokens={}),
        stage(
            "TemplateProcessing", single=[TEMPLATE["single"][1]] * 10**5, pair=[], special_tokens={}
        ),
        stage("BertProcessing", sep=["x", 2**32 - 1], cls=["y", 2**31]),
    ],
    "decoder": [
        stage("Strip", content="a", start=2**60, stop=2**60),
        stage("Strip", content="a", start=0, stop=5),
        stage("Replace", pattern={"String": ""}, content=" "),
        stage("Sequence", decoders=[replace("a", "aaaaaaaaaaaa")] * 9),
        stage("Metaspace", replacement="é"),
        stage("CTC", pad_token="", word_delimiter_token="", cleanup=True),
    ],
    "model": [
        *(
            bpe(vocab={"a": 2**32 - 1}),
            bpe(vocab={"a": -1}),
            bpe(merges=["a b"]),
            bpe(merges=["a"]),
        ),
        *(bpe(continuing_subword_prefix="##", merges=["a b"]), bpe(dropout=2.0), bpe(vocab={})),
        bpe(vocab={"<0xZZ>": 0, "<0x41>": 1}, byte_fallback=True),
        bpe(vocab={str(i): i * 4000 for i in range(1000)}),
        stage("Unigram", vocab=[], unk_id=None),
        stage("Unigram", vocab=[["a", 0.0]], unk_id=7),
        stage("Unigram", vocab=[["x" * 10**5, 0.0]], unk_id=0),
        stage("WordPiece", vocab={"a": 0}, unk_token="?", max_input_chars_per_word=2**40),
        stage("WordPiece", vocab={}, unk_token="?", continuing_subword_prefix="x" * 5000),
        stage("WordLevel", vocab={"a": 0}, unk_token="?"),
    ],
    "added_tokens": [
        *([added("q", 2**32 - 1)], [added("q", -1)], [added("", 2)], [added("q", 2)] * 3),
        [added(f"{i:02}" + "q" * 20_000, 300 + i) for i in range(99)],
        [added(f"{i:07}", 300 + i) for i in range(70_000)],
        [added("q", 2, normalized=True, single_word=True, lstrip=True, rstrip=True)],
    ],
    "padding": [{"strategy": {"Fixed": 2**40}, "direction": "Right"}, {"strategy": "x"}],
    "truncation": [{"max_length": 0, "strategy": "LongestFirst", "stride": 5}],
}


def broken_tokenizer(rng: random.Random, base: dict[str, Any]) -> bytes:
    """A part exchanged for a hostile one, or any change of its JSON."""
    if rng.random() < 0.5:
        return broken_json(rng, base)
    value = dict(base)
    for name in rng.sample(sorted(STAGES), rng.choice([1, 1, 2])):
        value[name] = rng.choice(STAGES[name])
    data = json.dumps(value).encode()
    return raw_broken(rng, data) if rng.random() < 0.05 else data


# Folders


class Folder:
    """A model folder in which one file is broken at a time."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = made.write_folder(folder, config)
        made.write_json(folder / "generation_config.json", {"eos_token_id": [0, 1]})
        made.write_json(folder / "special_tokens_map.json", {"bos_token": {"content": "<s>"}})
        made.write_json(folder / "chat_template.json", {"chat_template": "{{ messages }}"})
        kinds = [{"path": "", "type": "s.Transformer"}, {"path": "1_P", "type": "s.Pooling"}]
        if config["model_type"] == "bert":
            made.write_json(folder / "modules.json", kinds)
            made.write_json(folder / "1_P" / "config.json", {"pooling_mode_mean_tokens": True})
            made.write_json(folder / "sentence_bert_config.json", {"max_seq_length": 32})
        self.whole = {
            file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }

    def broken(self, rng: random.Random, name: str | None = None) -> Path:
        """The folder with one file changed and all others whole."""
        for file, data in self.whole.items():
            file.unlink(missing_ok=True)
            file.write_bytes(data)
        (self.folder / "model.safetensors.index.json").unlink(missing_ok=True)
        files = [f for f in self.whole if f.suffix == ".json" and f.name != "tokenizer.json"]
        file = (
            self.folder / name if name else rng.choice([*files, *[self.folder / "config.json"] * 4])
        )
        data = self.whole[file]
        if file.suffix == ".safetensors":
            file.write_bytes(broken_safetensors(rng, data))
        elif file.name == "tokenizer.json":
            file.write_bytes(broken_tokenizer(rng, json.loads(data)))
        elif rng.random() < 0.1:
            self.break_index(rng)
        else:
            file.write_bytes(broken_json(rng, json.loads(data), self.hostile(file)))
        return self.folder

    def break_index(self, rng: random.Random) -> None:
        """Shards that are not there, or not in the folder."""
        single = self.folder / "model.safetensors"
        single.rename(self.folder / "shard.safetensors")
        shard = rng.choice(["shard.safetensors", "../x", "/etc/passwd", "..", "", 7, "a\0b", "x"])
        index = {"weight_map": {"model.norm.weight": shard, "b": "shard.safetensors"}}
        (self.folder / "model.safetensors.index.json").write_bytes(broken_json(rng, index))

    def hostile(self, file: Path) -> list[Any]:
        if file.name != "config.json":
            return []
        scaling = {"rope_type": "llama3", "factor": -1, "low_freq_factor": 0}
        return [scaling, {"rope_type": []}, ["LlamaForCausalLM", 7], 10**9, 2**45]
