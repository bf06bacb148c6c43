"""Vocabularies of merged models: which row each token gets, against brute force, and what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_llamas import write_llama

import weft
from weft.checkpoint.memory import from_mapping
from weft.errors import CheckpointError, MissingDependencyError, RecipeError
from weft.recipe.chat import TEMPLATES, choose_template
from weft.recipe.opened import Opened
from weft.recipe.rows import Entries, embedding_rows, first_rows, gather, vocabulary_size, with_vocabulary_size
from weft.recipe.run import make_plan
from weft.recipe.tokenizer_files import TokenizerFiles

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# a row is at most the mean of three rows: three roundings of float32 at the size of the largest weight, below 8
CLOSE = 3 * 8 * 2.0**-24


def ids_of(folder: Path) -> dict[str, int]:
    return TokenizerFiles("", folder).ids


def passed_on(model: Path, output: Path, others: Sequence[Path], tokenizer: Any, **step: Any) -> dict[str, np.ndarray]:
    """What ``model`` looks like in the vocabulary of a merge: a linear merge in which only its weight is not zero."""
    sources = [{"model": str(m), "parameters": {"weight": float(m == model)}} for m in others]
    weft.run({"steps": [{"method": "linear", "models": sources, **step}], "output": {"tokenizer": tokenizer}}, output)
    return load_file(output / "model.safetensors")


# rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("rest", [(), (1,), (7,), (3, 5)])
def test_gathered_rows(dtype: str, rest: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    tensors = [torch.randn(n, *rest, generator=torch.Generator().manual_seed(n)) for n in (9, 6)]
    lazy = [from_mapping({"x": t.to(getattr(torch, dtype))})["x"] for t in tensors]
    values = [t.numpy().astype(np.float64) for t in lazy]
    counts = np.array([1, 1, 1, 2, 0, 1, 3, 1, 1, 1, 0, 0])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    source = random.integers(0, 2, offsets[-1])
    row = np.where(source == 0, random.integers(0, 9, offsets[-1]), random.integers(0, 6, offsets[-1]))
    source[:3], row[:3] = 0, [2, 3, 4]
    expected = np.zeros((12, *rest))
    for i in range(12):
        for k in range(offsets[i], offsets[i + 1]):
            expected[i] += values[source[k]][row[k]] / counts[i]
    expected[10:] = expected[:10].mean(axis=0)
    found = gather(lazy[0], lazy, Entries(offsets, source, row, 10))
    assert found.shape == (12, *rest)
    assert found.natural_dtype is lazy[0].dtype
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=CLOSE)
    flat = expected.reshape(-1)
    for start, stop in [(0, flat.size), (1, 2), *(sorted(random.integers(0, flat.size + 1, 2)) for _ in range(20))]:
        part = np.empty(stop - start, np.float32)
        if part.size:
            found.read_into(part.view(np.uint8).data, int(start) * 4)
        np.testing.assert_allclose(part, flat[start:stop], rtol=0, atol=CLOSE)


def test_gathered_rows_longer_than_a_chunk() -> None:
    values = np.random.default_rng(0).standard_normal((5, 200_000)).astype(np.float32)
    lazy = from_mapping({"x": values})["x"]
    order = np.array([3, 4, 0, 1, 2])
    found = gather(lazy, [lazy], Entries(np.arange(6), np.zeros(5, np.int64), order, 5))
    np.testing.assert_array_equal(found.numpy(), values[order])
    np.testing.assert_array_equal(first_rows(lazy, 2).numpy(), values[:2])


def test_where_the_number_of_rows_stands() -> None:
    names = {"model.embed_tokens.weight": (7, 2), "model.embed_positions.weight": (9, 2), "lm_head.weight": (7, 2)}
    tensors = {n: np.zeros(s, np.float32) for n, s in names.items()}
    assert embedding_rows(from_mapping(tensors)) == 7
    assert embedding_rows(from_mapping({"x": np.zeros((3, 3))})) is None
    both = from_mapping({"embeddings.word_embeddings.weight": np.zeros((7, 2)), "shared.weight": np.zeros((5, 2))})
    assert embedding_rows(both) == 7
    both.config = {"text_config": {"vocab_size": 5}}
    assert embedding_rows(both) == 5
    assert vocabulary_size({}) is None
    assert with_vocabulary_size({"a": 1}, 8) == {"a": 1, "vocab_size": 8}
    nested = {"text_config": {"vocab_size": 5}, "vision_config": {"vocab_size": 3}}
    assert with_vocabulary_size(nested, 8) == {"text_config": {"vocab_size": 8}, "vision_config": {"vocab_size": 3}}
    assert with_vocabulary_size({"vocab_size": 5, **nested}, 8)["vocab_size"] == 8


# alignment against brute force


def brute_force(
    models: Mapping[str, tuple[dict[str, int], np.ndarray]],
    vocabulary: Mapping[str, int],
    rows: int,
    base: str | None,
    fixed: Mapping[str, tuple[Any, bool]],
) -> dict[str, np.ndarray]:
    """Every model's rows in a common vocabulary, token by token, in float64."""
    found = {m: np.zeros((rows, v.shape[1])) for m, (_, v) in models.items()}
    used = set(vocabulary.values())
    named = {**{number: token for token, number in vocabulary.items()}}
    for number in range(rows):
        owners = {}
        for model, (ids, values) in models.items():
            if number in used and named[number] in ids and ids[named[number]] < len(values):
                owners[model] = values[ids[named[number]]].astype(np.float64)
            elif number not in used and number < len(values) and number not in ids.values():
                owners[model] = values[number].astype(np.float64)
        if base in owners:
            fill = owners[base]
        elif owners:
            fill = sum(owners.values()) / len(owners)
        else:
            fill = None
        source, force = fixed.get(named.get(number, ""), (None, False))
        if source == "zero":
            fill = np.zeros_like(next(iter(found.values()))[0])
        elif source is not None:
            model, token = source
            fill = models[model][1][models[model][0][token]].astype(np.float64)
        for model in models:
            if model in owners and not force:
                found[model][number] = owners[model]
            elif fill is not None:
                found[model][number] = fill
            elif number not in used:
                found[model][number] = np.nan
    tokens = max(used) + 1
    for values in found.values():
        empty = np.isnan(values[:, 0])
        values[empty] = values[:tokens].mean(axis=0)
    return found


def speakers(root: Path, seed: int) -> list[Path]:
    """Three models that share some tokens, each with padding of its own."""
    random = np.random.default_rng(seed)
    pool = [f"t{i}" for i in range(30)]
    folders = []
    for i, name in enumerate("abc"):
        words = list(random.permutation(pool)[: random.integers(8, 20)])
        rows = len(words) + 3 + int(random.integers(0, 6))
        special = ["<s>", "</s>", f"<{name}>"]
        folders.append(write_llama(root / name, seed=seed * 10 + i, layers=1, words=words, special=special, rows=rows))
    return folders


def inputs(folders: Sequence[Path], tensor: str) -> dict[str, tuple[dict[str, int], np.ndarray]]:
    return {f.name: (ids_of(f), load_file(f / "model.safetensors")[tensor]) for f in folders}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("source", ["base", "union", "b"])
@pytest.mark.parametrize("base", [None, "c"])
def test_rows_of_every_model(seed: int, source: str, base: str | None, tmp_path: Path) -> None:
    folders = speakers(tmp_path, seed)
    wanted = str(tmp_path / source) if source == "b" else source
    like = {"like": str(tmp_path / base)} if base else {}
    for folder in folders:
        output = tmp_path / f"as {folder.name}"
        found = passed_on(folder, output, folders, {"source": wanted}, **like)
        vocabulary, config = ids_of(output), json.loads((output / "config.json").read_text())
        rows = len(found[EMBEDDING])
        assert config["vocab_size"] == rows > max(vocabulary.values())
        start = {"base": base or "a", "union": base or "a", "b": "b"}[source]
        own = ids_of(tmp_path / start)
        assert {t: vocabulary[t] for t in own} == own, "tokens of the model that it is built on keep their ids"
        everyone = {t for f in folders for t in ids_of(f)}
        assert set(vocabulary) == (everyone if source == "union" else set(own))
        assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
        special = {t["content"] for t in TokenizerFiles("", output).added if t["special"]}
        assert special == {"<s>", "</s>"} | ({"<a>", "<b>", "<c>"} if source == "union" else {f"<{start}>"})
        assert rows == max(len(vocabulary), len(load_file(tmp_path / start / "model.safetensors")[EMBEDDING]))
        for tensor in (EMBEDDING, HEAD):
            expected = brute_force(inputs(folders, tensor), vocabulary, rows, base, {})
            np.testing.assert_allclose(found[tensor], expected[folder.name], rtol=0, atol=CLOSE)


def test_tokens_one_by_one(tmp_path: Path) -> None:
    folders = speakers(tmp_path, 7)
    a, b, _ = folders
    common = sorted(set(ids_of(a)) & set(ids_of(b)) - {"<s>", "</s>"})[:2]
    only_a = next(t for t in ids_of(a) if t not in ids_of(b) and t != "<a>")
    tokens = {
        common[0]: {"source": str(a), "force": True},
        common[1]: {"source": {"kind": "model_token", "model": str(b), "token": "<b>"}},
        "<new>": {"source": {"kind": "model_token", "model": str(a), "token_id": ids_of(a)["<a>"]}},
        "<zero>": {"source": {"kind": "zero"}},
        only_a: {"source": {"kind": "zero"}, "force": True},
    }
    fixed: dict[str, tuple[Any, bool]] = {
        common[0]: (("a", common[0]), True),
        common[1]: (("b", "<b>"), False),
        "<new>": (("a", "<a>"), False),
        "<zero>": ("zero", False),
        only_a: ("zero", True),
    }
    spec = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 32}
    for folder in folders:
        output = tmp_path / f"as {folder.name}"
        found = passed_on(folder, output, folders, spec)
        vocabulary = ids_of(output)
        assert len(found[EMBEDDING]) == 64 >= len(vocabulary) > 32
        expected = brute_force(inputs(folders, EMBEDDING), vocabulary, 64, None, fixed)
        np.testing.assert_allclose(found[EMBEDDING], expected[folder.name], rtol=0, atol=CLOSE)


def test_a_method_runs_on_aligned_rows(tmp_path: Path) -> None:
    folders = speakers(tmp_path, 3)
    step = {"method": "task_arithmetic", "models": [str(f) for f in folders[1:]], "base": str(folders[0])}
    recipe = {"steps": [{**step, "parameters": {"weight": 0.5}}], "output": {"tokenizer": {"source": "union"}}}
    weft.run(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING].astype(np.float64)
    rows = brute_force(inputs(folders, EMBEDDING), ids_of(tmp_path / "out"), len(found), "a", {})
    expected = rows["a"] + 0.5 * (rows["b"] - rows["a"]) + 0.5 * (rows["c"] - rows["a"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * CLOSE)


def test_models_with_one_tokenizer_are_left_alone(tmp_path: Path) -> None:
    a, b = (write_llama(tmp_path / m, seed=i, layers=1) for i, m in enumerate("ab"))
    steps = [{"method": "linear", "models": [str(a), str(b)]}]
    weft.run({"steps": steps}, tmp_path / "plain")
    weft.run({"steps": steps, "output": {"tokenizer": {"source": "union"}}}, tmp_path / "union")
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "union" / file).read_bytes()


def test_padding_is_kept(tmp_path: Path) -> None:
    a = write_llama(tmp_path / "a", seed=1, layers=1, rows=40)
    b = write_llama(tmp_path / "b", seed=2, layers=1, rows=32, config={"text_config": {"vocab_size": 32}})
    left, right = (load_file(m / "model.safetensors")[EMBEDDING] for m in (a, b))
    for spec in ({"source": "base"}, {"source": "base", "pad_to_multiple_of": 8}):
        output = tmp_path / f"out {len(spec)}"
        found = passed_on(b, output, [a, b], spec)[EMBEDDING]
        assert found.shape[0] == 40
        np.testing.assert_array_equal(found[:32], right)
        np.testing.assert_array_equal(found[32:], left[32:])
    output = tmp_path / "from b"
    assert len(passed_on(a, output, [b, a], {"source": "base", "pad_to_multiple_of": 64})[EMBEDDING]) == 64
    config = json.loads((output / "config.json").read_text())
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == 64


def test_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    a = write_llama(tmp_path / "a", seed=1, layers=1, words=["x", "y", "z"], rows=4)
    b = write_llama(tmp_path / "b", seed=2, layers=1, words=["x", "y", "v"], rows=5)
    recipe = {"steps": [{"method": "linear", "models": [str(a), str(b)]}], "output": {"tokenizer": {"source": "union"}}}
    plan = make_plan(recipe, Opened(), "out")
    assert any("'z'" in note and "beyond the 4 embedding rows" in note for note in plan.notes)
    weft.run(recipe, tmp_path / "out")
    assert ids_of(tmp_path / "out") == {"<s>": 0, "</s>": 1, "x": 2, "y": 3, "v": 4}


def test_stages_have_tokenizers(tmp_path: Path) -> None:
    a, b, c = speakers(tmp_path, 5)
    first = {"name": "first", "method": "linear", "models": [str(a), str(b)], "tokenizer": {"source": "union"}}
    second = {"method": "linear", "models": ["@first", str(c)]}
    output = {"tokenizer": {"source": "union"}}
    weft.run({"steps": [first, second], "output": output}, tmp_path / "together")
    weft.run({"steps": [first]}, tmp_path / "stage")
    weft.run({"steps": [{**second, "models": [str(tmp_path / "stage"), str(c)]}], "output": output}, tmp_path / "apart")
    assert ids_of(tmp_path / "together") == ids_of(tmp_path / "apart")
    left, right = (load_file(tmp_path / m / "model.safetensors") for m in ("together", "apart"))
    for name in right:
        np.testing.assert_array_equal(left[name], right[name])


def test_a_model_without_a_tokenizer_has_that_of_the_base(tmp_path: Path) -> None:
    a, b = (write_llama(tmp_path / m, seed=i, layers=1) for i, m in enumerate("ab"))
    (b / "tokenizer.json").unlink()
    recipe = {"steps": [{"method": "linear", "models": [str(a), str(b)]}], "output": {"tokenizer": {"source": "base"}}}
    plan = make_plan(recipe, Opened(), "out")
    assert any("b has no tokenizer" in note for note in plan.notes)
    recipe["steps"][0]["models"].reverse()  # type: ignore[index]
    with pytest.raises(RecipeError, match="built on this model's, which has none"):
        make_plan(recipe, Opened(), "out")


def test_special_tokens_follow_the_tokenizer(tmp_path: Path) -> None:
    a = write_llama(tmp_path / "a", seed=1, layers=1)
    b = write_llama(tmp_path / "b", seed=2, layers=1, special=["</s>", "<pad>", "<s>"])
    (a / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0], "max_length": 5}))
    recipe = {
        "steps": [{"method": "linear", "models": [str(a), str(b)]}],
        "output": {"tokenizer": {"source": str(b)}},
    }
    weft.run(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 0)
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {
        "eos_token_id": [0, 2],
        "max_length": 5,
    }
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()


def test_an_embedding_that_cannot_be_rearranged(tmp_path: Path) -> None:
    a, b = (write_llama(tmp_path / m, seed=i, layers=1, words=[m, "w"]) for i, m in enumerate("ab"))
    for folder in (a, b):
        tensors = load_file(folder / "model.safetensors")
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(np.int8)
        save_file(tensors, str(folder / "model.safetensors"))
    recipe = {"steps": [{"method": "linear", "models": [str(a), str(b)]}], "output": {"tokenizer": {"source": "union"}}}
    with pytest.raises(RecipeError, match="stores it as I8"):
        make_plan(recipe, Opened(), "out")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"kind": "model_token", "model": "A", "token": "w99"}, "'w99' of"),
        ({"kind": "model_token", "model": "A", "token_id": 99}, "99 of"),
        ("elsewhere", "no such tensor here"),
        (None, "has no source"),
    ],
)
def test_token_sources_that_are_not_there(source: Any, words: str, tmp_path: Path) -> None:
    a, b = (write_llama(tmp_path / m, seed=i, layers=1) for i, m in enumerate("ab"))
    if isinstance(source, dict):
        source = {**source, "model": str(a)}
    spec = {"source": "base", "tokens": {"<new>": {"source": source}}}
    recipe = {"steps": [{"method": "linear", "models": [str(a), str(b)]}], "output": {"tokenizer": spec}}
    with pytest.raises(RecipeError, match="<new>") as error:
        make_plan(recipe, Opened(), "out")
    assert words in str(error.value)


# files


def bpe(folder: Path, **more: Any) -> TokenizerFiles:
    folder.mkdir()
    vocabulary = {t: i for i, t in enumerate(["a", "b", "c", "ab", "abc", "bc"])}
    added = [
        {"id": 6 + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i, t in enumerate(["<s>", "<x>"])
    ]  # fmt: skip
    merges = [["a", "b"], "ab c", ["b", "c"]]
    data = {"added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    for name, content in more.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return TokenizerFiles("m", folder)


def test_tokens_that_go_take_their_merges_along(tmp_path: Path) -> None:
    files = bpe(tmp_path / "m", vocab__json={}, tokenizer_config__json={"bos_token": "<s>", "pad_token": "<x>"})
    changed = files.changed({t: i for t, i in files.ids.items() if i < 4}, [])
    data = changed.object("tokenizer.json")
    assert data["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3}
    assert data["model"]["merges"] == [["a", "b"]]
    assert data["added_tokens"] == []
    assert changed.object("tokenizer_config.json") == {}
    assert "vocab.json" not in changed.copies, "the older files would still have the tokens"
    assert set(changed.ids) == {"a", "b", "c", "ab"}


def test_tokens_that_come_are_listed_everywhere(tmp_path: Path) -> None:
    listed = {"6": {"content": "<s>", "special": True}, "7": {"content": "<x>", "special": True}}
    config = {"added_tokens_decoder": listed, "bos_token": {"content": "<s>"}, "additional_special_tokens": ["<x>"]}
    files = bpe(tmp_path / "m", vocab__json={}, tokenizer_config__json=config, special_tokens_map__json={"x": "<x>"})
    new = {"id": 8, "content": "neu", "single_word": False, "lstrip": False, "rstrip": True, "normalized": True,
           "special": False}  # fmt: skip
    changed = files.changed(files.ids, [new])
    assert changed.ids == {**files.ids, "neu": 8}
    assert changed.object("added_tokens.json") == {"<s>": 6, "<x>": 7, "neu": 8}
    written = changed.object("tokenizer_config.json")
    assert written["added_tokens_decoder"]["8"] == {k: v for k, v in new.items() if k != "id"}
    assert (written["bos_token"], written["additional_special_tokens"]) == ({"content": "<s>"}, ["<x>"])
    assert "vocab.json" in changed.copies
    assert changed.data["added_tokens"][-1] == new


def test_tokens_named_beside_tokenizer_json_count(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"8": {"content": "<y>", "special": True}, "0": {"content": "<taken>"}}}
    files = bpe(tmp_path / "m", tokenizer_config__json=config, added_tokens__json={"<z>": 9, "<s>": 6})
    assert {t: i for t, i in files.ids.items() if i > 5} == {"<s>": 6, "<x>": 7, "<y>": 8, "<z>": 9}


def test_pieces_in_a_list(tmp_path: Path) -> None:
    pieces = [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": pieces}}))
    files = TokenizerFiles("m", tmp_path)
    assert files.ids == {"<unk>": 0, "a": 1, "b": 2}
    assert files.changed({"<unk>": 0, "a": 1}, []).object("tokenizer.json")["model"]["vocab"] == pieces[:2]


@pytest.mark.parametrize(
    "data", [{}, {"model": {}}, {"model": {"vocab": 3}}, {"model": {"vocab": {}}, "added_tokens": [{"content": "x"}]}]
)
def test_a_damaged_tokenizer(data: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="does not list tokens"):
        _ = TokenizerFiles("m", tmp_path).ids


def test_older_files_need_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    monkeypatch.setitem(sys.modules, "transformers", None)
    files = TokenizerFiles("m", tmp_path)
    assert files.exists
    with pytest.raises(MissingDependencyError, match=r"weft\[hf\]"):
        _ = files.ids


# chat templates


def with_templates(root: Path, texts: Sequence[str]) -> list[Path]:
    return [write_llama(root / f"m{i}", seed=i, layers=1, template=t) for i, t in enumerate(texts)]


def written_template(models: Sequence[Path], output: Path, choice: str) -> dict[str, Any]:
    recipe = {
        "steps": [{"method": "linear", "models": [str(m) for m in models]}],
        "output": {"chat_template": choice},
    }
    weft.run(recipe, output)
    return dict(json.loads((output / "tokenizer_config.json").read_text()))


def test_auto_takes_the_most_common_template(tmp_path: Path) -> None:
    models = with_templates(tmp_path, ["rare {{ x }}", " common {{ x }}", "common {{ x }} ", ""])
    assert written_template(models, tmp_path / "out", "auto")["chat_template"] == "common {{ x }}"
    none = with_templates(tmp_path / "none", ["", ""])
    assert "chat_template" not in written_template(none, tmp_path / "out2", "auto")


def test_templates_of_all_forms_are_read_and_replaced(tmp_path: Path) -> None:
    (model,) = with_templates(tmp_path, [""])
    (model / "chat_template.jinja").write_text("from a file {{ x }}")
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert written_template([model], tmp_path / "auto", "auto")["chat_template"] == "from a file {{ x }}"
    text = "{{ messages | length }} messages"
    assert written_template([model], tmp_path / "out", text)["chat_template"] == text
    assert (tmp_path / "out/chat_template.jinja").read_text() == text
    assert json.loads((tmp_path / "out/chat_template.json").read_text()) == {"chat_template": text}
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").unlink()
    several = {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d {{ x }}"}]}
    (model / "tokenizer_config.json").write_text(json.dumps(several))
    assert written_template([model], tmp_path / "several", "auto")["chat_template"] == "d {{ x }}"


def test_a_template_without_a_tokenizer(tmp_path: Path) -> None:
    (model,) = with_templates(tmp_path, [""])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    recipe = {"steps": [{"method": "linear", "models": [str(model)]}], "output": {"chat_template": "chatml"}}
    assert any("the chat template is not written" in note for note in make_plan(recipe, Opened(), "out").notes)


@pytest.mark.parametrize("choice", ["chatlm", "not jinja at all, however long it is"])
def test_templates_that_do_not_exist(choice: str) -> None:
    with pytest.raises(RecipeError, match="neither a known name nor jinja text"):
        choose_template(choice, [])


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
PROMPTS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_write_the_published_formats(name: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATES[name])
    found = template.render(messages=CONVERSATION, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert found == PROMPTS[name]
