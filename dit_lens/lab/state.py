"""One view of the lab: a prompt, an edit of some heads, and the Python that repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal, get_args, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.arguments import integer, number, one_of
from hooked_models.generation.names import parse_head

from ..intervene.edits import Replace, Scale
from ..intervene.interventions import Intervention

Action = Literal["mask", "exchange", "scale", "freeze"]
MOST_STEPS, LONGEST = 100, 2000


@dataclass(frozen=True)
class State:
    """Prompts, seed and edits of the page, as its address has them.

    Args:
        prompt: text to draw.
        other: text whose keys and values are read in an exchange; as many tokens as `prompt`.
        seed: of the noise.
        num_steps: denoising steps.
        action: "mask" hides words from heads, "exchange" lets heads read the other prompt, "scale"
            multiplies what heads write, "freeze" keeps their attention of the first step of the
            edit.
        heads: those that are edited ("L2H1"); none leaves the image as it is.
        words: positions of the words that are masked or exchanged; all of them where none is given.
        first: first step of the edit.
        last: last step of the edit.
        factor: of "scale".

    Raises:
        ValueError: a field has a value without meaning.

    Example:
        >>> State("red circle is above blue square", heads=("L2H1",)).action
        'mask'
    """

    prompt: str
    other: str = ""
    seed: int = 0
    num_steps: int = 14
    action: Action = "mask"
    heads: tuple[str, ...] = ()
    words: tuple[int, ...] = ()
    first: int = 0
    last: int = 13
    factor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt", "other"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > LONGEST:
                raise ValueError(f"{name} is a text of at most {LONGEST} characters.")
        one_of("action", self.action, get_args(Action))
        integer("num_steps", self.num_steps, 1, MOST_STEPS)
        integer("seed", self.seed, 0, 2**63 - 1)
        integer(
            "last",
            self.last,
            integer("first", self.first, 0, self.num_steps - 1),
            self.num_steps - 1,
        )
        number("factor", self.factor, -10.0, 10.0)
        for word in self.words:
            integer("words", word, 0, LONGEST)
        for head in self.heads:
            parse_head(head)
        if self.action == "exchange" and self.heads and not self.other:
            raise ValueError("An exchange needs another prompt.")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> State:
        """From a JSON object. Fields that there are not are an error.

        Raises:
            ValueError: a field is unknown, missing or has no meaning.

        Example:
            >>> State.read({"prompt": "red circle", "heads": ["L0H1"]}).heads
            ('L0H1',)
        """
        known = get_type_hints(cls)
        if unknown := set(given) - set(known):
            raise ValueError(f"There is no field {sorted(unknown)[0]!r}.")
        if "prompt" not in given:
            raise ValueError("A prompt is needed.")
        lists = {
            name: tuple(given[name])
            for name in ("heads", "words")
            if isinstance(given.get(name), list)
        }
        factor = {"factor": float(given["factor"])} if isinstance(given.get("factor"), int) else {}
        return cls(**{**given, **lists, **factor})

    def interventions(self, model: HookedTextToImage) -> list[Intervention]:
        """The edit; none without heads.

        Raises:
            ValueError: the prompts of an exchange differ in their number of tokens, or the model
                lacks a head.

        Example:
            >>> len(
            ...     State(
            ...         "red circle is above square", heads=("L0H1", "L1H0"), words=(3,)
            ...     ).interventions(model)
            ... )
            2
        """
        steps, tokens = slice(self.first, self.last + 1), list(self.words) or None
        values = self._values(model)
        found = []
        for layer, heads in self._by_layer():
            site = f"blocks.{layer}.cross_attn.hook_"
            if self.action == "mask":
                # a row without any word has no softmax, so all words cannot be masked: nothing is
                # written instead
                masked = Intervention(f"{site}pattern", heads, tokens, steps, action="knockout")
                found.append(
                    masked
                    if tokens
                    else Intervention(f"{site}z", heads, None, steps, action="zero")
                )
            elif self.action == "scale":
                found.append(
                    Intervention(f"{site}z", heads, None, steps, action=Scale(self.factor))
                )
            elif self.action == "freeze":
                found.append(
                    Intervention(f"{site}pattern", heads, None, steps, action=Replace(values))
                )
            else:
                found += [
                    Intervention(f"{site}{part}", heads, tokens, steps, action=Replace(values))
                    for part in "kv"
                ]
        return found

    def draw(self, model: HookedTextToImage) -> Float[Tensor, "1 3 height width"]:
        """The image with the edit.

        Example:
            >>> State("red circle is above square", num_steps=1, last=0).draw(model).shape
            torch.Size([1, 3, 128, 128])
        """
        edits = self.interventions(model)
        hooks = [
            hook
            for edit in edits
            for hook in edit.hooks(model, self.prompt, num_steps=self.num_steps)
        ]
        with torch.no_grad():
            return model.run_with_hooks(
                self.prompt, seed=self.seed, num_steps=self.num_steps, fwd_hooks=hooks
            )

    def _edits_of(self, layer: int, heads: list[int]) -> list[str]:
        """Arguments of the interventions at one layer, as Python."""
        steps, tokens = f"slice({self.first}, {self.last + 1})", repr(list(self.words) or None)
        site = f"blocks.{layer}.cross_attn.hook_"
        if self.action == "mask" and self.words:
            return [f'"{site}pattern", {heads}, {tokens}, {steps}, action="knockout"']
        elif self.action == "mask":
            return [f'"{site}z", {heads}, None, {steps}, action="zero"']
        elif self.action == "scale":
            return [f'"{site}z", {heads}, None, {steps}, action=Scale({self.factor!r})']
        elif self.action == "freeze":
            return [f'"{site}pattern", {heads}, None, {steps}, action=Replace(values)']
        else:
            return [
                f'"{site}{part}", {heads}, {tokens}, {steps}, action=Replace(values)'
                for part in "kv"
            ]

    def snippet(self, model_name: str) -> str:
        """Python that draws the same image with the library's own calls, as `image`.

        Example:
            >>> print(
            ...     State("red circle", heads=("L0H1",), words=(0,))
            ...     .snippet("rte-nano")
            ...     .splitlines()[-1]
            ... )
            image = model.run_with_hooks(prompt, seed=0, num_steps=14, fwd_hooks=hooks)
        """
        lines = [
            "from dit_lens import Intervention, Replace, Scale",
            "from hooked_models import HookedTextToImage",
            "",
            f"model = HookedTextToImage.from_pretrained({model_name!r})",
            f"prompt = {self.prompt!r}",
        ]
        if self.action == "exchange" and self.heads:
            lines += [
                f"other = {self.other!r}",
                'parts = [f"blocks.{layer}.cross_attn.hook_{part}" '
                'for layer in range(model.cfg.n_layers) for part in "kv"]',
                'names = [f"steps.0.cond.{part}" for part in parts]',
                "_, cache = model.run_with_cache(other, seed=0, num_steps=1, names_filter=names)",
                'values = {part: cache[f"steps.0.cond.{part}"] for part in parts}',
            ]
        if self.action == "freeze" and self.heads:
            layers = [layer for layer, _ in self._by_layer()]
            lines += [
                f'parts = [f"blocks.{{layer}}.cross_attn.hook_pattern" for layer in {layers}]',
                f'names = [f"steps.{self.first}.cond.{{part}}" for part in parts]',
                f"_, cache = model.run_with_cache(prompt, seed={self.seed}, "
                f"num_steps={self.num_steps}, names_filter=names)",
                f'values = {{part: cache[f"steps.{self.first}.cond.{{part}}"] for part in parts}}',
            ]
        lines.append("edits = [")
        for layer, heads in self._by_layer():
            lines += [f"    Intervention({edit})," for edit in self._edits_of(layer, heads)]
        lines += [
            "]",
            "hooks = [hook for edit in edits for hook in edit.hooks(model, prompt, "
            f"num_steps={self.num_steps})]",
            f"image = model.run_with_hooks(prompt, seed={self.seed}, num_steps={self.num_steps}, "
            "fwd_hooks=hooks)",
        ]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """The fields.

        Example:
            >>> State.read(State("red circle").as_json()) == State("red circle")
            True
        """
        return asdict(self)

    def _by_layer(self) -> list[tuple[int, list[int]]]:
        places = sorted({parse_head(head) for head in self.heads})
        return [
            (layer, [head for _, head in some])
            for layer, some in groupby(places, key=lambda place: place[0])
        ]

    def _values(self, model: HookedTextToImage) -> dict[str, Tensor]:
        """By site: keys and values of the other prompt, the same at every step; or patterns at the
        first step of the edit.
        """
        if not self.heads or self.action not in ("exchange", "freeze"):
            return {}
        if self.action == "freeze":
            parts = [f"blocks.{layer}.cross_attn.hook_pattern" for layer, _ in self._by_layer()]
            names = [f"steps.{self.first}.cond.{part}" for part in parts]
            with torch.no_grad():
                _, cache = model.run_with_cache(
                    self.prompt, seed=self.seed, num_steps=self.num_steps, names_filter=names
                )
            return {part: cache[name] for part, name in zip(parts, names, strict=True)}
        n, m = (model.to_tokens(text).shape[1] for text in (self.prompt, self.other))
        if n != m:
            raise ValueError(
                f"{self.other!r} has {m} tokens and {self.prompt!r} has {n}: exchange prompts of "
                "equal length."
            )
        parts = [
            f"blocks.{layer}.cross_attn.hook_{part}"
            for layer in range(model.cfg.n_layers)
            for part in "kv"
        ]
        names = [f"steps.0.cond.{part}" for part in parts]
        with torch.no_grad():
            _, cache = model.run_with_cache(self.other, seed=0, num_steps=1, names_filter=names)
        return {part: cache[name] for part, name in zip(parts, names, strict=True)}
