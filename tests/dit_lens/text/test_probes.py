"""Probes find a planted code and nothing else."""

from __future__ import annotations

import numpy as np

from dit_lens.task import DIRECTIONS, HELD_OUT, PHRASES
from dit_lens.text.probes import (
    probe,
    probe_captions,
)


def test_probes_find_a_planted_code_and_nothing_else():
    captions = probe_captions()
    assert len(captions) == 264
    assert captions.held_out.sum() == sum(len(PHRASES[c.relation]) for c in HELD_OUT)
    rng = np.random.default_rng(0)
    codes = {relation: rng.standard_normal(16) for relation in DIRECTIONS}
    planted = np.stack([codes[r] for r in captions.relation]) + 0.1 * rng.standard_normal((264, 16))
    for split in ("captions", "combinations", "wordings", "never_read"):
        assert probe(planted, captions, "relation", split) == 1
        assert probe(rng.standard_normal((264, 16)), captions, "relation", split) < 0.35
    ramps = captions[["dx", "dy"]].to_numpy(float) @ rng.standard_normal(
        (2, 16)
    ) + 0.01 * rng.standard_normal((264, 16))
    assert probe(ramps, captions, "direction", "wordings") > 0.99
    assert probe(rng.standard_normal((264, 16)), captions, "direction", "captions") < 0.05
