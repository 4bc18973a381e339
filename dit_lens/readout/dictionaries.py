"""A sparse autoencoder or transcoder at a hook: features read, and edited beside the error term.

mine = readout.dictionary("blocks.9.hook_resid_post", sae.encode, sae.decode)
found = mine.activations(model, "red circle is above blue square", num_steps=28)
without_42 = mine.edit(lambda f: f * (torch.arange(f.shape[-1]) != 42))
images = model.run_with_hooks(prompts, fwd_hooks=without_42)

Sources: transcoders and sparse autoencoders in diffusion transformers, arXiv 2606.15796.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.arguments import integers, is_several, one_of
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.noise import Seeds
from hooked_models.hooks.errors import unknown_hook
from hooked_models.hooks.module import HookFunction

Branches = Literal["cond", "uncond", "both"]
StepChoice = int | Sequence[int] | None
Reduce = Literal["max", "mean", "none"]


def dictionary(
    name: str,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    output: str | None = None,
) -> Dictionary:
    """A dictionary of the caller's own, trained on the tensor of a hook.

    Args:
        name: the hook that `encode` reads: in the denoiser ("blocks.9.hook_resid_post", at every
            step), of the text encoder ("text_encoder.blocks.1.hook_resid_post"), between calls
            ("hook_x0"), or a full name.
        encode: tensor of that hook [batch … d] → features [batch … feature].
        decode: features → tensor of the hook `output`.
        output: for a transcoder, the hook whose tensor the features explain; by default `name`. It
            comes after `name`.

    Example:
        >>> basis = torch.linalg.qr(torch.randn(192, 192))[0]
        >>> found = dictionary(
        ...     "blocks.1.hook_resid_post", lambda x: x @ basis, lambda f: f @ basis.T
        ... )
        >>> dict(found.activations(model, "red circle", num_steps=2).sizes)
        {'prompt': 1, 'step': 2, 'feature': 192}
        >>> image, same = (
        ...     model.run_with_hooks("red circle", num_steps=2, fwd_hooks=h)
        ...     for h in ([], found.edit(lambda f: f))
        ... )
        >>> torch.equal(image, same)
        True
    """
    return Dictionary(name, encode, decode, name if output is None else output)


@dataclass(frozen=True)
class Dictionary:
    """An encoder and a decoder at a hook. Made by `dictionary`.

    Example:
        >>> Dictionary(
        ...     "blocks.0.hook_mlp_out", torch.relu, torch.relu, "blocks.0.hook_mlp_out"
        ... ).output
        'blocks.0.hook_mlp_out'
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    output: str

    @torch.no_grad()
    def activations(
        self,
        model: HookedTextToImage,
        prompts: str | Sequence[str],
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        *,
        steps: StepChoice = None,
        branch: Literal["cond", "uncond"] = "cond",
        reduce: Reduce = "max",
        **options: Any,
    ) -> xr.Dataset:
        """Features of a generation, reduced over positions as they are made.

        Args:
            model: hooked model; hooks that are attached to it act.
            prompts: one prompt or several.
            seed: an int gives every prompt the same noise; a sequence has one seed a prompt.
            num_steps: denoising steps of the generation.
            steps: from 0; by default all.
            branch: guidance branch that is read.
            reduce: "max" or "mean" over positions, or "none" to keep the positions.
            options: further arguments of the model's call.

        Returns:
            `activation`, dims (prompt, step, [pos,] feature), and `error`, dims (prompt, step): the
            part of the output's squared norm that the decoder leaves out. A hook outside of the
            steps has one, step 0.

        Raises:
            UnknownHookError: the model has no such hook; the nearest one is suggested.

        Example:
            >>> same = dictionary("blocks.1.hook_mlp_out", lambda x: x, lambda f: f)
            >>> found = same.activations(model, "red circle", num_steps=1, reduce="none")
            >>> dict(found.sizes), float(found["error"].max())
            ({'prompt': 1, 'step': 1, 'pos': 64, 'feature': 192}, 0.0)
        """
        one_of("reduce", reduce, ("max", "mean", "none"))
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        held: dict[str, Tensor] = {}
        found: dict[int, Tensor] = {}
        errors: dict[int, Tensor] = {}

        def read(x: Tensor, hook: HookPoint) -> None:
            features = self.encode(x)
            held[_place(hook)] = self.decode(features)
            flat = features.flatten(1, -2).float()
            reduced = {
                "max": lambda: flat.amax(1),
                "mean": lambda: flat.mean(1),
                "none": lambda: flat,
            }[reduce]()
            found[_step(hook)] = reduced.cpu()

        def compare(y: Tensor, hook: HookPoint) -> None:
            left = (y - held.pop(_place(hook))).flatten(1).float().square().sum(1)
            errors[_step(hook)] = (left / y.flatten(1).float().square().sum(1)).cpu()

        hooks: list[Any] = [
            (self._where(self.name, steps, branch), read),
            (self._where(self.output, steps, branch), compare),
        ]
        self._check(model)
        with model.hooks(hooks):
            model(texts, seed, num_steps, **options)
        at = sorted(found)
        dims = (
            ("prompt", "step", "pos", "feature")
            if reduce == "none"
            else ("prompt", "step", "feature")
        )
        values = torch.stack([found[step] for step in at], dim=1).numpy()
        missing = torch.stack([errors[step] for step in at], dim=1).numpy()
        return xr.Dataset(
            {"activation": (dims, values), "error": (("prompt", "step"), missing)},
            coords={"prompt": texts, "step": at},
        )

    def edit(
        self,
        change: Callable[
            [Float[Tensor, "batch *pos feature"]], Float[Tensor, "batch *pos feature"]
        ],
        *,
        steps: StepChoice = None,
        branch: Branches = "both",
    ) -> list[tuple[Callable[[str], bool], HookFunction]]:
        """`fwd_hooks` that add decode(change(f)) − decode(f); the error of the dictionary stays.

        A change that returns its argument changes nothing.

        Args:
            change: features → the features to go on with; must not write to its argument.
            steps: from 0; by default all.
            branch: guidance branches that are edited.

        Example:
            >>> found = dictionary("blocks.1.hook_resid_post", lambda x: x, lambda f: f)
            >>> len(found.edit(lambda f: 0 * f, steps=[0, 1], branch="cond"))
            1
        """
        held: dict[str, Tensor] = {}

        def difference(x: Tensor) -> Tensor:
            features = self.encode(x)
            return self.decode(change(features)) - self.decode(features)

        def edited(x: Tensor, hook: HookPoint) -> Tensor:
            return x + difference(x).to(x.dtype)

        def read(x: Tensor, hook: HookPoint) -> None:
            held[_place(hook)] = difference(x)

        def write(y: Tensor, hook: HookPoint) -> Tensor:
            return y + held.pop(_place(hook)).to(y.dtype)

        where, onto = self._where(self.name, steps, branch), self._where(self.output, steps, branch)
        return [(where, edited)] if self.output == self.name else [(where, read), (onto, write)]

    def _check(self, model: HookedTextToImage) -> None:
        for name in (self.name, self.output):
            if not any(self._where(name, None, "both")(full) for full in model.hook_dict):
                model.dit.canonical_name(name)  # raises, with the nearest name or the reason
                raise unknown_hook(name, list(model.hook_dict))

    @staticmethod
    def _where(name: str, steps: StepChoice, branch: Branches) -> Callable[[str], bool]:
        at = (
            None if steps is None else integers("steps", steps if is_several(steps) else [steps], 0)
        )
        one_of("branch", branch, ("cond", "uncond", "both"))

        def where(full: str) -> bool:
            step, of, inner = re.fullmatch(
                r"(?:steps\.(\d+)\.)?(?:(cond|uncond)\.)?(.+)", full
            ).groups()  # type: ignore[union-attr]
            there = (at is None or step is None or int(step) in at) and branch in (
                "both",
                of or branch,
            )
            return there and name in (full, inner)

        return where


def _place(hook: Any) -> str:
    """The denoiser call that a hook fires in."""
    return f"{hook.step} {hook.branch}"


def _step(hook: Any) -> int:
    return hook.step or 0
