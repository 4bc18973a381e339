"""The check at load finds wrong, silent and infinite models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel

from hooked_models import HookedTextToImage, ModelCheckError
from hooked_models.pipelines.checks import check_model
from hooked_models.pixart.attention import Attention
from hooked_models.pixart.block import MLP


def wrong_output(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return 1.01 * self.proj_out(
        self.hook_post(F.gelu(self.hook_pre(self.proj_in(x)), approximate="tanh"))
    )


def silent(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


def attention(use_pattern: bool, factor: float) -> Any:
    """An attention whose pattern is not used, or is not what it should be."""

    def forward(self: Attention, q: Any, k: Any, v: Any, bias: Any = None) -> torch.Tensor:
        q, k, v = (
            hook(x).transpose(1, 2)
            for hook, x in ((self.hook_q, q), (self.hook_k, k), (self.hook_v, v))
        )
        scores = q @ k.mT * self.scale
        bias = bias[:, None] if bias is not None and bias.ndim == 3 else bias
        pattern = self.hook_attn_scores(scores if bias is None else scores + bias).softmax(-1)
        seen = self.hook_pattern(factor * pattern) / factor
        return self.hook_z(((seen if use_pattern else pattern) @ v).transpose(1, 2))

    return forward


@pytest.mark.parametrize(
    ("broken", "forward", "message"),
    [
        (
            MLP,
            wrong_output,
            r"the denoiser's output differs from the original's by [\d.e-]+ \(allowed: ",
        ),
        (MLP, silent, r"names do not fire once each: blocks.0.mlp.hook_pre \(0 times\)"),
        (Attention, attention(False, 1), "attn.hook_z does not change when its pattern is edited"),
        (Attention, attention(True, 2), "attn.hook_pattern has rows that do not sum to one"),
    ],
)
def test_a_failed_check_names_the_model_and_the_versions(
    folder: Path, monkeypatch: pytest.MonkeyPatch, broken: type, forward: Any, message: str
) -> None:
    monkeypatch.setattr(broken, "forward", forward)
    with pytest.raises(ModelCheckError, match=message) as error:
        HookedTextToImage.from_pretrained(folder)
    assert f"{folder} failed its checks with diffusers 0." in str(error.value)
    assert "transformers 5." in str(error.value)
    HookedTextToImage.from_pretrained(folder, check=False)


def test_a_model_that_says_nothing_finite(copy: Path) -> None:
    network = PixArtTransformer2DModel.from_pretrained(copy, subfolder="transformer")
    network.proj_out.bias.fill_(torch.nan)
    network.save_pretrained(copy / "transformer")
    with pytest.raises(
        ModelCheckError, match=r"transformer's proj_out\.bias holds a value that is not a number"
    ):
        HookedTextToImage.from_pretrained(copy)
    opened = HookedTextToImage.from_pretrained(copy, check=False)
    with pytest.raises(ModelCheckError, match="not finite even without hooks"):
        check_model(opened)
