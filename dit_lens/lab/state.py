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
from ..readout.heat_maps import text_attentions

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
        words: positions of the text that are masked or exchanged; all of them where none is given.
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
                has no such head that reads the text.

        Example:
            >>> len(
            ...     State(
            ...         "red circle is above square", heads=("L0H1", "L1H0"), words=(3,)
            ...     ).interventions(model)
            ... )
            2
        """
        tokens, steps = self._tokens(model), range(self.first, self.last + 1)
        every, values = slice(steps.start, steps.stop), self._values(model)
        found = []
        edits: list[tuple[str, list[int] | None, Any, Any]]
        for site, heads in self._places(model):
            match self.action:
                case "mask" if tokens:
                    edits = [("pattern", tokens, every, "knockout")]
                case "mask":  # a row without any word has no softmax: nothing is written instead
                    edits = [("z", None, every, "zero")]
                case "scale":
                    edits = [("z", None, every, Scale(self.factor))]
                case "freeze":
                    first = values[f"steps.{self.first}.cond.{site}pattern"]
                    edits = [("pattern", None, every, Replace(first))]
                case _:
                    edits = [
                        (part, tokens, step, Replace(values[f"steps.{step}.cond.{site}{part}"]))
                        for step in steps
                        for part in "kv"
                    ]
            found += [
                Intervention(f"{site}{hook}", heads, at, when, action=action)
                for hook, at, when, action in edits
            ]
        return found

    def draw(self, model: HookedTextToImage) -> Float[Tensor, "1 3 height width"]:
        """The image with the edit.

        Example:
            >>> State("red circle is above square", num_steps=1, last=0).draw(model).shape
            torch.Size([1, 3, 128, 128])
        """
        hooks = [
            hook
            for edit in self.interventions(model)
            for hook in edit.hooks(model, self.prompt, num_steps=self.num_steps)
        ]
        with torch.no_grad():
            return model.run_with_hooks(
                self.prompt, seed=self.seed, num_steps=self.num_steps, fwd_hooks=hooks
            )

    def snippet(self, model: HookedTextToImage, name: str) -> str:
        """Python that draws the same image with the library's own calls, as `image`.

        Args:
            name: by which `from_pretrained` opens the model.

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-nano")
            >>> print(
            ...     State("red circle", heads=("L0H1",), words=(0,))
            ...     .snippet(model, "rte-nano")
            ...     .splitlines()[-1]
            ... )
            image = model.run_with_hooks(prompt, seed=0, num_steps=14, fwd_hooks=hooks)
        """
        tokens = self._tokens(model)
        at = repr(tokens) if self.words or not tokens else f"list(range({len(tokens)}))"
        every, run = f"slice({self.first}, {self.last + 1})", f"num_steps={self.num_steps}"
        steps, kept = "", None
        match self.action:
            case "mask" if tokens:
                edit = f'f"{{site}}pattern", heads, {at}, {every}, action="knockout"'
            case "mask":
                edit = f'f"{{site}}z", heads, None, {every}, action="zero"'
            case "scale":
                edit = f'f"{{site}}z", heads, None, {every}, action=Scale({self.factor!r})'
            case "freeze":
                kept = "prompt", f'f"steps.{self.first}.cond.{{site}}pattern"'
                edit = f'f"{{site}}pattern", heads, None, {every}, action=Replace(cache[{kept[1]}])'
            case _:
                kept = "other", 'f"steps.{step}.cond.{site}{part}"'
                steps = f' for step in range({self.first}, {self.last + 1}) for part in "kv"'
                edit = f'f"{{site}}{{part}}", heads, {at}, step, action=Replace(cache[{kept[1]}])'
        lines = [
            "from dit_lens import Intervention, Replace, Scale",
            "from hooked_models import HookedTextToImage",
            "",
            f"model = HookedTextToImage.from_pretrained({name!r})",
            *([f"model.options = {model.options!r}"] if getattr(model, "options", None) else ()),
            f"prompt = {self.prompt!r}",
            f"places = {self._places(model)!r}",
        ]
        if self.action == "exchange":
            lines.append(f"other = {self.other!r}")
        if kept and self.heads:
            text, names = kept
            lines += [
                f"names = [{names} for site, _ in places{steps}]",
                f"_, cache = model.run_with_cache({text}, seed={self.seed}, {run}, "
                "names_filter=names)",
            ]
        lines += [
            "edits = [",
            f"    Intervention({edit})",
            f"    for site, heads in places{steps}",
            "]",
            f"hooks = [hook for edit in edits for hook in edit.hooks(model, prompt, {run})]",
            f"image = model.run_with_hooks(prompt, seed={self.seed}, {run}, fwd_hooks=hooks)",
        ]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """The fields.

        Example:
            >>> State.read(State("red circle").as_json()) == State("red circle")
            True
        """
        return asdict(self)

    def _places(self, model: HookedTextToImage) -> list[tuple[str, list[int]]]:
        """Start of the hooks' names, and heads, of each layer that is edited."""
        attentions = text_attentions(model.dit)
        heads = sorted({parse_head(head) for head in self.heads})
        for layer, head in heads:
            if layer not in attentions or head >= model.cfg.n_heads:
                raise ValueError(f"There is no head L{layer}H{head} that reads the text.")
        return [
            (f"blocks.{layer}.{attentions[layer]}.hook_", [head for _, head in some])
            for layer, some in groupby(heads, key=lambda place: place[0])
        ]

    def _tokens(self, model: HookedTextToImage) -> list[int] | None:
        """Positions of the text that are masked or exchanged; None for all keys, where all of them
        are text.
        """
        if self.words or all(name == "cross_attn" for name in text_attentions(model.dit).values()):
            return list(self.words) or None
        return list(range(len(model.encoded_texts([self.prompt])[0].ids)))

    def _values(self, model: HookedTextToImage) -> Mapping[str, Tensor]:
        """Full name → keys and values of the other prompt, or patterns of the first step."""
        places = self._places(model)
        if self.action == "freeze":
            text, names = (
                self.prompt,
                [f"steps.{self.first}.cond.{site}pattern" for site, _ in places],
            )
        elif self.action == "exchange":
            text, names = (
                self.other,
                [
                    f"steps.{step}.cond.{site}{part}"
                    for step in range(self.first, self.last + 1)
                    for site, _ in places
                    for part in "kv"
                ],
            )
        else:
            return {}
        if not names:
            return {}
        n, m = (len(model.encoded_texts([each])[0].ids) for each in (self.prompt, text))
        if n != m:
            raise ValueError(
                f"{self.other!r} has {m} tokens and {self.prompt!r} has {n}: exchange prompts of "
                "equal length."
            )
        with torch.no_grad():
            return model.run_with_cache(
                text, seed=self.seed, num_steps=self.num_steps, names_filter=names
            )[1]
