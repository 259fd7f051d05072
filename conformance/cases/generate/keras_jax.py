#!/usr/bin/env python3
"""Makes the cases of conformance/cases/keras_jax from Keras and JAX.

    python3 -m venv peers
    peers/bin/pip install keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
    peers/bin/python conformance/cases/generate/keras_jax.py conformance/cases/keras_jax

Installs nothing itself. The folder is made, files of the same names are written over, and index.json lists the
cases. The same versions give the same files on the same kind of processor.

A case holds the arguments of the framework's own call: fields are named as in the signatures of
keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention and jax.nn.dot_product_attention, with their
defaults where a field is missing; tensors are in.NAME for an argument NAME and param.NAME for a weight under
Keras's own path (query/kernel [dim, heads, key_dim], query/bias [heads, key_dim], ..., attention_output/kernel
[heads, value_dim, dim]). Answers: ref64.NAME the truth in float64, out32.NAME what the framework gives in the
case's own type, own_err the framework's error. NAME is output, attention_scores (Keras, where
return_attention_scores) or residual (JAX, where return_residual).

The truth is NumPy's float64 of the formula written out below, asserted to agree with the framework: with Keras in
float64 to 1e-12; with JAX, whose softmax is f32 in every type, to 1e-5.
"""
import json
import os
import struct
import sys
import warnings
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
warnings.filterwarnings("ignore")

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
from keras.src import backend

rng = np.random.default_rng(20261130)
TYPES = {
    np.dtype("float64"): "F64",
    np.dtype("float32"): "F32",
    np.dtype("float16"): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype("int32"): "I32",
    np.dtype("bool"): "BOOL",
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def save(path, tensors, case):
    """A safetensors file, entries by name."""
    header, data = {"__metadata__": {"case": json.dumps(case)}}, b""
    for name, array in sorted(tensors.items()):
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": TYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Folder:
    def __init__(self, path):
        self.path, self.index = Path(path), []
        self.path.mkdir(parents=True, exist_ok=True)

    def add(self, name, op, fields, inputs, params, truth, own):
        case = {"name": name, "op": op, "keras": keras.__version__, "jax": jax.__version__, **fields}
        # Not of the residual of rows that see nothing, a huge number.
        plain = {key: np.abs(value) < 1e30 for key, value in truth.items()}
        case["own_err"] = {
            key: {
                "max_abs": float(np.max(np.abs(own[key].astype(np.float64) - value)[plain[key]], initial=0)),
                "ref_max": float(np.max(np.abs(value)[plain[key]], initial=0)),
            }
            for key, value in truth.items()
        }
        tensors = {}
        for prefix, group in [("in.", inputs), ("param.", params), ("ref64.", truth), ("out32.", own)]:
            tensors.update({prefix + key: np.asarray(value) for key, value in group.items()})
        save(self.path / f"{name}.safetensors", tensors, case)
        self.index.append({"name": name, "op": op})

    def close(self):
        entries = ",\n ".join(json.dumps(entry) for entry in self.index)
        (self.path / "index.json").write_text(f"[\n {entries}\n]\n")


def floats(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def mask(*shape, share=0.65):
    return rng.random(shape) < share


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def agree(what, got, want, tolerance):
    off = float(np.max(np.abs(np.asarray(got, np.float64) - want), initial=0))
    most = float(np.max(np.abs(want), initial=0))
    assert off <= tolerance * max(most, 1), f"{what}: off by {off}, largest value {most}"


# ---- Keras


def keras_masks(layer_window, query, value, masks, use_causal_mask):
    """MultiHeadAttention._compute_attention_mask: all of them, with &."""
    both = None
    if "query_mask" in masks:
        both = masks["query_mask"][..., None]
    for name in ["value_mask", "key_mask"]:
        if name in masks:
            keys = masks[name][..., None, :]
            both = keys if both is None else both & keys
    row, column = np.arange(query.shape[1])[None, :, None], np.arange(value.shape[1])[None, None, :]
    if use_causal_mask:
        both = row >= column if both is None else both & (row >= column)
    if layer_window is not None:
        near = np.abs(row - column) < layer_window
        both = near if both is None else both & near
    if "attention_mask" in masks:
        both = masks["attention_mask"] if both is None else both & masks["attention_mask"]
    return both


def keras_truth(params, repeats, inputs, seen, dead_is_mean, output_axes):
    """The layer in float64 for inputs [batch, len, dim]: output and attention scores."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    wide = {name: value.astype(np.float64) for name, value in inputs.items()}
    wide.setdefault("key", wide["value"])

    def project(x, name):
        return np.einsum("bld,dnh->blnh", x, p[f"{name}/kernel"]) + p.get(f"{name}/bias", 0)

    q = project(wide["query"], "query")
    k, v = (np.repeat(project(wide[name], name), repeats, axis=2) for name in ["key", "value"])
    scores = np.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(q.shape[-1])
    if seen is not None:
        while seen.ndim < 4:
            seen = seen[..., None, :, :]
        seen = np.broadcast_to(seen, scores.shape)
        scores = np.where(seen, scores, -1e9)
    weights = softmax(scores)
    if seen is not None and not dead_is_mean:
        weights = np.where(seen, weights, 0)
    heads = np.einsum("bnqk,bknh->bqnh", weights, v)
    if "gate/kernel" in p:
        heads = heads / (1 + np.exp(-project(wide["query"], "gate")))
    letters = "xyz"[:output_axes]
    output = np.einsum(f"bqnh,nh{letters}->bq{letters}", heads, p["attention_output/kernel"])
    return output + p.get("attention_output/bias", 0), weights


def keras_case(folder, name, grouped=False, dtype="float32", shapes=None, masks=None, call=None, note="", **init):
    """One call of a layer. `shapes` are those of query, value and, where given, key."""
    masks, call = masks or {}, call or {}
    layer_class = keras.layers.GroupQueryAttention if grouped else keras.layers.MultiHeadAttention
    inputs = {key: floats(*shape, dtype=DTYPES[dtype]) for key, shape in shapes.items()}
    layers = {kind: layer_class(**init, dtype=kind) for kind in {dtype, "float64"}}
    for layer in layers.values():
        built = {f"{key}_shape": shape for key, shape in shapes.items()}
        layer.build(**built)
    paths = [weight.path.split("/", 1)[1] if "/" in weight.path else weight.path for weight in layers[dtype].weights]
    params = {
        "/".join(path.split("/")[-2:]): (floats(*weight.shape) / np.sqrt(weight.shape[0])).astype(DTYPES[dtype])
        for path, weight in zip(paths, layers[dtype].weights)
    }

    def run(kind, scores):
        layer = layers[kind]
        layer.set_weights([value.astype(DTYPES.get(kind, np.float64)) for value in params.values()])
        given = {key: jnp.asarray(value.astype(DTYPES.get(kind, np.float64))) for key, value in inputs.items()}
        rest = {key: jnp.asarray(value) for key, value in masks.items() if key != "query_mask"}
        if "query_mask" in masks and grouped:
            rest["query_mask"] = jnp.asarray(masks["query_mask"])
        elif "query_mask" in masks:
            # MultiHeadAttention overwrites its argument by the mask that is attached to the query.
            backend.set_keras_mask(given["query"], jnp.asarray(masks["query_mask"]))
        given.update(rest)
        more = {key: value for key, value in call.items() if key != "return_attention_scores"}
        return layer(**given, **more, return_attention_scores=scores)

    wants_scores = bool(call.get("return_attention_scores"))
    flat = len(shapes["query"]) == 3
    output64, scores64 = (np.asarray(x, np.float64) for x in run("float64", True))
    # Keras goes through jax.nn.dot_product_attention where it can, which gives the mean of V where nothing is seen.
    dead_is_mean = flat and not wants_scores and not init.get("dropout")
    if flat:
        seen = keras_masks(init.get("sliding_window"), inputs["query"], inputs["value"], masks, call.get("use_causal_mask"))
        repeats = init["num_query_heads"] // init["num_key_value_heads"] if grouped else 1
        axes = params["attention_output/kernel"].ndim - 2
        output, weights = keras_truth(params, repeats, inputs, seen, False, axes)
        agree(name, output64, output, 1e-12)
        agree(name, scores64, weights, 1e-12)
        output64 = keras_truth(params, repeats, inputs, seen, dead_is_mean, axes)[0]
    own = run(dtype, wants_scores)
    truth = {"output": output64}
    if wants_scores:
        truth["attention_scores"] = scores64
        own = dict(zip(truth, own))
    else:
        own = {"output": own}
    own = {key: np.asarray(value) for key, value in own.items()}
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    for key in truth:
        agree(f"{name} {key} in {dtype}", own[key], truth[key], tolerance)
    fields = {**init, **call, "dtype": dtype, "backend": "jax", "note": note}
    op = "keras.GroupQueryAttention" if grouped else "keras.MultiHeadAttention"
    folder.add(name, op, fields, {**inputs, **masks}, params, truth, own)


def keras_cases(folder):
    scores = {"return_attention_scores": True}
    causal = {"use_causal_mask": True}
    one = dict(query=(2, 5, 6), value=(2, 7, 6))
    cross = dict(query=(2, 5, 6), value=(2, 7, 9), key=(2, 7, 8))
    small = dict(query=(1, 5, 4), value=(1, 6, 4))
    alone = dict(query=(2, 6, 4), value=(2, 6, 4))

    def add(name, **rest):
        keras_case(folder, f"keras_{name}", **rest)

    def grouped(name, **rest):
        keras_case(folder, f"keras_grouped_{name}", grouped=True, **rest)

    add("plain", shapes=one, num_heads=2, key_dim=3)
    add("scores", shapes=one, num_heads=2, key_dim=3, call=scores)
    add("cross", shapes=cross, num_heads=3, key_dim=4, call=scores)
    # Values of another width than keys: Keras on JAX computes them only where scores are returned.
    add("value_dim", shapes=small, num_heads=2, key_dim=3, value_dim=5, call=scores)
    add("output_shape", shapes=cross, num_heads=2, key_dim=3, output_shape=7)
    add("output_shape_two_axes", shapes=small, num_heads=2, key_dim=3, output_shape=(3, 5))
    add("no_bias", shapes=small, num_heads=2, key_dim=3, use_bias=False)
    add("gate", shapes=one, num_heads=2, key_dim=3, use_gate=True)
    add("gate_value_dim_no_bias", shapes=small, num_heads=2, key_dim=3, value_dim=5, use_bias=False, use_gate=True,
        output_shape=3, call=scores)
    add("causal_longer_query", shapes=dict(query=(2, 7, 4), value=(2, 5, 4)), num_heads=2, key_dim=3, call=causal)
    add("causal_scores", shapes=small, num_heads=2, key_dim=3, call={**causal, **scores})
    add("attention_mask", shapes=one, num_heads=2, key_dim=3, masks=dict(attention_mask=mask(2, 5, 7) | (np.arange(7) == 2)))
    add("attention_mask_per_head", shapes=small, num_heads=2, key_dim=3, call=scores,
        masks=dict(attention_mask=mask(1, 2, 5, 6) | (np.arange(6) == 1)))
    add("attention_mask_for_all", shapes=one, num_heads=2, key_dim=3,
        masks=dict(attention_mask=mask(1, 5, 7) | (np.arange(7) == 3)))
    add("value_mask", shapes=one, num_heads=2, key_dim=3, masks=dict(value_mask=np.arange(7) < [[4], [6]]))
    add("key_mask", shapes=cross, num_heads=2, key_dim=3, masks=dict(key_mask=np.arange(7) < [[7], [2]]), call=scores)
    add("query_mask_scores", shapes=alone, num_heads=2, key_dim=3, masks=dict(query_mask=np.arange(6) < [[4], [6]]),
        call=scores, note="the mask is attached to the query; rows that see nothing get weights 0")
    add("query_mask", shapes=alone, num_heads=2, key_dim=3, masks=dict(query_mask=np.arange(6) < [[4], [6]]),
        note="the mask is attached to the query; rows that see nothing get the mean of V")
    add("every_mask_causal", shapes=dict(query=(2, 6, 4), value=(2, 6, 4), key=(2, 6, 5)), num_heads=2, key_dim=3,
        masks=dict(query_mask=np.arange(6) < [[5], [6]], value_mask=np.arange(6) < [[6], [5]],
                   key_mask=np.arange(6) != [[3], [4]], attention_mask=mask(2, 6, 6, share=0.8) | (np.arange(6) == 0)),
        call={**causal, **scores})
    add("nothing_seen", shapes=small, num_heads=2, key_dim=3, note="rows that see nothing get the mean of V",
        masks=dict(attention_mask=mask(1, 5, 6) & (np.arange(5) % 2 == 0)[:, None]))
    add("nothing_seen_scores", shapes=small, num_heads=2, key_dim=3, note="rows that see nothing get weights 0",
        masks=dict(attention_mask=mask(1, 5, 6) & (np.arange(5) % 2 == 0)[:, None]), call=scores)
    add("window", shapes=alone, num_heads=2, key_dim=3, sliding_window=2)
    add("window_causal", shapes=alone, num_heads=2, key_dim=3, sliding_window=3, call={**causal, **scores})
    add("dropout_at_inference", shapes=small, num_heads=2, key_dim=3, dropout=0.3, seed=1, call=dict(training=False))
    add("axes_one_of_two", shapes=dict(query=(1, 3, 4, 4), value=(1, 3, 5, 4)), num_heads=2, key_dim=3,
        attention_axes=(2,), call=scores)
    add("axes_first_of_two", shapes=dict(query=(1, 3, 2, 4), value=(1, 5, 2, 4)), num_heads=2, key_dim=3,
        attention_axes=(1,), call=causal)
    add("axes_both", shapes=dict(query=(1, 2, 3, 4), value=(1, 3, 2, 4)), num_heads=2, key_dim=3, call=scores,
        masks=dict(attention_mask=mask(1, 2, 3, 3, 2) | (np.arange(2) == 0)))
    add("axes_negative_mask", shapes=dict(query=(2, 2, 3, 4), value=(2, 2, 4, 4)), num_heads=2, key_dim=3,
        attention_axes=(-2,), masks=dict(attention_mask=mask(2, 2, 3, 4) | (np.arange(4) == 1)), use_gate=True)
    add("f16", shapes=small, num_heads=2, key_dim=4, dtype="float16")
    add("bf16", shapes=small, num_heads=2, key_dim=4, dtype="bfloat16")

    grouped("plain", shapes=one, head_dim=3, num_query_heads=4, num_key_value_heads=2)
    grouped("one_head_scores", shapes=one, head_dim=3, num_query_heads=3, num_key_value_heads=1, call=scores)
    grouped("gate_no_bias", shapes=small, head_dim=3, num_query_heads=4, num_key_value_heads=2, use_bias=False, use_gate=True)
    grouped("gate_causal", shapes=small, head_dim=3, num_query_heads=4, num_key_value_heads=2, use_gate=True,
            call={**causal, **scores})
    grouped("window_causal", shapes=alone, head_dim=2, num_query_heads=4, num_key_value_heads=4, sliding_window=2, call=causal)
    grouped("every_mask", shapes=dict(query=(2, 4, 4), value=(2, 5, 4), key=(2, 5, 3)), head_dim=3, num_query_heads=4,
            num_key_value_heads=2, call=scores,
            masks=dict(query_mask=np.arange(4) < [[3], [4]], value_mask=np.arange(5) < [[5], [4]],
                       key_mask=np.arange(5) != [[1], [2]], attention_mask=mask(2, 4, 5, share=0.8) | (np.arange(5) == 0)))
    grouped("query_mask", shapes=small, head_dim=3, num_query_heads=2, num_key_value_heads=1,
            masks=dict(query_mask=np.arange(5) < [[3]]), note="rows that see nothing get the mean of V")


# ---- JAX


def jax_truth(q, k, v, bias, seen, scale, query_lengths):
    """jax.nn.dot_product_attention in float64: output, residual."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    flat = q.ndim == 3
    q, k, v = (x[None] if flat else x for x in (q, k, v))
    repeats = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeats, axis=2), np.repeat(v, repeats, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) * (1 / np.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.astype(np.float64)
    if seen is not None:
        scores = np.where(np.broadcast_to(seen, scores.shape), scores, -0.7 * float(np.finfo(np.float32).max))
    output = np.einsum("bnts,bsnh->btnh", softmax(scores), v)
    if query_lengths is not None:
        output = output * (np.arange(q.shape[1]) < query_lengths[:, None])[:, :, None, None]
    peak = scores.max(-1, keepdims=True)
    residual = (peak + np.log(np.exp(scores - peak).sum(-1, keepdims=True)))[..., 0].transpose(0, 2, 1)
    return (output[0], residual[0]) if flat else (output, residual)


def jax_case(folder, name, q, kv, dtype="float32", note="", bias=None, mask=None, query_seq_lengths=None,
             key_value_seq_lengths=None, **fields):
    q, k, v = (floats(*shape, dtype=DTYPES[dtype]) for shape in (q, kv, kv))
    given = dict(query=q, key=k, value=v)
    optional = dict(bias=bias, mask=mask, query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
    given.update({key: np.asarray(value) for key, value in optional.items() if value is not None})
    for key in ["query_seq_lengths", "key_value_seq_lengths"]:
        if key in given:
            given[key] = given[key].astype(np.int32)
    len_q, len_k = q.shape[-3], k.shape[-3]
    row, column = np.arange(len_q)[:, None], np.arange(len_k)[None, :]
    seen = np.ones((1, 1, len_q, len_k), bool)
    if "mask" in given:
        seen = seen & given["mask"]
    if fields.get("is_causal"):
        seen = seen & (column <= row)
    window = fields.get("local_window_size")
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        seen = seen & (row <= column + left) & (row >= column - right)
    lengths = given.get("query_seq_lengths")
    if lengths is not None:
        seen = seen & (row < lengths[:, None, None, None])
    if "key_value_seq_lengths" in given:
        seen = seen & (column < given["key_value_seq_lengths"][:, None, None, None])
    output, residual = jax_truth(q, k, v, given.get("bias"), seen, fields.get("scale"), lengths)
    call = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    own = jax.nn.dot_product_attention(**{key: jnp.asarray(value) for key, value in given.items()}, **call)
    truth = {"output": output}
    if fields.get("return_residual"):
        truth["residual"] = residual
        own = {"output": np.asarray(own[0]), "residual": np.asarray(own[1])}
    else:
        own = {"output": np.asarray(own)}
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    for key in truth:
        agree(f"{name} {key} in {dtype}", own[key], truth[key], tolerance)
    fields = {**fields, "dtype": dtype, "note": note}
    folder.add(name, "jax.nn.dot_product_attention", fields, given, {}, truth, own)


def jax_cases(folder):
    q, kv = (2, 5, 4, 8), (2, 7, 4, 8)
    few, few_kv = (2, 5, 4, 4), (2, 6, 2, 4)

    def add(name, q=few, kv=few_kv, **rest):
        jax_case(folder, f"jax_{name}", q, kv, **rest)

    add("plain", q, kv)
    add("grouped", (2, 5, 6, 4), (2, 7, 3, 4))
    add("one_key_head", (1, 5, 4, 5), (1, 7, 1, 5))
    add("no_batch", (5, 4, 4), (7, 2, 4))
    add("scale", scale=0.3)
    add("bias", bias=floats(2, 4, 5, 6))
    add("bias_for_all_heads", bias=floats(2, 1, 1, 6))
    add("bias_without_batch", bias=floats(4, 5, 6))
    add("mask", mask=mask(2, 4, 5, 6) | (np.arange(6) == 2))
    add("mask_of_keys", mask=(np.arange(6) < np.array([[4], [5]]))[:, None, None, :])
    add("mask_bias_scale", mask=mask(1, 1, 5, 6) | (np.arange(6) == 2), bias=floats(1, 4, 5, 6), scale=0.7)
    add("causal", is_causal=True)
    add("causal_longer_query", (1, 7, 2, 4), (1, 5, 2, 4), is_causal=True)
    add("decode", (2, 1, 4, 4), (2, 9, 2, 4), key_value_seq_lengths=[5, 9])
    add("key_lengths", key_value_seq_lengths=[3, 6])
    add("query_lengths", query_seq_lengths=[2, 5], note="rows behind a query's length are 0")
    add("both_lengths_causal", query_seq_lengths=[4, 3], key_value_seq_lengths=[5, 3], is_causal=True)
    add("window", local_window_size=1)
    add("window_pair", local_window_size=[2, 1], is_causal=False)
    add("window_causal", local_window_size=[2, 0], is_causal=True, implementation="xla")
    add("everything", (2, 6, 4, 4), (2, 6, 2, 4), mask=mask(2, 1, 6, 6, share=0.9) | np.eye(6, dtype=bool), bias=floats(1, 4, 6, 6),
        scale=0.4, is_causal=True, query_seq_lengths=[5, 6], key_value_seq_lengths=[6, 6], local_window_size=[3, 3])
    add("nothing_seen", mask=mask(2, 1, 5, 6) & (np.arange(5) % 2 == 0)[:, None], note="rows that see nothing get the mean of V")
    add("no_key_valid", key_value_seq_lengths=[0, 4], note="rows that see nothing get the mean of V")
    add("window_beyond_keys", (1, 8, 2, 4), (1, 4, 2, 4), local_window_size=[2, 2], bias=floats(1, 2, 8, 4),
        note="rows that see nothing get the mean of V")
    add("residual", return_residual=True, is_causal=True)
    add("residual_no_batch", (5, 4, 4), (6, 2, 4), return_residual=True)
    add("residual_lengths", return_residual=True, query_seq_lengths=[3, 5], key_value_seq_lengths=[4, 0],
        note="a row that sees nothing has -0.7 * the largest f32 as residual")
    add("f16", dtype="float16", is_causal=True)
    add("bf16", dtype="bfloat16", bias=floats(1, 4, 5, 6))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Folder(sys.argv[1])
    keras_cases(folder)
    jax_cases(folder)
    folder.close()
    print(f"{len(folder.index)} cases in {folder.path}")
