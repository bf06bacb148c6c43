import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weft.errors import RecipeError
from weft.init import extend_vocabulary_, hull_violation, replace_vocabulary_

transformers = pytest.importorskip("transformers")
VOCABULARY, WIDTH, COUNT = 40, 16, 9
TEXT = [[VOCABULARY + i % COUNT if i % 3 else i % VOCABULARY for i in range(400)]]
PIECES = [[i, i + 1, 3 * i] for i in range(COUNT)]
CONVEX = ("mean", "subword_mean", "convex", "cw2v")
# Sums of 16 products and of 40 coefficients, all of numbers below 4.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coefficients(count: int = COUNT, rows: int = VOCABULARY) -> torch.Tensor:
    return torch.rand(count, rows, generator=seeded()).softmax(dim=1)


def arguments(strategy: str) -> dict[str, Any]:
    return {
        "strategy": strategy, "pieces": PIECES, "text": TEXT, "coefficients": coefficients(), "steps": 30,
        "generator": seeded(),
    }  # fmt: skip


def llama(tied: bool, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    nn.init.normal_(model.get_output_embeddings().bias, generator=seeded())
    return model


def bart() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_(generator=seeded())
    return model


MODELS = {
    "tied Llama": lambda: llama(True),
    "untied Llama": lambda: llama(False),
    "GPT-2": gpt2,
    "BERT, tied, with a bias": bert,
    "BART, three places and a bias in a buffer": bart,
}


@pytest.mark.parametrize("strategy", ["subword_mean", "cw2v", "multivariate"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_old_rows_stay_and_ties_stay_through_a_file(name: str, strategy: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    ties = len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))
    state = torch.random.get_rng_state()
    done = extend_vocabulary_(model, COUNT, **arguments(strategy))
    assert torch.equal(torch.random.get_rng_state(), state)
    for n, value in model.state_dict().items():
        grown = value.shape != before[n].shape
        axis = list(before[n].shape).index(VOCABULARY) if grown else 0
        assert torch.equal(value.narrow(axis, 0, before[n].shape[axis]) if grown else value, before[n]), n
        assert not grown or value.shape[axis] == VOCABULARY + COUNT, n
    assert len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters())) == ties
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCABULARY + COUNT
    assert model.get_output_embeddings().out_features == VOCABULARY + COUNT
    assert done.output is done.input or name == "untied Llama"
    assert (done.input is None) == (strategy not in CONVEX)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    ids = torch.arange(VOCABULARY + COUNT)[None]
    again_logits, logits = again(ids[:, -20:]).logits, model(ids[:, -20:]).logits
    assert logits.shape[-1] == VOCABULARY + COUNT
    assert torch.equal(again_logits, logits)


@pytest.mark.parametrize("strategy", CONVEX)
@pytest.mark.parametrize("tied", [True, False])
def test_coefficients_are_convex_and_are_what_the_rows_are(tied: bool, strategy: str) -> None:
    model = llama(tied)
    old = [m.weight.detach().double() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    done = extend_vocabulary_(model, COUNT, **arguments(strategy))
    for mix, before, module in zip(
        (done.input, done.output), old, (model.get_input_embeddings(), model.get_output_embeddings())
    ):
        assert mix is not None
        dense = mix.to_dense().double()
        assert dense.shape == (COUNT, VOCABULARY)
        assert (dense >= 0).all()
        torch.testing.assert_close(dense.sum(dim=1), torch.ones(COUNT, dtype=torch.float64), atol=ROUNDING, rtol=0)
        torch.testing.assert_close(module.weight[VOCABULARY:].double(), dense @ before, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("strategy", CONVEX)
@pytest.mark.parametrize("name", ["tied Llama", "untied Llama", "GPT-2"])
def test_hull_theorem_and_greedy_output(name: str, strategy: str) -> None:
    model = MODELS[name]()
    prompt = torch.randint(VOCABULARY, (8, 12), generator=seeded(1))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = model.generate(prompt, **options)
    extend_vocabulary_(model, COUNT, **arguments(strategy))
    assert torch.equal(model.generate(prompt, **options), first)
    rows = model.get_output_embeddings().weight.detach()
    real = model(prompt, output_hidden_states=True).hidden_states[-1].detach()
    for hidden in (real, torch.randn(1000, WIDTH, generator=seeded())):
        scale = hidden.norm(dim=-1) * rows.norm(dim=1).max()
        assert (hull_violation(rows[:VOCABULARY], rows[VOCABULARY:], hidden) <= ROUNDING * scale).all()


def test_rows_out_of_the_hull_win_and_change_the_output() -> None:
    model = llama(False)
    prompt = torch.randint(VOCABULARY, (8, 12), generator=seeded(1))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = model.generate(prompt, **options)
    model.resize_token_embeddings(VOCABULARY + COUNT, mean_resizing=False)  # N(0, 0.3), as large as the old rows
    rows = model.get_output_embeddings().weight.detach()
    hidden = model(prompt, output_hidden_states=True).hidden_states[-1].detach()
    share = (hull_violation(rows[:VOCABULARY], rows[VOCABULARY:], hidden) > 0).float().mean()
    # 9 of 49 rows of one law: each is the best as often as another
    assert 0.05 < share < 0.4
    assert not torch.equal(model.generate(prompt, **options), first)


def test_hull_theorem_holds_with_a_bias_as_a_column() -> None:
    embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
    nn.init.normal_(head.bias, std=3, generator=seeded())  # large enough to decide
    extend_vocabulary_(embedding, COUNT, head=head, **arguments("convex"))
    hidden = torch.randn(2000, WIDTH, generator=seeded())
    logits = head(hidden)
    assert (logits.argmax(dim=1) < VOCABULARY).all()
    rows = torch.cat([head.weight, head.bias[:, None]], dim=1)
    ones = torch.cat([hidden, torch.ones(2000, 1)], dim=1)
    expected = logits[:, VOCABULARY:].amax(dim=1) - logits[:, :VOCABULARY].amax(dim=1)
    torch.testing.assert_close(hull_violation(rows[:VOCABULARY], rows[VOCABULARY:], ones), expected)


def test_multivariate_law_is_that_of_transformers() -> None:
    count, scale = 20_000, 1e-9  # theirs
    model, peer = llama(True), llama(True)
    old = model.get_input_embeddings().weight.detach().double()
    # rows far from zero hide deviations of 3e-5 in float32
    extend_vocabulary_(model.double(), count, strategy="multivariate", scale=scale, generator=seeded())
    torch.manual_seed(0)
    peer.resize_token_embeddings(VOCABULARY + count)
    for made in (model, peer):
        rows = made.get_input_embeddings().weight.detach()[VOCABULARY:].double()
        spread = (rows - old.mean(dim=0)) / scale**0.5
        covariance = torch.cov(old.T, correction=0)
        largest = covariance.diagonal().max()
        # the mean of 2e4 draws scatters by sigma / 141, an entry of the covariance by up to sqrt(2) sigma^2 / 141;
        # the largest of 136 is rarely beyond 4 of these
        assert spread.mean(dim=0).abs().max() < 4 * largest.sqrt() / 141
        assert (torch.cov(spread.T) - covariance).abs().max() < 4 * 2**0.5 * largest / 141


def test_univariate_law() -> None:
    embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    old = embedding.weight.detach()
    extend_vocabulary_(embedding, 20_000, strategy="univariate", generator=seeded())
    spread = (embedding.weight.detach()[VOCABULARY:] - old.mean(dim=0)) / old.std(dim=0, correction=0)
    assert spread.mean(dim=0).abs().max() < 4 / 141
    assert (torch.cov(spread.T) - torch.eye(WIDTH)).abs().max() < 4 * 2**0.5 / 141


def test_covariance_without_full_rank_is_no_obstacle() -> None:
    embedding = nn.Embedding(3, WIDTH)  # rank 2
    old = embedding.weight.detach().clone()
    extend_vocabulary_(embedding, 200, strategy="multivariate", scale=1.0, generator=seeded())
    away = embedding.weight.detach()[3:] - old.mean(dim=0)
    inside = torch.linalg.qr((old - old.mean(dim=0)).T[:, :2]).Q
    assert (away - away @ inside @ inside.T).norm() < 1e-3 * away.norm()  # the square root of the jitter
    nn.init.ones_(embedding.weight)
    extend_vocabulary_(embedding, 1, strategy="multivariate")
    assert torch.equal(embedding.weight[-1], torch.ones(WIDTH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", [*CONVEX, "univariate", "multivariate"])
def test_another_tokenizer_copies_what_both_have(strategy: str, dtype: torch.dtype) -> None:
    old = {chr(97 + i): i for i in range(VOCABULARY)}
    new = {t: i for i, t in enumerate(sorted(old, reverse=True)[:30])} | {chr(300 + i): 32 + i for i in range(COUNT)}
    model = llama(False, pad_token_id=3, eos_token_id=[1, 2], bos_token_id=39).to(dtype)
    model.generation_config.eos_token_id = 38
    before = [m.weight.clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    text = [[i % 30 if i % 2 else 32 + i % COUNT for i in range(300)]]
    done = replace_vocabulary_(
        model, old, new, **arguments(strategy) | {"text": text, "pieces": lambda t: [ord(t) - 300]},
        pad_to_multiple_of=16,
    )  # fmt: skip
    for module, values in zip((model.get_input_embeddings(), model.get_output_embeddings()), before):
        assert module.weight.shape == (48, WIDTH)
        for token, index in new.items():
            if token in old:
                assert torch.equal(module.weight[index], values[old[token]])
        mean = values.to(torch.float32).mean(dim=0).to(dtype)
        assert torch.equal(module.weight[done.padding], mean.expand(len(done.padding), -1))
        if strategy == "subword_mean":
            assert torch.equal(module.weight[done.made], values[:COUNT])
    assert done.padding.tolist() == [30, 31, *range(41, 48)]
    assert done.made.tolist() == [*range(32, 41)]
    assert {(int(a), int(b)) for a, b in done.copied} == {(i, old[t]) for t, i in new.items() if t in old}
    # the 30 kept are 10 to 39, backwards
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, None, None)
    assert model.get_input_embeddings().padding_idx is None
    assert model.generation_config.eos_token_id == 1
    assert set(done.unset) >= {"eos_token_id", "pad_token_id"}


def test_padding_row_follows_its_token() -> None:
    embedding = nn.Embedding(3, 2, padding_idx=2)
    replace_vocabulary_(embedding, {"a": 0, "b": 1, "<pad>": 2}, {"<pad>": 0, "a": 1, "b": 2}, strategy="mean")
    assert embedding.padding_idx == 0
    assert (embedding.weight[0] == 0).all()
    embedding(torch.tensor([0, 1])).sum().backward()
    assert embedding.weight.grad[:, 0].tolist() == [0, 1, 0]


def test_spare_rows_are_used_first_and_are_in_no_mean() -> None:
    embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    head.weight = embedding.weight
    with torch.no_grad():
        embedding.weight[5:] = 1e6
    parameter = embedding.weight
    before = embedding.weight.detach().clone()
    done = extend_vocabulary_(embedding, 2, head=head, tokens=5, strategy="mean")
    assert embedding.weight is parameter
    assert head.weight is parameter
    torch.testing.assert_close(embedding.weight[5:7], before[:5].mean(dim=0).expand(2, -1))
    assert torch.equal(embedding.weight[7], before[7])
    assert done.input[0].tolist() == pytest.approx([0.2] * 5 + [0] * 3)
    extend_vocabulary_(embedding, 4, head=head, tokens=7, strategy="cw2v", text=[[8, 9, 10, 0, 7]], steps=2)
    assert embedding.weight.shape == (11, 4)
    assert embedding.weight[7:].abs().max() < 10
    assert head.weight is embedding.weight
    assert head.out_features == embedding.num_embeddings == 11


def test_tokens_without_pieces_get_the_mean_and_repeated_pieces_count() -> None:
    embedding = nn.Embedding(4, 3, dtype=torch.float64)
    old = embedding.weight.detach().clone()
    extend_vocabulary_(embedding, 2, pieces=[[], [0, 0, 1]])
    torch.testing.assert_close(embedding.weight[4], old.mean(dim=0))
    torch.testing.assert_close(embedding.weight[5], (2 * old[0] + old[1]) / 3)


def test_coefficients_of_the_mean_take_the_memory_of_one_row() -> None:
    embedding = nn.Embedding(2000, 4)
    done = extend_vocabulary_(embedding, 1000, strategy="mean")
    assert done.input.shape == (1000, 2000)
    assert done.input.untyped_storage().nbytes() == 4 * 2000


def test_input_and_output_may_have_coefficients_of_their_own_dense_or_sparse() -> None:
    embedding, head = nn.Embedding(4, 3), nn.Linear(3, 4)
    first, second = torch.eye(4)[:1], torch.eye(4)[3:].to_sparse()
    extend_vocabulary_(embedding, 1, head=head, strategy="convex", coefficients=(first, second))
    assert torch.equal(embedding.weight[4], embedding.weight[0])
    assert torch.equal(head.weight[4], head.weight[3])
    assert head.bias[4] == head.bias[3]


def test_nothing_new_only_pads_and_gradients_stay_off() -> None:
    embedding = nn.Embedding(5, 3).requires_grad_(False)
    done = extend_vocabulary_(embedding, 0, pieces=[], pad_to_multiple_of=8)
    assert embedding.weight.shape == (8, 3)
    assert not embedding.weight.requires_grad
    assert (len(done.made), done.padding.tolist()) == (0, [5, 6, 7])
    assert done.output is None


def quantised() -> nn.Module:
    embedding = nn.Embedding(4, 3)
    embedding.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    return embedding


def sharded() -> nn.Module:
    embedding = nn.Embedding(4, 3)
    embedding.weight = nn.Parameter(torch.empty(0))
    return embedding


def broken() -> nn.Module:
    embedding = nn.Embedding(4, 3)
    nn.init.constant_(embedding.weight[2], float("nan"))
    return embedding


@pytest.mark.parametrize(
    ("model", "new", "options", "message"),
    [
        (quantised, 1, {}, "quantised tables"),
        (sharded, 1, {}, "sharded"),
        (broken, 1, {}, "row 2"),
        (lambda: nn.Embedding(4, 3, device="meta"), 1, {}, "meta device"),
        (lambda: nn.Embedding(0, 3), 1, {}, "no rows to start from"),
        (lambda: nn.Linear(4, 3), 1, {}, "does not say where its tables are"),
        (lambda: torch.compile(nn.Embedding(4, 3), backend="eager"), 1, {}, "wraps the model"),
        (lambda: llama(True), 1, {"head": nn.Linear(3, 4)}, "knows its own head"),
        (lambda: nn.Embedding(4, 3), 1, {"head": nn.Linear(3, 5)}, "4 rows and the output head"),
        (lambda: nn.Embedding(4, 3), 1, {"head": nn.Embedding(4, 3)}, "must be an nn.Linear"),
        (lambda: nn.Embedding(4, 3), -1, {}, "only grows"),
        (lambda: nn.Embedding(4, 3), 1, {"tokens": 5}, "at most that of the tables"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "subword_mean"}, "needs pieces"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "convex"}, "needs coefficients"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "cw2v"}, "needs text"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "subwordmean"}, "Did you mean subword_mean"),
        (lambda: nn.Embedding(4, 3), "abc", {}, "a list of texts"),
        (lambda: nn.Embedding(4, 3), ["a", "b", "a"], {}, "'a' is given twice"),
        (lambda: nn.Embedding(4, 3), ["ab"], {"strategy": "subword_mean", "pieces": [[0, 4]]}, "Piece 4 of new token 0"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "subword_mean", "pieces": [[0, -1]]}, "Piece -1"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "subword_mean", "pieces": [[3]], "tokens": 3}, "Piece 3"),
        (lambda: nn.Embedding(4, 3), 2, {"strategy": "subword_mean", "pieces": [[0]]}, "1 entries for 2"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "subword_mean", "pieces": lambda t: [0]}, "needs the texts"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "convex", "coefficients": torch.ones(1, 4)}, "sum to 1"),
        (lambda: nn.Embedding(4, 3), 1, {"strategy": "convex", "coefficients": torch.ones(4)}, "are \\(new tokens"),
        (
            lambda: nn.Embedding(2, 3), 1, {"strategy": "convex", "coefficients": torch.tensor([[2.0, -1.0]])},
            "smallest coefficient is -1",
        ),
        (
            lambda: nn.Embedding(2, 3), 1, {"strategy": "convex", "coefficients": torch.tensor([[float("nan"), 1.0]])},
            "sum to 1",
        ),
        (
            lambda: nn.Embedding(1, 3), 1, {"strategy": "convex", "coefficients": (torch.ones(1, 1),) * 2},
            "2 matrices of coefficients for 1 tables",
        ),
    ],
)  # fmt: skip
def test_refuses(model: Any, new: Any, options: dict[str, Any], message: str) -> None:
    made = model()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(RecipeError, match=message):
        extend_vocabulary_(made, new, **{"strategy": "mean", **options})
    assert all(v.shape == before[n].shape for n, v in made.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"a": 0, "b": 0}, {"a": 0, "b": 1, "c": 2}, "'a' and 'b' have the id 0"),
        ({"a": 0, "b": 1}, {"a": 1, "c": 1, "d": 2}, "'a' and 'c' have the id 1"),
        ({"a": 0, "b": 3}, {"a": 0, "b": 1, "c": 2}, "trained with"),
        ({"a": 0}, {"a": -1, "b": 1, "c": 2}, "from 0"),
        ({"a": 0}, {}, "0 tokens"),
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1}, "shrink=True"),
    ],
)
def test_refuses_vocabularies(old: dict[str, int], new: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace_vocabulary_(nn.Embedding(3, 2), old, new, strategy="mean")


def test_hull_violation_refuses() -> None:
    with pytest.raises(RecipeError, match="are needed"):
        hull_violation(torch.ones(2, 3), torch.ones(2, 4), torch.ones(3))
    with pytest.raises(RecipeError, match="are needed"):
        hull_violation(torch.ones(2, 3), torch.ones(0, 3), torch.ones(3))
