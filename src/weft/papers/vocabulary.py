"""Words of the field, brought to one form: light stemming, compounds, and groups of words that mean the same.

A query and a card meet here: both are turned into terms by :func:`terms`; a term also stands for the groups that it
belongs to (:func:`groups`), which count less than the word itself.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_STOP_WORDS = """
a about after all also am an and any are as at be because been before being best better both but by can cannot could do
does doing don each every few for from get gets getting give gives good had has have help her here how i if in into is
isn it its just keep let like make makes me more most much my need needs no nor not of on one only or other our out over
own please same should so some such t than that the their them then there these they this those to too try up us use
used using very want was way we well were what when where which while who why will with without would you your
"""
STOP = frozenset(_STOP_WORDS.split())

# Two words that are one, and pairs that say something neither word says.
_COMPOUNDS = {
    "fine tune": "finetune",
    "full finetune": "finetune",
    "pre train": "pretrain",
    "low bit": "lowbit",
    "few bit": "lowbit",
    "fewer bit": "lowbit",
    "mixed precision": "mixedprecision",
    "data set": "dataset",
    "check point": "checkpoint",
    "hyper parameter": "hyperparameter",
    "over fit": "overfit",
    "un labelled": "unlabelled",
    "un learn": "unlearn",
    "multi task": "multitask",
    "many task": "multitask",
    "long tail": "longtail",
    "class imbalance": "longtail",
    "language model": "llm",
    "large llm": "llm",
    "without data": "datafree",
    "no data": "datafree",
    "data free": "datafree",
    "zero data": "datafree",
    "without calibration": "datafree",
    "without train": "trainfree",
    "no train": "trainfree",
    "train free": "trainfree",
    "without retrain": "trainfree",
    "no retrain": "trainfree",
    "without backpropagation": "nobackprop",
    "no backpropagation": "nobackprop",
    "without backprop": "nobackprop",
    "batch norm": "batchnorm",
    "layer norm": "layernorm",
    "rms norm": "rmsnorm",
    "semi supervised": "semisupervised",
    "mode connectivity": "modeconnectivity",
    "warm up": "warmup",
    "learning rate": "learningrate",
    "look up": "lookup",
    "out distribution": "ood",
    "distribution shift": "ood",
    "domain shift": "ood",
    "non iid": "noniid",
    "re basin": "rebasin",
    "mixture expert": "moe",
    "sparse moe": "moe",
    "random init": "randominit",
    "too large": "toobig",
    "too big": "toobig",
    "too slow": "slow",
}

# Words of one meaning; a word may be in several groups.
_GROUPS = (
    "interfere interference conflict conflicting sign compete competition clash disagree cancel",
    "merge merging combine average averaging soup blend fuse mean interpolate join",
    "compress compression shrink smaller small reduce footprint tiny compact squeeze toobig",
    "quantize quantization int4 int8 int3 int2 lowbit bits 4bit 8bit 2bit nf4 fp4 fp8 ptq qat rounding gptq gguf",
    "forget unlearn unlearning remove removal erase delete gdpr",
    "finetune finetuned finetuning peft adapter lora qlora adapt dora",
    "prune pruning sparse sparsity sparsify mask masked ticket",
    "imbalance imbalanced unbalanced longtail minority rare skewed skew uneven heterogeneous heterogeneity noniid",
    "noise noisy mislabelled wrong corrupted incorrect",
    "moe smoe expert experts router routing mixtral gate",
    "federated federation client clients fedavg decentralised gossip server",
    "continual incremental lifelong catastrophic sequence forgetting",
    "robust robustness adversarial attack attacks pgd perturbation defence defense",
    "shift ood drift domain corruption generalisation",
    "diverge divergence unstable instability spike spikes nan explode exploding collapse",
    "stable stability stabilise steady",
    "llm gpt llama transformer",
    "initialise initialisation initial init start xavier kaiming randominit",
    "fast faster speed quick slow latency accelerate cheaper inference throughput",
    "memory vram ram oom footprint",
    "distill distillation teacher student",
    "nas architecture supernet subnetwork",
    "confidence confident calibrated calibration uncertainty overconfident",
    "vocabulary token tokens tokenizer embedding embeddings",
    "generate generation generator hypernetwork",
    "watermark fingerprint trace attribution leak leaked stolen owner",
    "overfit overfitting regularise regulariser regularisation",
    "preference dpo rlhf alignment align kto simpo",
    "image images vision vit cnn convolution picture",
    "graph gnn gcn node",
    "grow growing widen expand deepen enlarge bigger wider",
    "rotation rotate equivariant equivariance invariant",
    "benchmark evaluation eval score significant significance",
    "optimizer adam adamw sgd momentum",
    "annotate annotation label labels labelling",
    "select selection choose pick subset",
    "pseudolabel fixmatch semisupervised unlabelled",
    "grpo reinforcement rl reward rewards rollout",
    "permute permutation rebasin neuron units seed seeds",
    "datafree trainfree",
    "train training pretrain pretraining",
    "json grammar structured constrained constraint schema",
    "forest tree trees boosting xgboost",
    "ensemble ensembling stacking bagging vote",
    "probability likelihood odds",
    "forecast quantile interval intervals",
    "normalise normalisation norm batchnorm layernorm rmsnorm",
    "recurrent rnn lstm gru",
    "diffusion dit generative",
    "clip multimodal vlm image-text vision-language",
    "vector codebook vq kmeans clustering",
    "entity mention ontology",
    "physics pde fno operator",
    "protein molecule molecules pointcloud atoms",
    "augment augmentation",
    "distilled condensation synthetic dataset",
    "kan activation activations",
    "siren nerf coordinate implicit",
    "svd singular lowrank",
    "grokking delayed",
    "portfolio trading stock finance strategy",
    "idle unused dead underused",
    "phone phones mobile device devices edge embedded",
    "resnet residual",
    "drop remove removal cut",
    "communication bandwidth upload",
    "worse fail fails failure broken bad poor degrade hurt",
    "stale absent offline dropout unavailable",
)


@cache
def stem(word: str) -> str:
    """A word without its ending, in American spelling; crude, and the same for queries and cards.

    >>> stem("quantisation"), stem("quantizers"), stem("labelled"), stem("merging"), stem("merges"), stem("noisy")
    ('quantiz', 'quantiz', 'label', 'merg', 'merg', 'nois')
    """
    if word in ("forgets", "forgot", "forgotten", "forgetting"):
        return "forgetting"  # a fault; to forget on request is not
    if len(word) <= 3 or any(c.isdigit() for c in word):
        return word
    word = re.sub("(?<=..)our", "or", word)
    if word.endswith("ies"):
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith(("ss", "us", "is", "as")):
        word = word[:-1]
    shorter = re.sub(r"(?<=.{3})i[sz](e|ed|er|ing|ation|ational)$", "iz", word)
    if shorter != word:
        return shorter
    for suffix in ("ations", "ating", "ation", "ated", "ator", "ate", "ness", "ity", "ing", "er", "ed", "or"):
        head = word.removesuffix(suffix)
        if head != word and len(head) >= (3 if suffix in ("ing", "ed") else 4) and re.search("[aeiouy]", head):
            if word.endswith("eed"):
                break
            word = head
            if word[-1] == word[-2] and word[-1] not in "sfea":
                word = word[:-1]
            break
    if len(word) > 5 and word.endswith("ll"):
        return word[:-1]
    if len(word) >= 7 and word.endswith(("tion", "sion")):
        word = word[:-3]
    return word[:-1] if len(word) > (4 if word[-1] == "y" else 3) and word.endswith(("e", "y")) else word


def terms(text: str) -> list[str]:
    """Stems and compounds of a text, in order, stop words left out.

    >>> terms("Fine-tunes that interfere, without data"), terms("a mixture of experts as a language model")
    (['finetun', 'interfer', 'datafre'], ['moe', 'llm'])
    """
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    pairs = _pairs()
    result: list[str] = []
    for word in re.findall(r"[^\W_]+", text.lower()):
        current = word if word in STOP else stem(word)
        previous = result[-1] if result else ""
        # "mixture of experts" and "out of distribution" are pairs around a stop word
        if previous == "of" and len(result) > 1 and (result[-2], current) in pairs:
            result[-2:] = [pairs[result[-2], current]]
        elif (previous, current) in pairs:
            result[-1] = pairs[previous, current]
        else:
            result.append(current)
    return [t for t in result if t not in STOP]


@cache
def _pairs() -> dict[tuple[str, str], str]:
    pairs = {}
    for words, one in _COMPOUNDS.items():
        first, second = (w if w in STOP else stem(w) for w in words.split())
        pairs[first, second] = stem(one)
    return pairs


@cache
def groups(term: str) -> tuple[str, ...]:
    """Names of the groups of synonyms that a term belongs to.

    >>> groups("interfer") == groups("conflict") != ()
    True
    """
    return tuple(synonyms().get(term, ()))


@cache
def synonyms() -> dict[str, list[str]]:
    """All terms that belong to a group, with the names of their groups."""
    members: dict[str, list[str]] = {}
    for number, group in enumerate(_GROUPS):
        for term in dict.fromkeys(t for word in group.split() for t in terms(word)):
            members.setdefault(term, []).append(f"~{number}")
    return members
