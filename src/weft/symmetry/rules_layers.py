"""Rules of products, attention, convolutions, normalisation and pooling."""

from __future__ import annotations

from weft.symmetry.factors import Axis, Misaligned, size_of
from weft.symmetry.rules import Call, Value, rule


@rule("linear")
def linear(call: Call) -> Value:
    """x (…, in), weight (out, in), bias (out)."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    call.unify(x.axes[-1], weight.axes[-1])
    _mark(call, "linear", weight.axes[-1], *weight.axes[:-1])
    out = weight.axes[:-1]
    if bias is not None:
        call.broadcast([out, bias.axes])
    return Value(x.axes[:-1] + out)


@rule("bilinear")
def bilinear(call: Call) -> Value:
    """x (…, in1), y (…, in2), weight (out, in1, in2)."""
    x, y, weight, bias = call["input1"], call["input2"], call["weight"], call["bias"]
    call.unify(x.axes[-1], weight.axes[1])
    call.unify(y.axes[-1], weight.axes[2])
    call.broadcast([weight.axes[:1], *([bias.axes] if bias is not None else [])])
    places = call.broadcast([x.axes[:-1], y.axes[:-1]])
    call.inner.append([*places, weight.axes[1], weight.axes[2]])  # the outer product
    return Value(places + weight.axes[:1])


@rule("_weight_norm")
def weight_norm(call: Call) -> Value:
    """A direction (out, in) and a gain (out, 1)."""
    direction, dim = call["v"], call["dim"]
    call.broadcast([direction, call["g"]])
    call.mixes(direction, [d for d in range(len(direction.axes)) if d != dim % len(direction.axes)])
    return Value(direction.axes, constant=True)


def _mark(call: Call, hint: str, *axes: Axis) -> None:
    for axis in axes:
        call.space.hint(axis, hint)


def _product(call: Call, a: Value, b: Value) -> list[Axis]:
    """Matrix product with broadcast batch axes; vectors lose their axis."""
    left, right = list(a.axes), list(b.axes)
    call.unify(left[-1], right[-2] if len(right) > 1 else right[-1])
    if len(left) >= 4 and len(right) >= 4:
        _mark(call, "heads", left[-3], right[-3])
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else []
    for value, axes in ((a, left), (b, right)):
        if value.constant and len(axes) == 2:
            _mark(call, "linear", *axes)
    return call.broadcast([left[:-2], right[:-2]]) + rows + columns


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(call: Call) -> Value:
    """(…, n, k) @ (…, k, m)."""
    other = next(v for v in (call["other"], call["mat2"], call["vec"], call["tensor"]) if v is not None)
    return Value(_product(call, call["self"], other))


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(call: Call) -> Value:
    """A product and a bias."""
    if call.name == "addbmm":
        raise Misaligned("no rule")
    pairs = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}[call.name]
    out = _product(call, call[pairs[0]], call[pairs[1]])
    call.broadcast([out, call["self"].axes])
    return Value(out)


@rule("einsum")
def einsum(call: Call) -> Value:
    """Letters are axes."""
    equation, operands = call["equation"].replace(" ", ""), call["tensors"]
    if "..." in equation:
        raise Misaligned("an ellipsis")
    inputs, arrow, output = equation.partition("->")
    axes: dict[str, Axis] = {}
    for letters, value in zip(inputs.split(","), operands):
        for letter, axis in zip(letters, value.axes):
            if call.space.expand(axes.setdefault(letter, axis)):
                if call.space.expand(axis):
                    call.unify(axes[letter], axis)
            else:
                axes[letter] = axis
    if not arrow:
        output = "".join(sorted(c for c in set(inputs) - {","} if inputs.count(c) == 1))
    call.inner.append([axes[c] for c in axes])  # the product before the sum, with every letter once
    return Value([axes[c] for c in output])


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Value:
    """query (…, h, L, e), key (…, h or h / g, S, e), value (…, h or h / g, S, v)."""
    q, k, v, mask = call["query"].axes, call["key"].axes, call["value"].axes, call["attn_mask"]
    call.unify(q[-1], k[-1])
    call.unify(k[-2], v[-2])
    batches = [q[:-2]]
    for other in (k[:-2], v[:-2]):
        if call["enable_gqa"] and other and size_of(other[-1]) != size_of(q[-3]):
            copies = call.space.axis(size_of(q[-3]) // size_of(other[-1]))
            other = [*other[:-1], other[-1] + copies]
        batches.append(other)
    batch = call.broadcast(batches)
    scores = [*batch, q[-2], k[-2]]
    if call["is_causal"]:
        call.freeze(q[-2])
        call.freeze(k[-2])
    if mask is not None:
        call.broadcast([scores, mask.axes])
    call.inner.append(scores)
    if len(q) >= 4:
        _mark(call, "heads", q[-3])
    _mark(call, "head_dim", q[-1], v[-1])
    return Value([*batch, q[-2], v[-1]])


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(call: Call) -> Value:
    """x (n, groups × in, …), weight (groups × out, in, …), or (groups × in, out, …) if transposed."""
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"] or 1
    spatial = len(weight.axes) - 2
    transposed = "transpose" in call.name or bool(call["transposed"])
    channels = x.axes[-1 - spatial]
    for axis in [*weight.axes[2:], *(x.axes[-spatial:])]:
        call.freeze(axis, "places in an image or a kernel")
    rows, columns = weight.axes[0], weight.axes[1]
    if groups == 1:
        inner, out = (rows, columns) if transposed else (columns, rows)
        call.unify(channels, inner)
    else:
        group, inside = call.space.regroup(rows, (groups, size_of(rows) // groups))
        call.unify(channels, group + (inside if transposed else columns))
        out = group + (columns if transposed else inside)
    if bias is not None:
        call.unify(bias.axes[0], out)
    _mark(call, "conv", rows, columns)
    places = [call.space.axis(n, "places in an image") for n in call.shapes[0][-spatial:]]
    return Value([*x.axes[: -1 - spatial], out, *places])


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "instance_norm")
def batch_norm(call: Call) -> Value:
    """x (n, c, …) and four tensors of (c)."""
    x = call["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            call.unify(x.axes[1], call[name].axes[0])
    if call.name == "instance_norm":
        call.mixes(x, range(2, len(x.axes)))
    return Value(x.axes)


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Value:
    """Statistics over the last axes do not depend on their order."""
    x = call["input"]
    call.broadcast([v for v in (x, call["weight"], call["bias"]) if v is not None])
    call.mixes(x, range(-len(call["normalized_shape"]), 0))
    return Value(x.axes)


@rule("group_norm")
def group_norm(call: Call) -> Value:
    """x (n, groups × c, …): channels within a group, groups among themselves."""
    x, groups = call["input"], call["num_groups"]
    parts = call.space.regroup(x.axes[1], (groups, size_of(x.axes[1]) // groups))
    for name in ("weight", "bias"):
        if call[name] is not None:
            call.unify([f for p in parts for f in p], call[name].axes[0])
    call.inner.append([x.axes[0], parts[0]])
    return Value(x.axes)


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "max_pool2d_with_indices", "reflection_pad2d", "replication_pad2d",
    "upsample_nearest1d", "upsample_linear1d",
)  # fmt: skip
def pool(call: Call) -> Value | list[Value]:
    """Places of an image change, channels do not."""
    x = call["self"] or call["input"]
    spatial = int(call.name[call.name.index("d", call.name.rindex("d") - 1) - 1])
    for axis in x.axes[-spatial:]:
        call.freeze(axis, "places in an image")
    out = [
        Value([*x.axes[:-spatial], *(call.space.axis(n, "places in an image") for n in shape[-spatial:])])
        for shape in call.shapes
    ]
    return out if len(out) > 1 else out[0]


@rule("prelu")
def prelu(call: Call) -> Value:
    """One slope, or one for each channel."""
    x, weight = call["self"], call["weight"]
    if size_of(weight.axes[0] if weight.axes else []) > 1:
        call.unify(x.axes[1], weight.axes[0])
    return Value(x.axes)
