"""Names of activations and parameters in words, and the order in which a backward reaches them.

Activations ("sites") are named by `Engine.trace`, in the order of computation; docs/parity.md lists
them.
"""

from __future__ import annotations

from horovod_lm.spec import ModelSpec

_SPECIAL = {
    "norm": "global norm of the gradient",
    "embeddings.sum": "embeddings, sum of tokens and positions",
    "embeddings": "embeddings after dropout",
    "source_embeddings.sum": "source embeddings, sum of tokens and positions",
    "source_embeddings": "source embeddings after dropout",
    "pooled": "pooler output",
}
_TAILS = {
    "dropped": "{} probabilities after dropout",
    "mixed": "{}, values mixed by it",
    "residual": "residual stream after {}",
}


def words(name: str) -> str:
    """A site or a parameter for a person, blocks counted from 1: `decoder.1.attention.scores` is
    "block 2, attention scores"."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    place, tail = _split(name)
    if not tail:
        return _plain(place)
    if tail == "logits":
        return f"head {place} logits"
    if place == "heads":
        head, _, rest = tail.partition(".")
        return _plain(f"{'output layer' if head == 'lm' else f'head {head}'} {rest}")
    branch, _, end = tail.partition(".")
    text = _TAILS[end].format(_plain(branch)) if end in _TAILS else _plain(tail)
    return f"{place} {text}" if place.endswith(("final norm", "pooler")) else f"{place}, {text}"


def within_layer(name: str) -> str:
    """`words` without the layer, for a table that names it in another column."""
    text, place = words(name), layer(name)
    return text.removeprefix(f"{place},").removeprefix(place).strip() or text


def layer(name: str) -> str:
    """The layer that a site or a parameter belongs to: "embeddings", "block 2", "final norm",
    "pooler", "output", or "all" for the global norm."""
    place, _ = _split(name)
    outputs = place in ("heads", "logits", "loss") or name.endswith(".logits")
    return "all" if place == "norm" else "output" if outputs else place


def _split(name: str) -> tuple[str, str]:
    first, _, rest = name.partition(".")
    if first not in ("decoder", "encoder"):
        return {"source_embeddings": "source embeddings", "pooled": "pooler"}.get(
            first, first
        ), rest
    stack = "encoder " if first == "encoder" else ""
    second, _, tail = rest.partition(".")
    if second.isdigit():
        return f"{stack}block {int(second) + 1}", tail
    if second == "norm":
        return f"{stack}final norm", tail
    return first, rest


def _plain(name: str) -> str:
    text = name.replace("feed_forward", "feed-forward").replace(
        "cross_attention", "cross-attention"
    )
    return text.replace(".", " ").replace("_", " ")


def backward_order(spec: ModelSpec) -> list[str]:
    """The canonical parameters in the order in which a backward completes their gradients, from
    the output back. The table of the spec stands in the order of a pre-norm forward; with
    post-norm each norm follows its sublayer."""
    names = [parameter.name for parameter in spec.parameters]
    if spec.norm_placement == "post":
        names = _norms_last(names)
    # The embeddings' norm stands after the tables in either order.
    return names[::-1]


def _norms_last(names: list[str]) -> list[str]:
    """Each run of `SUBLAYER_norm` parameters moved behind those of `SUBLAYER`."""
    moved: list[str] = []
    waiting: list[str] = []
    for name in names:
        part = ".".join(name.split(".")[:3])
        if waiting and not name.startswith(waiting[0].split("_norm.")[0]):
            moved, waiting = moved + waiting, []
        if part.endswith("_norm"):
            waiting.append(name)
        else:
            moved.append(name)
    return moved + waiting
