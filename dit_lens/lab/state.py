"""One view of the lab: a prompt, an edit of some heads, and the Python that repeats it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
class _Edit:
    """An action on the attention of a layer, of which interventions and their Python are made."""

    parts: tuple[str, ...]
    """Hooks of the attention that are edited."""
    action: Literal["knockout", "zero", "scale", "replace"]
    on_words: bool = False
    """At the chosen positions of the text, or everywhere."""
    reads: Literal["", "prompt", "other"] = ""
    """Prompt whose run has the values that replace."""
    each_step: bool = False
    """Replaced at each step by that step's values, or at all by those of the first."""

    def made(self, factor: float, value: Tensor | None) -> Any:
        """Action of an `Intervention`."""
        if self.action == "replace":
            assert value is not None
            return Replace(value)
        return Scale(factor) if self.action == "scale" else self.action

    def code(self, factor: float, value: str) -> str:
        """The same as Python."""
        actions = {"replace": f"Replace({value})", "scale": f"Scale({factor!r})"}
        return actions.get(self.action, repr(self.action))


EDITS = {
    "mask": _Edit(("pattern",), "knockout", on_words=True),
    "silence": _Edit(("z",), "zero"),
    "scale": _Edit(("z",), "scale"),
    "freeze": _Edit(("pattern",), "replace", reads="prompt"),
    "exchange": _Edit(("k", "v"), "replace", on_words=True, reads="other", each_step=True),
}
"""The actions of the page; "silence" is a mask of all words."""


@dataclass(frozen=True)
class State:
    """Prompts, seed and edits of the page, as its address has them.

    Args:
        prompt: text to draw.
        other: text whose keys and values are read in an exchange; as many tokens as `prompt`.
        seed: of the noise.
        num_steps: denoising steps.
        action: "mask" hides words from heads, "exchange" lets heads read the other prompt, "scale"
            multiplies the heads' output, "freeze" keeps their attention of the first step of the
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
        edit, tokens, values = self._edit(model), self._tokens(model), self._values(model)
        return [
            Intervention(
                f"{site}{part}",
                heads,
                tokens if edit.on_words else None,
                step,
                action=edit.made(self.factor, values.get(key)),
            )
            for site, heads, part, step, key in self._edited(model)
        ]

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
            model: the open model, in which heads and words are found.
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
        edit, tokens, run = self._edit(model), self._tokens(model), f"num_steps={self.num_steps}"
        every = f"({self.first}, {self.last + 1})"
        steps = f"range{every}" if edit.each_step else f"[slice{every}]"
        loop = f"for step in {steps} for part in {edit.parts!r}"
        key = f'f"steps.{"{step}" if edit.each_step else self.first}.cond.{{site}}{{part}}"'
        at = repr(tokens) if self.words or not tokens else f"list(range({len(tokens)}))"
        action = edit.code(self.factor, f"cache[{key}]")
        lines = [
            "from dit_lens import Intervention, Replace, Scale",
            "from hooked_models import HookedTextToImage",
            "",
            f"model = HookedTextToImage.from_pretrained({name!r})",
            *([f"model.options = {model.options!r}"] if getattr(model, "options", None) else ()),
            f"prompt = {self.prompt!r}",
            f"places = {self._places(model)!r}",
        ]
        if edit.reads == "other":
            lines.append(f"other = {self.other!r}")
        if edit.reads and self.heads:
            lines += [
                f"names = [{key} for site, _ in places {loop}]",
                f"_, cache = model.run_with_cache({edit.reads}, seed={self.seed}, {run}, "
                "names_filter=names)",
            ]
        lines += [
            "edits = [",
            f'    Intervention(f"{{site}}{{part}}", heads, {at if edit.on_words else None}, step, '
            f"action={action})",
            f"    for site, heads in places {loop}",
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
        """Positions of the text that are masked or exchanged.

        None for all keys, where all of them are text.
        """
        if self.words or all(name == "cross_attn" for name in text_attentions(model.dit).values()):
            return list(self.words) or None
        return list(range(len(model.encoded_texts([self.prompt])[0].ids)))

    def _edit(self, model: HookedTextToImage) -> _Edit:
        """The action; a mask of all words silences, since a row without keys has no softmax."""
        nothing_left = self.action == "mask" and not self._tokens(model)
        return EDITS["silence" if nothing_left else self.action]

    def _edited(
        self, model: HookedTextToImage
    ) -> list[tuple[str, list[int], str, int | slice, str]]:
        """Edited tensors.

        For each, the start of its name, heads, part, steps, and the full name of the one that
        replaces it.
        """
        edit = self._edit(model)
        steps: Iterable[int | slice] = [slice(self.first, self.last + 1)]
        if edit.each_step:
            steps = range(self.first, self.last + 1)
        return [
            (site, heads, part, step, f"steps.{at}.cond.{site}{part}")
            for site, heads in self._places(model)
            for step in steps
            for at in [step if edit.each_step else self.first]
            for part in edit.parts
        ]

    def _values(self, model: HookedTextToImage) -> Mapping[str, Tensor]:
        """Full name → the values that replace: of the other prompt, or of the first step."""
        reads, names = self._edit(model).reads, [key for *_, key in self._edited(model)]
        if not reads or not names:
            return {}
        text = getattr(self, reads)
        n, m = (len(model.encoded_texts([each])[0].ids) for each in (self.prompt, text))
        if n != m:
            raise ValueError(
                f"{self.other!r} has {m} tokens and {self.prompt!r} has {n}: exchange prompts of "
                "equal length."
            )
        with torch.no_grad():
            _, cache = model.run_with_cache(
                text, seed=self.seed, num_steps=self.num_steps, names_filter=names
            )
        return {name: cache[name] for name in names}
