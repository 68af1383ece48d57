"""Seeded damage: to trees of JSON or YAML, to bytes, and to the kind of thing a file is.

Every function draws from the ``random.Random`` it is given and from nothing else, and returns in a
few words what it did.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

MARKUP = "<script>alert(1)</script>"
"""A page that shows this as it is, and not as text, runs a stranger's script."""
PWNED = "PWNED"
"""The file, in HOME, that any code of a stranger writes when it is run."""
EVIL = f"import os\nopen(os.path.join(os.environ['HOME'], '{PWNED}'), 'w').close()\n"

# Texts that a dumper would not write: they take the place of a marker in the dumped text.
RAW = {
    "deep": "[" * 50_000 + "]" * 50_000,
    "digits": "9" * 6000,
    "over": "1e999",
    "octal": "0777",
}
RAW_YAML = RAW | {
    "bomb": "[&a [x,x,x,x,x,x,x,x,x,x],"
    + ",".join(
        f"&{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]",
    "itself": "&r [*r]",
    "tag": f"!!python/object/apply:os.system ['touch $HOME/{PWNED}']",
    "date": "2024-01-01",
    "binary": "!!binary aGVsbG8=",
    "set": "!!set {a, b}",
    "merge": "{<<: {a: 1}}",
}

ODD: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [0, 1, 2]),
    *(0, 1, -1, 2, 255, 2**31, 2**63, -(2**63), 10**12, 10**30),
    *(0.0, -0.0, 0.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "0", "7", "1.5", "true", "null", "NaN", "x" * 100_000, "é" * 300),
    *("\x1b[31mred\x1b[0m", "a\nvlprune: done", "\r\b\a", "\u202eabc", "\ud800", "nul\0", "\x9b1m"),
    *("[bold]x[/nope]", MARKUP, "| a | b |", "`x`", "%s%n", "{0}"),
    *("../../outside", "/dev/zero", "/etc/passwd", "~", "~nobody/x", "$HOME", "$NOPE", "${"),
    *([0] * 20_000, "@@deep@@", "@@digits@@", "@@over@@", "@@octal@@"),
)
Place = tuple[Any, ...]


def odd(rng: random.Random, old: Any, more: tuple[Any, ...] = ()) -> Any:
    """A value in place of ``old``: any odd one, or one that resembles it."""
    if rng.random() < 0.6:
        return copy.deepcopy(rng.choice(ODD + more))
    if isinstance(old, bool):
        return rng.choice([str(old), int(old), not old])
    if isinstance(old, int):
        return rng.choice([old + 1, old - 1, -old, old * 10**6, str(old), float(old), [old]])
    if isinstance(old, float):
        return rng.choice([-old, old * 1e6, old / 1e6, str(old), [old], {"value": old}])
    if isinstance(old, str):
        return rng.choice([old + "x", old.upper(), old[:-1], f" {old} ", [old], {old: old}, 3])
    if isinstance(old, list):
        changes = [old * 2, old[:-1], old[::-1], [old], {"0": old}, [*old, None], [str(old)]]
        return copy.deepcopy(rng.choice(changes))
    return rng.choice([None, [old], str(old), list(old) if isinstance(old, dict) else 0])


def places(tree: Any, here: Place = ()) -> Iterator[Place]:
    """Where all values of a tree are, the tree itself left out."""
    steps: Any = ()
    if isinstance(tree, dict):
        steps = tree.items()
    elif isinstance(tree, list):
        steps = enumerate(tree)
    for step, value in steps:
        yield (*here, step)
        yield from places(value, (*here, step))


def at(tree: Any, place: Place) -> Any:
    """The value there."""
    for step in place:
        tree = tree[step]
    return tree


def pick(rng: random.Random, tree: Any) -> Place | None:
    """A place, each depth as likely as any: long lists of numbers would drown what is above."""
    found = list(places(tree))
    if not found:
        return None
    depth = rng.choice(sorted({len(place) for place in found}))
    return rng.choice([place for place in found if len(place) == depth])


def damage_tree(
    rng: random.Random, tree: Any, more: tuple[Any, ...] = ()
) -> tuple[Any, str, list[str]]:
    """A damaged copy, what was done, and the keys on the way to where it was done."""
    tree = copy.deepcopy(tree)
    place = pick(rng, tree)
    if place is None or rng.random() < 0.02:
        value = odd(rng, tree, more)
        return value, f"all -> {_short(value)}", []
    parent, last, old = at(tree, place[:-1]), place[-1], at(tree, place)
    keys = [str(step) for step in place if isinstance(step, str)]
    name, kind = ".".join(map(str, place)), rng.random()
    if kind < 0.62:
        value = parent[last] = odd(rng, old, more)
        if isinstance(value, str) and ("/" in value or "data" in keys):  # it names a file
            keys.append(value)
        return tree, f"{name} -> {_short(value)}", keys
    if kind < 0.72:
        del parent[last]
        return tree, f"{name} deleted", keys
    if kind < 0.82 and isinstance(parent, dict):
        new = rng.choice([f"{last}x", str(last)[:-1], "", "\x1b[1m", "[/b]", MARKUP, "x" * 5000])
        parent[new] = parent.pop(last)
        return tree, f"{name} renamed to {_short(new)}", [*keys, new]
    if kind < 0.88 and isinstance(parent, list):
        parent.extend([copy.deepcopy(old)] * rng.choice([1, 2, 1000]))
        return tree, f"{name} repeated", keys
    if kind < 0.92 and isinstance(parent, dict):
        parent[f"@@twice@@{last}"] = odd(rng, old, more)
        return tree, f"{name} twice", keys
    other = pick(rng, tree) or place
    value = copy.deepcopy(at(tree, other))
    parent[last] = value
    keys += [str(step) for step in other if isinstance(step, str)]
    return tree, f"{name} -> what {'.'.join(map(str, other))} holds", keys


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)} characters)"


def dump(tree: Any, form: str) -> str:
    """The tree as ``json`` or ``yaml`` text, with what no dumper writes in place of markers."""
    if form == "yaml":
        text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=10**9)
    else:
        text = json.dumps(tree)
    raw = RAW_YAML if form == "yaml" else RAW
    text = text.replace("@@twice@@", "")
    return re.sub(r"""(["']?)@@(\w+)@@\1""", lambda m: raw.get(m[2], m[0]), text)


def damage_text(rng: random.Random, path: Path, form: str, times: int) -> tuple[str, list[str]]:
    """Damage a JSON or YAML file as a tree."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) if form == "yaml" else json.loads(text)
    except (ValueError, OSError, yaml.YAMLError, RecursionError):  # damaged once already
        return "left as it was", []
    more = tuple(f"@@{name}@@" for name in RAW_YAML) if form == "yaml" else ()
    done, keys = [], []
    for _ in range(times):
        tree, what, touched = damage_tree(rng, tree, more)
        done.append(what)
        keys += touched
    path.write_text(dump(tree, form), encoding="utf-8")
    return "; ".join(done), keys


def damage_bytes(rng: random.Random, path: Path) -> str:
    """Damage a file byte by byte."""
    data = bytearray(path.read_bytes())
    size = max(1, len(data))
    start = rng.randrange(size) if rng.random() < 0.6 else rng.randrange(min(size, 512))
    length = min(rng.choice([1, 4, 64, 4096]), size - start)
    kind = rng.choice("flip cut head insert repeat zero append text encoding noise".split())
    if kind == "flip" and data:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[start:]
    elif kind == "head":
        del data[:start]
    elif kind == "insert":
        data[start:start] = rng.randbytes(length)
    elif kind == "repeat":
        data[start:start] = data[start : start + length]
    elif kind == "zero":
        data[start : start + length] = bytes(length)
    elif kind == "append":
        data += rng.choice([b"\0" * length, rng.randbytes(length), b"}", b"\n", bytes(data)])
    elif kind == "text":
        data[start:start] = rng.choice([b"\x1b[31m", b"\0", b"\xff", b"\xed\xa0\x80", b"{", b"&a "])
    elif kind == "encoding":
        text = data.decode("utf-8", "replace")
        data = bytearray(text.encode(rng.choice(["utf-16", "utf-8-sig", "utf-32-be"]), "replace"))
    else:
        data = bytearray(rng.randbytes(rng.choice([1, 100, 5000])))
    path.write_bytes(data)
    return f"bytes: {kind} at {start}, {length}"


KINDS = "missing empty folder pipe zeros loop dangling outside socket huge null unreadable".split()


def damage_kind(rng: random.Random, path: Path, outside: Path) -> str:
    """Put another kind of thing in a file's place; ``outside`` holds what a link leads out to."""
    kind = rng.choice(KINDS if os.geteuid() else KINDS[:-1])
    away = outside / path.name
    if path.exists():
        path.rename(away)
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
        (path / path.name).touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        where = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have some hundred characters only
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name[:100])
        os.chdir(where)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**40)  # takes no room on the disk
    elif kind == "unreadable":
        away.rename(path)
        path.chmod(0)
    elif kind != "missing":
        targets = {"zeros": Path("/dev/zero"), "null": Path("/dev/null"), "loop": path}
        targets["outside"] = away
        path.symlink_to(targets.get(kind, outside / "nothing"))
    return f"kind: {kind}"


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def damage_safetensors(rng: random.Random, path: Path) -> str:
    """Damage the header or the numbers of a safetensors file."""
    header, data = read_safetensors(path)
    names = [name for name in header if name != "__metadata__"]
    name, kind = (
        rng.choice(names),
        rng.choice("tree tree length dtype shape swap drop fill".split()),
    )
    entry, length, what = header[name], None, name
    if kind == "tree":
        header, what, _ = damage_tree(rng, header)
    elif kind == "length":
        length = rng.choice([0, 1, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
        what = str(length)
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "I64", "BOOL", "F8_E4M3", "X"])
    elif kind == "shape":
        shape = entry["shape"]
        flat = [math.prod(shape)]
        entry["shape"] = rng.choice([shape[::-1], flat, [1, *shape], [2**62, 4], [-1], []])
    elif kind == "swap":
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
        what = f"{name} and {other}"
    elif kind == "drop":
        del header[name]
    else:
        start, end = entry["data_offsets"]
        value = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\1\2\3\x3f"])
        data = data[:start] + (value * ((end - start) // 4 + 1))[: end - start] + data[end:]
    packed = dump(header, "json").encode()
    size = len(packed) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + packed + data)
    return f"safetensors: {kind} {what}"


def damage_image(rng: random.Random, path: Path) -> str:
    """Put another, mostly valid, picture in the place of one."""
    kind = rng.choice("I;16 F LA P RGBA CMYK 1 tiny thin turned gif tiff header bomb".split())
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    form = path.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    options: dict[str, Any] = {}
    if kind in ("I;16", "F"):
        dtype = np.uint16 if kind == "I;16" else np.float32
        values = np.asarray(picture.convert("L")).astype(dtype) * rng.choice([1, 200])
        if kind == "F" and rng.random() < 0.5:
            values[0, 0] = np.nan
        picture, form = Image.fromarray(values), "png" if kind == "I;16" else "tiff"
    elif kind in ("LA", "P", "RGBA", "CMYK", "1"):
        picture = picture.convert(kind)
        form = "tiff" if kind == "CMYK" else "png"
        options = {"transparency": 0} if kind == "P" else {}
    elif kind in ("tiny", "thin"):
        picture = picture.resize((1, 1) if kind == "tiny" else (1, 2000))
    elif kind == "turned":
        options["exif"] = picture.getexif()
        options["exif"][0x0112] = rng.choice([0, 3, 6, 8, 99])
    elif kind in ("gif", "tiff"):
        form = kind
        options = {"save_all": True, "append_images": [picture, picture]}
    picture.save(path, format=form, **options)
    if kind in ("header", "bomb"):
        picture.save(path, format="png")
        side = rng.choice([0, 30_000, 2**31 - 1]) if kind == "header" else 60_000
        ihdr = b"IHDR" + struct.pack(">IIBBBBB", side, side, rng.choice([1, 8, 16]), 0, 0, 0, 0)
        rest = path.read_bytes()[33:] if kind == "header" else _row(side)
        head = struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + rest)
    return f"image: {kind}"


def _row(side: int) -> bytes:
    """The data of a picture of zeros: some megabytes that unfold to gigabytes."""
    body = b"IDAT" + zlib.compress(bytes(side // 8 * side), 1)
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
