"""The global norm of a gradient with a large tensor, as of a real vocabulary."""

from __future__ import annotations

import numpy as np

from tests.parity.compare import within


def test_the_norm_of_millions_of_elements(make_pair):
    pair = make_pair(vocabulary=2**16, width=64, layers=1, context=8)
    generator = np.random.default_rng(1)
    gradients = {
        p.name: generator.standard_normal(p.shape, dtype=np.float32) for p in pair.spec.parameters
    }
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    for name, engine in pair.engines.items():
        engine.load_gradients(gradients)
        # Clipped to half its norm, and so the first moment of a first update tells the norm.
        engine.apply_gradients(1e-2, norm / 2)
        first = engine.state().moments["first"]["embeddings.tokens"]
        expected = 0.1 * gradients["embeddings.tokens"].astype(np.float64) / 2
        apart = np.linalg.norm(first - expected) / np.linalg.norm(expected)
        within(f"clipping of 4 million elements, {name} to fp64", float(apart), 1e-6)
