"""mergekit and weft run the same YAML files on the same folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import weft

pytest.importorskip("mergekit")
sys.path.insert(0, str(Path(__file__).parents[1] / "recipe"))
from tiny_llamas import write_llama, write_tokenizer

from weft.recipe.tokenizer_files import TokenizerFiles, added_token

pytestmark = pytest.mark.filterwarnings("ignore")

# mergekit and weft sum in float32 in different orders: an element that is a sum of k terms of size s differs by at
# most about k * s * 2**-23; weights here are below 8 and k below 8
TOLERANCE = 8 * 8 * 2.0**-23


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = write_llama(root / "base", seed=0)
    return {
        "base": base,
        "a": write_llama(root / "a", seed=1, start_at=base),
        "b": write_llama(root / "b", seed=2, start_at=base),
        "c": write_llama(root / "c", seed=3, start_at=base),
    }


@pytest.fixture(scope="module")
def by_mergekit() -> Callable[..., Path]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def run(document: dict[str, Any], output: Path, **options: Any) -> Path:
        settings = MergeOptions(allow_crimes=True, quiet=True, write_model_card=False, clone_tensors=True, **options)
        run_merge(MergeConfiguration.model_validate(document), str(output), options=settings)
        return output

    return run


def fill(text: str, folders: dict[str, Path]) -> str:
    return text.replace("$", str(folders["base"].parent) + "/")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(ours: Path, theirs: Path, *keys: str) -> None:
    left, right = tensors_of(ours), tensors_of(theirs)
    assert set(left) == set(right)
    for name in right:
        assert left[name].shape == right[name].shape, name
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=TOLERANCE, err_msg=name)
    mine, other = (json.loads((f / "config.json").read_text()) for f in (ours, theirs))
    for key in keys or ("num_hidden_layers", "vocab_size"):
        assert mine[key] == other[key]


FILES = {
    "linear": """
        models:
          - {model: $a, parameters: {weight: 1.0}}
          - {model: $b, parameters: {weight: [0.2, 0.9]}}
          - model: $c
            parameters:
              weight:
                - {filter: mlp, value: 0.5}
                - value: 0.25
        merge_method: linear
        dtype: float32
    """,
    "slerp with a gradient": """
        slices:
          - sources:
              - {model: $a, layer_range: [0, 4]}
              - {model: $b, layer_range: [0, 4]}
        merge_method: slerp
        base_model: $a
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: float32
    """,
    "ties with filters": """
        models:
          - model: $base
          - model: $a
            parameters: {density: [1, 0.7, 0.1], weight: 1.0}
          - model: $b
            parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
          - model: $c
            parameters:
              density: 0.33
              weight:
                - {filter: mlp, value: 0.5}
                - value: 0
        merge_method: ties
        base_model: $base
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
    """,
    "stacked slices": """
        slices:
          - sources:
              - {model: $a, layer_range: [0, 3]}
          - sources:
              - model: $b
                layer_range: [1, 4]
                parameters:
                  scale:
                    - {filter: o_proj, value: 0.0}
                    - {filter: down_proj, value: 0.5}
                    - value: 1.0
          - sources:
              - {model: $a, layer_range: [3, 4]}
        merge_method: passthrough
        dtype: float32
    """,
    "task arithmetic with a gradient": """
        models:
          - {model: $a, parameters: {weight: [0, 1]}}
          - {model: $b, parameters: {weight: [1.0, 0.2, 0.6]}}
        merge_method: task_arithmetic
        base_model: $base
        parameters: {lambda: 0.7, normalize: false}
        dtype: float32
    """,
    "slices with a base of their own layers": """
        slices:
          - sources:
              - {model: $base, layer_range: [0, 2]}
              - {model: $a, layer_range: [0, 2], parameters: {weight: 0.3}}
              - {model: $b, layer_range: [1, 3]}
            parameters: {weight: [0.1, 0.9]}
          - sources:
              - {model: $base, layer_range: [2, 4]}
              - {model: $c, layer_range: [1, 3]}
        merge_method: task_arithmetic
        base_model: $base
        parameters: {weight: 0.5}
        dtype: float32
    """,
    "a base that the method has no use for": """
        models:
          - {model: $a, parameters: {weight: 0.3}}
        merge_method: linear
        base_model: $base
        parameters: {weight: 0.7}
        dtype: float32
    """,
    "modules with one section": """
        modules:
          default:
            models:
              - {model: $a, parameters: {weight: 2}}
              - model: $b
            parameters:
              weight:
                - {filter: mlp, value: 3}
        merge_method: linear
        parameters: {weight: 1}
        dtype: float32
    """,
    "model stock": """
        models: [{model: $a}, {model: $b}, {model: $c}]
        merge_method: model_stock
        base_model: $base
        dtype: float32
    """,
    "nuslerp over differences": """
        models:
          - {model: $a, parameters: {weight: 0.3}}
          - {model: $b, parameters: {weight: [0.2, 0.8]}}
        merge_method: nuslerp
        base_model: $base
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        dtype: float32
    """,
}


@pytest.mark.parametrize("name", FILES)
def test_file(name: str, folders: dict[str, Path], by_mergekit: Callable[..., Path], tmp_path: Path) -> None:
    text = fill(FILES[name], folders)
    file = tmp_path / "file.yaml"
    file.write_text(text)
    weft.run(file, tmp_path / "ours")
    by_mergekit(yaml.safe_load(text), tmp_path / "theirs")
    assert_same(tmp_path / "ours", tmp_path / "theirs")


# vocabularies


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose vocabularies overlap: a and b lack tokens of the base, and have some of their own."""
    root = tmp_path_factory.mktemp("speakers")
    common = [f"w{i}" for i in range(12)]
    shared = ["both0", "both1"]
    special = ["<s>", "</s>"]
    base = write_llama(root / "base", seed=0, layers=2, words=[*common, "base0", "base1"], special=special)
    models = {
        "a": write_llama(root / "a", seed=1, layers=2, start_at=base, words=[*common[3:], "a0", *shared],
                         special=[*special, "<a>"]),
        "b": write_llama(root / "b", seed=2, layers=2, start_at=base, words=["b0", *shared, *common[::-1], "base0"],
                         special=[*special, "<b>"]),
    }  # fmt: skip
    return {"base": base, **models}


SPEAKING = {
    "union of a linear merge": """
        models:
          - {model: $base, parameters: {weight: 0.5}}
          - {model: $a, parameters: {weight: 0.3}}
          - {model: $b, parameters: {weight: 0.2}}
        merge_method: linear
        base_model: $base
        tokenizer_source: union
        dtype: float32
    """,
    "union of task vectors": """
        models:
          - {model: $a, parameters: {weight: 0.3}}
          - {model: $b, parameters: {weight: 0.2}}
        merge_method: task_arithmetic
        base_model: $base
        tokenizer: {source: union}
        dtype: float32
    """,
    "the base's tokens": """
        models: [{model: $base}, {model: $b}]
        merge_method: slerp
        base_model: $base
        parameters: {t: 0.4}
        tokenizer_source: base
        dtype: float32
    """,
    "another model's tokens": """
        models:
          - {model: $a, parameters: {weight: 0.3}}
          - {model: $b, parameters: {weight: 0.7}}
        merge_method: linear
        base_model: $base
        parameters: {weight: 1.0}
        tokenizer: {source: $b}
        dtype: float32
    """,
    "tokens one by one": """
        models:
          - {model: $a, parameters: {weight: 0.3}}
          - {model: $b, parameters: {weight: 0.2}}
        merge_method: task_arithmetic
        base_model: $base
        tokenizer:
          source: union
          tokens:
            <a>: {source: $a, force: true}
            both1: {source: $b}
            w5: {source: {kind: model_token, model: $b, token: w7}, force: true}
            <new>: {source: {kind: model_token, model: $a, token_id: 4}}
            <empty>: {source: {kind: zero}}
          pad_to_multiple_of: 16
        dtype: float32
    """,
}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("name", SPEAKING)
def test_tokenizers(name: str, speakers: dict[str, Path], by_mergekit: Callable[..., Path], tmp_path: Path) -> None:
    text = fill(SPEAKING[name], speakers)
    file = tmp_path / "file.yaml"
    file.write_text(text)
    weft.run(file, tmp_path / "ours")
    by_mergekit(yaml.safe_load(text), tmp_path / "theirs")
    mine, other = (TokenizerFiles("", tmp_path / f).ids for f in ("ours", "theirs"))
    assert set(mine) == set(other)
    # mergekit numbers the tokens that it adds in the order of a hash table
    left, right = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert set(left) == set(right)
    for tensor in right:
        a, b = left[tensor], right[tensor]
        assert a.shape == b.shape
        if tensor in EMBEDDINGS:
            padding = np.setdiff1d(np.arange(len(a)), list(mine.values()))
            np.testing.assert_allclose(a[padding], b[padding], rtol=0, atol=TOLERANCE)
            a, b = a[[mine[t] for t in mine]], b[[other[t] for t in mine]]
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE, err_msg=tensor)
    ours, theirs = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "theirs"))
    assert ours["vocab_size"] == theirs["vocab_size"] == left[EMBEDDINGS[0]].shape[0]


def test_transformers_reads_the_same_tokens(speakers: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "file.yaml"
    file.write_text(fill(SPEAKING["tokens one by one"], speakers))
    weft.run(file, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.get_vocab() == TokenizerFiles("", tmp_path / "ours").ids
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    assert special == {"<s>", "</s>", "<a>", "<b>"}
    ids = tokenizer("w3 both1 <a> <new> base1")["input_ids"]
    vocabulary = tokenizer.get_vocab()
    assert ids == [vocabulary[t] for t in ("w3", "both1", "<a>", "<new>", "base1")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size >= len(vocabulary)


def test_embeddings_of_unequal_length(
    speakers: dict[str, Path], by_mergekit: Callable[..., Path], tmp_path: Path
) -> None:
    text = fill(
        """
        models:
          - {model: $base, parameters: {weight: 0.5}}
          - {model: $a, parameters: {weight: 0.3}}
          - {model: $b, parameters: {weight: 0.2}}
        merge_method: linear
        dtype: float32
        """,
        speakers,
    )
    file = tmp_path / "file.yaml"
    file.write_text(text)
    weft.run(file, tmp_path / "ours")
    by_mergekit(yaml.safe_load(text), tmp_path / "theirs", unsafe_truncate_embeddings=True)
    left, right = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    for name in right:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=TOLERANCE, err_msg=name)
    # mergekit leaves the first model's vocab_size in the config
    assert json.loads((tmp_path / "ours/config.json").read_text())["vocab_size"] == len(left[EMBEDDINGS[0]])


def test_stages(folders: dict[str, Path], by_mergekit: Callable[..., Path], tmp_path: Path) -> None:
    final = fill(
        """
        models: [{model: first}, {model: $c}]
        merge_method: slerp
        base_model: first
        parameters: {t: [0.2, 0.7]}
        dtype: float32
        """,
        folders,
    )
    first = fill(
        """
        name: first
        models:
          - {model: $a, parameters: {weight: 0.4}}
          - {model: $b, parameters: {weight: 0.6}}
        merge_method: task_arithmetic
        base_model: $base
        dtype: float32
        """,
        folders,
    )
    file = tmp_path / "file.yaml"
    file.write_text(f"{final}\n---\n{first}")
    weft.run(file, tmp_path / "ours")
    stage = by_mergekit(yaml.safe_load(first), tmp_path / "first")
    by_mergekit(yaml.safe_load(final.replace("first", str(stage))), tmp_path / "theirs")
    assert_same(tmp_path / "ours", tmp_path / "theirs")


# models with several parts


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    root = tmp_path_factory.mktemp("encoders")
    found = {}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 22, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 4}
        config = T5Config(**sizes, num_heads=4, feed_forward_proj="gated-gelu")
        T5ForConditionalGeneration(config).save_pretrained(root / name)
        write_tokenizer(root / name, [f"w{i}" for i in range(20)], ["<s>", "</s>"])
        found[name] = root / name
    return found


def test_modules(encoders: dict[str, Path], by_mergekit: Callable[..., Path], tmp_path: Path) -> None:
    text = fill(
        """
        modules:
          encoder:
            models:
              - {model: $a, parameters: {weight: [0.0, 1.0]}}
              - {model: $b}
            parameters: {weight: 0.5}
          decoder:
            slices:
              - sources:
                  - {model: $a, layer_range: [0, 2]}
                  - {model: $b, layer_range: [0, 2]}
              - sources:
                  - {model: $a, layer_range: [3, 4]}
                  - {model: $b, layer_range: [3, 4], parameters: {weight: 3}}
          shared:
            models: [{model: $b}]
        merge_method: linear
        parameters: {weight: 1}
        dtype: float32
        """,
        encoders,
    )
    file = tmp_path / "file.yaml"
    file.write_text(text)
    weft.run(file, tmp_path / "ours")
    by_mergekit(yaml.safe_load(text), tmp_path / "theirs")
    assert_same(tmp_path / "ours", tmp_path / "theirs", "num_layers", "num_decoder_layers")


def test_older_tokenizer_files_are_converted(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ab", "##c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    files = TokenizerFiles("m", tmp_path)
    assert files.ids == {w: i for i, w in enumerate(words)}
    changed = files.changed(files.ids, [added_token("neu", len(words))])
    for name, content in changed.written.items():
        (tmp_path / name).write_bytes(content)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)("abc neu")["input_ids"] == [2, 5, 6, 7, 3]
