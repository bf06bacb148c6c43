"""Problem words, typing errors and synonyms find the right card; facets narrow; nothing found gives the nearest."""

import pytest

from weft.errors import RecipeError
from weft.papers.catalogue import load
from weft.papers.search import search
from weft.papers.status import Status
from weft.papers.vocabulary import groups, stem, terms

# query -> a card that must be among the first three
QUERIES = [
    ("fine-tunes interfere", "pcb-merging"),
    ("fine tuned models conflict when merged", "pcb-merging"),
    ("average checkpoints from a sweep", "model-soups"),
    ("merge models trained from different seeds", "weight-matching"),
    ("my merged model is worse than either", "weight-matching"),
    ("quantise without data", "nupes"),
    ("4-bit language model", "awq"),
    ("int4 llm", "awq"),
    ("qunatization 2 bits codebook", "vptq"),
    ("bits per layer under a budget", "gradient-ptq"),
    ("weights as powers of two, no multiplication", "denseshift"),
    ("diffusion transformer 2 bit", "vq4dit"),
    ("forget a class", "salun"),
    ("machine unlerning", "salun"),
    ("experts unused in mixture", "alf-lb"),
    ("experts unused in mixture", "m-smoe"),
    ("mixture of experts too big to serve", "m-smoe"),
    ("unbalanced clients federated", "fedstale"),
    ("federated learning across hospitals with different scanners", "fedwon"),
    ("attention entropy collapse", "sigma-reparam"),
    ("loss spikes in transformer training", "sigma-reparam"),
    ("label noise", "ensloss"),
    ("rare classes under adversarial attack", "srat"),
    ("catastrophic forgetting", "exssnet"),
    ("the network forgets old tasks", "dynamic-sparse-continual"),
    ("who leaked my model", "wouaf"),
    ("make it robust to blur without retraining", "robust-weight-signatures"),
    ("prune an LLM for medicine", "d-pruner"),
    ("how much to prune in each layer", "rd-pruning"),
    ("dataset distilation", "smooth-trajectory-distillation"),
    ("choose what to label", "active-outlier-ensembles"),
    ("ordered outcome, rare event", "presto"),
    ("is the difference between two models significant?", "evaluation-variance"),
    ("add tokens to a tokenizer", "cw2v"),
    ("smaller adapters than LoRA", "mixture-of-shards"),
    ("optimizer states out of memory", "gradnormlorp"),
    ("tiny batches in object detection", "weight-standardization"),
    ("molecules forces rotation", "ponita"),
    ("force JSON output", "awrs"),
    ("visual tokens too many, kv cache", "p-mod"),
    ("stabelise training", "sigma-reparam"),
    ("wise-ft", "bang"),
    ("double descent", "generalization-dynamics"),
]


@pytest.mark.parametrize(("query", "key"), QUERIES)
def test_the_right_card_is_among_the_first_three(query: str, key: str) -> None:
    hits = search(query, limit=3)
    assert key in [hit.paper.key for hit in hits]
    assert not any(hit.nearest for hit in hits)


def test_to_forget_on_request_is_not_forgetting() -> None:
    assert search("forget a class", limit=1)[0].paper.key == "salun"
    assert search("the network keeps forgetting", limit=1)[0].paper.family == "continual"


def test_every_card_is_found_by_its_own_names() -> None:
    for card in load().values():
        for query in (card.key, card.module, card.title):
            assert search(query, limit=1)[0].paper is card, query
        if card.arxiv:
            assert search(f"see arXiv:{card.arxiv}", limit=1)[0].paper is card
        assert card in [hit.paper for hit in search(card.keywords[0], limit=5)], card.key


def test_most_cards_survive_a_typing_error() -> None:
    # the first key word, its longest word with two letters exchanged in the middle
    found = 0
    for card in load().values():
        word = max(card.keywords[0].split(), key=len)
        middle = len(word) // 2
        wrong = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
        query = card.keywords[0].replace(word, wrong)
        found += card.key in [hit.paper.key for hit in search(query, limit=5)]
    assert found >= 100


def test_spellings_and_forms_are_one() -> None:
    for words in (
        "quantise quantize quantisation quantization quantized quantizer quantizing",
        "merge merges merged merging merger",
        "label labels labelled labeled labelling",
        "initialise initialize initialization initialised",
        "noise noisy",
        "distill distilled distillation distilling",
        "federated federation federate",
    ):
        assert len({stem(word) for word in words.split()}) == 1, words
    assert terms("Fine-tuned") == terms("finetunes") == terms("fine tuning")
    assert terms("Mixture-of-Experts") == terms("MoE")
    assert terms("Padé") == terms("Pade")
    assert groups(stem("interfere")) == groups(stem("conflicts"))


def test_the_same_words_in_any_order_and_case() -> None:
    first = search("gradient compression for federated clients")
    assert first == search("CLIENTS gradient, federated!! compression")
    assert [hit.score for hit in first] == sorted((hit.score for hit in first), reverse=True)


def test_facets_narrow() -> None:
    every = search("", limit=None)
    assert len(every) == 116
    assert all(hit.paper.family == "merge" for hit in search("", family="merge", limit=None))
    both = search("", family=["merge", "edit"], limit=None)
    assert {hit.paper.family for hit in both} == {"merge", "edit"}
    moe = search("", have="mixture of experts", limit=None)
    assert {hit.paper.key for hit in moe} == {"alf-lb", "m-smoe"}
    assert {hit.paper.key for hit in search("", have="a mixture of experts", want="shrink")} == {"m-smoe"}
    fewer = search("", want="fewer bits", limit=None)
    assert len(fewer) >= 10
    assert all("fewer bits" in hit.paper.want or "extremely few bits" in hit.paper.want for hit in fewer)
    tunes = {hit.paper.key for hit in search("", have="fine-tunes", limit=None)}
    assert {"model-soups", "bang"} <= tunes  # several fine-tunes, and a base with one
    two = search("", have=["one trained model", "labelled data"], limit=None)
    assert all({"one trained model", "labelled data"} <= set(hit.paper.have) for hit in two)
    assert "awq" not in [hit.paper.key for hit in search("4-bit language model", have="a training loop")]


def test_grade_facet_uses_the_status() -> None:
    status = {key: Status("checked" if key in ("awq", "salun") else "planned") for key in load()}
    assert {hit.paper.key for hit in search("", grade="checked", status=status)} == {"awq", "salun"}
    assert [hit.paper.key for hit in search("quantize", grade="checked", status=status)] == ["awq"]
    assert len(search("", grade=["checked", "planned"], limit=None, status=status)) == 116


def test_facets_forgive() -> None:
    assert search("", family="quantise", limit=None) == search("", family="quantize", limit=None)
    with pytest.raises(RecipeError, match="Did you mean merge"):
        search("", family="mergee")


@pytest.mark.parametrize("facet", ["have", "want", "family", "grade"])
def test_unknown_facets_are_refused(facet: str) -> None:
    with pytest.raises(RecipeError, match=f"There is no {facet} 'bananas'"):
        search("merge", **{facet: "bananas"})  # type: ignore[arg-type]


def test_nothing_found_gives_the_nearest_three() -> None:
    for query in ("xyzzy", "bake bread", "the of", "????", "ß", "1234567"):
        hits = search(query)
        assert len(hits) == 3, query
        assert all(hit.nearest for hit in hits), query
        assert hits == search(query)
    # letters decide where no word does, facets where letters say nothing
    assert "kat" in [hit.paper.key for hit in search("kolmogorovarnoldtransformers")]
    crossed = search("average checkpoints from a sweep", family="quantize")
    assert crossed[0].paper.key == "model-soups"
    assert crossed[0].nearest
    assert all(
        hit.paper.goal == "edit" or hit.paper.family == "optim" for hit in search("", want="edit", family="optim")
    )


def test_limits() -> None:
    assert len(search("train", limit=None)) > 10 == len(search("train"))
    assert search("train", limit=0) == []
    assert len(search("xyzzy", limit=1)) == 1
