"""Random numbers that depend on keys alone: never on a framework, a processor or a count of ranks.

Everything starts from integers (Philox, or a 64-bit mixer) and goes on in operations that IEEE 754
rounds in one way only (+, -, x, /, sqrt). `np.log` is not one of them: it gives other bits on
processors with AVX-512.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from horovod_lm.spec import ModelSpec, Parameter

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 16  # elements at a time, so that the work arrays stay in the cache


def philox(seed: int, name: str) -> np.random.Philox:
    """The counter-based generator (Salmon et al., 2011) keyed by (seed, name). Only its raw
    integers are promised to be the same in every version of NumPy, so take those."""
    return np.random.Philox(key=np.frombuffer(_digest(seed, name)[:16], dtype="<u8"))


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def uniforms(generator: np.random.Philox, count: int) -> np.ndarray:
    """`count` fp64 numbers strictly between 0 and 1."""
    return _within_unit(generator.random_raw(count))


def _within_unit(raw: np.ndarray) -> np.ndarray:
    """fp64 numbers strictly between 0 and 1, from the upper 52 bits of raw integers: with 53, the
    largest plus a half would be rounded to 1."""
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normals(seed: int, name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    """fp32 normal numbers with standard deviation `std`, keyed by (seed, name); pinned by golden
    digests in the tests. The inverse distribution function is Wichura's algorithm AS 241 (1988),
    whose relative error is about 1e-16."""
    generator = philox(seed, name)
    values = np.empty(int(np.prod(shape)), dtype=np.float32)
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        part[:] = std * _normal_quantile(uniforms(generator, part.size))
    return values.reshape(shape)


def initial_weight(seed: int, parameter: Parameter) -> np.ndarray:
    """The fp32 start of one parameter: a function of (seed, name, shape, initialiser) alone."""
    initialiser = parameter.initialiser
    if initialiser.kind == "normal":
        return normals(seed, parameter.name, parameter.shape, initialiser.std)
    value = 1.0 if initialiser.kind == "ones" else 0.0
    return np.full(parameter.shape, value, dtype=np.float32)


def initial_weights(spec: ModelSpec, seed: int) -> dict[str, np.ndarray]:
    """Every weight of a new model, by canonical name."""
    return {p.name: initial_weight(seed, p) for p in spec.parameters}


# Coefficients of AS 241 (Wichura, Applied Statistics 37, 1988), highest power first.
_A = (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4,
      4.5921953931549871457e4, 1.3731693765509461125e4, 1.9715909503065514427e3,
      1.3314166789178437745e2, 3.3871328727963666080e0)  # fmt: skip
_B = (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4,
      2.1213794301586595867e4, 5.3941960214247511077e3, 6.8718700749205790830e2,
      4.2313330701600911252e1, 1.0)  # fmt: skip
_C = (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
      1.27045825245236838258e0, 3.64784832476320460504e0, 5.76949722146069140550e0,
      4.63033784615654529590e0, 1.42343711074968357734e0)  # fmt: skip
_D = (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
      1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0,
      2.05319162663775882187e0, 1.0)  # fmt: skip
_E = (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3,
      2.65321895265761230930e-2, 2.96560571828504891230e-1, 1.78482653991729133580e0,
      5.46378491116411436990e0, 6.65790464350110377720e0)  # fmt: skip
_F = (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5,
      7.86869131145613259100e-4, 1.48753612908506148525e-2, 1.36929880922735805310e-1,
      5.99832206555887937690e-1, 1.0)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result *= x
        result += coefficient
    return result


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm by exactly rounded operations only: x = m 2^e with m near 1, then
    2 artanh((m - 1) / (m + 1)) as a series."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.70710678118654752
    mantissa = np.where(low, 2 * mantissa, mantissa)
    exponent = np.where(low, exponent - 1, exponent).astype(np.float64)
    s = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(tuple(2.0 / k for k in range(23, 0, -2)), s * s)
    return exponent * 0.693147180559945309417 + s * series


def _normal_quantile(p: np.ndarray) -> np.ndarray:
    q = p - 0.5
    r = 0.180625 - q * q
    result = q * _polynomial(_A, r) / _polynomial(_B, r)
    tail = np.flatnonzero(np.abs(q) > 0.425)
    q = q[tail]
    r = np.sqrt(-_log(np.minimum(p[tail], 1 - p[tail])))
    near, far = r - 1.6, r - 5.0
    value = np.where(
        r <= 5.0,
        _polynomial(_C, near) / _polynomial(_D, near),
        _polynomial(_E, far) / _polynomial(_F, far),
    )
    result[tail] = np.where(q < 0, -value, value)
    return result


def mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64 (Steele et al., 2014): every output bit depends on every
    input bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def words(key: tuple[int, ...], indices: np.ndarray) -> np.ndarray:
    """Well-mixed int32 words at `indices` (any shape, non-negative) of the stream keyed by
    `key`."""
    base = np.zeros(1, dtype=np.uint64)
    for part in key:
        base = mix((base + np.uint64(part % 2**64)) * _GOLDEN + _GOLDEN)
    hashed = mix(base + indices.astype(np.uint64) * _GOLDEN)
    return (hashed >> np.uint64(32)).astype(np.uint32).view(np.int32)


class Keys:
    """Keys of random numbers from (seed, name) and further numbers, by a 64-bit mixer."""

    def __init__(self, seed: int, name: str) -> None:
        self._base = np.frombuffer(_digest(seed, name)[:8], dtype="<u8").astype(np.uint64)

    def __call__(self, *numbers: int | np.ndarray) -> np.ndarray:
        """uint64 keys of `numbers`, not negative; arrays (M,) among them give a key each, and
        without one it is (1,)."""
        keys = self._base
        for number in numbers:
            part = np.atleast_1d(np.asarray(number)).astype(np.uint64)
            keys = mix((keys + part) * _GOLDEN + _GOLDEN)
        return keys


def fractions(keys: np.ndarray, count: int) -> np.ndarray:
    """(…, count) fp64 numbers strictly between 0 and 1, of each key of shape (…)."""
    places = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return _within_unit(mix(keys[..., None] + places))


@dataclass(frozen=True)
class DropoutWords:
    """The integer words from which both frameworks make the same dropout masks.

    A mask element is kept where `int32((row ^ column) * MULTIPLIER) >= threshold(rate)`, with the
    product wrapping. `residual_rows` is (sites, B, L), `residual_columns` (sites, D): site 0 are
    the embeddings, the others the branches of the layers in order: attention, attention to the
    encoder where the stack has it, feed-forward.
    `attention_rows` is (layers, B, H, L), `attention_columns` (layers, M): site i are the
    probabilities of layer i; `cross_rows` and `cross_columns` are those of its attention to the
    encoder. All are int32; an array that is not needed is None.
    """

    residual_rows: np.ndarray | None
    residual_columns: np.ndarray | None
    attention_rows: np.ndarray | None
    attention_columns: np.ndarray | None
    cross_rows: np.ndarray | None = None
    cross_columns: np.ndarray | None = None


def native_seed(seed: int, step: int, rows: np.ndarray) -> np.ndarray:
    """(2,) int32 from which a framework's own generator starts in the micro-batch of these `rows`
    of the global batch, where the dropout is not the shared one."""
    return words((seed, step, 4, int(rows[0])), np.arange(2))


MULTIPLIER = 0x9E3779B1 - 2**32  # as a signed 32-bit number


def threshold(rate: float) -> int:
    """The signed 32-bit threshold that drops a share `rate` of all words."""
    return round(rate * 2**32) - 2**31


def keep_mask(rows: np.ndarray, columns: np.ndarray, rate: float) -> np.ndarray:
    """The mask in NumPy: bool of shape rows.shape + columns.shape. The backends' own forms are
    tested against it."""
    mixed = (rows[..., None] ^ columns).astype(np.int32) * np.int32(MULTIPLIER)
    return mixed >= np.int32(threshold(rate))


def dropout_words(
    spec: ModelSpec, seed: int, step: int, rows: np.ndarray, lengths: Mapping[str, int]
) -> dict[str, DropoutWords]:
    """Words by stack for one micro-batch, whose rows have the indices `rows` (B,) in the global
    batch and whose stacks have sequences of `lengths`: they depend on (seed, step, stack, site,
    row, position) alone, so not on the framework, the ranks or the accumulation. Empty if the spec
    has no dropout."""
    if not spec.dropout and not spec.attention_dropout:
        return {}
    return {
        stack: _stack_words(spec, (seed, step), 8 * number, stack, rows, lengths)
        for number, stack in enumerate(spec.stacks)
    }


def _stack_words(
    spec: ModelSpec,
    key: tuple[int, int],
    kind: int,
    stack: str,
    rows: np.ndarray,
    lengths: Mapping[str, int],
) -> DropoutWords:
    """`kind` is the first of 8 numbers that keep the words of one stack from those of another."""
    layers, position = spec.stacks[stack], np.arange(lengths[stack])
    cross = spec.attends_to_encoder(stack)
    cells = rows[:, None].astype(np.uint64) * np.uint64(2**20) + position.astype(np.uint64)
    head = np.arange(spec.heads, dtype=np.uint64)[:, None] << np.uint64(52)

    def sites(number: int, count: int, indices: np.ndarray) -> np.ndarray:
        return np.stack([words((*key, kind + number, site), indices) for site in range(count)])

    found: dict[str, np.ndarray | None] = dict.fromkeys(DropoutWords.__dataclass_fields__)
    if spec.dropout:
        branches = 1 + (3 if cross else 2) * layers
        found["residual_rows"] = sites(0, branches, cells)
        found["residual_columns"] = sites(1, branches, np.arange(spec.width))
    if spec.attention_dropout:
        found["attention_rows"] = sites(2, layers, cells[:, None, :] + head)
        found["attention_columns"] = sites(3, layers, position)
    if spec.attention_dropout and cross:
        found["cross_rows"] = sites(5, layers, cells[:, None, :] + head)
        found["cross_columns"] = sites(6, layers, np.arange(lengths["encoder"]))
    return DropoutWords(**found)
