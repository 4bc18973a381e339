"""docs/scaling.md counts as a plan does, and as torch does."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import schedule, xl_cost
from dit_lens import sweep
from dit_lens.intervene.interventions import Intervention
from hooked_models import HookedTextToImage

from .hooked_models.pipelines import PROMPTS, tiny_pipeline


def test_row_layers_are_those_of_a_plan():
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=range(2), heads=range(2), steps=range(3)
    )
    work = xl_cost.count(layers=2, heads=2, steps=3)
    for on, later in (("latent", work.later), ("x0", 0)):
        metric = sweep.Metric(lambda tensor: tensor.flatten(1)[:, 0], on=on)
        cost = sweep.plan(model, PROMPTS[0], 0, cells, {"m": metric}, num_steps=3).cost
        assert cost.clean_layers == work.clean
        assert cost.fork_layers == work.forked_step + later
        assert cost.naive_layers == work.naive


def test_a_block_is_counted_as_torch_counts_it():
    """The real width and numbers of tokens, on no device; the difference of two depths is one
    block.
    """
    counted = {}
    for layers in (1, 2):
        with torch.device("meta"):
            model = PixArtTransformer2DModel(
                num_layers=layers,
                sample_size=64,
                caption_channels=4096,
                use_additional_conditions=False,
            )
            model.set_attn_processor(AttnProcessor())  # torch does not see into fused attention
            text, latents = torch.zeros(1, 300, 4096), torch.zeros(1, 4, 64, 64)
            with FlopCounterMode(display=False) as counter:
                model(latents, text, torch.zeros(1), {"resolution": None, "aspect_ratio": None})
        counted[layers] = counter.get_total_flops()
    config = xl_cost.Config()
    text_once = 2 * 2 * config.text_tokens * config.width**2
    assert (
        counted[2] - counted[1]
        == xl_cost.block_flops(config.width, config.image_tokens, config.text_tokens) + text_once
    )


def test_the_document_holds_what_is_counted():
    assert xl_cost.table(xl_cost.Config()) in xl_cost.DOCUMENT.read_text()


def test_the_schedule_does_all_the_work_and_stands_in_the_document():
    small = schedule.Config(
        xl=xl_cost.Config(layers=4, heads=4, steps=3, prompts=12),
        seconds_of_table=0.0,
        rate=float("inf"),
    )
    work = xl_cost.count(layers=4, heads=4, steps=3)
    c = small.xl
    unit = xl_cost.block_flops(c.width, c.image_tokens, c.text_tokens) / (c.peak * c.reached)
    for image, later in ((False, 0), (True, work.later)):
        images = image * 4 * 4 * 3 * 12 * c.decode / (c.peak * c.reached)
        begun = len(schedule.jobs(small, image, 1)) * 4 * 64 / 16 * unit
        expected = 12 * (work.forked_step + later) * unit + images + begun
        assert schedule.jobs(small, image, 1).sum() == pytest.approx(expected)
        alone = schedule.sweeping(small, image, 1)
        assert alone == pytest.approx(12 * 2 * 4 * 3 * unit + expected)
        assert alone / 2 <= schedule.sweeping(small, image, 2) < alone
    alone, exhaustive = schedule.searching(small, 1), schedule.sweeping(small, True, 1)
    assert alone / 3 <= schedule.searching(small, 3) < alone < exhaustive
    assert schedule.table(schedule.Config()) in xl_cost.DOCUMENT.read_text()
