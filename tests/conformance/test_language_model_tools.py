"""Tools for causal language models: on a model that makes images they say why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from transformer_lens import evals, head_detector
from transformer_lens.tools.analysis import JacobianLens

from hooked_models import HookedTextToImage

from ..hooked_models.pipelines import tiny_pipeline
from .oracles import Bound, equal, tool

CAUSAL = "for causal language models"


@pytest.fixture(params=["bind", "at", "model", "dit"])
def model(request: pytest.FixtureRequest, bound: Bound, generation: HookedTextToImage) -> Any:
    return {
        "bind": lambda: bound.view,
        "at": lambda: generation.at(0, "red circle", num_steps=2)[0],
        "model": lambda: generation,
        "dit": lambda: bound.dit,
    }[request.param]()


@tool("head_detector.detect_head", "bind at model", "refuses", check="the error", note=CAUSAL)
def test_head_detector(model: Any) -> None:
    with pytest.raises(TypeError, match="causal language models"):
        head_detector.detect_head(model, "red circle", "previous_token_head")
    with pytest.raises(TypeError, match="causal language models"):
        head_detector.detect_head(model, ["red circle", "red circle"], "induction_head")


@tool(
    "evals.sanity_check, …",
    "bind at model",
    "refuses",
    check="the error",
    note="for language models: an image model has no loss",
)
def test_evals(model: Any) -> None:
    with pytest.raises(TypeError, match="evals are for language models"):
        evals.sanity_check(model)
    with pytest.raises(TypeError, match="evals are for language models"):
        evals.evaluate_on_dataset(
            model, [{"tokens": torch.zeros(1, 4, dtype=torch.long)}], device="cpu"
        )


@pytest.mark.parametrize("where", ["bind", "at"])
def test_a_view_has_no_return_type(where: str, bound: Bound, generation: HookedTextToImage) -> None:
    view, tokens = (
        (bound.view, bound.clean)
        if where == "bind"
        else generation.at(0, "red circle", num_steps=2)
    )
    equal(view.run_with_cache(tokens, return_type=None)[0], view(tokens))
    equal(view.run_with_hooks(tokens, return_type=None), view(tokens))
    for run in (view.run_with_cache, view.run_with_hooks):
        with pytest.raises(TypeError, match="has no logits: it makes images"):
            run(tokens, return_type="logits")


@tool(
    "JacobianLens, jacobian_lens_coordinate_patch, jacobian_lens_decomposition", "bind at model", "refuses", check="the error",
    note="TransformerLens' own error: for a `TransformerBridge` only",
)  # fmt: skip
def test_jacobian_lens(model: Any) -> None:
    with pytest.raises(TypeError, match="TransformerBridge"):
        JacobianLens.fit(model, ["red circle"], corpus="captions")


def test_a_scheduler_without_clean_image_prediction() -> None:
    model = HookedTextToImage.from_pipeline(
        tiny_pipeline(scheduler=CMStochasticIterativeScheduler())
    )
    with pytest.raises(
        ValueError,
        match=r"CMStochasticIterativeScheduler forms no clean-image .*: take returns='out'",
    ):
        model.at(0, "red circle", num_steps=2, returns="x0")
